"""Features made of a cache's own tokens by an affine map: its principal components, found here or brought.

The map is settled first and stands in the feature's provenance; then shard after shard is read, checked, mapped and
written, as a build writes: killed at any time, the same call goes on, with the map that it began with. A shard's bytes depend
on the source's and on the map alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import featcache
from featcache.builder.prepare import check_disk
from featcache.codecs import FeatureCodec
from featcache.errors import CacheError, UserError
from featcache.feature_names import CLASS_TOKEN
from featcache.paths import typed
from featcache.progress import QUIET, Progress
from featcache.read.components import TokenMoments, standardised_components
from featcache.read.decoded import BATCH, read_decoded
from featcache.read.maps import Found, load_map
from featcache.read.reader import Cache, Reader
from featcache.store.contents import shard_checker
from featcache.store.derived import Derived
from featcache.store.layout import Json
from featcache.store.manifest import FeatureSpec, Manifest, check_feature_name
from featcache.store.writer import CacheWriter, building_directory, declared
from featcache.store.writers import open_writer, repair_writer

CODEC = "fp16"
IMAGES = 10_000


@dataclass(frozen=True, kw_only=True)
class DeriveRequest:
    """What is asked for: feature `feature` of the cache at `cache` mapped to fewer channels.

    components: how many; with a map from elsewhere None, or of that the first so many. like: another cache (path or URL) that
    has the same feature derived; map: a file of `featcache.read.maps`; neither: principal components of this cache's tokens,
    found in `images` images drawn by `seed` (all if there are fewer; None: all). name: of the new feature.
    """

    cache: Path
    feature: str
    components: int | None = None
    like: str | None = None
    map: Path | None = None
    images: int | None = IMAGES
    seed: int = 0
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class DeriveResult:
    """The new feature, and of how many images it was made now (0: it was complete)."""

    spec: FeatureSpec
    images: int


def derive(request: DeriveRequest, progress: Progress = QUIET) -> DeriveResult:
    """Writes a derived feature, float16 [T, K], into a cache, or goes on with it.

    Raises `UserError` for anything but tokens, for components that there are not, and for a map that does not fit; `CacheError`
    for damage, if the name is taken by something else, and while another process writes the feature.
    """
    cache = featcache.open(request.cache)
    manifest = cache.manifest
    cache.require([request.feature])
    source = manifest.features[request.feature]
    _check_tokens(source)
    if manifest.format == "wds":
        raise CacheError(
            f"{request.cache} is a webdataset cache: its tars are complete and take no more features",
            remedy=f"Convert it (featcache convert {typed(request.cache)} COPY --to zarr) and derive in the copy.",
        )
    spec = _settle(request, cache, source, progress)
    with open_writer(request.cache) as writer:
        writer.begin([spec])
        pending = writer.pending()
        left = sum(len(writer.slots(shard)) for shard in pending)
        check_disk(request.cache, [spec], samples=left)
        progress.begin(f"deriving {spec.name}", manifest.dataset.count, done=manifest.dataset.count - left)
        write_derived(cache, [spec], {spec.name: pending}, writer, progress)
        writer.finish()
    return DeriveResult(spec=spec, images=left)


def write_derived(
    cache: Cache,
    specs: Sequence[FeatureSpec],
    shards: Mapping[str, Iterable[int]],
    writer: CacheWriter,
    progress: Progress,
) -> None:
    """Makes some shards (feature -> numbers, rising) of derived features of a cache from the features that it holds.

    Raises `CacheError` if a shard of the source is damaged.
    """
    manifest = cache.manifest
    for spec in specs:
        derivation = Derivation(cache.path, manifest, spec)
        name = derivation.source.name
        check = shard_checker(Path(cache.path), manifest, [name])
        with cache.reader([name], slots=True) as reader:
            buffers = reader.allocate(min(BATCH, manifest.shard_size))
            for shard in shards[spec.name]:
                slots = writer.slots(shard)
                check(slots)
                stored = functools.partial(_stored, reader, buffers, slots.start)
                writer.write_shard(spec.name, shard, derivation.shard(slots, stored))
                progress.update(len(slots))


def _stored(
    reader: Reader, buffers: dict[str, np.ndarray], start: int, first: int, count: int
) -> dict[str, np.ndarray]:
    reader.read(np.arange(start + first, start + first + count), buffers)
    return {array: values[:count] for array, values in buffers.items()}


class Derivation:
    """Stored tokens of the source feature => stored tokens of the derived one, `spec`, of the cache at `path`.

    Raises `CacheError` if the cache has no such source (any more).
    """

    def __init__(self, path: str | Path, manifest: Manifest, spec: FeatureSpec) -> None:
        derived = spec.derived
        assert derived is not None
        if derived.source not in manifest.features:
            raise CacheError(
                f"{spec.name} was derived of {derived.source}, which is not in the cache any more",
                remedy=f"Mend it from another copy: featcache repair {typed(path)} --from URL; or bring {derived.source} back "
                f"first (featcache restore {typed(path)}, or featcache build --into {typed(path)} --encoder {derived.source})",
            )
        self.spec, self.source = spec, manifest.features[derived.source]
        self._empty = frozenset(entry.slot for entry in manifest.skipped)
        self._codec = FeatureCodec(self.source)
        self._matrix, self._offset = (torch.from_numpy(v) for v in (derived.map.matrix, derived.map.offset))
        if len(self._matrix) != self.source.shape[-1] or self.source.views != spec.views:
            raise CacheError(
                f"{spec.name} was derived of tokens of {len(self._matrix)} channels in {spec.views} views, and {derived.source} "
                f"has {self.source.shape[-1]} in {self.source.views}"
            )

    def shard(self, slots: range, stored: Callable[[int, int], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays of a shard by suffix. `stored(first, count)` gives those of the source, by name, of so many of its
        samples; it is asked for `BATCH` at a time, from the first on, so that a shard comes out the same at all times."""
        (shape,) = (shape for _, shape in self.spec.arrays.values())
        out = np.empty((len(slots), *shape), np.float16)
        for first in range(0, len(slots), BATCH):
            part = out[first : first + BATCH]
            part[...] = self._mapped(stored(first, len(part))).reshape(part.shape)
        for row, slot in enumerate(slots):
            if slot in self._empty:
                out[row] = 0
        if not np.isfinite(out).all():
            raise CacheError(f"{self.source.name} has values that are not finite", remedy="Build it again.")
        return {"": out}

    def _mapped(self, stored: Mapping[str, np.ndarray]) -> np.ndarray:
        """[n * views, T, K] float16."""
        batch = {name: torch.from_numpy(values) for name, values in stored.items()}
        if self.source.views > 1:
            batch = {name: values.flatten(0, 1) for name, values in batch.items()}
        tokens = self._codec.decode(batch).double() @ self._matrix + self._offset
        limit = torch.finfo(torch.float16).max
        # By numpy: PyTorch rounds to float32 in between, so twice.
        found: np.ndarray = tokens.clamp(-limit, limit).numpy().astype(np.float16)
        return found


