"""What a build will do: source, encoders and features, opened and checked alike in every worker. Writes nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import featcache
from featcache.builder.pipeline import Work
from featcache.builder.request import BuildRequest
from featcache.console import size_text
from featcache.encoders import TINY
from featcache.encoders.base import Compute, Encoder, WeightsSource, remedy_for_other_weights
from featcache.encoders.custom import UserEncoder, is_custom
from featcache.encoders.missing import require_weights
from featcache.encoders.table import ENCODERS, TEXTS, Resampling
from featcache.encoders.text import TextEncoder
from featcache.encoders.vae import LEVELS, VaeEncoder, recorded_resampling
from featcache.encoders.vision import VisionEncoder, without_class_token
from featcache.errors import CacheError, UserError, WeightsUnavailable
from featcache.feature_names import is_class_token, layer_feature
from featcache.keys import from_printable, key_bytes
from featcache.read.reader import Cache
from featcache.sources.base import Source, fingerprint, sample_order
from featcache.sources.captions import Captions, open_captions
from featcache.sources.decoders import check_decoder, exact_loader
from featcache.sources.embedded import is_embedded, recorded_embedded
from featcache.sources.folder import refuse_splits, refuse_unlabelled
from featcache.sources.open import open_source
from featcache.sources.pixels import CROP_NAME, CROPS, SQUARE_NAME
from featcache.store.basis import Basis
from featcache.store.layout import recommended_shard_size
from featcache.store.manifest import SAMPLE_FEATURES, DatasetSpec, FeatureSpec

RESERVE_BYTES = 256 << 20  # free space to leave on the disk, of small caches as much as they take
KEY_ALIGN = 8


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A request with its source and encoders opened: what every worker derives alike before anything is written.

    there: those features that were asked for and that the cache holds already, as they were asked for.
    """

    request: BuildRequest
    path: Path
    dataset: DatasetSpec
    specs: tuple[FeatureSpec, ...]
    existing: Cache | None
    work: Work
    there: tuple[FeatureSpec, ...] = ()


def prepare(request: BuildRequest, *, device: str, again: Collection[str] = ()) -> Plan:
    """Opens the source and loads the encoders onto `device`. Writes nothing.

    Args:
        again: complete features of the cache `request.into` to make once more, as they are recorded (for repairs).

    Raises `UserError` for bad input of any kind.
    """
    try:
        return _prepare(request, device=device, again=again)
    except WeightsUnavailable as error:
        if again:  # which must come from the weights that they came from
            raise
        raise WeightsUnavailable(
            error.what,
            remedy=f"{error.remedy}\nOr pass --random-weights 0 to try things out with random weights (the cache is marked "
            "accordingly).",
        ) from error


def _prepare(request: BuildRequest, *, device: str, again: Collection[str]) -> Plan:
    existing = featcache.open(request.into) if request.into is not None else None
    resolution = _resolution(request, existing)
    crop = _crop(request, existing)
    decoder = _decoder(request, existing, crop)
    source = open_source(request.data, resolution=resolution, limit=_source_limit(request, existing))
    if existing is None:
        refuse_splits(source)
        if not request.texts:
            refuse_unlabelled(source)
    order = sample_order(
        len(source), seed=existing.manifest.dataset.order_seed if existing is not None else request.seed
    )
    order = order[: existing.manifest.dataset.count if existing is not None else request.limit]

    compute = _compute(request, device)
    grid = existing.manifest.dataset.grid if existing is not None else None
    encoders: list[Encoder] = []
    without = existing is not None and request.texts and not (request.encoders or request.levels or request.vae)
    if not without and (not again or set(again) - {*SAMPLE_FEATURES, "text/count"}):
        encoders = _encoders(
            _with_vae(request, existing),
            resolution,
            compute,
            grid=grid,
            need_vae=existing is None,
            add_vae=bool(request.vae),
        )
    texts = _prepare_texts(request, source, order, existing, compute, counted="text/count" in again)
    dataset = _dataset(request, source, order, resolution, crop, decoder, encoders, existing)
    if existing is not None:
        _check_same_images(existing, dataset, encoders)
    there: list[FeatureSpec] = []
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
            there = [spec for spec in specs if spec.name in existing.manifest.features]
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
        decoder=decoder if exact_loader(crop) == "pil" else exact_loader(crop),
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
    return Plan(
        request=request,
        path=path,
        dataset=dataset,
        specs=tuple(specs),
        existing=existing,
        work=work,
        there=tuple(there),
    )


