"""One pass over the images: read, crop, encode, quantise, write; resumable by shard, divided among workers.

What is built is planned here, alike in every worker; :mod:`featcache.pipeline` does it and :mod:`featcache.workers`
divides it. The bytes of a cache do not depend on how often the build was interrupted nor on how many workers shared it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from featcache.captions import Captions, open_captions
from featcache.decoders import check_decoder
from featcache.encoders import TINY
from featcache.errors import CacheError, UserError
from featcache.images import CROP_NAME, Source, fingerprint, open_source, recorded_shapes
from featcache.keys import from_printable, key_bytes
from featcache.pipeline import Meter, Stage, Work, run_shards
from featcache.request import BuildRequest
from featcache.store import CacheWriter
from featcache.store.layout import recommended_shard_size, stored_arrays
from featcache.store.manifest import DatasetSpec, FeatureSpec

if TYPE_CHECKING:
    from featcache.workers import Ranks

RESERVE_BYTES = 256 << 20  # free space to leave on the disk
KEY_ALIGN = 8


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


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A request with its source and encoders opened: what every worker derives alike before anything is written."""

    request: BuildRequest
    path: Path
    dataset: DatasetSpec
    specs: tuple[FeatureSpec, ...]
    existing: Any
    work: Work


SAMPLE_FEATURES = ("label", "key", "content")


def prepare(request: BuildRequest, *, device: str, again: Collection[str] = ()) -> Plan:
    """Opens the source and loads the encoders onto ``device``. Writes nothing.

    Args:
        again: complete features of the cache ``request.into`` to make once more, as they are recorded (for repairs).

    Raises:
        UserError: bad input of any kind.
    """
    import featcache
    from featcache.encoders.base import Encoder

    existing = featcache.open(request.into) if request.into is not None else None
    resolution = _resolution(request, existing)
    decoder = _decoder(request, existing)
    source = open_source(request.data, resolution=resolution, limit=_source_limit(request, existing))
    order = sample_order(len(source), seed=existing.manifest.dataset.order_seed if existing else request.seed)
    order = order[: existing.manifest.dataset.count if existing else request.limit]

    compute = _compute(request, device)
    grid = existing.manifest.dataset.grid if existing is not None else None
    encoders: list[Encoder] = []
    without = existing is not None and request.texts and not (request.encoders or request.levels or request.vae)
    if not without and (not again or set(again) - {*SAMPLE_FEATURES, "text/count"}):
        cached_vae = (existing.manifest.dataset.vae or {}).get("name") if existing is not None else None
        named = request if request.vae or cached_vae is None else replace(request, vae=str(cached_vae))
        encoders = _encoders(
            named, resolution, compute, grid=grid, need_vae=existing is None, add_vae=bool(request.vae)
        )
    texts = _prepare_texts(request, source, order, existing, compute, counted="text/count" in again)
    dataset = _dataset(request, source, order, resolution, decoder, encoders, existing)
    if existing is not None:
        _check_same_images(existing, dataset, encoders)
    if existing is not None and again:
        specs = [existing.manifest.features[name] for name in again]
        _check_same_weights(specs, [*encoders, *texts.encoders])
        _check_same_captions(specs, texts.origin)
    else:
        flipped = request if existing is None else replace(request, flip=dataset.flip)
        specs = _feature_specs(flipped, source, order, encoders, with_samples=existing is None)
        specs += _text_specs(request, texts)
        if existing is not None:
            _check_same_captions([s for n, s in existing.manifest.features.items() if _is_text(n)], texts.origin)
            specs = [spec for spec in specs if spec.name not in existing.manifest.features]
    path = request.into or request.out or Path("caches") / derived_name(dataset, specs)
    wanted = {spec.name: spec for spec in specs}
    work = Work(
        source=source,
        order=order,
        resolution=resolution,
        shard_size=existing.manifest.shard_size if existing is not None else _shard_size(request, specs, len(order)),
        batch_size=request.batch_size,
        specs=wanted,
        encoders=[e for e in encoders if any(name in wanted for name in e.shapes)],
        device=device,
        pad_batches=compute.compile,
        decoder=decoder,
        flip=dataset.flip,
        skip_bad=request.on_bad_image == "skip" and existing is None,
        holes=frozenset(from_printable(s.key) for s in existing.manifest.skipped)
        if existing is not None
        else frozenset(),
        known=_known_content(path, len(order)) if existing is not None and "content" not in again else None,
        threads=request.workers or min(16, max(1, os.cpu_count() or 1)),
        texts=[e for e in texts.encoders if any(name in wanted for name in e.provenance)],
        captions=texts.captions if any(map(_is_text, wanted)) else None,
        captions_per_image=texts.per_image,
    )
    return Plan(request=request, path=path, dataset=dataset, specs=tuple(specs), existing=existing, work=work)


