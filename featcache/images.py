"""Image sources and the one crop: where pixels come from before any encoder sees them.

A source is a finite, ordered set of samples; sample ``i`` has a key (unique, stable text), a label (class index) and
pixels. Everything downstream joins by key, never by position in a directory listing.

Decoding treats unusual files the way DiT's and REPA's preprocessing does, that is PIL's ``convert("RGB")`` on the file
as stored: grayscale is replicated over three channels, palettes are looked up, CMYK is converted by PIL's formula,
alpha is dropped (not blended), and an EXIF orientation is *not* applied.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from featcache.errors import UserError

EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp")
CROP_NAME = "adm-center-crop"

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
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    H, W, _ = pixels.shape
    top, left = (H - size) // 2, (W - size) // 2
    return pixels[top : top + size, left : left + size]


def decode(data: bytes, key: str) -> Image.Image:
    """Encoded image bytes => RGB image, as stored (no EXIF rotation, alpha dropped).

    Raises:
        BadImage: truncated or unknown data, or an image too large to be safe to decode.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        # The library's message names an object by its address: builds would differ where the manifest quotes it.
        raise BadImage(key, "not an image of a known format") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImage(key, " ".join(str(error).split()) or type(error).__name__) from error


def content_hash(data: bytes) -> int:
    """First 8 bytes of the SHA-256, big-endian: identifies a sample's bytes across machines."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


class EncodedSource:
    """What sources of encoded files share: reading gives bytes, loading decodes and crops them."""

    def key(self, index: int) -> str:
        raise AssertionError("a source defines its keys")

    def read(self, index: int) -> bytes:
        """The sample's file as stored. Raises `BadImage` if it cannot be read."""
        raise AssertionError("a source defines its reading")

    def load(self, index: int, resolution: int, decoder: str = "pil") -> tuple[np.ndarray, int]:
        """As :meth:`Source.load`."""
        from featcache.decoders import DECODERS

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
        return str((self.root / self.files[index]).stat().st_size)

    def read(self, index: int) -> bytes:
        key = self.files[index]
        try:
            return (self.root / key).read_bytes()
        except OSError as error:
            raise BadImage(key, error.strerror or str(error)) from error


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
    return _open_files(data)


def _open_files(data: str) -> Source:
    from featcache.remote import is_remote

    stem = data.rstrip("/").rpartition("/")[2]
    pattern = is_remote(data) or "{" in data or "*" in data
    path = Path(data)
    if pattern or (path.is_file() and path.suffix.lower() in (".tar", ".zip", ".parquet")):
        if data.lower().endswith(".parquet"):
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
    found: list[str] = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders.sort()
        relative = Path(folder).relative_to(root)
        found += [(relative / n).as_posix() for n in names if n.lower().endswith(EXTENSIONS)]
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
        name=root.resolve().name,
        class_names=tuple(classes),
        files=files,
        labels=[index[f.split("/")[0]] for f in files],
    )


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
    digest.update("\n".join(source.class_names).encode())
    lines = sorted(f"{source.key(int(i))}\t{source.label(int(i))}\t{source.signature(int(i))}" for i in indices)
    for line in lines:
        digest.update(b"\n" + line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
