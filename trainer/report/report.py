"""Runs => one HTML page: how the samples look, how training went, what was measured, how to do it again."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from featcache.store import files
from trainer import runs as run_folders
from trainer.report.charts import Chart, Series, smoothed_series
from trainer.report.data import Column, RunData
from trainer.report.page import Figure, charts_html, escape, figures_html, image_html, number, page_html, read_picture
from trainer.report.table import (
    Published,
    flatten,
    higher_is_better,
    latest,
    metric_names,
    metrics_of,
    numbers_html,
    settings_html,
)

MAX_STRIP_STEPS, MAX_STRIP_TILES = 6, 3


def write_report(
    out_html: Path | str,
    runs: Sequence[RunData],
    *,
    title: str,
    lead: str = "",
    images: Sequence[Figure] = (),
    charts: Sequence[Chart] = (),
    published: Sequence[Published] = (),
) -> Path:
    """Write one self-contained page about one or several runs: samples, curves, numbers, settings.

    Args:
        out_html: the file; written under a temporary name and renamed, folders made as needed.
        runs: read by `load_run`; the first is the one others are compared with.
        title: heading.
        lead: one or two sentences below it.
        images: pictures beside the runs' own samples (`section="samples"`) or in a section below the curves.
        charts: further charts, such as `router_chart`.
        published: figures of papers for the table.

    Returns:
        The path written.

    Raises:
        UserError: a picture that cannot be read.
    """
    features = [f for f in images if f.section != "samples"]
    body = [
        _header(title, lead, runs),
        _section("Samples", figures_html([*_given(images), *_run_samples(runs)])),
        _section("Curves", _curves([*_step_charts(runs), *charts])),
        _section("Numbers", numbers_html(runs, published) + _judged_sentences(runs)),
        _section("Features", figures_html(features)),
        _section("How it was sampled and judged", _settings(runs)),
        _section("Diagnostics", _diagnostics(Path(out_html), runs)),
        _section("Settings to reproduce", _configs(runs)),
    ]
    return _write(Path(out_html), page_html(title, "".join(body)))


def write_comparison(
    out_html: Path | str,
    runs: Sequence[RunData],
    *,
    title: str = "Comparison",
    lead: str = "",
    images: Sequence[Figure] = (),
    charts: Sequence[Chart] = (),
    published: Sequence[Published] = (),
) -> Path:
    """Write one self-contained page that puts runs side by side.

    Every curve stands twice: over steps and over time. Samples are compared as strips: one row a run, one
    column a step that all runs have, always the same tiles of the grids, which come from the same noise.

    Arguments, return value and errors as `write_report`.
    """
    features = [f for f in images if f.section != "samples"]
    body = [
        _header(title, lead, runs),
        _section("Same noise, same class, as training goes on", _strips(runs)),
        _section("Samples", figures_html([*_given(images), *_run_samples(runs)])),
        _section("At equal steps", _curves(_step_charts(runs))),
        _section("At equal time", _curves(_time_charts(runs))),
        _section("Over the timestep", charts_html(charts)),
        _section("Numbers", numbers_html(runs, published) + _judged_sentences(runs)),
        _section("Features", figures_html(features)),
        _section("How it was sampled and judged", _settings(runs)),
        _section("Diagnostics", _diagnostics(Path(out_html), runs)),
        _section("Settings to reproduce", _configs(runs)),
    ]
    return _write(Path(out_html), page_html(title, "".join(body)))


def router_chart(
    t: Sequence[float] | np.ndarray, weights: Mapping[str, Sequence[float] | np.ndarray], *, title: str
) -> Chart:
    """Router weights over the timestep: one line for each level or layer, weights [n] at t [n]."""
    series = [Series(label=name, x=t, y=w, colour=i, dashed=i >= 8) for i, (name, w) in enumerate(weights.items())]
    note = "t = 0 is data, t = 1 is noise."
    return Chart(title=title, x_label="timestep t", y_label="weight", series=series, note=note)


def _write(path: Path, text: str) -> Path:
    run_folders.write_page(path, text)
    return path


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{content}</section>" if content else ""


def _header(title: str, lead: str, runs: Sequence[RunData]) -> str:
    sentence = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    warnings = dict.fromkeys(str(w) for run in runs for w in latest(run).get("warnings", ()))
    notes = "".join(f'<p class="warn">{escape(w)}</p>' for w in warnings)
    return f"<header><h1>{escape(title)}</h1>{sentence}{notes}</header>"


def _given(images: Sequence[Figure]) -> list[Figure]:
    return [f for f in images if f.section == "samples"]


def _run_samples(runs: Sequence[RunData]) -> list[Figure]:
    figures = []
    for run in runs:
        if run.samples:
            step, path = run.samples[-1]
            figures.append(
                Figure(
                    image=path,
                    title=f"{run.name}, step {number(step)}.",
                    caption="Drawn during training, at this step.",
                    alt=f"Grid of generated samples of run {run.name} at step {step}",
                )
            )
    return figures


def _judged_sentences(runs: Sequence[RunData]) -> str:
    """How the judged samples were drawn, once for all runs that did it alike. The grids have settings of their own."""
    names: dict[str, list[str]] = {}
    for run in runs:
        settings = flatten(latest(run).get("sampler"))
        parts = [v if k in ("name", "sampler") else f"{k.replace('_', ' ')} {v}" for k, v in settings]
        if parts:
            names.setdefault(", ".join(parts), []).append(run.name)
    lines = [f"Judged samples of {' and '.join(who)}: {how}." for how, who in names.items()]
    return "".join(f'<p class="after">{escape(line)}</p>' for line in lines)


def _log_keys(runs: Sequence[RunData]) -> list[tuple[str, str, str]]:
    """(log key, title, axis label) in reading order, of what any run logged."""
    keys = dict.fromkeys(k for run in runs for k in run.log)
    chosen = [("loss", "Loss", "loss")]
    if any(_differs(run.log.get("loss"), run.log.get("denoise")) for run in runs):
        chosen.append(("denoise", "Denoising term", "loss"))
    chosen += [(k, f"Alignment: {k.removeprefix('align/')}", "loss term") for k in keys if k.startswith("align/")]
    chosen += [(k, k.removeprefix("metric/"), k.removeprefix("metric/")) for k in keys if k.startswith("metric/")]
    chosen += [("grad_norm", "Gradient norm before clipping", "L2 norm")]
    return [entry for entry in chosen if entry[0] in keys]


def _differs(a: Column | None, b: Column | None) -> bool:
    return b is not None and (a is None or len(a.values) != len(b.values) or not np.allclose(a.values, b.values))


def _evaluated(run: RunData, metric: str) -> Column:
    """A metric of metrics.json over the checkpoints it was measured at, all as in the last evaluation that holds it.

    Other samplers, references or numbers of samples give other numbers: joined by a line they would look like progress.
    """
    entries = [e for e in run.evaluations if metric in metrics_of(e) and e.get("step") is not None]
    values = {
        int(e["step"]): float(metrics_of(e)[metric]) for e in entries if _conditions(e) == _conditions(entries[-1])
    }
    steps = np.array(sorted(values), dtype=np.float64)
    return Column(steps=steps, time_s=_time_at(run, steps), values=np.array([values[int(s)] for s in steps]))


def _conditions(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What moves the numbers of an evaluation, but for the checkpoint."""
    settings = evaluation.get("settings") or {}
    named = ("extractor", "sample_count", "resolution", "reference", "reference_count", "reference_features")
    return {"sampler": evaluation.get("sampler"), **{name: settings.get(name) for name in named}}


