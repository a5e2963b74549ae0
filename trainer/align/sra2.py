"""SRA 2: alignment with the clean VAE latent (Wang et al., 2026). Taps one block.

Our sources give the target and the idea of a light projection; depth, head, distance and weight are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from featcache.settings import Count, NotNegative, Positive, settings
from trainer.align.base import AlignInputs, Alignment, BackboneInfo, FeatureInfo, cosine_per_token
from trainer.align.heads import build_head, tap_depth
from trainer.align.losses import negative_cosine, smooth_l1

Loss = Literal["smooth-l1", "cosine"]
Head = Literal["mlp", "conv", "linear"]

# REPA's; ours for SRA 2.
DEPTHS = {"B": 4, "L": 8, "XL": 8}


@settings(where="sra2")
class Sra2Config:
    """Options of SRA 2. All defaults are ours: REPA's depth and head, SRA's distance and weight.

    depth: block (1-based) whose hidden state is aligned; None: 4 for B, 8 for L and XL, in proportion elsewhere.
    weight: factor of the term.
    loss: `smooth-l1` or `cosine` over the p*p*C entries of a patch.
    beta: of smooth L1.
    head: `mlp` (three layers), `conv` (one 3x3 convolution) or `linear`.
    head_width: inner width of the MLP.
    """

    depth: Count | None = None
    weight: NotNegative = 0.2
    loss: Loss = "smooth-l1"
    beta: Positive = 0.05
    head: Head = "mlp"
    head_width: Count = 2048

    def required(self) -> tuple[str, ...]:
        return ()

    def resolve(self, available: Mapping[str, FeatureInfo]) -> tuple[str, ...]:
        return ()


def patchify(latent: Tensor, patch: int) -> Tensor:
    """[B, C, h, w] -> [B, (h/p)*(w/p), p*p*C]: tokens row-major, within a patch rows, columns, channels."""
    B, C, h, w = latent.shape
    cells = latent.reshape(B, C, h // patch, patch, w // patch, patch).permute(0, 2, 4, 3, 5, 1)
    return cells.reshape(B, (h // patch) * (w // patch), patch * patch * C)


class Sra2(Alignment):
    """`L = weight * smooth_l1(head(h), patchify(z))` with the step's own draw of the scaled latent z."""

    def __init__(self, config: Sra2Config, info: BackboneInfo, features: Mapping[str, FeatureInfo]) -> None:
        super().__init__()
        self.config = config
        self.patch = info.patch_size
        self.depth = tap_depth("sra2", config.depth, DEPTHS, info)
        self.taps = (self.depth,)
        kind = {"mlp": "mlp3", "conv": "conv1", "linear": "linear"}[config.head]
        out_width = info.patch_size**2 * info.latent_channels
        self.head = build_head(kind, info.width, out_width, grid=info.grid, hidden=config.head_width)

    def pair(self, inputs: AlignInputs) -> tuple[Tensor, Tensor]:
        """Projected hidden state and patchified latent, [B, N, p*p*C] each."""
        return self.head(inputs.hidden[self.depth]), patchify(inputs.latent.detach(), self.patch)

    def terms(self, inputs: AlignInputs) -> dict[str, Tensor]:
        p, y = self.pair(inputs)
        loss = negative_cosine(p, y) if self.config.loss == "cosine" else smooth_l1(p, y, self.config.beta)
        return {self.config.loss: self.config.weight * loss}

    def metrics(self, inputs: AlignInputs) -> dict[str, Tensor]:
        return {"similarity": cosine_per_token(*self.pair(inputs)).mean()}
