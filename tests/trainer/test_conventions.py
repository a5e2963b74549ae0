"""What is picked by convention is said: the newest run, the newest cache that fits, where the images are."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import settings
from typer.testing import CliRunner

from tests.told import Told
from trainer.cli import app
from trainer.training.loop import train


@pytest.mark.usefixtures("nano")
def test_what_was_picked_is_said(shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shapes_cache, tmp_path / "caches" / "shapes")
    notes = Told()
    train(replace(settings("", steps=1, name="first"), cache=None), resume=False, watcher=notes)
    assert "the cache is caches/shapes, the newest that fits (--cache names another)" in notes.notes

    words = ["--num", "4", "--sampler", "ode", "--steps", "1", "--extractor", "embedded", "--device", "cpu"]
    judged = CliRunner().invoke(app, ["eval", *words])
    assert judged.exit_code == 0, judged.output
    said = " ".join(judged.output.split())
    assert said.index("judging runs/first, the newest run") < said.index("embedded-FID")
    assert "compared with the images of caches/shapes" in said

    resumed = CliRunner().invoke(app, ["run", "--resume", "--steps", "2", "--device", "cpu"])
    assert resumed.exit_code == 0 and "continuing runs/first, the newest run" in resumed.output

    named = Told()
    train(settings("caches/shapes", steps=1, name="second"), resume=False, watcher=named)
    assert not [note for note in named.notes if "newest" in note]
