"""Samples and a reference => the numbers, with everything that moves them written down beside them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor

from featcache.errors import UserError
from featcache.progress import QUIET, Progress
from trainer.evaluate.extractors import Extractor
from trainer.evaluate.images import ImageSet, NpzImages, open_images
from trainer.evaluate.metrics import INCEPTION_CHUNK, NEIGHBOURS
from trainer.evaluate.references import (
    Statistics,
    compute_statistics,
    full_precision,
    open_reference,
    reference_statistics,
)
from trainer.evaluate.table import METRICS
from trainer.evaluate.trial import Measured, Trial
from trainer.runs.published import PUBLISHED_SAMPLES

if TYPE_CHECKING:
    from trainer.evaluate.shelf import Shelf

UNBIASED_ENOUGH = 50_000
FEWEST_OF_REFERENCES = 10_000  # as ADM's batches hold
SHORT_NAMES = {"is": "inception_score"}
NEED_FEATURES = frozenset(name for name, metric in METRICS.items() if metric.activations)


def evaluate(
    samples: ImageSet | str | Path,
    reference: Statistics | str | Path,
    extractor: Extractor,
    *,
    metrics: Sequence[str] | None = None,
    count: int | None = None,
    batch_size: int = 64,
    bootstrap: int = 0,
    seed: int = 0,
    require_labels: bool = False,
    data: str | None = None,
    shelf: Shelf | None = None,
    crop: str | None = None,
    by_prompt: bool = False,
    progress: Progress = QUIET,
) -> dict[str, Any]:
    """Judge samples by a reference.

    Args:
        samples: an image set, or what `open_images` opens.
        reference: statistics, or what `reference_statistics` opens.
        extractor: the network; runs on its own device, as do the metrics.
        metrics: keys of `extractor.metric_names`, in any case, or `is`; None takes all of them.
        count: how many samples to judge, the first ones (of a folder a fair draw); None takes all.
        batch_size: images per forward pass. Results do not depend on it beyond float32 rounding.
        bootstrap: replicates behind 95 % intervals, 0 for none; KID has none. Each repeats FID's covariance and
            decomposition: at 50,000 x 2048 that takes seconds on a GPU, half a minute on two cores.
        seed: of KID's subsets and of the bootstrap.
        require_labels: insist that the samples carry labels.
        data: for a cache as reference, the folder it was built from.
        shelf: where the statistics of such a cache's images are kept; None computes them.
        crop: by which images of a folder as reference are cropped, as a cache's manifest names it; None is ADM's.
        by_prompt: whether the samples were drawn by prompt, whose published figures are of other numbers of samples.
        progress: of images that pass through the network, then of each metric's bootstrap.

    Returns:
        JSON-able: `metrics`, `intervals` and `details` by reported name, `settings`, `warnings`, `time_s`.

    Raises:
        UserError: an unknown metric, or one the extractor does not define; fewer samples than `count`; images of a
            wrong size or type; a reference of another resolution or extractor; labels required and missing.
    """
    chosen = chosen_metrics(metrics, extractor)
    need_features = bool(NEED_FEATURES & set(chosen))
    images = open_images(samples, by_name=by_prompt) if isinstance(samples, str | Path) else samples
    _check_count(images, images.count, count)
    labels = _label_record(images, require_labels=require_labels)
    if isinstance(images, NpzImages) and not isinstance(reference, Statistics):  # before the work, where a header tells
        open_reference(reference, extractor, resolution=images.resolution, need_features=need_features, data=data)
    times: dict[str, float] = {}
    with _timed(times, "samples"):
        judged = compute_statistics(
            images,
            extractor,
            batch_size=batch_size,
            limit=count,
            keep_features=None if need_features else 0,
            keep_all=bootstrap > 0,
            name="features of the samples",
            progress=progress,
        )
    assert judged.resolution is not None
    _check_count(images, judged.count, count)
    with _timed(times, "reference"):
        if not isinstance(reference, Statistics):
            reference = reference_statistics(
                reference,
                extractor,
                resolution=judged.resolution,
                need_features=need_features,
                batch_size=batch_size,
                data=data,
                shelf=shelf,
                crop=crop,
                progress=progress,
            )
    draws = {"bootstrap": bootstrap, "seed": seed}
    trial = Trial(judged=judged, reference=reference, device=extractor.device, progress=progress, **draws)
    with full_precision(), _timed(times, "metrics"):
        measured = {extractor.metric_names[metric]: _function(metric)(trial) for metric in chosen}
    sides = {**_samples_record(images, judged, labels), **_reference_record(reference, need_features=need_features)}
    return {
        **_numbers(measured),
        "settings": {"extractor": dict(extractor.provenance), **sides, **draws, "batch_size": batch_size},
        "warnings": _warnings(chosen, judged, reference, extractor, by_prompt=by_prompt),
        "time_s": {stage: round(seconds, 3) for stage, seconds in times.items()},
    }


def _numbers(measured: Mapping[str, Measured]) -> dict[str, object]:
    return {
        "metrics": {name: m.value for name, m in measured.items()},
        "intervals": {name: list(m.interval) for name, m in measured.items() if m.interval is not None},
        "details": {name: m.detail for name, m in measured.items() if m.detail is not None},
    }


@contextmanager
def _timed(times: dict[str, float], stage: str) -> Iterator[None]:
    """Puts the seconds that a block takes into `times`."""
    started = time.perf_counter()
    yield
    times[stage] = time.perf_counter() - started


def _samples_record(images: ImageSet, judged: Statistics, labels: dict[str, int] | None) -> dict[str, object]:
    return {
        "samples": images.description,
        "sample_count": judged.count,
        "resolution": judged.resolution,
        "labels": labels,
    }


def _reference_record(reference: Statistics, *, need_features: bool) -> dict[str, object]:
    kept = reference.features if need_features else None
    return {
        "reference": reference.provenance.get("source") or _unnamed(reference),
        "reference_images": reference.provenance.get("images"),
        "reference_count": reference.count,
        "reference_features": len(kept) if kept is not None else None,
        "reference_draw": "of all images" if _is_part(kept, reference) and "drawn" in reference.provenance else None,
        "neighbours": NEIGHBOURS,
        "inception_chunk": INCEPTION_CHUNK,
        "distance_dtype": "float32",
    }


def _is_part(kept: Tensor | None, reference: Statistics) -> bool:
    """Whether activations are of some of the reference's images only."""
    return kept is not None and reference.count is not None and len(kept) < reference.count


