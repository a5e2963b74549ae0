"""A resumed run equals an uninterrupted one, bit by bit, however and whenever it was interrupted."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import Listener, assert_identical, keep_only, log_of, settings

from featcache.errors import CacheError, UserError
from featcache.settings import to_mapping
from trainer.runs import checkpoint
from trainer.runs.config import RunConfig
from trainer.runs.log import OF_THE_MACHINE
from trainer.training.loop import train

STEPS = 6


def run(config: RunConfig, root: Path, *, resume: bool = False) -> Path:
    return train(config, resume=resume, watcher=Listener(), root=root)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("none", {"model": "DiT-Nano/2"}),
        ("dya", {"align_until": 4}),
        ("ahpa+sra", {"precision": "bf16", "ema_warmup": True}),
        ("sara", {"precision": "fp16", "accumulate": 2}),
        ("ahpa", {"align": {"ahpa": {"normalize": "whiten", "router_lr": 0.1, "entropy_floor": 0.9}}}),
    ],
)
def test_resuming_at_every_step_changes_nothing(
    shapes_cache: Path, tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    """Weights, average, both optimisers, router, heads, discriminator and loss scale; the log, too."""
    common = {"steps": STEPS, "checkpoint_every": 1, "keep_checkpoints": STEPS, "warmup_steps": 3}
    config = settings(shapes_cache, method, **common, **changes)
    whole = run(config, tmp_path / "whole")
    for step in range(1, STEPS):
        root = tmp_path / f"from-{step}"
        keep_only(whole, step, root / "run")
        resumed = run(config, root, resume=True)
        assert_identical(whole, resumed, STEPS)
        first, second = (
            [{k: v for k, v in r.items() if k not in OF_THE_MACHINE} for r in log_of(x)] for x in (whole, resumed)
        )
        assert first == second


@pytest.mark.usefixtures("nano")
def test_the_log_is_cut_back_to_the_checkpoint(shapes_cache: Path, tmp_path: Path) -> None:
    config = settings(shapes_cache, steps=4, checkpoint_every=2, keep_checkpoints=9)
    whole = run(config, tmp_path / "whole")
    copy = keep_only(whole, 2, tmp_path / "cut" / "run")
    with (copy / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # torn by a crash
    resumed = run(config, tmp_path / "cut", resume=True)
    assert [r["step"] for r in log_of(resumed)] == [1, 2, 3, 4]
    times = [r["time_s"] for r in log_of(resumed)]
    assert times == sorted(times) and times[2] > times[1], "training time goes on where it stopped"


@pytest.mark.usefixtures("nano")
def test_more_steps_may_be_added(shapes_cache: Path, tmp_path: Path) -> None:
    first = run(settings(shapes_cache, steps=3), tmp_path / "a")
    run(settings(shapes_cache, steps=5), tmp_path / "a", resume=True)
    assert_identical(first, run(settings(shapes_cache, steps=5), tmp_path / "b"), 5)


@pytest.mark.usefixtures("nano")
def test_a_finished_run_is_left_alone(shapes_cache: Path, tmp_path: Path) -> None:
    config = settings(shapes_cache, steps=2)
    path = run(config, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()}
    listener = Listener()
    train(config, resume=True, watcher=listener, root=tmp_path)
    assert "nothing to do" in listener.warnings[-1]
    assert before == {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()}


@pytest.mark.usefixtures("nano")
def test_changed_settings_are_refused_and_harmless_ones_are_not(shapes_cache: Path, tmp_path: Path) -> None:
    run(settings(shapes_cache, "repa", steps=2), tmp_path)
    with pytest.raises(UserError, match="exists already") as error:
        run(settings(shapes_cache, "repa", steps=4), tmp_path)
    assert error.value.remedy is not None and "--resume" in error.value.remedy
    for changed in (
        {"lr": 2e-3},
        {"batch_size": 8},
        {"seed": 1},
        {"clip": 2.0},
        {"align": {"repa": {"head_width": 32}}},
    ):
        with pytest.raises(UserError, match=next(iter(changed))):
            run(settings(shapes_cache, "repa", steps=4, **changed), tmp_path, resume=True)
    with pytest.raises(UserError, match="method"):
        run(settings(shapes_cache, "none", steps=4), tmp_path, resume=True)
    run(settings(shapes_cache, "repa", steps=4, accumulate=2, log_every=2, keep_checkpoints=5), tmp_path, resume=True)


@pytest.mark.usefixtures("nano")
def test_another_cache_is_refused(shapes_cache: Path, tmp_path: Path) -> None:
    path = run(settings(shapes_cache, steps=2), tmp_path)
    summary = json.loads((path / "cache.json").read_text())
    features = summary["features"]
    changed = {**features, "vae/moments": {**features["vae/moments"], "codec": "fp32"}}
    for key, value in (("fingerprint", "0" * 64), ("features", changed)):
        (path / "cache.json").write_text(json.dumps({**summary, key: value}))
        with pytest.raises(CacheError) as error:
            run(settings(shapes_cache, steps=4), tmp_path, resume=True)
        assert error.value.remedy == f"Pass the cache it was started with: --cache {shapes_cache}"


@pytest.mark.usefixtures("nano")
def test_a_damaged_checkpoint_is_an_error_with_a_way_out(shapes_cache: Path, tmp_path: Path) -> None:
    path = run(settings(shapes_cache, steps=4, checkpoint_every=2), tmp_path)
    file = path / "checkpoints" / "step_0000004" / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="ema") as error:
        run(settings(shapes_cache, steps=6), tmp_path, resume=True)
    assert error.value.remedy is not None and "from the one before" in error.value.remedy


class ForkServer:
    """See fork_server.py."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def start(self, config: RunConfig, root: Path, *, resume: bool = False) -> int:
        job = {"settings": to_mapping(config), "root": str(root), "resume": resume}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(self._answer())

    def status(self) -> int:
        return int(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    process = ForkServer()
    yield process
    process.close()


def wait_for(condition: Any, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def check_complete(run_folder: Path) -> int:
    """The latest checkpoint can be read whole; returns its step (0 if there is none)."""
    found = checkpoint.list_checkpoints(run_folder)
    for step, path in found:
        assert checkpoint.load_state(path)["step"] == step
        for stem in ("model", "ema", "optimizer", "alignment"):
            assert checkpoint.load_tensors(path, stem)
    return found[-1][0] if found else 0


def kill_and_continue(
    server: ForkServer, config: RunConfig, tmp_path: Path, *, kills: int, seed: int, expected: Path
) -> int:
    """SIGKILLs a run again and again at random moments, then lets it finish. Returns how many kills hit a save."""
    rng, folder, in_save = random.Random(seed), tmp_path / "run", 0
    saving = folder / "checkpoints"
    for attempt in range(kills):
        child = server.start(config, tmp_path, resume=attempt > 0)
        at = check_complete(folder)
        wait_for(lambda: any(s > at for s, _ in checkpoint.list_checkpoints(folder)))  # noqa: B023
        if attempt % 2:  # aim at the middle of a save
            wait_for(lambda: any(saving.glob(".step_*.partial")))
        time.sleep(rng.random() * 0.01)
        os.kill(child, signal.SIGKILL)
        assert server.status() == -signal.SIGKILL
        in_save += bool(list(saving.glob(".step_*")))
        assert check_complete(folder) > at
    server.start(config, tmp_path, resume=True)
    assert server.status() == 0
    assert_identical(expected, folder, config.steps)
    return in_save


@pytest.mark.usefixtures("nano")
def test_sigkill_at_random_moments_loses_nothing(server: ForkServer, shapes_cache: Path, tmp_path: Path) -> None:
    """Router, teacher, discriminator, loss scale and micro-batches together."""
    config = settings(shapes_cache, "ahpa+sra+sara", steps=14, checkpoint_every=1, precision="fp16", accumulate=2)
    expected = run(config, tmp_path / "whole")
    kill_and_continue(server, config, tmp_path / "killed", kills=2, seed=0, expected=expected)


@pytest.mark.slow
@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("method", ["ahpa", "sara"])
def test_many_sigkills_in_the_middle_of_saving(
    server: ForkServer, shapes_cache: Path, tmp_path: Path, method: str
) -> None:
    config = settings(shapes_cache, method, steps=300, checkpoint_every=1)
    expected = run(config, tmp_path / "whole")
    hits = kill_and_continue(server, config, tmp_path / "killed", kills=30, seed=1, expected=expected)
    assert hits >= 5, "the kills have to hit saves to mean anything"


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_leaves(
    server: ForkServer, shapes_cache: Path, tmp_path: Path, number: signal.Signals
) -> None:
    config = settings(shapes_cache, "ahpa", steps=10_000, checkpoint_every=10_000)
    child = server.start(config, tmp_path / "stopped")
    log = tmp_path / "stopped" / "run" / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 3)
    os.kill(child, number)
    os.kill(child, number)  # schedulers and launchers often both send one
    assert server.status() == 128 + number
    step = check_complete(tmp_path / "stopped" / "run")
    assert step >= 3
    steps = step + 2
    short = settings(shapes_cache, "ahpa", steps=steps, checkpoint_every=10_000)
    server.start(short, tmp_path / "stopped", resume=True)
    assert server.status() == 0
    assert_identical(run(short, tmp_path / "whole"), tmp_path / "stopped" / "run", steps)
