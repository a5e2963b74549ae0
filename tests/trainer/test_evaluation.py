"""From a run to metrics.json and report.html, as functions and as typed."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featcache.builder.request import BuildRequest
from featcache.builder.run import build
from featcache.encoders import EncoderChoice
from featcache.errors import UserError
from featcache.progress import Quiet
from tests.told import Told
from trainer.classes import Classes
from trainer.evaluate.run import beside_figure, choose_reference, evaluate_images, evaluate_run, with_defaults
from trainer.interval import Interval
from trainer.models import build_model
from trainer.models.config import forward_flops
from trainer.report import data
from trainer.report import run as report
from trainer.report.run import router_charts, write_run_report
from trainer.report.same_noise import SameNoise
from trainer.requests import EvalRequest, SampleSettings
from trainer.runs import folder as runs
from trainer.runs.config import RunConfig
from trainer.runs.exchange import export_checkpoint, import_checkpoint
from trainer.runs.recipes import list_recipes, load_figure, load_recipe_file
from trainer.runs.records import run_model_config
from trainer.sampling.draw import load_run
from trainer.training.loop import train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache and a short AHPA run."""
    root = tmp_path_factory.mktemp("evaluation")
    ask = BuildRequest(
        data="shapes", encoders=(EncoderChoice(name="tiny"),), resolution=32, limit=40, out=root / "caches/shapes"
    )
    build(ask, Quiet())
    config = RunConfig(
        method="ahpa",
        model="SiT-Ti/2",
        cache=str(ask.out),
        name="a",
        steps=3,
        batch_size=4,
        device="cpu",
        sample_every=3,
        log_every=1,
    )
    train(config, resume=False, watcher=Quiet(), root=root / "runs")
    return root


ASK = EvalRequest(settings=SampleSettings(num=16, sampler="ode", steps=2, device="cpu"), extractor="embedded")


def changed(request: EvalRequest, **changes: object) -> EvalRequest:
    """The request with other sample settings."""
    return replace(request, settings=replace(request.settings, **changes))  # type: ignore[arg-type]


def test_evaluation_writes_numbers_and_a_report(root: Path) -> None:
    run = root / "runs/a"
    result = evaluate_run(run, ASK, Quiet())
    assert result is not None
    assert all(name.startswith("embedded-") for name in result.metrics)
    assert result.metrics["embedded-FID"] > 0
    (entry,) = json.loads((run / "metrics.json").read_text())
    assert entry["step"] == 3
    assert entry["sampler"]["sampler"] == "ode"
    assert entry["metrics"] == dict(result.metrics)
    again = evaluate_run(run, ASK, Quiet())
    assert again is not None and again.metrics == result.metrics
    assert len(json.loads((run / "metrics.json").read_text())) == 1, "the same evaluation replaces itself"
    evaluate_run(run, changed(ASK, seed=1), Quiet())
    assert len(json.loads((run / "metrics.json").read_text())) == 2
    page = write_run_report([run]).read_text()
    for expected in (
        "embedded-FID",
        "Judged samples",
        "real images",
        "What the cache holds",
        "Router weights between groups",
        "<svg",
        "data:image/png",
    ):
        assert expected in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


def test_auto_falls_back_to_the_embedded_extractor_and_says_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from featcache.errors import WeightsUnavailable
    from trainer.evaluate import extractors
    from trainer.evaluate.run import choose_extractor

    def missing(**_: object) -> object:
        raise WeightsUnavailable("no Inception weights", remedy="bring them")

    monkeypatch.setitem(extractors.EXTRACTORS, "inception", missing)
    told = Told()
    assert choose_extractor("auto", None, "cpu", told).name == "embedded"
    assert any("not FID" in note for note in told.notes)
    with pytest.raises(WeightsUnavailable):
        choose_extractor("inception", None, "cpu", told)


def test_router_curves_are_the_checkpoints_own(root: Path) -> None:
    charts = router_charts(root / "runs/a")
    assert len(charts) == 3
    for chart in charts:
        total = np.sum([np.asarray(series.y) for series in chart.series], axis=0)
        assert np.allclose(total, 1, atol=1e-5)


