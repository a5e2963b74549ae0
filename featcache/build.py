"""One pass over the images: read, crop, encode, quantise, write; resumable by shard.

Batches never span shards and a bad image keeps its place as zeros, so every batch has the same composition however
often the build was interrupted: the bytes of a resumed cache equal those of an uninterrupted one.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from featcache.encoders import TINY, EncoderChoice
from featcache.errors import CacheError, UserError
from featcache.images import CROP_NAME, BadImage, Source, fingerprint, open_source
from featcache.store import CacheWriter
from featcache.store.layout import recommended_shard_size, stored_arrays
from featcache.store.manifest import DatasetSpec, FeatureSpec

DEFAULT_CODECS = {"moments": "fp16", "levels": "int8", "tokens": "int8"}
RESERVE_BYTES = 256 << 20  # free space to leave on the disk
KEY_ALIGN = 8


class Progress(Protocol):
    """What a build tells whoever watches. Called from the building thread."""

    def start(self, *, total: int, done: int, note: str) -> None: ...

    def advance(self, images: int) -> None: ...

    def warn(self, text: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """Everything that ``featcache build`` was asked for, already parsed.

    data: folder or embedded set; out: where the cache goes (None: ``./caches/<derived name>``); into: an existing cache
    to add features to. codecs: storage codec for "moments", "levels" and "tokens".
    """

    data: str
    encoders: tuple[EncoderChoice, ...] = ()
    vae: str | None = None
    levels: tuple[str, ...] = ()
    resolution: int | None = None
    limit: int | None = None
    batch_size: int = 16
    device: str = "auto"
    weights_dir: Path | None = None
    random_weights: int | None = None
    on_bad_image: str = "fail"
    final_norm: str = "auto"
    precision: str = "auto"
    compile: bool | None = None
    out: Path | None = None
    into: Path | None = None
    codecs: Mapping[str, str] = field(default_factory=lambda: dict(DEFAULT_CODECS))
    flip: bool = False
    shard_size: int | None = None
    seed: int = 0
    workers: int | None = None


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    path: Path
    count: int
    features: tuple[str, ...]
    skipped: tuple[str, ...]
    encoded: int


def build(request: BuildRequest, progress: Progress) -> BuildResult:
    """Builds or continues a cache, or adds features to one (``into``).

    Raises:
        UserError: bad input of any kind; whatever shards were written stay, and the same call continues.
    """
    import featcache
    from featcache.encoders.base import Encoder

    _check(request)
    device = pick_device(request.device)
    existing = featcache.open(request.into) if request.into is not None else None
    resolution = _resolution(request, existing)
    source = open_source(request.data, resolution=resolution, limit=request.limit)
    order = sample_order(len(source), seed=existing.manifest.dataset.order_seed if existing else request.seed)
    limit = existing.manifest.dataset.count if existing else request.limit
    order = order[:limit]

    compute = _compute(request, device)
    grid = existing.manifest.dataset.grid if existing is not None else None
    encoders: list[Encoder] = _encoders(request, resolution, compute, grid=grid, need_vae=existing is None)
    dataset = _dataset(request, source, order, resolution, encoders, existing)
    specs = _feature_specs(request, source, order, encoders, with_samples=existing is None)
    if existing is not None:
        _check_same_images(existing, dataset, encoders)
        specs = [spec for spec in specs if spec.name not in existing.manifest.features]
    path = request.into or request.out or Path("caches") / derived_name(dataset, specs)

    shard_size = request.shard_size or _shard_size(specs, len(order))
    writer = (
        CacheWriter.open(path)
        if existing is not None
        else CacheWriter.create(path, dataset, shard_size=shard_size, versions=_versions())
    )
    writer.begin(specs)
    shard_size = writer.shard_size
    pending = writer.pending()
    _check_disk(path, specs, samples=min(len(order), len(pending) * shard_size))

    wanted = {spec.name: spec for spec in specs}
    todo = [e for e in encoders if any(name in wanted for name in e.shapes)]
    holes = frozenset(s.key for s in existing.manifest.skipped) if existing is not None else frozenset()
    known = _known_content(path, len(order)) if existing is not None else None
    done = len(order) - sum(min(shard_size, len(order) - s * shard_size) for s in pending)
    progress.start(total=len(order), done=done, note=", ".join(n for n in wanted if n not in ("key", "content")))

    encoded = 0
    skipped: list[str] = []
    workers = request.workers or min(16, max(1, os.cpu_count() or 1))
    with writer, ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(1) as disk:
        decoded = _decoded_batches(source, order, pending, shard_size, resolution, request, holes, pool)
        writing: Future[None] | None = None
        for shard in pending:
            slots = np.arange(shard * shard_size, min((shard + 1) * shard_size, len(order)))
            parts = _allocate(specs, len(slots))
            bad: list[tuple[int, str, str]] = []
            filled = 0
            while filled < len(slots):
                batch = next(decoded)
                _check_content(source, batch, known)
                n = len(batch.slots)
                rows = slice(filled, filled + n)
                _encode_batch(batch, todo, wanted, parts, rows, device, request.flip)
                _fill_samples(source, order, batch, parts, rows)
                bad += [(int(slot), key, reason) for slot, key, reason in batch.bad if key not in holes]
                filled += n
                encoded += n
                progress.advance(n)
            for _, key, reason in bad:
                progress.warn(f"skipped {key}: {reason}")
                skipped.append(key)
            if writing is not None:
                writing.result()
            writing = disk.submit(_write, writer, shard, parts, bad)
        if writing is not None:
            writing.result()
        writer.finish()
    return BuildResult(path=path, count=len(order), features=tuple(wanted), skipped=tuple(skipped), encoded=encoded)


def pick_device(device: str) -> str:
    """``auto`` => ``cuda`` where there is one, else ``cpu``.

    Raises:
        UserError: the device does not exist here.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise UserError(f"unknown device {device!r}", remedy="Type --device cpu, cuda, cuda:1 or auto.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but PyTorch finds no GPU on this machine", remedy="Type --device cpu.")
    return device


