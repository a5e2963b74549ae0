"""How alike two representations of the same samples are: CKA, CKNNA, mutual k-nearest neighbours.

All use the inner product as kernel, `K_ij = <x_i, x_j>`, as REPA and the Platonic Representation Hypothesis (Huh et
al. 2024) do. No n x n matrix is ever whole in memory: kernel rows are made in chunks, only each row's k largest entries
are kept, and CKA is computed in feature space. Nothing is normalised in here (neither does the public code); normalise
before, if you want cosines. Sums run in float64.

Two estimators of CKA and two of CKNNA exist in public code, and the paper's formula makes a third of CKNNA:

- `unbiased`: HSIC as in Song et al. 2012, Eq. 5, diagonals left out. The public default for CKNNA.
- `biased`: `tr(K H L H)`, a sample counts as its own neighbour. The public default for CKA.
- `paper` (CKNNA only): REPA, Eq. 23, literally: kernels centred by row over all samples, then masked.

Above 1: `paper` never is (it sums products over pairs that are neighbours under both kernels, and its denominator the
squares over all neighbours under each: Cauchy-Schwarz). The other two of CKNNA correct these sums by means over rows and
columns, which is no scalar product any more: near copies among few samples may reach 1.2 (16 samples with k = 10), as in the public code.

Because the mask is not symmetrised, `unbiased` and `biased` CKNNA change a little when x and y trade places.

The public code adds 1e-6 to the denominator, which matters where features are small; here it is left out, so the result
does not change when features are scaled.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from featcache.errors import UserError

CkaEstimator = Literal["biased", "unbiased"]
CknnaEstimator = Literal["unbiased", "biased", "paper"]


class Neighbours(NamedTuple):
    """The k largest entries of each kernel row: int64 [n, k] columns, float32 [n, k] values; row means float64 [n]."""

    columns: Tensor
    value: Tensor
    row_mean: Tensor


def _check(x: Tensor, y: Tensor, *, fewest: int) -> int:
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise UserError(
            f"representations of shapes {tuple(x.shape)} and {tuple(y.shape)} cannot be compared",
            remedy="Give two [samples, features] matrices about the same samples.",
        )
    if len(x) < fewest:
        raise UserError(f"{len(x)} samples are too few for this estimator", remedy=f"Use at least {fewest}.")
    return len(x)


def _choice(what: str, value: str, kind: object) -> None:
    if value not in get_args(kind):
        raise UserError(f"there is no {what} estimator {value!r}", remedy=f"Use one of: {', '.join(get_args(kind))}.")


def neighbours(x: Tensor, k: int, *, include_self: bool = False, chunk: int = 1024) -> Neighbours:
    """Nearest neighbours by inner product. float [n, D] -> `Neighbours`.

    Args:
        include_self: whether a sample may be its own neighbour (the `biased` estimator lets it).
        chunk: kernel rows at once; memory is chunk x n floats, the result does not depend on it.

    Raises:
        UserError: k outside 1..n-1 (1..n with include_self).
    """
    n, _ = x.shape
    most = n if include_self else n - 1
    if not 1 <= k <= most:
        raise UserError(f"k = {k} neighbours among {n} samples", remedy=f"Choose k from 1 to {most}.")
    index, value = x.new_empty((n, k), dtype=torch.int64), x.new_empty((n, k))
    for start in range(0, n, chunk):
        rows = x[start : start + chunk] @ x.T  # [chunk, n]
        if not include_self:
            own = torch.arange(start, start + len(rows), device=x.device)
            rows[own - start, own] = -math.inf
        value[start : start + chunk], index[start : start + chunk] = rows.topk(k, dim=1)
    row_mean = x.double() @ x.double().mean(dim=0)
    return Neighbours(index, value, row_mean)


class _Masked(NamedTuple):
    """Entries of two kernels on the intersection of their neighbourhoods: positions int64 [m], values float64 [m]."""

    n: int
    row: Tensor
    col: Tensor
    a: Tensor
    b: Tensor


def _intersect(x: Neighbours, y: Neighbours, chunk: int = 1024) -> _Masked:
    n, _ = x.columns.shape
    parts = []
    for start in range(0, n, chunk):
        rows = slice(start, start + chunk)
        index = x.columns[rows]
        table = torch.full((len(index), n), math.nan, dtype=y.value.dtype, device=index.device)
        b = table.scatter_(1, y.columns[rows], y.value[rows]).gather(1, index)  # NaN where y has no such neighbour
        row, at = (~b.isnan()).nonzero(as_tuple=True)
        parts.append((row + start, index[row, at], x.value[rows][row, at].double(), b[row, at].double()))
    return _Masked(n, *(torch.cat(column) for column in zip(*parts)))


def _product_trace(m: _Masked) -> float:
    """`tr(A B) = sum_ij A_ij B_ji`: the mask is not symmetric, so an entry counts only if its mirror is in it too."""
    keys, mirrored = m.row * m.n + m.col, m.col * m.n + m.row
    ordered, order = keys.sort()
    at = torch.searchsorted(ordered, mirrored).clamp(max=max(len(keys) - 1, 0))
    found = ordered[at] == mirrored
    return float((m.a[found] * m.b[order[at[found]]]).sum())


def _sums(m: _Masked, values: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column sums of one masked kernel, float64 [n] each."""
    zero = torch.zeros(m.n, dtype=torch.float64, device=values.device)
    return zero.index_add(0, m.row, values), zero.index_add(0, m.col, values)


