"""Hashes of a shard's blocks, so that a part of it that came over the wire can be checked by itself.

Beside each `SHA256SUMS` lies a file `BLOCKS` whose own SHA-256 is in the manifest: for every shard its length and the
BLAKE3 of each of its blocks of 1 MiB. BLAKE3 because a second SHA-256 of every byte would cost a second core; it is as
collision-resistant, so a server cannot pass off other bytes.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

from featcache.errors import CacheError
from featcache.store.layout import BLOCKS, Json, index_bytes, sample_bytes, shard_samples
from featcache.store.manifest import Manifest
from featcache.store.wds import tar_layout

BLOCK_BYTES = 1 << 20
DIGEST_BYTES = 32
MAX_BLOCKS_BYTES = 1 << 30  # of one file: 32 TiB of an array
_HEADER = b"featcache blocks" + struct.pack("<II", 1, BLOCK_BYTES)
_HEX = re.compile(r"(?:[0-9a-f]{64})*\Z")


@dataclass(frozen=True)
class ShardBlocks:
    """A shard file's length and the BLAKE3 of its blocks, one after another, 32 bytes each."""

    n_bytes: int
    digests: bytes

    def to_json(self) -> Json:
        return [self.n_bytes, self.digests.hex()]


def n_blocks(n_bytes: int) -> int:
    return -(-n_bytes // BLOCK_BYTES)


class BlockHasher:
    """Hashes a shard's blocks as its bytes pass, in pieces of any length."""

    def __init__(self) -> None:
        self._n_bytes = 0
        self._digests = bytearray()
        self._current = blake3()

    def update(self, data: memoryview) -> None:
        """`data`: flat bytes."""
        while data:
            room = BLOCK_BYTES - self._n_bytes % BLOCK_BYTES
            piece, data = data[:room], data[room:]
            self._current.update(piece)
            self._n_bytes += len(piece)
            if len(piece) == room:
                self._digests += self._current.digest()
                self._current = blake3()

    def result(self) -> ShardBlocks:
        """What was hashed so far."""
        rest = self._current.digest() if self._n_bytes % BLOCK_BYTES else b""
        return ShardBlocks(self._n_bytes, bytes(self._digests) + rest)


def blocks_from_json(value: Json, what: str) -> ShardBlocks:
    """What `ShardBlocks.to_json` made; raises `CacheError` for anything else."""
    if (
        isinstance(value, list)
        and len(value) == 2
        and type(value[0]) is int
        and 0 <= value[0] < 1 << 62
        and isinstance(value[1], str)
        and _HEX.match(value[1])
        and len(value[1]) == 2 * DIGEST_BYTES * n_blocks(value[0])
    ):
        return ShardBlocks(value[0], bytes.fromhex(value[1]))
    raise CacheError(f"{what} is damaged: it does not hold a shard's length and the hashes of its blocks")


def blocks_path(manifest: Manifest, array: str) -> str:
    """Where an array's `BLOCKS` file is, relative to the cache; only arrays in `manifest.blocks` have one."""
    return BLOCKS if manifest.format == "wds" else f"{array}/{BLOCKS}"


def blocks_limit(manifest: Manifest, array: str) -> int:
    """The most bytes that an array's `BLOCKS` file may have (exactly as many, where shards are uncompressed)."""
    lengths = _shard_bytes(manifest, array)
    if lengths is None:
        return MAX_BLOCKS_BYTES
    full, last = lengths
    blocks = (manifest.n_shards - 1) * n_blocks(full) + n_blocks(last)
    return min(MAX_BLOCKS_BYTES, len(_HEADER) + 8 * manifest.n_shards + DIGEST_BYTES * blocks)


def _shard_bytes(manifest: Manifest, array: str) -> tuple[int, int] | None:
    """Length of a full shard and of the last one; None where compressed."""
    if manifest.compressor is not None:
        return None
    samples = manifest.shard_size, shard_samples(manifest.dataset.count, manifest.shard_size, manifest.n_shards - 1)
    if manifest.format == "wds":
        layout = tar_layout(manifest)
        return layout.tar_bytes(samples[0]), layout.tar_bytes(samples[1])
    dtype, shape = manifest.arrays[array]
    length, index = sample_bytes(dtype, shape), index_bytes(manifest.shard_size)
    return samples[0] * length + index, samples[1] * length + index


def blocks_bytes(shards: Sequence[ShardBlocks]) -> bytes:
    """A `BLOCKS` file."""
    lengths = np.array([shard.n_bytes for shard in shards], "<u8").tobytes()
    return b"".join([_HEADER, lengths, *(shard.digests for shard in shards)])


def parse_blocks(data: bytes, manifest: Manifest, array: str, where: str) -> list[ShardBlocks]:
    """The shards' blocks from an array's `BLOCKS` file, checked against the digest in the manifest.

    Raises `CacheError` unless it is the file that the manifest names, and agrees with the shards' lengths.
    """
    if hashlib.sha256(data).hexdigest() != manifest.blocks[array]:
        raise CacheError(f"{where} is damaged: it is not the file that the manifest names")
    # Right as far as the builder is right; yet a builder may lie.
    start = len(_HEADER) + 8 * manifest.n_shards
    if data[: len(_HEADER)] != _HEADER or len(data) < start:
        raise CacheError(f"{where} is damaged: it does not begin as such a file must")
    lengths = np.frombuffer(data, "<u8", manifest.n_shards, len(_HEADER))
    expected = _shard_bytes(manifest, array)
    if (lengths > MAX_BLOCKS_BYTES * BLOCK_BYTES // DIGEST_BYTES).any() or (
        expected is not None and ((lengths[:-1] != expected[0]).any() or lengths[-1] != expected[1])
    ):
        raise CacheError(f"{where} is damaged: its shards have other lengths than the manifest says")
    found = []
    for n_bytes in lengths.tolist():
        stop = start + DIGEST_BYTES * n_blocks(n_bytes)
        found.append(ShardBlocks(n_bytes, data[start:stop]))
        start = stop
    if start != len(data):
        raise CacheError(f"{where} is damaged: it does not hold one hash for each block")
    return found


def check_block(shard: ShardBlocks, index: int, data: bytes | bytearray | memoryview, where: str) -> None:
    """Raises `CacheError` unless `data` is the shard's whole block `index` (the last one may be shorter)."""
    recorded = shard.digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
    length = min(BLOCK_BYTES, shard.n_bytes - index * BLOCK_BYTES)
    if not index >= 0 or not recorded or len(data) != length or blake3(data).digest() != recorded:
        raise CacheError(f"{where} is damaged: block {index} does not match its recorded hash")
