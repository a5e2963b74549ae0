"""Is every byte of a cache what its builder wrote, and do the samples make sense together?"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from featcache.errors import CacheError
from featcache.reader import Cache, open_cache
from featcache.store import files, wds
from featcache.store.blocks import MAX_BLOCKS_BYTES, ShardBlocks, blocks_bytes
from featcache.store.layout import (
    BLOCKS,
    CHECKSUMS,
    ROOT_METADATA,
    ROOT_NAMES,
    canonical_json,
    index_bytes,
    sample_bytes,
    shard_samples,
)
from featcache.store.manifest import MAX_METADATA_BYTES, Manifest
from featcache.store.root import find_root, node_metadata, parse_root, read_root, root_bytes
from featcache.store.writer import (
    cache_lock,
    checksum_files,
    checksums_path,
    checksums_text,
    clear_parts,
    read_record,
    shard_names,
    vouched_for,
)

_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong. `feature` and `shard` are set where encoding that shard again would mend it."""

    path: str
    what: str
    feature: str | None = None
    shard: int | None = None

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `verify` found, and how much it read."""

    path: str
    problems: tuple[Problem, ...]
    n_files: int
    n_bytes: int

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def damaged(self) -> dict[str, list[int]]:
        """Feature -> numbers of its damaged shards: what `CacheWriter.open_for_repair` takes."""
        shards: dict[str, set[int]] = {}
        for problem in self.problems:
            if problem.feature is not None and problem.shard is not None:
                shards.setdefault(problem.feature, set()).add(problem.shard)
        return {name: sorted(numbers) for name, numbers in sorted(shards.items())}


@dataclass(frozen=True)
class ShardFileEntry:
    """One shard file of a cache as the manifest knows it. `features` are those that it holds (wds: all)."""

    name: str
    features: tuple[str, ...]
    array: str
    shard: int
    n_bytes: int | None  # None where compressed


def shard_files(manifest: Manifest, features: Iterable[str] | None = None) -> Iterator[ShardFileEntry]:
    """Every shard file of the cache (or of some features), by name relative to the cache."""
    wanted = set(manifest.features) if features is None else set(features)
    count, size = manifest.dataset.count, manifest.shard_size
    if manifest.format == "wds":
        layout = wds.tar_layout(manifest)
        array = next(iter(sorted(manifest.arrays)))
        for shard, name in enumerate(shard_names(manifest, array)):
            tar_bytes = layout.tar_bytes(shard_samples(count, size, shard))
            yield ShardFileEntry(name, tuple(sorted(manifest.features)), array, shard, tar_bytes)
        return
    for feature in sorted(wanted):
        for array, (dtype, shape) in manifest.features[feature].arrays.items():
            length = sample_bytes(dtype, shape)
            for shard, name in enumerate(shard_names(manifest, array)):
                whole = shard_samples(count, size, shard) * length + index_bytes(size)
                n_bytes = whole if manifest.compressor is None else None
                yield ShardFileEntry(f"{array}/{name}", (feature,), array, shard, n_bytes)


def metadata_files(manifest: Manifest) -> dict[str, bytes]:
    """Name -> exact content of every file that follows from the manifest alone, the root document last."""
    nodes = node_metadata(manifest) if manifest.format == "zarr" else {}
    found = {f"{node}/{ROOT_METADATA}": canonical_json(content) for node, content in nodes.items()}
    found[ROOT_NAMES[manifest.format]] = root_bytes(manifest)
    return found


def verify(
    path: str | Path,
    *,
    features: Sequence[str] | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Check a local cache: every file's bytes against recorded checksums, then labels, keys and skipped
    slots.

    features: check only these. threads: default one a core. progress: called with the bytes of each checked
    file.

    Raises `CacheError` only if there is no cache at `path`; whatever is wrong inside one is in the report.
    """
    path = Path(path)
    root = find_root(path)
    if root is None:
        read_root(path)  # raises, saying what is there instead
        raise AssertionError
    problems: list[Problem] = []
    try:
        data = files.read_bounded(root, MAX_METADATA_BYTES)
        manifest = parse_root(data, str(root))
        if ROOT_NAMES[manifest.format] != root.name:
            raise CacheError(f"it describes a cache of format {manifest.format!r}")
    except CacheError as error:
        problem = Problem(path=str(root), what=error.what)
        return Report(path=str(path), problems=(problem,), n_files=1, n_bytes=0)
    n_files = n_bytes = 0
    for name, content in metadata_files(manifest).items():
        n_files += 1
        n_bytes += len(content)
        if not _equals(path, name, content):
            problems.append(Problem(path=str(path / name), what="missing, or not as the manifest says"))
    chosen = manifest if features is None or manifest.format == "wds" else manifest.only(features)
    records = {array: read_record(path, manifest, array) for array in sorted(chosen.arrays)}
    for name, digest in checksum_files(manifest, chosen.arrays).items():
        try:
            data = files.read_bounded(files.inside(path, name), MAX_BLOCKS_BYTES)
        except CacheError as error:
            problems.append(Problem(path=str(path / name), what=error.what))
            continue
        n_bytes += len(data)
        if hashlib.sha256(data).hexdigest() != digest:
            problems.append(Problem(path=str(path / name), what="damaged: not the file that the manifest names"))
    # Hashes of the shards of arrays of which nothing is left that tells sound ones from damaged ones.
    untold: dict[str, dict[int, str]] = {a: {} for a, r in records.items() if r.checksums is None and r.blocks is None}

    def check(entry: ShardFileEntry) -> tuple[ShardFileEntry, str | None, int]:
        """What is wrong with a shard's file, and its length."""
        record = records[entry.array]
        found, length = _hashes(path, entry.name, with_blocks=record.checksums is None)
        wrong = shard_problem(entry, found.sha256 if found else None, length, record.checksums)
        if wrong is None and found is not None and record.checksums is None:
            if record.agrees(entry.shard, found) is False:
                wrong = "its bytes do not match the recorded hashes of its blocks"
            elif entry.array in untold:
                untold[entry.array][entry.shard] = found.sha256
        return entry, wrong, length

    sound: dict[str, list[ShardFileEntry]] = {array: [] for array in untold}
    for entry, wrong, length in _in_threads(check, shard_files(manifest, features), threads):
        n_files += 1
        n_bytes += length
        if wrong is not None:
            problems += _shard_problems(path, entry, wrong)
        elif entry.array in untold:
            sound[entry.array].append(entry)
        if progress is not None:
            progress(length)
    for array, digests in untold.items():
        # All of them together may still be what the manifest stands for.
        lines = [digests.get(shard, "") for shard in range(manifest.n_shards)]
        text = checksums_text(lines, shard_names(manifest, array))
        if hashlib.sha256(text).hexdigest() != manifest.checksums[array]:
            for entry in sound[array]:
                problems += _shard_problems(path, entry, "cannot be told sound from damaged: its checksum is lost")
    problems += _unexpected(path, manifest)
    if not problems:
        problems += inconsistencies(open_cache(path), str(path))
    problems.sort(key=lambda p: (p.path, p.what, p.feature or ""))
    return Report(path=str(path), problems=tuple(problems), n_files=n_files, n_bytes=n_bytes)


