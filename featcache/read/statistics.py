"""Statistics of cached tokens, layer by layer: mean, covariance, and what they say of a level's worth as a target.

A level whose tokens share one large mean vector, or that uses few directions, gives an alignment loss little to teach:
a constant answers it. `featcache inspect` shows the figures, AHPA's `normalize` undoes what they describe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from featcache.errors import CacheError
from featcache.read.decoded import read_decoded
from featcache.read.reader import Cache

IMAGES, TOKENS = 512, 128


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """Of a feature's L layers (1 for tokens `[T, C]`), over its tokens, float64.

    mean: `[L, C]`. covariance: `[L, C, C]`, divided by the number of tokens. neighbour: `[L]`, mean cosine between a
    token and the same token one layer before, in this feature or the one read before it; NaN where there is none of
    the same width. count: tokens.
    """

    mean: Tensor
    covariance: Tensor
    neighbour: Tensor
    count: int

    @property
    def rms(self) -> Tensor:
        """`[L]`: root mean square of the activations."""
        return (self._squared_norm / self.mean.shape[-1]).sqrt()

    @property
    def mean_share(self) -> Tensor:
        """`[L]`: share of the mean vector in the tokens' squared norm; 1 where all tokens are one vector."""
        return self.mean.square().sum(-1) / self._squared_norm.clamp(min=1e-300)

    @property
    def effective_rank(self) -> Tensor:
        """`[L]`: exponential of the entropy of the covariance's eigenvalues, as shares of their sum (Roy and Vetterli,
        2007); from 1 to C."""
        values = torch.linalg.eigvalsh(self.covariance).clamp(min=0)
        share = values / values.sum(-1, keepdim=True).clamp(min=1e-300)
        rank: Tensor = torch.special.entr(share).sum(-1).exp()
        return rank

    @property
    def std(self) -> Tensor:
        """`[L, C]`: standard deviation of each channel."""
        return self.covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()

    @property
    def _squared_norm(self) -> Tensor:
        """`[L]`: mean over the tokens."""
        return self.mean.square().sum(-1) + self.covariance.diagonal(dim1=-2, dim2=-1).sum(-1)

    def whitening(self, shrinkage: float) -> Tensor:
        """`[L, C, C]`: symmetric W with `W (covariance + shrinkage * its mean variance * I) W = I` (ZCA).

        shrinkage: directions of less variance than this share of a channel's mean are not blown up to the size of the
        others: what a codec's rounding leaves there is noise.
        """
        values, vectors = torch.linalg.eigh(self.covariance)
        values = values.clamp(min=0)
        floor = (shrinkage * values.mean(-1, keepdim=True)).clamp(min=1e-30)
        whitening: Tensor = (vectors * (values + floor).rsqrt()[:, None]) @ vectors.mT
        return whitening


def layer_statistics(
    cache: Cache, names: Sequence[str], *, images: int = IMAGES, tokens: int = TOKENS, seed: int = 0
) -> dict[str, LayerStatistics]:
    """Statistics of some features, tokens `[T, C]` or groups of layers `[L, T, C]`, from a sample of the cache.

    Args:
        images, tokens: how many images, and of each how many tokens at the same places in all layers, drawn by `seed`;
            all where there are fewer. Flipped caches give their first view.

    One pass over the sample's bytes; sums are float64. The same for the same cache and seed, on any machine up to the
    rounding of float64.

    Raises `CacheError` if the cache lacks one of them, or holds no images or values that are not finite.
    """
    cache.require(names)
    if not len(cache):
        raise CacheError(f"{cache.path} holds no images to take statistics of")
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(len(cache), min(images, len(cache)), replace=False))
    sums = {name: _Sums() for name in names}
    first = 0
    for batch in read_decoded(cache, names, chosen):
        before: Tensor | None = None  # the last layer of the feature before: [B, T, C]
        for name, values in batch.items():
            layers = values[:, None] if values.ndim == 3 else values  # [B, L, T, C]
            if before is not None and before.shape != (len(layers), *layers.shape[2:]):
                before = None
            places = np.sort(np.random.default_rng((seed, first)).permutation(layers.shape[2])[:tokens])
            sums[name].add(layers[:, :, places], None if before is None else before[:, places])
            before = layers[:, -1]
        first += len(values)
    for name, found in sums.items():
        if not bool(torch.isfinite(found.products).all()):
            raise CacheError(f"{name} in {cache.path} holds values that are not finite", remedy="Build it again.")
    return {name: found.result() for name, found in sums.items()}


class _Sums:
    """Sums of one feature's tokens, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.total = self.products = self.cosines = torch.zeros(())

    def add(self, layers: Tensor, before: Tensor | None) -> None:
        """`layers` `[B, L, T, C]`; before: the layer before the first, `[B, T, C]`."""
        flat = layers.double().transpose(0, 1).flatten(1, 2)  # [L, n, C]
        self.count += flat.shape[1]
        self.total = self.total + flat.sum(1)
        self.products = self.products + flat.mT @ flat
        cosine = torch.full((len(flat),), torch.nan, dtype=torch.float64)
        if before is not None:
            cosine[0] = F.cosine_similarity(flat[0], before.double().flatten(0, 1), dim=-1).sum()
        cosine[1:] = F.cosine_similarity(flat[1:], flat[:-1], dim=-1).sum(-1)
        self.cosines = self.cosines + cosine

    def result(self) -> LayerStatistics:
        mean = self.total / self.count
        covariance = self.products / self.count - mean[:, :, None] * mean[:, None]
        return LayerStatistics(mean=mean, covariance=covariance, neighbour=self.cosines / self.count, count=self.count)
