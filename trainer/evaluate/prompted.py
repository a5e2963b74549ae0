"""How well samples do what their prompts say: metrics that look at images and texts, and at no reference."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from featcache.errors import UserError
from featcache.progress import QUIET, Progress
from featcache.sources.shapes_text import ATTRIBUTES
from trainer.evaluate import obeyed
from trainer.evaluate.images import ImageSet, check_batch, prefetch
from trainer.evaluate.metrics import bootstrap_interval
from trainer.evaluate.table import PROMPT_METRICS

if TYPE_CHECKING:
    from trainer.sampling.prompts import Prompts


class PromptJudge(Protocol):
    """One network that looks at images and what they should show.

    Attributes:
        provenance: JSON-able record of weights and preprocessing.
    """

    provenance: dict[str, Any]

    def check(self, prompts: Sequence[str]) -> None:
        """Raises `UserError` if there is a prompt that it cannot judge by."""
        ...

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> Mapping[str, np.ndarray]:
        """uint8 [n, R, R, 3] and n prompts => name => a score for each image, float64 [n]. The metric is their mean."""
        ...


def build_prompt_judges(
    names: Sequence[str], *, weights_dir: str | None, device: torch.device | str
) -> dict[str, PromptJudge]:
    """The judges of keys of `PROMPT_METRICS`, by name.

    Raises:
        UserError: damaged weights, or those of another network.
        WeightsUnavailable: weights are not to be had.
    """
    return {name: _build(name, weights_dir, device) for name in names}


def _build(name: str, weights_dir: str | None, device: torch.device | str) -> PromptJudge:
    if name == obeyed.NAME:
        return _Obeyed(device)
    from featcache.encoders.base import WeightsSource
    from trainer.evaluate.clip_scores import ClipScorer

    source = WeightsSource(weights_dir=None if weights_dir is None else Path(weights_dir))
    return ClipScorer(name, source=source, device=device)


class _Obeyed:
    """`trainer.evaluate.obeyed.CaptionJudge` as a `PromptJudge`: 1 where an image shows what its prompt names, else 0."""

    def __init__(self, device: torch.device | str) -> None:
        self._judge = obeyed.CaptionJudge(device=device)
        self.provenance: dict[str, Any] = dict(self._judge.provenance)

    def check(self, prompts: Sequence[str]) -> None:
        obeyed.parsed(prompts)

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        right = self._judge.right(images, prompts).astype(np.float64)
        each = {f"{obeyed.NAME}/{name}": column for name, column in zip(ATTRIBUTES, right.T, strict=True)}
        return {obeyed.NAME: right.min(1), **each}


def judge_prompts(
    images: ImageSet,
    prompts: Prompts,
    judges: Mapping[str, PromptJudge],
    *,
    count: int | None = None,
    batch_size: int = 64,
    bootstrap: int = 0,
    seed: int = 0,
    progress: Progress = QUIET,
) -> dict[str, Any]:
    """Scores of images, image i by prompt i modulo their number, averaged over all images.

    Args:
        judges: by name; each sees every image once.
        count: how many images to judge, the first ones; None takes all.
        batch_size: images per forward pass.
        bootstrap: replicates behind 95 % intervals, 0 for none. seed: of those.

    Returns:
        JSON-able, as `trainer.evaluate.judge.evaluate` does; `details` holds the scores' standard deviation.

    Raises:
        UserError: images of a wrong size or type, or fewer than `count`; a prompt that a judge cannot judge by.
    """
    started = time.perf_counter()
    total = images.count if count is None else count
    used = prompts.texts if total is None else prompts.texts[:total]
    for judge in judges.values():
        judge.check(used)
    scores: dict[str, list[np.ndarray]] = {}
    seen, side = 0, None
    progress.begin("judging by prompts", total)
    for batch in prefetch(images.batches(batch_size)):
        side = check_batch(batch, side, images.description)
        batch = batch if total is None else batch[: total - seen]
        if not len(batch):
            break
        texts = prompts.of(range(seen, seen + len(batch)))
        for judge in judges.values():
            for name, values in judge(batch, texts).items():
                scores.setdefault(name, []).append(values)
        seen += len(batch)
        progress.update(len(batch))
    if not seen or (count is not None and seen < count):
        raise UserError(
            f"{images.description} holds {seen} images, {count or 'some'} were asked for",
            remedy="Draw more (trainer sample --num), or judge what is there: --num.",
        )
    joined = {name: np.concatenate(parts) for name, parts in scores.items()}
    return {
        "metrics": {name: float(values.mean()) for name, values in joined.items()},
        "intervals": _intervals(joined, bootstrap, seed) if bootstrap else {},
        "details": {name: {"standard_deviation": float(values.std())} for name, values in joined.items()},
        "settings": {
            "samples": images.description,
            "sample_count": seen,
            "resolution": side,
            "judges": {name: dict(judge.provenance) for name, judge in judges.items()},
            "bootstrap": bootstrap,
            "seed": seed,
            "batch_size": batch_size,
        },
        "warnings": [],
        "time_s": {"prompts": round(time.perf_counter() - started, 3)},
    }


def _intervals(scores: Mapping[str, np.ndarray], replicates: int, seed: int) -> dict[str, list[float]]:
    found = {}
    for name, values in scores.items():

        def mean(indices: np.ndarray, values: np.ndarray = values) -> float:
            return float(values[indices].mean())

        estimate = float(values.mean())
        found[name] = list(bootstrap_interval(mean, len(values), estimate, replicates=replicates, seed=seed))
    return found


def split_metrics(
    asked: Sequence[str], prompts: Prompts | None, *, subject: str
) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Metrics that compare with a reference (None: all that the extractor defines), and those of prompts.

    Where none is asked for: all of the extractor's, and `prompts_obeyed` where all prompts are of the embedded set's kind.

    Args:
        subject: what is judged, for errors.

    Raises:
        UserError: a metric of prompts where there are none.
    """
    if not asked:
        return None, (obeyed.NAME,) if prompts is not None and obeyed.can_judge(prompts.texts) else ()
    lowered = [name.lower() for name in asked]
    of_prompts = tuple(name for name in PROMPT_METRICS if name in lowered)
    if of_prompts and prompts is None:
        raise UserError(
            f"the metric {of_prompts[0]} is of images and their prompts, and {subject} has none",
            remedy=f"Leave {of_prompts[0]} out of --metrics; or, for samples drawn by prompt, say which: --prompts FILE",
        )
    return tuple(name for name in asked if name.lower() not in PROMPT_METRICS), of_prompts
