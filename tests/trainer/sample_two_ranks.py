"""Run by a test: draws samples of a run in forked processes, in blocks of eight, and prints how each ended.

    python sample_two_ranks.py RUN FOLDER [PROMPTS]

``one``: a process alone. ``two``: two ranks, told of each other as torchrun does. ``killed``: alone, killed while it
writes its second block, and started again. ``left`` are the blocks that the killed one left. Imports happen once.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import diffusers.models.autoencoders.autoencoder_kl  # noqa: F401 (what every child would import)
import numpy as np
import torch

from featcache.progress import Quiet
from trainer.requests import SampleRequest
from trainer.sampling import run as sampling


def dies_in_the_second_block(path: Path, pixels: np.ndarray) -> None:
    if path.name == "000001.npy":
        path.with_name(f".{path.name}.partial").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save(path, pixels)


def start(out: Path, environment: Mapping[str, str] = MappingProxyType({}), *, dies: bool = False) -> int:
    """Forks a process that draws into ``out``; its id."""
    child = os.fork()
    if child == 0:
        os.environ.update(environment)
        if dies:
            sampling._save_block = dies_in_the_second_block
        status = 1
        try:
            prompts = sys.argv[3] if len(sys.argv) > 3 else None
            ask = SampleRequest(num=21, sampler="sde", steps=3, device="cpu", batch_size=8, out=out, prompts=prompts)
            sampling.sample_run(Path(sys.argv[1]), ask, Quiet())
            status = 0
        finally:
            os._exit(status)
    return child


def ended(*children: int) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    sampling.BLOCK = 8
    save = sampling._save_block
    folder = Path(sys.argv[2])
    result: dict[str, Sequence[object]] = {"one": list(ended(start(folder / "one")))}
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [start(folder / "two", world | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    result["two"] = list(ended(*ranks))
    result["killed"] = list(ended(start(folder / "killed", dies=True)))
    result["left"] = sorted(p.name for p in (folder / "killed/blocks").glob("0*.npy"))
    result["again"] = list(ended(start(folder / "killed")))
    print(json.dumps(result))
