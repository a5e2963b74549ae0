"""Cached features as numbers: batches read and decoded on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from featcache.codecs import FeatureCodec
from featcache.errors import UserError
from featcache.keys import key_text

if TYPE_CHECKING:
    from featcache.read.reader import Cache

BATCH = 32
PIECE_VALUES = 1 << 19
KEY = "key"


def decode_in_pieces(codec: FeatureCodec, batch: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """`codec.decode`, a few samples at a time: on a CPU the float32 in between then stays in the cache, which is worth a
    factor of six for int8 tokens (it is allocated anew otherwise, page by page). Memory of its own."""
    count = len(batch[codec.arrays[0]])
    first = codec.decode({name: batch[name][:1] for name in codec.arrays}, dtype)
    out = torch.empty((count, *first.shape[1:]), dtype=first.dtype)
    together = max(1, PIECE_VALUES // max(1, first.numel()))
    for start in range(0, count, together):
        rows = slice(start, start + together)
        out[rows] = codec.decode({name: batch[name][rows] for name in codec.arrays}, dtype)
    return out


class Decoder:
    """Reads some features of a cache and decodes them on the CPU.

    Args:
        names: features of the cache.
        threads: as `Cache.reader` takes them.
        all_views: of flipped caches both views of each sample, `[B, 2, *shape]`; else the one that `read` is told.
    """

    def __init__(
        self, cache: Cache, names: Sequence[str], *, threads: int | None = None, all_views: bool = False
    ) -> None:
        self._reader = cache.reader(names, threads=threads, single_view=not all_views)
        self._codecs = {name: FeatureCodec(cache.manifest.features[name]) for name in self._reader.features}
        self._doubled = {name for name in self._codecs if all_views and cache.manifest.features[name].views > 1}

    def stored(self, indices: Sequence[int] | np.ndarray, views: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Stored arrays by name, `[B, *stored_shape]`, in memory of their own."""
        out = self._reader.allocate(len(indices))
        self._reader.read(indices, out, views=views)
        return out

    def read(
        self,
        indices: Sequence[int] | np.ndarray,
        dtype: torch.dtype = torch.float32,
        *,
        views: np.ndarray | None = None,
    ) -> dict[str, Any]:
        """Features by name, `[B, *shape]` in `dtype`; raw ones as they are stored, keys as a list of `str`."""
        stored = self.stored(indices, views)
        batch = {name: torch.from_numpy(values) for name, values in stored.items() if name != KEY}
        return {name: self._decoded(name, stored, batch, dtype) for name in self._codecs}

    def _decoded(self, name: str, stored: dict[str, np.ndarray], batch: dict[str, Tensor], dtype: torch.dtype) -> Any:
        if name == KEY:
            return [key_text(bytes(row)) for row in stored[KEY]]
        codec = self._codecs[name]
        if name not in self._doubled:
            return decode_in_pieces(codec, batch, dtype)
        of_feature = {array: batch[array].flatten(0, 1) for array in codec.arrays}
        return decode_in_pieces(codec, of_feature, dtype).unflatten(0, (-1, 2))

    def as_numpy(self, name: str, value: Any, dtype: np.dtype) -> np.ndarray:
        """A feature that `read` gave in float32, in `dtype`."""
        if name == KEY:
            return np.array(value, dtype=object)
        array: np.ndarray = value.numpy()
        return array if self._codecs[name].codec == "raw" else array.astype(dtype, copy=False)

    def close(self) -> None:
        self._reader.close()


def read_samples(decoder: Decoder, indices: Sequence[int] | np.ndarray, dtype: Any, view: int) -> dict[str, Any]:
    """What `Cache.read` returns."""
    views = np.full(len(indices), view, np.int64) if view else None
    if dtype is None:
        return decoder.stored(indices, views)
    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point:
            raise _no_dtype(dtype)
        return decoder.read(indices, dtype, views=views)
    wanted = _numpy_dtype(dtype)
    return {name: decoder.as_numpy(name, value, wanted) for name, value in decoder.read(indices, views=views).items()}


def _numpy_dtype(dtype: Any) -> np.dtype:
    try:
        found: np.dtype = np.dtype(dtype)
    except TypeError:
        raise _no_dtype(dtype) from None
    if found.kind != "f":
        raise _no_dtype(dtype)
    return found


def _no_dtype(dtype: Any) -> UserError:
    return UserError(
        f"features cannot be decoded to {dtype!r}",
        remedy="Ask for a floating dtype of numpy (np.float32) or torch (torch.bfloat16), or None for what is stored.",
    )


def read_decoded(
    cache: Cache, names: Sequence[str], indices: Sequence[int] | np.ndarray, *, all_views: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Features of some samples in float32 (raw ones in their own dtype), `[B, *shape]` by name, `BATCH` at a time.

    all_views: of flipped caches both views, as samples of their own (`B` is then twice as large); else the first.
    """
    chosen = np.asarray(indices, np.int64)
    decoder = Decoder(cache, names, all_views=all_views)
    doubled = {name for name in names if all_views and cache.manifest.features[name].views > 1}
    try:
        for first in range(0, len(chosen), BATCH):
            batch = decoder.read(chosen[first : first + BATCH])
            yield {name: value.flatten(0, 1) if name in doubled else value for name, value in batch.items()}
    finally:
        decoder.close()
