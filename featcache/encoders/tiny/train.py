"""Trains the tiny VAE and the tiny ViT from scratch on procedural shapes, and measures them.

    python -m featcache.encoders.tiny.train --out DIR

writes `vae.safetensors`, `vae.json`, `vit.safetensors`, `vit.json` and `figures.json` to DIR. The committed
files are the output of this script with its defaults. Every image and every noise draw is a function of
(seed, purpose, step); sums still depend on the machine and its thread count, so a retrained file agrees in
quality, not in its bytes.

VAE: see `vae_loss`; images of 64 px and, at every `LARGE_EVERY`th step, of 128 px. What lets it converge
within some ten thousand images is its start (`start_as_resampler`) and Muon for every weight matrix.

ViT: trained with labels. The class is read from the mean patch token, and each patch token must also tell the
figure's coverage and the mean colour of its patch, so that tokens know both what the image shows and what
they themselves show of it. Those heads are thrown away.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from featcache.encoders import tiny
from featcache.machine import cpu_name
from featcache.sources import shapes
from featcache.store import files

VAE_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 64],
    "layers_per_block": 2,
    "latent_channels": 8,
    "norm_num_groups": 8,
    "sample_size": 64,
}
VIT_CONFIG: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 16,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 3,
    "mlp_ratio": 2.0,
    "num_classes": 0,
    "global_pool": "avg",
    "fc_norm": False,  # keep the final norm on the tokens themselves
    "dynamic_img_size": True,
}

# Seeds of image sets, far from the small ones that users and tests pick: what they draw stays unseen here.
TRAIN_SET, HELD_OUT_SET = 731_001, 731_002

# Every n-th batch holds a quarter as many images of twice the side: the same pixels, hence the same cost.
LARGE_EVERY = 8
EDGE_WEIGHT = 0.5
BLUR_WEIGHT = 4.0
KL_WEIGHT = 2e-3
DENSE_WEIGHT = 2.0

# Purposes of the random streams.
_WEIGHTS, _POSTERIOR = 0, 1


class Part(StrEnum):
    vae = "vae"
    vit = "vit"
    both = "both"


def _generator(seed: int, purpose: int, step: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, purpose, step]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


def _seed_initial_weights(seed: int) -> None:
    # Module constructors draw from the global generator; this is the one place where it is set.
    torch.manual_seed(_generator(seed, _WEIGHTS, 0).initial_seed())


def _images(indices: range, *, image_set: int, resolution: int) -> tuple[Tensor, Tensor, Tensor]:
    """RGB `[B, 3, H, W]` in [-1, 1], coverage `[B, 1, H, W]` in [0, 1], labels `[B]`."""
    layers = [shapes.render_layers(i, seed=image_set, resolution=resolution) for i in indices]
    images = torch.from_numpy(np.stack([image for image, _, _ in layers])).permute(0, 3, 1, 2)
    coverage = torch.from_numpy(np.stack([cover for _, cover, _ in layers]))[:, None]
    labels = torch.tensor([label for _, _, label in layers])
    # Through 8 bits, as every stored image goes.
    return (images * 255).round() / 127.5 - 1, coverage, labels


def _batch(step: int, batch_size: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    large = step % LARGE_EVERY == LARGE_EVERY - 1
    n = max(batch_size // 4, 1) if large else batch_size
    first = step * batch_size
    return _images(range(first, first + n), image_set=TRAIN_SET + 2 * seed, resolution=128 if large else 64)


def _held_out(n: int, resolution: int, *, chunk: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    for first in range(0, n, chunk):
        images, _, labels = _images(range(first, min(first + chunk, n)), image_set=HELD_OUT_SET, resolution=resolution)
        yield images, labels


def _learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine to 1 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, step: int) -> None:
    # The short memory at the start keeps the untrained weights out of the average.
    decay = min(0.998, (1 + step) / (10 + step))
    for a, p in zip(average.parameters(), model.parameters(), strict=True):
        a.lerp_(p, 1 - decay)


def _save(module: nn.Module, config: dict[str, Any], name: str, out: Path) -> None:
    half = {key: value.detach().cpu().half().contiguous() for key, value in module.state_dict().items()}
    files.atomic_write(out / f"{name}.safetensors", [save(half)])
    (out / f"{name}.json").write_text(json.dumps(config, indent=2) + "\n")


def vae_loss(images: Tensor, decoded: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Our recipe; images and decoded `[B, 3, H, W]` in [-1, 1], moments `[B, C, H/8, W/8]`.

    L1 of pixels, + `EDGE_WEIGHT` L1 of finite differences (sharp outlines), + `BLUR_WEIGHT` squared error
    after 4x4 and after 8x8 box blurs (colours: a first attempt without it was still grey after some 350 steps),
    + `KL_WEIGHT` mean KL to N(0, 1).
    """
    error = decoded - images
    blurred = sum(F.avg_pool2d(error, side).square().mean() for side in (4, 8))
    pixels = error.abs().mean()
    edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return pixels + EDGE_WEIGHT * edges + BLUR_WEIGHT * blurred + KL_WEIGHT * kl


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, *, resolution: int, n: int) -> Tensor:
    """PSNR in dB `[n]` of each of the first `n` held-out images, decoded from the posterior mean.

    Pixels are clipped to their range, which is also the peak.
    """
    device = next(vae.parameters()).device
    values = []
    for images, _ in _held_out(n, resolution):
        images = images.to(device)
        decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
        squared = ((decoded - images) / 2).square().flatten(1).mean(1)  # [B]
        values.append(-10 * torch.log10(squared))
    return torch.cat(values)


