"""From a checkpoint to images: labels, noise, sampler, guidance, decoder, files."""

from __future__ import annotations

import functools
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from featcache.encoders.base import upload
from featcache.encoders.vae import LatentDecoder, load_recorded_vae
from featcache.errors import UserError
from featcache.store import files
from trainer.averages import Average
from trainer.diffusion import ddpm, samplers
from trainer.diffusion.guidance import Guidance, guided
from trainer.diffusion.noise import noise_stream, sample_noise
from trainer.diffusion.streams import Layout
from trainer.diffusion.transport import Flow, Transport, build_transport
from trainer.models import ModelOutput, Transformer, build_model, load_weights
from trainer.runs import empty_text
from trainer.runs import folder as runs
from trainer.runs.config import RunConfig
from trainer.runs.normalization import Normalization, of_run
from trainer.runs.published import SHIFTED
from trainer.runs.records import cache_summary, run_model_config
from trainer.runs.schemas import Summary
from trainer.runs.snapshots import find_weights
from trainer.sampling.grid import row_record, spread
from trainer.seeds import derive_seed

if TYPE_CHECKING:
    from trainer.sampling.inference import Network
    from trainer.sampling.trunk import Trunk

# Family -> its samplers, the default first; and the one that draws grids, in GRID_STEPS steps.
SAMPLERS = {"sit": ("sde", "ode", "heun", "dopri5"), "dit": ("ddpm", "ddim")}
GRID_SAMPLERS, GRID_STEPS, GRID_ROWS = {"sit": "ode", "dit": "ddpm"}, 32, 10

# Images decoded at once: enough to fill a GPU at 256 pixels, and 1 GiB for the SD-VAE's largest activation there.
DECODED_IMAGES = 16


def check_sampler(family: str, sampler: str | None) -> str:
    """The sampler to use with a family of backbones; None takes its default.

    Raises:
        UserError: a sampler that is unknown or belongs to the other family.
    """
    valid = SAMPLERS[family]
    if sampler is None:
        return valid[0]
    if sampler not in valid:
        raise UserError(
            f"--sampler {sampler!r} does not go with a {'SiT or LightningDiT' if family == 'sit' else 'DiT'} model",
            remedy=f"Type one of: {', '.join(valid)}",
        )
    return sampler


def sampling_times(sampler: str, steps: int, shift: float = 1.0) -> list[float] | ddpm.Schedule:
    """The grid of times of a SiT sampler, or the kept steps of a DiT one.

    Raises:
        UserError: a number of steps that the sampler cannot take, or a shift where it has no grid of times.
    """
    if shift != 1 and sampler not in SHIFTED:
        raise UserError(
            f"--shift {shift:g} has no effect on --sampler {sampler}, which takes steps of its own",
            remedy=f"Leave --shift out, or (SiT) take --sampler {', '.join(SHIFTED)}.",
        )
    if sampler == "sde":
        return samplers.sde_grid(steps, shift=shift)
    if sampler not in ("ddpm", "ddim"):
        return samplers.ode_grid(steps, shift=shift)
    schedule = ddpm.linear_schedule()
    stride = sampler == "ddim" and ddpm.has_stride(schedule, steps)
    return ddpm.respace(schedule, steps, spacing="stride" if stride else "even")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How images are drawn.

    sampler: for SiT `ode` (Euler), `heun`, `dopri5`, `sde` (Euler-Maruyama, the papers' last step without noise);
    for DiT `ddpm` (ancestral) and `ddim` (every i-th step from 0 on as in ADM, where a whole i gives `steps` of
    them; else spread evenly from the first step to the last, as for `ddpm`: our choice; a single step is the last).
    steps: evaluations of the model (Heun: steps of two; dopri5 chooses its own).
    shift: of the grid of times, see `trainer.diffusion.interpolants.shifted`; training's is another matter.
    guidance: scale, interval and channels.
    pixels: `round` is 127.5 x + 128 clamped (ADM, DiT, SiT); `truncate` is 255 (x + 1) / 2 cut off (REPA).
    seed: together with the sample's index it fixes the sample's noise.
    """

    sampler: str = "sde"
    steps: int = 250
    shift: float = 1.0
    guidance: Guidance = Guidance()  # noqa: RUF009 (frozen)
    pixels: str = "round"
    seed: int = 0

    def record(self) -> dict[str, object]:
        """Plain values, as `settings.json` beside samples holds them; a shift of 1 is left out, as before there was one."""
        values = {key: value for key, value in vars(self).items() if key != "shift" or value != 1}
        return {**values, "guidance": self.guidance.record()}


def load_decoder(
    vae: Mapping[str, Any],
    moments: Mapping[str, Any],
    weights_dir: str | None,
    normalization: Normalization | None = None,
) -> LatentDecoder:
    """The decoder of the VAE that a manifest names, as recorded: pretrained, embedded, or random with the recorded seed.

    Args:
        vae: the manifest's `dataset.vae`. moments: provenance of `vae/moments`. normalization: that training used;
            None: by the scaling factor.

    Raises as `load_recorded_vae`.
    """
    module = load_recorded_vae(vae, moments, Path(weights_dir) if weights_dir else None)
    if normalization is None:
        return LatentDecoder(module, vae)
    return LatentDecoder(module, vae, scale=normalization.scale, shift=normalization.shift)


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A checkpoint's weights in a model ready to sample from."""

    path: Path
    step: int
    config: RunConfig
    summary: Summary  # cache.json
    model: Transformer
    stored: str | None = None  # the dtype of a snapshot that rounded them
    notes: Sequence[str] = ()

    @property
    def transport(self) -> Transport:
        """As the run trained with it, on the model's device."""
        device = next(self.model.parameters()).device
        return build_transport(self.model.cfg.family, device=device, **self.config.flow)

    def decoder(self, weights_dir: str | None) -> LatentDecoder:
        """What turns its latents into pixels, normalised as the run normalised them; raises as `load_decoder`."""
        vae = self.summary["dataset"]["vae"]
        normalization = of_run(self.path, self.config, vae)
        return load_decoder(vae, self.summary["features"]["vae/moments"], weights_dir, normalization)

    @functools.cached_property
    def null(self) -> Tensor | None:
        """Of a run that was trained on text, the rows of '', float32 [T, W] on the model's device; None for labels.

        Raises:
            UserError: the run's copy is missing or damaged.
        """
        text = self.model.cfg.text
        return None if text is None else empty_text.of_run(self.path, text).to(next(self.model.parameters()).device)

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.summary["dataset"]["class_names"])

    @property
    def resolution(self) -> int:
        return int(self.summary["dataset"]["preprocessing"]["resolution"])


