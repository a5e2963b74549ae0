"""MMDiT: text to image with joint attention (Esser et al. 2024, "Scaling Rectified Flow Transformers", Sec. 4), in the form
that REPA trains on MS-COCO (Yu et al. 2025, App. K, and its published code).

Text tokens are a sequence of their own before the image's, with weights of their own in every block. Time alone enters by
adaptive layer norm: there is no pooled text vector, no mask of padding and no position for text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from trainer.models.blocks import JointBlock, Recomputable, token_positions, unpatchify
from trainer.models.transformer import ModelOutput, Transformer, set_to_zero


class MMDiT(Transformer):
    """Transformer over latent patches and text rows; taps and `hidden` are the image's tokens alone."""

    def _add_condition(self) -> None:
        assert self.cfg.text is not None, "its configuration says what text it takes"
        self.context_embedder = nn.Linear(self.cfg.text.width, self.cfg.width)

    def _blocks(self) -> Iterable[Recomputable]:
        cfg = self.cfg
        for depth in range(1, cfg.depth + 1):
            yield JointBlock(
                cfg.width,
                cfg.heads,
                cfg.mlp_width,
                qk_norm=cfg.qk_norm,
                attention=cfg.attention,
                last=depth == cfg.depth,
            )

    @property
    def condition_embedder(self) -> nn.Module:
        return self.context_embedder

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """PyTorch's default everywhere, as the published code leaves it: weights and biases U(-1, 1) / sqrt(inputs), in the
        order of the modules.

        `zero_init` (ours) then sets all adaLN projections and the final layer to zero, so that each block starts as the
        identity and the model predicts zero.
        """
        self.pos_embed.copy_(token_positions(self.cfg))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                assert module.bias is not None
                bound = 1 / math.sqrt(module.weight[0].numel())
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        if self.cfg.zero_init:
            for block in self.blocks:
                assert isinstance(block, JointBlock)
                for half in (block.context_block, block.x_block):
                    set_to_zero(half.adaLN_modulation[1])
            set_to_zero(self.final_layer.adaLN_modulation[1])
            set_to_zero(self.final_layer.linear)

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
        """As of `Transformer`, with y the text rows, [B, T, W] in any real dtype; the null condition is those of `''`."""
        assert not streams, "its configuration refuses them"
        last = self._last_block(taps, stop_after)
        c = self.t_embedder(t)  # [B, D]
        h = self.embed(x)  # [B, N, D]
        text = self.context_embedder(y.to(x.dtype))  # [B, T, D]
        hidden: dict[int, Tensor] = {}
        for depth, block in enumerate(self.blocks[:last], start=1):
            h, text = block(h, text, c)
            if depth in taps:
                hidden[depth] = h
        if stop_after is not None:
            return ModelOutput(None, hidden, c)
        return ModelOutput(unpatchify(self.final_layer(h, c), self.cfg.patch_size), hidden, c)
