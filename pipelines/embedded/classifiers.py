"""The tiny ViT, whose tokens methods align with, and the judge, which no method sees. Both are trained with labels.

The ViT reads the class from the mean patch token, and each patch token must also tell the figure's coverage (shapes) and
the mean colour of its patch, so that tokens know both what an image shows and what they themselves show of it. The judge
is a residual network with other data order, other weights and no dense task; it reads the class from its pooled features.
Heads are thrown away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pipelines.embedded import loop
from pipelines.embedded.data import LARGE_EVERY, Material, enlarged, numbers, to_pixels

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
    return ResNet(block=BasicBlock, **JUDGE_CONFIG)  # type: ignore[arg-type]  # timm's annotation is of an instance


def patch_means(images: Tensor, coverage: Tensor, patch: int) -> Tensor:
    """Dense targets `[B, N, 4]`: coverage in [0, 1] and mean RGB in [-1, 1] of each patch, row by row."""
    pooled = F.avg_pool2d(torch.cat([coverage, images], dim=1), patch)  # [B, 4, h, w]
    return pooled.flatten(2).transpose(1, 2)  # [B, N, 4]


@dataclass(frozen=True, kw_only=True)
class LabelledBatch:
    """Pixels `[B, 3, H, H]`: shapes first, then photographs. coverage: of the shapes `[S, 1, H, H]`. labels: kind => its
    part of the batch and its classes."""

    pixels: Tensor
    coverage: Tensor
    labels: dict[str, tuple[slice, Tensor]]


def labelled_batch(material: Material, step: int, size: int, *, seed: int, purpose: int) -> LabelledBatch:
    """A quarter shapes, the rest photographs; every `LARGE_EVERY`-th batch at twice the side with a quarter of the images. Mirrored
    at random, photographs shifted by up to 8 pixels besides."""
    rng = numbers(seed, purpose, step)
    large = step % LARGE_EVERY == LARGE_EVERY - 1
    drawn = material.large_shapes if large else material.shapes
    n = max(2, size // 4) if large else size
    own = n if material.photographs is None else max(1, n // 4)
    chosen = rng.integers(0, len(drawn.labels), own)
    images, coverage = drawn.images[chosen], drawn.coverage[chosen]
    mirrored = rng.random(own) < 0.5
    images[mirrored], coverage[mirrored] = images[mirrored, :, ::-1], coverage[mirrored, :, ::-1]
    pixels, labels = to_pixels(images), {"shapes": (slice(0, own), torch.from_numpy(drawn.labels[chosen]))}
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
        labels["photographs"] = (slice(own, n), torch.from_numpy(material.photographs.labels[picks]))
    return LabelledBatch(
        pixels=pixels,
        coverage=torch.from_numpy(np.ascontiguousarray(coverage)).float()[:, None] / 255,
        labels=labels,
    )


class Heads(nn.Module):
    """What is thrown away after training: a linear head for each kind of class, and for the ViT one that reads its patch
    from each token. Called with a network and a batch, it gives the loss and its terms."""

    def __init__(self, width: int, classes: Mapping[str, int], *, dense: bool) -> None:
        super().__init__()
        self.classes = nn.ModuleDict({kind: nn.Linear(width, count) for kind, count in classes.items()})
        self.dense = nn.Linear(width, 4) if dense else None

    def forward(self, network: Any, batch: LabelledBatch) -> tuple[Tensor, dict[str, Tensor]]:
        told: dict[str, Tensor] = {}
        if self.dense is None:
            features = network(batch.pixels)
        else:
            tokens = network.forward_features(batch.pixels)[:, network.num_prefix_tokens :]  # [B, N, D]
            features = tokens.mean(1)
            told["dense"] = self._dense_error(self.dense(tokens), batch)
        for kind, (part, known) in batch.labels.items():
            smoothing = 0.1 if kind == "photographs" else 0.0
            told[kind] = F.cross_entropy(self.classes[kind](features[part]), known, label_smoothing=smoothing)
        return sum(told.values(), torch.zeros(())) + (DENSE_WEIGHT - 1) * told.get("dense", torch.zeros(())), told

    @staticmethod
    def _dense_error(read: Tensor, batch: LabelledBatch) -> Tensor:
        """Mean squared error per image; photographs have no coverage, so there only colour counts."""
        own = len(batch.coverage)
        nothing = batch.coverage.new_zeros(len(read) - own, 1, *batch.coverage.shape[2:])
        wanted = patch_means(batch.pixels, torch.cat([batch.coverage, nothing]), VIT_CONFIG["patch_size"])
        error = (read - wanted).square().mean(1)  # [B, 4]
        return (error[:own].mean(1).sum() + error[own:, 1:].mean(1).sum()) / len(read)


def train(
    material: Material,
    network: nn.Module,
    heads: nn.Module,
    *,
    name: str,
    steps: int,
    size: int,
    peak_lr: float,
    seed: int,
    purpose: int,
    out: Path,
) -> tuple[nn.Module, float]:
    """Train `network` with the loss that `heads` say; returns the averaged network and the seconds that it took."""
    parameters = [*network.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, weight_decay=0.05)
    parts = loop.Parts(network=network, average=loop.averaged(network), heads=heads, optimizers=(optimizer,))

    def update(step: int) -> dict[str, Tensor]:
        told: dict[str, Tensor]
        loss, told = heads(network, labelled_batch(material, step, size, seed=seed, purpose=purpose))
        optimizer.param_groups[0]["lr"] = peak_lr * loop.rate(step, steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return told

    settings = {
        "part": name,
        "steps": steps,
        "size": size,
        "seed": seed,
        "photographs": material.photographs is not None,
    }
    seconds = loop.run(name, parts, update, steps=steps, settings=settings, out=out)
    return parts.average, seconds
