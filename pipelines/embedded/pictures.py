"""Draws the pictures of `docs/embedded.md`: contact sheets of the two sets, and reconstructions by the tiny VAE.

    python -m pipelines.embedded.pictures --out docs/images

The photographs are scikit-image's, which are free to share (NASA's astronaut is in the public domain, the others CC0) and
which no training has seen.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw

from featcache.encoders import tiny
from featcache.fonts import font_of
from featcache.sources import shapes, shapes_text
from featcache.sources.pixels import center_crop
from featcache.sources.shapes_text import Part
from pipelines.embedded.data import to_pixels

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
CAPTIONED, COLUMNS = {Part.seen: 10, Part.held_out: 5}, 5
CELL, LETTERS = (136, 176), 10  # width and height of a picture with its caption, size of its letters
UNSEEN_SET = 5  # not the set that the encoders were trained on


def _by_class(per_class: int, resolution: int) -> np.ndarray:
    """The first images of each class, `[classes, per_class, H, W, 3]` uint8."""
    images, labels = shapes.render_batch(
        range(per_class * len(shapes.CLASS_NAMES)), seed=UNSEEN_SET, resolution=resolution
    )
    # Every aligned block of ten holds each class once, so a stable sort gives equal groups.
    return images[np.argsort(labels, kind="stable")].reshape(-1, per_class, resolution, resolution, 3)


def _sheet(rows: np.ndarray) -> Image.Image:
    """Images `[rows, columns, H, W, 3]` side by side."""
    R, C, H, W, _ = rows.shape
    return Image.fromarray(rows.transpose(0, 2, 1, 3, 4).reshape(R * H, C * W, 3))


def contact_sheet(*, per_class: int = 4, resolution: int = 64) -> Image.Image:
    """One column per class."""
    return _sheet(_by_class(per_class, resolution).swapaxes(0, 1))


def captioned_sheet(*, resolution: int = 128) -> Image.Image:
    """Pictures of `shapes-text` with one of their captions below each; the last row is of held-out combinations."""
    shown = [(part, i) for part, count in CAPTIONED.items() for i in range(count)]
    width, height = CELL
    sheet = Image.new("RGB", (COLUMNS * width, -(-len(shown) // COLUMNS) * height), "white")
    pen, font = ImageDraw.Draw(sheet), font_of("", LETTERS)
    for at, (part, i) in enumerate(shown):
        x, y = at % COLUMNS * width, at // COLUMNS * height
        image, _ = shapes_text.render(i, part=part, seed=UNSEEN_SET, resolution=resolution)
        text = shapes_text.captions_of(i, part=part, seed=UNSEEN_SET)[0]
        sheet.paste(Image.fromarray(image), (x + (width - resolution) // 2, y))
        pen.multiline_text(
            (x + width // 2, y + resolution + 4),
            "\n".join(textwrap.wrap(text, 24)),
            "black",
            font,
            "ma",
            align="center",
        )
    return sheet


def photographs(resolution: int = 128) -> np.ndarray:
    """The photographs in `PHOTOGRAPHS`, cropped as a build crops them, `[N, H, W, 3]` uint8."""
    import skimage.data

    images = [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOGRAPHS]
    return np.stack([center_crop(image, resolution) for image in images])


def reconstructions(originals: np.ndarray) -> Image.Image:
    """Images `[N, H, W, 3]` above the same through the VAE."""
    vae = tiny.load_tiny_vae()
    with torch.no_grad():
        decoded = vae.decode(vae.encode(to_pixels(originals)).latent_dist.mode()).sample.clamp(-1, 1)
    restored = ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return _sheet(np.stack([originals, restored]))


def main(out: Annotated[Path, typer.Option(help="Folder for the PNG files.")]) -> None:
    """Write `shapes.png`, `shapes-text.png`, `reconstructions.png` and `photographs.png`."""
    out.mkdir(parents=True, exist_ok=True)
    contact_sheet().save(out / "shapes.png", optimize=True)
    captioned_sheet().save(out / "shapes-text.png", optimize=True)
    reconstructions(_by_class(1, 64)[:, 0]).save(out / "reconstructions.png", optimize=True)
    reconstructions(photographs()).save(out / "photographs.png", optimize=True)


if __name__ == "__main__":
    typer.run(main)
