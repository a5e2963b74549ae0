"""SARA: structural and adversarial representation alignment (Chen et al., 2025).

Reads one encoder's tokens of the clean image, taps one block, and may train a discriminator beside the model.
Equation and table numbers are the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featcache.errors import UserError
from featcache.settings import Count, NotNegative, settings
from trainer.align.base import AlignInputs, Alignment, BackboneInfo, FeatureInfo, cosine_per_token
from trainer.align.discriminator import TokenDiscriminator, frozen
from trainer.align.features import LAST_LAYER, check_token_name, last_layer, require
from trainer.align.heads import build_head, square_side, tap_depth, to_grid
from trainer.align.losses import negative_cosine, structure

Reduction = Literal["mean", "sum"]
Norm = Literal["group", "batch"]

# Sec. 4.2.
DEPTHS = {"B": 4, "L": 8, "XL": 8}


@settings(where="sara")
class SaraConfig:
    """Options of SARA. A weight of 0 switches its term off, computation included (rows of Table 2).

    feature: encoder tokens, e.g. `"dinov2-b@11"`; None: the deepest cached layer of the cache's only encoder.
    depth: block (1-based) whose hidden state is aligned; None: 4 for B, 8 for L and XL, in proportion elsewhere.
    patch_weight, structure_weight, adversarial_weight: lambda, beta, gamma of Eq. 11.
    structure_reduction: `mean` or `sum` over the N x N entries of Eq. 8. The paper writes a squared
        Frobenius norm without saying which; at beta = 0.5 a sum over 65,536 entries would drown the denoising
        loss, so that the mean is our default.
    adversary_every: steps of the model for one step of the discriminator.
    discriminator_weights: `auto` (ImageNet weights where they can be had, else random with a warning),
        `random`, or a `.safetensors` file of timm's ResNet-18.
    discriminator_norm: `group` (ours: the same loss for any number of ranks) or `batch`.
    head_width: inner width of the three-layer MLP.
    """

    feature: str | None = None
    depth: Count | None = None
    patch_weight: NotNegative = 0.5
    structure_weight: NotNegative = 0.5
    adversarial_weight: NotNegative = 0.05
    structure_reduction: Reduction = "mean"
    adversary_every: Count = 5
    discriminator_weights: str = "auto"
    discriminator_norm: Norm = "group"
    head_width: Count = 2048

    def __post_init__(self) -> None:
        if self.feature is not None:
            check_token_name("sara", "feature", self.feature)
        weights = ("patch_weight", "structure_weight", "adversarial_weight")
        if not any(getattr(self, option) for option in weights):
            raise UserError(
                "sara: all three weights are 0, so nothing is aligned",
                remedy=f"Give one of {', '.join(weights)} a positive value, or use method none.",
            )
        chosen = self.discriminator_weights
        if chosen not in ("auto", "random") and not str(chosen).endswith(".safetensors"):
            raise UserError(
                f"sara: discriminator_weights={chosen!r} is neither a .safetensors file nor a known start",
                remedy="Use auto, random, or the path of a .safetensors file of timm's resnet18.",
            )

    def required(self) -> tuple[str, ...]:
        return (self.feature or LAST_LAYER,)

    def resolve(self, available: Mapping[str, FeatureInfo]) -> tuple[str, ...]:
        return require(
            "sara", (self.feature or last_layer("sara", available, option="feature={name}@LAYER"),), available, rank=2
        )


class Sara(Alignment):
    """`0.5 L_patch + 0.5 L_struc + 0.05 L_adv` (Eq. 6, 8, 10, 11) on `p = head(h)`.

    In the model's step the discriminator's parameters are constants; in the discriminator's step (Eq. 9)
    hidden states and head are. The model's adversarial term is the non-saturating `-log D(p)`.
    """

    def __init__(self, config: SaraConfig, info: BackboneInfo, features: Mapping[str, FeatureInfo]) -> None:
        super().__init__()
        self.config = config
        self.grid = info.grid
        (self.feature,) = features
        N, C = features[self.feature].shape
        square_side("sara", self.feature, N)
        self.depth = tap_depth("sara", config.depth, DEPTHS, info)
        self.reads = (self.feature,)
        self.taps = (self.depth,)
        self.adversary_every = config.adversary_every
        self.head = build_head("mlp3", info.width, C, grid=info.grid, hidden=config.head_width)
        self.discriminator: TokenDiscriminator | None = None
        if config.adversarial_weight:
            self.discriminator = TokenDiscriminator(
                C, grid=info.grid, norm=config.discriminator_norm, weights=config.discriminator_weights
            )

    @property
    def adversary(self) -> nn.Module | None:  # type: ignore[override]
        return self.discriminator

    def target(self, inputs: AlignInputs) -> Tensor:
        """The encoder's tokens on the backbone's grid, [B, N, C]."""
        return to_grid(inputs.targets[self.feature].detach(), self.grid)

    def terms(self, inputs: AlignInputs) -> dict[str, Tensor]:
        config = self.config
        p, y = self.head(inputs.hidden[self.depth]), self.target(inputs)
        terms = {}
        if config.patch_weight:
            terms["patch"] = config.patch_weight * negative_cosine(p, y)
        if config.structure_weight:
            terms["structure"] = config.structure_weight * structure(p, y, config.structure_reduction)
        if self.discriminator is not None:
            terms["adversarial"] = config.adversarial_weight * F.softplus(-frozen(self.discriminator, p)).mean()
        return terms

    def adversary_loss(self, inputs: AlignInputs) -> Tensor:
        """`-mean log D(y) - mean log(1 - D(p))` (Eq. 9), with gradients to the discriminator alone."""
        if self.discriminator is None:
            return super().adversary_loss(inputs)
        with torch.no_grad():
            p = self.head(inputs.hidden[self.depth])
        real, fake = self.discriminator(self.target(inputs)), self.discriminator(p)
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    def metrics(self, inputs: AlignInputs) -> dict[str, Tensor]:
        p, y = self.head(inputs.hidden[self.depth]), self.target(inputs)
        values = {"similarity": cosine_per_token(p, y).mean(), "structure_gap": structure(p, y, "mean")}
        if self.discriminator is not None:
            values["real_probability"] = self.discriminator(y).sigmoid().mean()
            values["fake_probability"] = self.discriminator(p).sigmoid().mean()
        return values
