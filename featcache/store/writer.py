"""Writing a zarr cache: shards straight to their final place, visible only when a feature is complete.

During a build the directory holds, besides finished features,

    <array>/c.<shard>.0...            finished shards, each put into place whole
    .featcache/lock                   held for moments: creating, beginning, finishing, removing
    .featcache/dataset.json           dataset and shard size until the first feature is finished
    .featcache/building/<feature>/    lock (held by the builder), spec.json, `run` (which names the next), and
      run-<16 hex digits>/            temporary files of the builder and of those who joined it
      <number>.json                   for each finished shard its checksums and its skipped slots

A process that is thought dead may live on and write the same shards as its replacement. Within one run the first file
that is put in a shard's place stays: whoever comes second takes the hashes of what lies there. Whoever begins anew
makes a new run and removes the old one's directory before clearing away shards that are not journaled; so nothing that
was written in an earlier run can take a name any more.

`finish` turns the journal into checksum files and metadata, renames the root document into place and removes
the journal. Nothing final depends on time, order or interruptions, so a resumed build ends in the same bytes.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shlex
import stat
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from featcache.errors import CacheError
from featcache.store import files, locks
from featcache.store.blocks import ShardBlocks, blocks_bytes, blocks_from_json, blocks_path
from featcache.store.contents import checksums_path, checksums_text, require_recorded, shard_names, vouched_for
from featcache.store.differences import dataset_differences, feature_differences
from featcache.store.layout import (
    BLOCKS,
    CHECKSUMS,
    ROOT_METADATA,
    ROOT_NAMES,
    STATE,
    Buffer,
    Json,
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
from featcache.store.root import NotACache, find_root, node_metadata, read_root, root_bytes
from featcache.store.shards import encode_shard

# When a group of shards is made durable: whichever comes first.
GROUP_S = 1.0
GROUP_BYTES = 1 << 30
GROUP_FILES = 128

_ENTRY = re.compile(r"(\d{8})\.json\Z")
_RUN = re.compile(r"run-[0-9a-f]{16}\Z")
_SHARD = re.compile(r"c(?:\.\d+)+\Z")
_METADATA = re.compile(rf"(?:{CHECKSUMS}|{BLOCKS}|{'|'.join(re.escape(name) for name in ROOT_NAMES.values())})\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
# How long what another machine has written may stay unseen: NFS trusts what it knows of a directory for a minute.
STALE_S = 90.0
STALE_POLL_S = 0.5


def state_directory(path: Path) -> Path:
    return path / STATE


@contextlib.contextmanager
def cache_lock(path: Path) -> Iterator[None]:
    """Hold the lock on a cache's metadata (for moments). What dead processes left goes on the way in; on the way out an
    idle cache loses its state directory. Raises `CacheError` where the cache's folder is not there (any more).
    """
    state = files.inside(path, STATE)
    held, idle = lock_cache(path), False
    try:
        # Whoever wrote these under this lock is dead.
        files.remove_parts(state)
        remove_others(path, (), _METADATA, only_parts=True)
        _clear_published(path)
        yield
        files.remove_empty_directory(state / "building")
        if find_root(path) is not None and not (state / "building").exists():
            files.remove_file(state / "dataset.json")
        idle = all(map(locks.is_lock_file, files.names_in(state)))
    finally:
        held.release(remove=idle)
    if idle:
        # Only now: NFS keeps a file that is open. Whoever has made a new lock there meanwhile keeps the directory.
        files.remove_empty_directory(state)


def lock_cache(path: Path) -> locks.Lock:
    """The lock of `cache_lock` alone, waited for; raises `CacheError` where the cache's folder is not there (any more)."""
    try:
        return locks.lock(files.inside(path, f"{STATE}/lock"))
    except CacheError as error:
        raise error if path.is_dir() else _was_removed(path) from error


def _was_removed(path: Path) -> CacheError:
    return CacheError(
        f"the cache {path} was removed meanwhile",
        remedy=f"featcache restore {shlex.quote(str(path))} brings it back; or run the same command again",
    )


