"""No alignment: the vanilla backbone, trained on the denoising loss alone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from featcache.settings import settings
from trainer.align.base import AlignInputs, Alignment, BackboneInfo, FeatureInfo


@settings(where="none")
class NoneConfig:
    """`none` has no options."""

    def required(self) -> tuple[str, ...]:
        return ()

    def resolve(self, available: Mapping[str, FeatureInfo]) -> tuple[str, ...]:
        return ()


class NoAlignment(Alignment):
    """Reads nothing, taps nothing, owns no parameters, adds no terms."""

    def __init__(self, config: NoneConfig, info: BackboneInfo, features: Mapping[str, FeatureInfo]) -> None:
        super().__init__()

    def terms(self, inputs: AlignInputs) -> dict[str, Tensor]:
        return {}
