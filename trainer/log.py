"""Where a run's numbers go: JSON lines, TensorBoard, optionally Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

from featcache.errors import UserError


class RunLog:
    """Appends records to ``log.jsonl`` and scalars to ``tensorboard/`` (and wandb if ``$WANDB_PROJECT`` is set)."""

    def __init__(self, run: Path, *, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._file = (run / "log.jsonl").open("a")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self._wandb: Any = None
        if project := os.environ.get("WANDB_PROJECT"):
            try:
                import wandb
            except ImportError:
                raise UserError(
                    "$WANDB_PROJECT is set, but wandb is not installed", remedy="Type: pip install wandb   or unset it"
                ) from None
            try:
                self._wandb = wandb.init(project=project, name=str(run), dir=str(run), resume="allow")
            except Exception as error:  # its own and the network's
                raise UserError(
                    f"Weights & Biases could not be reached: {type(error).__name__}: {error!s:.200}",
                    remedy="Set WANDB_MODE=offline, or unset WANDB_PROJECT.",
                ) from error

    def record(self, values: dict[str, Any]) -> None:
        """One line; numbers also become scalars at ``values["step"]``. NaN and infinity are null: JSON has neither."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        step = values["step"]
        scalars = {k: v for k, v in values.items() if isinstance(v, int | float) and k != "step"}
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def image(self, name: str, pixels: Any, step: int) -> None:
        """uint8 [H, W, 3] to TensorBoard."""
        self._board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._file.close()
        with contextlib.suppress(OSError):  # the page beside the log, which is whole by now
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
