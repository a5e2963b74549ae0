"""The manifest: what a cache holds, of which images, made how. Strictly validated: it may come from anybody.

It lives in the attribute `featcache` of the root group, in the same file as the consolidated metadata, so that one
rename makes a set of features visible. Its `checksum` covers manifest and consolidated metadata together.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import NoReturn

import numpy as np

from featcache.errors import CacheError, UserError
from featcache.store.basis import MAX_WIDTH, Basis, problem
from featcache.store.derived import Derived, derived_of
from featcache.store.derived import problem as derived_problem
from featcache.store.layout import (
    CODECS,
    COMPRESSORS,
    FORMATS,
    RAW_DTYPES,
    SCALE_SUFFIX,
    Json,
    canonical_json,
    n_shards,
    sample_bytes,
    stored_arrays,
)
from featcache.store.numbers import from_text, to_text

# 2: shards have hashes of their blocks. 3: and a feature is stored in a basis. 4: and a feature has its text of ''. A
# manifest says the lowest that it needs.
FORMAT_VERSION = 4
MAX_METADATA_BYTES = 64 << 20
MAX_COUNT = 1 << 40
MAX_SAMPLE_BYTES = 1 << 32
MAX_SHARD_SIZE = 1 << 20
MAX_SHARDS = 1 << 20
MAX_SHARD_FILES = 1 << 22
MAX_DEPTH = 24
MAX_RESOLUTION = 1 << 13
MAX_EMPTY = 1 << 21  # numbers of the text of '', which lies in the manifest: 512 tokens of 4096 channels

_FP16_MAX = float(np.finfo(np.float16).max)
_COMPONENT = r"[A-Za-z0-9](?:[A-Za-z0-9_@-]|\.(?!\.))*"
_NAME = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})?\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
# What importers record of a VAE where the source is silent: its name, or the hash of its weights.
UNKNOWN = "unknown"
SAMPLE_FEATURES = ("label", "key", "content")  # of the samples themselves, from no encoder
_RESERVED = {"c", "zarr.json", "SHA256SUMS"}


def check_feature_name(name: object) -> str:
    """`name` if it may name a feature: one or two components of letters, digits and `_ @ - .`; raises `CacheError`.

    It becomes a path inside the cache, so nothing that could leave it (`..`, a leading `/` or `.`) passes.
    """
    if (
        not isinstance(name, str)
        or len(name) > 128
        or not _NAME.match(name)
        or name.endswith((SCALE_SUFFIX, ".part", "."))
        or not _RESERVED.isdisjoint(name.split("/"))
    ):
        raise CacheError(
            f"{name!r:.200} cannot name a feature: one or two parts (joined by '/') of letters, digits "
            "and _ @ - . that begin with a letter or digit"
        )
    return name


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """One feature: its decoded per-sample `shape` (without the view axis), how it is stored, where it comes from.

    `dtype` is the decoded numpy dtype: 'float32' but for codec `raw`. `views` is 2 where mirrored copies are
    stored (a leading axis of every stored sample; view 1 is the mirrored one). `basis`: what is stored are coefficients
    in it, [T, K] by that codec. `empty`: of a text feature [C, T, W] or [C, P], what its encoder says of the text '', float16
    [T, W] or [P] in base64 (see `with_empty`, `empty_text`). `provenance` says encoder, weights (SHA-256 or random seed),
    layer, preprocessing and versions; only JSON values.
    """

    name: str
    shape: tuple[int, ...]
    codec: str
    dtype: str = "float32"
    views: int = 1
    basis: Basis | None = None
    empty: str | None = None
    provenance: Mapping[str, Json] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "provenance", _plain_json(self.provenance, f"provenance of {self.name!r:.150}"))
        parse_feature(self.to_json())

    @functools.cached_property
    def arrays(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Array name -> (numpy dtype, per-sample stored shape, with the view axis where there is one)."""
        lead = (self.views,) if self.views > 1 else ()
        return {self.name + suffix: (dtype, (*lead, *shape)) for suffix, (dtype, shape) in self.stored.items()}

    @functools.cached_property
    def stored(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Suffix -> (numpy dtype, per-sample stored shape without the view axis)."""
        return _stored(self.codec, self.shape, self.dtype, self.basis)

    @functools.cached_property
    def derived(self) -> Derived | None:
        """How it was made of another feature of the cache; None if it was not."""
        return derived_of(self.provenance, self.shape)

    def with_empty(self, values: np.ndarray) -> FeatureSpec:
        """This text feature with its text of '', float [T, W] (of a pooled one [P]), kept as float16, saturating.

        Raises `CacheError` for another shape, for values that are not finite, and for a feature of no text.
        """
        if values.shape != self.shape[1:]:
            _fail(f"the text of '' of {self.name}", f"of the shape {list(self.shape[1:])}", list(values.shape))
        return replace(self, empty=to_text(np.clip(values, -_FP16_MAX, _FP16_MAX), "<f2"))

    def empty_text(self) -> np.ndarray:
        """What the feature's encoder says of the text '': float32 [T, W], of a pooled feature [P].

        It is what classifier-free guidance takes for no text. Raises `CacheError` if the cache does not have it.
        """
        if self.empty is None:
            raise CacheError(
                f"{self.name} comes without the text of '', which unconditional text needs: it is no text feature, or was "
                "made by a featcache that did not keep it",
                remedy=f"Make it again: featcache rm CACHE --features {self.name}, then featcache build --into CACHE --text "
                f"{self.name.removeprefix('text/').removesuffix('.pooled')}",
            )
        return from_text(self.empty, "<f2").reshape(self.shape[1:]).astype(np.float32)

    @property
    def bytes_per_sample(self) -> int:
        """Stored bytes, scales and views included."""
        return sum(sample_bytes(dtype, shape) for dtype, shape in self.arrays.values())

    @property
    def shape_text(self) -> str:
        """Decoded shape of a sample, with the view axis, for people: '256x768'."""
        return "x".join(map(str, ((self.views,) if self.views > 1 else ()) + self.shape)) or "scalar"

    @property
    def stored_as(self) -> str:
        """The codec and the basis, or what a raw feature's numbers are, for people."""
        if self.codec == "raw":
            return self.dtype
        return self.codec if self.basis is None else f"{self.codec}, {self.basis.rank} components"

    def to_json(self) -> dict[str, Json]:
        """As the manifest has it."""
        values: dict[str, Json] = {
            "name": self.name,
            "shape": list(self.shape),
            "codec": self.codec,
            "dtype": self.dtype,
            "views": self.views,
            "provenance": dict(self.provenance),
        }
        if self.basis is not None:
            values["basis"] = dict(vars(self.basis))
        if self.empty is not None:
            values["empty"] = self.empty
        return values


def _stored(
    codec: str, shape: tuple[int, ...], dtype: str, basis: Basis | None
) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    return stored_arrays(codec, shape if basis is None else (shape[-2], basis.rank), dtype)


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """The images behind a cache and everything that decides which pixels an encoder saw, in which slot.

    count: slots, skipped images included. fingerprint: SHA-256 (hex) over the images. preprocessing:
    resolution, crop, decoder. order_seed: seed of the permutation from source order to slots. vae: name,
    latent_channels, scaling_factor, shift_factor, downsampling; None if the cache holds no latents. grid:
    side of the token grid.
    """

    name: str
    count: int
    class_names: tuple[str, ...]
    fingerprint: str
    preprocessing: Mapping[str, Json] = field(default_factory=dict)
    order_seed: int = 0
    flip: bool = False
    source: str = ""
    vae: Mapping[str, Json] | None = None
    grid: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))
        object.__setattr__(self, "preprocessing", _plain_json(self.preprocessing, "preprocessing"))
        if self.vae is not None:
            object.__setattr__(self, "vae", _plain_json(self.vae, "vae"))
        parse_dataset(self.to_json())

    @property
    def resolution(self) -> int:
        """Side of the crop, in pixels; raises `CacheError` if the cache does not say."""
        if "resolution" not in self.preprocessing:
            raise CacheError("the cache's metadata does not say at which resolution its images were taken")
        return int(self.preprocessing["resolution"])

    def to_json(self) -> dict[str, Json]:
        """As the manifest has it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["class_names"] = list(self.class_names)
        return values


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A slot without an image (zero-filled, label -1): which, the image's key, and why."""

    slot: int
    key: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a cache but the features' bytes. `features` holds complete ones only.

    checksums: array name -> SHA-256 of that array's `SHA256SUMS` file (in format 'wds', one file for all arrays).
    blocks: the same of `BLOCKS` files; arrays written before there were any have none. compressor: of every array
    ('zstd', 'blosc' or None). format: 'zarr' or 'wds'. versions: of the software that made the cache.
    """

    dataset: DatasetSpec
    shard_size: int
    features: Mapping[str, FeatureSpec] = field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    compressor: str | None = None
    format: str = "zarr"
    checksums: Mapping[str, str] = field(default_factory=dict)
    blocks: Mapping[str, str] = field(default_factory=dict)

    @property
    def n_shards(self) -> int:
        return n_shards(self.dataset.count, self.shard_size)

    @functools.cached_property
    def arrays(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Array name -> (numpy dtype, per-sample stored shape) of all features."""
        return {name: array for spec in self.features.values() for name, array in spec.arrays.items()}

    @property
    def encoded(self) -> list[str]:
        """Names of the features but those of the samples themselves (`SAMPLE_FEATURES`)."""
        return [name for name in self.features if name not in SAMPLE_FEATURES]

    def only(self, features: Collection[str]) -> Manifest:
        """The manifest without the other features."""
        kept = {name: spec for name, spec in self.features.items() if name in features}
        arrays = {array for spec in kept.values() for array in spec.arrays}
        return replace(
            self,
            features=kept,
            checksums={array: digest for array, digest in self.checksums.items() if array in arrays},
            blocks={array: digest for array, digest in self.blocks.items() if array in arrays},
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the samples' identity: dataset and skipped slots. Adding features keeps it."""
        identity = {"dataset": self.dataset.to_json(), "skipped": [s.slot for s in self.skipped]}
        return hashlib.sha256(canonical_json(identity)).hexdigest()

    @property
    def _version(self) -> int:
        if any(spec.empty is not None for spec in self.features.values()):
            return 4
        if any(spec.basis is not None for spec in self.features.values()):
            return 3
        return 2 if self.blocks else 1

    def to_json(self) -> dict[str, Json]:
        """As the manifest has it."""
        return {
            "format_version": self._version,
            "dataset": self.dataset.to_json(),
            "shard_size": self.shard_size,
            "compressor": self.compressor,
            "format": self.format,
            "features": {name: self.features[name].to_json() for name in sorted(self.features)},
            "skipped": [{"slot": s.slot, "key": s.key, "reason": s.reason} for s in self.skipped],
            "versions": dict(self.versions),
            "checksums": dict(self.checksums),
        } | ({"blocks": dict(self.blocks)} if self.blocks else {})


# Parsing. Every function takes what json.loads made of unknown bytes and raises CacheError for anything unexpected.


def _fail(what: str, expected: str, value: object) -> NoReturn:
    raise CacheError(f"the cache's metadata is damaged: {what} must be {expected}, but is {value!r:.120}")


def load_json(data: bytes, what: str) -> Json:
    """Strict JSON: no duplicate keys, no NaN, bounded depth. Raises `CacheError`."""

    def unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key occurs twice")
        return found

    def finite(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            raise ValueError(f"{text:.20} is too large")
        return number

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(data, object_pairs_hook=unique, parse_constant=constant, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{what} is not valid JSON: {error!s:.200}") from error
    if nested_deeper(value, MAX_DEPTH):
        raise CacheError(f"{what} is nested more than {MAX_DEPTH} levels deep")
    return value


def nested_deeper(value: Json, most: int) -> bool:
    """Whether lists and objects of a JSON value lie more than `most` levels within one another."""
    level = [value]
    for _ in range(most):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return False
    return True


def _plain_json(value: Mapping[str, Json], what: str) -> dict[str, Json]:
    """`value` as it will read back from JSON (tuples become lists); raises `UserError` if JSON cannot hold it."""
    try:
        plain: dict[str, Json] = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} cannot be written as JSON: {error}") from error
    return plain


def _object(value: Json, what: str, keys: set[str]) -> dict[str, Json]:
    if not isinstance(value, dict):
        _fail(what, "an object", value)
    if set(value) != keys:
        odd = sorted(set(value) ^ keys)
        _fail(what, f"an object with the keys {sorted(keys)}", f"(missing or unknown: {odd})")
    return value


def _integer(value: Json, what: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        _fail(what, f"an integer in [{low}, {high}]", value)
    return value


def _string(value: Json, what: str, *, choices: tuple[str, ...] | None = None, max_length: int = 4096) -> str:
    if not isinstance(value, str) or len(value) > max_length or (choices is not None and value not in choices):
        _fail(what, f"one of {choices}" if choices else f"a string of at most {max_length} characters", value)
    if any(0xD800 <= ord(character) < 0xE000 for character in value):
        _fail(what, "a string without lone surrogates", value)
    return value


def _boolean(value: Json, what: str) -> bool:
    if type(value) is not bool:
        _fail(what, "true or false", value)
    return value


def _mapping(value: Json, what: str) -> dict[str, Json]:
    if not isinstance(value, dict):
        _fail(what, "an object", value)
    return value


def _sequence(value: Json, what: str, max_length: int) -> list[Json]:
    if not isinstance(value, list) or len(value) > max_length:
        _fail(what, f"a list of at most {max_length} items", value)
    return value


def _sha256(value: Json, what: str) -> str:
    if not isinstance(value, str) or not _SHA256.match(value):
        _fail(what, "64 hexadecimal digits", value)
    return value


def parse_feature(value: Json) -> dict[str, Json]:
    """Check one feature's JSON; returns it unchanged."""
    keys = {"name", "shape", "codec", "dtype", "views", "provenance"}
    optional = {"basis", "empty"} & set(value) if isinstance(value, dict) else set()
    item = _object(value, "a feature", keys | optional)
    name = check_feature_name(item["name"])
    shape = [
        _integer(n, f"shape of {name}", 1, MAX_SAMPLE_BYTES) for n in _sequence(item["shape"], f"shape of {name}", 8)
    ]
    codec = _string(item["codec"], f"codec of {name}", choices=CODECS)
    dtype = _string(
        item["dtype"],
        f"dtype of {name}",
        choices=RAW_DTYPES if codec == "raw" else ("float32",),
        max_length=16,
    )
    views = _integer(item["views"], f"views of {name}", 1, 2)
    _provenance(item["provenance"], name)
    if "derived" in item["provenance"]:
        _derived(item["provenance"]["derived"], tuple(shape), name)
    if math.prod(shape) * views > MAX_SAMPLE_BYTES:
        _fail(f"shape of {name}", f"at most {MAX_SAMPLE_BYTES} values", shape)
    basis = _basis(item["basis"], tuple(shape), codec, name) if "basis" in optional else None
    if "empty" in optional:
        _empty(item["empty"], tuple(shape), codec, name)
    stored = _stored(codec, tuple(shape), dtype, basis)
    if any(sample_bytes(d, s) * views > MAX_SAMPLE_BYTES for d, s in stored.values()):
        _fail(f"shape of {name}", f"at most {MAX_SAMPLE_BYTES} bytes per sample", shape)
    return item


def _basis(value: Json, shape: tuple[int, ...], codec: str, name: str) -> Basis:
    what = f"basis of {name}"
    item = _object(value, what, {"rank", "mean", "scale", "vectors"})
    rank = _integer(item["rank"], f"{what}: rank", 1, MAX_WIDTH)
    for key in ("mean", "scale", "vectors"):
        if not (isinstance(item[key], str) and item[key].isascii()):
            _fail(f"{what}: {key}", "base64", item[key])
    found = Basis(rank=rank, mean=item["mean"], scale=item["scale"], vectors=item["vectors"])
    wrong = "one for a feature of numbers" if codec == "raw" else problem(found, shape)
    if wrong is not None:
        _fail(what, f"a mean, {rank} scales and {rank} vectors in base64", wrong)
    return found


def _empty(value: Json, shape: tuple[int, ...], codec: str, name: str) -> None:
    what = f"empty of {name}"
    count = math.prod(shape[1:])
    if not name.startswith("text/") or len(shape) not in (2, 3) or codec == "raw" or count > MAX_EMPTY:
        _fail(what, f"of a text feature, at most {MAX_EMPTY} numbers", f"one of {codec} {list(shape)}")
    # By its length first: what is too long is not decoded.
    if not isinstance(value, str) or len(value) != 4 * -(-2 * count // 3) or not value.isascii():
        _fail(what, f"{count} numbers as base64 of float16", value)
    try:
        numbers = from_text(value, "<f2")
    except ValueError:
        _fail(what, f"{count} numbers as base64 of float16", value)
    if len(numbers) != count or not np.isfinite(numbers).all():
        _fail(what, f"{count} finite numbers", "others")


def _derived(value: Json, shape: tuple[int, ...], name: str) -> None:
    what = f"provenance of {name}: derived"
    wrong = derived_problem(value, shape)
    if wrong is not None:
        _fail(what, f"how a feature of the shape {list(shape)} was made of another", wrong)
    if check_feature_name(value["from"]) == name:
        _fail(f"{what}.from", "another feature", name)


def parse_dataset(value: Json) -> dict[str, Json]:
    """Check a dataset's JSON; returns it unchanged."""
    item = _object(value, "dataset", {f.name for f in fields(DatasetSpec)})
    _string(item["name"], "dataset.name")
    _string(item["source"], "dataset.source")
    _integer(item["count"], "dataset.count", 1, MAX_COUNT)
    for name in _sequence(item["class_names"], "dataset.class_names", 1 << 20):
        _string(name, "a class name")
    _sha256(item["fingerprint"], "dataset.fingerprint")
    _preprocessing(item["preprocessing"])
    _integer(item["order_seed"], "dataset.order_seed", 0, (1 << 63) - 1)
    _boolean(item["flip"], "dataset.flip")
    if item["vae"] is not None:
        _vae(item["vae"])
    _integer(item["grid"], "dataset.grid", 0, 1 << 16)
    return item


def _number(value: Json, what: str) -> float:
    if type(value) not in (int, float) or not abs(value) <= 1e30:
        _fail(what, "a number", value)
    number: float = value
    return number


def _preprocessing(value: Json) -> None:
    """What is read from it anywhere; a cache may say more, or nothing."""
    item = _mapping(value, "dataset.preprocessing")
    for key, highest in (("resolution", MAX_RESOLUTION), ("available", MAX_COUNT)):
        if key in item:
            _integer(item[key], f"dataset.preprocessing.{key}", 1, highest)
    for key in ("crop", "decode"):
        if key in item:
            _string(item[key], f"dataset.preprocessing.{key}")


def _vae(value: Json) -> None:
    item = _mapping(value, "dataset.vae")
    needed = ("name", "latent_channels", "downsampling", "scaling_factor", "shift_factor")
    if not set(needed) <= set(item):
        _fail("dataset.vae", f"an object with the keys {needed}", sorted(item)[:8])
    _string(item["name"], "dataset.vae.name")
    for key in ("latent_channels", "downsampling"):
        _integer(item[key], f"dataset.vae.{key}", 1, 1 << 16)
    for key in ("scaling_factor", "shift_factor"):
        _number(item[key], f"dataset.vae.{key}")
    if item["scaling_factor"] == 0:
        _fail("dataset.vae.scaling_factor", "another number than", 0)
    if item.get("sha256") is not None:
        _string(item["sha256"], "dataset.vae.sha256")
    if item.get("pixel_range") is not None:
        for bound in _sequence(item["pixel_range"], "dataset.vae.pixel_range", 2):
            _number(bound, "dataset.vae.pixel_range")


def _provenance(value: Json, name: str) -> None:
    """What is read from it anywhere; the rest is for people."""
    item, what = _mapping(value, f"provenance of {name}"), f"provenance of {name}: "
    if item.get("seed") is not None or item.get("weights") == "random":
        _integer(item.get("seed"), what + "seed", 0, (1 << 64) - 1)
    for key in ("weights", "sha256"):
        if item.get(key) is not None:
            _string(item[key], what + key)
    if "final_norm" in item:
        _boolean(item["final_norm"], what + "final_norm")
    if item.get("layers") is not None:
        for layer in _sequence(item["layers"], what + "layers", 1 << 12):
            _string(layer, what + "a layer", max_length=256)
    if "captions" in item or name == "text/count":
        captions = _mapping(item.get("captions"), what + "captions")
        if not {"from", "key", "identity", "per_image"} <= set(captions):
            _fail(what + "captions", "an object that says from, key, identity and per_image", sorted(captions)[:8])
        _string(captions["from"], what + "captions.from")
        if captions["key"] is not None:
            _string(captions["key"], what + "captions.key")
        _integer(captions["per_image"], what + "captions.per_image", 1, 1 << 20)


def _feature(value: Json) -> FeatureSpec:
    item = parse_feature(value)
    basis = Basis(**item["basis"]) if "basis" in item else None
    return FeatureSpec(**{**item, "shape": tuple(item["shape"]), "basis": basis})


def dataset_from_json(value: Json) -> DatasetSpec:
    """The dataset of a JSON object; raises `CacheError` for anything unexpected."""
    item = parse_dataset(value)
    return DatasetSpec(**{**item, "class_names": tuple(item["class_names"])})


def feature_from_json(value: Json) -> FeatureSpec:
    """The feature of a JSON object; raises `CacheError` for anything unexpected."""
    return _as_cache_error(lambda: _feature(value))


def skipped_from_json(value: Json, count: int) -> tuple[Skipped, ...]:
    """Skipped slots in increasing order; raises `CacheError` for anything unexpected."""
    skipped = []
    for entry in _sequence(value, "skipped", count):
        item = _object(entry, "a skipped slot", {"slot", "key", "reason"})
        skipped.append(
            Skipped(
                slot=_integer(item["slot"], "skipped.slot", 0, count - 1),
                key=_string(item["key"], "skipped.key"),
                reason=_string(item["reason"], "skipped.reason"),
            )
        )
    slots = [s.slot for s in skipped]
    if any(a >= b for a, b in itertools.pairwise(slots)):
        _fail("skipped", "in increasing order of slots", slots[:8])
    return tuple(skipped)


def check_no_nesting(names: list[str]) -> None:
    """A zarr array cannot contain another node: no feature may be named like another one's first part."""
    taken = {array for name in names for array in (name, name + SCALE_SUFFIX)}
    for name in names:
        if "/" in name and name.split("/")[0] in taken:
            raise CacheError(
                f"features {name.split('/')[0]!r} and {name!r} cannot be in one cache: one contains the other"
            )


def manifest_from_json(value: Json) -> Manifest:
    """The manifest of a JSON object; raises `CacheError` for anything unexpected."""
    version = value.get("format_version") if isinstance(value, dict) else None
    if version is not None and (type(version) is not int or not 1 <= version <= FORMAT_VERSION):
        raise CacheError(
            f"this cache has format version {version!r:.40}; this program reads versions 1 to {FORMAT_VERSION}",
            remedy="install the featcache version that wrote it, or build the cache again",
        )
    keys = {"format_version", "format", "dataset", "shard_size", "compressor", "features", "skipped"}
    with_blocks = version == 2 or (version in (3, 4) and isinstance(value, dict) and "blocks" in value)
    keys |= {"versions", "checksums"} | ({"blocks"} if with_blocks else set())
    item = _object(value, "manifest", keys)
    _integer(item["format_version"], "format_version", 1, FORMAT_VERSION)
    dataset = dataset_from_json(item["dataset"])
    features: dict[str, FeatureSpec] = {}
    for name, entry in _mapping(item["features"], "features").items():
        spec = feature_from_json(entry)
        if spec.name != name:
            _fail("features", "keyed by feature name", name)
        features[name] = spec
    check_no_nesting(list(features))
    versions = {
        _string(k, "versions"): _string(v, "versions") for k, v in _mapping(item["versions"], "versions").items()
    }
    if item["compressor"] is not None:
        _string(item["compressor"], "compressor", choices=COMPRESSORS)
    manifest = Manifest(
        dataset=dataset,
        shard_size=_integer(item["shard_size"], "shard_size", 1, MAX_SHARD_SIZE),
        features=features,
        skipped=skipped_from_json(item["skipped"], dataset.count),
        versions=versions,
        compressor=item["compressor"],
        format=_string(item["format"], "format", choices=FORMATS),
        checksums=_digests(item["checksums"], "checksums"),
        blocks=_digests(item.get("blocks", {}), "blocks"),
    )
    if manifest.n_shards > MAX_SHARDS:
        _fail("shard_size", f"such that there are at most {MAX_SHARDS} shards", manifest.shard_size)
    if set(manifest.checksums) != set(manifest.arrays):
        _fail("checksums", "one for each stored array", sorted(manifest.checksums)[:8])
    if with_blocks and not (manifest.blocks and set(manifest.blocks) <= set(manifest.arrays)):
        _fail("blocks", "digests of stored arrays' BLOCKS files", sorted(manifest.blocks)[:8])
    if len(manifest.arrays) * manifest.n_shards > MAX_SHARD_FILES:
        _fail("shard_size", f"such that there are at most {MAX_SHARD_FILES} shard files", manifest.shard_size)
    if manifest.format == "wds":
        _check_shared(manifest)
    moments = features.get("vae/moments")
    if moments is not None and dataset.vae is not None:
        channels = 2 * dataset.vae["latent_channels"]
        if len(moments.shape) != 3 or moments.shape[0] != channels:
            _fail("shape of vae/moments", f"[{channels}, height, width], as its VAE has them", moments.shape)
    return manifest


def _digests(value: Json, what: str) -> dict[str, str]:
    return {name: _sha256(digest, f"{what}.{name:.150}") for name, digest in _mapping(value, what).items()}


def _check_shared(manifest: Manifest) -> None:
    """In a webdataset cache one checksum file serves all arrays."""
    for what, digests in (("checksums", manifest.checksums), ("blocks", manifest.blocks)):
        if len(set(digests.values())) > 1 or (digests and set(digests) != set(manifest.arrays)):
            _fail(what, "the same for all arrays of a webdataset cache", sorted(digests.values())[:2])


def _as_cache_error(make: Callable[[], FeatureSpec]) -> FeatureSpec:
    try:
        return make()
    except CacheError:
        raise
    except UserError as error:
        raise CacheError(f"the cache's metadata is damaged: {error.what}") from error
