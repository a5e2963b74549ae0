"""AHPA's routers: timestep -> weights of the VAE encoder's layers and groups (AHPA Sec. 4.3 and App. D.6).

All routers share one call: `router(t [B], content [B, D] | None) -> RouterWeights`. They run in float32,
outside autocast: a time embedding in bfloat16 would resolve t only to 1/256, and the cost is nil.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class RouterWeights(NamedTuple):
    """intra: per group [B, L_g], softmax(a_g) of Eq. 3; inter: [B, G], s of Eq. 4. Each row sums to 1."""

    intra: tuple[Tensor, ...]
    inter: Tensor


def entropy_shortfall(weights: RouterWeights, floor: float) -> Tensor:
    """How far the weights' entropies lie below `floor` of the largest possible (that of equal weights), in nats.

    Mean over the batch of `relu(floor * log n - H(w))`, summed over the layers' and the groups' weights.
    """
    short = [
        (floor * math.log(w.shape[-1]) - _entropy(w.float())).clamp(min=0).mean()
        for w in (*weights.intra, weights.inter)
    ]
    return torch.stack(short).sum()


def _entropy(w: Tensor) -> Tensor:
    """Over the last dimension, in nats. `torch.special.entr` has an infinite derivative at 0, where a softmax that has
    saturated makes NaN of it."""
    return -(w * w.clamp(min=torch.finfo(w.dtype).tiny).log()).sum(-1)


def largest_weight(weights: RouterWeights) -> Tensor:
    """[B]: the largest share that one layer has in the target, `max_gl s_g w_gl`; 1 where the rest is unused."""
    shares = [w * weights.inter[:, g : g + 1] for g, w in enumerate(weights.intra)]
    return torch.cat(shares, dim=-1).amax(dim=-1)


class LinearTime(nn.Module):
    """`e(t) = W t + b` with learned W and b, [B] -> [B, width] (App. D.6, the default)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(1, width)

    def forward(self, t: Tensor) -> Tensor:
        embedded: Tensor = self.projection(t[:, None])
        return embedded


class SinusoidalTime(nn.Module):
    """Cosines and sines at `width / 2` geometric frequencies, [B] -> [B, width] (App. D.6).

    The formula is not legible in our copy. We take DDPM's, `10000^(-i / (width/2))` on `1000 t`, which is
    the scale at which the paper's "high-frequency harmonic components" exist.
    """

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        frequencies = 1000.0 * torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        phase = t[:, None] * self.frequencies
        return torch.cat([phase.cos(), phase.sin()], dim=-1)


