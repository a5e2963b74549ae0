"""Open shards: where the bytes of a sample are, and getting them. Shared by the reader and by
verification.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from featcache.errors import CacheError
from featcache.store import files, wds
from featcache.store.layout import sample_bytes, shard_name, shard_samples
from featcache.store.manifest import Manifest
from featcache.store.shards import decompress, read_index


class ShardFile(Protocol):
    """One open shard of one array. Samples are numbered within the shard."""

    def read_run(self, first: int, buffers: list[memoryview]) -> None:
        """Fill the buffers, each a whole number of samples long, with samples from `first` on."""

    def read_part(self, sample: int, part: int, buffer: memoryview) -> None:
        """Fill the buffer with the `part`-th piece of the sample, counted in pieces of the buffer's
        length.
        """


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


class StridedShard:
    """Uncompressed samples at equal distances: sample i begins at `start + i * stride`.

    Mapped (`mapped` and `view` are the file's bytes), a sample is read from the file the first time (one request to
    the disk for all of it) and copied from the mapping ever after (no system call, no work by the page in the kernel:
    memory speed). `touched` tells which samples have been read.
    """

    __slots__ = ("fd", "length", "mapped", "n", "start", "stride", "touched", "view", "where")

    def __init__(self, fd: int, start: int, stride: int, length: int, n: int, where: str) -> None:
        self.fd, self.start, self.stride, self.length, self.where = fd, start, stride, length, where
        self.n = n
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

    def read_run(self, first: int, buffers: list[memoryview]) -> None:
        offset = self.start + first * self.stride
        if self.stride == self.length:
            _read_exactly(self.fd, buffers, offset, self.where)
            return
        for buffer in _one_by_one(buffers, self.length):
            _read_exactly(self.fd, [buffer], offset, self.where)
            offset += self.stride

    def read_part(self, sample: int, part: int, buffer: memoryview) -> None:
        offset = self.start + sample * self.stride + part * len(buffer)
        _read_exactly(self.fd, [buffer], offset, self.where)


class IndexedShard:
    """Samples anywhere in the file, compressed or not."""

    def __init__(
        self,
        fd: int,
        offsets: np.ndarray,
        lengths: np.ndarray,
        compressor: str | None,
        sample_bytes: int,
        where: str,
    ) -> None:
        self.fd, self.offsets, self.lengths, self.where = fd, offsets, lengths, where
        self.compressor, self.sample_bytes = compressor, sample_bytes

    def __del__(self) -> None:
        os.close(self.fd)

    def _read(self, sample: int, buffer: memoryview) -> None:
        offset, length = int(self.offsets[sample]), int(self.lengths[sample])
        if self.compressor is None:
            _read_exactly(self.fd, [buffer], offset, self.where)
            return
        raw = bytearray(length)
        _read_exactly(self.fd, [memoryview(raw)], offset, self.where)
        decompress(self.compressor, bytes(raw), np.frombuffer(buffer, np.uint8), self.where)

    def read_run(self, first: int, buffers: list[memoryview]) -> None:
        for i, buffer in enumerate(_one_by_one(buffers, self.sample_bytes)):
            self._read(first + i, buffer)

    def read_part(self, sample: int, part: int, buffer: memoryview) -> None:
        if self.compressor is None:
            offset = int(self.offsets[sample]) + part * len(buffer)
            _read_exactly(self.fd, [buffer], offset, self.where)
            return
        # Compressed samples decode as a whole; keep one part.
        whole = memoryview(bytearray(self.sample_bytes))
        self._read(sample, whole)
        buffer[:] = whole[part * len(buffer) : (part + 1) * len(buffer)]


class ZarrBackend:
    """Shards of a zarr cache in a directory."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        # Arrays' shards whose index was checked and found contiguous, one byte each: reopening costs one
        # open().
        self._contiguous: dict[str, bytearray] = {}
        self._folders: dict[str, Path] = {}

    def open_shard(self, array: str, shard: int) -> ShardFile:
        manifest = self.manifest
        dtype, shape = manifest.arrays[array]
        if array not in self._folders:
            self._folders[array] = files.inside(self.path, array)
        where = str(self._folders[array] / shard_name(shard, len(shape)))
        length = sample_bytes(dtype, shape)
        n = shard_samples(manifest.dataset.count, manifest.shard_size, shard)
        known = self._contiguous.setdefault(array, bytearray(manifest.n_shards))
        fd = files.open_to_read(Path(where))
        try:
            if known[shard]:
                return StridedShard(fd, 0, length, length, n, where)
            offsets, lengths = read_index(
                fd,
                n=n,
                shard_size=manifest.shard_size,
                sample_bytes=length if manifest.compressor is None else None,
                where=where,
            )
            if manifest.compressor is None and (offsets == np.arange(n) * length).all():
                known[shard] = 1
                return StridedShard(fd, 0, length, length, n, where)
            return IndexedShard(fd, offsets, lengths, manifest.compressor, length, where)
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
