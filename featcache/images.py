"""Image sources and the one crop: where pixels come from before any encoder sees them.

A source is a finite, ordered set of samples; sample ``i`` has a key (unique, stable text), a label (class index) and
pixels. Everything downstream joins by key, never by position in a directory listing.

Decoding treats unusual files the way DiT's and REPA's preprocessing does, that is PIL's ``convert("RGB")`` on the file
as stored: grayscale is replicated over three channels, palettes are looked up, CMYK is converted by PIL's formula,
alpha is dropped (not blended), and an EXIF orientation is *not* applied. Of animations the first frame counts.

Files may come from anyone. They are read as JPEG, PNG or WebP and nothing else, by what they hold and not by their
names; their size in pixels is checked before they are decoded; and all threads together hold only so many bytes of
files and pixels at a time, however many of them decode.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import hashlib
import io
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from featcache.errors import UserError, first_line
from featcache.keys import key_bytes, printable
from featcache.sources.opening import Unreadable, file_size, raise_unreadable, read_file

EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp")
CROP_NAME = "adm-center-crop"
MAX_PIXELS = 178_000_000  # a little more than the largest sensors of cameras have; also of a crop before it is cut
MAX_FILE_BYTES = 256 << 20
MAX_LINKS = 64  # to one folder

# More than anybody draws; a manifest from anybody may say any number.
MAX_RECORDED_SHAPES = 10_000_000


class BadImage(UserError):
    """A file that cannot be decoded; carries the sample's key."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(
            f"cannot decode image {key!r}: {reason}",
            remedy="Replace or remove the file, or pass --on-bad-image skip to leave it out (the manifest records it).",
        )
        self.key = key
        self.reason = reason


class Source(Protocol):
    """A labelled image set. ``description`` regenerates or names the source in a manifest (no absolute paths)."""

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def key(self, index: int) -> str: ...

    def label(self, index: int) -> int: ...

    def signature(self, index: int) -> str:
        """Cheap identity of the sample's bytes (file size, or generator parameters) that enters the fingerprint."""
        ...

    def load(self, index: int, resolution: int, decoder: str = "pil") -> tuple[np.ndarray, int]:
        """Pixels after the crop, uint8 [R, R, 3], and the first 8 bytes of the SHA-256 of the sample as stored.

        Args:
            decoder: a key of :data:`featcache.decoders.DECODERS`.

        Raises:
            BadImage: the file cannot be decoded.
        """
        ...


class Budget:
    """So many bytes for all threads together; who asks for more waits until others have finished."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._used, self._changed = limit_bytes, 0, threading.Condition()

    @contextlib.contextmanager
    def claim(self, n_bytes: int) -> Iterator[None]:
        """Holds ``n_bytes`` inside; a claim beyond the whole budget is granted when it is the only one."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + n_bytes <= self._limit)
            self._used += n_bytes
        try:
            yield
        finally:
            with self._changed:
                self._used -= n_bytes
                self._changed.notify_all()


# PIL's blocks are 16 MB otherwise: malloc takes such from a heap of each thread's own, and keeps them there when they are
# freed, which adds up. Larger ones go back to the system.
Image.core.set_block_size(1 << 30)

# Threads take from the second while they hold of the first, never the other way round: nobody waits for ever.
FILES_IN_FLIGHT = Budget(1 << 30)
PIXELS_IN_FLIGHT = Budget(2 << 30)


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's centre crop: halve with a box filter while twice too large, bicubic to ``size``, cut the middle.

    Byte-identical to guided-diffusion's ``center_crop_arr``, DiT's and REPA's ``center-crop-dhariwal``.

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


def _scaled(size: tuple[int, int], short: int) -> tuple[int, int]:
    """Width and height when the shorter one becomes ``short``."""
    scale = short / min(size)
    return round(size[0] * scale), round(size[1] * scale)


@contextlib.contextmanager
def room_for(size: tuple[int, int], key: str, *, resolution: int | None, bytes_per_pixel: int = 8) -> Iterator[None]:
    """Checks an image's width and height before it is decoded, and holds its part of the memory inside.

    Args:
        resolution: side of the crop to be made of it; None for none.
        bytes_per_pixel: that decoding takes.

    Raises:
        BadImage: too many pixels, as it is or brought to the crop's size.
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

    Raises:
        BadImage: truncated or unknown data, or an image too large to be safe to decode.
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
    """As :func:`decoded`, for callers who hold few images at a time."""
    with decoded(data, key) as image:
        return image


def content_hash(data: bytes) -> int:
    """First 8 bytes of the SHA-256, big-endian: identifies a sample's bytes across machines."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


