"""One shard file from another place: continued where it stopped, checked block by block, never twice what is there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from featcache.errors import CacheError
from featcache.progress import QUIET, Progress
from featcache.store import blocks as hashes
from featcache.store import files
from featcache.store.blocks import ShardBlocks, check_block
from featcache.store.contents import ShardFileEntry, most_bytes
from featcache.store.manifest import Manifest
from featcache.store.places import DamagedSource, Location, Missing, is_missing

# Of a block that comes damaged, and of a whole shard without hashes of its blocks.
TRIES = 3


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A file as the manifest wants it: length and SHA-256, and the hashes of its blocks where there are any."""

    name: str
    n_bytes: int
    sha256: str
    blocks: ShardBlocks | None


@dataclass(frozen=True)
class Fetched:
    """A file that is in place now: the hashes of its bytes, and how many of them came over the wire."""

    hashes: files.Hashes
    n_bytes: int


def partial_name(entry: ShardFileEntry) -> str:
    """Name of the file that holds what has come of a shard so far."""
    return f"{entry.name.replace('/', '+')}.fetched"


def wanted(
    place: Location, manifest: Manifest, entry: ShardFileEntry, sha256: str, blocks: ShardBlocks | None
) -> Wanted:
    """What the file of `entry` must be. Only a compressed one without blocks has to be asked for its length, which is
    believed as far as it is possible.
    """
    n_bytes = entry.n_bytes if entry.n_bytes is not None else blocks.n_bytes if blocks is not None else None
    if n_bytes is None:
        try:
            n_bytes = place.size(entry.name)
        except Missing as error:
            raise is_missing(place, entry.name) from error
        if n_bytes > most_bytes(manifest, entry):
            raise DamagedSource(f"{place.url}/{entry.name} is damaged: it cannot have {n_bytes} bytes")
    return Wanted(name=entry.name, n_bytes=n_bytes, sha256=sha256, blocks=blocks)


def fetch(
    place: Location,
    file: Wanted,
    target: Path,
    partial: Path,
    *,
    damaged: Path | None = None,
    progress: Progress = QUIET,
) -> Fetched:
    """Bring one file from `place` to `target`, which takes its name only if every byte is right.

    What has come so far is kept in `partial` (on the same disk), also when the process is killed, and is checked again
    before it is continued: with hashes of blocks after its last whole block, else after its last byte. Blocks that are
    right in the file `damaged` are taken from there.

    Raises `CacheError` if it cannot be had or its bytes are wrong, several times.
    """
    files.make_directory(partial.parent)
    fd = files.open_to_write(partial)
    try:
        if file.blocks is not None:
            found = _fetch_blocks(place, file, file.blocks, fd, partial, damaged, progress)
        else:
            found = _fetch_bytes(place, file, fd, partial, progress)
        files.publish(fd, partial, target)
        return found
    except Missing as error:
        raise is_missing(place, file.name) from error
    finally:
        os.close(fd)


def _damaged(place: Location, file: Wanted, what: str) -> DamagedSource:
    return DamagedSource(f"{place.url}/{file.name} is damaged: {what}")


def _fetch_bytes(place: Location, file: Wanted, fd: int, partial: Path, progress: Progress) -> Fetched:
    """A file without hashes of blocks: checked as a whole, at the end."""
    fetched = 0
    for _ in range(TRIES):
        hasher, position = files.Hasher(), 0
        os.lseek(fd, 0, os.SEEK_SET)
        while data := os.read(fd, hashes.BLOCK_BYTES):
            hasher.update(memoryview(data))
            position += len(data)
        if position > file.n_bytes:
            os.ftruncate(fd, 0)
            continue
        for data in place.chunks(file.name, position, file.n_bytes):
            files.append(fd, data, partial)
            hasher.update(memoryview(data))
            fetched += len(data)
            progress.update(len(data))
        found = hasher.result()
        if found.sha256 == file.sha256:
            return Fetched(found, fetched)
        os.ftruncate(fd, 0)
    raise _damaged(place, file, "its bytes do not match the recorded SHA-256")


