"""Parts of the diffusion Transformer. Module and parameter names are those of the official checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from featcache.errors import UserError
from trainer.models.config import TIME_FREQUENCIES, FeedForward, ModelConfig, Norm


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm's affine part (DiT, Sec. 3.2). x [B, N, D], shift and scale [B, D] -> [B, N, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


def sincos_positions(width: int, grid: int) -> Tensor:
    """Fixed 2-D sin-cos position table, computed in float64, returned as float32 [1, grid * grid, width].

    Tokens are row-major. The first half of the channels encodes the column, the second half the row, each as
    [sines, cosines] with frequencies 10000^(-i / (width / 4)): the layout of DiT, SiT and MAE.
    """
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega  # [grid, D/4]
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, D/2]
    column = axis[None].expand(grid, grid, -1)
    row = axis[:, None].expand(grid, grid, -1)
    return torch.cat([column, row], dim=-1).reshape(1, grid * grid, width).float()


def token_positions(cfg: ModelConfig) -> Tensor:
    """Position table of all tokens, float32 [1, T + N, D]: of each stream's, then the image's. A lone token has zeros."""
    parts = [
        torch.zeros(1, 1, cfg.width) if stream.tokens == 1 else sincos_positions(cfg.width, stream.side)
        for stream in cfg.own_streams
    ]
    return torch.cat([*parts, sincos_positions(cfg.width, cfg.grid)], dim=1)


def time_frequencies(count: int = TIME_FREQUENCIES // 2, device: torch.device | None = None) -> Tensor:
    """Angular frequencies of the time embedding, from 1 down towards 1/10000, float32 [count]."""
    return torch.exp(-math.log(10000) * torch.arange(count, dtype=torch.float32, device=device) / count)


def sinusoid(t: Tensor, width: int = TIME_FREQUENCIES) -> Tensor:
    """Sinusoidal features of the time in float32, cosine half first. t [B], any real dtype -> [B, width].

    t is taken as it is, never multiplied by 1000: SiT passes [0, 1], DiT passes steps 0..999.
    """
    angles = t.float()[:, None] * time_frequencies(width // 2, t.device)  # [B, width / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotary_positions(width: int, grid: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines that rotate the channels of a head, computed in float64, returned as float32 [grid * grid, width].

    Tokens are row-major. The first half of the channels turns with the row, the second half with the column, each in
    neighbouring pairs: pair i by position * 10000^(-2i / (width / 2)) (Su et al. 2021, in the 2-D form of EVA-02).
    """
    frequencies = 10000.0 ** -(torch.arange(0, width // 2, 2, dtype=torch.float64) / (width // 2))
    angles = (torch.arange(grid, dtype=torch.float64)[:, None] * frequencies).repeat_interleave(2, dim=1)  # [grid, d/2]
    row = angles[:, None].expand(grid, grid, -1)
    column = angles[None].expand(grid, grid, -1)
    both = torch.cat([row, column], dim=-1).reshape(grid * grid, width)
    return both.cos().float(), both.sin().float()


class RotaryEmbedding(nn.Module):
    """Rotates queries or keys [B, heads, N, d] by their token's row and column; all blocks share one.

    The tokens are those of several squares, one after the other, `grids` their sides; a lone token is not rotated. The
    tables are non-persistent buffers: fixed, neither trained nor averaged nor saved.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, *grids: int) -> None:
        super().__init__()
        self.width, self.grids = width, grids
        tokens = sum(grid**2 for grid in grids)
        self.register_buffer("cos", torch.empty(tokens, width), persistent=False)
        self.register_buffer("sin", torch.empty(tokens, width), persistent=False)

    def reset_parameters(self) -> None:
        """Computes the tables, which are empty at first."""
        each = [rotary_positions(self.width, grid) for grid in self.grids]
        for table, values in zip((self.cos, self.sin), zip(*each)):
            table.copy_(torch.cat(values))

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-second, first], dim=-1).flatten(-2)  # each pair by a quarter
        return x * self.cos + turned * self.sin


class RMSNorm(nn.RMSNorm):
    """Root mean square norm with a weight, computed in the weight's precision, under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def block_norm(width: int, kind: Norm) -> nn.Module:
    """Norm in front of an adaptive modulation."""
    return RMSNorm(width, eps=1e-6) if kind == "rms" else nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


def head_norm(width: int, kind: Norm) -> nn.Module:
    """Norm of a head's queries or keys, with parameters of its own."""
    return RMSNorm(width, eps=1e-6) if kind == "rms" else nn.LayerNorm(width)


class PatchEmbed(nn.Module):
    """Linear embedding of non-overlapping patches: [B, C, H, W] -> [B, N, D], tokens row-major.

    `proj` is a convolution because the official checkpoints store it as one; it is applied as the matrix
    product it is, which costs the same on every backend and needs no convolution algorithm to be chosen.
    """

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        p = self.patch_size
        x = x.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)  # [B, h, w, C, p, p]
        return F.linear(x.reshape(B, -1, C * p * p), self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    """Time t [B] -> [B, D] by sinusoidal features and a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        # Outside autocast: in bfloat16 the features of t in [0, 1] keep 8 bits, so near-by times would
        # coincide. B rows only, so float32 costs nothing.
        with torch.autocast(device_type=t.device.type, enabled=False):
            embedded: Tensor = self.mlp(sinusoid(t).to(next(self.mlp.parameters()).dtype))
            return embedded


class LabelEmbedder(nn.Module):
    """Labels y [B] -> [B, D]; the last row of the table is the null label's (classifier-free guidance)."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        embedded: Tensor = self.embedding_table(y)
        return embedded


def _xformers_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    import xformers.ops

    # xformers wants [B, N, H, d]
    out: Tensor = xformers.ops.memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention, [B, N, D] -> [B, N, D], in parts: `heads_of`, `attend`, `joined`.

    `qk_norm` is a norm over the head's channels: a LayerNorm with its own scale and offset (what REPA's
    `--qk-norm` gives with the timm release it names), or an RMSNorm with its own scale. `rope` rotates what comes
    out of it. Without `outputs` there is no projection: tokens that are attended to, and need not attend.

    Raises:
        UserError: `attention='xformers'` where xformers is not installed.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qk_norm: bool,
        attention: str,
        norm: Norm = "layer",
        rope: RotaryEmbedding | None = None,
        outputs: bool = True,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = head_norm(width // heads, norm) if qk_norm else nn.Identity()
        self.k_norm = head_norm(width // heads, norm) if qk_norm else nn.Identity()
        if outputs:
            self.proj = nn.Linear(width, width)
        self.rope = rope
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention
        if attention == "xformers":
            try:
                import xformers.ops  # noqa: F401
            except ImportError as error:
                raise UserError(
                    "attention 'xformers' was asked for, but xformers is not installed.",
                    remedy="Leave it at 'sdpa' (torch's own fused attention), or: pip install xformers",
                ) from error
            self.attend = _xformers_attention

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of tokens [B, N, D], each [B, heads, N, d] and ready to attend."""
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # each [B, heads, N, d]
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q), self.rope(k)
        # A norm or a rotation under autocast returns float32; fused attention wants one dtype.
        return q.to(v.dtype), k.to(v.dtype), v

    def joined(self, attended: Tensor) -> Tensor:
        """What heads found, [B, heads, N, d], as tokens again: [B, N, D]."""
        projected: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return projected


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between, [B, N, D] -> [B, N, D]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class SwiGlu(nn.Module):
    """Gated MLP `w3(silu(a) * b)` with `a, b = w12(x)` (Shazeer 2020), [B, N, D] -> [B, N, D]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        out: Tensor = self.w3(F.silu(gate) * value)
        return out


class Recomputable(nn.Module):
    """A block whose forward pass is `_forward`.

    recompute: keep only the inputs for the backward pass, which then runs the block anew. The block is cut out in here, so
    that whatever surrounds it (FSDP's gathering, a compiled region) sees one block forward and one backward.
    """

    recompute: bool = False
    _forward: Callable[..., Any]

    def forward(self, *inputs: Tensor) -> Any:
        if not (self.recompute and torch.is_grad_enabled()):
            return self._forward(*inputs)
        # Nothing in a block is random, so there is no random state to put back.
        return checkpoint(self._forward, *inputs, use_reentrant=False, preserve_rng_state=False)


# Queries, keys and values, [B, heads, N, d] each.
Heads = tuple[Tensor, Tensor, Tensor]


class Block(Recomputable):
    """Transformer block with adaLN-Zero conditioning (DiT, Sec. 3.2): x [B, N, D], c [B, D] -> [B, N, D].

    pre_only: half of a joint block whose tokens nothing follows (SD3's last text half): it has what others attend to, and
    nothing of its own after that.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        *,
        qk_norm: bool = False,
        attention: str = "sdpa",
        norm: Norm = "layer",
        mlp: FeedForward = "gelu",
        rope: RotaryEmbedding | None = None,
        pre_only: bool = False,
    ) -> None:
        super().__init__()
        self.pre_only = pre_only
        self.norm1 = block_norm(width, norm)
        self.attn = Attention(
            width, heads, qk_norm=qk_norm, attention=attention, norm=norm, rope=rope, outputs=not pre_only
        )
        if not pre_only:
            self.norm2 = block_norm(width, norm)
            self.mlp = SwiGlu(width, mlp_width) if mlp == "swiglu" else Mlp(width, mlp_width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (2 if pre_only else 6) * width))

    def before_attention(self, x: Tensor, c: Tensor) -> tuple[Heads, list[Tensor]]:
        """Its tokens' heads, and the modulations [B, D] that `after_attention` takes."""
        shift, scale, *later = self.adaLN_modulation(c).chunk(2 if self.pre_only else 6, dim=-1)
        return self.attn.heads_of(modulate(self.norm1(x), shift, scale)), later

    def after_attention(self, x: Tensor, attended: Tensor, later: Sequence[Tensor]) -> Tensor:
        """The tokens x [B, N, D] with what their heads found, [B, heads, N, d], and the MLP's part."""
        gate_msa, shift_mlp, scale_mlp, gate_mlp = later
        x = x + gate_msa[:, None] * self.attn.joined(attended)
        out: Tensor = x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return out

    def _forward(self, x: Tensor, c: Tensor) -> Tensor:
        heads, later = self.before_attention(x, c)
        return self.after_attention(x, self.attn.attend(*heads), later)


class JointBlock(Recomputable):
    """Two blocks with weights of their own, for text and image, and one attention over both (SD3, Esser et al. 2024,
    Fig. 2b): x [B, N, D], text [B, T, D], c [B, D] -> (x, text), the text first in the sequence.

    last: nothing follows the text, so it has no queries and comes back as it was. Without them the image's tokens are the
    same as with them, as each query has a softmax of its own.
    """

    def __init__(self, width: int, heads: int, mlp_width: int, *, qk_norm: bool, attention: str, last: bool) -> None:
        super().__init__()
        self.context_block = Block(width, heads, mlp_width, qk_norm=qk_norm, attention=attention, pre_only=last)
        self.x_block = Block(width, heads, mlp_width, qk_norm=qk_norm, attention=attention)

    def _forward(self, x: Tensor, text: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        (text_q, text_k, text_v), text_later = self.context_block.before_attention(text, c)
        (q, k, v), later = self.x_block.before_attention(x, c)
        attend = self.x_block.attn.attend
        k, v = torch.cat([text_k, k], dim=2), torch.cat([text_v, v], dim=2)
        if self.context_block.pre_only:
            return self.x_block.after_attention(x, attend(q, k, v), later), text
        T = text.shape[1]
        attended = attend(torch.cat([text_q, q], dim=2), k, v)
        text = self.context_block.after_attention(text, attended[:, :, :T], text_later)
        return self.x_block.after_attention(x, attended[:, :, T:], later), text


class StreamEmbed(nn.Module):
    """Tokens of a stream: a linear layer and a LayerNorm with parameters (REG's code), [B, C, T] -> [B, T, D]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, width)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.proj(x.transpose(1, 2)))
        return out


class FinalLayer(nn.Module):
    """Tokens to patches: x [B, N, D], c [B, D] -> [B, N, p * p * C_out], channel fastest.

    streams: channels of those whose tokens, one linear layer for each, stand before the image's (`split`).
    """

    def __init__(
        self, width: int, patch_size: int, out_channels: int, *, norm: Norm = "layer", streams: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.norm_final = block_norm(width, norm)
        self.linear = nn.Linear(width, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.stream_linears = nn.ModuleList(nn.Linear(width, channels) for channels in streams)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        out: Tensor = self.linear(self._modulated(x, c))
        return out

    def split(self, x: Tensor, c: Tensor, counts: Sequence[int]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The image's patches, and what is predicted of each stream: [B, C, T]. counts: tokens of each stream."""
        *parts, image = self._modulated(x, c).split([*counts, x.shape[1] - sum(counts)], dim=1)
        out: Tensor = self.linear(image)
        return out, tuple(linear(part).transpose(1, 2) for linear, part in zip(self.stream_linears, parts))

    def _modulated(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return modulate(self.norm_final(x), shift, scale)


def unpatchify(x: Tensor, patch_size: int) -> Tensor:
    """[B, N, p * p * C], tokens row-major and channel fastest -> [B, C, H, W], square."""
    B, N, _ = x.shape
    side = math.isqrt(N)
    x = x.reshape(B, side, side, patch_size, patch_size, -1).permute(0, 5, 1, 3, 2, 4)  # [B, C, h, p, w, p]
    return x.reshape(B, -1, side * patch_size, side * patch_size)
