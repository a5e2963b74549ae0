"""Commands in real processes, ended or stopped at an exact operation. See `shim.c` and `server.py`."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HUNG = "hung"


class NoCompiler(Exception):
    """There is no C compiler here, so no shim."""


@functools.cache
def compiled_shim() -> Path:
    """The shared library of `shim.c`; raises `NoCompiler`."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise NoCompiler("there is no C compiler (gcc or cc) for the shim that ends processes at exact operations")
    folder = tempfile.mkdtemp(prefix="featcache-shim-")
    target = Path(folder) / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", target, source, "-ldl", "-lpthread"], check=True)
    return target


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process does and what is done to it.

    argv: ("featcache" or "trainer", words...), or ("module:function", arguments...). folder: where it runs. watch:
    folder below which operations count. action: "kill", "tear" (kill; of a write half is made first) or "stop" at
    operation `at` (from 1). log: file for the operations. network: what sockets send counts too. unprivileged: without
    root's power over modes of files. group_files: see `featcache.store.writer`.
    """

    argv: Sequence[str]
    folder: str
    watch: str
    output: str
    action: str = ""
    at: int = 0
    log: str = ""
    network: bool = False
    unprivileged: bool = False
    group_files: int = 6
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended: "exit" with `number` = code, "signal" with its number, "stopped", or "hung" (killed by us
    when its time was over). operations: how many it had made or was about to make. output: both its streams.
    """

    how: str
    number: int
    operations: int
    output: str

    @property
    def killed(self) -> bool:
        return self.how == "signal" and self.number == signal.SIGKILL

    @property
    def code(self) -> int | None:
        return self.number if self.how == "exit" else None

    @property
    def clean(self) -> bool:
        """It ended by itself and without a traceback."""
        return self.how == "exit" and self.number in (0, 1, 2) and "Traceback" not in self.output

    def __str__(self) -> str:
        return f"{self.how} {self.number}: {' '.join(self.output.split())[-400:]}"


class Processes:
    """The client of `server.py`."""

    def __init__(self, *, trainer: bool = True) -> None:
        """trainer: whether jobs may be the trainer's commands (it takes seconds to import)."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("FEATCACHE_", "AWS_"))}
        environment |= {"LD_PRELOAD": str(compiled_shim()), "OMP_NUM_THREADS": "1", "COLUMNS": "400"}
        environment["PYTHONPATH"] = str(ROOT)
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.attacks.server", *([] if trainer else ["--no-trainer"])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self._outputs: dict[int, Path] = {}

    def _ask(self, *words: object) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(words) + "\n")
        self._server.stdin.flush()
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError("the server of processes has ended")
        return json.loads(line)

    def start(self, job: Job) -> int:
        """Begin; returns the process id."""
        pid = self._ask("start", asdict(job))
        assert isinstance(pid, int)
        self._outputs[pid] = Path(job.output)
        return pid

    def wait(self, pid: int, timeout_s: float = 60, *, end: bool = True) -> Ended:
        """How it ended or stopped. When the time is over it is killed and has "hung" (with `end` False: "running")."""
        how, number, operations = self._ask("wait", pid, timeout_s)
        if how == "running" and end:
            self.kill(pid)
            self._ask("wait", pid, 10)
            how = HUNG
        path = self._outputs[pid]
        return Ended(
            how=how,
            number=number,
            operations=operations,
            output=path.read_text(errors="replace") if path.exists() else "",
        )

    def run(self, job: Job, timeout_s: float = 60) -> Ended:
        return self.wait(self.start(job), timeout_s)

    @staticmethod
    def kill(pid: int) -> None:
        """SIGKILL to a child of the server and what it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        try:
            self._server.wait(timeout=60)
        except subprocess.TimeoutExpired:  # a machine under load takes its time to take torch apart
            self._server.kill()
            self._server.wait()


@contextlib.contextmanager
def processes(*, trainer: bool = True) -> Iterator[Processes]:
    """A server of processes for the length of a block; raises `NoCompiler`."""
    found = Processes(trainer=trainer)
    try:
        yield found
    finally:
        found.close()
