"""Writing a zarr cache: shards straight to their final place, visible only when a feature is complete.

During a build the directory holds, besides finished features,

    <array>/c.<shard>.0...            finished shards, each renamed into place
    .featcache/lock                   held for moments: creating, beginning, finishing, removing
    .featcache/dataset.json           dataset and shard size until the first feature is finished
    .featcache/building/<feature>/    lock (held by the builder), spec.json, and per finished shard
    <number>.json
                                      with its checksums and its skipped slots

`finish` turns the journal into checksum files and metadata, renames the root document into place and removes
the journal. Nothing final depends on time, order or interruptions, so a resumed build ends in the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from featcache.errors import CacheError
from featcache.store import files
from featcache.store.layout import (
    CHECKSUMS,
    COMPRESSORS,
    ROOT_METADATA,
    ROOT_NAMES,
    STATE,
    canonical_json,
    index_bytes,
    sample_bytes,
    shard_name,
    shard_samples,
)
from featcache.store.manifest import (
    MAX_METADATA_BYTES,
    DatasetSpec,
    FeatureSpec,
    Manifest,
    Skipped,
    check_feature_name,
    check_no_nesting,
    feature_from_json,
    load_json,
    manifest_from_json,
    skipped_from_json,
)
from featcache.store.root import find_root, node_metadata, read_root, root_bytes
from featcache.store.shards import encode_shard
from featcache.store.wds import tar_name

# When a group of shards is made durable: whichever comes first.
GROUP_S = 1.0
GROUP_BYTES = 1 << 30
GROUP_FILES = 128

_ENTRY = re.compile(r"(\d{8})\.json\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


def state_directory(path: Path) -> Path:
    return path / STATE


@contextlib.contextmanager
def cache_lock(path: Path) -> Iterator[None]:
    """Hold the lock on a cache's metadata (for moments). On the way out an idle cache loses its state
    directory.
    """
    state = state_directory(path)
    fd = files.lock(state / "lock")
    try:
        yield
        files.remove_empty_directory(state / "building")
        if find_root(path) is not None and not (state / "building").exists():
            files.remove_file(state / "dataset.json")
        if {entry.name for entry in state.iterdir()} == {"lock"}:
            files.remove_file(state / "lock")
            files.remove_empty_directory(state)
    finally:
        os.close(fd)


def building_directory(path: Path, feature: str) -> Path:
    return state_directory(path) / "building" / feature.replace("/", "+")


def journal_name(shard: int) -> str:
    return f"{shard:08d}.json"


class CacheWriter:
    """Writes features into one cache. Use `create` or `open`, then `begin`, `write_shard`..., `finish`.

    One writer belongs to one thread. Several writers, in any processes, may work on different features of
    one cache. It is a context manager that lets go of its features on exit; `finish` does that as well.
    """

    def __init__(self, path: Path, base: Manifest) -> None:
        self.path = path
        self._base = base
        self._specs: dict[str, FeatureSpec] = {}
        self._locks: dict[str, int] = {}
        self._done: dict[str, set[int]] = {}
        self._skipped: dict[int, list[Skipped]] = {}
        self._written: set[int] = set()
        self._repairs: dict[str, set[int]] | None = None
        self._group = files.Group()
        self._unrecorded: list[tuple[str, int, dict[str, str]]] = []
        self._last_commit_s = time.monotonic()

    # Opening

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        dataset: DatasetSpec,
        *,
        shard_size: int,
        resume: bool = True,
        compressor: str | None = None,
        format: str = "zarr",
        versions: Mapping[str, str] | None = None,
    ) -> CacheWriter:
        """A writer for the cache at `path`, new or (with `resume`) one of the same dataset.

        format: 'zarr', or 'wds' for webdataset tars, whose features must all be written by one builder.

        Raises `CacheError` if a cache of other images, preprocessing or shard size is there, or if it cannot
        be written.
        """
        path = Path(path)
        if compressor is not None and compressor not in COMPRESSORS:
            raise CacheError(f"there is no compressor {compressor!r}", remedy=f"use one of {', '.join(COMPRESSORS)}")
        if format == "wds" and compressor is not None:
            raise CacheError("webdataset caches are not compressed", remedy="use the zarr format, or no compressor")
        wanted = Manifest(
            dataset=dataset,
            shard_size=shard_size,
            compressor=compressor,
            format=format,
            versions=dict(versions or {}),
        )
        manifest_from_json(wanted.to_json())
        _refuse_foreign_directory(path)
        with cache_lock(path):
            existing = _existing_manifest(path)
            if existing is None:
                files.atomic_write(state_directory(path) / "dataset.json", [canonical_json(wanted.to_json())])
                return _writer_class(wanted)(path, wanted)
        if not resume:
            raise CacheError(
                f"there is a cache at {path} already", remedy="choose another --out, or leave --no-resume out"
            )
        require_same_dataset(existing, wanted, path)
        return _writer_class(existing)(path, existing)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, dataset: DatasetSpec | None = None) -> CacheWriter:
        """A writer that adds features to the cache at `path`.

        Raises `CacheError` if there is none, or if `dataset` is given and differs from the cache's.
        """
        path = Path(path)
        existing = None
        if find_root(path) is not None or (state_directory(path) / "dataset.json").is_file():
            with cache_lock(path):
                existing = _existing_manifest(path)
        if existing is None:
            raise CacheError(f"there is no cache at {path}", remedy=f"featcache build --out {path} makes one")
        if dataset is not None:
            require_same_dataset(existing, replace(existing, dataset=dataset), path)
        return _writer_class(existing)(path, existing)

    @classmethod
    def open_for_repair(cls, path: str | os.PathLike[str], shards: Mapping[str, Iterable[int]]) -> CacheWriter:
        """A writer that may rewrite just these shards (feature -> shard numbers) of complete features.

        `write_shard` replaces them; `finish` records the checksums of what was written. Re-encoding on the
        same hardware and software gives the recorded bytes back, elsewhere it may differ in the last bit.
        """
        writer = cls.open(path)
        repairs = {name: set(numbers) for name, numbers in shards.items()}
        for name, numbers in repairs.items():
            if name not in writer._base.features:
                raise CacheError(f"there is no complete feature {name!r} to repair in {writer.path}")
            if not all(0 <= n < writer.n_shards for n in numbers):
                raise CacheError(f"{name!r} has the shards 0 to {writer.n_shards - 1}, not {sorted(numbers)}")
        if writer._base.format == "wds" and (
            set(repairs) != set(writer._base.features) or len(set(map(frozenset, repairs.values()))) > 1
        ):
            raise CacheError("a tar holds all features: repair the same shards of all of them")
        with cache_lock(writer.path):
            for name in repairs:
                writer._specs[name] = writer._base.features[name]
                writer._take(name)
                writer._done[name] = set(range(writer.n_shards)) - repairs[name]
        writer._repairs = repairs
        return writer

    @classmethod
    def join(cls, path: str | os.PathLike[str], specs: Sequence[FeatureSpec]) -> CacheWriter:
        """A writer beside another process's that has begun `specs`: it writes shards, the other one finishes.

        It takes no locks; whoever began the features divides the shards among those who join and calls
        `refresh` when they are done.

        Raises `CacheError` if a feature is not being built, or is being built otherwise than `specs` says.
        """
        path = Path(path)
        existing = _existing_manifest(path)
        if existing is None:
            raise CacheError(f"no build of {path} is under way")
        if existing.format != "zarr":
            raise CacheError("several processes cannot write one webdataset cache", remedy="use the zarr format")
        writer = cls(path, existing)
        for spec in specs:
            complete = existing.features.get(spec.name)
            record = building_directory(path, spec.name) / "spec.json"
            if complete is None and not record.is_file():
                raise CacheError(f"no build of {spec.name!r} of {path} is under way")
            begun = complete or feature_from_json(
                load_json(files.read_bounded(record, MAX_METADATA_BYTES), str(record))
            )
            _require_same_feature(begun, spec, path)
            writer._specs[spec.name] = spec
            whole = set(range(writer.n_shards))
            writer._done[spec.name] = whole if complete is not None else writer._journaled_shards(spec)
        return writer

    def refresh(self) -> None:
        """Take note of the shards that writers who joined have finished."""
        self.commit()
        for name, spec in self._specs.items():
            if name in self._locks:
                self._done[name] = self._journaled_shards(spec)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        # An error is on its way already; what cannot be kept will be written anew.
        with contextlib.suppress(CacheError):
            self.commit()
        self._release()

    def close(self) -> None:
        """Let go of the begun features without finishing them; what is written stays."""
        try:
            self.commit()
        finally:
            self._release()

    def _release(self) -> None:
        self._group.abandon()
        for fd in self._locks.values():
            os.close(fd)
        self._locks.clear()

    # What there is

    @property
    def dataset(self) -> DatasetSpec:
        return self._base.dataset

    @property
    def shard_size(self) -> int:
        return self._base.shard_size

    @property
    def n_shards(self) -> int:
        return self._base.n_shards

    @property
    def manifest(self) -> Manifest:
        """The manifest as of opening: complete features, skipped slots."""
        return self._base

    def slots(self, shard: int) -> range:
        """The slots of shard `shard`."""
        start = shard * self.shard_size
        return range(start, start + shard_samples(self.dataset.count, self.shard_size, shard))

    def pending(self) -> list[int]:
        """Shards that are not yet complete for at least one of the begun features, in order."""
        done = [self._done[name] for name in self._specs]
        return [shard for shard in range(self.n_shards) if not all(shard in shards for shards in done)]

    def pending_for(self, feature: str) -> list[int]:
        """Shards of one begun feature that are not yet complete, in order."""
        return [shard for shard in range(self.n_shards) if shard not in self._done[feature]]

    # Building

    def begin(self, specs: Sequence[FeatureSpec]) -> None:
        """Declare the features that this writer will write. Shards of an interrupted build count as written.

        A feature that is complete already and declared alike has nothing pending.

        Raises `CacheError` if another process builds one of them, or if one exists with another shape, codec
        or provenance.
        """
        with cache_lock(self.path):
            self._base = self._current()
            others = {name for name in unfinished_features(self.path) if name not in {s.name for s in specs}}
            check_no_nesting([*self._base.features, *others, *(s.name for s in specs)])
            for spec in specs:
                complete = self._base.features.get(spec.name)
                if complete is not None:
                    _require_same_feature(complete, spec, self.path)
                    self._specs[spec.name] = spec
                    self._done[spec.name] = set(range(self.n_shards))
                    continue
                self._take(spec.name)
                self._specs[spec.name] = spec
                self._done[spec.name] = self._resume(spec)

    def _current(self) -> Manifest:
        """The manifest as it is now; raises `CacheError` if the cache was removed since this writer opened it."""
        current = _existing_manifest(self.path)
        if current is None:
            raise CacheError(
                f"the cache {self.path} was removed while this build was under way",
                remedy=f"featcache restore {shlex.quote(str(self.path))} brings it back; or run the same command again",
            )
        return current

    def _take(self, name: str) -> None:
        directory = building_directory(self.path, name)
        files.make_directory(directory)
        fd = files.try_lock(directory / "lock")
        if fd is None:
            raise CacheError(
                f"another process is writing {name!r} of {self.path} at this moment",
                remedy="wait for it to finish, or build other features meanwhile",
            )
        self._locks[name] = fd

    def _resume(self, spec: FeatureSpec) -> set[int]:
        """Shards of `spec` that an earlier build finished; clears away what it left half done."""
        directory = building_directory(self.path, spec.name)
        record = directory / "spec.json"
        if record.is_file():
            earlier = feature_from_json(load_json(files.read_bounded(record, MAX_METADATA_BYTES), str(record)))
            _require_same_feature(earlier, spec, self.path)
        else:
            files.atomic_write(record, [canonical_json(spec.to_json())])
        for leftover in directory.glob("*" + files.PART_SUFFIX):
            files.remove_file(leftover)
        self._prepare(spec)
        return self._journaled_shards(spec)

    def _journaled_shards(self, spec: FeatureSpec) -> set[int]:
        """Shards of a feature under way that are journaled and whole."""
        done = set()
        for entry in building_directory(self.path, spec.name).iterdir():
            match = _ENTRY.match(entry.name)
            if match and self._shard_is_whole(spec, int(match[1])):
                with contextlib.suppress(CacheError):
                    journal_entry(entry, spec, self.dataset.count)
                    done.add(int(match[1]))
        return done

    def _prepare(self, spec: FeatureSpec) -> None:
        """Make the directories for a feature's shards and clear away half-written ones."""
        for array in spec.arrays:
            files.make_directory(self.path / array)
            for leftover in (self.path / array).glob("*" + files.PART_SUFFIX):
                files.remove_file(leftover)

    def _shard_is_whole(self, spec: FeatureSpec, shard: int) -> bool:
        if shard >= self.n_shards:
            return False
        n = shard_samples(self.dataset.count, self.shard_size, shard)
        for array, (dtype, shape) in spec.arrays.items():
            path = self.path / array / shard_name(shard, len(shape))
            expected = n * sample_bytes(dtype, shape) + index_bytes(self.shard_size)
            try:
                size = path.stat().st_size
            except OSError:
                return False
            if self._base.compressor is None and size != expected:
                return False
        return True

    def skip(self, shard: int, slots: Iterable[tuple[int, str, str]]) -> None:
        """Say that these `(slot, key, reason)` of `shard` hold no image. Call it before `write_shard` of
        that shard.

        The caller still writes zeros there and label -1. Recorded durably with each feature's shard.
        """
        inside = self.slots(shard)
        skipped = [Skipped(slot=slot, key=key, reason=reason) for slot, key, reason in slots]
        if any(entry.slot not in inside for entry in skipped):
            raise CacheError(f"a skipped slot lies outside shard {shard}, which holds {inside}")
        skipped.sort(key=lambda entry: entry.slot)
        late = shard in self._written and skipped != self._skipped.get(shard, [])
        assert not late, "skip must come before the shard's first write_shard"
        self._skipped[shard] = skipped

    def write_shard(self, feature: str, shard: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write one shard of a begun feature: suffix ('' or '.scale') -> `[n, *stored_shape]`.

        `n` is the number of slots in the shard. Writing a finished shard again does nothing.

        It is durable and journaled with the next `commit`, a second or two later; a build that is killed
        before writes it again.

        Raises `CacheError` for arrays of another shape or dtype and when the disk refuses; the shard then
        counts as not written and nothing half-written is left.
        """
        if shard in self._done[feature]:
            return
        spec = self._specs[feature]
        n = len(self.slots(shard))
        if {feature + suffix for suffix in arrays} != set(spec.arrays):
            raise CacheError(f"{feature!r} stores the arrays {sorted(spec.arrays)}, not {sorted(arrays)}")
        for array, (dtype, shape) in spec.arrays.items():
            got = arrays[array[len(feature) :]]
            if got.dtype != dtype or got.shape != (n, *shape):
                raise CacheError(
                    f"shard {shard} of {array!r} must be {dtype} {(n, *shape)}, not {got.dtype} {got.shape}"
                )
        self._written.add(shard)
        self._store(feature, shard, {feature + suffix: values for suffix, values in arrays.items()})

    def _store(self, feature: str, shard: int, arrays: dict[str, np.ndarray]) -> None:
        checksums = {}
        for array, (_, shape) in self._specs[feature].arrays.items():
            buffers = encode_shard(arrays[array], self.shard_size, self._base.compressor)
            target = self.path / array / shard_name(shard, len(shape))
            checksums[array] = self._group.write(target, buffers)
        self._written_to_group([(feature, shard, checksums)])

    def _written_to_group(self, shards: list[tuple[str, int, dict[str, str]]]) -> None:
        """Note shards whose files are in the group; commit it when it is large or old enough."""
        self._unrecorded += shards
        for feature, shard, _ in shards:
            self._done[feature].add(shard)
        old = time.monotonic() - self._last_commit_s > GROUP_S
        if old or self._group.n_bytes >= GROUP_BYTES or len(self._group) >= GROUP_FILES:
            self.commit()

    def commit(self) -> None:
        """Make every shard written so far durable and journal it.

        Happens by itself every second or two and in `finish` and `close`. Raises `CacheError` if the disk
        refuses; the shards of the group are pending again then.
        """
        shards, self._unrecorded = self._unrecorded, []
        try:
            self._group.commit()
            while shards:
                self._record(*shards[0])
                del shards[0]
        finally:
            self._last_commit_s = time.monotonic()
            for feature, shard, _ in shards:
                self._done[feature].discard(shard)

    def _record(self, feature: str, shard: int, checksums: dict[str, str]) -> None:
        """Journal one finished shard of one feature."""
        skipped = [vars(entry) for entry in self._skipped.get(shard, [])]
        entry = canonical_json({"checksums": checksums, "skipped": skipped})
        # After its shards are durable, and not itself: a lost or damaged entry only means writing a shard
        # again.
        target = building_directory(self.path, feature) / journal_name(shard)
        files.atomic_write(target, [entry], durable=False)
        self._done[feature].add(shard)

    def finished(self, feature: str) -> frozenset[int]:
        """Shards of a begun feature that are written."""
        return frozenset(self._done[feature])

    def adopt_shard(self, feature: str, shard: int, checksums: Mapping[str, str]) -> None:
        """Record a shard whose files are in place already (array -> SHA-256 of its file), fetched and
        checked.
        """
        self._written.add(shard)
        self._record(feature, shard, dict(checksums))

    def finish(self) -> Manifest:
        """Make the begun features visible, all at once, and remove the journal. Returns the new manifest.

        Raises `CacheError` if a shard is missing.
        """
        self.commit()
        missing = self.pending()
        if missing:
            raise CacheError(
                f"{len(missing)} of {self.n_shards} shards are not written yet (the first is {missing[0]})",
                remedy="run the same build command again: it goes on where it stopped",
            )
        with cache_lock(self.path):
            current = self._current()
            features = {**current.features, **self._specs}
            skipped = {entry.slot: entry for entry in current.skipped}
            checksums = dict(current.checksums)
            for name in self._locks:
                skipped |= {entry.slot: entry for entry in self._seal(name, checksums)}
            manifest = replace(
                current,
                features={name: features[name] for name in sorted(features)},
                skipped=tuple(skipped[slot] for slot in sorted(skipped)),
                checksums=dict(sorted(checksums.items())),
            )
            self._publish(manifest)
            for name in self._specs:
                files.remove_tree(building_directory(self.path, name))
            self._release()
        self._base = manifest
        return manifest

    def _seal(self, name: str, checksums: dict[str, str]) -> list[Skipped]:
        """Write the checksum files of one feature's arrays; returns its skipped slots."""
        spec = self._specs[name]
        repaired = None if self._repairs is None else self._repairs[name]
        lines = {
            array: [""] * self.n_shards if repaired is None else recorded_checksums(self.path, self._base, array)
            for array in spec.arrays
        }
        skipped: list[Skipped] = []
        for shard in range(self.n_shards) if repaired is None else sorted(repaired):
            digests, entries = self._journaled(spec, shard)
            for array, digest in digests.items():
                lines[array][shard] = digest
            skipped += entries
        for array, (_, shape) in spec.arrays.items():
            names = [shard_name(shard, len(shape)) for shard in range(self.n_shards)]
            text = checksums_text(lines[array], names)
            checksums[array] = self._group.write(self.path / array / CHECKSUMS, [text])
        return skipped

    def _journaled(self, spec: FeatureSpec, shard: int) -> tuple[dict[str, str], tuple[Skipped, ...]]:
        path = building_directory(self.path, spec.name) / journal_name(shard)
        return journal_entry(path, spec, self.dataset.count)

    def _publish(self, manifest: Manifest) -> None:
        publish(self.path, manifest, set(self._specs), self._group)


def _writer_class(manifest: Manifest) -> type[CacheWriter]:
    if manifest.format == "zarr":
        return CacheWriter
    from featcache.store.wds_writer import WdsWriter

    return WdsWriter


def publish(path: Path, manifest: Manifest, features: set[str], group: files.Group | None = None) -> None:
    """Write the nodes' metadata of `features` with whatever is in `group`, and then, last, the root document.

    The caller holds the cache's lock.
    """
    group = files.Group() if group is None else group
    content: dict[Path, dict[str, Any]] = {}
    nodes = node_metadata(manifest) if manifest.format == "zarr" else {}
    for name in sorted(features) if nodes else ():
        parents = [name.split("/")[0]] if "/" in name else []
        content |= {path / node / ROOT_METADATA: nodes[node] for node in (*parents, *manifest.features[name].arrays)}
    for target, node in content.items():
        document = canonical_json(node)
        if not target.is_file() or target.read_bytes() != document:
            group.write(target, [document], hashing=False)
    group.commit()
    files.atomic_write(path / ROOT_NAMES[manifest.format], [root_bytes(manifest)])


def shard_names(manifest: Manifest, array: str) -> list[str]:
    """Names of the files that hold an array's shards, relative to where its `SHA256SUMS` is."""
    if manifest.format == "wds":
        return [tar_name(shard) for shard in range(manifest.n_shards)]
    ndim = len(manifest.arrays[array][1])
    return [shard_name(shard, ndim) for shard in range(manifest.n_shards)]


def checksums_path(manifest: Manifest, array: str) -> str:
    """Where the `SHA256SUMS` file of an array is, relative to the cache."""
    return CHECKSUMS if manifest.format == "wds" else f"{array}/{CHECKSUMS}"


def checksums_text(digests: Sequence[str], names: Sequence[str]) -> bytes:
    """A `SHA256SUMS` file, as `sha256sum --check` reads it in its own directory."""
    return "".join(f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True)).encode("ascii")