@torch.no_grad()
def _latent_std(vae: AutoencoderKL, *, seed: int, n: int = 512) -> float:
    device = next(vae.parameters()).device
    latents = []
    for chunk, first in enumerate(range(0, n, 32)):
        images, _, _ = _images(range(first, first + 32), image_set=TRAIN_SET + 2 * seed, resolution=64)
        posterior = vae.encode(images.to(device)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=_generator(seed, _POSTERIOR, 1_000_000_000 + chunk))
        latents.append((posterior.mean + posterior.std * noise.to(device)).flatten())
    return torch.cat(latents).std().item()


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


@torch.no_grad()
def start_as_resampler(vae: AutoencoderKL) -> None:
    """Initialise so that both halves begin as plain resampling networks (our choice).

    Residual branches end in zeros, shortcuts are orthogonal, downsampling averages 2x2 and upsampling repeats (both
    plus a little noise to break symmetry), and the posterior starts narrow. Colours and positions then get through from
    the first step, where the default start spends most of a CPU's budget on finding them.
    """
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            _zero(module.conv2)
            if module.conv_shortcut is not None:
                weight = module.conv_shortcut.weight
                _zero(module.conv_shortcut)
                nn.init.orthogonal_(weight)
        elif isinstance(module, Downsample2D | Upsample2D):
            assert isinstance(module.conv, nn.Conv2d)
            weight = module.conv.weight
            _zero(module.conv)
            nn.init.dirac_(weight)
            if isinstance(module, Downsample2D):
                # The input is padded by one at the right and bottom: taps 0 and 1 cover a 2x2 block.
                weight[:, :, :2, :2] = weight[:, :, 1:2, 1:2].clone() / 4
            weight += 0.02 * torch.randn_like(weight)
        elif isinstance(module, Attention):
            _zero(module.to_out[0])
    assert vae.quant_conv is not None and vae.quant_conv.bias is not None
    vae.quant_conv.bias[vae.config["latent_channels"] :] = -6.0


class _Optimizer:
    """Muon for weights of two and more axes, taken as matrices [out, rest]; AdamW for biases and norms."""

    def __init__(self, module: nn.Module, *, muon_lr: float, adam_lr: float) -> None:
        self._weights = [p for p in module.parameters() if p.ndim >= 2]
        # Views on the same storage: `torch.optim.Muon` takes matrices only.
        self._matrices = [nn.Parameter(p.detach().view(p.shape[0], -1)) for p in self._weights]
        vectors = [p for p in module.parameters() if p.ndim < 2]
        self._peaks = (muon_lr, adam_lr)
        self._optimizers = (
            torch.optim.Muon(self._matrices, lr=muon_lr, weight_decay=0.01),
            torch.optim.AdamW(vectors, lr=adam_lr, betas=(0.9, 0.99), weight_decay=0.0),
        )
        self._module = module

    def step(self, loss: Tensor, step: int, steps: int) -> None:
        self._module.zero_grad()
        loss.backward()
        for weight, matrix in zip(self._weights, self._matrices, strict=True):
            assert weight.grad is not None
            matrix.grad = weight.grad.reshape(matrix.shape)
        for optimizer, peak in zip(self._optimizers, self._peaks, strict=True):
            optimizer.param_groups[0]["lr"] = _learning_rate(step, steps, peak)
            optimizer.step()


