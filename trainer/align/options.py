"""Checks shared by the methods' option dataclasses. No torch here."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

from featcache.errors import UserError


def suggest(value: object, choices: Iterable[str]) -> str:
    """``"Did you mean 'x'? "`` for a near miss, else an empty string."""
    close = difflib.get_close_matches(str(value), list(choices), n=1)
    return f"Did you mean {close[0]!r}? " if close else ""


def check_choice(method: str, option: str, value: object, choices: Sequence[str]) -> None:
    """Raises UserError unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise UserError(
            f"{method}: {option}={value!r} is not known",
            remedy=f"{suggest(value, choices)}Use one of: {', '.join(choices)}.",
        )


def check_real(
    method: str,
    option: str,
    value: object,
    *,
    low: float = 0.0,
    high: float = math.inf,
    exclude_low: bool = False,
) -> None:
    """Raises UserError unless ``value`` is finite and in [low, high]; ``exclude_low``: in (low, high]."""
    real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not real or not low <= value <= high or (exclude_low and value == low):  # type: ignore[operator]
        bracket = "(" if exclude_low else "["
        closing = ")" if math.isinf(high) else "]"
        raise UserError(
            f"{method}: {option}={value!r} is not a number in {bracket}{low:g}, {high:g}{closing}",
            remedy=f"Give {option} as a plain number, e.g. {option}=0.5.",
        )


def check_int(method: str, option: str, value: object, *, low: int = 1) -> None:
    """Raises UserError unless ``value`` is an integer of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UserError(
            f"{method}: {option}={value!r} is not an integer of at least {low}",
            remedy=f"Give {option} as a whole number, e.g. {option}={max(low, 4)}.",
        )


def check_flag(method: str, option: str, value: object) -> None:
    """Raises UserError unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise UserError(
            f"{method}: {option}={value!r} is neither true nor false",
            remedy=f"Write {option}=true or {option}=false.",
        )


def freeze_tuple(config: Any, method: str, option: str, item: type) -> None:
    """Turns a list (as YAML gives it) in a field of a frozen dataclass into a tuple and checks its items."""
    value = getattr(config, option)
    if not isinstance(value, list | tuple) or any(isinstance(v, bool) or not isinstance(v, item) for v in value):
        raise UserError(
            f"{method}: {option}={value!r} is not a list of {'names' if item is str else 'whole numbers'}",
            remedy=f"Write it as a list, e.g. {option}=[{'name' if item is str else '4'}].",
        )
    if len(set(value)) != len(value):
        raise UserError(f"{method}: {option}={value!r} names something twice", remedy="Drop the repetition.")
    object.__setattr__(config, option, tuple(value))
