"""The numbers of a report as tables: one column per run, one row per quantity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from trainer.evaluate.prompt_sets import PromptSet
from trainer.evaluate.table import decided_by, higher_is_better
from trainer.report.charts import smooth, smoothing_span
from trainer.report.data import Column, RunData
from trainer.runs.published import PROMPTS
from trainer.typeset import measure, number, setting

T = TypeVar("T")

# Of two runs judged by fewer samples, none is said to be better: twice the features of the embedded judge, whose covariance
# is singular below half of this.
FEWEST_TO_RANK = 256


@dataclass(frozen=True, kw_only=True)
class PublishedFigure:
    """A figure from a paper, shown beside ours.

    Attributes:
        metric: name as in metrics.json, e.g. `FID`.
        source: where it stands, e.g. `AHPA, Table 3`.
        run: name of the run it belongs to; None if it belongs to all.
        prompts: what its samples were drawn for, a key of `trainer.runs.published.PROMPTS`; None for classes.
    """

    metric: str
    value: float
    source: str
    run: str | None = None
    prompts: str | None = None


@dataclass(frozen=True)
class Cell:
    """What stands in one place of a table; `small` below it."""

    text: str
    small: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One quantity.

    Attributes:
        cells: one per run, None where there is nothing to show.
        best: the index of the cell that leads.
        published: figures of papers.
        better: which values are, `higher` or `lower` ones; empty where that is no question.
    """

    label: str
    cells: Sequence[Cell | None]
    best: int | None = None
    published: Sequence[Cell] = ()
    better: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under headings. columns: heads of the runs' columns, then that of the published figures if there are any."""

    columns: Sequence[Cell]
    groups: Mapping[str, Sequence[Row]]
    has_published: bool = False


EVERY: Literal["every"] = "every"  # evaluation, whatever its samples were drawn for
NOTHING: Literal["nothing"] = "nothing"
Of = PromptSet | Literal["every", "nothing"] | None  # which evaluations; None: of samples by class


def evaluations_of(run: RunData, of: Of) -> list[Mapping[str, Any]]:
    """The evaluations with these prompts, or of classes (None), oldest first."""
    return [e for e in run.evaluations if of == EVERY or PromptSet.of(e) == of]


def prompt_sets(runs: Sequence[RunData]) -> list[PromptSet | None]:
    """What the runs were judged by, None for classes: that of their latest evaluations first. Numbers of one are never
    put beside those of another."""
    depth = max((len(run.evaluations) for run in runs), default=0)
    latest_first = [list(reversed(run.evaluations)) for run in runs]
    return list(dict.fromkeys(PromptSet.of(of[i]) for i in range(depth) for of in latest_first if i < len(of)))


def metric_names(runs: Sequence[RunData], of: Of = EVERY) -> list[str]:
    """Names of all metrics in the runs' metrics.json, in order of appearance."""
    return list(dict.fromkeys(name for run in runs for e in evaluations_of(run, of) for name in metrics_of(e)))


def metrics_of(evaluation: Mapping[str, Any]) -> Mapping[str, float]:
    """`metrics` of one entry of metrics.json."""
    metrics = evaluation.get("metrics")
    return metrics if isinstance(metrics, Mapping) else {}


def sample_count(evaluation: Mapping[str, Any]) -> int | None:
    """How many samples an evaluation judged, where it says so."""
    judged = evaluation.get("settings")
    count = judged.get("sample_count") if isinstance(judged, Mapping) else None
    return count if isinstance(count, int) else None


