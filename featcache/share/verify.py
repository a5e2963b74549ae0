"""Is every byte of a cache what its builder wrote, and do the samples make sense together?

In constant memory, whatever the manifest claims: shards are named one by one, few are under way at a time, and after
`MAX_PROBLEMS` the rest is not looked at. Only regular files are opened, none through a link.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import random
import stat
from array import array as compact
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from featcache.errors import CacheError
from featcache.keys import key_bytes
from featcache.progress import QUIET, Progress
from featcache.read.open import open_cache
from featcache.read.reader import Cache
from featcache.store import files, locks, wds
from featcache.store.blocks import (
    BLOCK_BYTES,
    ShardBlocks,
    blocks_bytes,
    blocks_path,
    check_block,
    n_blocks,
    parse_blocks,
)
from featcache.store.contents import (
    ShardFileEntry,
    array_files,
    arrays_with_files,
    checksum_files,
    checksums_path,
    checksums_text,
    metadata_files,
    most_bytes,
    shard_names,
)
from featcache.store.layout import ROOT_NAMES, STATE, sample_bytes, shard_name
from featcache.store.ledger import Ledger, identity
from featcache.store.manifest import MAX_METADATA_BYTES, Manifest
from featcache.store.names import OwnNames
from featcache.store.places import DamagedSource, LocalLocation, Location, Missing, Unreadable, read_small
from featcache.store.root import cache_digest, find_root, parse_root, read_root
from featcache.store.writer import cache_lock, clear_parts

MAX_PROBLEMS = 100_000
_ATTEMPTS = 10
_PUBLISHING_S = 30.0  # a publisher holds the lock for moments
_MAX_KEY_BYTES = 1 << 16
_PIECE_BYTES = 64 << 20

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True, slots=True)
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
    """What `verify` found, and how much it read.

    digest: of the cache that was checked (`cache_digest`), None where its root document is damaged. n_unread: shards
    that were not read, because the sample did not fall on them or they are as they were when last checked. fraction,
    seed: of the sample, None where there was none. since_last: whether only what changed was read.
    """

    path: str
    problems: tuple[Problem, ...]
    n_files: int
    n_bytes: int
    digest: str | None = None
    n_unread: int = 0
    fraction: float | None = None
    seed: int | None = None
    since_last: bool = False

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def damaged(self) -> dict[str, list[int]]:
        """Feature -> numbers of its damaged shards: what `repair_writer` takes."""
        shards: dict[str, set[int]] = {}
        for problem in self.problems:
            if problem.feature is not None and problem.shard is not None:
                shards.setdefault(problem.feature, set()).add(problem.shard)
        return {name: sorted(numbers) for name, numbers in sorted(shards.items())}


def parse_fraction(text: str) -> float:
    """A fraction in (0, 1] from '1%' or '0.01'; raises `CacheError` for anything else."""
    number, percent = (text.strip()[:-1], 100.0) if text.strip().endswith("%") else (text.strip(), 1.0)
    try:
        value = float(number) / percent
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise CacheError(f"{text!r:.40} is no part of a cache", remedy="type a percentage such as 1%, or 0.01")
    return value


def fresh_seed() -> int:
    return random.SystemRandom().randrange(1 << 32)


def verify(
    path: str | Path,
    *,
    features: Sequence[str] | None = None,
    threads: int | None = None,
    progress: Progress = QUIET,
    fraction: float | None = None,
    seed: int | None = None,
    since_last: bool = False,
    remember: bool = False,
) -> Report:
    """Check a local cache: every file's bytes against recorded checksums, then labels, keys and skipped slots.

    features: check only these. threads: default one per core. progress: advances with each checked file.

    fraction: read only this part of the bytes, drawn at random with `seed` (default: a fresh one): blocks of 1 MiB
    where their hashes are recorded, else whole shards. Metadata, and the length of every shard, are checked all the same;
    labels and keys then not.
    since_last: skip shards that an earlier call with `remember` found sound and whose size, times and inode are as they
    were then. remember: keep note of sound shards for that in the cache's state folder (where it can be written).

    What a builder, a removal or a restoration publishes meanwhile is taken into account: before problems are reported
    the root document is read again, and where it has changed, what changed is checked again.

    Raises `CacheError` only if there is no cache at `path` (any more), it lacks one of `features`, changes again and
    again, or cannot be read for a reason that is not the files' (permissions, a limit on open files); whatever is wrong
    inside one is in the report.
    """
    path = Path(path)
    if fraction is not None and seed is None:
        seed = fresh_seed()
    progress.begin("checking", None, unit="bytes")
    plan = _Plan(fraction, seed, since_last, remember, threads or os.cpu_count() or 1, progress)
    checked = _Checked()
    previous: Manifest | None = None
    for _ in range(_ATTEMPTS):
        with _opened_root(path) as root:
            try:
                manifest = root.manifest()
            except CacheError as error:
                if _unchanged(path, root):
                    problem = Problem(path=str(root.path), what=error.what.removeprefix(f"{root.path}: "))
                    return Report(path=str(path), problems=(problem,), n_files=1, n_bytes=0)
                continue
            missing = [name for name in features or () if name not in manifest.features]
            if missing:
                have = ", ".join(sorted(manifest.features)) or "nothing"
                raise CacheError(f"{path} does not hold {', '.join(missing)}", remedy=f"it holds {have}")
            every = arrays_with_files(manifest, features)
            again = [array for array in every if _must_check(array, manifest, previous, checked)]
            checked.problems.clear()
            _check(LocalLocation(path), manifest, root.data, again, plan, checked)
            if fraction is None and not checked.problems:
                checked.problems += _inconsistencies(path)
            if not checked.problems or _unchanged(path, root):
                return checked.report(str(path), manifest, plan)
            previous = manifest
    raise CacheError(
        f"{path} changed {_ATTEMPTS} times while it was checked",
        remedy="run it again when no build or removal is under way",
    )


def verify_place(
    place: Location,
    manifest: Manifest,
    *,
    features: Sequence[str] | None,
    threads: int,
    progress: Progress,
    fraction: float | None,
    seed: int | None,
    consistent: Callable[[], list[Problem]],
) -> Report:
    """Check the cache with that manifest at a place, byte by byte, without keeping what is read; as `verify` otherwise.

    Files that do not belong there are not looked for: not every place can list its files. consistent: what is wrong
    between labels, keys and skipped slots, asked where everything else is sound.

    Raises `CacheError` if the connection stays broken.
    """
    progress.begin("checking", None, unit="bytes")
    plan = _Plan(fraction, fresh_seed() if seed is None else seed, False, False, threads, progress)
    checked = _Checked()
    _check(place, manifest, None, arrays_with_files(manifest, features), plan, checked)
    if not checked.problems and fraction is None:
        checked.problems += consistent()
    return checked.report(place.url, manifest, plan)


@dataclass(frozen=True)
class _Plan:
    """How to check. `since_last` and `remember` are for local caches."""

    fraction: float | None
    seed: int | None
    since_last: bool
    remember: bool
    threads: int
    progress: Progress


@dataclass
class _Checked:
    """What was found so far. `arrays`: array -> (files read, bytes read, shards not read)."""

    problems: list[Problem] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)
    arrays: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    metadata: tuple[int, int] = (0, 0)

    @property
    def full(self) -> bool:
        return len(self.problems) >= MAX_PROBLEMS

    def problem(self, place: Location, name: str, what: str) -> None:
        self.problems.append(Problem(path=f"{place.url}/{name}", what=what))

    def report(self, where: str, manifest: Manifest, plan: _Plan) -> Report:
        problems = sorted(self.problems, key=lambda p: (p.path, p.what, p.feature or ""))
        if self.full:
            problems.append(Problem(path=where, what=f"{len(problems)} problems: the rest was not checked"))
        counts = [found for array, found in self.arrays.items() if array in manifest.arrays]
        return Report(
            path=where,
            problems=tuple(problems),
            n_files=self.metadata[0] + sum(n for n, _, _ in counts),
            n_bytes=self.metadata[1] + sum(n for _, n, _ in counts),
            digest=cache_digest(manifest),
            n_unread=sum(n for _, _, n in counts),
            fraction=plan.fraction,
            seed=plan.seed if plan.fraction is not None else None,
            since_last=plan.since_last,
        )


@dataclass(frozen=True)
class _Root:
    """A root document, kept open: so no other file can have its inode, and one put in its place is told from it even
    if its bytes are the same (a feature removed and added again).
    """

    path: Path
    fd: int
    data: bytes

    def manifest(self) -> Manifest:
        if len(self.data) > MAX_METADATA_BYTES:
            raise CacheError(f"{self.path} is longer than the {MAX_METADATA_BYTES} bytes that such a file may have")
        manifest = parse_root(self.data, str(self.path))
        if ROOT_NAMES[manifest.format] != self.path.name:
            raise CacheError(f"it describes a cache of format {manifest.format!r}")
        return manifest

    def is_current(self) -> bool:
        try:
            held, current = os.fstat(self.fd), self.path.stat()
        except FileNotFoundError:
            return False
        return (held.st_dev, held.st_ino) == (current.st_dev, current.st_ino)


@contextlib.contextmanager
def _opened_root(path: Path) -> Iterator[_Root]:
    """The root document of the cache at `path`; raises `CacheError` if there is none."""
    root = find_root(path)
    if root is None:
        read_root(path)  # raises, saying what is there instead
        raise AssertionError
    fd = files.open_to_read(root)
    try:
        with os.fdopen(os.dup(fd), "rb") as file:
            data = file.read(min(os.fstat(fd).st_size, MAX_METADATA_BYTES) + 1)
        yield _Root(root, fd, data)
    finally:
        os.close(fd)


def _unchanged(path: Path, root: _Root) -> bool:
    """Whether the root document was not replaced, once whoever is publishing at this moment is done.

    Raises `CacheError` where there is no cache any more.
    """
    with contextlib.suppress(CacheError):
        locks.wait_while_held(files.inside(path, f"{STATE}/lock"), _PUBLISHING_S)
    if find_root(path) is None:
        read_root(path)
    return root.is_current()


def _inconsistencies(path: Path) -> list[Problem]:
    try:
        return inconsistencies(open_cache(path), str(path))
    except CacheError as error:
        if files.not_the_file(error):
            raise
        return [Problem(path=str(path), what=error.what)]


def _must_check(array: str, manifest: Manifest, previous: Manifest | None, checked: _Checked) -> bool:
    """Whether an array was not yet found sound as it now is."""
    if previous is None or array in checked.bad or array not in checked.arrays:
        return True
    frames = [(m.dataset, m.shard_size, m.format, m.compressor) for m in (manifest, previous)]
    digests = [(m.checksums.get(array), m.blocks.get(array)) for m in (manifest, previous)]
    return frames[0] != frames[1] or digests[0] != digests[1]


def _check(
    place: Location, manifest: Manifest, root: bytes | None, arrays: Collection[str], plan: _Plan, checked: _Checked
) -> None:
    """Check metadata and the shards of `arrays`; what is found goes into `checked`. root: the root document, if read."""
    n_files = n_bytes = 0
    for name, content in metadata_files(manifest).items():
        n_files, n_bytes = n_files + 1, n_bytes + len(content)
        known = root if name == ROOT_NAMES[manifest.format] else None
        if not (_equals(place, name, content) if known is None else known == content):
            checked.problem(place, name, "missing, or not as the manifest says")
    with ThreadPoolExecutor(plan.threads) as pool:
        for array in arrays:
            if checked.full:
                break
            n_bytes += _check_array(place, manifest, array, plan, checked, pool)
    checked.metadata = (n_files, n_bytes)
    if isinstance(place, LocalLocation):
        checked.problems += _unexpected(place.path, manifest, MAX_PROBLEMS - len(checked.problems))


def _check_array(
    place: Location, manifest: Manifest, array: str, plan: _Plan, checked: _Checked, pool: ThreadPoolExecutor
) -> int:
    """Check one array's (or the tars') checksum files and shards; returns the bytes of the checksum files."""
    before = len(checked.problems)
    recorded, blocks, n_bytes = _recorded(place, manifest, array, checked)
    path = place.path if isinstance(place, LocalLocation) and (plan.remember or plan.since_last) else None
    ledger = None if path is None else Ledger(path, array, manifest.checksums[array], manifest.n_shards)
    parts = None
    if plan.fraction is not None and plan.seed is not None:
        parts = sampled(manifest, array, blocks, plan.fraction, plan.seed)
    most = most_bytes(manifest, next(array_files(manifest, array)))
    # Without any record: all of them together may still be what the manifest stands for.
    untold = _Untold(manifest, array) if recorded is None and blocks is None and parts is None else None
    n_files = n_read = n_unread = 0

    def jobs() -> Iterator[_Job]:
        nonlocal n_unread
        digests = _recorded_digests(recorded, manifest, array)
        # Here it costs little to look at each file, whatever part of the bytes is read.
        chosen = range(manifest.n_shards) if parts is None or isinstance(place, LocalLocation) else sorted(parts)
        position = 0
        for entry in array_files(manifest, array, chosen):
            if checked.full:
                return
            lost = None if recorded is None else ""
            digest = next((d for d in digests if (position := position + 1) > entry.shard), lost)
            if plan.since_last and path is not None and ledger is not None and _looks_unchanged(path, entry, ledger):
                n_unread += 1
                continue
            of_shard = None if blocks is None else blocks[entry.shard]
            yield _Job(place, entry, digest, of_shard, None if parts is None else parts.get(entry.shard, []), most)

    for job, result in _mapped(pool, _check_shard, jobs(), 4 * plan.threads):
        n_files, n_read = n_files + (job.parts != []), n_read + result.n_bytes
        if result.what is not None:
            checked.problems += _problems(place, job.entry, result.what)
        elif untold is not None:
            untold.add(job.entry, result.sha256)
        if plan.remember and ledger is not None and (result.what is not None or job.parts is None):
            ledger.note(job.entry.shard, result.mark if recorded is not None and result.what is None else b"")
        if job.parts != []:
            plan.progress.update(result.n_bytes)
    if untold is not None:
        checked.problems += untold.problems(place, MAX_PROBLEMS - len(checked.problems))
    if plan.remember and ledger is not None:
        ledger.save()
    if parts is not None:
        n_unread = manifest.n_shards - len(parts)
    checked.arrays[array] = (n_files, n_read, n_unread)
    (checked.bad.add if len(checked.problems) > before else checked.bad.discard)(array)
    return n_bytes


def _recorded(
    place: Location, manifest: Manifest, array: str, checked: _Checked
) -> tuple[bytes | None, list[ShardBlocks] | None, int]:
    """An array's `SHA256SUMS`, not yet parsed, and the hashes of its blocks, where they are sound; and their bytes."""
    found: dict[str, bytes | None] = {}
    for name, sha256, limit in checksum_files(manifest, array):
        try:
            found[name] = read_small(place, name, limit)
        except (Unreadable, DamagedSource) as error:
            found[name] = None
            checked.problem(place, name, error.what)
            continue
        if hashlib.sha256(found[name] or b"").hexdigest() != sha256:
            found[name] = None
            checked.problem(place, name, "is damaged: it is not the file that the manifest names")
    n_bytes = sum(len(data or b"") for data in found.values())
    name = checksums_path(manifest, array)
    recorded, blocks = found[name], None
    if recorded is not None and recorded.count(b"\n") != manifest.n_shards:
        checked.problem(place, name, f"does not list the {manifest.n_shards} shards")
    data = found.get(blocks_path(manifest, array))
    if data is not None:
        try:
            blocks = parse_blocks(data, manifest, array, blocks_path(manifest, array))
        except CacheError as error:
            checked.problem(place, blocks_path(manifest, array), error.what)
    return recorded, blocks, n_bytes


