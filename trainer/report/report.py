"""Runs => one HTML page: how the samples look, how training went, what was measured, how to do it again."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import numpy as np

from featcache.store import files
from trainer.evaluate.prompt_sets import PromptSet
from trainer.evaluate.table import higher_is_better, in_words
from trainer.plots import Chart, Mark, Series, Strips
from trainer.report.analysis import in_brief
from trainer.report.charts import smoothed_series
from trainer.report.data import Column, RunData
from trainer.report.judged import JudgedSamples
from trainer.report.page import Figure, read_picture, write_page
from trainer.report.table import (
    FEWEST_TO_RANK,
    Of,
    PublishedFigure,
    conditions,
    evaluations_of,
    flatten,
    is_text,
    judged_otherwise,
    judgement,
    latest,
    loss_titles,
    measure_words,
    metric_names,
    metrics_of,
    numbers,
    prompt_sets,
    sample_count,
    settings,
)
from trainer.runs.log import EVALUATION, is_detail
from trainer.sampling.grid import row_names, row_scale
from trainer.training.spikes import COLUMN as SPIKE
from trainer.typeset import number

MAX_STRIP_STEPS, MAX_STRIP_TILES = 6, 3
MAX_MARKS = 200  # of a kind on a chart
STEPS = "training step"


def write_report(
    out_html: Path | str,
    runs: Sequence[RunData],
    *,
    title: str,
    lead: str = "",
    images: Sequence[Figure] = (),
    charts: Sequence[Chart] = (),
    published: Sequence[PublishedFigure] = (),
    judged_samples: Sequence[JudgedSamples] = (),
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
        judged_samples: shown first.

    Returns:
        The path written.

    Raises:
        UserError: a picture that cannot be read.
    """
    values = _values(Path(out_html), runs, title, lead, images, published)
    values["judged_samples"] = judged_samples
    return write_page(Path(out_html), "report.html", **values, charts=[*_step_charts(runs), *charts])


def write_comparison(
    out_html: Path | str,
    runs: Sequence[RunData],
    *,
    title: str = "Comparison",
    lead: str = "",
    images: Sequence[Figure] = (),
    charts: Sequence[Chart] = (),
    published: Sequence[PublishedFigure] = (),
    judged_samples: Sequence[JudgedSamples] = (),
    drawn: Strips | None = None,
) -> Path:
    """Write one self-contained page that puts runs side by side.

    Curves stand over steps; the denoising loss and FID over time, too. Samples are compared as strips: one row per run, one
    column per step that all runs have, always the same tiles of the grids, which come from the same noise.
    Where they have none, `drawn` takes their place.

    Other arguments, return value and errors as `write_report`.
    """
    values = _values(Path(out_html), runs, title, lead, images, published)
    values["judged_samples"] = judged_samples
    values |= {"at_steps": _step_charts(runs), "at_time": _time_charts(runs), "charts": charts}
    values |= {"strips": _strips(runs), "drawn": drawn}
    return write_page(Path(out_html), "comparison.html", **values)


def _values(
    out_html: Path,
    runs: Sequence[RunData],
    title: str,
    lead: str,
    images: Sequence[Figure],
    published: Sequence[PublishedFigure],
) -> dict[str, Any]:
    """What both pages show."""
    return {
        "title": title,
        "lead": lead,
        "warnings": dict.fromkeys(
            [
                *incomparable(runs),
                *(str(w) for run in runs for w in latest(run).get("warnings", ())),
            ]
        ),
        "came_from": _came_from(runs),
        "samples": [*(f for f in images if f.section == "samples"), *_run_samples(runs)],
        "features": [f for f in images if f.section != "samples"],
        "numbers": numbers(runs, published),
        "judged": [*_substitutes(runs), *_prompt_judges(runs), *_judged_sentences(runs)],
        "settings": {"Sampler": settings(runs, "sampler"), "Evaluation": settings(runs, "settings")},
        "runs": runs,
        "diagnostics": in_brief(runs[0]) if len(runs) == 1 else [],
        "links": _diagnostics_pages(out_html, runs),
    }


