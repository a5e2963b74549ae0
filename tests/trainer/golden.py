"""Independent replicas of the public SiT and DiT: their initial weights from seeds, and their forward pass.

The vectors that some tests compare with were computed by the public code with weights that are not stored,
only the seeds of their initialisation are. :func:`official_weights` consumes torch's random numbers in the
order in which the public constructors do, so it gives the same bytes (checked by SHA-256).
:func:`official_forward` is written from the formulas with plain operations and shares nothing with the
package.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def position_table(width: int, grid: int) -> np.ndarray:
    """[1, grid * grid, width] float64: per token sin and cos of the column, then of the row."""
    table = np.zeros((grid, grid, width))
    quarter = width // 4
    for row in range(grid):
        for column in range(grid):
            for i in range(quarter):
                omega = 1 / 10000 ** (i / quarter)
                table[row, column, i] = math.sin(column * omega)
                table[row, column, quarter + i] = math.cos(column * omega)
                table[row, column, 2 * quarter + i] = math.sin(row * omega)
                table[row, column, 3 * quarter + i] = math.cos(row * omega)
    return table.reshape(1, grid * grid, width)


def official_weights(
    *,
    seed: int,
    seed_redrawn: int,
    depth: int = 4,
    width: int = 64,
    channels: int = 4,
    channels_out: int = 4,
    patch: int = 2,
    grid: int = 16,
    classes: int = 10,
    projector: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """A state dict under official names: official initialisation, then adaLN and final layers drawn N(0,
    0.02^2).

    Order of the draws: every module's default initialisation at construction, then Xavier over all linear
    layers in module order, then patch embedding, label table and time MLP; with a new seed the layers that
    start at zero.
    """
    state: dict[str, Tensor] = {"pos_embed": torch.from_numpy(position_table(width, grid)).float()}
    linears: list[str] = []

    def add(name: str, module: nn.Module) -> None:
        for key, value in module.named_parameters():
            state[f"{name}.{key}"] = value.detach()
        if isinstance(module, nn.Linear):
            linears.append(name)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        add("x_embedder.proj", nn.Conv2d(channels, width, patch, patch))
        add("t_embedder.mlp.0", nn.Linear(256, width))
        add("t_embedder.mlp.2", nn.Linear(width, width))
        add("y_embedder.embedding_table", nn.Embedding(classes + 1, width))
        for i in range(depth):
            add(f"blocks.{i}.attn.qkv", nn.Linear(width, 3 * width))
            add(f"blocks.{i}.attn.proj", nn.Linear(width, width))
            add(f"blocks.{i}.mlp.fc1", nn.Linear(width, 4 * width))
            add(f"blocks.{i}.mlp.fc2", nn.Linear(4 * width, width))
            add(f"blocks.{i}.adaLN_modulation.1", nn.Linear(width, 6 * width))
        if projector is not None:
            hidden, features = projector
            add("projectors.0.0", nn.Linear(width, hidden))
            add("projectors.0.2", nn.Linear(hidden, hidden))
            add("projectors.0.4", nn.Linear(hidden, features))
        add("final_layer.linear", nn.Linear(width, patch * patch * channels_out))
        add("final_layer.adaLN_modulation.1", nn.Linear(width, 2 * width))
        for name in linears:
            nn.init.xavier_uniform_(state[f"{name}.weight"])
            state[f"{name}.bias"].zero_()
        nn.init.xavier_uniform_(state["x_embedder.proj.weight"].view(width, -1))
        state["x_embedder.proj.bias"].zero_()
        for name in ("y_embedder.embedding_table", "t_embedder.mlp.0", "t_embedder.mlp.2"):
            nn.init.normal_(state[f"{name}.weight"], std=0.02)

        torch.manual_seed(seed_redrawn)
        for key, value in state.items():
            if "adaLN_modulation" in key or key.startswith("final_layer.linear"):
                nn.init.normal_(value, std=0.02)
    return state


def official_forward(
    state: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor, *, heads: int
) -> tuple[Tensor, list[Tensor]]:
    """Prediction with all channels out, and the tokens after every block."""
    dtype = state["x_embedder.proj.weight"].dtype

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(h: Tensor) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def head_norm(name: str, h: Tensor) -> Tensor:
        if f"{name}.weight" not in state:
            return h
        centred = h - h.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def silu(h: Tensor) -> Tensor:
        return h / (1 + (-h).exp())

    patch = state["x_embedder.proj.weight"].shape[-1]
    h = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=patch)
    h = h.flatten(2).mT + state["pos_embed"]  # [B, N, D]
    B, N, D = h.shape
    # In float32 whatever the rest is, like the public code.
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(128).float() / 128)
    features = torch.cat([angles.cos(), angles.sin()], 1).to(dtype)
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", features)))
    c = silu(c + state["y_embedder.embedding_table.weight"][y])
    hidden = []
    depth = sum(key.endswith("attn.qkv.weight") for key in state)
    for i in range(depth):
        block = f"blocks.{i}"
        m = linear(f"{block}.adaLN_modulation.1", c)[:, None].split(D, dim=-1)
        qkv = linear(f"{block}.attn.qkv", norm(h) * (1 + m[1]) + m[0]).split(D, dim=-1)
        q, k, v = (part.reshape(B, N, heads, D // heads).transpose(1, 2) for part in qkv)
        q, k = head_norm(f"{block}.attn.q_norm", q), head_norm(f"{block}.attn.k_norm", k)
        attention = (q @ k.mT / math.sqrt(D // heads)).softmax(-1) @ v
        h = h + m[2] * linear(f"{block}.attn.proj", attention.transpose(1, 2).reshape(B, N, D))
        u = linear(f"{block}.mlp.fc1", norm(h) * (1 + m[4]) + m[3])
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        h = h + m[5] * linear(f"{block}.mlp.fc2", u)
        hidden.append(h)
    shift, scale = linear("final_layer.adaLN_modulation.1", c)[:, None].split(D, dim=-1)
    out = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    side = math.isqrt(N)
    channels = out.shape[-1] // patch**2
    image = torch.zeros(B, channels, side * patch, side * patch, dtype=dtype)
    for p in range(patch):
        for q_ in range(patch):
            for ch in range(channels):
                column = out[:, :, (p * patch + q_) * channels + ch].reshape(B, side, side)
                image[:, ch, p::patch, q_::patch] = column
    return image, hidden
