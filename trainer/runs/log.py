"""Where a run's numbers go: JSON lines, TensorBoard, optionally Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from featcache.errors import os_error
from featcache.store import files
from trainer.runs.weights_and_biases import open_run

if TYPE_CHECKING:
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter

    from trainer.runs.config import RunConfig


# Columns that say how fast the machine was and what it took: all others are functions of settings and data alone.
OF_THE_MACHINE = (
    *("time_s", "images_per_s", "data_wait", "rss_bytes", "gpu_allocated_bytes", "gpu_reserved_bytes"),
    *("tflop_per_s", "mfu"),
)

EVALUATION = "eval/"  # begins the columns of evaluations during training
EVALUATION_OF = "eval_of"  # beside them: how they were measured, in words; what has other words is of another curve


def is_detail(name: str) -> bool:
    """Whether a reading is one of several by interval of t: for the log and TensorBoard, neither for the line of progress
    nor for a chart of its own."""
    return " t=" in name


class RunLog:
    """Appends records to `log.jsonl` and scalars to `tensorboard/`; to wandb, too, where `$WANDB_PROJECT` is set and the
    run's settings are given."""

    def __init__(self, run: Path, *, step: int, warn: Callable[[str], None], config: RunConfig | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = files.inside(run, "log.jsonl")
        board = files.inside(run, "tensorboard")
        files.inside(run, "wandb")
        self._file = self._path.open("a")
        self._warn = warn
        self._board: SummaryWriter | None = None
        with self._told():
            self._board = SummaryWriter(str(board), purge_step=step + 1)
        self._wandb = open_run(run, config, warn) if config is not None else None

    def record(self, values: Mapping[str, object]) -> None:
        """One line; numbers also become scalars at `values["step"]`. NaN and infinity are null: JSON has neither."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with self._explained():
            self._write(json.dumps(values) + "\n")
        step = values["step"]
        scalars = {k: v for k, v in values.items() if isinstance(v, int | float) and k != "step"}

        def add(board: SummaryWriter) -> None:
            for name, value in scalars.items():
                board.add_scalar(name, value, step)

        self._on_board(add)
        if self._wandb is not None:
            self._wandb.log(scalars, int(step) if isinstance(step, int) else 0)

    def sync(self) -> None:
        """Waits until the disk has every line: before a checkpoint that a resumed run will not write them again for."""
        with self._explained():
            os.fsync(self._file.fileno())

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """uint8 [H, W, 3] to TensorBoard and wandb."""
        self._on_board(lambda board: board.add_image(name, pixels, step, dataformats="HWC"))
        if self._wandb is not None:
            self._wandb.image(name, pixels, step)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise os_error(OSError(error.errno, error.strerror, str(self._path))) from error

    def _write(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()

    def _on_board(self, write: Callable[[SummaryWriter], object]) -> None:
        if self._board is not None:
            with self._told():
                write(self._board)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """TensorBoard shows what the log holds: a disk that refuses its files ends the pictures, not the training."""
        try:
            yield
        except OSError as error:
            self._board = None
            self._warn(f"nothing more for TensorBoard: {os_error(error).what}; log.jsonl goes on")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # every line was flushed, or its failure told
            self._file.close()
        self._on_board(lambda board: board.close())
        if self._wandb is not None:
            self._wandb.finish()