def router_chart(
    t: Sequence[float] | np.ndarray, weights: Mapping[str, Sequence[float] | np.ndarray], *, title: str
) -> Chart:
    """Router weights over the timestep: one line for each level or layer, weights [n] at t [n]."""
    series = [Series(label=name, x=t, y=w, colour=i, dashed=i >= 8) for i, (name, w) in enumerate(weights.items())]
    note = "t = 0 is data, t = 1 is noise."
    return Chart(title=title, x_label="timestep t", y_label="weight", series=series, note=note)


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


def _substitutes(runs: Sequence[RunData]) -> list[str]:
    """What may be made of figures by a network other than the one in the literature."""
    names = [n for n in metric_names(runs) if n.startswith(("embedded-", "random-")) and in_words(n) is None]
    if not names:
        return []
    said = (
        f"{', '.join(names)}: measured with a network other than the one in the literature: they are not FID and cannot be "
        "compared with published numbers."
    )
    if len([run for run in runs if metrics_of(latest(run))]) < 2:
        return [said]
    if len({PromptSet.of(latest(run)) for run in runs if metrics_of(latest(run))}) > 1:
        return [f"{said} The runs were judged by different prompts or by classes, so the figures do not rank them."]
    if any(judged_otherwise(runs, name, of) for of in prompt_sets(runs) for name in names):
        return [f"{said} The runs were not judged alike, so the figures do not rank them."]
    held = [judgement(run, name, of) for of in prompt_sets(runs) for name in names for run in runs]
    counts = [sample_count(each) for each in held if each]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return [said]
    if min(known) < FEWEST_TO_RANK:
        return [f"{said} {number(min(known))} samples are too few to rank the runs by: judge {FEWEST_TO_RANK} or more."]
    return [f"{said} They rank the runs on this page against each other."]


def _prompt_judges(runs: Sequence[RunData]) -> list[str]:
    """What each metric of prompts is, and by which network it was measured."""
    found: dict[str, list[str]] = {}
    for run in runs:
        for evaluation in run.evaluations:
            for metric, judge in _judges_of(evaluation).items():
                names = found.setdefault(metric, [])
                names += [judge] if judge not in names else []
    words = {metric: in_words(metric) for metric in found}
    return [f"{metric}: {words[metric]}; by {', '.join(by)}." for metric, by in found.items() if words[metric]]


def _judges_of(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """By metric of prompts, the network that measured it, and the digest of its weights."""
    settings = evaluation.get("settings")
    judges = settings.get("judges") if isinstance(settings, Mapping) else None
    found = {}
    for metric, judge in judges.items() if isinstance(judges, Mapping) else ():
        if isinstance(judge, Mapping):
            name = str(judge.get("model") or judge.get("judge"))[:200]
            random = " of random weights" if judge.get("weights") == "random" else ""
            weights = str(judge.get("sha256") or judge.get("weights_sha256"))[:12]
            found[str(metric)] = f"{name}{random}, weights {weights}"
    return found


def _judged_sentences(runs: Sequence[RunData]) -> list[str]:
    """How the judged samples were drawn, once for all runs that did it alike. The grids have settings of their own."""
    names: dict[str, list[str]] = {}
    for run in runs:
        settings, of = flatten(latest(run).get("sampler")), PromptSet.of(latest(run))
        parts = [
            v if k in ("name", "sampler") else f"{k.replace('_', ' ')} {v}"
            for k, v in settings
            if of is None or k != "prompts"
        ]
        parts += [] if of is None else [f"prompts: {of}"]
        if parts:
            names.setdefault(", ".join(parts), []).append(run.name)
    return [f"Judged samples of {' and '.join(who)}: {how}." for how, who in names.items()]


def _log_keys(runs: Sequence[RunData]) -> list[tuple[str, str, str]]:
    """(log key, title, axis label) in reading order, of what any run logged."""
    keys = dict.fromkeys(k for run in runs for k in run.log if not is_detail(k))
    titles = loss_titles(runs)
    chosen = [("loss", titles["loss"], "loss")]
    if any(_differs(run.log.get("loss"), run.log.get("denoise")) for run in runs):
        chosen.append(("denoise", titles["denoise"], "loss"))
    for part in ("denoise/", "align/"):
        chosen += [(k, titles[k], "loss term, weighted") for k in keys if k.startswith(part)]
    chosen += [(k, *measure_words(k)) for k in keys if k.startswith("metric/")]
    chosen += [
        (k, f"{k.removeprefix(EVALUATION)} of few samples, during training", k.removeprefix(EVALUATION))
        for k in keys
        if k.startswith(EVALUATION)
    ]
    chosen += [("grad_norm", "Gradient norm before clipping", "L2 norm")]
    chosen += [("images_per_s", "Speed", "images/s"), ("data_wait", "Waiting for data", "share of the time")]
    return [entry for entry in chosen if entry[0] in keys]


def incomparable(runs: Sequence[RunData]) -> list[str]:
    """What keeps the figures of these runs from being compared."""
    found = []
    by_normalization = _grouped(runs, lambda run: str(run.config.get("normalization", "scalar")))
    if len(by_normalization) > 1:
        named = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in by_normalization.items())
        found.append(
            f"The runs normalise their latents differently ({named}), so neither losses nor scores compare the methods."
        )
    by_weights = _grouped([run for run in runs if _judges(run)], lambda run: _judges(run) or ("", ""))
    by_prompts = _grouped([run for run in runs if metrics_of(latest(run))], lambda run: PromptSet.of(latest(run)))
    if len(by_prompts) > 1:
        said = "; ".join(f"{of or 'classes, no prompts'}: {', '.join(who)}" for of, who in by_prompts.items())
        found.append(
            f"The runs' latest samples were drawn for different prompts, or for classes ({said}): numbers of one of these "
            "are not compared with those of another."
        )
    found += [*_other_settings(runs), *_other_judges(runs)]
    names = [name for name, _ in by_weights]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            said = "; ".join(f"{w[:12]}: {', '.join(who)}" for (n, w), who in by_weights.items() if n == name)
            found.append(
                f"The runs were judged by different weights of the extractor {name} ({said}), so their scores cannot be "
                "compared: judge them again with trainer eval."
            )
    return found


