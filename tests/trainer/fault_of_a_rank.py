"""Run by torchrun for test_distributed.py: `trainer` as typed, with a fault that nobody foresaw on rank 1.

    fault_of_a_rank.py FUNCTION WORD...

FUNCTION of `trainer.training.loop` is the one that fails: `train_step` in its third call, others in their first.
"""

from __future__ import annotations

import os
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch
from tiny_runs import add_nano

import trainer.training.loop
from trainer import cli

if __name__ == "__main__":
    torch.set_num_threads(1)
    add_nano()
    name = sys.argv.pop(1)
    real, calls = getattr(trainer.training.loop, name), 0

    def fails(*args: Any, **kw: Any) -> Any:
        global calls
        calls += 1
        if os.environ["RANK"] == "1" and calls == (3 if name == "train_step" else 1):
            raise RuntimeError("nobody foresaw this")
        return real(*args, **kw)

    setattr(trainer.training.loop, name, fails)
    cli.time = SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 10))  # type: ignore[attr-defined,assignment]  # its import
    cli.main()
