"""Sample grids drawn while a run goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from featcache.errors import UserError, WeightsUnavailable
from trainer.config import RunConfig
from trainer.log import RunLog
from trainer.sample import class_grid, load_decoder, save_png


class GridMaker:
    """Draws grids from the averaged weights; gives up, once and aloud, where the VAE is not to be had."""

    def __init__(self, config: RunConfig, cache: Any, warn: Callable[[str], None]) -> None:
        self._config, self._cache, self._warn = config, cache, warn
        self._broken = False
        self._vae: Any = None

    def draw(self, ema: Any, run: Path, step: int, log: RunLog) -> None:
        """One row a class to ``samples/step_N.png`` and TensorBoard. The decoder leaves the GPU again afterwards."""
        if self._broken:
            return
        try:
            if self._vae is None:
                moments = self._cache.manifest.features["vae/moments"].provenance
                self._vae = load_decoder(self._cache.manifest.dataset.vae, moments, self._config.weights_dir)
        except WeightsUnavailable as error:
            self._broken = True
            self._warn(f"no sample grids: {error.what}")
            return
        self._vae.to(next(ema.parameters()).device)
        pixels = class_grid(ema, self._vae, path=self._config.path, seed=self._config.seed)
        self._vae.to("cpu")
        try:
            save_png(pixels, run / "samples" / f"step_{step:07d}.png")
        except UserError as error:  # a picture is no reason to end a run; a disk that is full the log will find, too
            self._warn(f"no sample grid at step {step}: {error.what}")
            return
        log.image("samples", pixels, step)
