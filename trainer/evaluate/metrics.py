"""The metrics of ADM's evaluator, plus KID, on given activations.

Definitions: FID (Heusel et al. 2017), sFID (Nash et al. 2021), Inception score (Salimans et al. 2016),
improved precision and recall (Kynkaanniemi et al. 2019), each as ADM's evaluator computes it (Dhariwal &
Nichol 2021), and KID (Binkowski et al. 2018). Nothing here knows what an image or a network is.

Memory is constant in the number of samples for everything that goes through `Moments` and `InceptionScore`.
Precision, recall, KID and bootstrap intervals need the activations themselves.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NEIGHBOURS = 3
INCEPTION_CHUNK = 5_000
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1_000

# Float32 blocks of the distance matrix. Two sets of 50,000 x 2048 float32 features take 0.82 GB; half a
# gigabyte of distances keeps the whole of precision and recall far below 4 GB and is large enough to be bound
# by the matmul.
DISTANCE_BLOCK_BYTES = 512 * 2**20


class Moments:
    """Streaming mean and covariance in float64.

    Uses Chan, Golub and LeVeque's pairwise update: sums of squares are taken about each block's own mean, so
    a large common offset costs no digits, unlike E[xx'] - E[x]E[x]'.

    Args:
        dim: number of features, D.
        device: where the [D, D] float64 scatter matrix lives and is updated.
        block_rows: rows gathered before one update. An update touches the whole [D, D] matrix, so small
            batches are collected first: it costs `block_rows * D` float64 numbers of memory.
    """

    def __init__(self, dim: int, *, device: torch.device | str = "cpu", block_rows: int = 1024) -> None:
        self.dim = dim
        self.block_rows = block_rows
        self._count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self._pending: list[Tensor] = []
        self._pending_rows = 0

    @property
    def count(self) -> int:
        """Samples seen so far."""
        return self._count + self._pending_rows

    def update(self, x: Tensor) -> None:
        """Add activations [B, D] of any floating dtype."""
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"expected activations of shape [B, {self.dim}], got {tuple(x.shape)}")
        if not len(x):
            return
        self._pending.append(x.detach().to(self._mean.device, torch.float64))
        self._pending_rows += len(x)
        if self._pending_rows >= self.block_rows:
            self._flush()

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [D] and covariance [D, D] with `ddof = 1`, float64.

        Raises:
            ValueError: fewer than two samples.
        """
        self._flush()
        if self._count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self._count}")
        return self._mean.cpu().numpy().copy(), (self._scatter / (self._count - 1)).cpu().numpy()

    def _flush(self) -> None:
        if not self._pending:
            return
        block = torch.cat(self._pending)
        self._pending, self._pending_rows = [], 0
        mean = block.mean(0)
        centred = block - mean
        self._combine(len(block), mean, centred.T @ centred)

    def _combine(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if not count:
            return
        total = self._count + count
        delta = mean - self._mean
        self._scatter += scatter
        self._scatter.addr_(delta, delta, alpha=self._count * count / total)
        self._mean += delta * (count / total)
        self._count = total


def _covariance_factor(covariance: Tensor) -> Tensor:
    """A [D, r] with A A' = covariance [D, D], r its numerical rank."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    # eigh errs by about eps * largest: what lies below D times that is rounding, not data. Keeping it would
    # add up to sqrt(eps) per missing dimension to the trace below, which is what ruins sqrtm on fewer samples
    # than dimensions.
    tolerance = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * eigenvalues[-1].clamp(min=0)
    keep = eigenvalues > tolerance
    root: Tensor = vectors[:, keep] * eigenvalues[keep].sqrt()
    return root


def frechet_distance(
    mean_1: np.ndarray,
    covariance_1: np.ndarray,
    mean_2: np.ndarray,
    covariance_2: np.ndarray,
    *,
    device: torch.device | str = "cpu",
) -> float:
    """Squared Frechet distance of two Gaussians: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    ADM takes the trace of `scipy.linalg.sqrtm(S1 @ S2)`. Its product squares the condition number, and with fewer
    samples than dimensions it is singular: sqrtm then returns rounding noise of order sqrt(eps) per missing dimension.
    The choice here is ours and gives the same number where sqrtm is accurate: with S1 = A A' and S2 = B B' the trace is
    the sum of the singular values of A' B, which never squares anything.

    Args:
        mean_1, mean_2: [D].
        covariance_1, covariance_2: [D, D], symmetric positive semidefinite; any rank.
        device: where the two eigendecompositions and the singular values are computed, in float64.

    Raises:
        ValueError: shapes that do not match, or values that are not finite.
    """
    arrays = [np.asarray(a, dtype=np.float64) for a in (mean_1, covariance_1, mean_2, covariance_2)]
    dim = arrays[0].shape[0]
    for name, array, shape in zip(
        ("mean_1", "covariance_1", "mean_2", "covariance_2"), arrays, ((dim,), (dim, dim)) * 2
    ):
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds values that are not finite")
    m1, s1, m2, s2 = (torch.from_numpy(a).to(device) for a in arrays)
    a, b = _covariance_factor((s1 + s1.T) / 2), _covariance_factor((s2 + s2.T) / 2)
    trace_root = torch.linalg.svdvals(a.T @ b).sum()
    difference = m1 - m2
    return float(difference @ difference + s1.trace() + s2.trace() - 2 * trace_root)


class InceptionScore:
    """Streaming Inception score over consecutive chunks of the samples.

    exp(mean KL(p(y|x) || p(y))) in each chunk of `chunk` consecutive samples (the last may be shorter), then
    the unweighted mean over chunks, as ADM's evaluator does. The order of samples therefore matters a little;
    each batch says where it starts.
    """

    def __init__(self, *, chunk: int = INCEPTION_CHUNK) -> None:
        self.chunk = chunk
        # chunk index -> count and float64 [1 + K]: sum of p log p, sum of p. It stays on the device of the logits:
        # reading it back at every batch would make the device wait for the host.
        self._sums: dict[int, tuple[int, Tensor]] = {}

    def update(self, logits: Tensor, start: int) -> None:
        """Add class logits [B, K] of samples `start .. start + B - 1`."""
        log_p = logits.detach().to(torch.float64).log_softmax(1)
        p = log_p.exp()
        terms = torch.cat([(p * log_p).sum(1, keepdim=True), p], 1)  # [B, 1 + K]
        stop = start + len(logits)
        for index in range(start // self.chunk, (stop - 1) // self.chunk + 1):
            rows = slice(max(index * self.chunk - start, 0), min((index + 1) * self.chunk, stop) - start)
            part = terms[rows]
            self._add(index, len(part), part.sum(0))

    def _add(self, index: int, count: int, sums: Tensor) -> None:
        if index in self._sums:
            before, total = self._sums[index]
            count, sums = before + count, total + sums.to(total.device)
        self._sums[index] = count, sums

    def result(self) -> float:
        """Mean over chunks.

        Raises:
            ValueError: no samples.
        """
        if not self._sums:
            raise ValueError("an Inception score needs at least one sample")
        scores = []
        for count, sums in self._sums.values():
            entropy, *total = (sums / count).tolist()
            marginal = np.array(total)
            positive = marginal[marginal > 0]
            # mean_x sum_y p(y|x) log p(y) = sum_y p(y) log p(y): only the marginal is needed.
            scores.append(np.exp(entropy - (positive * np.log(positive)).sum()))
        return float(np.mean(scores))


def inception_score(logits: Tensor, *, chunk: int = INCEPTION_CHUNK) -> float:
    """Inception score of class logits [N, K]; see `InceptionScore`."""
    score = InceptionScore(chunk=chunk)
    for start in range(0, len(logits), chunk):
        score.update(logits[start : start + chunk], start)
    return score.result()


@dataclass(frozen=True, kw_only=True)
class ManifoldCoverage:
    """Which samples lie in the manifold of the other set.

    Attributes:
        samples_covered: bool [N], sample i lies within a reference ball; its mean is the precision.
        reference_covered: bool [M], reference j lies within a sample ball; its mean is the recall.
    """

    samples_covered: np.ndarray
    reference_covered: np.ndarray

    @property
    def precision(self) -> float:
        """Fraction of samples in the reference manifold."""
        return float(self.samples_covered.mean())

    @property
    def recall(self) -> float:
        """Fraction of the reference in the samples' manifold."""
        return float(self.reference_covered.mean())


def _distance_blocks(
    a: Tensor, b: Tensor, device: torch.device | str, block_bytes: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Squared distances of a [N, D] to b [M, D] in float32, in blocks of at most `block_bytes`."""
    side = max(1, int((block_bytes / 4 / 2) ** 0.5))  # the matmul's result and one temporary of its size
    for i in range(0, len(a), side):
        rows = slice(i, min(i + side, len(a)))
        x = a[rows].to(device)
        x_norms = x.square().sum(1)
        for j in range(0, len(b), side):
            columns = slice(j, min(j + side, len(b)))
            y = b[columns].to(device)
            distances = torch.addmm(y.square().sum(1)[None, :], x, y.T, alpha=-2)
            yield rows, columns, distances.add_(x_norms[:, None]).clamp_(min=0)


def _radii(x: Tensor, k: int, device: torch.device | str, block_bytes: int) -> Tensor:
    """Squared distance of each row of x [N, D] to its k-th nearest other row: [N] on `device`."""
    nearest = torch.full((len(x), k), torch.inf, device=device)
    for rows, columns, distances in _distance_blocks(x, x, device, block_bytes):
        if rows == columns:  # a block on the diagonal of the whole matrix: x to itself
            distances.fill_diagonal_(torch.inf)
        candidates = distances.topk(min(k, distances.shape[1]), dim=1, largest=False).values
        nearest[rows] = torch.cat([nearest[rows], candidates], 1).topk(k, dim=1, largest=False).values
    return nearest[:, -1]


def manifold_coverage(
    reference: Tensor,
    samples: Tensor,
    *,
    k: int = NEIGHBOURS,
    device: torch.device | str = "cpu",
    block_bytes: int = DISTANCE_BLOCK_BYTES,
) -> ManifoldCoverage:
    """Improved precision and recall (Kynkaanniemi et al. 2019): membership in k-nearest-neighbour balls.

    A point is covered by the other set when it lies within the ball of any of its points, whose radius reaches that
    point's k-th nearest neighbour in its own set, itself excluded. ADM's evaluator computes the squared distances in
    float16 and falls back to float32 on overflow; here they are float32 always (features centred first, so that |x|^2 +
    |y|^2 - 2 x.y loses fewer digits), which differs from float16 in the third decimal.

    Args:
        reference: [M, D] and samples [N, D], any floating dtype; compared in float32.
        block_bytes: upper limit for each block of the distance matrix, temporaries included.

    Raises:
        ValueError: a set with at most k rows, or different D.
    """
    if reference.shape[1] != samples.shape[1]:
        raise ValueError(f"reference has {reference.shape[1]} features, samples have {samples.shape[1]}")
    for name, features in (("reference", reference), ("samples", samples)):
        if len(features) <= k:
            raise ValueError(f"{name} holds {len(features)} rows: a {k}-nearest-neighbour radius needs more than {k}")
    centre = reference.mean(0, dtype=torch.float64)
    reference = (reference - centre.to(reference)).to(torch.float32)
    samples = (samples - centre.to(samples)).to(torch.float32)
    reference_radii = _radii(reference, k, device, block_bytes)
    sample_radii = _radii(samples, k, device, block_bytes)
    samples_covered = torch.zeros(len(samples), dtype=torch.bool, device=device)
    reference_covered = torch.zeros(len(reference), dtype=torch.bool, device=device)
    for rows, columns, distances in _distance_blocks(reference, samples, device, block_bytes):
        samples_covered[columns] |= (distances <= reference_radii[rows, None]).any(0)
        reference_covered[rows] |= (distances <= sample_radii[None, columns]).any(1)
    return ManifoldCoverage(
        samples_covered=samples_covered.cpu().numpy(), reference_covered=reference_covered.cpu().numpy()
    )


def polynomial_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased squared MMD of x [N, D] and y [M, D], kernel (x.y / D + 1)^3 (Binkowski et al. 2018)."""
    N, D = x.shape
    M = len(y)
    k_xx, k_yy, k_xy = ((a @ b.T / D + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within_x = (k_xx.sum() - k_xx.diagonal().sum()) / (N * (N - 1))
    within_y = (k_yy.sum() - k_yy.diagonal().sum()) / (M * (M - 1))
    return within_x + within_y - 2 * k_xy.mean()


def kid(
    reference: Tensor,
    samples: Tensor,
    *,
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Kernel Inception distance: mean and standard deviation of `polynomial_mmd` over random subsets, in float64.

    Args:
        reference: [M, D].
        samples: [N, D].
        subset_size: rows of each subset, drawn without replacement; at most min(M, N).
        seed: of the draws; subset i of a seed is the same whatever `subsets` is.

    Raises:
        ValueError: a subset larger than a set, or of fewer than two rows.
    """
    if not 2 <= subset_size <= min(len(reference), len(samples)):
        raise ValueError(
            f"subset_size is {subset_size}: it must lie between 2 and the smaller set ({len(reference)}"
            f" reference, {len(samples)} samples)"
        )
    values = []
    for index in range(subsets):
        rng = np.random.default_rng((seed, index))
        x, y = (
            features[torch.from_numpy(rng.choice(len(features), subset_size, replace=False))].to(device, torch.float64)
            for features in (reference, samples)
        )
        values.append(float(polynomial_mmd(x, y)))
    return float(np.mean(values)), float(np.std(values))


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float],
    count: int,
    estimate: float,
    *,
    replicates: int,
    seed: int,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Bootstrap interval of a statistic of `count` samples: the spread of its replicates about the estimate.

    `statistic(indices)` evaluates the metric on the samples `indices` [count], drawn with replacement.
    Replicates hold only 63 % distinct samples, which biases FID upwards, often past its own estimate; the
    replicates are therefore shifted so that their mean is the estimate (our choice). What remains is the
    sampling error at this `count`: the bias of FID at few samples is not part of it.

    Returns:
        Lower and upper end.
    """
    values = np.array(
        [statistic(np.random.default_rng((seed, index)).integers(0, count, count)) for index in range(replicates)]
    )
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail]) - values.mean() + estimate
    return float(low), float(high)


def moments_of(
    features: Tensor, *, indices: np.ndarray | None = None, device: torch.device | str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D] of activations [N, D], or of its rows `indices` [n], by `Moments`."""
    moments = Moments(features.shape[1], device=device)
    rows = torch.arange(len(features)) if indices is None else torch.from_numpy(indices)
    for block in rows.split(moments.block_rows):
        moments.update(features[block])
    return moments.result()
