"""Intervals of time: one type from the command line and the recipes to the sampler. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import PlainValidator

from featcache.errors import UserError


@dataclass(frozen=True)
class Interval:
    """A closed interval of t in [0, 1], where 0 is data and 1 is noise.

    Raises:
        UserError: bounds outside [0, 1], or the lower above the upper.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise UserError(
                f"an interval of t from {self.low} to {self.high} was asked for",
                remedy="Use LOW,HIGH with 0 <= LOW <= HIGH <= 1, where 0 is data and 1 is noise: for example 0,0.7.",
            )
        for name in ("low", "high"):  # equal intervals are alike in every way: 0 and 1 as typed, -0.0
            object.__setattr__(self, name, abs(float(getattr(self, name))))

    def __contains__(self, t: float) -> bool:
        return self.low <= t <= self.high

    def __str__(self) -> str:
        """`LOW,HIGH`, one text for equal intervals: what `parse` reads, and what file names hold."""
        return f"{plain(self.low)},{plain(self.high)}"

    @classmethod
    def parse(cls, value: object) -> Interval:
        """From `LOW,HIGH` as typed, from a list of two numbers as in YAML, or from an interval.

        Raises:
            UserError: anything else, or as the constructor.
        """
        if isinstance(value, cls):
            return value
        parts = value.split(",") if isinstance(value, str) else value
        try:
            if not isinstance(parts, list | tuple):
                raise TypeError
            low, high = map(_bound, parts)
        except (TypeError, ValueError, OverflowError):
            raise UserError(
                f"{value!r:.200} is not an interval LOW,HIGH", remedy="Write two numbers, for example 0,0.7."
            ) from None
        return cls(low, high)


# A field of settings that takes whatever `Interval.parse` reads.
ParsedInterval = Annotated[Interval, PlainValidator(Interval.parse)]


def plain(value: float) -> str:
    """The shortest text that reads as this number again: `0.7`, and `1` for 1.0."""
    return repr(float(value)).removesuffix(".0")


def _bound(part: object) -> float:
    if isinstance(part, bool) or not isinstance(part, str | int | float):
        raise TypeError
    return float(part)
