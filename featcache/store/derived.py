"""Features that were made of another feature of the cache by an affine map: part of the manifest, so that whoever has the
cache can make them again, and make the same of other images.

Each token y, float32 [C] as the source feature decodes, becomes `y @ matrix + offset`, [K], in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from featcache.errors import UserError
from featcache.store.layout import Json
from featcache.store.numbers import from_text, to_text

MAX_NUMBERS = 1 << 18  # of a map, which lies in the manifest: 341 components of 768 channels


@dataclass(frozen=True, kw_only=True, eq=False)
class AffineMap:
    """matrix: float64 [C, K]; offset: float64 [K]. Raises `UserError` for other shapes, for more numbers than a manifest
    takes, and for numbers that are not finite."""

    matrix: np.ndarray
    offset: np.ndarray

    def __post_init__(self) -> None:
        matrix, offset = self.matrix, self.offset
        if matrix.ndim != 2 or offset.shape != matrix.shape[1:] or not matrix.size:
            raise UserError(
                f"a map has a matrix [C, K] and an offset [K], not {list(matrix.shape)}, {list(offset.shape)}"
            )
        if matrix.dtype != np.float64 or offset.dtype != np.float64:
            raise UserError(f"a map is of float64, not of {matrix.dtype} and {offset.dtype}")
        if matrix.size > MAX_NUMBERS:
            raise UserError(
                f"a map of {matrix.shape[0]} channels to {matrix.shape[1]} is too large for a manifest",
                remedy=f"Take at most {MAX_NUMBERS // matrix.shape[0]} components: --pca 8",
            )
        if not (np.isfinite(matrix).all() and np.isfinite(offset).all()):
            raise UserError("a map has numbers that are not finite")

    def first(self, components: int) -> AffineMap:
        """That to the first so many components."""
        return AffineMap(matrix=self.matrix[:, :components].copy(), offset=self.offset[:components].copy())

    def to_json(self) -> dict[str, Json]:
        """The arrays as base64 of their little-endian bytes."""
        return {"matrix": to_text(self.matrix, "<f8"), "offset": to_text(self.offset, "<f8")}

    @classmethod
    def from_json(cls, value: Json, components: int) -> AffineMap:
        """The inverse of `to_json`. Raises `UserError` for anything else, and other numbers of components."""
        if not isinstance(value, dict) or set(value) != {"matrix", "offset"}:
            raise UserError("a map is an object of matrix and offset")
        try:
            matrix, offset = (
                from_text(value["matrix"], "<f8").reshape(-1, components),
                from_text(value["offset"], "<f8"),
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"a map's numbers are base64 of float64: {error}") from error
        return cls(matrix=matrix.astype(np.float64), offset=offset.astype(np.float64))


@dataclass(frozen=True, kw_only=True)
class Derived:
    """What a derived feature's provenance says under `derived`.

    source: the feature that it was made of. map: by which. how: where that was found, for people and for whoever asks for
    the same again; only JSON values.
    """

    source: str
    map: AffineMap
    how: Mapping[str, Json]

    def to_json(self) -> dict[str, Json]:
        return {"from": self.source, "how": dict(self.how), "map": self.map.to_json()}


def problem(value: Json, shape: tuple[int, ...]) -> str | None:
    """What is wrong with the `derived` of a feature of that shape; None if nothing is."""
    try:
        parse_derived(value, shape)
    except UserError as error:
        return error.what
    return None


def parse_derived(value: Json, shape: tuple[int, ...]) -> Derived:
    """What a provenance says under `derived`; raises `UserError` if it is not that of a feature of that shape, [T, K]."""
    if not isinstance(value, dict) or set(value) != {"from", "how", "map"}:
        raise UserError("an object of from, how and map was expected")
    if not isinstance(value["from"], str) or not isinstance(value["how"], dict):
        raise UserError("from is a feature's name, and how an object")
    if len(shape) != 2:
        raise UserError(f"what is derived has the shape [T, K], not {list(shape)}")
    return Derived(source=value["from"], map=AffineMap.from_json(value["map"], shape[1]), how=value["how"])


def derived_of(provenance: Mapping[str, Any], shape: tuple[int, ...]) -> Derived | None:
    """How a feature of a manifest was derived; None if it was not."""
    return parse_derived(provenance["derived"], shape) if "derived" in provenance else None
