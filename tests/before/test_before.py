"""Caches and runs that earlier code left on disks: opened, verified, continued, resumed, sampled and judged as ever.

`make_before.py` made them with the state of the code that it names. Stored bytes decode to the same values on every
machine. What is computed anew (encoded, trained, drawn) has the same bits on a machine like the maker's ("made by" in
`recorded.json`) with one thread; on another one the processor's instructions round differently, and `NEAR` holds.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import make_before as before
import numpy as np
import pytest
import torch

import featcache
from featcache.cli import app as featcache_app
from featcache.share.verify import verify
from trainer.cli import app as trainer_app
from trainer.models.config import SIZES
from trainer.runs.folder import load_config

RECORD = json.loads(before.RECORD.read_text())
SAME_MACHINE = RECORD["made by"] == before.made_by()
NEAR: Any = {"rel": 1e-4, "abs": 1e-5}
GREY_LEVELS = 1.0  # of an image's mean
# What was a default when the runs were made and has to be typed now: SRA's head was as wide as the backbone.
SINCE = {"sit": ("--set", "sra.head_ratio=1")}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with all fixtures, the model size that their runs have, and one thread."""
    for archive in sorted(before.HERE.glob("*.tar.xz")):
        with tarfile.open(archive) as packed:
            packed.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SIZES, "Mini", before.SIZE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def featcache_types(*words: str) -> None:
    assert not featcache_app(list(words), standalone_mode=False)


def trainer_types(*words: str) -> None:
    assert not trainer_app(list(words), standalone_mode=False)


