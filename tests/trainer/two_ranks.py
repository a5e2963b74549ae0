"""What the ranks of test_distributed.py do: several runs, one after another, in one process group.

Arguments: a JSON file with a list of {"name", "settings", ...}, a folder for the runs, a folder for what each rank saw.
With "watch" a job also reports its steps' collectives; each reports its compiled graphs, what broke them, and how many there
are of each function that was compiled more than once.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from collectives import Collectives
from tiny_runs import Listener, add_nano
from torch._dynamo.utils import counters

import trainer.training.loop
from featcache.errors import UserError
from featcache.settings import from_mapping
from trainer.distributed import StopSignal, average_gradients, from_main, join, leave
from trainer.evaluate.during import small_judge
from trainer.runs.config import RunConfig
from trainer.training import objective


class Recompiled(logging.Handler):
    """Counts the graphs of each function that torch compiled anew, `file.py:line` of where it begins."""

    def __init__(self) -> None:
        super().__init__()
        self.graphs: dict[str, int] = {}
        torch._logging.set_logs(recompiles=True)
        logging.getLogger("torch._dynamo.guards.__recompiles").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.search(r"Recompiling function \S+ in (\S+)", record.getMessage()):
            where = Path(found[1]).name
            self.graphs[where] = self.graphs.get(where, 1) + 1


def signalling(step: int) -> Any:
    """A training step after which this process gets a SIGTERM once, at the given step."""
    real = trainer.training.loop.train_step

    def train_step(job: Any, stream: Any, at: int, *args: Any, **kw: Any) -> Any:
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(job, stream, at, *args, **kw)

    return train_step


def spoiling(steps: Collection[int]) -> Any:
    """Draws with a NaN in the last sample of the global batch, which the last rank trains on, in some steps."""
    real = objective.draw

    def draw(**kw: Any) -> Any:
        draws = real(**kw)
        if kw["step"] in steps:
            draws.noise[-1, 0, 0, 0] = math.nan
        return draws

    return draw


def run(job: Mapping[str, Any], root: Path, rank: int, recompiled: Recompiled) -> dict[str, Any]:
    real = trainer.training.loop.train_step
    collectives = Collectives()
    vars(trainer.training.loop)["draw"] = spoiling(job.get("bad_steps", ()))
    if job.get("signal_rank") == rank:
        trainer.training.loop.train_step = signalling(job["signal_step"])
    if job.get("watch"):
        trainer.training.loop.train_step = collectives.stepwise(real)
    listener = Listener()
    torch.compiler.reset()
    counters.clear()
    recompiled.graphs = {}
    try:
        config = from_mapping(RunConfig, job["settings"])
        resume = job.get("resume", False)
        with collectives if job.get("watch") else nullcontext():
            folder = trainer.training.loop.train(
                config, resume=resume, watcher=listener, root=root, make_judge=small_judge
            )
        graphs, breaks = counters["stats"]["unique_graphs"], list(counters["graph_break"])
        seen = {"steps": collectives.steps[1:], "graphs": graphs, "breaks": breaks}
        seen["recompiled"] = recompiled.graphs
        return {"folder": str(folder), "told": listener.done, **seen}
    except SystemExit as leaving:
        return {"exit": leaving.code, "told": listener.done}
    except UserError as error:
        return {"error": error.what}
    finally:
        trainer.training.loop.train_step = real


def flags(rank: int) -> list[int]:
    """Rank 1 raises its flag in round 3 only."""
    signals = StopSignal()
    seen = [signals.agree(15 if rank == 1 and k == 3 else 0) for k in range(6)]
    return [*seen, signals.wait()]


def averaged(rank: int) -> list[Any]:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad = torch.tensor([1.0, 2.0]) * (rank + 1)
    parameters[2].grad = torch.tensor([10.0, 0.0]) * (rank + 1)
    average_gradients(parameters)
    return [p.grad if p.grad is None else p.grad.tolist() for p in parameters]


def compile_quickly() -> None:
    """Compiled modules are traced, differentiated and cut as ever, but run without generated code, which takes long."""
    real = torch.nn.Module.compile
    torch.nn.Module.compile = lambda module, **kw: real(module, **kw, backend="aot_eager")  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    compile_quickly()
    add_nano()
    jobs, root, seen = (Path(word) for word in sys.argv[1:])
    world = join("cpu")
    recompiled = Recompiled()
    report: dict[str, Any] = {
        job["name"]: run(job, root, world.rank, recompiled) for job in json.loads(jobs.read_text())
    }
    report["flags"], report["averaged"] = flags(world.rank), averaged(world.rank)
    report["from_main"] = from_main({"rank": world.rank})
    (seen / f"rank{world.rank}.json").write_text(json.dumps(report))
    leave()
