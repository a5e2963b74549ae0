"""What a build will cost, before any work: bytes, bandwidth, time, and (measured) what each codec loses."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from rich.table import Table

from featcache.builder.fidelity import distance, fidelity
from featcache.builder.prepare import check_request, free_bytes, prepare, room_for
from featcache.builder.request import CLASS_TOKEN_CODECS, BuildRequest
from featcache.codecs import FeatureCodec
from featcache.console import amount_text, console, safe, size_text, time_text
from featcache.encoders.base import Network, in_precision, synchronise
from featcache.encoders.text import Tokens
from featcache.errors import UserError
from featcache.feature_names import is_class_token
from featcache.machine import pick_device
from featcache.precision import PRECISIONS
from featcache.read.captions import has_captions, one_caption
from featcache.store.layout import CODECS
from featcache.store.manifest import SAMPLE_FEATURES, FeatureSpec

PROBE_IMAGES = 2  # for the encoders' rate, after one warm-up of the same size


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One planned build.

    specs: features to be made. count: images. free_bytes: on the disk that the cache would lie on. rates: stage ->
    images/s on this machine, measured. fidelity: feature -> codec -> figures of `featcache.builder.fidelity.fidelity`.
    precision: feature -> precision -> figures of `featcache.builder.fidelity.distance` from fp32. precision_rates: encoder
    -> precision -> images/s.
    """

    path: Path
    specs: tuple[FeatureSpec, ...]
    count: int
    device: str
    free_bytes: int
    rates: Mapping[str, float]
    fidelity: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    precision: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    precision_rates: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def bytes_per_image(self) -> int:
        return sum(spec.bytes_per_sample for spec in self.specs)

    @property
    def seconds(self) -> float:
        """Encoding time: the encoders one after the other; decoding and writing go on beside them."""
        encoders = [rate for stage, rate in self.rates.items() if stage.startswith("encode")]
        slowest = min(
            [rate for stage, rate in self.rates.items() if not stage.startswith("encode")], default=float("inf")
        )
        return self.count * max(sum(1 / rate for rate in encoders), 1 / slowest)


