"""What a DiT's output holds: noise, and what a learned variance is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from trainer.models.transformer import ModelOutput


def split_variance(output: ModelOutput, channels: int) -> tuple[Tensor, Tensor | None]:
    """Predicted noise [B, C, H, W] and the variance's interpolation values [B, C, H, W] (None if not learned).

    The values interpolate the log-variance between its bounds: -1 is the posterior's, 1 is beta (Nichol &
    Dhariwal 2021, Eq. 15).
    """
    prediction = output.prediction
    assert prediction is not None, "the forward pass stopped before the prediction"
    if prediction.shape[1] == channels:
        return prediction, None
    noise, values = prediction.split(channels, dim=1)
    return noise, values
