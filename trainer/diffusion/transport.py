"""What a model's times and predictions mean, and how it is trained on them: flows (SiT) and DDPM (DiT).

To the trainer time is t in [0, 1] with 0 = data and 1 = noise, whatever the backbone is told. The random numbers come
in from outside. Nothing here reads a value back from the device, and all of it compiles as a part of the step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict, Unpack

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from trainer.diffusion import ddpm
from trainer.diffusion.interpolants import (
    Path,
    Prediction,
    TimeDistribution,
    draw_times,
    interpolate,
    predicted_velocity,
    shifted,
)
from trainer.models.dit import split_variance

if TYPE_CHECKING:
    from trainer.models.transformer import ModelOutput


# Shorter velocities count as this long in the cosine. Ours: PyTorch's 1e-8 makes a gradient of 1e8 where a backbone
# begins, at the prediction zero, and Adam's second moment takes tens of thousands of steps to forget it.
SHORTEST = 1e-2


class FlowOptions(TypedDict, total=False):
    """The fields of `Flow`."""

    path: Path
    time_sampling: TimeDistribution
    time_mean: float
    time_std: float
    time_shift: float
    prediction: Prediction
    time_floor: float
    cosine_weight: float


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

    def loss(
        self, out: ModelOutput, x0: Tensor, noise: Tensor, x_t: Tensor, t: Tensor, *, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Scalar loss terms by name, in float32; their sum is minimised. `out`: of the backbone at (x_t, t). weights: of
        the samples, [B], None for all 1; the mean is over all samples in either case."""
        ...

    def velocity(self, out: ModelOutput, x_t: Tensor, t: Tensor) -> Tensor:
        """dx_t/dt along the probability flow that the backbone's output implies."""
        ...


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Over samples and all that they hold, [B, ...]."""
    return (
        values.mean()
        if weights is None
        else (values.flatten(1).mean(1) if values.ndim > 1 else values).mul(weights).mean()
    )


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Stochastic interpolants trained on their velocity (SiT, Eq. 4 to 7). The backbone is told t itself.

    Args:
        path: see `trainer.diffusion.interpolants.INTERPOLANTS`.
        time_sampling: distribution of the training times; `uniform` takes U(0, 1) draws, `lognormal` N(0, 1).
        time_mean, time_std: of the log-normal's logarithm.
        time_shift: training times are `shifted` by it, whatever their distribution.
        prediction: what the backbone says of x_t: its `velocity`, the data `x` or the `noise` in it.
        time_floor: smallest divisor of the last two, see `predicted_velocity`.
        cosine_weight: of a second term, the mean over positions of 1 - cos(v, v*) over the channels (LightningDiT).

    Raises:
        UserError: an unknown path or distribution.
    """

    path: Path = "linear"
    time_sampling: TimeDistribution = "uniform"
    time_mean: float = 0.0
    time_std: float = 1.0
    time_shift: float = 1.0
    prediction: Prediction = "velocity"
    time_floor: float = 0.05
    cosine_weight: float = 0.0

    def __post_init__(self) -> None:
        draw_times(self.time_sampling, self.path, torch.empty(0))  # unknown names are errors here

    @property
    def time_range(self) -> float:
        return 1.0

    def times(self, draws: Tensor) -> Tensor:
        t = draw_times(self.time_sampling, self.path, draws, mean=self.time_mean, std=self.time_std)
        return t if self.time_shift == 1 else shifted(t, self.time_shift)

    def model_time(self, t: Tensor) -> Tensor:
        return t

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return interpolate(self.path, x0, noise, t)[0]

    def loss(
        self, out: ModelOutput, x0: Tensor, noise: Tensor, x_t: Tensor, t: Tensor, *, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`denoise`: mean squared error of the velocity (SiT, Eq. 7); `denoise/cosine` where it has a weight.

        Where the floor makes velocities too small it does so to the prediction's and the truth's alike, as in RAEv2 and
        JiT: the loss is the prediction's squared error over the squared divisor, and zero for the truth at every t.
        """
        _, velocity = interpolate(self.path, x0, noise, t)
        if self.prediction != "velocity":
            velocity = self._implied(x0 if self.prediction == "x" else noise, x_t, t)
        found = self.velocity(out, x_t, t).float()
        terms = {"denoise": _mean((found - velocity).square(), weights)}
        if self.cosine_weight:
            cosines = cosine_similarity(found, velocity, dim=1, eps=SHORTEST)
            terms["denoise/cosine"] = self.cosine_weight * _mean(1 - cosines, weights)
        return terms

    def velocity(self, out: ModelOutput, x_t: Tensor, t: Tensor) -> Tensor:
        assert out.prediction is not None, "the forward pass stopped before the prediction"
        return self._implied(out.prediction, x_t, t)

    def _implied(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return predicted_velocity(self.path, self.prediction, out, x_t, t, self.time_floor)


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

    def loss(
        self, out: ModelOutput, x0: Tensor, noise: Tensor, x_t: Tensor, t: Tensor, *, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`denoise`: DiT's loss, see `trainer.diffusion.ddpm.ddpm_loss`."""
        assert out.prediction is not None, "the forward pass stopped before the prediction"
        loss = ddpm.ddpm_loss(
            out.prediction.float(), x0=x0, x_t=x_t, noise=noise, t=self.model_time(t), table=self.table
        )
        return {"denoise": _mean(loss.loss, weights)}

    def velocity(self, out: ModelOutput, x_t: Tensor, t: Tensor) -> Tensor:
        noise, _ = split_variance(out, x_t.shape[1])
        return self.time_range * ddpm.probability_flow(self.table, noise, x_t, self.model_time(t))


def build_transport(
    family: Literal["sit", "dit"], *, device: torch.device | str = "cpu", **options: Unpack[FlowOptions]
) -> Transport:
    """The transport of a family of backbones. `options` are a flow's, of which DDPM has none; `device`: of the latents.

    Raises:
        UserError: an unknown path or distribution of times.
    """
    if family == "dit":
        return DDPM(table=ddpm.tables(ddpm.linear_schedule(), device))
    return Flow(**options)
