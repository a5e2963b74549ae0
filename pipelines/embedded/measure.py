"""The figures that stand in `figures.json`, taken from the stored (fp16) weights on images that no training saw."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from featcache.errors import UserError
from featcache.machine import describe_machine
from featcache.sources.pixels import center_crop
from pipelines.embedded import levels
from pipelines.embedded.data import HELD_OUT_SET, Drawn, Photographs, draw_shapes, read_photographs, split_of, to_pixels
from pipelines.embedded.vae import psnr

CHUNK = 50
PROBED = ("down2.downsample", "down3.res0", "down3.res1", "mid.res1")  # down3.res0 ends G3, mid.res1 ends G4


class HeldOut:
    """Images to measure on: shapes of a set of their own, photographs of the validation split, larger ones of a folder."""

    def __init__(self, *, data: Path | None, large: Path | None, quick: bool = False) -> None:
        n = 200 if quick else 2000
        self.shapes = draw_shapes(n, image_set=HELD_OUT_SET)
        self.large_shapes = draw_shapes(20 if quick else 256, image_set=HELD_OUT_SET, resolution=128)
        self.photographs: Photographs | None = None
        if data is not None:
            everything = read_photographs(split_of(data, "val"))
            order = np.random.default_rng(0).permutation(len(everything.labels))[: 400 if quick else None]
            self.photographs = Photographs(
                images=everything.images[order], labels=everything.labels[order], classes=everything.classes
            )
        self.large = None if large is None else read_folder(large, limit=10 if quick else None)

    def glance(self) -> dict[str, Tensor]:
        """A few images of each kind, for the lines of progress."""
        shown = {"shapes": to_pixels(self.shapes.images[:32])}
        return shown if self.photographs is None else shown | {"photographs": to_pixels(self.photographs.images[:32])}


def read_folder(folder: Path, *, side: int = 128, limit: int | None = None) -> NDArray[np.uint8]:
    """The JPEGs of a folder and its subfolders, cropped as a build crops them: uint8 `[N, side, side, 3]`."""
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in (".jpg", ".jpeg"))[:limit]
    if not files:
        raise UserError(f"{folder} holds no JPEGs")
    images = []
    for file in files:
        with Image.open(file) as image:
            images.append(center_crop(image.convert("RGB"), side))
    return np.stack(images)


def batches(images: NDArray[np.uint8]) -> Iterator[Tensor]:
    for first in range(0, len(images), CHUNK):
        yield to_pixels(images[first : first + CHUNK])


def vae_figures(vae: AutoencoderKL, held_out: HeldOut) -> dict[str, Any]:
    """PSNR, the levels, and what linear probes read from them."""
    sets = {"shapes, 64 px": held_out.shapes.images[:1000], "shapes, 128 px": held_out.large_shapes.images}
    if held_out.photographs is not None:
        sets["photographs, 64 px"] = held_out.photographs.images[:1000]
    if held_out.large is not None:
        sets["photographs, 128 px"] = held_out.large
    found: dict[str, Any] = {"psnr_db": {}, "levels": {}, "probes": {}}
    for name, images in sets.items():
        values = psnr(vae, batches(images))
        found["psnr_db"][name] = {
            "mean": round(values.mean().item(), 2),
            "lowest": round(values.min().item(), 2),
            "images": len(values),
        }
    known: dict[str, Drawn | Photographs] = {"shapes": held_out.shapes}
    if held_out.photographs is not None:
        known["photographs"] = held_out.photographs
    for name, part in known.items():
        figures = levels.table(vae, to_pixels(part.images[:100]), grid=8)
        found["levels"][name] = {
            layer: {figure: None if value is None else round(value, 4) for figure, value in row.items()}
            for layer, row in figures.items()
        }
        features = levels.pooled(vae, batches(part.images), PROBED)
        found["probes"][name] = {layer: round(_split_probe(f, part.labels), 4) for layer, f in features.items()}
    latents = torch.cat([levels.encode(vae, pixels).mean for pixels in batches(sets["shapes, 64 px"])])
    found["latent_std"] = [round(value, 3) for value in latents.std((0, 2, 3)).tolist()]
    return found | {"scaling_factor": vae.config["scaling_factor"], "parameters": _parameters(vae)}


def _split_probe(features: Tensor, labels: NDArray[np.int64]) -> float:
    half, known = len(features) // 2, torch.from_numpy(labels)
    return levels.linear_probe(features[:half], known[:half], features[half:], known[half:])


def nearest_neighbours(known: Tensor, known_labels: Tensor, asked: Tensor, asked_labels: Tensor, k: int = 10) -> float:
    """Accuracy of the vote of the `k` nearest by cosine, on standardised features `[N, D]`."""
    mean, std = known.mean(0), known.std(0) + 1e-6
    similarity = F.normalize((asked - mean) / std, dim=1) @ F.normalize((known - mean) / std, dim=1).T
    votes = F.one_hot(known_labels[similarity.topk(k, dim=1).indices]).sum(1)
    return (votes.argmax(1) == asked_labels).float().mean().item()


@torch.no_grad()
def classifier_figures(network: nn.Module, features: Callable[[Tensor], Tensor], held_out: HeldOut) -> dict[str, Any]:
    """What a linear probe and the nearest neighbours read from pooled features, fitted on one half of the held-out images
    and tested on the other."""
    found: dict[str, Any] = {}
    for name, part in (("shapes", held_out.shapes), ("photographs", held_out.photographs)):
        if part is None:
            continue
        values = torch.cat([features(pixels) for pixels in batches(part.images)])
        half, known = len(values) // 2, torch.from_numpy(part.labels)
        found[name] = {
            "linear": round(_split_probe(values, part.labels), 4),
            "neighbours": round(nearest_neighbours(values[:half], known[:half], values[half:], known[half:]), 4),
            "classes": len(set(part.labels.tolist())),
        }
    return found | {"parameters": _parameters(network)}


def _parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def circumstances(
    *, seed: int, steps: int, size: int, training_photographs: int, seconds: float, precision: str
) -> dict[str, Any]:
    """What a figure came from."""
    return {
        "command": "python -m pipelines.embedded " + shlex.join(_without_paths(sys.argv[1:])),
        "seed": seed,
        "steps": steps,
        "batch_size": size,
        "training_photographs": training_photographs,
        "precision": precision,
        "train_seconds": round(seconds),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine("torch", "diffusers", "timm", "numpy"),
    }


def _without_paths(words: list[str]) -> list[str]:
    """The command line with names for folders: where they lie is nobody's business."""
    names = {"--out": "DIR", "--data": "PHOTOGRAPHS", "--large": "LARGE"}
    return [names.get(before, word) for before, word in zip(["", *words], words)]
