"""What is picked by convention is said: the newest run, the newest cache that fits, where the images are."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import settings
from typer.testing import CliRunner

from featcache.cli import app as featcache_app
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


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("elsewhere", [False, True], ids=["unset", "other images"])
def test_eval_finds_the_images_where_they_lay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool) -> None:
    """Without --data; $FEATCACHE_DATA is unset, or names the images of another cache."""
    generator = np.random.default_rng(0)
    for i in range(8):
        folder = tmp_path / "photographs" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "others" / "a").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "others" / "a" / "1.png")
    others = str(tmp_path / "others")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEATCACHE_DATA", raising=False)
    asked = ["--data", "photographs", "--encoder", "tiny@5", "--vae", "tiny", "--resolution", "64", "--out", "cache"]
    assert CliRunner().invoke(featcache_app, ["build", *asked, "--device", "cpu"]).exit_code == 0
    run = train(settings("cache", steps=1, name="first"), resume=False, watcher=Told())
    if elsewhere:
        monkeypatch.setenv("FEATCACHE_DATA", others)

    words = ["--num", "4", "--sampler", "ode", "--steps", "1", "--extractor", "embedded", "--device", "cpu"]
    judged = CliRunner().invoke(app, ["eval", *words])
    assert judged.exit_code == 0, judged.output
    assert f"which are in {tmp_path / 'photographs'}" in judged.output.replace("\n", "")
    assert ">real images<" in (run / "report.html").read_text()

    shutil.rmtree(run / "samples")
    refused = CliRunner().invoke(app, ["eval", *words, "--data", others])
    assert "does not hold the images" in str(refused.exception)
    assert not (run / "samples").exists()  # said before anything is drawn
