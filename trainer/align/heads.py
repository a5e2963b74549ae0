"""Projection heads from the backbone's hidden states to a target, and changes of token grid.

Heads are trained with the backbone and dropped at inference. Token maps are row-major on a square grid.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor, nn

from featcache.errors import UserError
from trainer.align.base import BackboneInfo
from trainer.models.config import takes_text

_KIND = re.compile(r"(linear)|mlp([1-9])|conv([1-9])")


class ConvHead(nn.Module):
    """`depth` 3x3 convolutions on the token grid, [B, N, D] -> [B, N, C].

    AHPA App. A uses one; its Table D.13 stacks Conv + GroupNorm + SiLU blocks. The paper leaves their width
    and number of groups open: the target's width and up to 32 groups are ours. The last convolution is plain,
    so that the output can take any sign and scale.
    """

    def __init__(self, in_width: int, out_width: int, *, depth: int, grid: int, hidden: int) -> None:
        super().__init__()
        self.grid = grid
        layers: list[nn.Module] = []
        for i in range(depth):
            last = i == depth - 1
            width = out_width if last else hidden
            layers.append(nn.Conv2d(in_width if i == 0 else hidden, width, 3, padding=1))
            if not last:
                layers += [nn.GroupNorm(math.gcd(32, width), width), nn.SiLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, hidden: Tensor) -> Tensor:
        B, N, D = hidden.shape
        # [B, N, D] seen as [B, D, g, g] is already in channels-last memory order: neither way costs a copy.
        maps = hidden.reshape(B, self.grid, self.grid, D).permute(0, 3, 1, 2)
        out: Tensor = self.layers(maps).permute(0, 2, 3, 1).reshape(B, N, -1)
        return out


def mlp(in_width: int, out_width: int, *, depth: int, hidden: int) -> nn.Sequential:
    """`depth` linear layers with SiLU between them (REPA App. D: three, hidden width 2048)."""
    widths = [in_width, *[hidden] * (depth - 1), out_width]
    layers: list[nn.Module] = []
    for i in range(depth):
        layers.append(nn.Linear(widths[i], widths[i + 1]))
        if i < depth - 1:
            layers.append(nn.SiLU())
    return nn.Sequential(*layers)


def build_head(kind: str, in_width: int, out_width: int, *, grid: int, hidden: int | None = None) -> nn.Module:
    """`'linear'`, `'mlp<depth>'` or `'conv<depth>'`: [B, N, in_width] -> [B, N, out_width], N = grid^2.

    hidden: inner width; None means 2048 for MLPs (REPA App. D) and the output's width for convolutions.
    """
    match = _KIND.fullmatch(kind)
    assert match, f"head kinds are validated by the method's options, got {kind!r}"
    if match[1]:
        return nn.Linear(in_width, out_width)
    if match[2]:
        return mlp(in_width, out_width, depth=int(match[2]), hidden=hidden or 2048)
    return ConvHead(in_width, out_width, depth=int(match[3]), grid=grid, hidden=hidden or out_width)


def square_side(method: str, name: str, tokens: int) -> int:
    """Side of a square token grid. UserError: the number of tokens is no square (e.g. with class tokens)."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise UserError(
            f"{method}: feature {name} has {tokens} tokens, which is not a square grid",
            remedy="Cache patch tokens only, without class or register tokens.",
        )
    return side


def to_grid(tokens: Tensor, side: int) -> Tensor:
    """Token map resampled to `side` x `side`: [B, M, C] -> [B, side^2, C]; itself where M = side^2.

    The papers only treat equal grids. For others (patch 4 or 8, encoders of another resolution) we average
    whole cells where the grids divide and interpolate bilinearly elsewhere.
    """
    B, M, C = tokens.shape
    source = math.isqrt(M)
    if source == side:
        return tokens
    if source % side == 0:
        r = source // side
        return tokens.reshape(B, side, r, side, r, C).mean(dim=(2, 4)).reshape(B, side * side, C)
    maps = tokens.float().reshape(B, source, source, C).permute(0, 3, 1, 2)  # [B, C, s, s]
    maps = nn.functional.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
    return maps.permute(0, 2, 3, 1).reshape(B, side * side, C)


def tap_depth(method: str, chosen: int | None, by_scale: Mapping[str, int], info: BackboneInfo) -> int:
    """Block (1-based) whose hidden state is aligned.

    The papers give it for B, L and XL (`by_scale`). Elsewhere the share that B uses of its 12 blocks is
    kept, which is ours: SiT-S (12 blocks) gets B's block, the small `Ti` (6 blocks) half of it. MMDiT's sizes have other
    depths than SiT's of the same letter, but for L: the share that L uses of its 24 blocks is kept, ours again.

    Raises:
        UserError: the model has no such block.
    """
    if takes_text(info.name):
        usual = max(1, round(by_scale["L"] * info.depth / 24))
    else:
        usual = by_scale.get(info.scale, max(1, round(by_scale["B"] * info.depth / 12)))
    block = usual if chosen is None else chosen
    if not 1 <= block <= info.depth:
        raise UserError(
            f"{method}: block {block} was asked for, and {info.name} has {info.depth} blocks",
            remedy=f"Choose a depth from 1 to {info.depth}.",
        )
    return block