class EncodedSource:
    """What sources of encoded files share: reading gives bytes, loading decodes and crops them."""

    def key(self, index: int) -> str:
        raise AssertionError("a source defines its keys")

    def size_bytes(self, index: int) -> int:
        """Memory that :meth:`read` takes. Raises as it does."""
        raise AssertionError("a source knows its files' sizes")

    def read(self, index: int) -> bytes:
        """The sample's file as stored.

        Raises:
            BadImage: it cannot be read, for a reason that lies in the file.
            UserError: nor can others: the archive, the disk or the network fails.
        """
        raise AssertionError("a source defines its reading")

    def load(self, index: int, resolution: int, decoder: str = "pil") -> tuple[np.ndarray, int]:
        """As :meth:`Source.load`."""
        from featcache.decoders import DECODERS

        size = self.size_bytes(index)
        if size > MAX_FILE_BYTES:
            raise BadImage(
                self.key(index), f"the file has {size} bytes, more than the {MAX_FILE_BYTES:,} that are read"
            )
        with FILES_IN_FLIGHT.claim(size):
            data = self.read(index)
            return DECODERS[decoder](data, self.key(index), resolution), content_hash(data)


@dataclass(frozen=True, kw_only=True)
class FolderSource(EncodedSource):
    """One folder per class, sorted; keys are paths below the root with forward slashes."""

    root: Path
    name: str
    class_names: tuple[str, ...]
    files: Sequence[str]
    labels: Sequence[int]

    @property
    def description(self) -> str:
        return f"folder {self.name}"

    def __len__(self) -> int:
        return len(self.files)

    def key(self, index: int) -> str:
        return self.files[index]

    def label(self, index: int) -> int:
        return self.labels[index]

    def signature(self, index: int) -> str:
        try:
            return str(file_size(self._path(index)))
        except Unreadable:
            return "unreadable"

    def size_bytes(self, index: int) -> int:
        try:
            return file_size(self._path(index))
        except Unreadable as error:
            raise BadImage(self.files[index], str(error)) from error

    def read(self, index: int) -> bytes:
        try:
            return read_file(self._path(index), MAX_FILE_BYTES)
        except Unreadable as error:
            raise BadImage(self.files[index], str(error)) from error

    def _path(self, index: int) -> str:
        return f"{self.root}/{self.files[index]}"


@dataclass(frozen=True, kw_only=True)
class ShapesSource:
    """The embedded procedural data set (:mod:`featcache.shapes`); every image is drawn on demand."""

    count: int
    resolution: int
    seed: int = 0
    name: str = "shapes"

    @property
    def description(self) -> str:
        return f"shapes seed={self.seed} count={self.count}"

    @property
    def class_names(self) -> tuple[str, ...]:
        from featcache.shapes import CLASS_NAMES

        return CLASS_NAMES

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        return f"shapes/{self.seed}/{index:08d}"

    def label(self, index: int) -> int:
        from featcache.shapes import label_of

        return label_of(index, seed=self.seed)

    def signature(self, index: int) -> str:
        return f"{self.seed}:{index}"

    def load(self, index: int, resolution: int, decoder: str = "pil") -> tuple[np.ndarray, int]:
        from featcache.shapes import render

        pixels, _ = render(index, seed=self.seed, resolution=resolution)
        return pixels, content_hash(pixels.tobytes())


def open_source(data: str, *, resolution: int, limit: int | None = None) -> Source:
    """The source that ``--data`` names: ``shapes``, ``shapes:SEED``, a folder with one folder per class, or archives.

    Archives are ``.tar``, ``.zip`` and ``.parquet`` files, folders of them, and patterns of webdataset shards
    (``data/train-{0000..0146}.tar``, also behind ``s3://`` and ``hf://``): see docs/sources.md.

    Args:
        data: what the user typed.
        resolution: side in pixels after the crop.
        limit: for the procedural set, how many images exist (default 2,000).

    Raises:
        UserError: the folder is missing, is not a folder, or holds no images.
    """
    if data == "shapes" or data.startswith("shapes:"):
        seed = data.partition(":")[2] or "0"
        if not seed.isdigit():
            raise UserError(f"--data {data}: the part after 'shapes:' must be a seed", remedy="Type --data shapes:0")
        return ShapesSource(count=limit or 2000, resolution=resolution, seed=int(seed))
    try:
        return _open_files(data)
    except OSError as error:
        raise_unreadable(f"--data {data}", error)


def _open_files(data: str) -> Source:
    from featcache.remote import is_remote

    remote = is_remote(data)
    named = data.partition("?")[0] if remote else data  # without the secrets of a signed URL
    stem = named.rstrip("/").rpartition("/")[2]
    pattern = remote or "{" in data or "*" in data
    path = Path(data)
    if pattern or (path.is_file() and path.suffix.lower() in (".tar", ".zip", ".parquet")):
        if named.lower().endswith(".parquet"):
            from featcache.sources.parquet import open_parquet

            return open_parquet(data, name=stem.removesuffix(".parquet"))
        from featcache.sources.archives import find_places, open_archives

        return open_archives(find_places(data), name=re.sub(r"\.(tar|zip)$", "", stem))
    if path.is_dir():
        held = {file.suffix.lower() for file in path.iterdir() if file.is_file()}
        if not any(child.is_dir() for child in path.iterdir()) and held & {".tar", ".zip", ".parquet"}:
            from featcache.sources.archives import find_places, open_archives
            from featcache.sources.parquet import open_parquet

            if ".parquet" in held:
                return open_parquet(str(path / "*.parquet"), name=path.resolve().name)
            kind = ".tar" if ".tar" in held else ".zip"
            return open_archives(find_places(str(path / f"*{kind}")), name=path.resolve().name, folder=True)
    return _open_folder(path)


