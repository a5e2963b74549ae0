"""Command lines in processes that can be killed or stopped at any file operation.

`python -m tests.attacks.server [--no-trainer]`, with the shim preloaded, imports everything once and then forks a child for each job
that comes on standard input. A line there is a JSON array:

    ["start", {...the fields of `tests.attacks.processes.Job`...}]  answers the child's process id
    ["wait", pid, seconds]   answers [how, number, operations]: "exit" and the exit code, "signal" and its number,
                             "stopped" and 0, or "running" and 0 when the time is over
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import time
from typing import Any

ACTIONS = {"": 0, "kill": 1, "tear": 2, "stop": 3}


def library() -> Any:
    """The preloaded shim's functions."""
    found = ctypes.CDLL(None)
    found.attacks_counter.restype = ctypes.c_void_p
    found.attacks_count.restype = ctypes.c_long
    found.attacks_count.argtypes = [ctypes.c_void_p]
    found.attacks_free.argtypes = [ctypes.c_void_p]
    found.attacks_arm.argtypes = [
        *(ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
    ]
    return found


_STORE = (
    *(
        "featcache.cli",
        "featcache.builder.run",
        "featcache.builder.repair",
        "featcache.share.convert",
        "featcache.share.transfer",
        "obstore.store",
    ),
    *(
        "featcache.share.importers",
        "featcache.read.stream",
        "featcache.cli.info",
        "featcache.builder.ranks",
        "featcache.share.manage",
    ),
    *("featcache.encoders.vae", "featcache.encoders.vision", "featcache.console_progress", "store_helpers"),
)
_TRAINER = (
    *("torch._dynamo", "torch.utils.tensorboard", "featcache.inspect", "matplotlib.pyplot", "scipy.linalg"),
    *(
        "trainer.cli",
        "trainer.training.loop",
        "trainer.sampling.run",
        "trainer.evaluate.run",
        "trainer.runs.exchange",
    ),
    *("trainer.evaluate.extractors", "trainer.evaluate.judge", "trainer.report.report", "safetensors.torch"),
)


def preload(*, trainer: bool) -> None:
    """Import what any job may import, so that a fork costs milliseconds."""
    import torch

    torch.set_num_threads(1)
    for name in (*_STORE, *(_TRAINER if trainer else ())):
        importlib.import_module(name)
    from featcache.encoders.tiny import load_tiny_vae, load_tiny_vit

    load_tiny_vae()
    load_tiny_vit()
    if trainer:
        from tiny_runs import add_nano

        from trainer import align

        add_nano()
        for method in align.method_names():
            align.config_class(method)


def run_job(job: dict[str, Any]) -> int:
    """In the child: one command line, or one Python function."""
    from featcache.console import run_app

    program, *_ = job["argv"]
    if ":" in program:
        module, _, name = program.partition(":")
        getattr(importlib.import_module(module), name)(*job["argv"][1:])
        return 0
    sys.argv = job["argv"]
    return run_app(importlib.import_module(f"{program}.cli").app)


def drop_capabilities() -> None:
    """Root without its privileges: the modes of files hold for it, too."""

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    header, nothing = Header(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(ctypes.byref(header), nothing):
        raise OSError(ctypes.get_errno(), "capset")


def in_child(job: dict[str, Any], shim: Any, counter: int) -> None:
    """Never returns."""
    code = 70
    try:
        os.setsid()
        os.chdir(job["folder"])
        output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        nowhere = os.open(os.devnull, os.O_RDONLY)
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND) if job["log"] else -1
        for source, target in ((nowhere, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.environ.update(job["environment"])
        # Small groups, so that a build of a second has the phases of one of hours.
        from featcache.store import writer

        writer.GROUP_FILES = job["group_files"]
        if job["unprivileged"]:
            drop_capabilities()
        action = ACTIONS[job["action"]]
        shim.attacks_arm(os.fsencode(job["watch"]), action, job["at"], log, job["network"], counter)
        code = run_job(job)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, seconds: float) -> tuple[str, int]:
    deadline = time.monotonic() + seconds
    pause = 0.0005
    while True:
        found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if found:
            if os.WIFSTOPPED(status):
                return "stopped", 0
            code = os.waitstatus_to_exitcode(status)
            return ("exit", code) if code >= 0 else ("signal", -code)
        if time.monotonic() >= deadline:
            return "running", 0
        time.sleep(pause)
        pause = min(pause * 1.3, 0.02)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints while it is imported
    shim = library()
    preload(trainer="--no-trainer" not in sys.argv)
    counters: dict[int, int] = {}
    for line in sys.stdin:
        what, *rest = json.loads(line)
        answer: Any
        if what == "start":
            counter = shim.attacks_counter()
            pid = os.fork()
            if pid == 0:
                in_child(rest[0], shim, counter)
            counters[pid] = counter
            answer = pid
        else:
            pid, seconds = rest
            how, number = wait(pid, seconds)
            answer = [how, number, shim.attacks_count(counters[pid])]
            if how in ("exit", "signal"):
                shim.attacks_free(counters.pop(pid))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