def load_run(
    run: Path, *, step: int | None = None, device: str = "cpu", weights: str = "ema", snapshots: bool = True
) -> LoadedRun:
    """The model of a run at `step` (None: the latest checkpoint).

    Args:
        weights: as `trainer.averages.Average` names them; `model` is `raw`. snapshots: whether to look there, too.

    Raises:
        UserError: no such run, checkpoint or snapshot, or one of another run; or it does not hold these weights.
    """
    config = runs.load_config(run)
    summary = cache_summary(run)
    average = Average.parse("raw" if weights == "model" else weights)
    found = find_weights(run, config, step, average, snapshots=snapshots)
    model = build_model(run_model_config(run, config), device=device).eval().requires_grad_(False)
    path = found.path
    if average.kind == "raw" and not os.path.lexists(path / "model.safetensors"):
        raise UserError(
            f"{path} holds no raw weights: of an imported checkpoint one set of weights is kept, the averaged ones by default",
            remedy="Take those: --weights ema. For the raw ones, import the file again: trainer import FILE --weights model --name NAME",
        )
    load_weights(model, found.load(device), source=str(path))
    return LoadedRun(
        path=run, step=found.step, config=config, summary=summary, model=model, stored=found.stored, notes=found.notes
    )


@torch.inference_mode()
def draw_latents(
    model: Transformer | Network,
    condition: Tensor,
    indices: Sequence[int],
    config: SampleConfig,
    *,
    transport: Transport | None = None,
    trunk: Trunk | None = None,
    null: Tensor | None = None,
) -> Tensor:
    """Scaled latents float32 [B, C, h, w] of the samples `indices` with a condition each: labels [B], or text rows [B, T, W].

    Each sample's noise is a function of (config.seed, its index) alone, and the latents' is the same whatever is drawn
    beside them. `transport`: what the model was trained with, None its family's with default settings. `trunk`: where
    states are kept that samples under other guidance pass, too; no bit depends on it. `null`: of text, the rows of '',
    [T, W]: what guidance is against.

    Raises:
        UserError: guidance of a model that takes text without `null`.
    """
    return draw_streams(model, condition, indices, config, transport=transport, trunk=trunk, null=null)[0]


