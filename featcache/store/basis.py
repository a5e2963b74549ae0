"""A linear basis in which a feature's tokens are stored: part of the manifest, so that whoever has the cache has it.

A token is what an encoder says of one place: C channels, or those of all L layers of a VAE group together, D = L * C
numbers. It is stored as K coefficients, and reads back as `mean + (coefficients * scale) @ vectors`. Mixtures of layers
stay linear in the coefficients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from featcache.errors import UserError
from featcache.store.numbers import from_text, to_text

MAX_WIDTH = 1 << 14  # of a token; its principal components are found in a matrix of that side


@dataclass(frozen=True, kw_only=True)
class Basis:
    """mean: float32 [D], scale: float32 [K], vectors: float16 [K, D], in base64 of their little-endian bytes, as the
    manifest has them.

    Vectors are principal components, of length 1; scale is the standard deviation along them, so that coefficients have
    variance 1 and one step of quantisation suits them all.
    """

    rank: int
    mean: str
    scale: str
    vectors: str

    @classmethod
    def of(cls, mean: np.ndarray, scale: np.ndarray, vectors: np.ndarray) -> Basis:
        """From float arrays [D], [K] and [K, D]."""
        return cls(
            rank=len(vectors), mean=to_text(mean, "<f4"), scale=to_text(scale, "<f4"), vectors=to_text(vectors, "<f2")
        )

    @classmethod
    def unfitted(cls, rank: int, shape: tuple[int, ...]) -> Basis:
        """A placeholder of the size that a fitted one will have: what is stored by it can be planned, not encoded.

        Raises `UserError` if tokens of a feature of that shape cannot have so many components.
        """
        width = token_width(shape)
        if not 1 <= rank <= width:
            raise UserError(
                f"a basis of {rank} components was asked for, and its tokens have {width} channels",
                remedy=f"Choose 1 to {width}.",
            )
        return cls.of(np.zeros(width), np.zeros(rank), np.zeros((rank, width)))

    @property
    def is_fitted(self) -> bool:
        return bool(self.arrays()[1].all())

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """mean float32 [D], scale float32 [K], vectors float16 [K, D]; raises `ValueError` if the text holds others."""
        vectors = from_text(self.vectors, "<f2").reshape(self.rank, -1)
        return from_text(self.mean, "<f4"), from_text(self.scale, "<f4"), vectors


def token_width(shape: tuple[int, ...]) -> int:
    """D of a feature's per-sample shape, [T, C] or [L, T, C]; raises `UserError` for others."""
    if len(shape) not in (2, 3):
        raise UserError(
            f"a basis is for tokens, and the feature has the shape {'x'.join(map(str, shape)) or 'scalar'}",
            remedy="Leave the basis out.",
        )
    width = math.prod(shape) // shape[-2]
    if width > MAX_WIDTH:
        raise UserError(f"a basis is for tokens of at most {MAX_WIDTH} channels, and these have {width}")
    return width


def problem(basis: Basis, shape: tuple[int, ...]) -> str | None:
    """What is wrong with a basis that came with a feature of that shape; None if nothing is."""
    try:
        width = token_width(shape)
        mean, scale, vectors = basis.arrays()
    except (UserError, ValueError) as error:
        return str(error)
    if len(mean) != width or len(scale) != basis.rank or vectors.shape != (basis.rank, width):
        return f"{len(mean)}, {len(scale)} and {list(vectors.shape)} numbers for tokens of {width}"
    if not all(np.isfinite(values).all() for values in (mean, scale, vectors)):
        return "numbers that are not finite"
    return None
