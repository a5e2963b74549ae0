"""Which files in a cache's folder are the store's own, by what its manifest and journals say. Nothing else
is ever deleted."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featcache.errors import CacheError
from featcache.store import files
from featcache.store.layout import BLOCKS, CHECKSUMS, ROOT_METADATA, ROOT_NAMES, SIGNATURE, STATE, shard_name
from featcache.store.manifest import Manifest
from featcache.store.wds import tar_name

_NUMBER = re.compile(r"(?:c\.)?(\d{1,8})(?:\.|\Z)")
# Array name -> axes of a stored sample; None where nothing readable says how many.
Axes = Mapping[str, int | None]


@dataclass(frozen=True)
class OwnNames:
    """The names that the store gives to files of a cache; in constant memory, however many shards there are.

    format, n_shards: as in the manifest.
    """

    format: str
    n_shards: int
    arrays: Axes

    @classmethod
    def of(cls, manifest: Manifest, extra: Iterable[Axes] = ()) -> OwnNames:
        """Those of a manifest's features and of `extra` arrays (under construction)."""
        arrays = {array: axes for some in extra for array, axes in some.items()}
        return cls(manifest.format, manifest.n_shards, arrays | axes_of(manifest.arrays))

    @property
    def folders(self) -> list[str]:
        """Folders that hold files of the store, inner ones first; '' is the cache's own."""
        if self.format == "wds":
            return [""]
        return [*sorted(self.arrays), *sorted(self._groups), ""]

    @property
    def _groups(self) -> set[str]:
        return {array.split("/")[0] for array in self.arrays if "/" in array}

    def owns(self, folder: str, name: str) -> bool:
        """Whether the file `name` in `folder` (relative, '' for the cache's own) is the store's, or a temporary of one."""
        name = files.part_of(name) or name
        if folder == "" and name == SIGNATURE:
            return True
        if self.format == "wds":
            return folder == "" and (name in (ROOT_NAMES["wds"], CHECKSUMS, BLOCKS) or self._is_tar(name))
        if folder in self.arrays:
            return name in (ROOT_METADATA, CHECKSUMS, BLOCKS) or self._is_shard(name, self.arrays[folder])
        return name == ROOT_METADATA and (folder == "" or folder in self._groups)

    def _is_shard(self, name: str, ndim: int | None) -> bool:
        match = _NUMBER.match(name)
        ndim = max(0, name.count(".") - 1) if ndim is None else ndim
        return match is not None and int(match[1]) < self.n_shards and name == shard_name(int(match[1]), ndim)

    def _is_tar(self, name: str) -> bool:
        match = _NUMBER.match(name)
        return match is not None and int(match[1]) < self.n_shards and name == tar_name(int(match[1]))


def axes_of(arrays: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> dict[str, int | None]:
    return {array: len(shape) for array, (_, shape) in arrays.items()}


def regular_files(root: Path, folder: str) -> Iterator[tuple[str, int]]:
    """(name, bytes) of the regular files in `root / folder`; nothing where that is missing or reached through a link."""
    try:
        directory = files.inside(root, folder)
    except CacheError:
        return
    try:
        entries = sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.is_file() and not entry.is_symlink():
            yield entry.name, entry.lstat().st_size


def own_files(root: Path, names: OwnNames, folder: str) -> Iterator[tuple[str, int]]:
    """(path relative to `root`, bytes) of the store's files in one of its folders."""
    for name, n_bytes in regular_files(root, folder):
        if names.owns(folder, name):
            yield f"{folder}/{name}".lstrip("/"), n_bytes


def first_foreign(root: Path, names: OwnNames | None) -> str | None:
    """Something below `root` that is not the store's (relative), None if all is. Links are foreign, and not followed.

    names: None where no manifest says which are; then every file outside the state folder is foreign.
    """
    for directory, folders, found in os.walk(root):
        folder = Path(directory).relative_to(root).as_posix().removeprefix(".")
        if folder == "" and STATE in folders and not (root / STATE).is_symlink():
            folders.remove(STATE)
        links = [name for name in folders if (Path(directory) / name).is_symlink()]
        for name in sorted([*found, *links]):
            regular = stat.S_ISREG((Path(directory) / name).lstat().st_mode)
            if names is None or not regular or not names.owns(folder, name):
                return f"{folder}/{name}".lstrip("/")
    return None
