"""The benchmark of sampling runs, small, and its ratios are those of its own rounds."""

from __future__ import annotations

import importlib.util
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def benchmark() -> Any:
    path = Path(__file__).parents[2] / "benchmarks/sample.py"
    spec = importlib.util.spec_from_file_location("benchmark_sample", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_small_run_writes_what_it_measured(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer
    from torch import nn

    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: None)  # half a minute of compiling is not the subject
    app = typer.Typer()
    app.command()(benchmark.main)
    words = ["--name", "t", "--device", "cpu", "--model", "SiT-Ti/2", "--steps", "2", "--batch-size", "1"]
    done = CliRunner().invoke(app, [*words, "--rounds", "3", "--latent-size", "4", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.exception
    report = json.loads((tmp_path / "sample-t.json").read_text())
    variants = ["eager-fp32", "eager-fp32-guided", "compiled-fp32", "compiled-fp32-guided", "decode"]
    assert list(report["results"]) == variants
    assert report["options"]["precisions"] == "fp32" and report["versions"]["torch"]
    for name in variants:
        result = report["results"][name]
        assert len(result["images_per_s_of_rounds"]) == 3
        assert result["images_per_s"] == pytest.approx(statistics.median(result["images_per_s_of_rounds"]))
    for guided in ("", "-guided"):
        fast, slow = (
            report["results"][f"{kind}-fp32{guided}"]["images_per_s_of_rounds"] for kind in ("compiled", "eager")
        )
        ratio = report["results"][f"compiled-fp32{guided}"][f"times_eager-fp32{guided}"]
        assert ratio == pytest.approx(statistics.median(a / b for a, b in zip(fast, slow)))
    wrong = CliRunner().invoke(app, [*words, "--precisions", "tf32"])
    assert "needs an NVIDIA GPU" in str(wrong.exception)
