"""Opening a cache for writing: the writer of its format, new, for more features, for repairs, or
beside another process's."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from featcache.errors import CacheError
from featcache.paths import typed
from featcache.store import files
from featcache.store.layout import COMPRESSORS, canonical_json
from featcache.store.manifest import MAX_SHARD_SIZE, DatasetSpec, FeatureSpec, Manifest, manifest_from_json
from featcache.store.root import find_root
from featcache.store.wds_writer import WdsWriter
from featcache.store.writer import (
    CacheWriter,
    cache_lock,
    known_manifest,
    refuse_foreign_directory,
    require_same_dataset,
    state_directory,
)


def _writer(path: Path, manifest: Manifest) -> CacheWriter:
    return (WdsWriter if manifest.format == "wds" else CacheWriter)(path, manifest)


def create_writer(
    path: str | os.PathLike[str],
    dataset: DatasetSpec,
    *,
    shard_size: int,
    compressor: str | None = None,
    format: str = "zarr",
    versions: Mapping[str, str] | None = None,
) -> CacheWriter:
    """A writer for the cache at `path`, new or one of the same dataset.

    format: 'zarr', or 'wds' for webdataset tars, whose features must all be written by one builder.

    Raises `CacheError` if a cache of other images, preprocessing or shard size is there, or if it cannot be written.
    """
    path = Path(path)
    if compressor is not None and compressor not in COMPRESSORS:
        raise CacheError(f"there is no compressor {compressor!r}", remedy=f"use one of {', '.join(COMPRESSORS)}")
    if format == "wds" and compressor is not None:
        raise CacheError("webdataset caches are not compressed", remedy="use the zarr format, or no compressor")
    if not 1 <= shard_size <= MAX_SHARD_SIZE:
        raise CacheError(
            f"a shard cannot hold {shard_size} samples: 1 to {MAX_SHARD_SIZE:,} are possible",
            remedy="choose another --shard-size, or leave it out",
        )
    wanted = Manifest(
        dataset=dataset,
        shard_size=shard_size,
        compressor=compressor,
        format=format,
        versions=dict(versions or {}),
    )
    manifest_from_json(wanted.to_json())
    refuse_foreign_directory(path)
    files.make_directory(path)
    with cache_lock(path):
        existing = known_manifest(path)
        if existing is None:
            files.atomic_write(state_directory(path) / "dataset.json", [canonical_json(wanted.to_json())])
            return _writer(path, wanted)
    require_same_dataset(existing, wanted, path)
    return _writer(path, existing)


def open_writer(path: str | os.PathLike[str], *, dataset: DatasetSpec | None = None) -> CacheWriter:
    """A writer that adds features to the cache at `path`.

    Raises `CacheError` if there is none, or if `dataset` is given and differs from the cache's.
    """
    path = Path(path)
    existing = None
    if find_root(path) is not None or (state_directory(path) / "dataset.json").is_file():
        with cache_lock(path):
            existing = known_manifest(path)
    if existing is None:
        raise CacheError(f"there is no cache at {path}", remedy=f"featcache build --out {typed(path)} makes one")
    if dataset is not None:
        require_same_dataset(existing, replace(existing, dataset=dataset), path)
    return _writer(path, existing)


def repair_writer(
    path: str | os.PathLike[str], shards: Mapping[str, Iterable[int]], *, exact: Collection[str] = ()
) -> CacheWriter:
    """A writer that may rewrite just these shards (feature -> shard numbers) of complete features.

    `write_shard` replaces them; `finish` records the checksums of what was written. Re-encoding on the
    same hardware and software gives the recorded bytes back, elsewhere it may differ in the last bit. Where an
    array's checksums are lost, all its shards must be repaired that nothing else vouches for: see `finish`.

    exact: features that come out the same everywhere. `finish` raises `CacheError` and publishes nothing if one of
    their shards is not, as far as anything is left to tell by, what was recorded (not so in tars, which hold others).
    """
    writer = open_writer(path)
    writer.repair_only(shards, exact=exact)
    return writer


def join_writer(path: str | os.PathLike[str], specs: Sequence[FeatureSpec]) -> CacheWriter:
    """A writer beside another process's that has begun `specs`: it writes shards, the other one finishes.

    It takes no locks; whoever began the features divides the shards among those who join and calls
    `refresh` when they are done.

    Raises `CacheError` if a feature is not being built, or is being built otherwise than `specs` says.
    """
    path = Path(path)
    existing = known_manifest(path)
    if existing is None:
        raise CacheError(f"no build of {path} is under way")
    if existing.format != "zarr":
        raise CacheError("several processes cannot write one webdataset cache", remedy="use the zarr format")
    writer = CacheWriter(path, existing)
    writer.join(specs)
    return writer
