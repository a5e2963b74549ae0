"""Samplers on Gaussian data, whose velocity, score, flow map and marginals are known in closed form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from featcache.errors import UserError
from trainer.diffusion.ddpm import Schedule, linear_schedule, respace
from trainer.diffusion.guidance import Guidance, guided
from trainer.diffusion.noise import noise_stream, sample_noise
from trainer.diffusion.samplers import (
    ddim,
    ddpm,
    dopri5,
    euler,
    euler_maruyama,
    heun,
    ode_grid,
    sde_grid,
)
from trainer.interval import Interval
from trainer.models.transformer import ModelOutput

MEAN, STD = 1.5, 0.5


def path(kind: str, t: float) -> tuple[float, float, float, float]:
    if kind == "linear":
        return 1 - t, t, -1.0, 1.0
    q = math.pi / 2
    return math.cos(q * t), math.sin(q * t), -q * math.sin(q * t), q * math.cos(q * t)


def gaussian_velocity(kind: str = "linear", mean: float = MEAN, std: float = STD) -> Callable[..., Tensor]:
    """Exact velocity for data N(mean, std^2)."""

    def model_fn(x: Tensor, t: float, *, interval_t: float | None = None) -> Tensor:
        a, b, da, db = path(kind, t)
        residual = (x - a * mean) / (a * a * std * std + b * b)
        return da * (mean + a * std * std * residual) + db * b * residual

    return model_fn


def noise_at_one(count: int = 64) -> Tensor:
    return torch.linspace(-2.5, 2.5, count, dtype=torch.float64)[:, None]


def flow_map(x: Tensor) -> Tensor:
    """Where the probability flow takes the noise x: the increasing map from N(0, 1) to N(MEAN, STD^2)."""
    return MEAN + STD * x


def test_grids() -> None:
    assert ode_grid(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    grid = sde_grid(250)
    assert len(grid) == 251
    assert (grid[0], grid[-1]) == (1.0, 0.0)
    assert grid[-2] == pytest.approx(0.04, abs=1e-15)
    np.testing.assert_allclose(np.diff(grid[:-1]), -0.96 / 249, rtol=1e-10)


@pytest.mark.parametrize("make", [lambda: ode_grid(0), lambda: sde_grid(1), lambda: sde_grid(10, last=0.0)])
def test_impossible_grids_are_explained(make: Callable[[], list[float]]) -> None:
    with pytest.raises(UserError):
        make()


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_order_of_convergence(sampler: Callable[..., Tensor], order: int, kind: str) -> None:
    x = noise_at_one()
    errors = [
        (sampler(gaussian_velocity(kind), x, ode_grid(steps)) - flow_map(x)).abs().max().item()
        for steps in (80, 160, 320)
    ]
    slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert slopes == pytest.approx([order, order], abs=0.1)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_dopri5_keeps_its_tolerance(kind: str) -> None:
    x = noise_at_one()
    errors = []
    for tolerance in (1e-4, 1e-6, 1e-8):
        out = dopri5(
            gaussian_velocity(kind),
            x,
            ode_grid(1),
            state_dtype=torch.float64,
            rtol=tolerance,
            atol=tolerance,
        )
        errors.append((out - flow_map(x)).abs().max().item())
    # Local tolerances add up along the path.
    assert all(error < 100 * tolerance for error, tolerance in zip(errors, (1e-4, 1e-6, 1e-8)))
    assert errors[0] > errors[1] > errors[2]


def test_number_of_evaluations() -> None:
    times: list[tuple[float, float | None]] = []

    def model_fn(x: Tensor, t: float, *, interval_t: float | None = None) -> Tensor:
        times.append((t, interval_t))
        return torch.zeros_like(x)

    x = torch.zeros(1, 1)
    euler(model_fn, x, ode_grid(4))
    assert times == [(1.0, None), (0.75, None), (0.5, None), (0.25, None)]
    times.clear()
    heun(model_fn, x, ode_grid(2))
    assert times == [(1.0, None), (0.5, 1.0), (0.5, None)]
    times.clear()
    heun(model_fn, x, ode_grid(2), interval_at="next")
    assert times == [(1.0, None), (0.5, 0.5), (0.5, None)]
    times.clear()
    drawn: list[int] = []

    def noise(step: int) -> Tensor:
        drawn.append(step)
        return torch.zeros(1, 1)

    euler_maruyama(model_fn, x, sde_grid(5), noise=noise)
    assert len(times) == 5
    assert drawn == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("sampler", "options"),
    [(euler, {}), (heun, {}), (euler_maruyama, {"noise": lambda step: torch.full((64, 1), 0.3 * step)})],
)
def test_state_is_float64_and_the_model_sees_the_dtype_of_x(sampler: Callable[..., Tensor], options: dict) -> None:
    seen = set()

    def model_fn(x: Tensor, t: float, *, interval_t: float | None = None) -> Tensor:
        seen.add(x.dtype)
        return gaussian_velocity()(x, t)

    x = noise_at_one().float()
    grid = sde_grid(400)
    exact = sampler(gaussian_velocity(), x.double(), grid, **options)
    ours = sampler(model_fn, x, grid, **options)
    single = sampler(model_fn, x, grid, state_dtype=torch.float32, **options)
    assert seen == {torch.float32}
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() < (single - exact).abs().max()


def sde_moments(kind: str, grid: list[float], w: Callable[[float], float], std: float = STD) -> tuple[float, float]:
    """Exact mean and variance of Euler-Maruyama's result from N(0, 1), by its affine steps, with the score
    of the Gaussian marginal written out."""
    mean, variance = 0.0, 1.0
    for i, (t, t_next) in enumerate(itertools.pairwise(grid)):
        a, b, da, db = path(kind, t)
        marginal = a * a * std * std + b * b
        # velocity = slope_v x + offset_v, score = slope_s x + offset_s
        slope_v = (da * a * std * std + db * b) / marginal
        offset_v = da * MEAN - slope_v * a * MEAN
        slope_s, offset_s = -1 / marginal, a * MEAN / marginal
        dt = t_next - t
        factor = 1 + dt * (slope_v - 0.5 * w(t) * slope_s)
        mean = factor * mean + dt * (offset_v - 0.5 * w(t) * offset_s)
        variance *= factor**2
        if i < len(grid) - 2:
            variance += w(t) * -dt
    return mean, variance


W = {"linear": lambda t: 2 * t, "sigma": lambda t: 2 * math.sin(math.pi / 2 * t)}


@pytest.mark.parametrize(("kind", "diffusion"), [("linear", "linear"), ("cosine", "linear"), ("cosine", "sigma")])
def test_euler_maruyama_step_by_step(kind: Literal["linear", "cosine"], diffusion: Literal["linear", "sigma"]) -> None:
    """Its result is affine in the noise and in every draw: coefficients give its exact moments."""
    grid = sde_grid(50)
    draws = len(grid) - 2

    def run(x: Tensor, noise: Tensor) -> Tensor:  # x [R, 1], noise [R, draws]
        return euler_maruyama(
            gaussian_velocity(kind),
            x,
            grid,
            noise=lambda step: noise[:, step - 1 : step],
            path=kind,
            diffusion=diffusion,
        )[:, 0]

    zero = torch.zeros(1, draws, dtype=torch.float64)
    offset = run(torch.zeros(1, 1, dtype=torch.float64), zero)
    initial = run(torch.ones(1, 1, dtype=torch.float64), zero) - offset
    each = run(torch.zeros(draws, 1, dtype=torch.float64), torch.eye(draws, dtype=torch.float64)) - offset
    mean, variance = sde_moments(kind, grid, W[diffusion])
    assert offset.item() == pytest.approx(mean, rel=1e-10)
    assert (initial.square() + each.square().sum()).item() == pytest.approx(variance, rel=1e-10)


@pytest.mark.parametrize(("kind", "diffusion"), [("linear", "linear"), ("cosine", "linear"), ("cosine", "sigma")])
def test_euler_maruyama_converges_to_the_data(kind: str, diffusion: str) -> None:
    """The exact moments of the discrete process, so no sampling error: first order in the step."""
    errors = []
    for steps in (1000, 2000, 4000):
        mean, variance = sde_moments(kind, [*np.linspace(1, 1 / steps, steps), 0.0], W[diffusion])
        errors.append(abs(mean - MEAN) + abs(variance - STD**2))
    assert errors[0] < 0.01
    slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert slopes == pytest.approx([1, 1], abs=0.15)


def test_euler_maruyama_marginal() -> None:
    grid, shape = sde_grid(100), (20,)
    x = sample_noise(0, range(200), shape, 0)
    out = euler_maruyama(gaussian_velocity(), x, grid, noise=noise_stream(0, range(200), shape))
    mean, variance = sde_moments("linear", grid, W["linear"])
    assert stats.kstest(out.flatten().numpy(), "norm", args=(mean, math.sqrt(variance))).pvalue > 0.01


def gaussian_noise_prediction(
    mean: float, std: float, value: float | None, schedule: Schedule | None = None
) -> Callable[..., Tensor]:
    """E[e | x_t] for data N(mean, std^2), with a constant variance value in further channels."""
    schedule = schedule or linear_schedule()

    def model_fn(x: Tensor, t: float, *, interval_t: float | None = None) -> Tensor:
        bar = float(schedule.alpha_bar[int(t)])
        residual = (x - math.sqrt(bar) * mean) / (bar * std**2 + 1 - bar)
        noise = math.sqrt(1 - bar) * residual
        return noise if value is None else torch.cat([noise, torch.full_like(x, value)], dim=1)

    return model_fn


def affine(
    sampler: Callable[..., Tensor],
    model_fn: Callable[..., Tensor],
    schedule: Schedule,
    x_scale: float = 1.0,
    **kw: float,
) -> tuple[float, float]:
    """Exact mean and variance of a sampler's result from N(0, x_scale^2): it is affine in all its noise."""
    draws = len(schedule) - 1
    rows = draws + 2
    x = torch.zeros(rows, 1, dtype=torch.float64)
    x[1] = x_scale
    noise = torch.cat([torch.zeros(2, draws), torch.eye(draws)]).double()
    out = sampler(model_fn, x, schedule, noise=lambda step: noise[:, step - 1 : step], state_dtype=torch.float64, **kw)[
        :, 0
    ]
    return out[0].item(), (out[1:] - out[0]).square().sum().item()


