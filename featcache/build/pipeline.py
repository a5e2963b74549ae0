"""The stages of a build: decode, encode, quantise, copy, write, each at its own pace, and how fast each one is.

Threads decode a few batches ahead; the calling thread feeds the encoders and quantises on their device; on a GPU the
stored bytes travel to pinned memory while the next batch is computed; one thread writes a finished shard while the
next is filled. Batches never span shards and a bad image keeps its place as zeros, so every batch has the same
composition however the shards are divided among workers and however often a build was interrupted: the bytes of a
shard depend on nothing else.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from featcache.codecs import FeatureCodec
from featcache.console import amount_text
from featcache.encoders.base import Encoder
from featcache.encoders.text import TextEncoder, Tokens
from featcache.errors import CacheError, UserError
from featcache.keys import key_bytes, printable
from featcache.progress import Progress
from featcache.sources.base import Source
from featcache.sources.captions import Captions
from featcache.sources.pixels import BadImage
from featcache.store.manifest import FeatureSpec

BATCHES_AHEAD = 3
SHARDS_IN_MEMORY = 2
_Loaded = tuple[int, float] | BadImage
_Arrays = dict[str, dict[str, np.ndarray]]  # feature -> suffix -> [n, (views), *stored shape]


class ShardWriter(Protocol):
    """What the pipeline needs of a cache's writer; called from one thread. It keeps no array it was given."""

    def skip(self, shard: int, slots: Sequence[tuple[int, str, str]]) -> None: ...

    def write_shard(self, feature: str, shard: int, arrays: Mapping[str, np.ndarray]) -> None: ...

    def commit(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be encoded and how, the same in every worker.

    order: slot -> index in the source, int64. specs: features to write. encoders: those with a wanted feature. holes:
    keys of images that an existing cache lacks. known: content hashes of an existing cache by slot, uint64, or None.
    skip_bad: leave unreadable images out instead of raising. texts: text encoders with a wanted feature, which read the
    first `captions_per_image` of `captions`.
    """

    source: Source
    order: np.ndarray
    resolution: int
    shard_size: int
    batch_size: int
    specs: Mapping[str, FeatureSpec]
    encoders: Sequence[Encoder]
    device: str
    pad_batches: bool = False
    decoder: str = "pil"
    flip: bool = False
    skip_bad: bool = False
    holes: frozenset[str] = frozenset()
    known: np.ndarray | None = None
    threads: int = 1
    texts: Sequence[TextEncoder] = ()
    captions: Captions | None = None
    captions_per_image: int = 0

    @property
    def needs_images(self) -> bool:
        """Whether the images are read at all: text features, labels and keys do without."""
        return bool(self.encoders) or "content" in self.specs

    def slots(self, shard: int) -> np.ndarray:
        return np.arange(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.order)))


@dataclass
class Stage:
    """Busy time of one stage, added up over `lanes` parallel lanes."""

    lanes: int = 1
    busy_s: float = 0.0
    images: int = 0

    @property
    def images_per_s(self) -> float:
        """What the stage could do if it were never kept waiting, all lanes together."""
        return self.lanes * self.images / self.busy_s if self.busy_s > 0 else float("inf")


@dataclass
class Meter:
    """Rates of all stages of one worker. Stages on the CPU compete for its cores, so their rates are as seen."""

    stages: dict[str, Stage] = field(default_factory=dict)

    def add(self, stage: str, seconds: float, images: int, *, lanes: int = 1) -> None:
        """Counts `seconds` in which one lane of `stage` did `images` images; `lanes` counts at the first call."""
        entry = self.stages.setdefault(stage, Stage(lanes=lanes))
        entry.busy_s += seconds
        entry.images += images

    def merge(self, other: Mapping[str, Stage]) -> None:
        """Adds another worker's stages beside these: twice the lanes."""
        for name, stage in other.items():
            mine = self.stages.get(name)
            if mine is None:
                self.stages[name] = Stage(stage.lanes, stage.busy_s, stage.images)
            else:
                mine.lanes += stage.lanes
                mine.busy_s += stage.busy_s
                mine.images += stage.images

    def summary(self) -> str:
        """The bottleneck, and in a second line every stage with its rate, the slowest first; empty without stages."""
        rates = sorted((stage.images_per_s, name) for name, stage in list(self.stages.items()))
        if not rates:
            return ""
        every = ", ".join(f"{name} {amount_text(rate)}" for rate, name in rates)
        return f"bottleneck: {rates[0][1]}\nimages/s of each stage: {every}"


def run_shards(
    work: Work,
    shards: Iterable[int],
    writer: ShardWriter,
    *,
    meter: Meter,
    progress: Progress,
) -> list[int]:
    """Encodes and writes `shards`, in order; they are durable when it returns. Returns them.

    Args:
        shards: taken one by one, a few batches before they are encoded: an iterator may decide late.
        progress: advances with every encoded batch; of every image left out there is a note.

    Raises `UserError` for an image that cannot be decoded (unless bad ones are left out) and for features that
    are not finite; `CacheError` for an image whose bytes are not those an existing cache was built from, and
    where the disk refuses.
    """
    done: list[int] = []
    with ThreadPoolExecutor(work.threads) as pool, ThreadPoolExecutor(1) as disk:
        buffers = _Buffers(pinned=work.device.startswith("cuda"))
        batches = _decoded(work, shards, pool, buffers, meter)
        device = _Device(work, meter)
        writing: deque[Future[None]] = deque()
        part: _Part | None = None
        try:
            for batch in batches:
                if part is None:
                    part = _Part(work, batch.shard, len(work.slots(batch.shard)), buffers)
                _check_content(work, batch)
                device.encode(batch, part)
                part.add_samples(batch)
                progress.update(len(batch.slots), meter.summary())
                if batch.pixels is not None:
                    buffers.give(batch.pixels)
                if part.filled < part.count:
                    continue
                for _, key, reason in part.bad:
                    progress.note(f"skipped {key}: {reason}")
                while len(writing) >= SHARDS_IN_MEMORY - 1:
                    writing.popleft().result()
                writing.append(disk.submit(_write, writer, part, device.finisher(), meter))
                done.append(part.shard)
                part = None
            while writing:
                writing.popleft().result()
            disk.submit(writer.commit).result()
        finally:
            batches.close()
            for future in writing:
                future.cancel()
    return done


class _Buffers:
    """Memory for pixels and shards that is used again and again: fresh memory for each would fragment the heap.

    Pinned memory (where there is a GPU) comes from PyTorch, which keeps it for the next user by itself and knows which
    copies are still under way.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._free: dict[tuple[int, ...], list[Tensor]] = {}

    def take(self, *shape: int) -> Tensor:
        """A tensor, uint8 of `shape`, with anything in it."""
        if self._pinned:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        try:
            return self._free[shape].pop()
        except (KeyError, IndexError):
            return torch.empty(shape, dtype=torch.uint8)

    def give(self, tensor: Tensor) -> None:
        """Hands a tensor back. From any thread."""
        if not self._pinned:
            self._free.setdefault(tuple(tensor.shape), []).append(tensor)


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Slots of one shard. pixels: uint8 [n, R, R, 3], pinned where there is a GPU, zeros where bad; None: not needed."""

    shard: int
    slots: np.ndarray
    pixels: Tensor | None
    content: np.ndarray  # uint64 [n]
    bad: list[tuple[int, str, str]]  # slot, key, reason
    counts: np.ndarray  # int32 [n], captions of each image
    tokens: list[Tokens]  # one for each of the work's text encoders


@dataclass(frozen=True, kw_only=True)
class _Ahead:
    """A batch that the pool's threads are at."""

    shard: int
    slots: np.ndarray
    pixels: Tensor | None
    images: list[Future[_Loaded]]
    texts: Future[tuple[np.ndarray, list[Tokens], float]] | None


def _load(work: Work, slot: int, pixels: np.ndarray) -> _Loaded:
    """A slot's pixels; the hash of what was read and the seconds that took, or what is wrong with it."""
    start = time.perf_counter()
    index = int(work.order[slot])
    if work.source.key(index) in work.holes:
        return BadImage(work.source.key(index), "skipped when the cache was built")
    try:
        pixels[...], content = work.source.load(index, work.resolution, work.decoder)
    except BadImage as error:
        if not work.skip_bad:
            raise
        return error
    return content, time.perf_counter() - start


def _read_texts(work: Work, slots: np.ndarray) -> tuple[np.ndarray, list[Tokens], float]:
    """Captions of each slot, counted; their tokens by encoder; the seconds that took."""
    assert work.captions is not None
    start = time.perf_counter()
    indices = [int(work.order[slot]) for slot in slots]
    found = [() if work.source.key(i) in work.holes else work.captions.of(i) for i in indices]
    counts = np.array([min(len(texts), work.captions_per_image) for texts in found], np.int32)
    return counts, [encoder.tokenise(found) for encoder in work.texts], time.perf_counter() - start


def _collect(work: Work, ahead: _Ahead, meter: Meter, lanes: int) -> _Batch:
    """The batch, once its threads are done."""
    n = len(ahead.slots)
    content, bad = np.zeros(n, np.uint64), []
    if not work.needs_images:
        keys = [(int(slot), work.source.key(int(work.order[slot]))) for slot in ahead.slots]
        bad = [(slot, key, "skipped when the cache was built") for slot, key in keys if key in work.holes]
    for i, (slot, future) in enumerate(zip(ahead.slots, ahead.images)):
        loaded = future.result()
        if isinstance(loaded, BadImage):
            bad.append((int(slot), loaded.key, loaded.reason))
            assert ahead.pixels is not None
            ahead.pixels[i] = 0
        else:
            content[i], seconds = loaded
            meter.add("decode", seconds, 1, lanes=lanes)
    counts, tokens = np.zeros(n, np.int32), list[Tokens]()
    if ahead.texts is not None:
        counts, tokens, seconds = ahead.texts.result()
        meter.add("tokenise", seconds, n, lanes=lanes)
    return _Batch(
        shard=ahead.shard,
        slots=ahead.slots,
        pixels=ahead.pixels,
        content=content,
        bad=bad,
        counts=counts,
        tokens=tokens,
    )


def _decoded(
    work: Work, shards: Iterable[int], pool: ThreadPoolExecutor, buffers: _Buffers, meter: Meter
) -> Generator[_Batch, None, None]:
    """Batches in order of slots, decoded ahead by the pool's threads (decoders release the GIL)."""
    R = work.resolution
    lanes = min(work.threads, os.cpu_count() or 1)

    def plan() -> Iterator[tuple[int, np.ndarray]]:
        for shard in shards:
            slots = work.slots(shard)
            for first in range(0, len(slots), work.batch_size):
                yield shard, slots[first : first + work.batch_size]

    def submit(shard: int, slots: np.ndarray) -> _Ahead:
        pixels, images = None, list[Future[_Loaded]]()
        if work.needs_images:
            pixels = buffers.take(len(slots), R, R, 3)
            rows = pixels.numpy()
            images = [pool.submit(_load, work, int(slot), rows[i]) for i, slot in enumerate(slots)]
        texts = pool.submit(_read_texts, work, slots) if work.captions is not None else None
        return _Ahead(shard=shard, slots=slots, pixels=pixels, images=images, texts=texts)

    def batches() -> Generator[_Batch, None, None]:
        waiting: deque[_Ahead] = deque()
        planned = plan()
        try:
            while True:
                while len(waiting) < BATCHES_AHEAD and (entry := next(planned, None)) is not None:
                    waiting.append(submit(*entry))
                if not waiting:
                    return
                yield _collect(work, waiting.popleft(), meter, lanes)
        finally:
            for ahead in waiting:
                for image in ahead.images:
                    image.cancel()
                if ahead.texts is not None:
                    ahead.texts.cancel()

    return batches()


def _check_content(work: Work, batch: _Batch) -> None:
    if work.known is None or not work.needs_images:
        return
    bad = {slot for slot, _, _ in batch.bad}
    for slot, content in zip(batch.slots, batch.content):
        if int(slot) not in bad and work.known[slot] != content:
            raise CacheError(
                f"the image in slot {slot} is not the one this cache was built from (its bytes have changed)",
                remedy="Pass the original --data, or build a new cache with --out.",
            )


class _Part:
    """The stored arrays of one shard while it is being filled, in pinned memory where there is a GPU."""

    def __init__(self, work: Work, shard: int, count: int, buffers: _Buffers) -> None:
        self.buffers = buffers
        self.work, self.shard, self.count, self.filled = work, shard, count, 0
        self.bad: list[tuple[int, str, str]] = []
        self.bytes: dict[tuple[str, str], Tensor] = {}  # uint8 [n, bytes of a sample]
        self.arrays: _Arrays = {}
        for name, spec in work.specs.items():
            self.arrays[name] = {}
            lead = (count, spec.views) if spec.views > 1 else (count,)
            for suffix, (dtype, shape) in spec.stored.items():
                self._allocate(name, suffix, dtype, (*lead, *shape))

    def _allocate(self, name: str, suffix: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        flat = self.buffers.take(shape[0], dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))).zero_()
        self.bytes[name, suffix] = flat
        self.arrays[name][suffix] = flat.numpy().view(dtype).reshape(shape)

    def free(self) -> None:
        """Once everything is written."""
        self.arrays.clear()
        for flat in self.bytes.values():
            self.buffers.give(flat)
        self.bytes.clear()

    def add_samples(self, batch: _Batch) -> None:
        """Labels, keys and content hashes of a batch whose features are in, or on their way."""
        work, rows = self.work, slice(self.filled, self.filled + len(batch.slots))
        self.filled = rows.stop
        self.bad += [entry for entry in batch.bad if entry[1] not in work.holes]
        bad = {slot for slot, _, _ in batch.bad}
        for row, slot in enumerate(batch.slots, start=rows.start):
            index = int(work.order[slot])
            if "label" in self.arrays:
                self.arrays["label"][""][row] = -1 if int(slot) in bad else work.source.label(index)
            if "key" in self.arrays:
                key = key_bytes(work.source.key(index))
                self.arrays["key"][""][row, : len(key)] = np.frombuffer(key, np.uint8)
        if "content" in self.arrays:
            self.arrays["content"][""][rows] = batch.content
        good = np.array([int(slot) not in bad for slot in batch.slots])
        if "text/count" in self.arrays:
            self.arrays["text/count"][""][rows] = batch.counts * good
        for encoder, tokens in zip(work.texts, batch.tokens):
            if encoder.lengths in self.arrays:
                self.arrays[encoder.lengths][""][rows] = tokens.lengths.numpy() * good[:, None]