@torch.inference_mode()
def draw_streams(
    model: Transformer | Network,
    condition: Tensor,
    indices: Sequence[int],
    config: SampleConfig,
    *,
    transport: Transport | None = None,
    trunk: Trunk | None = None,
    null: Tensor | None = None,
) -> list[Tensor]:
    """As `draw_latents`: the latents, then each stream in the shapes of `trainer.diffusion.streams.Layout`."""
    cfg, device = model.cfg, condition.device
    layout = Layout(cfg=cfg)
    transport = transport or build_transport(cfg.family, device=device)
    seeds = [config.seed, *(derive_seed(config.seed, f"samples/{stream.name}") for stream in cfg.streams)]
    first = [sample_noise(s, indices, shape, 0, device=device) for s, shape in zip(seeds, layout.shapes)]
    later = [noise_stream(s, indices, shape, device=device) for s, shape in zip(seeds, layout.shapes)]
    x = layout.pack(first)

    def noise(step: int) -> Tensor:
        return layout.pack([draw(step) for draw in later])

    times = sampling_times(config.sampler, config.steps, config.shift)
    model_fn = guided(
        _on_state(model, layout, None if isinstance(times, ddpm.Schedule) else transport),
        condition,
        null=cfg.num_classes if cfg.text is None else null,
        guidance=config.guidance,
        time_range=transport.time_range,
        layout=layout,
    )
    if isinstance(times, ddpm.Schedule):
        if config.sampler == "ddim":
            return layout.unpack(samplers.ddim(model_fn, x, times))
        return layout.unpack(samplers.ddpm(model_fn, x, times, noise=noise))
    sampler: Sampler
    if config.sampler == "sde":
        assert isinstance(transport, Flow), "check_sampler lets no DDPM model come here"
        sampler = partial(samplers.euler_maruyama, noise=noise, path=transport.path)
    elif config.sampler == "dopri5":  # chooses its steps: there are no states that others pass, too
        return layout.unpack(samplers.dopri5(model_fn, x, times))
    else:
        sampler = {"ode": samplers.euler, "heun": samplers.heun}[config.sampler]
    if trunk is None:
        return layout.unpack(sampler(model_fn, x, times))
    guided_from = first_guided(times, config.guidance, transport.time_range)
    return layout.unpack(_from_trunk(sampler, model_fn, x, times, trunk, indices, guided_from))


Sampler = Callable[..., Tensor]


def first_guided(times: Sequence[float], guidance: Guidance, time_range: float = 1.0) -> int:
    """Number of the first step of a grid in which guidance acts; the number of steps where it never does."""
    return next((k for k, t in enumerate(times[:-1]) if guidance.active(t / time_range)), len(times) - 1)


def _from_trunk(
    sampler: Sampler,
    model_fn: samplers.ModelFn,
    x: Tensor,
    times: list[float],
    trunk: Trunk,
    indices: Sequence[int],
    guided_from: int,
) -> Tensor:
    """What the sampler makes of x, from the furthest state that is kept and comes before guidance acts."""
    steps, begun, state = len(times) - 1, 0, x
    found = trunk.load(indices, shape=tuple(x.shape), most=guided_from)
    if found is not None:
        begun, state = found[0], upload(found[1], x.device)
    if begun < guided_from < steps:
        part = samplers.Part(start=begun, stop=guided_from, dtype=x.dtype)
        state = sampler(model_fn, state, times, part=part)
        trunk.save(indices, guided_from, state)
        begun = guided_from
    return sampler(model_fn, state, times, part=samplers.Part(start=begun, stop=steps, dtype=x.dtype))


def _on_state(
    model: Transformer | Network, layout: Layout, transport: Transport | None
) -> Callable[[Tensor, Tensor, Tensor], ModelOutput]:
    """`model` on a sampler's state; with a transport it gives velocities, whatever it was trained to predict."""

    def call(state: Tensor, t: Tensor, y: Tensor) -> ModelOutput:
        parts = layout.unpack(state)
        x, own = layout.inputs(parts)
        output: ModelOutput = model(x, t, y, **own)
        if (
            transport is None
        ):  # all streams are merged, so the state and what is predicted of it are shaped as the latents
            return output
        found = [transport.velocity(out, part, t) for out, part in zip(layout.outputs(output), parts)]
        return output._replace(prediction=layout.pack(found))

    return call


def to_uint8(pixels: Tensor, rule: str = "round") -> Tensor:
    """Pixels in [-1, 1], [B, 3, R, R] => uint8 [B, R, R, 3] on the same device, by either public convention."""
    if rule == "round":
        values = (127.5 * pixels + 128).clamp(0, 255)
    else:
        values = (255 * (pixels + 1) / 2).clamp(0, 255)
    return values.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@torch.inference_mode()
def decode_pixels(decoder: LatentDecoder, latents: Tensor, rule: str = "round") -> Tensor:
    """Scaled latents [B, C, h, w] => uint8 [B, R, R, 3], a part at a time: memory does not grow with B."""
    return torch.cat([to_uint8(decoder(part), rule) for part in latents.split(DECODED_IMAGES)])