def _clear_published(path: Path) -> None:
    """Remove what builders who died after publishing (or while repairing) left. The caller holds the cache's lock."""
    with contextlib.suppress(CacheError):
        names = unfinished_features(path)
        published = set(read_root(path).features) if names and find_root(path) is not None else set()
        for name in published.intersection(names):
            held = locks.try_lock(building_directory(path, name) / "lock")
            if held is not None:
                remove_building(path, name, held)


def remove_building(path: Path, name: str, held: locks.Lock) -> None:
    """Remove the directory of a build that is over. The caller holds the cache's lock, so nobody else takes it up."""
    # Released first: NFS would keep the open file and so the directory.
    held.release()
    # What cannot be removed now, whoever next takes the cache's lock will remove.
    with contextlib.suppress(CacheError):
        files.remove_tree(building_directory(path, name))


def building_directory(path: Path, feature: str) -> Path:
    return files.inside(path, f"{STATE}/building/{feature.replace('/', '+')}")


def journal_name(shard: int) -> str:
    return f"{shard:08d}.json"


class CacheWriter:
    """Writes features into one cache: `begin`, `write_shard`..., `finish`. `featcache.store.writers` opens it.

    One writer belongs to one thread. Several writers, in any processes, may work on different features of
    one cache. It is a context manager that lets go of its features on exit; `finish` does that as well.
    """

    def __init__(self, path: Path, base: Manifest) -> None:
        self.path = path
        self._base = base
        self._specs: dict[str, FeatureSpec] = {}
        self._locks: dict[str, locks.Lock] = {}
        self._runs: dict[str, Path] = {}
        self._without_blocks: set[str] = set()
        self._done: dict[str, set[int]] = {}
        self._skipped: dict[int, list[Skipped]] = {}
        self._written: set[int] = set()
        self._repairs: dict[str, set[int]] | None = None
        self._exact: frozenset[str] = frozenset()
        self._group = files.Group()
        self._unrecorded: list[tuple[str, int, dict[str, files.Hashes]]] = []
        self._last_commit_s = time.monotonic()

    def repair_only(self, shards: Mapping[str, Iterable[int]], *, exact: Collection[str] = ()) -> None:
        """Take complete features, of which just these shards (feature -> shard numbers) may be rewritten.

        exact: features that come out the same everywhere. `finish` raises `CacheError` and publishes nothing if one of
        their shards is not, as far as anything is left to tell by, what was recorded (not so in tars, which hold others).

        Raises `CacheError` for a feature or shard that there is not, or one that somebody else writes.
        """
        repairs = {name: set(numbers) for name, numbers in shards.items()}
        for name, numbers in repairs.items():
            if name not in self._base.features:
                raise CacheError(f"there is no complete feature {name!r} to repair in {self.path}")
            if not all(0 <= n < self.n_shards for n in numbers):
                raise CacheError(f"{name!r} has the shards 0 to {self.n_shards - 1}, not {sorted(numbers)}")
        if self._base.format == "wds" and (
            set(repairs) != set(self._base.features) or len(set(map(frozenset, repairs.values()))) > 1
        ):
            raise CacheError("a tar holds all features: repair the same shards of all of them")
        self._repairs, self._exact = repairs, frozenset(exact)
        self._without_blocks = {
            name for name in repairs if self._base.blocks.keys().isdisjoint(self._base.features[name].arrays)
        }
        with cache_lock(self.path):
            for name in repairs:
                self._specs[name] = self._base.features[name]
                self._take(name)
                self._make_directories(name)
                self._done[name] = set(range(self.n_shards)) - repairs[name]
            clear_parts(self.path, self._base, repairs)

    def join(self, specs: Sequence[FeatureSpec]) -> None:
        """Write shards of features that another process has begun, and finishes.

        Raises `CacheError` if a feature is not being built, or is being built otherwise than `specs` says.
        """
        for spec in specs:
            complete = self._base.features.get(spec.name)
            record = building_directory(self.path, spec.name) / "spec.json"
            if complete is None:
                if not record.is_file():
                    raise CacheError(f"no build of {spec.name!r} of {self.path} is under way")
                self._runs[spec.name] = _run_directory(self.path, spec.name)
            _require_same_feature(complete or declared(record.parent), spec, self.path, begun=complete is None)
            self._specs[spec.name] = spec
            whole = set(range(self.n_shards))
            self._done[spec.name] = whole if complete is not None else self._journaled_shards(spec)

    def refresh(self) -> None:
        """Take note of the shards that writers who joined have finished. They must have, and must have closed.

        A network file system may take a while to show what another machine has written: what is missing is looked
        for again until `STALE_S` have passed.
        """
        self.commit()
        deadline = time.monotonic() + STALE_S
        while True:
            for name, spec in self._specs.items():
                if name in self._locks:
                    self._done[name] = self._journaled_shards(spec)
            if not self.pending() or time.monotonic() > deadline:
                return
            time.sleep(STALE_POLL_S)

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
        for held in self._locks.values():
            held.release()
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

    # Building

    def begin(self, specs: Sequence[FeatureSpec], *, without_blocks: Collection[str] = ()) -> None:
        """Declare the features that this writer will write. Shards of an interrupted build count as written.

        A feature that is complete already and declared alike has nothing pending. without_blocks: features that are
        to have no hashes of blocks, to be copies of ones that have none.

        Raises `CacheError` if another process builds one of them, or if one exists with another shape,
        codec or provenance.
        """
        with cache_lock(self.path):
            self._base = self._current()
            others = {name for name in unfinished_features(self.path) if name not in {s.name for s in specs}}
            check_no_nesting([*self._base.features, *others, *(s.name for s in specs)])
            self._without_blocks |= set(without_blocks)
            for spec in specs:
                complete = self._base.features.get(spec.name)
                if complete is not None:
                    _require_same_feature(complete, spec, self.path)
                    self._specs[spec.name] = spec
                    self._done[spec.name] = set(range(self.n_shards))
                    continue
                self._take(spec.name)
                self._resume(spec)
                self._specs[spec.name] = spec
                self._done[spec.name] = self._journaled_shards(spec)
            self._clear_unjournaled()
            clear_parts(self.path, self._planned(), self._locks)

    def _planned(self) -> Manifest:
        """The manifest with the begun features."""
        return replace(self._base, features={**self._base.features, **self._specs})

    def _current(self) -> Manifest:
        """The manifest as it is now; raises `CacheError` if the cache was removed since this writer opened it."""
        current = known_manifest(self.path)
        if current is None:
            raise _was_removed(self.path)
        return current

    def _take(self, name: str) -> None:
        """Lock a feature and begin a new run of its build; what an earlier run has under way is void from now on."""
        directory = building_directory(self.path, name)
        files.make_directory(directory)
        held = locks.try_lock(directory / "lock")
        if held is None:
            known = locks.holder(directory / "lock")
            raise CacheError(
                f"another process is writing {name!r} of {self.path} at this moment",
                remedy=known or "wait for it to finish, or build other features meanwhile",
            )
        self._locks[name] = held
        for entry in files.names_in(directory):
            earlier = directory / entry
            if earlier.is_dir() and not earlier.is_symlink():
                # By one step, so that nobody makes a file in it while it is being removed.
                gone = directory / f"gone-{secrets.token_hex(8)}"
                with files.explained(earlier, "removed"):
                    earlier.rename(gone)
                with contextlib.suppress(CacheError):
                    files.remove_tree(gone)
            elif files.part_of(entry) is not None:
                files.remove_file(earlier)
        run = f"run-{secrets.token_hex(8)}"
        files.make_directory(directory / run)
        files.atomic_write(directory / "run", [run.encode()], durable=False)
        self._runs[name] = directory / run

    def _resume(self, spec: FeatureSpec) -> None:
        """Record what is built, or make sure that an earlier build was of the same."""
        directory = building_directory(self.path, spec.name)
        if (directory / "spec.json").is_file():
            _require_same_feature(declared(directory), spec, self.path, begun=True)
            return
        # A journal that does not say of what it is, such as a dead repair's, vouches for nothing.
        for name in files.names_in(directory):
            if _ENTRY.match(name):
                files.remove_file(directory / name)
        files.atomic_write(directory / "spec.json", [canonical_json(spec.to_json())])

    def _journaled_shards(self, spec: FeatureSpec) -> set[int]:
        """Shards of a feature under way that are journaled and whole."""
        directory = building_directory(self.path, spec.name)
        done = set()
        for name in files.names_in(directory):
            match = _ENTRY.match(name)
            if match and self._shard_is_whole(spec, int(match[1])):
                with contextlib.suppress(CacheError):
                    journal_entry(directory / name, spec, self.dataset.count)
                    done.add(int(match[1]))
        return done

    def _make_directories(self, feature: str) -> None:
        for array in self._specs[feature].arrays:
            files.make_directory(files.inside(self.path, array))

    def _clear_unjournaled(self) -> None:
        """Remove shards, whole or not, that are in place but not journaled: nobody knows what their bytes are."""
        for name in self._locks:
            self._make_directories(name)
            for array, (_, shape) in self._specs[name].arrays.items():
                kept = {shard_name(shard, len(shape)) for shard in self._done[name]}
                remove_others(files.inside(self.path, array), kept, _SHARD)

    def _shard_is_whole(self, spec: FeatureSpec, shard: int) -> bool:
        if shard >= self.n_shards:
            return False
        n = shard_samples(self.dataset.count, self.shard_size, shard)
        for array, (dtype, shape) in spec.arrays.items():
            path = self.path / array / shard_name(shard, len(shape))
            expected = n * sample_bytes(dtype, shape) + index_bytes(self.shard_size)
            if not has_bytes(path, expected if self._base.compressor is None else None):
                return False
        return True

    def skip(self, shard: int, slots: Iterable[tuple[int, str, str]]) -> None:
        """Say that these `(slot, key, reason)` of `shard` hold no image. Call it before `write_shard` of that shard.

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
        hashes = {}
        for array, (_, shape) in self._specs[feature].arrays.items():
            buffers = encode_shard(arrays[array], self.shard_size, self._base.compressor)
            target = self.path / array / shard_name(shard, len(shape))
            hashes[array] = self._write_file(feature, target, buffers)
        self._written_to_group([(feature, shard, hashes)])

    def _write_file(self, feature: str, target: Path, buffers: Sequence[Buffer]) -> files.Hashes:
        """A shard's file, into the group. In a repair it takes the damaged one's place."""
        return self._group.write(target, buffers, folder=self._runs[feature], replace=self._repairs is not None)

    def _written_to_group(self, shards: list[tuple[str, int, dict[str, files.Hashes]]]) -> None:
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
            there = {path: files.hashes_of(path) for path in self._group.commit()}
            while shards:
                feature, shard, hashes = shards[0]
                for array in hashes if there else ():
                    target = self.path / self._shard_file(array, shard)
                    hashes[array] = there.get(target, hashes[array])
                if there and not self._shard_is_whole(self._specs[feature], shard):
                    raise CacheError(f"shard {shard} of {feature!r} was put into {self.path} by another program")
                self._record(feature, shard, hashes)
                del shards[0]
        finally:
            self._last_commit_s = time.monotonic()
            for feature, shard, _ in shards:
                self._done[feature].discard(shard)

    def _shard_file(self, array: str, shard: int) -> str:
        """Name of a shard's file, relative to the cache."""
        spec = next(spec for spec in self._specs.values() if array in spec.arrays)
        return f"{array}/{shard_name(shard, len(spec.arrays[array][1]))}"

    def _record(self, feature: str, shard: int, hashes: Mapping[str, files.Hashes]) -> None:
        """Journal one finished shard of one feature."""
        with_blocks = () if feature in self._without_blocks else self._arrays_with_blocks(feature)
        entry = {
            "checksums": {array: found.sha256 for array, found in hashes.items()},
            "blocks": {array: hashes[array].blocks.to_json() for array in with_blocks},
            "skipped": [vars(entry) for entry in self._skipped.get(shard, [])],
        }
        # After its shards are durable, and not itself: a lost or damaged entry only means writing a shard again.
        target = building_directory(self.path, feature) / journal_name(shard)
        files.atomic_write(target, [canonical_json(entry)], folder=self._runs[feature], durable=False)
        self._done[feature].add(shard)

    def _arrays_with_blocks(self, feature: str) -> Iterable[str]:
        """Those of a feature's arrays whose hashes of blocks its journal keeps."""
        return self._specs[feature].arrays

    def finished(self, feature: str) -> frozenset[int]:
        """Shards of a begun feature that are written."""
        return frozenset(self._done[feature])

    def adopt_shard(self, feature: str, shard: int, hashes: Mapping[str, files.Hashes]) -> None:
        """Record a shard whose files are in place already (array -> hashes of its file), fetched and checked."""
        self._written.add(shard)
        self._record(feature, shard, hashes)

    def finish(self) -> Manifest:
        """Make the begun features visible, all at once, and remove the journal. Returns the new manifest.

        Of those that were complete when they were declared, it holds the ones that were not removed meanwhile.

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
            features = {**current.features, **{name: self._specs[name] for name in self._locks}}
            skipped = {entry.slot: entry for entry in current.skipped}
            sums = Sums(dict(current.checksums), dict(current.blocks))
            for name in self._locks:
                skipped |= {entry.slot: entry for entry in self._seal(name, sums)}
            manifest = replace(
                current,
                features={name: features[name] for name in sorted(features)},
                skipped=tuple(skipped[slot] for slot in sorted(skipped)),
                checksums=dict(sorted(sums.checksums.items())),
                blocks=dict(sorted(sums.blocks.items())),
            )
            publish(self.path, manifest, set(self._locks), self._group)
            while self._locks:
                name, held = self._locks.popitem()
                remove_building(self.path, name, held)
        self._base = manifest
        return manifest

    def _seal(self, name: str, sums: Sums) -> list[Skipped]:
        """Write the checksum files of one feature's arrays; returns its skipped slots."""
        spec = self._specs[name]
        entries = self._journal_of(spec)
        for array in spec.arrays:
            hashes = {shard: self._hashes(entry, array, shard) for shard, entry in entries.items()}
            if name in self._exact:
                require_recorded(self.path, self._base, array, hashes)
            self._seal_array(array, hashes, sums)
        return [skipped for entry in entries.values() for skipped in entry.skipped]

    def _journal_of(self, spec: FeatureSpec) -> dict[int, JournalEntry]:
        """What was written of a feature by this build, or in this repair: shard -> entry."""
        shards = range(self.n_shards) if self._repairs is None else sorted(self._repairs[spec.name])
        directory = building_directory(self.path, spec.name)
        return {shard: journal_entry(directory / journal_name(shard), spec, self.dataset.count) for shard in shards}

    def _hashes(self, entry: JournalEntry, array: str, shard: int) -> files.Hashes:
        """Hashes of a journaled shard's file. Those of its blocks are taken now, if an earlier version wrote it."""
        if array in entry.blocks:
            return files.Hashes(entry.checksums[array], entry.blocks[array])
        path = files.inside(self.path, self._shard_file(array, shard))
        found = files.hashes_of(path)
        if found.sha256 != entry.checksums[array]:
            raise CacheError(
                f"{path} is damaged: its bytes do not match the SHA-256 that was recorded when it was written",
                remedy=f"remove it and run the same build command again: rm {shlex.quote(str(path))}",
            )
        return found

    def _seal_array(self, array: str, written: dict[int, files.Hashes], sums: Sums) -> None:
        """Write the checksum files of one array, of which these shards were written now."""
        shards = written
        if self._repairs is not None:
            shards = written | vouched_for(self.path, self._base, array, set(range(self.n_shards)) - set(written))
        ordered = [shards[shard] for shard in range(self.n_shards)]
        manifest = self._planned()
        text = checksums_text([found.sha256 for found in ordered], shard_names(manifest, array))
        sums.checksums[array] = self._group.write(self.path / checksums_path(manifest, array), [text]).sha256
        if not any(array in self._specs[name].arrays for name in self._without_blocks):
            data = blocks_bytes([found.blocks for found in ordered])
            sums.blocks[array] = self._group.write(self.path / blocks_path(manifest, array), [data]).sha256