@pytest.mark.parametrize("count", [10, 250, 1000])
@pytest.mark.parametrize("value", [1.0, None])
def test_ddpm_keeps_a_standard_normal(count: int, value: float | None) -> None:
    """For N(0, 1) data the exact reverse step has variance beta, so every marginal but the noiseless last
    is N(0, 1)."""
    schedule = respace(linear_schedule(), count)
    mean, variance = affine(ddpm, gaussian_noise_prediction(0, 1, value), schedule)
    assert mean == pytest.approx(0, abs=1e-12)
    assert variance == pytest.approx(1 - schedule.beta[0], rel=1e-6)


@pytest.mark.parametrize("count", [10, 250])
def test_ddpm_with_the_posterior_variance_reaches_a_point(count: int) -> None:
    """For data at one point the exact reverse step is the posterior: value -1."""
    mean, variance = affine(ddpm, gaussian_noise_prediction(MEAN, 0, -1.0), respace(linear_schedule(), count))
    assert mean == pytest.approx(MEAN, abs=1e-9)
    assert variance == pytest.approx(0, abs=1e-12)


def test_ddpm_interpolates_the_log_variance() -> None:
    """One step with noise: its coefficient is the standard deviation."""
    schedule = respace(linear_schedule(), 2)
    k = 1

    def model_fn(x: Tensor, t: float, *, interval_t: float | None = None) -> Tensor:
        return torch.cat([torch.zeros_like(x), torch.full_like(x, 0.5)], dim=1)

    x = torch.zeros(1, 1, dtype=torch.float64)
    out = ddpm(model_fn, x, schedule, noise=lambda step: torch.ones(1, 1).double(), state_dtype=torch.float64)
    log_variance = 0.75 * math.log(schedule.beta[k]) + 0.25 * math.log(schedule.posterior_variance[k])
    last = schedule.mean_from_x0[0] / math.sqrt(schedule.alpha_bar[0]) + schedule.mean_from_xt[0]
    assert out.item() == pytest.approx(last * math.exp(log_variance / 2), rel=1e-10)


