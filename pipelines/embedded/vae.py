"""The tiny VAE: SD-VAE's four-stage layout, trained so that its encoder's levels are a hierarchy worth aligning with.

Loss: see `reconstruction_loss`; a posterior kept just off a point (`KL_WEIGHT`); and a term on the encoder's levels
(`LevelTerm`): the last layers of G3 and G4 must tell the class, and every layer of G3 and G4 must use many directions.
Without the last term a small VAE's levels are dominated by their mean and nearly alike from layer to layer.

It starts where `start.solve_encoder` leaves it; `optimizers` says who trains what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from featcache.encoders.vae import encoder_layers
from pipelines.embedded import loop
from pipelines.embedded.data import LARGE_EVERY, Material, enlarged, mosaic, numbers, to_pixels
from pipelines.embedded.start import solve_encoder

CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 88, 88],
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "sample_size": 64,
}

SQUARED_WEIGHT, ABSOLUTE_WEIGHT, EDGE_WEIGHT = 4.0, 0.5, 0.1
KL_WEIGHT = 1e-5
LEVEL_WEIGHTS = {"class": 0.02, "mean": 0.02, "correlation": 0.5, "change": 0.5}
LARGEST_COSINE = 0.9  # between a layer's tokens and those of the layer before it
MUON_LR, ADAM_LR = 2e-2, 1e-3
FITTED_ON = 96  # images from which the start is solved
BATCHES, NOISE = 1, 2  # purposes of random numbers
SUPERVISED = ("down3.res0", "mid.res1")  # the last layers of G3 and of G4


def reconstruction_loss(images: Tensor, decoded: Tensor) -> Tensor:
    """Squared and absolute error of pixels and absolute error of their finite differences (sharp outlines), weighted.

    Images `[B, 3, H, W]` in [-1, 1].
    """
    error = decoded - images
    edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
    return SQUARED_WEIGHT * error.square().mean() + ABSOLUTE_WEIGHT * error.abs().mean() + EDGE_WEIGHT * edges


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
            {
                f"{kind}/{name}".replace(".", "-"): nn.Linear(width, n)
                for kind, n in classes.items()
                for name in SUPERVISED
            }
        )

    def forward(self, labels: dict[str, tuple[slice, Tensor]]) -> dict[str, Tensor]:
        """The terms of the last encoding by name, as in `LEVEL_WEIGHTS`. labels: kind => its part of the batch, its classes."""
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
        terms = {"class": classes, "mean": means, "correlation": correlations, "change": changes}
        return {name: torch.stack(values).mean() for name, values in terms.items()}


@torch.no_grad()
def start_decoder(vae: AutoencoderKL) -> None:
    """Initialise so that the decoder begins as a resampler: residual branches end in zeros, shortcuts are orthogonal and
    upsampling repeats (plus a little noise to break symmetry), so that colours and places get through from the first step.
    """
    for module in vae.decoder.modules():
        if isinstance(module, ResnetBlock2D):
            _zero(module.conv2)
            if module.conv_shortcut is not None:
                _zero(module.conv_shortcut)
                nn.init.orthogonal_(module.conv_shortcut.weight)
        elif isinstance(module, Attention):
            _zero(module.to_out[0])
        elif isinstance(module, Upsample2D):
            assert isinstance(module.conv, nn.Conv2d)
            _zero(module.conv)
            nn.init.dirac_(module.conv.weight)
            module.conv.weight += 0.02 * torch.randn_like(module.conv.weight)


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class Muon(torch.optim.Muon):
    """Muon for weights of any number of axes, taken as matrices [out, rest]."""

    def __init__(self, weights: Iterable[Tensor], **options: Any) -> None:
        self._weights = list(weights)
        # Views on the same storage: the base class takes matrices only.
        self._matrices = [nn.Parameter(w.detach().view(w.shape[0], -1)) for w in self._weights]
        super().__init__(self._matrices, **options)

    def step(self, closure: Any = None) -> Any:
        for weight, matrix in zip(self._weights, self._matrices, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.reshape(matrix.shape)
        return super().step(closure)  # type: ignore[no-untyped-call]


def optimizers(vae: AutoencoderKL, heads: nn.Module) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the decoder's matrices and those inside the encoder's residual branches; AdamW for all else, above all
    what carries the encoder's stream, which grows under Muon until the branches no longer change it."""
    taken: list[Any] = [p for p in vae.decoder.parameters() if p.ndim >= 2]
    for module in vae.encoder.modules():
        if isinstance(module, ResnetBlock2D):
            taken += [module.conv1.weight, module.conv2.weight]
        elif isinstance(module, Attention):
            taken += [layer.weight for layer in (module.to_q, module.to_k, module.to_v, module.to_out[0])]
    have = {id(p) for p in taken}
    rest = [p for p in (*vae.parameters(), *heads.parameters()) if id(p) not in have]
    return (
        Muon(taken, lr=MUON_LR, weight_decay=0.05),
        torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.99), weight_decay=0.0),
    )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Pixels `[B, 3, H, H]` in [-1, 1]. labels: kind => its part of the batch and its classes."""

    pixels: Tensor
    labels: dict[str, tuple[slice, Tensor]]


def batch(material: Material, step: int, size: int, *, seed: int) -> Batch:
    """A quarter shapes, the rest photographs (shapes alone without them), mirrored at random. Every `LARGE_EVERY`-th
    batch is of twice the side, a quarter as many images: photographs four in one, or one enlarged, without labels."""
    rng = numbers(seed, BATCHES, step)
    large = step % LARGE_EVERY == LARGE_EVERY - 1
    drawn, photographs = material.large_shapes if large else material.shapes, material.photographs
    n = max(2, size // 4) if large else size
    own = n if photographs is None else max(1, n // 4)
    chosen = rng.integers(0, len(drawn.labels), own)
    parts, labels = [drawn.images[chosen]], {"shapes": (slice(0, own), torch.from_numpy(drawn.labels[chosen]))}
    if photographs is not None:
        count = n - own
        picks = rng.integers(0, len(photographs.labels), 4 * count if large else count)
        images = photographs.images[picks]
        if large:
            parts.append(mosaic(images) if rng.random() < 0.5 else enlarged(images[:count]))
        else:
            parts.append(images)
            labels["photographs"] = (slice(own, n), torch.from_numpy(photographs.labels[picks]))
    images = np.concatenate(parts)
    mirrored = rng.random(len(images)) < 0.5
    images[mirrored] = images[mirrored, :, ::-1]
    return Batch(pixels=to_pixels(images), labels=labels)


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
def latent_std(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Standard deviation of drawn latents over all channels."""
    drawn = [
        posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(i))
        for i, posterior in enumerate(vae.encode(chunk).latent_dist for chunk in pixels.split(32))
    ]
    return torch.cat(drawn).std().item()


