"""LightningDiT's forward pass, written from its description (arXiv:2501.01423, Table 1; EVA-02's rotary positions), alone.

Nothing of `trainer` is used. Time runs as in the public code: t = 1 is data, and the velocity is data - noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def rotated(x: Tensor, side: int) -> Tensor:
    """[B, heads, side * side, d]: neighbouring channels are complex numbers; half of them turn with the row, half with
    the column, the k-th of n by the position times 10000^(-k / n)."""
    B, H, N, d = x.shape
    n = d // 4
    numbers = torch.view_as_complex(x.reshape(B, H, side, side, d // 2, 2).contiguous())
    speed = 10000.0 ** -(torch.arange(n, dtype=torch.float64) / n)
    turn = torch.exp(1j * torch.arange(side)[:, None] * speed)  # [side, n]
    rows = numbers[..., :n] * turn[:, None]
    columns = numbers[..., n:] * turn[None]
    return torch.view_as_real(torch.cat([rows, columns], -1)).reshape(B, H, N, d)


def published_forward(state: Mapping[str, Tensor], x: Tensor, t: Tensor, y: Tensor, *, heads: int) -> Tensor:
    """Prediction [B, C, h, w] in float64 from a state dict under the public names. A `swiglu` MLP, RMS norms and rotary
    positions, each where the state has its weights."""
    state = {key: value.double() for key, value in state.items()}

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, h: Tensor) -> Tensor:
        return h / (h.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]

    def head_norm(name: str, h: Tensor) -> Tensor:
        return norm(name, h) if f"{name}.weight" in state else h

    def silu(h: Tensor) -> Tensor:
        return h * torch.sigmoid(h)

    kernel = state["x_embedder.proj.weight"]
    D, C, p, _ = kernel.shape
    B, _, height, _ = x.shape
    side, N = height // p, (height // p) ** 2
    patches = x.double().reshape(B, C, side, p, side, p).permute(0, 2, 4, 1, 3, 5).reshape(B, N, C * p * p)
    h = patches @ kernel.reshape(D, -1).T + state["x_embedder.proj.bias"] + state["pos_embed"]
    # The public code takes the sinusoids in float32.
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(128).float() / 128)
    features = torch.cat([angles.cos(), angles.sin()], 1).double()
    time = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", features)))
    c = silu(time + state["y_embedder.embedding_table.weight"][y])[:, None]
    for i in range(sum(key.endswith("attn.qkv.weight") for key in state)):
        block = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{block}.adaLN_modulation.1", c).chunk(6, -1)
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", h) * (1 + scale1) + shift1).chunk(3, -1)
        q, k, v = (part.reshape(B, N, heads, D // heads).transpose(1, 2) for part in qkv)
        q, k = (rotated(head_norm(f"{block}.attn.{n}_norm", part), side) for n, part in (("q", q), ("k", k)))
        mixed = torch.softmax(q @ k.mT / math.sqrt(D // heads), -1) @ v
        h = h + gate1 * linear(f"{block}.attn.proj", mixed.transpose(1, 2).reshape(B, N, D))
        w12 = linear(f"{block}.mlp.w12", norm(f"{block}.norm2", h) * (1 + scale2) + shift2)
        half = w12.shape[-1] // 2
        h = h + gate2 * linear(f"{block}.mlp.w3", silu(w12[..., :half]) * w12[..., half:])
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, -1)
    out = linear("final_layer.linear", norm("final_layer.norm_final", h) * (1 + scale) + shift)
    tiles = out.reshape(B, side, side, p, p, -1).permute(0, 5, 1, 3, 2, 4)
    return tiles.reshape(B, -1, side * p, side * p)
