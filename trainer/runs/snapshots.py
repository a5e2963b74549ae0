"""Snapshots: the averaged weights of a step alone, kept for good, and averages made of them after the run.

A snapshot is a folder `snapshots/step_0001000` with a file `<average>.safetensors` for each average of the run and
`state.json`, which holds the files' SHA-256. It is written as a checkpoint is (`trainer.runs.checkpoint`): a folder of that
name is complete. A resumed run puts those that it comes by again in the place of the former ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featcache.errors import UserError, os_error
from featcache.store import files
from trainer.averages import Average, combine
from trainer.runs import checkpoint
from trainer.runs.config import RunConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
POOR_PROFILE = 0.01  # the relative error of a profile from which on it is said


def snapshots_folder(run: Path) -> Path:
    """Raises `CacheError` where it is a link."""
    return files.inside(run, "snapshots")


def list_snapshots(run: Path) -> list[tuple[int, Path]]:
    """Complete snapshots of a run, by rising step. Raises `UserError` where their folder is a link."""
    return checkpoint.list_steps(snapshots_folder(run))


def save_snapshot(
    run: Path, step: int, averages: Mapping[str, Mapping[str, Tensor]], config: RunConfig, *, dtype: str
) -> Path:
    """Writes one, in the place of a former one of that step.

    Args:
        averages: file stem -> state dict, float32, in host memory. dtype: a key of `DTYPES`.

    Raises:
        UserError: the disk refuses.
    """
    final = snapshots_folder(run) / f"step_{step:07d}"
    stored = {stem: {k: v.to(DTYPES[dtype]) for k, v in tensors.items()} for stem, tensors in averages.items()}
    # Nothing that differs from one machine or start to the next: the time stands in the log.
    state = {"step": step, "model": config.model, "method": config.method, "dtype": dtype}
    checkpoint.write_whole(final, stored, state, what="snapshot", digests=True)
    return final


def tidy(run: Path) -> None:
    """Removes what a killed process left of a snapshot; a disk that refuses has the next one's writing refused aloud."""
    with contextlib.suppress(OSError, UserError):
        checkpoint.clear_leftovers(snapshots_folder(run))


def load_snapshot(folder: Path, stem: str) -> dict[str, Tensor]:
    """One average of a snapshot, in float32.

    Raises:
        UserError: it is missing or damaged: its bytes are not those that were written.
    """
    state = checkpoint.load_state(folder)
    path = folder / f"{stem}.safetensors"
    remedy = f"Take another --step, or remove {folder}."
    try:
        tensors = checkpoint.load_tensors(folder, stem)
        found = checkpoint.digest(path)
    except UserError as error:
        raise UserError(error.what, remedy=remedy) from error
    except OSError as error:
        raise UserError(os_error(error).what, remedy=remedy) from error
    if found != state.get("sha256", {}).get(stem):
        raise UserError(f"{path} is damaged: its bytes are not those that were written", remedy=remedy)
    return {name: value.float() for name, value in tensors.items()}


@dataclass(frozen=True, kw_only=True)
class Found:
    """Weights of a run, not yet read.

    stored: the dtype of a snapshot that rounded them; None where nothing was. load: their state dict, in float32.
    notes: what is to be said of them.
    """

    step: int
    path: Path
    load: Callable[[str], dict[str, Tensor]]
    stored: str | None = None
    notes: Sequence[str] = field(default=())


def find_weights(run: Path, config: RunConfig, step: int | None, weights: Average, *, snapshots: bool = True) -> Found:
    """The weights of that name at `step` (None: the latest checkpoint).

    A step that is named takes the snapshot where there is one, since it stays while checkpoints go; a power-function average
    that was not stored is put together from the snapshots up to that step (by default the last).

    Args:
        snapshots: False looks among checkpoints alone.

    Raises:
        UserError: no such step, or it does not hold these weights, or they are of another run.
    """
    if weights == Average("ema", config.ema_decay):
        weights = Average()
    kept = dict(list_snapshots(run)) if snapshots else {}
    if weights.kind == "power" and weights not in config.averages:
        return _combined(run, config, step, weights, kept)
    if step in kept and weights.kind != "raw":
        return _from_snapshot(step, kept[step], config, weights)
    try:
        at, path = checkpoint.find_checkpoint(run, step)
    except UserError:
        if not kept:
            raise
        if step is None and weights.kind != "raw":
            return _from_snapshot(*max(kept.items()), config, weights)
        raise _no_step(run, step, kept, weights) from None
    checkpoint.require_own(path, method=config.method, model=config.model)
    if weights not in (*config.averages, Average("raw")) and not checkpoint.is_imported(path):
        raise _no_average(run, config, weights)
    return Found(step=at, path=path, load=lambda device: checkpoint.load_tensors(path, weights.stem, device=device))


