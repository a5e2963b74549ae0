"""The curve of a run's judged snapshots as a plot beside its JSON."""

from __future__ import annotations

from pathlib import Path

from featcache.store import files
from trainer.evaluate.curve import Curve
from trainer.evaluate.prompt_sets import PromptSet
from trainer.evaluate.table import higher_is_better
from trainer.plots import Chart, Series
from trainer.report.charts import save
from trainer.runs import folder as runs


def write_curve(run: Path, curve: Curve) -> Path:
    """Draws the first metric over steps to `curves/<weights>.svg` and `.png`; the JSON file's path.

    Raises:
        UserError: the disk refuses.
    """
    first = next(iter(curve.points[-1].metrics))
    points = [(point.step, point.metrics[first]) for point in curve.points if first in point.metrics]
    name = f"{runs.display_name(run)}, {curve.weights}"
    judged = runs.read_metrics(run)
    of = next((PromptSet.of(entry) for entry in reversed(judged) if entry.get("asked") == curve.asked), None)
    name += "" if of is None else f", prompts from {of.source}, {of.sha256[:8]}"
    chart = Chart(
        title=f"{first} ({'higher' if higher_is_better(first) else 'lower'} is better)",
        x_label="training step",
        y_label=first,
        series=[Series(label=name, x=[x for x, _ in points], y=[y for _, y in points], markers=True)],
    )
    stem = files.inside(run, "curves") / curve.file.stem
    save(chart, stem)
    return curve.file
