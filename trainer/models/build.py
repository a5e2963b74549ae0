"""From a configuration to a model."""

from __future__ import annotations

import torch

from trainer.models.config import ModelConfig
from trainer.models.mmdit import MMDiT
from trainer.models.transformer import Transformer


def empty_model(cfg: ModelConfig) -> Transformer:
    """The model without weights, on the meta device: its modules, names and shapes.

    Raises:
        UserError: `attention='xformers'` where xformers is not installed.
    """
    with torch.device("meta"):
        return Transformer(cfg) if cfg.text is None else MMDiT(cfg)


def build_model(cfg: ModelConfig, *, seed: int = 0, device: torch.device | str = "cpu") -> Transformer:
    """A freshly initialised model in float32, a function of (cfg, seed) alone.

    The weights are drawn on the CPU from a generator of their own, so neither the global random state nor
    the device plays a part. The distributions are the official ones (`initialise`): except for MMDiT, a fresh model
    predicts exactly zero.

    Raises:
        UserError: `attention='xformers'` where xformers is not installed.
    """
    model = empty_model(cfg)
    model.to_empty(device="cpu")
    model.initialise(torch.Generator().manual_seed(seed))
    return model.to(device)