def publish(path: Path, manifest: Manifest, features: set[str], group: files.Group | None = None) -> None:
    """Write the nodes' metadata of `features` with whatever is in `group`, and then, last, the root document.

    The caller holds the cache's lock.
    """
    manifest_from_json(manifest.to_json())  # a root document that does not open would take the whole cache with it
    group = files.Group() if group is None else group
    content: dict[Path, dict[str, Json]] = {}
    nodes = node_metadata(manifest) if manifest.format == "zarr" else {}
    for name in sorted(features) if nodes else ():
        parents = [name.split("/")[0]] if "/" in name else []
        content |= {path / node / ROOT_METADATA: nodes[node] for node in (*parents, *manifest.features[name].arrays)}
    for target, node in content.items():
        document = canonical_json(node)
        if not _holds(files.inside(path, str(target.relative_to(path))), document):
            group.write(target, [document])
    group.commit()
    files.atomic_write(path / ROOT_NAMES[manifest.format], [root_bytes(manifest)])


def require_same_dataset(existing: Manifest, wanted: Manifest, path: Path) -> None:
    """Raises `CacheError` naming every difference if `wanted` is not what the cache at `path` was made of."""
    found = dataset_differences(existing, wanted)
    if found:
        raise CacheError(
            f"{path} holds a cache already, of other images or settings:\n  " + "\n  ".join(found),
            remedy="use the same images and options as that cache, or choose another folder",
        )


