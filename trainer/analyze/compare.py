"""What several runs show of one diagnostic, on one pair of axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from trainer.analyze import DIAGNOSTICS
from trainer.analyze.result import Compared, Result
from trainer.plots import Chart, Plot, Series, Strips


def compare(by_run: Mapping[str, Sequence[Result]]) -> list[Compared]:
    """One section per diagnostic that any run has: each run's finding, and what `_common_plots` finds."""
    sections = []
    for what in DIAGNOSTICS:
        results = {run: r for run, found in by_run.items() for r in found if r.what == what}
        if results:
            first = next(iter(results.values()))
            sections.append(
                Compared(
                    what=what,
                    title=first.title,
                    question=first.question,
                    plots=_common_plots(results, list(by_run)),
                    findings={run: r.finding for run, r in results.items()},
                )
            )
    return sections


def _common_plots(results: Mapping[str, Result], runs: Sequence[str]) -> list[Plot]:
    """A chart for each headline that at least two runs have, one line per run; pictures (the first of each run) one
    below the other."""
    charts: dict[str, list[tuple[Plot, Series]]] = {}
    pictures: dict[str, list[tuple[str, Strips]]] = {}
    for run, result in results.items():
        i = runs.index(run)  # a run keeps its colour where another has no such result
        for plot in result.plots:
            if plot.headline is not None:
                label = f"{run}: {plot.headline.label}"
                line = dataclasses.replace(plot.headline, label=label, colour=i % 8, dashed=i >= 8)
                charts.setdefault(plot.name, []).append((plot, line))
        strips = [(plot.name, plot.drawing) for plot in result.plots if isinstance(plot.drawing, Strips)]
        for name, first in strips[:1]:
            pictures.setdefault(name, []).append((run, first))
    out = []
    for name, lines in charts.items():
        base = lines[0][0]
        if len(lines) > 1 and isinstance(base.drawing, Chart):
            title, note = base.headline_title or base.drawing.title, base.headline_note or base.drawing.note
            title = title[0].upper() + title[1:]
            drawing = dataclasses.replace(base.drawing, title=title, series=[line for _, line in lines], note=note)
            out.append(Plot(name=f"comparison_{name}", drawing=drawing))
    out += [
        Plot(name=f"comparison_{name}", drawing=_stacked(found)) for name, found in pictures.items() if len(found) > 1
    ]
    return out


def _stacked(found: Sequence[tuple[str, Strips]]) -> Strips:
    """Runs' pictures one below the other, in the columns that all have: methods read and tap different ones."""
    common = [c for c in found[0][1].columns if all(c in strips.columns for _, strips in found)]
    places = [[list(strips.columns).index(c) for c in common] for _, strips in found]
    return dataclasses.replace(
        found[0][1],
        columns=common,
        rows=[f"{run}, {row}" for run, strips in found for row in strips.rows],
        cells=[[row[i] for i in place] for place, (_, strips) in zip(places, found) for row in strips.cells],
    )
