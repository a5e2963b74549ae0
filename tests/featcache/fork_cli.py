"""Command lines in processes that can be killed: imports once, then forks a child for every line on standard input.

A line is JSON: {"argv": [...], "folder": working folder, "errors": file for standard error}. It answers with the child's
process id, then, when the child has ended, with its wait status (negative: the signal that ended it).
"""

from __future__ import annotations

import json
import os
import signal
import sys

import torch

from featcache.cli import app
from featcache.console import run_app
from featcache.encoders.tiny import load_tiny_vae, load_tiny_vit

if __name__ == "__main__":
    # No thread but this one may exist when it forks.
    torch.set_num_threads(1)
    load_tiny_vae()
    load_tiny_vit()
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.chdir(job["folder"])
            descriptor = os.open(job["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 2)
            os.dup2(descriptor, 1)
            sys.argv = job["argv"]
            os._exit(run_app(app))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