# What sentences of their own say of extractors (`incomparable`) and of judges by prompt (`_other_judges`).
_SAID_OF_NETWORKS = re.compile(r"extractor weights sha256:|judges .* (model|judge|weights|sha256|weights sha256):")


def _other_settings(runs: Sequence[RunData]) -> list[str]:
    """Metrics that were measured at other settings, but for other weights, of which there are sentences of their own."""
    by_settings: dict[tuple[str, ...], list[str]] = {}
    for of in prompt_sets(runs):
        for metric in metric_names(runs, of):
            differing = judged_otherwise(runs, metric, of)
            said = tuple(each for each in differing if not _SAID_OF_NETWORKS.match(each))
            if said:
                by_settings.setdefault(said, []).append(metric)
    return [
        f"The runs' {', '.join(dict.fromkeys(metrics))} {'were' if len(metrics) > 1 else 'was'} not measured alike "
        f"({'; '.join(said)}), so no run is said to lead: judge them again with equal settings of trainer eval."
        for said, metrics in by_settings.items()
    ]


def _other_judges(runs: Sequence[RunData]) -> list[str]:
    """Metrics of prompts that were measured by different networks."""
    by_judge: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        for metric, judge in _judges_of(latest(run)).items():
            by_judge.setdefault(metric, {}).setdefault(judge, []).append(run.name)
    found = []
    for metric, judges in by_judge.items():
        if len(judges) > 1:
            said = "; ".join(f"{judge}: {', '.join(who)}" for judge, who in judges.items())
            found.append(
                f"The runs' {metric} was measured by different networks ({said}), so it cannot be compared: judge them "
                "again with trainer eval."
            )
    return found


Key = TypeVar("Key", bound=Hashable)


def _grouped(runs: Sequence[RunData], key: Callable[[RunData], Key]) -> dict[Key, list[str]]:
    groups: dict[Key, list[str]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run.name)
    return groups


def _judges(run: RunData) -> tuple[str, str] | None:
    """Extractor of the latest judgement and its weights' hash."""
    settings = latest(run).get("settings")
    extractor = settings.get("extractor") if isinstance(settings, Mapping) else None
    if not isinstance(extractor, Mapping):
        return None
    return str(extractor.get("extractor")), str(extractor.get("weights_sha256"))


