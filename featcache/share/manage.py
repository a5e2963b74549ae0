"""Listing caches, removing and restoring, clearing away what dead builds left."""

from __future__ import annotations

import os
import re
import secrets
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from featcache.errors import CacheError, UserError
from featcache.share import trash
from featcache.store import files, locks
from featcache.store.layout import PUSHES, RESTORED, ROOT_NAMES, SOUND, STATE, index_bytes, sample_bytes, shard_samples
from featcache.store.manifest import Manifest
from featcache.store.names import Axes, OwnNames, first_foreign, own_files, regular_files
from featcache.store.root import find_root, read_root
from featcache.store.wds import tar_layout
from featcache.store.writer import (
    building_directory,
    cache_lock,
    known_manifest,
    remove_building,
    unfinished_features,
)

DEFAULT_AGE_S = trash.parse_age(trash.DEFAULT_AGE)
_PUSH_JOURNAL = re.compile(r"[0-9a-f]{16}\.jsonl")
_FETCHED = re.compile(r".+\.fetched|lock(?:\.owner)?", re.DOTALL)
_NEVER = re.compile(r"(?!)")


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """One line of a listing. `manifest` is None where nothing is complete yet or the root cannot be read.

    n_bytes: of the complete features' shards, by the manifest (0 for compressed ones, which it does not know).
    problem: why the entry cannot be used, in one line.
    """

    path: Path
    manifest: Manifest | None
    unfinished: tuple[str, ...] = ()
    problem: str | None = None
    n_bytes: int = 0


def cache_bytes(manifest: Manifest, features: Sequence[str] | None = None) -> int:
    """Bytes of all uncompressed shard files, indices included; 0 for compressed ones."""
    if not manifest.features or manifest.compressor is not None:
        return 0
    count, size, n_shards = manifest.dataset.count, manifest.shard_size, manifest.n_shards
    if manifest.format == "wds":
        layout = tar_layout(manifest)
        last = layout.tar_bytes(shard_samples(count, size, n_shards - 1))
        return (n_shards - 1) * layout.tar_bytes(size) + last
    chosen = manifest.features if features is None else features
    arrays = [array for name in chosen for array in manifest.features[name].arrays.values()]
    return sum(count * sample_bytes(dtype, shape) + n_shards * index_bytes(size) for dtype, shape in arrays)


def is_cache(path: Path) -> bool:
    """Whether `path` holds a cache or an unfinished one, readable or not."""
    return any(os.path.lexists(path / name) for name in (*ROOT_NAMES.values(), STATE))


def cache_info(path: str | Path) -> CacheInfo:
    """What lies at `path`; what is wrong with it is in `problem`. Raises `CacheError` if it is no cache at all."""
    path = Path(path)
    try:
        if not is_cache(path):
            read_root(path)  # raises, saying what is there instead
        complete = find_root(path) is not None
    except OSError as error:
        return CacheInfo(path=path, manifest=None, problem=_reason(error))
    unfinished: tuple[str, ...] = ()
    manifest, n_bytes, problem = None, 0, None
    try:
        unfinished = tuple(sorted(unfinished_features(path)))
        if complete:
            manifest = read_root(path)
            n_bytes = cache_bytes(manifest)
            # What a builder left that died after it had made its features visible is not unfinished.
            unfinished = tuple(name for name in unfinished if name not in manifest.features)
        elif not (path / STATE).is_dir():
            problem = "not a cache: its root document or state folder is something else"
    except (UserError, OSError) as error:
        problem = _reason(error)
    return CacheInfo(path=path, manifest=manifest, unfinished=unfinished, problem=problem, n_bytes=n_bytes)


def _reason(error: UserError | OSError) -> str:
    what = error.what if isinstance(error, UserError) else f"cannot be read: {error.strerror or error}"
    return " ".join(what.split())


