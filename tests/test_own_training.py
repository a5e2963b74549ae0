"""The programs of docs/own-training.md, as they stand there, on the cache that the page builds."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import featcache
from featcache.cli import app
from featcache.console import run_app
from featcache.torch import Loader

PAGE = Path(__file__).resolve().parents[1] / "docs/own-training.md"
TEXT = PAGE.read_text("utf-8")
PROGRAMS = dict(re.findall(r"^```python (\w+)\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE))
COMMANDS = dict(re.findall(r"^```sh (\w+)\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE))
MAX_LINES = 25
# Those that are no dependencies: their programs run where they are installed.
OPTIONAL = {"accelerate": "accelerate", "jax": "jax"}


def type_in(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line of featcache, as a user types it in `folder`."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", shlex.split(command))
    assert run_app(app) == 0, command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the page's two caches."""
    path = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as monkeypatch:
        type_in(COMMANDS["cache"], path, monkeypatch)
        type_in(COMMANDS["wds"], path, monkeypatch)
    return path


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """Runs a program in that folder; returns what it defined."""

    def call(name: str) -> dict[str, Any]:
        if name in OPTIONAL and importlib.util.find_spec(OPTIONAL[name]) is None:
            pytest.skip(f"{OPTIONAL[name]} is not installed")
        file = tmp_path / f"{name}.py"
        file.write_text(PROGRAMS[name])
        monkeypatch.chdir(folder)
        torch.manual_seed(0)
        return runpy.run_path(str(file), run_name="program")

    return call


def test_the_page_has_the_programs_and_they_are_short() -> None:
    names = ["loader", "dataset", "accelerate", "numpy", "jax", "zarr", "tensorstore", "webdataset"]
    assert list(PROGRAMS) == names
    lengths = {name: len([line for line in text.splitlines() if line.strip()]) for name, text in PROGRAMS.items()}
    assert max(lengths.values()) <= MAX_LINES, lengths
    assert not [line for text in PROGRAMS.values() for line in text.splitlines() if len(line) > 120]


def test_loader(run: Callable[[str], dict[str, Any]], folder: Path) -> None:
    found = run("loader")
    assert torch.isfinite(found["loss"]) and found["x"].shape == (16, 16, 8, 8)
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    again = Loader("caches/photos", ["label"], batch_size=16, stop=11)
    again.load_state_dict(saved["loader"])
    assert again.step == 10 and len(list(again)) == 1


def test_dataset(run: Callable[[str], dict[str, Any]]) -> None:
    loss = run("dataset")["main"]()
    assert loss < np.log(10), "it learns something"


def test_accelerate(run: Callable[[str], dict[str, Any]]) -> None:
    found = run("accelerate")
    assert torch.isfinite(found["loss"]) and len(found["loader"]) == 4


def test_numpy(run: Callable[[str], dict[str, Any]]) -> None:
    found = run("numpy")
    assert found["features"].shape == (64, 128) and found["accuracy"] > 0.5


def test_jax(run: Callable[[str], dict[str, Any]]) -> None:
    losses = run("jax")["losses"]
    assert len(losses) == 16 and losses[-1] < losses[0]


def test_zarr_reads_what_featcache_decodes(run: Callable[[str], dict[str, Any]]) -> None:
    found = run("zarr")
    cache = featcache.open("caches/photos")
    expected = cache.read(found["batch"])  # no slot was skipped
    assert np.array_equal(found["moments"], expected["vae/moments"]) and np.array_equal(
        found["tokens"], expected["tiny@5"]
    )
    assert found["names"] == [cache.classes[label] for label in expected["label"]]


def test_tensorstore_reads_what_featcache_decodes(run: Callable[[str], dict[str, Any]]) -> None:
    pytest.importorskip("tensorstore")
    found = run("tensorstore")
    expected = featcache.open("caches/photos").read(found["batch"])
    assert np.array_equal(found["tokens"], expected["tiny@5"])
    assert np.array_equal(found["read"]["vae/moments"].astype(np.float32), expected["vae/moments"])


def test_webdataset_reads_what_featcache_decodes(run: Callable[[str], dict[str, Any]]) -> None:
    found = run("webdataset")
    cache = featcache.open("caches/photos")
    tokens = cache.read(range(64))["tiny@5"]
    last = np.asarray(found["tokens"])
    assert len(last) == 16 and all((tokens == row).all((1, 2)).sum() == 1 for row in last)


def test_exports_of_the_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's commands, on the page's cache."""
    commands = re.findall(r"^    (featcache export .*)$", TEXT, flags=re.MULTILINE)
    assert [re.findall(r"--to (\w+)", command)[0] for command in commands] == ["repa", "lightningdit", "hf"]
    for command in commands:
        typed = command.replace("caches/imagenet", "caches/photos").replace("dinov2-b@11", "tiny@5")
        type_in(typed + (" --view 0" if "lightningdit" in typed else ""), folder, monkeypatch)
    assert len(json.loads((folder / "data/vae-sd/dataset.json").read_text())["labels"]) == 64
    assert (folder / "data/imagenet_train_256/latents_stats.pt").is_file()
    assert (folder / "imagenet-features/README.md").is_file()
