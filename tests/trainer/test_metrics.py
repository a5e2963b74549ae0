"""The metrics against formulas written a second time, in float64, from ADM's definitions."""

import math
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial.distance
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.evaluate.metrics import (
    InceptionScore,
    Moments,
    bootstrap_interval,
    frechet_distance,
    inception_score,
    kid,
    manifold_coverage,
    moments_of,
    polynomial_mmd,
)

Array = np.ndarray
ROOT = Path(__file__).resolve().parents[2]


def adm_fid(x: Array, y: Array) -> float:
    """ADM's evaluator: numpy moments, sqrtm of the product, 1e-6 on the diagonals if that is not finite."""
    m1, s1, m2, s2 = x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(s1 @ s2)
    if not np.isfinite(root).all():
        offset = np.eye(len(s1)) * 1e-6
        root = scipy.linalg.sqrtm((s1 + offset) @ (s2 + offset))
    return float((m1 - m2) @ (m1 - m2) + np.trace(s1) + np.trace(s2) - 2 * np.trace(np.real(root)))


def exact_fid(x: Array, y: Array) -> float:
    """The same quantity from the activations: tr (S1 S2)^(1/2) is the nuclear norm of X Y' for S1 = X'X, S2 =
    Y'Y.

    No covariance is formed, so nothing is squared and rank does not matter.
    """
    centred = [(a - a.mean(0)) / math.sqrt(len(a) - 1) for a in (x, y)]
    a, b = (np.linalg.qr(c).R if len(c) > c.shape[1] else c for c in centred)
    difference = x.mean(0) - y.mean(0)
    return float(difference @ difference + (a**2).sum() + (b**2).sum() - 2 * np.linalg.norm(a @ b.T, "nuc"))


def activations(rng: np.random.Generator, n: int, spectrum: Array, *, shift: float = 0.0) -> Array:
    """Gaussian activations [n, D] whose covariance has this spectrum, in a random basis."""
    basis = np.linalg.qr(rng.normal(size=(len(spectrum),) * 2))[0]
    return (rng.normal(size=(n, len(spectrum))) * np.sqrt(spectrum)) @ basis + shift


def ours(x: Array, y: Array) -> float:
    return frechet_distance(*moments_of(torch.from_numpy(x)), *moments_of(torch.from_numpy(y)))


D = 96
FLAT, GRADED = np.ones(D), 10.0 ** np.linspace(0, -12, D)


@pytest.mark.parametrize(
    ("n_x", "n_y", "spectrum"), [(400, 300, FLAT), (40, 60, FLAT), (400, 300, GRADED), (40, 300, GRADED)]
)
def test_frechet_distance_is_adms_on_full_and_deficient_rank(n_x: int, n_y: int, spectrum: Array) -> None:
    rng = np.random.default_rng(0)
    x, y = activations(rng, n_x, spectrum), activations(rng, n_y, spectrum, shift=0.02)
    assert ours(x, y) == pytest.approx(exact_fid(x, y), rel=1e-8)
    assert ours(x, y) == pytest.approx(adm_fid(x, y), rel=1e-4)


def test_frechet_distance_keeps_its_digits_where_sqrtm_loses_them() -> None:
    """Nearly equal sets of fewer samples than dimensions: the distance is a millionth of the traces."""
    x = activations(np.random.default_rng(0), 40, FLAT)
    y = x * 1.001
    expected = exact_fid(x, y)
    assert expected < 1e-5 * np.trace(np.cov(x, rowvar=False))
    assert ours(x, y) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form() -> None:
    rng = np.random.default_rng(1)
    a, b, shift = rng.uniform(0, 3, D), rng.uniform(0, 3, D), rng.normal(size=D)
    a[:50] = 0
    value = frechet_distance(np.zeros(D), np.diag(a), shift, np.diag(b))
    assert value == pytest.approx((shift**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-12)


def test_frechet_distance_refuses_what_it_cannot_mean() -> None:
    zero, one = np.zeros(3), np.eye(3)
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(zero, one, zero, one * np.nan)
    with pytest.raises(ValueError, match="shape"):
        frechet_distance(zero, one, np.zeros(4), np.eye(4))


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    seed=st.integers(0, 2**16),
    offset=st.sampled_from([0.0, 1e6]),
    block_rows=st.sampled_from([1, 7, 16]),
)
@settings(max_examples=40, deadline=None)
def test_moments_do_not_depend_on_batches(sizes: list[int], seed: int, offset: float, block_rows: int) -> None:
    rng = np.random.default_rng(seed)
    batches = [rng.normal(size=(n, 5)) + offset for n in sizes]
    whole = np.concatenate([*batches, rng.normal(size=(2, 5)) + offset])
    batches.append(whole[-2:])
    moments = Moments(5, block_rows=block_rows)
    for batch in batches:
        moments.update(torch.from_numpy(batch))
    mean, covariance = moments.result()
    assert moments.count == len(whole)
    np.testing.assert_allclose(mean, whole.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(whole, rowvar=False), rtol=1e-8, atol=1e-9)


