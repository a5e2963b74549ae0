"""ReDi: joint diffusion of latents and principal components of an image encoder's tokens (Kouzelis et al., NeurIPS 2025).

The components are a derived feature of the cache (`featcache derive --pca 8`), merged into the latents' channels. There is no
alignment loss in it; `redi+repa` adds one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featcache.errors import CacheError, UserError
from featcache.feature_names import layer_feature
from featcache.settings import NotNegative, Share, settings
from trainer.align.base import FeatureInfo
from trainer.align.features import LAST_LAYER, require

COMPONENTS = 8  # the paper's best number


@settings(where="redi")
class RediConfig:
    """Options of ReDi.

    feature: the components, e.g. `dinov2-b-reg@11.pca8`; None: the only derived feature of the cache.
    weight: of their denoising loss (the paper's lambda). dropout: share of samples trained without them, which
        representation guidance needs (0.2 in the paper, of whole steps there).
    """

    feature: str | None = None
    weight: NotNegative = 1.0
    dropout: Share = 0.0

    def required(self) -> tuple[str, ...]:
        return (self.feature or f"{LAST_LAYER}.pca{COMPONENTS}",)

    def resolve(self, available: Mapping[str, FeatureInfo]) -> tuple[str, ...]:
        if self.feature is not None:
            return require("redi", (self.feature,), available, rank=2)
        derived = [name for name in available if (f := layer_feature(name)) and f.is_derived]
        if not derived:
            raise CacheError(
                "redi diffuses principal components of an encoder's tokens, and the cache holds none",
                remedy=f"Add them: featcache derive CACHE --feature dinov2-b@11 --pca {COMPONENTS}",
            )
        if len(derived) > 1:
            raise UserError(
                f"redi: the cache holds several derived features ({', '.join(derived)})",
                remedy=f"Say which redi shall diffuse: --set redi.feature={derived[0]}",
            )
        return require("redi", derived, available, rank=2)

    def streams(self, available: Mapping[str, FeatureInfo]) -> dict[str, dict[str, Any]]:
        """The components as they were derived, merged into the latents' channels."""
        (name,) = self.resolve(available)
        return {name: {"weight": self.weight, "normalization": "none", "embed": "merged", "dropout": self.dropout}}
