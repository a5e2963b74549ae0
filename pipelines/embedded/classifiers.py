"""The tiny ViT, whose tokens methods align with, and the judge, which no method sees. Both are trained with labels.

The ViT reads the class from the mean patch token, and each patch token must also tell the figure's coverage (shapes) and
the mean colour of its patch, so that tokens know both what an image shows and what they themselves show of it. The judge
is a residual network with other data order, other weights and no dense task; it reads the class from its pooled features.
Heads are thrown away.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pipelines.embedded.data import enlarged, numbers, to_pixels
from pipelines.embedded.vae import LARGE_EVERY, Material, update_average

VIT_CONFIG: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 16,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "num_classes": 0,
    "global_pool": "avg",
    "fc_norm": False,  # keep the final norm on the tokens themselves
    "dynamic_img_size": True,
}
JUDGE_CONFIG: dict[str, Any] = {"layers": [1, 1, 1, 1], "channels": [24, 48, 80, 128], "num_classes": 0}
DENSE_WEIGHT = 2.0


def build_vit() -> VisionTransformer:
    return VisionTransformer(**VIT_CONFIG)


def build_judge() -> ResNet:
    """Four stages of one basic block each; pooled features `[B, 128]`."""
    return ResNet(block=BasicBlock, **JUDGE_CONFIG)


def patch_means(images: Tensor, coverage: Tensor, patch: int) -> Tensor:
    """Dense targets `[B, N, 4]`: coverage in [0, 1] and mean RGB in [-1, 1] of each patch, row by row."""
    pooled = F.avg_pool2d(torch.cat([coverage, images], dim=1), patch)  # [B, 4, h, w]
    return pooled.flatten(2).transpose(1, 2)  # [B, N, 4]


@dataclass(frozen=True, kw_only=True)
class LabelledBatch:
    """Pixels `[B, 3, H, H]`: shapes first, then photographs. coverage: of the shapes `[S, 1, H, H]`."""

    pixels: Tensor
    coverage: Tensor
    shape_labels: Tensor
    photograph_labels: Tensor


def labelled_batch(material: Material, step: int, size: int, *, seed: int, purpose: int) -> LabelledBatch:
    """Half shapes, half photographs; every `LARGE_EVERY`-th batch at twice the side with a quarter of the images. Mirrored
    at random, photographs shifted by up to 8 pixels besides."""
    rng = numbers(seed, purpose, step)
    large = step % LARGE_EVERY == LARGE_EVERY - 1
    drawn = material.large_shapes if large else material.shapes
    n = max(2, size // 4) if large else size
    own = n if material.photographs is None else n // 2
    chosen = rng.integers(0, len(drawn.labels), own)
    images, coverage = drawn.images[chosen], drawn.coverage[chosen]
    mirrored = rng.random(own) < 0.5
    images[mirrored], coverage[mirrored] = images[mirrored, :, ::-1], coverage[mirrored, :, ::-1]
    pixels, photograph_labels = to_pixels(images), torch.zeros(0, dtype=torch.long)
    if material.photographs is not None:
        picks = rng.integers(0, len(material.photographs.labels), n - own)
        photographs = enlarged(material.photographs.images[picks]) if large else material.photographs.images[picks]
        shown = to_pixels(photographs)
        flipped = torch.from_numpy(rng.random(len(picks)) < 0.5)
        shown[flipped] = shown[flipped].flip(-1)
        padded = F.pad(shown, (8, 8, 8, 8), mode="reflect")
        H = shown.shape[-1]
        moves = rng.integers(0, 17, (len(picks), 2))
        shown = torch.stack([p[:, y : y + H, x : x + H] for p, (y, x) in zip(padded, moves, strict=True)])
        pixels = torch.cat([pixels, shown])
        photograph_labels = torch.from_numpy(material.photographs.labels[picks])
    return LabelledBatch(
        pixels=pixels,
        coverage=torch.from_numpy(np.ascontiguousarray(coverage)).float()[:, None] / 255,
        shape_labels=torch.from_numpy(drawn.labels[chosen]),
        photograph_labels=photograph_labels,
    )


class VitTask(nn.Module):
    """The ViT's training heads and its loss."""

    def __init__(self, vit: VisionTransformer, shapes: int, photographs: int) -> None:
        super().__init__()
        self.shapes, self.photographs = nn.Linear(vit.embed_dim, shapes), nn.Linear(vit.embed_dim, photographs)
        self.dense = nn.Linear(vit.embed_dim, 4)

    def forward(self, vit: VisionTransformer, batch: LabelledBatch) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = vit.forward_features(batch.pixels)[:, vit.num_prefix_tokens :]  # [B, N, D]
        own, mean = len(batch.shape_labels), tokens.mean(1)
        nothing = batch.coverage.new_zeros(len(mean) - own, 1, *batch.coverage.shape[2:])
        wanted = patch_means(batch.pixels, torch.cat([batch.coverage, nothing]), VIT_CONFIG["patch_size"])
        error = (self.dense(tokens) - wanted).square()
        dense = (error[:own].mean() * own + error[own:, :, 1:].sum() / 3 / wanted.shape[1]) / len(mean)
        return _class_loss(self, mean, batch, DENSE_WEIGHT * dense)


