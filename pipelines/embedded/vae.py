"""The tiny VAE: SD-VAE's four-stage layout, trained so that its encoder's levels are a hierarchy worth aligning with.

Loss: see `reconstruction_loss`; a posterior kept just off a point (`KL_WEIGHT`); and a term on the encoder's levels
(`LevelTerm`): the last layers of G3 and G4 must tell the class, and every layer of G3 and G4 must use many directions.
Without the last term a small VAE's levels are dominated by their mean and nearly alike from layer to layer.

Muon trains the convolutions inside residual branches and AdamW all that carries the stream (first convolutions,
down- and upsampling, shortcuts): a stream under Muon grows without bound, until the branches no longer change it.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from featcache.encoders.vae import encoder_layers
from pipelines.embedded import levels
from pipelines.embedded.data import Drawn, Photographs, enlarged, mosaic, numbers, to_pixels

CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 88, 88],
    "layers_per_block": 2,
    "latent_channels": 8,
    "norm_num_groups": 8,
    "sample_size": 64,
}

EDGE_WEIGHT = 0.5
BLUR_WEIGHT = 2.0
KL_WEIGHT = 1e-5
CLASS_WEIGHT = 0.02
MEAN_WEIGHT = 0.02
CORRELATION_WEIGHT = 0.5
CHANGE_WEIGHT = 0.5
LARGEST_COSINE = 0.9  # between a layer's tokens and those of the layer before it
LARGE_EVERY = 6  # every n-th batch holds a quarter as many images of twice the side
SUPERVISED = ("down3.res0", "mid.res1")  # the last layers of G3 and of G4


def reconstruction_loss(images: Tensor, decoded: Tensor) -> Tensor:
    """L1 of pixels, + `EDGE_WEIGHT` L1 of finite differences (sharp outlines), + `BLUR_WEIGHT` squared error after 4x4
    and after 8x8 box blurs (colours). Images `[B, 3, H, W]` in [-1, 1].
    """
    error = decoded - images
    blurred = sum(F.avg_pool2d(error, side).square().mean() for side in (4, 8))
    edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
    return error.abs().mean() + EDGE_WEIGHT * edges + BLUR_WEIGHT * blurred


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Mean KL of the posterior to N(0, 1), per element."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


class LevelTerm(nn.Module):
    """What is asked of the encoder's levels; its linear heads are thrown away.

    Classes: cross-entropy from the mean token of the layers in `SUPERVISED`, shapes and photographs each with a head.
    Directions: for each layer of G3 and G4, the share of the mean vector in the tokens' energy, and the mean squared
    correlation between two channels. Change: how far the mean cosine to the layer before exceeds `LARGEST_COSINE`.
    """

    def __init__(self, vae: AutoencoderKL, classes: dict[str, int]) -> None:
        super().__init__()
        layers = [layer for layer in encoder_layers(vae) if layer.level in ("G3", "G4")]
        width = layers[0].width
        self._kept: dict[str, Tensor] = {}
        for layer in layers:
            layer.module.register_forward_hook(lambda _m, _i, out, name=layer.name: self._kept.__setitem__(name, out))
        self.heads = nn.ModuleDict(
            {f"{kind}/{name}".replace(".", "-"): nn.Linear(width, n) for kind, n in classes.items() for name in SUPERVISED}
        )

    def forward(self, labels: dict[str, tuple[slice, Tensor]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Class, mean, correlation and change terms of the last encoding. labels: kind -> its part of the batch, its labels."""
        classes, means, correlations, changes = [], [], [], []
        previous: Tensor | None = None
        for name, output in self._kept.items():
            output = output.float()
            flat = output.permute(0, 2, 3, 1).flatten(0, 2)
            if previous is not None and previous.shape == output.shape:
                changes.append(F.relu(F.cosine_similarity(output, previous, dim=1).mean() - LARGEST_COSINE))
            previous = output
            mean = flat.mean(0)
            energy = flat.square().sum(1).mean()
            means.append(mean.square().sum() / energy)
            centred = (flat - mean) / (flat.std(0) + 1e-4)
            correlation = centred.T @ centred / len(flat)
            correlations.append((correlation - torch.diag(correlation.diagonal())).square().mean())
            if name in SUPERVISED:
                pooled = output.mean((2, 3))
                for kind, (part, known) in labels.items():
                    scale = pooled[part].detach().std() + 1e-4
                    logits = self.heads[f"{kind}/{name}".replace(".", "-")](pooled[part] / scale)
                    classes.append(F.cross_entropy(logits, known))
        self._kept.clear()
        terms = (classes, means, correlations, changes)
        told, mean, correlation, change = (torch.stack(term).mean() for term in terms)
        return told, mean, correlation, change