class _Untold:
    """Shards of an array of which nothing is left that tells sound ones from damaged ones, in order."""

    def __init__(self, manifest: Manifest, array: str) -> None:
        self._manifest, self._array = manifest, array
        self._digest = hashlib.sha256()
        self._shards = compact("L")

    def add(self, entry: ShardFileEntry, sha256: str) -> None:
        """A shard that looks sound, and its SHA-256."""
        name = entry.name.rpartition("/")[2]
        self._digest.update(f"{sha256}  {name}\n".encode())
        self._shards.append(entry.shard)

    def problems(self, place: Location, limit: int) -> list[Problem]:
        """None if their checksums are together the ones that the manifest stands for."""
        whole = len(self._shards) == self._manifest.n_shards
        if whole and self._digest.hexdigest() == self._manifest.checksums[self._array]:
            return []
        what = "cannot be told sound from damaged: its checksum is lost"
        entries = array_files(self._manifest, self._array, self._shards)
        return [problem for entry in entries for problem in _problems(place, entry, what)][:limit]


def _problems(place: Location, entry: ShardFileEntry, what: str) -> list[Problem]:
    where = f"{place.url}/{entry.name}"
    return [Problem(path=where, what=what, feature=name, shard=entry.shard) for name in entry.features]


def _recorded_digests(data: bytes | None, manifest: Manifest, array: str) -> Iterator[str]:
    """The shards' SHA-256 from a `SHA256SUMS` file, one by one; '' where a line is not as it must be."""
    ndim = None if manifest.format == "wds" else len(manifest.arrays[array][1])
    lines = iter(data.splitlines(keepends=True)) if data is not None else iter(())
    for shard, line in enumerate(lines):
        name = wds.tar_name(shard) if ndim is None else shard_name(shard, ndim)
        yield line[:64].decode("ascii", "replace") if line[64:] == f"  {name}\n".encode() else ""