@dataclass(frozen=True, kw_only=True)
class _Texts:
    """The text encoders of a request with their captions; `origin` is what the manifest says of the captions."""

    encoders: tuple[TextEncoder, ...] = ()
    captions: Captions | None = None
    per_image: int = 0
    origin: Mapping[str, Any] = field(default_factory=dict)


def _is_text(feature: str) -> bool:
    return feature.startswith("text/")


def _prepare_texts(
    request: BuildRequest,
    source: Source,
    order: np.ndarray,
    existing: Cache | None,
    compute: Compute,
    *,
    counted: bool,
) -> _Texts:
    """counted: captions are wanted even without an encoder, to be counted again."""
    if not (request.texts or counted):
        if request.captions or request.caption_key or request.captions_per_image:
            raise UserError("captions are named, but no text encoder", remedy="Type for example: --text clip-l")
        return _Texts()

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
        record = {"captions": texts.origin, "versions": package_versions("torch", "transformers", "tokenizers")}
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
        for key, what in (("identity", "other captions"), ("per_image", "another number of captions per image")):
            if recorded[key] != origin[key]:
                raise CacheError(
                    f"{spec.name} was made with {what}: {recorded['from']}, {recorded['per_image']} per image, "
                    f"against {origin['from']}, {origin['per_image']} per image",
                    remedy="Pass the same captions, or remove the cache's text features first (featcache rm).",
                )


def _compute(request: BuildRequest, device: str) -> Compute:
    gpu = device.startswith("cuda")
    precision = ("tf32" if gpu else "fp32") if request.precision == "auto" else request.precision
    return Compute(device=device, precision=precision, compile=gpu if request.compile is None else request.compile)


def derived_name(dataset: DatasetSpec, specs: Sequence[FeatureSpec]) -> str:
    """Folder name from what is built, e.g. `imagenet-256-sd-ft-ema-G3-G4-dinov2-b@11`."""
    vae = Path(dataset.vae["name"]).name if dataset.vae else "no-vae"
    levels = [s.name.split("/")[1] for s in specs if s.name.startswith("vae/G")]
    tokens: dict[str, list[str]] = {}
    for spec in specs:
        if layer_feature(spec.name):
            encoder, _, layer = spec.name.partition("@")
            tokens.setdefault(encoder, []).append(layer)
    parts = [dataset.name, str(dataset.preprocessing["resolution"]), vae, *levels]
    parts += [f"{encoder}@{','.join(layers)}" for encoder, layers in tokens.items()]
    parts += [s.name.replace("/", "-") for s in specs if _is_text(s.name) and len(s.shape) == 3]
    if dataset.count != dataset.preprocessing["available"]:
        parts.append(f"n{dataset.count}")
    if recorded_resampling({spec.name: spec.provenance for spec in specs}) == "average":
        parts.append("average")
    return "-".join(parts) + ("-flip" if dataset.flip else "")


def check_request(request: BuildRequest) -> None:
    """Raises `UserError` for encoders that do not exist."""
    for choice in request.encoders:
        if choice.name != TINY and choice.name not in ENCODERS and not is_custom(choice.name):
            raise UserError(
                f"unknown encoder {choice.name!r}",
                remedy=f"Type --encoder with one of: {', '.join((*ENCODERS, TINY))}; or your own: path/to/file.py:name",
            )
        if choice.class_tokens and choice.name in ENCODERS and not ENCODERS[choice.name].class_token:
            raise without_class_token(choice.name)
    for name in request.texts:
        if name not in TEXTS:
            raise UserError(f"unknown text encoder {name!r}", remedy=f"Type --text with one of: {', '.join(TEXTS)}.")


def _resolution(request: BuildRequest, existing: Cache | None) -> int:
    if existing is not None:
        cached = existing.manifest.dataset.resolution
        if request.resolution not in (None, cached):
            raise CacheError(
                f"{request.into} holds images at {cached} px, so features at {request.resolution} px cannot join it",
                remedy=f"Leave --resolution out (or type {cached}), or build a new cache with --out.",
            )
        return cached
    resolution = request.resolution or (64 if is_embedded(request.data) else 256)
    if resolution < 32 or resolution % 32:
        raise UserError(
            f"--resolution {resolution}: the crop must be a multiple of 32 px, for whole patches of tokens and latents",
            remedy="Type --resolution 256 (or 64, 128, 512).",
        )
    return resolution


def _source_limit(request: BuildRequest, existing: Cache | None) -> int | None:
    """How many images to take: of the embedded set, whose size is a choice, as many as the cache has."""
    shapes = recorded_embedded(existing.manifest.dataset.source) if existing is not None else None
    if shapes is not None and is_embedded(request.data) and request.limit is None:
        return shapes[1]
    return request.limit