def train_vae(
    *, steps: int, batch_size: int, peak_lr: float, seed: int, device: str, out: Path, progress: Progress
) -> dict[str, Any]:
    """Train, save `vae.safetensors` and `vae.json`, and return the measured figures."""
    _seed_initial_weights(seed)
    vae = AutoencoderKL(**VAE_CONFIG)
    start_as_resampler(vae)
    vae.to(device)
    average = copy.deepcopy(vae).eval().requires_grad_(False)
    optimizer = _Optimizer(vae, muon_lr=peak_lr, adam_lr=1e-3)
    task = progress.add_task("tiny VAE", total=steps, note="")
    started = saved = time.monotonic()
    for step in range(steps):
        images = _batch(step, batch_size, seed=seed)[0].to(device, memory_format=torch.channels_last)
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=_generator(seed, _POSTERIOR, step)).to(device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        loss = vae_loss(images, decoded, posterior.mean, posterior.logvar)
        optimizer.step(loss, step, steps)
        _update_average(average, vae, step)
        progress.advance(task)
        if (step + 1) % 100 == 0:
            psnr = reconstruction_psnr(average, resolution=64, n=32).mean().item()
            note = f"loss {loss.item():.4f}, held-out PSNR {psnr:.2f} dB"
            progress.update(task, note=note)
            progress.console.print(f"VAE step {step + 1}: {note}, {time.monotonic() - started:.0f} s")
        if time.monotonic() - saved > 120:  # an interrupted run leaves usable weights behind
            _save_vae(average, seed=seed, out=out)
            saved = time.monotonic()
    seconds = time.monotonic() - started
    _save_vae(average, seed=seed, out=out)

    stored = tiny.load_tiny_vae(folder=out)
    nn.Module.to(stored, device)
    figures: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "peak_lr": peak_lr}
    for resolution, n in ((64, 1024), (128, 256)):
        per_image = reconstruction_psnr(stored, resolution=resolution, n=n)
        figures[f"psnr_{resolution}px_db"] = round(per_image.mean().item(), 2)
        figures[f"psnr_{resolution}px_lowest_db"] = round(per_image.min().item(), 2)
        figures[f"psnr_{resolution}px_images"] = n
    figures["scaling_factor"] = stored.config["scaling_factor"]
    return figures | {
        "parameters": sum(p.numel() for p in stored.parameters()),
        "train_seconds": round(seconds),
    }


def _save_vae(average: AutoencoderKL, *, seed: int, out: Path) -> None:
    scaling_factor = round(1 / _latent_std(average, seed=seed), 5)
    _save(average, VAE_CONFIG | {"scaling_factor": scaling_factor}, "vae", out)


