"""What `featcache rm` removes lies in a trash for a while, and comes back from there.

    <parent>/.featcache-trash/<stamp>-<name>/       a whole cache: renamed there at once
    <cache>/.featcache/trash/<stamp>/               features: a root document of just these, and their arrays

A whole cache goes and comes back by one rename. Features go by the rename of the cache's root document; the trash's own
was written before it and says which files follow, so that an interrupted removal is completed by the next one, by `gc`
or by `restore`. `deleting-` before a stamp marks what is being deleted for good and never comes back.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from featcache.errors import CacheError, UserError
from featcache.store import files, locks
from featcache.store.layout import BLOCKS, CHECKSUMS, ROOT_METADATA, SCALE_SUFFIX, STATE, shard_name
from featcache.store.manifest import (
    FeatureSpec,
    Manifest,
    check_feature_name,
    check_no_nesting,
)
from featcache.store.names import Axes, OwnNames, axes_of, first_foreign, own_files
from featcache.store.root import find_root, read_root, root_bytes
from featcache.store.writer import (
    building_directory,
    cache_lock,
    declared,
    known_manifest,
    lock_cache,
    publish,
    require_same_dataset,
    state_directory,
)

FOLDER_TRASH = ".featcache-trash"
CACHE_TRASH = "trash"
DEFAULT_AGE = "7d"
_DELETING = "deleting-"
_STAMP = "%Y%m%dT%H%M%S.%fZ"
_ENTRY = re.compile(rf"({_DELETING})?(\d{{8}}T\d{{6}}\.\d{{6}}Z)(?:-(.+))?\Z", re.DOTALL)
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def _now_s() -> float:
    return time.time()


def parse_age(text: str) -> float:
    """Seconds of an age such as '7d', '36h' or '1.5w'; raises `UserError` for anything else."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)([smhdw])", text.strip())
    if match is None:
        raise UserError(f"{text!r:.40} is no age", remedy="type a number and a unit (s, m, h, d, w), such as 7d or 36h")
    return float(match[1]) * _UNITS_S[match[2]]


@dataclass(frozen=True)
class Entry:
    """One thing in a trash. `name` is the cache's, None for features. `deleting`: on its way out for good."""

    path: Path
    name: str | None
    removed_s: float
    deleting: bool

    def expired(self, older_than_s: float) -> bool:
        # Where the clock went back since, it was removed just now.
        return self.deleting or max(0.0, _now_s() - self.removed_s) >= older_than_s


def _stamp() -> str:
    return datetime.fromtimestamp(_now_s(), UTC).strftime(_STAMP)


def folder_trash(parent: Path) -> Path:
    """Where whole caches of the folder `parent` go; raises `CacheError` where that is a link."""
    return files.inside(parent, FOLDER_TRASH)


def cache_trash(cache: Path) -> Path:
    """Where features of a cache go; raises `CacheError` where that is a link."""
    return files.inside(cache, f"{STATE}/{CACHE_TRASH}")


def entries(trash: Path) -> list[Entry]:
    """What lies in a trash, the latest first. Whatever else lies there is left out."""
    if not trash.is_dir():
        return []
    found = []
    for path in trash.iterdir():
        match = _ENTRY.match(path.name)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        with contextlib.suppress(ValueError):
            removed = datetime.strptime(match[2], _STAMP).replace(tzinfo=UTC)
            found.append(Entry(path, match[3], removed.timestamp(), match[1] is not None))
    return sorted(found, key=lambda entry: (entry.removed_s, entry.path.name), reverse=True)


def _rename(source: Path, target: Path) -> None:
    """Rename durably; raises `CacheError` where that is not possible (another disk, no permission)."""
    try:
        source.rename(target)
        for folder in {source.parent, target.parent}:
            files.fsync_directory(folder)
    except OSError as error:
        raise CacheError(
            f"{source} could not be moved to {target}: {error.strerror}",
            remedy="nothing was changed; put that right and run the same command again",
        ) from error


def delete(entry: Entry) -> None:
    """Delete one thing for good. From its first change on it cannot come back."""
    path = entry.path
    if not entry.deleting:
        path = path.with_name(_DELETING + path.name)
        _rename(entry.path, path)
    files.remove_tree(path)
    files.remove_empty_directory(path.parent)