def sampled(
    manifest: Manifest, array: str, blocks: list[ShardBlocks] | None, fraction: float, seed: int
) -> dict[int, list[int] | None]:
    """Shard -> its blocks to read (None: the whole shard) of a sample of an array.

    A function of the seed, the array and the number of its blocks (or shards) alone.
    """
    draw = random.Random(f"{seed}/{array}")
    if blocks is None:
        n = manifest.n_shards
        return dict.fromkeys(draw.sample(range(n), math.ceil(fraction * n)))
    firsts = np.cumsum([0, *(n_blocks(shard.n_bytes) for shard in blocks)])
    total = int(firsts[-1])
    found: dict[int, list[int] | None] = {}
    for index in sorted(draw.sample(range(total), math.ceil(fraction * total))):
        shard = int(np.searchsorted(firsts, index, side="right")) - 1
        of_shard = found.setdefault(shard, [])
        assert of_shard is not None
        of_shard.append(index - int(firsts[shard]))
    return found


def _looks_unchanged(path: Path, entry: ShardFileEntry, ledger: Ledger) -> bool:
    try:
        status = files.inside(path, entry.name).lstat()
    except (OSError, CacheError):
        return False
    return stat.S_ISREG(status.st_mode) and ledger.unchanged(entry.shard, status)


