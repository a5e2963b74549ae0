"""`trainer eval --sweep`: a point is what an evaluation there gives, what can be shared is, and what was cut off goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from featcache.builder.request import BuildRequest
from featcache.builder.run import build
from featcache.encoders import EncoderChoice
from featcache.errors import UserError
from featcache.progress import Quiet
from tests.told import Told
from trainer.cli import app
from trainer.diffusion import samplers
from trainer.diffusion.guidance import Guidance
from trainer.evaluate import run as evaluation
from trainer.evaluate.extractors import Extractor, build_extractor
from trainer.evaluate.references import write_statistics
from trainer.evaluate.run import evaluate_run
from trainer.evaluate.sweep import Curve, Point, _judging, read_curves, sweep_run
from trainer.interval import Interval
from trainer.report.run import write_run_report
from trainer.report.sweeps import sweep_charts
from trainer.requests import EvalRequest, SampleSettings
from trainer.runs import checkpoint
from trainer.runs import folder as runs
from trainer.runs.config import RunConfig
from trainer.runs.snapshots import save_snapshot
from trainer.sampling import inference
from trainer.sampling.draw import first_guided
from trainer.sweep import Sweep
from trainer.training.loop import train


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache and a run whose weights are as good as random, so that guidance changes its samples."""
    root = tmp_path_factory.mktemp("sweep")
    ask = BuildRequest(
        data="shapes", encoders=(EncoderChoice(name="tiny"),), resolution=32, limit=40, out=root / "caches/shapes"
    )
    build(ask, Quiet())
    config = RunConfig(
        method="none",
        model="SiT-Ti/2",
        cache=str(ask.out),
        name="a",
        steps=4,
        batch_size=4,
        lr=0.05,
        ema_decay=0.0,
        device="cpu",
        sample_every=0,
    )
    train(config, resume=False, watcher=Quiet(), root=root / "runs")
    return root


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "runs/a", tmp_path / "runs/a"))


DRAWN = SampleSettings(num=12, sampler="sde", steps=8, interval=Interval(0, 0.5), device="cpu")
ASK = EvalRequest(settings=DRAWN, extractor="embedded", metrics=("fid", "precision", "recall"))