def draw_units(
    model: Transformer | Network,
    vae: LatentDecoder,
    condition: np.ndarray | Callable[[Sequence[int]], Tensor],
    indices: Sequence[int],
    config: SampleConfig,
    *,
    transport: Transport | None = None,
    trunk: Trunk | None = None,
    null: Tensor | None = None,
    unit: int,
) -> Iterator[np.ndarray]:
    """The samples `indices` [n] in order: uint8 [unit, R, R, 3] again and again, the last one shorter.

    condition: labels int64 [n] or text rows float32 [n, T, W]; or a function that gives those of some of the samples, by
    their indices, for what would fill the memory all at once. null: as for `draw_latents`.

    Every unit is computed whole (the last filled up with its last sample), so that shapes, and with them the rounding,
    are always the same. On the CPU each unit is computed by one thread, as many at a time as torch has threads, so that
    their number changes no bit either. On a GPU the copy of one unit to the host, and what the caller does with it,
    overlap with the drawing of the next.
    """
    device = next(vae.parameters()).device

    def draw(start: int) -> Tensor:
        chosen = np.minimum(np.arange(start, start + unit), len(indices) - 1)
        numbers = [int(indices[i]) for i in chosen]
        given = condition(numbers) if callable(condition) else torch.from_numpy(np.asarray(condition)[chosen])
        wanted = upload(given, device)
        latents = draw_latents(model, wanted, numbers, config, null=null, transport=transport, trunk=trunk)
        return decode_pixels(vae, latents, config.pixels)[: len(indices) - start]

    starts = range(0, len(indices), unit)
    return _fetched(map(draw, starts)) if device.type == "cuda" else _each_by_one_thread(draw, starts)


def _each_by_one_thread(draw: Callable[[int], Tensor], starts: Sequence[int]) -> Iterator[np.ndarray]:
    """`draw` of each start in order, on the host; one thread each, and never many more results than threads ahead."""
    threads = torch.get_num_threads()
    ahead: deque[Future[Tensor]] = deque()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for start in starts:
            ahead.append(pool.submit(draw, start))
            if start == starts[0]:  # alone: compiles what is to be compiled
                wait(ahead)
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result().cpu().numpy()
        while ahead:
            yield ahead.popleft().result().cpu().numpy()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _fetched(batches: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """A GPU's tensors on the host, one behind: it works on the next while one is copied."""
    waiting: tuple[Tensor, torch.cuda.Event] | None = None
    for batch in batches:
        host = torch.empty(batch.shape, dtype=batch.dtype, pin_memory=True)  # to pageable memory the copy would wait
        host.copy_(batch, non_blocking=True)
        event = torch.cuda.current_stream(batch.device).record_event()
        if waiting is not None:
            waiting[1].synchronize()
            yield waiting[0].numpy()
        waiting = host, event
    if waiting is not None:
        waiting[1].synchronize()
        yield waiting[0].numpy()


def class_grid(
    model: Transformer | Network,
    vae: LatentDecoder,
    *,
    transport: Transport | None = None,
    seed: int = 0,
    columns: int = 8,
) -> np.ndarray:
    """One row per class, the same noise down every column: uint8 [rows * R, columns * R, 3]."""
    classes = np.asarray(spread(model.cfg.num_classes, GRID_ROWS))
    return condition_grid(model, vae, classes, transport=transport, seed=seed, columns=columns)


def condition_grid(
    model: Transformer | Network,
    vae: LatentDecoder,
    conditions: np.ndarray,
    *,
    transport: Transport | None = None,
    seed: int = 0,
    columns: int = 8,
) -> np.ndarray:
    """One row for each of `conditions`, labels [rows] or text rows [rows, T, W], as `class_grid`."""
    config = SampleConfig(sampler=GRID_SAMPLERS[model.cfg.family], steps=GRID_STEPS, seed=seed)
    rows = len(conditions)
    indices = list(range(columns)) * rows
    repeated = np.repeat(conditions, columns, axis=0)
    units = draw_units(model, vae, repeated, indices, config, transport=transport, unit=columns)
    tiles = np.concatenate(list(units))
    _, R, _, _ = tiles.shape
    grid = tiles.reshape(rows, columns, R, R, 3).transpose(0, 2, 1, 3, 4)  # [rows, R, columns, R, 3]
    return grid.reshape(rows * R, columns * R, 3)


def save_png(pixels: np.ndarray, path: Path, *, rows: Sequence[str] = ()) -> None:
    """uint8 [H, W, 3] to a PNG, replaced whole.

    rows: of a picture made by `trainer.sampling.grid.named_rows`, the names; `row_names` reads them.

    Raises:
        UserError: the disk refuses.
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", pnginfo=row_record(rows) if rows else None)
    files.make_directory(path.parent)
    files.atomic_write(path, [buffer.getbuffer()])