def _crop(request: BuildRequest, existing: Cache | None) -> str:
    """The crop asked for as the manifest names it, which must be that of the cache to add to."""
    asked = CROPS[request.crop] if request.crop is not None else None
    if existing is None:
        return asked or CROP_NAME
    cached = str(existing.manifest.dataset.preprocessing.get("crop", CROP_NAME))
    if asked not in (None, cached):
        known = next((option for option, name in CROPS.items() if name == cached), None)
        raise CacheError(
            f"the images in {request.into} were cropped by {cached!r}, so features of images cropped by {asked!r} cannot join it",
            remedy="Leave --crop out" + (f" (or type {known})" if known else "") + ", or build a new cache with --out.",
        )
    return cached


def _decoder(request: BuildRequest, existing: Cache | None, crop: str) -> str:
    """The decoder asked for, which must be that of the cache to add to."""
    cached = str(existing.manifest.dataset.preprocessing.get("decode", "pil")) if existing is not None else None
    decoder = request.decode or cached or "pil"
    if cached is not None and decoder != cached:
        raise CacheError(
            f"{request.into} was decoded by {cached!r}, so features from {decoder!r} cannot join it",
            remedy=f"Leave --decode out (or type {cached}), or build a new cache with --out.",
        )
    check_decoder(decoder)
    if decoder != "pil" and crop == SQUARE_NAME:
        raise UserError(
            f"--decode {decoder} halves images as ADM's crop does, and --crop {SQUARE_NAME} takes them whole",
            remedy="Leave --decode out.",
        )
    return decoder


def _with_vae(request: BuildRequest, existing: Cache | None) -> BuildRequest:
    """The request with the existing cache's VAE and resampling where it names none."""
    cached = (existing.manifest.dataset.vae or {}).get("name") if existing is not None else None
    vae = request.vae or (None if cached is None else str(cached))
    return replace(request, vae=vae, vae_resampling=_resampling(request, existing))


def _resampling(request: BuildRequest, existing: Cache | None) -> Resampling:
    """As asked for, else as the existing cache has it: one mixture is made of all its levels."""
    features = existing.manifest.features if existing is not None else {}
    cached = recorded_resampling({name: spec.provenance for name, spec in features.items()})
    asked = request.vae_resampling or cached or "bilinear"
    if cached not in (None, asked):
        raise CacheError(
            f"the VAE levels in {request.into} were resampled by {cached!r}, so levels resampled by {asked!r} cannot join them",
            remedy=f"Leave --vae-resampling out (or type {cached}), or build a new cache with --out.",
        )
    return asked


def _encoders(
    request: BuildRequest, resolution: int, compute: Compute, *, grid: int | None, need_vae: bool, add_vae: bool
) -> list[Encoder]:
    """The encoders that the request names. `grid`: token grid of an existing cache; else the VAE decides it.

    need_vae: for a new cache. add_vae: the VAE is asked for by name, even without levels.
    """
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
    encoders: list[Encoder] = []
    if with_vae:
        encoders.append(
            VaeEncoder(
                vae,
                weights,
                resolution=resolution,
                levels=levels,
                compute=compute,
                resampling=request.vae_resampling or "bilinear",
            )
        )
        grid = encoders[0].grid
    for choice in request.encoders:
        if is_custom(choice.name):
            made: Encoder = UserEncoder(
                choice.name,
                choice.layers,
                resolution=resolution,
                grid=grid,
                class_tokens=choice.class_tokens,
                compute=compute,
            )
        else:
            made = VisionEncoder(
                choice.name,
                choice.layers,
                weights,
                resolution=resolution,
                grid=grid,
                final_norm=request.final_norm,
                class_tokens=choice.class_tokens,
                compute=compute,
            )
        encoders.append(made)
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
    crop: str,
    decoder: str,
    encoders: Sequence[Encoder],
    existing: Cache | None,
) -> DatasetSpec:
    vae = _vae_info(encoders)
    if existing is not None:
        vae = vae or existing.manifest.dataset.vae
    return DatasetSpec(
        name=source.name,
        count=len(order),
        class_names=source.class_names,
        fingerprint=fingerprint(source, order),
        preprocessing={
            "resolution": resolution,
            "crop": crop,
            "decode": decoder,
            "available": len(source),
        },
        order_seed=existing.manifest.dataset.order_seed if existing is not None else request.seed,
        flip=existing.manifest.dataset.flip if existing is not None else request.flip,
        source=source.description,
        vae=vae,
        grid=existing.manifest.dataset.grid if existing is not None else encoders[0].grid,
    )