def swept(text: str, **settings: Any) -> EvalRequest:
    return replace(ASK, sweep=Sweep.parse(text), settings=replace(DRAWN, **settings))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Samples that pass through the backbone, call by call."""
    rows: list[int] = []
    forward = inference.Network.forward

    def counted(self: inference.Network, x: torch.Tensor, *args: Any, **kw: Any) -> Any:
        rows.append(len(x))
        return forward(self, x, *args, **kw)

    monkeypatch.setattr(inference.Network, "forward", counted)
    return rows


def alone(run: Path, **settings: Any) -> dict[str, float]:
    result = evaluate_run(run, replace(ASK, settings=replace(DRAWN, **settings)), Quiet())
    assert result is not None
    return dict(result.metrics)


def alone_by(run: Path, reference: Path) -> dict[str, float]:
    ask = replace(ASK, reference=str(reference), settings=replace(DRAWN, guidance=1))
    result = evaluate_run(run, ask, Quiet())
    assert result is not None
    return dict(result.metrics)


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return build_extractor("embedded")


@pytest.mark.parametrize("sampler", ["sde", "ode", "heun"])
def test_a_point_is_an_evaluation_and_common_steps_are_taken_once(run: Path, passes: list[int], sampler: str) -> None:
    result = sweep_run(run, swept("guidance=1,2,3", sampler=sampler), Quiet())
    assert result is not None
    together = sum(passes)
    passes.clear()
    found = {point.value: dict(point.metrics) for point in result.curve.points}
    expected = {scale: alone(run, sampler=sampler, guidance=scale) for scale in (1.0, 2.0, 3.0)}
    assert found == expected, "to the bit"
    assert len({m["embedded-FID"] for m in found.values()}) == 3, "guidance changes something"
    units = 2  # of eight samples
    if sampler == "heun":  # two evaluations a step, one in the last; the grid's 8 steps are guided from t = 0.5 on
        free, rest = 4 * 2, 3 * 2 + 1
    else:  # of the SDE's times 1, 0.86, 0.73, 0.59, 0.45, ... the fifth is the first in [0, 0.5]; of the ODE's 0.5 is
        free, rest = 4, 4
    assert sum(passes) == 8 * units * (free + rest + 2 * (free + 2 * rest))
    assert together == 8 * units * (free + rest + 2 * 2 * rest)


def test_guided_at_all_times_nothing_is_shared_but_the_half_without_labels_is_left_out(
    run: Path, passes: list[int]
) -> None:
    sweep_run(run, swept("guidance=1,1.5,2", interval=None, sampler="ode"), Quiet())
    assert sum(passes) == 8 * 2 * (8 + 2 * 2 * 8)
    assert not (run / "sweeps").joinpath("trunk").exists()


def test_ends_of_the_interval(run: Path, passes: list[int]) -> None:
    """Later ends go on from the states of earlier ones."""
    result = sweep_run(run, swept("interval_high=0.3,0.5,1", interval=None, guidance=2.5, sampler="ode"), Quiet())
    assert result is not None
    together = sum(passes)
    found = {point.value: dict(point.metrics) for point in result.curve.points}
    passes.clear()
    assert found == {
        high: alone(run, guidance=2.5, sampler="ode", interval=Interval(0, high)) for high in (0.3, 0.5, 1.0)
    }
    # 1, 0.875, ...: guided from the first step, from the fifth (0.5) and from the seventh (0.25)
    assert sum(passes) == 16 * (16 + 4 + 8 + 6 + 4)
    assert together == 16 * (16 + 4 + 8 + 2 + 4)
    assert result.curve.common["low"] == 0.0 and "high" not in result.curve.common
    low = sweep_run(run, swept("interval_low=0,0.4", interval=None, guidance=2.5, sampler="ode"), Quiet())
    assert low is not None and low.curve.points[0].metrics == found[1.0]


def test_another_reference_under_the_same_name_begins_another_curve(
    run: Path, made: Path, tmp_path: Path, extractor: Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's settings tell what was compared with; a secret in its address is not written down."""
    reference = tmp_path / "reference.npz"
    files = []
    for limit in (30, 40, 40):
        write_statistics(made / "caches/shapes", reference, extractor, limit=limit)
        result = sweep_run(run, replace(swept("guidance=1,2"), reference=str(reference)), Quiet())
        assert result is not None
        files.append(result.file)
        assert json.loads(result.file.read_text())["common"]["reference"] == str(reference)
        assert dict(result.curve.points[0].metrics) == alone_by(run, reference)
    assert len(set(files[:2])) == 2
    monkeypatch.setattr(evaluation, "choose_reference", lambda *_: (str(reference), None))
    of_recipe = sweep_run(run, swept("guidance=1,2"), Quiet())
    assert of_recipe is not None
    assert json.loads(of_recipe.file.read_text())["common"]["reference"] == str(reference), "not the run's cache"
    monkeypatch.undo()
    standard = evaluation.Standard(reference="s3://key:secret@bucket/cache", stamp=None)
    assert "secret" not in json.dumps(_judging(ASK, standard))


def test_a_snapshot_is_swept_whose_checkpoint_is_gone(run: Path) -> None:
    _, latest = checkpoint.find_checkpoint(run)
    averaged = {"ema": checkpoint.load_tensors(latest, "ema")}
    save_snapshot(run, 2, averaged, runs.load_config(run), dtype="fp32")
    at_snapshot = sweep_run(run, swept("guidance=1,2", checkpoint=2), Quiet())
    at_latest = sweep_run(run, swept("guidance=1,2"), Quiet())
    assert at_snapshot is not None and at_latest is not None
    assert (at_snapshot.curve.step, at_latest.curve.step) == (2, checkpoint.find_checkpoint(run)[0])
    assert at_snapshot.curve.points == at_latest.curve.points, "the same weights"


