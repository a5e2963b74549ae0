"""Sample grids drawn while a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch.nn.modules.module import register_module_forward_pre_hook

from featcache.encoders.vae import LatentDecoder
from featcache.errors import UserError, first_line
from featcache.inspect import find_captions
from featcache.sources.embedded import recorded_embedded
from featcache.store import files
from trainer.diffusion.transport import Transport, build_transport
from trainer.runs.cache import sample_keys
from trainer.runs.config import RunConfig
from trainer.runs.log import RunLog
from trainer.runs.normalization import of_run
from trainer.sampling.draw import GRID_ROWS, class_grid, condition_grid, load_decoder, save_png
from trainer.sampling.grid import named_rows
from trainer.stopping import Stop
from trainer.training.conditions import build_condition, cached_conditions

if TYPE_CHECKING:
    from featcache.read.reader import Cache
    from trainer.models import Transformer


class GridMaker:
    """Draws grids from the averaged weights. Whatever goes wrong is said, and ends no run: a picture is not worth one.

    Gives up, once and aloud, where the VAE is not to be had.
    """

    def __init__(self, config: RunConfig, cache: Cache, run: Path, warn: Callable[[str], None]) -> None:
        self._config, self._cache, self._run, self._warn = config, cache, run, warn
        self._broken = False
        self._decoder: LatentDecoder | None = None
        self._names: list[str] = []  # of the rows of a model that takes text

    def draw(self, ema: Transformer, step: int, log: RunLog, told: Stop) -> None:
        """One row per class to `samples/step_N.png` and TensorBoard; of a model that takes text, one row for each of the
        first images' captions, with the caption under it, or the image's key where the cache cannot tell it. The decoder leaves the GPU again afterwards. Given up when the run is
        `told` to stop."""
        if self._broken:
            return
        try:
            self._decoder = self._decoder or self._load()
        except Exception as error:
            self._broken = True
            self._warn(f"no sample grids: {what_happened(error)}")
            return
        device = next(ema.parameters()).device
        transport = build_transport(ema.cfg.family, device=device, **self._config.flow)
        try:
            with given_up_when(told):
                pixels = self._pixels(ema, self._decoder.to(device), transport)
            save_png(pixels, files.inside(self._run, "samples") / f"step_{step:07d}.png", rows=self._names)
        except Exception as error:  # memory, say; a disk that is full the log will find, too
            self._warn(f"no sample grid at step {step}: {what_happened(error)}")
            return
        finally:
            self._decoder.to("cpu")
        log.image("samples", pixels, step)

    def _pixels(self, ema: Transformer, decoder: LatentDecoder, transport: Transport) -> np.ndarray:
        if ema.cfg.text is None:
            return class_grid(ema, decoder, transport=transport, seed=self._config.seed)
        first = np.arange(min(GRID_ROWS, len(self._cache)))
        rows = cached_conditions(build_condition(ema.cfg, self._cache), self._cache, first).numpy()
        pixels = condition_grid(ema, decoder, rows, transport=transport, seed=self._config.seed)
        tiles = pixels.reshape(len(first), -1, *pixels.shape[1:])  # [rows, R, columns * R, 3]
        self._names = self._names or _captions(self._cache, first)
        return named_rows(tiles, self._names)

    def _load(self) -> LatentDecoder:
        return decoder_of(self._run, self._config, self._cache)


def _captions(cache: Cache, indices: np.ndarray) -> list[str]:
    """What stands under the rows of the samples `indices` [n]: of an embedded set their first captions, `''` for none; of
    others, whose images would have to be found first, the images' keys."""
    embedded = recorded_embedded(cache.manifest.dataset.source) is not None
    found = find_captions(cache, [int(i) for i in indices]) if embedded else None
    return sample_keys(cache, indices) if found is None else [captions[0] if captions else "''" for captions in found]


class GivenUp(UserError):
    """The run was told to stop."""


@contextmanager
def given_up_when(told: Stop) -> Iterator[None]:
    """Raises `GivenUp` in the next call of any module in the block once the run is `told` to stop."""

    def check(*_: object) -> None:
        if told.number:
            raise GivenUp("the run was told to stop")

    watched = register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        watched.remove()


def decoder_of(run: Path, config: RunConfig, cache: Cache) -> LatentDecoder:
    """What turns the latents of a run under way into pixels, on the CPU. Raises as `load_decoder`."""
    dataset, moments = cache.manifest.dataset, cache.manifest.features["vae/moments"]
    assert dataset.vae is not None, "a run trains on latents"
    normalization = of_run(run, config, dataset.vae)
    return load_decoder(dataset.vae, moments.provenance, config.weights_dir, normalization)


def what_happened(error: Exception) -> str:
    """An error in one line, for what ends no run."""
    return error.what if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