def _open_folder(root: Path) -> FolderSource:
    if not root.exists():
        raise UserError(
            f"there is no image folder at {str(root)!r}",
            remedy="Pass --data DIR (one folder per class, JPEG, PNG or WebP inside), set $FEATCACHE_DATA, "
            "or use the embedded set: --data shapes",
        )
    if not root.is_dir():
        raise UserError(
            f"{str(root)!r} is neither a folder of images nor a .tar, .zip or .parquet file",
            remedy="Pass --data DIR, one folder per class, or an archive (docs/sources.md).",
        )
    found = [name for name in _walk(root) if name.lower().endswith(EXTENSIONS)]
    classes = sorted({f.split("/")[0] for f in found if "/" in f})
    if not found:
        raise UserError(
            f"no images ({', '.join(EXTENSIONS)}) below {str(root)!r}",
            remedy="Pass --data DIR with one folder per class, images inside; or --data shapes",
        )
    if not classes:
        raise UserError(
            f"{str(root)!r} holds images but no class folders, so they have no labels",
            remedy="Put the images of each class in a folder of its own (one folder is enough).",
        )
    index = {name: label for label, name in enumerate(classes)}
    files = sorted(f for f in found if "/" in f)
    return FolderSource(
        root=root,
        name=printable(root.resolve().name),
        class_names=tuple(map(printable, classes)),
        files=files,
        labels=[index[f.split("/")[0]] for f in files],
    )


def _walk(root: Path) -> Iterator[str]:
    """Paths below ``root`` of everything that is no folder, with forward slashes.

    Links are followed. A folder that is reached again from inside itself is passed over; one that many links lead to is
    refused, since links to links can make a few folders look like any number of them.

    Raises:
        UserError: a folder that cannot be listed, or that many links lead to.
    """
    seen: collections.Counter[tuple[int, int]] = collections.Counter()
    # Each entry: a folder's path below the root and the identities of the folders it lies in, itself included.
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset({_identity(root)}))]
    while waiting:
        below, above = waiting.pop()
        folder = f"{root}/{below}"
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not _is_folder(entry):
                        yield below + entry.name
                        continue
                    itself = _identity(entry.path)
                    if itself in above:
                        continue
                    seen[itself] += 1
                    if seen[itself] > MAX_LINKS:
                        raise UserError(
                            f"more than {MAX_LINKS} links lead to the folder {os.path.realpath(entry.path)!r}",
                            remedy="Remove links below --data, so that each folder is reached a few times at most.",
                        )
                    waiting.append((f"{below}{entry.name}/", above | {itself}))
        except OSError as error:
            raise_unreadable(f"the folder {folder!r}", error)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False  # a link to itself


def _identity(folder: str | Path) -> tuple[int, int]:
    found = os.stat(folder)  # noqa: PTH116
    return found.st_dev, found.st_ino


def find_data(data: str | None, *, into: Path | None = None) -> str:
    """``--data``, else ``$FEATCACHE_DATA``, else ``./data/imagenet``.

    into: cache to add to; one of the embedded set says itself which images it holds.

    Raises:
        UserError: none of the three exists.
    """
    if data is None and into is not None:
        import featcache

        shapes = recorded_shapes(featcache.open(into).manifest.dataset.source)
        if shapes is not None:
            return shapes[0]
    chosen = data or os.environ.get("FEATCACHE_DATA")
    if chosen:
        return chosen
    default = Path("data/imagenet")
    if default.exists():
        return str(default)
    raise UserError(
        "no images to encode: --data was not given, $FEATCACHE_DATA is not set and ./data/imagenet does not exist",
        remedy="Type: featcache build --data /path/to/images ...   (one folder per class), or --data shapes",
    )


def recorded_shapes(description: str) -> tuple[str, int] | None:
    """``--data`` and number of images of the embedded set that a manifest's source describes, None for other sources."""
    seed, count = (re.search(rf" {word}=(\d{{1,18}})(?: |$)", description) for word in ("seed", "count"))
    if not description.startswith("shapes ") or seed is None or count is None or int(count[1]) > MAX_RECORDED_SHAPES:
        return None
    return f"shapes:{seed[1]}", int(count[1])


def fingerprint(source: Source, indices: Sequence[int] | np.ndarray) -> str:
    """SHA-256 (hex) over class names and (key, label, signature) of the chosen samples, in key order.

    Equal for the same images wherever they lie; does not depend on the order in which they are cached.
    """
    digest = hashlib.sha256()
    digest.update(key_bytes("\n".join(source.class_names)))
    lines = sorted(f"{source.key(int(i))}\t{source.label(int(i))}\t{source.signature(int(i))}" for i in indices)
    for line in lines:
        digest.update(b"\n" + key_bytes(line))
    return digest.hexdigest()
