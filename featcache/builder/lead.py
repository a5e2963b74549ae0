"""What the process that leads a build does: open the writer, finish the cache, say what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import featcache
from featcache.builder.pipeline import Stage
from featcache.builder.prepare import Plan, check_disk, package_versions
from featcache.paths import typed
from featcache.progress import Progress
from featcache.read.captions import has_captions
from featcache.read.reader import Cache
from featcache.store import CacheWriter
from featcache.store.differences import difference
from featcache.store.manifest import FeatureSpec
from featcache.store.writers import create_writer, open_writer


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


def remarks(plan: Plan) -> list[str]:
    """What whoever starts a build should know: images and captions that are left out, and features that stay as they
    are in the cache although they were asked for otherwise."""
    found = [getattr(part, "remark", None) for part in (plan.work.source, plan.work.captions)]
    if plan.existing is not None:
        found += [_kept(plan.existing, spec, plan.path) for spec in plan.there]
    return [remark for remark in found if remark]


def _kept(existing: Cache, spec: FeatureSpec, path: Path) -> str | None:
    """How a feature of the cache differs from what is asked for."""
    have = existing.manifest.features[spec.name]
    pairs = [(key, getattr(have, key), getattr(spec, key)) for key in ("codec", "shape", "views")]
    pairs += [
        (key, have.provenance.get(key), value)
        for key, value in spec.provenance.items()
        if key not in ("versions", "captions")
    ]
    pairs += [("components", have.basis and have.basis.rank, spec.basis and spec.basis.rank)]
    if has_captions(spec) and spec.codec != "raw":
        pairs += [("text of ''", have.empty is not None, True)]
    differences = [difference(key, found, asked) for key, found, asked in pairs if found != asked]
    if not differences:
        return None
    return (
        f"{spec.name} is there already and stays as it is: {'; '.join(differences)}. To make it anew, type "
        f"featcache rm {typed(path)} --features {spec.name} and then the same command again."
    )


def announce(plan: Plan, left: int, progress: Progress, workers: str) -> None:
    """Begins the progress of a build of which `left` images remain: what it writes, and who does it (`" (2 ranks)"`)."""
    total = len(plan.work.order)
    features = ", ".join(name for name in plan.work.specs if name not in ("key", "content"))
    progress.begin("encoding", total, done=total - left)
    progress.note(f"images: {_images(plan)}")
    progress.note(f"features: {features}{workers}")
    for remark in remarks(plan):
        progress.note(remark)


def _images(plan: Plan) -> str:
    """How many of how many classes, and where they are from."""
    dataset, total = plan.dataset, len(plan.work.source)
    of = "" if dataset.count == total else f" of {total:,}"
    classes = len(dataset.class_names)
    return f"{dataset.count:,}{of} of {classes:,} class{'es' * (classes != 1)} from {dataset.source}"


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
        progress.note(f"{bare} of {len(cache)} images have no caption: their text/count is 0, their features are zeros")
