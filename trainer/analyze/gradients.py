"""Gradients as objects of study: per-sample gradients, their moments, angles between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from featcache.errors import UserError

GsnrEstimator = Literal["plugin", "unbiased"]


@dataclass(frozen=True)
class Moments:
    """What G-SNR needs of `count` per-sample gradients: `||mean||^2` and the trace of their sample covariance."""

    count: int
    squared_mean: float
    trace: float


class GradientMoments:
    """Running mean and total variance of per-sample gradients, which need not be in memory together.

    Keeps their float64 sum [P] and the sum of their squared norms.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None
        self._squares = 0.0

    def add(self, gradients: Tensor) -> None:
        """One chunk of per-sample gradients [b, P]."""
        total = gradients.sum(dim=0, dtype=torch.float64)
        self._sum = total if self._sum is None else self._sum.add_(total)
        self._squares += float(gradients.square().sum(dtype=torch.float64))
        self.count += len(gradients)

    @property
    def mean(self) -> Tensor:
        """float64 [P]."""
        assert self._sum is not None, "no gradients were added"
        return self._sum / self.count

    @property
    def squared_mean(self) -> float:
        """`||mean_i g_i||^2`."""
        return float(self.mean.square().sum())

    @property
    def trace(self) -> float:
        """Trace of the sample covariance, with n - 1 in the denominator; never negative."""
        return max(self._squares - self.count * self.squared_mean, 0.0) / (self.count - 1)

    def finish(self) -> Moments:
        """The scalars alone, so that the sum [P] can go: a block of SiT-XL/2 has 24 million parameters."""
        return Moments(self.count, self.squared_mean, self.trace)


def gsnr(moments: GradientMoments | Moments, estimator: GsnrEstimator = "plugin") -> float:
    """Gradient signal-to-noise ratio `||E g||^2 / tr Cov g` (AHPA, Eq. 1), dimensionless.

    `plugin` puts the sample mean and the sample covariance (ddof 1) in place of the true ones (AHPA, Eq. 6). It
    is too large by 1/n on average, n the number of samples, because `E ||mean||^2 = ||E g||^2 + tr Cov g / n`:
    gradients without any common direction get 1/n and not 0. `unbiased` (ours) estimates the numerator without bias,
    `||mean||^2 - tr Cov / n`, and so is `plugin - 1/n`; it may come out negative. Its ratio is consistent, but the
    ratio of two unbiased estimates is not itself free of bias.

    Raises:
        UserError: fewer than two samples, or an unknown estimator.
    """
    if estimator not in get_args(GsnrEstimator):
        raise UserError(
            f"there is no G-SNR estimator {estimator!r}", remedy=f"Use one of: {', '.join(get_args(GsnrEstimator))}."
        )
    if moments.count < 2:
        raise UserError("G-SNR needs the gradients of at least 2 samples", remedy="Use more samples.")
    trace = moments.trace
    if trace == 0:
        return math.inf if moments.squared_mean else math.nan
    ratio = moments.squared_mean / trace
    return ratio if estimator == "plugin" else ratio - 1 / moments.count


S = TypeVar("S")
Loss = Callable[[Mapping[int, Tensor], S], Tensor]
"""Of one sample: (depth -> tokens after that block, those of streams first, [T + N, D]; pytree of that sample's other
tensors) -> scalar."""


def hidden_gradients(loss: Loss[S], hidden: Mapping[int, Tensor], sample: S) -> dict[int, Tensor]:
    """Per-sample gradients of `loss` with respect to hidden states, by `vmap(grad)`.

    Args:
        loss: see `Loss`.
        hidden: depth -> [B, T + N, D], see `Loss`.
        sample: pytree of tensors with B in front.

    Returns:
        depth -> [B, T + N, D].
    """
    with _plain_attention():
        found: dict[int, Tensor] = vmap(grad(loss))(dict(hidden), sample)
        return found