def test_ddim_converges_to_the_flow_map() -> None:
    start = math.sqrt(linear_schedule().alpha_bar[-1])
    x = noise_at_one()
    expected = MEAN + STD * (x - start * MEAN) / math.sqrt(start**2 * STD**2 + 1 - start**2)
    errors = []
    for count in (50, 100, 200):
        out = ddim(
            gaussian_noise_prediction(MEAN, STD, 0.0),
            x,
            respace(linear_schedule(), count),
            state_dtype=torch.float64,
        )
        errors.append((out - expected).abs().max().item())
    slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert slopes == pytest.approx([1, 1], abs=0.2)
    assert errors[-1] < 0.02


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", ["even", "stride"])
def test_ddim_reaches_a_point_for_any_eta(eta: float, spacing: Literal["even", "stride"]) -> None:
    schedule = respace(linear_schedule(), 10, spacing=spacing)
    mean, variance = affine(ddim, gaussian_noise_prediction(MEAN, 0, None), schedule, eta=eta)
    assert mean == pytest.approx(MEAN, abs=1e-9)
    assert variance == pytest.approx(0, abs=1e-12)


def test_ddim_with_eta_one_is_ddpm_with_the_posterior_variance() -> None:
    schedule = respace(linear_schedule(), 25)
    x = noise_at_one()
    noise = noise_stream(3, range(64), (1,))
    a = ddim(
        gaussian_noise_prediction(MEAN, STD, None),
        x,
        schedule,
        noise=noise,
        eta=1.0,
        state_dtype=torch.float64,
    )
    b = ddpm(gaussian_noise_prediction(MEAN, STD, -1.0), x, schedule, noise=noise, state_dtype=torch.float64)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_ddim_with_noise_converges_to_the_data() -> None:
    # A finer process than 1000 steps, whose own step size would show.
    process = linear_schedule(20000, beta_first=5e-6, beta_last=1e-3)
    model_fn = gaussian_noise_prediction(MEAN, STD, None, process)
    errors = []
    for count in (125, 250, 500):
        mean, variance = affine(ddim, model_fn, respace(process, count), eta=0.5)
        errors.append(abs(variance - STD**2))
        # Sampling starts at mean zero, where the process has shrunk the data's mean to this, not to zero.
        assert abs(mean - MEAN) < MEAN * math.sqrt(process.alpha_bar[-1])
    slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert slopes == pytest.approx([1, 1], abs=0.1)


