"""Real training runs small enough for tests: a four-block model on two dozen embedded images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from featcache.progress import Quiet
from featcache.settings import from_mapping
from trainer.models.config import SIZES, TEXT_SIZES
from trainer.runs.config import RunConfig

NANO = "SiT-Nano/2"

# Small heads; everything else as users get it.
METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "repa": {"repa": {"head_width": 24}},
    "sara": {"sara": {"head_width": 24, "discriminator_weights": "random", "adversary_every": 2}},
    "dya": {"dya": {"head_width": 24, "dropout": 0.5}},
    "ahpa": {"ahpa": {"router_width": 16, "time_width": 8}},
    "sra": {"sra": {"head_ratio": 1.0}},
    "sra2": {"sra2": {"head_width": 24}},
    "reg": {"reg": {"head_width": 24}},
    "redi": {},
}


def add_nano() -> None:
    """Makes the size ``Nano`` (4 blocks, width 48, 2 heads) known."""
    SIZES["Nano"] = TEXT_SIZES["Nano"] = (4, 48, 2)


class Listener(Quiet):
    """Remembers what a run tells whoever watches."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.done = 0

    def begin(self, name: str, total: int | None, *, done: int = 0, unit: str = "images") -> None:
        self.done = done
        self.start(run=Path(), total=total or 0, done=done, note=name)

    def update(self, count: int, text: str = "") -> None:
        self.done += count
        self.advance(self.done, {})

    def note(self, text: str) -> None:
        self.warnings.append(text)

    def start(self, *, run: Path, total: int, done: int, note: str) -> None:
        """For tests that act when the first step begins."""

    def advance(self, step: int, shown: Mapping[str, float]) -> None:
        """For tests that act when ``step`` is over."""


def settings(cache: Path | str, method: str = "none", **kw: Any) -> RunConfig:
    """A run of a few steps on the CPU that logs every step."""
    values: dict[str, Any] = {
        "method": method,
        "align": {k: v for name in method.split("+") for k, v in METHOD_OPTIONS[name].items()},
        "model": NANO,
        "cache": str(cache),
        "name": "run",
        "steps": 6,
        "batch_size": 4,
        "lr": 1e-3,
        "ema_decay": 0.9,
        "device": "cpu",
        "log_every": 1,
        "sample_every": 0,
        "checkpoint_every": 100,
        "clip": 1.0,
    }
    return from_mapping(RunConfig, values | kw)


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path, name: str = "loss") -> list[float]:
    return [record[name] for record in log_of(run)]


def checkpoint_files(run: Path, step: int) -> dict[str, dict[str, torch.Tensor]]:
    folder = run / "checkpoints" / f"step_{step:07d}"
    return {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def assert_identical(a: Path, b: Path, step: int) -> None:
    """Every tensor of two checkpoints, bit by bit, and what else they hold but the time."""
    first, second = checkpoint_files(a, step), checkpoint_files(b, step)
    assert first.keys() == second.keys()
    for stem in first:
        assert first[stem].keys() == second[stem].keys(), stem
        for key, value in first[stem].items():
            assert torch.equal(value, second[stem][key]), (stem, key)
    states = [json.loads((run / "checkpoints" / f"step_{step:07d}" / "state.json").read_text()) for run in (a, b)]
    for state in states:
        state.pop("time_s")
    assert states[0] == states[1], "the loss scale among others"


def keep_only(run: Path, step: int, copy: Path) -> Path:
    """A copy of a run as it was right after it had saved ``step``."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    name = f"step_{step:07d}"
    shutil.copytree(run / "checkpoints" / name, copy / "checkpoints" / name)
    return copy