def conditions(evaluation: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """What moves a metric of an evaluation, but for the checkpoint."""
    settings = evaluation.get("settings")
    settings = settings if isinstance(settings, Mapping) else {}
    found = {name: settings.get(name) for name in decided_by(metric)}
    judges = found.get("judges")
    if isinstance(judges, Mapping):  # of several metrics of prompts each has its own
        name = metric.removeprefix("random-").partition("/")[0]
        found["judges"] = {key: value for key, value in judges.items() if key == name}
    sampler = evaluation.get("sampler")
    if isinstance(sampler, Mapping):  # the latest checkpoint ends the curve of the snapshots, which may be rounded
        sampler = {key: value for key, value in sampler.items() if key != "stored"}
    return {"sampler": sampler, **found}


def _reference_images(evaluation: Mapping[str, Any]) -> str | None:
    """Which images samples were compared with, where that is known beyond the name of their cache."""
    settings = evaluation.get("settings")
    found = settings.get("reference_images") if isinstance(settings, Mapping) else None
    return found if isinstance(found, str) else None


def judged_otherwise(runs: Sequence[RunData], metric: str, of: Of) -> list[str]:
    """In what the judgements differ that the runs' figures of a metric are from, as `name: value (runs)`; empty where
    they compare."""
    held = [(run.name, judgement(run, metric, of)) for run in runs]
    flat = [(run, dict(flatten(conditions(each, metric)))) for run, each in held if each is not None]
    # Caches of the same images have names and fingerprints of their own; older evaluations say these alone.
    images = [_reference_images(each) for _, each in held if each is not None]
    if all(images) and len(set(images)) == 1:
        flat = [(run, {name: value for name, value in each.items() if name != "reference"}) for run, each in flat]
    found = []
    for name in dict.fromkeys(name for _, each in flat for name in each):
        values: dict[str, list[str]] = {}
        for run, each in flat:
            values.setdefault(each.get(name, "none"), []).append(run)
        if len(values) > 1:
            said = ", ".join(f"{value} of {' and '.join(who)}" for value, who in values.items())
            found.append(f"{name.replace('_', ' ')}: {said}")
    return found


def judgement(run: RunData, metric: str, of: Of) -> Mapping[str, Any] | None:
    """The last evaluation that holds a metric, empty where it was logged in training; None where it is not known."""
    held = next((e for e in reversed(evaluations_of(run, of)) if metric in metrics_of(e)), None)
    if held is None and of is None and run.last(f"metric/{metric}") is not None:
        return {}
    return held


def latest(run: RunData, of: Of = EVERY) -> Mapping[str, Any]:
    """The run's last evaluation, empty if there is none."""
    found = evaluations_of(run, of)
    return found[-1] if found else {}


def numbers(runs: Sequence[RunData], published: Sequence[PublishedFigure]) -> Table:
    """The table of numbers; groups and rows in which nothing is known are left out."""
    sources = {p.source for p in published}
    groups = {"Run": _run_rows(runs), "Training, averaged over the last steps": _training_rows(runs)}
    for heading, of, figures in _judgements(runs, published):
        groups[heading] = _evaluated_rows(runs, of, figures, with_source=len(sources) > 1)
    known = {heading: [row for row in rows if any(row.cells)] for heading, rows in groups.items()}
    extra = [Cell("Published", sources.pop() if len(sources) == 1 else "")] if published else []
    return Table(
        columns=[*(Cell(run.name) for run in runs), *extra],
        groups={heading: rows for heading, rows in known.items() if rows},
        has_published=bool(published),
    )


def _judgements(
    runs: Sequence[RunData], published: Sequence[PublishedFigure]
) -> list[tuple[str, Of, list[PublishedFigure]]]:
    """Heading, prompts and papers' figures of each group of evaluations; figures of prompts that nothing was judged by
    come last, by themselves."""
    groups: list[Of] = list(prompt_sets(runs))
    of_papers: dict[Of, str | None] = {of: of.known for of in groups if isinstance(of, PromptSet) and of.known}
    of_papers |= {None: None}  # classes
    found = []
    for of in groups if None in groups else [*groups, None]:
        figures = [p for p in published if of in of_papers and p.prompts == of_papers[of]]
        heading = "Evaluation" if of is None else f"Evaluation by prompts: {of}"
        found.append((f"{heading}, latest of each metric", of, figures))
    for prompts in dict.fromkeys(p.prompts for p in published if p.prompts not in of_papers.values()):
        what = PROMPTS[prompts][1] if prompts is not None and prompts in PROMPTS else str(prompts)
        found.append((f"Published, by prompts: {what}", NOTHING, [p for p in published if p.prompts == prompts]))
    return found


def _evaluated_rows(
    runs: Sequence[RunData], of: Of, published: Sequence[PublishedFigure], *, with_source: bool
) -> list[Row]:
    names = list(dict.fromkeys([*metric_names(runs, of), *(p.metric for p in published)]))
    rows = [_metric_row(runs, name, of, published, with_source=with_source) for name in names]
    if names:
        at = _cells(number, [latest(run, of).get("step") for run in runs])
        rows.append(Row(label="Evaluated at step", cells=[c or Cell("not judged") for c in at] if any(at) else at))
    return rows


def settings(runs: Sequence[RunData], key: str) -> Table:
    """`key` of the runs' last evaluations: all settings, since all of them move the numbers."""
    columns = [dict(flatten(latest(run).get(key))) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [
        Row(label=name.replace("_", " "), cells=[Cell(column.get(name, "–")) for column in columns]) for name in names
    ]
    return Table(columns=[Cell(run.name) for run in runs], groups={"": rows} if rows else {})


def _run_rows(runs: Sequence[RunData]) -> list[Row]:
    def row(label: str, name: str) -> Row:
        return Row(label=label, cells=_cells(str, [_setting(run, name) for run in runs]))

    speeds = [run.log.get("images_per_s") for run in runs]
    medians = [float(np.nanmedian(c.values)) if c is not None else None for c in speeds]
    beside = [", ".join(streams_of(run)) or None for run in runs]
    return [
        row("Method", "method"),
        *([Row(label="Diffused beside the latents", cells=_cells(str, beside))] if any(beside) else []),
        row("Model", "model"),
        row("Seed", "seed"),
        Row(label="Steps", cells=_cells(number, [run.steps for run in runs])),
        Row(label="Images/s (median)", cells=_cells(measure, medians)),
    ]


def is_text(run: RunData) -> bool:
    """Whether a run is conditioned on text, not on classes."""
    return run.config.get("condition") is not None


def streams_of(run: RunData) -> list[str]:
    """The features that a run diffused beside the latents; none where its configuration says nothing of the kind."""
    given = run.config.get("streams")
    return [str(feature) for feature in given] if isinstance(given, Mapping) else []


def loss_titles(runs: Sequence[RunData]) -> dict[str, str]:
    """What the loss and its weighted terms are called, by key of the log."""
    streams = dict.fromkeys(feature for run in runs for feature in streams_of(run))
    titles = {"loss": "Loss", "denoise": "Denoising loss of the latents" if streams else "Denoising term"}
    for key in dict.fromkeys(k for run in runs for k in run.log):
        kind, _, term = key.partition("/")
        if kind == "denoise" and term:
            of = next((f for f in streams if term == f or term.startswith(f"{f}/")), None)
            part = term if of is None else term[len(of) :].removeprefix("/")
            titles[key] = f"Denoising: {part}" if of is None else f"Denoising loss of {of}{f': {part}' if part else ''}"
        elif kind == "align":
            titles[key] = f"Alignment: {term}"
    return titles


MEASURES = {
    "similarity": ("Similarity of hidden states and targets", "mean cosine"),
    "router": ("Router: weight of the group", "weight, mean over the batch"),
    "xi": ("DyA: weight of the target that time modulates", "xi(t), mean over the batch"),
    "structure_gap": ("Structure of hidden states against that of targets", "mean difference of similarities"),
    "real_probability": ("Discriminator: targets taken for targets", "mean probability"),
    "fake_probability": ("Discriminator: hidden states taken for targets", "mean probability"),
}


def measure_words(key: str) -> tuple[str, str]:
    """What a method's measure `metric/<name>` is called, and the label of its axis; its own name where none is known.

    `metric/router/G3` is of a part, `metric/sra/similarity` of one of several methods.
    """
    name = key.removeprefix("metric/")
    words = name.split("/")
    at = next((i for i, word in enumerate(words) if word in MEASURES), None)
    if at is None:
        return name, name
    title, axis = MEASURES[words[at]]
    method, part = " ".join(words[:at]), "/".join(words[at + 1 :])
    return f"{title}{f' {part}' if part else ''}{f' ({method})' if method else ''}", axis


def _training_rows(runs: Sequence[RunData]) -> list[Row]:
    return [
        Row(label=label, cells=_cells(measure, [_level(run.log.get(key)) for run in runs]))
        for key, label in loss_titles(runs).items()
    ]


def _metric_row(
    runs: Sequence[RunData],
    metric: str,
    of: Of,
    published: Sequence[PublishedFigure],
    *,
    with_source: bool,
) -> Row:
    found = [_latest_metric(run, metric, of) for run in runs]
    known = [(f[0], i) for i, f in enumerate(found) if f is not None]
    best = None
    judgements = [judgement(run, metric, of) or {} for run in runs]
    few = any((sample_count(each) or FEWEST_TO_RANK) < FEWEST_TO_RANK for each in judgements)
    alike = not judged_otherwise(runs, metric, of)
    if alike and not few and len({measure(value) for value, _ in known}) > 1:  # a lead that does not show is none
        best = (max if higher_is_better(metric) else min)(known)[1]
    figures = []
    for p in published:
        if p.metric == metric:
            whose = f"({p.run})" if p.run and len(runs) > 1 else ""
            figures.append(Cell(measure(p.value), " ".join(filter(None, (p.source if with_source else "", whose)))))
    return Row(
        label=metric,
        cells=[_metric_cell(*f) if f else Cell("not measured") for f in found],
        best=best,
        published=figures,
        better="higher" if higher_is_better(metric) else "lower",
    )


def _cells(text: Callable[[T], str], values: Sequence[T | None]) -> list[Cell | None]:
    return [Cell(text(value)) if value is not None else None for value in values]


def _setting(run: RunData, name: str) -> str | None:
    """A setting of the config, at the top or one level down."""
    for place in [run.config, *(v for v in run.config.values() if isinstance(v, Mapping))]:
        value = place.get(name)
        if isinstance(value, Mapping):
            value = value.get("name")
        if value is not None:
            return setting(value)
    return None


def _level(column: Column | None) -> float | None:
    """Where a noisy quantity stands at the end: the last value of its smoothed curve."""
    if column is None:
        return None
    values = column.values[np.isfinite(column.values)]
    return float(smooth(values, span=smoothing_span(len(values)))[-1]) if len(values) else None


def _latest_metric(run: RunData, metric: str, of: Of) -> tuple[float, Sequence[float] | None] | None:
    """Value and interval of the last evaluation that holds the metric, else its last logged value."""
    held = judgement(run, metric, of)
    if held is None:
        return None
    if held:
        return float(metrics_of(held)[metric]), (held.get("intervals") or {}).get(metric)
    logged = run.last(f"metric/{metric}")
    assert logged is not None
    return logged, None


def _metric_cell(value: float, interval: Sequence[float] | None) -> Cell:
    return Cell(measure(value), f"95 %: {measure(interval[0])} to {measure(interval[1])}" if interval else "")


def flatten(settings: object, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (name, text) pairs; names of inner ones after those of outer ones, None left out."""
    if not isinstance(settings, Mapping):
        return []
    rows = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            rows += flatten(value, f"{prefix}{key} ")
        elif value is not None:
            rows.append((f"{prefix}{key}", setting(value)))
    return rows
