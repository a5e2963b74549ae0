"""Caches between places: push, pull, list. Parallel, resumable, checked against the recorded SHA-256, atomic.

A pull is a build whose shards come over the wire: the same journal, locks and final rename, and so the same
promises. A push sends shards and checksum files first and the root document last; until then nobody sees
anything of it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featcache.errors import CacheError
from featcache.remote import (
    PIECE_BYTES,
    Destination,
    Location,
    Missing,
    is_remote,
    local_path,
    open_destination,
    open_location,
    parse_hub_url,
)
from featcache.store import files
from featcache.store.blocks import MAX_BLOCKS_BYTES
from featcache.store.layout import BLOCKS, ROOT_NAMES, STATE
from featcache.store.manage import cache_bytes
from featcache.store.manifest import MAX_METADATA_BYTES, Manifest
from featcache.store.root import parse_root, read_root
from featcache.store.verify import (
    Problem,
    Report,
    ShardFileEntry,
    inconsistencies,
    metadata_files,
    shard_files,
    shard_problem,
)
from featcache.store.writer import (
    CacheWriter,
    cache_lock,
    check_checksums,
    checksum_files,
    checksums_path,
    require_same_dataset,
)

_ALWAYS = ("label", "key")
Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One cache at a place."""

    url: str
    manifest: Manifest

    @property
    def n_bytes(self) -> int:
        return cache_bytes(self.manifest)


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What a push or pull did: files and bytes moved now, and those that were there already."""

    manifest: Manifest
    n_files: int
    n_bytes: int
    n_files_before: int


def read_remote_root(place: Location) -> Manifest | None:
    """The manifest of the cache at a place, None if there is none; raises `CacheError` if it is damaged."""
    for format_name, name in ROOT_NAMES.items():
        try:
            size = place.size(name)
            if size > MAX_METADATA_BYTES:
                raise CacheError(f"{place.url}/{name} is longer than a manifest may be")
            manifest = parse_root(place.read(name, 0, size), f"{place.url}/{name}")
        except Missing:
            continue
        if manifest.format != format_name:
            raise CacheError(f"{place.url}/{name} is damaged: it describes a cache of format {manifest.format!r}")
        return manifest
    return None


def list_remote(url: str) -> list[Listed]:
    """Caches at `url`: itself, or its immediate subdirectories (where the place can list them).

    Raises `CacheError` if the place cannot be reached.
    """
    place = open_location(url)
    here = read_remote_root(place)
    if here is not None:
        return [Listed(url=place.url, manifest=here)]
    found = []
    for name in place.directories():
        manifest = read_remote_root(open_location(f"{place.url}/{name}"))
        if manifest is not None:
            found.append(Listed(url=f"{place.url}/{name}", manifest=manifest))
    return found


def _required_root(place: Location) -> Manifest:
    manifest = read_remote_root(place)
    if manifest is None:
        raise CacheError(f"there is no cache at {place.url}", remedy=f"featcache ls {place.url} lists what is there")
    return manifest


def _read_checksums(place: Location, manifest: Manifest, array: str) -> list[str]:
    name = checksums_path(manifest, array)
    try:
        size = place.size(name)
        if size > manifest.n_shards * 160:
            raise CacheError(f"{place.url}/{name} is damaged: it is too long")
        return check_checksums(place.read(name, 0, size), manifest, array, f"{place.url}/{name}")
    except Missing as error:
        raise CacheError(f"{place.url}/{name} is missing") from error


def subset(manifest: Manifest, features: Sequence[str] | None, samples: int | None) -> Manifest:
    """The manifest of a part of a cache: some features (label and key come along), the first samples.

    `samples` is rounded up to whole shards. A part with fewer samples is another data set: its fingerprint
    is derived from the whole one's, which its preprocessing names.

    Raises `CacheError` for features that the cache lacks, and for features of tars, which hold all.
    """
    part = manifest
    if features is not None:
        missing = [name for name in features if name not in manifest.features]
        if missing:
            have = ", ".join(sorted(manifest.features))
            raise CacheError(f"the cache does not hold {', '.join(missing)} (it holds {have})")
        if manifest.format == "wds" and set(features) != set(manifest.features):
            raise CacheError("a webdataset cache holds all features in each tar: pull it whole, then convert it")
        wanted = {*features, *(name for name in _ALWAYS if name in manifest.features)}
        part = part.only(wanted)
    if samples is not None:
        if samples < 1:
            raise CacheError(f"--samples {samples} is less than one")
        count = min(manifest.dataset.count, -(-samples // manifest.shard_size) * manifest.shard_size)
        if count < manifest.dataset.count:
            whole = manifest.dataset
            derived = hashlib.sha256(f"{whole.fingerprint}/first {count}".encode()).hexdigest()
            about = {**whole.preprocessing, "subset_of": whole.fingerprint, "subset_samples": count}
            dataset = replace(whole, count=count, fingerprint=derived, preprocessing=about)
            skipped = tuple(entry for entry in manifest.skipped if entry.slot < count)
            part = replace(part, dataset=dataset, skipped=skipped)
    return part


def pull(
    url: str,
    target: str | Path,
    *,
    features: Sequence[str] | None = None,
    samples: int | None = None,
    threads: int = 8,
    progress: Progress | None = None,
) -> Transfer:
    """Copy a cache, or part of one, from `url` (or a local path) into the directory `target`.

    Every shard is checked against the recorded SHA-256 before it takes its name; an interrupted pull goes on
    where it stopped; readers of `target` see its features only when all of them are there. Pulling more
    features into the same directory later adds them. `progress` is called with bytes as they arrive.

    Raises `CacheError` for a place without a cache, a damaged source, a target that holds something else, or
    a connection that stays broken.
    """
    place = open_location(url)
    whole = _required_root(place)
    part = subset(whole, features, samples)
    recorded = {array: _read_checksums(place, whole, array) for array in part.arrays}
    target = Path(target)
    moved = [0, 0, 0]
    with CacheWriter.create(
        target,
        part.dataset,
        shard_size=part.shard_size,
        compressor=part.compressor,
        format=part.format,
        versions=part.versions,
    ) as writer:
        # A copy of what has no hashes of blocks has none either, and so the same digest.
        without = [name for name, spec in part.features.items() if whole.blocks.keys().isdisjoint(spec.arrays)]
        writer.begin([part.features[name] for name in sorted(part.features)], without_blocks=without)
        by_shard: dict[tuple[str, int], list[ShardFileEntry]] = {}
        for entry in shard_files(part):
            key = (entry.features[0] if part.format == "zarr" else "", entry.shard)
            by_shard.setdefault(key, []).append(entry)
        arrived: dict[tuple[str, int], files.Hashes] = {}
        todo = []
        for (feature, shard), entries in by_shard.items():
            names = [feature] if feature else sorted(part.features)
            if all(shard in writer.finished(name) for name in names):
                moved[2] += len(entries)
            else:
                todo.append((names, shard, entries))

        def fetch(job: tuple[list[str], int, list[ShardFileEntry]]) -> None:
            _, shard, entries = job
            for entry in entries:
                expected = recorded[entry.array][shard]
                size = entry.n_bytes if entry.n_bytes is not None else _size(place, entry.name)
                file = files.inside(target, entry.name)
                arrived[entry.array, shard] = download(place, entry.name, size, file, expected, progress)
                moved[1] += size

        def done(job: tuple[list[str], int, list[ShardFileEntry]]) -> None:
            names, shard, entries = job
            moved[0] += len(entries)
            inside = writer.slots(shard)
            writer.skip(shard, [(s.slot, s.key, s.reason) for s in part.skipped if s.slot in inside])
            hashes = {entry.array: arrived.pop((entry.array, shard)) for entry in entries}
            for name in names:
                arrays = part.features[name].arrays
                writer.adopt_shard(
                    name, shard, {a: hashes[a if part.format == "zarr" else entries[0].array] for a in arrays}
                )

        in_parallel(todo, fetch, done, threads)
        manifest = writer.finish()
    return Transfer(manifest=manifest, n_files=moved[0], n_bytes=moved[1], n_files_before=moved[2])


def _size(place: Location, name: str) -> int:
    try:
        return place.size(name)
    except Missing as error:
        raise CacheError(f"{place.url}/{name} is missing") from error


def in_parallel(jobs: Iterable[Any], work: Callable[[Any], None], done: Callable[[Any], None], threads: int) -> None:
    """`work(job)` in threads, `done(job)` in this one as each finishes. The first error stops the rest and
    is raised.
    """
    waiting = iter(jobs)
    running: dict[Future[None], Any] = {}
    failure: BaseException | None = None
    with ThreadPoolExecutor(max(1, threads)) as pool:
        while True:
            while failure is None and len(running) < 2 * threads and (job := next(waiting, None)) is not None:
                running[pool.submit(work, job)] = job
            if not running:
                break
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                job = running.pop(future)
                try:
                    future.result()
                except CancelledError:
                    continue
                except Exception as error:
                    failure = failure or error
                    for other in running:
                        other.cancel()
                else:
                    # Also after a failure: what has arrived need not be sent again.
                    done(job)
    if failure is not None:
        raise failure


def download(
    place: Location, name: str, size: int, target: Path, expected: str, progress: Progress | None = None
) -> files.Hashes:
    """Fetch one file in pieces, each retried, and give it its name only if its SHA-256 is `expected`. Returns its
    hashes.

    Raises `CacheError` if it cannot be had or its bytes are wrong, twice.
    """
    attempt = 0
    while True:
        try:
            with files.atomic_stream(target) as stream:
                for start in range(0, size, PIECE_BYTES):
                    data = place.read(name, start, min(start + PIECE_BYTES, size))
                    stream.write(data)
                    if progress is not None:
                        progress(len(data))
                hashes = stream.hashes()
                if hashes.sha256 != expected:
                    raise _WrongBytes
            return hashes
        except Missing as error:
            raise CacheError(f"{place.url}/{name} is missing") from error
        except _WrongBytes as error:
            attempt += 1
            if attempt == 2:
                raise CacheError(
                    f"{place.url}/{name} is damaged: its bytes do not match the recorded SHA-256",
                    remedy="tell whoever shares the cache; featcache verify checks it at its source",
                ) from error


class _WrongBytes(Exception):
    pass


def push(
    cache: str | Path,
    url: str,
    *,
    features: Sequence[str] | None = None,
    threads: int = 8,
    read_back: bool = True,
    progress: Progress | None = None,
) -> Transfer:
    """Copy the local `cache` (or some features) to `url`: s3://, gs://, hf:// or a local path.

    Each shard is checked against the recorded SHA-256 before it leaves and, with `read_back`, after it has
    arrived. The root document goes last, so a reader sees the old cache or the new one. Features that are at
    `url` already stay; a push that was interrupted goes on where it stopped. `progress` is called with bytes
    as they are sent.

    Raises `CacheError` for a damaged cache, or a place that holds a cache of other images or other bytes
    under the same feature name.
    """
    source = Path(cache)
    manifest = subset(read_root(source), features, None)
    if not is_remote(url):
        return pull(str(source), local_path(url), features=features, threads=threads, progress=progress)
    if url.startswith("hf://"):
        return _push_to_hub(source, manifest, url, progress)
    place = open_destination(url)
    recorded = {array: _read_checksums(open_location(source), manifest, array) for array in manifest.arrays}
    while True:
        version = place.version(ROOT_NAMES[manifest.format])
        existing = read_remote_root(place)
        merged = _merge(existing, manifest, place.url)
        present = set(existing.arrays) if existing is not None else set()
        result = _send_shards(source, manifest, place, recorded, present, threads, read_back, progress)
        content = metadata_files(merged)
        root = content.pop(ROOT_NAMES[merged.format])
        for name, digest in checksum_files(manifest, set(manifest.arrays) - present).items():
            content[name] = _read_checksum_file(source, name, digest)
        for name, data in content.items():
            place.put(name, data)
        # Another push may have finished meanwhile: then merge with it and try again (its shards are there
        # already).
        if place.put_if(ROOT_NAMES[merged.format], root, version):
            _tidy(source, place.url)
            return replace(result, manifest=merged)


def _read_checksum_file(source: Path, name: str, digest: str) -> bytes:
    data = files.read_bounded(files.inside(source, name), MAX_BLOCKS_BYTES)
    if hashlib.sha256(data).hexdigest() != digest:
        raise CacheError(
            f"{source / name} is damaged; nothing was sent", remedy=f"featcache verify {source} --repair mends it"
        )
    return data


def _tidy(source: Path, url: str) -> None:
    journal = _push_journal(source, url)
    if journal.parent.is_dir():
        files.remove_tree(journal.parent)
        with cache_lock(source):
            pass  # an idle cache loses its state directory on the way out


def _merge(existing: Manifest | None, ours: Manifest, where: str) -> Manifest:
    """What will be at the destination: its features and ours."""
    if existing is None:
        return ours
    require_same_dataset(existing, ours, Path(where))
    if existing.format == "wds" and set(existing.features) != set(ours.features):
        raise CacheError(f"{where} holds a webdataset cache with other features")
    for name in set(existing.features) & set(ours.features):
        arrays = ours.features[name].arrays
        if any(existing.checksums[array] != ours.checksums[array] for array in arrays):
            raise CacheError(
                f"{where} holds {name!r} already, with other bytes",
                remedy="push to another URL, or leave that feature out with --features",
            )
    features = {**existing.features, **ours.features}
    skipped = {entry.slot: entry for entry in (*existing.skipped, *ours.skipped)}
    return replace(
        existing,
        features={name: features[name] for name in sorted(features)},
        checksums=dict(sorted({**existing.checksums, **ours.checksums}.items())),
        blocks=dict(
            sorted(({a: d for a, d in ours.blocks.items() if a not in existing.arrays} | dict(existing.blocks)).items())
        ),
        skipped=tuple(skipped[slot] for slot in sorted(skipped)),
    )


def _push_journal(source: Path, url: str) -> Path:
    """Which files of this cache an unfinished push has sent: name, SHA-256 and the store's version, one a
    line.
    """
    return source / STATE / "push" / (hashlib.sha256(url.encode()).hexdigest()[:16] + ".jsonl")


def _read_push_journal(path: Path) -> dict[str, tuple[str, str]]:
    sent = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            name, digest, version = json.loads(line)
        except ValueError:
            continue  # the last line of a killed push
        sent[str(name)] = (str(digest), str(version))
    return sent


def _send_shards(
    source: Path,
    manifest: Manifest,
    place: Destination,
    recorded: dict[str, list[str]],
    present: set[str],
    threads: int,
    read_back: bool,
    progress: Progress | None,
) -> Transfer:
    journal: Path | None = _push_journal(source, place.url)
    assert journal is not None
    sent = _read_push_journal(journal)
    try:
        files.make_directory(journal.parent)
    except CacheError:
        journal = None  # a cache on a read-only disk: an interrupted push starts anew
    moved = [0, 0, 0]
    todo = []
    for entry in shard_files(manifest):
        if entry.array in present:
            moved[2] += 1
        else:
            todo.append(entry)
    versions: dict[str, str | None] = {}

    def send(entry: ShardFileEntry) -> None:
        expected = recorded[entry.array][entry.shard]
        if entry.name in sent and sent[entry.name][0] == expected:
            version = place.version(entry.name)
            if version is not None and version == sent[entry.name][1]:
                moved[2] += 1
                return
        path = files.inside(source, entry.name)
        digest, size = files.sha256_of(path), path.stat().st_size
        if digest != expected:
            raise CacheError(
                f"{path} is damaged: its bytes do not match the recorded SHA-256; it was not sent",
                remedy=f"featcache verify {source} --repair mends it",
            )
        place.put(entry.name, path)
        if read_back and remote_sha256(place, entry.name, size) != expected:
            raise CacheError(f"{place.url}/{entry.name} did not arrive as it was sent")
        versions[entry.name] = place.version(entry.name)
        moved[0] += 1
        moved[1] += size
        if progress is not None:
            progress(size)

    def done(entry: ShardFileEntry) -> None:
        if entry.name in versions and journal is not None:
            line = json.dumps([entry.name, recorded[entry.array][entry.shard], versions.pop(entry.name)])
            with journal.open("a") as file:
                file.write(line + "\n")

    in_parallel(todo, send, done, threads)
    return Transfer(manifest=manifest, n_files=moved[0], n_bytes=moved[1], n_files_before=moved[2])


def remote_sha256(place: Location, name: str, size: int) -> str:
    """SHA-256 (hex) of a file at a place, read in pieces."""
    digest = hashlib.sha256()
    for start in range(0, size, PIECE_BYTES):
        digest.update(place.read(name, start, min(start + PIECE_BYTES, size)))
    return digest.hexdigest()


def verify_remote(
    url: str, *, features: Sequence[str] | None = None, threads: int = 8, progress: Progress | None = None
) -> Report:
    """Check a cache where it lies, byte by byte as `verify` does a local one, without keeping what is read.

    Files that do not belong there are not looked for: not every place can list its files.

    Raises `CacheError` if there is no readable cache at `url`, or the connection stays broken.
    """
    place = open_location(url)
    manifest = _required_root(place)
    chosen = subset(manifest, features, None)
    problems: list[Problem] = []
    n_files = n_bytes = 0

    def problem(name: str, what: str) -> None:
        problems.append(Problem(path=f"{place.url}/{name}", what=what))

    for name, content in metadata_files(manifest).items():
        n_files, n_bytes = n_files + 1, n_bytes + len(content)
        try:
            size = place.size(name)
            same = size == len(content) and place.read(name, 0, size) == content
        except Missing:
            same = False
        if not same:
            problem(name, "missing, or not as the manifest says")
    recorded = {}
    for array in sorted(chosen.arrays):
        try:
            recorded[array] = _read_checksums(place, manifest, array)
        except CacheError as error:
            problem(checksums_path(manifest, array), error.what)
    for name, expected in checksum_files(manifest, set(chosen.arrays) & set(manifest.blocks)).items():
        if Path(name).name != BLOCKS:
            continue
        try:
            size = place.size(name)
            same = size <= MAX_BLOCKS_BYTES and remote_sha256(place, name, size) == expected
        except Missing:
            same = False
        if not same:
            problem(name, "missing, or not the file that the manifest names")

    found: list[tuple[ShardFileEntry, str | None, int]] = []

    def check(entry: ShardFileEntry) -> None:
        try:
            size = place.size(entry.name)
            digest = remote_sha256(place, entry.name, size) if entry.n_bytes in (None, size) else ""
        except Missing:
            size, digest = 0, None
        found.append((entry, digest, size))
        if progress is not None:
            progress(size)

    in_parallel(shard_files(chosen), check, lambda _: None, threads)
    for entry, digest, size in found:
        n_files, n_bytes = n_files + 1, n_bytes + size
        what = shard_problem(entry, digest, size, recorded.get(entry.array))
        if what is not None:
            problem(entry.name, what)
    if not problems:
        from featcache.stream import open_remote

        with tempfile.TemporaryDirectory(prefix="featcache-verify-") as folder:
            problems += inconsistencies(open_remote(url, cache_dir=folder), place.url)
    problems.sort(key=lambda p: (p.path, p.what))
    return Report(path=place.url, problems=tuple(problems), n_files=n_files, n_bytes=n_bytes)


def _push_to_hub(source: Path, manifest: Manifest, url: str, progress: Progress | None) -> Transfer:
    """One commit to a data-set repository. The hub keeps uploaded files by SHA-256, so a rerun sends only
    the rest.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    repository, revision, prefix = parse_hub_url(url)
    place = open_location(url)
    existing = read_remote_root(place)
    merged = _merge(existing, manifest, url)
    present = set(existing.arrays) if existing is not None else set()
    local = open_location(source)
    recorded = {array: _read_checksums(local, manifest, array) for array in manifest.arrays}
    content: dict[str, bytes | Path] = dict(metadata_files(merged))
    for name, digest in checksum_files(manifest, set(manifest.arrays) - present).items():
        content[name] = _read_checksum_file(source, name, digest)
    sizes, before = [], 0
    for entry in shard_files(manifest):
        if entry.array in present:
            before += 1
            continue
        path = source / entry.name
        if files.sha256_of(path) != recorded[entry.array][entry.shard]:
            raise CacheError(f"{path} is damaged: its bytes do not match the recorded SHA-256; nothing was sent")
        content[entry.name] = path
        sizes.append(path.stat().st_size)
    operations = [
        CommitOperationAdd(
            path_in_repo=f"{prefix}/{name}".lstrip("/"),
            path_or_fileobj=data if isinstance(data, bytes) else str(data),
        )
        for name, data in content.items()
    ]
    try:
        api = HfApi()
        api.create_repo(repository, repo_type="dataset", exist_ok=True)
        api.create_commit(
            repository,
            operations,
            repo_type="dataset",
            revision=revision,
            commit_message=f"featcache: {', '.join(sorted(manifest.features))}",
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CacheError(
            f"{url} could not be written: {str(error).splitlines()[0][:300]}",
            remedy="log in (hf auth login) and run the same command again: what has arrived is not sent twice",
        ) from error
    if progress is not None:
        progress(sum(sizes))
    return Transfer(manifest=merged, n_files=len(sizes), n_bytes=sum(sizes), n_files_before=before)
