"""Trains in processes that can be killed: imports once, then forks a child for every line on standard input.

A line is JSON: {"settings": {...RunConfig...}, "root": folder, "resume": bool}. It answers with the child's process id,
then, when the child has ended, with its wait status (negative: the signal that ended it).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch._dynamo  # what the first optimiser step and the log would import in every child
import torch.utils.tensorboard
from tiny_runs import Listener, add_nano

import trainer.training.loop
from featcache.settings import from_mapping
from trainer import align
from trainer.runs.config import RunConfig

if __name__ == "__main__":
    torch.set_num_threads(1)
    add_nano()
    for name in align.method_names():
        align.config_class(name)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # whoever began the tests may have ignored them, as nohup does
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 0
            try:
                config = from_mapping(RunConfig, job["settings"])
                trainer.training.loop.train(config, resume=job["resume"], watcher=Listener(), root=Path(job["root"]))
            except SystemExit as leaving:
                status = leaving.code if isinstance(leaving.code, int) else 1
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                status = 1
            os._exit(status)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