def test_report_survives_a_cache_that_is_gone(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "runs/b"
    shutil.copytree(root / "runs/a", copy)
    summary = json.loads((copy / "cache.json").read_text())
    (copy / "cache.json").write_text(json.dumps(summary | {"path": str(tmp_path / "gone")}))
    assert write_run_report([copy]).is_file()
    with pytest.raises(UserError, match=r"cannot be opened: there is no cache at .*gone"):
        evaluate_run(copy, ASK, Quiet())


@pytest.mark.parametrize("content", ["{", "[3]"])
def test_damaged_files_of_a_run_are_not_to_be_removed(root: Path, tmp_path: Path, content: str, monkeypatch) -> None:
    """Without cache.json a run cannot be resumed, and metrics.json holds all that was measured."""
    copy = tmp_path / "runs/b"
    shutil.copytree(root / "runs/a", copy)
    (copy / "metrics.json").write_text(content)
    monkeypatch.setattr("trainer.evaluate.run.sample_run", None)  # nothing is drawn for numbers that cannot be kept
    with pytest.raises(UserError, match=r"metrics\.json") as found:
        evaluate_run(copy, ASK, Quiet())
    assert found.value.remedy is not None and "repair" in found.value.remedy
    (copy / "metrics.json").unlink()
    (copy / "cache.json").write_text(content)
    for read in (runs.read_summary, data.load_run):
        with pytest.raises(UserError, match=r"cache\.json") as found:
            read(copy)
        assert found.value.remedy == runs.RESTORE


def test_the_newest_run_is_the_one_active_last(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run"):
        runs.newest_run(tmp_path)
    import os

    for i, name in enumerate(("old", "nested/new")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("method: none\n")
        os.utime(tmp_path / name / "config.yaml", (1000 + i, 1000 + i))
    assert runs.newest_run(tmp_path) == tmp_path / "nested/new"
    (tmp_path / "old/log.jsonl").write_text("")
    assert runs.newest_run(tmp_path) == tmp_path / "old"


def test_export_then_import_keeps_the_function(root: Path, tmp_path: Path) -> None:
    out = export_checkpoint(root / "runs/a", tmp_path / "weights.pt", convention="repa", step=None)
    assert set(torch.load(out, weights_only=True)) >= {"ema", "model"}
    run = import_checkpoint(out, name="back", weights="ema", convention=None, root=tmp_path / "runs")
    ours, theirs = load_run(root / "runs/a").model, load_run(run).model
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *(ours.cfg.latent_channels, ours.cfg.latent_size, ours.cfg.latent_size), generator=generator)
    t, y = torch.tensor([0.2, 0.9]), torch.tensor([1, 10])
    with torch.no_grad():
        assert torch.allclose(ours(x, t, y).prediction, theirs(x, t, y).prediction, atol=1e-6)
    assert build_model(run_model_config(run, runs.load_config(run))).cfg == theirs.cfg
    with pytest.raises(UserError, match="exists"):
        import_checkpoint(out, name="back", weights="ema", convention=None, root=tmp_path / "runs")


def test_what_cannot_be_judged_is_refused_before_anything_is_drawn(root: Path, tmp_path: Path) -> None:
    run = root / "runs/a"
    other = tmp_path / "other.npz"
    np.savez(other, arr_0=np.zeros((4, 64, 64, 3), np.uint8))
    for change, words in (
        ({"metrics": ("is",)}, "'is'"),
        ({"reference": str(tmp_path / "nothing.npz")}, "nothing"),
        ({"reference": str(other)}, "64 pixels"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate_run(run, replace(changed(ASK, seed=77), **change), Quiet())
    assert not list((run / "samples").glob("*seed77*"))


def test_images_of_any_code_can_be_judged(root: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    bare, labelled, reference = (tmp_path / f"{name}.npz" for name in ("bare", "labelled", "reference"))
    images = rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    np.savez(bare, arr_0=images)
    np.savez(labelled, arr_0=images, arr_1=np.arange(6))
    np.savez(reference, arr_0=rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8))
    ask = EvalRequest(
        settings=SampleSettings(device="cpu"), extractor="embedded", reference=str(reference), metrics=("FID",)
    )
    result = evaluate_images(str(labelled), ask, require_labels=True, progress=Quiet())
    record = json.loads(result.file.read_text())
    assert result.file == tmp_path / "labelled.npz.metrics.json"
    assert record["settings"]["labels"] == {"classes": 6, "fewest": 1, "most": 1}
    assert record["metrics"] == dict(result.metrics) and set(result.metrics) == {"embedded-FID"}
    with pytest.raises(UserError, match="no labels"):
        evaluate_images(str(bare), ask, require_labels=True, progress=Quiet())
    with pytest.raises(UserError, match="7 were asked for"):
        evaluate_images(str(bare), changed(ask, num=7), require_labels=False, progress=Quiet())
    with pytest.raises(UserError, match="compared with"):
        evaluate_images(str(bare), replace(ask, reference=None), require_labels=False, progress=Quiet())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        *(
            (["--samples", "x.npz", *option.split()], option.split()[0])
            for option in (
                "--sampler ode",
                "--steps 9",
                "--guidance 1.5",
                "--interval 0,0.5",
                "--classes random",
                "--pixels round",  # the default, but typed
                "--guided-channels 3",
                "--stream-guidance 2",
                "--representation-guidance 1.5",
                "--step 4",
                "--precision fp32",
                "--compile",
                "--no-compile",
            )
        ),
        (["--require-labels"], "--require-labels"),
    ],
)
def test_options_without_effect_are_refused(words: list[str], named: str) -> None:
    from typer.testing import CliRunner

    from trainer.cli import app

    done = CliRunner().invoke(app, ["eval", "--reference", "y.npz", *words])
    assert isinstance(done.exception, UserError)
    assert done.exception.what.startswith(named.replace("--no-compile", "--compile"))


PUBLISHED: dict[str, object] = {
    "source": "REPA, Table 4",
    "metrics": {"FID": 1.42, "sFID": 4.7, "IS": 305.7, "Precision": 0.8, "Recall": 0.65},
    "sampling": {"sampler": "heun", "steps": 40, "guidance": 1.8, "interval": [0, 0.7]},
}


def with_recipe(root: Path, copy: Path, published: dict[str, object]) -> Path:
    shutil.copytree(root / "runs/a", copy)
    runs.save_config(copy, replace(runs.load_config(copy), published=published))
    return copy


def test_the_recipe_says_how_to_sample(root: Path, tmp_path: Path) -> None:
    run = with_recipe(root, tmp_path / "runs/a", PUBLISHED)
    config = runs.load_config(run)
    on_gpu = with_defaults(SampleSettings(), run, config, "cuda", Quiet())
    assert (on_gpu.sampler, on_gpu.steps, on_gpu.guidance, on_gpu.interval, on_gpu.num) == (
        "heun",
        40,
        1.8,
        Interval(0, 0.7),
        50_000,
    )
    asked = with_defaults(SampleSettings(sampler="ode", steps=9, guidance=3.0), run, config, "cuda", Quiet())
    assert (asked.sampler, asked.steps, asked.guidance, asked.interval) == ("ode", 9, 3.0, Interval())
    same_scale = with_defaults(SampleSettings(guidance=1.8), run, config, "cuda", Quiet())
    assert (same_scale.guidance, same_scale.interval) == (1.8, Interval(0, 0.7))
    on_cpu = with_defaults(SampleSettings(), run, config, "cpu", Quiet())
    assert (on_cpu.sampler, on_cpu.steps, on_cpu.guidance) == ("ode", 32, 1.8)
    vague = replace(config, published={**PUBLISHED, "sampling": {"sampler": "sde", "steps": 250, "guidance": None}})
    with pytest.raises(UserError, match="the paper does not give its scale") as caught:
        with_defaults(SampleSettings(), run, vague, "cuda", Quiet())
    assert f"trainer eval {run} --guidance 1 " in (caught.value.remedy or "")
    assert with_defaults(SampleSettings(guidance=1.0), run, vague, "cuda", Quiet()).guidance == 1.0
    two = {"guidance": 1.5, "variants": [{"guidance": 1.0, "why": "the caption"}], "num": 40_000}
    told = Told()
    chosen = with_defaults(
        SampleSettings(), run, replace(config, published={**PUBLISHED, "sampling": two}), "cuda", told
    )
    assert (chosen.guidance, chosen.num) == (1.5, 40_000)
    assert told.notes == ["the recipe's figures may have been drawn otherwise, the caption: --guidance 1"]
    page = write_run_report([run]).read_text()
    assert "REPA, Table 4: heun 40, guidance 1.8 in [0, 0.7]" in page
    for figure in ("1.420", "4.70", "305.7", "0.800", "0.650"):
        assert figure in page


@pytest.mark.parametrize(
    ("asked", "said"), [({"num": 4}, True), ({"num": 10}, False), ({"num": 4, "classes": Classes("random")}, False)]
)
def test_fewer_samples_than_classes_are_said_to_be_of_the_first(
    root: Path, asked: dict[str, Any], *, said: bool
) -> None:
    told = Told()
    with_defaults(SampleSettings(**asked), root / "runs/a", runs.load_config(root / "runs/a"), "cpu", told)
    assert any("4 samples are of the first 4 of 10 classes" in note for note in told.notes) == said


def test_the_recipe_says_which_channels_labels_pixels_and_times(root: Path, tmp_path: Path) -> None:
    """LightningDiT's: its grid is shifted, and three channels are guided. What is typed wins; a run of before has neither."""
    drawn = {"sampler": "ode", "steps": 249, "guidance": 6.7, "interval": [0, 0.875]}
    protocol = {"shift": 3.333, "channels": 3, "classes": "balanced", "pixels": "truncate"}
    run = with_recipe(root, tmp_path / "runs/a", {**PUBLISHED, "sampling": drawn | protocol})
    config = runs.load_config(run)

    def as_asked(**asked: Any) -> tuple[object, ...]:
        found = with_defaults(SampleSettings(**asked), run, config, "cuda", Quiet())
        return found.shift, found.guided_channels, str(found.classes), found.pixels

    assert as_asked() == (3.333, 3, "balanced", "truncate")
    assert as_asked(shift=1.0, guided_channels=4, classes="random", pixels="round") == (1.0, 4, "random", "round")
    assert as_asked(guidance=2.0) == (3.333, None, "balanced", "truncate"), "the channels belong to the scale"
    assert as_asked(sampler="dopri5")[0] == 1.0, "which takes steps of its own"
    assert "times shifted by 3.333, guidance 6.7 in [0, 0.875] of 3 channels" in write_run_report([run]).read_text()
    old = replace(config, published={**PUBLISHED, "sampling": drawn})
    earlier = with_defaults(SampleSettings(), run, old, "cuda", Quiet())
    assert (earlier.shift, earlier.guided_channels, str(earlier.classes), earlier.pixels) == (
        1.0,
        None,
        "balanced",
        "round",
    )
    for wrong in ({"channels": 0}, {"classes": "207"}, {"pixels": "floor"}, {"shift": 0}):
        with pytest.raises(UserError, match=f"published.sampling.{next(iter(wrong))}"):
            replace(config, published={**PUBLISHED, "sampling": drawn | wrong})


def test_the_recipe_says_how_streams_are_guided(root: Path, tmp_path: Path) -> None:
    """REG's and ReDi's. What belongs to one kind of guidance is not taken over by the other that is typed."""
    run = with_recipe(root, tmp_path / "runs/a", PUBLISHED)

    def as_asked(sampling: dict[str, Any], **asked: Any) -> tuple[object, ...]:
        config = replace(runs.load_config(run), published={**PUBLISHED, "sampling": sampling})
        found = with_defaults(SampleSettings(**asked), run, config, "cuda", Quiet())
        beside = found.stream_guidance, found.representation_guidance
        return found.guidance, *beside, found.guided_channels, str(found.interval)

    reg: dict[str, Any] = {"guidance": 2.3, "stream_guidance": 2.2, "interval": [0, 0.85], "channels": 3}
    assert as_asked(reg) == as_asked(reg, representation_guidance=1.0) == (2.3, 2.2, 1.0, 3, "0,0.85")
    assert as_asked(reg, stream_guidance=1.5) == (2.3, 1.5, 1.0, 3, "0,0.85")
    assert as_asked(reg, guidance=2.0) == (2.0, None, 1.0, None, "0,1")
    unknown = {**reg, "guidance": None}
    with pytest.raises(UserError, match="does not give its scale"):
        as_asked(unknown)
    for recipe in (reg, unknown):
        assert as_asked(recipe, representation_guidance=1.5) == (1.0, None, 1.5, None, "0,1")
    redi = {"representation_guidance": 1.1, "interval": [0, 0.5]}
    assert as_asked(redi) == as_asked(redi, representation_guidance=1.1) == (1.0, None, 1.1, None, "0,0.5")
    assert as_asked(redi, representation_guidance=1.4) == (1.0, None, 1.4, None, "0,1")
    assert as_asked(redi, guidance=2.0) == (2.0, None, 1.0, None, "0,1")


def test_guidance_of_either_kind_counts_as_two_passes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = root / "runs/a"
    config = runs.load_config(run)
    passes = forward_flops(run_model_config(run, config)) * 32
    monkeypatch.setattr("trainer.evaluate.run.CPU_BUDGET_FLOPS", 100 * passes)

    def affordable(**asked: Any) -> int:
        return with_defaults(SampleSettings(**asked), run, config, "cpu", Quiet()).num

    assert affordable() == 100
    assert affordable(guidance=2.0) == affordable(representation_guidance=2.0) == 50


def test_samples_are_drawn_as_a_figure_was_and_say_so(root: Path, tmp_path: Path) -> None:
    """`trainer sample --figure`, from what is typed to what stands beside the images."""
    from typer.testing import CliRunner

    from trainer.cli import app

    few = ["--num", "12", "--sampler", "ode", "--steps", "2", "--step", "3", "--device", "cpu"]
    for figure, typed, expected in (
        ("none/xl2-7m-guided", [], ("random", "round", 1.5, 3)),
        ("repa/xl2-4m-interval", [], ("random", "truncate", 1.8, None)),
        ("repa/xl2-4m-interval", ["--classes", "balanced", "--guidance", "1"], ("balanced", "truncate", 1.0, None)),
    ):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        words = ["sample", str(root / "runs/a"), "--figure", figure, "--out", str(out), *few, *typed]
        done = CliRunner().invoke(app, words)
        assert done.exception is None, done.output
        record = json.loads((out / "settings.json").read_text())
        guidance = record["guidance"]
        assert (record["classes"], record["pixels"], guidance["scale"], guidance["channels"]) == expected
        assert guidance["high"] == (0.7 if guidance["scale"] == 1.8 else 1.0)
    labels = np.load(tmp_path / "0/samples_12.npz")["arr_1"]
    assert (labels == Classes("random").labels(256, 10, seed=0)[:12]).all()
    unknown = CliRunner().invoke(app, ["sample", str(root / "runs/a"), "--figure", "ahpa/xl2-4m-guided", *few])
    assert isinstance(unknown.exception, UserError) and "does not give its scale" in unknown.exception.what
    assert load_figure("ahpa/xl2-4m-guided").drawn_as({"guidance": 2.0}, "")["checkpoint"] == 4_000_000
    missing = CliRunner().invoke(app, ["sample", str(root / "runs/a"), "--figure", "haste/b2"])
    assert isinstance(missing.exception, UserError) and "no published figures" in missing.exception.what


def test_a_run_is_drawn_as_any_figure_was(root: Path) -> None:
    """--figure draws as every published row says, on any device, at the row's step; what is typed still wins."""
    run = root / "runs/a"
    config = runs.load_config(run)
    rows = [recipe for recipe in list_recipes() if recipe.published is not None and recipe.published.is_of_samples]
    assert len(rows) > 150
    for recipe in rows:
        assert recipe.published is not None and recipe.published.sampling is not None
        sampling = recipe.published.sampling
        told = Told()
        asked, as_if = beside_figure(recipe.name, EvalRequest(), config, told)
        if sampling.guidance is None:
            with pytest.raises(UserError, match="does not give its scale"):
                with_defaults(asked.settings, run, as_if, "cuda", told)
            asked = replace(asked, settings=replace(asked.settings, guidance=1.0))
        low, high = sampling.interval.low, sampling.interval.high
        for device, sampler, steps in (("cuda", None, 250), ("cpu", "ode", 32)):
            drawn = with_defaults(asked.settings, run, as_if, device, told)
            assert (drawn.sampler, drawn.steps) == (sampling.sampler or sampler, sampling.steps or steps), recipe.name
            assert drawn.guidance == (1.0 if sampling.guidance is None else sampling.guidance), recipe.name
            assert str(drawn.interval) == f"{low:g},{high:g}" and drawn.checkpoint == recipe.steps, recipe.name
            assert (str(drawn.classes), drawn.pixels) == (sampling.classes or "balanced", sampling.pixels), recipe.name
            assert device == "cpu" or drawn.num == (sampling.num or 50_000), recipe.name
            assert (drawn.guided_channels, drawn.shift) == (sampling.channels, sampling.shift), recipe.name
            beside = sampling.stream_guidance, sampling.representation_guidance
            assert (drawn.stream_guidance, drawn.representation_guidance) == beside, recipe.name
        disputed = sampling.guidance is not None and bool(sampling.variants)
        assert any("may have been drawn otherwise" in note for note in told.notes) == disputed, recipe.name
        assert any(f"not trained as {recipe.training} says" in note for note in told.notes), "it is a tiny run"
    typed = EvalRequest(settings=SampleSettings(sampler="heun", steps=7, guidance=2.0, checkpoint=5))
    asked, as_if = beside_figure("repa/xl2-4m-interval", typed, config, Quiet())
    drawn = with_defaults(asked.settings, run, as_if, "cuda", Quiet())
    assert (drawn.sampler, drawn.steps, drawn.guidance, str(drawn.interval), drawn.checkpoint) == (
        "heun",
        7,
        2.0,
        "0,1",
        5,
    )
    with pytest.raises(UserError, match="haste/b2 has no published figures"):
        beside_figure("haste/b2", EvalRequest(), config, Quiet())


def test_samples_of_a_recipe_s_run_are_drawn_as_its_figures_were(root: Path, tmp_path: Path) -> None:
    """`trainer sample` without --figure: the protocol of the run's own recipe, under what is typed."""
    from typer.testing import CliRunner

    from trainer.cli import app

    drawn = {"sampler": "heun", "steps": 3, "guidance": 1.8, "interval": [0, 0.7], "classes": "random", "num": 50_000}
    run = with_recipe(root, tmp_path / "runs/a", {**PUBLISHED, "sampling": {**drawn, "pixels": "truncate"}})
    few = ["--num", "4", "--device", "cpu"]
    for number, (typed, expected) in enumerate(
        (
            ([], ("heun", 3, 1.8, 0.7, "random", "truncate")),
            (["--sampler", "ode", "--guidance", "2"], ("ode", 3, 2.0, 1.0, "random", "truncate")),
        )
    ):
        out = tmp_path / str(number)
        done = CliRunner().invoke(app, ["sample", str(run), "--out", str(out), *few, *typed])
        assert done.exception is None, done.output
        record = json.loads((out / "settings.json").read_text())
        guidance = record["guidance"]["scale"], record["guidance"]["high"]
        found = record["sampler"], record["steps"], *guidance, record["classes"], record["pixels"]
        assert found == expected
        assert "drawn as the samples of the recipe's figures" in " ".join(done.output.split())
    vague = with_recipe(root, tmp_path / "runs/b", {**PUBLISHED, "sampling": {"guidance": None}})
    done = CliRunner().invoke(app, ["sample", str(vague), *few])
    assert isinstance(done.exception, UserError) and "does not give its scale" in done.exception.what
    plain = CliRunner().invoke(
        app, ["sample", str(root / "runs/a"), "--out", str(tmp_path / "2"), *few, "--steps", "2"]
    )
    assert plain.exception is None and "figures" not in plain.output


def test_a_recipe_names_the_reference_of_its_figures(root: Path, tmp_path: Path) -> None:
    """ADM's file is taken where it lies among the weights; else it is named, and the cache's images stand in."""
    sampling = {"sampler": "ode", "steps": 2, "reference": "adm-256"}
    run = with_recipe(root, tmp_path / "runs/a", {**PUBLISHED, "sampling": sampling})
    config, told = runs.load_config(run), Told()
    where, _ = choose_reference(run, ASK, config, told)
    assert where == str(root / "caches/shapes") and "--reference VIRTUAL_imagenet256_labeled.npz" in told.notes[-1]
    weights = tmp_path / "weights"
    weights.mkdir()
    file = weights / "VIRTUAL_imagenet256_labeled.npz"
    file.write_bytes(b"")
    beside = changed(ASK, weights_dir=str(weights))
    assert choose_reference(run, beside, config, told) == (str(file), None)
    assert "as the recipe's figures were" in told.notes[-1]
    assert choose_reference(run, replace(beside, reference="other.npz"), config, told) == ("other.npz", None)


def test_a_run_of_the_recipe_is_not_called_another(root: Path) -> None:
    told = Told()
    beside_figure("ahpa/xl2-4m-guided", EvalRequest(), load_recipe_file("ahpa/xl2").config(), told)
    assert told.notes == []
    beside_figure("ahpa/xl2", EvalRequest(), replace(load_recipe_file("ahpa/xl2").config(), lr=1e-4), told)
    assert told.notes == ["the run was not trained as ahpa/xl2 says: its lr differs"]


def test_evaluations_beside_figures_are_reported_with_them(root: Path, tmp_path: Path) -> None:
    run = with_recipe(root, tmp_path / "runs/a", PUBLISHED)
    with pytest.raises(UserError, match="no checkpoint at step 400000") as caught:
        evaluate_run(run, replace(ASK, figure="ahpa/b2"), Quiet())
    assert caught.value.remedy == "It has: 3; choose one with --step"
    evaluate_run(run, changed(replace(ASK, figure="ahpa/b2", metrics=("fid",)), checkpoint=3), Quiet())
    *_, entry = json.loads((run / "metrics.json").read_text())
    assert entry["figure"] == load_recipe_file("ahpa/b2").values["published"]
    page = write_run_report([run]).read_text()
    for source in ("REPA, Table 4: heun 40, guidance 1.8 in [0, 0.7]", "AHPA, Table 3: ode 250"):
        assert source in page
    for figure in ("1.420", "25.5", "5.78", "52.3"):
        assert figure in page


def test_several_runs_are_always_the_comparison_page(root: Path, tmp_path: Path) -> None:
    one, two = (with_recipe(root, tmp_path / f"{place}/a", PUBLISHED) for place in ("x", "y"))
    page = write_run_report([one, two])
    text = page.read_text()
    assert page == one / "comparison.html"
    for expected in ("At equal steps", "At equal time", "Same noise, same class", "Router weights", str(two)):
        assert expected in text
    with pytest.raises(UserError, match="twice"):
        write_run_report([one, one])


def without_samples(root: Path, path: Path) -> Path:
    """A copy of the run without what training drew."""
    run = with_recipe(root, path, {})
    shutil.rmtree(run / "samples")
    return run


def test_samples_from_the_same_noise_are_drawn_once_for_runs_without_any(root: Path, tmp_path: Path) -> None:
    both = [without_samples(root, tmp_path / name) for name in "ab"]
    drawing = SameNoise(num=3, device="cpu", progress=(told := Told()))
    first = write_run_report(both, same_noise=drawing).read_text()
    assert "all images of a column start from the same noise" in first
    assert [task[:2] for task in told.tasks] == [("sampling", 3)] * 2
    (one,), (two,) = (list((run / "samples").glob("*/samples_3.npz")) for run in both)
    with np.load(one) as a, np.load(two) as b:
        assert np.array_equal(a["arr_0"], b["arr_0"]), "equal weights, noise and classes"
        names = load_run(both[0]).class_names
        assert a["arr_1"].tolist() == [0, round((len(names) - 1) / 2), len(names) - 1]
    for row in ("a, step 3", "b, step 3"):
        assert first.count(f'alt="{names[0]}, {row}"') == 1
    assert write_run_report(both, same_noise=drawing).read_text() == first
    assert len(told.tasks) == 2 and not told.notes, "they are there"
    assert "Same noise" not in write_run_report(both).read_text(), "nothing is drawn unasked"


def test_nothing_is_drawn_where_there_are_samples_or_none_in_common(root: Path, tmp_path: Path) -> None:
    drawing = SameNoise(num=2, device="cpu", progress=(told := Told()))
    trained = [with_recipe(root, tmp_path / name, {}) for name in "ab"]
    assert "One column per training step" in write_run_report(trained, same_noise=drawing).read_text()
    judged = [without_samples(root, tmp_path / name) for name in "cd"]
    for run in judged:
        evaluate_run(run, ASK, Quiet())
    page = write_run_report(judged, same_noise=drawing).read_text()
    assert "The same place in every run starts from the same noise" in page
    assert not told.tasks
    other = without_samples(root, tmp_path / "other")
    summary = json.loads((other / "cache.json").read_text())
    summary["dataset"]["class_names"][0] = "another"
    (other / "cache.json").write_text(json.dumps(summary))
    assert "Same noise" not in write_run_report([judged[0], other], same_noise=drawing).read_text()
    assert told.notes == ["no samples from the same noise are drawn: the runs' classes differ"] and not told.tasks


def test_other_images_than_the_cache_s_are_left_out_of_a_report(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise UserError("not the images that the cache was made from")

    run = without_samples(root, tmp_path / "a")
    assert "Real images." in write_run_report([run]).read_text()
    monkeypatch.setattr(report, "pixels_of", refuse)
    assert "Real images." not in write_run_report([run]).read_text()
    evaluate_run(run, ASK, Quiet())
    page = write_run_report([run]).read_text()
    assert "Judged samples" in page and "real images" not in page


def test_as_typed(root: Path, cli: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from trainer.cli import app

    nothing = cli("trainer", "eval", "--device", "cpu")
    assert nothing.returncode == 2
    assert "trainer run --method ahpa" in nothing.stderr
    assert "Traceback" not in nothing.stderr
    run = with_recipe(root, tmp_path / "runs/a", {})
    words = ["--num", "8", "--steps", "2", "--extractor", "embedded", "--device", "cpu", "--metrics", "fid, fid"]
    with chdir(tmp_path):
        done = CliRunner().invoke(app, ["eval", *words])
        assert done.exit_code == 0, done.exception
        with_recipe(root, tmp_path / "runs/b", {})
        pages = [tmp_path / "both.html", tmp_path / "same.html"]
        for command, out in zip(("compare", "report"), pages):
            done = CliRunner().invoke(app, [command, "runs/a", "runs/b", "--out", str(out)])
            assert done.exit_code == 0, done.exception
    (entry,) = [e for e in json.loads((run / "metrics.json").read_text()) if e["settings"]["sample_count"] == 8]
    assert set(entry["metrics"]) == {"embedded-FID"}
    assert (run / "report.html").is_file()
    assert pages[0].read_text() == pages[1].read_text()
