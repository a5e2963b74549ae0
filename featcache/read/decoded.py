"""Cached features as numbers: batches read and decoded on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from featcache.codecs import FeatureCodec
from featcache.read.reader import Cache

BATCH = 32


def read_decoded(
    cache: Cache, names: Sequence[str], indices: Sequence[int] | np.ndarray, *, all_views: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Features of some samples in float32 (raw ones in their own dtype), `[B, *shape]` by name, `BATCH` at a time.

    all_views: of flipped caches both views, as samples of their own (`B` is then twice as large); else the first.
    """
    chosen = np.asarray(indices, np.int64)
    features = [FeatureCodec(cache.manifest.features[name]) for name in names]
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
