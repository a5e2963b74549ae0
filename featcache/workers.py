"""Dividing a build among processes and machines: torchrun's ranks, or actors of a Ray cluster.

One process leads: it holds the features' locks, says which shards are pending, and finishes the cache. The others join
it (:meth:`featcache.store.CacheWriter.join`) and write shards of their own into the same directory, which must be on a
file system that all of them see. A shard is journaled when it is whole, so whoever dies loses the shard it was at.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from featcache import launch
from featcache.errors import UserError
from featcache.pipeline import Meter, Stage, run_shards
from featcache.store import CacheWriter

if TYPE_CHECKING:
    from featcache.build import BuildResult, Progress
    from featcache.request import BuildRequest


MAX_WAIT = timedelta(days=14)  # the first rank to be done waits for the last
POLL_S = 0.5
SHARDS_A_CALL = 8
MAX_DEATHS_OF_A_CALL = 3


class Ranks:
    """The processes that torchrun started, or this one alone. A context manager: it holds the process group."""

    def __init__(self, rank: int, size: int, local_rank: int) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._store: Any = None

    @classmethod
    def of_environment(cls) -> Ranks:
        """From torchrun's environment variables; without them, rank 0 of 1."""
        size = launch.world_size()
        if size == 1 or "MASTER_ADDR" not in os.environ:
            return cls(0, 1, 0)
        return cls(launch.rank(), size, launch.local_rank())

    def __enter__(self) -> Self:
        if self.size > 1:
            import torch.distributed as dist

            # Over the network's sockets: only lists of numbers are exchanged.
            store, _, _ = next(iter(dist.rendezvous("env://", timeout=MAX_WAIT)))
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=MAX_WAIT)
            # Counters beside the group's own entries. torchrun gives every restart of the ranks fresh ones.
            self._store = dist.PrefixStore("featcache", store)
        return self

    def __exit__(self, *_: object) -> None:
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()

    def device(self, device: str) -> str:
        """``cuda`` => the GPU of this rank."""
        return f"cuda:{self.local_rank}" if device == "cuda" and self.size > 1 else device

    def from_first(self, numbers: Sequence[int]) -> list[int]:
        """The numbers that rank 0 passes, in every rank."""
        if self.size == 1:
            return list(numbers)
        import torch
        import torch.distributed as dist

        length = torch.tensor([len(numbers)])
        dist.broadcast(length, 0)
        values = (
            torch.tensor(numbers, dtype=torch.int64) if self.rank == 0 else torch.empty(int(length), dtype=torch.int64)
        )
        if len(values):
            dist.broadcast(values, 0)
        return values.tolist()

    def share(self, shards: Sequence[int], schedule: str) -> Iterator[int]:
        """This rank's part of ``shards``, in order.

        static: rank r of W takes those at positions r, r + W, ... dynamic: the next one that nobody has taken, so that
        a slow rank takes fewer; whoever asks adds one to a counter that all ranks see.
        """
        if self.size == 1:
            yield from shards
        elif schedule == "static":
            yield from shards[self.rank :: self.size]
        else:
            while (position := self._store.add("next", 1) - 1) < len(shards):
                yield shards[position]

    def done(self, images: int) -> int:
        """Adds to the images that all ranks have encoded. Returns their number so far."""
        return int(self._store.add("images", images))

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Until every rank is here. ``meanwhile`` is called every half a second and once at the end; not by one alone."""
        if self.size > 1:
            import torch.distributed as dist

            arrival = dist.barrier(async_op=True)
            while not arrival.is_completed():
                meanwhile()
                time.sleep(POLL_S)
            arrival.wait()  # raises if another rank has died
            meanwhile()

    def note(self) -> str:
        """What to say of the ranks in a line of progress."""
        return f" ({self.size} ranks)" if self.size > 1 else ""


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """What an actor did: images, their stages' busy times, lines about bad images; or the error of the user's."""

    images: int = 0
    stages: dict[str, Stage] | None = None
    warnings: tuple[str, ...] = ()
    error: tuple[str, str | None] | None = None


class _Actor:
    """One worker of a Ray cluster: encoders loaded once, then any shards."""

    def __init__(self, request: BuildRequest, device: str, folder: str) -> None:
        # Where the user typed the command, so that relative paths mean what they meant there.
        os.chdir(folder)
        self._request, self._device = request, device
        self._plan: Any = None

    def run(self, shards: Sequence[int]) -> _Answer:
        from featcache.build import prepare

        meter, images, warnings = Meter(), [0], list[str]()

        def advance(count: int) -> None:
            images[0] += count

        try:
            if self._plan is None:
                self._plan = prepare(self._request, device=self._device)
            with CacheWriter.join(self._plan.path, self._plan.specs) as writer:
                # A call that is tried again may have written some of its shards.
                left = set(writer.pending())
                todo = [shard for shard in shards if shard in left]
                run_shards(self._plan.work, todo, writer, meter=meter, advance=advance, warn=warnings.append)
        except UserError as error:
            return _Answer(error=(error.what, error.remedy))
        return _Answer(images=images[0], stages=meter.stages, warnings=tuple(warnings))


def build_on_ray(request: BuildRequest, progress: Progress, meter: Meter) -> BuildResult:
    """As :func:`featcache.build.build`, on the Ray cluster at ``$RAY_ADDRESS``, or a local one.

    One actor a GPU of the cluster (``ray_workers`` of them; by default as many as it has now, or one a core without
    GPUs). A call whose actor dies is tried again on a new one; a cluster may grow meanwhile.

    Raises:
        UserError: Ray is missing, bad input of any kind, or a call that keeps killing its actors.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "--engine ray needs Ray, which is not installed", remedy="pip install 'featcache-trainer[ray]'"
        ) from error
    from featcache.build import BuildResult, features_note, finish, lead, prepare, remarks, warn_of_bare_images

    started = not ray.is_initialized()
    if started:
        ray.init(
            address=os.environ.get("RAY_ADDRESS"),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    try:
        request, device = _settled(request, ray.cluster_resources())
        plan = prepare(request, device="cpu")
        # Actors need not count the captions again.
        per_image = plan.work.captions_per_image or None
        out = None if request.into else plan.path
        request = replace(request, engine="local", out=out, captions_per_image=per_image)
        with lead(plan) as writer:
            pending = writer.pending()
            total = len(plan.work.order)
            left = sum(len(plan.work.slots(shard)) for shard in pending)
            progress.start(total=total, done=total - left, note=features_note(plan.work.specs) + " (Ray)")
            for remark in remarks(plan):
                progress.warn(remark)
            resources = {"num_gpus": 1} if device == "cuda" else {"num_cpus": 1}
            remote: Any = ray.remote
            make = remote(max_restarts=0, **resources)(_Actor)
            _run_calls(
                pending,
                lambda: make.remote(request, device, str(Path.cwd())),
                request.ray_workers or 1,
                meter,
                progress,
            )
            writer.refresh()
            skipped = finish(plan, writer)
            warn_of_bare_images(plan, progress)
    finally:
        if started:
            ray.shutdown()
    return BuildResult(
        path=plan.path,
        count=total,
        features=tuple(plan.work.specs),
        skipped=skipped,
        encoded=left,
        stages=meter.stages,
    )


def _settled(request: BuildRequest, resources: dict[str, float]) -> tuple[BuildRequest, str]:
    """The request with what ``auto`` means on this cluster, and its workers' device."""
    gpus = int(resources.get("GPU", 0))
    device = ("cuda" if gpus else "cpu") if request.device == "auto" else request.device
    gpu = device.startswith("cuda")
    precision = ("tf32" if gpu else "fp32") if request.precision == "auto" else request.precision
    count = request.ray_workers or (gpus if gpu else int(resources.get("CPU", 1)))
    settled = replace(
        request,
        precision=precision,
        compile=gpu if request.compile is None else request.compile,
        ray_workers=max(1, count),
        workers=request.workers or (None if gpu else 1),
    )
    return settled, device


def _run_calls(pending: Sequence[int], make: Any, count: int, meter: Meter, progress: Progress) -> None:
    """Hands runs of shards to actors until none is pending."""
    import ray
    from ray.exceptions import RayActorError

    size = max(1, min(SHARDS_A_CALL, -(-len(pending) // (2 * count))))
    calls = deque((tuple(pending[i : i + size]), 0) for i in range(0, len(pending), size))
    running: dict[Any, tuple[Any, tuple[int, ...], int]] = {}
    idle: list[Any] = []
    while calls or running:
        while calls and len(running) < count:
            shards, deaths = calls.popleft()
            actor = idle.pop() if idle else make()
            running[actor.run.remote(shards)] = (actor, shards, deaths)
        (ready,), _ = ray.wait(list(running), num_returns=1)
        actor, shards, deaths = running.pop(ready)
        try:
            answer: _Answer = ray.get(ready)
        except RayActorError as error:
            if deaths + 1 >= MAX_DEATHS_OF_A_CALL:
                raise UserError(
                    f"workers died {deaths + 1} times at shards {shards[0]} to {shards[-1]}: {str(error).splitlines()[0]}",
                    remedy="Look at Ray's logs; often it is memory: type a smaller --batch-size or --shard-size.",
                ) from error
            progress.warn(f"a worker died; its shards {shards[0]} to {shards[-1]} are tried again")
            calls.appendleft((shards, deaths + 1))
            continue
        if answer.error is not None:
            raise UserError(answer.error[0], remedy=answer.error[1])
        idle.append(actor)
        meter.merge(answer.stages or {})
        for text in answer.warnings:
            progress.warn(text)
        progress.advance(answer.images)
