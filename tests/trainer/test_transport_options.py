"""How a flow's times are drawn, what its backbone predicts, its second loss: against closed forms."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.diffusion import samplers
from trainer.diffusion.interpolants import INTERPOLANTS, interpolate, predicted_velocity, shifted
from trainer.diffusion.transport import SHORTEST, Flow
from trainer.models.transformer import ModelOutput

PREDICTIONS: tuple[Literal["velocity", "x", "noise"], ...] = ("velocity", "x", "noise")
PATHS: tuple[Literal["linear", "cosine"], ...] = ("linear", "cosine")
number = st.floats(-5, 5)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def output(prediction: Tensor) -> ModelOutput:
    return ModelOutput(prediction, {}, torch.zeros(len(prediction), 1))


# What the backbone says


@given(x=number, noise=number, t=st.floats(0.06, 0.94), path=st.sampled_from(PATHS))
def test_every_prediction_implies_the_same_velocity(x: float, noise: float, t: float, path: Any) -> None:
    clean, e, times = (torch.tensor([[value]], dtype=torch.float64) for value in (x, noise, t))
    x_t, velocity = interpolate(path, clean, e, times[0])
    for prediction, said in zip(PREDICTIONS, (velocity, clean, e), strict=True):
        flow = Flow(path=path, prediction=prediction)
        torch.testing.assert_close(flow.velocity(output(said), x_t, times[0]), velocity, rtol=1e-9, atol=1e-9)


def test_on_the_linear_path_the_velocity_is_the_published_quotient() -> None:
    """As RAEv2 and JiT write it: (x_t - x) / max(t, 0.05); of the noise (e - x_t) / max(1 - t, floor)."""
    x_t, said, t = normal(6, 2, 3), normal(6, 2, 3, seed=1), torch.tensor([0.0, 0.01, 0.05, 0.5, 0.97, 1.0]).double()
    column = t[:, None, None]
    by_x = predicted_velocity("linear", "x", said, x_t, t, 0.05)
    torch.testing.assert_close(by_x, (x_t - said) / column.clamp(min=0.05))
    by_noise = predicted_velocity("linear", "noise", said, x_t, t, 0.1)
    torch.testing.assert_close(by_noise, (said - x_t) / (1 - column).clamp(min=0.1))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_the_velocity_s_and_zero_for_the_truth_at_every_t(path: Any, prediction: Any) -> None:
    x0, noise = normal(8, 3, 2, 2), normal(8, 3, 2, 2, seed=1)
    t = torch.tensor([0.0, 0.01, 0.04, 0.3, 0.6, 0.96, 0.999, 1.0], dtype=torch.float64)
    flow = Flow(path=path, prediction=prediction, time_floor=0.05)
    x_t, velocity = interpolate(path, x0, noise, t)
    truth = {"velocity": velocity, "x": x0, "noise": noise}[prediction]
    (exact,) = flow.loss(output(truth), x0, noise, x_t, t).values()
    assert exact == pytest.approx(0, abs=1e-12)
    said = truth + normal(8, 3, 2, 2, seed=2)
    (loss,) = flow.loss(output(said), x0, noise, x_t, t).values()
    q = math.pi / 2
    alpha, sigma = (1 - t, t) if path == "linear" else (torch.cos(q * t), torch.sin(q * t))
    determinant = 1 if path == "linear" else q
    divisor = {"velocity": torch.ones_like(t), "x": sigma.clamp(min=0.05), "noise": alpha.clamp(min=0.05)}[prediction]
    factor = 1 if prediction == "velocity" else determinant
    errors = (said - truth).square().flatten(1).mean(1)
    # The loss is computed in float32.
    assert loss.item() == pytest.approx((factor**2 * errors / divisor**2).mean().item(), rel=1e-5)


MEAN, COVARIANCE = torch.tensor([1.0, -2.0]).double(), torch.tensor([[1.0, 0.6], [0.6, 0.5]]).double()


def optimal(path: str, prediction: str) -> Any:
    """The best predictor for normal data with MEAN and COVARIANCE: (x [B, 2, 1, 1], t [B]) -> the conditional mean."""
    coefficients = INTERPOLANTS[path]

    def predict(x: Tensor, t: Tensor) -> Tensor:
        time = t[0].double()
        alpha, sigma = coefficients.alpha(time), coefficients.sigma(time)
        spread = alpha**2 * COVARIANCE + sigma**2 * torch.eye(2)
        whitened = torch.linalg.solve(spread, (x[:, :, 0, 0] - alpha * MEAN).T).T
        data, noise = MEAN + alpha * whitened @ COVARIANCE, sigma * whitened
        slope = coefficients.d_alpha(time) * data + coefficients.d_sigma(time) * noise
        return {"x": data, "noise": noise, "velocity": slope}[prediction][:, :, None, None]

    return predict


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_samplers_reach_one_distribution_with_each_prediction(path: Any, sampler: str) -> None:
    """The optimal predictor of normal data is known in each form. 5,000 samples: within four standard errors."""
    x, steps = normal(5000, 2, 1, 1), 250
    found = {}
    for prediction in PREDICTIONS:
        flow, predict = Flow(path=path, prediction=prediction, time_floor=1e-6), optimal(path, prediction)

        def velocity(
            x: Tensor, t: float, *, interval_t: float | None = None, flow: Any = flow, predict: Any = predict
        ) -> Tensor:
            times = torch.full((len(x),), t, dtype=torch.float64)
            out: Tensor = flow.velocity(output(predict(x, times)), x, times)
            return out

        if sampler == "sde":
            noises = [normal(*x.shape, seed=10 + step) for step in range(steps)]
            drawn = samplers.euler_maruyama(
                velocity,
                x,
                samplers.sde_grid(steps, last=0.005),
                noise=noises.__getitem__,
                path=path,
                diffusion="sigma",
            )
        else:
            drawn = getattr(samplers, sampler)(velocity, x, samplers.ode_grid(steps))
        found[prediction] = drawn[:, :, 0, 0]
        assert (found[prediction].mean(0) - MEAN).abs().max() < 4 * 5000**-0.5
        assert (found[prediction].T.cov() - COVARIANCE).abs().max() < 4 * (2 / 5000) ** 0.5
    for prediction in ("x", "noise"):
        assert (found[prediction] - found["velocity"]).abs().max() < 0.03, "sample by sample, the same noise"


# How times are drawn


@given(t=st.floats(0, 1), alpha=st.floats(0.1, 20))
def test_a_shift_keeps_the_ends_and_is_undone_by_its_reciprocal(t: float, alpha: float) -> None:
    assert shifted(0.0, alpha) == 0 and shifted(1.0, alpha) == pytest.approx(1)
    assert shifted(shifted(t, alpha), 1 / alpha) == pytest.approx(t, abs=1e-12)
    assert shifted(t, 1.0) == t, "to the bit"
    moved = shifted(t, alpha) - t
    assert moved * (alpha - 1) >= -1e-14, "above 1 towards noise, below 1 towards data"


def test_the_density_of_shifted_times() -> None:
    """Of uniform times p(t) = alpha / (alpha + (1 - alpha) t)^2: against the shares of 50 intervals."""
    alpha, draws = 3.0, (torch.arange(1_000_000).double() + 0.5) / 1_000_000
    times = Flow(time_shift=alpha).times(draws)
    counts, edges = np.histogram(times.numpy(), bins=50, range=(0, 1), density=True)
    middles = (edges[1:] + edges[:-1]) / 2
    assert counts == pytest.approx(alpha / (alpha + (1 - alpha) * middles) ** 2, rel=2e-3)


@pytest.mark.parametrize("path", PATHS)
def test_lognormal_times_have_the_mean_and_spread_that_were_asked_for(path: Any) -> None:
    """sigma / alpha is exp(mean + std n); a shift by alpha multiplies it by alpha on the linear path."""
    draws = normal(1000)
    t = Flow(path=path, time_sampling="lognormal", time_mean=-0.4, time_std=1.5).times(draws)
    ratio = INTERPOLANTS[path].sigma(t) / INTERPOLANTS[path].alpha(t)
    torch.testing.assert_close(ratio.log(), -0.4 + 1.5 * draws, rtol=1e-9, atol=1e-9)
    if path == "linear":
        moved = Flow(time_sampling="lognormal", time_mean=-0.4, time_std=1.5, time_shift=8.0).times(draws)
        torch.testing.assert_close((moved / (1 - moved)).log(), -0.4 + 1.5 * draws + math.log(8))


@pytest.mark.parametrize("distribution", ["uniform", "lognormal"])
def test_the_defaults_are_the_draws_themselves(distribution: Any) -> None:
    draws = torch.rand(100, generator=torch.Generator().manual_seed(0))
    plain = draws if distribution == "uniform" else draws.sigmoid()
    assert torch.equal(Flow(time_sampling=distribution).times(draws), plain)


def test_a_shifted_grid_is_lightningdit_s() -> None:
    """Its time runs the other way, s = 1 - t, and its timestep_shift of 0.3 is our 1 / 0.3."""
    s = np.linspace(0, 1, 11)
    theirs = 1 - 0.3 * s / (1 + (0.3 - 1) * s)
    assert samplers.ode_grid(10, shift=1 / 0.3) == pytest.approx(theirs.tolist(), abs=1e-12)
    grid = samplers.sde_grid(20, shift=3.0)
    assert grid[0] == 1 and grid[-2:] == pytest.approx([0.04, 0]) and grid == sorted(grid, reverse=True)
    equal = [shifted(t, 1 / 3.0) for t in grid[:-1]]
    assert np.diff(equal) == pytest.approx(np.full(19, (equal[-1] - 1) / 19))
    assert samplers.ode_grid(7) == torch.linspace(1, 0, 8, dtype=torch.float64).tolist(), "to the bit"
    assert samplers.sde_grid(7)[:-1] == torch.linspace(1, 0.04, 7, dtype=torch.float64).tolist()


# The direction of the velocity


def test_the_cosine_loss_is_the_mean_over_positions() -> None:
    x0, noise, said = normal(3, 4, 2, 5), normal(3, 4, 2, 5, seed=1), normal(3, 4, 2, 5, seed=2)
    t = torch.tensor([0.2, 0.5, 0.9]).double()
    x_t, velocity = interpolate("linear", x0, noise, t)
    plain, both = (Flow(cosine_weight=w).loss(output(said), x0, noise, x_t, t) for w in (0.0, 0.7))
    assert list(plain) == ["denoise"] and list(both) == ["denoise", "denoise/cosine"]
    assert torch.equal(plain["denoise"], both["denoise"])
    v, target = said.numpy(), velocity.numpy()
    cosines = [
        v[b, :, i, j] @ target[b, :, i, j] / np.linalg.norm(v[b, :, i, j]) / np.linalg.norm(target[b, :, i, j])
        for b in range(3)
        for i in range(2)
        for j in range(5)
    ]
    assert both["denoise/cosine"].item() == pytest.approx(0.7 * np.mean(1 - np.array(cosines)), rel=1e-5)


def test_the_cosine_s_gradient_is_bounded_where_a_backbone_begins() -> None:
    said = torch.zeros(2, 4, 3, 3, requires_grad=True)
    x0, noise, t = normal(2, 4, 3, 3).float(), normal(2, 4, 3, 3, seed=1).float(), torch.tensor([0.3, 0.8])
    x_t, _ = interpolate("linear", x0, noise, t)
    loss = Flow(cosine_weight=1.0).loss(output(said), x0, noise, x_t, t)["denoise/cosine"]
    (gradient,) = torch.autograd.grad(loss, said)
    assert loss == 1 and gradient.square().sum(1).sqrt().mean().item() == pytest.approx(1 / SHORTEST / 18, rel=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_all_options_compile_as_one_graph(prediction: Any) -> None:
    flow = Flow(
        time_sampling="lognormal", time_mean=0.3, time_std=0.8, time_shift=2.0, prediction=prediction, cosine_weight=1.0
    )

    def step(draws: Tensor, x0: Tensor, noise: Tensor, said: Tensor) -> list[Tensor]:
        t = flow.times(draws)
        x_t = flow.noisy(x0, noise, t)
        return [*flow.loss(output(said), x0, noise, x_t, t).values(), flow.velocity(output(said), x_t, t)]

    given = torch.rand(3), *(normal(3, 4, 2, 2, seed=seed).float() for seed in range(3))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(*given), step(*given), strict=True):
        torch.testing.assert_close(ours, expected)