@torch.no_grad()
def start(vae: AutoencoderKL) -> None:
    """Initialise so that colours and positions get through from the first step (our choice).

    Shortcuts are orthogonal, downsampling averages 2x2, upsampling repeats (both plus a little noise to break symmetry),
    and the posterior starts narrow. Residual branches keep PyTorch's own start, which makes each as strong as the stream.
    """
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D) and module.conv_shortcut is not None:
            nn.init.zeros_(module.conv_shortcut.bias)
            nn.init.orthogonal_(module.conv_shortcut.weight)
        elif isinstance(module, Downsample2D | Upsample2D):
            assert isinstance(module.conv, nn.Conv2d) and module.conv.bias is not None
            weight = module.conv.weight
            nn.init.zeros_(module.conv.bias)
            nn.init.dirac_(weight)
            if isinstance(module, Downsample2D):
                # The input is padded by one at the right and bottom: taps 0 and 1 cover a 2x2 block.
                weight[:, :, :2, :2] = weight[:, :, 1:2, 1:2].clone() / 4
            weight += 0.02 * torch.randn_like(weight)
    assert vae.quant_conv is not None and vae.quant_conv.bias is not None
    vae.quant_conv.bias[vae.config["latent_channels"] :] = -6.0


class Optimizer:
    """Muon for the weights inside residual branches, taken as matrices [out, rest]; AdamW for all else."""

    def __init__(self, vae: AutoencoderKL, others: nn.Module, *, muon_lr: float, adam_lr: float) -> None:
        inside = [m for m in vae.modules() if isinstance(m, ResnetBlock2D | Attention)]
        branch = [m.conv1 for m in inside if isinstance(m, ResnetBlock2D)]
        branch += [m.conv2 for m in inside if isinstance(m, ResnetBlock2D)]
        branch += [layer for m in inside if isinstance(m, Attention) for layer in (m.to_q, m.to_k, m.to_v, m.to_out[0])]
        self._weights = [module.weight for module in branch]
        # Views on the same storage: `torch.optim.Muon` takes matrices only.
        self._matrices = [nn.Parameter(p.detach().view(p.shape[0], -1)) for p in self._weights]
        taken = {id(p) for p in self._weights}
        rest = [p for p in (*vae.parameters(), *others.parameters()) if id(p) not in taken]
        self._peaks = (muon_lr, adam_lr)
        self._optimizers = (
            torch.optim.Muon(self._matrices, lr=muon_lr, weight_decay=0.05),
            torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.99), weight_decay=0.0),
        )
        self._all = [*vae.parameters(), *others.parameters()]

    def step(self, loss: Tensor, fraction: float) -> None:
        """fraction: of the training that is over, in [0, 1)."""
        for parameter in self._all:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self._all, 1.0)
        for weight, matrix in zip(self._weights, self._matrices, strict=True):
            assert weight.grad is not None
            matrix.grad = weight.grad.reshape(matrix.shape)
        warm = min(1.0, fraction / 0.02 + 0.01)
        factor = warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fraction)))
        for optimizer, peak in zip(self._optimizers, self._peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
            optimizer.step()


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a training draws from: shapes of 64 and of 128 px, photographs of 64 px or None."""

    shapes: Drawn
    large_shapes: Drawn
    photographs: Photographs | None


def batch(material: Material, step: int, size: int, *, seed: int) -> tuple[Tensor, dict[str, tuple[slice, Tensor]]]:
    """Pixels `[B, 3, H, H]` and, for each kind, its part of the batch with its labels. Large batches have no labels
    of photographs (they are four in one, or one enlarged)."""
    rng = numbers(seed, 1, step)
    large = step % LARGE_EVERY == LARGE_EVERY - 1
    drawn = material.large_shapes if large else material.shapes
    n = max(1, size // 4) if large else size
    own = n if material.photographs is None else (n + 1) // 2
    chosen = rng.integers(0, len(drawn.labels), own)
    parts, labels = [drawn.images[chosen]], {"shapes": (slice(0, own), torch.from_numpy(drawn.labels[chosen]))}
    if material.photographs is not None and n > own:
        photographs = material.photographs
        count = n - own
        if large:
            picks = rng.integers(0, len(photographs.labels), 4 * count)
            images = photographs.images[picks]
            parts.append(mosaic(images) if rng.random() < 0.5 else enlarged(images[:count]))
        else:
            picks = rng.integers(0, len(photographs.labels), count)
            parts.append(photographs.images[picks])
            labels["photographs"] = (slice(own, n), torch.from_numpy(photographs.labels[picks]))
    images = np.concatenate(parts)
    mirrored = rng.random(len(images)) < 0.5
    images[mirrored] = images[mirrored, :, ::-1]
    return to_pixels(images), labels


@torch.no_grad()
def psnr(vae: AutoencoderKL, batches: Iterator[Tensor]) -> Tensor:
    """PSNR in dB of each image, decoded from the posterior's mean; pixels are clipped to their range, the peak."""
    values = []
    for images in batches:
        decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
        squared = ((decoded - images) / 2).square().flatten(1).mean(1)
        values.append(-10 * torch.log10(squared))
    return torch.cat(values)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int) -> None:
    """The short memory at the start keeps the untrained weights out of the average."""
    decay = min(0.998, (1 + step) / (10 + step))
    for a, p in zip(average.parameters(), model.parameters(), strict=True):
        a.lerp_(p, 1 - decay)


