"""The numbers of a report: one column a run, one row a quantity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.report.charts import smooth
from trainer.report.data import Column, RunData
from trainer.report.page import escape, measure, number


@dataclass(frozen=True, kw_only=True)
class Published:
    """A figure from a paper, shown beside ours.

    Attributes:
        metric: name as in metrics.json, e.g. `FID`.
        source: where it stands, e.g. `AHPA, Table 3`.
        run: name of the run it belongs to; None if it belongs to all.
    """

    metric: str
    value: float
    source: str
    run: str | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One quantity: `cells` are HTML, one a run, None where there is nothing to show."""

    label: str
    cells: Sequence[str | None]
    best: int | None = None
    published: str = ""


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of the metric reported under this name is better."""
    return metric.endswith("IS") or "Precision" in metric or "Recall" in metric


def metric_names(runs: Sequence[RunData]) -> list[str]:
    """Names of all metrics in the runs' metrics.json, in order of appearance."""
    return list(dict.fromkeys(name for run in runs for e in run.evaluations for name in metrics_of(e)))


def metrics_of(evaluation: Mapping[str, Any]) -> Mapping[str, float]:
    """`metrics` of one entry of metrics.json."""
    metrics = evaluation.get("metrics")
    return metrics if isinstance(metrics, Mapping) else {}


def latest(run: RunData) -> Mapping[str, Any]:
    """The run's last evaluation, empty if there is none."""
    return run.evaluations[-1] if run.evaluations else {}


def plain(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) >= 2**53:
        return f"{value!s:.40}"
    if isinstance(value, int | float):
        return number(float(value))
    if isinstance(value, list | tuple):
        return (" to " if len(value) == 2 else ", ").join(plain(v) for v in value)
    return str(value)


def numbers_html(runs: Sequence[RunData], published: Sequence[Published]) -> str:
    """The table of numbers, and below it what its metrics must not be taken for."""
    names = list(dict.fromkeys([*metric_names(runs), *(p.metric for p in published)]))
    sources = {p.source for p in published}
    groups = {
        "Run": _run_rows(runs),
        "Training, averaged over the last steps": _training_rows(runs),
        "Evaluation, latest of each metric": [
            _metric_row(runs, name, published, with_source=len(sources) > 1) for name in names
        ],
    }
    if names:
        steps = [latest(run).get("step") for run in runs]
        groups["Evaluation, latest of each metric"].append(Row(label="Evaluated at step", cells=_numbers(steps)))
    source = sources.pop() if len(sources) == 1 else ""
    extra = [f"Published<small>{escape(source)}</small>" if source else "Published"] if published else []
    body = []
    for heading, rows in groups.items():
        rows = [row for row in rows if any(row.cells)]
        if rows:
            body.append(f'<tr class="group"><th colspan="{len(runs) + 1 + len(extra)}">{heading}</th></tr>')
            body += [_row_html(row, published=bool(extra)) for row in rows]
    return _table_html([*(escape(run.name) for run in runs), *extra], body) + _caveat(names)


