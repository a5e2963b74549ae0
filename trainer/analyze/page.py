"""Results => one self-contained page a run, and one page that puts several runs side by side."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.analyze import DIAGNOSTICS
from trainer.analyze.result import Matrix, Plot, Result, Strips
from trainer.report.charts import Chart, Series
from trainer.report.page import charts_html, escape, image_html, measure, number, page_html

# Also goes into run reports: nothing here may touch what they have of their own.
PLOT_STYLE = """
.wideplot{margin:1.6rem 0 0}.wideplot table{margin-top:.3rem}
.matrix td,.matrix th{padding:.25rem .7rem;border:0;white-space:nowrap;font-size:.8125rem}
.finding{font-size:1.0625rem;margin:0 0 .3rem;max-width:52rem}
.measured{color:var(--soft);font-size:.8125rem;margin:0 0 1rem}
.briefplot .charts{max-width:23rem}.briefplot .wideplot{margin-top:.4rem}
.brief h3{font-size:1rem;margin:1.6rem 0 .2rem;font-weight:650;break-after:avoid}
.toc{max-width:52rem;padding-left:1.2rem}.toc li{margin:.35rem 0}
.panels td{padding:0 2px 2px 0;border:0;width:6.2rem;min-width:3rem}
.panels th{border:0;padding:.1rem .3rem .2rem 0;font-size:.75rem;font-weight:400;color:var(--soft);text-align:left;
  vertical-align:bottom;line-height:1.25}
.panels tbody th{vertical-align:middle;white-space:nowrap}
.panels img{width:100%;image-rendering:pixelated}
.settings td.text{text-align:left;max-width:44rem}
@media print{.raw{display:none}}
.numbers{max-height:24rem;overflow:auto}.numbers table{font-size:.8125rem}
"""
STYLE = f"{PLOT_STYLE}.charts{{grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr))}}\n"
SHOWN_ROWS = 120


def strips_html(strips: Strips) -> str:
    """Pictures as a table, so that they scroll on a phone and keep the page's colours."""
    head = "".join(f'<th scope="col">{escape(c).replace(", ", "<br>")}</th>' for c in strips.columns)
    body = []
    for label, row in zip(strips.rows, strips.cells):
        cells = "".join(
            f"<td>{image_html(p, alt=f'{c}, {label}')}</td>" if p is not None else "<td></td>"
            for c, p in zip(strips.columns, row)
        )
        body.append(f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>')
    table = f'<table class="panels"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    return _wide(strips.title, f'<div class="scroll">{table}</div>', strips.note)


def matrix_html(matrix: Matrix) -> str:
    """Numbers as a table, shaded by value."""
    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in matrix.columns)
    body = []
    for label, values in zip(matrix.rows, matrix.values):
        cells = []
        for value in values:
            if not np.isfinite(value):
                cells.append("<td>&ndash;</td>")
                continue
            share = 100 * min(max((value - matrix.low) / (matrix.high - matrix.low), 0.0), 1.0)
            shade = f"background:color-mix(in srgb,var(--s0) {0.55 * share:.0f}%,transparent)"
            cells.append(f'<td style="{shade}">{value:.{matrix.decimals}f}</td>')
        body.append(f'<tr><th scope="row">{escape(label)}</th>{"".join(cells)}</tr>')
    table = f'<table class="matrix"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    return _wide(matrix.title, f'<div class="scroll">{table}</div>', matrix.note)


def _wide(title: str, content: str, note: str) -> str:
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f'<figure class="wideplot"><p class="charttitle">{escape(title)}</p>{content}{caption}</figure>'


def plots_html(plots: Sequence[Plot]) -> str:
    """Charts side by side, wide plots below them."""
    charts = charts_html([p.drawing for p in plots if isinstance(p.drawing, Chart)])
    wide = "".join(
        strips_html(p.drawing) if isinstance(p.drawing, Strips) else matrix_html(p.drawing)
        for p in plots
        if not isinstance(p.drawing, Chart)
    )
    return charts + wide


