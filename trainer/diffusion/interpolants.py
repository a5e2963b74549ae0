"""Paths between data and noise, x_t = alpha(t) z + sigma(t) e with t = 0 data and t = 1 noise (SiT, Eq. 4 to 6)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from featcache.errors import UserError

Path = Literal["linear", "cosine"]
TimeDistribution = Literal["uniform", "lognormal"]
Prediction = Literal["velocity", "x", "noise"]
T = TypeVar("T", Tensor, float)


@dataclass(frozen=True, kw_only=True)
class Interpolant:
    """A path and its derivatives with respect to t. Each takes and gives a tensor of any shape."""

    alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    d_alpha: Callable[[Tensor], Tensor]
    d_sigma: Callable[[Tensor], Tensor]


_QUARTER = math.pi / 2

INTERPOLANTS: dict[str, Interpolant] = {
    "linear": Interpolant(
        alpha=lambda t: 1 - t,
        sigma=lambda t: t,
        d_alpha=lambda t: -torch.ones_like(t),
        d_sigma=lambda t: torch.ones_like(t),
    ),
    # Variance preserving: alpha^2 + sigma^2 = 1 ("GVP" in SiT, "cosine" in REPA).
    "cosine": Interpolant(
        alpha=lambda t: torch.cos(_QUARTER * t),
        sigma=lambda t: torch.sin(_QUARTER * t),
        d_alpha=lambda t: -_QUARTER * torch.sin(_QUARTER * t),
        d_sigma=lambda t: _QUARTER * torch.cos(_QUARTER * t),
    ),
}


def interpolant(kind: str) -> Interpolant:
    """The path of that name.

    Raises:
        UserError: an unknown name.
    """
    if kind not in INTERPOLANTS:
        raise UserError(f"Unknown path {kind!r}.", remedy=f"Use one of: {', '.join(INTERPOLANTS)}.")
    return INTERPOLANTS[kind]


def _like(t: Tensor, x: Tensor) -> Tensor:
    """t [B] -> [B, 1, ...] with as many axes as x."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def interpolate(kind: str, z: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latent and velocity target (SiT, Eq. 4 and 7).

    Args:
        z: [B, ...] clean latent.
        noise: [B, ...] standard normal.
        t: [B] in [0, 1].

    Returns:
        x_t = alpha z + sigma noise and its time derivative d_alpha z + d_sigma noise, both [B, ...].
    """
    path, t = interpolant(kind), _like(t, z)
    return path.alpha(t) * z + path.sigma(t) * noise, path.d_alpha(t) * z + path.d_sigma(t) * noise


def score_from_velocity(kind: str, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Score of x_t from its velocity (SiT, Eq. 9), [B, ...].

    Solving `v = d_alpha E[z|x] + d_sigma E[e|x]` and `x = alpha E[z|x] + sigma E[e|x]` for `E[e|x] =
    -sigma s` gives `s = (alpha v - d_alpha x) / (sigma (d_alpha sigma - alpha d_sigma))`: finite
    wherever sigma is not zero, also where d_alpha is (the usual form divides by d_alpha first). At t = 0
    the score is not determined by the velocity; the result is not finite there.
    """
    path, t = interpolant(kind), _like(t, x)
    alpha, sigma, d_alpha, d_sigma = path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)
    return (alpha * velocity - d_alpha * x) / (sigma * (d_alpha * sigma - alpha * d_sigma))


def predicted_velocity(kind: str, prediction: Prediction, out: Tensor, x_t: Tensor, t: Tensor, floor: float) -> Tensor:
    """Velocity of x_t that a statement about it implies, [B, ...].

    Of `x = z` and `noise = e` in `x_t = alpha z + sigma e` one gives the other, and both the velocity
    `d_alpha z + d_sigma e`; with `D = d_alpha sigma - alpha d_sigma` (-1 on the linear path)

        x:      v = (d_sigma x_t + D z) / sigma         (x_t - z) / t on the linear path
        noise:  v = (d_alpha x_t - D e) / alpha         (e - x_t) / (1 - t)

    The divisor is taken to be at least `floor`: near the data x says nothing of the noise in x_t, and near pure noise
    the noise says nothing of the data. There the velocity is too small, by the share that the divisor is too large.

    Args:
        prediction: what `out` [B, ...] is; `velocity` passes through.
        t: [B].
    """
    if prediction == "velocity":
        return out
    path, t = interpolant(kind), _like(t, x_t)
    alpha, sigma, d_alpha, d_sigma = path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)
    determinant = d_alpha * sigma - alpha * d_sigma
    if prediction == "x":
        return (d_sigma * x_t + determinant * out) / sigma.clamp(min=floor)
    return (d_alpha * x_t - determinant * out) / alpha.clamp(min=floor)


def shifted(t: T, alpha: float) -> T:
    """`alpha t / (1 + (alpha - 1) t)`: times moved towards noise by alpha > 1, with 0 and 1 where they are.

    On the linear path sigma / alpha is multiplied by `alpha`, as if the latent were alpha times smaller (Esser et al.
    2024, Eq. 23). Another alpha is undone by its reciprocal.
    """
    return alpha * t / (1 + (alpha - 1) * t)


def draw_times(distribution: str, kind: str, draws: Tensor, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Training times [B] in (0, 1) from draws [B].

    `uniform` takes U(0, 1) draws and passes them through. `lognormal` takes N(0, 1) draws n and gives
    the time at which sigma(t) / alpha(t) = exp(mean + std n), as REPA's code does after EDM: the logit-normal
    `sigmoid(mean + std n)` on the linear path, `2 / pi atan(exp(mean + std n))` on the cosine path.

    Raises:
        UserError: an unknown distribution or path.
    """
    interpolant(kind)
    if distribution == "uniform":
        return draws
    if distribution == "lognormal":
        log_ratio = draws if (mean, std) == (0, 1) else mean + std * draws
        return log_ratio.sigmoid() if kind == "linear" else log_ratio.exp().atan() / _QUARTER
    raise UserError(f"Unknown distribution of training times {distribution!r}.", remedy="Use 'uniform' or 'lognormal'.")
