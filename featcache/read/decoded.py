"""Cached features as numbers: how one lies in a batch of stored bytes, and batches read and decoded on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from featcache.codecs import decode
from featcache.read.reader import Cache
from featcache.store.layout import stored_arrays
from featcache.store.manifest import FeatureSpec

BATCH = 32


@dataclass(frozen=True, kw_only=True)
class CachedFeature:
    """How one feature lies in a batch: what its decoding needs, without the cache."""

    name: str
    shape: tuple[int, ...]
    codec: str
    dtype: str

    @classmethod
    def of(cls, spec: FeatureSpec) -> CachedFeature:
        return cls(name=spec.name, shape=tuple(spec.shape), codec=spec.codec, dtype=spec.dtype)

    def decode(self, batch: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """Stored arrays of the batch, by name => `[B, *shape]`; pure, so that it compiles into a training step."""
        stored = {s: batch[self.name + s] for s in stored_arrays(self.codec, self.shape, self.dtype)}
        return decode(self.codec, stored, self.shape, dtype)


def read_decoded(
    cache: Cache, names: Sequence[str], indices: Sequence[int] | np.ndarray, *, all_views: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Features of some samples in float32 (raw ones in their own dtype), `[B, *shape]` by name, `BATCH` at a time.

    all_views: of flipped caches both views, as samples of their own (`B` is then twice as large); else the first.
    """
    chosen = np.asarray(indices, np.int64)
    features = [CachedFeature.of(cache.manifest.features[name]) for name in names]
    with cache.reader(list(names), single_view=not all_views) as reader:
        out = reader.allocate(min(BATCH, len(chosen)))
        for first in range(0, len(chosen), BATCH):
            part = chosen[first : first + BATCH]
            reader.read(part, out)
            batch = {name: torch.from_numpy(values[: len(part)]) for name, values in out.items()}
            if all_views:
                flipped = {a for n in names if (spec := cache.manifest.features[n]).views > 1 for a in spec.arrays}
                batch = {name: t.flatten(0, 1) if name in flipped else t for name, t in batch.items()}
            # A raw or fp32 feature decodes to its buffer, which the next batch overwrites.
            yield {f.name: f.decode(batch).clone() for f in features}
