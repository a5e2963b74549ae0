"""Curves over a setting of guidance, for the page of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.evaluate.sweep import Curve, read_curves
from trainer.evaluate.table import higher_is_better
from trainer.interval import plain
from trainer.plots import Chart, Mark, Series
from trainer.typeset import measure, number

AXES = {"guidance": "guidance scale", "interval_low": "guided from t =", "interval_high": "guided up to t ="}
TOGETHER = ("Precision", "Recall")  # both are shares
OBEYED = "prompts_obeyed"  # and its shares for each of what prompts name


def sweep_charts(folder: Path) -> list[Chart]:
    """For each sweep of a run a chart of each metric, precision and recall in one; the best point is marked.

    Raises:
        UserError: a damaged file.
    """
    return [chart for curve in read_curves(folder) for chart in _charts(curve)]


def _charts(curve: Curve) -> list[Chart]:
    names = list(dict.fromkeys(name for point in curve.points for name in point.metrics))
    shares = [name for name in names if name.endswith(TOGETHER)]
    obeyed = [name for name in names if name.split("/")[0] == OBEYED]
    groups = [[name] for name in names if name not in (*shares, *obeyed)] + [
        group for group in (shares, obeyed) if group
    ]
    return [_chart(curve, group) for group in groups]


def _chart(curve: Curve, names: Sequence[str]) -> Chart:
    series = []
    for i, name in enumerate(names):
        points = [point for point in curve.points if name in point.metrics]
        x, y = [point.value for point in points], [point.metrics[name] for point in points]
        series.append(Series(label=name, x=x, y=y, colour=i, markers=True))
    best, deciding = curve.best, curve.deciding
    better = "higher" if higher_is_better(names[0]) else "lower"
    axis = AXES.get(curve.setting, curve.setting)
    of = f" Prompts: {curve.prompts}." if curve.prompts else ""
    return Chart(
        title=f"{names[0] if names[0] == OBEYED else ' and '.join(names)} over {axis.removesuffix(' =')} ({better} is better), step {number(curve.step)}",
        x_label=axis,
        y_label=names[0] if len(names) == 1 else "share",
        series=series,
        marks=(Mark(x=best.value),),
        note=f"Dotted: the best {deciding}, {measure(best.metrics[deciding])} at {plain(best.value)}, {curve.remark}.{of}",
    )
