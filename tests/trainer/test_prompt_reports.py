"""Reports of runs on text: numbers of different prompts are kept apart, and every number says what it was measured with."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from trainer.evaluate.prompt_sets import PromptSet, known_prompts
from trainer.report.data import RunData
from trainer.report.report import _step_charts, _strips, incomparable, write_comparison, write_report
from trainer.report.sweeps import sweep_charts
from trainer.report.table import PublishedFigure, Table, numbers, prompt_sets
from trainer.runs.published import PROMPTS
from trainer.sampling.draw import save_png
from trainer.sampling.grid import LEAST_SIDE, ROW_NAMES, named_rows, row_names, row_scale

JUDGE = {"model": "openai/clip-vit-large-patch14", "weights": "openai/clip-vit-large-patch14", "sha256": "a" * 64}


def judged(
    metrics: Mapping[str, float],
    *,
    step: int = 8,
    prompts: str | None = None,
    source: str | None = None,
    count: int = 100,
    samples: int = 96,
    judges: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """An entry of metrics.json. prompts: their digest, None for classes."""
    settings: dict[str, Any] = {"sample_count": samples}
    sampler: dict[str, Any] = {"sampler": "ode", "steps": 25}
    if prompts is not None:
        digest = prompts * 64
        settings["prompts"] = {"source": source or f"text {prompts}.txt", "count": count, "sha256": digest}
        sampler["prompts"] = digest
    settings |= {} if judges is None else {"judges": judges}
    return {"step": step, "metrics": metrics, "settings": settings, "sampler": sampler}


def on_text(name: str, *evaluations: Mapping[str, Any], **kw: Any) -> RunData:
    return RunData(name=name, evaluations=evaluations, config={"condition": "text/clip-l"}, **kw)


def shown(table: Table) -> dict[str, dict[str, list[str | None]]]:
    """Heading -> label -> what the runs' cells say."""
    return {
        heading: {row.label: [None if cell is None else cell.text for cell in row.cells] for row in rows}
        for heading, rows in table.groups.items()
    }


def test_numbers_of_other_prompts_stand_under_their_own_heading() -> None:
    first = judged({"FID": 30.0, "clip_score": 0.2}, prompts="a")
    other = judged({"clip_score": 0.3}, prompts="b")
    fewer = judged({"clip_score": 0.4}, prompts="a", samples=50)
    again = judged({"pick_score": 20.0}, prompts="a", step=9)
    run, labels = on_text("t", first, other, fewer, again), RunData(name="l", evaluations=[judged({"FID": 5.0})])
    groups = shown(numbers([run, labels], []))
    sets = [PromptSet.of(e) for e in (again, judged({}), fewer, other)]
    assert prompt_sets([run, labels]) == sets and sets[0] == PromptSet.of(first)
    headings = [h for h in groups if h.startswith("Evaluation")]
    assert headings == [
        f"Evaluation by prompts: {sets[0]}, latest of each metric",
        "Evaluation, latest of each metric",
        f"Evaluation by prompts: {sets[2]}, latest of each metric",
        f"Evaluation by prompts: {sets[3]}, latest of each metric",
    ]
    assert groups[headings[0]] == {
        "FID": ["30.00", "not measured"],
        "clip_score": ["0.200", "not measured"],
        "pick_score": ["20.00", "not measured"],
        "Evaluated at step": ["9", "not judged"],
    }
    assert groups[headings[1]] == {"FID": ["not measured", "5.00"], "Evaluated at step": ["not judged", "8"]}
    assert groups[headings[2]]["clip_score"][0] == "0.400" and groups[headings[3]]["clip_score"][0] == "0.300"


