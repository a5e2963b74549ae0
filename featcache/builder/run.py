"""One pass over the images: read, crop, encode, quantise, write; resumable by shard, divided among workers.

What is built is planned by `featcache.builder.prepare`, alike in every worker; `featcache.builder.pipeline` does it and
`featcache.builder.ranks` and `featcache.builder.ray` divide it. The bytes of a cache do not depend on how often the build
was interrupted nor on how many workers shared it.
"""

from __future__ import annotations

from dataclasses import replace

from featcache.builder.bases import adopt_bases, settle_bases
from featcache.builder.empty_texts import adopt_empty_texts, settle_empty_texts
from featcache.builder.lead import BuildResult, announce, finish, lead, warn_of_bare_images
from featcache.builder.pipeline import Meter, run_shards
from featcache.builder.prepare import Plan, check_request, prepare
from featcache.builder.ranks import Ranks
from featcache.builder.ray import build_on_ray
from featcache.builder.request import BuildRequest
from featcache.machine import pick_device
from featcache.progress import Progress
from featcache.store.writers import join_writer


def build(request: BuildRequest, progress: Progress, *, meter: Meter | None = None) -> BuildResult:
    """Builds or continues a cache, or adds features to one (`into`).

    Under torchrun every rank calls it; the ranks divide the shards, and rank 0 finishes the cache. `meter` is told how
    fast this process's stages are while it goes on.

    Raises `UserError` for bad input of any kind; whatever shards were written stay, and the same call continues.
    """
    check_request(request)
    if request.engine == "ray":
        return build_on_ray(request, progress, meter or Meter())
    meter = meter or Meter()
    with Ranks.of_environment() as ranks:
        plan = prepare_together(request, ranks, device=ranks.device(pick_device(request.device)))
        if ranks.rank == 0:
            plan = settle_empty_texts(settle_bases(plan, progress))
        writer = lead(plan) if ranks.rank == 0 else None
        pending = ranks.from_first(writer.pending() if writer is not None else [])
        if writer is None:
            plan = adopt_empty_texts(adopt_bases(plan))
        work = plan.work
        left = sum(len(work.slots(shard)) for shard in pending)
        with writer or join_writer(plan.path, plan.specs) as shard_writer:
            progress = _Shared(progress, ranks) if ranks.size > 1 else progress
            if writer is not None:
                announce(plan, left, progress, ranks.note())
            mine = ranks.share(pending, request.schedule)
            run_shards(work, mine, shard_writer, meter=meter, progress=progress)
            ranks.wait(lambda: progress.update(0))
            if writer is not None:
                writer.refresh()
                skipped = finish(plan, writer)
                warn_of_bare_images(plan, progress)
            else:
                skipped = ()
            ranks.wait()
    return BuildResult(
        path=plan.path,
        count=len(work.order),
        features=tuple(work.specs),
        skipped=skipped,
        encoded=left,
        first=ranks.rank == 0,
        stages=meter.stages,
    )


def prepare_together(request: BuildRequest, ranks: Ranks, *, device: str) -> Plan:
    """As `prepare`, in every rank. Where captions are to be counted, which may read each of them, only the first
    rank does it, and the others wait for the number."""
    if not request.texts or request.captions_per_image:
        return prepare(request, device=device)
    plan = prepare(request, device=device) if ranks.rank == 0 else None
    (per_image,) = ranks.from_first([plan.work.captions_per_image] if plan is not None else [])
    return plan or prepare(replace(request, captions_per_image=per_image), device=device)


class _Shared:
    """Progress of all ranks: the first one begins and shows it, the others only make notes."""

    def __init__(self, progress: Progress, ranks: Ranks) -> None:
        self._progress, self._ranks, self._shown = progress, ranks, 0

    def begin(self, name: str, total: int | None, *, done: int = 0, unit: str = "images") -> None:
        self._progress.begin(name, total, done=done, unit=unit)

    def update(self, count: int, text: str = "") -> None:
        """Counts images of this rank; the first rank shows those of all. With 0, only that."""
        if not count and self._ranks.rank > 0:
            return
        done = self._ranks.done(count)
        if self._ranks.rank == 0:
            self._progress.update(done - self._shown, text)
            self._shown = done

    def note(self, text: str) -> None:
        self._progress.note(text)