def _require_same_feature(have: FeatureSpec, want: FeatureSpec, path: Path, *, begun: bool = False) -> None:
    """Raise `CacheError` naming a difference. begun: `have` is of an unfinished build."""
    found = feature_differences(have, want)
    if found:
        cache = shlex.quote(str(path))
        remedy = f"featcache rm {cache} --features {have.name} removes it"
        if begun:
            remedy = f"featcache gc {cache} clears unfinished builds away"
        raise CacheError(
            f"{path} holds {have.name!r} already ({'begun' if begun else 'complete'}), made otherwise: {'; '.join(found)}",
            remedy=f"{remedy}; or choose another folder",
        )


@dataclass
class Sums:
    """Array -> SHA-256 of its checksum files, as they are written."""

    checksums: dict[str, str]
    blocks: dict[str, str]


@dataclass(frozen=True)
class JournalEntry:
    """A finished shard of a feature: hashes of its files by array, and its skipped slots."""

    checksums: dict[str, str]
    blocks: dict[str, ShardBlocks]
    skipped: tuple[Skipped, ...]


def journal_entry(path: Path, spec: FeatureSpec, count: int) -> JournalEntry:
    """Read one; raises `CacheError` if it is damaged."""
    value = _read_json(path)
    damaged = CacheError(
        f"{path} is damaged",
        remedy="remove that file and run the same build command again: it writes that shard anew",
    )
    # Version 1 knew no blocks.
    if not isinstance(value, dict) or {*value, "blocks"} != {"checksums", "skipped", "blocks"}:
        raise damaged
    checksums, blocks = value["checksums"], value.get("blocks", {})
    if not isinstance(checksums, dict) or set(checksums) != set(spec.arrays):
        raise damaged
    if not all(isinstance(digest, str) and _SHA256.match(digest) for digest in checksums.values()):
        raise damaged
    if not isinstance(blocks, dict) or not set(blocks) <= set(spec.arrays):
        raise damaged
    parsed = {array: blocks_from_json(entry, str(path)) for array, entry in blocks.items()}
    return JournalEntry(checksums, parsed, skipped_from_json(value["skipped"], count))


