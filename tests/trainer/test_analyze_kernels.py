"""CKNNA, CKA and mutual k-NN against loops written from their definitions, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.errors import UserError
from trainer.analyze import kernels

N, K = 23, 5


def pair(n: int = N, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two related representations of different widths, not centred."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator) + 0.5
    y = x @ torch.randn(6, 4, generator=generator) + 0.5 * torch.randn(n, 4, generator=generator)
    return x, y


def gram(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy() @ x.double().numpy().T


def nearest(kernel: np.ndarray, k: int, *, include_self: bool) -> list[set[int]]:
    n = len(kernel)
    return [
        set(sorted((j for j in range(n) if include_self or j != i), key=lambda j: -kernel[i, j])[:k]) for i in range(n)
    ]


def mask(a: np.ndarray, b: np.ndarray, k: int, *, include_self: bool) -> np.ndarray:
    near_a, near_b = (nearest(kernel, k, include_self=include_self) for kernel in (a, b))
    n = len(a)
    return np.array([[float(j in near_a[i] and j in near_b[i]) for j in range(n)] for i in range(n)])


def align_paper(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """REPA, Eq. 23 and 24, term by term."""
    n, alpha = len(a), mask(a, b, k, include_self=False)
    total = 0.0
    for i in range(n):
        for j in range(n):
            total += alpha[i, j] * (a[i, j] - a[i].mean()) * (b[i, j] - b[i].mean())
    return total / (n - 1) ** 2


def hsic_unbiased(a: np.ndarray, b: np.ndarray) -> float:
    """Song et al. 2012, Eq. 5, with full matrices."""
    n = len(a)
    a, b = a - np.diag(np.diag(a)), b - np.diag(np.diag(b))
    ones = np.ones(n)
    value = np.trace(a @ b) + (ones @ a @ ones) * (ones @ b @ ones) / ((n - 1) * (n - 2))
    return (value - 2 / (n - 2) * (ones @ a @ b @ ones)) / (n * (n - 3))


def hsic_biased(a: np.ndarray, b: np.ndarray) -> float:
    n = len(a)
    centre = np.eye(n) - np.ones((n, n)) / n
    return np.trace(a @ centre @ b @ centre)


def align(a: np.ndarray, b: np.ndarray, k: int, estimator: str) -> float:
    if estimator == "paper":
        return align_paper(a, b, k)
    m = mask(a, b, k, include_self=estimator == "biased")
    return (hsic_biased if estimator == "biased" else hsic_unbiased)(m * a, m * b)


def test_cknna_of_few_samples_may_exceed_one_but_the_papers_does_not() -> None:
    found: dict[str, list[float]] = {"unbiased": [], "biased": [], "paper": []}
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(16, 32, generator=generator) + torch.randn(1, 32, generator=generator)
        y = x + 0.2 * torch.randn(16, 32, generator=generator)
        for estimator, values in found.items():
            values.append(kernels.cknna(x, y, k=10, estimator=estimator))  # type: ignore[arg-type]
    assert 1 < max(found["unbiased"]) < 1.25 and 1 < max(found["biased"]) < 1.25
    assert max(found["paper"]) < 1


@pytest.mark.parametrize("estimator", ["unbiased", "biased", "paper"])
@pytest.mark.parametrize("k", [2, K, N - 1])
def test_cknna_is_its_definition(estimator: str, k: int) -> None:
    x, y = pair()
    a, b = gram(x), gram(y)
    expected = align(a, b, k, estimator) / math.sqrt(align(a, a, k, estimator) * align(b, b, k, estimator))
    assert kernels.cknna(x, y, k=k, estimator=estimator) == pytest.approx(expected, rel=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("n", [5, N])
def test_cka_is_its_definition(estimator: str, n: int) -> None:
    x, y = pair(n)
    a, b = gram(x), gram(y)
    hsic = hsic_biased if estimator == "biased" else hsic_unbiased
    expected = hsic(a, b) / math.sqrt(hsic(a, a) * hsic(b, b))
    assert kernels.cka(x, y, estimator=estimator) == pytest.approx(expected, rel=1e-9)  # type: ignore[arg-type]


def test_biased_cka_of_centred_features_is_repa_equation_22() -> None:
    """The printed double sum centres each kernel by row only; for centred features that is the same."""
    x, y = (z - z.mean(dim=0) for z in pair())
    a, b = gram(x), gram(y)

    def hsic(p: np.ndarray, q: np.ndarray) -> float:
        n = len(p)
        return sum((p[i, j] - p[i].mean()) * (q[i, j] - q[i].mean()) for i in range(n) for j in range(n)) / (n - 1) ** 2

    assert kernels.cka(x, y) == pytest.approx(hsic(a, b) / math.sqrt(hsic(a, a) * hsic(b, b)), rel=1e-6)


def test_mutual_knn_is_its_definition() -> None:
    x, y = pair()
    near_x, near_y = (nearest(gram(z), K, include_self=False) for z in (x, y))
    expected = np.mean([len(p & q) / K for p, q in zip(near_x, near_y)])
    assert kernels.mutual_knn(x, y, k=K) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("include_self", [False, True])
def test_chunks_change_nothing(include_self: bool) -> None:
    x, _ = pair()
    whole = kernels.neighbours(x, K, include_self=include_self, chunk=N)
    for chunk in (1, 7, 100):
        parts = kernels.neighbours(x, K, include_self=include_self, chunk=chunk)
        assert torch.equal(parts.columns, whole.columns)
        torch.testing.assert_close(parts.value, whole.value, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(6, 40), st.integers(2, 5), st.floats(0.01, 100.0), st.integers(0, 2**16))
def test_invariances(n: int, k: int, scale: float, seed: int) -> None:
    x, y = pair(n, seed)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]
    assert kernels.cka(x, x) == pytest.approx(1)
    assert kernels.cka(scale * x.double() @ rotation + 3.0, y) == pytest.approx(kernels.cka(x, y), rel=1e-6, abs=1e-9)
    assert kernels.cka(x, y, estimator="unbiased") == pytest.approx(kernels.cka(y, x, estimator="unbiased"))
    assert kernels.mutual_knn(x, scale * x, k=k) == 1
    assert kernels.cknna(x, scale * x, k=k, estimator="paper") == pytest.approx(1, rel=1e-4)
    assert 0 <= kernels.cka(x, y) <= 1 + 1e-9


def test_independent_representations_are_unalike() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(400, 50, generator=generator), torch.randn(400, 50, generator=generator)
    # The biased estimate of independent features is about (D / n) / (1 + D / n), the unbiased one about 0.
    assert kernels.cka(x, y) == pytest.approx((50 / 400) / (1 + 50 / 400), abs=0.03)
    assert kernels.cka(x, y, estimator="unbiased") == pytest.approx(0, abs=0.02)
    assert kernels.mutual_knn(x, y, k=10) == pytest.approx(10 / 399, abs=0.015)


def test_bad_input() -> None:
    x, y = pair()
    for bad in (
        lambda: kernels.cknna(x, y[:-1]),
        lambda: kernels.cknna(x, y, k=N),
        lambda: kernels.cknna(x, y, k=0),
        lambda: kernels.cknna(x, y, k=3, estimator="public"),  # type: ignore[arg-type]
        lambda: kernels.cka(x, y, estimator="paper"),  # type: ignore[arg-type]
        lambda: kernels.cka(x[:3], y[:3]),
        lambda: kernels.cka(x[:, 0], y),
        lambda: kernels.mutual_knn(x, y, k=N),
    ):
        with pytest.raises(UserError):
            bad()
