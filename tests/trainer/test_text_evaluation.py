"""Judging samples by their prompts: the averages, what is needed for which metric, and runs judged as users do it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from featcache.encoders.base import WeightsSource
from featcache.errors import UserError, WeightsUnavailable
from featcache.progress import Quiet
from featcache.sources import coco, shapes_text
from tests.trainer.text_runs import make_runs
from tests.trainer.tiny_runs import Listener, log_of
from trainer.cli import app
from trainer.evaluate import during, obeyed
from trainer.evaluate import run as evaluation
from trainer.evaluate.clip_scores import CLIPS, ClipScorer, VisionEntry
from trainer.evaluate.images import ArrayImages
from trainer.evaluate.prompted import build_prompt_judges, judge_prompts, split_metrics
from trainer.evaluate.run import evaluate_images, evaluate_run
from trainer.evaluate.table import higher_is_better, in_words
from trainer.report.run import write_run_report
from trainer.report.same_noise import SameNoise
from trainer.requests import EvalRequest, SampleRequest, SampleSettings
from trainer.runs import folder as runs
from trainer.runs.recipes import load_figure
from trainer.sampling.prompts import Prompts, open_prompts
from trainer.sampling.run import sample_run
from trainer.training.loop import train

HELD_OUT = "shapes-text:held-out"


@pytest.fixture(scope="module")
def runs_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs(tmp_path_factory.mktemp("text-evaluation"), snapshot_every=1)


@pytest.fixture
def small_clips(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both networks in miniature with random weights, as if those were the published ones; nothing else is to be had."""
    for metric, entry in list(CLIPS.items()):
        text = replace(entry.text, width=32, depth=1, heads=2, hidden=48, projected=24)
        vision = VisionEntry(width=40, depth=1, heads=2, hidden=56, patch=8, side=32)
        monkeypatch.setitem(CLIPS, metric, replace(entry, text=text, vision=vision))
    monkeypatch.setattr("featcache.encoders.hub._hub_problem", lambda: "the model hub does not answer: test")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "nowhere"))


