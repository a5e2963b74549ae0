"""Arrays as text in a manifest: base64 of their little-endian bytes."""

from __future__ import annotations

import base64

import numpy as np


def to_text(values: np.ndarray, dtype: str) -> str:
    """The array's values as `dtype`, such as `<f4`."""
    return base64.b64encode(np.ascontiguousarray(values, dtype).tobytes()).decode("ascii")


def from_text(text: str, dtype: str) -> np.ndarray:
    """The inverse, flat and read-only. Raises `ValueError` for anything that is not that."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype)