def train(material: Material, *, steps: int, size: int, seed: int, held_out: dict[str, Tensor], out: Path) -> AutoencoderKL:
    """Train for `steps` batches of `size` images; continues from `out/vae-state.pt`, which it writes every 500 steps."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(**CONFIG)
    start(vae)
    classes = {"shapes": int(material.shapes.labels.max()) + 1}
    if material.photographs is not None:
        classes["photographs"] = len(material.photographs.classes)
    average = copy.deepcopy(vae).eval().requires_grad_(False)
    term = LevelTerm(vae, classes)
    optimizer = Optimizer(vae, term, muon_lr=2e-2, adam_lr=1e-3)
    state, first = out / "vae-state.pt", 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        first = int(saved["step"])
        for module, values in zip((vae, term, average), saved["modules"], strict=True):
            module.load_state_dict(values)
        for part, values in zip(optimizer._optimizers, saved["optimizers"], strict=True):
            part.load_state_dict(values)
    began = time.monotonic()
    for step in range(first, steps):
        images, labels = batch(material, step, size, seed=seed)
        images = images.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(images).latent_dist
        generator = torch.Generator().manual_seed(int(numbers(seed, 2, step).integers(1 << 62)))
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        decoded = vae.decode(latents).sample
        rebuilt = reconstruction_loss(images, decoded)
        told, mean, correlation, change = term(labels)
        loss = rebuilt + KL_WEIGHT * divergence(posterior.mean, posterior.logvar)
        loss = loss + CLASS_WEIGHT * told + MEAN_WEIGHT * mean + CORRELATION_WEIGHT * correlation + CHANGE_WEIGHT * change
        optimizer.step(loss, step / steps)
        update_average(average, vae, step)
        if (step + 1) % 100 == 0:
            with torch.no_grad():
                found = {name: psnr(average, iter([pixels])).mean().item() for name, pixels in held_out.items()}
            shown = ", ".join(f"{name} {value:.2f} dB" for name, value in found.items())
            print(
                f"step {step + 1}: loss {rebuilt.item():.4f}, class {told.item():.3f}, mean {mean.item():.3f}, "
                f"correlation {correlation.item():.4f}, change {change.item():.4f}; {shown}; {time.monotonic() - began:.0f} s",
                flush=True,
            )
        if (step + 1) % 500 == 0:
            with torch.no_grad():
                for name, row in levels.table(average, held_out["photographs" if "photographs" in held_out else "shapes"], grid=8).items():
                    print(f"   {name:18}", {k: v if v is None else round(v, 4) for k, v in row.items()}, flush=True)
            partial = state.with_suffix(".partial")
            torch.save(
                {
                    "step": step + 1,
                    "modules": [m.state_dict() for m in (vae, term, average)],
                    "optimizers": [o.state_dict() for o in optimizer._optimizers],
                },
                partial,
            )
            partial.replace(state)
    return average