def parse_checksums(data: bytes, names: Sequence[str], where: str) -> list[str]:
    """The shards' SHA-256 from a `SHA256SUMS` file; raises `CacheError` unless it is exactly as written."""
    digests = [line[:64] for line in data.decode("ascii", "replace").splitlines()]
    whole = len(digests) == len(names) and all(map(_SHA256.match, digests))
    if not whole or checksums_text(digests, names) != data:
        raise CacheError(f"{where} is damaged: it does not list {len(names)} shards and their SHA-256")
    return digests


def check_checksums(data: bytes, manifest: Manifest, array: str, where: str) -> list[str]:
    """The shards' SHA-256 from the bytes of an array's `SHA256SUMS`, checked against the manifest."""
    if hashlib.sha256(data).hexdigest() != manifest.checksums[array]:
        raise CacheError(f"{where} is damaged: it is not the file that the manifest names")
    return parse_checksums(data, shard_names(manifest, array), where)


def read_checksums(path: Path, manifest: Manifest, array: str) -> list[str]:
    """The SHA-256 of an array's shards; raises `CacheError` if the file is missing or damaged."""
    where = path / checksums_path(manifest, array)
    return check_checksums(files.read_bounded(where, manifest.n_shards * 160), manifest, array, str(where))


def recorded_checksums(path: Path, manifest: Manifest, array: str) -> list[str]:
    """As `read_checksums`, but where that file is damaged itself, the SHA-256 of the shards as they are."""
    try:
        return read_checksums(path, manifest, array)
    except CacheError:
        folder = (path / checksums_path(manifest, array)).parent
        return [files.sha256_of(folder / name) for name in shard_names(manifest, array)]


