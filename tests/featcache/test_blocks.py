"""Hashes of blocks: what a `BLOCKS` file holds, and that nothing else passes for it."""

import hashlib
import os
from dataclasses import replace

import pytest
from blake3 import blake3
from store_helpers import COUNT, SHARD_SIZE, dataset

from featcache.errors import CacheError
from featcache.store import FeatureSpec, Manifest
from featcache.store.blocks import (
    BLOCK_BYTES,
    BlockHasher,
    ShardBlocks,
    blocks_bytes,
    blocks_from_json,
    blocks_limit,
    check_block,
    parse_blocks,
)
from featcache.store.layout import index_bytes
from featcache.store.manifest import manifest_from_json

SPEC = FeatureSpec(name="a@1", shape=(40_000,), codec="fp32")
LENGTHS = [SHARD_SIZE * 160_000 + index_bytes(SHARD_SIZE)] * 3 + [2 * 160_000 + index_bytes(SHARD_SIZE)]


def shard_blocks(data: bytes, step: int) -> ShardBlocks:
    hasher = BlockHasher()
    for start in range(0, len(data), step):
        hasher.update(memoryview(data)[start : start + step])
    return hasher.result()


@pytest.fixture(scope="module")
def shards() -> list[bytes]:
    return [os.urandom(n) for n in LENGTHS]


def manifest_of(data: bytes) -> Manifest:
    return Manifest(
        dataset=dataset(),
        shard_size=SHARD_SIZE,
        features={"a@1": SPEC},
        checksums={"a@1": "0" * 64},
        blocks={"a@1": hashlib.sha256(data).hexdigest()},
    )


def test_blocks_of_any_pieces(shards: list[bytes]) -> None:
    for data in shards:
        whole = b"".join(blake3(data[i : i + BLOCK_BYTES]).digest() for i in range(0, len(data), BLOCK_BYTES))
        for step in (1 << 16, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 7, len(data)):
            assert shard_blocks(data, step) == ShardBlocks(len(data), whole)
    assert shard_blocks(b"", 1) == ShardBlocks(0, b"")
    one = shard_blocks(shards[0], 1 << 20)
    assert blocks_from_json(one.to_json(), "it") == one


def test_file_holds_what_was_hashed_and_checks_every_block(shards: list[bytes]) -> None:
    hashed = [shard_blocks(data, 1 << 20) for data in shards]
    data = blocks_bytes(hashed)
    manifest = manifest_of(data)
    assert len(data) == blocks_limit(manifest, "a@1")
    found = parse_blocks(data, manifest, "a@1", "it")
    assert found == hashed
    for shard, content in zip(found, shards, strict=True):
        count = -(-len(content) // BLOCK_BYTES)
        for index in range(count):
            block = content[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
            check_block(shard, index, block, "it")
            wrong = bytearray(block)
            wrong[len(wrong) // 2] ^= 1
            for bad in (wrong, block[:-1], block + b"\0", b""):
                with pytest.raises(CacheError, match="recorded hash"):
                    check_block(shard, index, bad, "it")
        for index in (-1, count, 1 << 40):
            with pytest.raises(CacheError, match="recorded hash"):
                check_block(shard, index, content[:BLOCK_BYTES], "it")


def test_other_files_are_refused(shards: list[bytes]) -> None:
    hashed = [shard_blocks(data, 1 << 20) for data in shards]
    data = blocks_bytes(hashed)
    for position in range(0, len(data), 7):
        wrong = bytearray(data)
        wrong[position] ^= 1
        with pytest.raises(CacheError, match="not the file that the manifest names"):
            parse_blocks(bytes(wrong), manifest_of(data), "a@1", "it")
    # A builder that lies: the digest is right, the content is not.
    lies = [
        b"",
        data[:20],
        data[:-1],
        data + b"\0",
        b"x" + data[1:],
        blocks_bytes(hashed[:3]),
        blocks_bytes([*hashed[:3], hashed[0]]),
        blocks_bytes([replace(hashed[0], digests=b""), *hashed[1:]]),
        blocks_bytes([replace(s, n_bytes=(1 << 63) - 1) for s in hashed]),
    ]
    for compressor in (None, "zstd"):
        for lie in lies:
            if compressor and lie == lies[6]:
                continue  # compressed shards may have any length
            with pytest.raises(CacheError, match="damaged"):
                parse_blocks(lie, replace(manifest_of(lie), compressor=compressor), "a@1", "it")


@pytest.mark.parametrize(
    "value", [None, [], [1], [1, ""], [-1, ""], [True, "0" * 64], [1, "0" * 63], [1, "g" * 64], "x"]
)
def test_damaged_journal_entries(value) -> None:
    with pytest.raises(CacheError):
        blocks_from_json(value, "it")


def test_version_is_2_only_with_blocks() -> None:
    new = manifest_of(b"")
    old = replace(new, blocks={})
    assert new.to_json()["format_version"] == 2 and manifest_from_json(new.to_json()) == new
    assert old.to_json()["format_version"] == 1 and "blocks" not in old.to_json()
    assert manifest_from_json(old.to_json()) == old
    for wrong in (
        {**old.to_json(), "format_version": 2},
        {**new.to_json(), "format_version": 1},
        {**new.to_json(), "blocks": {}},
        {**new.to_json(), "blocks": {"b@1": "0" * 64}},
        {**new.to_json(), "format": "wds", "features": {}, "checksums": {}, "blocks": {"b@1": "0" * 64}},
    ):
        with pytest.raises(CacheError):
            manifest_from_json(wrong)
    assert new.only(()).to_json()["format_version"] == 1
    assert new.dataset.count == COUNT