def tree_bytes(path: Path) -> int:
    """Bytes of all files below `path`; links count as nothing."""
    found = (Path(folder) / name for folder, _, names in os.walk(path) for name in names)
    return sum(file.lstat().st_size for file in found if not file.is_symlink())


# Builds under way


def journaled(cache: Path) -> dict[str, Axes]:
    """Feature -> arrays that its unfinished build or repair (alive or dead) writes, as far as its declaration can be
    read: else those that a feature of that name may have.

    Raises `CacheError` where a folder is a link.
    """
    found: dict[str, Axes] = {}
    for name in _building(cache):
        folder = building_directory(cache, name)
        with contextlib.suppress(CacheError):
            check_feature_name(name)
            if folder.is_dir():
                found[name] = dict.fromkeys((name, name + SCALE_SUFFIX))
                spec = declared(folder)
                found[name] = axes_of(spec.arrays) if spec.name == name else found[name]
    return found


@contextlib.contextmanager
def without_builders(cache: Path, features: Sequence[str]) -> Iterator[list[locks.Lock]]:
    """Hold the builders' locks of those of `features` that are under construction.

    Raises `CacheError` naming those that another process is writing.
    """
    held: list[locks.Lock] = []
    busy = []
    try:
        for name in features:
            folder = building_directory(cache, name)
            if folder.is_dir():
                lock = locks.try_lock(folder / "lock")
                if lock is None:
                    busy.append(name)
                else:
                    held.append(lock)
        if busy:
            raise CacheError(
                f"another process is writing {', '.join(busy)} of {cache} at this moment; nothing was removed",
                remedy="wait until it is done, or stop it, then run the same command again",
            )
        yield held
    finally:
        for lock in held:
            lock.release()


# Whole caches


def cache_names(cache: Path) -> OwnNames | None:
    """The store's names in a cache, complete or not; None where nothing readable says what it holds."""
    try:
        manifest = known_manifest(cache)
        return None if manifest is None else OwnNames.of(manifest, journaled(cache).values())
    except CacheError:
        return None


def require_cache(path: Path) -> Path:
    """The folder of a whole cache, finished or not; raises `CacheError` if there is none, or `path` is a symbolic link."""
    if path.is_symlink():
        real = shlex.quote(str(path.resolve()))
        raise CacheError(
            f"{path} is a symbolic link to {path.resolve()}; nothing was removed",
            remedy=f"remove the cache itself: featcache rm {real}; then the link: rm {shlex.quote(str(path))}",
        )
    path = path.resolve()
    if find_root(path) is None and not (path / STATE).is_dir():
        read_root(path)  # raises, saying what is there instead
    return path


def remove_cache(path: str | Path, *, now: bool = False) -> Path | None:
    """Move a whole cache, finished or not, to the trash beside it; returns where it lies there. `now`: delete
    it for good.

    It goes by one rename: whoever opens it finds it whole or not at all. Those who have shards open may go on reading.

    Raises `CacheError` if there is none, if `path` is a symbolic link, if a builder is at work in it, or, with `now`,
    if it holds files that are not the cache's.
    """
    path = require_cache(Path(path))
    trash = folder_trash(path.parent)
    lock = lock_cache(path)
    try:
        with without_builders(path, list(_building(path))) as held:
            foreign = first_foreign(path, cache_names(path)) if now else None
            if foreign is not None:
                raise CacheError(
                    f"{path} holds files that are not the cache's, such as {foreign}; nothing was removed",
                    remedy="move them elsewhere, or leave --now out: then the folder goes to the trash as it is",
                )
            files.make_directory(trash)
            target = trash / f"{_DELETING if now else ''}{_stamp()}-{path.name}"
            _rename(path, target)
            for moved in (lock, *held):
                moved.moved(target / moved.path.relative_to(path))
    finally:
        lock.release()
        if state_directory(path).is_dir():
            tidy(path)
    if not now:
        return target
    files.remove_tree(target)
    files.remove_empty_directory(trash)
    return None


def _building(cache: Path) -> list[str]:
    return [name.replace("+", "/") for name in files.names_in(files.inside(cache, f"{STATE}/building"))]


def tidy(cache: Path) -> None:
    """An idle cache loses its state folder."""
    with cache_lock(cache):
        pass