def settings_html(heading: str, runs: Sequence[RunData], key: str) -> str:
    """`key` of the runs' last evaluations, folded away: all settings, since all of them move the numbers."""
    columns = [dict(flatten(latest(run).get(key))) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    if not names:
        return ""
    body = []
    for name in names:
        cells = "".join(f'<td class="text">{escape(column.get(name, "–"))}</td>' for column in columns)
        body.append(f'<tr><th scope="row">{escape(name.replace("_", " "))}</th>{cells}</tr>')
    table = _table_html([escape(run.name) for run in runs], body)
    return f"<details><summary>{escape(heading)}</summary>{table}</details>"


def _run_rows(runs: Sequence[RunData]) -> list[Row]:
    def setting(label: str, name: str) -> Row:
        values = [_setting(run, name) for run in runs]
        return Row(label=label, cells=[escape(v) if v is not None else None for v in values])

    speeds = [run.log.get("images_per_s") for run in runs]
    return [
        setting("Method", "method"),
        setting("Model", "model"),
        setting("Seed", "seed"),
        Row(label="Steps", cells=_numbers([run.steps for run in runs])),
        Row(
            label="Images/s (median)",
            cells=_measures([float(np.nanmedian(c.values)) if c is not None else None for c in speeds]),
        ),
    ]


def _training_rows(runs: Sequence[RunData]) -> list[Row]:
    terms = dict.fromkeys(k for run in runs for k in run.log if k.startswith("align/"))
    labels = {"loss": "Loss", "denoise": "Denoising term"}
    labels |= {k: f"Alignment: {escape(k.removeprefix('align/'))}" for k in terms}
    return [
        Row(label=label, cells=_measures([_level(run.log.get(key)) for run in runs])) for key, label in labels.items()
    ]


def _metric_row(runs: Sequence[RunData], metric: str, published: Sequence[Published], *, with_source: bool) -> Row:
    found = [_latest_metric(run, metric) for run in runs]
    values = [f[0] if f else None for f in found]
    known = [(value, i) for i, value in enumerate(values) if value is not None]
    best = None
    if len({measure(value) for value, _ in known}) > 1:  # a lead that does not show is none
        best = (max if higher_is_better(metric) else min)(known)[1]
    cells = [_metric_cell(*f) if f else "not measured" for f in found]
    figures = []
    for p in published:
        if p.metric == metric:
            whose = f"({p.run})" if p.run and len(runs) > 1 else ""
            note = " ".join(part for part in (p.source if with_source else "", whose) if part)
            figures.append(measure(p.value) + (f"<small>{escape(note)}</small>" if note else ""))
    arrow, hint = ("&uarr;", "higher") if higher_is_better(metric) else ("&darr;", "lower")
    label = f'{escape(metric)} <span title="{hint} is better">{arrow}</span>'
    return Row(label=label, cells=cells, best=best, published="".join(figures))


def _row_html(row: Row, *, published: bool) -> str:
    cells = []
    for index, cell in enumerate(row.cells):
        mark = ' class="best"' if index == row.best else ""
        cells.append(f"<td{mark}>{cell if cell is not None else '&ndash;'}</td>")
    if published:
        cells.append(f"<td>{row.published}</td>")
    return f'<tr><th scope="row">{row.label}</th>{"".join(cells)}</tr>'


def _table_html(columns: Sequence[str], body: Sequence[str]) -> str:
    """Columns and rows as HTML."""
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    return (
        f'<div class="scroll"><table><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _caveat(names: Sequence[str]) -> str:
    substitutes = [name for name in names if name.startswith(("embedded-", "random-"))]
    if not substitutes:
        return ""
    return (
        f'<p class="after">{escape(", ".join(substitutes))}: measured with a network other than the one in the'
        " literature. They rank the runs on this page against each other; they are not FID and cannot be compared"
        " with published numbers.</p>"
    )


def _numbers(values: Sequence[float | None]) -> list[str | None]:
    return [number(float(v)) if v is not None else None for v in values]


def _measures(values: Sequence[float | None]) -> list[str | None]:
    return [measure(v) if v is not None else None for v in values]


def _setting(run: RunData, name: str) -> str | None:
    """A setting of the config, at the top or one level down."""
    for place in [run.config, *(v for v in run.config.values() if isinstance(v, Mapping))]:
        value = place.get(name)
        if isinstance(value, Mapping):
            value = value.get("name")
        if value is not None:
            return plain(value)
    return None


def _level(column: Column | None) -> float | None:
    """Where a noisy quantity stands at the end: the last value of its smoothed curve."""
    if column is None:
        return None
    values = column.values[np.isfinite(column.values)]
    return float(smooth(values, span=max(5, len(values) // 25))[-1]) if len(values) else None


def _latest_metric(run: RunData, metric: str) -> tuple[float, Sequence[float] | None] | None:
    """Value and interval of the last evaluation that holds the metric, else its last logged value."""
    for evaluation in reversed(run.evaluations):
        metrics = metrics_of(evaluation)
        if metric in metrics:
            return float(metrics[metric]), (evaluation.get("intervals") or {}).get(metric)
    logged = run.last(f"metric/{metric}")
    return (logged, None) if logged is not None else None


def _metric_cell(value: float, interval: Sequence[float] | None) -> str:
    if not interval:
        return measure(value)
    return f"{measure(value)}<small>95 %: {measure(interval[0])} to {measure(interval[1])}</small>"


def flatten(settings: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (name, text) pairs; names of inner ones after those of outer ones, None left out."""
    if not isinstance(settings, Mapping):
        return []
    rows = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            rows += flatten(value, f"{prefix}{key} ")
        elif value is not None:
            rows.append((f"{prefix}{key}", plain(value)))
    return rows
