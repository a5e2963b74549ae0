"""The metrics as :mod:`trainer.evaluate.table` names them, each a function of a :class:`Trial`."""

from __future__ import annotations

from typing import Any

import numpy as np

from featcache.errors import UserError
from trainer.evaluate import metrics
from trainer.evaluate.metrics import KID_SUBSET_SIZE, KID_SUBSETS, frechet_distance, moments_of
from trainer.evaluate.trial import Measured, Trial


def fid(trial: Trial) -> Measured:
    mine, theirs = trial.judged, trial.reference
    moments = (mine.mean, mine.covariance), (theirs.mean, theirs.covariance)
    return _frechet(trial, "fid", *moments, mine.features)


def sfid(trial: Trial) -> Measured:
    mine, theirs = trial.judged, trial.reference
    if theirs.spatial_mean is None or theirs.spatial_covariance is None:
        raise UserError(
            "the reference holds no spatial statistics (mu_s, sigma_s), which sFID needs",
            remedy="Make the reference again with trainer stats, or leave sfid out of --metrics.",
        )
    assert mine.spatial_mean is not None and mine.spatial_covariance is not None
    moments = (mine.spatial_mean, mine.spatial_covariance), (theirs.spatial_mean, theirs.spatial_covariance)
    return _frechet(trial, "sfid", *moments, mine.spatial_features)


def _frechet(
    trial: Trial,
    metric: str,
    mine: tuple[np.ndarray, np.ndarray],
    theirs: tuple[np.ndarray, np.ndarray],
    rows: Any,
) -> Measured:
    if theirs[0].shape != mine[0].shape:
        raise UserError(
            f"the reference has {len(theirs[0])} features, the extractor yields {len(mine[0])}",
            remedy="Pass a reference made with this extractor.",
        )
    device = trial.moments_device
    value = frechet_distance(*mine, *theirs, device=device)

    def resampled(indices: np.ndarray) -> float:
        return frechet_distance(*moments_of(rows, indices=indices, device=device), *theirs, device=device)

    return Measured(value=value, interval=trial.interval(metric, value, trial.samples, resampled))


def inception_score(trial: Trial) -> Measured:
    assert trial.judged.inception is not None
    value, logits = trial.judged.inception.result(), trial.judged.logits

    def resampled(indices: np.ndarray) -> float:
        assert logits is not None
        return metrics.inception_score(logits[np.sort(indices)])  # sorted: chunks keep the classes they had

    return Measured(value=value, interval=trial.interval("inception_score", value, trial.samples, resampled))


def precision(trial: Trial) -> Measured:
    return _share(trial, "precision", trial.coverage.samples_covered)


def recall(trial: Trial) -> Measured:
    return _share(trial, "recall", trial.coverage.reference_covered)


def _share(trial: Trial, metric: str, hits: np.ndarray) -> Measured:
    # Both manifolds stay as they are; only which points are asked is drawn again.
    value = float(hits.mean())
    interval = trial.interval(metric, value, len(hits), lambda indices: float(hits[indices].mean()))
    return Measured(value=value, interval=interval)


def kid(trial: Trial) -> Measured:
    mine, theirs = trial.activations(needed=2)
    # At most half a set: subsets of nearly everything would all be the same, their spread meaningless.
    size = max(2, min(KID_SUBSET_SIZE, len(mine) // 2, len(theirs) // 2))
    value, spread = metrics.kid(theirs, mine, subset_size=size, seed=trial.seed, device=trial.moments_device)
    detail = {"standard_deviation": spread, "subsets": KID_SUBSETS, "subset_size": size}
    return Measured(value=value, detail=detail)
