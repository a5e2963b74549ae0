"""Sets of images to judge or to judge by: uint8 batches, streamed, whatever they are stored in.

Nothing here holds more than a few batches in memory.
"""

from __future__ import annotations

import hashlib
import math
import os
import queue
import re
import threading
import zipfile
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

import featcache
from featcache.errors import UserError
from featcache.inspect import find_source
from featcache.sources.base import EXTENSIONS, sample_order
from featcache.sources.decoders import LOADERS, exact_loader
from featcache.sources.opening import Unreadable, explained, read_file
from featcache.sources.pixels import MAX_FILE_BYTES, BadImage, decode
from featcache.store.root import find_root

if TYPE_CHECKING:
    from featcache import Cache

T = TypeVar("T")

DECODE_THREADS = 8
PREFETCHED_BATCHES = 4
MAX_ARRAY_BYTES = 2 << 30
FOLDER_SEED = 0  # of the order in which a folder's images are read


class ImageSet(Protocol):
    """A finite, ordered set of square RGB images of one size."""

    @property
    def description(self) -> str:
        """What it is, for provenance: names, not absolute paths."""
        ...

    @property
    def count(self) -> int | None:
        """Number of images, None if only reading tells."""
        ...

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """uint8 [b, R, R, 3], b = `batch_size` but for the last batch.

        Raises:
            UserError: an image that cannot be read, or is not 8-bit RGB, or of another size than the first.
        """
        ...

    def labels(self) -> np.ndarray | None:
        """Class indices int64 [count], or None if the set has none."""
        ...


def check_batch(images: np.ndarray, resolution: int | None, where: str) -> int:
    """Side R of a batch [b, R, R, 3].

    Raises:
        UserError: it is not uint8, square RGB, of `resolution`.
    """
    if images.dtype != np.uint8:
        raise UserError(
            f"{where} holds {images.dtype} images: metrics are defined on 8-bit images",
            remedy="Round to 0..255 and store as uint8, as trainer sample does.",
        )
    if images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2]:
        raise UserError(
            f"{where} holds an array of shape {images.shape}, expected square RGB images [N, R, R, 3]",
            remedy="Store images channels-last, as trainer sample does.",
        )
    if resolution is not None and images.shape[1] != resolution:
        raise UserError(
            f"{where} holds images of {images.shape[1]} pixels beside images of {resolution}",
            remedy="Bring all images to one size first: how they are resized changes FID.",
        )
    return int(images.shape[1])


@dataclass(frozen=True, kw_only=True)
class ArrayImages:
    """Images in memory, uint8 [N, R, R, 3], with optional labels [N]."""

    images: np.ndarray
    description: str = "array"
    classes: np.ndarray | None = None

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.images)

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """See `ImageSet.batches`."""
        check_batch(self.images[:1], None, self.description)
        for start in range(0, len(self.images), batch_size):
            yield self.images[start : start + batch_size]

    def labels(self) -> np.ndarray | None:
        """See `ImageSet.labels`."""
        return self.classes


