"""What is particular to DiT: time is a DDPM step 0..999, the noise is predicted, and its variance may be
learned."""

from __future__ import annotations

from torch import Tensor

from trainer.models.transformer import ModelOutput


def split_variance(output: ModelOutput, channels: int) -> tuple[Tensor, Tensor | None]:
    """Predicted noise [B, C, H, W] and the variance's interpolation values [B, C, H, W] (None if not
    learned).

    The values interpolate the log-variance between its bounds: -1 is the posterior's, 1 is beta (Nichol &
    Dhariwal 2021, Eq. 15).
    """
    prediction = output.prediction
    assert prediction is not None, "the forward pass stopped before the prediction"
    if prediction.shape[1] == channels:
        return prediction, None
    noise, values = prediction.split(channels, dim=1)
    return noise, values