def _time_at(run: RunData, steps: np.ndarray) -> np.ndarray:
    column = run.log.get("loss")
    if column is None or not np.isfinite(column.time_s).any():
        return np.full(len(steps), np.nan)
    known = np.isfinite(column.time_s)
    return np.interp(steps, column.steps[known], column.time_s[known], left=np.nan, right=np.nan)


def _charts(runs: Sequence[RunData], x_label: str, x_of: Callable[[Column], np.ndarray]) -> list[Chart]:
    charts = []
    for key, title, label in _log_keys(runs):
        series = [
            smoothed_series(run.name, x_of(run.log[key]), run.log[key].values, colour=i)
            for i, run in enumerate(runs)
            if key in run.log
        ]
        series = [s for s in series if len(s.y)]
        if series:
            charts.append(Chart(title=title, x_label=x_label, y_label=label, series=series))
    for metric in metric_names(runs):
        series = []
        for i, run in enumerate(runs):
            column = _evaluated(run, metric)
            x = x_of(column)
            keep = np.isfinite(x) & np.isfinite(column.values)
            if keep.any():
                series.append(Series(label=run.name, x=x[keep], y=column.values[keep], colour=i, markers=True))
        # A single checkpoint is a number, not a curve: the table has it.
        if any(len(s.x) > 1 for s in series):
            arrow = "higher is better" if higher_is_better(metric) else "lower is better"
            charts.append(Chart(title=f"{metric} ({arrow})", x_label=x_label, y_label=metric, series=series))
    return charts