def _equals(path: Path, name: str, content: bytes) -> bool:
    try:
        return files.read_bounded(files.inside(path, name), len(content)) == content
    except CacheError:
        return False


def _shard_problems(path: Path, entry: ShardFileEntry, what: str) -> list[Problem]:
    where = str(path / entry.name)
    return [Problem(path=where, what=what, feature=name, shard=entry.shard) for name in entry.features]


def _in_threads(
    work: Callable[[ShardFileEntry], _Result], entries: Iterable[ShardFileEntry], threads: int | None
) -> Iterator[_Result]:
    """Results of `work`, as they come; a few entries are taken ahead, for there may be millions."""
    waiting: set[Future[_Result]] = set()
    with ThreadPoolExecutor(threads) as pool:
        for entry in entries:
            waiting.add(pool.submit(work, entry))
            if len(waiting) >= 64:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in waiting)


def _hashes(path: Path, name: str, *, with_blocks: bool) -> tuple[files.Hashes | None, int]:
    """Hashes of a file in the cache (of its blocks only if asked for), None if it cannot be read; its length."""
    try:
        file = files.inside(path, name)
        if with_blocks:
            found = files.hashes_of(file)
            return found, found.blocks.n_bytes
        return files.Hashes(files.sha256_of(file), ShardBlocks(0, b"")), file.stat().st_size
    except (CacheError, OSError):
        return None, 0


def shard_problem(entry: ShardFileEntry, digest: str | None, length: int, recorded: list[str] | None) -> str | None:
    """What is wrong with a shard file, None if nothing is.

    digest: SHA-256 (hex) of its bytes, None if it could not be read. length: its bytes. recorded: digests of the
    array's shards by number; None, if they are lost, leaves the length to go by.
    """
    if digest is None:
        return "missing or unreadable"
    if entry.n_bytes is not None and length != entry.n_bytes:
        return f"has {length} bytes instead of {entry.n_bytes}"
    if recorded is not None and digest != recorded[entry.shard]:
        return "its bytes do not match the recorded SHA-256"
    return None