def list_caches(directory: str | Path) -> list[CacheInfo]:
    """Caches in `directory`: itself, or its immediate subdirectories, by name. Files and other folders are left out.

    An entry that cannot be read or makes no sense is listed with its problem.

    Raises `CacheError` if `directory` itself cannot be listed.
    """
    directory = Path(directory)
    try:
        if not directory.is_dir():
            raise CacheError(
                f"there is no directory {directory}", remedy="featcache build makes a cache under ./caches"
            )
        if is_cache(directory):
            return [cache_info(directory)]
        found = sorted(directory.iterdir())
    except OSError as error:
        raise CacheError(f"{directory} cannot be listed: {error.strerror}") from error
    return [info for path in found if (info := _entry_info(path)) is not None]


def holds_caches(path: Path) -> bool:
    """Whether `path` is no cache, but a folder with readable caches in it."""
    try:
        return path.is_dir() and not is_cache(path) and any(info.problem is None for info in list_caches(path))
    except (UserError, OSError):
        return False


def _entry_info(path: Path) -> CacheInfo | None:
    """One entry of a folder of caches, None if it has nothing to do with them."""
    try:
        if path.is_symlink() and not path.exists():
            return CacheInfo(path=path, manifest=None, problem=f"a link to nothing: {path.readlink()}")
        if path.is_dir() and is_cache(path):
            return cache_info(path)
        if path.is_dir():
            os.scandir(path).close()  # a folder that cannot be looked into may well be a cache
        return None
    except (OSError, RuntimeError) as error:  # a link to itself is a RuntimeError to pathlib
        reason = error.strerror if isinstance(error, OSError) else "a link to itself"
        return CacheInfo(path=path, manifest=None, problem=f"cannot be read: {reason}")


# Removing


def remove_features(path: str | Path, features: Sequence[str], *, now: bool = False) -> int:
    """Move complete features of a zarr cache to its trash, or (`now`) delete them for good; returns their bytes.

    Readers stop seeing them first; those that have shards open may go on reading. What a crash in between leaves,
    `restore` brings back and `collect_garbage` clears away.

    Raises `CacheError` if a feature is not there or is being repaired, or if the cache is one of tars.
    """
    path = Path(path)
    read_root(path)
    files.inside(path, STATE)
    with cache_lock(path):
        manifest = read_root(path)
        if manifest.format != "zarr":
            raise CacheError(
                f"{path} is a webdataset cache: features cannot be removed from its tars",
                remedy="make a copy with just the features that are to stay: featcache convert OLD NEW --to zarr --features ...",
            )
        missing = [name for name in features if name not in manifest.features]
        if missing:
            raise CacheError(
                f"{path} does not hold {', '.join(missing)}",
                remedy=f"it holds {', '.join(sorted(manifest.features)) or 'no features'}",
            )
        with trash.without_builders(path, features):
            return trash.move_features(path, manifest, features, now=now)


def remove_cache(path: str | Path, *, now: bool = False) -> Path | None:
    """See `trash.remove_cache`."""
    return trash.remove_cache(path, now=now)


def restore(path: str | Path, features: Sequence[str] | None = None) -> str:
    """Undo the latest `remove_features` or `remove_cache` at `path`; returns what came back, in words.

    features: bring back just these. Without, a cache that is there gets the features that it lost last; where there is
    none, the latest removed one of that name comes back.

    Raises `CacheError` if the trash holds nothing for it, or something is in the way; nothing is changed then.
    """
    path = Path(path)
    place = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    whole = [e for e in trash.entries(trash.folder_trash(place.parent)) if e.name == place.name and not e.deleting]
    if whole:
        _remove_ghost(place)
    in_cache = find_root(place) is not None and bool(trash.entries(trash.cache_trash(place)))
    if features is None and (not os.path.lexists(place) or (whole and not in_cache)):
        trash.restore_cache(place)
        return str(path)
    return f"{', '.join(trash.restore_features(place, features))} of {path}"


def _remove_ghost(path: Path) -> None:
    """Take away an empty folder, or one with a lock alone: a process leaves it that began to build and was killed."""
    state = path / STATE
    if path.is_symlink() or state.is_symlink():
        return
    files.remove_empty_directory(path)
    if state.is_dir() and files.names_in(path) == [STATE] and all(map(locks.is_lock_file, files.names_in(state))):
        with cache_lock(path):
            pass
        files.remove_empty_directory(path)