def _from_snapshot(step: int, path: Path, config: RunConfig, weights: Average) -> Found:
    state = checkpoint.require_own(path, method=config.method, model=config.model)
    if weights.stem not in state.get("sha256", {}):
        raise _no_average(path.parents[1], config, weights)

    def load(device: str) -> dict[str, Tensor]:
        return {name: value.to(device) for name, value in load_snapshot(path, weights.stem).items()}

    return Found(step=step, path=path, load=load, stored=_rounded(state))


def _rounded(state: Mapping[str, Any]) -> str | None:
    dtype = str(state.get("dtype", "fp32"))
    return None if dtype == "fp32" else dtype


def _combined(run: Path, config: RunConfig, step: int | None, weights: Average, kept: Mapping[int, Path]) -> Found:
    """A power-function average of a width that was not stored."""
    assert weights.value is not None
    if not config.posthoc or not kept:
        lacks = "keeps no power-function averages" if not config.posthoc else "has no snapshots yet"
        raise UserError(
            f"{run} {lacks}, and {weights} is made of those in its snapshots",
            remedy="Train with --set posthoc=true --set snapshot_every=N, or take --weights ema.",
        )
    at = max(kept) if step is None else step
    if at not in kept:
        raise _no_step(run, step, kept, weights)
    parts: list[tuple[int, float, Path, str]] = []
    rounded: str | None = None
    for taken, path in sorted(kept.items()):
        if taken > at:
            break
        state = checkpoint.require_own(path, method=config.method, model=config.model)
        held = [average for average in config.averages if average.kind == "power"]
        parts += [(taken, a.value, path, a.stem) for a in held if a.value and a.stem in state.get("sha256", {})]
        rounded = rounded or _rounded(state)
    if not parts:
        raise _no_average(run, config, weights)
    made = combine([(taken, width) for taken, width, _, _ in parts], (at, weights.value))
    notes = []
    if made.error > POOR_PROFILE:
        notes.append(
            f"{weights} at step {at} is put together from {len(parts)} stored averages, and its profile is {made.error:.0%} off: "
            "more snapshots, or a width nearer to theirs, bring it closer"
        )

    def load(device: str) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for coefficient, (_, _, path, stem) in zip(made.coefficients.tolist(), parts, strict=True):
            for name, value in load_snapshot(path, stem).items():
                total[name] = (
                    total[name].add_(value, alpha=coefficient) if name in total else value.double() * coefficient
                )
        return {name: value.float().to(device) for name, value in total.items()}

    return Found(step=at, path=kept[at], load=load, stored=rounded, notes=notes)


def _no_average(run: Path, config: RunConfig, weights: Average) -> UserError:
    known = ", ".join(str(average) for average in config.averages)
    return UserError(
        f"{run} keeps no average {weights}", remedy=f"It keeps: {known}. Type one of these after --weights, or raw."
    )


def _no_step(run: Path, step: int | None, kept: Mapping[int, Path], weights: Average) -> UserError:
    if weights.kind == "raw":
        return UserError(
            f"{run} has no checkpoint at step {step}, and snapshots hold averages alone", remedy="Type --weights ema."
        )
    steps = {*kept, *(at for at, _ in checkpoint.list_checkpoints(run))} if weights.kind == "ema" else set(kept)
    return UserError(
        f"{run} has neither a checkpoint nor a snapshot at step {step}"
        if weights.kind == "ema"
        else f"{run} has no snapshot at step {step}",
        remedy=f"It has: {', '.join(map(str, sorted(steps)))}; choose one with --step",
    )
