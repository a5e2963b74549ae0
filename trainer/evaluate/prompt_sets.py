"""The prompts behind an evaluation, as its record says: what keeps numbers of different prompts apart. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.runs.published import COCO_VAL, COCO_VAL_FILE, PUBLISHED_SAMPLES
from trainer.typeset import number


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """The first `used` of the `count` prompts of a source. Equal for evaluations that were made with the same prompts.

    sha256: of all of them. source: where they are from, a name.
    """

    source: str
    sha256: str
    count: int
    used: int

    @classmethod
    def of(cls, evaluation: Mapping[str, Any]) -> PromptSet | None:
        """Of an entry of `metrics.json` or a point of a sweep; None where its samples were not drawn by prompt."""
        settings = evaluation.get("settings")
        record = settings.get("prompts") if isinstance(settings, Mapping) else None
        if not isinstance(settings, Mapping) or not isinstance(record, Mapping):
            return None
        count, judged = _whole(record.get("count")), _whole(settings.get("sample_count"))
        return cls(
            source=str(record.get("source"))[:500],
            sha256=str(record.get("sha256"))[:64],
            count=count,
            used=min(count, judged),
        )

    @property
    def known(self) -> str | None:
        """Their name in `trainer.runs.published.PROMPTS`, where they are such, and as many as papers take."""
        return known_prompts(self.source) if self.used >= min(PUBLISHED_SAMPLES) else None

    def __str__(self) -> str:
        some = "all " if self.used == self.count else f"the first {number(self.used)} of "
        return f"{self.source}, {some}{number(self.count)}, digest {self.sha256[:12]}"


def known_prompts(source: str) -> str | None:
    """The key of `trainer.runs.published.PROMPTS` whose prompts a source has; None for all others."""
    return COCO_VAL if source.endswith(f" {COCO_VAL_FILE}") else None


def _whole(value: object) -> int:
    return value if isinstance(value, int) and 0 <= value < 1 << 53 else 0