@dataclass(frozen=True, slots=True)
class _Job:
    """One shard to check. `parts`: numbers of the blocks to read, None for all. most_bytes: more it cannot have.

    With `parts` empty only that it is a file, of the right length, is checked.
    """

    place: Location
    entry: ShardFileEntry
    digest: str | None
    blocks: ShardBlocks | None
    parts: list[int] | None
    most_bytes: int


@dataclass(frozen=True, slots=True)
class _Result:
    what: str | None
    n_bytes: int
    mark: bytes = b""
    sha256: str = ""


def _check_shard(job: _Job) -> _Result:
    name = job.entry.name
    try:
        if not isinstance(job.place, LocalLocation):
            return _compared(job, _RemoteShard(job.place, name, job.place.size(name)))
        with job.place.open(name) as file:
            return _compared(job, _LocalShard(file.fileno()))
    except (Unreadable, DamagedSource) as error:
        return _Result(f"missing or unreadable: {error.what}", 0)
    except Missing:
        return _Result("missing or unreadable", 0)
    except OSError as error:
        if files.not_the_file(error):
            raise files.explain(error, Path(job.place.address) / name, "read") from error
        return _Result("missing or unreadable", 0)


class _LocalShard:
    """An open file, read once."""

    def __init__(self, fd: int) -> None:
        self._fd, self._status = fd, os.fstat(fd)
        self.n_bytes = self._status.st_size

    def pieces(self) -> Iterator[memoryview]:
        view = memoryview(bytearray(BLOCK_BYTES))
        while n := os.readv(self._fd, [view]):
            yield view[:n]

    def read(self, start: int, stop: int) -> bytes:
        return os.pread(self._fd, stop - start, start)

    def mark(self) -> bytes:
        """How the file looks, empty if it changed while it was read."""
        return identity(self._status) if identity(os.fstat(self._fd)) == identity(self._status) else b""


