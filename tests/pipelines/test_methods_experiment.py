"""The experiment on methods: its statistics against closed forms, and a tiny run of it that is interrupted."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featcache.errors import UserError
from pipelines.experiments import checks, step_times
from pipelines.experiments import methods as experiment
from pipelines.experiments.methods import METHODS, PARTS, Settings, run_part, run_values, write_json
from pipelines.experiments.pictures import COLUMNS, draw_samples
from pipelines.experiments.summary import SHOWN, apart, mean_and_interval, summarise, table
from trainer.runs.config import RunConfig

FID = "embedded-FID"
TINY = Settings(
    steps=4, points=2, batch_size=4, images=16, samples=8, sampling_steps=2, held_out=8, bins=2, device="cpu"
)


def entry(method: str, seed: int, step: int, time_s: float, fid: float) -> dict[str, object]:
    return {"method": method, "seed": seed, "step": step, "time_s": time_s, "metrics": {FID: fid}}


def test_every_method_has_a_valid_configuration() -> None:
    for name, method in METHODS.items():
        config = RunConfig(**run_values(Settings(), name))
        assert config.methods == (() if method.name == "none" else (method.name,))
        assert config.align_until == (1500 if name == "haste" else None)
    assert run_values(Settings(), "repa")["align"] == {"repa": {"head_width": 384}}
    assert run_values(Settings(model="SiT-S/2"), "sra2")["align"] == {"sra2": {"head_width": 768}}


def test_parts_are_what_is_claimed_of_them() -> None:
    """On 64 tokens, five seeds of vanilla, REPA and AHPA; elsewhere all methods with three."""
    for name, part in PARTS.items():
        tokens = (part.resolution // 8 // 2) ** 2
        assert str(tokens) == name.rpartition("-")[2]
        if tokens == 64:
            assert part.seeds == 5 and part.methods == ("none", "repa", "ahpa")
        else:
            assert part.seeds == 3 and set(part.methods) == set(METHODS) - {"ahpa-whiten"}


def test_mean_and_interval() -> None:
    assert mean_and_interval([2.0]) == (2.0, None)
    mean, width = mean_and_interval([1.0, 2.0, 6.0])
    assert mean == 3.0
    deviation = math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 2)
    assert width == pytest.approx(4.302653 * deviation / math.sqrt(3), rel=1e-6)  # of Student's t with 2 degrees


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        mean, width = mean_and_interval(rng.normal(3.0, 2.0, 4).tolist())
        inside += width is not None and abs(mean - 3.0) <= width
    assert inside / 2000 == pytest.approx(0.95, abs=0.015)


def test_summary_averages_over_seeds_and_interpolates_to_equal_time() -> None:
    fast = [
        entry("none", s, step, step / 10, fid)
        for s, fids in ((0, (40, 20)), (1, (44, 24)))
        for step, fid in zip((100, 200), fids)
    ]
    slow = [entry("sra", 0, 200, 40.0, 10.0), entry("sra", 0, 100, 16.0, 30.0)]  # in any order
    summary = summarise([*fast, *slow, entry("sra", 1, 100, 17.0, 31.0)])  # seed 1 has not finished
    assert summary["last_step"] == 200 and summary["budget_s"] == 20.0
    # 0.16 and 0.24 s per step in the two halves.
    assert summary["step_s"] == pytest.approx({"none": 0.1, "sra": 0.2})
    none, sra = summary["curves"]["none"], summary["curves"]["sra"]
    assert [(p["step"], p["seeds"], p[FID]) for p in none] == [(100, 2, 42.0), (200, 2, 22.0)]
    assert none[0][f"{FID} interval"] == pytest.approx(12.7062 * 2.0, rel=1e-4)
    assert [(p["step"], p["seeds"], p[f"{FID} interval"]) for p in sra] == [(100, 1, None), (200, 1, None)]
    assert summary["equal_time"]["none"][FID] == 22.0
    # 20 s are 100 steps of 0.2 s.
    end = summary["equal_time"]["sra"]
    assert end["step"] == pytest.approx(100) and end[FID] == pytest.approx(30)
    # Against the vanilla run of the same seed, which ends at 20: at equal steps 10 lower, at equal time 10 higher.
    assert end[f"{FID} minus vanilla"] == pytest.approx(10)
    assert summary["equal_steps"]["sra"][f"{FID} minus vanilla"] == pytest.approx(-10)
    assert f"{FID} minus vanilla" not in summary["equal_steps"]["none"]


def test_between_two_evaluations_curves_flatten() -> None:
    """Of a metric that falls with the logarithm of the steps, the figure at equal time is exact."""
    both = [entry("none", 0, step, step / 10, 50 - math.log(step)) for step in (100, 300)]
    both += [entry("repa", 0, step, step / 8, 40 - math.log(step)) for step in (100, 300)]
    end = summarise(both)["equal_time"]["repa"]
    assert end["step"] == pytest.approx(240) and end[FID] == pytest.approx(40 - math.log(240))


def test_differences_are_taken_seed_by_seed() -> None:
    """What seeds share (a good or a bad start) is no part of the difference's interval."""
    both = [entry("none", s, 10, 1.0, base) for s, base in enumerate((10.0, 30.0, 20.0))]
    both += [entry("repa", s, 10, 1.0, base - 1.0) for s, base in enumerate((10.0, 30.0, 20.0))]
    end = summarise(both)["equal_steps"]["repa"]
    assert end[f"{FID} minus vanilla"] == pytest.approx(-1.0)
    assert end[f"{FID} minus vanilla interval"] == pytest.approx(0.0, abs=1e-12)
    assert end[f"{FID} interval"] > 20