def estimate(request: BuildRequest, *, measure: int = 0) -> Estimate:
    """Plans a build. Rates come from a few probe images; with `measure` > 0 from so many real ones, which also give
    each codec's fidelity and each precision's error and rate.

    Without `measure` the encoders run with random weights where real ones are not to be had: sizes and speed
    are the same.

    Raises `UserError` for bad input of any kind, as a build does.
    """
    check_request(request)
    seed = request.random_weights
    if not measure and seed is None and request.weights_dir is None:
        request = replace(request, random_weights=0)
    plan = prepare(request, device=pick_device(request.device))
    work = plan.work
    R = work.resolution
    rates: dict[str, float] = {}
    chosen = [int(i) for i in work.order[: min(measure or PROBE_IMAGES, len(work.order))]]
    if measure and work.needs_images:
        start = time.perf_counter()
        pixels = np.stack([work.source.load(i, R, work.decoder)[0] for i in chosen])
        rates["decode (1 thread)"] = len(chosen) / (time.perf_counter() - start)
    else:
        pixels = np.random.default_rng(0).integers(0, 256, (len(chosen), R, R, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(work.device)
    batches = _equal_batches(images, request.batch_size)
    runs: list[_Run[torch.Tensor] | _Run[Tokens]] = [
        _Run(encoder=e, inputs=batches, computed=sum(map(len, batches)), images=len(images)) for e in work.encoders
    ]
    if work.captions is not None:
        captions = [work.captions.of(i) for i in chosen]
        runs += [
            _Run(encoder=e, inputs=[e.tokenise(captions)], computed=len(chosen), images=len(chosen)) for e in work.texts
        ]
    features: dict[str, torch.Tensor] = {}
    precision: dict[str, dict[str, dict[str, float]]] = {}
    precision_rates: dict[str, dict[str, float]] = {}
    for run in runs:
        made, rates[f"encode {run.encoder.title}"] = run.timed()
        made = {name: feature for name, feature in made.items() if name in work.specs}
        features |= made
        if not measure:
            continue
        exact: dict[str, torch.Tensor] = {}
        for kind in PRECISIONS:
            other, rate = run.timed(kind)
            precision_rates.setdefault(run.encoder.title, {})[kind] = rate
            exact = exact or other
            for name in made:
                precision.setdefault(name, {})[kind] = distance(exact[name], other[name])
    start = time.perf_counter()
    for name, feature in features.items():
        FeatureCodec(work.specs[name]).to(work.device).encode(feature)
    rates["quantise"] = len(images) / max(time.perf_counter() - start, 1e-9)
    return Estimate(
        path=plan.path,
        specs=tuple(plan.specs),
        count=len(work.order),
        device=work.device,
        free_bytes=free_bytes(plan.path),
        rates=rates,
        fidelity={name: _fidelities(name, feature) for name, feature in features.items()} if measure else {},
        precision=precision,
        precision_rates=precision_rates,
    )


def _equal_batches(images: torch.Tensor, size: int) -> Sequence[torch.Tensor]:
    """Images [n, ...] in batches of one size, the last one filled up with the first of them: a compiled network would
    be compiled again for a shorter one, and timed with it."""
    size = min(size, len(images))
    batches: tuple[torch.Tensor, ...] = torch.cat([images, images[: -len(images) % size]]).split(size)
    return batches


Batch = TypeVar("Batch")


@dataclass(frozen=True, kw_only=True)
class _Run(Generic[Batch]):
    """An encoder and what it is given: inputs one call each, of `computed` images together, of which the first
    `images` count as features."""

    encoder: Network[Batch]
    inputs: Sequence[Batch]
    computed: int
    images: int

    def timed(self, precision: str | None = None) -> tuple[dict[str, torch.Tensor], float]:
        """Features on the CPU, float32, and images/s, after one call that does not count (kernels, compilation)."""
        encoder = self.encoder if precision is None else in_precision(self.encoder, precision)
        encoder(self.inputs[0])
        synchronise(encoder.compute.device)
        start = time.perf_counter()
        parts = [{name: value.float().cpu() for name, value in encoder(given).items()} for given in self.inputs]
        rate = self.computed / (time.perf_counter() - start)
        return {name: torch.cat([part[name] for part in parts])[: self.images] for name in parts[0]}, rate


def _fidelities(name: str, feature: torch.Tensor) -> dict[str, dict[str, float]]:
    found = {}
    for codec in CLASS_TOKEN_CODECS if is_class_token(name) else CODECS:
        if codec == "raw":
            continue
        try:
            found[codec] = fidelity(codec, feature)
        except UserError:
            continue  # int4 needs channels in groups of 32
    return found


def _figure(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def print_estimate(plan: Estimate, *, steps_per_s: float, batch: int, random: bool) -> None:
    """The table that `featcache plan` shows."""

    def table(*titles: str) -> Table:
        made = Table(box=None, pad_edge=False, header_style="bold")
        for i, title in enumerate(titles):
            made.add_column(title, justify="left" if i == 0 else "right", no_wrap=True)
        return made

    sizes = table("feature", "shape", "codec", "per image", "total")
    for spec in plan.specs:
        one = spec.bytes_per_sample
        sizes.add_row(
            safe(spec.name),
            spec.shape_text,
            spec.stored_as,
            size_text(one),
            size_text(one * plan.count),
        )
    total = plan.bytes_per_image * plan.count
    sizes.add_row("[bold]all[/bold]", "", "", size_text(plan.bytes_per_image), f"[bold]{size_text(total)}[/bold]")
    console.print_table(sizes)
    trained = [spec for spec in plan.specs if spec.name not in SAMPLE_FEATURES]
    read = sum(one_caption(spec).bytes_per_sample // spec.views for spec in trained)
    parts = ["one of the two views"] if any(spec.views > 1 for spec in trained) else []
    captions = max((spec.shape[0] for spec in trained if has_captions(spec)), default=1)
    parts += [f"one of {captions} captions"] if captions > 1 else []
    console.print(
        f"training on all of it at {steps_per_s:g} steps/s and batch {batch} reads {size_text(read * steps_per_s * batch)}/s"
        + (f" ({', '.join(parts)})" if parts else "")
    )
    fits = "fits" if room_for(total) <= plan.free_bytes else "[red]does not fit[/red]"
    console.print(f"{safe(plan.path)}: {size_text(plan.free_bytes)} free on its disk, {fits}")
    rates = table("stage", "images/s")
    for stage, rate in plan.rates.items():
        rates.add_row(safe(stage), amount_text(rate))
    console.print_table(rates)
    console.print(
        f"{plan.count:,} images in about {time_text(plan.seconds)} on this machine's device"
        + (" (timed with random weights)" if random else "")
    )
    for encoder, by_precision in plan.precision_rates.items():
        speeds = table(f"encode {safe(encoder)}", "images/s")
        for kind, rate in by_precision.items():
            speeds.add_row(f"--precision {kind}", amount_text(rate))
        console.print_table(speeds)
    for name, kinds in plan.precision.items():
        errors = table(f"{safe(name)} against fp32", "mean cosine", "worst cosine", "relative error")
        for kind, row in kinds.items():
            errors.add_row(
                f"--precision {kind}",
                _figure(row["mean_cosine"], ".6f"),
                _figure(row["worst_cosine"], ".6f"),
                _figure(row["relative_error"], ".2e"),
            )
        console.print_table(errors)
    if plan.precision and plan.device == "cpu":
        console.print("tf32 is fp32 on a CPU: it exists on GPUs only")
    for name, codecs in plan.fidelity.items():
        losses = table(safe(name), "per image", "mean cosine", "worst cosine", "relative error")
        for codec, row in codecs.items():
            losses.add_row(
                codec,
                size_text(row["bytes_per_image"]),
                _figure(row["mean_cosine"], ".6f"),
                _figure(row["worst_cosine"], ".6f"),
                _figure(row["relative_error"], ".2e"),
            )
        console.print_table(losses)
