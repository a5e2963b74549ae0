"""Dividing a build among the processes that torchrun started.

One process leads: it holds the features' locks, says which shards are pending, and finishes the cache. The others join
it (`featcache.store.join_writer`) and write shards of their own into the same directory, which must be on a
file system that all of them see. A shard is journaled when it is whole, so whoever dies loses the shard it was at.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Self

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from featcache import launch

MAX_WAIT = timedelta(days=14)  # the first rank to be done waits for the last
POLL_S = 0.5


class Ranks:
    """The processes that torchrun started, or this one alone. A context manager: it holds the process group."""

    def __init__(self, rank: int, size: int, local_rank: int) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._store: Store | None = None

    @classmethod
    def of_environment(cls) -> Ranks:
        """From torchrun's environment variables; without them, rank 0 of 1."""
        size = launch.world_size()
        if size == 1 or "MASTER_ADDR" not in os.environ:
            return cls(0, 1, 0)
        return cls(launch.rank(), size, launch.local_rank())

    def __enter__(self) -> Self:
        if self.size > 1:
            # Over the network's sockets: only lists of numbers are exchanged.
            store, _, _ = next(iter(rendezvous("env://", timeout=MAX_WAIT)))
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=MAX_WAIT)
            # Counters beside the group's own entries. torchrun gives every restart of the ranks fresh ones.
            self._store = PrefixStore("featcache", store)
        return self

    def __exit__(self, *_: object) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    def device(self, device: str) -> str:
        """`cuda` => the GPU of this rank."""
        return f"cuda:{self.local_rank}" if device == "cuda" and self.size > 1 else device

    def from_first(self, numbers: Sequence[int]) -> list[int]:
        """The numbers that rank 0 passes, in every rank."""
        if self.size == 1:
            return list(numbers)

        length = torch.tensor([len(numbers)])
        dist.broadcast(length, 0)
        values = (
            torch.tensor(numbers, dtype=torch.int64) if self.rank == 0 else torch.empty(int(length), dtype=torch.int64)
        )
        if len(values):
            dist.broadcast(values, 0)
        return values.tolist()

    def share(self, shards: Sequence[int], schedule: str) -> Iterator[int]:
        """This rank's part of `shards`, in order.

        static: rank r of W takes those at positions r, r + W, ... dynamic: the next one that nobody has taken, so that
        a slow rank takes fewer; whoever asks adds one to a counter that all ranks see.
        """
        if self.size == 1:
            yield from shards
        elif schedule == "static":
            yield from shards[self.rank :: self.size]
        else:
            while (position := self._count("next", 1) - 1) < len(shards):
                yield shards[position]

    def done(self, images: int) -> int:
        """Adds to the images that all ranks have encoded. Returns their number so far."""
        return self._count("images", images)

    def _count(self, counter: str, amount: int) -> int:
        assert self._store is not None, "ranks share counters inside their context only"
        return int(self._store.add(counter, amount))

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Until every rank is here. `meanwhile` is called every half a second and once at the end; not by one alone."""
        if self.size > 1:
            arrival = dist.barrier(async_op=True)
            while not arrival.is_completed():
                meanwhile()
                time.sleep(POLL_S)
            arrival.wait()  # raises if another rank has died
            meanwhile()

    def note(self) -> str:
        """What to say of the ranks in a line of progress."""
        return f" ({self.size} ranks)" if self.size > 1 else ""
