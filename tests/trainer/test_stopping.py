"""Signals are answered at once, also while the main thread is in a call that takes long. Real processes, real signals."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from trainer.runs import checkpoint
from trainer.stopping import APART_S, GRACE_S, Stop

WITHIN_S = 2.0
REPOSITORY = Path(__file__).parents[2]
Start = Callable[..., "Process"]


class Process:
    """A process in a group of its own, whose lines are read with their times."""

    def __init__(self, words: Sequence[str], folder: Path) -> None:
        self.process = subprocess.Popen(
            words,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "400"}
            | {"PYTHONPATH": str(REPOSITORY)},
        )
        self.said: list[str] = []
        self._lines: queue.Queue[tuple[float, str]] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put((time.monotonic(), line.strip()))

    def line(self, pattern: str, timeout_s: float = 120) -> tuple[float, str]:
        """When the next line with that pattern came, and the line."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                when, text = self._lines.get(timeout=max(deadline - time.monotonic(), 0.01))
            except queue.Empty:
                raise AssertionError(f"no line with {pattern!r} in {timeout_s} s: {self.said}") from None
            self.said.append(text)
            if re.search(pattern, text):
                return when, text

    def send(self, number: int) -> float:
        """To the whole group, as a terminal does."""
        os.killpg(self.process.pid, number)
        return time.monotonic()

    def end(self, timeout_s: float) -> int:
        return self.process.wait(timeout=timeout_s)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts processes, and sees that none is left."""
    started: list[Process] = []

    def begin(*words: str) -> Process:
        started.append(Process([sys.executable, *words], tmp_path))
        return started[-1]

    yield begin
    for process in started:
        if process.process.poll() is None:
            os.killpg(process.process.pid, signal.SIGKILL)
            process.process.wait()


def training(cache: Path, *words: str, model: str = "SiT-B/2", batch: int = 64) -> list[str]:
    """A step takes half a minute or more with these defaults, most of it in one call: the backward pass."""
    common = ["-m", "trainer.cli", "run", "--cache", str(cache), "--device", "cpu", "--name", "slow", "--model", model]
    return [*common, "--batch-size", str(batch), *words]


ON_LONG_CALL = """
import torch
from trainer import stopping
a = torch.zeros({size}, {size})
with stopping.prompt("ended at once"):
    print("begun", flush=True)
    a @ a
    print("it was too short", flush=True)
"""


@pytest.mark.parametrize("size", [12_000])
def test_a_long_call_does_not_keep_ctrl_c_waiting(start: Start, size: int) -> None:
    """A product of matrices that takes a core many seconds, and during which Python's own handler does not run."""
    process = start("-c", ON_LONG_CALL.format(size=size))
    process.line("begun")
    time.sleep(0.3)
    sent = process.send(signal.SIGINT)
    assert process.end(30) == 130
    assert time.monotonic() - sent < GRACE_S + WITHIN_S
    process.line("ended at once", 1)
    assert "it was too short" not in process.said


def test_a_python_loop_ends_by_itself(start: Start) -> None:
    process = start(
        "-c", "from trainer import stopping\nwith stopping.prompt():\n print('begun', flush=True)\n while 1: pass"
    )
    process.line("begun")
    process.send(signal.SIGINT)
    assert process.end(10) == -signal.SIGINT, "KeyboardInterrupt, as ever"
    process.line("KeyboardInterrupt", 1)


ENDING_SLOWLY = """
import sys, time
from trainer import stopping
def command():
    try:
        with stopping.prompt():
            print("begun", flush=True)
            time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.5)
        return 130
sys.exit(command())
"""


def test_ctrl_c_typed_many_times_does_not_interrupt_the_ending(start: Start) -> None:
    process = start("-c", ENDING_SLOWLY)
    process.line("begun")
    for _ in range(10):
        process.send(signal.SIGINT)
        time.sleep(0.05)
    assert process.end(10) == 130
    time.sleep(0.1)
    with pytest.raises(AssertionError, match="no line"):
        process.line("Traceback", 0.1)


IN_A_FINALISER = """
import time
from trainer import stopping
class Slow:
    def __del__(self):
        print("begun", flush=True)
        end = time.monotonic() + 0.5
        while time.monotonic() < end: pass
with stopping.prompt("ended at once"):
    Slow()
    time.sleep(60)
"""


