"""SiT, DiT and LightningDiT backbones. The configuration imports without torch; the modules are loaded on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.models.config import MODEL_NAMES, ModelConfig, forward_flops, model_config

if TYPE_CHECKING:
    from trainer.models.transformer import ModelOutput, Transformer, build_model, load_weights

__all__ = [
    "MODEL_NAMES",
    "ModelConfig",
    "ModelOutput",
    "Transformer",
    "build_model",
    "forward_flops",
    "load_weights",
    "model_config",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from trainer.models import transformer

        return getattr(transformer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