class _Heads(nn.Module):
    """Training heads of the ViT: class from the mean patch token; coverage and colour from each token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.label = nn.Linear(width, len(shapes.CLASS_NAMES))
        self.dense = nn.Linear(width, 4)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.label(tokens.mean(1)), self.dense(tokens)


def patch_means(images: Tensor, coverage: Tensor, patch: int) -> Tensor:
    """Dense targets `[B, N, 4]`: coverage in [0, 1] and mean RGB in [-1, 1] of each patch, row by row."""
    pooled = F.avg_pool2d(torch.cat([coverage, images], dim=1), patch)  # [B, 4, h, w]
    return pooled.flatten(2).transpose(1, 2)  # [B, N, 4]


@torch.no_grad()
def mean_patch_tokens(vit: VisionTransformer, *, first: int, n: int, resolution: int) -> tuple[Tensor, Tensor]:
    """Mean patch tokens `[n, D]` and labels `[n]` of held-out images first ... first + n - 1."""
    device = next(vit.parameters()).device
    features, labels = [], []
    for start in range(first, first + n, 64):
        chunk = range(start, min(start + 64, first + n))
        images, _, label = _images(chunk, image_set=HELD_OUT_SET, resolution=resolution)
        tokens = vit.forward_features(images.to(device))[:, vit.num_prefix_tokens :]
        features.append(tokens.mean(1).cpu())
        labels.append(label)
    return torch.cat(features), torch.cat(labels)


def token_quality(vit: VisionTransformer, *, n: int = 1000, resolution: int = 64) -> dict[str, float]:
    """Accuracies of 10-nearest-neighbour (cosine) and linear classifiers on mean patch tokens.

    Both are fitted on `n` held-out images and tested on the next `n`. The linear one is ridge regression to
    one-hot labels on standardised features, in closed form.
    """
    known, known_labels = mean_patch_tokens(vit, first=0, n=n, resolution=resolution)
    asked, asked_labels = mean_patch_tokens(vit, first=n, n=n, resolution=resolution)
    mean, std = known.mean(0), known.std(0) + 1e-6
    known, asked = (known - mean) / std, (asked - mean) / std

    similarity = F.normalize(asked, dim=1) @ F.normalize(known, dim=1).T
    votes = F.one_hot(known_labels[similarity.topk(10, dim=1).indices], len(shapes.CLASS_NAMES)).sum(1)
    knn = (votes.argmax(1) == asked_labels).float().mean().item()

    design, queries = (F.pad(t, (0, 1), value=1.0).double() for t in (known, asked))
    targets = F.one_hot(known_labels, len(shapes.CLASS_NAMES)).double()
    ridge = 1e-2 * n * torch.eye(design.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(design.T @ design + ridge, design.T @ targets)
    linear = ((queries @ weights).argmax(1) == asked_labels).float().mean().item()
    return {"knn_accuracy": round(knn, 4), "linear_accuracy": round(linear, 4)}


def train_vit(
    *, steps: int, batch_size: int, peak_lr: float, seed: int, device: str, out: Path, progress: Progress
) -> dict[str, Any]:
    """Train, save `vit.safetensors` and `vit.json`, and return the measured figures."""
    _seed_initial_weights(seed)
    vit = VisionTransformer(**VIT_CONFIG).to(device)
    untrained = token_quality(vit.eval())
    vit.train()
    heads = _Heads(vit.embed_dim).to(device)
    average = copy.deepcopy(vit).eval().requires_grad_(False)
    parameters = [*vit.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, weight_decay=0.05)
    task = progress.add_task("tiny ViT", total=steps, note="")
    started = saved = time.monotonic()
    for step in range(steps):
        images, coverage, labels = (t.to(device) for t in _batch(step, batch_size, seed=seed))
        tokens = vit.forward_features(images)[:, vit.num_prefix_tokens :]  # [B, N, D]
        logits, dense = heads(tokens)
        label_loss = F.cross_entropy(logits, labels)
        dense_loss = F.mse_loss(dense, patch_means(images, coverage, VIT_CONFIG["patch_size"]))
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, steps, peak_lr)
        optimizer.zero_grad()
        (label_loss + DENSE_WEIGHT * dense_loss).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        _update_average(average, vit, step)
        progress.advance(task)
        if (step + 1) % 250 == 0:
            note = f"class loss {label_loss.item():.4f}, dense loss {dense_loss.item():.5f}"
            progress.update(task, note=note)
            progress.console.print(f"ViT step {step + 1}: {note}, {time.monotonic() - started:.0f} s")
        if time.monotonic() - saved > 120:
            _save(average, VIT_CONFIG, "vit", out)
            saved = time.monotonic()
    seconds = time.monotonic() - started
    _save(average, VIT_CONFIG, "vit", out)

    stored = tiny.load_tiny_vit(folder=out).to(device)
    return {
        "steps": steps,
        "batch_size": batch_size,
        "peak_lr": peak_lr,
        "supervision": "class labels; coverage and mean colour of each patch",
        "trained_64px": token_quality(stored),
        "trained_128px": token_quality(stored, resolution=128),
        "untrained_64px": untrained,
        "parameters": sum(p.numel() for p in stored.parameters()),
        "train_seconds": round(seconds),
    }


def _circumstances(device: str, seed: int) -> dict[str, Any]:
    if device.startswith("cuda"):
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{cpu_name()}, {torch.get_num_threads()} thread(s)"
    return {
        "command": "python -m featcache.encoders.tiny.train " + shlex.join(sys.argv[1:]),
        "seed": seed,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine,
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "diffusers", "timm", "numpy")},
        },
    }


def main(
    out: Annotated[Path, typer.Option(help="Folder for weights, configs and figures.json.")],
    part: Annotated[Part, typer.Option(help="What to train.")] = Part.both,
    vae_steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of the VAE.")] = 4000,
    vit_steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of the ViT.")] = 4000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, images and noise.")] = 0,
    device: Annotated[str, typer.Option(help="Torch device, as in cpu or cuda.")] = "cpu",
) -> None:
    """Train the tiny VAE and ViT on procedural shapes; write weights and figures.json to --out."""
    out.mkdir(parents=True, exist_ok=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    jobs: dict[Part, Callable[[Progress], dict[str, Any]]] = {
        Part.vae: lambda p: train_vae(
            steps=vae_steps, batch_size=4, peak_lr=2e-2, seed=seed, device=device, out=out, progress=p
        ),
        Part.vit: lambda p: train_vit(
            steps=vit_steps, batch_size=64, peak_lr=1e-3, seed=seed, device=device, out=out, progress=p
        ),
    }
    console = Console()
    with Progress(*columns, console=console) as progress:
        for name, job in jobs.items():
            if part in (name, Part.both):
                figures = job(progress) | _circumstances(device, seed)
                _record(out / "figures.json", name.value, figures)
                console.print_json(data={name.value: figures})


def _record(path: Path, name: str, figures: dict[str, Any]) -> None:
    # Read as late as possible: the two parts may run side by side.
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | {name: figures}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