def test_ddim_marginal() -> None:
    schedule, shape = respace(linear_schedule(), 100), (20,)
    model_fn = gaussian_noise_prediction(MEAN, STD, None)
    x, noise = sample_noise(1, range(200), shape, 0), noise_stream(1, range(200), shape)
    out = ddim(model_fn, x, schedule, noise=noise, eta=0.5)
    mean, variance = affine(ddim, model_fn, schedule, eta=0.5)
    assert stats.kstest(out.flatten().numpy(), "norm", args=(mean, math.sqrt(variance))).pvalue > 0.01


class Recorder:
    """A model [B, 4, 2, 2] -> velocity: known per label, with a record of its batches."""

    NULL = 10

    def __init__(self, extra_channels: int = 0) -> None:
        self.extra = extra_channels
        self.batches: list[tuple[list[float], list[int]]] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> ModelOutput:
        self.batches.append((t.tolist(), y.tolist()))
        value = (1.0 + y.to(x) + t.to(x)).reshape(-1, 1, 1, 1)
        channels = x.shape[1] + self.extra
        return ModelOutput(value * torch.arange(1, channels + 1).to(x).reshape(1, -1, 1, 1) + 0 * x[:, :1], {}, t)


def latent(B: int = 2) -> Tensor:
    return torch.randn(B, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("channels", "guided_channels"), [(None, 4), (3, 3)])
def test_guidance_by_hand(channels: int | None, guided_channels: int) -> None:
    model, labels = Recorder(extra_channels=4), torch.tensor([2, 5])
    model_fn = guided(model, labels, null=Recorder.NULL, guidance=Guidance(scale=3, channels=channels))
    out = model_fn(latent(), 0.5)
    assert out.shape == (2, 8, 2, 2)
    assert model.batches == [([0.5] * 4, [2, 5, 10, 10])]
    for b, label in enumerate((2, 5)):
        for c in range(8):
            conditional, unconditional = (c + 1) * (label + 1.5), (c + 1) * 11.5
            expected = unconditional + 3 * (conditional - unconditional) if c < guided_channels else conditional
            assert out[b, c].flatten().tolist() == pytest.approx([expected] * 4)


def test_interval_is_closed_at_both_ends() -> None:
    guidance = Guidance(scale=2, interval=Interval(0.25, 0.5))
    doubled = {}
    for t in (0.0, 0.24, 0.25, 0.3, 0.5, 0.51, 1.0):
        model = Recorder()
        guided(model, torch.tensor([1]), null=10, guidance=guidance)(latent(1), t)
        doubled[t] = len(model.batches[0][1]) == 2
    assert doubled == {0.0: False, 0.24: False, 0.25: True, 0.3: True, 0.5: True, 0.51: False, 1.0: False}


def test_interval_of_a_ddpm_model_is_in_parts_of_the_last_step() -> None:
    guidance = Guidance(scale=2, interval=Interval(0.5, 1.0))
    sizes = []
    for step in (499.0, 500.0, 999.0):
        model = Recorder()
        guided(model, torch.tensor([1]), null=10, guidance=guidance, time_range=999)(latent(1), step)
        sizes.append(len(model.batches[0][1]))
    assert sizes == [1, 2, 2]


