"""G-SNR on gradients of known mean and covariance; per-sample gradients against one backward pass per sample."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from featcache.errors import UserError
from trainer.analyze import gradients
from trainer.analyze.gradients import (
    GradientMoments,
    GradientPair,
    RidgeHeads,
    _sketch,
    block_gradients,
    degrees,
    gsnr,
    hidden_gradients,
)
from trainer.models.blocks import Block


def moments_of(gradients: torch.Tensor, chunk: int) -> GradientMoments:
    moments = GradientMoments()
    for part in gradients.split(chunk):
        moments.add(part)
    return moments


def gaussian(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """n draws from a Gaussian, its mean and its covariance."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    return mean + torch.randn(n, 4, generator=generator, dtype=torch.float64) @ root.T, mean, root @ root.T


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_gsnr_is_equation_6(chunk: int) -> None:
    g, _, _ = gaussian(50)
    numpy = g.numpy()
    expected = np.sum(numpy.mean(axis=0) ** 2) / np.trace(np.cov(numpy.T, ddof=1))
    moments = moments_of(g, chunk)
    assert gsnr(moments) == pytest.approx(expected, rel=1e-10)
    assert gsnr(moments, "unbiased") == pytest.approx(expected - 1 / 50, rel=1e-10)
    assert moments.trace == pytest.approx(np.trace(np.cov(numpy.T)), rel=1e-10)


def test_gsnr_approaches_the_true_ratio() -> None:
    g, mean, covariance = gaussian(200_000)
    true = float(mean.square().sum() / covariance.trace())
    assert gsnr(moments_of(g, 50_000)) == pytest.approx(true, rel=0.02)


def test_bias_of_the_numerator() -> None:
    """Over many small batches, ||mean||^2 averages ||mu||^2 + tr(Cov) / n, and the corrected numerator ||mu||^2."""
    n, batches = 8, 20_000
    g, mean, covariance = gaussian(n * batches)
    plain = corrected = 0.0
    for batch in g.reshape(batches, n, 4)[:4000]:
        moments = moments_of(batch, n)
        plain += moments.squared_mean / 4000
        corrected += (moments.squared_mean - moments.trace / n) / 4000
    signal, noise = float(mean.square().sum()), float(covariance.trace())
    # Standard error of ||mean||^2 over 4,000 batches: 2 sqrt(mu' Cov mu / n) / sqrt(4000) and smaller terms.
    error = 4 * 2 * math.sqrt(float(mean @ covariance @ mean) / n / 4000)
    assert plain == pytest.approx(signal + noise / n, abs=error)
    assert corrected == pytest.approx(signal, abs=error)
    assert abs(plain - signal) > 2 * error  # the test can tell the two apart


def test_gsnr_ends() -> None:
    same = torch.ones(5, 3)
    assert gsnr(moments_of(same, 2)) == math.inf
    assert math.isnan(gsnr(moments_of(0 * same, 2)))
    opposite = torch.stack([torch.ones(3), -torch.ones(3)])
    assert gsnr(moments_of(opposite, 1)) == 0
    assert gsnr(moments_of(opposite, 1), "unbiased") == pytest.approx(-0.5)
    with pytest.raises(UserError, match="at least 2"):
        gsnr(moments_of(same[:1], 1))
    with pytest.raises(UserError, match="no G-SNR estimator"):
        gsnr(moments_of(same, 1), "best")  # type: ignore[arg-type]


def test_scale_changes_nothing() -> None:
    g, _, _ = gaussian(30)
    assert gsnr(moments_of(1000 * g, 8)) == pytest.approx(gsnr(moments_of(g, 8)), rel=1e-12)


def loss(hidden: Mapping[int, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    return ((hidden[2] - target).square().sum(dim=-1) + hidden[3].sum(dim=-1).sin()).mean()


def test_hidden_gradients_are_those_of_single_samples() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = {d: torch.randn(3, 4, 5, generator=generator) for d in (2, 3)}
    target = torch.randn(3, 4, 5, generator=generator)
    found = hidden_gradients(loss, hidden, target)
    for i in range(3):
        leaves = {d: h[i].clone().requires_grad_() for d, h in hidden.items()}
        loss(leaves, target[i]).backward()
        for d, leaf in leaves.items():
            torch.testing.assert_close(found[d][i], leaf.grad)


def test_block_gradients_are_those_of_single_samples() -> None:
    generator = torch.Generator().manual_seed(2)
    torch.manual_seed(0)
    block = Block(8, 2, 16)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=generator)
    x, c = torch.randn(3, 4, 8, generator=generator), torch.randn(3, 8, generator=generator)
    target = torch.randn(3, 4, 8, generator=generator)
    others = {3: torch.randn(3, 4, 8, generator=generator), 2: torch.zeros(3, 4, 8)}
    found = block_gradients(loss, block, 2, x, c, others, target)
    for i in range(3):
        block.zero_grad()
        loss({3: others[3][i], 2: block(x[i : i + 1], c[i : i + 1])[0]}, target[i]).backward()
        expected = torch.cat([p.grad.flatten() for p in block.parameters() if p.grad is not None])
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-5)


def pair_of(*groups: tuple[list[Tensor], list[Tensor], int]) -> GradientPair:
    pair = GradientPair()
    for group in groups:
        pair.add(*group)
    return pair


