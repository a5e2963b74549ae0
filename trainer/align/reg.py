"""REG: representation entanglement for generation (Wu et al., NeurIPS 2025).

The class token of a frozen image encoder is diffused with the latents, as one more token of the backbone, and REPA's loss
aligns that token and the image's with the encoder's. At sampling the class token is drawn too, and thrown away.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from featcache.settings import Count, NotNegative, settings
from trainer.align.base import AlignInputs, BackboneInfo, FeatureInfo, cosine_per_token
from trainer.align.features import LAST_LAYER, check_token_name, last_layer, require
from trainer.align.heads import to_grid
from trainer.align.repa import Repa, RepaConfig


@settings(where="reg")
class RegConfig:
    """Options of REG.

    feature: encoder tokens to align with, e.g. `dinov2-b@11`, whose class token (`dinov2-b@11.cls`) is diffused; None: the
        deepest cached layer of the cache's only encoder.
    depth: block (1-based) that is aligned; None: REPA's, 4 for B, 8 for L and XL.
    weight: of the alignment (the paper's lambda). class_weight: of the class token's denoising loss (its beta).
    head_width: inner width of the MLP.
    """

    feature: str | None = None
    depth: Count | None = None
    weight: NotNegative = 0.5
    class_weight: NotNegative = 0.03
    head_width: Count = 2048

    def __post_init__(self) -> None:
        if self.feature is not None:
            check_token_name("reg", "feature", self.feature)

    def required(self) -> tuple[str, ...]:
        name = self.feature or LAST_LAYER
        return name, f"{name}.cls"

    def resolve(self, available: Mapping[str, FeatureInfo]) -> tuple[str, ...]:
        name = self.feature or last_layer("reg", available, option="feature={name}@LAYER")
        return (*require("reg", (name,), available, rank=2), *require("reg", (f"{name}.cls",), available, rank=1))

    def streams(self, available: Mapping[str, FeatureInfo]) -> dict[str, dict[str, Any]]:
        """The class token as the encoder gave it, with a token of its own."""
        _, class_token = self.resolve(available)
        return {class_token: {"weight": self.class_weight, "normalization": "none", "embed": "own"}}


class Reg(Repa):
    """`L = weight * mean over images and over the class token and all image tokens of -cos(y, head(h))` (Eq. 9)."""

    def __init__(self, config: RegConfig, info: BackboneInfo, features: Mapping[str, FeatureInfo]) -> None:
        name, class_token = features
        as_repa = RepaConfig(features=(name,), depth=config.depth, weight=config.weight, head_width=config.head_width)
        super().__init__(as_repa, info, {name: features[name]})
        self.class_token = class_token
        self.reads = (name, class_token)

    def pairs(self, inputs: AlignInputs) -> list[tuple[Tensor, Tensor]]:
        """Projected hidden state and target of the class token and all image tokens, [B, 1 + N, C] each."""
        name, class_token = self.reads
        hidden = torch.cat([inputs.stream_hidden[class_token][self.depth], inputs.hidden[self.depth]], dim=1)
        tokens = to_grid(inputs.targets[name].detach(), self.grid)
        target = torch.cat([inputs.targets[class_token].detach()[:, None], tokens], dim=1)
        (head,) = self.heads
        return [(head(hidden), target)]

    def metrics(self, inputs: AlignInputs) -> dict[str, Tensor]:
        ((projected, target),) = self.pairs(inputs)
        similar = cosine_per_token(projected, target)
        return {
            f"similarity/{self.reads[0]}": similar[:, 1:].mean(),
            f"similarity/{self.class_token}": similar[:, 0].mean(),
        }
