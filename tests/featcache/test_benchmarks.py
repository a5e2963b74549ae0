"""The benchmarks of builds: what their results say of their making."""

from __future__ import annotations

import datetime
import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_memory_of_a_build_is_recorded_with_command_date_and_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("FEATCACHE_INDEX", str(tmp_path))  # the benchmark sets its own: put back afterwards
    import build_memory

    monkeypatch.setattr(build_memory, "RESULTS", tmp_path)
    monkeypatch.setattr(build_memory, "SHARD_IMAGES", 64)
    monkeypatch.setattr(sys, "argv", ["benchmarks/build_memory.py", "--count", "128"])
    build_memory.main(count=128, size=32, batch_size=8, every_s=0.005, name="small")
    record = json.loads((tmp_path / "small.json").read_text())
    assert record["command"] == "python benchmarks/build_memory.py --count 128"
    assert datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(record["date"]) < datetime.timedelta(1)
    machine = record["machine"]
    assert machine["cpu"]
    assert machine["threads"] == torch.get_num_threads()
    assert machine["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {name: machine["packages"][name] for name in ("torch", "timm")} == {
        "torch": version("torch"),
        "timm": version("timm"),
    }
    assert record["lowest_bytes"] > 1 << 20
    assert 2 <= len(record["samples_images_s_bytes"]) <= 200
