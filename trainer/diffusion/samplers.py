"""Samplers, each one function on one screen.

For velocity models, from noise at t = 1 to data at t = 0: `euler`, `heun`, `dopri5` (ODE) and `euler_maruyama` (SDE).
All take `(model_fn, x, t_grid)` first: `model_fn(x, t) -> velocity` with x [B, ...] and t a Python float (testing it
reads nothing back from the device), the noise x at `t_grid[0]`, and a decreasing grid of times. For DDPM models: `ddpm`
and `ddim`, which take a `Schedule` in place of the grid; their t is a step number.

`euler`, `heun` and `euler_maruyama` can be taken in parts (`Part`), which give the same bits as the whole.

The state is kept in `state_dtype` (float64 as in REPA's samplers; float32 for dopri5 as in SiT's, and for
DDPM and DDIM as in DiT's), the model is called in the dtype of x, and the sample comes back in it.

Randomness comes in through `noise(step) -> [B, ...]`, one draw for step 1, 2, ...: see
`trainer.diffusion.noise`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from featcache.errors import UserError
from trainer.diffusion.ddpm import Schedule
from trainer.diffusion.interpolants import interpolant, score_from_velocity, shifted


class ModelFn(Protocol):
    """Velocity at (x, t). `interval_t` is the time at which a guidance interval is tested, by default t itself."""

    def __call__(self, x: Tensor, t: float, /, *, interval_t: float | None = None) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Part:
    """The steps of a grid from number `start` (0 is the first) up to, and without, number `stop`.

    x is then the state before the first of them, in the state's dtype, and so is what comes back, unless the last of all
    steps is among them. dtype: in which the model is called.
    """

    start: int
    stop: int
    dtype: torch.dtype


def _steps(
    t_grid: list[float], x: Tensor, part: Part | None
) -> tuple[list[tuple[int, float, float]], torch.dtype, bool]:
    """Number (from 1 on) and both ends of each step to take, the model's dtype, and whether the last one is the grid's."""
    steps = [(number, *ends) for number, ends in enumerate(pairwise(t_grid), start=1)]
    if part is None:
        return steps, x.dtype, True
    return steps[part.start : part.stop], part.dtype, part.stop >= len(steps)


def ode_grid(steps: int, *, shift: float = 1.0) -> list[float]:
    """`steps` steps from 1 to 0, equal before they are `shifted`: steps + 1 times.

    Raises:
        UserError: fewer than one step.
    """
    if steps < 1:
        raise UserError(f"{steps} sampling steps were asked for.", remedy="Use at least 1.")
    return [shifted(t, shift) for t in torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()]


def sde_grid(steps: int, *, last: float = 0.04, shift: float = 1.0) -> list[float]:
    """REPA's grid for Euler-Maruyama: `steps` times from 1 to `last` in equal steps, then 0.

    `steps` evaluations of the model, of which the last one, from `last` to 0, adds no noise. A grid that is `shifted`
    has these ends, too (ours): the step without noise does not grow.

    Raises:
        UserError: fewer than two steps, or `last` outside (0, 1).
    """
    if steps < 2:
        raise UserError(f"{steps} steps of the SDE sampler were asked for.", remedy="Use at least 2.")
    if not 0 < last < 1:
        raise UserError(f"The last step of the SDE starts at t = {last}.", remedy="Use a time in (0, 1): 0.04.")
    first = torch.linspace(1, shifted(last, 1 / shift), steps, dtype=torch.float64).tolist()
    return [*(shifted(t, shift) for t in first), 0.0]


@torch.no_grad()
def euler(
    model_fn: ModelFn,
    x: Tensor,
    t_grid: list[float],
    *,
    state_dtype: torch.dtype = torch.float64,
    part: Part | None = None,
) -> Tensor:
    """Euler's method for the probability flow ODE dx = v dt: first order, one evaluation per step. [B, ...]."""
    state = x.to(state_dtype)
    steps, dtype, ends = _steps(t_grid, x, part)
    for _, t, t_next in steps:
        state = state + (t_next - t) * model_fn(state.to(dtype), t).to(state_dtype)
    return state.to(dtype) if ends else state


@torch.no_grad()
def heun(
    model_fn: ModelFn,
    x: Tensor,
    t_grid: list[float],
    *,
    state_dtype: torch.dtype = torch.float64,
    interval_at: Literal["current", "next"] = "current",
    part: Part | None = None,
) -> Tensor:
    """Heun's method for the probability flow ODE: second order, two evaluations per step, one in the last. [B, ...].

    As in EDM (Alg. 1) and REPA the last step is Euler's. `interval_at` says at which time the corrector
    tests a guidance interval: `current`, the beginning of the step, as REPA's code does, or `next`,
    where it evaluates.
    """
    state = x.to(state_dtype)
    last = len(t_grid) - 1
    steps, dtype, ends = _steps(t_grid, x, part)
    for step, t, t_next in steps:
        velocity = model_fn(state.to(dtype), t).to(state_dtype)
        euler_state = state + (t_next - t) * velocity
        if step == last:
            state = euler_state
            break
        tested = t if interval_at == "current" else t_next
        corrector = model_fn(euler_state.to(dtype), t_next, interval_t=tested).to(state_dtype)
        state = state + (t_next - t) * 0.5 * (velocity + corrector)
    return state.to(dtype) if ends else state