def require_same_dataset(existing: Manifest, wanted: Manifest, path: Path) -> None:
    """Raise `CacheError` naming every difference if `wanted` is not what the cache at `path` was made of."""
    have, want = existing.dataset.to_json(), wanted.dataset.to_json()
    # Where the images lie and what the set is called do not change them.
    differences = [
        f"{key}: the cache has {have[key]!r:.200}, this build {want[key]!r:.200}"
        for key in have
        if key not in ("source", "name") and have[key] != want[key]
    ]
    for key in ("shard_size", "compressor", "format"):
        if getattr(existing, key) != getattr(wanted, key):
            differences.append(f"{key}: the cache has {getattr(existing, key)}, this build {getattr(wanted, key)}")
    if differences:
        raise CacheError(
            f"{path} holds a cache of other images or preprocessing:\n  " + "\n  ".join(differences),
            remedy="use the same --data and options as that cache, or choose another --out",
        )


def _require_same_feature(have: FeatureSpec, want: FeatureSpec, path: Path) -> None:
    differing = [key for key, value in have.to_json().items() if value != want.to_json()[key]]
    if differing:
        key = differing[0]
        raise CacheError(
            f"{path} holds {have.name!r} already (complete or begun), with another {key}: "
            f"{have.to_json()[key]!r:.300} there, {want.to_json()[key]!r:.300} here",
            remedy=f"featcache rm {path} {have.name} removes it; or choose another --out",
        )