def restore_cache(path: Path) -> None:
    """Bring the latest removed cache of that name back; raises `CacheError` if there is none or something is
    in its place."""
    trash = folder_trash(path.parent)
    found = [entry for entry in entries(trash) if entry.name == path.name and not entry.deleting]
    if not found:
        raise CacheError(
            f"there is nothing in the trash to restore at {path}",
            remedy="featcache gc empties the trash; pull or build the cache again",
        )
    if os.path.lexists(path):
        raise CacheError(f"{path} is in the way", remedy=f"move it elsewhere: mv {shlex.quote(str(path))} NEW_NAME")
    # In the trash nobody holds it: whoever removed the cache was killed before letting go.
    files.remove_file(files.inside(found[0].path, f"{STATE}/lock{locks.OWNER_SUFFIX}"))
    _rename(found[0].path, path)
    files.remove_empty_directory(trash)
    tidy(path)


# Features


def _record(entry: Entry) -> Manifest | None:
    """The manifest of the features in an entry, None where it was not yet written or cannot be read."""
    try:
        return read_root(entry.path)
    except CacheError:
        return None


def move_features(cache: Path, manifest: Manifest, names: Sequence[str], *, now: bool) -> int:
    """Take complete features out of a zarr cache, to its trash or (`now`) for good; returns their bytes.

    The caller holds the cache's lock.
    """
    trash = cache_trash(cache)
    path = trash / f"{_DELETING if now else ''}{_stamp()}"
    files.make_directory(path)
    files.atomic_write(path / ROOT_METADATA, [root_bytes(manifest.only(names))])
    rest = manifest.only(set(manifest.features) - set(names))
    publish(cache, rest, set())
    entry = Entry(path, None, _now_s(), now)
    freed = settle(cache, rest, entry)
    if now:
        delete(entry)
    return freed


def settle(cache: Path, manifest: Manifest, entry: Entry) -> int:
    """Move what is left of removed features from the cache to the trash; returns the bytes moved."""
    record = _record(entry)
    if record is None:
        return 0
    in_use = OwnNames.of(manifest, journaled(cache).values())
    groups = {array.split("/")[0] for array in in_use.arrays if "/" in array}
    moved = 0
    names = OwnNames.of(record)
    for folder in names.folders:
        if folder in in_use.arrays or folder == "":
            continue
        if folder in names.arrays:
            found = list(own_files(cache, names, folder))
            if found:
                files.make_directory(files.inside(entry.path, folder))
            for name, n_bytes in found:
                (cache / name).replace(entry.path / name)
                moved += n_bytes
        elif folder not in groups:
            files.remove_file(files.inside(cache, f"{folder}/{ROOT_METADATA}"))
        files.remove_empty_directory(cache / folder)
    return moved


def restore_features(cache: Path, wanted: Sequence[str] | None) -> list[str]:
    """Bring features back from the cache's trash: `wanted`, or those removed last. Returns their names.

    Raises `CacheError` if they are not there, not whole, or in the cache already.
    """
    if find_root(cache) is None:
        read_root(cache)  # raises, saying what is there instead, before a lock makes a state folder there
    with cache_lock(cache):
        manifest = read_root(cache)
        remove_void(cache, manifest)
        by_entry = _choose(cache, manifest, wanted)
        names = [name for chosen in by_entry.values() for name in chosen]
        for entry, chosen in by_entry.items():
            record = _record(entry)
            assert record is not None
            manifest = _bring_back(cache, manifest, entry, record.only(chosen))
        publish(cache, manifest, set(names))
        for entry, chosen in by_entry.items():
            _forget(entry, chosen)
        remove_void(cache, manifest)
        files.remove_empty_directory(cache_trash(cache))
    return sorted(names)


def remove_void(cache: Path, manifest: Manifest) -> None:
    """Remove entries of the trash in which nothing lies: their removal never happened, or was undone. One that cannot be
    read stays. The caller holds the cache's lock.
    """
    for entry in entries(cache_trash(cache)):
        if _is_void(entry, manifest):
            delete(entry)


def _is_void(entry: Entry, manifest: Manifest) -> bool:
    if not os.path.lexists(entry.path / ROOT_METADATA):  # it is written before anything comes here
        return all(map(files.is_part, files.names_in(entry.path)))
    record = _record(entry)
    return record is not None and all(
        name in manifest.features and not _has_files(entry, spec) for name, spec in record.features.items()
    )