def block_gradients(
    loss: Loss[S], block: torch.nn.Module, depth: int, x: Tensor, c: Tensor, hidden: Mapping[int, Tensor], sample: S
) -> Tensor:
    """Per-sample gradients of `loss` with respect to one block's parameters, through that block's output alone.

    Args:
        block: called as block(x [1, T + N, D], c [1, D]); depth: where its output stands in `hidden`.
        x, c: the block's inputs [B, T + N, D] and [B, D].

    Returns:
        [B, P], parameters flattened in the order of `named_parameters`.
    """
    parameters = {name: p.detach() for name, p in block.named_parameters()}

    def through(p: dict[str, Tensor], x: Tensor, c: Tensor, hidden: dict[int, Tensor], sample: S) -> Tensor:
        out = functional_call(block, p, (x[None], c[None]))[0]
        return loss(hidden | {depth: out}, sample)

    with _plain_attention():
        found = vmap(grad(through), in_dims=(None, 0, 0, 0, 0))(parameters, x, c, dict(hidden), sample)
    return torch.cat([g.flatten(1) for g in found.values()], dim=1)


def _plain_attention() -> AbstractContextManager[None]:
    # The fused kernels have no batching rule for their backward pass; the plain formula is differentiated as it is.
    return sdpa_kernel(SDPBackend.MATH)


class GradientPair:
    """Two losses' gradients with respect to the same parameters, from groups of samples, which need not be in memory together.

    Keeps both sums over samples, and of each group's sums the three scalar products and a sketch.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sums: tuple[list[Tensor], list[Tensor]] | None = None
        self._within = np.zeros(3)
        self._squares = 0  # of the groups' sizes
        self._sketches: list[np.ndarray] = []  # [2, SKETCH], of both sums of a group

    def add(self, a: Sequence[Tensor], b: Sequence[Tensor], samples: int) -> None:
        """One group's mean gradients, lists of tensors of the same shapes, over `samples` samples that no other group has."""
        groups = [g * samples for g in a], [g * samples for g in b]
        self._within += _products(*groups)
        self._squares += samples**2
        self._sketches.append(np.stack([_sketch(each) for each in groups]))
        if self._sums is None:
            self._sums = groups
        else:
            for total, group in zip(self._sums, groups):
                for x, y in zip(total, group, strict=True):
                    x.add_(y)
        self.count += samples

    @property
    def means(self) -> tuple[list[Tensor], list[Tensor]]:
        """Both losses' mean gradients over all samples."""
        assert self._sums is not None, "no gradients were added"
        a, b = ([g / self.count for g in total] for total in self._sums)
        return a, b

    @property
    def parameters(self) -> int:
        """Numbers in one gradient."""
        assert self._sums is not None, "no gradients were added"
        return sum(g.numel() for g in self._sums[0])

    @property
    def plugin(self) -> float:
        """Cosine between the two means, in float64; NaN if either is zero.

        Of `n` samples its scalar product is `<E a, E b> + tr Cov(a, b) / n` on average, and its norms are too long likewise:
        few samples pull it towards the correlation of both losses' gradients of one sample, which have image and noise in common.
        """
        assert self._sums is not None, "no gradients were added"
        return _cosine(*_products(*self._sums))

    @property
    def unbiased(self) -> float:
        """The same from products of different groups alone, so that no sample meets itself: scalar product and squared norms
        are without bias (their quotient need not be, and may leave [-1, 1]); NaN where the noise leaves no squared norm
        above zero, and of a single group."""
        return _cosine(*self._apart())

    @property
    def standard_error(self) -> float:
        """Of `unbiased`, by the jackknife over groups; NaN of fewer than three, or where one left out leaves it unknown.

        From sketches of the gradients, whose scalar products are right but for about 1 / sqrt(SKETCH) of both norms' product.
        """
        a, b = np.stack(self._sketches, axis=1)
        n, grams = len(a), np.stack([a @ b.T, a @ a.T, b @ b.T])
        if n < 3:
            return math.nan
        grams[:, np.arange(n), np.arange(n)] = 0
        left = grams.sum(axis=(1, 2))[:, None] - grams.sum(axis=1) - grams.sum(axis=2)  # [3, n], one group left out
        cosines = np.array([_cosine(*each) for each in left.T])
        return float(math.sqrt((n - 1) / n * np.square(cosines - cosines.mean()).sum()))

    @property
    def norms(self) -> tuple[float, float]:
        """Of both mean gradients; their squares are without bias. NaN where one comes out below zero."""
        pairs = self.count**2 - self._squares
        _, *squares = self._apart()
        a, b = (math.sqrt(square / pairs) if pairs and square >= 0 else math.nan for square in squares)
        return a, b

    def _apart(self) -> np.ndarray:
        """The products of different groups' sums, added up."""
        assert self._sums is not None, "no gradients were added"
        found: np.ndarray = _products(*self._sums) - self._within
        return found


