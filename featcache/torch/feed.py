"""Cache => device: stored bytes of the right samples, read and copied ahead of the step that uses them."""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from featcache.errors import UserError
from featcache.read.captions import COUNT
from featcache.read.order import stream_captions, stream_views

if TYPE_CHECKING:
    from featcache.read.reader import Cache, Reader

RING = 3  # device buffers: one in use, one ready, one being filled
STAGING = 2  # pinned host buffers: one being copied to the GPU, one being read into

Stored = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which rows of every global batch one rank takes, micro-batch by micro-batch.

    The ranks' parts lie inside each micro-batch, so the micro-batches are the same for any number of ranks.

    Raises:
        UserError: they cannot be shared out evenly.
    """

    global_batch: int
    rank: int = 0
    world_size: int = 1
    micro_batches: int = 1

    def __post_init__(self) -> None:
        if min(self.global_batch, self.world_size, self.micro_batches) < 1 or not 0 <= self.rank < self.world_size:
            raise UserError(
                f"there is no share of rank {self.rank} of {self.world_size} in {self.micro_batches} micro-batches of a batch "
                f"of {self.global_batch}",
                remedy="Numbers are at least 1, and the rank is below the number of ranks.",
            )
        if self.global_batch % (self.world_size * self.micro_batches):
            raise UserError(
                f"batch_size {self.global_batch} cannot be shared by {self.world_size} ranks x {self.micro_batches} "
                "accumulation steps",
                remedy="Choose a batch size that is a multiple of both together.",
            )

    @property
    def rows(self) -> int:
        """Rows of one micro-batch on one rank."""
        return self.global_batch // self.world_size // self.micro_batches

    def slice(self, micro: int) -> slice:
        """This rank's rows of the global batch in micro-batch `micro`."""
        first = (micro * self.world_size + self.rank) * self.rows
        return slice(first, first + self.rows)