def _compute(request: BuildRequest, device: str) -> Any:
    from featcache.encoders.base import Compute

    gpu = device.startswith("cuda")
    precision = ("tf32" if gpu else "fp32") if request.precision == "auto" else request.precision
    return Compute(device=device, precision=precision, compile=gpu if request.compile is None else request.compile)


def sample_order(count: int, *, seed: int) -> np.ndarray:
    """Slot -> source index, int64 [count]: a seeded permutation, so that shards read in sequence mix classes."""
    return np.random.Generator(np.random.Philox(key=[seed, 0x0FDE5])).permutation(count)


def derived_name(dataset: DatasetSpec, specs: Sequence[FeatureSpec]) -> str:
    """Folder name from what is built, e.g. ``imagenet-256-sd-ft-ema-G3-G4-dinov2-b@11``."""
    vae = Path(dataset.vae["name"]).name if dataset.vae else "no-vae"
    levels = [s.name.split("/")[1] for s in specs if s.name.startswith("vae/G")]
    tokens: dict[str, list[str]] = {}
    for spec in specs:
        if "@" in spec.name:
            encoder, _, layer = spec.name.partition("@")
            tokens.setdefault(encoder, []).append(layer)
    parts = [dataset.name, str(dataset.preprocessing["resolution"]), vae, *levels]
    parts += [f"{encoder}@{','.join(layers)}" for encoder, layers in tokens.items()]
    if dataset.count != dataset.preprocessing["available"]:
        parts.append(f"n{dataset.count}")
    return "-".join(parts) + ("-flip" if dataset.flip else "")


@dataclass(frozen=True, kw_only=True)
class _Batch:
    slots: np.ndarray
    pixels: np.ndarray  # uint8 [n, R, R, 3]; zeros where bad
    content: np.ndarray  # uint64 [n]
    bad: list[tuple[int, str, str]]  # slot, key, reason


def _check(request: BuildRequest) -> None:
    from featcache.encoders.custom import is_custom
    from featcache.encoders.table import ENCODERS

    for choice in request.encoders:
        if choice.name != TINY and choice.name not in ENCODERS and not is_custom(choice.name):
            raise UserError(
                f"unknown encoder {choice.name!r}",
                remedy=f"Type --encoder with one of: {', '.join((*ENCODERS, TINY))}; or your own: path/to/file.py:name",
            )
    if request.on_bad_image not in ("fail", "skip"):
        raise UserError(
            f"--on-bad-image {request.on_bad_image!r} is neither fail nor skip", remedy="Type one of the two."
        )
    for what, value in (
        ("--limit", request.limit),
        ("--batch-size", request.batch_size),
        ("--shard-size", request.shard_size),
    ):
        if value is not None and value < 1:
            raise UserError(f"{what} {value} is less than 1", remedy=f"Type {what} with a positive number.")
    if request.into is not None and request.out is not None:
        raise UserError("--into and --out exclude each other", remedy="--into adds to a cache, --out makes a new one.")