def journal_entry(path: Path, spec: FeatureSpec, count: int) -> tuple[dict[str, str], tuple[Skipped, ...]]:
    value = load_json(files.read_bounded(path, MAX_METADATA_BYTES), str(path))
    damaged = CacheError(
        f"{path} is damaged",
        remedy="remove that file and run the same build command again: it writes that shard anew",
    )
    if not isinstance(value, dict) or set(value) != {"checksums", "skipped"}:
        raise damaged
    checksums = value["checksums"]
    if not isinstance(checksums, dict) or set(checksums) != set(spec.arrays):
        raise damaged
    if not all(isinstance(digest, str) and _SHA256.match(digest) for digest in checksums.values()):
        raise damaged
    return checksums, skipped_from_json(value["skipped"], count)


def _existing_manifest(path: Path) -> Manifest | None:
    if find_root(path) is not None:
        return read_root(path)
    record = state_directory(path) / "dataset.json"
    if record.is_file():
        return manifest_from_json(load_json(files.read_bounded(record, MAX_METADATA_BYTES), str(record)))
    return None


def unfinished_features(path: Path) -> list[str]:
    """Features of which an unfinished build is in the cache's directory."""
    building = state_directory(path) / "building"
    if not building.is_dir():
        return []
    names = [entry.name.replace("+", "/") for entry in building.iterdir()]
    for name in names:
        check_feature_name(name)
    return names


def _refuse_foreign_directory(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise CacheError(f"{path} is a file", remedy="choose another --out")
    if path.is_dir() and not (path / STATE).is_dir() and find_root(path) is None and any(path.iterdir()):
        raise CacheError(f"{path} is not empty and is not a cache", remedy="choose another --out")