def _fetch_blocks(
    place: Location,
    file: Wanted,
    blocks: ShardBlocks,
    fd: int,
    partial: Path,
    damaged: Path | None,
    progress: Progress,
) -> Fetched:
    """A file with hashes of its blocks: each is checked before it is written."""
    if blocks.n_bytes != file.n_bytes:
        raise _damaged(place, file, "its manifest and the hashes of its blocks disagree about its length")
    hasher, start = files.Hasher(), 0
    for index, data in _right_blocks(fd, blocks, stop_at_wrong=True):
        hasher.update(memoryview(data))
        start = index * hashes.BLOCK_BYTES + len(data)
    os.ftruncate(fd, start)
    os.lseek(fd, start, os.SEEK_SET)
    fetched = 0
    with contextlib.ExitStack() as stack:
        here: set[int] = set()
        old = -1
        if damaged is not None:
            with contextlib.suppress(CacheError):
                old = files.open_to_read(damaged)
                stack.callback(os.close, old)
                here = {index for index, _ in _right_blocks(old, blocks)}
        while start < file.n_bytes:
            index = start // hashes.BLOCK_BYTES
            if index in here:
                kept = _right_block(old, blocks, index)
                if kept is not None:
                    files.append(fd, kept, partial)
                    hasher.update(memoryview(kept))
                    start += len(kept)
                    continue
                here.discard(index)  # it has changed since
            stop = min([i * hashes.BLOCK_BYTES for i in here if i > index], default=file.n_bytes)
            for data in verified_blocks(place, file.name, blocks, start, stop):
                files.append(fd, data, partial)
                hasher.update(memoryview(data))
                start += len(data)
                fetched += len(data)
                progress.update(len(data))
    found = hasher.result()
    if found.sha256 != file.sha256:
        raise _damaged(place, file, "the hashes of its blocks contradict its SHA-256")
    return Fetched(found, fetched)


def _right_blocks(fd: int, blocks: ShardBlocks, *, stop_at_wrong: bool = False) -> Iterator[tuple[int, bytes]]:
    """The blocks of an open file that are what they must be."""
    for index in range(hashes.n_blocks(blocks.n_bytes)):
        data = _right_block(fd, blocks, index)
        if data is not None:
            yield index, data
        elif stop_at_wrong:
            return


def _right_block(fd: int, blocks: ShardBlocks, index: int) -> bytes | None:
    """A block of an open file; None if it is not what it must be, or the disk does not give it any more."""
    start = index * hashes.BLOCK_BYTES
    try:
        data = os.pread(fd, min(hashes.BLOCK_BYTES, blocks.n_bytes - start), start)
        check_block(blocks, index, data, "")
    except (CacheError, OSError):
        return None
    return data


def verified_blocks(place: Location, name: str, blocks: ShardBlocks, start: int, stop: int) -> Iterator[bytes]:
    """The blocks between `start` (a block's beginning) and `stop`, each checked; one that is wrong is fetched again.

    Raises `Missing`, and `CacheError` for one that is wrong several times.
    """
    failures = 0
    while start < stop:
        index = start // hashes.BLOCK_BYTES
        block = bytearray()
        with contextlib.closing(place.chunks(name, start, stop)) as chunks:
            for data in chunks:
                block += data
                while block and len(block) >= min(hashes.BLOCK_BYTES, stop - start):
                    whole = bytes(block[: hashes.BLOCK_BYTES])
                    try:
                        check_block(blocks, index, whole, f"{place.url}/{name}")
                    except CacheError as error:
                        failures += 1
                        if failures == TRIES:
                            raise DamagedSource(f"{error.what} ({TRIES} times)") from error
                        break
                    del block[: hashes.BLOCK_BYTES]
                    yield whole
                    failures = 0
                    start, index = start + len(whole), index + 1
                else:
                    continue
                break  # ask for that block again