def _forget(entry: Entry, names: Sequence[str]) -> None:
    record = _record(entry)
    assert record is not None
    left = set(record.features) - set(names)
    if left:
        files.atomic_write(entry.path / ROOT_METADATA, [root_bytes(record.only(left))])
    else:
        delete(entry)


def _choose(cache: Path, manifest: Manifest, wanted: Sequence[str] | None) -> dict[Entry, list[str]]:
    """Entry -> features to restore from it. Entries whose removal never happened, or was undone, are passed over."""
    held: dict[str, Entry] = {}
    latest: tuple[Entry, list[str]] | None = None
    unreadable: list[Entry] = []
    for entry in entries(cache_trash(cache)):
        record = None if entry.deleting else _record(entry)
        if record is None:
            unreadable += [] if entry.deleting else [entry]
            continue
        names = [n for n in record.features if n not in manifest.features or _has_files(entry, record.features[n])]
        for name in names:
            held.setdefault(name, entry)
        if names and latest is None:
            latest = (entry, names)
    if latest is None:
        if unreadable:
            raise CacheError(
                f"{unreadable[0].path / ROOT_METADATA} says what was removed, and cannot be read or is damaged",
                remedy="if it is damaged, build or pull the features again; featcache gc empties the trash by age",
            )
        raise CacheError(
            f"there is nothing in the trash of {cache} to restore",
            remedy=f"featcache info {shlex.quote(str(cache))} lists what the cache holds",
        )
    if wanted is None:
        return {latest[0]: latest[1]}
    missing = [name for name in wanted if name not in held]
    if missing:
        raise CacheError(
            f"the trash of {cache} does not hold {', '.join(missing)}", remedy=f"it holds {', '.join(sorted(held))}"
        )
    chosen: dict[Entry, list[str]] = {}
    for name in dict.fromkeys(wanted):
        chosen.setdefault(held[name], []).append(name)
    return chosen


def _has_files(entry: Entry, spec: FeatureSpec) -> bool:
    return any((entry.path / array).is_dir() for array in spec.arrays)


def _bring_back(cache: Path, manifest: Manifest, entry: Entry, part: Manifest) -> Manifest:
    """Move features' files from the trash to their place; returns the manifest that holds them."""
    unfinished = _building(cache)
    for name in part.features:
        if name in manifest.features or name in unfinished:
            # Not to the trash: then it would be the latest there, and the one to come back.
            remedy = f"to delete what is there for good: featcache rm {shlex.quote(str(cache))} --features {name} --now"
            if name in unfinished:
                remedy = (
                    f"an unfinished build of it is there; featcache gc {shlex.quote(str(cache))} removes a dead one"
                )
            raise CacheError(f"{name} of {cache} is in the way: it was made again meanwhile", remedy=remedy)
    check_no_nesting([*manifest.features, *part.features, *unfinished])
    require_same_dataset(manifest, part, cache)
    moves = []
    for array, (_, shape) in part.arrays.items():
        needed = [CHECKSUMS, *([BLOCKS] if array in part.blocks else [])]
        for name in [*needed, *(shard_name(shard, len(shape)) for shard in range(part.n_shards))]:
            source = files.inside(entry.path, f"{array}/{name}")
            target = files.inside(cache, f"{array}/{name}")
            if source.is_file():
                moves.append((source, target))
            elif not target.is_file():
                raise CacheError(f"{source} is missing: {array} cannot be restored", remedy="build or pull it again")
    for array in part.arrays:
        files.make_directory(cache / array)
    for source, target in moves:
        source.replace(target)
    for array in part.arrays:
        files.fsync_directory(cache / array)
        for name, _ in list(own_files(entry.path, OwnNames.of(part), array)):
            files.remove_file(entry.path / name)  # metadata, which is written anew
        files.remove_empty_directory(entry.path / array)
    skipped = {slot.slot: slot for slot in (*manifest.skipped, *part.skipped)}
    features = {**manifest.features, **part.features}
    return replace(
        manifest,
        features={name: features[name] for name in sorted(features)},
        skipped=tuple(skipped[slot] for slot in sorted(skipped)),
        checksums=dict(sorted({**manifest.checksums, **part.checksums}.items())),
        blocks=dict(sorted({**manifest.blocks, **part.blocks}.items())),
    )