def _resolution(request: BuildRequest, existing: Any) -> int:
    if existing is not None:
        cached = int(existing.manifest.dataset.preprocessing["resolution"])
        if request.resolution not in (None, cached):
            raise CacheError(
                f"{request.into} holds images at {cached} px, so features at {request.resolution} px cannot join it",
                remedy=f"Leave --resolution out (or type {cached}), or build a new cache with --out.",
            )
        return cached
    resolution = request.resolution or (64 if request.data.split(":")[0] == "shapes" else 256)
    if resolution < 32 or resolution % 32:
        raise UserError(
            f"--resolution {resolution}: the crop must be a multiple of 32 px, for whole patches of tokens and latents",
            remedy="Type --resolution 256 (or 64, 128, 512).",
        )
    return resolution


def _encoders(request: BuildRequest, resolution: int, compute: Any, *, grid: int | None, need_vae: bool) -> list[Any]:
    """The encoders that the request names. ``grid``: token grid of an existing cache; else the VAE decides it."""
    from featcache.encoders.base import WeightsSource
    from featcache.encoders.custom import UserEncoder, is_custom
    from featcache.encoders.vae import LEVELS, VaeEncoder
    from featcache.encoders.vision import VisionEncoder

    if request.weights_dir is not None and not request.weights_dir.is_dir():
        raise UserError(
            f"--weights-dir {request.weights_dir} is not a folder",
            remedy="Pass the folder that holds the weights.",
        )
    weights = WeightsSource(weights_dir=request.weights_dir, random_seed=request.random_weights)
    only_tiny = bool(request.encoders) and all(choice.name == TINY for choice in request.encoders)
    vae = request.vae or (TINY if only_tiny else "sd-ft-ema")
    levels = request.levels or (LEVELS if only_tiny and vae == TINY and need_vae else ())
    encoders: list[Any] = []
    if need_vae or levels or request.vae:
        encoders.append(VaeEncoder(vae, weights, resolution=resolution, levels=levels, compute=compute))
        grid = encoders[0].grid
    for choice in request.encoders:
        common = {"resolution": resolution, "grid": grid, "compute": compute}
        if is_custom(choice.name):
            encoders.append(UserEncoder(choice.name, choice.layers, **common))
        else:
            common["final_norm"] = request.final_norm
            encoders.append(VisionEncoder(choice.name, choice.layers, weights, **common))
    if not encoders:
        raise UserError(
            "nothing to add: neither --encoder nor --vae-levels was given",
            remedy="Type for example: --encoder dinov2-b",
        )
    return encoders


def _dataset(
    request: BuildRequest,
    source: Source,
    order: np.ndarray,
    resolution: int,
    encoders: Sequence[Any],
    existing: Any,
) -> DatasetSpec:
    vae = next((e.info for e in encoders if hasattr(e, "info")), None)
    if existing is not None:
        vae = vae or existing.manifest.dataset.vae
    return DatasetSpec(
        name=source.name,
        count=len(order),
        class_names=source.class_names,
        fingerprint=fingerprint(source, order),
        preprocessing={
            "resolution": resolution,
            "crop": CROP_NAME,
            "decode": "pil",
            "available": len(source),
        },
        order_seed=existing.manifest.dataset.order_seed if existing is not None else request.seed,
        flip=existing.manifest.dataset.flip if existing is not None else request.flip,
        source=source.description,
        vae=vae,
        grid=existing.manifest.dataset.grid if existing is not None else encoders[0].grid,
    )


def _kind(feature: str) -> str:
    if feature == "vae/moments":
        return "moments"
    return "levels" if feature.startswith("vae/") else "tokens"


