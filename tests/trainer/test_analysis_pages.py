"""Diagnostics pages from made-up results: what is kept, what is shown of it, and files that nobody here wrote."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import trainer
from featcache.errors import UserError
from trainer.analyze.compare import compare
from trainer.analyze.result import (
    About,
    Result,
    read_about,
    read_comparison,
    read_results,
    write_about,
    write_comparison,
    write_result,
)
from trainer.plots import Chart, Matrix, Plot, Series, Strips
from trainer.report import load_run, write_report
from trainer.report.analysis import write_diagnostics, write_diagnostics_comparison
from trainer.report.charts import render_svg

NASTY = "<script>alert(1)</script>$\\frac{$\x1b]0;pwn\x07"


def result(text: str = "plain") -> Result:
    """One of everything that a diagnostic can draw; two lines, one with a hole."""
    rng = np.random.default_rng(len(text))
    x = np.linspace(0, 1, 4)
    lines = [
        Series(label=text, x=x, y=np.array([0.1, np.nan, 0.3, 0.4]), markers=True),
        Series(label="flat", x=x, y=np.full(4, 0.2), colour=7, dashed=True),
    ]
    tile = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    chart = Chart(title=text, x_label=text, y_label=text, series=lines, note=f"Look for {text}.")
    return Result(
        what="gsnr",
        title=f"Title: {text}",
        question=f"Is it {text}?",
        finding=f"It is {text}.",
        plots=[
            Plot(name="lines", drawing=chart, headline=lines[0], headline_title="each one's own"),
            Plot(
                name="grid",
                drawing=Strips(
                    title=text, columns=[text, "b"], rows=["r", text], cells=[[tile, None], [tile // 2, tile]]
                ),
            ),
            Plot(
                name="table",
                drawing=Matrix(
                    title=text, columns=["a", text], rows=[text], values=np.array([[0.25, np.nan]]), low=0, high=1
                ),
            ),
        ],
        rows=[{"name": text, "value": np.float64(np.inf), "count": 70_000}, {"name": "b", "value": 0.5, "count": 2}],
        settings={text: [1, 2], "on": True},
        run={"name": "run", "step": 4},
        measured="Step 4.",
    )


def run_with(folder: Path, found: Result) -> Path:
    """A run directory that has been analysed."""
    (folder / "analysis").mkdir(parents=True)
    (folder / "config.yaml").write_text("method: none\n")
    write_result(folder / "analysis", found)
    return folder


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = result()
    (read,) = read_results(run_with(tmp_path / "run", written) / "analysis")
    assert (read.title, read.question, read.finding, read.measured) == (
        "Title: plain",
        "Is it plain?",
        "It is plain.",
        "Step 4.",
    )
    assert read.rows[0] == {"name": "plain", "value": None, "count": 70_000}
    chart, strips, matrix = (plot.drawing for plot in read.plots)
    assert isinstance(chart, Chart) and isinstance(strips, Strips) and isinstance(matrix, Matrix)
    assert read.plots[0].headline is not None
    for series in (chart.series[0], read.plots[0].headline):
        np.testing.assert_array_equal(series.y, [0.1, np.nan, 0.3, 0.4])
    assert dataclasses.replace(chart, series=()) == dataclasses.replace(written.plots[0].drawing, series=())  # type: ignore[type-var]
    for row, expected in zip(strips.cells, written.plots[1].drawing.cells):  # type: ignore[union-attr]
        for tile, one in zip(row, expected):
            np.testing.assert_array_equal(tile, one)
    np.testing.assert_array_equal(matrix.values, [[0.25, np.nan]])


def test_pages_hold_nothing_but_what_the_files_say(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", result())
    write_about(run / "analysis", About(lead="A small model.", left_out={"router": "it has none"}), asked=[])
    page = write_diagnostics(run, ["gsnr"])
    first = page.read_bytes()
    text = first.decode()
    for phrase in ("A small model.", "router is left out: it has none.", 'id="gsnr"', "70\u202f000", "Look for plain."):
        assert phrase in text
    drawn = {file.name for file in (run / "analysis").glob("*.*g")}
    assert drawn == {f"{name}.{kind}" for name in ("lines", "grid", "table") for kind in ("svg", "png")}
    page.write_text("<section id='router'>what somebody put here</section>")
    assert write_diagnostics(run, []).read_bytes() == first
    # The report has the one plot with a headline.
    report = write_report(tmp_path / "report.html", [load_run(run)], title="t").read_text()
    assert "It is plain." in report and report.count("<svg") == 1 and 'href="run/analysis/index.html"' in report


def test_a_measurement_replaces_the_earlier_one_and_its_files(tmp_path: Path) -> None:
    folder = run_with(tmp_path / "run", result()) / "analysis"
    write_diagnostics(folder.parent, ["gsnr"])
    write_result(folder, dataclasses.replace(result("other"), plots=result("other").plots[:1]))
    assert not list(folder.glob("grid*")) and not list(folder.glob("tiles/*")) and not list(folder.glob("table*"))
    assert "plain" not in write_diagnostics(folder.parent, ["gsnr"]).read_text()


def test_what_is_left_out_stays_until_it_is_asked_for_again(tmp_path: Path) -> None:
    write_about(tmp_path, About(lead="a", left_out={"router": "none", "codec": "no"}), asked=["router", "codec"])
    write_about(tmp_path, About(lead="b"), asked=["codec", "gsnr"])
    assert read_about(tmp_path) == About(lead="b", left_out={"router": "none"})
    (tmp_path / "about.json").write_text("{")
    write_about(tmp_path, About(lead="c"), asked=["gsnr"])
    assert read_about(tmp_path) == About(lead="c")


def test_pictures_are_neither_written_nor_deleted_through_links(tmp_path: Path) -> None:
    folder, outside = run_with(tmp_path / "run", result()) / "analysis", tmp_path / "outside"
    shutil.move(folder / "tiles", outside)
    (folder / "tiles").symlink_to(outside)
    before = (outside / "grid.png").read_bytes()
    for touch in (lambda: write_result(folder, result("other")), lambda: load_run(tmp_path / "run")):
        with pytest.raises(UserError, match="tiles is a symbolic link"):
            touch()
    assert (outside / "grid.png").read_bytes() == before


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # so long a name leaves no room for axes
def test_names_do_no_harm_on_pages_and_plots(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", result(NASTY))
    write_about(run / "analysis", About(lead=NASTY, left_out={NASTY: NASTY}), asked=[])
    write_comparison(run / "analysis", ["a 1", "b 1"], compare({NASTY: [result(NASTY)], "b": [result(NASTY)]}))
    pages = [write_diagnostics(run, ["gsnr"]), write_diagnostics_comparison(run, ["gsnr"])]
    pages.append(write_report(tmp_path / "report.html", [load_run(run)], title=NASTY))
    for page in pages:
        text = page.read_text()
        assert "alert(1)" in text and "<script" not in text and "frac{" in text
        assert re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text) is None
    assert (run / "analysis" / "comparison_grid.png").is_file()


def test_a_folder_of_an_earlier_version_shows_the_plots_that_were_drawn(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", result())
    folder = run / "analysis"
    old = {"diagnostic": "gsnr", "title": "G", "run": {}, "plots": ["lines", "gone", "link"], "finding": "It was so."}
    (folder / "gsnr.json").write_text(json.dumps(old | {"settings": {"k": 3}, "rows": [{"a": 1}]}))
    Image.fromarray(np.full((9, 7, 3), 99, np.uint8)).save(folder / "lines.png")
    (folder / "link.png").symlink_to(folder / "lines.png")
    compared = {"gsnr": {"findings": {"run": "It was so."}, "plots": {"lines": [{"line": "run", "x": [1], "y": [2]}]}}}
    (folder / "comparison.json").write_text(json.dumps({"compared": ["run 1", "b 1"], "diagnostics": compared}))
    for page in (write_diagnostics(run, []), write_diagnostics_comparison(run, [])):
        text = page.read_text()
        assert "It was so." in text and text.count("<img") == 1 and 'width="7" height="9" alt="lines"' in text
    report = write_report(tmp_path / "report.html", [load_run(run)], title="t").read_text()
    assert "It was so." in report and report.count("<img") == 1
    # Another comparison takes its place, with the plots of its own.
    write_comparison(folder, ["run 1", "c 1"], [])
    assert read_comparison(folder) == [] and not (folder / "lines.png").exists()


def test_strips_whose_pictures_are_gone_are_shown_as_drawn(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", result())
    whole = write_diagnostics(run, ["gsnr"]).read_text()
    tiles = run / "analysis" / "tiles" / "grid.png"
    for damage in (lambda: Image.new("RGB", (5, 7)).save(tiles), lambda: tiles.write_bytes(b"x"), tiles.unlink):
        damage()
        text = write_diagnostics(run, []).read_text()
        assert 'class="panels"' in whole and 'class="panels"' not in text and 'alt="grid"' in text


def changed(path: tuple[str | int, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        place: Any = document
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("finding",), 3),
        (("rows",), {"a": 1}),
        (("settings",), [1]),
        (("plots",), 5),
        (("plots", 0), "../../outside"),
        (("drawings",), ["x"]),
        (("drawings", 0, "drawing", "kind"), "film"),
        (("drawings", 0, "drawing", "series", 0, "y"), [1.0]),
        (("drawings", 0, "drawing", "series", 0, "y"), "abcd"),
        (("drawings", 0, "drawing", "series", 0, "y"), [10**400] * 4),
        (("drawings", 0, "drawing", "series", 0, "colour"), -1),
        (("drawings", 0, "headline"), "x"),
        (("drawings", 1, "drawing", "cells"), [["x"]]),
        (("drawings", 2, "drawing", "values"), [[1.0]]),
        (("drawings", 2, "drawing", "values"), [[1.0], [1.0, 2.0]]),
        (("drawings", 2, "drawing", "high"), 0.0),
        (("drawings", 2, "drawing", "decimals"), 10**9),
    ],
    ids=str,
)
def test_a_damaged_file_is_named(tmp_path: Path, path: tuple[str | int, ...], value: Any) -> None:
    run = run_with(tmp_path / "run", result())
    file = run / "analysis" / "gsnr.json"
    document = json.loads(file.read_text())
    changed(path, value)(document)
    file.write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"gsnr\.json is damaged"):
        write_diagnostics(run, ["gsnr"])
    with pytest.raises(UserError, match=r"gsnr\.json is damaged"):
        load_run(run)
    # Measuring again mends it.
    write_result(run / "analysis", result())
    assert load_run(run).diagnostics[0].finding == "It is plain."


@pytest.mark.parametrize("value", [1e300, -(10**30), None, 5])
def test_numbers_beyond_any_axis_leave_a_hole(tmp_path: Path, value: Any) -> None:
    run = run_with(tmp_path / "run", result())
    file = run / "analysis" / "gsnr.json"
    document = json.loads(file.read_text())
    changed(("drawings", 0, "drawing", "series", 1, "y"), [value] * 4)(document)
    changed(("drawings", 2, "drawing", "values"), [[value, value]])(document)
    file.write_text(json.dumps(document))
    assert "It is plain." in write_diagnostics(run, ["gsnr"]).read_text()


def test_text_between_dollars_is_no_mathematics_and_holes_no_error() -> None:
    series = [Series(label="a", x=[0, 1, 2], y=[np.nan, np.inf, 1])]
    svg = render_svg(Chart(title="t", x_label="$\\frac{$", y_label="from $5 to $6", series=series))
    assert "$\\frac{$" in svg and "from $5 to $6" in svg


def test_measuring_knows_no_pages_and_pages_read_results_alone() -> None:
    """Arrows between the packages point one way; the command that does both is told apart."""

    def imported(folder: str) -> set[str]:
        files = [file for file in (Path(trainer.__path__[0]) / folder).rglob("*.py") if file.name != "analyze.py"]
        nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8")))]
        return {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module is not None}

    measuring, pages = imported("analyze"), imported("report")
    assert "trainer.plots" in measuring and "trainer.plots" in pages
    assert not [name for name in measuring if name.startswith(("trainer.report", "trainer.report.analyze"))]
    assert "trainer.evaluate.run" not in measuring
    assert {name for name in pages if name.startswith("trainer.analy")} == {"trainer.analyze.result"}