def numbers_html(result: Result) -> str:
    """Settings and the first rows of the table, folded away, with the names of the files that hold all of it."""
    settings = "".join(
        f'<tr><th scope="row">{escape(k)}</th><td class="text">{escape(_text(v))}</td></tr>'
        for k, v in result.settings.items()
    )
    rows = result.rows[:SHOWN_ROWS]
    columns = list(rows[0]) if rows else []
    head = "".join(f'<th scope="col">{escape(c.replace("_", " "))}</th>' for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(_text(row[c]))}</td>" for c in columns) + "</tr>" for row in rows)
    more = f"<p>The first {SHOWN_ROWS} of {len(result.rows)} rows.</p>" if len(result.rows) > SHOWN_ROWS else ""
    stem = result.what
    links = ", ".join(f'<a href="{stem}.{kind}">{stem}.{kind}</a>' for kind in ("json", "csv"))
    files = f"<p>Files: {links}, and each plot as SVG and PNG.</p>"
    return (
        f'<details><summary>How it was measured</summary><table class="settings"><tbody>{settings}</tbody></table></details>'
        f'<details class="raw"><summary>Numbers</summary>{files}{more}'
        f'<div class="numbers"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>'
    )


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value) if abs(value) >= 0.01 or value == 0 else measure(value)
    return str(value)


def section_html(result: Result, measured: str) -> str:
    """Question, finding, plots, numbers. measured: on what, in a few words."""
    return (
        f'<section id="{escape(result.what)}"><h2>{escape(result.title)}</h2>'
        f'<p class="lead">{escape(result.question)}</p>'
        f'<p class="finding">{escape(result.finding)}</p><p class="measured">{escape(measured)}</p>'
        f"{plots_html(result.plots)}{numbers_html(result)}</section>"
    )


# Pages are their own memory: what a later call does not measure anew is taken over from between these comments. All
# text on a page is escaped, so none can look like one.
_PART = re.compile(r"<!--(\w+):([\w-]+)-->(.*?)<!--/\1:\2-->", re.DOTALL)


def _parts(page: str) -> dict[tuple[str, str], str]:
    """(kind, diagnostic) => HTML of a page written before."""
    return {(m[1], m[2]): m[3] for m in _PART.finditer(page)}


def _marked(parts: Mapping[tuple[str, str], str], kind: str) -> str:
    return "".join(
        f"<!--{kind}:{what}-->{parts[kind, what]}<!--/{kind}:{what}-->" for what in DIAGNOSTICS if (kind, what) in parts
    )


def run_page(
    title: str,
    lead: str,
    results: Sequence[tuple[Result, str]],
    left_out: Mapping[str, str],
    earlier: str = "",
) -> str:
    """The page of one run.

    Args:
        results: each with the words on what it was measured.
        left_out: diagnostic => why it does not apply.
        earlier: the page as it was; sections of other diagnostics stay.
    """
    parts = _parts(earlier)
    for what in [*(r.what for r, _ in results), *left_out]:
        for kind in ("glance", "section", "leftout", "brief"):
            parts.pop((kind, what), None)
    for result, measured in results:
        what = result.what
        parts["section", what] = section_html(result, measured)
        parts["glance", what] = (
            f'<li><a href="#{escape(what)}">{escape(result.title)}</a>: {escape(result.finding)}</li>'
        )
        parts["brief", what] = _brief(result)
    for what, why in left_out.items():
        parts["leftout", what] = f'<p class="hint">{escape(what)} is left out: {escape(why)}.</p>'
    header = (
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p></header>'
        f'<section><h2>At a glance</h2><ul class="toc">{_marked(parts, "glance")}</ul>{_marked(parts, "leftout")}'
        '<p class="hint">Numbers beside the names of lines: where each line ends.</p></section>'
    )
    # Kept for the run's report, and not shown here a second time.
    brief = f"<template>{_marked(parts, 'brief')}</template>"
    return _document(title, header + _marked(parts, "section") + brief)


def _brief(result: Result) -> str:
    """Title, finding and the plot that tells most, for the run's report."""
    plot = next((p for p in result.plots if p.headline is not None), result.plots[0])
    return (
        f'<div class="brief"><h3>{escape(result.title)}</h3><p>{escape(result.finding)}</p>'
        f'<div class="briefplot">{plots_html([plot])}</div></div>'
    )


def report_section(page: Path, link: str) -> str:
    """The diagnostics of one run for its report, from its page: each one's finding and main plot. Empty without a page.

    link: the page as seen from the report.
    """
    from trainer.runs import read_page

    parts = {key: html for key, html in _parts(read_page(page)).items() if key[0] == "brief"}
    more = f'<p><a href="{escape(link)}">All plots and numbers of the diagnostics</a></p>'
    return f"<style>{PLOT_STYLE}</style>{''.join(parts.values())}{more}" if parts else more