def test_the_file_names_the_best_and_metrics_json_stays_as_it_is(run: Path) -> None:
    told = Told()
    result = sweep_run(run, swept("guidance=1:2:0.5"), told)
    assert result is not None
    content = json.loads(result.file.read_text())
    assert [point["value"] for point in content["points"]] == [1.0, 1.5, 2.0]
    best = min(content["points"], key=lambda point: point["metrics"]["embedded-FID"])
    assert content["best"] == {"value": best["value"], "metric": "embedded-FID", "remark": result.curve.remark}
    assert content["points"][1]["sampler"]["guidance"]["scale"] == 1.5
    assert content["points"][0]["sampler"]["guidance"]["high"] == 1.0, "no guidance has no interval"
    assert runs.read_metrics(run) == []
    assert [path.name for path in (run / "sweeps").iterdir()] == [result.file.name], "samples and states are gone"
    assert any("points left, about" in note for note in told.notes)
    assert any(name.startswith("guidance 1.5 (") and name.endswith("/3): sampling") for name, *_ in told.tasks)


def test_the_report_shows_the_curve_and_a_comparison_does_not(run: Path, tmp_path: Path) -> None:
    sweep_run(run, swept("guidance=1,2,3"), Quiet())
    charts = sweep_charts(run)
    assert [len(chart.series) for chart in charts] == [1, 2]
    assert all(len(line.x) == 3 and line.markers for chart in charts for line in chart.series)
    page = write_run_report([run]).read_text()
    for words in ("embedded-FID over guidance scale", "embedded-Precision and embedded-Recall", "as the papers choose"):
        assert words in page
    other = Path(shutil.copytree(run, tmp_path / "runs/b"))
    assert "over guidance scale" not in write_run_report([run, other]).read_text()


