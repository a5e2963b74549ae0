"""What a run's text encoder says of the text '': the null condition of classifier-free guidance, kept in its folder.

With it a run can be sampled from without the cache it was trained on.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from featcache.errors import UserError, first_line
from featcache.store import files
from trainer.models.config import TextShape
from trainer.runs import folder as runs

FILE = runs.EMPTY_TEXT
KEY = "text"
MAX_BYTES = 64 << 20
_RESTORE = "Restore the file as the run wrote it."


def keep(text: Tensor, run: Path) -> None:
    """Writes the copy of a run that begins, float32 [T, W]; one that has begun keeps its own.

    Raises:
        UserError: the disk refuses.
    """
    if not runs.is_run(run):
        files.atomic_write(files.inside(run, FILE), [save({KEY: text.detach().cpu().float().contiguous()})])


def of_run(run: Path, shape: TextShape) -> Tensor:
    """The run's copy, float32 [T, W]. It may come from anybody.

    Raises:
        UserError: it is missing, a link, damaged, or not of this shape.
    """
    path = files.inside(run, FILE)
    if not path.is_file():
        raise UserError(f"{path} is missing, the text of '' that the run was trained with", remedy=_RESTORE)
    try:
        tensors = load(files.read_bounded(path, MAX_BYTES))
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}", remedy=_RESTORE) from error
    found = tensors.get(KEY)
    wanted = (shape.tokens, shape.width)
    if tensors.keys() != {KEY} or found is None or found.dtype != torch.float32 or tuple(found.shape) != wanted:
        held = ", ".join(f"{name} {list(value.shape)} {value.dtype}" for name, value in list(tensors.items())[:4])
        raise UserError(
            f"{path} is damaged: it holds {held or 'nothing'!s:.200}, and {KEY} {list(wanted)} float32 was expected",
            remedy=_RESTORE,
        )
    if not found.isfinite().all():
        raise UserError(f"{path} is damaged: it holds numbers that are not finite", remedy=_RESTORE)
    return found
