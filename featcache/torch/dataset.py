"""A cache as a map-style dataset."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.utils.data

from featcache.errors import UserError
from featcache.read.decoded import Decoder
from featcache.read.open import open_cache
from featcache.read.reader import Cache


class Dataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Samples of a cache for `torch.utils.data.DataLoader`: dictionaries of tensors by the feature's name.

    A batch is read in one go (`__getitems__`), by each worker in its own process, forked or spawned. Features are decoded
    when they are read; integers (`label`) stay what they are, and `key` is a `str`.

    Args:
        cache: an open one, or its folder or URL.
        features: names; default all but `content`.
        dtype: of decoded features. None: stored arrays by their names.
        view: of a cache of mirrored images: 0 as they are, 1 mirrored, `random` a fair coin of torch's generator for
            each sample (`DataLoader` seeds it in each worker).

    Raises:
        CacheError: no cache, or a feature that it lacks. UserError: a dtype or view that there is not.
    """

    def __init__(
        self,
        cache: Cache | str | os.PathLike[str],
        features: Sequence[str] | None = None,
        *,
        dtype: torch.dtype | None = torch.float32,
        view: Literal[0, 1, "random"] = 0,
    ) -> None:
        self.cache = cache if isinstance(cache, Cache) else open_cache(cache)
        self.features = tuple(n for n in self.cache.features if n != "content") if features is None else tuple(features)
        self.cache.require(self.features)
        if dtype is not None and not dtype.is_floating_point:
            raise UserError(f"features cannot be decoded to {dtype}", remedy="Type for example dtype=torch.bfloat16.")
        if view not in (0, 1, "random"):
            raise UserError(f"there is no view {view!r}", remedy="Views are 0, 1 and 'random'.")
        self.dtype, self.view = dtype, view
        self._process, self._decoder = os.getpid(), None if torch.utils.data.get_worker_info() else self._open()

    def _open(self) -> Decoder:
        # Workers are many, so each reads in its own thread.
        return Decoder(self.cache, self.features, threads=0 if torch.utils.data.get_worker_info() else None)

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} is outside the cache's {len(self)} samples")
        return self.__getitems__([index % len(self)])[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several samples at once, as `DataLoader` asks for them."""
        if self._decoder is None or self._process != os.getpid():
            if self._process != os.getpid():  # a child's: connections and locks were its parent's
                self.cache, self._process = self.cache.reopened(), os.getpid()
            self._decoder = self._open()
        views = self._views(len(indices))
        batch: Mapping[str, Any]
        if self.dtype is None:
            batch = {name: torch.from_numpy(rows) for name, rows in self._decoder.stored(indices, views).items()}
        else:
            batch = self._decoder.read(indices, self.dtype, views=views)
        return [{name: values[row] for name, values in batch.items()} for row in range(len(indices))]

    def _views(self, count: int) -> np.ndarray | None:
        if self.view == "random":
            return torch.randint(2, (count,)).numpy()
        return np.ones(count, np.int64) if self.view else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoder": None}
