"""Diagnostics => pages: all of one run, one diagnostic of several runs, and the gist of them for a run's report."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from trainer.analyze.result import Section, read_about, read_comparison, read_results, writing
from trainer.plots import Chart, Plot
from trainer.report.charts import save
from trainer.report.data import RunData
from trainer.report.page import write_page
from trainer.runs import folder as runs

SHOWN_ROWS = 120


def write_diagnostics(run: Path, drawn: Collection[str]) -> Path:
    """Writes `analysis/index.html` of a run from the results beside it.

    Args:
        drawn: diagnostics whose plots are drawn as files, too.

    Raises:
        UserError: a damaged file.
    """
    with writing(run) as folder:
        results, about = read_results(folder), read_about(folder)
        _save_plots(folder, results, drawn)
        return write_page(
            folder / "index.html",
            "diagnostics.html",
            title=f"Diagnostics of {runs.display_name(run)}",
            lead=about.lead,
            left_out=about.left_out,
            sections=[(result, _drawings(folder, result.plots)) for result in results],
            shown_rows=SHOWN_ROWS,
        )


def write_diagnostics_comparison(run: Path, drawn: Collection[str]) -> Path:
    """Writes `analysis/comparison.html` from the `comparison.json` beside it; arguments and errors as above."""
    with writing(run) as folder:
        sections = read_comparison(folder)
        _save_plots(folder, sections, drawn)
        names = dict.fromkeys(name for section in sections for name in section.findings)
        return write_page(
            folder / "comparison.html",
            "diagnostics_comparison.html",
            title=f"Diagnostics of {', '.join(names)}",
            lead="The same samples, noise and timesteps for every run.",
            sections=[(section, _drawings(folder, section.plots)) for section in sections],
        )


def in_brief(run: RunData) -> list[tuple[Section, dict[str, Any]]]:
    """A run's diagnostics, each with the one plot that tells most."""
    if run.path is None:
        return []
    folder = run.path / "analysis"
    return [(result, _drawings(folder, _main_plot(result))) for result in run.diagnostics]


def _main_plot(section: Section) -> list[Plot]:
    return [*(p for p in section.plots if p.headline is not None), *section.plots][:1]


def _drawings(folder: Path, plots: Sequence[Plot]) -> dict[str, Any]:
    """What the template lays out: charts side by side, wide drawings below them, then files alone."""
    drawings = [plot.drawing for plot in plots if plot.drawing is not None]
    files = [(plot.name, folder / f"{plot.name}.png") for plot in plots if plot.drawing is None]
    return {
        "charts": [drawing for drawing in drawings if isinstance(drawing, Chart)],
        "wide": [drawing for drawing in drawings if not isinstance(drawing, Chart)],
        "files": [(name, path) for name, path in files if path.is_file() and not path.is_symlink()],
    }


def _save_plots(folder: Path, sections: Sequence[Section], drawn: Collection[str]) -> None:
    for section in sections:
        for plot in section.plots:
            if section.what in drawn and plot.drawing is not None:
                save(plot.drawing, folder / plot.name)
