"""Caches in the layouts that other trainers read: the inverse of `featcache.share.importers`, and parquet.

- `repa`, `edm2`: `00000/img-mean-std-00000000.npy`, float32 `[2C, h, w]` mean and standard deviation, and `dataset.json`
  with their labels. Samples are numbered by their sorted keys, as the tools of both projects number images, so that REPA's
  `images/` folder of the same images fits beside it. The two differ in the pixels that the latents are of.
- `lightningdit`: `latents_rank00_shard000.safetensors` of 10,000 samples each (`latents`, `latents_flip`: float32
  `[n, C, h, w]`, one sample of each posterior; `labels`) and `latents_stats.pt`.
- `hf`: `data/train-00000-of-00001.parquet` and a dataset card, see `featcache.share.parquet`.

The names of files are numbers: an image's key, which may be anything, is never part of a path. Keys, classes and the VAE
are written beside them (`featcache.share.exported`).

An export is made in a folder beside its own, piece by piece, each of them whole or not there, and takes its name when it
is complete. Run again after a kill it goes on after the last whole piece.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featcache.console import safe
from featcache.errors import CacheError, UserError
from featcache.progress import QUIET, Progress
from featcache.read.open import open_cache
from featcache.read.reader import Cache
from featcache.share.exported import MARKER, VERSION
from featcache.share.layouts import MOMENTS, Layout, NpyLayout, SafetensorsLayout, Samples, digits
from featcache.share.parquet import parquet_layout
from featcache.store import files, locks
from featcache.store.contents import shard_checker
from featcache.store.layout import Json, canonical_json
from featcache.store.manifest import Manifest
from featcache.store.remote import is_remote, local_path

LAYOUTS = ("repa", "edm2", "lightningdit", "hf")
UNFINISHED = ".unfinished"
LOCK = "featcache-export.lock"
_EDM2_PIXELS = [0, 1]


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What `featcache export` was asked for.

    cache: folder or URL. layout: one of `LAYOUTS`. features: of `hf` (default: all but the images' hashes). view: of the
    images (0) or of their mirrored copies (1); default what the layout has places for. seed: of the samples of the
    posterior in `lightningdit`. dtype: of features in `hf`; default the smallest that loses nothing.
    """

    cache: str
    out: Path
    layout: str
    features: tuple[str, ...] | None = None
    view: int | None = None
    seed: int = 0
    dtype: str | None = None


def export(request: ExportRequest, progress: Progress = QUIET) -> int:
    """Write a cache in another project's layout; returns the number of samples.

    Made in `<out>.unfinished`, which takes the name `out` when it is complete. Goes on where an export of the same was
    interrupted; does nothing where it is complete. `progress` advances with each piece.

    Raises `UserError` for an unknown layout, a cache without what the layout needs, or a folder that holds anything else;
    `CacheError` for a damaged cache or a disk that refuses.
    """
    if request.layout not in LAYOUTS:
        raise UserError(f"there is no layout {request.layout!r}", remedy=f"Type --to with one of {', '.join(LAYOUTS)}.")
    cache = open_cache(request.cache)
    samples, layout = _prepare(request, cache, progress)
    try:
        said = _said(request, cache, samples)
        out = request.out.resolve()
        if _is_complete(out, said):
            progress.note(f"{safe(out)} is complete already: nothing to export")
            return len(samples)
        unfinished = out.with_name(out.name + UNFINISHED)
        lock = _begin(unfinished, said)
        try:
            _write_all(request, samples, layout, unfinished, progress)
            files.rename_directory(unfinished, out)
            lock.moved(out / LOCK)
        finally:
            lock.release(remove=True)
        return len(samples)
    finally:
        samples.close()


def _write_all(request: ExportRequest, samples: Samples, layout: Layout, folder: Path, progress: Progress) -> None:
    pieces = layout.pieces()
    pending = [piece for piece in pieces if not layout.is_whole(folder / piece.name, piece)]
    if pending:
        _check(request.cache, samples.cache.manifest, samples.names, progress)
    for place in dict.fromkeys((folder / piece.name).parent for piece in pieces):
        files.make_directory(place)
        files.remove_parts(place)
    files.remove_parts(folder)
    left = sum(len(piece.rows) for piece in pending)
    progress.begin("exporting", len(samples), done=len(samples) - left, unit="samples")
    for piece in pending:
        files.remove_tree(folder / piece.name)
        layout.write(folder / piece.name, piece)
        progress.update(len(piece.rows))
    layout.finish(folder)