def comparison_plots(by_run: Mapping[str, Sequence[Result]], what: str) -> list[Plot]:
    """What several runs show of one diagnostic: a chart for each headline that at least two of them have, one line a
    run; pictures (the first of each run) one below the other."""
    charts: dict[str, list[tuple[Plot, Series]]] = {}
    pictures: dict[str, list[tuple[str, Strips]]] = {}
    for i, (run, results) in enumerate(by_run.items()):
        plots = [p for r in results if r.what == what for p in r.plots]
        for plot in plots:
            if plot.headline is not None:
                label = f"{run}: {plot.headline.label}"
                line = dataclasses.replace(plot.headline, label=label, colour=i % 8, dashed=i >= 8)
                charts.setdefault(plot.name, []).append((plot, line))
        first = next((p for p in plots if isinstance(p.drawing, Strips)), None)
        if first is not None and isinstance(first.drawing, Strips):
            pictures.setdefault(first.name, []).append((run, first.drawing))
    out = []
    for name, lines in charts.items():
        base = lines[0][0]
        if len(lines) > 1 and isinstance(base.drawing, Chart):
            title, note = base.headline_title or base.drawing.title, base.headline_note or base.drawing.note
            title = title[0].upper() + title[1:]
            drawing = dataclasses.replace(base.drawing, title=title, series=[line for _, line in lines], note=note)
            out.append(Plot(name=f"comparison_{name}", drawing=drawing))
    for name, found in pictures.items():
        if len(found) > 1:
            out.append(Plot(name=f"comparison_{name}", drawing=_stacked(found)))
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


def comparison_page(title: str, lead: str, by_run: Mapping[str, Sequence[Result]], earlier: str = "") -> str:
    """One section a diagnostic: each run's finding and :func:`comparison_plots`.

    earlier: a page about the same runs and checkpoints; its other sections stay.
    """
    parts = _parts(earlier)
    for what in DIAGNOSTICS:
        results = {run: r for run, found in by_run.items() for r in found if r.what == what}
        if not results:
            continue
        first = next(iter(results.values()))
        findings = "".join(f"<li><b>{escape(run)}</b>: {escape(r.finding)}</li>" for run, r in results.items())
        parts["compared", what] = (
            f'<section id="{what}"><h2>{escape(first.title)}</h2><p class="lead">{escape(first.question)}</p>'
            f'<ul class="toc">{findings}</ul>{plots_html(comparison_plots(by_run, what))}</section>'
        )
    header = f'<header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p></header>'
    return _document(title, header + _marked(parts, "compared"))


def comparison_numbers(by_run: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """Diagnostic => findings by run, and the lines of its comparison charts by plot; JSON-ready."""
    out: dict[str, Any] = {}
    for what in DIAGNOSTICS:
        findings = {run: r.finding for run, found in by_run.items() for r in found if r.what == what}
        if findings:
            plots: dict[str, list[dict[str, Any]]] = {}
            for plot in comparison_plots(by_run, what):
                lines = plot.drawing.series if isinstance(plot.drawing, Chart) else ()
                plots[plot.name] = [
                    {"line": s.label, "x": np.asarray(s.x).tolist(), "y": np.asarray(s.y).tolist()} for s in lines
                ]
            out[what] = {"findings": findings, "plots": plots}
    finite: dict[str, Any] = _finite(out)
    return finite


def _document(title: str, body: str) -> str:
    return page_html(title, body).replace("</style>", f"{STYLE}</style>", 1)


def write_table(result: Result, folder: Path, run: Mapping[str, Any]) -> None:
    """``<what>.json`` (settings and rows) and ``<what>.csv`` (rows)."""
    import csv
    import io

    from trainer.runs import write_text

    document = {
        "diagnostic": result.what,
        "title": result.title,
        "run": dict(run),
        "plots": [plot.name for plot in result.plots],
        "finding": result.finding,
        "settings": dict(result.settings),
        "rows": [dict(row) for row in result.rows],
    }
    write_text(folder / f"{result.what}.json", json.dumps(_finite(document), indent=1) + "\n")
    buffer = io.StringIO()
    if result.rows:
        writer = csv.DictWriter(buffer, list(result.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(result.rows)
    write_text(folder / f"{result.what}.csv", buffer.getvalue())


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: they become null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