class Feed:
    """Iterates over batches of stored arrays on the device, one micro-batch after another, from a given step on.

    A thread reads ahead. On a GPU it reads into pinned memory and queues the copy on a stream of its own; the
    consumer's stream waits for the copy, the copy for the step that used its target before, and the host for neither.
    The tensors of a batch are buffers: valid until the next one is asked for.

    Args:
        cache: an open one.
        features: names to read at every step.
        indices: samples at positions `start..stop` of the stream, int64.
        seed: of the views of mirrored images, and of the captions.
        extra: names to read only at the steps for which `wanted` says so.
        steps: range of steps to deliver.
        one_caption: read one caption's row of text features, drawn uniformly among those of the sample (row 0, zeros, where
            it has none); `featcache.read.captions.one_caption` says what is left of a feature.
    """

    def __init__(
        self,
        cache: Cache,
        features: Sequence[str],
        *,
        share: Share,
        indices: Callable[[int, int], np.ndarray],
        seed: int,
        device: torch.device,
        steps: range,
        extra: Sequence[str] = (),
        wanted: Callable[[int], bool] = lambda step: True,
        one_caption: bool = False,
    ) -> None:
        self._share, self._indices, self._seed, self._steps, self._wanted = share, indices, seed, steps, wanted
        self._flipped = cache.manifest.dataset.flip
        self._device, self._cuda = device, device.type == "cuda"
        base = list(dict.fromkeys(features))
        reader = functools.partial(cache.reader, single_view=True, single_caption=one_caption)
        self._readers = {False: reader(base)}
        self._readers[True] = reader([*base, *extra]) if extra else self._readers[False]
        self._counts = cache.reader([COUNT], threads=0) if one_caption else None
        # Buffers that the consumer has done with, each with the GPU event that says so (None on the CPU).
        self._free: queue.Queue[tuple[Stored, torch.cuda.Event | None] | None] = queue.Queue()
        self._full: queue.Queue[tuple[Stored, Stored, torch.cuda.Event | None] | BaseException | None] = queue.Queue()
        self.waited_s = 0.0  # that whoever iterates stood still for want of data
        for _ in range(RING):
            self._free.put((self._buffers(device), None))
        self._thread = threading.Thread(target=self._fill, name="cache-reader", daemon=True)
        self._thread.start()

    def _buffers(self, device: torch.device, *, pin: bool = False) -> Stored:
        arrays = self._readers[True].arrays.items()
        host = {name: torch.from_numpy(np.empty((self._share.rows, *shape), dtype)) for name, (dtype, shape) in arrays}
        return {name: tensor.pin_memory() if pin else tensor.to(device) for name, tensor in host.items()}

    def _fill(self) -> None:
        """The reading thread: read, queue the copy, hand over."""
        try:
            if self._cuda:
                torch.cuda.set_device(self._device)  # a thread of its own starts on the first GPU
            copies = torch.cuda.Stream(self._device) if self._cuda else None
            staging = [self._buffers(self._device, pin=True) for _ in range(STAGING)] if self._cuda else []
            copied: list[torch.cuda.Event | None] = [None] * STAGING
            turn = 0
            for step in self._steps:
                reader = self._readers[self._wanted(step)]
                for micro in range(self._share.micro_batches):
                    if copies is None:
                        if (slot := self._free.get()) is None:
                            return
                        buffers, _ = slot
                        self._read(reader, step, micro, buffers)
                        self._full.put((buffers, {name: buffers[name] for name in reader.arrays}, None))
                        continue
                    turn = (turn + 1) % STAGING
                    if (earlier := copied[turn]) is not None:
                        earlier.synchronize()  # this thread may wait: it is ahead
                    self._read(reader, step, micro, staging[turn])
                    if (slot := self._free.get()) is None:
                        return
                    buffers, used = slot
                    with torch.cuda.stream(copies):
                        if used is not None:
                            copies.wait_event(used)
                        for name in reader.arrays:
                            buffers[name].copy_(staging[turn][name], non_blocking=True)
                        copied[turn] = done = torch.cuda.Event()
                        done.record(copies)
                    self._full.put((buffers, {name: buffers[name] for name in reader.arrays}, done))
            self._full.put(None)
        except BaseException as error:  # handed to the consumer, who raises it
            self._full.put(error)

    def _read(self, reader: Reader, step: int, micro: int, into: Stored) -> None:
        rows = self._share.slice(micro)
        first, stop = step * self._share.global_batch + rows.start, step * self._share.global_batch + rows.stop
        indices = self._indices(first, stop)
        views = stream_views(first, stop, seed=self._seed) if self._flipped else None
        captions = self._captions(first, stop, indices)
        out = {name: into[name].numpy() for name in reader.arrays}
        reader.read(indices, out, views=views, captions=captions)

    def _captions(self, first: int, stop: int, indices: np.ndarray) -> np.ndarray | None:
        """Which caption each position takes; None where all are read."""
        if self._counts is None:
            return None
        counts = self._counts.allocate(len(indices))
        self._counts.read(indices, counts)
        return stream_captions(first, stop, counts=counts[COUNT], seed=self._seed)

    def __iter__(self) -> Iterator[Stored]:
        used: torch.cuda.Event | None = None
        while (item := self._waited_for(used)) is not None:
            if isinstance(item, BaseException):
                raise item
            buffers, batch, copied = item
            if copied is not None:
                torch.cuda.current_stream(self._device).wait_event(copied)
            yield batch
            used = torch.cuda.current_stream(self._device).record_event() if self._cuda else None
            self._free.put((buffers, used))

    def _waited_for(self, used: torch.cuda.Event | None) -> Any:
        """The next item, its wait counted; not where the device has work of before left (an event tells without waiting):
        the host may be so far ahead that the reader waits for the device to be done with a buffer."""
        began_s = time.perf_counter()
        item = self._full.get()
        if used is None or used.query():
            self.waited_s += time.perf_counter() - began_s
        return item

    def close(self) -> None:
        """Stops the reading thread, and whoever iterates."""
        self._free.queue.clear()
        self._free.put(None)
        self._thread.join(timeout=10)
        self._full.queue.clear()
        self._full.put(None)
        for reader in (*self._readers.values(), *filter(None, [self._counts])):
            reader.close()
