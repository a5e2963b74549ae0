"""Paths, velocities, scores and training times against closed forms in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from featcache.errors import UserError
from trainer.diffusion.interpolants import (
    INTERPOLANTS,
    draw_times,
    interpolant,
    interpolate,
    score_from_velocity,
)

KINDS = list(INTERPOLANTS)
TIMES = torch.linspace(0, 1, 21, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_ends_are_data_and_noise(kind: str) -> None:
    z, noise = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t, end in ((0.0, z), (1.0, noise)):
        x, _ = interpolate(kind, z, noise, torch.full((3,), t, dtype=torch.float64))
        torch.testing.assert_close(x, end, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives(kind: str) -> None:
    path = interpolant(kind)
    for value, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        t = TIMES.clone().requires_grad_()
        (expected,) = torch.autograd.grad(value(t).sum(), t)
        torch.testing.assert_close(derivative(TIMES), expected)


def test_cosine_path_keeps_the_variance() -> None:
    path = interpolant("cosine")
    torch.testing.assert_close(path.alpha(TIMES) ** 2 + path.sigma(TIMES) ** 2, torch.ones_like(TIMES))


def test_linear_path_by_hand() -> None:
    z, noise = torch.tensor([[[[2.0]]], [[[2.0]]]]), torch.tensor([[[[10.0]]], [[[-10.0]]]])
    x, v = interpolate("linear", z, noise, torch.tensor([0.25, 0.5]))
    assert x.flatten().tolist() == [4.0, -4.0]
    assert v.flatten().tolist() == [8.0, -12.0]


@pytest.mark.parametrize("kind", KINDS)
def test_velocity_is_the_time_derivative_of_the_path(kind: str) -> None:
    z, noise = torch.randn(2, 21, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, v = interpolate(kind, z, noise, TIMES)
    h = 1e-6
    ahead, _ = interpolate(kind, z, noise, TIMES + h)
    behind, _ = interpolate(kind, z, noise, TIMES - h)
    torch.testing.assert_close(v, (ahead - behind) / (2 * h), rtol=1e-8, atol=1e-8)


def gaussian(kind: str, mean: float, std: float, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Velocity and score at (x, t) for data N(mean, std^2), from the joint Gaussian of (z, e, x_t)."""
    if kind == "linear":
        a, b, da, db = 1 - t, t, -1.0, 1.0
    else:
        q = math.pi / 2
        a, b, da, db = math.cos(q * t), math.sin(q * t), -q * math.sin(q * t), q * math.cos(q * t)
    residual = (x - a * mean) / (a * a * std * std + b * b)
    return da * (mean + a * std * std * residual) + db * b * residual, -residual


@pytest.mark.parametrize("kind", KINDS)
@given(mean=st.floats(-3, 3), std=st.floats(0, 3), t=st.floats(0.01, 1), x=st.lists(st.floats(-5, 5), min_size=1))
def test_score_of_a_gaussian(kind: str, mean: float, std: float, t: float, x: list[float]) -> None:
    state = torch.tensor(x, dtype=torch.float64)[:, None]
    velocity, score = gaussian(kind, mean, std, state, t)
    ours = score_from_velocity(kind, velocity, state, torch.full((len(x),), t, dtype=torch.float64))
    # The score is a difference of terms divided by sigma: relative to their size it is exact to rounding.
    scale = (velocity.abs().max().item() + state.abs().max().item() + 1) / t
    torch.testing.assert_close(ours, score, rtol=1e-9, atol=1e-12 * scale)


def test_lognormal_times_are_where_the_noise_ratio_is_lognormal() -> None:
    n = torch.linspace(-4, 4, 33, dtype=torch.float64)
    for kind in KINDS:
        t, path = draw_times("lognormal", kind, n), interpolant(kind)
        assert ((t > 0) & (t < 1)).all()
        torch.testing.assert_close(path.sigma(t) / path.alpha(t), n.exp())


def test_uniform_times_pass_through() -> None:
    u = torch.rand(5)
    assert draw_times("uniform", "linear", u) is u


def test_unknown_names_are_explained() -> None:
    with pytest.raises(UserError, match="Unknown path 'vp'"):
        interpolate("vp", torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1))
    with pytest.raises(UserError, match="Unknown distribution"):
        draw_times("beta", "linear", torch.zeros(1))


@pytest.mark.parametrize("kind", KINDS)
def test_interpolation_compiles_without_graph_breaks(kind: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(interpolate, fullgraph=True, backend="eager")
    z, noise, t = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2), torch.rand(2)
    for ours, expected in zip(compiled(kind, z, noise, t), interpolate(kind, z, noise, t)):
        torch.testing.assert_close(ours, expected)