def test_cosine_and_angle() -> None:
    a, b = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])], [torch.tensor([0.0, 2.0]), torch.tensor([[2.0]])]
    assert pair_of((a, b, 3)).plugin == pytest.approx(8 / (5 * math.sqrt(8)))
    assert pair_of((a, [-2 * x for x in a], 1)).plugin == pytest.approx(-1)
    assert math.isnan(pair_of((a, [0 * x for x in a], 1)).plugin)
    assert math.isnan(pair_of((a, b, 3)).unbiased), "of one group nothing is known of the noise"
    assert degrees(0.5) == pytest.approx(60)
    assert degrees(-1 - 1e-12) == 180


def test_products_of_different_groups_are_those_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(4)
    drawn = torch.randn(4, 2, 7, generator=generator, dtype=torch.float64) + 1
    sizes = [3, 5, 4, 2]
    pair = pair_of(*(([a[:3], a[3:]], [b[:3], b[3:]], size) for (a, b), size in zip(drawn, sizes)))
    weighted = drawn * torch.tensor(sizes, dtype=torch.float64)[:, None, None]
    different = [(weighted[i], weighted[j]) for i in range(4) for j in range(4) if i != j]
    dot, square_a, square_b = (sum(float(g[x] @ h[y]) for g, h in different) for x, y in ((0, 1), (0, 0), (1, 1)))
    assert pair.unbiased == pytest.approx(dot / math.sqrt(square_a * square_b))
    mean = weighted.sum(dim=0) / sum(sizes)
    assert pair.plugin == pytest.approx(torch.cosine_similarity(mean[0], mean[1], dim=0).item())
    for found, expected in zip(pair.means, mean):
        torch.testing.assert_close(torch.cat(found), expected)
    assert pair.count == sum(sizes) and pair.parameters == 7


def test_noise_that_both_losses_share_moves_the_plain_cosine_alone() -> None:
    """True means at right angles, noise in common: few samples make the plain cosine positive, the other one not."""
    generator = torch.Generator().manual_seed(5)
    plain, apart, said = [], [], []
    for _ in range(200):
        pair = GradientPair()
        for _ in range(8):
            noise = 2 * torch.randn(50, generator=generator, dtype=torch.float64)
            a, b = noise.clone(), noise.clone()
            a[0] += 6
            b[1] += 6
            pair.add([a], [b], 1)
        plain.append(pair.plugin)
        apart.append(pair.unbiased)
        said.append(pair.standard_error)
    # <E a, E b> = 0; the plain scalar product has tr Cov / n = 50 * 4 / 8 = 25 too much, as have the squared norms of 36.
    assert np.mean(plain) == pytest.approx(25 / (36 + 25), abs=0.05)
    error = np.std(apart, ddof=1) / math.sqrt(len(apart))
    assert abs(np.mean(apart)) < 4 * error < 0.1
    # The standard error is the spread of repetitions: of a median of 200, and the jackknife errs on the large side.
    assert 0.8 * np.std(apart, ddof=1) < np.median(said) < 1.4 * np.std(apart, ddof=1)


def test_standard_error_and_norms_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(6)
    drawn = torch.randn(5, 2, 300, generator=generator) + 1
    sizes = [4, 4, 4, 4, 2]
    groups = [([a[:100], a[100:]], [b[:100], b[100:]], size) for (a, b), size in zip(drawn, sizes)]
    pair = pair_of(*groups)
    left_out = [pair_of(*(g for j, g in enumerate(groups) if j != i)).unbiased for i in range(5)]
    expected = math.sqrt(4 / 5 * sum((x - np.mean(left_out)) ** 2 for x in left_out))
    assert pair.standard_error == pytest.approx(expected, rel=1e-6)
    weighted = (drawn * torch.tensor(sizes)[:, None, None]).double()
    for norm, each in zip(pair.norms, weighted.unbind(dim=1)):
        products = each @ each.T
        mean_square = (products.sum() - products.trace()) / (sum(sizes) ** 2 - sum(size**2 for size in sizes))
        assert norm == pytest.approx(math.sqrt(mean_square))
    assert math.isnan(pair_of(*groups[:2]).standard_error)
    monkeypatch.setattr(gradients, "SKETCH", 64)
    folded = [_sketch([a[:100], a[100:]]) for a, _ in drawn]
    exact = (drawn[:, 0] @ drawn[:, 0].T).numpy()
    # 1 / sqrt(64) of both norms is one standard deviation of a product's error
    norms = np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))
    assert (np.abs(np.array(folded) @ np.array(folded).T - exact) < 4 / 8 * norms).all()


def test_ridge_head_is_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 5, generator=generator, dtype=torch.float64) + 2
    y = x @ torch.randn(5, 3, generator=generator, dtype=torch.float64) + 1
    y = y + 0.1 * torch.randn(40, 3, generator=generator, dtype=torch.float64)
    heads = RidgeHeads(0.01)
    for rows in torch.arange(40).split(9):
        heads.add(x[rows], {"y": y[rows], "other": -2 * y[rows, :1]})
    solved = heads.solve()
    weight, offset = solved["y"]
    torch.testing.assert_close(solved["other"][0], -2 * weight[:, :1], rtol=1e-5, atol=1e-6)
    xc, yc = x - x.mean(0), y - y.mean(0)
    ridge = 0.01 * xc.square().sum(0).mean()
    # The same problem as least squares with the penalty as extra rows.
    stacked = torch.cat([xc, ridge.sqrt() * torch.eye(5, dtype=torch.float64)])
    expected = torch.linalg.lstsq(stacked, torch.cat([yc, torch.zeros(5, 3, dtype=torch.float64)])).solution
    torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(offset.double(), y.mean(0) - x.mean(0) @ expected, rtol=1e-5, atol=1e-5)
