"""Weights & Biases: one run there for each here, with settings, pictures and a summary. Played by a module of our own."""

from __future__ import annotations

import json
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import Listener, log_of, settings

from featcache.errors import UserError
from trainer.runs.weights_and_biases import FILE
from trainer.training.loop import train


class Run:
    """A run of the played module: what it was told."""

    def __init__(self, fails_at: int | None) -> None:
        self.logged: list[dict[str, Any]] = []
        self.metrics: list[tuple[Any, ...]] = []
        self.summary: dict[str, Any] = {}
        self.finished, self._fails_at = 0, fails_at

    def define_metric(self, name: str, **options: Any) -> None:
        self.metrics.append((name, options))

    def log(self, values: dict[str, Any]) -> None:
        if self._fails_at == len(self.logged):
            raise RuntimeError("the network is gone\nfor long")
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


class Wandb(types.ModuleType):
    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__("wandb")
        self.runs: list[Run] = []
        self.begun: list[dict[str, Any]] = []
        self._fails_at = fails_at

    def init(self, **options: Any) -> Run:
        self.begun.append(options)
        self.runs.append(Run(self._fails_at))
        return self.runs[-1]

    def Image(self, pixels: np.ndarray) -> tuple[str, np.ndarray]:
        return "image", pixels


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_PROJECT", "papers")
    return module


@pytest.mark.usefixtures("nano")
def test_a_resumed_run_goes_on_with_its_own(shapes_cache: Path, tmp_path: Path, wandb: Wandb) -> None:
    config = settings(shapes_cache, "repa", steps=4, sample_every=4, name="a run")
    run = train(config, resume=False, watcher=Listener(), root=tmp_path)
    train(settings(shapes_cache, "repa", steps=6, name="a run"), resume=True, watcher=Listener(), root=tmp_path)
    first, second = wandb.begun
    assert first["id"] == second["id"] == json.loads((run / FILE).read_text())["id"]
    assert first["id"].startswith("a-run-") and len(first["id"]) == len("a-run-") + 8
    assert (first["project"], first["name"], first["resume"], first["dir"]) == ("papers", "a run", "allow", str(run))
    assert (first["config"]["method"], first["config"]["steps"], second["config"]["steps"]) == ("repa", 4, 6)
    assert first["config"]["align"]["repa"]["head_width"] == 24
    json.dumps(first["config"])
    began, went_on = wandb.runs
    assert ("*", {"step_metric": "step"}) in began.metrics
    lines = [entry for entry in [*began.logged, *went_on.logged] if "loss" in entry]
    assert [{**entry} for entry in lines] == [{**record} for record in log_of(run)]
    ((kind, pixels),) = [entry["samples"] for entry in began.logged if "samples" in entry]
    assert kind == "image" and pixels.dtype == np.uint8 and pixels.shape[2] == 3
    assert next(entry for entry in began.logged if "samples" in entry)["step"] == 4
    assert went_on.summary["step"] == 6 and went_on.summary["loss"] == log_of(run)[-1]["loss"]
    assert began.finished == went_on.finished == 1


@pytest.mark.usefixtures("nano")
def test_a_copy_under_another_name_is_another_run(
    shapes_cache: Path, tmp_path: Path, wandb: Wandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As is one that goes by another project; a run whose whole folder of runs was moved is the same."""
    run = train(settings(shapes_cache, steps=2), resume=False, watcher=Listener(), root=tmp_path / "runs")
    shutil.copytree(run, tmp_path / "runs" / "branch")
    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "runs", moved)
    train(settings(shapes_cache, steps=3, name="branch"), resume=True, watcher=Listener(), root=tmp_path / "runs")
    train(settings(shapes_cache, steps=3), resume=True, watcher=Listener(), root=moved)
    monkeypatch.setenv("WANDB_PROJECT", "others")
    train(settings(shapes_cache, steps=4), resume=True, watcher=Listener(), root=moved)
    of_run, of_branch, of_moved, of_others = (options["id"] for options in wandb.begun)
    assert of_moved == of_run and len({of_run, of_branch, of_others}) == 3
    assert of_branch.startswith("branch-")


@pytest.mark.usefixtures("nano")
def test_what_fails_later_ends_no_training(shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Wandb(fails_at=2))
    monkeypatch.setenv("WANDB_PROJECT", "papers")
    listener = Listener()
    run = train(settings(shapes_cache, steps=5), resume=False, watcher=listener, root=tmp_path)
    assert len(log_of(run)) == 5
    said = [note for note in listener.warnings if "Weights & Biases" in note]
    assert said == ["nothing more for Weights & Biases: RuntimeError: the network is gone"]


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("text", ["", "[]", '{"id": "../../x"}', "{" * 3000])
def test_a_damaged_file_is_said(shapes_cache: Path, tmp_path: Path, wandb: Wandb, text: str) -> None:
    run = train(settings(shapes_cache, steps=1), resume=False, watcher=Listener(), root=tmp_path)
    (run / FILE).write_text(text)
    with pytest.raises(UserError, match=r"wandb\.json is damaged") as error:
        train(settings(shapes_cache, steps=2), resume=True, watcher=Listener(), root=tmp_path)
    assert error.value.remedy is not None and "Remove it" in error.value.remedy


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise AttributeError('numpy has no float')", "cannot be imported: AttributeError: numpy has no float"),
        ("import sys; sys.exit(5)", "cannot be imported: SystemExit: 5"),
        ("def init(**given): raise SystemExit(3)", "could not be reached: SystemExit: 3"),
    ],
)
def test_a_broken_installation_is_said(
    shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    (tmp_path / "wandb.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("WANDB_PROJECT", "project")
    with pytest.raises(UserError, match=re.escape(said)):
        train(settings(shapes_cache, steps=1), resume=False, watcher=Listener(), root=tmp_path)


@pytest.mark.usefixtures("nano")
def test_without_a_project_nothing_is_begun(
    shapes_cache: Path, tmp_path: Path, wandb: Wandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_PROJECT")
    run = train(settings(shapes_cache, steps=1), resume=False, watcher=Listener(), root=tmp_path)
    assert not wandb.begun and not (run / FILE).exists()
    monkeypatch.setenv("WANDB_PROJECT", "papers")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed"):
        train(settings(shapes_cache, steps=1, name="other"), resume=False, watcher=Listener(), root=tmp_path)
