"""A small cache with one large shard, for tests of what happens inside a shard."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from store_helpers import dataset

from featcache.store import FeatureSpec
from featcache.store.manifest import Manifest
from featcache.store.root import read_root
from featcache.store.writer import publish
from featcache.store.writers import create_writer

LARGE = "wide@1"
LARGE_FILE = f"{LARGE}/c.0.0"


def build_large(path: Path, *, mebibytes: int = 12, **options) -> Path:
    """Labels and one shard of random bytes, `mebibytes` long, in 16 samples."""
    specs = [
        FeatureSpec(name="label", shape=(), codec="raw", dtype="int64"),
        FeatureSpec(name=LARGE, shape=(mebibytes << 16,), codec="raw", dtype="uint8"),
    ]
    rng = np.random.default_rng(0)
    with create_writer(path, dataset(16), shard_size=16, **options) as writer:
        writer.begin(specs)
        writer.write_shard("label", 0, {"": np.arange(16) % 3})
        writer.write_shard(LARGE, 0, {"": rng.integers(0, 256, (16, mebibytes << 16), dtype=np.uint8)})
        writer.finish()
    return path


def without_blocks(path: Path) -> Manifest:
    """Make of a cache one that an earlier version wrote, which knew no hashes of blocks."""
    manifest = replace(read_root(path), blocks={})
    for file in path.rglob("BLOCKS"):
        file.unlink()
    publish(path, manifest, set())
    return manifest
