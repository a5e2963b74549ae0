"""Reading a cache: batches of stored bytes by index, straight into the caller's buffers. No torch, no zarr.

An uncompressed shard holds its samples back to back, so a sample is one `preadv` from a known offset into
the row of the batch where it belongs; neighbours merge into one call. Threads work because the call lets go
of the interpreter lock. What is kept in memory is per shard, never per sample.
"""

from __future__ import annotations

import itertools
import math
import operator
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from featcache.errors import CacheError
from featcache.keys import key_text
from featcache.read.captions import has_captions
from featcache.read.order import epoch_order, sequential_order
from featcache.store.backends import Backend, ShardFile, StridedShard
from featcache.store.layout import sample_bytes
from featcache.store.manifest import FeatureSpec, Manifest

if TYPE_CHECKING:
    from featcache.read.decoded import Decoder

__all__ = ["Cache", "Reader", "epoch_order", "sequential_order"]

_MAX_IOV = 512  # Linux takes 1024 buffers per call
_PIECE = 1 << 18
_TOGETHER = 32  # samples that an iteration reads at a time
_SMALL_BYTES = 16 << 10
_PAGE_BYTES = 4096
_LABEL, _KEY = "label", "key"


def _descriptor_budget() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(2048, soft // 2))


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    n_bytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(n_bytes + _PAGE_BYTES, np.uint8)
    start = -buffer.ctypes.data % _PAGE_BYTES
    return buffer[start : start + n_bytes].view(dtype).reshape(shape)


def _physical_memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class _OpenShards:
    """The most recently used open shards, bounded in number."""

    def __init__(self, backend: Backend, limit: int, n_files: int, mapped: bool = False) -> None:
        self._backend, self._limit, self._mapped = backend, limit, mapped
        self._all = n_files <= limit
        self._open: OrderedDict[tuple[str, int], ShardFile] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, array: str, shard: int) -> ShardFile:
        key = (array, shard)
        if self._all:  # nothing is ever dropped, so there is no order to keep
            found = self._open.get(key)
            if found is not None:
                return found
        with self._lock:
            found = self._open.get(key)
            if found is not None:
                self._open.move_to_end(key)
                return found
        opened = self._backend.open_shard(array, shard)
        if self._mapped and isinstance(opened, StridedShard):
            opened.map()
        with self._lock:
            self._open[key] = opened
            while len(self._open) > self._limit:
                self._open.popitem(last=False)
        return opened


