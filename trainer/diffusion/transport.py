"""What a model's times and predictions mean, and how it is trained on them: flows (SiT) and DDPM (DiT).

To the trainer time is t in [0, 1] with 0 = data and 1 = noise, whatever the backbone is told. The random numbers come
in from outside. Nothing here reads a value back from the device, and all of it compiles as a part of the step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from trainer.diffusion import ddpm
from trainer.diffusion.interpolants import Path, TimeDistribution, draw_times, interpolate
from trainer.models.dit import split_variance

if TYPE_CHECKING:
    from trainer.models.transformer import ModelOutput


class Transport(Protocol):
    """How data become noise, what a model says of it, and what it is trained to say.

    Latents, noise and velocities are [B, C, ...], times [B].
    """

    @property
    def time_range(self) -> float:
        """What the backbone is told at t = 1."""
        ...

    def times(self, draws: Tensor) -> Tensor:
        """Training times t in [0, 1], float32, from random draws."""
        ...

    def model_time(self, t: Tensor) -> Tensor:
        """Time as the backbone takes it."""
        ...

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, from clean latents and standard normal noise."""
        ...

    def loss(self, out: ModelOutput, x0: Tensor, noise: Tensor, x_t: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Scalar loss terms by name, in float32; their sum is minimised. `out`: of the backbone at (x_t, t)."""
        ...

    def velocity(self, out: ModelOutput, x_t: Tensor, t: Tensor) -> Tensor:
        """dx_t/dt along the probability flow that the backbone's output implies."""
        ...


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Stochastic interpolants with velocity prediction (SiT, Eq. 4 to 7). The backbone is told t itself.

    Args:
        path: see `trainer.diffusion.interpolants.INTERPOLANTS`.
        time_sampling: distribution of the training times; `uniform` takes U(0, 1) draws, `lognormal` N(0, 1).

    Raises:
        UserError: an unknown path or distribution.
    """

    path: Path = "linear"
    time_sampling: TimeDistribution = "uniform"

    def __post_init__(self) -> None:
        draw_times(self.time_sampling, self.path, torch.empty(0))  # unknown names are errors here

    @property
    def time_range(self) -> float:
        return 1.0

    def times(self, draws: Tensor) -> Tensor:
        return draw_times(self.time_sampling, self.path, draws)

    def model_time(self, t: Tensor) -> Tensor:
        return t

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return interpolate(self.path, x0, noise, t)[0]

    def loss(self, out: ModelOutput, x0: Tensor, noise: Tensor, x_t: Tensor, t: Tensor) -> dict[str, Tensor]:
        """`denoise`: mean squared error of the velocity (SiT, Eq. 7)."""
        _, velocity = interpolate(self.path, x0, noise, t)
        return {"denoise": (self.velocity(out, x_t, t).float() - velocity).square().mean()}

    def velocity(self, out: ModelOutput, x_t: Tensor, t: Tensor) -> Tensor:
        assert out.prediction is not None, "the forward pass stopped before the prediction"
        return out.prediction


@dataclass(frozen=True, kw_only=True, eq=False)
class DDPM:
    """Noise prediction over discrete steps k = 0..K-1, the variance learned or not (Ho 2020; Nichol & Dhariwal 2021).

    t is k / (K - 1), and the backbone is told k. A time between two steps is the nearer one.

    Args:
        table: the schedule's columns on the device of the latents.
    """

    table: ddpm.Tables = field(repr=False)

    @property
    def time_range(self) -> float:
        return float(len(self.table.signal) - 1)

    def times(self, draws: Tensor) -> Tensor:
        """Every step alike, from U(0, 1) draws."""
        steps = len(self.table.signal)
        return (draws * steps).long().clamp(max=steps - 1).float() / self.time_range

    def model_time(self, t: Tensor) -> Tensor:
        return (t * self.time_range).round().long()

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return ddpm.q_sample(self.table, x0, self.model_time(t), noise)

    def loss(self, out: ModelOutput, x0: Tensor, noise: Tensor, x_t: Tensor, t: Tensor) -> dict[str, Tensor]:
        """`denoise`: DiT's loss, see `trainer.diffusion.ddpm.ddpm_loss`."""
        assert out.prediction is not None, "the forward pass stopped before the prediction"
        loss = ddpm.ddpm_loss(
            out.prediction.float(), x0=x0, x_t=x_t, noise=noise, t=self.model_time(t), table=self.table
        )
        return {"denoise": loss.loss.mean()}

    def velocity(self, out: ModelOutput, x_t: Tensor, t: Tensor) -> Tensor:
        noise, _ = split_variance(out, x_t.shape[1])
        return self.time_range * ddpm.probability_flow(self.table, noise, x_t, self.model_time(t))


def build_transport(
    family: Literal["sit", "dit"],
    *,
    path: Path = "linear",
    time_sampling: TimeDistribution = "uniform",
    device: torch.device | str = "cpu",
) -> Transport:
    """The transport of a family of backbones. `path` and `time_sampling` are a flow's; `device`: of the latents.

    Raises:
        UserError: an unknown path or distribution of times.
    """
    if family == "dit":
        return DDPM(table=ddpm.tables(ddpm.linear_schedule(), device))
    return Flow(path=path, time_sampling=time_sampling)
