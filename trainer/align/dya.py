"""DyA: dynamic alignment with two layers of one encoder, and its stochastic dropout strategy (SDS).

Reads a texture layer and the semantic (last) layer of one image encoder, taps one block. Equation and table
numbers are the paper's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from featcache.errors import CacheError, UserError
from featcache.settings import Count, Index, NotNegative, Share, settings
from trainer.align.base import AlignInputs, Alignment, BackboneInfo, FeatureInfo, cosine_per_token
from trainer.align.features import encoder_layers, only_encoder, require
from trainer.align.heads import build_head, square_side, tap_depth, to_grid

Modulation = Literal["texture", "both"]

# Table 1.
DEPTHS = {"B": 6, "L": 8, "XL": 8}


@settings(where="dya")
class DyaConfig:
    """Options of DyA.

    encoder: e.g. `"dinov2-b"`; None: the cache's only encoder.
    texture_layer, semantic_layer: layers counted from 0; the paper's are 9 and 11 of DINOv2-B (Table 1; Table
        5 varies the first over 5, 7, 9). None: the deepest cached layer is the semantic one, and the cached
        layer nearest to 9/11 of its number the texture one. The paper does not say whether the inner layer
        passes the encoder's final norm: that is chosen when the cache is built (`featcache build
        --final-norm`: all layers by default, or the last alone) and recorded in its manifest.
    depth: block (1-based) whose hidden state is aligned; None: 6 for B, 8 for L and XL, in proportion elsewhere.
    weight: lambda of Eq. 9.
    modulation: `texture`, xi weighs the texture term alone (Eq. 5); `both`, texture by 1 - xi and
        semantic by xi (Table 5, second row).
    dropout: probability with which SDS switches the alignment off for a whole step (0: never).
    truncate_at: step from which on there is no alignment (the ablation "Truncation"); None: never.
    head_width: inner width of the three-layer MLP.
    """

    encoder: str | None = None
    texture_layer: Index | None = None
    semantic_layer: Index | None = None
    depth: Count | None = None
    weight: NotNegative = 1.0
    modulation: Modulation = "texture"
    dropout: Share = 0.25
    truncate_at: Index | None = None
    head_width: Count = 2048

    def __post_init__(self) -> None:
        if self.encoder is not None and "@" in self.encoder:
            raise UserError(
                f"dya: encoder={self.encoder!r} is not an encoder's name",
                remedy="Write e.g. encoder=dinov2-b; layers are given by texture_layer and semantic_layer.",
            )
        if self.texture_layer is not None and self.texture_layer == self.semantic_layer:
            raise UserError(
                f"dya: texture_layer and semantic_layer are both {self.texture_layer}",
                remedy="Give two different layers, e.g. 9 and 11; repa aligns with one.",
            )

    def required(self) -> tuple[str, ...]:
        encoder = self.encoder or "<encoder>"
        texture = "<texture>" if self.texture_layer is None else self.texture_layer
        semantic = "<last>" if self.semantic_layer is None else self.semantic_layer
        return (f"{encoder}@{texture}", f"{encoder}@{semantic}")

    def resolve(self, available: Mapping[str, FeatureInfo]) -> tuple[str, ...]:
        """Texture first, then semantic."""
        encoder = self.encoder or only_encoder("dya", available, option="encoder={name}")
        layers = encoder_layers(available).get(encoder, [])
        texture, semantic = self.texture_layer, self.semantic_layer
        if semantic is None:
            others = [layer for layer in layers if layer != texture]
            semantic = others[-1] if others else None
        if texture is None and semantic is not None:
            last = semantic
            others = [layer for layer in layers if layer != last]
            # The deeper one of two equally near.
            texture = min(others, key=lambda layer: (abs(11 * layer - 9 * last), -layer), default=None)
        if texture is None or semantic is None:
            raise CacheError(
                f"dya needs two layers of {encoder}, and the cache holds {layers or 'none'}",
                remedy="Add them with `featcache build`, e.g. dinov2-b@9 and dinov2-b@11.",
            )
        return require("dya", (f"{encoder}@{texture}", f"{encoder}@{semantic}"), available, rank=2)


def dropped(*, seed: int, step: int, probability: float) -> bool:
    """SDS: whether this step goes without alignment. One Bernoulli(probability) draw, a function of (seed, step).

    The paper's Algorithm 1 compares the wrong way round; its text (Sec. 3.4) is followed: alignment ceases
    with `probability`. A hash instead of a generator: no state to save, and every rank draws alike.
    """
    digest = hashlib.blake2b(f"dya-sds/{seed}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < probability * 2**64


class Dya(Alignment):
    """`L = -weight * mean_b [xi_b A(y_texture, p) + A(y_semantic, p)]`, A the mean patch cosine (Eq. 5 to 9).

    `p = head(h)` serves both targets. `xi = sigmoid(linear(time embedding))`, the temporal module (Eq.
    6), is trained with the model; its gradient also reaches the backbone's time embedding, as the plain
    reading of the paper has it. It starts at zero weights, xi = 0.5 (ours).
    """

    def __init__(self, config: DyaConfig, info: BackboneInfo, features: Mapping[str, FeatureInfo]) -> None:
        super().__init__()
        self.config = config
        self.grid = info.grid
        self.depth = tap_depth("dya", config.depth, DEPTHS, info)
        self.texture, self.semantic = features
        self.reads = (self.texture, self.semantic)
        self.taps = (self.depth,)
        for name, feature in features.items():
            square_side("dya", name, feature.shape[0])
        widths = [feature.shape[1] for feature in features.values()]
        if widths[0] != widths[1]:
            raise UserError(
                f"dya: {self.texture} has {widths[0]} channels and {self.semantic} {widths[1]}",
                remedy="Choose two layers of equal width: one projection serves both.",
            )
        self.head = build_head("mlp3", info.width, widths[0], grid=info.grid, hidden=config.head_width)
        self.temporal = nn.Linear(info.width, 1)
        nn.init.zeros_(self.temporal.weight)
        nn.init.zeros_(self.temporal.bias)

    def active(self, *, step: int, seed: int) -> bool:
        if self.config.truncate_at is not None and step >= self.config.truncate_at:
            return False
        return not dropped(seed=seed, step=step, probability=self.config.dropout)

    def xi(self, time_embedding: Tensor) -> Tensor:
        """Strength of the texture term: [B, D] -> [B] in (0, 1), float32."""
        with torch.autocast(time_embedding.device.type, enabled=False):
            strength: Tensor = self.temporal(time_embedding.float())[:, 0].sigmoid()
            return strength

    def similarities(self, inputs: AlignInputs) -> tuple[Tensor, Tensor]:
        """A of Eq. 7 and 8: mean patch cosine with the texture and the semantic target, [B] each."""
        p = self.head(inputs.hidden[self.depth])
        texture, semantic = (
            cosine_per_token(p, to_grid(inputs.targets[name].detach(), self.grid)).mean(dim=1) for name in self.reads
        )
        return texture, semantic

    def terms(self, inputs: AlignInputs) -> dict[str, Tensor]:
        texture, semantic = self.similarities(inputs)
        xi = self.xi(inputs.time_embedding)
        if self.config.modulation == "both":
            texture, semantic = (1 - xi) * texture, xi * semantic
        else:
            texture = xi * texture
        return {
            "texture": -self.config.weight * texture.mean(),
            "semantic": -self.config.weight * semantic.mean(),
        }

    def metrics(self, inputs: AlignInputs) -> dict[str, Tensor]:
        texture, semantic = self.similarities(inputs)
        return {
            "similarity/texture": texture.mean(),
            "similarity/semantic": semantic.mean(),
            "xi": self.xi(inputs.time_embedding).mean(),
        }
