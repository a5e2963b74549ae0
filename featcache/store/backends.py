"""Open shards: where the bytes of a sample are, and getting them. Shared by the reader and by verification."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from featcache.errors import CacheError
from featcache.store import files, wds
from featcache.store.layout import index_bytes, sample_bytes, shard_name, shard_samples
from featcache.store.manifest import Manifest
from featcache.store.shards import decompress, parse_index

# Offsets and lengths of a shard's samples, int64 [n] each.
Index = tuple[np.ndarray, np.ndarray]


class ShardFile(Protocol):
    """One open shard of one array. Samples are numbered within the shard."""

    def read_run(self, first: int, buffers: list[memoryview]) -> None:
        """Fill the buffers, each a whole number of samples long, with samples from `first` on."""

    def read_part(self, sample: int, part: int, buffer: memoryview) -> None:
        """Fill the buffer with the `part`-th piece of the sample, counted in pieces of the buffer's length."""


class Backend(Protocol):
    """Where shards come from: a zarr directory, a folder of tars, or a remote store."""

    def open_shard(self, array: str, shard: int) -> ShardFile: ...


def _read_exactly(fd: int, buffers: list[memoryview], offset: int, where: str) -> None:
    total = sum(map(len, buffers))
    while True:
        try:
            got = os.preadv(fd, buffers, offset)
        except OSError as error:
            raise CacheError(f"{where} cannot be read: {error.strerror}") from error
        if got == total:
            return
        if got <= 0:
            raise CacheError(
                f"{where} is shorter than its index says",
                remedy="featcache verify finds and --repair mends it",
            )
        offset, total = offset + got, total - got
        rest = []
        for buffer in buffers:
            if got < len(buffer):
                rest.append(buffer[got:])
            got = max(0, got - len(buffer))
        buffers = rest


def _one_by_one(buffers: list[memoryview], length: int) -> Iterator[memoryview]:
    """The samples' places in buffers that hold several."""
    for buffer in buffers:
        for start in range(0, len(buffer), length):
            yield buffer[start : start + length]


class Strided:
    """Uncompressed samples at equal distances: sample i begins at `start + i * stride`."""

    __slots__ = ("length", "start", "stride")

    def __init__(self, start: int, stride: int, length: int) -> None:
        self.start, self.stride, self.length = start, stride, length

    def _fill(self, buffers: list[memoryview], offset: int) -> None:
        """Fill the buffers with the file's bytes from `offset` on."""
        raise NotImplementedError

    def read_run(self, first: int, buffers: list[memoryview]) -> None:
        offset = self.start + first * self.stride
        if self.stride == self.length:
            self._fill(buffers, offset)
            return
        for buffer in _one_by_one(buffers, self.length):
            self._fill([buffer], offset)
            offset += self.stride

    def read_part(self, sample: int, part: int, buffer: memoryview) -> None:
        self._fill([buffer], self.start + sample * self.stride + part * len(buffer))


class StridedShard(Strided):
    """`Strided` in a file on this machine.

    Mapped (`mapped` and `view` are the file's bytes), a sample is read from the file the first time (one request to
    the disk for all of it) and copied from the mapping ever after (no system call, no work by the page in the kernel:
    memory speed). `touched` tells which samples have been read.
    """

    __slots__ = ("fd", "mapped", "n", "touched", "view", "where")

    def __init__(self, fd: int, start: int, stride: int, length: int, n: int, where: str) -> None:
        super().__init__(start, stride, length)
        self.fd, self.where, self.n = fd, where, n
        self.mapped: np.ndarray | None = None
        self.view = memoryview(b"")
        self.touched = bytearray()

    def map(self) -> None:
        """Map the file; a failure leaves it unmapped, which is only slower."""
        try:
            mapping = mmap.mmap(self.fd, 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):
            return
        self.mapped, self.view = np.frombuffer(mapping, np.uint8), memoryview(mapping)
        self.touched = bytearray(self.n)

    def __del__(self) -> None:
        # The last user closes: a thread may still read from a shard that the cache of open files has dropped.
        os.close(self.fd)

    def _fill(self, buffers: list[memoryview], offset: int) -> None:
        _read_exactly(self.fd, buffers, offset, self.where)


