"""Numbers and settings as text for people: in findings, tables and keys."""

from __future__ import annotations

import math


def number(value: float) -> str:
    """Four significant digits, without exponents in the usual range."""
    if not math.isfinite(value):
        text = str(value)
    elif value == int(value) and abs(value) < 1e9:
        text = f"{int(value):,}"
    elif abs(value) >= 1000:
        text = f"{value:,.0f}"
    elif abs(value) < 1e-3:
        text = f"{value:.2e}"
    else:
        text = f"{value:.4g}"
    return _typeset(text)


def measure(value: float) -> str:
    """A measured value with decimals that line up: 8.10, 123.4, 0.612."""
    if not math.isfinite(value) or abs(value) >= 1000:
        return number(value)
    if 0 < abs(value) < 0.01:
        return _typeset(f"{value:.2g}")
    return _typeset(f"{value:.{1 if abs(value) >= 100 else 2 if abs(value) >= 2 else 3}f}")


def setting(value: object) -> str:
    """What a JSON or YAML file holds, as text; a dash for null."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) >= 2**53:
        return f"{value!s:.40}"
    if isinstance(value, int | float):
        return number(float(value))
    if isinstance(value, list | tuple):
        return (" to " if len(value) == 2 else ", ").join(setting(v) for v in value)
    return str(value)


def _typeset(text: str) -> str:
    """Thin spaces between thousands, a real minus sign."""
    return text.replace(",", "\u202f").replace("-", "\u2212")