def _unnamed(reference: Statistics) -> str:
    """What tells statistics that do not say what they are of from others of the kind."""
    digest = hashlib.sha256(reference.mean.tobytes() + reference.covariance.tobytes()).hexdigest()
    return f"stored statistics, digest {digest[:16]}"


def chosen_metrics(metrics: Sequence[str] | None, extractor: Extractor) -> list[str]:
    """The metrics to measure, in the extractor's order; None takes all it defines.

    Raises:
        UserError: one that it does not define.
    """
    defined = list(extractor.metric_names)
    wanted = [SHORT_NAMES.get(m.lower(), m.lower()) for m in metrics or defined]
    for metric in wanted:
        if metric not in defined:
            short = {long: name for name, long in SHORT_NAMES.items()}
            raise UserError(
                f"the extractor {extractor.name} does not define the metric {short.get(metric, metric)!r}",
                remedy=f"Choose among: {', '.join(short.get(m, m) for m in defined)}",
            )
    return [m for m in defined if m in wanted]


def _check_count(images: ImageSet, found: int | None, expected: int | None) -> None:
    if found is not None and expected is not None and found < expected:
        raise UserError(
            f"{images.description} holds {found} samples, {expected} were asked for",
            remedy=f"Draw that many (trainer sample --num {expected}), or judge what is there: --num {found}",
        )


def _label_record(images: ImageSet, *, require_labels: bool) -> dict[str, int] | None:
    """Spread of the samples over classes: random and balanced labels give different FIDs."""
    labels = images.labels()
    if labels is None:
        if require_labels:
            raise UserError(
                f"{images.description} holds no labels",
                remedy="Store them: arr_1 in an npz, .cls in a tar, or one folder per class.",
            )
        return None
    _, counts = np.unique(labels, return_counts=True)
    return {"classes": len(counts), "fewest": int(counts.min()), "most": int(counts.max())}


def _function(metric: str) -> Callable[[Trial], Measured]:
    file, _, name = METRICS[metric].function.rpartition(".")
    return cast("Callable[[Trial], Measured]", getattr(import_module(f"trainer.evaluate.{file}"), name))


def _warnings(
    chosen: Sequence[str], judged: Statistics, reference: Statistics, extractor: Extractor, *, by_prompt: bool
) -> list[str]:
    warnings = []
    assert judged.count is not None
    enough = min(PUBLISHED_SAMPLES) if by_prompt else UNBIASED_ENOUGH
    if {"fid", "sfid"} & set(chosen) and judged.count < enough:
        use = (
            f"are of {' or '.join(f'{n:,}' for n in PUBLISHED_SAMPLES)} prompts of COCO's validation set"
            if by_prompt
            else f"use {UNBIASED_ENOUGH:,}"
        )
        warnings.append(
            f"{extractor.metric_names['fid']} of {judged.count:,} samples is biased upwards; published"
            f" figures {use}. Compare only numbers of equal sample count."
        )
    if extractor.is_standard and reference.count is not None and reference.count < FEWEST_OF_REFERENCES:
        warnings.append(
            f"The reference holds {reference.count:,} images: published figures compare with {FEWEST_OF_REFERENCES:,} or"
            " more, and fewer move every number."
        )
    if NEED_FEATURES & set(chosen) and _is_part(reference.features, reference) and "drawn" not in reference.provenance:
        warnings.append(
            "The reference's activations are of its first images, as earlier versions kept them: where it is sorted by class,"
            " precision, recall and KID are by few classes. Make it again: trainer stats."
        )
    if extractor.name == "inception" and "extractor" not in reference.provenance and reference.spatial_mean is None:
        warnings.append(
            "The reference does not say which network made it: it was taken for the Inception of ADM's evaluator. Those of"
            " pytorch-fid and clean-fid were fed otherwise resized images, and their statistics give other numbers."
        )
    if not extractor.is_standard:
        warnings.append(
            f"The extractor {extractor.name} is not the literature's network: its numbers are not FID and"
            " serve comparisons within this project only."
        )
    return warnings
