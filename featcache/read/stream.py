"""Reading a cache where it lies: blocks of shards come over the wire and stay in a bounded local directory.

A sample's bytes are found as in a local cache (by arithmetic, or by the shard's index), then taken from
blocks of 1 MiB. Each is checked against its recorded hash when it comes, and ends in a crc32c on disk, so a directory
that survived a crash cannot serve damaged bytes either. Of a cache without such hashes, shards of at most 16 MiB are
fetched whole once and checked against their SHA-256; larger ones cannot be checked.

Every epoch in `sequential_order` fetches each block once; a global shuffle of a cache much larger than the directory
fetches a block for every sample, which costs bandwidth: pull such a cache, or read it in sequential order.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import google_crc32c

from featcache.console import errors, safe
from featcache.errors import CacheError
from featcache.paths import user_cache
from featcache.read.fetch import TRIES, verified_blocks, wanted
from featcache.read.reader import Cache
from featcache.read.root import require_authentic, required_root
from featcache.store import blocks as hashes
from featcache.store import wds
from featcache.store.backends import Index, Indexed, Indices, ShardFile, Strided
from featcache.store.blocks import BlockHasher, ShardBlocks
from featcache.store.contents import ShardFileEntry, array_files, read_blocks, read_checksums
from featcache.store.layout import sample_bytes
from featcache.store.manifest import Manifest
from featcache.store.places import Location, Missing, is_missing
from featcache.store.remote import open_location
from featcache.store.root import root_bytes

DEFAULT_CACHE_BYTES = 10 << 30
# Up to this length a shard without hashes of its blocks is fetched whole, to be checked.
WHOLE_BYTES = 16 << 20


def default_cache_directory() -> Path:
    """`$FEATCACHE_STREAM_DIR`, else `featcache/stream` under the user's cache directory."""
    chosen = os.environ.get("FEATCACHE_STREAM_DIR")
    return Path(chosen) if chosen else user_cache("FEATCACHE_STREAM_DIR") / "stream"


