"""Results => one self-contained page a run, and one page that puts several runs side by side."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.analyze.result import Matrix, Plot, Result, Strips
from trainer.report.charts import Chart
from trainer.report.page import chart_html, charts_html, escape, image_html, measure, number, page_html

STYLE = """
.charts{grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr))}
.finding+.charts{margin-top:1.1rem}
.wideplot{margin:1.6rem 0 0}.wideplot table{margin-top:.3rem}
.matrix td,.matrix th{padding:.25rem .7rem;border:0;white-space:nowrap;font-size:.8125rem}
.finding{font-size:1.0625rem;margin:0 0 .3rem;max-width:52rem}
.toc{max-width:52rem;padding-left:1.2rem}.toc li{margin:.35rem 0}
.panels td{padding:.05rem .12rem 0 0;border:0;width:6.2rem;min-width:3rem}
.panels th{border:0;padding:.1rem .3rem .2rem 0;font-size:.75rem;font-weight:400;color:var(--soft);text-align:left;
  vertical-align:bottom;line-height:1.25}
.panels tbody th{vertical-align:middle}
.panels img{width:100%;image-rendering:pixelated}
.numbers{max-height:24rem;overflow:auto}.numbers table{font-size:.8125rem}
"""
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
        f"<details><summary>How it was measured</summary><table><tbody>{settings}</tbody></table></details>"
        f"<details><summary>Numbers</summary>{files}{more}"
        f'<div class="numbers"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>'
    )


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value) if abs(value) >= 0.01 or value == 0 else measure(value)
    return str(value)


def section_html(result: Result) -> str:
    """Question, finding, plots, numbers."""
    return (
        f'<section id="{escape(result.what)}"><h2>{escape(result.title)}</h2>'
        f'<p class="lead">{escape(result.question)}</p>'
        f'<p class="finding">{escape(result.finding)}</p>{plots_html(result.plots)}{numbers_html(result)}</section>'
    )


def run_page(title: str, lead: str, results: Sequence[Result], left_out: Mapping[str, str]) -> str:
    """The page of one run.

    left_out: diagnostic => why it does not apply.
    """
    items = "".join(f'<li><a href="#{escape(r.what)}">{escape(r.title)}</a>: {escape(r.finding)}</li>' for r in results)
    missing = "".join(
        f'<p class="hint">{escape(what)} is left out: {escape(why)}.</p>' for what, why in left_out.items()
    )
    header = (
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p></header>'
        f'<section><h2>At a glance</h2><ul class="toc">{items}</ul>{missing}'
        '<p class="hint">Numbers beside the names of lines: where each line ends.</p></section>'
    )
    return _document(title, header + "".join(section_html(r) for r in results))


def comparison_page(title: str, lead: str, by_run: Mapping[str, Sequence[Result]]) -> str:
    """One chart for each headline that at least two runs have, one line a run; then each run's findings."""
    charts: dict[str, Chart] = {}
    for i, (run, results) in enumerate(by_run.items()):
        for result in results:
            for plot in result.plots:
                if plot.headline is None or not isinstance(plot.drawing, Chart):
                    continue
                line = dataclasses.replace(
                    plot.headline, label=f"{run}: {plot.headline.label}", colour=i % 8, dashed=i >= 8
                )
                heading = f"{result.title}: {plot.headline_title or plot.drawing.title}"
                base = charts.get(plot.name) or dataclasses.replace(plot.drawing, title=heading, series=[])
                charts[plot.name] = dataclasses.replace(base, series=[*base.series, line])
    shown = [chart_html(c) for c in charts.values() if len(c.series) > 1]
    findings = "".join(
        f"<h2>{escape(run)}</h2><ul class='toc'>"
        + "".join(f"<li>{escape(r.title)}: {escape(r.finding)}</li>" for r in results)
        + "</ul>"
        for run, results in by_run.items()
    )
    header = f'<header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p></header>'
    charts_part = f'<section><h2>Side by side</h2><div class="charts">{"".join(shown)}</div></section>'
    body = f"{header}{charts_part}<section>{findings}</section>"
    return _document(title, body)


def _document(title: str, body: str) -> str:
    return page_html(title, body).replace("</style>", f"{STYLE}</style>", 1)


def write_table(result: Result, folder: Path, run: Mapping[str, Any]) -> None:
    """``<what>.json`` (settings and rows) and ``<what>.csv`` (rows)."""
    import csv
    import io

    from trainer.runs import write_text

    document = {
        "diagnostic": result.what,
        "run": dict(run),
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
