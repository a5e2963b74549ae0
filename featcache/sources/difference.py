"""How far a fast decoder is from the exact crop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from featcache.errors import UserError
from featcache.sources.base import Source
from featcache.sources.pixels import BadImage


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a decoder is from the exact crop over some images: in grey levels of 255, and the PSNR in dB."""

    images: int
    mean: float
    largest: int
    psnr_db: float


def difference(source: Source, indices: Sequence[int], resolution: int, decoder: str) -> Difference:
    """Crops of `indices` by `decoder` against those by `pil`. Unreadable images are left out.

    Raises `UserError` if none of them can be read.
    """
    errors = []
    for index in indices:
        try:
            exact, _ = source.load(index, resolution)
            fast, _ = source.load(index, resolution, decoder)
        except BadImage:
            continue
        errors.append(np.abs(exact.astype(np.int16) - fast))
    if not errors:
        raise UserError("none of the images can be decoded", remedy="Check --data.")
    every = np.stack(errors)
    squared = float(np.mean(np.square(every, dtype=np.float64)))
    psnr = float("inf") if squared == 0 else 10 * float(np.log10(255**2 / squared))
    return Difference(images=len(every), mean=float(every.mean()), largest=int(every.max()), psnr_db=psnr)