class DerivingWriter:
    """A `ShardWriter` that makes derived features of what passes through it: for tars, which hold all features at once."""

    def __init__(self, writer: CacheWriter, specs: Sequence[FeatureSpec]) -> None:
        self._writer = writer
        self._derivations = [Derivation(writer.path, writer.manifest, spec) for spec in specs]

    def skip(self, shard: int, slots: Sequence[tuple[int, str, str]]) -> None:
        self._writer.skip(shard, slots)

    def commit(self) -> None:
        self._writer.commit()

    def write_shard(self, feature: str, shard: int, arrays: Mapping[str, np.ndarray]) -> None:
        self._writer.write_shard(feature, shard, arrays)
        for derivation in self._derivations:
            if derivation.source.name == feature:
                made = derivation.shard(
                    self._writer.slots(shard),
                    lambda first, count: {feature + suffix: v[first : first + count] for suffix, v in arrays.items()},
                )
                self._writer.write_shard(derivation.spec.name, shard, made)


def repair_derived(path: Path, damaged: Mapping[str, Sequence[int]], progress: Progress) -> None:
    """Makes damaged shards (derived feature -> numbers) of a zarr cache again, of sources that are sound."""
    cache = featcache.open(path)
    specs = [cache.manifest.features[name] for name in damaged]
    for spec in specs:
        Derivation(path, cache.manifest, spec)  # nothing is begun if one of them cannot be made
    shards = {name: sorted(numbers) for name, numbers in damaged.items()}
    with repair_writer(path, shards) as writer:
        total = sum(len(writer.slots(shard)) for numbers in shards.values() for shard in numbers)
        progress.begin("deriving again", total)
        write_derived(cache, specs, shards, writer, progress)
        writer.finish()