SKETCH = 65_521  # a prime: no column of a matrix, whose widths share factors, falls on a few places again and again


def _sketch(tensors: Sequence[Tensor]) -> np.ndarray:
    """All numbers with random signs, always the same, added up in `SKETCH` places, in turn, not at random as in the count
    sketch (Charikar et al. 2002). Scalar products of two of them are without bias those of what they are of, exact of no more than `SKETCH` numbers."""
    total, place = np.zeros(SKETCH), 0
    for index, tensor in enumerate(tensors):
        random = torch.Generator(tensor.device).manual_seed(index)
        signs = torch.randint(0, 2, (tensor.numel(),), generator=random, device=tensor.device, dtype=torch.int8) * 2 - 1
        padded = F.pad(tensor.flatten().double() * signs, (place, -(place + tensor.numel()) % SKETCH))
        total += padded.view(-1, SKETCH).sum(dim=0).cpu().numpy()
        place = (place + tensor.numel()) % SKETCH
    return total


def _products(a: Sequence[Tensor], b: Sequence[Tensor]) -> np.ndarray:
    """`<a, b>`, `<a, a>` and `<b, b>` in float64, [3]."""
    pairs = [(x.double(), y.double()) for x, y in zip(a, b, strict=True)]
    by_tensor = [[float((x * y).sum()), float((x * x).sum()), float((y * y).sum())] for x, y in pairs]
    found: np.ndarray = np.sum(by_tensor, axis=0)
    return found


def _cosine(dot: float, square_a: float, square_b: float) -> float:
    return float(dot / math.sqrt(square_a * square_b)) if square_a > 0 and square_b > 0 else math.nan


def degrees(cos: float) -> float:
    """Angle of a cosine, 0 to 180 degrees."""
    return math.degrees(math.acos(min(max(cos, -1.0), 1.0))) if math.isfinite(cos) else math.nan


class RidgeHeads:
    """Linear maps with offset from one X to several Y by ridge regression, from float64 sums added chunk by chunk.

    `min_W ||X W + b - Y||^2 + a ||W||^2` with `a = strength` times the mean variance of X times the rows. The
    moments of X are added up once for all targets.
    """

    def __init__(self, strength: float = 1e-3) -> None:
        self.strength = strength
        self._rows = 0
        self._x: tuple[Tensor, Tensor] | None = None
        self._y: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, x: Tensor, targets: Mapping[str, Tensor]) -> None:
        """Rows [m, D] and, by name, their targets [m, C]; the same names in every call."""
        x = x.double()
        new = (x.T @ x, x.sum(dim=0))
        self._x = new if self._x is None else (self._x[0].add_(new[0]), self._x[1].add_(new[1]))
        for name, y in targets.items():
            new = (x.T @ y.double(), y.sum(dim=0, dtype=torch.float64))
            old = self._y.get(name)
            self._y[name] = new if old is None else (old[0].add_(new[0]), old[1].add_(new[1]))
        self._rows += len(x)

    def solve(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Target -> weights [D, C] and offset [C], float32."""
        assert self._x is not None, "no rows were added"
        mean_x = self._x[1] / self._rows
        xx = self._x[0] - self._rows * torch.outer(mean_x, mean_x)
        ridge = self.strength * xx.diagonal().mean() + 1e-12
        factor = torch.linalg.cholesky(xx + ridge * torch.eye(len(xx), dtype=xx.dtype, device=xx.device))
        heads = {}
        for name, (xy, y) in self._y.items():
            mean_y = y / self._rows
            weight = torch.cholesky_solve(xy - self._rows * torch.outer(mean_x, mean_y), factor)
            heads[name] = (weight.float(), (mean_y - mean_x @ weight).float())
        return heads