def test_ctrl_c_that_a_finaliser_swallows_ends_the_process_all_the_same(start: Start) -> None:
    process = start("-c", IN_A_FINALISER)
    process.line("begun")
    process.send(signal.SIGINT)
    assert process.end(10) == 130
    process.line("ended at once", 1)
    assert "Traceback" not in " ".join(process.said)


def test_copies_of_a_signal_are_not_a_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stop = Stop()
    assert not stop.take(signal.SIGINT) and not stop.take(signal.SIGINT)
    now[0] += APART_S + 0.1
    assert not stop.take(signal.SIGTERM), "a scheduler's: only a person ends it at once"
    assert stop.take(signal.SIGINT) and stop.number == signal.SIGINT
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert stop.take(signal.SIGTERM), "torchrun's word for a second Ctrl-C"
    late = Stop()
    late.take(signal.SIGTERM)
    now[0] += APART_S + 0.1
    assert not late.take(signal.SIGTERM), "a scheduler repeats itself"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_inside_a_long_step_is_answered_and_a_second_ctrl_c_obeyed(
    start: Start, shapes_cache: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = start(*training(shapes_cache, "--steps", "3"))
    process.line("the run's folder is")
    time.sleep(8)  # forward is over, backward goes on
    sent = process.send(number)
    told, text = process.line("stopping after")
    assert told - sent < WITHIN_S
    assert "stopping after this step, then saving" in text
    assert "press Ctrl-C again to stop now (nothing is saved yet)" in text
    log = tmp_path / "runs" / "slow" / "log.jsonl"
    assert not log.exists() or not log.read_text(), "the step goes on"
    time.sleep(APART_S + 0.2)
    assert not log.exists() or not log.read_text()
    sent = process.send(signal.SIGINT)
    assert process.end(30) == 130
    assert time.monotonic() - sent < WITHIN_S
    process.line("stopped in the middle of this step; nothing is saved yet", 1)


@pytest.mark.slow
def test_the_step_under_way_is_saved_and_resumed(start: Start, shapes_cache: Path, tmp_path: Path) -> None:
    words = training(shapes_cache, model="SiT-S/2", batch=64)
    process = start(*words, "--steps", "9")
    process.line(r"step|1/9")
    time.sleep(1)
    process.send(signal.SIGINT)
    process.line("stopping after this step, then saving")
    assert process.end(120) == 130
    step, _ = checkpoint.find_checkpoint(tmp_path / "runs" / "slow")
    assert 1 <= step < 9
    again = start(*words, "--steps", str(step + 1), "--resume")
    assert again.end(240) == 0
    assert checkpoint.find_checkpoint(tmp_path / "runs" / "slow")[0] == step + 1


@pytest.mark.slow
def test_before_the_first_step_ctrl_c_ends_at_once(start: Start, shapes_cache: Path, tmp_path: Path) -> None:
    """While a large model is built."""
    process = start(*training(shapes_cache, "--steps", "3", model="SiT-L/2", batch=2))
    time.sleep(9)
    assert not (tmp_path / "runs" / "slow" / "config.yaml").exists(), "it is still building"
    sent = process.send(signal.SIGINT)
    assert process.end(30) == 130
    assert time.monotonic() - sent < WITHIN_S + GRACE_S
    process.line("interrupted", 1)


@pytest.mark.slow
def test_drawing_is_given_up(start: Start, shapes_cache: Path, tmp_path: Path) -> None:
    words = training(shapes_cache, "--steps", "9", "--set", "sample_every=1", model="SiT-S/2", batch=4)
    process = start(*words)
    log = tmp_path / "runs" / "slow" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(3)
    process.send(signal.SIGINT)
    process.line("stopping after")
    process.line("no sample grid at step 1: the run was told to stop")
    assert process.end(60) == 130
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path / "runs" / "slow")] == [1]


@pytest.mark.slow
def test_two_ranks_are_ended_by_a_second_ctrl_c(start: Start, shapes_cache: Path, tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start(*launch, *training(shapes_cache, "--steps", "3", batch=48))
    process.line("the run's folder is")
    time.sleep(8)
    sent = process.send(signal.SIGINT)
    told, _ = process.line("stopping after the next step")
    assert told - sent < WITHIN_S
    time.sleep(APART_S + 0.2)
    sent = process.send(signal.SIGINT)
    ended, _ = process.line("stopped in the middle of this step")
    assert ended - sent < WITHIN_S
    assert process.end(30) != 0
    assert (tmp_path / "runs" / "slow" / "config.yaml").exists()
