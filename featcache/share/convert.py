"""The same cache in another format: bit for bit, in either direction, resumable by shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from featcache.errors import CacheError
from featcache.progress import QUIET, Progress
from featcache.read.open import open_cache
from featcache.store.contents import shard_checker
from featcache.store.layout import FORMATS
from featcache.store.manifest import Manifest
from featcache.store.remote import is_remote, local_path
from featcache.store.writers import create_writer


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str,
    features: Sequence[str] | None = None,
    shard_size: int | None = None,
    compressor: str | None = None,
    progress: Progress = QUIET,
) -> Manifest:
    """Copy the cache `source` to `target` in format `to` ('zarr' or 'wds'); returns the new manifest.

    features: only these (default all). shard_size: samples per shard (default the source's). compressor: of a
    zarr target ('zstd' or 'blosc'). progress: advances with each finished shard.

    Slots, skipped ones included, stay where they are; so converting there and back gives the same files. The copy has
    checksums of its own, so each shard is checked against the recorded one before it is read: damage is not copied.

    Raises `CacheError` for an unknown format, a target that holds something else, or a damaged source.
    """
    if to not in FORMATS:
        raise CacheError(f"there is no cache format {to!r}", remedy=f"use one of {', '.join(FORMATS)}")
    if Path(source).resolve() == Path(target).resolve():
        raise CacheError(f"source and target are both {source}", remedy="choose another target")
    cache = open_cache(source)
    manifest = cache.manifest
    names = sorted(manifest.features) if features is None else list(features)
    cache.require(names)
    specs = [manifest.features[name] for name in names]
    writer = create_writer(
        target,
        manifest.dataset,
        shard_size=manifest.shard_size if shard_size is None else shard_size,
        compressor=compressor,
        format=to,
        versions=manifest.versions,
    )
    check = _checker(source, manifest, names)
    with writer, cache.reader(names, slots=True) as reader:
        writer.begin(specs)
        pending = writer.pending()
        left = sum(len(writer.slots(shard)) for shard in pending)
        progress.begin("converting", manifest.dataset.count, done=manifest.dataset.count - left, unit="samples")
        for shard in pending:
            slots = writer.slots(shard)
            check(slots)
            arrays = reader.allocate(len(slots))
            reader.read(np.arange(slots.start, slots.stop), arrays)
            writer.skip(shard, [(s.slot, s.key, s.reason) for s in manifest.skipped if s.slot in slots])
            for spec in specs:
                stored = {array[len(spec.name) :]: arrays[array] for array in spec.arrays}
                writer.write_shard(spec.name, shard, stored)
            progress.update(len(slots))
        return writer.finish()


def _checker(source: str | Path, manifest: Manifest, names: Sequence[str]) -> Callable[[range], None]:
    """A function that raises `CacheError` unless the shards of some features in which a range of slots lies are what
    was recorded. Ranges must come in rising order: each shard is read once. Streams check what they fetch themselves.
    """
    if is_remote(source):
        return lambda _: None
    return shard_checker(Path(local_path(source)), manifest, names)