@dataclass(frozen=True, kw_only=True)
class _Texts:
    """The text encoders of a request with their captions; ``origin`` is what the manifest says of the captions."""

    encoders: tuple[Any, ...] = ()
    captions: Captions | None = None
    per_image: int = 0
    origin: Mapping[str, Any] = field(default_factory=dict)


def _is_text(feature: str) -> bool:
    return feature.startswith("text/")


def _prepare_texts(
    request: BuildRequest, source: Source, order: np.ndarray, existing: Any, compute: Any, *, counted: bool
) -> _Texts:
    """counted: captions are wanted even without an encoder, to be counted again."""
    if not (request.texts or counted):
        if request.captions or request.caption_key or request.captions_per_image:
            raise UserError("captions are named, but no text encoder", remedy="Type for example: --text clip-l")
        return _Texts()
    from featcache.encoders.base import WeightsSource
    from featcache.encoders.missing import require_weights
    from featcache.encoders.text import TextEncoder

    captions = open_captions(source, table=request.captions, key=request.caption_key)
    per_image = request.captions_per_image
    if existing is not None and per_image is None and "text/count" in existing.manifest.features:
        per_image = int(existing.manifest.features["text/count"].provenance["captions"]["per_image"])
    per_image = per_image or captions.most(order)
    if not per_image:
        raise UserError(
            f"none of the {len(order)} images has a caption ({captions.description})",
            remedy="Check --captions, or --caption-key.",
        )
    weights = WeightsSource(weights_dir=request.weights_dir, random_seed=request.random_weights)
    require_weights(weights, vae_name=None, texts=request.texts)
    encoders = [
        TextEncoder(name, weights, captions=per_image, compute=compute, batch_size=request.batch_size)
        for name in request.texts
    ]
    origin = {
        "from": captions.description,
        "key": request.caption_key,
        "identity": captions.identity,
        "per_image": per_image,
    }
    return _Texts(encoders=tuple(encoders), captions=captions, per_image=per_image, origin=origin)


def _text_specs(request: BuildRequest, texts: _Texts) -> list[FeatureSpec]:
    if not texts.encoders:
        return []
    specs = [
        FeatureSpec(name="text/count", shape=(), codec="raw", dtype="int32", provenance={"captions": texts.origin})
    ]
    for encoder in texts.encoders:
        record = {"captions": texts.origin, "versions": _versions("torch", "transformers", "tokenizers")}
        for name, shape in encoder.shapes.items():
            provenance = {**encoder.provenance[name], **record}
            specs.append(FeatureSpec(name=name, shape=shape, codec=request.text_codec, provenance=provenance))
        provenance = {**encoder.provenance[encoder.lengths], **record}
        lengths = FeatureSpec(
            name=encoder.lengths, shape=(texts.per_image,), codec="raw", dtype="int32", provenance=provenance
        )
        specs.append(lengths)
    return specs


def _check_same_captions(specs: Sequence[FeatureSpec], origin: Mapping[str, Any]) -> None:
    """All text features of a cache are of the same captions, since one count of them serves all."""
    for spec in specs:
        recorded = spec.provenance.get("captions")
        if not origin or recorded is None:
            continue
        for key, what in (("identity", "captions"), ("per_image", "number of captions an image")):
            if recorded[key] != origin[key]:
                raise CacheError(
                    f"{spec.name} was made with another {what}: {recorded['from']}, {recorded['per_image']} an image, "
                    f"against {origin['from']}, {origin['per_image']} an image",
                    remedy="Pass the same captions, or remove the cache's text features first (featcache rm).",
                )


def lead(plan: Plan) -> CacheWriter:
    """The writer that holds the features' locks until it finishes them, with enough room on the disk.

    Raises:
        CacheError: the cache is of other images, or somebody else builds one of the features.
        UserError: the disk is too small.
    """
    if plan.existing is not None:
        writer = CacheWriter.open(plan.path)
    else:
        writer = CacheWriter.create(
            plan.path,
            plan.dataset,
            shard_size=plan.work.shard_size,
            format=plan.request.format,
            compressor=plan.request.compressor,
            versions={"featcache": version("featcache-trainer"), **_versions()},
        )
    writer.begin(plan.specs)
    count = len(plan.work.order)
    _check_disk(plan.path, plan.specs, samples=min(count, len(writer.pending()) * writer.shard_size))
    return writer