def _vae_info(encoders: Sequence[Encoder]) -> Mapping[str, Any] | None:
    return next((e.info for e in encoders if isinstance(e, VaeEncoder)), None)


def _kind(feature: str) -> str:
    if feature == "vae/moments":
        return "moments"
    if is_class_token(feature):
        return "cls"
    return "levels" if feature.startswith("vae/") else "tokens"


def _feature_specs(
    request: BuildRequest, source: Source, order: np.ndarray, encoders: Sequence[Encoder], *, with_samples: bool
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
    versions = package_versions()
    for encoder in encoders:
        for name, shape in encoder.shapes.items():
            specs.append(
                FeatureSpec(
                    name=name,
                    shape=tuple(shape),
                    codec=request.codecs[_kind(name)],
                    views=views,
                    basis=None
                    if (rank := request.bases.get(_kind(name))) is None
                    else Basis.unfitted(rank, tuple(shape)),
                    provenance={**encoder.provenance[name], "versions": versions},
                )
            )
    return specs


def package_versions(*packages: str) -> dict[str, str]:
    return {package: version(package) for package in packages or ("torch", "timm", "diffusers", "pillow", "numpy")}


def _shard_size(request: BuildRequest, specs: Sequence[FeatureSpec], count: int) -> int:
    """By bytes for big sets; for small ones about sixteen shards, so that an interrupted build loses little."""
    if request.shard_size:
        return request.shard_size
    by_bytes = recommended_shard_size(max(spec.bytes_per_sample for spec in specs))
    return max(1, min(by_bytes, max(16, -(-count // 16))))


def room_for(n_bytes: float) -> float:
    """Bytes that a disk must have free before so many are written to it: metadata, journals and others need some too."""
    return n_bytes + min(RESERVE_BYTES, n_bytes)


def free_bytes(path: Path) -> int:
    """Free space on the disk that `path`, which need not exist yet, would lie on."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def check_disk(path: Path, specs: Sequence[FeatureSpec], *, samples: int) -> None:
    """Raises `UserError` unless the features of so many samples fit onto the disk."""
    needed, free = room_for(samples * sum(spec.bytes_per_sample for spec in specs)), free_bytes(path)
    if needed > free:
        raise UserError(
            f"{path} needs {size_text(needed)} of free space, but its disk has {size_text(free)}",
            remedy="Choose another disk with --out, fewer --vae-levels or layers, or --limit; nothing was encoded.",
        )


def _check_same_images(existing: Cache, dataset: DatasetSpec, encoders: Sequence[Encoder]) -> None:
    cached = existing.manifest.dataset
    if dataset.fingerprint != cached.fingerprint:
        raise CacheError(
            f"these are not the images that {existing.path} was built from: fingerprint "
            f"{dataset.fingerprint[:12]} against the manifest's {cached.fingerprint[:12]} ({cached.source})",
            remedy="Pass the same --data, unchanged, or build a new cache with --out.",
        )
    ours = _vae_info(encoders)
    if ours is not None and cached.vae is not None and ours["sha256"] != cached.vae.get("sha256"):
        other = f"Type --vae {cached.vae['name']} with the same weights, or build a new cache with --out."
        raise CacheError(
            f"{existing.path} was built with VAE {cached.vae['name']!r} ({str(cached.vae.get('sha256'))[:12]}), "
            f"but this build would use {ours['name']!r} ({ours['sha256'][:12]})",
            remedy=remedy_for_other_weights("embedded") if cached.vae["name"] == ours["name"] == TINY else other,
        )


def _check_same_weights(specs: Sequence[FeatureSpec], encoders: Sequence[Encoder | TextEncoder]) -> None:
    """Features made again must come from the weights that are recorded."""
    found = {name: origin for encoder in encoders for name, origin in encoder.provenance.items()}
    for spec in specs:
        recorded, ours = spec.provenance.get("sha256"), found.get(spec.name, {}).get("sha256")
        if recorded != ours:
            raise CacheError(
                f"{spec.name} was made with weights {str(recorded)[:12]}, but those found here are {str(ours)[:12]}",
                remedy=remedy_for_other_weights(spec.provenance.get("weights")),
            )


def _known_content(path: Path, count: int) -> np.ndarray | None:
    """Content hashes of an existing cache by slot, uint64 [count]; None if it has none (imported caches)."""
    cache = featcache.open(path)
    if "content" not in cache.manifest.features:
        return None
    reader = cache.reader(["content"], slots=True)
    out = reader.allocate(count)
    reader.read(np.arange(count), out)
    return out["content"]
