"""The webdataset backend: one tar per shard, one `.npy` member for each array of each sample.

    featcache.json      manifest and its checksum
    SHA256SUMS          of the tars
    00000000.tar        members <slot, 9 digits>.<array, '/' as '+'>.npy, sample by sample, arrays by name

Headers carry no times, owners or other accidents, and every member of one array has the same length. So
where a sample lies follows from the manifest, and reading needs no index: the reader seeks as in a zarr
shard, while any webdataset pipeline streams the same files.
"""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from featcache.errors import CacheError
from featcache.store.layout import sample_bytes
from featcache.store.manifest import Manifest

if TYPE_CHECKING:
    from featcache.store.layout import Buffer

_BLOCK = 512
_SLOT_DIGITS = 9
_END = bytes(2 * _BLOCK)


def tar_name(shard: int) -> str:
    return f"{shard:08d}.tar"


def member_name(slot: int, array: str) -> str:
    return f"{slot:0{_SLOT_DIGITS}d}.{array.replace('/', '+')}.npy"


def npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """A version 1.0 `.npy` header, padded to 64 bytes, for a C-ordered little-endian array."""
    dims = f"({shape[0]},)" if len(shape) == 1 else str(tuple(shape))
    descr = dtype.newbyteorder("<").str
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {dims}, }}"
    length = -(-(10 + len(text) + 1) // 64) * 64
    return b"\x93NUMPY\x01\x00" + (length - 10).to_bytes(2, "little") + text.ljust(length - 11).encode() + b"\n"


def tar_header(name: str, length: int) -> bytes:
    """A ustar header of a plain file, a function of name and length alone."""
    info = tarfile.TarInfo(name)
    info.size = length
    info.mode = 0o644
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


@dataclass(frozen=True)
class Member:
    """One array's member within a sample's stretch of the tar."""

    offset: int  # of the tar header, from the beginning of the sample
    npy: bytes
    length: int  # of the values, without the npy header
    padding: int


@dataclass(frozen=True)
class TarLayout:
    """Where everything lies in a tar. `stride` is the bytes from one sample to the next."""

    members: dict[str, Member]
    stride: int

    def data_offset(self, array: str) -> int:
        """Offset of the first sample's values."""
        member = self.members[array]
        return member.offset + _BLOCK + len(member.npy)

    def tar_bytes(self, n: int) -> int:
        return n * self.stride + len(_END)


def tar_layout(manifest: Manifest) -> TarLayout:
    """The layout of a cache's tars; raises `CacheError` where a feature's name is too long for a tar header."""
    members, offset = {}, 0
    if manifest.dataset.count > 10**_SLOT_DIGITS:
        raise CacheError(f"a webdataset cache holds at most {10**_SLOT_DIGITS} samples", remedy="use the zarr format")
    if len({name.lower() for name in manifest.arrays}) < len(manifest.arrays):
        raise CacheError("two features differ only in case, which webdataset cannot tell apart", remedy="use zarr")
    for array, (dtype, shape) in sorted(manifest.arrays.items()):
        if len(member_name(0, array)) > 100:
            raise CacheError(f"the name {array!r} is too long for a tar header", remedy="use the zarr format")
        npy = npy_header(dtype, shape)
        length = sample_bytes(dtype, shape)
        padding = -(len(npy) + length) % _BLOCK
        members[array] = Member(offset, npy, length, padding)
        offset += _BLOCK + len(npy) + length + padding
    return TarLayout(members, offset)


def encode_tar(layout: TarLayout, first_slot: int, arrays: dict[str, np.ndarray]) -> list[Buffer]:
    """The buffers whose concatenation is the tar of samples `first_slot`... (array -> `[n,
    *stored_shape]`).
    """
    buffers: list[Buffer] = []
    little = {
        name: np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")) for name, values in arrays.items()
    }
    n = len(next(iter(little.values())))
    for i in range(n):
        for name, member in layout.members.items():
            header = tar_header(member_name(first_slot + i, name), len(member.npy) + member.length)
            buffers += [header + member.npy, little[name][i : i + 1], bytes(member.padding)]
    return [*buffers, _END]


def check_tar(fd: int, layout: TarLayout, array: str, first_slot: int, n: int, where: str) -> None:
    """Raises `CacheError` unless the tar has its length, and `array`'s first and last member are where they belong."""
    if os.fstat(fd).st_size != layout.tar_bytes(n):
        raise CacheError(f"{where} is damaged: it must have {layout.tar_bytes(n)} bytes")
    for i in {0, n - 1}:
        check_member(fd, layout, array, first_slot + i, i, where)


def check_member(fd: int, layout: TarLayout, array: str, slot: int, i: int, where: str) -> None:
    """Raises `CacheError` unless the headers of one sample's member are, byte by byte, what they must be."""
    member = layout.members[array]
    expected = tar_header(member_name(slot, array), len(member.npy) + member.length) + member.npy
    if os.pread(fd, len(expected), i * layout.stride + member.offset) != expected:
        raise CacheError(f"{where} is damaged: {member_name(slot, array)} is not where it must be")
