"""Checkpoints: safetensors and one JSON, written whole or not at all, found again by their step.

A checkpoint is a folder ``step_0001000`` with ``model``, ``ema``, ``alignment``, ``optimizer`` (and ``adversary``)
``.safetensors`` and ``state.json``. It is written under a temporary name, synced, then renamed; a folder with the final
name is complete. No random state is saved: all randomness derives from (seed, step).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featcache.errors import UserError
from trainer.distributed import like, local

_NAME = re.compile(r"step_(\d{7,})")
_REMEDY = "Remove this checkpoint's folder to go on from the one before."


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:07d}"


def list_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints of a run, by rising step."""
    folder = run / "checkpoints"
    found = [(m, p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))] if folder.is_dir() else []
    return sorted((int(m[1]), p) for m, p in found if (p / "state.json").is_file())


def find_checkpoint(run: Path, step: int | None = None) -> tuple[int, Path]:
    """The checkpoint at ``step``, else the latest.

    Raises:
        UserError: there is none.
    """
    found = list_checkpoints(run)
    if not found:
        raise UserError(f"{run} holds no complete checkpoint", remedy="Let it train first: trainer run ... --resume")
    if step is None:
        return found[-1]
    for at, path in found:
        if at == step:
            return at, path
    raise UserError(
        f"{run} has no checkpoint at step {step}",
        remedy=f"It has: {', '.join(str(at) for at, _ in found)}; choose one with --step",
    )


def save_checkpoint(
    run: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, keep: int
) -> Path:
    """Writes one checkpoint atomically and removes all but the ``keep`` latest.

    Args:
        tensors: file stem -> state dict, in host memory.
        state: JSON-able values for ``state.json``.
    """
    from safetensors.torch import save_file

    final = checkpoint_path(run, step)
    if final.exists():
        return final
    for leftover in (*final.parent.glob(".step_*.partial"), *final.parent.glob(".step_*.removed")):
        shutil.rmtree(leftover)  # of a process that was killed while it saved
    partial = final.with_name(f".{final.name}.partial")
    partial.mkdir(parents=True)
    for stem, values in tensors.items():
        save_file({k: v.contiguous() for k, v in values.items()}, partial / f"{stem}.safetensors")
    (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=1, sort_keys=True))
    for path in [*partial.iterdir(), partial]:
        _sync(path)
    partial.rename(final)
    _sync(final.parent)
    for _, old in list_checkpoints(run)[:-keep]:
        # Renamed first, so that an interrupted removal never leaves half a checkpoint under a complete one's name.
        doomed = old.with_name(f".{old.name}.removed")
        old.rename(doomed)
        shutil.rmtree(doomed)
    return final


def load_tensors(checkpoint: Path, stem: str, *, device: str = "cpu") -> dict[str, Tensor]:
    """One state dict of a checkpoint.

    Raises:
        UserError: the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = checkpoint / f"{stem}.safetensors"
    try:
        return load_file(path, device=device)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}", remedy=_REMEDY) from error


def load_state(checkpoint: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return dict(json.loads((checkpoint / "state.json").read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {checkpoint / 'state.json'}: {error}", remedy=_REMEDY) from error


def load_module(module: torch.nn.Module, checkpoint: Path, stem: str) -> None:
    """Loads a module's state dict, every key of it.

    Raises:
        UserError: missing, damaged, or of another module.
    """
    try:
        module.load_state_dict(load_tensors(checkpoint, stem))
    except RuntimeError as error:
        raise UserError(
            f"{checkpoint / stem}.safetensors does not fit this run: {' '.join(str(error).split())}"
        ) from error


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """Adam's state under ``<moment>/<parameter name>``; of parameters that had no gradient yet there is none."""
    return {
        f"{moment}/{names[parameter]}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for moment, value in state.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor], names: Mapping[Tensor, str]) -> None:
    """Puts :func:`optimizer_tensors` back.

    Raises:
        UserError: the state belongs to other parameters.
    """
    by_name = {name: parameter for parameter, name in names.items()}
    for key, value in saved.items():
        moment, _, name = key.partition("/")
        if name not in by_name:
            raise UserError(f"the checkpoint's optimiser knows a parameter {name!r} that this run has not")
        parameter = by_name[name]
        # The step count is a scalar beside the parameter's shards; the moments are laid out as the parameter.
        target = value.to(local(parameter).device) if moment == "step" else like(value, parameter)
        optimizer.state[parameter][moment] = target.clone()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
