"""Checkpoints: safetensors and one JSON, written whole or not at all, found again by their step.

A checkpoint is a folder `step_0001000` with `model`, `ema`, `alignment`, `optimizer` (and `adversary`)
`.safetensors` and `state.json`. It is written under a temporary name, synced, then renamed; a folder with the final
name is complete. No random state is saved: all randomness derives from (seed, step).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from featcache.errors import CacheError, UserError, os_error
from featcache.store import files
from trainer.distributed import like, local
from trainer.runs import schemas

_NAME = re.compile(r"step_([0-9]{7,16})")
_MAX_STATE_BYTES = 1 << 20
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's
REAL_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_REMEDY = "Remove this checkpoint's folder to go on from the one before."
DRAW_OR_TRAIN = "Draw from them: trainer sample, trainer eval; or train anew under another --name."


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:07d}"


def list_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints of a run, by rising step.

    Raises:
        UserError: their folder is a link, which would have those of another run removed as old ones.
    """
    return list_steps(files.inside(run, "checkpoints"))


def list_steps(folder: Path) -> list[tuple[int, Path]]:
    """The complete folders `step_N` in a folder, by rising step."""
    try:
        found = [(m, p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))] if folder.is_dir() else []
        return sorted((int(m[1]), p) for m, p in found if (files.inside(folder, p.name) / "state.json").is_file())
    except OSError as error:
        raise os_error(error) from error


def find_checkpoint(run: Path, step: int | None = None) -> tuple[int, Path]:
    """The checkpoint at `step`, else the latest.

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
    run: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, object], *, keep: int
) -> Path:
    """Writes one checkpoint atomically and removes all but the `keep` latest.

    Args:
        tensors: file stem -> state dict, in host memory.
        state: JSON-able values for `state.json`.
    """
    final = checkpoint_path(run, step)
    files.inside(run, "checkpoints")
    if (final / "state.json").is_file():
        return final
    write_whole(final, tensors, {"step": step, **state}, what="checkpoint")
    _remove_old(run, keep)
    return final


def write_whole(
    final: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    what: str,
    digests: bool = False,
) -> None:
    """Writes a folder `step_N` under a temporary name, syncs it, gives it its name. What is complete under that name stays
    there until then.

    Args:
        what: `checkpoint` or another word for it. digests: puts the files' SHA-256 into `state.json`, as `sha256`.

    Raises:
        UserError: the disk refuses.
    """
    partial, former = (final.with_name(f".{final.name}.{suffix}") for suffix in ("partial", "removed"))
    try:
        files.make_directory(final.parent)
        there = (final / "state.json").is_file() and not final.is_symlink()
        (clear_leftovers if there else _clear)(final.parent if there else final)
        _write(partial, tensors, state, digests=digests)
        if there:
            final.rename(former)
        partial.rename(final)
        _sync(final.parent)
        if there:
            shutil.rmtree(former, ignore_errors=True)
    except (OSError, SafetensorError, CacheError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = _reason(error)
        raise UserError(
            f"the {what} of step {state['step']} could not be written to {final}: {reason.what}",
            remedy=reason.remedy or "Free some space or check the disk.",
        ) from error


def _reason(error: Exception) -> UserError:
    """What the disk, safetensors or the store said."""
    if isinstance(error, UserError):
        return error
    return os_error(error) if isinstance(error, OSError) else UserError(str(error))


def _clear(final: Path) -> None:
    """Makes way for a checkpoint: away with what killed processes left; what else has its name is set aside."""
    clear_leftovers(final.parent)
    if final.exists() or final.is_symlink():
        final.rename(final.with_name(f"{final.name}.incomplete-{secrets.token_hex(4)}"))


def clear_leftovers(folder: Path) -> None:
    """Removes what killed processes left of folders that they were writing or removing."""
    for leftover in (*folder.glob(".step_*.partial"), *folder.glob(".step_*.removed")):
        shutil.rmtree(leftover)


def tidy(run: Path, *, keep: int) -> None:
    """Finishes what a killed process left undone: its leftovers, and all but the `keep` latest checkpoints, go.

    A disk that refuses is no reason to stop: it has the next checkpoint's saving refused aloud.
    """
    with contextlib.suppress(OSError, UserError):
        clear_leftovers(files.inside(run, "checkpoints"))
    _remove_old(run, keep)


def _write(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, object], *, digests: bool
) -> None:
    """A new folder with everything in it, on the disk when this returns."""
    folder.mkdir()
    for stem, values in tensors.items():
        safetensors.torch.save_file({k: v.contiguous() for k, v in values.items()}, folder / f"{stem}.safetensors")
    if digests:
        state = {**state, "sha256": {stem: digest(folder / f"{stem}.safetensors") for stem in tensors}}
    (folder / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True))
    for path in [*folder.iterdir(), folder]:
        _sync(path)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_old(run: Path, keep: int) -> None:
    """All but the `keep` latest. The new one is safe by now, so a disk that refuses to remove is no reason to stop."""
    with contextlib.suppress(OSError, UserError):
        for _, old in list_checkpoints(run)[:-keep]:
            # Renamed first, so that an interrupted removal never leaves half a checkpoint under a complete one's name.
            doomed = old.with_name(f".{old.name}.removed")
            old.rename(doomed)
            _sync(doomed.parent)
            shutil.rmtree(doomed)


def load_tensors(checkpoint: Path, stem: str, *, device: str = "cpu") -> dict[str, Tensor]:
    """One state dict of a checkpoint.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = checkpoint / f"{stem}.safetensors"
    try:
        os.close(files.open_to_read(path))  # neither a link nor a pipe
        return safetensors.torch.load_file(path, device=device)
    except (OSError, UserError, SafetensorError) as error:
        imported = False
        with contextlib.suppress(UserError):
            imported = is_imported(checkpoint)
        if imported and not os.path.lexists(path):
            raise UserError(
                f"{checkpoint} holds imported weights, averaged ones alone: no {path.name}", remedy=DRAW_OR_TRAIN
            ) from error
        raise UserError(f"cannot read {path}: {_reason(error).what:.300}", remedy=_REMEDY) from error
    except (AttributeError, KeyError, ValueError) as error:  # types of numbers that torch or safetensors do not know
        raise UserError(f"cannot read {path}: it holds numbers of an unknown type", remedy=_REMEDY) from error