class Indexed:
    """Samples anywhere in the file, compressed or not."""

    def __init__(self, index: Index, compressor: str | None, sample_bytes: int, where: str) -> None:
        self._offsets, self._lengths = index
        self._compressor, self._sample_bytes, self._where = compressor, sample_bytes, where

    def _fill(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer with the file's bytes from `offset` on."""
        raise NotImplementedError

    def _read(self, sample: int, buffer: memoryview) -> None:
        if self._compressor is None:
            self._fill(buffer, int(self._offsets[sample]))
            return
        raw = bytearray(int(self._lengths[sample]))
        self._fill(memoryview(raw), int(self._offsets[sample]))
        decompress(self._compressor, bytes(raw), np.frombuffer(buffer, np.uint8), self._where)

    def read_run(self, first: int, buffers: list[memoryview]) -> None:
        for i, buffer in enumerate(_one_by_one(buffers, self._sample_bytes)):
            self._read(first + i, buffer)

    def read_part(self, sample: int, part: int, buffer: memoryview) -> None:
        if self._compressor is None:
            self._fill(buffer, int(self._offsets[sample]) + part * len(buffer))
            return
        # Compressed samples decode as a whole; keep one part.
        whole = memoryview(bytearray(self._sample_bytes))
        self._read(sample, whole)
        buffer[:] = whole[part * len(buffer) : (part + 1) * len(buffer)]


class IndexedShard(Indexed):
    """`Indexed` in a file on this machine."""

    def __init__(self, fd: int, index: Index, compressor: str | None, sample_bytes: int, where: str) -> None:
        super().__init__(index, compressor, sample_bytes, where)
        self._fd = fd

    def __del__(self) -> None:
        os.close(self._fd)

    def _fill(self, buffer: memoryview, offset: int) -> None:
        _read_exactly(self._fd, [buffer], offset, self._where)


class Indices:
    """The indices of a zarr cache's shards. Which were checked and found contiguous is kept, one byte each, so that
    opening one again reads none.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._contiguous: dict[str, bytearray] = {}

    def index(self, array: str, shard: int, size: int, tail: Callable[[int], bytes], where: str) -> Index | None:
        """Where the samples of a shard of `size` bytes lie; None if uncompressed and one after another from 0 on.

        tail: gives the last so many bytes of the file. Raises `CacheError` if the index is damaged.
        """
        manifest, n_bytes = self._manifest, index_bytes(self._manifest.shard_size)
        known = self._contiguous.setdefault(array, bytearray(manifest.n_shards))
        if known[shard]:
            return None
        if size < n_bytes:
            raise CacheError(f"{where} is damaged: it is too short to hold its index")
        length = sample_bytes(*manifest.arrays[array]) if manifest.compressor is None else None
        n = shard_samples(manifest.dataset.count, manifest.shard_size, shard)
        raw = tail(n_bytes)
        found = parse_index(raw, n=n, shard_size=manifest.shard_size, file_bytes=size, sample_bytes=length, where=where)
        if length is None or (found[0] != np.arange(n) * length).any():
            return found
        known[shard] = 1
        return None


class ZarrBackend:
    """Shards of a zarr cache in a directory."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._indices = Indices(manifest)
        self._folders: dict[str, Path] = {}

    def open_shard(self, array: str, shard: int) -> ShardFile:
        manifest = self.manifest
        dtype, shape = manifest.arrays[array]
        if array not in self._folders:
            self._folders[array] = files.inside(self.path, array)
        where = str(self._folders[array] / shard_name(shard, len(shape)))
        length = sample_bytes(dtype, shape)
        n = shard_samples(manifest.dataset.count, manifest.shard_size, shard)
        fd = files.open_to_read(Path(where))
        try:
            size = os.fstat(fd).st_size
            index = self._indices.index(array, shard, size, lambda n: os.pread(fd, n, size - n), where)
            if index is None:
                return StridedShard(fd, 0, length, length, n, where)
            return IndexedShard(fd, index, manifest.compressor, length, where)
        except BaseException:
            os.close(fd)
            raise


class WdsBackend:
    """Shards of a webdataset cache: tars whose layout follows from the manifest."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._layout = wds.tar_layout(manifest)
        self._checked: dict[str, bytearray] = {}

    def open_shard(self, array: str, shard: int) -> ShardFile:
        manifest, layout = self.manifest, self._layout
        where = str(self.path / wds.tar_name(shard))
        fd = files.open_to_read(Path(where))
        try:
            checked = self._checked.setdefault(array, bytearray(manifest.n_shards))
            n = shard_samples(manifest.dataset.count, manifest.shard_size, shard)
            if not checked[shard]:
                wds.check_tar(fd, layout, array, shard * manifest.shard_size, n, where)
                checked[shard] = 1
            start, length = layout.data_offset(array), layout.members[array].length
            return StridedShard(fd, start, layout.stride, length, n, where)
        except BaseException:
            os.close(fd)
            raise


def open_backend(path: Path, manifest: Manifest) -> Backend:
    """The backend for a cache in a local directory."""
    return WdsBackend(path, manifest) if manifest.format == "wds" else ZarrBackend(path, manifest)
