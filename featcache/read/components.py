"""Principal components of tokens, taken as they come: what a feature's basis is fitted by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from featcache.errors import CacheError, UserError
from featcache.store.basis import Basis, token_width

TOKENS = 64  # of each image: neighbours say much the same
_SMALLEST = 1e-6  # of the largest standard deviation: a component below it is rounding


class Components:
    """Mean and covariance of tokens, in float64, taken as the shards of a build come; a `ShardWriter`."""

    def __init__(self) -> None:
        self._count: dict[str, int] = {}
        self._sum: dict[str, np.ndarray] = {}
        self._products: dict[str, np.ndarray] = {}

    def skip(self, shard: int, slots: Sequence[tuple[int, str, str]]) -> None:
        pass

    def write_shard(self, feature: str, shard: int, arrays: Mapping[str, np.ndarray]) -> None:
        values = arrays[""]
        left_out = (values == 0).reshape(len(values), -1).all(1)  # the place of an image that could not be read
        self.add(feature, values[~left_out], seed=shard)

    def commit(self) -> None:
        pass

    def add(self, feature: str, values: np.ndarray, *, seed: int) -> None:
        """Tokens of images `[n, T, C]` or `[n, L, T, C]`; of more than `TOKENS` places some, drawn by `seed`."""
        places = np.sort(np.random.default_rng(seed).permutation(values.shape[-2])[:TOKENS])
        chosen = values[..., places, :].astype(np.float64)
        tokens = chosen if chosen.ndim == 3 else chosen.swapaxes(1, 2)
        tokens = tokens.reshape(-1, token_width(values.shape[1:]))
        self._count[feature] = self._count.get(feature, 0) + len(tokens)
        self._sum[feature] = self._sum.get(feature, 0) + tokens.sum(0)
        self._products[feature] = self._products.get(feature, 0) + tokens.T @ tokens

    def count(self, feature: str) -> int:
        """Tokens added so far."""
        return self._count.get(feature, 0)

    def basis(self, feature: str, rank: int) -> Basis:
        """The leading components of what was added.

        Raises:
            UserError: there are fewer tokens than components. CacheError: their numbers are not finite.
        """
        count = self.count(feature)
        if count < rank:
            raise UserError(
                f"{rank} components of {feature} were asked for, and there are {count} tokens to find them in",
                remedy="Choose fewer components, or build from more images.",
            )
        mean = self._sum[feature] / count
        covariance = self._products[feature] / count - np.outer(mean, mean)
        if not np.isfinite(covariance).all():
            raise CacheError(f"{feature} has values that are not finite", remedy="Type --precision fp32.")
        values, vectors = np.linalg.eigh(covariance)  # ascending
        values, vectors = values[::-1][:rank], vectors.T[::-1][:rank]
        std = np.sqrt(np.clip(values, 0, None))
        std = np.clip(std, _SMALLEST * max(float(std[0]), 1e-30), None)
        # Signs are the solver's choice: the largest entry is positive, so that one sample gives one basis.
        largest = np.abs(vectors).argmax(1)
        signs = np.sign(vectors[np.arange(rank), largest])
        return Basis.of(mean, std, vectors * signs[:, None])
