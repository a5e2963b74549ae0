"""Listing caches, removing features, clearing away what dead builds left."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from featcache.errors import CacheError
from featcache.store import files, locks
from featcache.store.layout import BLOCKS, CHECKSUMS, ROOT_METADATA, STATE
from featcache.store.manifest import Manifest
from featcache.store.root import find_root, read_root
from featcache.store.verify import shard_files
from featcache.store.writer import (
    building_directory,
    cache_lock,
    publish,
    remove_building,
    state_directory,
    unfinished_features,
)

_OURS = re.compile(rf"(?:c(?:\.\d+)+|{ROOT_METADATA}|{CHECKSUMS}|{BLOCKS})\Z")


def _is_ours(name: str) -> bool:
    """Whether a builder gives such a name to a file in an array's directory."""
    return bool(_OURS.match(files.part_of(name) or name))


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """One line of a listing. `manifest` is None where nothing is complete yet or the root cannot be read."""

    path: Path
    manifest: Manifest | None
    unfinished: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of the complete features' shards, by the manifest (0 for compressed ones, which it does not
        know).
        """
        return 0 if self.manifest is None else cache_bytes(self.manifest)


def cache_bytes(manifest: Manifest, features: Sequence[str] | None = None) -> int:
    """Bytes of all uncompressed shard files, indices included."""
    if not manifest.features:
        return 0
    return sum(entry.n_bytes or 0 for entry in shard_files(manifest, features))


def cache_info(path: str | Path) -> CacheInfo:
    """What lies at `path`; raises `CacheError` if it is no cache at all."""
    path = Path(path)
    if find_root(path) is None and not (path / STATE).is_dir():
        read_root(path)
    unfinished = tuple(sorted(unfinished_features(path)))
    if find_root(path) is None:
        return CacheInfo(path=path, manifest=None, unfinished=unfinished)
    try:
        manifest = read_root(path)
        # What a builder left that died after it had made its features visible is not unfinished.
        unfinished = tuple(name for name in unfinished if name not in manifest.features)
        return CacheInfo(path=path, manifest=manifest, unfinished=unfinished)
    except CacheError as error:
        return CacheInfo(path=path, manifest=None, unfinished=unfinished, problem=error.what)


def list_caches(directory: str | Path) -> list[CacheInfo]:
    """Caches in `directory`: itself, or its immediate subdirectories, by name."""
    directory = Path(directory)
    if not directory.is_dir():
        raise CacheError(f"there is no directory {directory}", remedy="featcache build makes a cache under ./caches")
    if find_root(directory) is not None or (directory / STATE).is_dir():
        return [cache_info(directory)]
    found = [p for p in sorted(directory.iterdir()) if p.is_dir()]
    return [cache_info(p) for p in found if find_root(p) is not None or (p / STATE).is_dir()]


def remove_features(path: str | Path, features: Sequence[str]) -> int:
    """Remove complete features from a zarr cache; returns the bytes freed.

    Readers stop seeing them first; those that have shards open may go on reading. A crash in between leaves
    files that `collect_garbage` removes.

    Raises `CacheError` if a feature is not there or the cache is one of tars.
    """
    path = Path(path)
    read_root(path)
    with cache_lock(path):
        manifest = read_root(path)
        if manifest.format != "zarr":
            raise CacheError(f"{path} is a webdataset cache: features cannot be removed from its tars")
        missing = [name for name in features if name not in manifest.features]
        if missing:
            raise CacheError(
                f"{path} does not hold {', '.join(missing)}",
                remedy=f"it holds {', '.join(sorted(manifest.features)) or 'no features'}",
            )
        arrays = [array for name in features for array in manifest.features[name].arrays]
        kept = set(manifest.features) - set(features)
        publish(path, manifest.only(kept), set())
        return sum(_remove_array(path, array, kept) for array in arrays)


def _remove_array(path: Path, array: str, kept: set[str]) -> int:
    """Delete the files of one array that are ours; returns their bytes."""
    freed = _remove_ours(path / array)
    parent = (path / array).parent
    if parent != path and not any(name.startswith(parent.name + "/") for name in kept):
        files.remove_file(parent / ROOT_METADATA)
        files.remove_empty_directory(parent)
    return freed


def _remove_ours(directory: Path) -> int:
    freed = 0
    for entry in directory.iterdir() if directory.is_dir() else ():
        if _is_ours(entry.name) and entry.is_file() and not entry.is_symlink():
            freed += entry.stat().st_size
            files.remove_file(entry)
    files.remove_empty_directory(directory)
    return freed


def collect_garbage(path: str | Path, *, dry_run: bool = False) -> list[tuple[str, int]]:
    """Remove what dead builds and interrupted removals left: (name, bytes) of each thing removed.

    An unfinished feature whose builder lives is left alone; one whose builder is dead is removed, so that it
    can no longer be resumed. Only files with names that a builder gives are deleted. With `dry_run` nothing
    is.
    """
    path = Path(path)
    if find_root(path) is None and not (path / STATE).is_dir():
        read_root(path)
    with cache_lock(path):
        manifest = read_root(path) if find_root(path) is not None else None
        arrays = set(manifest.arrays) if manifest is not None else set()
        live, dead = set(), []
        for name in unfinished_features(path):
            held = locks.try_lock(building_directory(path, name) / "lock")
            if held is None:
                live.add(name)
            else:
                dead.append((name, held))
        removed = _orphans(path, arrays, live, set(manifest.features if manifest else ()))
        removed += [p for p in sorted(path.rglob("*" + files.PART_SUFFIX)) if not _belongs_to(p, path, live)]
        if manifest is None and not live:
            removed += sorted(path.glob("*.tar"))
        removed += sorted((state_directory(path) / "push").glob("*.jsonl"))
        result = [(str(p.relative_to(path)), p.stat().st_size) for p in dict.fromkeys(removed)]
        if not dry_run:
            # First, so that no process that is thought dead puts another file in place.
            for name, held in dead:
                remove_building(path, name, held)
            for file in dict.fromkeys(removed):
                files.remove_file(file)
                files.remove_empty_directory(file.parent)
                if file.parent.parent != path:
                    files.remove_empty_directory(file.parent.parent)
        for _, held in dead:
            held.release()
        if not dry_run and manifest is None and not live:
            files.remove_file(state_directory(path) / "dataset.json")
    return result


def _belongs_to(file: Path, path: Path, live: set[str]) -> bool:
    """Whether a half-written file may be a live builder's."""
    relative = file.relative_to(path)
    if relative.parts[0] == STATE:
        return len(relative.parts) > 2 and relative.parts[2].replace("+", "/") in live
    if file.parent == path:
        return bool(live)
    return any(str(relative.parent) in (name, name + ".scale") for name in live)


def _orphans(path: Path, arrays: set[str], live: set[str], features: set[str]) -> list[Path]:
    """Files of ours in directories that are no array of the manifest nor of a live build."""
    keep = arrays | live | {name + ".scale" for name in live}
    groups = {name.split("/")[0] for name in features | live if "/" in name}
    found = []
    for directory in sorted([*path.glob("*/"), *path.glob("*/*/")]):
        name = str(directory.relative_to(path))
        if name.split("/")[0] == STATE or name in keep or directory.is_symlink():
            continue
        for entry in sorted(directory.iterdir()):
            if name in groups and entry.name == ROOT_METADATA:
                continue
            if _is_ours(entry.name) and entry.is_file() and not entry.is_symlink():
                found.append(entry)
    return found
