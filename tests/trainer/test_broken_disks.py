"""Disks that fill up, fail or vanish while a run writes: every single operation of a save, of the log, of the start."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from faults import Killed, Operations
from safetensors import SafetensorError
from tiny_runs import Listener, assert_identical, log_of, settings

from featcache.errors import UserError
from trainer.runs import checkpoint
from trainer.runs import folder as runs
from trainer.training.loop import train

REFUSALS = [errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EDQUOT]


def save(run: Path, step: int) -> Path:
    tensors = {"model": {"w": torch.full((300,), float(step))}, "ema": {"w": torch.zeros(2)}}
    return checkpoint.save_checkpoint(run, step, tensors, {"time_s": 1.5}, keep=1)


def test_a_save_that_fails_anywhere_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    """Every operation, refused or cut short by a kill; leftovers of killed processes to be removed are there, too."""

    def prepare(run: Path) -> None:
        save(run, 1)
        leftover = run / "checkpoints" / ".step_0000002.partial"
        leftover.mkdir()
        (leftover / "model.safetensors").write_bytes(b"half")

    with pytest.MonkeyPatch.context() as patch:
        prepare(tmp_path / "count")
        operations = Operations(patch, tmp_path / "count", None, None)
        save(tmp_path / "count", 2)
    assert {"save_file", "fsync", "rename", "mkdir", "io.open", "unlink", "rmdir"} <= set(operations.names)
    stopped = 0
    for number in range(operations.count):
        for code in (REFUSALS[number % len(REFUSALS)], None):
            run = tmp_path / f"{number}-{code}"
            prepare(run)
            error: BaseException = Killed() if code is None else OSError(code, os.strerror(code), str(run))
            if code is not None and operations.names[number] == "save_file":
                error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
            with pytest.MonkeyPatch.context() as patch:
                Operations(patch, run, number, error)
                try:
                    save(run, 2)
                except UserError as refused:
                    stopped += 1
                    assert "step 2 could not be written" in refused.what and "\n" not in refused.what
                    assert refused.remedy
                except Killed:
                    pass
            step, path = checkpoint.find_checkpoint(run)
            assert step in (1, 2)
            assert checkpoint.load_tensors(path, "model")["w"].tolist() == [float(step)] * 300
            save(run, 3)  # goes on as if nothing had been
            assert checkpoint.find_checkpoint(run)[0] == 3
            assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_0000003"]
            shutil.rmtree(run)
    assert stopped > operations.count // 2


def test_what_stands_in_the_way_of_a_checkpoint_is_set_aside(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "step_0000002").write_text("a file")
    (tmp_path / "checkpoints" / "step_0000003").mkdir()
    (tmp_path / "checkpoints" / "step_0000003" / "model.safetensors").write_text("not ours")
    for step in (2, 3):
        save(tmp_path, step)
        assert checkpoint.find_checkpoint(tmp_path)[0] == step
    aside = [p.name for p in (tmp_path / "checkpoints").iterdir() if "incomplete" in p.name]
    assert len(aside) == 2
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match="could not be written"):
        save(tmp_path, 4)


@contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def test_a_real_refusal_of_the_kernel(tmp_path: Path) -> None:
    """No stand-in: the limit on file sizes cuts the writing of the tensors short."""
    save(tmp_path, 1)
    with file_size_limit(1000), pytest.raises(UserError, match="step 2 could not be written"):
        save(tmp_path, 2)
    assert checkpoint.find_checkpoint(tmp_path)[0] == 1


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    ("answer", "advice"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), "Free some space or check the disk."),
        (OSError(errno.ENOSPC, "No space left on device"), "Free some space."),
    ],
)
def test_training_on_a_disk_that_fills_up_can_be_resumed(
    shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Exception, advice: str
) -> None:
    config = settings(shapes_cache, steps=6, checkpoint_every=2)
    whole = train(config, resume=False, watcher=Listener(), root=tmp_path / "whole")
    real = safetensors.torch.save_file
    saves = []

    def full(*args: Any, **kw: Any) -> None:
        saves.append(args)
        if len(saves) == 5:  # in the middle of the second checkpoint
            raise answer
        real(*args, **kw)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(UserError, match=r"training stopped \(step 2 is saved\): the checkpoint of step 4") as error:
            train(config, resume=False, watcher=Listener(), root=tmp_path / "full")
    assert error.value.remedy == f"{advice} Training goes on with: trainer run --resume --name run"
    resumed = train(config, resume=True, watcher=Listener(), root=tmp_path / "full")
    assert_identical(whole, resumed, 6)
    assert [record["step"] for record in log_of(resumed)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("code", REFUSALS)
def test_a_log_that_cannot_be_written_ends_the_run_in_one_sentence(
    shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    from trainer.runs import log

    real = log.RunLog._write

    def refuse(self: Any, line: str) -> None:
        if '"step": 3' in line:
            raise OSError(code, os.strerror(code))
        real(self, line)

    config = settings(shapes_cache, steps=4, checkpoint_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(log.RunLog, "_write", refuse)
        with pytest.raises(UserError, match=rf"\(step 2 is saved\): {os.strerror(code)}: .*log\.jsonl"):
            train(config, resume=False, watcher=Listener(), root=tmp_path)
    train(config, resume=True, watcher=Listener(), root=tmp_path)
    assert [record["step"] for record in log_of(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.usefixtures("nano")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_s_disk_may_fill_up(shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread writes beside the training; what it could not write is no reason to stop."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    def refuse(self: Any, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordWriter, "write", refuse)
    listener = Listener()
    train(settings(shapes_cache, steps=3), resume=False, watcher=listener, root=tmp_path)
    assert len(log_of(tmp_path / "run")) == 3
    assert len([warning for warning in listener.warnings if "nothing more for TensorBoard" in warning]) == 1


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("name", ["config.yaml", "cache.json", "log.jsonl", "tensorboard", "checkpoints"])
def test_a_folder_in_place_of_a_file_or_the_other_way_round(shapes_cache: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    if name in ("tensorboard", "checkpoints"):
        (run / name).write_text("a file")
    else:
        (run / name).mkdir()
    if name == "tensorboard":
        listener = Listener()
        train(settings(shapes_cache, steps=1), resume=False, watcher=listener, root=tmp_path)
        assert any("TensorBoard: File exists" in warning for warning in listener.warnings)
        return
    with pytest.raises(UserError) as error:
        train(settings(shapes_cache, steps=1), resume=name == "config.yaml", watcher=Listener(), root=tmp_path)
    assert name in error.value.what and "\n" not in error.value.what


@pytest.mark.usefixtures("nano")
def test_a_grid_that_cannot_be_written_is_a_remark(
    shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.training import grids

    monkeypatch.setattr(grids, "load_decoder", lambda *_: torch.nn.Identity())
    monkeypatch.setattr(grids, "class_grid", lambda *_, **__: np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").write_text("a file")
    listener = Listener()
    train(settings(shapes_cache, steps=1, sample_every=1), resume=False, watcher=listener, root=tmp_path)
    assert any("no sample grid at step 1" in warning for warning in listener.warnings)


def test_small_files_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    runs.write_text(path, "old")
    with pytest.MonkeyPatch.context() as patch:
        operations = Operations(patch, tmp_path, None, None)
        runs.write_text(path, "old")
    for number in range(operations.count):
        for code in (*REFUSALS, None):
            error: BaseException = Killed() if code is None else OSError(code, os.strerror(code))
            with pytest.MonkeyPatch.context() as patch:
                Operations(patch, tmp_path, number, error)
                try:
                    runs.write_text(path, "new")
                    done = True
                except (UserError, Killed):
                    done = False
            assert path.read_text() in (("new",) if done else ("old", "new"))
            runs.write_text(path, "old")


def test_a_damaged_block_of_samples_is_drawn_again(tmp_path: Path) -> None:
    from trainer.sampling.run import _is_whole, _save_block

    _save_block(tmp_path / "000000.npy", np.zeros((4, 2, 2, 3), np.uint8))
    assert _is_whole(tmp_path, 4, 0) and not _is_whole(tmp_path, 5, 0)
    data = (tmp_path / "000000.npy").read_bytes()
    for damaged in (data[:-1], data[:40], b"", b"x" * 200):
        (tmp_path / "000000.npy").write_bytes(damaged)
        assert not _is_whole(tmp_path, 4, 0)