def build(request: BuildRequest, progress: Progress, *, meter: Meter | None = None) -> BuildResult:
    """Builds or continues a cache, or adds features to one (``into``).

    Under torchrun every rank calls it; the ranks divide the shards, and rank 0 finishes the cache. ``meter`` is told how
    fast this process's stages are while it goes on.

    Raises:
        UserError: bad input of any kind; whatever shards were written stay, and the same call continues.
    """
    from featcache.workers import Ranks, build_on_ray

    check_request(request)
    if request.engine == "ray":
        return build_on_ray(request, progress, meter or Meter())
    meter = meter or Meter()
    with Ranks.of_environment() as ranks:
        plan = prepare_together(request, ranks, device=ranks.device(pick_device(request.device)))
        work = plan.work
        writer = lead(plan) if ranks.rank == 0 else None
        pending = ranks.from_first(writer.pending() if writer is not None else [])
        left = sum(len(work.slots(shard)) for shard in pending)
        with writer or CacheWriter.join(plan.path, plan.specs) as shard_writer:
            progress = _Shared(progress, ranks) if ranks.size > 1 else progress
            note = features_note(work.specs) + ranks.note()
            progress.start(total=len(work.order), done=len(work.order) - left, note=note)
            if writer is not None and work.captions is not None and work.captions.remark:
                progress.warn(work.captions.remark)
            mine = ranks.share(pending, request.schedule)
            run_shards(work, mine, shard_writer, meter=meter, advance=progress.advance, warn=progress.warn)
            ranks.wait(lambda: progress.advance(0))
            if writer is not None:
                writer.refresh()
                skipped = finish(plan, writer)
                warn_of_bare_images(plan, progress)
            else:
                skipped = ()
            ranks.wait()
    return BuildResult(
        path=plan.path,
        count=len(work.order),
        features=tuple(work.specs),
        skipped=skipped,
        encoded=left,
        first=ranks.rank == 0,
        stages=meter.stages,
    )


def prepare_together(request: BuildRequest, ranks: Ranks, *, device: str) -> Plan:
    """As :func:`prepare`, in every rank. Where captions are to be counted, which may read each of them, only the first
    rank does it, and the others wait for the number."""
    if not request.texts or request.captions_per_image:
        return prepare(request, device=device)
    plan = prepare(request, device=device) if ranks.rank == 0 else None
    (per_image,) = ranks.from_first([plan.work.captions_per_image] if plan is not None else [])
    return plan or prepare(replace(request, captions_per_image=per_image), device=device)


class _Shared:
    """Progress of all ranks: the first one shows it, the others only warn."""

    def __init__(self, progress: Progress, ranks: Ranks) -> None:
        self._progress, self._ranks, self._shown = progress, ranks, 0

    def start(self, *, total: int, done: int, note: str) -> None:
        if self._ranks.rank == 0:
            self._progress.start(total=total, done=done, note=note)

    def advance(self, images: int) -> None:
        """Counts images of this rank; the first rank shows those of all. With 0, only that."""
        if not images and self._ranks.rank > 0:
            return
        done = self._ranks.done(images)
        if self._ranks.rank == 0:
            self._progress.advance(done - self._shown)
            self._shown = done

    def warn(self, text: str) -> None:
        self._progress.warn(text)


def finish(plan: Plan, writer: CacheWriter) -> tuple[str, ...]:
    """Makes the features visible. Returns the keys of the images that this build left out."""
    before = {entry.slot for entry in plan.existing.manifest.skipped} if plan.existing is not None else set()
    return tuple(entry.key for entry in writer.finish().skipped if entry.slot not in before)


def warn_of_bare_images(plan: Plan, progress: Progress) -> None:
    """Says how many images of a finished build have no caption, where it made text features."""
    import featcache

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
    parts += [s.name.replace("/", "-") for s in specs if _is_text(s.name) and len(s.shape) == 3]
    if dataset.count != dataset.preprocessing["available"]:
        parts.append(f"n{dataset.count}")
    return "-".join(parts) + ("-flip" if dataset.flip else "")