@dataclass(frozen=True, kw_only=True)
class NpzImages:
    """ADM's layout: images in `arr_0`, labels, if any, in `arr_1`. Read in sequence, compressed or not."""

    path: Path

    @property
    def description(self) -> str:
        """File name."""
        return f"npz {self.path.name}"

    @property
    def count(self) -> int:
        """Number of images, from the array's header."""
        shape, _ = self._header("arr_0")
        return shape[0] if shape else 0

    @property
    def resolution(self) -> int:
        """Side of the images in pixels, from the array's header.

        Raises:
            UserError: not square RGB in uint8.
        """
        shape, dtype = self._header("arr_0")
        return check_batch(np.empty((0, *shape[1:]), dtype), None, str(self.path))

    def _header(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        with _opened(self.path), open_npz(self.path) as archive, _member(archive, name, self.path) as stream:
            return _array_header(stream, self.path)

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """See `ImageSet.batches`."""
        with _opened(self.path), open_npz(self.path) as archive, _member(archive, "arr_0", self.path) as stream:
            shape, dtype = _array_header(stream, self.path)
            # Judged before a byte is read: a wrong dtype would be misread, a wrong shape misallocated.
            check_batch(np.empty((0, *shape[1:]), dtype), None, str(self.path))
            image_bytes = int(np.prod(shape[1:])) * dtype.itemsize
            for start in range(0, shape[0], batch_size):
                rows = min(batch_size, shape[0] - start)
                with explained(str(self.path), "Write the file again."):
                    data = stream.read(rows * image_bytes)
                if len(data) != rows * image_bytes:
                    raise UserError(
                        f"{self.path} ends early: {shape[0]} images announced", remedy="Write the file again."
                    )
                yield np.frombuffer(data, dtype).reshape(rows, *shape[1:])

    def labels(self) -> np.ndarray | None:
        """See `ImageSet.labels`."""
        labels = read_arrays(self.path, ("arr_1",)).get("arr_1")
        if labels is None:
            return None
        if labels.dtype.kind not in "iu" or labels.shape != (self.count,):
            raise UserError(
                f"{self.path} holds labels {list(labels.shape)} of {labels.dtype}, expected {self.count} integers",
                remedy="Write one class index for each image into arr_1.",
            )
        return labels.astype(np.int64)


def _opened(path: Path) -> AbstractContextManager[None]:
    return explained(
        str(path), "Pass another file, or remove this one and make it again.", wrong="is not a readable npz file"
    )


def open_npz(path: Path) -> zipfile.ZipFile:
    """The archive behind an npz file.

    Raises:
        UserError: it is none.
    """
    with _opened(path):
        return zipfile.ZipFile(path)


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of the arrays `names` that an npz file has, never unpickled, each of at most 2 GiB.

    Raises:
        UserError: not an npz file, or an array that is damaged, too large or of objects.
    """
    found = {}
    with open_npz(path) as archive, _opened(path):
        for name in names:
            if f"{name}.npy" not in archive.namelist():
                continue
            with archive.open(f"{name}.npy") as stream:
                shape, dtype = _array_header(stream, path)
                n_bytes = math.prod(shape) * dtype.itemsize
                if not 0 <= n_bytes <= min(MAX_ARRAY_BYTES, archive.getinfo(f"{name}.npy").file_size):
                    raise UserError(f"{path}: {name} says that it is {list(shape)!s:.80}, which it is not")
                data = stream.read(n_bytes)
            if len(data) != n_bytes:
                raise UserError(f"{path}: {name} ends early", remedy="Write the file again.")
            found[name] = np.frombuffer(data, dtype).reshape(shape).copy()
    return found


def _member(archive: zipfile.ZipFile, name: str, path: Path) -> IO[bytes]:
    if f"{name}.npy" not in archive.namelist():
        raise UserError(
            f"{path} has no array {name!r} (it has {', '.join(archive.namelist())})",
            remedy="Images belong into arr_0, uint8 [N, R, R, 3]: trainer sample --format npz does so.",
        )
    with explained(str(path), "Write the file again."):
        return archive.open(f"{name}.npy")


def _array_header(stream: IO[bytes], path: Path) -> tuple[tuple[int, ...], np.dtype]:
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with explained(str(path), "Write it with numpy.savez.", wrong="holds no plain numpy array"):
        shape, fortran, dtype = read[np.lib.format.read_magic(stream)](stream)
    if (fortran and len(shape) > 1) or dtype.hasobject or any(n < 0 for n in shape):
        raise UserError(
            f"{path} holds a Fortran-ordered or object array", remedy="Write a plain C-ordered uint8 array."
        )
    return shape, dtype


def _natural(name: str) -> tuple[tuple[str | int, ...], str]:
    """What sorts names by the numbers in them; of equal ones (1 and 01) by themselves."""
    parts = re.split(r"([0-9]+)", name)
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts)), name


@dataclass(frozen=True, kw_only=True)
class FolderImages:
    """All images below a folder; the first folder level names classes, if there is one.

    They are read in a shuffled order, always the same of equal paths: most folders are sorted by class, and the first
    images of them, or any chunk, would be of a few classes only.

    Attributes:
        resolution: side to which a centre crop brings every image, for folders of real images. None takes
            images as they are and insists that all have one size, for samples.
        crop: which, as a cache's manifest names it; None is ADM's.
        by_name: read them by the numbers in their names instead (2.png before 10.png): images that were drawn for a
            list of prompts.
    """

    path: Path
    resolution: int | None = None
    crop: str | None = None
    by_name: bool = False
    files: tuple[Path, ...] = field(init=False)

    def __post_init__(self) -> None:
        found = (p for p in self.path.rglob("*") if p.suffix.lower() in EXTENSIONS)
        natural = (lambda p: _natural(p.relative_to(self.path).as_posix())) if self.by_name else None
        files = sorted(found, key=natural)
        if not files:
            raise UserError(f"no images ({', '.join(EXTENSIONS)}) below {self.path}", remedy="Pass another folder.")
        order = range(len(files)) if self.by_name else sample_order(len(files), seed=FOLDER_SEED).tolist()
        object.__setattr__(self, "files", tuple(files[i] for i in order))

    @property
    def description(self) -> str:
        """Folder name, and the crop where it is not ADM's."""
        square = self.resolution is not None and exact_loader(self.crop) != "pil"
        return f"folder {self.path.resolve().name}" + (f", {self.crop}" if square else "")

    @property
    def identity(self) -> str:
        """Digest of the files' names, sizes and times: another one where images were added, removed or written again."""
        files = sorted((path.relative_to(self.path).as_posix(), _stat(path)) for path in self.files)
        lines = "".join(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n" for name, stat in files)
        return hashlib.sha256(lines.encode()).hexdigest()[:16]

    @property
    def count(self) -> int:
        """Number of files."""
        return len(self.files)

    def _load(self, file: Path) -> np.ndarray:
        try:
            data = read_file(file, MAX_FILE_BYTES)
        except Unreadable as error:
            raise BadImage(str(file), str(error)) from error
        if self.resolution is None:
            return np.asarray(decode(data, str(file)))
        return LOADERS[exact_loader(self.crop)](data, str(file), self.resolution)

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """See `ImageSet.batches`."""
        side: int | None = None
        with ThreadPoolExecutor(DECODE_THREADS) as pool:
            for start in range(0, len(self.files), batch_size):
                files = self.files[start : start + batch_size]
                images = list(pool.map(self._load, files))
                for file, image in zip(files, images):
                    side = check_batch(image[None], side, str(file))
                yield np.stack(images)

    def labels(self) -> np.ndarray | None:
        """See `ImageSet.labels`."""
        folders = [p.relative_to(self.path).parts[0] if p.parent != self.path else None for p in self.files]
        if None in folders:
            return None
        index = {name: i for i, name in enumerate(sorted({f for f in folders if f is not None}))}
        return np.array([index[f] for f in folders if f is not None], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class TarImages:
    """A WebDataset shard, or several by a brace pattern: `png`, `jpg` or `webp`, and `cls` for labels."""

    pattern: str
    count: int | None = None

    @property
    def description(self) -> str:
        """File name or pattern."""
        return f"webdataset {Path(self.pattern).name}"

    def _samples(self) -> Iterator[dict[str, Any]]:
        import webdataset

        with explained(self.pattern, "Write the shard again.", wrong="cannot be read"):
            yield from webdataset.WebDataset(
                self.pattern, shardshuffle=False, empty_check=False, handler=webdataset.reraise_exception
            )

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """See `ImageSet.batches`."""
        side: int | None = None
        images: list[np.ndarray] = []
        for sample in self._samples():
            key = sample["__key__"]
            data = next((sample[s.lstrip(".")] for s in EXTENSIONS if s.lstrip(".") in sample), None)
            if data is None:
                raise UserError(f"{self.pattern} holds no image for sample {key}", remedy="Write png, jpg or webp.")
            images.append(np.asarray(decode(data, key)))
            side = check_batch(images[-1][None], side, f"{self.pattern}, {key}")
            if len(images) == batch_size:
                yield np.stack(images)
                images = []
        if images:
            yield np.stack(images)
        if side is None:
            raise UserError(f"{self.pattern} holds no samples", remedy="Pass another shard.")

    def labels(self) -> np.ndarray | None:
        """See `ImageSet.labels`; reads the shards once."""
        found = [sample.get("cls") for sample in self._samples()]
        with explained(f"{self.pattern}: a .cls member", "Write class numbers as text."):
            labels = [int(label) for label in found if label is not None]
        return np.array(labels, dtype=np.int64) if labels and len(labels) == len(found) else None


def _stat(path: Path) -> os.stat_result:
    """Of what a link points to; of the link where it points to nothing, which reading says."""
    try:
        return path.stat()
    except FileNotFoundError:
        return path.lstat()


@dataclass(frozen=True, kw_only=True)
class CacheImages:
    """The images that a feature cache was built from, as its encoders saw them (skipped ones left out).

    Attributes:
        cache: an open cache.
        data: the folder it was built from; not needed for the embedded set, which is drawn again.
        limit: judge by the first so many samples of the cache (in its own, shuffled order) only.
    """

    cache: Cache
    data: str | None = None
    limit: int | None = None

    @property
    def description(self) -> str:
        """Source and fingerprint."""
        dataset = self.cache.manifest.dataset
        return f"images of cache {dataset.name} ({dataset.source}, fingerprint {self.cache.fingerprint[:16]})"

    @property
    def identity(self) -> str:
        """Fingerprint of the images, and their crop: the same for all caches of them, whatever their features."""
        dataset = self.cache.manifest.dataset
        return f"{dataset.fingerprint[:16]} {dataset.preprocessing.get('crop') or 'adm'}"

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.cache) if self.limit is None else min(self.limit, len(self.cache))

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """See `ImageSet.batches`.

        Raises:
            UserError: the images are not here; other than for `featcache inspect`, decoded latents will not do.
        """
        dataset = self.cache.manifest.dataset
        source = find_source(self.cache, self.data)
        if source is None:
            raise UserError(
                f"the images of the cache {self.cache.path} are needed, and it was built from a folder",
                remedy="Pass the folder: --data DIR (or saved statistics: --reference FILE.npz).",
            )
        resolution, how = dataset.resolution, exact_loader(dataset.preprocessing.get("crop"))
        order = sample_order(len(source), seed=dataset.order_seed)
        slots = self.cache.slots(np.arange(self.count))
        with ThreadPoolExecutor(DECODE_THREADS) as pool:
            for start in range(0, len(slots), batch_size):
                rows = [int(i) for i in order[slots[start : start + batch_size]]]
                yield np.stack(list(pool.map(lambda i: source.load(i, resolution, how)[0], rows)))

    def labels(self) -> np.ndarray | None:
        """See `ImageSet.labels`."""
        return self.cache.labels()[: self.count]


def open_images(
    where: str | Path,
    *,
    resolution: int | None = None,
    crop: str | None = None,
    data: str | None = None,
    by_name: bool = False,
) -> ImageSet:
    """The image set behind a path: an npz file, a tar shard or pattern, a feature cache, or a folder.

    Args:
        resolution: for folders, bring every image to this side by a centre crop; None takes them as they are.
        crop: which, as a cache's manifest names it; None is ADM's.
        data: for caches, the folder they were built from.
        by_name: for folders, read the images by the numbers in their names, not shuffled.

    Raises:
        UserError: nothing there, or not a set of images.
    """
    text, path = str(where), Path(where)
    if text.endswith(".tar"):
        if not path.exists() and not re.search(r"[{*]", text):
            raise UserError(f"there is no file {text}", remedy="Pass an existing shard.")
        return TarImages(pattern=text)
    if "://" in text:
        return CacheImages(cache=featcache.open(text), data=data)
    if not path.exists():
        raise UserError(f"there is nothing at {text}", remedy="Pass an npz file, a tar shard, a folder or a cache.")
    if path.suffix == ".npz":
        return NpzImages(path=path)
    if find_root(path) is not None:
        return CacheImages(cache=featcache.open(path), data=data)
    if path.is_dir():
        return FolderImages(path=path, resolution=resolution, crop=crop, by_name=by_name)
    raise UserError(f"{text} is not a set of images", remedy="Pass an npz file, a tar shard, a folder or a cache.")


def prefetch(items: Iterator[T], *, depth: int = PREFETCHED_BATCHES) -> Generator[T, None, None]:
    """The same items, made by a thread up to `depth` ahead: decoding overlaps with the network."""
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def put(entry: tuple[T | None, BaseException | None]) -> None:
        while not stop.is_set():
            try:
                return ready.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in items:
                put((item, None))
                if stop.is_set():
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))
        finally:
            getattr(items, "close", lambda: None)()

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()
