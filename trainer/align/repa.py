"""REPA: representation alignment with a frozen image encoder (Yu et al., ICLR 2025); iREPA as options of it.

Reads the encoder's tokens of the clean image, taps one block. iREPA (Singh et al., 2025) is `head="conv"`,
`spatial_gamma=0.6`, `weight=1.0`. HASTE is REPA switched off from some step on, which the trainer does
for all methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from featcache.settings import Count, Names, NotNegative, Positive, Share, settings
from trainer.align.base import AlignInputs, Alignment, BackboneInfo, FeatureInfo, cosine_per_token
from trainer.align.features import LAST_LAYER, check_token_name, last_layer, require
from trainer.align.heads import build_head, square_side, tap_depth, to_grid
from trainer.align.losses import negative_cosine, normalize_over_space, nt_xent

Head = Literal["mlp", "conv"]
Loss = Literal["cosine", "nt-xent"]

# REPA Table 7.
DEPTHS = {"B": 4, "L": 8, "XL": 8}


@settings(where="repa")
class RepaConfig:
    """Options of REPA.

    features: encoder tokens to align with, e.g. `("dinov2-b@11",)`; empty: the deepest cached layer of the
        cache's only encoder. With several, each has its own head and their losses are averaged.
    depth: block (1-based) whose hidden state is aligned; None: 4 for B, 8 for L and XL (Table 7),
        in proportion elsewhere.
    weight: lambda of Eq. 9.
    loss: `cosine` (Eq. 8) or `nt-xent` (Table 2).
    temperature: of NT-Xent; the paper does not give it, 0.1 is ours.
    head: `mlp`, three linear layers with SiLU, or `conv`, one 3x3 convolution on the token grid (iREPA).
    head_width: inner width of the MLP.
    spatial_gamma: None, or gamma of iREPA's spatial normalisation of the target (0.6 in latent diffusion).
    """

    features: Names = ()
    depth: Count | None = None
    weight: NotNegative = 0.5
    loss: Loss = "cosine"
    temperature: Positive = 0.1
    head: Head = "mlp"
    head_width: Count = 2048
    spatial_gamma: Share | None = None

    def __post_init__(self) -> None:
        for name in self.features:
            check_token_name("repa", "features", name)

    def required(self) -> tuple[str, ...]:
        return self.features or (LAST_LAYER,)

    def resolve(self, available: Mapping[str, FeatureInfo]) -> tuple[str, ...]:
        names = self.features or (last_layer("repa", available, option="features=[{name}@LAYER]"),)
        return require("repa", names, available, rank=2)


class Repa(Alignment):
    """`L = weight * mean over encoders, images and tokens of -cos(y, head(h))` (Eq. 8)."""

    def __init__(self, config: RepaConfig, info: BackboneInfo, features: Mapping[str, FeatureInfo]) -> None:
        super().__init__()
        self.config = config
        self.grid = info.grid
        self.depth = tap_depth("repa", config.depth, DEPTHS, info)
        self.reads = tuple(features)
        self.taps = (self.depth,)
        kind = {"mlp": "mlp3", "conv": "conv1"}[config.head]
        self.heads = nn.ModuleList()
        for name, feature in features.items():
            N, C = feature.shape
            square_side("repa", name, N)
            self.heads.append(build_head(kind, info.width, C, grid=info.grid, hidden=config.head_width))

    def pairs(self, inputs: AlignInputs) -> list[tuple[Tensor, Tensor]]:
        """Projected hidden state and target, [B, N, C] each, per encoder."""
        hidden = inputs.hidden[self.depth]
        pairs = []
        for name, head in zip(self.reads, self.heads, strict=True):
            y = to_grid(inputs.targets[name].detach(), self.grid)
            if self.config.spatial_gamma is not None:
                y = normalize_over_space(y, self.config.spatial_gamma)
            pairs.append((head(hidden), y))
        return pairs

    def terms(self, inputs: AlignInputs) -> dict[str, Tensor]:
        if self.config.loss == "cosine":
            losses = [negative_cosine(p, y) for p, y in self.pairs(inputs)]
        else:
            losses = [nt_xent(p, y, self.config.temperature) for p, y in self.pairs(inputs)]
        return {self.config.loss: self.config.weight * torch.stack(losses).mean()}

    def metrics(self, inputs: AlignInputs) -> dict[str, Tensor]:
        return {
            f"similarity/{name}": cosine_per_token(p, y).mean()
            for name, (p, y) in zip(self.reads, self.pairs(inputs), strict=True)
        }