def check_request(request: BuildRequest) -> None:
    """Raises `UserError` for encoders that do not exist."""
    from featcache.encoders.custom import is_custom
    from featcache.encoders.table import ENCODERS, TEXTS

    for choice in request.encoders:
        if choice.name != TINY and choice.name not in ENCODERS and not is_custom(choice.name):
            raise UserError(
                f"unknown encoder {choice.name!r}",
                remedy=f"Type --encoder with one of: {', '.join((*ENCODERS, TINY))}; or your own: path/to/file.py:name",
            )
    for name in request.texts:
        if name not in TEXTS:
            raise UserError(f"unknown text encoder {name!r}", remedy=f"Type --text with one of: {', '.join(TEXTS)}.")


def _resolution(request: BuildRequest, existing: Any) -> int:
    if existing is not None:
        cached = existing.manifest.dataset.resolution
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


def _source_limit(request: BuildRequest, existing: Any) -> int | None:
    """How many images the source shall offer: of the embedded set, whose size is a choice, as many as the cache's had."""
    shapes = recorded_shapes(existing.manifest.dataset.source) if existing is not None else None
    if shapes is not None and request.data.split(":")[0] == "shapes" and request.limit is None:
        return shapes[1]
    return request.limit


def _decoder(request: BuildRequest, existing: Any) -> str:
    """The decoder asked for, which must be that of the cache to add to."""
    cached = str(existing.manifest.dataset.preprocessing.get("decode", "pil")) if existing is not None else None
    decoder = request.decode or cached or "pil"
    if cached is not None and decoder != cached:
        raise CacheError(
            f"{request.into} was decoded by {cached!r}, so features from {decoder!r} cannot join it",
            remedy=f"Leave --decode out (or type {cached}), or build a new cache with --out.",
        )
    check_decoder(decoder)
    return decoder


def _encoders(
    request: BuildRequest, resolution: int, compute: Any, *, grid: int | None, need_vae: bool, add_vae: bool
) -> list[Any]:
    """The encoders that the request names. ``grid``: token grid of an existing cache; else the VAE decides it.

    need_vae: for a new cache. add_vae: the VAE is asked for by name, be it without levels.
    """
    from featcache.encoders.base import WeightsSource
    from featcache.encoders.custom import UserEncoder, is_custom
    from featcache.encoders.missing import require_weights
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
    with_vae = need_vae or bool(levels) or add_vae
    names = [choice.name for choice in request.encoders if not is_custom(choice.name)]
    require_weights(weights, vae_name=vae if with_vae else None, encoders=names, texts=request.texts)
    encoders: list[Any] = []
    if with_vae:
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
            "nothing to add: neither --encoder nor --vae-levels nor --text was given",
            remedy="Type for example: --encoder dinov2-b",
        )
    return encoders


def _dataset(
    request: BuildRequest,
    source: Source,
    order: np.ndarray,
    resolution: int,
    decoder: str,
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
            "decode": decoder,
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
        longest = max(len(key_bytes(source.key(int(i)))) for i in order)
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
                    codec=request.codecs[_kind(name)],
                    views=views,
                    provenance={**encoder.provenance[name], "versions": versions},
                )
            )
    return specs


def _versions(*packages: str) -> dict[str, str]:
    return {package: version(package) for package in packages or ("torch", "timm", "diffusers", "pillow", "numpy")}


def _shard_size(request: BuildRequest, specs: Sequence[FeatureSpec], count: int) -> int:
    """By bytes for big sets; for small ones about sixteen shards, so that an interrupted build loses little."""
    if request.shard_size:
        return request.shard_size
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
    if ours is not None and cached.vae is not None and ours["sha256"] != cached.vae.get("sha256"):
        from featcache.encoders.base import remedy_for_other_weights

        other = f"Type --vae {cached.vae['name']} with the same weights, or build a new cache with --out."
        raise CacheError(
            f"{existing.path} was built with VAE {cached.vae['name']!r} ({str(cached.vae.get('sha256'))[:12]}), "
            f"but this build would use {ours['name']!r} ({ours['sha256'][:12]})",
            remedy=remedy_for_other_weights("embedded") if cached.vae["name"] == ours["name"] == TINY else other,
        )


def _check_same_weights(specs: Sequence[FeatureSpec], encoders: Sequence[Any]) -> None:
    """Features made again must come from the weights that are recorded."""
    found = {name: origin for encoder in encoders for name, origin in encoder.provenance.items()}
    for spec in specs:
        recorded, ours = spec.provenance.get("sha256"), found.get(spec.name, {}).get("sha256")
        if recorded != ours:
            from featcache.encoders.base import remedy_for_other_weights

            raise CacheError(
                f"{spec.name} was made with weights {str(recorded)[:12]}, but those found here are {str(ours)[:12]}",
                remedy=remedy_for_other_weights(spec.provenance.get("weights")),
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