class FourierTime(nn.Module):
    """Random Fourier features `[cos(2 pi F t), sin(2 pi F t)]`, `F ~ N(0, scale^2)`, [B] -> [B, width].

    App. D.6; its scale is not legible in our copy, the default of 16 is ours. F is fixed and saved.
    """

    frequencies: Tensor

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(width // 2) * scale)

    def forward(self, t: Tensor) -> Tensor:
        phase = 2 * math.pi * t[:, None] * self.frequencies
        return torch.cat([phase.cos(), phase.sin()], dim=-1)


def build_time_embedding(kind: str, width: int, fourier_scale: float) -> nn.Module:
    """`'linear'`, `'sinusoidal'` or `'fourier'`: t [B] -> [B, width]."""
    if kind == "linear":
        return LinearTime(width)
    if kind == "sinusoidal":
        return SinusoidalTime(width)
    assert kind == "fourier", kind
    return FourierTime(width, fourier_scale)


class Router(nn.Module):
    """Base: turns logits [B, L_1 + ... + L_G + G] into softmax weights (Eq. 2 to 4).

    Args:
        layers: number of layers in each group.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        super().__init__()
        self.layers = tuple(layers)

    @property
    def num_logits(self) -> int:
        return sum(self.layers) + len(self.layers)

    def logits(self, t: Tensor, content: Tensor | None) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not define logits()")

    def forward(self, t: Tensor, content: Tensor | None = None) -> RouterWeights:
        with torch.autocast(t.device.type, enabled=False):
            logits = self.logits(t.float(), None if content is None else content.float())
            *intra, inter = logits.split([*self.layers, len(self.layers)], dim=-1)
            return RouterWeights(tuple(a.softmax(-1) for a in intra), inter.softmax(-1))


def _zeroed(linear: nn.Linear) -> nn.Linear:
    """Zero logits, so that the router starts as the uniform mixture (ours; the paper gives no start)."""
    nn.init.zeros_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


class MlpRouter(Router):
    """The paper's router: time embedding, `depth` hidden layers, one linear layer to all logits.

    App. A gives depth 4, width 256 and 128 for the embedding; SiLU is ours. With `content_width` it is the
    content-adaptive router of App. D.6: the average-pooled hidden state of the aligned block is projected to
    the embedding's width and joined to the time embedding (joining by concatenation is ours).
    """

    def __init__(
        self,
        layers: Sequence[int],
        *,
        time: nn.Module,
        time_width: int,
        width: int,
        depth: int,
        content_width: int | None = None,
    ) -> None:
        super().__init__(layers)
        self.time = time
        self.content = None if content_width is None else nn.Linear(content_width, time_width)
        inner: list[nn.Module] = []
        in_width = time_width if content_width is None else 2 * time_width
        for i in range(depth):
            inner += [nn.Linear(in_width if i == 0 else width, width), nn.SiLU()]
        self.mlp = nn.Sequential(*inner)
        self.out = _zeroed(nn.Linear(width, self.num_logits))

    def logits(self, t: Tensor, content: Tensor | None) -> Tensor:
        x = self.time(t)
        if self.content is not None:
            assert content is not None, "the content-adaptive router needs the pooled hidden state"
            x = torch.cat([x, self.content(content)], dim=-1)
        logits: Tensor = self.out(self.mlp(x))
        return logits


class TableRouter(Router):
    """Lookup table: t in `bins` uniform bins, one learned row of logits each (App. D.6, 3).

    The number of bins is not legible in our copy; 10 is ours, after the paper's example of a boundary at 0.9.
    """

    def __init__(self, layers: Sequence[int], *, bins: int) -> None:
        super().__init__(layers)
        self.table = nn.Parameter(torch.zeros(bins, self.num_logits))

    def logits(self, t: Tensor, content: Tensor | None) -> Tensor:
        bins = self.table.shape[0]
        return self.table[(t * bins).long().clamp(0, bins - 1)]


class AttentionRouter(Router):
    """The time embedding queries a bank of `prototypes` learned configurations (App. D.6, 3).

    `logits = softmax(W_q e(t) (W_k P)^T / sqrt(d)) W_v P`. The bank's size is not legible in our
    copy; 16 is ours.
    """

    def __init__(self, layers: Sequence[int], *, time: nn.Module, time_width: int, prototypes: int) -> None:
        super().__init__(layers)
        self.time = time
        self.bank = nn.Parameter(torch.randn(prototypes, time_width) / math.sqrt(time_width))
        self.query = nn.Linear(time_width, time_width, bias=False)
        self.key = nn.Linear(time_width, time_width, bias=False)
        self.value = _zeroed(nn.Linear(time_width, self.num_logits, bias=False))

    def logits(self, t: Tensor, content: Tensor | None) -> Tensor:
        scores = self.query(self.time(t)) @ self.key(self.bank).mT / math.sqrt(self.bank.shape[1])  # [B, prototypes]
        logits: Tensor = scores.softmax(-1) @ self.value(self.bank)
        return logits


class StaticRouter(Router):
    """Uniform weights at all t, nothing learned ("Static Uniform", Table D.15)."""

    def logits(self, t: Tensor, content: Tensor | None) -> Tensor:
        return t.new_zeros(t.shape[0], self.num_logits)


class ScheduleRouter(Router):
    """Linear schedule over the groups, nothing learned ("Heuristic (Linear)", Table D.15).

    The deepest group has weight t and the one before it 1 - t, uniform within a group; with more than two
    groups each rises and falls linearly around its own place on [0, 1]. Only "linear" is the paper's; the
    direction follows its finding that deep features guide at high noise (Sec. 3).
    """

    def forward(self, t: Tensor, content: Tensor | None = None) -> RouterWeights:
        t = t.float()
        G = len(self.layers)
        intra = tuple(t.new_full((t.shape[0], L), 1 / L) for L in self.layers)
        places = torch.arange(G, device=t.device, dtype=t.dtype)
        inter = (1 - (t[:, None] * (G - 1) - places).abs()).clamp(min=0)
        return RouterWeights(intra, inter)
