"""Distances between projected hidden states and targets, reduced in float32; every sample weighs the same."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.align.base import cosine_per_token


def negative_cosine(p: Tensor, y: Tensor) -> Tensor:
    """`-mean_{b,n} cos(p_bn, y_bn)`, [B, N, C] each -> scalar (REPA Eq. 8, AHPA Eq. 5)."""
    return -cosine_per_token(p, y).mean()


def smooth_l1(p: Tensor, y: Tensor, beta: float) -> Tensor:
    """Smooth L1, mean over all entries: quadratic below `beta`, linear above."""
    return F.smooth_l1_loss(p.float(), y.float(), beta=beta)


def l1(p: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference over all entries."""
    return F.l1_loss(p.float(), y.float())


def unit_rms(y: Tensor) -> Tensor:
    """Each token divided by the root mean square of its channels: [..., C] -> float32 [..., C]."""
    y = y.float()
    return y * (y.square().mean(dim=-1, keepdim=True) + 1e-12).rsqrt()


def nt_xent(p: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross entropy over the tokens of one image (REPA Table 2), scalar.

    `-mean_{b,n} log softmax_m(cos(p_bn, y_bm) / temperature)[n]`: each projected token must find its own
    target among the image's N target tokens. REPA leaves negatives and temperature open. Negatives from the
    same image only are ours: a sample's loss then does not depend on which others share its (micro-)batch or
    rank, and the logits stay [B, N, N].
    """
    B, N, _ = p.shape
    # Float32 throughout: at temperature 0.1, bfloat16 logits would be off by up to 0.04.
    with torch.autocast(p.device.type, enabled=False):
        logits = F.normalize(p.float(), dim=-1) @ F.normalize(y.float(), dim=-1).mT / temperature  # [B, N, N]
        own = torch.arange(N, device=p.device).expand(B, N).reshape(B * N)
        return F.cross_entropy(logits.reshape(B * N, N), own)


def normalize_over_space(y: Tensor, gamma: float) -> Tensor:
    """Target with (part of) its spatial mean removed: [B, N, C] -> float32 [B, N, C].

    `(y - gamma * mean_n y) / (std_n y + 1e-6)` with the unbiased std per sample and channel; iREPA uses
    `gamma = 0.6` for latent diffusion.
    """
    y = y.float()
    std, mean = torch.std_mean(y, dim=1, keepdim=True)
    return (y - gamma * mean) / (std + 1e-6)


def structure(p: Tensor, y: Tensor, reduction: str) -> Tensor:
    """`||A(y) - A(p)||_F^2` with `A(h)_ij = cos(h_i, h_j)` over one image's tokens (SARA Eq. 7-8).

    [B, N, C] each -> scalar: the `'mean'` or `'sum'` over the N x N entries, then the mean over images.

    Both matrices come from one product over 2C channels, `[p, y] [p, -y]^T = A(p) - A(y)`: under autocast
    the matrix cores accumulate the difference in float32 and round it once, instead of subtracting two
    rounded matrices of entries near 1.
    """
    p, y = F.normalize(p.float(), dim=-1), F.normalize(y.float(), dim=-1)
    difference = torch.cat([p, y], dim=-1) @ torch.cat([p, -y], dim=-1).mT  # [B, N, N]
    squared = difference.float().square()
    return squared.mean() if reduction == "mean" else squared.sum(dim=(1, 2)).mean()