def _feature_specs(
    request: BuildRequest, source: Source, order: np.ndarray, encoders: Sequence[Any], *, with_samples: bool
) -> list[FeatureSpec]:
    views = 2 if request.flip else 1
    specs = []
    if with_samples:
        longest = max(len(_key_bytes(source.key(int(i)))) for i in order)
        width = -(-longest // KEY_ALIGN) * KEY_ALIGN
        specs += [
            FeatureSpec(name="label", shape=(), codec="raw", dtype="int64", provenance={"source": "class folder"}),
            FeatureSpec(
                name="key",
                shape=(width,),
                codec="raw",
                dtype="uint8",
                provenance={"encoding": "utf-8, NUL-padded"},
            ),
            FeatureSpec(
                name="content",
                shape=(),
                codec="raw",
                dtype="uint64",
                provenance={"hash": "sha256, first 8 bytes"},
            ),
        ]
    versions = _versions()
    for encoder in encoders:
        for name, shape in encoder.shapes.items():
            specs.append(
                FeatureSpec(
                    name=name,
                    shape=tuple(shape),
                    codec=request.codecs.get(_kind(name), DEFAULT_CODECS[_kind(name)]),
                    views=views,
                    provenance={**encoder.provenance[name], "versions": versions},
                )
            )
    return specs


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in ("torch", "timm", "diffusers", "pillow", "numpy")}