class Cache:
    """An open cache: a sequence of samples, with their labels, keys and what is known of them.

    `cache[i]` is one sample, `cache[i:j]` or `cache[[i, j, ...]]` several: a dictionary of numpy arrays by the feature's
    name, decoded (`read` takes other dtypes and fewer features). Samples are numbered without the skipped slots. It can be
    pickled, and used in processes that are forked or spawned.

    Args:
        reopen: what opens this cache in another process.
    """

    def __init__(
        self, path: str, manifest: Manifest, backend: Backend, *, reopen: Callable[[], Cache] | None = None
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.backend = backend
        self._reopen = reopen
        self._decoders: dict[tuple[object, ...], Decoder] = {}
        self._skipped = np.array([entry.slot for entry in manifest.skipped], np.int64)
        # Number of samples before each skipped slot: sample i lies after k skipped slots if k of these are <= i.
        self._before = self._skipped - np.arange(len(self._skipped))

    def __len__(self) -> int:
        return self.manifest.dataset.count - len(self._skipped)

    def __repr__(self) -> str:
        return f"Cache({self.path!r}, {len(self)} samples, {sorted(self.manifest.features)})"

    def _repr_html_(self) -> str:
        """A table, for notebooks."""
        from featcache.read.table import as_html

        return as_html(self)

    def __reduce__(self) -> tuple[Callable[[], Cache], tuple[()]]:
        return self.reopened, ()

    @property
    def reopened(self) -> Callable[[], Cache]:
        """Opens the same cache anew: in a process that was forked or spawned, say."""
        if self._reopen is None:
            raise CacheError(f"{self.path} cannot be opened in another process", remedy="Open it by featcache.open.")
        return self._reopen

    @property
    def features(self) -> Mapping[str, FeatureSpec]:
        """What is stored for each sample, by name: shapes, codecs, where it comes from."""
        return self.manifest.features

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes: `classes[label]`."""
        return self.manifest.dataset.class_names

    @overload
    def __getitem__(self, key: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, key: slice | Sequence[int] | np.ndarray) -> dict[str, Any]: ...

    def __getitem__(self, key: int | slice | Sequence[int] | np.ndarray) -> dict[str, Any]:
        if isinstance(key, slice):
            return self.read(range(*key.indices(len(self))))
        if not isinstance(key, (int, np.integer)):
            return self.read(key)
        index = operator.index(key)
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} is outside the cache's {len(self)} samples")
        sample = self.read([index % len(self)])
        return {name: values[0] for name, values in sample.items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), _TOGETHER):
            samples = self[start : start + _TOGETHER]
            yield from (dict(zip(samples, row)) for row in zip(*samples.values()))

    def read(
        self,
        indices: Sequence[int] | np.ndarray,
        features: Sequence[str] | None = None,
        *,
        dtype: Any = np.float32,
        view: int = 0,
    ) -> dict[str, Any]:
        """Samples by their indices: feature -> `[len(indices), *shape]`, in the order asked for.

        For a training loop use `featcache.torch.Loader` or `featcache.torch.Dataset`, which are made for it.

        Args:
            indices: sample indices, or a mask (bool `[len(cache)]`).
            features: names; default all but `content`, the images' hashes.
            dtype: a floating dtype of numpy, or of torch, which returns tensors; integers stay what they are, and
                keys become `str`. None: numpy arrays of the bytes that are stored, by the arrays' names.
            view: 1 takes the mirrored images of a cache that holds them.

        Raises:
            CacheError: an index outside the cache, a feature that it lacks, a damaged shard. UserError: another dtype.
        """
        from featcache.read.decoded import Decoder, read_samples

        chosen = np.asarray(indices)
        if chosen.dtype == bool:
            if chosen.shape != (len(self),):
                raise CacheError(f"the mask is {chosen.shape}, but the cache has {len(self)} samples")
            chosen = np.flatnonzero(chosen)
        if chosen.ndim != 1 or (chosen.size and chosen.dtype.kind not in "iu"):
            raise CacheError("samples are chosen by a list of whole numbers, or by a mask")
        names = tuple(name for name in self.features if name != "content") if features is None else tuple(features)
        # In a forked process another's threads are gone, so its decoders are of no use.
        of = (os.getpid(), *names)
        if of not in self._decoders:
            self._decoders[of] = Decoder(self, names)
        return read_samples(self._decoders[of], chosen, dtype, view)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the dataset and its skipped slots; the same after features are added."""
        return self.manifest.fingerprint

    def slots(self, indices: np.ndarray | Sequence[int]) -> np.ndarray:
        """Slots (int64) of sample indices; raises `CacheError` for an index outside the cache."""
        indices = np.asarray(indices, np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise CacheError(f"sample {indices.min()} or {indices.max()} is outside the cache's {len(self)} samples")
        if not len(self._before):
            return indices
        return indices + np.searchsorted(self._before, indices, side="right")

    def require(self, names: Sequence[str]) -> None:
        """Raises `CacheError` naming those of `names` that the cache lacks."""
        missing = [name for name in names if name not in self.manifest.features]
        if missing:
            have = ", ".join(sorted(self.manifest.features)) or "nothing"
            raise CacheError(f"the cache {self.path} does not hold {', '.join(missing)}", remedy=f"it holds {have}")

    def labels(self) -> np.ndarray:
        """Labels int64 `[len(cache)]`, in sample order."""
        return self._whole(_LABEL)

    def content(self) -> np.ndarray:
        """First 8 bytes of each source file's SHA-256 as uint64 `[len(cache)]`."""
        return self._whole("content")

    def _whole(self, name: str) -> np.ndarray:
        self.require([name])
        dtype, shape = self.manifest.arrays[name]
        try:
            whole = np.empty((len(self), *shape), dtype)
        except MemoryError as error:
            raise CacheError(f"{name!r} of {len(self)} samples does not fit into memory") from error
        with self.reader([name]) as reader:
            for start in range(0, len(self), _PIECE):
                piece = whole[start : start + _PIECE]
                reader.read(np.arange(start, start + len(piece)), {name: piece})
        return whole

    def keys(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Keys (source paths) of the samples `start` to `stop`, as `featcache.keys` describes them."""
        stop = len(self) if stop is None else min(stop, len(self))
        with self.reader([_KEY]) as reader:
            out = reader.allocate(max(0, stop - start))
            reader.read(np.arange(start, stop), out)
        return [key_text(bytes(row)) for row in out[_KEY]]

    def reader(
        self,
        features: Sequence[str],
        *,
        threads: int | None = None,
        single_view: bool = False,
        single_caption: bool = False,
        slots: bool = False,
        access: str = "auto",
    ) -> Reader:
        """A reader of these features. `threads`: default one per core, at most 8; 0 reads in the calling thread.

        single_view: drop the view axis of flipped caches; `read` then takes the view of each sample and
        moves only its bytes. single_caption: the same with the caption axis of text features
        (`featcache.read.captions.one_caption` says what is left). slots: indices count slots, skipped ones
        (zeros, label -1) included. access: 'pread', 'mmap', or 'auto': mapped where the features fit into half the
        memory. A mapped file that another program cuts short ends the process (SIGBUS): choose 'pread' where that
        may happen (featcache itself never does it).
        """
        self.require(features)
        return Reader(
            self,
            features,
            threads=threads,
            single_view=single_view,
            single_caption=single_caption,
            slots=slots,
            access=access,
        )


class _Plan(NamedTuple):
    """Runs of samples in order of slots: shard, first sample in it, first row of the batch, length.

    `starts` holds for each run which of the samples, in that order, it begins with; `ends` where the runs of its shard end.
    """

    shards: list[int]
    ends: list[int]
    firsts: list[int]
    rows: list[int]
    counts: list[int]
    starts: list[int]


class _Job(NamedTuple):
    """One array of a batch: its buffer as flat bytes (twice: for the kernel, for copies), bytes per sample.

    `parts`, where not whole samples are read: which piece of each, its view or one of its captions.
    """

    name: str
    flat: memoryview
    array: np.ndarray
    length: int
    parts: list[int] | None


class Reader:
    """Reads batches of some features. `read` may be called from several threads at once."""

    def __init__(
        self,
        cache: Cache,
        features: Sequence[str],
        *,
        threads: int | None = None,
        single_view: bool = False,
        single_caption: bool = False,
        slots: bool = False,
        access: str = "auto",
    ) -> None:
        manifest = cache.manifest
        self.cache = cache
        self.features = tuple(dict.fromkeys(features))
        self.arrays: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        self._axes: dict[str, str | None] = {}  # what the axis numbers of which `read` takes one row, of each array
        self._limits = {"views": 2}
        for name in self.features:
            spec = manifest.features[name]
            axis = "views" if single_view and spec.views > 1 else None
            if single_caption and has_captions(spec):
                axis = "captions"
                self._limits[axis] = min(spec.shape[0], self._limits.get(axis, spec.shape[0]))
            for array, (dtype, shape) in spec.arrays.items():
                self.arrays[array] = (dtype, shape if axis is None else shape[1:])
                self._axes[array] = axis
        self._by_slot = slots
        self._shard_size = manifest.shard_size
        if access not in ("auto", "pread", "mmap"):
            raise CacheError(f"there is no access {access!r}", remedy="use auto, pread or mmap")
        # Half the budget: a mapping keeps a descriptor of its own.
        limit = _descriptor_budget() // 2
        n_files = manifest.n_shards * len(self.arrays)
        total_bytes = self.bytes_per_sample * manifest.dataset.count
        fits = total_bytes <= _physical_memory_bytes() // 2 and n_files <= limit
        self._open = _OpenShards(cache.backend, limit, n_files, access == "mmap" or (access == "auto" and fits))
        n_threads = min(8, os.cpu_count() or 1) if threads is None else threads
        self._pool = ThreadPoolExecutor(n_threads, "featcache-read") if n_threads > 1 else None
        self._n_threads = max(1, n_threads)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the reading threads."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    @property
    def bytes_per_sample(self) -> int:
        """Stored bytes that `read` moves for each sample."""
        return sum(sample_bytes(dtype, shape) for dtype, shape in self.arrays.values())

    def allocate(self, batch: int) -> dict[str, np.ndarray]:
        """Buffers for `batch` samples: array name -> `[batch, *stored_shape]`, beginning at a page's boundary.

        Alignment is worth a factor of two to three: samples lie at multiples of 64 bytes in shards, and copies whose
        ends differ modulo 64 are slow on current processors. (Pinned tensors are aligned by nature.)
        """
        return {name: _aligned((batch, *shape), dtype) for name, (dtype, shape) in self.arrays.items()}

    def read(
        self,
        indices: np.ndarray | Sequence[int],
        out: Mapping[str, np.ndarray],
        out_offset: int = 0,
        *,
        views: np.ndarray | Sequence[int] | None = None,
        captions: np.ndarray | Sequence[int] | None = None,
    ) -> None:
        """Fill rows `out_offset`, `out_offset + 1`, ... of each buffer with the stored bytes of the samples.

        `out` holds an array for each name in `arrays`, `[>= out_offset + len(indices), *stored_shape]`,
        contiguous, of that dtype (numpy views of pinned tensors, say). `views` is for readers with
        `single_view`: 0 or 1 for each sample, default 0. `captions` is for those with `single_caption`: which caption's row
        of each sample, default 0. Captions that a sample lacks are zeros (`text/count` says how many it has).

        Raises `CacheError` for indices outside the cache, unfit buffers, and missing or damaged shards.
        """
        slots = self._slots(indices)
        n = len(slots)
        if n == 0:
            return
        rows = np.arange(out_offset, out_offset + n)
        chosen = {"views": self._chosen("views", views, n), "captions": self._chosen("captions", captions, n)}
        # By slot: each shard is looked up once, neighbours merge, and a disk sees rising offsets.
        order = np.argsort(slots, kind="stable")
        slots, rows = slots[order], rows[order]
        shards, firsts = np.divmod(slots, self._shard_size)
        parts = {axis: of_samples[order].tolist() for axis, of_samples in chosen.items()}
        # Runs: neighbours in the shard that are neighbours in the batch too are read as one.
        joins = (np.diff(slots) == 1) & (np.diff(rows) == 1) & (np.diff(shards) == 0)
        starts = np.flatnonzero(np.concatenate([[True], ~joins]))
        stops = np.append(starts[1:], n)
        of_runs = shards[starts]
        plan = _Plan(
            shards=of_runs.tolist(),
            ends=np.searchsorted(of_runs, of_runs, side="right").tolist(),
            firsts=firsts[starts].tolist(),
            rows=rows[starts].tolist(),
            counts=(stops - starts).tolist(),
            starts=starts.tolist(),
        )
        jobs = []
        for name, (dtype, shape) in self.arrays.items():
            array = self._flat(name, out[name], dtype, shape, out_offset + n)
            axis = self._axes[name]
            jobs.append(
                _Job(name, array.data, array, sample_bytes(dtype, shape), None if axis is None else parts[axis])
            )
        n_runs = len(starts)
        if self._pool is None or n_runs == 1:
            self._read_range(jobs, plan, 0, n_runs)
            return
        # Cut by samples: all arrays of a sample in one thread, pieces of about equal size.
        cuts = [n * i // self._n_threads for i in range(1, self._n_threads)]
        bounds = sorted({0, n_runs, *np.searchsorted(starts, cuts).tolist()})
        futures = [self._pool.submit(self._read_range, jobs, plan, a, b) for a, b in itertools.pairwise(bounds[1:])]
        try:
            self._read_range(jobs, plan, bounds[0], bounds[1])
        finally:
            # Even after an error no thread may go on writing into the caller's buffers.
            errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]

    def _chosen(self, axis: str, rows: np.ndarray | Sequence[int] | None, n: int) -> np.ndarray:
        """Which row of an axis `read` takes of each sample, int64 [n]; raises `CacheError` for rows that there are not."""
        if rows is None or axis not in self._limits:
            return np.zeros(n, np.int64)
        chosen, limit = np.asarray(rows, np.int64), self._limits[axis]
        if chosen.shape != (n,) or chosen.min() < 0 or chosen.max() >= limit:
            raise CacheError(f"{axis} must be {n} numbers, each 0 to {limit - 1}")
        return chosen

    def _slots(self, indices: np.ndarray | Sequence[int]) -> np.ndarray:
        if not self._by_slot:
            return self.cache.slots(indices)
        slots = np.asarray(indices, np.int64)
        count = self.cache.manifest.dataset.count
        if slots.size and (slots.min() < 0 or slots.max() >= count):
            raise CacheError(f"slot {slots.min()} or {slots.max()} is outside the cache's {count} slots")
        return slots

    def _flat(self, name: str, array: np.ndarray, dtype: np.dtype, shape: tuple[int, ...], rows: int) -> np.ndarray:
        if array.dtype != dtype or array.shape[1:] != shape or len(array) < rows or not array.flags.c_contiguous:
            raise CacheError(
                f"the buffer for {name!r} must be contiguous {dtype} [{rows} or more, *{list(shape)}], "
                f"but is {array.dtype} {list(array.shape)}"
            )
        return array.reshape(-1).view(np.uint8)

    def _read_range(self, jobs: list[_Job], plan: _Plan, start: int, stop: int) -> None:
        """Read the runs `start` to `stop` of all arrays."""
        for job in jobs:
            i = start
            while i < stop:
                shard = plan.shards[i]
                after = min(stop, plan.ends[i])  # all runs up to here are in this shard
                file = self._open.get(job.name, shard)
                if job.parts is not None:
                    self._read_parts(file, job, job.parts, plan, i, after)
                elif isinstance(file, StridedShard) and file.mapped is not None:
                    self._copy_runs(file, job, plan, i, after)
                else:
                    self._read_runs(file, job, plan, i, after)
                i = after

    @staticmethod
    def _copy_runs(file: StridedShard, job: _Job, plan: _Plan, i: int, stop: int) -> None:
        """Runs of a mapped shard: copied where they have been read before, else read.

        At full speed the interpreter's work for a run weighs as much as copying some 10 KB, so the loop is flat. Small
        samples are copied through memoryviews, which are quicker to cut than arrays; large ones through arrays, which
        let go of the interpreter lock while they copy.
        """
        length, stride, touched = job.length, file.stride, file.touched
        small = length < _SMALL_BYTES
        source: Any = file.view if small else file.mapped
        target: Any = job.flat if small else job.array
        offset, dense = file.start, stride == length
        for first, row, count in zip(plan.firsts[i:stop], plan.rows[i:stop], plan.counts[i:stop]):
            place, start = row * length, offset + first * stride
            if count == 1:
                if touched[first]:
                    target[place : place + length] = source[start : start + length]
                    continue
                touched[first] = 1
            elif dense and 0 not in touched[first : first + count]:
                size = count * length
                target[place : place + size] = source[start : start + size]
                continue
            else:
                touched[first : first + count] = b"\1" * count
            file.read_run(first, [job.flat[place : place + count * length]])

    @staticmethod
    def _read_runs(file: ShardFile, job: _Job, plan: _Plan, i: int, stop: int) -> None:
        """Runs of any shard. Those that follow each other share a call, wherever in the batch they go."""
        flat, length = job.flat, job.length
        firsts, rows, counts = plan.firsts, plan.rows, plan.counts
        while i < stop:
            first = following = firsts[i]
            buffers: list[memoryview] = []
            while i < stop and firsts[i] == following and len(buffers) < _MAX_IOV:
                place = rows[i] * length
                buffers.append(flat[place : place + counts[i] * length])
                following += counts[i]
                i += 1
            file.read_run(first, buffers)

    @staticmethod
    def _read_parts(file: ShardFile, job: _Job, parts: list[int], plan: _Plan, i: int, stop: int) -> None:
        """One view, or one caption, of each sample."""
        flat, length = job.flat, job.length
        for run in range(i, stop):
            first, place = plan.firsts[run], plan.rows[run] * length
            for k in range(plan.counts[run]):
                file.read_part(first + k, parts[plan.starts[run] + k], flat[place : place + length])
                place += length
