"""Classifier-free guidance (Ho & Salimans 2022) as a wrapper around the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from featcache.errors import UserError
from trainer.interval import Interval
from trainer.models.transformer import ModelOutput

if TYPE_CHECKING:
    from trainer.diffusion.samplers import ModelFn


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How to guide.

    Args:
        scale: 1 is no guidance (and costs no second evaluation); the guided prediction is
            `unconditional + scale * (conditional - unconditional)`.
        interval: of t, in which to guide (Kynkaanniemi et al. 2024). For DDPM models t is the step divided by 999.
        channels: guide the first so many channels only: None for all (REPA), 3 as the public SiT and DiT do.

    Raises:
        UserError: no channel.
    """

    scale: float = 1.0
    interval: Interval = Interval()  # noqa: RUF009 (frozen)
    channels: int | None = None

    def __post_init__(self) -> None:
        if self.channels is not None and self.channels < 1:
            raise UserError(
                f"{self.channels} guided channels were asked for.", remedy="Use at least 1, or none for all."
            )

    def active(self, t: float) -> bool:
        return self.scale != 1 and t in self.interval

    def record(self) -> dict[str, object]:
        """Plain values, as `settings.json` beside samples holds them."""
        return {
            "scale": self.scale,
            "low": self.interval.low,
            "high": self.interval.high,
            "channels": self.channels,
        }


def guided(
    model: Callable[[Tensor, Tensor, Tensor], ModelOutput],
    labels: Tensor,
    *,
    null_label: int,
    guidance: Guidance = Guidance(),
    time_range: float = 1.0,
) -> ModelFn:
    """Bind a model to labels [B] and a guidance: the `model_fn(x, t)` that samplers take.

    Inside the interval the batch is doubled, conditional half first. Only the guided channels are combined;
    all others, also a learned variance, are the conditional half's, as in the public code.

    Args:
        model: (x [B, C, h, w], t [B], y [B]) -> `ModelOutput`.
        labels: [B] int64.
        null_label: label of the unconditional half: the number of classes.
        time_range: what t = 1 in the guidance interval is for the model: see
            `trainer.diffusion.transport.Transport`.
    """
    both = torch.cat([labels, torch.full_like(labels, null_label)])

    def model_fn(x: Tensor, t: float, *, interval_t: float | None = None) -> Tensor:
        B, C = x.shape[:2]
        time_dtype = torch.promote_types(x.dtype, torch.float32)  # bfloat16 has no steps such as 0.501 or 501
        if not guidance.active((t if interval_t is None else interval_t) / time_range):
            prediction = model(x, x.new_full((B,), t, dtype=time_dtype), labels).prediction
            assert prediction is not None
            return prediction
        prediction = model(torch.cat([x, x]), x.new_full((2 * B,), t, dtype=time_dtype), both).prediction
        assert prediction is not None
        conditional, unconditional = prediction.chunk(2)
        K = C if guidance.channels is None else min(guidance.channels, C)
        first, base = conditional[:, :K], unconditional[:, :K]
        return torch.cat([base + guidance.scale * (first - base), conditional[:, K:]], dim=1)

    return model_fn
