"""Several features diffused together: the latents, and the streams beside them (REG, ReDi).

A stream has a time in common with the latents and noise of its own. Clean, noisy and predicted alike, a feature is a tensor
of channels first: the latents and what is merged into them `[B, C, h, w]`, a stream with tokens of its own `[B, C, T]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.models.config import ModelConfig, StreamShape
from trainer.models.transformer import ModelOutput


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the latents and the streams of a backbone lie in its input, its output and a sampler's state."""

    cfg: ModelConfig

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of one sample: of the latents, then of each stream."""
        return (self.cfg.latent_shape, *(self._shape(stream) for stream in self.cfg.streams))

    def _shape(self, stream: StreamShape) -> tuple[int, ...]:
        side = self.cfg.latent_size
        return (stream.channels, side, side) if stream.merged else (stream.channels, stream.side**2)

    def inputs(self, parts: Sequence[Tensor]) -> tuple[Tensor, dict[str, Any]]:
        """A backbone's `x`, and `streams` by name if it has any, from the latents and each stream."""
        latents, *others = parts
        merged = [part for part, stream in zip(others, self.cfg.streams, strict=True) if stream.merged]
        own = tuple(part for part, stream in zip(others, self.cfg.streams) if not stream.merged)
        return (torch.cat([latents, *merged], dim=1) if merged else latents), {"streams": own} if own else {}

    def outputs(self, output: ModelOutput) -> list[ModelOutput]:
        """The same output once for the latents and once for each stream, with what it predicts of that alone.

        A learned variance (DiT) stands behind all predictions, in the same order.
        """
        if not self.cfg.streams:
            return [output]
        assert output.prediction is not None, "the forward pass stopped before the prediction"
        merged = [stream.channels for stream in self.cfg.streams if stream.merged]
        halves = output.prediction.split(self.cfg.in_channels, dim=1)  # the prediction, and the variance if learned
        split = [half.split([self.cfg.latent_channels, *merged], dim=1) for half in halves]
        first, *rest = (torch.cat(part, dim=1) for part in zip(*split))
        own, joined = iter(output.streams), iter(rest)
        each = [next(joined) if stream.merged else next(own) for stream in self.cfg.streams]
        return [output._replace(prediction=prediction) for prediction in (first, *each)]

    def hidden(self, output: ModelOutput) -> dict[str, dict[int, Tensor]]:
        """Stream with tokens of its own -> depth -> their hidden state [B, T, D]."""
        own = self.cfg.own_streams
        found: dict[str, dict[int, Tensor]] = {stream.name: {} for stream in own}
        for depth, tokens in (output.stream_hidden or {}).items():
            for stream, part in zip(own, tokens.split([stream.tokens for stream in own], dim=1)):
                found[stream.name][depth] = part
        return found

    @property
    def is_flat(self) -> bool:
        """Whether a sampler's state is a row of numbers for each sample, and not shaped as the latents."""
        return bool(self.cfg.own_streams)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many entries of a state's axis 1 belong to the latents and to each stream."""
        return tuple(math.prod(shape) if self.is_flat else shape[0] for shape in self.shapes)

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """The latents and each stream as one state of a sampler, [B, S] or [B, C, h, w]."""
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part.flatten(1) if self.is_flat else part for part in parts], dim=1)

    def unpack(self, state: Tensor) -> list[Tensor]:
        """The inverse of `pack`."""
        if not self.cfg.streams:
            return [state]
        return [
            part.unflatten(1, shape) if self.is_flat else part
            for part, shape in zip(state.split(self.sizes, 1), self.shapes)
        ]


def on_grid(tokens: Tensor, side: int, *, to: int) -> Tensor:
    """Tokens [B, C, side * side], row-major, as an image [B, C, to, to]: bilinear (ReDi), or averages where it shrinks
    (ours)."""
    image: Tensor = tokens.unflatten(2, (side, side))
    if side > to:
        image = F.adaptive_avg_pool2d(image, to)
    elif side < to:
        image = F.interpolate(image, size=(to, to), mode="bilinear", align_corners=False)
    return image
