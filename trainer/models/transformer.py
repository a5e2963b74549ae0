"""The diffusion Transformer that SiT (Ma et al. 2024), DiT (Peebles & Xie 2023) and LightningDiT (Yao et al. 2025) share.

The first two differ in what time means and in what is predicted, which is a transport's business
(`trainer.diffusion.transport`), and in the number of output channels; not in a single layer. LightningDiT is SiT with other
norms, another MLP and rotary positions: flags of `ModelConfig`. MMDiT, which takes text, is `trainer.models.mmdit`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from featcache.errors import UserError
from trainer.models.blocks import (
    Block,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    Recomputable,
    RMSNorm,
    RotaryEmbedding,
    StreamEmbed,
    TimestepEmbedder,
    token_positions,
    unpatchify,
)
from trainer.models.config import ModelConfig


class ModelOutput(NamedTuple):
    """What one forward pass gives.

    prediction: [B, C_out, H, W], or None if the pass stopped before the end. Autocast dtype.
    hidden: depth (1-based) -> the image's tokens after that block, [B, N, D], for the depths asked for.
    time_embedding: [B, D], the embedding of t before the label's is added. Parameter dtype.
    streams: what is predicted of each stream with tokens of its own, [B, C, T].
    stream_hidden: as `hidden`, the tokens of all streams, [B, T, D].
    """

    prediction: Tensor | None
    hidden: dict[int, Tensor]
    time_embedding: Tensor
    streams: tuple[Tensor, ...] = ()
    stream_hidden: dict[int, Tensor] | None = None


class Transformer(nn.Module):
    """adaLN-Zero Transformer over latent patches.

    `pos_embed` is a non-persistent buffer: fixed, neither trained nor averaged nor saved.
    """

    pos_embed: Tensor

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.x_embedder = PatchEmbed(cfg.in_channels, cfg.patch_size, cfg.width)
        self.t_embedder = TimestepEmbedder(cfg.width)
        self._add_condition()
        self.register_buffer("pos_embed", token_positions(cfg), persistent=False)
        self.blocks = nn.ModuleList(self._blocks())
        channels = [stream.channels for stream in cfg.own_streams]
        self.final_layer = FinalLayer(cfg.width, cfg.patch_size, cfg.out_channels, norm=cfg.norm, streams=channels)
        self.stream_embedders = nn.ModuleList(StreamEmbed(c, cfg.width) for c in channels)

    def _add_condition(self) -> None:
        self.y_embedder = LabelEmbedder(self.cfg.num_classes, self.cfg.width)

    def _blocks(self) -> Iterable[Recomputable]:
        cfg = self.cfg
        sides = (*(stream.side for stream in cfg.own_streams), cfg.grid)
        rope = RotaryEmbedding(cfg.width // cfg.heads, *sides) if cfg.rope else None
        for _ in range(cfg.depth):
            yield Block(
                cfg.width,
                cfg.heads,
                cfg.mlp_width,
                qk_norm=cfg.qk_norm,
                attention=cfg.attention,
                norm=cfg.norm,
                mlp=cfg.mlp,
                rope=rope,
            )

    @property
    def condition_embedder(self) -> nn.Module:
        """What embeds `y`."""
        return self.y_embedder

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """adaLN-Zero initialisation of DiT, SiT and LightningDiT, in place.

        Linear layers and the patch embedding (as a matrix): Xavier uniform, zero bias. Label table and time MLP:
        N(0, 0.02^2). Weights of norms: one. All adaLN projections and the final layer: zero, so each block starts as the
        identity. What belongs to streams is drawn last: everything else starts as it does without them.
        """
        self.pos_embed.copy_(token_positions(self.cfg))
        of_streams = [*self.stream_embedders.modules(), *self.final_layer.stream_linears]
        _initialise_layers([m for m in self.modules() if m not in set(of_streams)], generator)
        time_mlp = self.t_embedder.mlp
        for module in (self.y_embedder.embedding_table, time_mlp[0], time_mlp[2]):
            nn.init.normal_(module.get_parameter("weight"), std=0.02, generator=generator)
        for conditioned in (*self.blocks, self.final_layer):
            set_to_zero(conditioned.adaLN_modulation[1])
        _initialise_layers(of_streams, generator)
        for last in (self.final_layer.linear, *self.final_layer.stream_linears):
            set_to_zero(last)

    def set_recompute(self, on: bool) -> None:
        """Whether backward passes run each block anew instead of keeping what it computed: the same numbers, to the bit."""
        for block in self.blocks:
            assert isinstance(block, Recomputable)
            block.recompute = on

    def autocast_parameters(self) -> set[nn.Parameter]:
        """Those that autocast casts wherever they are used: of linear layers and the patch embedding.

        Not time's, which are used outside autocast, nor those of norms and of the label table, which stay as they are.
        """
        layers = [module for module in self.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        return {p for layer in layers for p in layer.parameters()} - set(self.t_embedder.parameters())

    def embed(self, x: Tensor, streams: Sequence[Tensor] = ()) -> Tensor:
        """Tokens of all streams, then the image's, with their positions: [B, T + N, D]. Arguments as of `forward`."""
        h: Tensor = self.x_embedder(x)
        if streams:
            before = (embedder(stream) for embedder, stream in zip(self.stream_embedders, streams, strict=True))
            h = torch.cat([*before, h], dim=1)
        return h + self.pos_embed

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        streams: Sequence[Tensor] = (),
        taps: Sequence[int] = (),
        stop_after: int | None = None,
    ) -> ModelOutput:
        """Predict from a noisy latent.

        Args:
            x: [B, C, H, W] noisy latent; what is merged into it are its last channels.
            t: [B] time: in [0, 1] with 1 = noise for SiT and LightningDiT, DDPM step 0..999 for DiT.
            y: [B] int64 labels; `num_classes` is the null label. Label dropout is the caller's business. Of a model that
                takes text its rows, [B, T, W].
            streams: noisy features with tokens of their own, [B, C, T] each.
            taps: depths (1-based) whose hidden states are wanted.
            stop_after: run blocks 1..stop_after only and predict nothing.
        """
        last = self._last_block(taps, stop_after)
        time_embedding = self.t_embedder(t)
        c = time_embedding + self.y_embedder(y)  # [B, D]
        h = self.embed(x, streams)  # [B, T + N, D]
        T = self.cfg.stream_tokens
        hidden: dict[int, Tensor] = {}
        stream_hidden: dict[int, Tensor] = {}
        for depth, block in enumerate(self.blocks[:last], start=1):
            h = block(h, c)
            if depth in taps:
                hidden[depth] = h[:, T:] if T else h
                stream_hidden |= {depth: h[:, :T]} if T else {}
        if stop_after is not None:
            return ModelOutput(None, hidden, time_embedding, (), stream_hidden)
        if not T:
            return ModelOutput(unpatchify(self.final_layer(h, c), self.cfg.patch_size), hidden, time_embedding)
        patches, predicted = self.final_layer.split(h, c, [stream.tokens for stream in self.cfg.own_streams])
        return ModelOutput(unpatchify(patches, self.cfg.patch_size), hidden, time_embedding, predicted, stream_hidden)

    def _last_block(self, taps: Sequence[int], stop_after: int | None) -> int:
        last = self.cfg.depth if stop_after is None else stop_after
        assert all(1 <= m <= last for m in taps), f"taps {taps} outside the blocks that run, 1..{last}"
        assert 1 <= last <= self.cfg.depth, f"stop_after {stop_after} outside 1..{self.cfg.depth}"
        return last


def set_to_zero(linear: nn.Module) -> None:
    """Weight and bias of a linear layer."""
    nn.init.zeros_(linear.get_parameter("weight"))
    nn.init.zeros_(linear.get_parameter("bias"))


def _initialise_layers(modules: Iterable[nn.Module], generator: torch.Generator) -> None:
    for module in modules:
        if isinstance(module, nn.Linear | nn.Conv2d):
            assert module.bias is not None
            nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm | RotaryEmbedding):
            module.reset_parameters()


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
            remedy="Name the model, resolution, number of classes and features beside the latents that the weights were trained "
            "with.",
        )


def _tensors(model: Transformer) -> dict[str, Tensor]:
    return {**model.state_dict(), "pos_embed": model.pos_embed}
