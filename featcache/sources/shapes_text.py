"""The embedded set with captions: figures whose shape, texture, colour and background have names.

The figures, textures and grounds are those of `featcache.sources.shapes`, but here the four attributes vary apart from each
other, and captions name them: "a red striped triangle on a dark background". A sixth of their combinations is held out: it
never occurs in `shapes-text` and is all of `shapes-text:held-out`, so that whether a model combines what it has seen
apart can be told from whether it has seen the combination.

Image `i` of a part is a function of (part, seed, i, resolution) alone, its captions of (part, seed, i).
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from enum import StrEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from featcache.sources import shapes
from featcache.sources.pixels import content_hash

SHAPES: tuple[str, ...] = shapes.CLASS_NAMES
BACKGROUNDS: tuple[str, ...] = ("dark", "grey", "light")

# Purposes of the random streams, apart from those of `featcache.sources.shapes`.
_COMBINATION, _APPEARANCE, _WORDINGS = 2, 3, 4


class Part(StrEnum):
    """Which combinations of attributes a set shows."""

    seen = "seen"
    held_out = "held-out"


@dataclass(frozen=True, order=True)
class Attributes:
    """What a caption names: values of `ATTRIBUTES`, in its order."""

    shape: str
    texture: str
    colour: str
    background: str


@dataclass(frozen=True)
class _Tone:
    """A named colour in OKLCH, and the lightness of the second tone that patterns have: pale, or dark where only that is
    told from the first or from the ground."""

    lightness: float
    chroma: float
    hue_degrees: float
    pale: bool = True


_TONES: dict[str, _Tone] = {
    "red": _Tone(0.57, 0.21, 27),
    "orange": _Tone(0.74, 0.17, 58),
    "yellow": _Tone(0.89, 0.18, 103, pale=False),
    "green": _Tone(0.62, 0.19, 144),
    "blue": _Tone(0.52, 0.20, 262),
    "purple": _Tone(0.52, 0.21, 308),
}
COLOURS: tuple[str, ...] = tuple(_TONES)

# Lightness of the ground's two ends.
_GROUNDS: dict[str, tuple[float, float]] = {"dark": (0.20, 0.32), "grey": (0.56, 0.66), "light": (0.97, 0.89)}


def _diagonal(u: shapes.Float, v: shapes.Float, d: shapes.Float, phase: float) -> shapes.Float:
    """Stripes that also cross the bars of a cross and the shaft of an arrow, which lie level."""
    return shapes.stripes(u, (u + v) * np.float32(math.sqrt(0.5)), d, phase)


_TEXTURES: dict[str, shapes.Texture] = {
    "plain": shapes.plain,
    "striped": _diagonal,
    "spotted": shapes.dots,
    "checked": shapes.checks,
}
TEXTURES: tuple[str, ...] = tuple(_TEXTURES)

ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "texture": TEXTURES,
    "colour": COLOURS,
    "background": BACKGROUNDS,
}


@lru_cache(maxsize=1)
def _split() -> dict[Part, dict[str, tuple[Attributes, ...]]]:
    """Combinations of each part by shape. Of every shape's, the sixth with the smallest SHA-256 is held out."""
    parts: dict[Part, dict[str, tuple[Attributes, ...]]] = {part: {} for part in Part}
    for shape in SHAPES:
        all_of_shape = [Attributes(shape, *rest) for rest in itertools.product(TEXTURES, COLOURS, BACKGROUNDS)]
        ranked = sorted(all_of_shape, key=lambda a: hashlib.sha256(" ".join(astuple(a)).encode()).digest())
        held_out = len(ranked) // 6
        parts[Part.held_out][shape], parts[Part.seen][shape] = tuple(ranked[:held_out]), tuple(ranked[held_out:])
    return parts


def combinations(part: Part) -> tuple[Attributes, ...]:
    """All combinations that images of a part may show: 600 seen ones, 120 held out."""
    return tuple(itertools.chain.from_iterable(_split()[part].values()))


def _stream(purpose: int, part: Part, seed: int, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, purpose, list(Part).index(part), index])


def attributes_of(index: int, *, part: Part = Part.seen, seed: int = 0) -> Attributes:
    """Attributes of image `index`: shapes as `shapes.label_of`, each once in a block of ten; the rest uniform among the
    part's combinations of that shape.

    Raises `UserError` for a negative index.
    """
    known = _split()[part][SHAPES[shapes.label_of(index, seed=seed)]]
    return known[int(_stream(_COMBINATION, part, seed, index).integers(len(known)))]