# Clearing away


def collect_garbage(
    path: str | Path,
    *,
    dry_run: bool = False,
    older_than_s: float = DEFAULT_AGE_S,
    only_trash: bool = False,
    warn: Callable[[str], None] = lambda _: None,
) -> list[tuple[str, int]]:
    """Remove what dead builds, interrupted removals and pushes left, and what lies in the trash for long enough.

    path: a cache or a folder of caches. An unfinished feature whose builder lives is left alone; one whose builder is
    dead is removed, so that it can no longer be resumed. Only files whose names follow from manifests and journals are
    deleted, and nothing that is reached through a link. only_trash: what can be gone on with stays.

    Returns (name relative to `path`, bytes) of each thing removed, or with `dry_run` of what would be. `warn` is called
    with a line for each cache of a folder that could not be cleared, and for what must stay in the trash.

    Raises `CacheError` if there is no cache at `path`, or it cannot be cleared.
    """
    path = Path(path)
    if is_cache(path):
        return _collect_cache(path, dry_run, older_than_s, only_trash)
    if not path.is_dir() or not (trash.folder_trash(path).is_dir() or any(info.path for info in list_caches(path))):
        read_root(path)
    removed = []
    for info in list_caches(path):
        if info.path.is_symlink():
            if info.problem is None:
                warn(
                    f"{info.path} is a symbolic link; for that cache: featcache gc {shlex.quote(str(info.path.resolve()))}"
                )
            continue
        try:
            found = _collect_cache(info.path, dry_run, older_than_s, only_trash)
            removed += [(f"{info.path.name}/{name}", n_bytes) for name, n_bytes in found]
        except (UserError, OSError) as error:
            warn(f"{info.path}: {_reason(error)}")
    for entry, foreign in kept_in_trash(path, older_than_s=older_than_s):
        warn(f"{entry} holds files that are not the cache's, such as {foreign}: look, then remove that folder by hand")
    bin_ = trash.folder_trash(path)
    return removed + _empty(bin_, path, dry_run, older_than_s)


def kept_in_trash(folder: Path, *, older_than_s: float) -> list[tuple[Path, str]]:
    """Removed caches that are old enough to go but hold somebody's own files: (where, one of those files)."""
    found = []
    for entry in trash.entries(trash.folder_trash(folder)):
        if entry.expired(older_than_s) and (foreign := _foreign(entry)) is not None:
            found.append((entry.path, foreign))
    return found


def _foreign(entry: trash.Entry) -> str | None:
    if entry.name is None or entry.deleting:
        return None
    return first_foreign(entry.path, trash.cache_names(entry.path))


def _empty(bin_: Path, path: Path, dry_run: bool, older_than_s: float) -> list[tuple[str, int]]:
    removed = []
    for entry in trash.entries(bin_):
        if not entry.expired(older_than_s) or _foreign(entry) is not None:
            continue
        removed.append((str(entry.path.relative_to(path)), trash.tree_bytes(entry.path)))
        if not dry_run:
            trash.delete(entry)
    if not dry_run:
        files.remove_empty_directory(bin_)
    return removed


def _collect_cache(path: Path, dry_run: bool, older_than_s: float, only_trash: bool) -> list[tuple[str, int]]:
    files.inside(path, STATE)
    if known_manifest(path) is None and not (path / STATE).is_dir():
        read_root(path)
    with cache_lock(path):
        manifest = known_manifest(path)
        if manifest is not None and find_root(path) is not None and not dry_run:
            for entry in trash.entries(trash.cache_trash(path)):
                trash.settle(path, manifest, entry)
            trash.remove_void(path, manifest)
        removed = [] if only_trash else _clear_dead(path, manifest, dry_run)
        return removed + _empty(trash.cache_trash(path), path, dry_run, older_than_s)


