"""How a trained backbone is run to sample from: precision, compiled or not.

Given the same `Arithmetic`, device and batch shape, the same inputs give the same bytes; another choice changes the
rounding, so it is recorded with the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from featcache.errors import UserError, first_line
from featcache.precision import PRECISIONS, tensor_float32
from trainer.models.transformer import ModelOutput, Transformer

if TYPE_CHECKING:
    from trainer.models import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """What the numbers of a sample depend on beside its settings.

    precision: `fp32`; `tf32` (float32 with TensorFloat-32 products, as the samplers of DiT, SiT and REPA run on a GPU);
    `bf16` (autocast of the backbone; sampler, guidance and VAE stay as with `tf32`). compile: the blocks are compiled.
    """

    precision: str = "fp32"
    compile: bool = False


def choose_arithmetic(device: str | torch.device, precision: str = "auto", compile: bool | None = None) -> Arithmetic:
    """Fills in what the device decides: on a GPU `tf32` and compiled, on the CPU `fp32` and not compiled.

    Raises:
        UserError: an unknown precision, or TensorFloat-32 without a GPU.
    """
    on_gpu = torch.device(device).type == "cuda"
    if precision == "auto":
        precision = "tf32" if on_gpu else "fp32"
    if precision not in PRECISIONS:
        raise UserError(
            f"--precision {precision!r} is not known for sampling",
            remedy=f"Type one of: auto, {', '.join(PRECISIONS)}",
        )
    if precision == "tf32" and not on_gpu:
        raise UserError("--precision tf32 needs an NVIDIA GPU", remedy="Type --precision fp32")
    return Arithmetic(precision=precision, compile=on_gpu if compile is None else compile)


class Network(nn.Module):
    """A backbone as samplers call it. It takes the backbone over: compiles its blocks, rounds its weights.

    Blocks are compiled one by one, not the model as a whole: they share one compiled function, so that it takes as long
    for 28 blocks as for one. Shapes are fixed; a batch and the doubled batch of guidance are compiled once each.

    Under `bf16` the weights of linear layers are rounded once instead of in every call, which changes no bit of what
    autocast computes and saves reading them twice. The embedding of the time stays in float32, as in training.
    """

    def __init__(self, backbone: Transformer, arithmetic: Arithmetic) -> None:
        super().__init__()
        self.backbone = backbone
        self.arithmetic = arithmetic
        if arithmetic.precision == "bf16":
            _round_weights(backbone)
        if arithmetic.compile:
            for block in backbone.blocks:
                block.compile(dynamic=False)

    @property
    def cfg(self) -> ModelConfig:
        return self.backbone.cfg

    def forward(self, x: Tensor, t: Tensor, y: Tensor, *, streams: Sequence[Tensor] = ()) -> ModelOutput:
        """As the backbone's, all predictions in the dtype of x: guidance then subtracts in float32.

        Raises:
            UserError: the blocks could not be compiled.
        """
        enabled = self.arithmetic.precision == "bf16"
        try:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=enabled):
                output: ModelOutput = self.backbone(x, t, y, streams=streams)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UserError(
                f"the backbone could not be compiled: {first_line(error)}",
                remedy="Type --no-compile (compiling needs a C++ compiler on the CPU and Triton on a GPU).",
            ) from error
        assert output.prediction is not None, "all blocks ran"
        of_streams = tuple(part.to(x.dtype) for part in output.streams)
        return output._replace(prediction=output.prediction.to(x.dtype), streams=of_streams)


def _round_weights(backbone: Transformer) -> None:
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not name.startswith("t_embedder"):
            module.to(torch.bfloat16)


def applied(arithmetic: Arithmetic) -> AbstractContextManager[None]:
    """TensorFloat-32 on or off, for products and convolutions alike (the VAE's are convolutions)."""
    return tensor_float32(arithmetic.precision != "fp32")