def _key_bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def _shard_size(specs: Sequence[FeatureSpec], count: int) -> int:
    """By bytes for big sets; for small ones about sixteen shards, so that an interrupted build loses little."""
    by_bytes = recommended_shard_size(max(spec_bytes(spec) for spec in specs))
    return max(1, min(by_bytes, max(16, -(-count // 16))))


def spec_bytes(spec: FeatureSpec) -> int:
    """Stored bytes of one sample of a feature, scales and views included."""
    arrays = stored_arrays(spec.codec, tuple(spec.shape), spec.dtype)
    return spec.views * sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in arrays.values())


def _check_disk(path: Path, specs: Sequence[FeatureSpec], *, samples: int) -> None:
    parent = path
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    needed = samples * sum(spec_bytes(spec) for spec in specs)
    if needed + RESERVE_BYTES > free:
        raise UserError(
            f"{path} needs {needed / 1e9:.2f} GB more, but its disk has {free / 1e9:.2f} GB free",
            remedy="Choose another disk with --out, fewer --vae-levels or layers, or --limit; nothing was written.",
        )


def _check_same_images(existing: Any, dataset: DatasetSpec, encoders: Sequence[Any]) -> None:
    cached = existing.manifest.dataset
    if dataset.fingerprint != cached.fingerprint:
        raise CacheError(
            f"these are not the images that {existing.path} was built from: fingerprint "
            f"{dataset.fingerprint[:12]} against the manifest's {cached.fingerprint[:12]} ({cached.source})",
            remedy="Pass the same --data, unchanged, or build a new cache with --out.",
        )
    ours = next((e.info for e in encoders if hasattr(e, "info")), None)
    if ours is not None and cached.vae is not None and ours["sha256"] != cached.vae["sha256"]:
        raise CacheError(
            f"{existing.path} was built with VAE {cached.vae['name']!r} ({cached.vae['sha256'][:12]}), "
            f"but this build would use {ours['name']!r} ({ours['sha256'][:12]})",
            remedy=f"Type --vae {cached.vae['name']} with the same weights, or build a new cache with --out.",
        )


def _known_content(path: Path, count: int) -> np.ndarray | None:
    """Content hashes of an existing cache by slot, uint64 [count]; None if it has none (imported caches)."""
    import featcache

    cache = featcache.open(path)
    if "content" not in cache.manifest.features:
        return None
    reader = cache.reader(["content"], slots=True)
    out = reader.allocate(count)
    reader.read(np.arange(count), out)
    return out["content"]


def _check_content(source: Source, batch: _Batch, known: np.ndarray | None) -> None:
    if known is None:
        return
    bad = {slot for slot, _, _ in batch.bad}
    for slot, content in zip(batch.slots, batch.content):
        if int(slot) not in bad and known[slot] != content:
            raise CacheError(
                f"the image in slot {slot} is not the one this cache was built from (its bytes have changed)",
                remedy="Pass the original --data, or build a new cache with --out.",
            )


def _decoded_batches(
    source: Source,
    order: np.ndarray,
    pending: Sequence[int],
    shard_size: int,
    resolution: int,
    request: BuildRequest,
    holes: frozenset[str],
    pool: ThreadPoolExecutor,
) -> Iterator[_Batch]:
    """Batches in order of slots, decoded a few batches ahead by the pool's threads (PIL releases the GIL)."""

    def load(slot: int) -> tuple[np.ndarray, int] | BadImage:
        index = int(order[slot])
        if source.key(index) in holes:
            return BadImage(source.key(index), "skipped when the cache was built")
        try:
            return source.load(index, resolution)
        except BadImage as error:
            if request.on_bad_image == "fail" or request.into is not None:
                raise
            return error

    def plan() -> Iterator[np.ndarray]:
        for shard in pending:
            end = min((shard + 1) * shard_size, len(order))
            for first in range(shard * shard_size, end, request.batch_size):
                yield np.arange(first, min(first + request.batch_size, end))

    ahead: deque[tuple[np.ndarray, list[Future[Any]]]] = deque()
    batches = plan()
    try:
        for _ in range(3):
            if (slots := next(batches, None)) is not None:
                ahead.append((slots, [pool.submit(load, int(s)) for s in slots]))
        while ahead:
            slots, futures = ahead.popleft()
            pixels = np.zeros((len(slots), resolution, resolution, 3), np.uint8)
            content = np.zeros(len(slots), np.uint64)
            bad = []
            for i, (slot, future) in enumerate(zip(slots, futures)):
                loaded = future.result()
                if isinstance(loaded, BadImage):
                    bad.append((int(slot), loaded.key, loaded.reason))
                else:
                    pixels[i], content[i] = loaded
            yield _Batch(slots=slots, pixels=pixels, content=content, bad=bad)
            if (slots := next(batches, None)) is not None:
                ahead.append((slots, [pool.submit(load, int(s)) for s in slots]))
    finally:
        for _, futures in ahead:
            for future in futures:
                future.cancel()


def _allocate(specs: Sequence[FeatureSpec], count: int) -> dict[str, dict[str, np.ndarray]]:
    """Zeroed stored arrays of one shard: feature -> suffix -> [count, (views), *shape]."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for spec in specs:
        lead = (count, spec.views) if spec.views > 1 else (count,)
        arrays = stored_arrays(spec.codec, tuple(spec.shape), spec.dtype)
        parts[spec.name] = {suffix: np.zeros((*lead, *shape), dtype) for suffix, (dtype, shape) in arrays.items()}
    return parts


def _encode_batch(
    batch: _Batch,
    encoders: Sequence[Any],
    wanted: Mapping[str, FeatureSpec],
    parts: dict[str, dict[str, np.ndarray]],
    rows: slice,
    device: str,
    flip: bool,
) -> None:
    import torch

    from featcache.codecs import encode, numpy_view

    pixels = torch.from_numpy(batch.pixels).to(device).permute(0, 3, 1, 2)  # [n, 3, R, R]
    first = int(batch.slots[0])
    bad = [slot - first for slot, _, _ in batch.bad]
    for view in (0, 1) if flip else (0,):
        seen = pixels.flip(-1) if view else pixels
        for encoder in encoders:
            for name, feature in encoder(seen).items():
                if name not in wanted:
                    continue
                for suffix, stored in encode(wanted[name].codec, feature).items():
                    array = numpy_view(stored)
                    if bad:
                        array = array.copy()
                        array[bad] = 0
                    target = parts[name][suffix][rows]
                    if flip:
                        target[:, view] = array
                    else:
                        target[...] = array


def _fill_samples(
    source: Source, order: np.ndarray, batch: _Batch, parts: dict[str, dict[str, np.ndarray]], rows: slice
) -> None:
    if "label" not in parts:
        return
    bad = {slot for slot, _, _ in batch.bad}
    for row, slot in enumerate(batch.slots, start=rows.start):
        index = int(order[slot])
        parts["label"][""][row] = -1 if int(slot) in bad else source.label(index)
        key = _key_bytes(source.key(index))
        parts["key"][""][row, : len(key)] = np.frombuffer(key, np.uint8)
    parts["content"][""][rows] = batch.content


def _write(
    writer: CacheWriter, shard: int, parts: dict[str, dict[str, np.ndarray]], bad: list[tuple[int, str, str]]
) -> None:
    if bad:
        writer.skip(shard, bad)
    for feature, arrays in parts.items():
        writer.write_shard(feature, shard, arrays)
