"""The experiment on the embedded set: its statistics against closed forms, and a tiny run of it that is interrupted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from featcache.errors import UserError
from pipelines.experiments import methods_on_shapes as experiment
from pipelines.experiments.methods_on_shapes import METHODS, NAMES, Settings, mean_and_error, run_experiment, summarise
from trainer.runs.config import RunConfig


def entry(method: str, seed: int, step: int, time_s: float, fid: float) -> dict[str, object]:
    return {"method": method, "seed": seed, "step": step, "time_s": time_s, "metrics": {"embedded-FID": fid}}


def test_every_method_has_a_valid_configuration() -> None:
    assert set(METHODS) == set(NAMES)
    for method, options in METHODS.values():
        config = RunConfig(method=method, align={method: options} if options else {})
        assert config.methods == (() if method == "none" else (method,))


def test_mean_and_standard_error() -> None:
    assert mean_and_error([2.0]) == (2.0, None)
    mean, error = mean_and_error([1.0, 2.0, 6.0])
    assert mean == 3.0
    assert error == pytest.approx(math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 2 / 3))


def test_summary_averages_over_seeds_and_interpolates_to_equal_time() -> None:
    fast = [
        entry("none", s, step, step / 10, fid)
        for s, fids in ((0, (40, 20)), (1, (44, 24)))
        for step, fid in zip((100, 200), fids)
    ]
    slow = [entry("sra", 0, 200, 40.0, 10.0), entry("sra", 0, 100, 16.0, 30.0)]  # in any order
    summary = summarise([*fast, *slow, entry("sra", 1, 100, 17.0, 31.0)])  # seed 1 has not finished
    assert summary["last_step"] == 200 and summary["budget_s"] == 20.0
    # 0.16 and 0.24 s per step in the two halves; of two values the median is the mean.
    assert summary["step_s"] == pytest.approx({"none": 0.1, "sra": 0.2})
    none, sra = summary["curves"]["none"], summary["curves"]["sra"]
    assert [(p["step"], p["seeds"], p["embedded-FID"]) for p in none] == [(100, 2, 42.0), (200, 2, 22.0)]
    assert none[0]["embedded-FID_error"] == pytest.approx(2.0)
    assert [(p["step"], p["seeds"], p["embedded-FID_error"]) for p in sra] == [(100, 1, None), (200, 1, None)]
    assert summary["equal_time"]["none"]["embedded-FID"] == 22.0
    # 20 s are 100 steps of 0.2 s.
    assert summary["equal_time"]["sra"]["step"] == pytest.approx(100)
    assert summary["equal_time"]["sra"]["embedded-FID"] == pytest.approx(30)


def test_a_pause_of_the_machine_does_not_make_a_method_slow() -> None:
    times = [10.0, 20.0, 300.0, 310.0, 320.0]
    summary = summarise([entry("repa", 0, 100 * (i + 1), t, 10.0) for i, t in enumerate(times)])
    assert summary["step_s"]["repa"] == pytest.approx(0.1)
    assert [p["time_s"] for p in summary["curves"]["repa"]] == pytest.approx([10, 20, 30, 40, 50])


def test_times_of_another_experiment(tmp_path: Path) -> None:
    slow = [entry("none", 0, 100, 50.0, 8.0), entry("repa", 0, 100, 60.0, 4.0)]
    summary = summarise(slow, {"none": 0.1, "repa": 0.2, "sara": 0.3})
    assert summary["step_s"] == {"none": 0.1, "repa": 0.2} and summary["budget_s"] == pytest.approx(10.0)
    assert summary["equal_time"]["repa"]["step"] == pytest.approx(50)
    settings = Settings(steps=4, points=2)
    with pytest.raises(UserError, match="no finished experiment"):
        run_experiment(settings, methods=["none"], seeds=1, out=tmp_path / "a", times=tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    for change, message in (({"batch_size": 8}, "timed batch_size 8"), ({}, "did not time sra")):
        timed = {"settings": {"model": settings.model, "batch_size": settings.batch_size, **change}}
        (tmp_path / "results.json").write_text(json.dumps(timed))
        with pytest.raises(UserError, match=message):
            run_experiment(settings, methods=["sra"], seeds=1, out=tmp_path / "a", times=tmp_path)


def test_points_must_divide_steps() -> None:
    with pytest.raises(UserError, match="evenly spaced"):
        Settings(steps=100, points=3)
    for steps, points, expected in ((3000, 5, 50), (20, 2, 10), (202, 2, 1), (140, 2, 35)):
        settings = Settings(steps=steps, points=points)
        assert settings.log_every == expected and settings.interval % settings.log_every == 0


def test_experiment_runs_continues_and_refuses_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(steps=4, points=2, batch_size=4, images=16, samples=8, sampling_steps=2, device="cpu")
    figure = run_experiment(settings, methods=["none"], seeds=1, out=tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(e["method"], e["seed"], e["step"]) for e in results["evaluations"]] == [("none", 0, 2), ("none", 0, 4)]
    assert all(math.isfinite(e["metrics"]["embedded-FID"]) for e in results["evaluations"])
    assert 0 < results["evaluations"][0]["time_s"] < results["evaluations"][1]["time_s"]
    assert figure.read_text().lstrip().startswith("<?xml") and (tmp_path / "methods.png").stat().st_size > 10_000
    assert [p.name for p in (tmp_path / "runs/none-0/checkpoints").iterdir()] == ["step_0000004"]

    train = experiment._train

    def only_new(settings: Settings, *, method: str, **places: Any) -> None:
        assert method == "sra2", "a finished run was trained again"
        train(settings, method=method, **places)

    with monkeypatch.context() as patched:
        patched.setattr(experiment, "_train", only_new)
        run_experiment(settings, methods=["none", "sra2"], seeds=1, out=tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["curves"]) == ["none", "sra2"]
    with pytest.raises(UserError, match="another lr"):
        run_experiment(Settings(**{**results["settings"], "lr": 1e-3}), methods=["none"], seeds=1, out=tmp_path)
    with pytest.raises(UserError, match="no method 'rep'"):
        run_experiment(settings, methods=["rep"], seeds=1, out=tmp_path)


def test_two_jobs_give_what_one_gives(tmp_path: Path) -> None:
    settings = Settings(steps=2, points=1, batch_size=4, images=16, samples=8, sampling_steps=2, device="cpu")
    found = []
    for jobs in (1, 2):
        run_experiment(settings, methods=["none"], seeds=2, out=tmp_path / str(jobs), jobs=jobs)
        entries = json.loads((tmp_path / str(jobs) / "results.json").read_text())["evaluations"]
        found.append({entry["seed"]: entry["metrics"]["embedded-FID"] for entry in entries})
    assert found[0].keys() == {0, 1}
    assert found[1] == pytest.approx(found[0], rel=1e-3)  # another number of threads sums in another order
