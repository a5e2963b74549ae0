"""Which shards an earlier verification found sound, and how their files looked then: 8 bytes per shard,
beside the cache.

    .featcache/sound/<array, '/' as '+'>    SHA-256 of the array's SHA256SUMS, then a mark for each shard (zero: none)

A mark is a hash of the file's size, times of change and inode. It says nothing about what a disk does to a file behind
the file system's back: that is for a whole verification to find.
"""

from __future__ import annotations

import os
import struct
from hashlib import blake2b
from pathlib import Path

from featcache.errors import CacheError
from featcache.store import files
from featcache.store.layout import SOUND, STATE

_MARK_BYTES = 8
_NONE = bytes(_MARK_BYTES)


def identity(status: os.stat_result) -> bytes:
    """How a file looks without reading it: its size, times of modification and of change, and inode, hashed."""
    fields = struct.pack("<QqqQ", status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return blake2b(fields, digest_size=_MARK_BYTES).digest()


class Ledger:
    """The marks of one array's shards."""

    def __init__(self, cache: Path, array: str, checksums: str, n_shards: int) -> None:
        self._cache, self._name = cache, f"{STATE}/{SOUND}/{array.replace('/', '+')}"
        self._header = bytes.fromhex(checksums)
        self._marks: bytearray | None = self._load(n_shards)
        self._n_bytes = n_shards * _MARK_BYTES
        self._changed = False

    def _load(self, n_shards: int) -> bytearray | None:
        """The marks of an earlier verification of the same array; None where there are none that can be used."""
        length = len(self._header) + n_shards * _MARK_BYTES
        try:
            data = files.read_bounded(files.inside(self._cache, self._name), length)
        except CacheError:
            return None
        whole = len(data) == length and data.startswith(self._header)
        return bytearray(data[len(self._header) :]) if whole else None

    def unchanged(self, shard: int, status: os.stat_result) -> bool:
        """Whether the shard was found sound and its file looks as it did then."""
        mark = self._at(shard)
        return mark not in (b"", _NONE) and mark == identity(status)

    def _at(self, shard: int) -> bytes:
        return b"" if self._marks is None else bytes(self._marks[shard * _MARK_BYTES : (shard + 1) * _MARK_BYTES])

    def note(self, shard: int, mark: bytes) -> None:
        """Take note of a shard that was found sound (its `identity`), or no longer is (empty)."""
        if self._marks is None:
            self._marks = bytearray(self._n_bytes)
        if self._at(shard) != (mark or _NONE):
            self._marks[shard * _MARK_BYTES : (shard + 1) * _MARK_BYTES] = mark or _NONE
            self._changed = True

    def save(self) -> None:
        """Write the marks; a cache on a read-only disk stays without."""
        if self._marks is None or not self._changed:
            return
        try:
            target = files.inside(self._cache, self._name)
            # One by one, so that a cache which was removed meanwhile does not come back as a folder of marks.
            for folder in (target.parent.parent, target.parent):
                with files.explained(folder, "written"):
                    folder.mkdir(exist_ok=True)
            files.atomic_write(target, [self._header, bytes(self._marks)], durable=False)
        except CacheError:
            return