class _Device:
    """Runs encoders and codecs and sends what they store to a shard's arrays."""

    def __init__(self, work: Work, meter: Meter) -> None:
        self.work, self.meter = work, meter
        self.clock: _CpuClock | _GpuClock = _GpuClock(meter) if work.device.startswith("cuda") else _CpuClock(meter)
        self._codecs = {name: FeatureCodec(spec).to(work.device) for name, spec in work.specs.items()}
        self._finite: dict[str, Tensor] = {}
        self._images = 0

    def encode(self, batch: _Batch, part: _Part) -> None:
        """Encodes a batch into rows of `part`; on a GPU they arrive later (see `finisher`)."""
        n = len(batch.slots)
        first = int(batch.slots[0])
        bad = [slot - first for slot, _, _ in batch.bad]
        rows = slice(part.filled, part.filled + n)
        self.clock.begin()
        self._images = n  # of the quantising and copying stages: once per batch, however many features
        if self.work.encoders:
            self._encode_images(batch, part, rows, bad)
        for encoder, tokens in zip(self.work.texts, batch.tokens):
            made = encoder(tokens)
            self.clock.mark(f"encode {encoder.title}", n)
            for name, value in made.items():
                if name in self.work.specs:
                    self._store(name, [value], part, rows, bad)

    def _encode_images(self, batch: _Batch, part: _Part, rows: slice, bad: list[int]) -> None:
        work, n = self.work, len(batch.slots)
        assert batch.pixels is not None
        pixels = batch.pixels.to(work.device, non_blocking=True).permute(0, 3, 1, 2)  # [n, 3, R, R]
        if work.pad_batches and n < work.batch_size:
            # A compiled encoder knows one batch size; compiling it anew for the last batch of a shard would cost more.
            blank = pixels.new_zeros((work.batch_size - n, *pixels.shape[1:]))
            pixels = torch.cat([pixels, blank])
        self.clock.mark("upload", n)
        for encoder in work.encoders:
            views = [encoder(pixels.flip(-1) if mirrored else pixels) for mirrored in ((0, 1) if work.flip else (0,))]
            self.clock.mark(f"encode {encoder.title}", n)
            for name in views[0]:
                if name in work.specs:
                    self._store(name, [view[name][:n] for view in views], part, rows, bad)

    def _store(self, name: str, views: list[Tensor], part: _Part, rows: slice, bad: list[int]) -> None:
        """Quantises one feature of a batch, view by view, and sends it to its rows."""
        stored: dict[str, list[Tensor]] = {}
        for view in views:
            for suffix, tensor in self._quantised(name, view, bad).items():
                stored.setdefault(suffix, []).append(tensor)
        self.clock.mark("quantise", self._images)
        for suffix, tensors in stored.items():
            tensor = torch.stack(tensors, dim=1) if len(tensors) > 1 else tensors[0]
            flat = tensor.contiguous().view(torch.uint8).reshape(len(tensor), -1)  # [n, bytes of a sample]
            part.bytes[name, suffix][rows].copy_(flat, non_blocking=True)
        self.clock.mark("copy", self._images)
        self._images = 0

    def _quantised(self, name: str, feature: Tensor, bad: list[int]) -> dict[str, Tensor]:
        stored = self._codecs[name].encode(feature)
        if bad:
            stored = {suffix: tensor.clone() for suffix, tensor in stored.items()}
            for tensor in stored.values():
                tensor[bad] = 0
        finite = torch.isfinite(feature).all()
        self._finite[name] = finite & self._finite[name] if name in self._finite else finite
        return stored

    def finisher(self) -> Callable[[], None]:
        """A function that waits until all rows sent so far have arrived, and checks that they are finite."""
        finite, self._finite = self._finite, {}
        wait = self.clock.checkpoint()

        def finish() -> None:
            wait()
            for name, flag in finite.items():
                if not bool(flag):
                    raise UserError(
                        f"{name} has values that are not finite, so its encoder cannot run like this",
                        remedy="Type --precision fp32, and check the weights.",
                    )

        return finish


