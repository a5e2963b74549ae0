"""What is diffused beside the latents, from stored bytes to what is made noisy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from featcache.codecs import FeatureCodec
from trainer.diffusion.streams import on_grid
from trainer.models.config import StreamShape
from trainer.runs.normalization import Normalization
from trainer.runs.streams import StreamConfig


class Normalize(nn.Module):
    """`x = (z - shift) * scale`. Numbers are constants of the graph, tensors buffers that move with the module."""

    shift: float | Tensor
    scale: float | Tensor

    def __init__(self, normalization: Normalization) -> None:
        super().__init__()
        for name, value in (("shift", normalization.shift), ("scale", normalization.scale)):
            if isinstance(value, Tensor):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)

    def forward(self, z: Tensor) -> Tensor:
        return (z - self.shift) * self.scale


class Stream(nn.Module):
    """One diffused feature: decoded, normalised, and in the shape of `trainer.diffusion.streams.Layout`.

    normalization: None takes it as it is stored. latent_size: side of the grid that it is merged into.
    """

    def __init__(
        self,
        shape: StreamShape,
        codec: FeatureCodec,
        config: StreamConfig,
        *,
        normalization: Normalization | None,
        latent_size: int,
    ) -> None:
        super().__init__()
        self.name, self.weight, self.dropout = shape.name, config.weight, config.dropout
        self._shape, self._latent_size = shape, latent_size
        self.codec = codec
        self.normalize = nn.Identity() if normalization is None else Normalize(normalization)

    def clean(self, batch: Mapping[str, Tensor]) -> Tensor:
        """[B, C, h, w] if merged, else [B, C, T]; float32."""
        values = self.codec.decode(batch, torch.float32)
        columns = values[..., None] if values.ndim == 2 else values.transpose(1, 2)  # [B, C, T]
        normal: Tensor = self.normalize(columns)
        return on_grid(normal, self._shape.side, to=self._latent_size) if self._shape.merged else normal

    def kept(self, draws: Tensor) -> Tensor | None:
        """1 for samples whose feature is there and 0 for those without it, [B], from U(0, 1); None if it always is."""
        return (draws >= self.dropout).float() if self.dropout else None