def load_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint: its `step`, and what was saved with it.

    Raises:
        UserError: the file is missing or damaged, or of another step than its folder's name says.
    """
    path = checkpoint / "state.json"
    try:
        state = json.loads(files.read_bounded(path, _MAX_STATE_BYTES))
    except (UserError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}", remedy=_REMEDY) from error
    schemas.check(state, schemas.CheckpointState, path, remedy=_REMEDY)
    name = _NAME.fullmatch(checkpoint.name)
    if name is not None and int(name[1]) != state["step"]:
        raise UserError(f"{path} is of step {state['step']}, unlike its folder", remedy=_REMEDY)
    return dict(state)


def is_imported(checkpoint: Path) -> bool:
    """Whether it was made of somebody's file (`trainer import`): averaged weights and nothing to train on from.

    Raises as `load_state`.
    """
    return "imported" in load_state(checkpoint)


def require_own(checkpoint: Path, *, method: str, model: str) -> dict[str, Any]:
    """The checkpoint's `load_state`, after checking that a run of that method and model saved it.

    Raises:
        UserError: as there; or it was brought from a run of another method or model.
    """
    state = load_state(checkpoint)
    saved, own = (state.get("method", method), state.get("model", model)), (method, model)
    if saved != own:
        raise UserError(
            f"{checkpoint} was saved by a run of {' on '.join(map(str, saved)):.200}, and this one is of {' on '.join(own)}",
            remedy=_REMEDY,
        )
    return state


def load_module(module: torch.nn.Module, checkpoint: Path, stem: str) -> None:
    """Loads a module's state dict, every key of it.

    Raises:
        UserError: missing, damaged, or of another module.
    """
    saved = load_tensors(checkpoint, stem)
    wrong = misfits(module, saved)
    if wrong:
        raise UserError(
            f"{checkpoint / stem}.safetensors does not fit this run: {wrong[0]!r:.100} "
            "is missing, unexpected, or of another shape or type",
            remedy=_REMEDY,
        )
    module.load_state_dict(saved)


def misfits(module: torch.nn.Module, saved: Mapping[str, Tensor]) -> list[str]:
    """Keys that keep a state dict from being loaded: missing, unexpected, of another shape or type."""
    own = module.state_dict()
    wrong = [name for name in own if name not in saved or not _fits(saved[name], own[name])]
    return wrong + [name for name in saved if name not in own]


def _fits(saved: Tensor, own: Tensor) -> bool:
    """Whether a saved tensor can be put in place of one of the run's own (which may be sharded)."""
    return saved.shape == own.shape and (saved.dtype == own.dtype or (_is_real(saved) and _is_real(own)))


def _is_real(tensor: Tensor) -> bool:
    return tensor.dtype in REAL_DTYPES


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """Adam's state under `<moment>/<parameter name>`; of parameters that had no gradient yet there is none."""
    return {
        f"{moment}/{names[parameter]}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for moment, value in state.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor], names: Mapping[Tensor, str]) -> None:
    """Puts `optimizer_tensors` back.

    Raises:
        UserError: the state belongs to other parameters.
    """
    by_name = {name: parameter for parameter, name in names.items()}
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in saved.items():
        moment, _, name = key.partition("/")
        if name not in by_name:
            raise UserError(
                f"the checkpoint's optimiser knows a parameter {name!r:.200} that this run has not", remedy=_REMEDY
            )
        found.setdefault(name, {})[moment] = value
    for name, moments in found.items():
        parameter = by_name[name]
        shapes = {moment: () if moment == "step" else tuple(parameter.shape) for moment in _MOMENTS}
        if {m: tuple(v.shape) for m, v in moments.items()} != shapes or not all(map(_is_real, moments.values())):
            raise UserError(
                f"the checkpoint's optimiser state of {name!r:.200} is incomplete or of another shape", remedy=_REMEDY
            )
        for moment, value in moments.items():
            # The step count is a scalar beside the parameter's shards; the moments are laid out as the parameter.
            if moment == "step":
                target = value.to(local(parameter).device, torch.float32)
            else:
                target = like(value.to(parameter.dtype), parameter)
            optimizer.state[parameter][moment] = target.clone()


def _sync(path: Path) -> None:
    if path.is_dir():
        files.fsync_directory(path)
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