def test_a_sweep_that_was_cut_off_goes_on_and_a_wider_one_adds_points(
    run: Path, tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path(shutil.copytree(run, tmp_path / "runs/whole"))
    expected = sweep_run(whole, swept("guidance=1,2,3"), Quiet())
    assert expected is not None
    total = sum(passes)
    passes.clear()
    judge, judged = evaluation.judge, []

    def ends(*args: Any, **kw: Any) -> Any:
        judged.append(args[0])
        if len(judged) == 2:  # the second point is drawn, not judged
            raise KeyboardInterrupt
        return judge(*args, **kw)

    monkeypatch.setattr(evaluation, "judge", ends)
    with pytest.raises(KeyboardInterrupt):
        sweep_run(run, swept("guidance=1,2,3"), Quiet())
    (curve,) = read_curves(run)
    assert [point.value for point in curve.points] == [2.0], "what is not guided at all comes last"
    monkeypatch.setattr(evaluation, "judge", judge)
    told = Told()
    result = sweep_run(run, swept("guidance=1,2,3"), told)
    assert result is not None and result.curve.points == expected.curve.points
    assert any("1 of 3 points are in" in note for note in told.notes)
    assert sum(passes) == total, "nothing was drawn twice"
    passes.clear()
    wider = sweep_run(run, swept("guidance=1:4:1"), Quiet())
    assert wider is not None and wider.file == result.file
    assert [point.value for point in wider.curve.points] == [1.0, 2.0, 3.0, 4.0]
    assert sum(passes) == 16 * (4 + 2 * 4), "the new point alone"
    again = sweep_run(run, swept("guidance=2,3"), Quiet())
    assert again is not None and sum(passes) == 16 * 12
    other = sweep_run(run, swept("guidance=2,3", seed=1), Quiet())
    assert other is not None and other.file != result.file, "other noise is another curve"


def test_a_state_that_is_damaged_is_computed_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sweep_run(run, swept("guidance=2,3"), Quiet())
    assert expected is not None
    shutil.rmtree(run / "sweeps")
    judge = evaluation.judge

    def damages(images: Path, *args: Any, **kw: Any) -> Any:
        for number, state in enumerate(sorted(images.parent.parent.glob("trunk/*.npy"))):
            state.write_bytes(b"damaged" if number else state.read_bytes()[:200])
        return judge(images, *args, **kw)

    monkeypatch.setattr(evaluation, "judge", damages)
    found = sweep_run(run, swept("guidance=2,3"), Quiet())
    assert found is not None and found.curve.points == expected.curve.points


def test_what_cannot_be_swept_is_refused(run: Path) -> None:
    def why(*words: str) -> UserError:
        with chdir(run.parent.parent):
            done = CliRunner().invoke(app, ["eval", *words])
        assert isinstance(done.exception, UserError), done.output
        return done.exception

    wrong = (
        "guidance",
        "guidance=2:1:0.1",
        "guidance=1:2:0",
        "guidance=1,1",
        "guidance=-1,2",
        "guidance=a,b",
        "shift=1,2",
    )
    for text in (*wrong, "guidance=1:1000:0.1", "interval_high=0.5,2", "guidance=1:2", "guidance=2"):
        found = why("runs/a", "--sweep", text)
        assert "Type for example: --sweep guidance=1.0:2.5:0.1" in (found.remedy or ""), text
    assert why("runs/a", "--sweep", "guidance=1,2", "--guidance", "2").remedy == "Leave --guidance out."
    assert why("runs/a", "--sweep", "interval_high=0.5,1", "--interval", "0,1").remedy == "Leave --interval out."
    found = why("runs/a", "--sweep", "interval_high=0.5,1")
    assert "not guided" in found.what and "--guidance 1.8 --sweep interval_high=0.5,1" in (found.remedy or "")
    found = why("runs/a", "--sweep", "interval_high=0.2,1", "--guidance", "2", "--representation-guidance", "2")
    assert "--representation-guidance" in (found.remedy or "")
    assert why("--samples", "x.npz", "--sweep", "guidance=1,2").remedy == "Leave --sweep out."
    assert not (run / "sweeps").exists()


def test_a_damaged_file_is_told_and_read_by_nobody(run: Path) -> None:
    (run / "sweeps").mkdir()
    for content in ("{", "[]", '{"setting": "guidance", "step": 3, "common": {}, "points": []}', '{"points": 3}'):
        (run / "sweeps/guidance-x.json").write_text(content)
        with pytest.raises(UserError, match="is damaged"):
            read_curves(run)


def test_numbers_that_no_axis_holds_are_left_out_of_the_page(run: Path) -> None:
    def write(*points: tuple[float, float]) -> None:
        entries = [{"value": value, "metrics": {"embedded-FID": measured}} for value, measured in points]
        content = {"setting": "guidance", "step": 4, "common": {}, "points": entries}
        (run / "sweeps").mkdir(exist_ok=True)
        (run / "sweeps/guidance-x.json").write_text(json.dumps(content))

    write((1.0, -1e308), (1.5, 2.0), (2.0, 1e308))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = write_run_report([run])
    assert "guidance scale" in page.read_text()
    write((-1e300, 1.0), (1e300, 2.0))
    with pytest.raises(UserError, match="is damaged"):
        write_run_report([run])


def test_the_command_prints_the_curve(run: Path, made: Path) -> None:
    recipe = {"source": "AHPA, Table 4", "metrics": {"FID": 1.4}, "sampling": {"sampler": "ode", "guidance": None}}
    runs.save_config(run, replace(runs.load_config(run), published=recipe))
    words = ["eval", str(run), "--device", "cpu", "--num", "8", "--steps", "2", "--extractor", "embedded"]
    with pytest.raises(UserError, match="the paper does not give its scale"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    done = CliRunner().invoke(app, [*words, "--sweep", "guidance=1,2", "--metrics", "fid"])
    assert done.exception is None, done.output
    assert "best embedded-FID: " in done.output and "as the papers choose" in done.output
    assert len(list((run / "sweeps").glob("guidance-step_0000004-*.json"))) == 1


def test_the_recipe_s_interval_stays_over_its_scales(run: Path) -> None:
    drawn = {"sampler": "ode", "guidance": 1.8, "interval": [0, 0.7], "channels": 3, "classes": "random"}
    published = {"source": "REPA, Table 4", "metrics": {"FID": 1.42}, "sampling": drawn}
    runs.save_config(run, replace(runs.load_config(run), published=published))
    request = replace(swept("guidance=1.5,2", interval=None, steps=2), metrics=("fid",))
    result = sweep_run(run, request, Quiet())
    assert result is not None
    common = result.curve.common
    assert (common["low"], common["high"], common["guided_channels"], common["classes"]) == (0.0, 0.7, 3, "random")


def test_the_best_is_by_the_distance() -> None:
    points = [Point(value=v, metrics={"sFID": 9 - v, "FID": abs(v - 2), "IS": v}) for v in (1.0, 2.0, 3.0)]
    curve = Curve(setting="guidance", step=1, common={}, points=points)
    assert (curve.deciding, curve.best.value) == ("FID", 2.0)
    scores = [Point(value=v, metrics={"IS": v}) for v in (1.0, 3.0)]
    assert Curve(setting="guidance", step=1, common={}, points=scores).best.value == 3.0


def test_the_first_guided_step() -> None:
    times = [1.0, 0.75, 0.5, 0.25, 0.0]
    assert first_guided(times, Guidance()) == 4
    assert first_guided(times, Guidance(scale=2.0)) == 0
    assert first_guided(times, Guidance(scale=2.0, interval=Interval(0, 0.5))) == 2
    assert first_guided(times, Guidance(scale=2.0, interval=Interval(0, 0.1))) == 4, "0 is where the last step ends"
    published = Guidance(scale=1.8, interval=Interval(0, 0.7))
    assert first_guided(samplers.sde_grid(250), published) == 78, "as docs/evaluation.md says"


@pytest.mark.parametrize("name", ["euler", "heun", "euler_maruyama"])
def test_a_sampler_in_parts_gives_the_bits_of_the_whole(name: str) -> None:
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    sampler: Callable[..., torch.Tensor] = getattr(samplers, name)
    grid = samplers.sde_grid(7) if name == "euler_maruyama" else samplers.ode_grid(7)
    given: dict[str, Any] = {"noise": lambda step: torch.full_like(x, step / 3)} if name == "euler_maruyama" else {}

    def model(state: torch.Tensor, t: float, *, interval_t: float | None = None) -> torch.Tensor:
        assert state.dtype == torch.float32
        return torch.sin(state * 3 + t)

    whole = sampler(model, x, grid, **given)
    for cut in range(8):
        first = sampler(model, x, grid, **given, part=samplers.Part(start=0, stop=cut, dtype=x.dtype)) if cut else x
        if 0 < cut < 7:
            assert first.dtype == torch.float64
        second = samplers.Part(start=cut, stop=7, dtype=x.dtype)
        assert torch.equal(sampler(model, first, grid, **given, part=second), whole)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_curve(run: Path, tmp_path: Path) -> None:
    """SIGKILL while states, blocks of samples and points are written."""
    whole = Path(shutil.copytree(run, tmp_path / "runs/whole"))
    expected = sweep_run(whole, swept("guidance=1,1.5,2,3", num=300), Quiet())
    assert expected is not None
    words = ["--num", "300", "--sampler", "sde", "--steps", "8", "--interval", "0,0.5", "--device", "cpu"]
    words += ["--extractor", "embedded", "--metrics", "fid,precision,recall", "--sweep", "guidance=1,1.5,2,3"]
    command = [sys.executable, "-m", "trainer.cli", "eval", str(run), *words]

    def written() -> set[tuple[str, int]]:
        found = set()
        for path in (run / "sweeps").rglob("*"):
            with contextlib.suppress(OSError):  # removed meanwhile
                found.add((str(path), path.stat().st_mtime_ns))
        return found

    for kill, further in enumerate((1, 30, 80, 2)):  # files that are written before the kill: states, blocks, points
        before = written()
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(written() - before) < further:
            time.sleep(0.02)
        time.sleep(0.05 * kill)
        process.send_signal(signal.SIGKILL)
        assert process.wait() in (-signal.SIGKILL, 0)
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=600)
    (curve,) = read_curves(run)
    assert curve.points == expected.curve.points


@pytest.mark.slow
def test_ranks_draw_together(run: Path) -> None:
    one = sweep_run(run, swept("guidance=1,2", num=300), Quiet())
    assert one is not None
    one.file.unlink()
    words = ["--num", "300", "--sampler", "sde", "--steps", "8", "--interval", "0,0.5", "--device", "cpu"]
    words += ["--extractor", "embedded", "--metrics", "fid,precision,recall", "--sweep", "guidance=1,2"]
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launched, "-m", "trainer.cli", "--", "eval", str(run), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (curve,) = read_curves(run)
    assert curve.points == one.curve.points