def _unexpected(path: Path, manifest: Manifest) -> list[Problem]:
    """Files among the shards that no builder of this cache put there."""
    if manifest.format == "wds":
        known = {path / entry.name for entry in shard_files(manifest)}
        found: Iterable[Path] = path.glob("*.tar*")
    else:
        known, candidates = set(), []
        for array in manifest.arrays:
            names = {
                *shard_names(manifest, array),
                ROOT_METADATA,
                CHECKSUMS,
                *([BLOCKS] if array in manifest.blocks else []),
            }
            known |= {path / array / name for name in names}
            if (path / array).is_dir():
                candidates += [p for p in (path / array).iterdir() if not p.is_dir()]
        found = candidates
    return [Problem(path=str(p), what="does not belong here") for p in sorted(set(found) - known)]


def inconsistencies(cache: Cache, where: str) -> list[Problem]:
    """Labels against classes and skipped slots, keys unique and readable. In pieces; 8 bytes a key are
    kept.
    """
    manifest = cache.manifest
    count, piece = manifest.dataset.count, 1 << 14
    skipped = np.zeros(0, np.int64) if not manifest.skipped else np.array([s.slot for s in manifest.skipped])
    problems = []
    if "label" in manifest.features:
        n_classes = len(manifest.dataset.class_names)
        with cache.reader(["label"], slots=True) as reader:
            for start in range(0, count, piece):
                out = reader.allocate(min(piece, count - start))
                reader.read(np.arange(start, start + len(out["label"])), out)
                labels = out["label"].reshape(len(out["label"]), -1)[:, 0].astype(np.int64)
                hole = np.isin(np.arange(start, start + len(labels)), skipped)
                bad = np.flatnonzero((labels < -1) | (labels >= n_classes) | ((labels == -1) != hole))
                if len(bad):
                    what = f"label {labels[bad[0]]} in slot {start + bad[0]} ({n_classes} classes"
                    what += ", skipped)" if hole[bad[0]] else ")"
                    problems.append(Problem(path=f"{where}/label", what=what))
    if "key" in manifest.features:
        hashes = []
        for start in range(0, len(cache), piece):
            for key in cache.keys(start, start + piece):
                hashes.append(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))
                if not key or "\ufffd" in key:
                    problems.append(Problem(path=f"{where}/key", what=f"key {key!r} is empty or not UTF-8"))
        if len(np.unique(np.array(hashes, np.uint64))) != len(hashes):
            problems.append(Problem(path=f"{where}/key", what="two samples have the same key"))
    return problems


def repair_metadata(path: str | Path) -> list[str]:
    """Rewrite those metadata and checksum files that can be had again from the manifest and intact shards.

    Returns the names of the files rewritten. What then remains in `verify(path).damaged` must be encoded
    again.
    """
    path = Path(path)
    rewritten = []
    with cache_lock(path):
        manifest = read_root(path)
        clear_parts(path, manifest, manifest.features)
        for name, content in metadata_files(manifest).items():
            if not _equals(path, name, content):
                target = files.inside(path, name)
                files.make_directory(target.parent)
                files.atomic_write(target, [content])
                rewritten.append(name)
        for name, array in _lost(path, manifest).items():
            # From the shards, if they are those that the manifest stands for.
            try:
                found = vouched_for(path, manifest, array, range(manifest.n_shards))
                hashes = [found[shard] for shard in range(manifest.n_shards)]
            except CacheError:
                there = [_hashes(path, shard, with_blocks=True)[0] for shard in _names_of(manifest, array)]
                hashes = [each for each in there if each is not None]
                if len(hashes) < len(there):
                    continue
            data = _checksum_file(manifest, array, name, hashes)
            if hashlib.sha256(data).hexdigest() == checksum_files(manifest, [array])[name]:
                files.atomic_write(files.inside(path, name), [data])
                rewritten.append(name)
    return rewritten


def _lost(path: Path, manifest: Manifest) -> dict[str, str]:
    """Names of checksum files that are missing or damaged, and an array whose shards they are of."""
    lost = {}
    for array in sorted(manifest.arrays):
        for name, digest in checksum_files(manifest, [array]).items():
            with contextlib.suppress(CacheError):
                if files.sha256_of(files.inside(path, name)) == digest:
                    continue
            lost[name] = array
    return lost


def _names_of(manifest: Manifest, array: str) -> list[str]:
    """Names of an array's shards, relative to the cache."""
    where = Path(checksums_path(manifest, array))
    return [str(where.with_name(name)) for name in shard_names(manifest, array)]


def _checksum_file(manifest: Manifest, array: str, name: str, hashes: Sequence[files.Hashes]) -> bytes:
    if name == checksums_path(manifest, array):
        return checksums_text([found.sha256 for found in hashes], shard_names(manifest, array))
    return blocks_bytes([found.blocks for found in hashes])
