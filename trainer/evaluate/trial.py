"""What a metric works on: the statistics of both sides, and intervals by resampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from featcache.errors import UserError
from featcache.progress import Progress
from trainer.evaluate.metrics import NEIGHBOURS, ManifoldCoverage, bootstrap_interval, manifold_coverage
from trainer.evaluate.references import Statistics


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a metric gives: its value, its 95 % interval if one was asked for, and what else is worth knowing."""

    value: float
    interval: tuple[float, float] | None = None
    detail: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Both sides and how to compare them. device: of the metrics. bootstrap: replicates behind intervals; 0 for none."""

    judged: Statistics
    reference: Statistics
    device: torch.device
    bootstrap: int
    seed: int
    progress: Progress

    @property
    def samples(self) -> int:
        """How many images are judged."""
        assert self.judged.count is not None
        return self.judged.count

    @property
    def moments_device(self) -> torch.device:
        """Where float64 exists."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def interval(
        self, metric: str, estimate: float, rows: int, statistic: Callable[[np.ndarray], float]
    ) -> tuple[float, float] | None:
        """95 % interval of `statistic` of resampled rows (their indices, int64 [rows]); None where none is asked for."""
        if not self.bootstrap:
            return None
        self.progress.begin(f"bootstrap {metric}", self.bootstrap, unit="replicates")

        def counted(indices: np.ndarray) -> float:
            self.progress.update(1)
            return statistic(indices)

        return bootstrap_interval(counted, rows, estimate, replicates=self.bootstrap, seed=self.seed)

    @cached_property
    def coverage(self) -> ManifoldCoverage:
        """How far each side's manifold covers the other side's points."""
        mine, theirs = self.activations(needed=NEIGHBOURS + 1)
        return manifold_coverage(theirs, mine, device=self.device)

    def activations(self, *, needed: int) -> tuple[Tensor, Tensor]:
        """`pool` of the samples [N, D] and of the reference [M, D], float32, on the CPU.

        Raises:
            UserError: the reference keeps none, or one side has fewer than `needed` images.
        """
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
