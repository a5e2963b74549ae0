"""Principal components of tokens, taken as they come: what a feature's basis is fitted by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from featcache.errors import CacheError, UserError
from featcache.store.basis import Basis, token_width
from featcache.store.derived import AffineMap

TOKENS = 64  # of each image: neighbours say much the same
_ALIKE = 1e-6  # entries that differ by less, as a share, are equal but for rounding
_SMALLEST = 1e-6  # of the largest standard deviation: a component below it is rounding


class TokenMoments:
    """Mean and covariance of tokens [n, C], in float64. Sums are of differences from the first tokens' mean, so that a mean
    far from zero costs no digits."""

    def __init__(self) -> None:
        self.count = 0
        self._origin = self._sum = self._products = np.zeros(0)

    def add(self, tokens: np.ndarray) -> None:
        tokens = tokens.astype(np.float64)
        if not self.count:
            self._origin = tokens.mean(0)
            self._sum, self._products = np.zeros_like(self._origin), np.zeros((tokens.shape[1],) * 2)
        tokens -= self._origin
        self.count += len(tokens)
        self._sum += tokens.sum(0)
        self._products += tokens.T @ tokens

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [C] and covariance [C, C], divided by the number of tokens."""
        mean = self._sum / self.count
        return self._origin + mean, self._products / self.count - np.outer(mean, mean)


class Components:
    """Bases of features, found in their tokens as the shards of a build come; a `ShardWriter`."""

    def __init__(self) -> None:
        self._moments: dict[str, TokenMoments] = {}

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
        chosen = values[..., places, :]
        tokens = chosen if chosen.ndim == 3 else chosen.swapaxes(1, 2)
        if len(values):
            moments = self._moments.setdefault(feature, TokenMoments())
            moments.add(tokens.reshape(-1, token_width(values.shape[1:])))

    def count(self, feature: str) -> int:
        """Tokens added so far."""
        return self._moments[feature].count if feature in self._moments else 0

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
        mean, covariance = self._moments[feature].result()
        if not np.isfinite(covariance).all():
            raise CacheError(f"{feature} has values that are not finite", remedy="Type --precision fp32.")
        values, vectors = principal(covariance, rank)
        std = np.sqrt(np.clip(values, 0, None))
        std = np.clip(std, _SMALLEST * max(float(std[0]), 1e-30), None)
        return Basis.of(mean, std, vectors)


def principal(covariance: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The `rank` largest eigenvalues of a symmetric matrix [D, D], descending, and their vectors [rank, D] of length 1.

    Signs are the solver's choice: the largest entry of each vector is positive, and of equally large ones the first, so that
    one sample gives one basis.
    """
    values, vectors = np.linalg.eigh(covariance)  # ascending
    values, vectors = values[::-1][:rank], vectors.T[::-1][:rank]
    size = np.abs(vectors)
    largest = (size >= (1 - _ALIKE) * size.max(1, keepdims=True)).argmax(1)
    signs = np.sign(vectors[np.arange(rank), largest])
    return values, vectors * signs[:, None]


def standardised_components(
    mean: np.ndarray, covariance: np.ndarray, components: int
) -> tuple[AffineMap, np.ndarray, float]:
    """Principal components of tokens of which each channel has been standardised, as one affine map of the tokens.

    With the standard deviation s of each channel and the leading eigenvectors W [K, C] of the correlation matrix that is
    `z = ((y - mean) / s) W^T`. A channel that never changes is left out. Returns the map [C] -> [K], the variance along each
    component [K], largest first, and the sum of all variances.

    Raises `UserError` if the tokens have fewer channels, or use fewer directions, than components were asked for.
    """
    C = len(mean)
    if not 1 <= components <= C:
        raise UserError(
            f"{components} components were asked for, and the tokens have {C} channels", remedy=f"Choose 1 to {C}."
        )
    std = np.sqrt(np.clip(np.diag(covariance), 0, None))
    live = std > max(_SMALLEST * float(std.max()), 1e-30)
    inverse = np.where(live, 1 / np.where(live, std, 1), 0.0)
    values, vectors = principal(covariance * np.outer(inverse, inverse), components)
    used = int((values > _SMALLEST**2 * values[0]).sum()) if live.any() else 0
    if used < components:
        raise UserError(
            f"{components} components were asked for, and the tokens use {used} directions",
            remedy="Choose fewer components, or find them in more images.",
        )
    matrix = (vectors * inverse).T
    return AffineMap(matrix=np.ascontiguousarray(matrix), offset=-(mean @ matrix)), values, float(live.sum())
