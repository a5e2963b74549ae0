"""Is every byte of a cache what its builder wrote, and do the samples make sense together?

In constant memory, whatever the manifest claims: shards are named one by one, few are under way at a time, and after
`MAX_PROBLEMS` the rest is not looked at. Only regular files are opened, none through a link.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import random
import stat
import time
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
from featcache.reader import Cache, open_cache
from featcache.store import files, wds
from featcache.store.blocks import (
    BLOCK_BYTES,
    BlockHasher,
    ShardBlocks,
    blocks_bytes,
    blocks_limit,
    blocks_path,
    check_block,
    n_blocks,
    parse_blocks,
)
from featcache.store.layout import (
    ROOT_METADATA,
    ROOT_NAMES,
    SCALE_SUFFIX,
    STATE,
    canonical_json,
    index_bytes,
    sample_bytes,
    shard_name,
    shard_samples,
)
from featcache.store.ledger import Ledger, identity
from featcache.store.manifest import MAX_METADATA_BYTES, Manifest
from featcache.store.names import OwnNames
from featcache.store.root import cache_digest, find_root, node_metadata, parse_root, read_root, root_bytes
from featcache.store.writer import (
    cache_lock,
    checksums_path,
    checksums_text,
    clear_parts,
)

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
    """Every shard file of the cache (or of some features), by name relative to the cache, one by one."""
    if not manifest.features:
        return
    for array in arrays_with_files(manifest, features):
        yield from array_files(manifest, array)


def arrays_with_files(manifest: Manifest, features: Iterable[str] | None = None) -> list[str]:
    """The arrays whose shard files are separate: in a cache of tars one stands for all."""
    if manifest.format == "wds":
        return sorted(manifest.arrays)[:1]
    wanted = manifest.features if features is None else set(features)
    return [array for feature in sorted(wanted) for array in manifest.features[feature].arrays]


def array_files(manifest: Manifest, array: str, shards: Iterable[int] | None = None) -> Iterator[ShardFileEntry]:
    """The shard files of one array, or some of them."""
    count, size = manifest.dataset.count, manifest.shard_size
    numbers = range(manifest.n_shards) if shards is None else shards
    if manifest.format == "wds":
        layout, every = wds.tar_layout(manifest), tuple(sorted(manifest.features))
        for shard in numbers:
            yield ShardFileEntry(
                wds.tar_name(shard), every, array, shard, layout.tar_bytes(shard_samples(count, size, shard))
            )
        return
    dtype, shape = manifest.arrays[array]
    feature = array.removesuffix(SCALE_SUFFIX)
    length = sample_bytes(dtype, shape)
    for shard in numbers:
        whole = shard_samples(count, size, shard) * length + index_bytes(size)
        n_bytes = whole if manifest.compressor is None else None
        yield ShardFileEntry(f"{array}/{shard_name(shard, len(shape))}", (feature,), array, shard, n_bytes)


def metadata_files(manifest: Manifest) -> dict[str, bytes]:
    """Name -> exact content of every file that follows from the manifest alone, the root document last."""
    nodes = node_metadata(manifest) if manifest.format == "zarr" else {}
    found = {f"{node}/{ROOT_METADATA}": canonical_json(content) for node, content in nodes.items()}
    found[ROOT_NAMES[manifest.format]] = root_bytes(manifest)
    return found


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
    progress: Callable[[int], None] | None = None,
    fraction: float | None = None,
    seed: int | None = None,
    since_last: bool = False,
    remember: bool = False,
) -> Report:
    """Check a local cache: every file's bytes against recorded checksums, then labels, keys and skipped
    slots.

    features: check only these. threads: default one a core. progress: called with the bytes of each checked
    file.

    fraction: read only this part of the bytes, drawn at random with `seed` (default: a fresh one): blocks of 1 MiB where
    their hashes are recorded, else whole shards. Metadata are checked whole, labels and keys then not. since_last: skip
    shards that an earlier call with `remember` found sound and whose size, times and inode are as they were then.
    remember: keep note of sound shards for that in the cache's state folder (where it can be written).

    What a builder, a removal or a restoration publishes meanwhile is taken into account: before problems are reported
    the root document is read again, and where it has changed, what changed is checked again.

    Raises `CacheError` only if there is no cache at `path` (any more), it lacks one of `features`, or changes again and
    again; whatever is wrong inside one is in the report.
    """
    path = Path(path)
    if fraction is not None and seed is None:
        seed = fresh_seed()
    plan = _Plan(fraction, seed, since_last, remember, threads or os.cpu_count() or 1, progress)
    checked = _Checked()
    previous: Manifest | None = None
    for _ in range(_ATTEMPTS):
        with _opened_root(path) as root:
            try:
                manifest = root.manifest()
            except CacheError as error:
                if _unchanged(path, root):
                    problem = Problem(path=str(root.path), what=error.what)
                    return Report(path=str(path), problems=(problem,), n_files=1, n_bytes=0)
                continue
            missing = [name for name in features or () if name not in manifest.features]
            if missing:
                have = ", ".join(sorted(manifest.features)) or "nothing"
                raise CacheError(f"{path} does not hold {', '.join(missing)}", remedy=f"it holds {have}")
            every = arrays_with_files(manifest, features)
            again = [array for array in every if _must_check(array, manifest, previous, checked)]
            checked.problems.clear()
            _check(path, manifest, root.data, again, plan, checked)
            if fraction is None and not checked.problems:
                checked.problems += _inconsistencies(path)
            if not checked.problems or _unchanged(path, root):
                return checked.report(path, manifest, plan)
            previous = manifest
    raise CacheError(
        f"{path} changed {_ATTEMPTS} times while it was checked",
        remedy="run it again when no build or removal is under way",
    )


@dataclass(frozen=True)
class _Plan:
    """How to check."""

    fraction: float | None
    seed: int | None
    since_last: bool
    remember: bool
    threads: int
    progress: Callable[[int], None] | None


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

    def report(self, path: Path, manifest: Manifest, plan: _Plan) -> Report:
        problems = sorted(self.problems, key=lambda p: (p.path, p.what, p.feature or ""))
        if self.full:
            problems.append(Problem(path=str(path), what=f"{len(problems)} problems: the rest was not checked"))
        counts = [found for array, found in self.arrays.items() if array in manifest.arrays]
        return Report(
            path=str(path),
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
    with contextlib.suppress(OSError, CacheError):
        lock = os.open(files.inside(path, f"{STATE}/lock"), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            _wait_for_publisher(lock)
        finally:
            os.close(lock)
    if find_root(path) is None:
        read_root(path)
    return root.is_current()


def _wait_for_publisher(lock: int) -> None:
    deadline = time.monotonic() + _PUBLISHING_S
    while time.monotonic() < deadline:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            return  # a file system without such locks


def _inconsistencies(path: Path) -> list[Problem]:
    try:
        return inconsistencies(open_cache(path), str(path))
    except CacheError as error:
        return [Problem(path=str(path), what=error.what)]


def _must_check(array: str, manifest: Manifest, previous: Manifest | None, checked: _Checked) -> bool:
    """Whether an array was not yet found sound as it now is."""
    if previous is None or array in checked.bad or array not in checked.arrays:
        return True
    frames = [(m.dataset, m.shard_size, m.format, m.compressor) for m in (manifest, previous)]
    digests = [(m.checksums.get(array), m.blocks.get(array)) for m in (manifest, previous)]
    return frames[0] != frames[1] or digests[0] != digests[1]


def _check(
    path: Path, manifest: Manifest, root: bytes, arrays: Collection[str], plan: _Plan, checked: _Checked
) -> None:
    """Check metadata and the shards of `arrays`; what is found goes into `checked`."""
    n_files = n_bytes = 0
    for name, content in metadata_files(manifest).items():
        n_files, n_bytes = n_files + 1, n_bytes + len(content)
        same = root == content if name == ROOT_NAMES[manifest.format] else _equals(path, name, content)
        if not same:
            checked.problems.append(Problem(path=str(path / name), what="missing, or not as the manifest says"))
    with ThreadPoolExecutor(plan.threads) as pool:
        for array in arrays:
            if checked.full:
                break
            n_bytes += _check_array(path, manifest, array, plan, checked, pool)
    checked.metadata = (n_files, n_bytes)
    checked.problems += _unexpected(path, manifest, MAX_PROBLEMS - len(checked.problems))


def _check_array(
    path: Path, manifest: Manifest, array: str, plan: _Plan, checked: _Checked, pool: ThreadPoolExecutor
) -> int:
    """Check one array's (or the tars') checksum files and shards; returns the bytes of the checksum files."""
    before = len(checked.problems)
    recorded = _small_file(path, checksums_path(manifest, array), manifest.n_shards * 160, checked.problems)
    if recorded is not None and hashlib.sha256(recorded).hexdigest() != manifest.checksums[array]:
        what = "is damaged: it is not the file that the manifest names"
        checked.problems.append(Problem(path=str(path / checksums_path(manifest, array)), what=what))
        recorded = None
    elif recorded is not None and recorded.count(b"\n") != manifest.n_shards:
        what = f"does not list the {manifest.n_shards} shards"
        checked.problems.append(Problem(path=str(path / checksums_path(manifest, array)), what=what))
    blocks: list[ShardBlocks] | None = None
    n_bytes = len(recorded or b"")
    if array in manifest.blocks:
        where = blocks_path(manifest, array)
        data = _small_file(path, where, blocks_limit(manifest, array), checked.problems)
        n_bytes += len(data or b"")
        try:
            blocks = None if data is None else parse_blocks(data, manifest, array, where)
        except CacheError as error:
            checked.problems.append(Problem(path=str(path / where), what=error.what))
    ledger = Ledger(path, array, manifest.checksums[array], manifest.n_shards)
    parts = None
    if plan.fraction is not None and plan.seed is not None:
        parts = sampled(manifest, array, blocks, plan.fraction, plan.seed)
    most_bytes = _most_bytes(manifest, array)
    # Without any record: all of them together may still be what the manifest stands for.
    untold = _Untold(manifest, array) if recorded is None and blocks is None and parts is None else None
    n_files = n_read = n_unread = 0

    def jobs() -> Iterator[_Job]:
        nonlocal n_unread
        digests = _recorded_digests(recorded, manifest, array)
        chosen = range(manifest.n_shards) if parts is None else sorted(parts)
        position = 0
        for entry in array_files(manifest, array, chosen):
            if checked.full:
                return
            lost = None if recorded is None else ""
            digest = next((d for d in digests if (position := position + 1) > entry.shard), lost)
            if plan.since_last and _looks_unchanged(path, entry, ledger):
                n_unread += 1
                continue
            of_shard = None if blocks is None else blocks[entry.shard]
            yield _Job(path, entry, digest, of_shard, None if parts is None else parts[entry.shard], most_bytes)

    for job, result in _mapped(pool, _check_shard, jobs(), 4 * plan.threads):
        n_files, n_read = n_files + 1, n_read + result.n_bytes
        if result.what is not None:
            checked.problems += _problems(path, job.entry, result.what)
        elif untold is not None:
            untold.add(job.entry, result.sha256)
        if plan.remember and (result.what is not None or job.parts is None):
            ledger.note(job.entry.shard, result.mark if recorded is not None and result.what is None else b"")
        if plan.progress is not None:
            plan.progress(result.n_bytes)
    if untold is not None:
        checked.problems += untold.problems(path, MAX_PROBLEMS - len(checked.problems))
    if plan.remember:
        ledger.save()
    if parts is not None:
        n_unread = manifest.n_shards - len(parts)
    checked.arrays[array] = (n_files, n_read, n_unread)
    (checked.bad.add if len(checked.problems) > before else checked.bad.discard)(array)
    return n_bytes


def _most_bytes(manifest: Manifest, array: str) -> int:
    """The longest that a shard file can be, compressed samples included: those that do not compress grow a little."""
    entry = next(array_files(manifest, array))
    if entry.n_bytes is not None:
        return entry.n_bytes
    length = sample_bytes(*manifest.arrays[array])
    n = shard_samples(manifest.dataset.count, manifest.shard_size, 0)
    return n * (length + length // 128 + 1024) + index_bytes(manifest.shard_size)


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

    def problems(self, path: Path, limit: int) -> list[Problem]:
        """None if their checksums are together the ones that the manifest stands for."""
        whole = len(self._shards) == self._manifest.n_shards
        if whole and self._digest.hexdigest() == self._manifest.checksums[self._array]:
            return []
        what = "cannot be told sound from damaged: its checksum is lost"
        entries = array_files(self._manifest, self._array, self._shards)
        return [problem for entry in entries for problem in _problems(path, entry, what)][:limit]


def _problems(path: Path, entry: ShardFileEntry, what: str) -> list[Problem]:
    where = str(path / entry.name)
    return [Problem(path=where, what=what, feature=name, shard=entry.shard) for name in entry.features]


def _small_file(path: Path, name: str, limit: int, problems: list[Problem]) -> bytes | None:
    try:
        return files.read_bounded(files.inside(path, name), limit)
    except CacheError as error:
        problems.append(Problem(path=str(path / name), what=error.what))
        return None


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
    """One shard to check. `parts`: numbers of the blocks to read, None for all. most_bytes: more it cannot have."""

    path: Path
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
    entry = job.entry
    try:
        fd = os.open(files.inside(job.path, entry.name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except CacheError as error:
        return _Result(error.what, 0)
    except OSError:
        return _Result("missing or unreadable", 0)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return _Result("missing or unreadable: it is not a file", 0)
        length = entry.n_bytes if job.blocks is None else job.blocks.n_bytes
        if length is not None and status.st_size != length:
            return _Result(f"has {status.st_size} bytes instead of {length}", 0)
        if status.st_size > job.most_bytes:
            return _Result(f"has {status.st_size} bytes, more than its samples can take", 0)
        if job.parts is not None and job.blocks is not None:
            return _check_blocks(fd, job)
        digest, blocks = _hashes(fd, job.blocks is not None)
        what = _shard_problem(entry, digest, status.st_size, job.digest)
        if what is None and blocks != job.blocks:
            what = "its bytes do not match the recorded hashes of its blocks"
        mark = identity(status)
        return _Result(what, status.st_size, mark if identity(os.fstat(fd)) == mark else b"", digest)
    except OSError:
        return _Result("missing or unreadable", 0)
    finally:
        os.close(fd)


def _check_blocks(fd: int, job: _Job) -> _Result:
    assert job.blocks is not None
    n_bytes = 0
    for index in job.parts or ():
        data = os.pread(fd, BLOCK_BYTES, index * BLOCK_BYTES)
        n_bytes += len(data)
        try:
            check_block(job.blocks, index, data, job.entry.name)
        except CacheError:
            return _Result(f"its block {index} does not match the recorded hash", n_bytes)
    return _Result(None, n_bytes)


def _hashes(fd: int, with_blocks: bool) -> tuple[str, ShardBlocks | None]:
    """SHA-256 (hex) of an open file and, if asked for, the hashes of its blocks: read once, in constant memory."""
    digest, blocks = hashlib.sha256(), BlockHasher() if with_blocks else None
    buffer = bytearray(BLOCK_BYTES)
    view = memoryview(buffer)
    while n := os.readv(fd, [buffer]):
        digest.update(view[:n])
        if blocks is not None:
            blocks.update(view[:n])
    return digest.hexdigest(), None if blocks is None else blocks.result()


def _mapped(pool: ThreadPoolExecutor, work: Callable[[T], R], jobs: Iterable[T], ahead: int) -> Iterator[tuple[T, R]]:
    """(job, result) in order, with at most `ahead` jobs under way or waiting."""
    waiting: deque[tuple[T, Future[R]]] = deque()
    for job in jobs:
        waiting.append((job, pool.submit(work, job)))
        if len(waiting) >= ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()


def _equals(path: Path, name: str, content: bytes) -> bool:
    try:
        return files.read_bounded(files.inside(path, name), len(content)) == content
    except CacheError:
        return False


def shard_problem(entry: ShardFileEntry, digest: str | None, length: int, recorded: list[str] | None) -> str | None:
    """What is wrong with a shard file, None if nothing is.

    digest: SHA-256 (hex) of its bytes, None if it could not be read. length: its bytes. recorded: digests of the
    array's shards by number; None, if they are lost, leaves the length to go by.
    """
    return _shard_problem(entry, digest, length, None if recorded is None else recorded[entry.shard])


def _shard_problem(entry: ShardFileEntry, digest: str | None, length: int, expected: str | None) -> str | None:
    if digest is None:
        return "missing or unreadable"
    if entry.n_bytes is not None and length != entry.n_bytes:
        return f"has {length} bytes instead of {entry.n_bytes}"
    if expected is not None and digest != expected:
        return "its bytes do not match the recorded SHA-256"
    return None


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
    """Labels against classes and skipped slots, keys unique and readable. In pieces; 8 bytes a key are
    kept.
    """
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
            problem("label", f"labels are {dtype} {list(shape)}, not one integer a sample")
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

    Returns the names of the files rewritten. What then remains in `verify(path).damaged` must be encoded
    again.
    """
    path = Path(path)
    rewritten = []

    def write(name: str, content: bytes) -> None:
        target = files.inside(path, name)
        files.make_directory(target.parent)
        files.atomic_write(target, [content])
        rewritten.append(name)

    with cache_lock(path):
        manifest = read_root(path)
        clear_parts(path, manifest, manifest.features)
        for name, content in metadata_files(manifest).items():
            if not _equals(path, name, content):
                write(name, content)
        for array in arrays_with_files(manifest):
            for name, content in _lost_hashes(path, manifest, array).items():
                write(name, content)
    return rewritten