def _check(source: str, manifest: Manifest, names: Sequence[str], progress: Progress) -> None:
    """Raises `CacheError` unless what is read are the recorded bytes: an export has no checksums that would tell later.
    Streams check what they fetch themselves."""
    if is_remote(source):
        return
    check, count = shard_checker(Path(local_path(source)), manifest, names), manifest.dataset.count
    progress.begin("checking", count, unit="samples")
    for start in range(0, count, manifest.shard_size):
        slots = range(start, min(start + manifest.shard_size, count))
        check(slots)
        progress.update(len(slots))


def _prepare(request: ExportRequest, cache: Cache, progress: Progress) -> tuple[Samples, Layout]:
    """What is going to be written. Raises `UserError` for what the layout cannot hold or the cache does not."""
    if not len(cache):
        raise CacheError(f"{cache.path} holds no samples")
    if request.dtype not in (None, "float32", "float16"):
        raise UserError(f"there is no dtype {request.dtype!r:.80} here", remedy="Type --dtype float32 or float16.")
    if request.view not in (None, 0, 1):
        raise UserError(f"there is no view {request.view}", remedy="Views are 0 and 1, the mirrored images.")
    if request.layout == "hf":
        return parquet_layout(cache, request.features, _views(request, cache), request.dtype)
    for option, given in (("--features", request.features), ("--dtype", request.dtype)):
        if given is not None:
            raise UserError(
                f"{option} is for --to hf: {request.layout} has a place for latents and labels only, in float32",
                remedy=f"Leave {option} out, or type --to hf.",
            )
    if MOMENTS not in cache.features or cache.manifest.dataset.vae is None:
        raise UserError(
            f"{cache.path} holds no latents, which {request.layout} is a layout of",
            remedy=f"Add them: featcache build --into {shlex.quote(cache.path)} --vae sd-ft-mse, or type --to hf.",
        )
    cache.require(["label"])
    views = _views(request, cache)
    _say_what_differs(request, cache, views, progress)
    keys = cache.keys() if "key" in cache.features else [digits(i) for i in range(len(cache))]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    samples = Samples(cache, [MOMENTS, "label"], order, views)
    sorted_keys = [keys[i] for i in order]
    if request.layout == "lightningdit":
        return samples, SafetensorsLayout(samples, sorted_keys, request.seed)
    return samples, NpyLayout(samples, cache.labels(), sorted_keys)


def _views(request: ExportRequest, cache: Cache) -> tuple[int, ...]:
    """Which views are exported. Raises `UserError` where the cache and the layout do not agree and nobody has said which."""
    mirrored, places = cache.manifest.dataset.flip, {"lightningdit": 2, "hf": None}.get(request.layout, 1)
    if request.view == 1 and not mirrored:
        raise UserError(f"{cache.path} holds no mirrored images", remedy="Leave --view out, or type --view 0.")
    if request.view is not None:
        return (request.view,)
    if mirrored and places == 1:
        raise UserError(
            f"{cache.path} holds each image mirrored too, and {request.layout} has a place for one of them",
            remedy="Type --view 0 for the images as they are (or 1 for the mirrored ones).",
        )
    if not mirrored and places == 2:
        raise UserError(
            f"{cache.path} holds no mirrored images, and {request.layout} has latents of each image and of its mirror image",
            remedy="Build a cache with --flip; or type --view 0 to put two samples of the same posterior there, so that "
            "no mirrored image is trained on.",
        )
    return (0, 1) if mirrored else (0,)


