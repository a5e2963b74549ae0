"""A procedural, class-labelled image set: ten textured shapes over varied backgrounds.

It stands in for a folder of photographs wherever the project needs real learning signals without a
download: tests, the demo, and the training of the `tiny` encoders. Image `i` is a function of (seed, i,
resolution) alone, so any slice of the set can be rendered anywhere, in any order, and gives the same bytes.

Everything is defined over continuous coordinates in [-1, 1] (x to the right, y down) and antialiased by one
pixel's width, so the same image exists at every resolution. The entropy is moderate on purpose: one large
figure near the centre, strong contrast in lightness against the ground, textures whose period is at least
an eighth of the image's side. A small diffusion model must be able to learn the set on a CPU in minutes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from featcache.errors import UserError
from featcache.sources.pixels import content_hash

Float = NDArray[np.float32]

MIN_RESOLUTION = 8

# Purposes of the random streams, so that labels and appearance never share draws.
_LABELS, _APPEARANCE = 0, 1


def _half_planes(x: Float, y: Float, n_sides: int, inradius: float, first_normal: float) -> Float:
    """Regular polygon as an intersection of half-planes; exact inside and beside the edges."""
    angles = first_normal + np.arange(n_sides) * (2 * math.pi / n_sides)
    distance = x * np.float32(math.cos(angles[0])) + y * np.float32(math.sin(angles[0]))
    for angle in angles[1:]:
        np.maximum(distance, x * np.float32(math.cos(angle)) + y * np.float32(math.sin(angle)), out=distance)
    return distance - np.float32(inradius)


def _union(a: Float, b: Float) -> Float:
    distance: Float = np.minimum(a, b)
    return distance


def _intersection(a: Float, b: Float) -> Float:
    distance: Float = np.maximum(a, b)
    return distance


def _box(x: Float, y: Float, half_width: float, half_height: float) -> Float:
    return _intersection(np.abs(x) - np.float32(half_width), np.abs(y) - np.float32(half_height))


def _length(x: Float, y: Float) -> Float:
    length: Float = np.sqrt(x * x + y * y)
    return length


# Signed distances in the figure's own frame, negative inside. Figures fill about the unit disc.


def _circle(x: Float, y: Float) -> Float:
    return _length(x, y) - np.float32(0.92)


def _square(x: Float, y: Float) -> Float:
    return _box(x, y, 0.8, 0.8)


def _triangle(x: Float, y: Float) -> Float:
    return _half_planes(x, y - np.float32(0.2), 3, 0.6, math.pi / 2)


def _star(x: Float, y: Float) -> Float:
    # Fold the plane into one tenth (between an outer tip and its neighbouring inner corner); there the
    # outline is the single straight edge that joins the two.
    outer, inner, tenth = 1.1, 0.5, math.pi / 5
    radius = _length(x, y)
    angle = np.abs(np.mod(np.arctan2(x, -y) + np.float32(tenth), np.float32(2 * tenth)) - np.float32(tenth))
    edge_x, edge_y = inner * math.cos(tenth) - outer, inner * math.sin(tenth)
    length = math.hypot(edge_x, edge_y)
    normal_x, normal_y = edge_y / length, -edge_x / length
    across = np.cos(angle) * np.float32(normal_x) + np.sin(angle) * np.float32(normal_y)
    return (radius * across - np.float32(outer * normal_x)).astype(np.float32)


def _ring(x: Float, y: Float) -> Float:
    distance: Float = np.abs(_length(x, y) - np.float32(0.7)) - np.float32(0.27)
    return distance


def _cross(x: Float, y: Float) -> Float:
    return _union(_box(x, y, 0.95, 0.3), _box(x, y, 0.3, 0.95))


def _heart(x: Float, y: Float) -> Float:
    # A square standing on its corner and a half-disc on each of its upper sides: an exact union.
    half_side, drop = 0.56, 0.12
    y = y - np.float32(drop)
    diamond = (np.abs(x) + np.abs(y)) * np.float32(math.sqrt(0.5)) - np.float32(half_side)
    offset = np.float32(half_side * math.sqrt(0.5))
    lobe_x, lobe_y = np.abs(x) - offset, y + offset
    return _union(diamond, _length(lobe_x, lobe_y) - np.float32(half_side))


def _crescent(x: Float, y: Float) -> Float:
    x = x - np.float32(0.12)
    bite_x = x - np.float32(0.56)
    return _intersection(_length(x, y) - np.float32(0.98), np.float32(0.74) - _length(bite_x, y))


def _hexagon(x: Float, y: Float) -> Float:
    return _half_planes(x, y, 6, 0.85, 0.0)


def _arrow(x: Float, y: Float) -> Float:
    shaft = _box(x + np.float32(0.45), y, 0.55, 0.26)
    slope = math.hypot(1.0, 1.0)
    head = _intersection((x + np.abs(y) - np.float32(1.05)) * np.float32(1 / slope), np.float32(0.1) - x)
    return _union(shaft, head)


# Textures: a mixing weight in [0, 1] between the figure's two colours, from the figure's frame (u, v), the signed
# distance d and a phase. Waves are sharpened by tanh rather than cut, which keeps them free of aliasing.


def _unit(values: Float) -> Float:
    weight: Float = np.clip(values, 0, 1)
    return weight


def _sharpened(values: Float, amplitude: float) -> Float:
    weight: Float = np.float32(0.5) + np.float32(amplitude) * np.tanh(values)
    return weight


def _wave(argument: Float) -> Float:
    return _sharpened(np.float32(2.0) * np.sin(argument), 0.52)


def plain(u: Float, v: Float, d: Float, phase: float) -> Float:
    return _unit(np.float32(0.5) - np.float32(0.35) * (u + v))


def _ball(u: Float, v: Float, d: Float, phase: float) -> Float:
    lit_u, lit_v = u + np.float32(0.35), v + np.float32(0.35)
    return _unit((lit_u * lit_u + lit_v * lit_v) * np.float32(0.55))


def checks(u: Float, v: Float, d: Float, phase: float) -> Float:
    k = np.float32(math.pi / 0.534)  # three fields across the square
    return _sharpened(np.float32(3.0) * np.cos(u * k) * np.cos(v * k), 0.5)


def stripes(u: Float, v: Float, d: Float, phase: float) -> Float:
    return _wave(v * np.float32(2 * math.pi / 0.62) + np.float32(phase))


def _glow(u: Float, v: Float, d: Float, phase: float) -> Float:
    return _unit((u * u + v * v) * np.float32(1.6))


def _segments(u: Float, v: Float, d: Float, phase: float) -> Float:
    return _wave(np.arctan2(v, u) * np.float32(6.0) + np.float32(phase))


def dots(u: Float, v: Float, d: Float, phase: float) -> Float:
    k = np.float32(2 * math.pi / 0.66)
    return _sharpened(np.float32(2.5) * (np.cos(u * k) + np.cos(v * k) - np.float32(0.7)), 0.5)


def _shade(u: Float, v: Float, d: Float, phase: float) -> Float:
    return _unit(np.float32(0.5) + np.float32(0.6) * v)


def _bands(u: Float, v: Float, d: Float, phase: float) -> Float:
    return _wave(d * np.float32(2 * math.pi / 0.56) + np.float32(0.5 * math.pi))


def _sweep(u: Float, v: Float, d: Float, phase: float) -> Float:
    return _unit(np.float32(0.5) - np.float32(0.6) * u)


Outline = Callable[[Float, Float], Float]
Texture = Callable[[Float, Float, Float, float], Float]

# The class fixes shape and texture; colours, pose and background vary freely.
CLASSES: dict[str, tuple[Outline, Texture]] = {
    "circle": (_circle, _ball),
    "square": (_square, checks),
    "triangle": (_triangle, stripes),
    "star": (_star, _glow),
    "ring": (_ring, _segments),
    "cross": (_cross, plain),
    "heart": (_heart, dots),
    "crescent": (_crescent, _shade),
    "hexagon": (_hexagon, _bands),
    "arrow": (_arrow, _sweep),
}

CLASS_NAMES: tuple[str, ...] = tuple(CLASSES)


@lru_cache(maxsize=8)
def _pixel_centres(resolution: int) -> tuple[Float, Float]:
    line = ((np.arange(resolution) + 0.5) * (2.0 / resolution) - 1.0).astype(np.float32)
    x, y = np.meshgrid(line, line)
    x.flags.writeable = y.flags.writeable = False
    return x, y


_OKLAB_TO_LMS = np.array(
    [
        [1.0, 0.3963377774, 0.2158037573],
        [1.0, -0.1055613458, -0.0638541728],
        [1.0, -0.0894841775, -1.2914855480],
    ]
)
_LMS_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


def oklch_to_srgb(lightness: np.ndarray, chroma: np.ndarray, hue: np.ndarray) -> Float:
    """OKLCH `[N]` each (hue in radians) to gamma-encoded sRGB `[N, 3]` in [0, 1] (B. Ottosson, 2020).

    A perceptual space makes "lighter than the ground" hold for every hue, which HSV does not.
    """
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    linear = np.clip(((lab @ _OKLAB_TO_LMS.T) ** 3) @ _LMS_TO_RGB.T, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    rounded: Float = encoded.astype(np.float32)
    return rounded


def label_of(index: int, *, seed: int = 0) -> int:
    """Label of image `index`: every aligned block of ten images holds each class once, in random order."""
    if index < 0:
        raise UserError(f"image index {index} is negative", remedy="use an index of 0 or more")
    n = len(CLASS_NAMES)
    block, position = divmod(index, n)
    return int(np.random.default_rng([seed, _LABELS, block]).permutation(n)[position])


def render_layers(index: int, *, seed: int = 0, resolution: int = 64) -> tuple[Float, Float, int]:
    """Image `[H, W, 3]` float32 in [0, 1], the figure's coverage `[H, W]` float32 in [0, 1], and the label.

    Raises `UserError` for a negative index or a resolution under 8 px.
    """
    label = label_of(index, seed=seed)
    outline, texture = CLASSES[CLASS_NAMES[label]]
    draw = np.random.default_rng([seed, _APPEARANCE, index]).random(14)

    dark_ground = draw[5] < 0.5
    ground_lightness = 0.24 + 0.10 * draw[6] if dark_ground else 0.97 - 0.07 * draw[6]
    ground_step = 0.16 if dark_ground else -0.14
    figure_lightness = np.array([0.84, 0.66]) if dark_ground else np.array([0.62, 0.42])
    hue = 2 * math.pi * draw[7]
    ground_hue = 2 * math.pi * draw[8]
    colours = oklch_to_srgb(
        np.array([*figure_lightness, ground_lightness, ground_lightness + ground_step]),
        np.array([0.13, 0.17, 0.04, 0.07]),
        np.array([hue, hue + 1.2 * (draw[9] - 0.5), ground_hue, ground_hue + 1.5 * (draw[10] - 0.5)]),
    )
    layout = np.concatenate([draw[:5], draw[11:]])
    return *compose(outline, texture, layout, colours, resolution), label


def compose(
    outline: Outline, texture: Texture, layout: NDArray[np.float64], colours: Float, resolution: int
) -> tuple[Float, Float]:
    """A figure over a ground: image `[H, W, 3]` float32 in [0, 1] and the figure's coverage `[H, W]` in [0, 1].

    Args:
        layout: eight numbers in [0, 1): the figure's size, place (x, y), tilt and the phase of its texture, then the
            ground's direction, bend and phase.
        colours: sRGB `[4, 3]` in [0, 1]: the figure's two, the ground's two.

    Raises `UserError` for a resolution under 8 px.
    """
    if resolution < MIN_RESOLUTION:
        raise UserError(
            f"shapes cannot be drawn at {resolution} px: too few pixels to tell them apart",
            remedy=f"use a resolution of at least {MIN_RESOLUTION}",
        )
    radius = 0.66 + 0.13 * layout[0]
    centre_x, centre_y = 0.18 * (layout[1] - 0.5), 0.18 * (layout[2] - 0.5)
    turn = 0.4 * (layout[3] - 0.5)  # radians: up to 11 degrees either way
    phase = 2 * math.pi * layout[4]

    x, y = _pixel_centres(resolution)
    # Ground: a gradient along a random direction, bent by one slow wave across it.
    angle = 2 * math.pi * layout[5]
    along = x * np.float32(math.cos(angle)) + y * np.float32(math.sin(angle))
    across = y * np.float32(math.cos(angle)) - x * np.float32(math.sin(angle))
    bend = np.float32(0.30 * layout[6])
    mix = np.float32(0.5) + np.float32(0.42) * along
    mix += bend * np.sin(across * np.float32(math.pi) + np.float32(2 * math.pi * layout[7]))
    np.clip(mix, 0, 1, out=mix)

    cos_turn, sin_turn = math.cos(turn) / radius, math.sin(turn) / radius
    shifted_x, shifted_y = x - np.float32(centre_x), y - np.float32(centre_y)
    u = shifted_x * np.float32(cos_turn) + shifted_y * np.float32(sin_turn)
    v = shifted_y * np.float32(cos_turn) - shifted_x * np.float32(sin_turn)
    distance = outline(u, v)
    weight = _unit(texture(u, v, distance, phase))
    distance *= np.float32(radius)
    coverage = _unit(np.float32(0.5) - distance * np.float32(0.5 * resolution))
    # A soft contact shadow lifts the figure off the ground.
    shadow = np.float32(1) - np.float32(0.22) * np.exp(np.maximum(distance, 0) * np.float32(-8.0))

    figure_a, figure_b, ground_a, ground_b = colours
    ground = (ground_a + mix[..., None] * (ground_b - ground_a)) * shadow[..., None]
    figure = figure_a + weight[..., None] * (figure_b - figure_a)
    image = ground + coverage[..., None] * (figure - ground)
    return image, coverage


def render(index: int, *, seed: int = 0, resolution: int = 64) -> tuple[NDArray[np.uint8], int]:
    """Image `index` of the set `seed`: RGB `[H, W, 3]` uint8 and its label in [0, 10).

    Raises `UserError` for a negative index or a resolution under 8 px.
    """
    image, _, label = render_layers(index, seed=seed, resolution=resolution)
    return quantised(image), label


def quantised(image: Float) -> NDArray[np.uint8]:
    """float32 in [0, 1] => uint8."""
    return (image * np.float32(255) + np.float32(0.5)).astype(np.uint8)


def render_batch(
    indices: Sequence[int], *, seed: int = 0, resolution: int = 64
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images `[N, H, W, 3]` uint8 and labels `[N]` int64 of the given indices."""
    images = np.empty((len(indices), resolution, resolution, 3), np.uint8)
    labels = np.empty(len(indices), np.int64)
    for row, index in enumerate(indices):
        images[row], labels[row] = render(int(index), seed=seed, resolution=resolution)
    return images, labels


@dataclass(frozen=True, kw_only=True)
class ShapesSource:
    """The embedded procedural data set (`featcache.sources.shapes`); every image is drawn on demand."""

    count: int
    resolution: int
    seed: int = 0
    name: str = "shapes"

    @property
    def description(self) -> str:
        return f"shapes seed={self.seed} count={self.count}"

    @property
    def class_names(self) -> tuple[str, ...]:
        return CLASS_NAMES

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        return f"shapes/{self.seed}/{index:08d}"

    def label(self, index: int) -> int:
        return label_of(index, seed=self.seed)

    def signature(self, index: int) -> str:
        return f"{self.seed}:{index}"

    def load(self, index: int, resolution: int, decoder: str = "pil") -> tuple[np.ndarray, int]:
        pixels, _ = render(index, seed=self.seed, resolution=resolution)
        return pixels, content_hash(pixels.tobytes())
