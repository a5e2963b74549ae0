"""The learning rate of each step: warm-up, hold, decay."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.runs.config import RunConfig


def learning_rate(config: RunConfig, step: int) -> float:
    """Of step 0, 1, ...: linear warm-up over `warmup_steps`, `hold_steps` at the full rate, then as `lr_schedule` says."""
    assert config.lr is not None
    lr = config.lr * min(1.0, (step + 1) / max(config.warmup_steps, 1))
    if config.lr_schedule == "constant":
        return lr
    held = config.warmup_steps + config.hold_steps
    if config.lr_schedule == "inverse-sqrt":
        return lr / math.sqrt(max((step + 1) / held, 1.0))
    end = config.decay_until or config.steps
    fallen = min(max((step + 1 - held) / (end - held), 0.0), 1.0)
    if config.lr_schedule == "cosine":
        fallen = 0.5 - 0.5 * math.cos(math.pi * fallen)
    return lr + fallen * (config.lr_end - lr)
