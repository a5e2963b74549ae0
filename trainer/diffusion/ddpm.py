"""DDPM as DiT trains it: linear schedule, noise prediction, learned variance (Ho 2020; Nichol & Dhariwal 2021).

The schedule is kept in float64 numpy; training gathers from float32 `Tables` on the device, samplers
use the float64 numbers themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featcache.errors import UserError

Float64 = NDArray[np.float64]

STEPS = 1000  # of the full process


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """Noise schedule over K kept steps, float64 [K] each.

    Args:
        steps: step number of each kept step in the full process: what the model is told as time.
        alpha_bar: cumulated product of 1 - beta, decreasing.
    """

    steps: NDArray[np.int64]
    alpha_bar: Float64

    def __len__(self) -> int:
        return len(self.steps)

    @cached_property
    def alpha_bar_prev(self) -> Float64:
        return np.append(1.0, self.alpha_bar[:-1])

    @cached_property
    def beta(self) -> Float64:
        return 1 - self.alpha_bar / self.alpha_bar_prev

    @cached_property
    def posterior_variance(self) -> Float64:
        """Variance of q(x_{k-1} | x_k, x_0) (Ho 2020, Eq. 7); zero at the first step."""
        return self.beta * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)

    @cached_property
    def posterior_log_variance(self) -> Float64:
        """Logarithm of the posterior variance, the first step's zero replaced by the second's value."""
        variance = self.posterior_variance.copy()
        variance[0] = variance[1] if len(self) > 1 else self.beta[0]
        return np.log(variance)

    @cached_property
    def mean_from_x0(self) -> Float64:
        """Coefficient of x_0 in the posterior mean (Ho 2020, Eq. 7)."""
        return self.beta * np.sqrt(self.alpha_bar_prev) / (1 - self.alpha_bar)

    @cached_property
    def mean_from_xt(self) -> Float64:
        """Coefficient of x_k in the posterior mean (Ho 2020, Eq. 7)."""
        return (1 - self.alpha_bar_prev) * np.sqrt(1 - self.beta) / (1 - self.alpha_bar)


def linear_schedule(steps: int = STEPS, *, beta_first: float = 1e-4, beta_last: float = 0.02) -> Schedule:
    """Beta rising linearly over `steps` steps (Ho 2020, Sec. 4), the schedule of the public DiT models."""
    beta = np.linspace(beta_first, beta_last, steps)
    return Schedule(steps=np.arange(steps), alpha_bar=np.cumprod(1 - beta).astype(np.float64))


def has_stride(schedule: Schedule, count: int) -> bool:
    """Whether taking every i-th step, for a whole i, gives `count` of them."""
    return any(len(range(0, len(schedule), i)) == count for i in range(1, len(schedule) + 1))


def respace(schedule: Schedule, count: int, *, spacing: Literal["even", "stride"] = "even") -> Schedule:
    """The same process seen at `count` of its steps only (Nichol & Dhariwal 2021, Sec. 4).

    `even` spreads them from the first step to the last, rounded: 10 of 1000 are 0, 111, ..., 999. `stride` takes every
    i-th step from 0 on (DDIM's choice): 10 of 1000 are 0, 100, ..., 900. A single step is the last one, where the
    process ends in noise, not the first as either rule has it: our choice.

    Raises:
        UserError: a count that the process or the stride does not allow.
    """
    T = len(schedule)
    if not 1 <= count <= T:
        raise UserError(f"{count} sampling steps of a process with {T} were asked for.", remedy=f"Use 1 to {T}.")
    if count == 1:
        kept = np.array([T - 1])
    elif spacing == "stride":
        strides = [i for i in range(1, T + 1) if len(range(0, T, i)) == count]
        if not strides:
            near = min({len(range(0, T, i)) for i in range(1, T + 1)}, key=lambda n: abs(n - count))
            raise UserError(
                f"No whole stride gives {count} of {T} steps.", remedy=f"Use {near} steps, or spacing 'even'."
            )
        kept = np.arange(0, T, strides[0])
    else:
        # Adding up the stride instead of multiplying it, because halves must round as they do in the public
        # code.
        stride, position, kept_list = (T - 1) / (count - 1), 0.0, []
        for _ in range(count):
            kept_list.append(round(position))
            position += stride
        kept = np.array(kept_list, dtype=np.int64)
    return Schedule(steps=schedule.steps[kept], alpha_bar=schedule.alpha_bar[kept])


class Tables(NamedTuple):
    """Columns of a schedule on a device, each [K]."""

    signal: Tensor  # sqrt(alpha_bar)
    noise: Tensor  # sqrt(1 - alpha_bar)
    mean_from_x0: Tensor
    mean_from_xt: Tensor
    posterior_log_variance: Tensor
    log_beta: Tensor


def tables(schedule: Schedule, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tables:
    """The schedule's columns for `q_sample` and `ddpm_loss`."""
    columns = (
        np.sqrt(schedule.alpha_bar),
        np.sqrt(1 - schedule.alpha_bar),
        schedule.mean_from_x0,
        schedule.mean_from_xt,
        schedule.posterior_log_variance,
        np.log(schedule.beta),
    )
    return Tables(*(torch.as_tensor(column, dtype=dtype, device=device) for column in columns))


def _gather(column: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """column [K], t [B] -> [B, 1, ...] with as many axes as x."""
    return column[t].reshape(-1, *[1] * (x.ndim - 1))


def q_sample(table: Tables, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Draw x_t given x_0 (Ho 2020, Eq. 4). x0, noise [B, ...], t [B] int64 position in the schedule -> [B, ...]."""
    return _gather(table.signal, t, x0) * x0 + _gather(table.noise, t, x0) * noise


def probability_flow(table: Tables, noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """dx/dt per step along the flow that has x_t's distribution at every t (Song 2021, "Score-Based Generative
    Modeling", Eq. 13): `beta / 2 (noise / sigma - x_t)` with sigma = sqrt(1 - alpha_bar).

    The schedule is read as a continuous one, which is right up to a share of beta and of beta's change from
    step to step. noise: as predicted, x_t [B, ...], t [B] int64 position in the schedule -> [B, ...].
    """
    half_beta = 0.5 * _gather(table.log_beta, t, x_t).exp()
    return half_beta * (noise / _gather(table.noise, t, x_t) - x_t)


class DDPMLoss(NamedTuple):
    """Each [B]: the mean squared error of the noise, the variational bound in bits per dimension (None if the
    variance is not learned), and their sum."""

    loss: Tensor
    mse: Tensor
    vb: Tensor | None


def ddpm_loss(prediction: Tensor, *, x0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor, table: Tables) -> DDPMLoss:
    """DiT's training loss, `mse + vb` with no weight between them (Nichol & Dhariwal 2021, Eq. 16 with
    lambda = 1).

    The bound is the KL divergence of the posterior and the model's step, at step 0 the negative
    log-likelihood of x_0 under a Gaussian cut into bins of width 2/255 (the public code does so for latents
    too). It trains the variance only: the predicted noise enters detached.

    Args:
        prediction: [B, 2C, ...] noise and variance values, or [B, C, ...] noise.
        x0, x_t, noise: [B, C, ...] clean, noisy, and the noise between.
        t: [B] int64 position in the schedule.
    """
    C = x0.shape[1]
    prediction = prediction.to(table.signal.dtype)  # in float32, whatever autocast made of the model's output
    predicted, values = prediction[:, :C], prediction[:, C:]
    mse = (predicted - noise).square().flatten(1).mean(1)
    if prediction.shape[1] == C:
        return DDPMLoss(mse, mse, None)
    min_log, max_log = _gather(table.posterior_log_variance, t, x0), _gather(table.log_beta, t, x0)
    log_variance = min_log + (values + 1) / 2 * (max_log - min_log)
    x0_hat = (x_t - _gather(table.noise, t, x0) * predicted.detach()) / _gather(table.signal, t, x0)
    from_x0, from_xt = _gather(table.mean_from_x0, t, x0), _gather(table.mean_from_xt, t, x0)
    mean, true_mean = from_x0 * x0_hat + from_xt * x_t, from_x0 * x0 + from_xt * x_t
    kl = 0.5 * (
        log_variance
        - min_log
        - 1
        + (min_log - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
    )
    nll = -discretized_log_likelihood(x0, mean, 0.5 * log_variance)
    at_first = (t == 0).reshape(-1, *[1] * (x0.ndim - 1))
    vb = torch.where(at_first, nll, kl).flatten(1).mean(1) / math.log(2)
    return DDPMLoss(mse + vb, mse, vb)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability (nats) of x's bin of width 2/255 under N(mean, std^2) (Ho 2020, Eq. 13), all [...].

    Beyond -0.999 and 0.999 the bin is open to that side. The normal distribution function is the tanh
    approximation and probabilities are cut off at 1e-12, as in the public code.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse_std = (-log_std).exp()
    upper = cdf(inverse_std * (x - mean + 1 / 255))
    lower = cdf(inverse_std * (x - mean - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()