def test_of_runs_judged_by_other_prompts_none_is_said_to_be_better(tmp_path: Path) -> None:
    def row(*runs: RunData) -> Any:
        (found,) = [row for rows in numbers(runs, []).groups.values() for row in rows if row.label == "clip_score"][:1]
        return found

    a, b = (judged({"clip_score": value}, prompts="a", samples=500, count=500) for value in (0.2, 0.3))
    assert row(on_text("a", a), on_text("b", b)).best == 1
    other = judged({"clip_score": 0.3}, prompts="b", samples=500, count=500)
    runs = [on_text("a", a), on_text("b", other), RunData(name="l", evaluations=[judged({"FID": 5.0})])]
    assert row(*runs).best is None
    (said,) = [text for text in incomparable(runs) if "prompts" in text]
    assert "text a.txt, all 500, digest aaaaaaaaaaaa: a; text b.txt" in said and "classes, no prompts: l" in said
    assert not incomparable([runs[0], on_text("c", a)])
    assert said.partition(" ")[2] in html.unescape(write_comparison(tmp_path / "p.html", runs).read_text())


def test_metrics_by_prompt_say_by_which_network_they_were_measured(tmp_path: Path) -> None:
    a = on_text("a", judged({"clip_score": 0.2}, prompts="a", judges={"clip_score": JUDGE}))
    b = on_text("b", judged({"clip_score": 0.3}, prompts="a", judges={"clip_score": {**JUDGE, "sha256": "b" * 64}}))
    page = write_report(tmp_path / "a.html", [a], title="t").read_text()
    assert "clip_score: CLIP score: cosine of" in page
    assert "by openai/clip-vit-large-patch14, weights aaaaaaaaaaaa." in page
    assert "prompts: text a.txt, the first 96 of 100, digest aaaaaaaaaaaa" in page and "a" * 64 in page
    (said,) = incomparable([a, b])
    assert "clip_score was measured by different networks" in said and "weights bbbbbbbbbbbb: b" in said
    damaged = on_text("d", {"metrics": {"x": 1.0}, "settings": {"judges": [1], "prompts": 3, "sample_count": "x"}})
    assert "x" in write_report(tmp_path / "d.html", [damaged], title="t").read_text()


def test_figures_of_papers_stand_by_as_many_of_their_prompts_alone() -> None:
    coco = "COCO's captions captions_val2014.json"
    figure = PublishedFigure(metric="FID", value=4.14, source="REPA, Table 9", prompts="coco-val")
    enough = judged({"FID": 5.0}, prompts="a", source=coco, count=40_504, samples=30_000)
    few = judged({"FID": 50.0}, prompts="a", source=coco, count=40_504, samples=96)
    other = judged({"FID": 60.0}, prompts="b")

    def where(*evaluations: Mapping[str, Any]) -> list[str]:
        groups = numbers([on_text("t", *evaluations)], [figure]).groups
        return [heading for heading, rows in groups.items() for row in rows if row.published]

    (heading,) = where(few, enough, other)
    assert heading == f"Evaluation by prompts: {PromptSet.of(enough)}, latest of each metric"
    apart = [f"Published, by prompts: {PROMPTS['coco-val'][1]}"]
    assert where(few, other) == where() == apart
    assert known_prompts(coco) == "coco-val" and known_prompts("text captions_val2014.json.txt") is None
    of_classes = replace(figure, prompts=None)
    groups = numbers([RunData(name="l", evaluations=[judged({"FID": 5.0})])], [of_classes]).groups
    assert [row.label for row in groups["Evaluation, latest of each metric"] if row.published] == ["FID"]


def test_curves_are_of_one_set_of_prompts() -> None:
    a = [judged({"clip_score": value}, prompts="a", step=step) for step, value in ((10, 0.1), (20, 0.2))]
    b = [judged({"clip_score": value}, prompts="b", step=step) for step, value in ((10, 0.6), (20, 0.5))]
    mixed = on_text("t", a[0], b[0], a[1], b[1])
    charts = [chart for chart in _step_charts([mixed]) if chart.y_label == "clip_score"]
    assert [list(chart.series[0].y) for chart in charts] == [[0.6, 0.5], [0.1, 0.2]]
    assert [chart.note for chart in charts] == [
        f"Prompts: text {name}.txt, the first 96 of 100, digest {name * 12}." for name in "ba"
    ]
    # A point by another network is not joined.
    other = judged({"clip_score": 0.9}, prompts="a", step=30, judges={"clip_score": JUDGE})
    assert not [chart for chart in _step_charts([on_text("t", a[0], other)]) if chart.y_label == "clip_score"]


