"""Flows and DDPM as one object, against closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from featcache.errors import UserError
from trainer.diffusion import ddpm
from trainer.diffusion.interpolants import draw_times
from trainer.diffusion.transport import DDPM, Flow, Transport, build_transport
from trainer.models.transformer import ModelOutput

K = ddpm.STEPS
DIT = build_transport("dit")
FLOWS = [Flow(path=path, time_sampling=times) for path in ("linear", "cosine") for times in ("uniform", "lognormal")]
ALL: list[Transport] = [DIT, *FLOWS]


def name(transport: Transport) -> str:
    return f"{transport.path}-{transport.time_sampling}" if isinstance(transport, Flow) else "ddpm"


def latents(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def output(prediction: Tensor) -> ModelOutput:
    return ModelOutput(prediction, {}, torch.zeros(len(prediction), 1))


def test_every_ddpm_step_survives_the_way_to_t_and_back() -> None:
    steps = torch.arange(K)
    t = DIT.times((steps + 0.5) / K)
    assert t.dtype is torch.float32 and t[0] == 0 and t[-1] == 1
    assert torch.equal(DIT.model_time(t), steps) and DIT.model_time(t).dtype is torch.int64


def test_ddpm_draws_every_step_alike_and_stays_inside() -> None:
    draws = torch.tensor([0.0, 0.0009999, 0.001, 0.5, 0.9999999, 1.0])
    assert DIT.model_time(DIT.times(draws)).tolist() == [0, 0, 1, 500, 999, 999]
    many = DIT.model_time(DIT.times(torch.rand(200_000, generator=torch.Generator().manual_seed(0))))
    counts = many.bincount(minlength=K)
    assert abs(counts.float() - 200).max() < 6 * 200**0.5


@pytest.mark.parametrize("flow", FLOWS, ids=name)
def test_a_flow_tells_the_backbone_t_itself(flow: Flow) -> None:
    draws = latents(64).sigmoid() if flow.time_sampling == "uniform" else latents(64)
    t = flow.times(draws)
    assert flow.model_time(t) is t and flow.time_range == 1
    assert torch.equal(t, draw_times(flow.time_sampling, flow.path, draws))


@pytest.mark.parametrize("transport", ALL, ids=name)
def test_noise_grows_from_none_to_nothing_else(transport: Transport) -> None:
    x0, noise = latents(2, 3, 4, 4), latents(2, 3, 4, 4, seed=1)
    first, last = (transport.noisy(x0, noise, torch.full((2,), t)) for t in (0.0, 1.0))
    # DDPM begins with a variance of 1e-4 and ends with 4e-5 of the signal's.
    assert torch.allclose(first, x0, atol=0.05) and torch.allclose(last, noise, atol=0.05)
    if transport is not DIT:
        assert torch.allclose(first, x0, atol=1e-6) and torch.allclose(last, noise, atol=1e-6)


@pytest.mark.parametrize("flow", FLOWS, ids=name)
def test_a_flow_s_loss_is_the_velocity_s_and_zero_for_the_true_one(flow: Flow) -> None:
    x0, noise, t = latents(5, 3, 4, 4).double(), latents(5, 3, 4, 4, seed=1).double(), torch.rand(5).double()
    h = 1e-6
    slope = (flow.noisy(x0, noise, t + h) - flow.noisy(x0, noise, t - h)) / (2 * h)
    x_t = flow.noisy(x0, noise, t)
    assert torch.equal(flow.velocity(output(slope), x_t, t), slope)
    (exact,) = flow.loss(output(slope), x0, noise, x_t, t).values()
    (off,) = flow.loss(output(slope + 0.5), x0, noise, x_t, t).values()
    assert exact < 1e-12 and off.item() == pytest.approx(0.25, rel=1e-5)


def test_ddpm_s_loss_is_dit_s() -> None:
    assert isinstance(DIT, DDPM)
    x0, noise, t = latents(6, 4, 2, 2), latents(6, 4, 2, 2, seed=1), DIT.times(torch.linspace(0, 1, 6))
    prediction, x_t = latents(6, 8, 2, 2, seed=2), DIT.noisy(x0, noise, t)
    expected = ddpm.ddpm_loss(prediction, x0=x0, x_t=x_t, noise=noise, t=DIT.model_time(t), table=DIT.table)
    assert DIT.loss(output(prediction), x0, noise, x_t, t) == {"denoise": expected.loss.mean()}


@pytest.mark.parametrize("learned", [False, True])
def test_ddpm_s_velocity_is_the_slope_of_its_path(learned: bool) -> None:
    """With the true noise, against central differences; beta stands for -log(1 - beta) and for its own mean over a step."""
    x0, noise = latents(1, 4, 2, 2).expand(800, -1, -1, -1), latents(1, 4, 2, 2, seed=1).expand(800, -1, -1, -1)
    t = torch.arange(150, 950) / (K - 1)
    slope = (DIT.noisy(x0, noise, t + 1 / (K - 1)) - DIT.noisy(x0, noise, t - 1 / (K - 1))) * (K - 1) / 2
    prediction = torch.cat([noise, latents(800, 4, 2, 2, seed=3)], dim=1) if learned else noise
    found = DIT.velocity(output(prediction), DIT.noisy(x0, noise, t), t)
    assert ((found - slope).flatten(1).norm(dim=1) / slope.flatten(1).norm(dim=1)).max() < 0.02


@pytest.mark.parametrize("path", ["linear", "cosine", "ddpm"])
def test_following_the_velocity_from_noise_ends_at_the_data(path: str) -> None:
    """Data normal with mean 3 and deviation 0.5, for which the exact prediction is known. 20,000 numbers, 999 Euler steps."""
    transport: Transport = DIT if path == "ddpm" else Flow(path=path)  # type: ignore[arg-type]
    x = latents(20_000, 1, 1, 1).double()
    # Coefficients of x_t by putting in pure data and pure noise.
    one, zero = torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double()
    grid = torch.linspace(1, 0, K).double()
    for now, then in pairwise(grid):
        t = now.reshape(1)
        a, s = transport.noisy(one, zero, t).item(), transport.noisy(zero, one, t).item()
        noise = s * (x - a * 3) / (a**2 * 0.25 + s**2)
        if path == "ddpm":
            prediction = noise
        else:
            q = math.pi / 2
            da, ds = (-1.0, 1.0) if path == "linear" else (-q * math.sin(q * now), q * math.cos(q * now))
            data = 3 + a * 0.25 * (x - a * 3) / (a**2 * 0.25 + s**2)
            prediction = da * data + ds * noise
        x = x + (then - now) * transport.velocity(output(prediction), x, t.expand(len(x)))
    assert x.mean().item() == pytest.approx(3, abs=0.03) and x.std().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("transport", ALL, ids=name)
def test_all_of_it_compiles_as_one_graph(transport: Transport) -> None:
    def step(draws: Tensor, x0: Tensor, noise: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = transport.times(draws)
        x_t = transport.noisy(x0, noise, t)
        (loss,) = transport.loss(output(prediction), x0, noise, x_t, t).values()
        return loss, transport.model_time(t), transport.velocity(output(prediction), x_t, t)

    C = 8 if transport is DIT else 4
    given = torch.rand(3), latents(3, 4, 2, 2), latents(3, 4, 2, 2, seed=1), latents(3, C, 2, 2, seed=2)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(*given), step(*given)):
        torch.testing.assert_close(ours, expected)


def test_unknown_paths_and_distributions_are_explained() -> None:
    with pytest.raises(UserError, match="path"):
        Flow(path="vp")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="distribution"):
        build_transport("sit", time_sampling="beta")  # type: ignore[arg-type]