def test_methods_are_set_against_each_other_by_the_seeds_that_both_have() -> None:
    found = [entry("ahpa", s, step, 1.0, fid - step) for s, fid in ((2, 30.0), (0, 50.0), (1, 1.0)) for step in (5, 10)]
    found += [entry("repa", s, step, 1.0, fid) for s, fid in ((0, 60.0), (2, 19.0), (3, 7.0)) for step in (5, 10)]
    assert apart(found, "ahpa", "repa") == {FID: [50 - 10 - 60, 30 - 10 - 19]}
    assert apart(found, "ahpa", "sra") == {}


def test_the_table_shows_as_many_digits_as_the_interval_allows() -> None:
    evaluations = [
        {"method": m, "seed": s, "step": 10, "time_s": 1.0, "metrics": dict.fromkeys(SHOWN, fid)}
        for m, fids in (("none", (5.0, 5.2)), ("repa", (4.0, 4.22)))
        for s, fid in enumerate(fids)
    ]
    half = [{**each, "step": 5, "metrics": dict.fromkeys(SHOWN, 7.0)} for each in evaluations]
    found = summarise([*half, *evaluations])
    by_step, by_time, earlier = table(found, {"none": "vanilla", "repa": "REPA"}).split("\n\n")
    assert "| after 5 steps | FID by the judge |" in earlier and "| vanilla | 7.000 ± 0.000 |" in earlier
    for lines in (by_step.splitlines(), by_time.splitlines()):
        assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
        assert lines[3].count(" 4.1 ± 1.4 (−0.99 ± 0.13) |") == len(SHOWN)
    assert "| after 10 steps | seeds | FID by the judge | KID by the judge | precision | recall |" in by_step
    assert "| vanilla | 2 | 5.1 ± 1.3 | 5.1 ± 1.3 |" in by_step
    assert (
        "| after 1 s of training | ms per step | steps |" in by_time and "| vanilla | 100 | 10 | 5.1 ± 1.3 |" in by_time
    )


def test_other_work_on_the_machine_does_not_make_a_method_slow() -> None:
    """Each seed is disturbed elsewhere. A method that is faster in its second half (HASTE) is timed in both."""
    times = {0: [60.0, 68.0], 1: [10.0, 90.0], 2: [30.0, 39.0]}
    summary = summarise(
        [entry("haste", s, 100 * (i + 1), t, 10.0) for s, ts in times.items() for i, t in enumerate(ts)]
    )
    assert summary["step_s"]["haste"] == pytest.approx((10 + 8) / 200)
    assert [p["time_s"] for p in summary["curves"]["haste"]] == pytest.approx([9, 18])


def test_step_times_that_were_measured_apart() -> None:
    slow = [entry("none", 0, 100, 50.0, 8.0), entry("repa", 0, 100, 60.0, 4.0)]
    summary = summarise(slow, {"none": 0.1, "repa": 0.2, "sara": 0.3})
    assert summary["step_s"] == {"none": 0.1, "repa": 0.2} and summary["budget_s"] == pytest.approx(10.0)
    assert summary["equal_time"]["repa"]["step"] == pytest.approx(50)


