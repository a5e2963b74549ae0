"""Images in folders, one for each class."""

from __future__ import annotations

import collections
import errno
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from featcache.errors import UserError
from featcache.keys import printable
from featcache.paths import typed
from featcache.sources.base import EXTENSIONS, EncodedSource
from featcache.sources.opening import Unreadable, file_size, raise_unreadable, read_file
from featcache.sources.pixels import MAX_FILE_BYTES, BadImage

ONE_CLASS = "all"  # of a flat folder; not its name, which may change without the images being others
MAX_LINKS = 64  # to one folder


@dataclass(frozen=True, kw_only=True)
class FolderSource(EncodedSource):
    """One folder per class, sorted; keys are paths below the root with forward slashes. A flat folder is one class, `all`.

    bare: images that lie in no class folder and are no samples. flat: there are no class folders, and all images are taken.
    """

    root: Path
    name: str
    class_names: tuple[str, ...]
    files: Sequence[str]
    labels: Sequence[int]
    bare: int = 0
    flat: bool = False

    @property
    def remark(self) -> str | None:
        """What whoever builds a cache of it should know."""
        if not self.bare:
            return None
        return f"{self.bare} images directly in {self.root} are left out: in no class folder, they have no label"

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


def open_folder(root: Path) -> FolderSource:
    if not root.exists():
        raise UserError(
            f"there is no image folder at {str(root)!r}",
            remedy="Pass --data DIR (one folder per class, JPEG, PNG or WebP inside), set $FEATCACHE_DATA, "
            "or use an embedded set: --data shapes, or shapes-text with captions",
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
        return FolderSource(
            root=root,
            name=printable(root.resolve().name),
            class_names=(ONE_CLASS,),
            files=sorted(found),
            labels=[0] * len(found),
            flat=True,
        )
    index = {name: label for label, name in enumerate(classes)}
    files = sorted(f for f in found if "/" in f)
    return FolderSource(
        root=root,
        name=printable(root.resolve().name),
        class_names=tuple(map(printable, classes)),
        files=files,
        labels=[index[f.split("/")[0]] for f in files],
        bare=len(found) - len(files),
    )


def refuse_unlabelled(source: object) -> None:
    """Raises `UserError` for a flat folder, whose images have no labels: for caches without text, which need some."""
    if isinstance(source, FolderSource) and source.flat:
        raise UserError(
            f"{str(source.root)!r} holds images but no class folders, so they have no labels",
            remedy="Put the images of each class in a folder of its own (one folder is enough); or, for images with "
            "captions, type --text clip-l --captions FILE.",
        )


_SPLIT = re.compile(r"(train|training|val|valid|validation|test|testing)(?P<year>20\d\d)?", re.IGNORECASE)


def refuse_splits(source: object) -> None:
    """Raises `UserError` for a folder of splits, each with class folders of its own or flat as COCO's `train2014` and
    `val2014`, that would make classes of them: a cache is made of one of them."""
    if not isinstance(source, FolderSource) or len(source.class_names) < 2:
        return
    splits = [_SPLIT.fullmatch(name) for name in source.class_names]
    if not all(splits):
        return
    classes: dict[str, set[str]] = {}
    for file in source.files:
        split, *between, _ = file.split("/")
        if between:
            classes.setdefault(split, set()).add(between[0])
    if not classes and not all(split is not None and split["year"] for split in splits):
        return
    lines = "".join(
        f"\n  featcache build --data {typed(source.root / split)} ...   "
        + (f"({len(classes[split])} classes)" if split in classes else "--text clip-l --captions FILE")
        for split in source.class_names
    )
    raise UserError(
        f"{str(source.root)!r} holds {' and '.join(source.class_names)}, which look like parts of a data set and not like classes",
        remedy=f"Make a cache of one of them:{lines}",
    )


def _walk(root: Path) -> Iterator[str]:
    """Paths below `root` of everything that is no folder, with forward slashes.

    Links are followed. A folder that is reached again from inside itself is passed over; one that many links lead to is
    refused, since links to links can make a few folders look like any number of them.

    Raises `UserError` for a folder that cannot be listed, or that many links lead to.
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