class _CpuClock:
    def __init__(self, meter: Meter) -> None:
        self._meter, self._last = meter, 0.0

    def begin(self) -> None:
        self._last = time.perf_counter()

    def mark(self, stage: str, images: int) -> None:
        now = time.perf_counter()
        self._meter.add(stage, now - self._last, images)
        self._last = now

    def checkpoint(self) -> Callable[[], None]:
        return lambda: None


class _GpuClock:
    """Marks are CUDA events; their differences are read once per shard, when they have passed."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._events: list[tuple[str, int, torch.cuda.Event]] = []

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> None:
        self._events.append(("", 0, self._event()))

    def mark(self, stage: str, images: int) -> None:
        self._events.append((stage, images, self._event()))

    def checkpoint(self) -> Callable[[], None]:
        events, self._events = self._events, []

        def wait() -> None:
            events[-1][2].synchronize()
            for (_, _, before), (stage, images, after) in itertools.pairwise(events):
                if stage:
                    self._meter.add(stage, before.elapsed_time(after) / 1000, images)

        return wait


def _write(writer: ShardWriter, part: _Part, finish: Callable[[], None], meter: Meter) -> None:
    finish()
    start = time.perf_counter()
    if part.bad:
        writer.skip(part.shard, [(slot, printable(key), printable(reason)) for slot, key, reason in part.bad])
    for feature, arrays in part.arrays.items():
        writer.write_shard(feature, part.shard, arrays)
    part.free()
    meter.add("write", time.perf_counter() - start, part.count)