def train(
    material: Material,
    *,
    steps: int,
    size: int,
    seed: int,
    bfloat16: bool,
    out: Path,
    measure: Callable[[nn.Module], str],
) -> tuple[AutoencoderKL, float]:
    """Train for `steps` batches of `size` images. Returns the averaged network and the seconds that it took.

    bfloat16: autocast of both halves. measure: see `loop.run`.
    """
    torch.manual_seed(seed)
    vae = AutoencoderKL(**CONFIG)
    start_decoder(vae)
    solve_encoder(vae, batch(material, 0, FITTED_ON, seed=seed).pixels)
    heads = LevelTerm(vae, material.classes)
    parts = loop.Parts(
        network=vae, average=loop.averaged(vae), heads=heads, optimizers=(both := optimizers(vae, heads))
    )
    everything = [*vae.parameters(), *heads.parameters()]

    def update(step: int) -> dict[str, Tensor]:
        drawn = batch(material, step, size, seed=seed)
        images = drawn.pixels.contiguous(memory_format=torch.channels_last)
        noise = torch.randn(
            len(images),
            int(vae.config["latent_channels"]),
            *(side // 8 for side in images.shape[2:]),
            generator=torch.Generator().manual_seed(int(numbers(seed, NOISE, step).integers(1 << 62))),
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            posterior = vae.encode(images).latent_dist
            mean, log_variance = posterior.mean.float(), posterior.logvar.float()
            decoded = vae.decode(mean + (0.5 * log_variance).exp() * noise).sample.float()
        rebuilt = reconstruction_loss(images, decoded)
        told = heads(drawn.labels)
        loss = rebuilt + KL_WEIGHT * divergence(mean, log_variance)
        loss = loss + sum(LEVEL_WEIGHTS[name] * term for name, term in told.items())
        for parameter in everything:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(everything, 1.0)
        factor = loop.rate(step, steps)
        for optimizer, peak in zip(both, (MUON_LR, ADAM_LR), strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
            optimizer.step()
        return {"rebuilt": rebuilt, **told}

    settings = {
        "part": "vae",
        "steps": steps,
        "size": size,
        "seed": seed,
        "photographs": material.photographs is not None,
    }
    seconds = loop.run("vae", parts, update, steps=steps, settings=settings, out=out, measure=measure)
    return parts.average, seconds  # type: ignore[return-value]
