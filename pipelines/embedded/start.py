"""Where the VAE's encoder starts: what carries its stream is solved for, not drawn.

The first and the strided convolutions are fitted by ridge regression, one after another on the network's own activations,
to the principal components of the block of pixels that each output stands for, and the last one to the leading
components, the latent. Components are half whitened: no direction outweighs the others, none is noise. So the levels
use many directions from the first step, and the latent begins as a transform codec's coefficients. Residual branches
keep PyTorch's start.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

RIDGE = 1e-4  # of the features' mean square
ROWS = 12_000  # positions that one regression looks at
LINEAR = 0.1  # gain before the SiLU in front of the latent, which is all but linear for small inputs
POSTERIOR = -6.0  # log-variance


def components(pixels: Tensor, *, window: int, stride: int, count: int) -> Tensor:
    """The `count` (or all) strongest principal components of windows of pixels, `[B, 3, H, W]` => `[B, k, h, w]`.

    Centred; the variance of each is replaced by its root, and all are scaled together to a root mean square of 1.
    """
    margin = (window - stride) // 2
    patches = F.unfold(F.pad(pixels, (margin,) * 4, mode="reflect") if margin else pixels, window, stride=stride)
    B, _, n = patches.shape
    rows = patches.transpose(1, 2).flatten(0, 1).double()  # [B n, window^2 * 3]
    rows -= rows.mean(0)
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    values, vectors = values.flip(0)[:count].clamp(min=1e-8), vectors.flip(1)[:, :count]
    scale = values.pow(-0.25) / values.sqrt().mean().sqrt()
    H = pixels.shape[2] // stride
    found: Tensor = (rows @ (vectors * scale)).float().reshape(B, n, -1).transpose(1, 2).reshape(B, -1, H, n // H)
    return found


@torch.no_grad()
def fit(conv: nn.Conv2d, inputs: Tensor, wanted: Tensor) -> None:
    """Ridge regression of a convolution's first channels: inputs `[B, C, H, W]` => wanted `[B, k, h, w]`. The others keep
    their weights."""
    side, k = conv.kernel_size[0], wanted.shape[1]
    patches = F.unfold(inputs, side, padding=int(conv.padding[0]), stride=conv.stride[0])  # [B, C side^2, h w]
    chosen = torch.randperm(patches.shape[2], generator=torch.Generator().manual_seed(0))[: max(1, ROWS // len(inputs))]
    rows = patches[:, :, chosen].transpose(1, 2).flatten(0, 1).double()
    targets = wanted.flatten(2)[:, :, chosen].transpose(1, 2).flatten(0, 1).double()
    mean, centre = rows.mean(0), targets.mean(0)
    rows, targets = rows - mean, targets - centre
    gram = rows.T @ rows
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    weights = torch.linalg.solve(gram, rows.T @ targets)  # [C side^2, k]
    assert conv.bias is not None
    conv.weight[:k] = weights.T.reshape(k, inputs.shape[1], side, side).float()
    conv.bias[:k] = (centre - mean @ weights).float()


@torch.no_grad()
def solve_encoder(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Set the weights of the encoder and of the latent's two 1x1 convolutions, from images `[B, 3, H, W]` in [-1, 1]."""
    encoder: Any = vae.encoder
    channels = int(vae.config["latent_channels"])
    fit(encoder.conv_in, pixels, components(pixels, window=3, stride=1, count=encoder.conv_in.out_channels))
    x, block = encoder.conv_in(pixels), 1
    for stage in encoder.down_blocks:
        for resnet in stage.resnets:
            if resnet.conv_shortcut is not None:
                nn.init.orthogonal_(resnet.conv_shortcut.weight)
                nn.init.zeros_(resnet.conv_shortcut.bias)
            x = resnet(x, None)
        for sampler in stage.downsamplers or ():
            block *= 2
            wanted = components(pixels, window=block, stride=block, count=sampler.conv.out_channels)
            fit(sampler.conv, F.pad(x, (0, 1, 0, 1)), wanted)  # the padding of diffusers' Downsample2D
            x = sampler(x)
    nn.init.constant_(encoder.conv_norm_out.weight, LINEAR)
    inside = F.silu(encoder.conv_norm_out(encoder.mid_block(x)))
    fit(encoder.conv_out, inside, components(pixels, window=block, stride=block, count=channels))
    encoder.conv_out.weight[channels:] = 0
    for conv in (vae.quant_conv, vae.post_quant_conv):
        assert conv is not None and conv.bias is not None
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    encoder.conv_out.bias[channels:] = POSTERIOR