# Which map


def _check_tokens(source: FeatureSpec) -> None:
    if len(source.shape) != 2 or source.codec == "raw" or source.name.startswith("text/") or source.derived:
        raise UserError(
            f"{source.name} has the shape {source.shape_text}: only an encoder's tokens, [T, C], can be derived of",
            remedy="Name a feature such as dinov2-b@11.",
        )


def _settle(request: DeriveRequest, cache: Cache, source: FeatureSpec, progress: Progress) -> FeatureSpec:
    """What is to be written: with the map that is there already, if it was asked for alike, else with the one asked for."""
    if request.like is not None:
        name, derived = _like(request, source)
    elif request.map is not None:
        found = load_map(request.map, request.components)
        name, derived = None, Derived(source=source.name, map=found.map, how=found.record())
    else:
        if request.components is None:
            raise UserError("nothing says what to derive", remedy="Type --pca 8 for the first 8 principal components.")
        asked = _asked(request, cache)
        name = _checked_name(request.name or f"{source.name}.pca{request.components}", source)
        known = _known(request.cache, name, source, request.components, asked)
        if known is not None:
            return known
        found = fit(cache, source, request.components, asked, progress)
        known = _known(request.cache, name, source, request.components, asked)  # of another process, meanwhile
        if known is not None:
            return known
        derived = Derived(source=source.name, map=found.map, how=found.record())
    channels, components = derived.map.matrix.shape
    if channels != source.shape[1]:
        raise UserError(
            f"the map takes tokens of {channels} channels, and {source.name} has {source.shape[1]}",
            remedy="Name the feature that it is for with --feature.",
        )
    name = _checked_name(request.name or name or f"{source.name}.pca{components}", source)
    return FeatureSpec(
        name=name,
        shape=(source.shape[0], components),
        codec=CODEC,
        views=source.views,
        provenance={**source.provenance, "derived": derived.to_json()},
    )


def _checked_name(name: str, source: FeatureSpec) -> str:
    """It begins like its source, so that the name says what it is of, and is not that of something else."""
    check_feature_name(name)
    part = name.removeprefix(f"{source.name}.")
    if part in ("", name, CLASS_TOKEN):
        raise UserError(
            f"--name {name}: what is derived of {source.name} is named after it",
            remedy=f"Type for example --name {source.name}.pca8",
        )
    return name


def _asked(request: DeriveRequest, cache: Cache) -> dict[str, Json]:
    count = len(cache) if request.images is None else min(request.images, len(cache))
    return {
        "method": "pca",
        "images": count,
        "seed": request.seed if count < len(cache) else 0,
        "cache": cache.fingerprint,
    }


