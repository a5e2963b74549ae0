"""How much disk a run takes: its checkpoints and its snapshots, known before it begins."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from featcache.console import size_text
from featcache.errors import UserError, os_error
from trainer.runs.checkpoint import list_checkpoints
from trainer.runs.config import RunConfig

_VALUE_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of what a run trains, in numbers (of float32) but for `beside_bytes`: the method's whole state, frozen parts too.

    weights: the backbone's. heads: the method's trained ones, without the discriminator's (`adversary`).
    """

    weights: int
    heads: int = 0
    beside_bytes: int = 0
    adversary: int = 0


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes of tensors; the files' headers add some hundred KB to each.

    checkpoints: how many lie there at once while a run goes on: those kept, and the one being written.
    """

    checkpoint_bytes: int
    checkpoints: int
    snapshot_bytes: int
    snapshots: int

    @property
    def checkpoints_bytes(self) -> int:
        return self.checkpoint_bytes * self.checkpoints

    @property
    def snapshots_bytes(self) -> int:
        return self.snapshot_bytes * self.snapshots

    @property
    def total_bytes(self) -> int:
        return self.checkpoints_bytes + self.snapshots_bytes


def disk_budget(config: RunConfig, sizes: Sizes, *, start: int = 0, there: int = 0) -> Budget:
    """What a run writes from step `start` on and leaves or has to have room for, `there` checkpoints that it has among it.

    A checkpoint holds the weights, each average, AdamW's two moments of all that is trained, and the method's state.
    """
    assert config.checkpoint_every is not None, "nothing of a run's settings is open"
    copies, moments = 1 + len(config.averages), 2
    numbers = copies * sizes.weights + moments * (sizes.weights + sizes.heads + sizes.adversary)
    left = -(-config.steps // config.checkpoint_every) - start // config.checkpoint_every if start < config.steps else 0
    if start and not there:  # a branch, which saves what it takes over
        left += 1
    every = config.snapshot_every
    return Budget(
        checkpoint_bytes=_VALUE_BYTES["fp32"] * numbers + sizes.beside_bytes,
        checkpoints=min(config.keep_checkpoints + 1, there + left),
        snapshot_bytes=_VALUE_BYTES[config.snapshot_dtype] * sizes.weights * len(config.averages),
        snapshots=config.steps // every - start // every if every else 0,
    )


@dataclass(frozen=True, kw_only=True)
class Room:
    """Of the disk a run lies on. budget: what the run may hold from now on. there_bytes: of that, what its checkpoints hold
    already."""

    budget: Budget
    there_bytes: int
    free_bytes: int

    @property
    def needed_bytes(self) -> int:
        """That snapshots and checkpoints may take beside what is there."""
        return max(0, self.budget.checkpoints_bytes - self.there_bytes) + self.budget.snapshots_bytes


def room_of(run: Path, config: RunConfig, sizes: Sizes, start: int) -> Room:
    """Counts what a run needs from step `start` on.

    Raises:
        UserError: the run's folder, or its disk, cannot be read.
    """
    kept = list_checkpoints(run)
    budget = disk_budget(config, sizes, start=start, there=len(kept))
    try:
        free = shutil.disk_usage(run).free
        there = sum(file.stat().st_size for _, folder in kept for file in folder.iterdir() if file.is_file())
    except OSError as error:
        raise os_error(error) from error
    return Room(budget=budget, there_bytes=there, free_bytes=free)


def require_room(run: Path, config: RunConfig, sizes: Sizes, start: int) -> None:
    """Checks that the disk has room for the checkpoints, without which a run is for nothing.

    Raises:
        UserError: it has not.
    """
    room = room_of(run, config, sizes, start)
    budget, free = room.budget, room.free_bytes
    needed = budget.checkpoints_bytes - room.there_bytes
    if free < needed:
        raise UserError(
            f"the disk of {run} has {size_text(free)} free, and the run's checkpoints need {size_text(needed)} more "
            f"({budget.checkpoints} of {size_text(budget.checkpoint_bytes)}, with the one that is being written)",
            remedy="Free some space, keep fewer (--set keep_checkpoints=1), or link ./runs to a larger disk.",
        )
