"""``trainer eval --all``: every snapshot judged alike, once, into a curve that reports draw."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import Listener, add_nano, settings
from typer.testing import CliRunner

from featcache.errors import UserError
from tests.told import Told
from trainer.cli import app
from trainer.evaluate import curve as curves
from trainer.evaluate.curve import evaluate_all
from trainer.evaluate.run import evaluate_run
from trainer.models.config import SIZES
from trainer.report.curve import write_curve
from trainer.report.run import _published_curve, write_run_report
from trainer.requests import EvalRequest, SampleSettings
from trainer.runs import folder as runs
from trainer.runs.recipes import figures_of, list_recipes
from trainer.runs.snapshots import list_snapshots
from trainer.training.loop import train

ASK = EvalRequest(settings=SampleSettings(num=16, sampler="ode", steps=2, device="cpu"), extractor="embedded")


@pytest.fixture(scope="module")
def trained(shapes_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """``runs/run`` with rounded snapshots of steps 2 and 4 and checkpoints of 4 and 5."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    add_nano()
    root = tmp_path_factory.mktemp("curve")
    config = settings(
        shapes_cache,
        steps=5,
        checkpoint_every=4,
        snapshot_every=2,
        snapshot_dtype="bf16",
        ema_decays=[0.5],
        posthoc=True,
    )
    yield train(config, resume=False, watcher=Listener(), root=root / "runs")
    SIZES.pop("Nano", None)
    torch.set_num_threads(threads)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs" / "run"))


def asked(weights: str | None) -> EvalRequest:
    return replace(ASK, settings=replace(ASK.settings, weights=weights))


def test_every_snapshot_and_the_latest_checkpoint_make_a_curve(run: Path) -> None:
    told = Told()
    curve = evaluate_all(run, ASK, told)
    assert curve is not None and [point.step for point in curve.points] == [2, 4, 5]
    assert [task for task in told.tasks if task[0].startswith("judging")] == [("judging 3 steps", 48, 0, "images")]
    assert sum(told.counts) >= 48
    assert any(text.startswith("step 4 (2 of 3): sampling") for text in told.texts)
    assert len(told.notes) == len(set(told.notes)), "each remark once"
    stored = json.loads(curve.file.read_text())
    assert stored["weights"] == "ema" and curve.file == run / "curves" / "ema.json"
    assert [point["step"] for point in stored["points"]] == [2, 4, 5]
    times = [point["time_s"] for point in stored["points"]]
    assert times == sorted(times) and times[0] > 0
    entries = {entry["step"]: entry for entry in runs.read_metrics(run)}
    assert {step: entry["metrics"] for step, entry in entries.items()} == {p.step: p.metrics for p in curve.points}
    assert [(entries[step]["sampler"] or {}).get("stored") for step in (2, 4, 5)] == ["bf16", "bf16", None]
    alone = evaluate_run(run, replace(ASK, settings=replace(ASK.settings, checkpoint=4)), Told())
    assert alone is not None and alone.metrics == entries[4]["metrics"], "the same settings, the same noise"
    assert write_curve(run, curve).with_suffix(".svg").is_file()
    page = write_run_report([run]).read_text()
    assert "embedded-FID (lower is better)" in page, "all three are one line"