def _measured_while_training(runs: Sequence[RunData], key: str) -> str:
    """How the small evaluations of runs were measured, and of how many earlier ones the curves are not."""
    columns = {run.name: run.log[key] for run in runs if key in run.log}
    ways: dict[str, list[str]] = {}
    for name, column in columns.items():
        if column.conditions:
            ways.setdefault(column.conditions, []).append(name)
    said = [how if len(ways) == 1 else f"{how} ({', '.join(of)})" for how, of in ways.items()]
    parts = [f"Measured of {'; of '.join(said)}."] if said else []
    parts += ["So these curves cannot be compared."] if len(ways) > 1 else []
    parts += [
        f"{name}: left out are earlier evaluations ({number(c.others)}) that were measured otherwise, or by a version that did not say how."
        for name, c in columns.items()
        if c.others
    ]
    return " ".join(parts)


def _differs(a: Column | None, b: Column | None) -> bool:
    return b is not None and (a is None or len(a.values) != len(b.values) or not np.allclose(a.values, b.values))


def _evaluated(run: RunData, metric: str, of: Of) -> Column:
    """A metric of metrics.json over the checkpoints it was measured at, all as in the last evaluation that holds it.

    Other samplers, references or numbers of samples give other numbers: joined by a line they would look like progress.
    """
    entries = [e for e in evaluations_of(run, of) if metric in metrics_of(e) and e.get("step") is not None]
    wanted = conditions(entries[-1], metric) if entries else {}
    values = {int(e["step"]): float(metrics_of(e)[metric]) for e in entries if conditions(e, metric) == wanted}
    steps = np.array(sorted(values), dtype=np.float64)
    return Column(steps=steps, time_s=_time_at(run, steps), values=np.array([values[int(s)] for s in steps]))


def _time_at(run: RunData, steps: np.ndarray) -> np.ndarray:
    column = run.log.get("loss")
    if column is None or not np.isfinite(column.time_s).any():
        return np.full(len(steps), np.nan)
    known = np.isfinite(column.time_s)
    times: np.ndarray = np.interp(steps, column.steps[known], column.time_s[known], left=np.nan, right=np.nan)
    return times


X = Callable[[Column], np.ndarray]  # where a column's values stand on the axis


def _charts(runs: Sequence[RunData], x_label: str, x_of: X, keys: Sequence[tuple[str, str, str]]) -> list[Chart]:
    """Charts of what was logged, and of each metric measured at several checkpoints."""
    ends = {run.name: x for run in runs if (x := _alignment_end(run, x_of)) is not None}
    begins = {run.name: places for run in runs if (places := _beginnings(run, x_of))}
    spikes = {run.name: x_of(run.log[SPIKE]) for run in runs if SPIKE in run.log}
    charts = []
    for key, title, label in keys:
        series = [
            smoothed_series(
                run.name,
                x_of(own),
                own.values,
                colour=i,
                breaks=[ends[run.name]] if run.name in ends else (),
            )
            for i, run in enumerate(runs)
            if key in run.log and (own := _own_part(run, runs, run.log[key])) is not None
        ]
        series = [s for s in series if len(s.y)]
        if series:
            chart = _marked(Chart(title=title, x_label=x_label, y_label=label, series=series), ends)
            chart = _with_marks(chart, begins, "line", "begins as a branch")
            if key.startswith(EVALUATION):
                chart = replace(chart, note=f"{chart.note} {_measured_while_training(runs, key)}".strip())
            if key in ("loss", "denoise"):
                chart = _with_marks(chart, spikes, "triangle", "has spikes of its denoising loss")
            charts.append(chart)
    return charts


