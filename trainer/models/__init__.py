"""SiT, DiT, LightningDiT and MMDiT backbones. The configuration imports without torch; the modules are loaded on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.models.config import MODEL_NAMES, ModelConfig, TextShape, forward_flops, model_config

if TYPE_CHECKING:
    from trainer.models.build import build_model, empty_model
    from trainer.models.transformer import ModelOutput, Transformer, load_weights

__all__ = [
    "MODEL_NAMES",
    "ModelConfig",
    "ModelOutput",
    "TextShape",
    "Transformer",
    "build_model",
    "empty_model",
    "forward_flops",
    "load_weights",
    "model_config",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from trainer.models import build, transformer

        return getattr(build if name in ("build_model", "empty_model") else transformer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
