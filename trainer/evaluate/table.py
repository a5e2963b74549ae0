"""Every metric that can be asked for, with its facts (imports no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric.

    label: the name it is reported under with a standard network; others put theirs before it. function: its file in this
    folder and its name there: a function of a `trainer.evaluate.trial.Trial`. reads: the feature it looks at; an
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


# Metrics of images and their prompts, which need no reference; and what they are, in words. Larger ones are better.
PROMPT_METRICS: Mapping[str, str] = {
    "clip_score": "CLIP score: cosine of the image's and its prompt's embeddings under CLIP ViT-L/14, mean",
    "pick_score": "PickScore: what people would prefer for the prompt, by PickScore_v1 (CLIP ViT-H/14), mean",
    "prompts_obeyed": "Prompts obeyed: share of images in which the embedded caption judge sees all that the prompt names",
}
_ASPECT = "prompts_obeyed/"  # and what of the prompt


def in_words(reported: str) -> str | None:
    """What a metric of prompts is, by the name it is reported under; None for all others."""
    if reported.startswith(_ASPECT):
        return f"share of images whose {reported.removeprefix(_ASPECT)} is as the prompt says, by the embedded caption judge"
    return PROMPT_METRICS.get(reported.removeprefix("random-"))


_WITH_ACTIVATIONS = {"KD", *(metric.label for metric in METRICS.values() if metric.activations)}


def decided_by(reported: str) -> tuple[str, ...]:
    """Which settings of an evaluation decide the metric reported under this name, beside how its samples were drawn."""
    counted = ("sample_count", "resolution")
    parts = reported.split("-")
    if in_words(reported) is not None:
        return (*counted, "judges")
    if METRICS["inception_score"].label in parts:
        return (*counted, "extractor")
    kept = () if _WITH_ACTIVATIONS.isdisjoint(parts) else ("reference_features", "reference_draw")
    return (*counted, "extractor", "reference", "reference_count", *kept)


def higher_is_better(reported: str) -> bool:
    """Whether a larger value is better of the metric reported under this name, such as `embedded-Recall`."""
    if in_words(reported) is not None:
        return True
    return not {m.label for m in METRICS.values() if m.higher_is_better}.isdisjoint(reported.split("-"))
