"""Every metric that can be asked for, with its facts (imports no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric.

    label: the name it is reported under with a standard network; others put theirs before it. function: its file in this
    folder and its name there: a function of a :class:`trainer.evaluate.trial.Trial`. reads: the feature it looks at; an
    extractor without that one does not define the metric. activations: whether it needs each image's `pool` on both
    sides, not its moments alone.
    """

    label: str
    function: str
    reads: Literal["pool", "spatial", "logits"] = "pool"
    activations: bool = False
    higher_is_better: bool = False


# In the order in which they are reported. A new metric is a function and a line here.
METRICS: Mapping[str, Metric] = {
    "fid": Metric(label="FID", function="measures.fid"),
    "sfid": Metric(label="sFID", function="measures.sfid", reads="spatial"),
    "inception_score": Metric(label="IS", function="measures.inception_score", reads="logits", higher_is_better=True),
    "precision": Metric(label="Precision", function="measures.precision", activations=True, higher_is_better=True),
    "recall": Metric(label="Recall", function="measures.recall", activations=True, higher_is_better=True),
    "kid": Metric(label="KID", function="measures.kid", activations=True),
}


def higher_is_better(reported: str) -> bool:
    """Whether a larger value is better of the metric reported under this name, such as `embedded-Recall`."""
    return not {m.label for m in METRICS.values() if m.higher_is_better}.isdisjoint(reported.split("-"))