def _curves(charts: Sequence[Chart]) -> str:
    smoothed = any(series.raw is not None for chart in charts for series in chart.series)
    hint = "Numbers beside the names: where each line ends."
    if smoothed:
        hint = f"Thin lines: as logged. Thick lines: exponential mean over 4 % of the log. {hint}"
    return f'<p class="hint">{hint}</p>{charts_html(charts)}' if charts else ""


def _step_charts(runs: Sequence[RunData]) -> list[Chart]:
    return _charts(runs, "training step", lambda column: column.steps)


def _time_charts(runs: Sequence[RunData]) -> list[Chart]:
    longest = max((float(np.nanmax(c.time_s, initial=0)) for run in runs for c in run.log.values()), default=0.0)
    unit, seconds = ("h", 3600) if longest >= 7200 else ("min", 60) if longest >= 120 else ("s", 1)
    return _charts(runs, f"training time ({unit})", lambda column: column.time_s / seconds)


def _settings(runs: Sequence[RunData]) -> str:
    return settings_html("Sampler", runs, "sampler") + settings_html("Evaluation", runs, "settings")


def _diagnostics(out_html: Path, runs: Sequence[RunData]) -> str:
    """What the runs' diagnostics pages found, where there are some: of several runs the links alone."""
    from trainer.analyze.page import report_section

    items = []
    for run in runs:
        page = files.inside(run.path, "analysis/index.html") if run.path is not None else None
        if page is not None and page.is_file():
            # Percent-encoded, so that a run may be named as it likes.
            link = quote(os.path.relpath(page, out_html.parent))
            if len(runs) == 1:
                return report_section(page, link)
            items.append(f'<p><a href="{escape(link)}">Diagnostics of {escape(run.name)}</a></p>')
    return "".join(items)


def _configs(runs: Sequence[RunData]) -> str:
    parts = []
    for run in runs:
        if not run.config_text:
            continue
        cache = ", ".join(f"{k} {run.cache[k]}" for k in ("path", "fingerprint") if k in run.cache)
        parts.append(
            f"<details><summary>{escape(run.name)}: resolved config</summary>"
            + (f"<p>Cache: {escape(cache)}</p>" if cache else "")
            + f"<pre>{escape(run.config_text)}</pre></details>"
        )
    return "".join(parts)


def _resolution(run: RunData) -> int | None:
    dataset = run.cache.get("dataset")
    preprocessing = dataset.get("preprocessing") if isinstance(dataset, Mapping) else None
    value = preprocessing.get("resolution") if isinstance(preprocessing, Mapping) else None
    return value if isinstance(value, int) and value > 0 else None


def _tiles(path: Path, side: int | None) -> list[np.ndarray]:
    """Tiles down the first column of a grid PNG, or the whole picture if the size of a tile is not known."""
    _, picture = read_picture(path)
    pixels = np.asarray(picture)
    H, W, _ = pixels.shape
    if side is None or H % side or W % side:
        return [pixels]
    return [pixels[top : top + side, :side] for top in range(0, H, side)]


def _strips(runs: Sequence[RunData]) -> str:
    """One table: a column a step that all runs have, a row a run, repeated for a few tiles of the grids."""
    common = sorted(set.intersection(*({s for s, _ in run.samples} for run in runs))) if runs else []
    if not common:
        return ""
    if len(common) > MAX_STRIP_STEPS:
        common = [common[i] for i in np.linspace(0, len(common) - 1, MAX_STRIP_STEPS).round().astype(int)]
    grids = [[_tiles(dict(run.samples)[step], _resolution(run)) for step in common] for run in runs]
    tiles = min(len(grid) for row in grids for grid in row)
    body = []
    for tile in np.unique(np.linspace(0, tiles - 1, MAX_STRIP_TILES).round().astype(int)):
        for run, row in zip(runs, grids):
            pictures = "".join(
                f"<td>{image_html(grid[tile], alt=f'{run.name}, step {step}')}</td>" for step, grid in zip(common, row)
            )
            body.append(f'<tr><th scope="row">{escape(run.name)}</th>{pictures}</tr>')
        body.append(f'<tr class="gap"><td colspan="{len(common) + 1}"></td></tr>')
    head = "".join(f'<th scope="col">{number(step)}</th>' for step in common)
    noise = "rows of a block start from the same noise and class"
    if len({str(run.config.get("seed")) for run in runs}) > 1:
        noise = "the runs have different seeds, so their noise differs"
    return (
        f'<p class="hint">One column a training step, one row a run; {noise}.</p>'
        f'<div class="scroll"><table class="strips"><thead><tr><th scope="col">Step</th>{head}</tr></thead>'
        f"<tbody>{''.join(body[:-1])}</tbody></table></div>"
    )
