"""The diffusion Transformer that SiT (Ma et al. 2024), DiT (Peebles & Xie 2023) and LightningDiT (Yao et al. 2025) share.

The first two differ in what time means and in what is predicted, which is a transport's business
(`trainer.diffusion.transport`), and in the number of output channels; not in a single layer. LightningDiT is SiT with other
norms, another MLP and rotary positions: flags of `ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from featcache.errors import UserError
from trainer.models.blocks import (
    Block,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    RMSNorm,
    RotaryEmbedding,
    TimestepEmbedder,
    sincos_positions,
    unpatchify,
)
from trainer.models.config import ModelConfig


class ModelOutput(NamedTuple):
    """What one forward pass gives.

    prediction: [B, C_out, H, W], or None if the pass stopped before the end. Autocast dtype.
    hidden: depth (1-based) -> tokens after that block, [B, N, D], for the depths asked for.
    time_embedding: [B, D], the embedding of t before the label's is added. Parameter dtype.
    """

    prediction: Tensor | None
    hidden: dict[int, Tensor]
    time_embedding: Tensor


class Transformer(nn.Module):
    """adaLN-Zero Transformer over latent patches.

    `pos_embed` is a non-persistent buffer: fixed, neither trained nor averaged nor saved.
    """

    pos_embed: Tensor

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.x_embedder = PatchEmbed(cfg.latent_channels, cfg.patch_size, cfg.width)
        self.t_embedder = TimestepEmbedder(cfg.width)
        self.y_embedder = LabelEmbedder(cfg.num_classes, cfg.width)
        self.register_buffer("pos_embed", sincos_positions(cfg.width, cfg.grid), persistent=False)
        rope = RotaryEmbedding(cfg.width // cfg.heads, cfg.grid) if cfg.rope else None
        self.blocks = nn.ModuleList(
            Block(
                cfg.width,
                cfg.heads,
                cfg.mlp_width,
                qk_norm=cfg.qk_norm,
                attention=cfg.attention,
                norm=cfg.norm,
                mlp=cfg.mlp,
                rope=rope,
            )
            for _ in range(cfg.depth)
        )
        self.final_layer = FinalLayer(cfg.width, cfg.patch_size, cfg.out_channels, norm=cfg.norm)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, *, taps: Sequence[int] = (), stop_after: int | None = None
    ) -> ModelOutput:
        """Predict from a noisy latent.

        Args:
            x: [B, C, H, W] noisy latent.
            t: [B] time: in [0, 1] with 1 = noise for SiT and LightningDiT, DDPM step 0..999 for DiT.
            y: [B] int64 labels; `num_classes` is the null label. Label dropout is the caller's business.
            taps: depths (1-based) whose hidden states are wanted.
            stop_after: run blocks 1..stop_after only and predict nothing.
        """
        last = self.cfg.depth if stop_after is None else stop_after
        assert all(1 <= m <= last for m in taps), f"taps {taps} outside the blocks that run, 1..{last}"
        assert 1 <= last <= self.cfg.depth, f"stop_after {stop_after} outside 1..{self.cfg.depth}"

        time_embedding = self.t_embedder(t)
        c = time_embedding + self.y_embedder(y)  # [B, D]
        h = self.x_embedder(x) + self.pos_embed  # [B, N, D]
        hidden: dict[int, Tensor] = {}
        for depth, block in enumerate(self.blocks[:last], start=1):
            h = block(h, c)
            if depth in taps:
                hidden[depth] = h
        if stop_after is not None:
            return ModelOutput(None, hidden, time_embedding)
        return ModelOutput(unpatchify(self.final_layer(h, c), self.cfg.patch_size), hidden, time_embedding)


def build_model(cfg: ModelConfig, *, seed: int = 0, device: torch.device | str = "cpu") -> Transformer:
    """A freshly initialised model in float32, a function of (cfg, seed) alone.

    The weights are drawn on the CPU from a generator of their own, so neither the global random state nor
    the device plays a part. The distributions are the official ones (`initialise`): a fresh model
    predicts exactly zero.

    Raises:
        UserError: `attention='xformers'` where xformers is not installed.
    """
    with torch.device("meta"):  # skips the default initialisation, which would be overwritten
        model = Transformer(cfg)
    model.to_empty(device="cpu")
    initialise(model, torch.Generator().manual_seed(seed))
    return model.to(device)


@torch.no_grad()
def initialise(model: Transformer, generator: torch.Generator) -> None:
    """adaLN-Zero initialisation of DiT, SiT and LightningDiT, in place.

    Linear layers and the patch embedding (as a matrix): Xavier uniform, zero bias. Label table and time MLP:
    N(0, 0.02^2). Weights of norms: one. All adaLN projections and the final layer: zero, so each block starts as the identity.
    """
    model.pos_embed.copy_(sincos_positions(model.cfg.width, model.cfg.grid))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            assert module.bias is not None
            nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm | RotaryEmbedding):
            module.reset_parameters()
    time_mlp = model.t_embedder.mlp
    for module in (model.y_embedder.embedding_table, time_mlp[0], time_mlp[2]):
        nn.init.normal_(module.get_parameter("weight"), std=0.02, generator=generator)
    for conditioned in (*model.blocks, model.final_layer):
        nn.init.zeros_(conditioned.adaLN_modulation[1].weight)
        nn.init.zeros_(conditioned.adaLN_modulation[1].bias)
    nn.init.zeros_(model.final_layer.linear.weight)
    nn.init.zeros_(model.final_layer.linear.bias)


def load_weights(model: Transformer, state: Mapping[str, Tensor], *, source: str = "the weights") -> None:
    """Load a state dict key by key, in place.

    A `pos_embed` entry is optional and replaces the model's table: official EMA checkpoints hold one that
    has drifted by rounding, and their outputs depend on it.

    Raises:
        UserError: keys missing, unexpected, or of another shape; the message names them.
    """
    check_fit(model, state, source=source)
    with torch.no_grad():
        for key, value in _tensors(model).items():
            if key in state:
                value.copy_(state[key])


def check_fit(model: Transformer, state: Mapping[str, Tensor], *, source: str = "the weights") -> None:
    """Check a state dict against a model (which may be on the meta device), key by key.

    Raises:
        UserError: keys missing, unexpected, or of another shape; the message names them.
    """
    own = _tensors(model)
    problems = [f"missing {key}" for key in own if key not in state and key != "pos_embed"]
    problems += [f"unexpected {key}" for key in state if key not in own]
    problems += [
        f"{key} is {list(state[key].shape)}, expected {list(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    problems += [
        f"{key} holds {str(value.dtype).removeprefix('torch.')}, not real numbers"
        for key, value in state.items()
        if key in own and value.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    ]
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise UserError(
            f"{source} does not fit the model ({model.cfg.backbone or model.cfg.family}, depth {model.cfg.depth}, "
            f"width {model.cfg.width}): {shown}.",
            remedy="Name the model, resolution and number of classes that the weights were trained with.",
        )


def _tensors(model: Transformer) -> dict[str, Tensor]:
    return {**model.state_dict(), "pos_embed": model.pos_embed}