class _RemoteShard:
    """A file elsewhere."""

    def __init__(self, place: Location, name: str, n_bytes: int) -> None:
        self._place, self._name, self.n_bytes = place, name, n_bytes

    def pieces(self) -> Iterator[memoryview]:
        return map(memoryview, self._place.chunks(self._name, 0, self.n_bytes))

    def read(self, start: int, stop: int) -> bytes:
        return self._place.read(self._name, start, stop)

    def mark(self) -> bytes:
        return b""


def _compared(job: _Job, shard: _LocalShard | _RemoteShard) -> _Result:
    length = job.entry.n_bytes if job.blocks is None else job.blocks.n_bytes
    if length is not None and shard.n_bytes != length:
        return _Result(f"has {shard.n_bytes} bytes instead of {length}", 0)
    if shard.n_bytes > job.most_bytes:
        return _Result(f"has {shard.n_bytes} bytes, more than its samples can take", 0)
    if job.parts == []:
        return _Result(None, 0)
    if job.parts is not None and job.blocks is not None:
        return _check_blocks(shard, job.parts, job.blocks)
    hasher = files.Hasher()
    for piece in shard.pieces():
        hasher.update(piece)
    found, what = hasher.result(), None
    if job.digest not in (None, found.sha256):
        what = "its bytes do not match the recorded SHA-256"
    elif job.blocks not in (None, found.blocks):
        what = "its bytes do not match the recorded hashes of its blocks"
    return _Result(what, shard.n_bytes, shard.mark(), found.sha256)


