"""The images that the embedded encoders learn from: shapes, and photographs where a folder of them is given.

Which images make batch k of a purpose is a function of (seed, purpose, k) alone. Shapes are drawn from sets whose seeds
are far from the ones that users pick; photographs come from zips of 64 px JPEGs, one folder per class (the layout of
`train-*.zip` and `val.zip` of Tiny ImageNet).
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from featcache.errors import UserError
from featcache.sources import shapes

# Seeds of the sets of shapes: what they draw stays unseen in tests, demos and experiments.
TRAIN_SET, HELD_OUT_SET = 731_001, 731_002
SIDE = 64
LARGE_EVERY = 6  # every n-th batch holds a quarter as many images of twice the side
SHAPES, LARGE_SHAPES = 16_384, 2_048  # drawn once; every further visit mirrors half of them


@dataclass(frozen=True, kw_only=True)
class Photographs:
    """Photographs of one split: uint8 `[N, 64, 64, 3]`, labels `[N]`, names of the classes."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]


def read_photographs(files: Sequence[Path], *, limit: int | None = None) -> Photographs:
    """Every JPEG of the zips `files`, sorted by name. Raises `UserError` for a zip without images of 64 px."""
    images, names = [], []
    for file in files:
        with zipfile.ZipFile(file) as archive:
            members = sorted(name for name in archive.namelist() if name.lower().endswith((".jpeg", ".jpg")))
            for name in members[:limit]:
                with Image.open(io.BytesIO(archive.read(name)), formats=["JPEG"]) as image:
                    pixels = np.asarray(image.convert("RGB"))
                if pixels.shape != (SIDE, SIDE, 3):
                    raise UserError(f"{file}: {name} is not of {SIDE} x {SIDE} pixels")
                images.append(pixels)
                names.append(name.split("/")[0])
    if not images:
        raise UserError(f"{', '.join(map(str, files)) or 'the folder'} holds no JPEGs")
    classes = tuple(sorted(set(names)))
    number = {name: i for i, name in enumerate(classes)}
    return Photographs(images=np.stack(images), labels=np.array([number[n] for n in names]), classes=classes)


def split_of(folder: Path, split: str) -> list[Path]:
    """The zips of `train` or `val` in a folder; raises `UserError` if there are none."""
    found = sorted(folder.glob(f"{split}*.zip"))
    if not found:
        raise UserError(f"{folder} holds no {split}*.zip", remedy="Leave --data out to train on shapes alone.")
    return found


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A set of shapes drawn once: RGB uint8 `[N, H, H, 3]`, coverage in [0, 1] as uint8 `[N, H, H]`, labels `[N]`."""

    images: NDArray[np.uint8]
    coverage: NDArray[np.uint8]
    labels: NDArray[np.int64]


def draw_shapes(count: int, *, image_set: int, resolution: int = SIDE, first: int = 0) -> Drawn:
    """Images first ... first + count - 1 of a set."""
    images = np.empty((count, resolution, resolution, 3), np.uint8)
    coverage = np.empty((count, resolution, resolution), np.uint8)
    labels = np.empty(count, np.int64)
    for i in range(count):
        image, cover, labels[i] = shapes.render_layers(first + i, seed=image_set, resolution=resolution)
        images[i], coverage[i] = np.round(image * 255), np.round(cover * 255)
    return Drawn(images=images, coverage=coverage, labels=labels)


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a training draws from: shapes of 64 and of 128 px, photographs of 64 px or None."""

    shapes: Drawn
    large_shapes: Drawn
    photographs: Photographs | None

    @property
    def classes(self) -> dict[str, int]:
        """Kind => number of its classes."""
        known = {"shapes": len(shapes.CLASS_NAMES)}
        return known if self.photographs is None else known | {"photographs": len(self.photographs.classes)}


def numbers(seed: int, purpose: int, step: int) -> np.random.Generator:
    """Random numbers of one step of one purpose."""
    return np.random.default_rng([seed, purpose, step])


def to_pixels(images: NDArray[np.uint8]) -> Tensor:
    """uint8 `[B, H, W, 3]` => `[B, 3, H, W]` in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 127.5 - 1


def mosaic(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Four images as quarters of one twice as large: `[4 B, H, H, 3]` => `[B, 2 H, 2 H, 3]`."""
    B, H = len(images) // 4, images.shape[1]
    quarters = images.reshape(B, 2, 2, H, H, 3)
    return quarters.transpose(0, 1, 3, 2, 4, 5).reshape(B, 2 * H, 2 * H, 3)


def enlarged(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Twice the side, bicubic: `[B, H, H, 3]` => `[B, 2 H, 2 H, 3]`."""
    large = F.interpolate(to_pixels(images), scale_factor=2, mode="bicubic", align_corners=False)
    return ((large.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