def _align(x: Neighbours, y: Neighbours, estimator: str) -> float:
    m = _intersect(x, y)
    n = m.n
    if estimator == "paper":
        a, b = m.a - x.row_mean[m.row], m.b - y.row_mean[m.row]
        return float((a * b).sum()) / (n - 1) ** 2
    (row_a, col_a), (row_b, col_b) = _sums(m, m.a), _sums(m, m.b)
    total = float(row_a.sum() * row_b.sum())
    if estimator == "biased":
        return _product_trace(m) - float(col_b @ row_a + col_a @ row_b) / n + total / n**2
    return (_product_trace(m) + total / ((n - 1) * (n - 2)) - 2 * float(col_a @ row_b) / (n - 2)) / (n * (n - 3))


def cknna_from_neighbours(x: Neighbours, y: Neighbours, *, estimator: CknnaEstimator = "unbiased") -> float:
    """CKNNA from neighbours found before, which saves finding them again for every pair.

    `x` and `y` must come from `neighbours` with `include_self=(estimator == "biased")` and one k. NaN where
    a representation's alignment with itself is not positive (the unbiased estimate may be).
    """
    _choice("CKNNA", estimator, CknnaEstimator)
    scale = _align(x, x, estimator) * _align(y, y, estimator)
    return _align(x, y, estimator) / math.sqrt(scale) if scale > 0 else math.nan


def cknna(x: Tensor, y: Tensor, *, k: int = 10, estimator: CknnaEstimator = "unbiased", chunk: int = 1024) -> float:
    """Centered kernel nearest-neighbour alignment of [n, D] and [n, E] (Huh et al. 2024; REPA, App. C.1, Eq. 21-24).

    `Align(K, L) / sqrt(Align(K, K) Align(L, L))`, where Align is HSIC over pairs (i, j) in which j is among the k
    nearest of i under both kernels. The mask is not symmetrised. Estimators: see the module.

    Raises:
        UserError: shapes that do not match, fewer than 4 samples, a bad k or estimator.
    """
    _check(x, y, fewest=4)
    _choice("CKNNA", estimator, CknnaEstimator)
    include = estimator == "biased"
    first, second = (neighbours(z, k, include_self=include, chunk=chunk) for z in (x, y))
    return cknna_from_neighbours(first, second, estimator=estimator)


def mutual_knn_from_neighbours(x: Neighbours, y: Neighbours) -> float:
    """Share of neighbours in common, from neighbours found before (without self)."""
    return len(_intersect(x, y).row) / x.columns.numel()


def mutual_knn(x: Tensor, y: Tensor, *, k: int = 10, chunk: int = 1024) -> float:
    """Mutual k-nearest neighbours of [n, D] and [n, E]: mean share of the k neighbours in common (Huh et al. 2024).

    Chance level is k / (n - 1).

    Raises:
        UserError: shapes that do not match, or a bad k.
    """
    _check(x, y, fewest=2)
    return mutual_knn_from_neighbours(neighbours(x, k, chunk=chunk), neighbours(y, k, chunk=chunk))


def cka(x: Tensor, y: Tensor, *, estimator: CkaEstimator = "biased") -> float:
    """Linear centered kernel alignment of [n, D] and [n, E] (Kornblith et al. 2019; REPA, Eq. 21).

    REPA's Eq. 22, as printed, centres kernels by row only; we centre both ways, as Kornblith et al. do.

    Computed in feature space, O(n D E): with centred features `tr(K H L H) = ||X^T Y||_F^2`, and all terms of the
    unbiased HSIC follow from it and the squared norms of the samples.

    Raises:
        UserError: shapes that do not match, fewer than 4 samples, an unknown estimator.
    """
    _check(x, y, fewest=4)
    _choice("CKA", estimator, CkaEstimator)
    x, y = (z.double() - z.double().mean(dim=0) for z in (x, y))
    scale = _hsic(x, x, estimator) * _hsic(y, y, estimator)
    return _hsic(x, y, estimator) / math.sqrt(scale) if scale > 0 else math.nan


def _hsic(x: Tensor, y: Tensor, estimator: str) -> float:
    """HSIC of centred float64 features, up to the factor that cancels in CKA."""
    n = len(x)
    trace = float((x.T @ y).square().sum())
    if estimator == "biased":
        return trace
    # HSIC is invariant under centring, and centred kernels have zero row sums: without its diagonal, a row of K sums
    # to minus that diagonal.
    p, q = x.square().sum(dim=1), y.square().sum(dim=1)
    both = float(p @ q)
    return (trace - both + float(p.sum() * q.sum()) / ((n - 1) * (n - 2)) - 2 * both / (n - 2)) / (n * (n - 3))