def tree(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def root_of(files: dict[str, bytes]) -> dict[str, Any]:
    """Takes the root document away and gives what it says, but for the versions of what began the build."""
    root = json.loads(files.pop("zarr.json"))["attributes"]["featcache"]
    return {key: value for key, value in root.items() if key != "versions"}


def test_they_are_small() -> None:
    files = [path for path in before.HERE.iterdir() if path.suffix in (".xz", ".json")]
    assert len(files) == 6 and sum(path.stat().st_size for path in files) < 250_000


@pytest.mark.parametrize("name", ["zarr", "wds"])
def test_caches_hold_the_values_that_they_held(folder: Path, name: str) -> None:
    path = folder / "caches" / name
    assert before.decoded(path) == RECORD["caches"][name]
    report = verify(path)
    assert not report.problems and report.n_bytes > 5000
    featcache_types("info", str(path))
    featcache_types("verify", str(path))


def test_a_killed_build_goes_on_to_the_bytes_of_a_fresh_one(folder: Path) -> None:
    begun = tree(folder / "caches/unfinished")
    shards = {name: data for name, data in begun.items() if "/c." in name}
    assert shards and "zarr.json" not in begun
    inodes = {name: (folder / "caches/unfinished" / name).stat().st_ino for name in shards}
    featcache_types(*before.BUILDS["unfinished"], "--out", "caches/unfinished")
    kept = {name: (folder / "caches/unfinished" / name).stat().st_ino for name in shards}
    assert kept == inodes, "what was written is not written again"
    featcache_types(*before.BUILDS["unfinished"], "--out", "fresh")
    continued, fresh = tree(folder / "caches/unfinished"), tree(folder / "fresh")
    assert {name: continued[name] for name in shards} == shards
    assert continued.keys() == fresh.keys()
    assert not verify(folder / "caches/unfinished").problems
    if SAME_MACHINE:
        assert root_of(continued) == root_of(fresh)
        assert continued == fresh
        assert before.decoded(folder / "caches/unfinished") == RECORD["caches"]["unfinished"]


def known(found: list[dict[str, float]], recorded: list[dict[str, float]]) -> list[dict[str, float]]:
    """What was logged then; there are more readings (`metric/...`) now."""
    readings = [
        {k: v for k, v in entry.items() if k in old or not k.startswith("metric/")}
        for entry, old in zip(found, recorded)
    ]
    assert len(readings) == len(found)
    return readings


@pytest.mark.parametrize("name", sorted(before.RUNS))
def test_a_run_goes_on_to_the_same_bits(folder: Path, name: str) -> None:
    run, recorded = folder / "runs" / name, RECORD["runs"][name]
    assert before.losses(run) == recorded["log"]
    trainer_types(*before.resume_words(name))
    assert [entry["step"] for entry in before.losses(run)] == list(range(1, before.STEPS + 1))
    if SAME_MACHINE:
        assert known(before.losses(run), recorded["log"]) == recorded["log"]
        assert before.weights(run, before.STEPS) == recorded["weights"]
    else:
        for found, expected in zip(known(before.losses(run), recorded["log"]), recorded["log"], strict=True):
            assert found == pytest.approx(expected, **NEAR)
        assert before.norms(run, before.STEPS) == pytest.approx(recorded["norms"], **NEAR)


@pytest.mark.parametrize("name", sorted(before.RUNS))
def test_a_run_begun_now_is_the_one_begun_then(folder: Path, name: str) -> None:
    """Configuration, order of the data, initial weights and draws: the log from the first step on."""
    run = folder / "runs" / name
    former = load_config(run)
    shutil.rmtree(run)
    trainer_types(*before.run_words(name), *SINCE.get(name, ()))
    assert load_config(run) == former
    log = RECORD["runs"][name]["log"]
    for found, expected in zip(known(before.losses(run), log), log, strict=True):
        assert found == (expected if SAME_MACHINE else pytest.approx(expected, **NEAR))


@pytest.mark.parametrize("name", sorted(before.RUNS))
def test_a_run_draws_the_same_pixels_and_is_judged_alike(folder: Path, name: str) -> None:
    run, recorded = folder / "runs" / name, RECORD["runs"][name]
    assert before.metrics(run) == recorded["metrics"], "the earlier judgement is still read"
    trainer_types(*before.sample_words(name, "drawn"))
    drawn = before.pixels(folder / "drawn")
    assert drawn.mean((1, 2)) == pytest.approx(np.array(recorded["pixels"]["means"]), abs=GREY_LEVELS)
    if SAME_MACHINE:
        assert before.digest(drawn.tobytes()) == recorded["pixels"]["sha256"]
    # What `embedded` was then has a name of its own now.
    trainer_types(*("embedded-vit" if word == "embedded" else word for word in before.eval_words(name)))
    found = {metric.replace("embedded-vit-", "embedded-"): value for metric, value in before.metrics(run).items()}
    assert found == (recorded["metrics"] if SAME_MACHINE else pytest.approx(recorded["metrics"], rel=0.02, abs=0.02))
    assert "embedded-vit-FID" in (run / "report.html").read_text()


def test_earlier_recipes_resolve_to_the_same_settings(folder: Path) -> None:
    """A recipe of a user's own upon one of the project's, by the names that those had as files; the rows themselves are in
    tests/pipelines/resolved.json."""
    from trainer.runs.recipes import load_recipe_file

    for base in ("ahpa/xl2", "pipelines/ahpa/xl2.yaml", "../ahpa/xl2.yaml"):
        (folder / "mine.yaml").write_text(f"base: {base}\nsteps: 1000\nalign: {{ahpa: {{weight: 0.5}}}}\n")
        row, mine = load_recipe_file("ahpa/xl2"), load_recipe_file(folder / "mine.yaml")
        align = {"ahpa": {**row.values["align"]["ahpa"], "weight": 0.5}}
        expected = {**row.values, "steps": 1000, "align": align}
        expected.pop("published")
        assert mine.values == expected


def test_opening_is_where_it_was(folder: Path) -> None:
    cache = featcache.open("caches/zarr")
    with cache.reader(["vae/moments", "label"]) as reader:
        out = reader.allocate(2)
        reader.read(np.array([3, 1]), out)
    assert out["vae/moments"].shape == (2, 32, 4, 4) and out["label"].tolist() == [*cache.labels()[[3, 1]]]
