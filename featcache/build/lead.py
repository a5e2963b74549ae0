"""What the process that leads a build does: open the writer, finish the cache, say what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import featcache
from featcache.build.pipeline import Stage
from featcache.build.prepare import Plan, check_disk, package_versions
from featcache.store import CacheWriter
from featcache.store.manifest import FeatureSpec
from featcache.store.writers import create_writer, open_writer


class Progress(Protocol):
    """What a build tells whoever watches. Called from the building thread."""

    def start(self, *, total: int, done: int, note: str) -> None: ...

    def advance(self, images: int) -> None: ...

    def warn(self, text: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    path: Path
    count: int
    features: tuple[str, ...]
    skipped: tuple[str, ...]
    encoded: int
    first: bool = True  # whether this process speaks for all of them (rank 0)
    stages: Mapping[str, Stage] = field(default_factory=dict)


def lead(plan: Plan) -> CacheWriter:
    """The writer that holds the features' locks until it finishes them, with enough room on the disk.

    Raises `CacheError` if the cache is of other images or somebody else builds one of the features; `UserError` if the
    disk is too small.
    """
    if plan.existing is not None:
        writer = open_writer(plan.path)
    else:
        writer = create_writer(
            plan.path,
            plan.dataset,
            shard_size=plan.work.shard_size,
            format=plan.request.format,
            compressor=plan.request.compressor,
            versions={"featcache": version("featcache-trainer"), **package_versions()},
        )
    writer.begin(plan.specs)
    count = len(plan.work.order)
    check_disk(plan.path, plan.specs, samples=min(count, len(writer.pending()) * writer.shard_size))
    return writer


def finish(plan: Plan, writer: CacheWriter) -> tuple[str, ...]:
    """Makes the features visible. Returns the keys of the images that this build left out."""
    before = {entry.slot for entry in plan.existing.manifest.skipped} if plan.existing is not None else set()
    return tuple(entry.key for entry in writer.finish().skipped if entry.slot not in before)


def warn_of_bare_images(plan: Plan, progress: Progress) -> None:
    """Says how many images of a finished build have no caption, where it made text features."""
    if "text/count" not in plan.work.specs:
        return
    cache = featcache.open(plan.path)
    with cache.reader(["text/count"]) as reader:
        out = reader.allocate(len(cache))
        reader.read(range(len(cache)), out)
    bare = int((out["text/count"] == 0).sum())
    if bare:
        progress.warn(f"{bare} of {len(cache)} images have no caption: their text/count is 0, their features are zeros")


def features_note(specs: Mapping[str, FeatureSpec]) -> str:
    """The features that a build writes, in a line."""
    return ", ".join(name for name in specs if name not in ("key", "content"))
