"""Small pictures for strips: enlarging, heat maps, marks."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from PIL import Image

SIDE = 112


def enlarge(pixels: np.ndarray, *, smooth: bool = False) -> np.ndarray:
    """uint8 [h, w, 3] -> [SIDE, SIDE, 3], tokens as plain squares unless `smooth`."""
    how = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((SIDE, SIDE), how))


def heat(values: np.ndarray, *, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """float [g, g] -> uint8 [SIDE, SIDE, 3] in matplotlib's viridis; outside values take the ends' colours."""
    scaled = np.clip((values - low) / (high - low), 0, 1)
    return enlarge((colormaps["viridis"](scaled)[..., :3] * 255).round().astype(np.uint8))


def over(heat: np.ndarray, image: np.ndarray, share: float = 0.3) -> np.ndarray:
    """A heat map [S, S, 3] laid over its image [R, R, 3], of which `share` of the brightness shows through."""
    grey = enlarge(image, smooth=True).astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return ((1 - share) * heat + share * grey[..., None]).round().astype(np.uint8)


def mark(pixels: np.ndarray, patch: int, grid: int) -> np.ndarray:
    """A black square with a white rim around one patch of the row-major token grid, on a copy. [S, S, 3]."""
    out = pixels.copy()
    cell = len(out) / grid
    top, left = int(patch // grid * cell), int(patch % grid * cell)
    bottom, right = int((patch // grid + 1) * cell) - 1, int((patch % grid + 1) * cell) - 1
    for inset, colour in ((0, 255), (1, 0), (2, 0), (3, 255)):
        t, l, b, r = top + inset, left + inset, bottom - inset, right - inset
        out[[t, b], l : r + 1] = colour
        out[t : b + 1, [l, r]] = colour
    return out