def test_a_sweep_says_its_prompts_and_how_its_best_was_chosen(tmp_path: Path) -> None:
    def write(name: str, metrics: Sequence[Mapping[str, float]], **kw: Any) -> None:
        points = [{"value": 1.0 + i, **judged(m, **kw)} for i, m in enumerate(metrics)]
        content = {"setting": "guidance", "step": 8, "common": {}, "points": points}
        (tmp_path / "sweeps").mkdir(exist_ok=True)
        (tmp_path / f"sweeps/{name}.json").write_text(json.dumps(content))

    shares = [{"prompts_obeyed": v, "prompts_obeyed/shape": v + 0.1} for v in (0.1, 0.4, 0.2)]
    write("a", shares, prompts="a")
    write("b", [{"FID": 3.0}, {"FID": 2.0}])
    of_prompts, of_classes = sweep_charts(tmp_path)
    assert len(of_prompts.series) == 2 and of_prompts.marks[0].x == 2.0
    assert of_prompts.title.startswith("prompts_obeyed over guidance scale (higher is better)")
    assert "the best prompts_obeyed, 0.400 at 2, chosen by the prompts and the judge" in of_prompts.note
    assert "Prompts: text a.txt, the first 96 of 100, digest aaaaaaaaaaaa." in of_prompts.note
    assert "by the reference" in of_classes.note and "Prompts" not in of_classes.note


# ---- grids of training ------------------------------------------------------------------------------------------------

NAMES = ["a dog", "<script>alert(1)</script>", "a long caption " * 40]


def text_grid(path: Path, side: int, names: Sequence[str]) -> None:
    rows = np.arange(len(names), dtype=np.uint8)[:, None, None, None] * np.ones((1, side, 2 * side, 3), np.uint8)
    save_png(named_rows(rows, names), path, rows=names)


@pytest.mark.parametrize("side", [32, 64, 128])
def test_strips_of_text_runs_are_tiles_with_their_captions(tmp_path: Path, side: int) -> None:
    dataset = {"preprocessing": {"resolution": side}}
    runs = []
    for name in ("a", "b"):
        text_grid(tmp_path / f"{name}.png", side, NAMES)
        runs.append(on_text(name, samples=[(4, tmp_path / f"{name}.png")], cache={"dataset": dataset}))
    strips = _strips(runs)
    assert strips is not None and strips["what"] == "prompt"
    assert [block["of"] for block in strips["blocks"]] == [name[:1000] for name in NAMES]
    large = side * row_scale(side)
    assert LEAST_SIDE <= large < 2 * max(side, LEAST_SIDE)
    for i, block in enumerate(strips["blocks"]):
        assert [name for name, _ in block["rows"]] == ["a", "b"]
        assert all(tile.shape == (large, large, 3) and (tile == i).all() for _, row in block["rows"] for tile in row)
    page = write_comparison(tmp_path / "p.html", runs).read_text()
    assert "Same noise, same prompt, as training goes on" in page and "&lt;script&gt;" in page and "<script" not in page
    # Other captions stand beside the runs' names; a run on classes has none.
    text_grid(tmp_path / "b.png", side, ["x", "y", "z"])
    strips = _strips(runs)
    assert strips is not None
    assert [n for n, _ in strips["blocks"][0]["rows"]] == ["a: a dog", "b: x"] and strips["blocks"][0]["of"] == ""
    assert write_comparison(tmp_path / "p.html", [runs[0], replace(runs[1], config={})]).stat().st_size > 0


@pytest.mark.parametrize("held", ["{", "[]", "{}", "3", json.dumps(["a"] * 7), "[" * 10_000])
def test_names_that_cannot_be_are_none(tmp_path: Path, held: str) -> None:
    record = PngInfo()
    record.add_itxt(ROW_NAMES, held)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=record)
    with Image.open(tmp_path / "x.png") as picture:
        assert row_names(picture) == []
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert row_names(picture) == []
