"""Cache => device: stored bytes of the right samples, one batch ahead, through pinned buffers.

The order of samples is one infinite stream, the epochs' permutations one after another; batch ``k`` of the run is
positions ``k * B .. (k + 1) * B`` of it. So the position is a function of the step alone: nothing to save, any number
of ranks reads the same global batches, and no sample is dropped at the end of an epoch.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featcache.reader import epoch_order

RING = 3  # batches being read, waiting, and in use


def stream_indices(start: int, stop: int, *, count: int, seed: int) -> np.ndarray:
    """Sample indices at positions ``start..stop`` of the infinite stream over ``count`` samples. int64 [stop - start]."""
    pieces = []
    while start < stop:
        epoch, offset = divmod(start, count)
        end = min(count, offset + stop - start)
        pieces.append(np.asarray(epoch_order(seed, epoch, count)[offset:end], dtype=np.int64))
        start += end - offset
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


def stream_views(start: int, stop: int, *, seed: int) -> np.ndarray:
    """Which of two cached views (0 as is, 1 mirrored) each position of the stream takes, a fair coin. int64 [stop - start]."""
    block, views = 4096, []
    for number in range(start // block, -(-stop // block)):
        coins = np.random.Generator(np.random.Philox(key=[seed, 0xF11B], counter=[0, 0, 0, number])).integers(0, 2, block)
        views.append(coins[max(0, start - number * block) : stop - number * block])
    return np.concatenate(views) if views else np.empty(0, np.int64)


class Batches:
    """Iterates over (stored arrays on the device, sample indices) from a given step on.

    A background thread fills a ring of (pinned) host buffers; on a GPU the copy runs on a side stream, and a buffer is
    reused only once its copy has finished.

    Args:
        cache: an open :class:`featcache.reader.Cache`.
        features: names to read; ``label`` included if wanted.
        global_batch: samples a step over all ranks; this rank gets its contiguous share.
        micro_batches: splits the rank's share; the iterator yields each part in turn.
    """

    def __init__(
        self,
        cache: Any,
        features: Sequence[str],
        *,
        global_batch: int,
        seed: int,
        device: torch.device,
        start_step: int = 0,
        stop_step: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
    ) -> None:
        self._reader = cache.reader(list(features), single_view=True)
        self._count, self._seed = len(cache), seed
        self._device, self._cuda = device, device.type == "cuda"
        self._global, self._rank, self._world, self._micro = global_batch, rank, world_size, micro_batches
        self._part = global_batch // world_size // micro_batches
        self._start, self._stop = start_step, stop_step
        self._free: queue.Queue[int] = queue.Queue()
        self._full: queue.Queue[tuple[int, np.ndarray] | BaseException | None] = queue.Queue()
        self._buffers = []
        for slot in range(RING):
            host = {name: self._host(dtype, shape) for name, (dtype, shape) in self._reader.arrays.items()}
            self._buffers.append((host, {name: tensor.numpy() for name, tensor in host.items()}))
            self._free.put(slot)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="cache-reader", daemon=True)
        self._thread.start()

    def _host(self, dtype: np.dtype, shape: tuple[int, ...]) -> Tensor:
        empty = torch.from_numpy(np.empty((self._part, *shape), dtype))
        return empty.pin_memory() if self._cuda else empty

    def _positions(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        step = self._start
        while self._stop is None or step < self._stop:
            for micro in range(self._micro):
                # The ranks' shares lie inside each micro-batch, so any world size sums the same micro-batches.
                first = step * self._global + (micro * self._world + self._rank) * self._part
                yield (
                    stream_indices(first, first + self._part, count=self._count, seed=self._seed),
                    stream_views(first, first + self._part, seed=self._seed),
                )
            step += 1

    def _fill(self) -> None:
        try:
            for indices, views in self._positions():
                slot = self._free.get()
                if self._closed.is_set():
                    return
                self._reader.read(indices, self._buffers[slot][1], views=views)
                self._full.put((slot, indices))
            self._full.put(None)
        except BaseException as error:  # handed to the consumer, who raises it
            self._full.put(error)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], np.ndarray]]:
        copies = torch.cuda.Stream(self._device) if self._cuda else None
        ready: tuple[dict[str, Tensor], np.ndarray, Callable[[], None]] | None = self._next(copies)
        while ready is not None:
            batch, indices, release = ready
            if copies is not None:
                torch.cuda.current_stream(self._device).wait_stream(copies)
                for tensor in batch.values():
                    tensor.record_stream(torch.cuda.current_stream(self._device))
                release()
                ready = self._next(copies)  # starts the next copy before this batch is used
                yield batch, indices
            else:
                yield batch, indices
                release()
                ready = self._next(copies)

    def _next(self, copies: Any) -> tuple[dict[str, Tensor], np.ndarray, Callable[[], None]] | None:
        item = self._full.get()
        if item is None:
            return None
        if isinstance(item, BaseException):
            raise item
        slot, indices = item
        host, _ = self._buffers[slot]
        if copies is None:
            return host, indices, lambda: self._free.put(slot)
        with torch.cuda.stream(copies):
            batch = {name: tensor.to(self._device, non_blocking=True) for name, tensor in host.items()}
            done = torch.cuda.Event()
            done.record(copies)

        def release() -> None:
            # The reader thread must not overwrite a pinned buffer that is still being copied. The copy was queued a
            # whole step ago, so this does not wait in practice.
            done.synchronize()
            self._free.put(slot)

        return batch, indices, release

    def close(self) -> None:
        """Stops the reading thread."""
        self._closed.set()
        self._free.put(0)
        self._thread.join(timeout=10)