def _clear_dead(path: Path, manifest: Manifest | None, dry_run: bool) -> list[tuple[str, int]]:
    """Remove what dead builds, pushes and repairs left. The caller holds the cache's lock."""
    specs = trash.journaled(path)
    dead: list[tuple[str, locks.Lock]] = []
    try:
        for name in specs:
            held = locks.try_lock(building_directory(path, name) / "lock")
            dead += [] if held is None else [(name, held)]
        live = set(specs) - {name for name, _ in dead}
        leftovers = _leftovers(path, manifest, specs, live) if manifest is not None else []
        state = _old_state(path)
        if not dry_run:
            # Runs first, so that no process that is thought dead puts another file in place; the rest of the journals
            # last, for they say which files are the dead builds'.
            for name, _ in dead:
                _remove_runs(building_directory(path, name))
            for name, _ in leftovers:
                files.remove_file(path / name)
            if manifest is not None:
                _remove_empty_folders(path, manifest, specs, live)
            for name, held in dead:
                remove_building(path, name, held)
            for name, _ in state:
                files.remove_file(path / name)
            for folder in (PUSHES, RESTORED, SOUND):
                files.remove_empty_directory(path / STATE / folder)
    finally:
        for _, held in dead:
            held.release()
    if not dry_run and not live and find_root(path) is None:
        files.remove_file(files.inside(path, f"{STATE}/dataset.json"))
    return leftovers + state


def _remove_runs(directory: Path) -> None:
    """Take away where a dead build had its temporary files; each by one rename first."""
    for name in files.names_in(directory):
        run = directory / name
        if run.is_dir() and not run.is_symlink():
            gone = run.with_name(f"gone-{secrets.token_hex(8)}")
            run.rename(gone)
            files.remove_tree(gone)


def _leftovers(path: Path, manifest: Manifest, specs: dict[str, Axes], live: set[str]) -> list[tuple[str, int]]:
    """The store's files that no complete feature and no live builder needs."""
    names = OwnNames.of(manifest, specs.values())
    written = {array for name in live for array in specs[name]}
    in_use = set(manifest.arrays) | written
    groups = {array.split("/")[0] for array in in_use if "/" in array}
    complete = find_root(path) is not None
    found = []
    for folder in names.folders:
        kept = folder in in_use or folder in groups or (folder == "" and (complete or bool(live)))
        for name, n_bytes in own_files(path, names, folder):
            temporary = files.part_of(Path(name).name) is not None
            being_written = folder in written or (folder == "" and bool(live) and manifest.format == "wds")
            if (temporary and not being_written) or not kept:
                found.append((name, n_bytes))
    return found


def _old_state(path: Path) -> list[tuple[str, int]]:
    """What dead pushes, repairs from another copy and verifications left in the state folder.

    A living push holds its journal, a living repair the lock beside what it has fetched so far: those stay. The caller
    holds the cache's lock, under which alone these are taken.
    """
    found = []
    for folder, names in ((PUSHES, _PUSH_JOURNAL), (RESTORED, _FETCHED), (SOUND, _NEVER)):
        for name, n_bytes in regular_files(path, f"{STATE}/{folder}"):
            place = path / STATE / folder
            lock = {PUSHES: place / name, RESTORED: place / "lock"}.get(folder)
            if (names.fullmatch(name) and not _is_held(lock)) or (files.part_of(name) and folder != RESTORED):
                found.append((f"{STATE}/{folder}/{name}", n_bytes))
    return found


def _is_held(lock: Path | None) -> bool:
    if lock is None or not lock.exists():
        return False
    held = locks.try_lock(lock)
    if held is not None:
        held.release()
    return held is None


def _remove_empty_folders(path: Path, manifest: Manifest, specs: dict[str, Axes], live: set[str]) -> None:
    in_use = {*manifest.arrays, *(array for name in live for array in specs[name])}
    for folder in OwnNames.of(manifest, specs.values()).folders[:-1]:
        linked = any((path / part).is_symlink() for part in (folder, folder.split("/")[0]))
        if not linked and not any(array == folder or array.startswith(f"{folder}/") for array in in_use):
            files.remove_empty_directory(path / folder)