def _say_what_differs(request: ExportRequest, cache: Cache, views: tuple[int, ...], progress: Progress) -> None:
    """Notes on what those who read the export would take for granted."""
    dataset = cache.manifest.dataset
    vae = dataset.vae or {}
    pixels = vae.get("pixel_range") or [-1, 1]
    if request.layout == "edm2" and pixels != _EDM2_PIXELS:
        progress.note(
            f"these latents are of pixels in [{pixels[0]}, {pixels[1]}]; EDM2's encoder takes them for ones of pixels in "
            "[0, 1]: give its raw_mean and raw_std the numbers of `featcache stats`, and scale what it decodes"
        )
    if request.layout == "repa" and pixels != [-1, 1]:
        progress.note(f"these latents are of pixels in [{pixels[0]}, {pixels[1]}], and REPA's are of [-1, 1]")
    available = dataset.preprocessing.get("available", dataset.count)
    if request.layout == "repa" and len(cache) != available:
        progress.note(
            f"the cache holds {len(cache)} of {available} images: files are numbered among these, and the images/ folder "
            "that REPA pairs with them by position must hold just these"
        )
    if request.layout == "lightningdit" and len(views) == 1:
        progress.note("latents_flip are not mirrored: both places hold samples of the same images")


def _said(request: ExportRequest, cache: Cache, samples: Samples) -> dict[str, Json]:
    """What the marker says. Two exports that say the same are the same to the last byte."""
    dataset = cache.manifest.dataset
    arrays = {array for name in samples.names for array in cache.features[name].arrays}
    return {
        "featcache_export": VERSION,
        "layout": request.layout,
        "count": len(samples),
        "cache": {"name": dataset.name, "fingerprint": cache.fingerprint},
        "bytes": {array: cache.manifest.checksums[array] for array in sorted(arrays)},
        "views": list(samples.views),
        "seed": request.seed,
        "dtype": request.dtype,
        "features": {name: cache.features[name].to_json() for name in samples.names},
        "classes": list(dataset.class_names),
        "vae": None if dataset.vae is None else dict(dataset.vae),
        "preprocessing": dict(dataset.preprocessing),
    }


def _is_complete(out: Path, said: dict[str, Json]) -> bool:
    """Whether the folder holds this export. Raises `UserError` if it holds anything else."""
    with files.explained(out, "read"):
        if not out.exists():
            return False
        if not out.is_dir():
            raise UserError(f"{out} is a file", remedy="Name a folder with --out.")
        if out.is_mount():
            raise UserError(
                f"{out} is where a disk is mounted, so nothing can take its name", remedy=_another(out / "x")
            )
    names = files.names_in(out)
    if not names:
        return False
    if not (out / MARKER).is_file():
        raise UserError(
            f"{out} holds {names[0]!r:.80} and is no export of this kind", remedy="Name a new folder with --out."
        )
    _require_same(out, said)
    files.remove_file(out / LOCK)  # left by one that was killed just when it was complete
    return True


def _begin(folder: Path, said: dict[str, Json]) -> locks.Lock:
    """The folder of an unfinished export, made or found, and locked. Raises `UserError` if it is another one's."""
    files.make_directory(folder.parent)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder} is in the way of an unfinished export", remedy="Remove it, or name another --out.")
    foreign = [n for n in files.names_in(folder) if not (n.startswith(LOCK) or files.is_part(n))]
    if foreign and not (folder / MARKER).is_file():
        raise UserError(
            f"{folder} holds {foreign[0]!r:.80} and is no unfinished export",
            remedy="Remove it, or name another folder with --out.",
        )
    files.make_directory(folder)
    lock = locks.try_lock(folder / LOCK)
    if lock is None:
        raise UserError(f"another process is exporting to {folder}", remedy="Wait for it, or name another --out.")
    try:
        if (folder / MARKER).is_file():
            _require_same(folder, said)
        else:
            files.atomic_write(folder / MARKER, [json.dumps(said, indent=1, sort_keys=True).encode()])
    except BaseException:
        lock.release()
        raise
    return lock


def _require_same(folder: Path, said: dict[str, Json]) -> None:
    try:
        there = json.loads(files.read_bounded(folder / MARKER, 64 << 20))
    except ValueError:
        there = None
    if not isinstance(there, dict):
        raise UserError(f"{folder / MARKER} is damaged", remedy=_another(folder))
    if canonical_json(there) != canonical_json(said):
        odd = sorted(name for name in said.keys() | there.keys() if said.get(name) != there.get(name))
        raise UserError(f"{folder} is another export: it differs in {', '.join(odd):.200}", remedy=_another(folder))


def _another(folder: Path) -> str:
    return f"Name another folder with --out, or remove that one: rm -r {shlex.quote(str(folder))}"