class JudgeTask(nn.Module):
    """The judge's training heads and its loss."""

    def __init__(self, judge: ResNet, shapes: int, photographs: int) -> None:
        super().__init__()
        self.shapes, self.photographs = nn.Linear(judge.num_features, shapes), nn.Linear(judge.num_features, photographs)

    def forward(self, judge: ResNet, batch: LabelledBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return _class_loss(self, judge(batch.pixels), batch, batch.pixels.new_zeros(()))


def _class_loss(task: Any, features: Tensor, batch: LabelledBatch, more: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    own = len(batch.shape_labels)
    told = {"shapes": F.cross_entropy(task.shapes(features[:own]), batch.shape_labels)}
    if len(batch.photograph_labels):
        told["photographs"] = F.cross_entropy(
            task.photographs(features[own:]), batch.photograph_labels, label_smoothing=0.1
        )
    return sum(told.values(), more), told | {"dense": more}


def train(
    material: Material,
    network: nn.Module,
    task: nn.Module,
    *,
    name: str,
    steps: int,
    size: int,
    peak_lr: float,
    seed: int,
    purpose: int,
    out: Path,
    measure: Callable[[nn.Module], str],
) -> nn.Module:
    """Train ``network`` with ``task``'s loss; returns the averaged weights. Continues from `out/<name>-state.pt`."""
    average = copy.deepcopy(network).eval().requires_grad_(False)
    parameters = [*network.parameters(), *task.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, weight_decay=0.05)
    state, first = out / f"{name}-state.pt", 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        first = int(saved["step"])
        for module, values in zip((network, task, average), saved["modules"], strict=True):
            module.load_state_dict(values)
        optimizer.load_state_dict(saved["optimizer"])
    began = time.monotonic()
    network.train()
    for step in range(first, steps):
        batch = labelled_batch(material, step, size, seed=seed, purpose=purpose)
        loss, told = task(network, batch)
        fraction = step / steps
        rate = peak_lr * min(1.0, fraction / 0.02 + 0.01) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fraction)))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        update_average(average, network, step)
        for kept, now in zip(average.buffers(), network.buffers(), strict=True):
            kept.copy_(now)
        if (step + 1) % 500 == 0:
            shown = ", ".join(f"{kind} {value.item():.4f}" for kind, value in told.items())
            print(f"{name} step {step + 1}: {shown}; {measure(average)}; {time.monotonic() - began:.0f} s", flush=True)
            partial = state.with_suffix(".partial")
            modules = [m.state_dict() for m in (network, task, average)]
            torch.save({"step": step + 1, "modules": modules, "optimizer": optimizer.state_dict()}, partial)
            partial.replace(state)
    return average