def test_what_was_judged_is_not_judged_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the call was killed in between; with other settings everything is."""
    judged: list[int | None] = []

    def noted(run: Path, request: EvalRequest, *args: Any, **kw: Any) -> Any:
        judged.append(request.settings.checkpoint)
        return evaluate_run(run, request, *args, **kw)

    def killed(*args: Any, **kw: Any) -> Any:
        if judged:
            raise KeyboardInterrupt
        return noted(*args, **kw)

    with monkeypatch.context() as patch:
        patch.setattr(curves, "evaluate_run", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate_all(run, ASK, Told())
    assert judged == [2]
    told = Told()
    monkeypatch.setattr(curves, "evaluate_run", noted)
    first = evaluate_all(run, ASK, told)
    assert judged == [2, 4, 5] and "1 of 3 steps are judged already" in told.notes
    before = (run / "metrics.json").read_bytes()
    assert evaluate_all(run, ASK, Told()) == first
    assert judged == [2, 4, 5] and (run / "metrics.json").read_bytes() == before
    shutil.rmtree(run / "snapshots" / "step_0000002")
    assert evaluate_all(run, ASK, Told()) == first, "what is known of a step that is gone stays"
    other = evaluate_all(run, replace(ASK, settings=replace(ASK.settings, seed=1)), Told())
    assert judged[3:] == [4, 5] and other is not None and first is not None
    assert other.points[0].metrics != first.points[1].metrics


def test_a_reference_folder_that_got_other_images_is_another_reference(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "real"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    judged: list[int | None] = []

    def noted(run: Path, request: EvalRequest, *args: Any, **kw: Any) -> Any:
        judged.append(request.settings.checkpoint)
        return evaluate_run(run, request, *args, **kw)

    monkeypatch.setattr(curves, "evaluate_run", noted)
    ask = replace(ASK, reference=str(folder), metrics=("fid",))
    first = evaluate_all(run, ask, Told())
    assert evaluate_all(run, ask, Told()) == first and judged == [2, 4, 5]
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / "3.png")
    second = evaluate_all(run, ask, Told())
    assert judged == [2, 4, 5] * 2 and first is not None and second is not None
    assert second.points[0].metrics != first.points[0].metrics


@pytest.mark.parametrize(
    ("weights", "steps"), [("ema:0.5", [2, 4, 5]), ("power:0.05", [2, 4, 5]), ("power:0.08", [2, 4])]
)
def test_a_curve_of_any_average(run: Path, weights: str, steps: list[int]) -> None:
    curve = evaluate_all(run, asked(weights), Told())
    assert curve is not None and [point.step for point in curve.points] == steps
    assert curve.file.name == f"{weights.replace(':', '-')}.json"
    plain = evaluate_run(run, asked(None), Told())
    assert plain is not None and curve.points[-1].metrics != plain.metrics


def test_runs_without_anything_to_judge_say_so(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="averages alone"):
        evaluate_all(run, asked("raw"), Told())
    bare = Path(shutil.copytree(run, tmp_path / "runs" / "bare"))
    shutil.rmtree(bare / "snapshots")
    assert [point.step for point in evaluate_all(bare, ASK, Told()).points] == [5]  # type: ignore[union-attr]
    shutil.rmtree(bare / "checkpoints")
    with pytest.raises(UserError, match="no complete checkpoint"):
        evaluate_all(bare, replace(ASK, settings=replace(ASK.settings, seed=9)), Told())
    assert not list_snapshots(bare)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("RUN --all --step 3", "--step names one step, and --all judges every one"),
        ("RUN --all --figure ahpa/b2", "--figure names one step, and --all judges every one"),
        ("RUN --all --sweep guidance=1,2", "--sweep judges one step at many values, and --all judges every one"),
        ("--all --samples x.npz --reference y.npz", "--all is of a run's steps, and --samples are drawn already"),
        ("--samples x.npz --reference y.npz --weights raw", "--weights says how to draw images"),
        ("RUN --weights best", "--weights 'best' names no average"),
    ],
)
def test_what_contradicts_itself_is_refused(words: str, said: str) -> None:
    done = CliRunner().invoke(app, ["eval", *words.split()])
    assert isinstance(done.exception, UserError) and done.exception.what.startswith(said)


def test_the_paper_s_points_stand_beside_the_curve(shapes_cache: Path, tmp_path: Path) -> None:
    """Those of the run's training at any step, of samples drawn alike, and no further than the run has got."""
    recipe = next(r for r in list_recipes("repa/xl2") if r.name == "repa/xl2")
    own = recipe.published
    assert own is not None
    path = tmp_path / "run"
    path.mkdir()
    runs.save_config(path, replace(recipe.config(), cache=str(shapes_cache), name="run").settled())
    sampler = {"sampler": "sde", "steps": 250}
    entries = [
        {"step": step, "metrics": {"FID": value}, "sampler": sampler}
        for step, value in ((100_000, 20.0), (400_000, 8.0))
    ]
    (path / "metrics.json").write_text(json.dumps(entries))
    lines = [{"step": step, "time_s": step / 5, "loss": 1.0} for step in (1, 400_000)]
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_run_report([path]).read_text()
    assert "FID (lower is better)" in page and "run, in the paper" in page
    expected = [
        (r.steps, r.published.metrics["FID"])
        for r in figures_of(recipe)
        if r.published and "FID" in r.published.metrics
    ]
    found = _published_curve(path)["FID"]
    assert set(found) <= set(expected) and (400_000, own.metrics["FID"]) in found
    assert all(
        figure.published.sampling == own.sampling
        for figure in figures_of(recipe)
        if figure.published and (figure.steps, figure.published.metrics.get("FID")) in found
    )
