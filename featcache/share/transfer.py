"""Caches between places: push, pull, list. Parallel, resumable, checked against the recorded SHA-256, atomic.

A pull is a build whose shards come over the wire: the same journal, locks and final rename, and so the same
promises. A push sends shards and checksum files first and the root document last; until then nobody sees
anything of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from featcache.errors import CacheError, UserError, first_line
from featcache.progress import QUIET, Progress
from featcache.read import fetch as transfer
from featcache.read.root import read_remote_root, require_authentic, required_root, root_document, versioned_root
from featcache.read.stream import DEFAULT_CACHE_BYTES, remote_cache
from featcache.redact import redact
from featcache.share.manage import cache_bytes
from featcache.share.verify import Problem, Report, inconsistencies, verify_place
from featcache.store import files, locks
from featcache.store.blocks import ShardBlocks, blocks_path
from featcache.store.contents import (
    ShardFileEntry,
    checksums_limit,
    checksums_path,
    checksums_text,
    metadata_files,
    read_blocks,
    read_checksums,
    shard_files,
    shard_names,
    sound_file,
)
from featcache.store.layout import PUSHES, ROOT_NAMES, SIGNATURE, STATE
from featcache.store.manifest import Manifest
from featcache.store.places import Location, Missing
from featcache.store.remote import (
    Destination,
    address_below,
    is_remote,
    local_path,
    open_destination,
    open_location,
    parse_hub_url,
)
from featcache.store.root import NotACache, cache_digest, parse_named_root, read_root
from featcache.store.signing import parse_digest, read_signature
from featcache.store.writer import (
    CacheWriter,
    building_directory,
    cache_lock,
    journal_entry,
    journal_name,
    require_same_dataset,
)
from featcache.store.writers import create_writer

T = TypeVar("T")

_ALWAYS = ("label", "key")


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One cache at a place. `manifest` is None where it cannot be read; `problem` says why, in one line.

    `url` is for people, `address` to open it with.
    """

    url: str
    address: str
    manifest: Manifest | None
    problem: str | None = None

    @property
    def n_bytes(self) -> int:
        return 0 if self.manifest is None else cache_bytes(self.manifest)


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What a push or pull did: files and bytes moved now, and those that were there already."""

    manifest: Manifest
    n_files: int
    n_bytes: int
    n_files_before: int


def list_remote(url: str) -> list[Listed]:
    """Caches at `url`: itself, or its immediate subdirectories (where the place can list them).

    One that cannot be read is listed with its problem. Raises `CacheError` if the place cannot be reached.
    """
    place = open_location(url)
    document = root_document(place)
    here = None if document is None else _listed(place.address, *document[:2])
    if here is not None:
        return [here]
    found: list[Listed | None] = []
    for name in place.directories():
        below = address_below(place, name)
        try:
            document = root_document(open_location(below))
        except UserError as error:
            found.append(_unreadable(below, error))
            continue
        found.append(None if document is None else _listed(below, *document[:2]))
    return [entry for entry in found if entry is not None]


def _listed(address: str, name: str, data: bytes) -> Listed | None:
    """What a listing says of a document; None for one of something else (a zarr array in a half-pushed cache)."""
    url = redact(address)
    try:
        return Listed(url=url, address=address, manifest=parse_named_root(data, name, f"{url}/{name}"))
    except NotACache:
        return None
    except CacheError as error:
        return _unreadable(address, error)


def _unreadable(address: str, error: UserError) -> Listed:
    return Listed(url=redact(address), address=address, manifest=None, problem=" ".join(error.what.split()))


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
            raise CacheError(f"the cache does not hold {', '.join(missing)}", remedy=f"it holds {have}")
        if manifest.format == "wds" and set(features) != set(manifest.features):
            raise CacheError(
                "a webdataset cache holds all features in each tar, and goes as a whole",
                remedy="leave --features out, then take them from the copy: featcache convert COPY NEW --to zarr --features ...",
            )
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
    expect: str | None = None,
    signed_by: Path | None = None,
    progress: Progress = QUIET,
) -> Transfer:
    """Copy a cache, or part of one, from `url` (or a local path) into the directory `target`.

    Every shard is checked against the recorded SHA-256 before it takes its name; an interrupted pull goes on
    where it stopped, inside a shard too; readers of `target` see its features only when all of them are there.
    Pulling more features into the same directory later adds them. `progress` advances as bytes arrive.

    expect: the digest that the whole cache at `url` must have; signed_by: a public key or allowed-signers file, one of
    which must have signed it. Both are checked before anything else is fetched.

    Raises `CacheError` for a place without a cache or with another one, a damaged source, a target that holds
    something else, or a connection that stays broken.
    """
    if expect is not None:
        parse_digest(expect)
    place = open_location(url)
    whole = required_root(place)
    require_authentic(place, whole, expect, signed_by)
    progress.begin("copying", None, unit="bytes")
    part = subset(whole, features, samples)
    target = Path(target)
    refuse_links(target, part)
    recorded = {array: read_checksums(place, whole, array) for array in part.arrays}
    blocks = {array: read_blocks(place, whole, array) for array in part.arrays}
    with create_writer(
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
        _refuse_other_bytes(writer.manifest, _with_checksums(part, recorded), str(target))
        under_way = _Pull(place, whole, part, writer, recorded, blocks, progress)
        in_parallel(under_way.jobs(), under_way.fetch, under_way.done, threads)
        manifest = writer.finish()
    _carry_signature(place, whole, target, manifest)
    n_files, n_bytes, n_before = under_way.moved
    return Transfer(manifest=manifest, n_files=n_files, n_bytes=n_bytes, n_files_before=n_before)


# What a shard's files hold of which features.
_Job = tuple[list[str], int, list[ShardFileEntry]]


@dataclass
class _Pull:
    """A pull under way. moved: files and bytes that came now, files that were there."""

    place: Location
    whole: Manifest
    part: Manifest
    writer: CacheWriter
    recorded: dict[str, list[str]]
    blocks: dict[str, list[ShardBlocks] | None]
    progress: Progress
    moved: list[int] = field(default_factory=lambda: [0, 0, 0])
    arrived: dict[tuple[str, int], transfer.Fetched] = field(default_factory=dict)

    def jobs(self) -> list[_Job]:
        """The shards that have to come."""
        by_shard: dict[tuple[str, int], list[ShardFileEntry]] = {}
        for entry in shard_files(self.part):
            key = (entry.features[0] if self.part.format == "zarr" else "", entry.shard)
            by_shard.setdefault(key, []).append(entry)
        todo = []
        for (feature, shard), entries in by_shard.items():
            names = [feature] if feature else sorted(self.part.features)
            if all(_is_there(self.writer, self.part, name, shard, self.recorded) for name in names):
                self.moved[2] += len(entries)
            else:
                todo.append((names, shard, entries))
        return todo

    def fetch(self, job: _Job) -> None:
        names, shard, entries = job
        target = self.writer.path
        for entry in entries:
            blocks = self.blocks[entry.array]
            of_shard = blocks[shard] if blocks is not None else None
            file = transfer.wanted(self.place, self.whole, entry, self.recorded[entry.array][shard], of_shard)
            partial = building_directory(target, names[0]) / transfer.partial_name(entry)
            path = files.inside(target, entry.name)
            self.arrived[entry.array, shard] = transfer.fetch(self.place, file, path, partial, progress=self.progress)

    def done(self, job: _Job) -> None:
        names, shard, entries = job
        fetched = {entry.array: self.arrived.pop((entry.array, shard)) for entry in entries}
        self.moved[0] += len(entries)
        self.moved[1] += sum(file.n_bytes for file in fetched.values())
        inside = self.writer.slots(shard)
        self.writer.skip(shard, [(s.slot, s.key, s.reason) for s in self.part.skipped if s.slot in inside])
        of_tar = next(iter(fetched.values()))
        for name in names:
            arrays = self.part.features[name].arrays
            self.writer.adopt_shard(name, shard, {array: fetched.get(array, of_tar).hashes for array in arrays})


def refuse_links(target: Path, part: Manifest) -> None:
    """Raises `CacheError` where writing the cache would lead out of its directory."""
    for name in (STATE, SIGNATURE, *ROOT_NAMES.values(), *(part.arrays if part.format == "zarr" else ())):
        files.inside(target, name)


def _with_checksums(part: Manifest, recorded: dict[str, list[str]]) -> Manifest:
    """The manifest of a part with the checksums of its own `SHA256SUMS` files: those of fewer shards list fewer."""
    texts = {array: checksums_text(recorded[array][: part.n_shards], shard_names(part, array)) for array in part.arrays}
    return replace(part, checksums={array: hashlib.sha256(text).hexdigest() for array, text in texts.items()})


def _refuse_other_bytes(existing: Manifest, ours: Manifest, where: str) -> None:
    """Raises `CacheError` if a feature is there already, with other bytes than ours."""
    for name in sorted(set(existing.features) & set(ours.features)):
        if any(existing.checksums[array] != ours.checksums[array] for array in ours.features[name].arrays):
            raise CacheError(
                f"{where} holds {name!r} already, with other bytes",
                remedy="choose another place, or leave that feature out with --features",
            )


def _is_there(writer: CacheWriter, part: Manifest, feature: str, shard: int, recorded: dict[str, list[str]]) -> bool:
    """Whether an earlier pull brought this shard, and from a cache with the same bytes."""
    if shard not in writer.finished(feature):
        return False
    if feature in writer.manifest.features:
        return True
    entry = building_directory(writer.path, feature) / journal_name(shard)
    with contextlib.suppress(CacheError):
        digests = journal_entry(entry, part.features[feature], part.dataset.count).checksums
        return all(recorded[array][shard] == digest for array, digest in digests.items())
    return False


def _carry_signature(place: Location, whole: Manifest, target: Path, manifest: Manifest) -> None:
    """The signature comes along where all of the cache did."""
    if cache_digest(manifest) == cache_digest(whole) and (signature := read_signature(place)) is not None:
        files.atomic_write(files.inside(target, SIGNATURE), [signature])


def in_parallel(jobs: Iterable[T], work: Callable[[T], None], done: Callable[[T], None], threads: int) -> None:
    """`work(job)` in threads, `done(job)` in this one as each finishes. The first error stops the rest and is raised."""
    waiting = iter(jobs)
    running: dict[Future[None], T] = {}
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


def push(
    cache: str | Path,
    url: str,
    *,
    features: Sequence[str] | None = None,
    threads: int = 8,
    read_back: bool = True,
    replace_unfinished: bool = False,
    progress: Progress = QUIET,
) -> Transfer:
    """Copy the local `cache` (or some features) to `url`: s3://, gs://, hf:// or a local path.

    Each shard is checked against the recorded SHA-256 before it leaves and, with `read_back`, after it has
    arrived. The root document goes last, so a reader sees the old cache or the new one. Features that are at
    `url` already stay; a push that was interrupted goes on where it stopped. Pushes to one place may run at the same
    time. `progress` advances as bytes are sent.

    replace_unfinished: send over what an unfinished push left there of a feature with other bytes.

    Raises `CacheError` for a damaged cache, or a place that holds a cache of other images or other bytes
    under the same feature name.
    """
    source = Path(cache)
    whole = read_root(source)
    manifest = subset(whole, features, None)
    if not is_remote(url):
        return pull(str(source), local_path(url), features=features, threads=threads, progress=progress)
    progress.begin("sending", None, unit="bytes")
    if url.startswith("hf://"):
        return _push_to_hub(source, whole, manifest, url, progress)
    place = open_destination(url)
    local = open_location(source)
    recorded = {array: read_checksums(local, manifest, array) for array in manifest.arrays}
    with _push_journal(source, place.address) as journal:
        for _ in range(_MERGES):
            existing, version = versioned_root(place)
            merged = _merge(existing, manifest, place.url)
            present = set(existing.arrays) if existing is not None else set()
            _claim(local, place, manifest, present, replace_unfinished)
            result = _send_shards(source, manifest, place, recorded, present, threads, read_back, journal, progress)
            content = metadata_files(merged)
            root = content.pop(ROOT_NAMES[merged.format])
            metadata: dict[str, bytes | Path] = {**content, **_block_files(source, manifest, existing)}
            for name, data in metadata.items():
                place.put(name, data)
            # Another push may have finished meanwhile: then merge with it and try again (its shards are there already).
            if place.put_if(ROOT_NAMES[merged.format], root, version) and _holds(place, manifest):
                signature = read_signature(open_location(source))
                if signature is not None and cache_digest(merged) == cache_digest(whole):
                    place.put(SIGNATURE, signature)
                return replace(result, manifest=merged)
    raise _replaced_too_often(place)


_MERGES = 50


def _replaced_too_often(place: Location) -> CacheError:
    return CacheError(
        f"{place.url} was replaced by others {_MERGES} times while this push was under way",
        remedy="run the same command again when fewer pushes run: what has arrived is not sent twice",
    )


def _holds(place: Destination, ours: Manifest) -> bool:
    """Whether what was pushed is in the root document. Where the store makes no conditional writes, another push may
    just have replaced it: then we look a moment later.
    """
    if not place.conditional:
        time.sleep(random.uniform(0.2, 1.0))
    existing = read_remote_root(place)
    return existing is not None and all(existing.checksums.get(a) == d for a, d in ours.checksums.items())


def _block_files(source: Path, manifest: Manifest, existing: Manifest | None) -> dict[str, Path]:
    """The files of block hashes that are not at the destination yet, checked: name -> where it is here."""
    local, known = open_location(source), existing.blocks if existing is not None else {}
    found = {}
    for array in sorted(set(manifest.blocks) - set(known)):
        read_blocks(local, manifest, array)
        name = blocks_path(manifest, array)
        found[name] = files.inside(source, name)
    return found


def _claim(local: Location, place: Destination, manifest: Manifest, present: set[str], replace_other: bool) -> None:
    """Put the checksum files of the arrays to be sent, which nobody may replace by other ones: so two pushes of one
    feature with different bytes cannot mix their shards.

    Raises `CacheError` where other ones are there.
    """
    limit = checksums_limit(manifest)
    for name in sorted({checksums_path(manifest, array) for array in manifest.arrays if array not in present}):
        ours = local.read_whole(name, limit)[0]
        for _ in range(_MERGES):
            if place.put_if(name, ours, None):
                break
            try:
                theirs, version = place.read_whole(name, limit)
            except Missing:
                continue
            if theirs == ours or (replace_other and place.put_if(name, ours, version)):
                break
            if not replace_other:
                raise CacheError(
                    f"another push to {place.url} has begun to send {name.rpartition('/')[0] or 'this cache'!r} "
                    "with other bytes",
                    remedy="if it is not running any more, add --replace-unfinished; else push to another URL",
                )
        else:
            raise _replaced_too_often(place)


class _Journal:
    """Which files of this cache an unfinished push to one place has sent: name, SHA-256 and the store's version, one a
    line. A push that runs at the same time from the same cache to the same place does without.
    """

    def __init__(self, path: Path, held: locks.Lock | None) -> None:
        self.path, self._held, self._fd = path, held, -1
        self.sent: dict[str, tuple[str, str]] = {}
        if held is None:
            return
        self._fd = files.open_to_write(path, os.O_APPEND)
        for line in os.pread(self._fd, os.fstat(self._fd).st_size, 0).decode("utf-8", "replace").splitlines():
            try:
                name, digest, version = json.loads(line)
            except ValueError:
                continue  # the last line of a killed push
            self.sent[str(name)] = (str(digest), str(version))

    def note(self, name: str, digest: str, version: str) -> None:
        """Record a file that has arrived. What cannot be recorded is sent again by the next push."""
        if self._fd >= 0:
            with contextlib.suppress(CacheError):
                files.append(self._fd, (json.dumps([name, digest, version]) + "\n").encode(), self.path)

    def close(self, *, remove: bool) -> None:
        """Let go of it; `remove` it with it."""
        if self._held is None:
            return
        os.close(self._fd)
        # What was sent is sent, though the cache here may have been removed meanwhile.
        with contextlib.suppress(CacheError), cache_lock(self.path.parents[2]):
            # Within the lock: an idle cache loses its state directory on the way out of it.
            self._held.release(remove=remove)
            files.remove_empty_directory(self.path.parent)
        self._held.release()


@contextlib.contextmanager
def _push_journal(source: Path, address: str) -> Iterator[_Journal]:
    """The journal of pushes from `source` to `address`, removed by one that succeeds; on a read-only disk
    it keeps nothing.
    """
    name = hashlib.sha256(address.encode()).hexdigest()[:16]
    path = files.inside(source, f"{STATE}/{PUSHES}/{name}.jsonl")
    held = None
    with contextlib.suppress(CacheError), cache_lock(source):
        files.make_directory(path.parent)
        held = locks.try_lock(path)
    journal = _Journal(path, held)
    done = False
    try:
        yield journal
        done = True
    finally:
        journal.close(remove=done or not journal.sent)


def _merge(existing: Manifest | None, ours: Manifest, where: str) -> Manifest:
    """What will be at the destination: its features and ours."""
    if existing is None:
        return ours
    require_same_dataset(existing, ours, Path(where))
    if existing.format == "wds" and set(existing.features) != set(ours.features):
        raise CacheError(f"{where} holds a webdataset cache with other features")
    _refuse_other_bytes(existing, ours, where)
    features = {**existing.features, **ours.features}
    skipped = {entry.slot: entry for entry in (*existing.skipped, *ours.skipped)}
    return replace(
        existing,
        features={name: features[name] for name in sorted(features)},
        checksums=dict(sorted({**existing.checksums, **ours.checksums}.items())),
        blocks=dict(sorted({**ours.blocks, **existing.blocks}.items())),
        skipped=tuple(skipped[slot] for slot in sorted(skipped)),
    )


def _send_shards(
    source: Path,
    manifest: Manifest,
    place: Destination,
    recorded: dict[str, list[str]],
    present: set[str],
    threads: int,
    read_back: bool,
    journal: _Journal,
    progress: Progress,
) -> Transfer:
    sent, moved = journal.sent, [0, 0, 0]
    todo = []
    for entry in shard_files(manifest):
        if entry.array in present:
            moved[2] += 1
        else:
            todo.append(entry)
    arrived: dict[str, tuple[int, str | None]] = {}

    def send(entry: ShardFileEntry) -> None:
        expected = recorded[entry.array][entry.shard]
        if entry.name in sent and sent[entry.name][0] == expected:
            version = place.version(entry.name)
            if version is not None and version == sent[entry.name][1]:
                return
        path, size = sound_file(source, entry, expected)
        place.put(entry.name, path)
        if read_back and _sha256(place.chunks(entry.name, 0, size)) != expected:
            raise CacheError(f"{place.url}/{entry.name} did not arrive as it was sent")
        arrived[entry.name] = size, place.version(entry.name)
        progress.update(size)

    def done(entry: ShardFileEntry) -> None:
        if entry.name not in arrived:
            moved[2] += 1
            return
        size, version = arrived[entry.name]
        moved[0] += 1
        moved[1] += size
        if version is not None:
            # In memory too: this push may have to merge and look again.
            sent[entry.name] = (recorded[entry.array][entry.shard], version)
            journal.note(entry.name, *sent[entry.name])

    in_parallel(todo, send, done, threads)
    return Transfer(manifest=manifest, n_files=moved[0], n_bytes=moved[1], n_files_before=moved[2])


def _sha256(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for data in pieces:
        digest.update(data)
    return digest.hexdigest()


def verify_remote(
    url: str,
    *,
    features: Sequence[str] | None = None,
    threads: int = 8,
    expect: str | None = None,
    signed_by: Path | None = None,
    fraction: float | None = None,
    seed: int | None = None,
    progress: Progress = QUIET,
) -> Report:
    """Check a cache where it lies, byte by byte as `verify` does a local one, without keeping what is read.

    Files that do not belong there are not looked for: not every place can list its files. fraction, seed: read only a
    sample, as `verify` does.

    Raises `CacheError` if there is no readable cache at `url`, it is not the one that is `expect`ed and `signed_by`
    asks for (as for `pull`), or the connection stays broken.
    """
    place = open_location(url)
    manifest = required_root(place)
    require_authentic(place, manifest, expect, signed_by)
    subset(manifest, features, None)

    def consistent() -> list[Problem]:
        with tempfile.TemporaryDirectory(prefix="featcache-verify-") as folder:
            return inconsistencies(remote_cache(place, manifest, Path(folder), DEFAULT_CACHE_BYTES), place.url)

    return verify_place(
        place,
        manifest,
        features=features,
        threads=threads,
        progress=progress,
        fraction=fraction,
        seed=seed,
        consistent=consistent,
    )


def _push_to_hub(source: Path, whole: Manifest, manifest: Manifest, url: str, progress: Progress) -> Transfer:
    """One commit to a data-set repository. The hub keeps uploaded files by SHA-256, so a rerun sends only the rest."""
    # Late: other places need no client of the hub.
    from huggingface_hub import CommitOperationAdd, HfApi, errors

    repository, revision, prefix = parse_hub_url(url)
    place, api = open_location(url), HfApi()
    recorded = {array: read_checksums(open_location(source), manifest, array) for array in manifest.arrays}
    try:
        api.create_repo(repository, repo_type="dataset", exist_ok=True)
        for _ in range(_MERGES):
            # Another commit after this one makes ours fail: then we merge with what it brought.
            parent = api.repo_info(repository, repo_type="dataset", revision=revision).sha
            existing = read_remote_root(place)
            merged = _merge(existing, manifest, url)
            content, result = _to_send(source, whole, manifest, existing, merged, recorded)
            operations = [
                CommitOperationAdd(
                    path_in_repo=f"{prefix}/{name}".lstrip("/"),
                    path_or_fileobj=data if isinstance(data, bytes) else str(data),
                )
                for name, data in content.items()
            ]
            try:
                api.create_commit(
                    repository,
                    operations,
                    repo_type="dataset",
                    revision=revision,
                    parent_commit=parent,
                    commit_message=f"featcache: {', '.join(sorted(manifest.features))}",
                )
            except errors.HfHubHTTPError as error:
                if error.response.status_code in (409, 412):
                    continue
                raise
            progress.update(result.n_bytes)
            return result
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        raise CacheError(
            f"{url} could not be written: {redact(first_line(error))}",
            remedy="log in (hf auth login) and run the same command again: what has arrived is not sent twice",
        ) from error
    raise _replaced_too_often(place)


def _to_send(
    source: Path,
    whole: Manifest,
    manifest: Manifest,
    existing: Manifest | None,
    merged: Manifest,
    recorded: dict[str, list[str]],
) -> tuple[dict[str, bytes | Path], Transfer]:
    """Every file that a commit must bring, checked (name -> content), and what that amounts to."""
    present = set(existing.arrays) if existing is not None else set()
    content: dict[str, bytes | Path] = {**metadata_files(merged), **_block_files(source, manifest, existing)}
    for array in set(manifest.arrays) - present:
        name = checksums_path(manifest, array)
        content[name] = files.inside(source, name)
    sizes, before = [], 0
    for entry in shard_files(manifest):
        if entry.array in present:
            before += 1
            continue
        content[entry.name], size = sound_file(source, entry, recorded[entry.array][entry.shard])
        sizes.append(size)
    if cache_digest(merged) == cache_digest(whole) and (signature := read_signature(open_location(source))) is not None:
        content[SIGNATURE] = signature
    return content, Transfer(manifest=merged, n_files=len(sizes), n_bytes=sum(sizes), n_files_before=before)