def _metric_charts(
    runs: Sequence[RunData], x_label: str, x_of: X, wanted: Callable[[str], bool] = lambda _: True
) -> list[Chart]:
    """A chart of each metric, and of each set of prompts that it was measured with."""
    charts = []
    pairs = [(each, name) for each in prompt_sets(runs) for name in metric_names(runs, each) if wanted(name)]
    for of, metric in pairs:
        series = []
        for i, run in enumerate(runs):
            column = _evaluated(run, metric, of)
            x = x_of(column)
            keep = np.isfinite(x) & np.isfinite(column.values)
            if keep.any():
                series.append(Series(label=run.name, x=x[keep], y=column.values[keep], colour=i, markers=True))
                of_paper = x_label == STEPS and (of is None or of.known is not None)
                series += _of_papers(run, metric, i) if of_paper else []
        # A single checkpoint is a number, not a curve: the table has it.
        if any(len(s.x) > 1 and not s.dashed for s in series):
            arrow = "higher is better" if higher_is_better(metric) else "lower is better"
            title, note = f"{metric} ({arrow})", "" if of is None else f"Prompts: {of}."
            charts.append(Chart(title=title, x_label=x_label, y_label=metric, series=series, note=note))
    return charts


def _of_papers(run: RunData, metric: str, colour: int) -> list[Series]:
    """What the paper gives for the run's training, as far as the run has got or a little further."""
    points = [(step, value) for step, value in run.published.get(metric, ()) if step <= 1.25 * (run.steps or 0)]
    if not points:
        return []
    x, y = zip(*sorted(points))
    return [
        Series(
            label=f"{run.name}, in the paper", x=np.array(x), y=np.array(y), colour=colour, dashed=True, markers=True
        )
    ]


def _alignment_end(run: RunData, x_of: X) -> float | None:
    """Where on the axis the step lies from which a run was not aligned any more."""
    until = run.config.get("align_until")
    if not isinstance(until, int) or not 0 < until < (run.steps or 0) or run.config.get("method") == "none":
        return None
    steps = np.array([float(until)])
    (x,) = x_of(Column(steps=steps, time_s=_time_at(run, steps), values=steps))
    return float(x) if np.isfinite(x) else None


def _marked(chart: Chart, ends: Mapping[str, float]) -> Chart:
    """With marks where alignment ends in runs whose lines go on beyond."""
    reached = [line for line in chart.series if line.label in ends and line.x[-1] > ends[line.label]]
    if not reached:
        return chart
    marks = tuple(Mark(x=ends[line.label], colour=line.colour) for line in reached)
    return replace(
        chart, marks=marks, note=f"Dotted: alignment of {' and '.join(line.label for line in reached)} ends."
    )


def _own_part(run: RunData, runs: Sequence[RunData], column: Column) -> Column | None:
    """What of a branch is its own where an origin of it is among `runs`, from the last point before on: the rest is that
    run's line, which it would cover. None where nothing of its own is there."""
    there = {hashlib.sha256(other.config_text.encode()).hexdigest() for other in runs if other is not run}
    left = max((origin["step"] for origin in run.origins if origin["config_sha256"] in there), default=None)
    if left is None:
        return column
    first = int(np.searchsorted(column.steps, left, side="right"))
    if first == len(column.steps):
        return None
    own = slice(max(first - 1, 0), None)
    return Column(steps=column.steps[own], time_s=column.time_s[own], values=column.values[own])


def _beginnings(run: RunData, x_of: X) -> list[float]:
    """Where on the axis the run, and each of its origins that is a branch, begins."""
    steps = np.array([float(origin["step"]) for origin in run.origins])
    places = x_of(Column(steps=steps, time_s=_time_at(run, steps), values=steps))
    return [float(x) for x in places if np.isfinite(x)]


def _with_marks(
    chart: Chart, places: Mapping[str, Sequence[float] | np.ndarray], kind: Literal["line", "triangle"], what: str
) -> Chart:
    """With a mark at each place of the runs that the chart shows."""
    shown = {line.label: line.colour for line in chart.series}
    marks = [
        Mark(x=float(x), colour=shown[name], kind=kind)
        for name, found in places.items()
        if name in shown
        for x in found
    ]
    if not marks:
        return chart
    names = " and ".join(name for name in places if name in shown)
    note = f"{'Dotted' if kind == 'line' else '▾'}: {names} {what}."
    return replace(chart, marks=(*chart.marks, *marks[:MAX_MARKS]), note=f"{chart.note} {note}".strip())


def _came_from(runs: Sequence[RunData]) -> list[str]:
    """Of each branch, where it came from."""
    found = []
    for run in runs:
        if run.origins:
            chain = ", which is ".join(
                f"a branch of {o['name']} at step {number(o['step'])}" for o in reversed(run.origins)
            )
            found.append(f"{run.name} is {chain}.")
    return found


