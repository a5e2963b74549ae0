"""Reading a cache where it lies: blocks of shards come over the wire and stay in a bounded local directory.

A sample's bytes are found as in a local cache (by arithmetic, or by the shard's index), then taken from
blocks of fixed size. Each block on disk ends in a crc32c, so a directory that survived a crash cannot serve
damaged bytes. Every epoch in `sequential_order` fetches each block once; a global shuffle of a cache much
larger than the directory fetches a block for every sample, which costs bandwidth: pull such a cache, or read
it in sequential order.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import struct
import threading
from collections import OrderedDict
from pathlib import Path

import google_crc32c
import numpy as np

from featcache.errors import CacheError
from featcache.reader import Cache
from featcache.remote import Location, Missing, open_location
from featcache.share import read_remote_root
from featcache.store import wds
from featcache.store.backends import ShardFile
from featcache.store.layout import index_bytes, sample_bytes, shard_name, shard_samples
from featcache.store.manifest import Manifest
from featcache.store.root import root_bytes
from featcache.store.shards import decompress, parse_index

DEFAULT_CACHE_BYTES = 10 << 30
BLOCK_BYTES = 1 << 20


def default_cache_directory() -> Path:
    """`$FEATCACHE_STREAM_DIR`, else `featcache/stream` under the user's cache directory."""
    chosen = os.environ.get("FEATCACHE_STREAM_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(base) / "featcache" / "stream"


class BlockCache:
    """Blocks of remote files in a local directory of at most `limit_bytes` (as far as this process knows).

    Several processes may share the directory; a block that another one evicted is fetched again.
    """

    def __init__(self, place: Location, directory: Path, limit_bytes: int, block_bytes: int = BLOCK_BYTES) -> None:
        self._place, self._directory = place, directory
        self._limit, self._block = limit_bytes, block_bytes
        if limit_bytes < 4 * block_bytes:
            raise CacheError(f"a stream needs at least {4 * block_bytes} bytes of local cache, not {limit_bytes}")
        self._lock = threading.Lock()
        self._known: OrderedDict[str, int] = OrderedDict()
        self._bytes = 0
        self._fetching: dict[str, threading.Lock] = {}
        self._sizes: dict[str, int] = {}
        self._serial = itertools.count()
        self.fetched_bytes = 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
            entries = [(e.stat().st_mtime_ns, e.name, e.stat().st_size) for e in os.scandir(directory) if e.is_file()]
        except OSError as error:
            raise CacheError(
                f"{directory} cannot be used: {error.strerror}", remedy="choose another --cache-dir"
            ) from error
        for _, name, size in sorted(entries):
            if name.endswith(".new"):
                (directory / name).unlink(missing_ok=True)
                continue
            self._known[name] = size
            self._bytes += size
        with self._lock:
            self._evict()

    def size(self, name: str) -> int:
        """Length of a remote file (asked once)."""
        if name not in self._sizes:
            try:
                self._sizes[name] = self._place.size(name)
            except Missing as error:
                raise CacheError(f"{self._place.url}/{name} is missing") from error
        return self._sizes[name]

    def read_directly(self, name: str, start: int, stop: int) -> bytes:
        """Bytes that are wanted once, around the blocks."""
        try:
            return self._place.read(name, start, stop)
        except Missing as error:
            raise CacheError(f"{self._place.url}/{name} is missing") from error

    def read(self, name: str, size: int, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of file `name` (of length `size`) from `start` on."""
        position = 0
        while position < len(out):
            block, offset = divmod(start + position, self._block)
            data = self._get(name, size, block)
            piece = memoryview(data)[offset : offset + len(out) - position]
            if not piece:
                raise CacheError(f"{self._place.url}/{name} is shorter than its manifest says")
            out[position : position + len(piece)] = piece
            position += len(piece)

    def _get(self, name: str, size: int, block: int) -> bytes:
        key = f"{name.replace('/', '+')}.{block}"
        with self._lock:
            lock = self._fetching.setdefault(key, threading.Lock())
        try:
            # One fetch for all threads that want the same block.
            with lock:
                data = self._load(key)
                return data if data is not None else self._fetch(key, name, size, block)
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

    def _fetch(self, key: str, name: str, size: int, block: int) -> bytes:
        start = block * self._block
        try:
            data = self._place.read(name, start, min(start + self._block, size))
        except Missing as error:
            raise CacheError(f"{self._place.url}/{name} is missing") from error
        temporary = self._directory / f"{os.getpid()}-{next(self._serial)}.new"
        with self._lock:
            self.fetched_bytes += len(data)
            self._known[key] = len(data) + 4
            self._bytes += len(data) + 4
            self._evict()
        try:
            temporary.write_bytes(data + struct.pack("<I", google_crc32c.value(data)))
            temporary.replace(self._directory / key)
        except OSError:
            # A full disk makes streaming slower, not wrong.
            with contextlib.suppress(OSError):
                temporary.unlink()
        return data

    def _evict(self) -> None:
        while self._bytes > self._limit and self._known:
            key, size = self._known.popitem(last=False)
            self._bytes -= size
            with contextlib.suppress(OSError):
                (self._directory / key).unlink()


class _RemoteShard:
    """One uncompressed shard: samples at equal distances."""

    def __init__(self, blocks: BlockCache, name: str, size: int, length: int, start: int, stride: int) -> None:
        self._blocks, self._name, self._size = blocks, name, size
        self._length, self._start, self._stride = length, start, stride

    def read_run(self, first: int, buffers: list[memoryview]) -> None:
        sample = first
        for buffer in buffers:
            if self._stride == self._length:
                self._blocks.read(self._name, self._size, self._start + sample * self._stride, buffer)
                sample += len(buffer) // self._length
                continue
            for place in range(0, len(buffer), self._length):
                self.read_part(sample, 0, buffer[place : place + self._length])
                sample += 1

    def read_part(self, sample: int, part: int, buffer: memoryview) -> None:
        offset = self._start + sample * self._stride + part * len(buffer)
        self._blocks.read(self._name, self._size, offset, buffer)


class _CompressedRemoteShard:
    """One compressed shard: offsets and lengths from its index."""

    def __init__(
        self, blocks: BlockCache, name: str, size: int, index: tuple[np.ndarray, np.ndarray], length: int, codec: str
    ) -> None:
        self._blocks, self._name, self._size = blocks, name, size
        self._offsets, self._lengths = index
        self._length, self._codec = length, codec

    def _read(self, sample: int, buffer: memoryview) -> None:
        raw = bytearray(int(self._lengths[sample]))
        self._blocks.read(self._name, self._size, int(self._offsets[sample]), memoryview(raw))
        decompress(self._codec, bytes(raw), np.frombuffer(buffer, np.uint8), self._name)

    def read_run(self, first: int, buffers: list[memoryview]) -> None:
        for buffer in buffers:
            for place in range(0, len(buffer), self._length):
                self._read(first, buffer[place : place + self._length])
                first += 1

    def read_part(self, sample: int, part: int, buffer: memoryview) -> None:
        whole = memoryview(bytearray(self._length))
        self._read(sample, whole)
        buffer[:] = whole[part * len(buffer) : (part + 1) * len(buffer)]


class RemoteBackend:
    """Shards of a cache at a `Location`, through a `BlockCache`."""

    def __init__(self, manifest: Manifest, blocks: BlockCache) -> None:
        self.manifest, self.blocks = manifest, blocks
        self._layout = wds.tar_layout(manifest) if manifest.format == "wds" else None
        # Arrays' shards whose index was checked and found contiguous, one byte each.
        self._contiguous: dict[str, bytearray] = {}

    def open_shard(self, array: str, shard: int) -> ShardFile:
        manifest, blocks = self.manifest, self.blocks
        dtype, shape = manifest.arrays[array]
        length = sample_bytes(dtype, shape)
        n = shard_samples(manifest.dataset.count, manifest.shard_size, shard)
        if self._layout is not None:
            name, size = wds.tar_name(shard), self._layout.tar_bytes(n)
            return _RemoteShard(blocks, name, size, length, self._layout.data_offset(array), self._layout.stride)
        name = f"{array}/{shard_name(shard, len(shape))}"
        tail = index_bytes(manifest.shard_size)
        if manifest.compressor is None:
            size = n * length + tail
            known = self._contiguous.setdefault(array, bytearray(manifest.n_shards))
            if not known[shard]:
                raw = blocks.read_directly(name, size - tail, size)
                offsets, _ = parse_index(
                    raw, n=n, shard_size=manifest.shard_size, file_bytes=size, sample_bytes=length, where=name
                )
                if (offsets != np.arange(n) * length).any():
                    raise CacheError(
                        f"{name} was rewritten by another program: its samples are not in order",
                        remedy="featcache verify finds such shards at their source",
                    )
                known[shard] = 1
            return _RemoteShard(blocks, name, size, length, 0, length)
        size = blocks.size(name)
        if size < tail:
            raise CacheError(f"{name} is damaged: it is too short to hold its index")
        raw = blocks.read_directly(name, size - tail, size)
        index = parse_index(raw, n=n, shard_size=manifest.shard_size, file_bytes=size, sample_bytes=None, where=name)
        return _CompressedRemoteShard(blocks, name, size, index, length, manifest.compressor)


def open_remote(url: str, *, cache_dir: str | Path | None = None, cache_bytes: int = DEFAULT_CACHE_BYTES) -> Cache:
    """Open the cache at `url` for reading through a local directory of at most `cache_bytes`.

    Raises `CacheError` if there is no cache or the place cannot be reached.
    """
    place = open_location(url)
    manifest = read_remote_root(place)
    if manifest is None:
        raise CacheError(f"there is no cache at {url}", remedy=f"featcache ls {url} lists what is there")
    base = default_cache_directory() if cache_dir is None else Path(cache_dir)
    # By content: a cache that changes at its place never meets blocks of its former self.
    name = hashlib.sha256(place.url.encode() + root_bytes(manifest)).hexdigest()[:16]
    blocks = BlockCache(place, base / name, cache_bytes)
    return Cache(place.url, manifest, RemoteBackend(manifest, blocks))
