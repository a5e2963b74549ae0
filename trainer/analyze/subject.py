"""One checkpoint of a run made ready to be looked into: model, alignment, cached features, samples and their noise.

Everything is computed in float32. A sample's noise, posterior draw and times are functions of (seed, its index in the
cache) alone, so diagnostics, checkpoints and runs see the same noisy images.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from featcache.codecs import FeatureCodec
from featcache.errors import UserError
from featcache.inspect import find_source, pixels_of, read_feature
from featcache.progress import QUIET, Progress
from featcache.sources.base import Source
from trainer.align.ahpa import Ahpa
from trainer.align.base import AlignInputs, Alignment
from trainer.align.combined import Combined
from trainer.align.features import encoder_layers
from trainer.align.heads import to_grid
from trainer.align.repa import DEPTHS
from trainer.align.sra2 import patchify
from trainer.analyze.config import AnalyzeConfig
from trainer.analyze.result import NotApplicable
from trainer.diffusion.noise import sample_noise
from trainer.diffusion.streams import Layout
from trainer.diffusion.transport import FlowOptions, Transport, build_transport
from trainer.models import ModelOutput, Transformer, build_model, load_weights
from trainer.runs import checkpoint
from trainer.runs import folder as runs
from trainer.runs.cache import cache_of_run
from trainer.runs.config import RunConfig
from trainer.runs.normalization import Normalization, of_run, scalar, streams_of_run
from trainer.sampling import draw as sample
from trainer.training.conditions import build_condition
from trainer.training.objective import Objective, ema_decay_at, sample_posterior
from trainer.training.state import backbone_info, build_alignment, build_streams
from trainer.training.streams import Stream

_POSTERIOR, _NOISE, _TIME, _ALIGN, _BESIDE = range(5)  # streams of the samples' random numbers
MIXTURE = "router's mixture"
FEWEST_SAMPLES = 8
_KEEP_BYTES = 1 << 30  # pooled states below this size are kept between diagnostics


class Subject:
    """See the module.

    gradients: for diagnostics of gradients: the true labels, as in a training step without label dropout, and where
        `options.weights` is `auto` the trained weights (of an imported run its average). Otherwise `options.labels`.
    progress: is told of each sample that is looked at.
    """

    def __init__(
        self,
        run: Path,
        options: AnalyzeConfig,
        *,
        device: str,
        gradients: bool,
        step: int | None = None,
        progress: Progress = QUIET,
    ) -> None:
        config = runs.load_config(run)
        self.cache, self.progress = cache_of_run(run), progress
        at, folder = checkpoint.find_checkpoint(run, step if step is not None else options.step)
        weights = options.weights
        if checkpoint.is_imported(folder):
            weights = "ema"  # there are no others
        elif weights == "auto":
            weights = "model" if gradients or initial_share(config, at) >= 0.1 else "ema"
        loaded = sample.load_run(run, step=at, device=device, weights=weights, snapshots=False)
        self.run, self.step, self.config, self.options = run, loaded.step, loaded.config, options
        self.device, self.weights = device, weights
        self.model = loaded.model
        self.cfg = loaded.model.cfg
        if len(self.cache) < FEWEST_SAMPLES:
            raise UserError(
                f"{self.cache.path} holds {len(self.cache)} images, and diagnostics need at least {FEWEST_SAMPLES}",
                remedy="Analyse a run that was trained on more.",
            )
        self.info = backbone_info(loaded.config.model, self.cfg)
        self.alignment = self._load_alignment()
        self._teacher: Transformer | None = None
        self.block = options.block or self._default_block()
        if self.block > self.cfg.depth:
            raise UserError(
                f"block {self.block} was asked for, and {self.config.model} has {self.cfg.depth} blocks",
                remedy=f"Choose 1 to {self.cfg.depth}.",
            )
        count = options.samples or (10_000 if device.startswith("cuda") else 512)
        self.indices = choose(len(self.cache), count, seed=options.seed)
        # Diagnostics of gradients see what training sees; elsewhere a given label would tell the class.
        self.labelled = gradients or options.labels == "given"
        self.labels = torch.from_numpy(self.cache.labels()[self.indices].astype(np.int64)).to(device)
        self.class_names = tuple(self.cache.manifest.dataset.class_names)
        self.transport = self._build_transport()
        self._layout = Layout(cfg=self.cfg)
        self._streams = [s.to(device) for s in self._build_streams()]
        self._condition = build_condition(self.cfg, self.cache).to(device)
        self._pooled: dict[float, Tensor] = {}

    def _build_transport(self) -> Transport:
        """The run's, but at the times that are asked for: neither drawn as in training nor shifted."""
        as_given: FlowOptions = {"time_sampling": "uniform", "time_mean": 0.0, "time_std": 1.0, "time_shift": 1.0}
        return build_transport(self.cfg.family, device=self.device, **(self.config.flow | as_given))

    def _load_alignment(self) -> Alignment | None:
        with warnings.catch_warnings():  # heads that warn of random weights get the trained ones below
            warnings.simplefilter("ignore")
            alignment = build_alignment(self.config, self.cache, self.cfg, calibrate=False)
        if alignment is None:
            return None
        _, path = checkpoint.find_checkpoint(self.run, self.step)
        checkpoint.load_module(alignment, path, "alignment")
        return alignment.to(self.device).eval().requires_grad_(False)

    def _build_streams(self) -> list[Stream]:
        return build_streams(self.config, self.cache, self.cfg, streams_of_run(self.run, self.config))

    def _default_block(self) -> int:
        if self.alignment is not None and self.alignment.taps:
            return self.alignment.taps[0]
        return max(1, round(DEPTHS["B"] / 12 * self.cfg.depth))

    @property
    def methods(self) -> dict[str, Alignment]:
        """The run's methods by name; empty without alignment."""
        if isinstance(self.alignment, Combined):
            return self.alignment.parts
        return {} if self.alignment is None else {self.config.method: self.alignment}

    @functools.cached_property
    def source(self) -> Source | None:
        """The cache's images; None where they are not at hand.

        Raises:
            UserError: `options.data` holds other images.
        """
        return find_source(self.cache, self.options.data)

    @property
    def depth(self) -> int:
        return self.cfg.depth

    @property
    def token_features(self) -> list[str]:
        """Cached encoder layers, e.g. `tiny@5`: by encoder, then shallow to deep."""
        return [
            f"{encoder}@{layer}"
            for encoder, layers in encoder_layers(self.cache.manifest.features).items()
            for layer in layers
        ]

    @property
    def levels(self) -> list[str]:
        """Cached VAE groups, e.g. `vae/G3`."""
        return sorted(n for n in self.cache.manifest.features if n.startswith("vae/G"))

    def layers(self, level: str) -> list[str]:
        """The encoder layers in a cached VAE group, shallow to deep, e.g. `vae/G3/down2.res0`."""
        spec = self.cache.manifest.features[level]
        names = spec.provenance.get("layers") or range(spec.shape[0])
        return [f"{level}/{name}" for name in names]

    def chunks(self, count: int | None = None, start: int = 0, *, size: int | None = None) -> Iterator[slice]:
        """Slices of the chosen samples from `start`, `count` in all (None: the rest), `size` (None: the option
        `batch_size`) at once."""
        stop = len(self.indices) if count is None else min(start + count, len(self.indices))
        size = size or self.options.batch_size
        for first in range(start, stop, size):
            rows = slice(first, min(first + size, stop))
            yield rows
            self.progress.update(rows.stop - rows.start)

    def read(self, name: str, rows: slice) -> Tensor:
        """One cached feature, decoded: float32 [b, *shape]; of one layer of a VAE group (`layers`): [b, N, C]."""
        level, _, _ = name.rpartition("/")
        if level in self.levels:
            return self.read(level, rows)[:, self.layers(level).index(name)]
        return torch.from_numpy(read_feature(self.cache, name, self.indices[rows].tolist())).to(self.device)

    def _normal(self, rows: slice, stream: int, shape: Sequence[int]) -> Tensor:
        return sample_noise(self.options.seed, self.indices[rows].tolist(), shape, stream, device=self.device)

    @property
    def _normalization(self) -> Normalization:
        vae = self.cache.manifest.dataset.vae
        assert vae is not None, "a run trains on latents"
        return of_run(self.run, self.config, vae) or scalar(vae)

    def conditioning(self, rows: slice) -> Tensor:
        """What the model is given, the null condition unless `labelled`: labels int64 [b], or text rows [b, T, W], of each
        image's first caption."""
        dropped = torch.full((rows.stop - rows.start,), not self.labelled, device=self.device)
        condition: Tensor = self._condition(self.stored(self._condition.reads, rows), dropped)
        return condition

    def latent(self, rows: slice) -> Tensor:
        """Clean, scaled latents drawn from the posterior, [b, C, h, w]."""
        moments, draw = self.read("vae/moments", rows), self.posterior(rows)
        norm = self._normalization
        scale, shift = (v.to(moments) if isinstance(v, Tensor) else v for v in (norm.scale, norm.shift))
        return sample_posterior(moments, draw, scale=scale, shift=shift)

    def posterior(self, rows: slice) -> Tensor:
        """The normal draws behind `latent`, [b, C, h, w]."""
        return self._normal(rows, _POSTERIOR, self.cfg.latent_shape)

    def noise(self, rows: slice) -> Tensor:
        return self._normal(rows, _NOISE, self.cfg.latent_shape)

    def uniform(self, rows: slice, stream: int = _ALIGN) -> Tensor:
        """U(0, 1), [b]."""
        uniform: Tensor = torch.special.ndtr(self._normal(rows, stream, (1,))[:, 0])
        return uniform

    def times_in_bin(self, rows: slice, index: int, bins: int) -> Tensor:
        """A time in bin `index` of [0, 1] for each sample, the same place within every bin. [b]."""
        return (index + self.uniform(rows, _TIME)) / bins

    def stream_noise(self, rows: slice) -> dict[str, Tensor]:
        """Of what is diffused beside the latents, by feature."""
        shapes = self._layout.shapes[1:]
        return {
            stream.name: self._normal(rows, _BESIDE + k, shape)
            for k, (stream, shape) in enumerate(zip(self._streams, shapes))
        }

    def _data(self, rows: slice) -> tuple[list[Tensor], list[Tensor]]:
        """The latents and all streams without noise, and the noise of each."""
        streams = [stream.clean(self.stored([stream.name], rows)) for stream in self._streams]
        return [self.latent(rows), *streams], [self.noise(rows), *self.stream_noise(rows).values()]

    def _call(
        self,
        model: Transformer,
        data: tuple[list[Tensor], list[Tensor]],
        t: Tensor,
        condition: Tensor,
        *,
        taps: Sequence[int],
        stop_after: int,
    ) -> ModelOutput:
        """`model` on data made noisy at t in [0, 1]."""
        noisy = [self.transport.noisy(clean, noise, t) for clean, noise in zip(*data)]
        x, own = self._layout.inputs(noisy)
        times = self.transport.model_time(t)
        output: ModelOutput = model(x, times, condition, **own, taps=taps, stop_after=stop_after)
        return output

    @torch.no_grad()
    def hidden(self, rows: slice, t: Tensor | float, depths: Sequence[int]) -> Mapping[int, Tensor]:
        """Hidden states [b, N, D] after the blocks `depths`."""
        return self.state(rows, t, depths).hidden

    @torch.no_grad()
    def state(
        self, rows: slice, t: Tensor | float, depths: Sequence[int] | None = None, *, targets: bool = False
    ) -> AlignInputs:
        """Everything an alignment loss may look at (`targets`: the features it reads, too)."""
        condition = self.conditioning(rows)
        if not isinstance(t, Tensor):
            t = torch.full((len(condition),), t, device=self.device)
        t = self.transport.times(t)  # of DDPM the time of a step, as in training
        data = self._data(rows)
        taps = self.alignment.taps if depths is None and self.alignment is not None else tuple(depths or ())
        output = self._call(self.model, data, t, condition, taps=taps, stop_after=max(taps, default=1))
        reads = self.alignment.reads if targets and self.alignment is not None else ()
        return AlignInputs(
            hidden=output.hidden,
            t=t,
            targets={name: self.read(name, rows) for name in reads},
            time_embedding=output.time_embedding,
            latent=data[0][0],
            uniform=self.uniform(rows),
            teacher=self._teach(data, condition),
            stream_hidden=self._layout.hidden(output),
        )

    def tokens(self, state: AlignInputs, depths: Sequence[int]) -> dict[int, Tensor]:
        """What the blocks `depths` gave, depth -> the tokens of all streams, then the image's: [b, T + N, D]."""
        before = [state.stream_hidden[stream.name] for stream in self.cfg.own_streams]
        return {d: torch.cat([*(hidden[d] for hidden in before), state.hidden[d]], dim=1) for d in depths}

    def split_tokens(self, tokens: Mapping[int, Tensor]) -> tuple[dict[int, Tensor], dict[str, dict[int, Tensor]]]:
        """The inverse of `tokens`: `hidden` and `stream_hidden` of `AlignInputs`."""
        own = self.cfg.own_streams
        hidden: dict[int, Tensor] = {}
        of_streams: dict[str, dict[int, Tensor]] = {stream.name: {} for stream in own}
        for depth, whole in tokens.items():
            *before, hidden[depth] = whole.split([*(stream.tokens for stream in own), self.cfg.tokens], dim=1)
            for stream, part in zip(own, before):
                of_streams[stream.name][depth] = part
        return hidden, of_streams

    def _teach(
        self, data: tuple[list[Tensor], list[Tensor]], condition: Tensor
    ) -> Callable[[Tensor, int], Tensor] | None:
        if self.alignment is None or not self.alignment.needs_teacher:
            return None
        teacher = self._ema()

        def hidden(t: Tensor, depth: int) -> Tensor:
            with torch.no_grad():
                return self._call(teacher, data, t, condition, taps=(depth,), stop_after=depth).hidden[depth]

        return hidden

    def _ema(self) -> Transformer:
        if self._teacher is None:
            _, path = checkpoint.find_checkpoint(self.run, self.step)
            model = build_model(self.cfg, device=self.device).eval().requires_grad_(False)
            load_weights(model, checkpoint.load_tensors(path, "ema", device=self.device), source=str(path))
            self._teacher = model
        return self._teacher

    @torch.no_grad()
    def block_input(self, rows: slice, t: Tensor) -> tuple[Tensor, Tensor]:
        """What block `self.block` is called with: tokens [b, T + N, D] and conditioning [b, D].

        Raises:
            NotApplicable: it is called with text tokens, too.
        """
        if self.cfg.text is not None:
            raise NotApplicable(
                f"{self.config.model}'s blocks take text beside the image's tokens, and this looks at blocks of one sequence",
                remedy="Leave --set wrt=block out: gradients with respect to hidden states are measured for any model.",
            )
        condition = self.conditioning(rows)
        with _input_of(self.model.blocks[self.block - 1]) as seen:
            self._call(self.model, self._data(rows), self.transport.times(t), condition, taps=(), stop_after=self.block)
        return seen[0], seen[1]

    def objective(self) -> Objective:
        """The run's training objective in float32 without label dropout; its `draws.time` is t itself."""
        reads = ("vae/moments", *(self.alignment.reads if self.alignment is not None else ()))
        return Objective(
            self.model,
            self.alignment,
            {name: FeatureCodec(self.cache.manifest.features[name]) for name in reads},
            streams=self._build_streams(),
            normalization=self._normalization,
            transport=self._build_transport(),
            label_dropout=0.0,
            autocast=None,
            teacher=self._ema() if self.alignment is not None and self.alignment.needs_teacher else None,
            condition=self._condition,
        ).to(self.device)

    def stored(self, names: Sequence[str], rows: slice) -> dict[str, Tensor]:
        """A batch of stored bytes as the objective takes it."""
        with self.cache.reader(list(names), single_view=True, single_caption=self.cfg.text is not None) as reader:
            out = reader.allocate(rows.stop - rows.start)
            reader.read(self.indices[rows], out)
        return {name: torch.from_numpy(array).to(self.device) for name, array in out.items()}

    def target(self, name: str, rows: slice, state: AlignInputs) -> Tensor:
        """A target on the backbone's token grid, [b, N, C].

        `latent`: the patchified clean latent. `vae/Gk`: the mean of the group's layers. `vae/Gk/<layer>` and
        `<encoder>@<layer>`: that layer. `router's mixture`: what AHPA's router makes of its levels at the state's t.
        """
        if name == "latent":
            return patchify(state.latent, self.cfg.patch_size)
        if name == MIXTURE:
            method = next(m for m in self.methods.values() if isinstance(m, Ahpa))
            return method.target(state, method.route(state, state.hidden[method.taps[0]]))
        tokens = self.read(name, rows)
        return to_grid(tokens.mean(dim=1) if tokens.ndim == 4 else tokens, self.info.grid)

    def target_names(self) -> list[str]:
        """All targets of `target` that this run and its cache have."""
        mixture = [MIXTURE] if any(isinstance(m, Ahpa) for m in self.methods.values()) else []
        layers = [layer for level in self.levels for layer in self.layers(level)]
        return [*self.levels, *layers, *self.token_features, "latent", *mixture]

    def shown_targets(self, most: int = 4) -> list[str]:
        """Cached features to show beside hidden states: those the run aligned with, the deepest encoder layer, the
        deepest VAE group; without repetition, at most `most`."""
        reads = self.alignment.reads if self.alignment is not None else ()
        cached = [*self.token_features, *self.levels]
        chosen = dict.fromkeys([*(n for n in reads if n in cached), *self.token_features[-1:], *self.levels[-1:]])
        return sorted(list(chosen)[:most], key=cached.index)

    @torch.no_grad()
    def pooled(self, t: float) -> Tensor:
        """Hidden states of all blocks averaged over tokens: float32 [depth, n, D]. Gathered once for all diagnostics
        where that takes less than 1 GiB."""
        if t in self._pooled:
            return self._pooled[t]
        depths = range(1, self.depth + 1)
        out = torch.empty(self.depth, len(self.indices), self.cfg.width, device=self.device)
        for rows in self.chunks():
            for depth, h in self.hidden(rows, t, depths).items():
                out[depth - 1, rows] = h.mean(dim=1)
        if out.numel() * 4 * len(self.options.times) < _KEEP_BYTES:
            self._pooled[t] = out
        return out

    def pooled_feature(self, name: str) -> Tensor:
        """A cached feature averaged over tokens (of a VAE group: its deepest layer), float32 [n, C]."""
        parts = []
        for rows in self.chunks():
            feature = self.read(name, rows)
            parts.append((feature[:, -1] if feature.ndim == 4 else feature).mean(dim=1))
        return torch.cat(parts)


@contextmanager
def _input_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the module is called with inside the block."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, given: seen.extend(given))
    try:
        yield seen
    finally:
        handle.remove()


def initial_share(config: RunConfig, step: int) -> float:
    """How much of the averaged weights still is their initialisation: the product of all decays so far."""
    share = 1.0
    for done in range(step):
        share *= ema_decay_at(done, config.ema_decay, warmup=config.ema_warmup)
        if share < 1e-6:
            return 0.0
    return share


def choose(total: int, count: int, *, seed: int) -> np.ndarray:
    """`count` of `total` samples (all, if there are fewer), without repetition, in random order. int64."""
    generator = np.random.Generator(np.random.Philox(key=[seed, 0xA7A1]))
    return generator.permutation(total)[: min(count, total)].astype(np.int64)


def pictures_of(subject: Subject, rows: slice) -> tuple[str, np.ndarray]:
    """What the samples look like, uint8 [b, R, R, 3], behind what it is: "image", or "decoded latent" where the images are
    not at hand."""
    pixels = pixels_of(subject.cache, subject.source, subject.indices[rows].tolist())
    return "image" if subject.source is not None else "decoded latent", pixels