@pytest.fixture
def random_clips(small_clips: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Random(ClipScorer):
        def __init__(self, metric: str, *, source: WeightsSource, device: torch.device | str = "cpu") -> None:
            super().__init__(metric, source=WeightsSource(random_seed=5), device=device)

    monkeypatch.setattr("trainer.evaluate.clip_scores.ClipScorer", Random)


class Brightness:
    """Judges by the image's mean and the prompt's length, so that the expected mean can be written down."""

    def __init__(self) -> None:
        self.provenance: dict[str, Any] = {"judge": "brightness"}
        self.batches: list[int] = []

    def check(self, prompts: Sequence[str]) -> None:
        if "bad" in prompts:
            raise UserError("a bad prompt")

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> Mapping[str, np.ndarray]:
        assert len(images) == len(prompts)
        self.batches.append(len(images))
        return {"bright": np.array([image.mean() * len(text) for image, text in zip(images, prompts)])}


def grey(n: int) -> ArrayImages:
    return ArrayImages(images=np.arange(n, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8))


@pytest.mark.parametrize("count", [None, 7])
def test_a_metric_is_the_mean_over_images_each_with_its_own_prompt(count: int | None) -> None:
    judge, prompts = Brightness(), Prompts(texts=("a", "bb", "cccc"), source="x")
    found = judge_prompts(grey(10), prompts, {"bright": judge}, count=count, batch_size=4, bootstrap=200)
    scores = np.array([i * (1, 2, 4)[i % 3] for i in range(count or 10)], dtype=np.float64)
    assert found["metrics"] == {"bright": pytest.approx(scores.mean())}
    assert found["details"]["bright"]["standard_deviation"] == pytest.approx(scores.std())
    low, high = found["intervals"]["bright"]
    spread = 1.96 * scores.std() / np.sqrt(len(scores))
    assert low == pytest.approx(scores.mean() - spread, abs=0.35 * spread)
    assert high == pytest.approx(scores.mean() + spread, abs=0.35 * spread)
    assert judge.batches == ([4, 4, 2] if count is None else [4, 3])
    assert found["settings"]["sample_count"] == (count or 10)


def test_what_cannot_be_judged_is_said() -> None:
    prompts = Prompts(texts=("a", "bad"), source="x")
    with pytest.raises(UserError, match="a bad prompt"):
        judge_prompts(grey(3), prompts, {"bright": Brightness()})
    judge_prompts(grey(3), prompts, {"bright": Brightness()}, count=1)  # which never comes to it
    with pytest.raises(UserError, match="holds 3 images, 5 were asked for"):
        judge_prompts(grey(3), Prompts(texts=("a",), source="x"), {"bright": Brightness()}, count=5)


def test_which_metrics_are_of_prompts() -> None:
    embedded = open_prompts(HELD_OUT, seed=0)
    others = Prompts(texts=(*embedded.texts, "a cat"), source="x")
    assert split_metrics((), None, subject="x") == (None, ())
    assert split_metrics((), others, subject="x") == (None, ())
    assert split_metrics((), embedded, subject="x") == (None, ("prompts_obeyed",))
    assert split_metrics(("CLIP_score", "fid"), others, subject="x") == (("fid",), ("clip_score",))
    assert split_metrics(("pick_score",), others, subject="x") == ((), ("pick_score",))
    with pytest.raises(UserError, match="clip_score is of images and their prompts, and run 3 has none"):
        split_metrics(("clip_score",), None, subject="run 3")


def test_names_in_words() -> None:
    assert "cosine" in str(in_words("clip_score")) and "cosine" in str(in_words("random-clip_score"))
    assert "texture" in str(in_words("prompts_obeyed/texture"))
    assert in_words("FID") is None and in_words("embedded-Recall") is None
    assert higher_is_better("pick_score") and higher_is_better("prompts_obeyed/shape") and not higher_is_better("FID")


def test_obeyed_prompts_are_the_caption_judges() -> None:
    images = np.stack([shapes_text.render(i, resolution=64)[0] for i in range(16)])
    texts = tuple(shapes_text.captions_of(i)[0] for i in range(16))
    wrong = (*texts[1:], texts[0])
    for prompts in (texts, wrong):
        judges = build_prompt_judges(["prompts_obeyed"], weights_dir=None, device="cpu")
        found = judge_prompts(ArrayImages(images=images), Prompts(texts=prompts, source="x"), judges, batch_size=16)[
            "metrics"
        ]
        assert found == pytest.approx(obeyed.CaptionJudge().obeyed(images, prompts))
    assert found["prompts_obeyed"] < 0.5
    with pytest.raises(UserError, match="a cat"):
        judge_prompts(ArrayImages(images=images), Prompts(texts=("a cat",), source="x"), judges)


# ---- runs -------------------------------------------------------------------------------------------------------------


def request(*metrics: str, prompts: str | None = HELD_OUT, num: int | None = 16, **kw: Any) -> EvalRequest:
    drawing = SampleSettings(prompts=prompts, num=num, steps=2, sampler="ode", device="cpu")
    return replace(EvalRequest(settings=drawing, extractor="embedded", metrics=metrics), **kw)


def test_a_run_is_judged_by_its_reference_and_by_its_prompts(runs_root: Path) -> None:
    run, told = runs_root / "text", Listener()
    result = evaluate_run(run, request(), told)
    assert result is not None
    assert {"embedded-FID", "prompts_obeyed", "prompts_obeyed/background"} <= result.metrics.keys()
    entry = runs.read_metrics(run)[-1]
    prompts = open_prompts(HELD_OUT, seed=0)
    assert entry["settings"]["prompts"] == {  # type: ignore[index]
        "source": prompts.source,
        "count": len(prompts.texts),
        "sha256": prompts.sha256,
    }
    assert entry["sampler"]["prompts"] == prompts.sha256  # type: ignore[index]
    assert entry["settings"]["sample_count"] == 16  # type: ignore[index]
    said = " ".join(told.warnings)
    assert f"16 samples of the first 16 of {len(prompts.texts):,} prompts: captions of shapes-text" in said
    assert prompts.sha256[:12] in said
    (biased,) = [note for note in told.warnings if "biased" in note]
    assert "30,000 or 40,192 prompts" in biased and "50,000" not in said
    # Once more by hand.
    drawn = next((run / "samples").glob("step_*/samples_16.npz"))
    expected = obeyed.obeyed(np.load(drawn)["arr_0"], prompts.texts[:16])
    assert {name: result.metrics[name] for name in expected} == pytest.approx(expected)


def test_prompt_metrics_alone_need_neither_inception_nor_a_reference(
    runs_root: Path, monkeypatch: pytest.MonkeyPatch, random_clips: None
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("not needed")

    for name in ("choose_extractor", "choose_reference", "open_reference", "reference_statistics", "find_images"):
        monkeypatch.setattr(evaluation, name, never)
    result = evaluate_run(runs_root / "text", request("clip_score", "pick_score"), Quiet())
    assert result is not None and result.metrics.keys() == {"random-clip_score", "random-pick_score"}
    settings = runs.read_metrics(runs_root / "text")[-1]["settings"]
    assert settings is not None and settings["judges"]["clip_score"]["model"] == "openai/clip-vit-large-patch14"
    # Once more by hand: image i with prompt i.
    images = np.load(next((runs_root / "text/samples").glob("step_*/samples_16.npz")))["arr_0"]
    texts = open_prompts(HELD_OUT, seed=0).texts[:16]
    scorer = build_prompt_judges(["clip_score"], weights_dir=None, device="cpu")["clip_score"]
    by_hand = [scorer(images[i : i + 1], [texts[i]])["random-clip_score"][0] for i in range(16)]
    assert result.metrics["random-clip_score"] == pytest.approx(np.mean(by_hand), abs=1e-6)


def test_missing_weights_are_said_before_anything_is_drawn(
    runs_root: Path, monkeypatch: pytest.MonkeyPatch, small_clips: None
) -> None:
    monkeypatch.setattr(evaluation, "sample_run", lambda *_: pytest.fail("drawn"))
    for metric in ("clip_score", "pick_score"):
        with pytest.raises(WeightsUnavailable, match=metric):
            evaluate_run(runs_root / "text", request(metric), Quiet())
    with pytest.raises(UserError, match="a cat"):
        bad = replace(request("prompts_obeyed"), settings=SampleSettings(prompt=("a cat",), num=2, device="cpu"))
        evaluate_run(runs_root / "text", bad, Quiet())
    with pytest.raises(UserError, match="takes text, and it was not said"):
        evaluate_run(runs_root / "text", request(prompts=None), Quiet())
    with pytest.raises(UserError, match="clip_score is of images and their prompts"):
        evaluate_run(runs_root / "labels", request("clip_score", prompts=None), Quiet())
    with pytest.raises(UserError, match="--prompts is for models that take text"):
        evaluate_run(runs_root / "labels", request("fid"), Quiet())


@pytest.mark.parametrize("words", [[], ["--all"], ["--sweep", "guidance=1,2"]])
def test_prompts_that_are_not_there_are_said_before_anything_is_loaded(
    runs_root: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    for name in ("choose_extractor", "build_prompt_judges", "open_reference", "sample_run"):
        monkeypatch.setattr(evaluation, name, lambda *_, **__: pytest.fail("loaded"))
    given = ["eval", str(runs_root / "text"), *words, "--prompts", "no/where.txt", "--device", "cpu"]
    done = CliRunner().invoke(app, given)
    assert isinstance(done.exception, UserError) and "no/where.txt" in done.exception.what
    done = CliRunner().invoke(app, ["eval", "--samples", "x.npz", "--prompts", "no/where.txt", "--reference", "y.npz"])
    assert isinstance(done.exception, UserError) and "no/where.txt" in done.exception.what


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["sample"], ["eval"], ["eval", "--all"], ["eval", "--sweep", "guidance=1,2"]], ids=" ".join
)
def test_annotations_are_read_once(
    runs_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    captions = [{"id": i, "image_id": i // 2, "caption": shapes_text.captions_of(i)[0]} for i in range(12)]
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(7)]  # the last one has none
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps({"images": images, "annotations": captions}))
    times: list[Path] = []
    read = coco.read_annotations

    def counted(path: Path, **options: Any) -> Any:
        times.append(path)
        return read(path, **options)

    monkeypatch.setattr(coco, "read_annotations", counted)
    drawing = ["--prompts", str(path), "--steps", "2", "--device", "cpu"]
    judging = ["--metrics", "prompts_obeyed"] if words[0] == "eval" else ["--out", str(tmp_path / "out")]
    said = invoke(words[0], str(runs_root / "text"), *words[1:], *drawing, *judging)
    assert times == [path]
    assert "1 images without captions are passed over" in " ".join(said.split())


def test_recipes_say_of_which_prompts_their_figures_are(runs_root: Path) -> None:
    recipe = load_figure("mmdit/repa")
    config = replace(runs.load_config(runs_root / "text"), published=recipe.values["published"])
    asked, told = request("prompts_obeyed"), Listener()
    drawn = SampleRequest(num=4, device="cpu")
    prompts = open_prompts(HELD_OUT, seed=0)
    evaluation.standard_of(runs_root / "text", asked, drawn, config, "cpu", told, prompts=prompts)
    (said,) = [note for note in told.warnings if "figures are of" in note]
    assert "--prompts coco/annotations/captions_val2014.json" in said
    told = Listener()
    evaluation.choose_reference(runs_root / "text", asked, config, told)
    assert any("--reference coco/val2014" in note for note in told.warnings)
    # Of those very prompts nothing is to be said.
    told = Listener()
    theirs = replace(prompts, source="COCO's captions captions_val2014.json")
    evaluation.standard_of(runs_root / "text", asked, drawn, config, "cpu", told, prompts=theirs)
    assert not [note for note in told.warnings if "figures are of" in note]


def test_pages_of_runs_on_text_and_labels(runs_root: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("<script>alert(1)</script> a red dog\n" + "long words " * 200 + "\n")
    evaluate_run(runs_root / "labels", request("fid", prompts=None, num=4), Quiet())
    evaluate_run(runs_root / "text", request("fid", prompts=str(prompts), num=4), Quiet())
    page = write_run_report([runs_root / "text"], tmp_path / "text.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; a red dog" in page
    assert "Evaluation by prompts: text p.txt, all 2, digest" in page
    both = write_run_report([runs_root / "text", runs_root / "labels"], tmp_path / "both.html").read_text()
    assert "classes, no prompts: labels" in both and both.count("published figures use 50,000") == 1
    assert 'class="judged prompts"' in both and 'class="judged"' in both


@pytest.mark.slow
def test_runs_on_text_are_compared_by_samples_of_the_same_prompts(runs_root: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for copy in (first, second):
        shutil.copytree(runs_root / "text", copy, ignore=shutil.ignore_patterns("samples", "metrics.json"))
    told = Listener()
    drawing = SameNoise(num=3, device="cpu", progress=told)
    write_run_report([first, second], tmp_path / "none.html", same_noise=drawing)
    assert any("none of them was sampled yet" in note for note in told.warnings)
    words = ("a <b>cat</b>", "a dog", "a bird", "a fish")
    sample_run(second, SampleRequest(num=4, steps=1, sampler="ode", device="cpu", prompt=words), Quiet())
    page = write_run_report([first, second], tmp_path / "drawn.html", same_noise=drawing).read_text()
    assert "Same noise, same prompt" in page and "a &lt;b&gt;cat&lt;/b&gt;, first, step 2" in page
    assert "a bird" in page and "a fish" not in page


@pytest.mark.parametrize("command", ["sample", "eval"])
def test_help_can_be_read_at_80_columns(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80", "TERM": "dumb"}).output
    cut = [line for line in shown.splitlines() if "…" in line]
    assert [line for line in cut if "--representation-guid" not in line] == []
    words = " ".join(shown.replace("│", " ").split())
    assert "--prompts <str> Of a model that takes" in words
    assert command == "sample" or all(name in words for name in ("clip_score,", "pick_score,", "prompts_obeyed."))


def test_as_many_samples_as_prompts_unless_told_otherwise(runs_root: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("a cat\na dog\na bird\n")
    told = Listener()
    evaluate_run(runs_root / "text", request("fid", prompts=str(file), num=None), told)
    entry = runs.read_metrics(runs_root / "text")[-1]
    assert entry["settings"]["sample_count"] == 3  # type: ignore[index]
    assert not any("on the CPU only" in note for note in told.warnings)
    assert any("3 samples of 3 prompts: text p.txt" in note for note in told.warnings)


def test_samples_that_are_there_are_judged_by_prompts(tmp_path: Path, random_clips: None) -> None:
    images = np.stack([shapes_text.render(i, resolution=64)[0] for i in range(6)])
    np.savez(tmp_path / "x.npz", arr_0=images)
    (tmp_path / "p.txt").write_text("\n".join(shapes_text.captions_of(i)[0] for i in range(6)))
    asked = request("prompts_obeyed", "clip_score", prompts=str(tmp_path / "p.txt"), num=None)
    result = evaluate_images(str(tmp_path / "x.npz"), asked, require_labels=False, progress=Quiet())
    texts = open_prompts(str(tmp_path / "p.txt"), seed=0).texts
    assert result.metrics["prompts_obeyed"] == pytest.approx(obeyed.obeyed(images, texts)["prompts_obeyed"])
    assert json.loads(result.file.read_text())["settings"]["prompts"]["source"] == "text p.txt"
    with pytest.raises(UserError, match="is of images and their prompts"):
        evaluate_images(
            str(tmp_path / "x.npz"), request("clip_score", prompts=None), require_labels=False, progress=Quiet()
        )


def test_during_training_the_evaluations_are_of_the_prompts(
    runs_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(during, "GRID_STEPS", 2)
    given = {"steps": 1, "eval_every": 1, "eval_num": 4, "eval_extractor": "embedded", "eval_prompts": HELD_OUT}
    config = replace(runs.load_config(runs_root / "text"), **given)  # type: ignore[arg-type]
    folder = train(config, resume=False, watcher=Quiet(), root=tmp_path, make_judge=during.small_judge)
    (line,) = [line for line in log_of(folder) if any(key.startswith("eval/") for key in line)]
    assert {"eval/embedded-FID", "eval/prompts_obeyed", "eval/prompts_obeyed/shape"} <= line.keys()
    assert "(prompts: " in line["eval_of"]
    page = write_run_report([folder], tmp_path / "p.html").read_text()
    assert f"samples (prompts: {HELD_OUT}) compared with" in page


def test_prompts_of_a_run_on_labels_are_refused_at_once() -> None:
    from tests.trainer.tiny_runs import settings

    with pytest.raises(UserError, match="eval_prompts are for models that take text"):
        settings("nowhere", model="SiT-B/2", eval_prompts="x.txt")


def invoke(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


@pytest.mark.slow
def test_all_steps_and_sweeps_as_typed(runs_root: Path, random_clips: None) -> None:
    run = str(runs_root / "text")
    fast = ["--num", "8", "--steps", "2", "--device", "cpu", "--prompts", HELD_OUT, "--extractor", "embedded"]
    said = invoke("eval", run, "--all", *fast, "--metrics", "fid,prompts_obeyed")
    assert "curve:" in said
    points = json.loads((runs_root / "text/curves/ema.json").read_text())["points"]
    assert [point["step"] for point in points] == [1, 2]
    assert all({"embedded-FID", "prompts_obeyed"} <= point["metrics"].keys() for point in points)
    # Typed again nothing is drawn; other prompts are another curve.
    before = len(runs.read_metrics(runs_root / "text"))
    invoke("eval", run, "--all", *fast, "--metrics", "fid,prompts_obeyed")
    assert len(runs.read_metrics(runs_root / "text")) == before
    invoke("eval", run, "--all", *fast, "--metrics", "fid,prompts_obeyed", "--seed", "1")
    assert len(runs.read_metrics(runs_root / "text")) == before + 2
    others = set((runs_root / "text/sweeps").glob("*.json"))
    said = invoke("eval", run, "--sweep", "guidance=1,2", *fast, "--metrics", "clip_score")
    assert "best random-clip_score" in said
    (file,) = set((runs_root / "text/sweeps").glob("*.json")) - others
    held = json.loads(file.read_text())
    assert held["common"]["prompts"] == open_prompts(HELD_OUT, seed=0).sha256
    values = {point["value"]: point["metrics"]["random-clip_score"] for point in held["points"]}
    assert held["best"]["value"] == max(values, key=lambda value: values[value]), "more is better"


@pytest.mark.slow
def test_a_killed_judgement_of_all_steps_goes_on_where_it_was(runs_root: Path, tmp_path: Path) -> None:
    """Killed with -9 after the first step was judged, and while the second one is drawn."""
    root = tmp_path / "text"
    shutil.copytree(runs_root / "text", root, ignore=shutil.ignore_patterns("samples", "metrics.json", "curves"))
    script = Path(__file__).with_name("evaluate_killed.py")
    done = subprocess.run(
        [sys.executable, str(script), str(root), HELD_OUT],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "killed": -signal.SIGKILL,
        "judged": [1],
        "blocks": ["000000.npy"],
        "again": 0,
        "drawn": 8,  # the block that was lost, not the two that were there
    }
    points = json.loads((root / "curves/ema.json").read_text())["points"]
    assert [point["step"] for point in points] == [1, 2]
    whole = tmp_path / "whole"
    shutil.copytree(runs_root / "text", whole, ignore=shutil.ignore_patterns("samples", "metrics.json", "curves"))
    asked = replace(request("prompts_obeyed"), settings=replace(request().settings, checkpoint=2))
    evaluate_run(whole, asked, Quiet())
    assert runs.read_metrics(whole)[-1]["metrics"] == runs.read_metrics(root)[-1]["metrics"]
