"""Pictures of many images: samples, or real images, under the names of their classes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLUMNS, ROWS = 8, 16
GAP = 4
LEAST_SIDE = 96  # in pixels: smaller tiles are enlarged by a whole number, so that a name has room above them
TEXT_SIZE, LINE = 15, 22


def class_name(names: Sequence[str], label: int) -> str:
    """The name of a class; its number where there is none."""
    return names[label] if 0 <= label < len(names) and names[label] else str(label)


def spread(count: int, most: int) -> list[int]:
    """Up to `most` of the indices below `count`, spread evenly over all of them."""
    return [int(i) for i in np.linspace(0, count - 1, min(most, count)).round()]


def first_of_classes(labels: np.ndarray, *, columns: int = COLUMNS, rows: int = ROWS) -> dict[int, np.ndarray]:
    """The images to show of many: class -> the positions of its first images, in the order of classes.

    All of them where they fit into `rows` rows of `columns`. Else classes are spread evenly over those present; where
    each has few images, several share a row.

    Args:
        labels: int64 [n], not empty.
    """
    present, counts = np.unique(labels, return_counts=True)
    if counts.max() >= columns:
        most, each = rows, columns * max(1, rows // len(present))
    else:
        each = int(counts.max())
        most = rows * (columns // each)
    chosen = present[spread(len(present), most)]
    return {int(label): np.flatnonzero(labels == label)[:each] for label in chosen}


def class_picture(images: Mapping[int, np.ndarray], names: Sequence[str]) -> np.ndarray:
    """One picture of images by class, the class's name above the first of them: uint8 [H, W, 3].

    Classes follow each other like words in lines of `COLUMNS` tiles; a class that does not fit begins a line.

    Args:
        images: class -> uint8 [n, R, R, 3], n > 0, R the same for all.
    """
    side = next(iter(images.values())).shape[1]
    scale = -(-LEAST_SIDE // side)
    step = side * scale + GAP
    lines: list[list[tuple[int, int, np.ndarray]]] = []  # (column, class, tiles); the class is -1 where one goes on
    free = 0
    for label, tiles in images.items():
        for start in range(0, len(tiles), COLUMNS):
            part = tiles[start : start + COLUMNS]
            if start or len(part) > free:
                lines.append([])
                free = COLUMNS
            lines[-1].append((COLUMNS - free, -1 if start else label, part))
            free -= len(part)
    tops = np.cumsum([0, *(step + LINE * any(label >= 0 for _, label, _ in line) for line in lines)])
    width = max(column + len(tiles) for line in lines for column, _, tiles in line) * step - GAP
    sheet = Image.new("RGB", (width, int(tops[-1]) - GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for line, top, below in zip(lines, tops, tops[1:]):
        for column, label, tiles in line:
            if label >= 0:
                text = fitted(class_name(names, label), len(tiles) * step - 2 * GAP)
                draw.text((column * step, int(top)), text, fill="black", font=font())
            for i, tile in enumerate(tiles):
                large = tile.repeat(scale, axis=0).repeat(scale, axis=1)
                sheet.paste(Image.fromarray(large), ((column + i) * step, int(below) - step))
    return np.asarray(sheet)


def named_rows(rows: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """One picture of rows, each under its name: uint8 [n, H, W, 3] -> [n * (LINE + H), W, 3]."""
    n, height, width, _ = rows.shape
    sheet = Image.new("RGB", (width, n * (LINE + height)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        top = i * (LINE + height)
        draw.text((0, top), fitted(name, width), fill="black", font=font())
        sheet.paste(Image.fromarray(row), (0, top + LINE))
    return np.asarray(sheet)


def fitted(text: str, width: int) -> str:
    """`text`, cut off with an ellipsis where it is wider than `width` pixels."""
    text = " ".join(text.split())
    if font().getlength(text) <= width:
        return text
    while text and font().getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


@functools.cache
def font() -> ImageFont.FreeTypeFont:
    """Matplotlib's own, which knows Greek and Cyrillic letters; Pillow's does not."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", TEXT_SIZE)