def known_manifest(path: Path) -> Manifest | None:
    """The manifest of a cache, or of the unfinished build that is there; None if neither says anything."""
    if find_root(path) is not None:
        return read_root(path)
    record = files.inside(path, f"{STATE}/dataset.json")
    return manifest_from_json(_read_json(record)) if record.is_file() else None


def _read_json(path: Path) -> Json:
    return load_json(files.read_bounded(path, MAX_METADATA_BYTES), str(path))


def declared(building: Path) -> FeatureSpec:
    """What the unfinished build in a directory is of; raises `CacheError` if that is missing or damaged."""
    record = building / "spec.json"
    try:
        return feature_from_json(_read_json(record))
    except CacheError as error:
        cache = shlex.quote(str(building.parents[2]))
        raise CacheError(
            f"{record} is damaged: {error.what}", remedy=f"featcache gc {cache} clears that unfinished build away"
        ) from error


def _run_directory(path: Path, feature: str) -> Path:
    """Where the run of a build that is under way has its temporary files."""
    directory = building_directory(path, feature)
    name = files.read_bounded(directory / "run", 64).decode("ascii", "replace")
    if not _RUN.match(name):
        raise CacheError(f"{directory / 'run'} is damaged", remedy="start the build again")
    return files.inside(directory, name)