def _step_charts(runs: Sequence[RunData]) -> list[Chart]:
    label, steps = STEPS, attrgetter("steps")
    return _charts(runs, label, steps, _log_keys(runs)) + _metric_charts(runs, label, steps)


def _time_charts(runs: Sequence[RunData]) -> list[Chart]:
    """What is worth the time: the denoising loss, which all runs have, and FID."""
    longest = max((float(np.nanmax(c.time_s, initial=0)) for run in runs for c in run.log.values()), default=0.0)
    unit, seconds = ("h", 3600) if longest >= 7200 else ("min", 60) if longest >= 120 else ("s", 1)

    def times(column: Column) -> np.ndarray:
        return column.time_s / seconds

    label = f"training time ({unit})"
    denoising = [("denoise", loss_titles(runs)["denoise"], "loss")]
    return _charts(runs, label, times, denoising) + _metric_charts(
        runs, label, times, lambda metric: metric.endswith("FID")
    )


def _diagnostics_pages(out_html: Path, runs: Sequence[RunData]) -> list[tuple[str, str]]:
    """Runs and where their diagnostics pages lie, as seen from the report; percent-encoded: runs are named at will."""
    pages = [(run.name, files.inside(run.path, "analysis/index.html")) for run in runs if run.path is not None]
    return [(name, quote(os.path.relpath(page, out_html.parent))) for name, page in pages if page.is_file()]


def _resolution(run: RunData) -> int | None:
    dataset = run.cache.get("dataset")
    preprocessing = dataset.get("preprocessing") if isinstance(dataset, Mapping) else None
    value = preprocessing.get("resolution") if isinstance(preprocessing, Mapping) else None
    return value if isinstance(value, int) and value > 0 else None


def _tiles(path: Path, side: int | None) -> list[tuple[str, np.ndarray]]:
    """Tiles down the first column of a grid PNG, each with what it is of where the picture says so; or the whole picture if
    the size of a tile is not known."""
    _, picture = read_picture(path)
    pixels, names = np.asarray(picture), row_names(picture)
    H, W, _ = pixels.shape
    side = side * row_scale(side) if names and side is not None else side
    step = H // len(names) if names else side
    if side is None or step is None or H % step or W % side or step < side:
        return [("", pixels)]
    tiles = [pixels[top : top + side, :side] for top in range(0, H, step)]
    return list(zip(names or [""] * len(tiles), tiles, strict=True))


def common_steps(runs: Sequence[RunData]) -> list[int]:
    """Steps at which samples of all runs were drawn during training."""
    return sorted(set.intersection(*({step for step, _ in run.samples} for run in runs))) if runs else []


def _strips(runs: Sequence[RunData]) -> dict[str, Any] | None:
    """A column per step that all runs have; a block of rows, one per run, for each of a few tiles of the grids."""
    common = common_steps(runs)
    if not common:
        return None
    if len(common) > MAX_STRIP_STEPS:
        common = [common[i] for i in np.linspace(0, len(common) - 1, MAX_STRIP_STEPS).round().astype(int)]
    grids = [[_tiles(dict(run.samples)[step], _resolution(run)) for step in common] for run in runs]
    tiles = min(len(grid) for row in grids for grid in row)
    shown = np.unique(np.linspace(0, tiles - 1, MAX_STRIP_TILES).round().astype(int))
    blocks = []
    for tile in shown:
        rows = [(run.name, [grid[tile] for grid in row]) for run, row in zip(runs, grids)]
        # Of runs on text what was drawn; of one whose rows are of another caption it stands beside its name.
        captions = [row[-1][0] for _, row in rows]
        of = captions[0] if len(set(captions)) == 1 else ""
        named = [name if of or not caption else f"{name}: {caption}" for (name, _), caption in zip(rows, captions)]
        blocks.append({"of": of, "rows": [(name, [t for _, t in row]) for name, (_, row) in zip(named, rows)]})
    return {
        "steps": common,
        "blocks": blocks,
        "what": "prompt" if all(map(is_text, runs)) else "class or prompt" if any(map(is_text, runs)) else "class",
        "same_noise": len({str(run.config.get("seed")) for run in runs}) == 1,
    }
