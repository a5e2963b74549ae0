"""Run by a test: judges all steps of a run by prompt, in blocks of eight; the process is killed while it writes the second
block of the second step, and started again. Prints how each ended, and what was there in between.

    python evaluate_killed.py RUN PROMPTS
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from featcache.progress import Quiet
from trainer.evaluate.curve import evaluate_all
from trainer.requests import EvalRequest, SampleSettings
from trainer.runs import folder as runs
from trainer.sampling import run as sampling

RUN, PROMPTS = Path(sys.argv[1]), sys.argv[2]


def dies_in_the_second_step(path: Path, pixels: np.ndarray) -> None:
    if path.name == "000001.npy" and "step_0000002" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    save(path, pixels)


def counts(path: Path, pixels: np.ndarray) -> None:
    with (RUN / "drawn").open("a") as file:
        file.write(f"{len(pixels)}\n")
    save(path, pixels)


def judged(saving: object) -> int:
    """How a forked process ended that judges all steps."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sampling._save_block = saving  # type: ignore[assignment]
            drawing = SampleSettings(prompts=PROMPTS, num=16, steps=2, sampler="ode", device="cpu")
            evaluate_all(RUN, EvalRequest(settings=drawing, metrics=("prompts_obeyed",)), Quiet())
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    sampling.BLOCK = 8
    save = sampling._save_block
    result: dict[str, object] = {"killed": judged(dies_in_the_second_step)}
    result["judged"] = [entry["step"] for entry in runs.read_metrics(RUN)]
    result["blocks"] = sorted(path.name for path in RUN.glob("samples/step_0000002*/blocks/0*.npy"))
    result["again"] = judged(counts)
    result["drawn"] = sum(map(int, (RUN / "drawn").read_text().split()))
    print(json.dumps(result))