@torch.no_grad()
def dopri5(
    model_fn: ModelFn,
    x: Tensor,
    t_grid: list[float],
    *,
    state_dtype: torch.dtype = torch.float32,
    rtol: float = 1e-3,
    atol: float = 1e-6,
) -> Tensor:
    """Adaptive Dormand-Prince 5(4) for the probability flow ODE, by torchdiffeq. [B, ...].

    Only the ends of `t_grid` matter; tolerances default to SiT's. Step sizes follow the error over the
    whole batch, so a sample depends, within the tolerances, on what it is batched with: for byte-identical
    samples keep the batches.
    """
    from torchdiffeq import odeint

    def velocity(t: Tensor, state: Tensor) -> Tensor:
        return model_fn(state.to(x.dtype), float(t)).to(state_dtype)

    ends = torch.tensor([t_grid[0], t_grid[-1]], dtype=torch.float64, device=x.device)
    states: Tensor = odeint(velocity, x.to(state_dtype), ends, method="dopri5", rtol=rtol, atol=atol)
    return states[-1].to(x.dtype)


@torch.no_grad()
def euler_maruyama(
    model_fn: ModelFn,
    x: Tensor,
    t_grid: list[float],
    *,
    noise: Callable[[int], Tensor],
    path: str = "linear",
    diffusion: Literal["linear", "sigma"] = "linear",
    state_dtype: torch.dtype = torch.float64,
    part: Part | None = None,
) -> Tensor:
    """Euler-Maruyama for the reverse SDE dx = (v - w s / 2) dt + sqrt(w) dW (SiT, Eq. 5 and 10). [B, ...].

    In the convention of REPA's code `w = 2 t` (`linear`); `sigma` is `w = 2 sigma(t)`, which is
    SiT's form of that name (there written without the 2 and with noise sqrt(2 w)). They agree on the linear
    path. The last step of the grid is taken without noise: len(t_grid) - 1 evaluations, len(t_grid) - 2
    draws `noise(1), noise(2), ...`.
    """
    state = x.to(state_dtype)
    last = len(t_grid) - 1
    steps, dtype, ends = _steps(t_grid, x, part)
    for step, t, t_next in steps:
        time = state.new_full((1,) * x.ndim, t)
        velocity = model_fn(state.to(dtype), t).to(state_dtype)
        score = score_from_velocity(path, velocity, state, time)
        w = 2 * (time if diffusion == "linear" else interpolant(path).sigma(time))
        state = state + (t_next - t) * (velocity - 0.5 * w * score)
        if step < last:
            state = state + (w * (t - t_next)).sqrt() * noise(step).to(state)
    return state.to(dtype) if ends else state


@torch.no_grad()
def ddpm(
    model_fn: ModelFn,
    x: Tensor,
    schedule: Schedule,
    *,
    noise: Callable[[int], Tensor],
    state_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Ancestral sampling (Ho 2020, Alg. 2) with the model's variance where it is learned. [B, C, ...].

    `model_fn(x, step)` predicts [B, 2C, ...] noise and variance values (-1 is the posterior's
    log-variance, 1 is log beta; Nichol & Dhariwal 2021, Eq. 15) or [B, C, ...] noise, for which the
    variance is beta (the posterior's of the second step in the first). len(schedule) evaluations; no noise
    in the last.
    """
    state, C = x.to(state_dtype), x.shape[1]
    for k in reversed(range(len(schedule))):
        output = model_fn(state.to(x.dtype), float(schedule.steps[k])).to(state_dtype)
        min_log, max_log = float(schedule.posterior_log_variance[k]), math.log(schedule.beta[k])
        x0 = _predict_x0(schedule, k, state, output[:, :C])
        mean = float(schedule.mean_from_x0[k]) * x0 + float(schedule.mean_from_xt[k]) * state
        if k == 0:
            return mean.to(x.dtype)
        values = output[:, C:] if output.shape[1] > C else output.new_ones(())
        log_variance = min_log + (values + 1) / 2 * (max_log - min_log)
        state = mean + (0.5 * log_variance).exp() * noise(len(schedule) - k).to(state)
    raise AssertionError("a schedule has at least one step")


@torch.no_grad()
def ddim(
    model_fn: ModelFn,
    x: Tensor,
    schedule: Schedule,
    *,
    noise: Callable[[int], Tensor] | None = None,
    eta: float = 0.0,
    state_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """DDIM (Song 2021, Eq. 12 and 16): deterministic at `eta` = 0, the posterior's variance at 1. [B, C, ...].

    `model_fn` as for `ddpm`; a learned variance is not used. `noise` is needed if `eta` is not 0.
    """
    assert eta == 0 or noise is not None, "eta > 0 needs noise"
    state, C = x.to(state_dtype), x.shape[1]
    for k in reversed(range(len(schedule))):
        epsilon = model_fn(state.to(x.dtype), float(schedule.steps[k])).to(state_dtype)[:, :C]
        x0 = _predict_x0(schedule, k, state, epsilon)
        previous = float(schedule.alpha_bar_prev[k])
        std = eta * float(schedule.posterior_variance[k]) ** 0.5
        state = previous**0.5 * x0 + (1 - previous - std**2) ** 0.5 * epsilon
        if k > 0 and noise is not None and std > 0:
            state = state + std * noise(len(schedule) - k).to(state)
    return state.to(x.dtype)


def _predict_x0(schedule: Schedule, k: int, x: Tensor, epsilon: Tensor) -> Tensor:
    """Clean sample implied by the noise predicted at position k (Ho 2020, Eq. 15)."""
    alpha_bar = float(schedule.alpha_bar[k])
    clean: Tensor = (x - (1 - alpha_bar) ** 0.5 * epsilon) / alpha_bar**0.5
    return clean
