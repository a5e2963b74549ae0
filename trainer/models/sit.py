"""What is particular to SiT: time in [0, 1] with 1 = noise, velocity prediction, as many channels out as in.

The official SiT release runs time the other way and trains twice the channels: :mod:`trainer.weights_io`
converts.
"""

from __future__ import annotations

from torch import Tensor

from trainer.models.transformer import ModelOutput


def velocity(output: ModelOutput) -> Tensor:
    """The predicted velocity dx_t/dt, [B, C, H, W]."""
    assert output.prediction is not None, "the forward pass stopped before the prediction"
    return output.prediction
