"""Weights & Biases: one run there for each run here, however often it is stopped and resumed."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.errors import UserError, first_line
from featcache.settings import to_mapping
from featcache.store import files

if TYPE_CHECKING:
    import numpy as np

    from trainer.runs.config import RunConfig

FILE = "wandb.json"
_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_MAX_BYTES = 1 << 16


class BoardRun:
    """A run of Weights & Biases that is open. What fails there later on is said once, and ends no training."""

    def __init__(self, wandb: Any, run: Any, warn: Callable[[str], None]) -> None:
        self._wandb, self._run, self._warn = wandb, run, warn
        self._last: dict[str, object] = {}

    def log(self, values: Mapping[str, object], step: int) -> None:
        """Numbers at a step, which is an axis of its own: of a resumed run the steps since its checkpoint come again, and
        as steps of wandb they would be dropped."""
        self._last = {**values, "step": step}
        with self._told():
            self._run.log({**values, "step": step})

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """uint8 [H, W, 3]."""
        with self._told():
            self._run.log({name: self._wandb.Image(pixels), "step": step})

    def finish(self) -> None:
        """Closes it, with the last numbers as its summary."""
        with self._told():
            self._run.summary.update(self._last)
        with self._told():
            self._run.finish()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # its own, the network's, the disk's
            self._run = _Silent()
            self._warn(f"nothing more for Weights & Biases: {type(error).__name__}: {first_line(error)}")


class _Silent:
    """Takes what nobody keeps."""

    summary: dict[str, object] = {}  # noqa: RUF012 (nothing is read from it)

    def log(self, values: Mapping[str, object]) -> None: ...

    def finish(self) -> None: ...


def open_run(run: Path, config: RunConfig, warn: Callable[[str], None]) -> BoardRun | None:
    """The run of Weights & Biases that belongs to the folder `run`, begun or gone on with; None without `$WANDB_PROJECT`.

    Its id is made when it begins and stays in the folder's `wandb.json`, so that resuming goes on with it, wherever the
    folder lies. A folder that was copied under another name is another run.

    Raises:
        UserError: wandb is not installed, is broken or cannot be reached, or the file is damaged.
    """
    project = os.environ.get("WANDB_PROJECT")
    if not project:
        return None
    try:
        import wandb
    except ImportError:
        raise UserError(
            "$WANDB_PROJECT is set, but wandb is not installed", remedy="Type: pip install wandb   or unset it"
        ) from None
    except (Exception, SystemExit) as error:  # a broken installation
        raise UserError(
            f"$WANDB_PROJECT is set, but wandb cannot be imported: {type(error).__name__}: {first_line(error)}",
            remedy="Type: pip install --force-reinstall wandb   or unset it",
        ) from error
    name = str(config.name or run.name)
    known = _known(run, project, name)
    own = known or {"id": f"{_slug(name)}-{secrets.token_hex(4)}", "project": project, "name": name}
    if known is None:
        files.atomic_write(files.inside(run, FILE), [json.dumps(own, indent=1).encode()])
    try:
        opened = wandb.init(
            project=project,
            id=own["id"],
            name=name,
            dir=str(run),
            resume="allow",
            config=to_mapping(config),
            allow_val_change=True,  # of `steps`, say, when a run goes on for longer
        )
        opened.define_metric("step")
        opened.define_metric("*", step_metric="step")
    except (Exception, SystemExit) as error:  # its own and the network's
        raise UserError(
            f"Weights & Biases could not be reached: {type(error).__name__}: {error!s:.200}",
            remedy="Set WANDB_MODE=offline, or unset WANDB_PROJECT.",
        ) from error
    return BoardRun(wandb, opened, warn)


def _known(run: Path, project: str, name: str) -> dict[str, str] | None:
    """What an earlier start of this run left; None for its first, and where it went by another project or name."""
    path = files.inside(run, FILE)
    if not path.exists():
        return None
    try:
        found = json.loads(files.read_bounded(path, _MAX_BYTES))
        if not isinstance(found, dict) or not _ID.fullmatch(str(found.get("id"))):
            raise ValueError("it holds no id")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged: {error!s:.200}", remedy="Remove it: the run goes on as a new one of Weights & Biases."
        ) from error
    mine = found.get("project") == project and found.get("name") == name
    return {key: str(value) for key, value in found.items()} if mine else None


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name)[-100:].strip("-") or "run"
