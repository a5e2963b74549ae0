"""Encoded image bytes => RGB pixels => the one crop.

Decoding treats unusual files the way DiT's and REPA's preprocessing does, that is PIL's `convert("RGB")` on the file
as stored: grayscale is replicated over three channels, palettes are looked up, CMYK is converted by PIL's formula,
alpha is dropped (not blended), and an EXIF orientation is *not* applied. Of animations the first frame counts.

Files may come from anyone. They are read as JPEG, PNG or WebP and nothing else, by what they hold and not by their
names; their size in pixels is checked before they are decoded; and all threads together hold only so many bytes of
files and pixels at a time, however many of them decode.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from featcache.errors import UserError, first_line

# PIL's blocks are 16 MB otherwise: malloc takes such from a heap of each thread's own, and keeps them there when they
# are freed, which adds up. Larger ones go back to the system.
_core: Any = Image.core
_core.set_block_size(1 << 30)

CROP_NAME = "adm-center-crop"
SQUARE_NAME = "lanczos-square"
CROPS = {"adm": CROP_NAME, SQUARE_NAME: SQUARE_NAME}  # --crop -> what the manifest says
MAX_PIXELS = 178_000_000  # a little more than the largest sensors of cameras have; also of a crop before it is cut
MAX_FILE_BYTES = 256 << 20


class BadImage(UserError):
    """A file that cannot be decoded; carries the sample's key."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(
            f"cannot decode image {key!r}: {reason}",
            remedy="Replace or remove the file, or pass --on-bad-image skip to leave it out (the manifest records it).",
        )
        self.key = key
        self.reason = reason


class Budget:
    """So many bytes for all threads together; who asks for more waits until others have finished."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._used, self._changed = limit_bytes, 0, threading.Condition()

    @contextlib.contextmanager
    def claim(self, n_bytes: int) -> Iterator[None]:
        """Holds `n_bytes` inside; a claim beyond the whole budget is granted when it is the only one."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + n_bytes <= self._limit)
            self._used += n_bytes
        try:
            yield
        finally:
            with self._changed:
                self._used -= n_bytes
                self._changed.notify_all()


# Threads take from the second while they hold of the first, never the other way round: nobody waits for ever.
FILES_IN_FLIGHT = Budget(1 << 30)
PIXELS_IN_FLIGHT = Budget(2 << 30)


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's centre crop: halve with a box filter while twice too large, bicubic to `size`, cut the middle.

    Byte-identical to guided-diffusion's `center_crop_arr`, DiT's and REPA's `center-crop-dhariwal`.

    Args:
        image: any size, mode RGB.
        size: side of the square result in pixels.

    Returns:
        uint8 [size, size, 3].
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    image = image.resize(_scaled(image.size, size), resample=Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    H, W, _ = pixels.shape
    top, left = (H - size) // 2, (W - size) // 2
    return pixels[top : top + size, left : left + size]


def square_crop(image: Image.Image, size: int) -> np.ndarray:
    """The largest centred square, cut first, then brought to `size` by PIL's Lanczos filter.

    Byte-identical to U-ViT's crop of MS-COCO (`center_crop` of its datasets, which REPA's text-to-image code takes over):
    rows and columns from floor((side - short) / 2).

    Args:
        image: any size, mode RGB.
        size: side of the square result in pixels.

    Returns:
        uint8 [size, size, 3].
    """
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    # Cut and then resized: with `box=` PIL would let the filter reach beyond the square.
    square = image.crop((left, top, left + short, top + short))
    return np.asarray(square.resize((size, size), resample=Image.Resampling.LANCZOS))


def _scaled(size: tuple[int, int], short: int) -> tuple[int, int]:
    """Width and height when the shorter one becomes `short`."""
    scale = short / min(size)
    return round(size[0] * scale), round(size[1] * scale)


@contextlib.contextmanager
def room_for(size: tuple[int, int], key: str, *, resolution: int | None, bytes_per_pixel: int = 8) -> Iterator[None]:
    """Checks an image's width and height before it is decoded, and holds its part of the memory inside.

    Args:
        resolution: side of the crop to be made of it; None for none.
        bytes_per_pixel: that decoding takes.

    Raises `BadImage` for too many pixels, as it is or brought to the crop's size.
    """
    width, height = size
    if width * height > MAX_PIXELS:
        raise BadImage(key, f"it has {width} x {height} pixels, more than the {MAX_PIXELS:,} that are decoded")
    # Halved images are smaller than the original; enlarged narrow ones can be far larger.
    wide, high = _scaled(size, resolution) if resolution is not None else (0, 0)
    if wide * high > max(MAX_PIXELS, width * height):
        raise BadImage(key, f"{width} x {height} pixels are too narrow to crop at {resolution}")
    with PIXELS_IN_FLIGHT.claim(bytes_per_pixel * width * height + 4 * wide * high):
        yield


@contextlib.contextmanager
def decoded(data: bytes, key: str, *, resolution: int | None = None) -> Iterator[Image.Image]:
    """Encoded image bytes => RGB image, as stored (no EXIF rotation, alpha dropped); its memory is held inside.

    Args:
        resolution: side of the crop that will be made of it inside; None for none.

    Raises `BadImage` for truncated or unknown data, and for an image too large to be safe to decode.
    """
    with _bad_image(key):
        image = _opened(data, key)
    source_bytes = 16 if image.format == "WEBP" else 4  # libwebp keeps two canvases and hands over a copy
    copy_bytes = 0 if image.mode == "RGB" else 4
    with room_for(image.size, key, resolution=resolution, bytes_per_pixel=source_bytes + copy_bytes + 1):
        with _bad_image(key):
            image.load()
            rgb = image if image.mode == "RGB" else image.convert("RGB")
        yield rgb


@contextlib.contextmanager
def _bad_image(key: str) -> Iterator[None]:
    """Turns what PIL raises over a damaged file, which is of many kinds, into `BadImage`."""
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"there is no memory left to decode {key!r}", remedy="Pass fewer --workers.") from error
    except Exception as error:
        raise BadImage(key, first_line(error)) from error


def _opened(data: bytes, key: str) -> ImageFile.ImageFile:
    """The image behind its header; PIL's own table of formats would also try those that start other programs."""
    if data[:3] == b"\xff\xd8\xff":
        return JpegImagePlugin.JpegImageFile(io.BytesIO(data))
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return PngImagePlugin.PngImageFile(io.BytesIO(data))
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        # Its reader allocates the canvas when it opens.
        with room_for(_webp_size(data), key, resolution=None, bytes_per_pixel=0):
            return WebPImagePlugin.WebPImageFile(io.BytesIO(data))
    raise BadImage(key, "not an image of a known format (JPEG, PNG, WebP)")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height from the first chunk of a WebP file (RFC 9649); (0, 0) where it is none of the three kinds."""
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if data[12:16] == b"VP8 ":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return 0, 0


def decode(data: bytes, key: str) -> Image.Image:
    """As `decoded`, for callers who hold few images at a time."""
    with decoded(data, key) as image:
        return image


def content_hash(data: bytes) -> int:
    """First 8 bytes of the SHA-256, big-endian: identifies a sample's bytes across machines."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
