"""Pictures of many images: samples, or real images, under the names of their classes or above their prompts."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from featcache.fonts import font_of

COLUMNS, ROWS = 8, 16
GAP = 4
LEAST_SIDE = 96  # in pixels: smaller tiles are enlarged by a whole number, so that a name has room above them
TEXT_SIZE, LINE = 15, 22
PROMPT_COLUMNS, PROMPT_ROWS = 6, 8
PROMPT_SIDE = 176  # in pixels, at least: tiles under which words have room
PROMPT_SIZE, PROMPT_LINE, PROMPT_LINES = 13, 17, 5
NAME_LINES = 3
ROW_NAMES, MAX_NAME = "featcache:rows", 1000


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
    """One picture of rows, each with its name under it: uint8 [n, R, C R, 3] -> [n * (S R + h), C S R, 3].

    Small tiles are enlarged S = `row_scale(R)` times. Long names take up to `NAME_LINES` lines, and all rows as many as the
    longest: h is the same for all.
    """
    scale = row_scale(rows.shape[1])
    rows = rows.repeat(scale, axis=1).repeat(scale, axis=2)
    n, height, width, _ = rows.shape
    wrapped = [wrap(name, width, lines=NAME_LINES) for name in names]
    step = height + PROMPT_LINE * max(1, *map(len, wrapped)) + GAP
    sheet = Image.new("RGB", (width, n * step), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (row, lines) in enumerate(zip(rows, wrapped, strict=True)):
        sheet.paste(Image.fromarray(row), (0, i * step))
        for number, line in enumerate(lines):
            at = 0, i * step + height + number * PROMPT_LINE
            draw.text(at, line, fill="black", font=font_of(line, PROMPT_SIZE))
    return np.asarray(sheet)


def row_scale(side: int) -> int:
    """How many times `named_rows` enlarges tiles of so many pixels, so that words below have room."""
    return -(-LEAST_SIDE // side)


def row_record(names: Sequence[str]) -> PngInfo:
    """What a PNG made by `named_rows` is to say of itself: the names as text, cut off after `MAX_NAME` characters."""
    record = PngInfo()
    record.add_itxt(ROW_NAMES, json.dumps([name[:MAX_NAME] for name in names]))
    return record


def row_names(picture: Image.Image) -> list[str]:
    """The names that `row_record` put into a PNG; none where it says nothing, or what cannot be."""
    try:
        found = json.loads(picture.info.get(ROW_NAMES, "[]"))
    except (TypeError, ValueError, RecursionError):
        return []
    fits = isinstance(found, list) and found and picture.height % len(found) == 0
    return [str(name)[:MAX_NAME] for name in found] if fits else []


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


def prompts_shown(num: int) -> list[int]:
    """Which of `num` samples a picture of prompts shows: the first ones."""
    return list(range(min(num, PROMPT_COLUMNS * PROMPT_ROWS)))


def prompt_picture(images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
    """Images in rows of `PROMPT_COLUMNS`, each with its prompt under it: uint8 [H, W, 3].

    Args:
        images: uint8 [R, R, 3], at least one, R the same for all. prompts: as many; long ones are cut off.
    """
    side = images[0].shape[1]
    scale = -(-PROMPT_SIDE // side)
    large = side * scale
    wrapped = [wrap(text, large, lines=PROMPT_LINES) for text in prompts]
    rows = [range(start, min(start + PROMPT_COLUMNS, len(images))) for start in range(0, len(images), PROMPT_COLUMNS)]
    heights = [large + PROMPT_LINE * max(len(wrapped[i]) for i in row) + 3 * GAP for row in rows]
    sheet = Image.new("RGB", (min(len(images), PROMPT_COLUMNS) * (large + GAP) - GAP, sum(heights) - 2 * GAP), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for row, height in zip(rows, heights):
        for column, i in enumerate(row):
            left = column * (large + GAP)
            sheet.paste(Image.fromarray(images[i].repeat(scale, axis=0).repeat(scale, axis=1)), (left, top))
            for line, text in enumerate(wrapped[i]):
                at = left, top + large + GAP // 2 + line * PROMPT_LINE
                draw.text(at, text, fill="black", font=font_of(text, PROMPT_SIZE))
        top += height
    return np.asarray(sheet)


def wrap(text: str, width: int, *, lines: int) -> list[str]:
    """`text` in at most `lines` lines of `width` pixels, broken between words where that is possible; the last ends in an
    ellipsis where something is left."""
    found: list[str] = []
    known = font_of(text, PROMPT_SIZE)
    rest = " ".join(_visible(text).split())
    while rest:
        fits = _fitting(rest, width, known)
        if fits < len(rest) and len(found) == lines - 1:
            return [*found, rest[: _fitting(rest, width - int(known.getlength("…")) - 1, known)].rstrip() + "…"]
        if fits < len(rest) and rest[fits] != " " and " " in rest[:fits]:
            fits = rest[:fits].rindex(" ")
        found.append(rest[:fits].rstrip())
        rest = rest[fits:].lstrip()
    return found


def _visible(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text[: 1 << 12])


def _fitting(text: str, width: int, known: ImageFont.FreeTypeFont) -> int:
    """How many characters of `text` fit into `width` pixels; at least one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if known.getlength(text[:middle]) <= width else (low, middle - 1)
    return low
