"""Malformed input of every kind, in worker processes with bounded memory and a watchdog.

Modules `fuzz_*` beside this one have `KINDS` and `run(kind, count, seed, folder) -> list of failures`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.attacks.campaign import Tally
from tests.attacks.fuzz_worker import HANG_S
from tests.attacks.processes import ROOT

MODULES = ("fuzz_store", "fuzz_inputs", "fuzz_runs")
CHUNK_S = 2.0


def all_kinds() -> list[tuple[str, str]]:
    """(module, kind) of everything that is here to be tried."""
    found = []
    for module in MODULES:
        if Path(__file__).with_name(f"{module}.py").is_file():
            found += [(module, str(kind)) for kind in importlib.import_module(f"tests.attacks.{module}").KINDS]
    return found


class Worker:
    """A process that tries inputs; started anew after it was lost."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process: subprocess.Popen[str] | None = None

    def run(self, module: str, kind: str, count: int, seed: int, folder: Path) -> list[str]:
        """The failures of one chunk; a hang or a death of the process is one."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.attacks.fuzz_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                cwd=ROOT,
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        # The first job also imports.
        self._errors.seek(0)
        self._errors.truncate()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps([module, kind, count, seed, str(folder)]) + "\n")
            process.stdin.flush()
        with selectors.DefaultSelector() as waiting:
            waiting.register(process.stdout, selectors.EVENT_READ)
            line = process.stdout.readline() if waiting.select(HANG_S) else "hang"
        if line.startswith("["):
            return list(json.loads(line))
        how = "hangs" if line == "hang" else "ends its process"
        self.close()
        self._errors.seek(0)
        return [f"{how}: {' '.join(self._errors.read().split())[-800:]}"]

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def run(tally: Tally, root: Path, *, count: int, seed: int, first: int = 0, only: list[str] | None = None) -> int:
    """At least `count` inputs in chunks of about two seconds, going round the kinds; returns the next chunk's number."""
    kinds = [(m, k) for m, k in all_kinds() if not only or k in only or m in only]
    worker, sizes = Worker(), dict.fromkeys(kinds, 20)
    done, chunk = 0, first
    folder = root / "fuzz"
    try:
        while done < count and not tally.late:
            module, kind = kinds[chunk % len(kinds)]
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            size, start = sizes[module, kind], time.monotonic()
            found = worker.run(module, kind, size, seed + chunk, folder)
            took = max(0.01, time.monotonic() - start)
            # Bounded, so that quick kinds do not make up most of the count; growing slowly, because the first job imports.
            sizes[module, kind] = max(5, min(3_000, 10 * size, int(size * CHUNK_S / took)))
            where = f"fuzz_worker {json.dumps([module, kind, size, seed + chunk])}"
            tally.trial(f"{module.removeprefix('fuzz_')}: {kind}", found, where)
            tally.trials[f"{module.removeprefix('fuzz_')}: {kind}"] += size - 1
            done, chunk = done + size, chunk + 1
    finally:
        worker.close()
    return chunk