def _check_blocks(shard: _LocalShard | _RemoteShard, parts: list[int], blocks: ShardBlocks) -> _Result:
    n_bytes = 0
    for index in parts:
        data = shard.read(index * BLOCK_BYTES, min(shard.n_bytes, (index + 1) * BLOCK_BYTES))
        n_bytes += len(data)
        try:
            check_block(blocks, index, data, "")
        except CacheError:
            return _Result(f"its block {index} does not match the recorded hash", n_bytes)
    return _Result(None, n_bytes)


def _mapped(pool: ThreadPoolExecutor, work: Callable[[T], R], jobs: Iterable[T], ahead: int) -> Iterator[tuple[T, R]]:
    """(job, result) in order, with at most `ahead` jobs under way or waiting."""
    waiting: deque[tuple[T, Future[R]]] = deque()
    try:
        for job in jobs:
            waiting.append((job, pool.submit(work, job)))
            if len(waiting) >= ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def _equals(place: Location, name: str, content: bytes) -> bool:
    try:
        return place.read_whole(name, len(content))[0] == content
    except (Missing, Unreadable):
        return False


def _unexpected(path: Path, manifest: Manifest, limit: int) -> list[Problem]:
    """Files among the shards that no builder of this cache put there; temporary files of a builder are none of them."""
    names = OwnNames.of(manifest)
    folders = [""] if manifest.format == "wds" else sorted(manifest.arrays)
    found: list[Problem] = []
    for folder in folders:
        try:
            entries = os.scandir(files.inside(path, folder))
        except (OSError, CacheError):
            continue  # its shards are reported
        with entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False) or names.owns(folder, entry.name):
                    continue
                if manifest.format == "wds" and ".tar" not in entry.name:
                    continue
                if len(found) >= limit:
                    return found
                found.append(Problem(path=str(path / folder / entry.name), what="does not belong here"))
    return found


