"""A build divided among the actors of a Ray cluster."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.builder.bases import adopt_bases, settle_bases
from featcache.builder.empty_texts import adopt_empty_texts, settle_empty_texts
from featcache.builder.lead import BuildResult, announce, finish, lead, warn_of_bare_images
from featcache.builder.pipeline import Meter, Stage, run_shards
from featcache.builder.prepare import Plan, prepare
from featcache.errors import UserError, first_line
from featcache.progress import Progress, Quiet
from featcache.store.writers import join_writer

if TYPE_CHECKING:
    from featcache.builder.request import BuildRequest


SHARDS_A_CALL = 8
MAX_DEATHS_OF_A_CALL = 3


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """What an actor did: images, their stages' busy times, lines about bad images; or the error of the user's."""

    images: int = 0
    stages: dict[str, Stage] | None = None
    notes: tuple[str, ...] = ()
    error: tuple[str, str | None] | None = None


class _Told(Quiet):
    """Keeps what an actor is to answer."""

    def __init__(self) -> None:
        self.images, self.notes = 0, list[str]()

    def update(self, count: int, text: str = "") -> None:
        self.images += count

    def note(self, text: str) -> None:
        self.notes.append(text)


class _Actor:
    """One worker of a Ray cluster: encoders loaded once, then any shards."""

    def __init__(self, request: BuildRequest, device: str, folder: str) -> None:
        # Where the user typed the command, so that relative paths mean what they meant there.
        os.chdir(folder)
        self._request, self._device = request, device
        self._plan: Plan | None = None

    def run(self, shards: Sequence[int]) -> _Answer:
        meter, told = Meter(), _Told()
        try:
            if self._plan is None:
                self._plan = adopt_empty_texts(adopt_bases(prepare(self._request, device=self._device)))
            with join_writer(self._plan.path, self._plan.specs) as writer:
                # A call that is tried again may have written some of its shards.
                left = set(writer.pending())
                todo = [shard for shard in shards if shard in left]
                run_shards(self._plan.work, todo, writer, meter=meter, progress=told)
        except UserError as error:
            return _Answer(error=(error.what, error.remedy))
        return _Answer(images=told.images, stages=meter.stages, notes=tuple(told.notes))


def build_on_ray(request: BuildRequest, progress: Progress, meter: Meter) -> BuildResult:
    """As `featcache.builder.run.build`, on the Ray cluster at `$RAY_ADDRESS`, or a local one.

    One actor per GPU of the cluster (`ray_workers` of them; by default as many as it has now, or one per core without
    GPUs). A call whose actor dies is tried again on a new one; a cluster may grow meanwhile.

    Raises `UserError` if Ray is missing, for bad input of any kind, and for a call that keeps killing its actors.
    """
    try:
        import ray  # late here and below: an extra
    except ImportError as error:
        raise UserError(
            "--engine ray needs Ray, which is not installed", remedy="pip install 'featcache-trainer[ray]'"
        ) from error

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
        plan = settle_empty_texts(settle_bases(prepare(request, device="cpu"), progress))
        # Actors need not count the captions again.
        per_image = plan.work.captions_per_image or None
        out = None if request.into else plan.path
        request = replace(request, engine="local", out=out, captions_per_image=per_image)
        with lead(plan) as writer:
            pending = writer.pending()
            total = len(plan.work.order)
            left = sum(len(plan.work.slots(shard)) for shard in pending)
            announce(plan, left, progress, " (Ray)")
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
    """The request with what `auto` means on this cluster, and its workers' device."""
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


def _run_calls(pending: Sequence[int], make: Callable[[], Any], count: int, meter: Meter, progress: Progress) -> None:
    """Hands runs of shards to actors until none is pending. What Ray makes of them at run time has no types."""
    import ray

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
        except ray.exceptions.RayActorError as error:
            if deaths + 1 >= MAX_DEATHS_OF_A_CALL:
                raise UserError(
                    f"workers died {deaths + 1} times at shards {shards[0]} to {shards[-1]}: {first_line(error)}",
                    remedy="Look at Ray's logs; often it is memory: type a smaller --batch-size or --shard-size.",
                ) from error
            progress.note(f"a worker died; its shards {shards[0]} to {shards[-1]} are tried again")
            calls.appendleft((shards, deaths + 1))
            continue
        if answer.error is not None:
            raise UserError(answer.error[0], remedy=answer.error[1])
        idle.append(actor)
        meter.merge(answer.stages or {})
        for text in answer.notes:
            progress.note(text)
        progress.update(answer.images, meter.summary())