class BlockCache:
    """Blocks of remote files in a local directory of at most `limit_bytes` (as far as this process knows).

    Several processes may share the directory; a block that another one evicted is fetched again.
    """

    def __init__(self, place: Location, directory: Path, limit_bytes: int) -> None:
        self._place, self._directory = place, directory
        self._limit, self._block = limit_bytes, hashes.BLOCK_BYTES
        if limit_bytes < 4 * self._block:
            raise CacheError(f"a stream needs at least {4 * self._block} bytes of local cache, not {limit_bytes}")
        self._lock = threading.Lock()
        self._known: OrderedDict[str, int] = OrderedDict()
        self._bytes = 0
        self._fetching: dict[str, threading.Lock] = {}
        self._serial = itertools.count()
        self.fetched_bytes = 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
            entries = [(e.stat().st_mtime_ns, e.name, e.stat().st_size) for e in os.scandir(directory) if e.is_file()]
        except OSError as error:
            raise CacheError(
                f"{directory} cannot be used: {error.strerror}",
                remedy="set $FEATCACHE_STREAM_DIR to a folder that can be written to",
            ) from error
        for _, name, size in sorted(entries):
            if name.endswith(".new"):
                (directory / name).unlink(missing_ok=True)
                continue
            self._known[name] = size
            self._bytes += size
        with self._lock:
            self._evict()

    def read_directly(self, name: str, start: int, stop: int) -> bytes:
        """Bytes that are wanted once, around the blocks and unchecked."""
        try:
            return self._place.read(name, start, stop)
        except Missing as error:
            raise is_missing(self._place, name) from error

    def read(self, name: str, size: int, start: int, out: memoryview, recorded: ShardBlocks | None) -> None:
        """Fill `out` with the bytes of file `name` (of length `size`) from `start` on, checked if its
        blocks are recorded.
        """
        position = 0
        while position < len(out):
            block, offset = divmod(start + position, self._block)
            data = self._get(name, size, block, recorded)
            piece = memoryview(data)[offset : offset + len(out) - position]
            if not piece:
                raise CacheError(f"{self._place.url}/{name} is shorter than its manifest says")
            out[position : position + len(piece)] = piece
            position += len(piece)

    def fetch_whole(self, name: str, size: int, sha256: str) -> ShardBlocks:
        """Fetch all blocks of a file, check them against its SHA-256, and keep them. Returns their hashes.

        Raises `CacheError` if the bytes are wrong several times.
        """
        for _ in range(TRIES):
            data = self.read_directly(name, 0, size)
            with self._lock:
                self.fetched_bytes += len(data)
            if hashlib.sha256(data).hexdigest() == sha256:
                hasher = BlockHasher()
                hasher.update(memoryview(data))
                for start in range(0, size, self._block):
                    self._keep(_key(name, start // self._block), data[start : start + self._block])
                return hasher.result()
        raise CacheError(
            f"{self._place.url}/{name} is damaged: its bytes do not match the recorded SHA-256",
            remedy="tell whoever shares the cache; featcache verify checks it at its source",
        )

    def _get(self, name: str, size: int, block: int, recorded: ShardBlocks | None) -> bytes:
        key = _key(name, block)
        with self._lock:
            lock = self._fetching.setdefault(key, threading.Lock())
        try:
            # One fetch for all threads that want the same block.
            with lock:
                data = self._load(key)
                return data if data is not None else self._fetch(key, name, size, block, recorded)
        finally:
            with self._lock:
                self._fetching.pop(key, None)

    def _load(self, key: str) -> bytes | None:
        with self._lock:
            if key not in self._known:
                return None
            self._known.move_to_end(key)
        try:
            data = (self._directory / key).read_bytes()
        except OSError:
            data = b""
        if len(data) > 4 and struct.unpack("<I", data[-4:])[0] == google_crc32c.value(data[:-4]):
            return data[:-4]
        with self._lock:
            self._bytes -= self._known.pop(key, 0)
        return None

    def _fetch(self, key: str, name: str, size: int, block: int, recorded: ShardBlocks | None) -> bytes:
        start = block * self._block
        stop = min(start + self._block, size)
        if recorded is None:
            data = self.read_directly(name, start, stop)
        else:
            try:
                data = b"".join(verified_blocks(self._place, name, recorded, start, stop))
            except Missing as error:
                raise is_missing(self._place, name) from error
        with self._lock:
            self.fetched_bytes += len(data)
        self._keep(key, data)
        return data

    def _keep(self, key: str, data: bytes) -> None:
        # Not `files.atomic_write`, which would hash each block again: its crc32c tells a torn one.
        temporary = self._directory / f"{os.getpid()}-{next(self._serial)}.new"
        with self._lock:
            self._bytes += len(data) + 4 - self._known.pop(key, 0)
            self._known[key] = len(data) + 4
            self._evict()
        try:
            temporary.write_bytes(data + struct.pack("<I", google_crc32c.value(data)))
            temporary.replace(self._directory / key)
        except OSError:
            # A full disk makes streaming slower, not wrong.
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _evict(self) -> None:
        while self._bytes > self._limit and self._known:
            key, size = self._known.popitem(last=False)
            self._bytes -= size
            with contextlib.suppress(OSError):
                (self._directory / key).unlink()


def _key(name: str, block: int) -> str:
    return f"{name.replace('/', '+')}.{block}"


class _RemoteFile:
    """A shard file behind a `BlockCache`. `recorded`: the hashes of its blocks, None if they cannot be checked."""

    def __init__(self, blocks: BlockCache, name: str, size: int, recorded: ShardBlocks | None) -> None:
        self._blocks, self.name, self.size, self._recorded = blocks, name, size, recorded

    def read(self, start: int, out: memoryview) -> None:
        self._blocks.read(self.name, self.size, start, out, self._recorded)

    def tail(self, n_bytes: int) -> bytes:
        """The last bytes. Unchecked ones need no whole block."""
        if self._recorded is None:
            return self._blocks.read_directly(self.name, self.size - n_bytes, self.size)
        out = bytearray(n_bytes)
        self.read(self.size - n_bytes, memoryview(out))
        return bytes(out)


class _RemoteStrided(Strided):
    def __init__(self, file: _RemoteFile, start: int, stride: int, length: int) -> None:
        super().__init__(start, stride, length)
        self._file = file

    def _fill(self, buffers: list[memoryview], offset: int) -> None:
        for buffer in buffers:
            self._file.read(offset, buffer)
            offset += len(buffer)


class _RemoteIndexed(Indexed):
    def __init__(self, file: _RemoteFile, index: Index, compressor: str | None, sample_bytes: int) -> None:
        super().__init__(index, compressor, sample_bytes, file.name)
        self._file = file

    def _fill(self, buffer: memoryview, offset: int) -> None:
        self._file.read(offset, buffer)


class RemoteBackend:
    """Shards of a cache at a `Location`, through a `BlockCache`."""

    def __init__(self, place: Location, manifest: Manifest, blocks: BlockCache) -> None:
        self.place, self.manifest, self.blocks = place, manifest, blocks
        self._layout = wds.tar_layout(manifest) if manifest.format == "wds" else None
        self._indices = Indices(manifest)
        # What is recorded of an array's shards, read when the first of them is opened.
        self._blocks: dict[str, list[ShardBlocks] | None] = {}
        self._checksums: dict[str, list[str]] = {}
        self._whole: dict[str, ShardBlocks] = {}
        self._lock = threading.RLock()

    def _file(self, entry: ShardFileEntry) -> _RemoteFile:
        """The file of an entry, with what its bytes are to be checked against."""
        manifest = self.manifest
        key = "" if manifest.format == "wds" else entry.array
        with self._lock:
            if key not in self._blocks:
                self._blocks[key] = read_blocks(self.place, manifest, entry.array)
            recorded = self._blocks[key]
            if recorded is not None:
                shard = recorded[entry.shard]
                return _RemoteFile(self.blocks, entry.name, shard.n_bytes, shard)
            if key not in self._checksums:
                self._checksums[key] = read_checksums(self.place, manifest, entry.array)
            file = wanted(self.place, manifest, entry, self._checksums[key][entry.shard], None)
            if file.n_bytes > WHOLE_BYTES:
                return _RemoteFile(self.blocks, entry.name, file.n_bytes, None)
            if entry.name not in self._whole:
                self._whole[entry.name] = self.blocks.fetch_whole(entry.name, file.n_bytes, file.sha256)
            return _RemoteFile(self.blocks, entry.name, file.n_bytes, self._whole[entry.name])

    def open_shard(self, array: str, shard: int) -> ShardFile:
        manifest = self.manifest
        dtype, shape = manifest.arrays[array]
        length = sample_bytes(dtype, shape)
        file = self._file(next(array_files(manifest, array, [shard])))
        if self._layout is not None:
            return _RemoteStrided(file, self._layout.data_offset(array), self._layout.stride, length)
        index = self._indices.index(array, shard, file.size, file.tail, file.name)
        if index is None:
            return _RemoteStrided(file, 0, length, length)
        return _RemoteIndexed(file, index, manifest.compressor, length)


def unverified_features(manifest: Manifest) -> list[str]:
    """Features whose bytes cannot be checked when they are streamed: without hashes of blocks, in large shards."""
    if manifest.format == "wds":
        layout = wds.tar_layout(manifest)
        large = not manifest.blocks and layout.tar_bytes(manifest.shard_size) > WHOLE_BYTES
        return sorted(manifest.features) if large else []
    return [
        name
        for name, spec in sorted(manifest.features.items())
        if any(
            array not in manifest.blocks and sample_bytes(*stored) * manifest.shard_size > WHOLE_BYTES
            for array, stored in spec.arrays.items()
        )
    ]


def open_remote(
    url: str,
    *,
    cache_dir: str | Path | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    expect: str | None = None,
    signed_by: Path | None = None,
) -> Cache:
    """Open the cache at `url` for reading through a local directory of at most `cache_bytes`.

    expect, signed_by: as for `featcache.share.transfer.pull`.

    Raises `CacheError` if there is no cache, it is another one, or the place cannot be reached.
    """
    place = open_location(url)
    manifest = required_root(place)
    require_authentic(place, manifest, expect, signed_by)
    if unchecked := unverified_features(manifest):
        errors.print(
            f"[yellow]note[/yellow]: what is streamed of {safe(', '.join(unchecked))} cannot be checked, since this cache "
            "has no hashes of blocks. featcache pull checks every byte; featcache convert CACHE NEW --to "
            f"{manifest.format} makes a copy that has them."
        )
    base = default_cache_directory() if cache_dir is None else Path(cache_dir)
    again = functools.partial(
        open_remote, url, cache_dir=cache_dir, cache_bytes=cache_bytes, expect=expect, signed_by=signed_by
    )
    return remote_cache(place, manifest, base, cache_bytes, reopen=again)


def remote_cache(
    place: Location, manifest: Manifest, base: Path, cache_bytes: int, *, reopen: Callable[[], Cache] | None = None
) -> Cache:
    """The cache at a place with the manifest that was read there, through a directory below `base`."""
    # By content: a cache that changes at its place never meets blocks of its former self. 'checked': nor blocks that
    # an earlier version of this program kept without checking them.
    name = hashlib.sha256(b"checked " + place.address.encode() + root_bytes(manifest)).hexdigest()[:16]
    blocks = BlockCache(place, base / name, cache_bytes)
    return Cache(place.url, manifest, RemoteBackend(place, manifest, blocks), reopen=reopen)
