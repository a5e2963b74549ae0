"""Samples and a reference => the numbers, with everything that moves them written down beside them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featcache.errors import UserError
from featcache.progress import QUIET, Progress
from trainer.evaluate.extractors import Extractor
from trainer.evaluate.images import ImageSet, NpzImages, open_images
from trainer.evaluate.metrics import (
    INCEPTION_CHUNK,
    KID_SUBSET_SIZE,
    KID_SUBSETS,
    NEIGHBOURS,
    ManifoldCoverage,
    bootstrap_interval,
    frechet_distance,
    inception_score,
    kid,
    manifold_coverage,
    moments_of,
)
from trainer.evaluate.references import (
    DEFAULT_KEPT_FEATURES,
    Statistics,
    compute_statistics,
    full_precision,
    open_reference,
    reference_statistics,
)

UNBIASED_ENOUGH = 50_000
SHORT_NAMES = {"is": "inception_score"}
NEED_FEATURES = frozenset({"precision", "recall", "kid"})


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
    reference_limit: int | None = None,
    keep_features: int = DEFAULT_KEPT_FEATURES,
    progress: Progress = QUIET,
) -> dict[str, Any]:
    """Judge samples by a reference.

    Args:
        samples: an image set, or what `open_images` opens.
        reference: statistics, or what `reference_statistics` opens.
        extractor: the network; runs on its own device, as do the metrics.
        metrics: keys of `extractor.metric_names`, in any case, or `is`; None takes all of them.
        count: how many samples to judge, the first ones; None takes all.
        batch_size: images a forward pass. Results do not depend on it beyond float32 rounding.
        bootstrap: replicates behind 95 % intervals, 0 for none. Each repeats FID's covariance and
            decomposition: seconds each on a GPU at 50,000 x 2048, half a minute on two cores. KID has none;
                see `details`.
        seed: of KID's subsets and of the bootstrap.
        require_labels: insist that the samples carry labels, and record how they are spread over the classes.
        data: for a cache as reference, the folder it was built from.
        reference_limit: use only so many reference images.
        keep_features: reference activations kept for precision, recall and KID. ADM's references hold 10,000
            images.
        progress: of images that pass through the network, then of each metric's bootstrap.

    Returns:
        JSON-able: `metrics` {reported name: value}, `intervals` {reported name: [low, high]}, `details`
        (KID's standard deviation over subsets), `settings`, `warnings`, `time_s`.

    Raises:
        UserError: an unknown metric, or one the extractor does not define; fewer samples than `count`; images
            of a wrong size or type; a reference of another resolution or extractor; labels required and
            missing.
    """
    chosen = chosen_metrics(metrics, extractor)
    images = open_images(samples) if isinstance(samples, str | Path) else samples
    if count is not None and images.count is not None and images.count < count:
        raise _too_few(images, images.count, count)
    labels = _label_record(images, require_labels=require_labels)
    need_features = bool(NEED_FEATURES & set(chosen))
    if isinstance(images, NpzImages) and not isinstance(reference, Statistics):  # before the work, where a header tells
        open_reference(reference, extractor, resolution=images.resolution, need_features=need_features, data=data)
    started = time.perf_counter()
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
    assert judged.count is not None and judged.resolution is not None
    if count is not None and judged.count < count:
        raise _too_few(images, judged.count, count)
    times = {"samples": time.perf_counter() - started}
    started = time.perf_counter()
    if not isinstance(reference, Statistics):
        reference = reference_statistics(
            reference,
            extractor,
            resolution=judged.resolution,
            need_features=need_features,
            batch_size=batch_size,
            data=data,
            limit=reference_limit,
            keep_features=keep_features,
            progress=progress,
        )
    times["reference"] = time.perf_counter() - started
    started = time.perf_counter()
    trial = _Trial(
        judged=judged,
        reference=reference,
        device=extractor.device,
        bootstrap=bootstrap,
        seed=seed,
        progress=progress,
    )
    with full_precision():
        measured = {extractor.metric_names[metric]: _MEASURES[metric](trial) for metric in chosen}
    times["metrics"] = time.perf_counter() - started
    kept = reference.features if need_features else None
    return {
        "metrics": {name: m.value for name, m in measured.items()},
        "intervals": {name: list(m.interval) for name, m in measured.items() if m.interval is not None},
        "details": {name: m.detail for name, m in measured.items() if m.detail is not None},
        "settings": {
            "extractor": dict(extractor.provenance),
            "samples": images.description,
            "sample_count": judged.count,
            "resolution": judged.resolution,
            "labels": labels,
            "reference": reference.provenance.get("source", "stored statistics"),
            "reference_count": reference.count,
            "reference_features": len(kept) if kept is not None else None,
            "neighbours": NEIGHBOURS,
            "inception_chunk": INCEPTION_CHUNK,
            "distance_dtype": "float32",
            "bootstrap": bootstrap,
            "seed": seed,
            "batch_size": batch_size,
        },
        "warnings": _warnings(chosen, judged, extractor),
        "time_s": {stage: round(seconds, 3) for stage, seconds in times.items()},
    }


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


def _too_few(images: ImageSet, found: int, expected: int) -> UserError:
    return UserError(
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


@dataclass(frozen=True, kw_only=True)
class _Measured:
    value: float
    interval: tuple[float, float] | None = None
    detail: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """Both sides and how to compare them; one method a metric."""

    judged: Statistics
    reference: Statistics
    device: torch.device
    bootstrap: int
    seed: int
    progress: Progress

    @property
    def _samples(self) -> int:
        assert self.judged.count is not None
        return self.judged.count

    @property
    def _moments_device(self) -> torch.device:
        """Where float64 exists."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def _interval(
        self, metric: str, estimate: float, rows: int, statistic: Callable[[np.ndarray], float]
    ) -> tuple[float, float] | None:
        if not self.bootstrap:
            return None
        self.progress.begin(f"bootstrap {metric}", self.bootstrap, unit="replicates")

        def counted(indices: np.ndarray) -> float:
            self.progress.update(1)
            return statistic(indices)

        return bootstrap_interval(counted, rows, estimate, replicates=self.bootstrap, seed=self.seed)

    def _frechet(
        self,
        metric: str,
        mine: tuple[np.ndarray, np.ndarray],
        theirs: tuple[np.ndarray, np.ndarray],
        rows: Any,
    ) -> _Measured:
        if theirs[0].shape != mine[0].shape:
            raise UserError(
                f"the reference has {len(theirs[0])} features, the extractor yields {len(mine[0])}",
                remedy="Pass a reference made with this extractor.",
            )
        device = self._moments_device
        value = frechet_distance(*mine, *theirs, device=device)

        def resampled(indices: np.ndarray) -> float:
            return frechet_distance(*moments_of(rows, indices=indices, device=device), *theirs, device=device)

        interval = self._interval(metric, value, self._samples, resampled)
        return _Measured(value=value, interval=interval)

    def fid(self) -> _Measured:
        mine, theirs = self.judged, self.reference
        return self._frechet("fid", (mine.mean, mine.covariance), (theirs.mean, theirs.covariance), mine.features)

    def sfid(self) -> _Measured:
        mine, theirs = self.judged, self.reference
        if theirs.spatial_mean is None or theirs.spatial_covariance is None:
            raise UserError(
                "the reference holds no spatial statistics (mu_s, sigma_s), which sFID needs",
                remedy="Make the reference again with trainer stats, or leave sfid out of --metrics.",
            )
        assert mine.spatial_mean is not None and mine.spatial_covariance is not None
        return self._frechet(
            "sfid",
            (mine.spatial_mean, mine.spatial_covariance),
            (theirs.spatial_mean, theirs.spatial_covariance),
            mine.spatial_features,
        )

    def inception_score(self) -> _Measured:
        assert self.judged.inception is not None
        value, logits = self.judged.inception.result(), self.judged.logits

        def resampled(indices: np.ndarray) -> float:
            assert logits is not None
            return inception_score(logits[np.sort(indices)])  # sorted: chunks keep the classes they had

        return _Measured(value=value, interval=self._interval("inception_score", value, self._samples, resampled))

    @cached_property
    def _coverage(self) -> ManifoldCoverage:
        mine, theirs = self._features(needed=NEIGHBOURS + 1)
        return manifold_coverage(theirs, mine, device=self.device)

    def precision(self) -> _Measured:
        return self._share("precision", self._coverage.samples_covered)

    def recall(self) -> _Measured:
        return self._share("recall", self._coverage.reference_covered)

    def _share(self, metric: str, hits: np.ndarray) -> _Measured:
        # Both manifolds stay as they are; only which points are asked is drawn again.
        value = float(hits.mean())
        interval = self._interval(metric, value, len(hits), lambda indices: float(hits[indices].mean()))
        return _Measured(value=value, interval=interval)

    def kid(self) -> _Measured:
        mine, theirs = self._features(needed=2)
        # At most half a set: subsets of nearly everything would all be the same, their spread meaningless.
        size = max(2, min(KID_SUBSET_SIZE, len(mine) // 2, len(theirs) // 2))
        value, spread = kid(theirs, mine, subset_size=size, seed=self.seed, device=self._moments_device)
        detail = {"standard_deviation": spread, "subsets": KID_SUBSETS, "subset_size": size}
        return _Measured(value=value, detail=detail)

    def _features(self, *, needed: int) -> tuple[Tensor, Tensor]:
        mine, theirs = self.judged.features, self.reference.features
        if theirs is None:
            raise UserError(
                "the reference holds no activations, which precision, recall and KID need",
                remedy="Make the statistics with --features 10000, or leave these metrics out.",
            )
        assert mine is not None
        for name, rows in (("the samples", mine), ("the reference", theirs)):
            if len(rows) < needed:
                raise UserError(
                    f"{name} are {len(rows)} images; precision, recall and KID need at least {needed}",
                    remedy="Pass more images, or --metrics fid.",
                )
        return mine, theirs


_MEASURES: dict[str, Callable[[_Trial], _Measured]] = {
    "fid": _Trial.fid,
    "sfid": _Trial.sfid,
    "inception_score": _Trial.inception_score,
    "precision": _Trial.precision,
    "recall": _Trial.recall,
    "kid": _Trial.kid,
}


def _warnings(chosen: Sequence[str], judged: Statistics, extractor: Extractor) -> list[str]:
    warnings = []
    assert judged.count is not None
    if {"fid", "sfid"} & set(chosen) and judged.count < UNBIASED_ENOUGH:
        warnings.append(
            f"{extractor.metric_names['fid']} of {judged.count:,} samples is biased upwards; published"
            f" figures use {UNBIASED_ENOUGH:,}. Compare only numbers of equal sample count."
        )
    if not extractor.is_standard:
        warnings.append(
            f"The extractor {extractor.name} is not the literature's network: its numbers are not FID and"
            " serve comparisons within this project only."
        )
    return warnings