def test_a_round_takes_every_method_in_turn_and_ratios_are_within_rounds() -> None:
    """A machine that doubles its speed from round to round changes no ratio."""
    order: list[str] = []
    cost = {"none": 1.0, "repa": 1.5, "sra": 3.0}

    def block(name: str) -> Callable[[int], float]:
        def run(steps: int) -> float:
            assert steps == step_times.BLOCK
            order.append(name)
            return cost[name] / 2.0 ** (len(order) // 3 if len(order) % 3 else len(order) // 3 - 1)

        return run

    told: list[int] = []
    seconds = step_times.take_turns({name: block(name) for name in cost}, rounds=3, told=told.append)
    assert order == [
        *("none", "repa", "sra"),
        *("repa", "sra", "none"),
        *("sra", "none", "repa"),
        *("none", "repa", "sra"),
    ]
    assert told == [step_times.BLOCK] * 12 and seconds["none"] == [1 / 2, 1 / 4, 1 / 8]
    found = step_times.of_rounds(seconds, ["none", "repa", "haste", "sra"])
    assert found["step_s"] == {"none": 1 / 4, "repa": 1.5 / 4, "haste": 1.25 / 4, "sra": 3 / 4}  # HASTE: REPA for half
    assert found["ratios"]["repa"] == [1.5, 1.5, 1.5]
    uneven = step_times.of_rounds({"none": [1.0, 2.0, 9.0], "repa": [2.0, 3.0, 36.0]}, ["repa"])
    assert uneven["step_s"] == {"repa": 4.0} and uneven["ratios"]["repa"] == [1.5, 2.0, 4.0]
    many = step_times.of_rounds({"none": [1.0] * 40, "repa": [*range(1, 41)]}, ["repa"])
    assert many["ratios"]["repa"] == [14, 20.5, 27], "ranks of the 95 % interval of a median of 40, as tables have them"


@pytest.mark.slow
def test_step_times_of_a_part_count_in_its_tables(tmp_path: Path) -> None:
    part = tmp_path / "shapes-16"
    with pytest.raises(UserError, match="holds no experiment"):
        step_times.main(part="shapes-16", out=tmp_path)
    run_part(TINY, methods=["none", "haste"], seeds=1, out=part)
    assert json.loads((part / "results.json").read_text())["timed"] is None
    step_times.main(part="shapes-16", out=tmp_path, rounds=6)
    record = json.loads((part / "step_times.json").read_text())
    assert set(record["step_s"]) == {"none", "haste"} and set(record["ratios"]) == {"none", "repa"}
    assert all(0 < seconds < 60 for seconds in record["step_s"].values())
    assert record["settings"] == {"part": "shapes-16", "model": TINY.model, "batch_size": 4, "precision": "bf16"}
    run_part(TINY, methods=["none", "haste"], seeds=1, out=part)
    assert json.loads((part / "results.json").read_text())["timed"] == record
    assert json.loads((part / "summary.json").read_text())["step_s"] == record["step_s"]
    run_part(TINY, methods=["sra"], seeds=1, out=part)  # more methods may be added later, and be timed then
    assert json.loads((part / "results.json").read_text())["timed"] is None
    assert experiment.read_settings(part)[1]["methods"].keys() == {"none", "haste", "sra"}
    write_json(part / "step_times.json", {**record, "settings": {**record["settings"], "batch_size": 8}})
    with pytest.raises(UserError, match="with another batch_size"):
        run_part(TINY, methods=["none"], seeds=1, out=part)


def test_points_must_divide_steps() -> None:
    with pytest.raises(UserError, match="evenly spaced"):
        Settings(steps=100, points=3)
    with pytest.raises(UserError, match="no part"):
        Settings(part="shapes")
    for steps, points, expected in ((3000, 5, 50), (20, 2, 10), (202, 2, 1), (140, 2, 35)):
        settings = Settings(steps=steps, points=points)
        assert settings.log_every == expected and settings.interval % settings.log_every == 0


def test_a_part_runs_continues_and_refuses_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = run_part(TINY, methods=["none"], seeds=1, out=tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(e["method"], e["seed"], e["step"]) for e in results["evaluations"]] == [("none", 0, 2), ("none", 0, 4)]
    assert all(math.isfinite(e["metrics"][metric]) for e in results["evaluations"] for metric in SHOWN)
    assert 0 < results["evaluations"][0]["time_s"] < results["evaluations"][1]["time_s"]
    assert figure.read_text().lstrip().startswith("<?xml") and (tmp_path / "methods.png").stat().st_size > 10_000
    assert [p.name for p in (tmp_path / "runs/none-0/checkpoints").iterdir()] == ["step_0000004"]
    alone = np.asarray(Image.open(tmp_path / "samples.jpg"))

    train = experiment._train

    def only_new(settings: Settings, *, method: str, **places: Any) -> None:
        assert method == "sra2", "a finished run was trained again"
        train(settings, method=method, **places)

    with monkeypatch.context() as patched:
        patched.setattr(experiment, "_train", only_new)
        run_part(TINY, methods=["sra2"], seeds=1, out=tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["curves"]) == ["none", "sra2"]
    assert "| SRA 2 |" in (tmp_path / "table.md").read_text()
    both = np.asarray(Image.open(tmp_path / "samples.jpg"))
    assert both.shape == (2 * len(alone), *alone.shape[1:])
    assert np.abs(both[: len(alone) - 8].astype(int) - alone[:-8]).max() < 32  # but for JPEG's blocks at the edge

    for change, message in (({"lr": 1e-3}, "another lr"), ({"points": 4}, "another points")):
        with pytest.raises(UserError, match=message):
            run_part(replace(TINY, **change), methods=["none"], seeds=1, out=tmp_path)
    with pytest.raises(UserError, match="no method 'rep'"):
        run_part(TINY, methods=["rep"], seeds=1, out=tmp_path)
    monkeypatch.setitem(METHODS, "sra2", replace(METHODS["sra2"], narrowed=False))
    with pytest.raises(UserError, match="runs of sra2 with other options"):
        run_part(TINY, methods=["sra2"], seeds=1, out=tmp_path)


def test_rows_of_samples_share_classes_and_noise(tmp_path: Path) -> None:
    run_part(replace(TINY, steps=2, points=1), methods=["none"], seeds=1, out=tmp_path)
    run = tmp_path / "runs/none-0"
    path = draw_samples({"a": run, "b": run}, tmp_path, step=2, sampling_steps=2, device="cpu")
    pixels = np.asarray(Image.open(path)).astype(int)
    side = pixels.shape[1] // COLUMNS
    above, below = pixels[:side], pixels[len(pixels) // 2 :][:side]
    assert np.abs(above - below).mean() < 4, "but for JPEG's blocks alike"
    assert np.abs(above[:, :side] - above[:, side : 2 * side]).mean() > 20, "columns differ"


@pytest.mark.slow
def test_checks_look_at_every_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = tmp_path / "shapes-16"
    with pytest.raises(UserError, match="holds no experiment"):
        checks.main(part="shapes-16", out=tmp_path)
    run_part(replace(TINY, images=32), methods=["none", "ahpa"], seeds=1, out=part)
    checks.main(part="shapes-16", out=tmp_path, samples=16, angles=False)
    assert "angle" not in json.loads((part / "checks.json").read_text())["runs"]["ahpa-0"]
    checks.main(part="shapes-16", out=tmp_path, samples=16)
    whole = json.loads((part / "checks.json").read_text())
    found, real = whole["runs"], whole["held_out"]
    images, decoded, blurred = (real[name]["embedded-FID"] for name in ("images", "decoded", "blurred"))
    assert images < decoded < blurred, "nothing beats the images themselves"
    assert list(found) == ["ahpa-0", "none-0"] and found["none-0"]["angle"] == found["none-0"]["router"] == {}
    aligned = found["ahpa-0"]
    assert all(len(values) == 10 and any(v is not None for v in values) for values in aligned["angle"].values())
    assert set(aligned["angle"]) == {"ema", "model"} and aligned["angle"]["ema"] != aligned["angle"]["model"]
    shares = aligned["router"]
    assert {name.rpartition("/")[0] for name in shares} == {"vae/G3", "vae/G4"}
    by_t = np.array(list(shares.values()))  # [layers, times]
    assert by_t.shape[1] == len(checks.TIMES) and by_t.min() > 0 and by_t.sum(axis=0) == pytest.approx(1)
    log = [json.loads(line) for line in (part / "runs/ahpa-0/log.jsonl").read_text().splitlines()]
    assert aligned["denoise"] == np.mean([r["denoise"] for r in log if r.get("step", 0) > TINY.steps * 2 / 3])
    assert aligned["judged"] == {}

    # What is there is not measured again; judged again with the experiment's own steps, a run gets the same figures.
    aligned["denoise"] = 7.0
    (part / "checks.json").write_text(json.dumps({"runs": found, "samples": 16}))
    few = TINY.sampling_steps
    for steps in (few, few + 1):
        checks.main(part="shapes-16", out=tmp_path, samples=16, sampling_steps=steps, judged_seeds=1)
    again = json.loads((part / "checks.json").read_text())["runs"]["ahpa-0"]
    judged = {steps: metrics[FID] for steps, metrics in again["judged"].items()}
    last = json.loads((part / "runs/ahpa-0/evaluations.json").read_text())[-1]["metrics"]
    assert again["denoise"] == 7.0 and judged[str(few)] == pytest.approx(last[FID], 1e-5) != judged[str(few + 1)]
    assert "ahpa-0: training loss 7.0000, cosine" in capsys.readouterr().out
    with pytest.raises(UserError, match="with --samples 16"):
        checks.main(part="shapes-16", out=tmp_path, samples=17)


def test_the_held_out_loss_is_alike_for_all_and_that_of_predicting_nothing_at_first(tmp_path: Path) -> None:
    """A model that predicts zero has the mean square of the velocity, `E (e - z)^2 = 1 + E z^2`, in each interval."""
    import torch

    import featcache
    from featcache.inspect import read_feature
    from trainer.runs import checkpoint
    from trainer.training.objective import sample_posterior

    settings = replace(TINY, steps=2, points=1, held_out=16)
    run_part(settings, methods=["none"], seeds=1, out=tmp_path)
    run, held_out = tmp_path / "runs/none-0", tmp_path / "held-out"
    path = checkpoint.find_checkpoint(run, 2)[1]
    zeros = {name: torch.zeros_like(value) for name, value in checkpoint.load_tensors(path, "ema").items()}
    from safetensors.torch import save_file

    save_file(zeros, path / "ema.safetensors")
    found = experiment.held_out_loss(run, 2, held_out, bins=4, device="cpu")
    assert found == experiment.held_out_loss(run, 2, held_out, bins=4, device="cpu")
    cache = featcache.open(held_out)
    moments = torch.from_numpy(read_feature(cache, "vae/moments", range(len(cache))))
    vae = cache.manifest.dataset.vae
    assert vae is not None
    noise = torch.randn(64, *moments[0, : len(moments[0]) // 2].shape, generator=torch.Generator().manual_seed(0))
    z = sample_posterior(moments.repeat(4, 1, 1, 1), noise, scale=vae["scaling_factor"], shift=vae["shift_factor"])
    expected = 1 + z.square().mean().item()
    assert [found[f"denoise t={i / 4:.1f}-{(i + 1) / 4:.1f}"] for i in range(4)] == pytest.approx(
        [expected] * 4, rel=0.05
    )


def test_photographs_come_from_archives(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("train-0.zip", "train-1.zip", "val.zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for i in range(12):
                place = tmp_path / f"{i}.png"
                Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(place)
                archive.write(place, f"{'ab'[i % 2]}/{name}-{i}.png")
                place.unlink()
    settings = replace(TINY, part="photographs-16", steps=2, points=1)
    with pytest.raises(UserError, match="needs photographs"):
        run_part(settings, methods=["none"], seeds=1, out=tmp_path / "out")
    run_part(settings, methods=["none"], seeds=1, out=tmp_path / "out", photographs=tmp_path)
    text = (tmp_path / "out/results.json").read_text()
    assert str(tmp_path) not in text
    assert len(json.loads(text)["evaluations"]) == 1


@pytest.mark.slow
def test_workers_end_with_an_experiment_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines.experiments.methods", "--part", "shapes-16", "--methods", "none,repa"]
    command += ["--jobs", "2", "--images", "16", "--held-out", "8", "--batch-size", "4", "--out", str(tmp_path)]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def all_ended() -> bool:
        try:
            os.killpg(running.pid, 0)
        except ProcessLookupError:
            return True
        return False

    try:
        logs = [tmp_path / f"shapes-16/runs/{method}-0/log.jsonl" for method in ("none", "repa")]
        wait_for(lambda: all(log.is_file() and log.stat().st_size for log in logs), seconds=300)
        running.kill()
        running.wait()
        wait_for(all_ended, seconds=60)
    finally:
        if not all_ended():
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()


def wait_for(condition: Callable[[], bool], *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.2)


@pytest.mark.slow
def test_two_jobs_give_what_one_gives(tmp_path: Path) -> None:
    settings = replace(TINY, steps=2, points=1)
    found = []
    for jobs in (1, 2):
        run_part(settings, methods=["none"], seeds=2, out=tmp_path / str(jobs), jobs=jobs)
        entries = json.loads((tmp_path / str(jobs) / "results.json").read_text())["evaluations"]
        found.append({entry["seed"]: entry["metrics"][FID] for entry in entries})
    assert found[0].keys() == {0, 1}
    assert found[1] == pytest.approx(found[0], rel=1e-3)  # another number of threads sums in another order