def inconsistencies(cache: Cache, where: str) -> list[Problem]:
    """Labels against classes and skipped slots, keys unique and readable. In pieces; 8 bytes per key are kept."""
    manifest = cache.manifest
    count, piece = manifest.dataset.count, 1 << 14
    skipped = np.zeros(0, np.int64) if not manifest.skipped else np.array([s.slot for s in manifest.skipped])
    problems: list[Problem] = []

    def problem(feature: str, what: str) -> None:
        if len(problems) < MAX_PROBLEMS:
            problems.append(Problem(path=f"{where}/{feature}", what=what))

    if "label" in manifest.features:
        n_classes = len(manifest.dataset.class_names)
        dtype, shape = manifest.arrays["label"]
        if math.prod(shape) != 1 or dtype.kind not in "iu":
            problem("label", f"labels are {dtype} {list(shape)}, not one integer per sample")
            return problems
        with cache.reader(["label"], slots=True) as reader:
            for start in range(0, count, piece):
                out = reader.allocate(min(piece, count - start))
                reader.read(np.arange(start, start + len(out["label"])), out)
                labels = out["label"].reshape(len(out["label"]), -1)[:, 0].astype(np.int64)
                hole = np.isin(np.arange(start, start + len(labels)), skipped)
                for row in np.flatnonzero((labels < -1) | (labels >= n_classes) | ((labels == -1) != hole))[:1]:
                    what = f"label {labels[row]} in slot {start + row} ({n_classes} classes"
                    problem("label", what + (", skipped)" if hole[row] else ")"))
    if "key" in manifest.features:
        length = sample_bytes(*manifest.arrays["key"])
        if length > _MAX_KEY_BYTES:
            problem("key", f"keys of {length} bytes are no paths")
            return problems
        hashes = compact("Q")
        piece = max(1, min(piece, _PIECE_BYTES // length))
        for start in range(0, len(cache), piece):
            for key in cache.keys(start, start + piece):
                hashes.append(int.from_bytes(hashlib.sha256(key_bytes(key)).digest()[:8], "little"))
                if not key:
                    problem("key", "a sample's key is empty")
        if len(np.unique(np.frombuffer(hashes, np.uint64) if hashes else [])) != len(hashes):
            problem("key", "two samples have the same key")
    return problems


def repair_metadata(path: str | Path) -> list[str]:
    """Rewrite those metadata and checksum files that can be had again from the manifest and intact shards.

    Returns the names of the files rewritten. What then remains in `verify(path).damaged` must be encoded again.
    """
    path = Path(path)
    rewritten = []

    def write(name: str, content: bytes) -> None:
        target = files.inside(path, name)
        files.make_directory(target.parent)
        files.atomic_write(target, [content])
        rewritten.append(name)

    # Outside the lock, which builders need for moments: this may read all of a cache.
    manifest = read_root(path)
    made = {name: data for array in arrays_with_files(manifest) for name, data in _made_again(path, manifest, array)}
    with cache_lock(path):
        manifest = read_root(path)
        clear_parts(path, manifest, manifest.features)
        for name, content in metadata_files(manifest).items():
            if not _equals(LocalLocation(path), name, content):
                write(name, content)
        for array in arrays_with_files(manifest):
            for name, sha256 in _lost(path, checksum_files(manifest, array)).items():
                if name in made and hashlib.sha256(made[name]).hexdigest() == sha256:
                    write(name, made[name])
    return rewritten


def _made_again(path: Path, manifest: Manifest, array: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of an array's damaged checksum files, where its shards still give what the manifest names."""
    lost = _lost(path, checksum_files(manifest, array))
    if not lost:
        return
    entries = list(array_files(manifest, array))
    try:
        found = [files.hashes_of(files.inside(path, entry.name)) for entry in entries]
    except CacheError:
        return
    made = {
        checksums_path(manifest, array): checksums_text([h.sha256 for h in found], shard_names(manifest, array)),
        blocks_path(manifest, array): blocks_bytes([hashes.blocks for hashes in found]),
    }
    for name, sha256 in lost.items():
        if hashlib.sha256(made[name]).hexdigest() == sha256:
            yield name, made[name]


def _lost(path: Path, names: Iterable[tuple[str, str, int]]) -> dict[str, str]:
    """Name -> SHA-256 of those of some files that are missing or damaged."""
    lost = {}
    for name, sha256, limit in names:
        try:
            data = files.read_bounded(files.inside(path, name), limit)
        except CacheError:
            data = None
        if data is None or hashlib.sha256(data).hexdigest() != sha256:
            lost[name] = sha256
    return lost