def test_moments_need_two_samples_and_the_right_width() -> None:
    moments = Moments(3)
    moments.update(torch.ones(1, 3))
    with pytest.raises(ValueError, match="at least 2"):
        moments.result()
    with pytest.raises(ValueError, match="shape"):
        moments.update(torch.ones(2, 4))


def adm_inception_score(logits: Array, split: int) -> float:
    """ADM's evaluator, on probabilities in float64."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    scores = []
    for start in range(0, len(p), split):
        part = p[start : start + split]
        kl = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(kl.sum(1).mean()))
    return float(np.mean(scores))


@given(
    n=st.integers(1, 60),
    chunk=st.integers(1, 25),
    batch=st.integers(1, 30),
    scale=st.sampled_from([0.1, 5.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_inception_score_over_consecutive_chunks(n: int, chunk: int, batch: int, scale: float, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(size=(n, 11)) * scale
    expected = adm_inception_score(logits, chunk)
    assert inception_score(torch.from_numpy(logits), chunk=chunk) == pytest.approx(expected, rel=1e-10)
    score = InceptionScore(chunk=chunk)
    for start in range(0, n, batch):
        score.update(torch.from_numpy(logits[start : start + batch]), start)
    assert score.result() == pytest.approx(expected, rel=1e-10)


def test_inception_score_of_certain_and_of_blind_classifiers() -> None:
    certain = torch.eye(10).repeat(20, 1) * 1000.0
    assert inception_score(certain) == pytest.approx(10.0)
    assert inception_score(torch.zeros(50, 10)) == pytest.approx(1.0)


def reference_precision_recall(
    reference: Array, samples: Array, k: int, *, stretch: float = 1.0
) -> tuple[float, float]:
    """Kynkaanniemi et al. 2019, Algorithm 1, on full float64 distance matrices; radii times `stretch`."""

    def radii(x: Array) -> Array:
        distances = scipy.spatial.distance.cdist(x, x)
        np.fill_diagonal(distances, np.inf)
        return np.sort(distances, axis=1)[:, k - 1] * stretch

    across = scipy.spatial.distance.cdist(reference, samples)
    precision = (across <= radii(reference)[:, None]).any(0).mean()
    recall = (across <= radii(samples)[None, :]).any(1).mean()
    return float(precision), float(recall)


@given(
    n=st.integers(5, 60),
    m=st.integers(5, 60),
    k=st.sampled_from([1, 3]),
    side=st.integers(3, 70),
    seed=st.integers(0, 999),
)
@settings(max_examples=40, deadline=None)
def test_precision_and_recall_in_blocks_of_any_size(n: int, m: int, k: int, side: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # A common offset far larger than the spread: centring must save the float32 distances.
    reference, samples = rng.normal(size=(n, 4)) + 300, rng.normal(size=(m, 4)) * 1.3 + 300.3
    x, y = torch.from_numpy(reference), torch.from_numpy(samples)
    covered = manifold_coverage(x, y, k=k, block_bytes=side * side * 8)
    # Float32 may decide a tie of the sixth digit either way, and nothing else.
    low = reference_precision_recall(reference, samples, k, stretch=1 - 1e-5)
    high = reference_precision_recall(reference, samples, k, stretch=1 + 1e-5)
    assert low[0] <= covered.precision <= high[0]
    assert low[1] <= covered.recall <= high[1]


def test_precision_and_recall_equal_the_reference_formula() -> None:
    rng = np.random.default_rng(7)
    reference, samples = rng.normal(size=(400, 8)), rng.normal(size=(300, 8)) * 1.2 + 0.2
    covered = manifold_coverage(torch.from_numpy(reference), torch.from_numpy(samples))
    expected = reference_precision_recall(reference, samples, 3)
    assert (covered.precision, covered.recall) == pytest.approx(expected, rel=1e-12)
    assert 0.1 < expected[0] < 0.98 and 0.1 < expected[1] < 0.98


def test_precision_and_recall_know_dropped_and_invented_modes() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(200, 8)), rng.normal(size=(200, 8)) + 100
    both = torch.from_numpy(np.concatenate([left, right]))
    dropped = manifold_coverage(both, torch.from_numpy(rng.normal(size=(200, 8))))
    invented = manifold_coverage(torch.from_numpy(rng.normal(size=(200, 8))), both)
    assert dropped.precision > 0.8 and dropped.recall <= 0.5
    assert invented.precision <= 0.5 and invented.recall > 0.8


def test_precision_needs_more_rows_than_neighbours() -> None:
    with pytest.raises(ValueError, match="more than 3"):
        manifold_coverage(torch.zeros(3, 2), torch.zeros(9, 2))


def reference_mmd(x: Array, y: Array) -> float:
    """The U-statistic with explicit double sums."""

    def k(a: Array, b: Array) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    xy = sum(k(a, b) for a in x for b in y) / (n * m)
    return xx + yy - 2 * xy


def test_kid_is_the_unbiased_polynomial_mmd() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 6)), rng.normal(size=(9, 6)) + 0.3
    assert float(polynomial_mmd(torch.from_numpy(x), torch.from_numpy(y))) == pytest.approx(
        reference_mmd(x, y), rel=1e-12
    )


def test_kid_equals_torch_fidelitys_on_the_whole_set() -> None:
    from torch_fidelity.metric_kid import kernel_mmd

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 16)), rng.normal(size=(50, 16)) * 1.2
    mean, spread = kid(torch.from_numpy(x), torch.from_numpy(y), subsets=3, subset_size=50)
    assert mean == pytest.approx(kernel_mmd(x, y), rel=1e-12)
    assert spread == pytest.approx(0.0, abs=1e-12)


def test_kid_is_unbiased_and_seeded() -> None:
    rng = np.random.default_rng(0)
    x, y = torch.from_numpy(rng.normal(size=(1000, 8))), torch.from_numpy(rng.normal(size=(1000, 8)))
    mean, spread = kid(x, y, subsets=60, subset_size=100)
    assert abs(mean) < spread  # equal distributions: zero on average, of either sign
    assert kid(x, y, subsets=3, subset_size=100, seed=5) == kid(x, y, subsets=3, subset_size=100, seed=5)
    assert kid(x, y, subsets=3, subset_size=100, seed=5) != kid(x, y, subsets=3, subset_size=100, seed=6)
    with pytest.raises(ValueError, match="subset_size"):
        kid(x, y, subset_size=1001)


def test_bootstrap_interval_of_a_mean_is_the_textbooks() -> None:
    values = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap_interval(
        lambda indices: float(values[indices].mean()), 400, float(values.mean()), replicates=2000, seed=0
    )
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_bootstrap_interval_holds_its_estimate_although_fid_replicates_are_biased() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 20)), moments_of(torch.from_numpy(rng.normal(size=(2000, 20))))
    features = torch.from_numpy(x)

    def fid(indices: Array) -> float:
        return frechet_distance(*moments_of(features, indices=indices), *y)

    estimate = fid(np.arange(60))
    assert min(fid(np.random.default_rng(i).integers(0, 60, 60)) for i in range(20)) > estimate  # the bias
    low, high = bootstrap_interval(fid, 60, estimate, replicates=60, seed=0)
    assert low < estimate < high


def test_manifolds_stay_within_their_block_budget() -> None:
    """Peak memory of a fresh process, 8,000 x 256 against itself: the full matrix alone would take 256 MB."""
    script = """
        import resource, torch
        from trainer.evaluate.metrics import manifold_coverage
        x, y = torch.randn(8000, 256), torch.randn(8000, 256)
        manifold_coverage(x[:64], y[:64])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        manifold_coverage(x, y, block_bytes=16 * 2**20)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    unit = 1 if sys.platform == "darwin" else 1024
    grown_bytes = int(done.stdout) * unit
    # Centred copies of both sets (16 MB), the block and its temporaries.
    assert grown_bytes < 80 * 2**20
