"""What the levels of a VAE's encoder are worth: how alike neighbours are, how many directions they use, what a linear
probe reads from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from featcache.encoders.vae import encoder_layers


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """outputs: name -> output `[B, C, h, w]` of every layer that counts for the levels. branches: of the layers that have
    a residual branch, the root mean square of what it adds over that of the output. mean: the posterior's."""

    outputs: dict[str, Tensor]
    branches: dict[str, float]
    mean: Tensor


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> Encoded:
    """All layers of one pass: pixels `[B, 3, H, W]` in [-1, 1]."""
    outputs: dict[str, Tensor] = {}
    branches: dict[str, float] = {}

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Tensor, name: str) -> None:
        outputs[name] = output
        if isinstance(module, ResnetBlock2D | Attention):
            shortcut = getattr(module, "conv_shortcut", None)
            stream = inputs[0] if shortcut is None else shortcut(inputs[0])
            branches[name] = ((output - stream).square().mean() / output.square().mean()).sqrt().item()

    hooks = [layer.module.register_forward_hook(partial(keep, name=layer.name)) for layer in encoder_layers(vae)]
    try:
        mean = vae.encode(pixels).latent_dist.mean
    finally:
        for hook in hooks:
            hook.remove()
    return Encoded(outputs=outputs, branches=branches, mean=mean)


def tokens_of(output: Tensor, grid: int) -> Tensor:
    """A layer's output on the token grid, `[B, C, h, w]` => `[B, T, C]`."""
    resampled = F.interpolate(output.float(), size=(grid, grid), mode="bilinear", align_corners=False)
    return resampled.flatten(2).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class LevelFigures:
    """rms of the activations. mean_share: squared norm of the mean vector over the mean squared norm. rank: effective
    rank of the centred covariance (exponential of the entropy of its eigenvalues' shares). cosine: mean cosine, token by
    token, to the previous layer of the same width (None for the first of a width). branch: see `Encoded`."""

    rms: float
    mean_share: float
    rank: float
    cosine: float | None
    branch: float | None


def describe(tokens: Tensor, previous: Tensor | None, branch: float | None) -> LevelFigures:
    """Figures of one layer's tokens `[B, T, C]`; previous: the tokens of the layer before it."""
    flat = tokens.flatten(0, 1).double()
    mean = flat.mean(0)
    values = torch.linalg.eigvalsh((flat - mean).T @ (flat - mean)).clamp(min=0)
    share = values / values.sum()
    entropy = -(share * share.clamp(min=1e-30).log()).sum()
    cosine: Tensor | None = None
    if previous is not None and previous.shape == tokens.shape:
        cosine = F.cosine_similarity(flat, previous.flatten(0, 1).double(), dim=1).mean()
    return LevelFigures(
        rms=flat.square().mean().sqrt().item(),
        mean_share=(mean.square().sum() / flat.square().sum(1).mean()).item(),
        rank=entropy.exp().item(),
        cosine=None if cosine is None else cosine.item(),
        branch=branch,
    )


def linear_probe(known: Tensor, known_labels: Tensor, asked: Tensor, asked_labels: Tensor) -> float:
    """Accuracy of ridge regression to one-hot labels on standardised features `[N, D]`, in closed form."""
    mean, std = known.mean(0), known.std(0) + 1e-6
    classes = int(known_labels.max()) + 1
    design, queries = (F.pad((t - mean) / std, (0, 1), value=1.0).double() for t in (known, asked))
    targets = F.one_hot(known_labels, classes).double()
    ridge = 1e-2 * len(known) * torch.eye(design.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(design.T @ design + ridge, design.T @ targets)
    return float(((queries @ weights).argmax(1) == asked_labels).float().mean())


def table(vae: AutoencoderKL, pixels: Tensor, *, grid: int) -> dict[str, dict[str, Any]]:
    """Layer -> `LevelFigures`, in order of computation. grid: side of the token grid that levels are resampled to."""
    encoded = encode(vae, pixels)
    found: dict[str, dict[str, Any]] = {}
    previous: Tensor | None = None
    for name, output in encoded.outputs.items():
        tokens = tokens_of(output, grid)
        found[name] = asdict(describe(tokens, previous, encoded.branches.get(name)))
        previous = tokens
    return found


def pooled(vae: AutoencoderKL, batches: Iterable[Tensor], layers: Sequence[str]) -> dict[str, Tensor]:
    """What a probe reads `[N, D]`: of each layer its mean token; "latent": the posterior's mean, all cells;
    "latent, pooled": their mean."""
    found: dict[str, list[Tensor]] = {name: [] for name in (*layers, "latent", "latent, pooled")}
    for pixels in batches:
        encoded = encode(vae, pixels)
        for name in layers:
            found[name].append(encoded.outputs[name].mean((2, 3)))
        found["latent"].append(encoded.mean.flatten(1))
        found["latent, pooled"].append(encoded.mean.mean((2, 3)))
    return {name: torch.cat(parts) for name, parts in found.items()}