def _known(
    path: Path, name: str, source: FeatureSpec, components: int, asked: Mapping[str, Json]
) -> FeatureSpec | None:
    """The feature of that name, complete or begun. Raises `CacheError` if it was asked for otherwise."""
    cache = featcache.open(path)
    building = building_directory(path, name)
    have = cache.manifest.features.get(name)
    begun = have is None
    if have is None and (building / "spec.json").is_file():
        have = declared(building)
    if have is None:
        return None
    derived = have.derived
    there = {} if derived is None else {**{key: derived.how.get(key) for key in asked}, "from": derived.source}
    there |= {"components": have.shape[-1]} if derived is not None else {}
    origin = {key: value for key, value in have.provenance.items() if key != "derived"}
    wanted = {**asked, "from": source.name, "components": components}
    other = [
        f"{key} {there.get(key)!s:.40}, not {wanted[key]!s:.40}" for key in wanted if there.get(key) != wanted[key]
    ]
    if not other and origin != dict(source.provenance):
        other = [f"of another {source.name} than the cache has now"]
    if other:
        again = f"featcache gc {typed(path)}" if begun else f"featcache rm {typed(path)} --features {name}"
        raise CacheError(
            f"{path} holds {name} already ({'begun' if begun else 'complete'}), made otherwise: {'; '.join(other)}",
            remedy=f"Choose another --name, or remove it first: {again}",
        )
    return have


def _like(request: DeriveRequest, source: FeatureSpec) -> tuple[str, Derived]:
    """What another cache derived of the same feature: the name that is the same here, and the map."""
    assert request.like is not None
    other = featcache.open(request.like).manifest
    found = {n: s for n, s in other.features.items() if s.derived is not None and s.derived.source == source.name}
    named = request.name if request.name in found else None
    if named is None and len(found) != 1:
        raise UserError(
            f"{request.like} holds {', '.join(found) or 'nothing'} derived of {source.name}",
            remedy="Say which one with --name." if found else "Derive it there first: featcache derive, with --pca 8.",
        )
    name = named or next(iter(found))
    spec = found[name]
    for key in ("sha256", "layer", "final_norm"):
        there, here = spec.provenance.get(key), source.provenance.get(key)
        if there != here:
            raise CacheError(
                f"{name} of {request.like} is of other tokens than {source.name} here: {key} {there!s:.40}, not {here!s:.40}",
                remedy="Build both caches with the same weights, or find components of this one: --pca 8",
            )
    derived = spec.derived
    assert derived is not None
    if request.components not in (None, spec.shape[1]):
        raise UserError(
            f"{name} of {request.like} has {spec.shape[1]} components, not {request.components}",
            remedy="Leave --pca out where --like says it.",
        )
    return name, derived


def fit(
    cache: Cache, source: FeatureSpec, components: int, asked: dict[str, Json], progress: Progress = QUIET
) -> Found:
    """Principal components of a feature's standardised tokens, in float64; all tokens and both views of each image.

    asked: `images` drawn by `seed` (see `_asked`). Every shard that is read is checked first.

    Raises `UserError` if there are fewer components, `CacheError` for damage and for values that are not finite.
    """
    if not len(cache):
        raise CacheError(f"{cache.path} holds no images")
    if components > source.shape[1]:
        raise UserError(f"{components} components were asked for, and {source.name} has {source.shape[1]} channels")
    chosen = np.arange(len(cache))
    if asked["images"] < len(cache):
        chosen = np.sort(np.random.default_rng(asked["seed"]).choice(len(cache), asked["images"], replace=False))
    slots = cache.slots(chosen)
    check = shard_checker(Path(cache.path), cache.manifest, [source.name])
    moments = TokenMoments()
    progress.begin(f"finding the components of {source.name}", len(chosen))
    batches = read_decoded(cache, [source.name], chosen, all_views=True)
    for start in range(0, len(chosen), BATCH):
        part = slots[start : start + BATCH]
        for slot in part:
            check(range(slot, slot + 1))
        moments.add(next(batches)[source.name].flatten(0, 1).numpy())  # read only now
        progress.update(len(part))
    mean, covariance = moments.result()
    if not np.isfinite(covariance).all():
        raise CacheError(f"{source.name} has values that are not finite", remedy="Build it again.")
    made, variance, total = standardised_components(mean, covariance, components)
    return Found(map=made, how=asked, variance=variance, total=total)