def test_scale_one_costs_no_second_evaluation() -> None:
    model = Recorder()
    out = guided(model, torch.tensor([1, 2]), null=10)(latent(), 0.5)
    assert model.batches == [([0.5, 0.5], [1, 2])]
    expected = model(latent(), torch.tensor([0.5, 0.5]), torch.tensor([1, 2])).prediction
    assert expected is not None and torch.equal(out, expected)


def test_time_keeps_its_precision_beside_a_bfloat16_latent() -> None:
    model = Recorder()
    guided(model, torch.tensor([1]), null=10)(latent(1).bfloat16(), 501.0)
    assert model.batches[0][0] == [501.0]


def test_impossible_guidance_is_explained() -> None:
    with pytest.raises(UserError, match="0 guided channels"):
        Guidance(scale=2, channels=0)


def test_guided_velocity_is_guided_drift() -> None:
    """The score is affine in the velocity with factors that only t and x set, so guiding either is the
    same."""
    scale, grid = 2.5, sde_grid(12)
    labels = torch.tensor([2, 5])
    model_fn = guided(Recorder(), labels, null=10, guidance=Guidance(scale=scale, interval=Interval(0.2, 0.8)))
    ours = euler_maruyama(model_fn, latent(), grid, noise=lambda step: latent() * step)

    model, x = Recorder(), latent()
    for i, (t, t_next) in enumerate(itertools.pairwise(grid)):
        drifts = []
        for y in (labels, torch.tensor([10, 10])):
            v = model(x, torch.full((2,), t, dtype=torch.float64), y).prediction
            assert v is not None
            s = -(x + (1 - t) * v) / t  # the linear path's score, solved for by hand
            drifts.append(v - t * s)
        drift = drifts[1] + scale * (drifts[0] - drifts[1]) if 0.2 <= t <= 0.8 else drifts[0]
        x = x + (t_next - t) * drift
        if i < len(grid) - 2:
            x = x + math.sqrt(2 * t * (t - t_next)) * latent() * (i + 1)
    torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("interval_at", "sizes"), [("current", [2, 2, 1, 1, 1]), ("next", [2, 1, 1, 1, 1])])
def test_heun_tests_the_interval_where_it_is_told_to(interval_at: Literal["current", "next"], sizes: list[int]) -> None:
    model = Recorder()
    model_fn = guided(model, torch.tensor([1]), null=10, guidance=Guidance(scale=2, interval=Interval(0.9, 1)))
    heun(model_fn, latent(1), ode_grid(3), interval_at=interval_at)
    assert [len(y) for _, y in model.batches] == sizes


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**63),
    indices=st.lists(st.integers(0, 2**40), min_size=1, max_size=9, unique=True),
    step=st.integers(0, 1000),
    data=st.data(),
)
def test_noise_belongs_to_the_sample(seed: int, indices: list[int], step: int, data: st.DataObject) -> None:
    whole = sample_noise(seed, indices, (2, 3), step)
    order = data.draw(st.permutations(range(len(indices))))
    kept = order[: data.draw(st.integers(1, len(indices)))]
    part = sample_noise(seed, [indices[i] for i in kept], (2, 3), step)
    assert torch.equal(part, whole[list(kept)])
    stream = noise_stream(seed, indices, (2, 3), threads=2)
    for asked in (step, step + 1, step, step + 5):
        assert torch.equal(stream(asked), sample_noise(seed, indices, (2, 3), asked))


def test_noise_is_standard_normal_and_independent() -> None:
    a = sample_noise(0, range(500), (40,), 1)
    assert a.dtype == torch.float32
    assert stats.kstest(a.flatten().numpy(), "norm").pvalue > 0.01
    others = [
        sample_noise(1, range(500), (40,), 1),
        sample_noise(0, range(500), (40,), 2),
        sample_noise(0, range(500, 1000), (40,), 1),
        a.roll(1, 0),
        a.roll(1, 1),
    ]
    for b in others:
        assert abs(np.corrcoef(a.flatten(), b.flatten())[0, 1]) < 4 / math.sqrt(a.numel())


def test_a_sample_does_not_depend_on_its_batch() -> None:
    def run(indices: list[int]) -> Tensor:
        noise = noise_stream(4, indices, (2,))
        x = sample_noise(4, indices, (2,), 0)
        return euler_maruyama(gaussian_velocity(), x, sde_grid(20), noise=noise)

    whole = run(list(range(7)))
    assert torch.equal(torch.cat([run([0, 1, 2]), run([3, 4, 5, 6])]), whole)
    assert torch.equal(run([5]), whole[5:6])