def _lost_hashes(path: Path, manifest: Manifest, array: str) -> dict[str, bytes]:
    """Name -> content of an array's damaged checksum files, where its shards still give what the manifest names."""
    lost: dict[str, str] = {}
    for name, digest, limit in (
        (checksums_path(manifest, array), manifest.checksums[array], manifest.n_shards * 160),
        *(
            [(blocks_path(manifest, array), manifest.blocks[array], blocks_limit(manifest, array))]
            if array in manifest.blocks
            else []
        ),
    ):
        data = _small_file(path, name, limit, [])
        if data is None or hashlib.sha256(data).hexdigest() != digest:
            lost[name] = digest
    if not lost:
        return {}
    digests, blocks = [], []
    for entry in array_files(manifest, array):
        try:
            fd = os.open(files.inside(path, entry.name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (OSError, CacheError):
            return {}
        with os.fdopen(fd, "rb"):
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return {}
            digest, of_shard = _hashes(fd, True)
        digests.append(digest)
        blocks.append(of_shard or ShardBlocks(0, b""))
    folder = checksums_path(manifest, array).rpartition("/")[0]
    names = [entry.name.removeprefix(f"{folder}/") for entry in array_files(manifest, array)]
    made = {
        checksums_path(manifest, array): checksums_text(digests, names),
        blocks_path(manifest, array): blocks_bytes(blocks),
    }
    return {n: made[n] for n, digest in lost.items() if hashlib.sha256(made[n]).hexdigest() == digest}
