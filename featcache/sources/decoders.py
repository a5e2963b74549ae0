"""Encoded image => cropped pixels: by one of the crops, the exact way or faster ones.

`pil` is the reference, byte for byte what the public preprocessing gives. `turbo` lets libjpeg-turbo halve a large
JPEG while it decodes (scaled inverse DCT), where the exact crop decodes it whole and halves it with a box filter; the
last resize is the same bicubic. Files that are no RGB JPEG go the exact way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ImportError:  # an extra: check_decoder says so
    simplejpeg = None

from featcache.errors import UserError, first_line
from featcache.sources.pixels import SQUARE_NAME, BadImage, center_crop, decoded, room_for, square_crop

Decoder = Callable[[bytes, str, int], np.ndarray]


def decode_pil(data: bytes, key: str, resolution: int) -> np.ndarray:
    """The exact crop: uint8 [R, R, 3]. Raises `BadImage`."""
    with decoded(data, key, resolution=resolution) as image:
        return center_crop(image, resolution)


def _colour_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of what libjpeg-turbo may decode (three components, YCbCr); None for anything else."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    try:
        height, width, colourspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (width, height) if colourspace == "YCbCr" else None


def decode_turbo(data: bytes, key: str, resolution: int) -> np.ndarray:
    """Halved during decoding as often as the exact crop would halve: uint8 [R, R, 3]. Raises `BadImage`."""
    size = _colour_jpeg_size(data)
    if size is None:
        return decode_pil(data, key, resolution)
    width, height = size
    halvings = 0
    while min(width, height) >> halvings >= 2 * resolution and halvings < 3:
        halvings += 1
    with room_for(size, key, resolution=resolution):
        try:
            # min_height asks for the smallest scaled size that is not below it.
            pixels = simplejpeg.decode_jpeg(
                data, "RGB", fastdct=False, min_height=height >> halvings, min_width=width >> halvings, min_factor=1
            )
        except ValueError as error:
            raise BadImage(key, first_line(error)) from error
        return center_crop(Image.fromarray(pixels), resolution)


def decode_square(data: bytes, key: str, resolution: int) -> np.ndarray:
    """Of the other crop, `square_crop`: uint8 [R, R, 3]. Raises `BadImage`."""
    with decoded(data, key) as image:
        return square_crop(image, resolution)


DECODERS: Mapping[str, Decoder] = {"pil": decode_pil, "turbo": decode_turbo}  # --decode, all by ADM's crop
LOADERS: Mapping[str, Decoder] = {**DECODERS, SQUARE_NAME: decode_square}


def exact_loader(crop: object) -> str:
    """The key of `LOADERS` that gives a crop exactly. crop: as a manifest records it; one that is not known is ADM's."""
    return SQUARE_NAME if crop == SQUARE_NAME else "pil"


def check_decoder(name: str) -> None:
    """Raises `UserError` if there is no such decoder or this machine cannot run it."""
    if name not in DECODERS:
        raise UserError(f"unknown decoder {name!r}", remedy=f"Type --decode with one of: {', '.join(DECODERS)}.")
    if name == "turbo" and simplejpeg is None:
        raise UserError(
            f"--decode {name} needs simplejpeg, which is not installed",
            remedy="pip install 'featcache-trainer[turbo]', or leave --decode out.",
        )