def draw(attributes: Attributes, numbers: NDArray[np.float64], *, resolution: int = 64) -> shapes.Float:
    """A picture `[H, W, 3]` float32 in [0, 1] of these attributes; what they leave open is in `numbers`, [16] in [0, 1).

    Raises `UserError` for a resolution under 8 px.
    """
    tone, ground = _TONES[attributes.colour], _GROUNDS[attributes.background]
    layout, free = numbers[:8], numbers[8:]
    lightness = tone.lightness + 0.04 * (free[0] - 0.5)
    hue = math.radians(tone.hue_degrees + 8 * (free[1] - 0.5))
    if attributes.texture == "plain":
        second, second_chroma = lightness - 0.07, tone.chroma
    elif tone.pale and attributes.background != "light":
        second, second_chroma = 0.95, 0.03
    else:
        second, second_chroma = 0.62 * lightness - 0.06, 0.6 * tone.chroma
    ground_hues = 2 * math.pi * free[2], 2 * math.pi * free[3]
    colours = shapes.oklch_to_srgb(
        np.array([lightness, second, *(value + 0.03 * (free[4] - 0.5) for value in ground)]),
        np.array([tone.chroma, second_chroma, 0.012, 0.012]),
        np.array([hue, hue, *ground_hues]),
    )
    outline, _ = shapes.CLASSES[attributes.shape]
    image, _ = shapes.compose(outline, _TEXTURES[attributes.texture], layout, colours, resolution)
    return image


def render(
    index: int, *, part: Part = Part.seen, seed: int = 0, resolution: int = 64
) -> tuple[NDArray[np.uint8], Attributes]:
    """Image `index` of a part: RGB `[H, W, 3]` uint8 and its attributes.

    Raises `UserError` for a negative index or a resolution under 8 px.
    """
    attributes = attributes_of(index, part=part, seed=seed)
    numbers = _stream(_APPEARANCE, part, seed, index).random(16)
    return shapes.quantised(draw(attributes, numbers, resolution=resolution)), attributes


# Each names every attribute once; @ stands for the article.
WORDINGS: tuple[str, ...] = (
    "@ {colour} {texture} {shape} on @ {background} background",
    "@ {texture} {colour} {shape} on @ {background} background",
    "on {background} ground, @ {texture} {shape} in {colour}",
    "@ {shape}, {colour} and {texture}, against @ {background} background",
    "the {shape} is {colour} and {texture}, the background is {background}",
    "@ {background} background with @ {texture} {colour} {shape}",
    "a picture of @ {colour} {shape}, {texture}, on {background} ground",
    "@ {texture} {shape} coloured {colour} on @ {background} ground",
)
CAPTIONS_PER_IMAGE = 4

# Other words for the values.
_SYNONYMS: Mapping[str, str] = {
    "gray": "grey",
    "bright": "light",
    "violet": "purple",
    "dotted": "spotted",
    "checkered": "checked",
    "chequered": "checked",
    "moon": "crescent",
}
_MEANINGS: Mapping[str, tuple[str, str]] = {
    word: (attribute, value)
    for attribute, values in ATTRIBUTES.items()
    for value in values
    for word in (value, *(other for other, meant in _SYNONYMS.items() if meant == value))
}
_DENIALS = frozenset({"no", "not", "nor", "neither", "never", "without", "except", "or"})


def caption(attributes: Attributes, wording: str) -> str:
    """One of `WORDINGS`, or another text with the four names in braces, about these attributes."""
    words = {field.name: getattr(attributes, field.name) for field in fields(attributes)}
    filled = re.sub(r"@ (?=[aeiou])", "an ", wording.format(**words))
    return filled.replace("@ ", "a ")


def captions_of(index: int, *, part: Part = Part.seen, seed: int = 0) -> tuple[str, ...]:
    """The captions of image `index`: four different wordings. Raises `UserError` for a negative index."""
    attributes = attributes_of(index, part=part, seed=seed)
    chosen = _stream(_WORDINGS, part, seed, index).permutation(len(WORDINGS))[:CAPTIONS_PER_IMAGE]
    return tuple(caption(attributes, WORDINGS[i]) for i in chosen)


def parse_caption(text: str) -> Attributes | None:
    """The attributes that a text names, in any order and wording, whatever its case and punctuation.

    None unless it holds exactly one word of each attribute, or if it denies or leaves a choice ("not red", "red or blue").
    """
    words = re.findall(r"[^\W\d_]+", text.lower())
    named = [_MEANINGS[word] for word in words if word in _MEANINGS]
    if sorted(attribute for attribute, _ in named) != sorted(ATTRIBUTES) or _DENIALS.intersection(words):
        return None
    return Attributes(**dict(named))


@dataclass(frozen=True, kw_only=True)
class ShapesTextSource:
    """The embedded set with captions; every image is drawn on demand. Its labels are the shapes."""

    count: int
    resolution: int
    seed: int = 0
    part: Part = Part.seen

    @property
    def name(self) -> str:
        return "shapes-text" if self.part is Part.seen else f"shapes-text-{self.part}"

    @property
    def description(self) -> str:
        return f"shapes-text seed={self.seed} count={self.count} combinations={self.part}"

    @property
    def class_names(self) -> tuple[str, ...]:
        return SHAPES

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        return f"{self.name}/{self.seed}/{index:08d}"

    def label(self, index: int) -> int:
        return shapes.label_of(index, seed=self.seed)

    def signature(self, index: int) -> str:
        return f"{self.seed}:{index}"

    def load(self, index: int, resolution: int, decoder: str = "pil") -> tuple[np.ndarray, int]:
        pixels, _ = render(index, part=self.part, seed=self.seed, resolution=resolution)
        return pixels, content_hash(pixels.tobytes())

    def captions(self, index: int) -> tuple[str, ...]:
        return captions_of(index, part=self.part, seed=self.seed)
