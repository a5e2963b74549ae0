"""A font for pictures: one that has the letters of a text, as far as this machine has any."""

from __future__ import annotations

import functools
from pathlib import Path

from PIL import ImageFont


def font_of(text: str, size: int) -> ImageFont.FreeTypeFont:
    """A font of `size` pixels that has all letters of `text`; where none has, DejaVu Sans (Latin, Greek, Cyrillic, ...)."""
    usual = _usual()
    path = usual if _letters(text) <= _characters(usual) else _found(_letters(text)) or usual
    return _opened(path, size)


def has_letters(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether a font of `font_of` has all letters of `text`."""
    return _letters(text) <= _characters(str(font.path))


def _letters(text: str) -> frozenset[int]:
    return frozenset(ord(character) for character in text if not character.isspace())


@functools.cache
def _usual() -> str:
    """That which matplotlib brings along."""
    import matplotlib  # late: it is asked only where a picture is drawn

    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@functools.cache
def _opened(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@functools.cache
def _found(letters: frozenset[int]) -> str | None:
    """The first of the machine's fonts, by name, that has them."""
    from matplotlib import font_manager

    return next((path for path in sorted(font_manager.findSystemFonts()) if letters <= _characters(path)), None)


@functools.lru_cache(maxsize=4096)
def _characters(path: str) -> frozenset[int]:
    """Code points that a font file has letters for; none where it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()