def has_bytes(path: Path, n_bytes: int | None) -> bool:
    """Whether there is a regular file at `path`, of that length if given."""
    try:
        status = path.stat(follow_symlinks=False)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and n_bytes in (None, status.st_size)


def _holds(path: Path, content: bytes) -> bool:
    try:
        return files.read_bounded(path, len(content)) == content
    except CacheError:
        return False


def remove_others(
    directory: Path, kept: Collection[str], pattern: re.Pattern[str], *, only_parts: bool = False
) -> None:
    """Remove files whose names (or final names, of temporary ones) match, but for those kept. only_parts:
    only temporary ones.
    """
    for name in files.names_in(directory):
        final = files.part_of(name)
        if name not in kept and (final or not only_parts) and pattern.match(final or name):
            files.remove_file(directory / name)


def clear_parts(path: Path, manifest: Manifest, features: Iterable[str]) -> None:
    """Remove temporary files in the directories of features that are complete, or whose lock the caller holds.

    The caller holds the cache's lock, under which alone temporary files of metadata are made.
    """
    if manifest.format == "zarr":
        for array in {a for name in features for a in manifest.features[name].arrays}:
            for folder in {array, array.split("/")[0]}:
                for pattern in (_METADATA, _SHARD):
                    remove_others(files.inside(path, folder), (), pattern, only_parts=True)


def unfinished_features(path: Path) -> list[str]:
    """Features of which an unfinished build is in the cache's directory."""
    found = []
    for name in files.names_in(files.inside(path, f"{STATE}/building")):
        with contextlib.suppress(CacheError):  # what cannot name a feature is nobody's build
            found.append(check_feature_name(name.replace("+", "/")))
    return found


def refuse_foreign_directory(path: Path) -> None:
    """Raises `CacheError` for a place where a new cache would mix with what is there: other files, or a cache around it,
    whose removal it would share."""
    if find_root(path) is None:
        for parent in path.absolute().parents:
            if find_root(parent) is not None and _is_cache(parent):
                raise CacheError(f"{path} lies inside the cache {parent}", remedy="choose a folder outside of it")
    if path.exists() and not path.is_dir():
        raise CacheError(f"{path} is a file", remedy="choose another folder")
    if path.is_dir() and not (path / STATE).is_dir() and find_root(path) is None and any(path.iterdir()):
        raise CacheError(f"{path} is not empty and is not a cache", remedy="choose another folder")


def _is_cache(path: Path) -> bool:
    try:
        read_root(path)
    except NotACache:  # a group or an array of zarr's, which may hold anything
        return False
    except CacheError:
        return True
    return True
