"""A damaged cache made whole from another copy of it: only what is damaged or missing comes over the wire.

Whatever the copy sends is checked against the manifest of the cache that is mended, so the copy need not be trusted,
nor sound itself. Every file is replaced whole and at once, so this can be killed and repeated at any moment.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from featcache.errors import CacheError
from featcache.progress import QUIET, Progress
from featcache.read import fetch as transfer
from featcache.read.root import required_root
from featcache.share.transfer import in_parallel, refuse_links
from featcache.share.verify import repair_metadata
from featcache.store import files, locks
from featcache.store.blocks import ShardBlocks, blocks_limit, blocks_path
from featcache.store.contents import (
    ShardFileEntry,
    checksums_limit,
    checksums_path,
    read_blocks,
    read_checksums,
    shard_files,
)
from featcache.store.layout import RESTORED, STATE
from featcache.store.manifest import Manifest
from featcache.store.places import DamagedSource, Location, Unreadable, read_small
from featcache.store.remote import open_location
from featcache.store.root import read_root
from featcache.store.writer import cache_lock


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What was mended: names of files, and bytes that came for them. `refused`: what the copy could not give, and why."""

    files: tuple[str, ...]
    n_bytes: int
    refused: tuple[str, ...]


def restore(
    path: Path,
    source: str,
    *,
    features: Sequence[str] | None = None,
    threads: int = 8,
    progress: Progress = QUIET,
) -> Restored:
    """Mend the cache in directory `path` from the copy at `source` (URL or directory): its metadata, checksum files and
    shards, of all or some features.

    Where the cache has hashes of its blocks, only damaged and missing blocks are fetched, else whole shards.

    Raises `CacheError` if there is no readable manifest at `path` or no cache at `source`, or the connection stays
    broken. What the copy cannot give (features that it lacks or has with other bytes, or damaged itself) is reported.
    """
    manifest = read_root(path)
    refuse_links(path, manifest)
    place = open_location(source)
    theirs = required_root(place)
    progress.begin("fetching", None, unit="bytes")
    with _partial_files(path) as folder:
        return _restored(path, manifest, place, theirs, features, folder, threads, progress)


@contextlib.contextmanager
def _partial_files(path: Path) -> Iterator[Path]:
    """Where files are kept while they come, for this process alone. What has come stays if the repair fails or is
    killed, so that the next one goes on with it; `featcache gc` removes it when no repair is under way.

    Within the cache's directory, since a finished file is renamed into its place.
    """
    folder = files.inside(path, f"{STATE}/{RESTORED}")
    with cache_lock(path):
        files.make_directory(folder)
        held = locks.try_lock(folder / "lock")
    if held is None:
        raise CacheError(
            f"another process is repairing {path} from another copy at this moment", remedy="wait until it is done"
        )
    whole = False
    try:
        yield folder
        whole = True
    finally:
        with cache_lock(path):  # an idle cache loses its state directory on the way out
            held.release(remove=True)
            (files.remove_tree if whole else files.remove_empty_directory)(folder)


def _restored(
    path: Path,
    manifest: Manifest,
    place: Location,
    theirs: Manifest,
    features: Sequence[str] | None,
    folder: Path,
    threads: int,
    progress: Progress,
) -> Restored:
    mended = repair_metadata(path)
    refused: list[str] = []
    recorded: dict[str, list[str]] = {}
    blocks: dict[str, list[ShardBlocks] | None] = {}
    local = open_location(path)
    chosen = manifest if features is None or manifest.format == "wds" else manifest.only(features)
    without: dict[str, str] = {}
    for array in sorted(chosen.arrays):
        try:
            recorded[array] = _record(local, place, manifest, array, mended)
        except CacheError as error:
            refused.append(f"{array}: {error.what}")
            continue
        try:
            blocks[array] = _blocks(local, place, manifest, array, mended)
        except CacheError as error:
            # A copy of an earlier version has none: whole shards come, and from these the hashes can be made again.
            blocks[array], without[blocks_path(manifest, array)] = None, f"{array}: {error.what}"
    n_bytes: dict[str, int] = {}

    def mend(entry: ShardFileEntry) -> None:
        sha256 = recorded[entry.array][entry.shard]
        target = files.inside(path, entry.name)
        if _sha256(target) == sha256:
            return
        of_array = blocks[entry.array]
        if theirs.checksums.get(entry.array) != manifest.checksums[entry.array]:
            refused.append(f"{entry.name}: {place.url} does not hold these bytes of {entry.array!r}")
            return
        try:
            files.make_directory(target.parent)
            file = transfer.wanted(place, manifest, entry, sha256, of_array[entry.shard] if of_array else None)
            partial = folder / transfer.partial_name(entry)
            fetched = transfer.fetch(place, file, target, partial, damaged=target, progress=progress)
            n_bytes[entry.name] = fetched.n_bytes
        except (DamagedSource, Unreadable) as error:
            refused.append(f"{entry.name}: {error.what}")

    in_parallel((e for e in shard_files(chosen) if e.array in recorded), mend, lambda _: None, threads)
    if without:
        made = repair_metadata(path)
        mended += made
        refused += [what for name, what in without.items() if name not in made]
    return Restored(files=(*mended, *sorted(n_bytes)), n_bytes=sum(n_bytes.values()), refused=tuple(sorted(refused)))


def _record(local: Location, place: Location, manifest: Manifest, array: str, mended: list[str]) -> list[str]:
    """The SHA-256 of an array's shards; the file that says so is fetched if it is lost here."""
    try:
        return read_checksums(local, manifest, array)
    except CacheError:
        _copy(
            local, place, checksums_path(manifest, array), manifest.checksums[array], checksums_limit(manifest), mended
        )
        return read_checksums(local, manifest, array)


def _blocks(
    local: Location, place: Location, manifest: Manifest, array: str, mended: list[str]
) -> list[ShardBlocks] | None:
    """The hashes of an array's blocks; the file that says so is fetched if it is lost here."""
    try:
        return read_blocks(local, manifest, array)
    except CacheError:
        _copy(local, place, blocks_path(manifest, array), manifest.blocks[array], blocks_limit(manifest, array), mended)
        return read_blocks(local, manifest, array)


def _copy(local: Location, place: Location, name: str, sha256: str, limit: int, mended: list[str]) -> None:
    """Write a checksum file as `place` has it; raises `CacheError` unless it is the one that the manifest names."""
    data = read_small(place, name, limit)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedSource(f"{place.url}/{name} is damaged: it is not the file that the manifest names")
    target = files.inside(Path(local.address), name)
    files.make_directory(target.parent)
    files.atomic_write(target, [data])
    mended.append(name)


def _sha256(path: Path) -> str | None:
    try:
        return files.sha256_of(path)
    except CacheError:
        return None
