"""Plots: line charts as inline SVG that follows the page's colours, and anything drawn as files for papers and slides.

Drawn by matplotlib. Charts of a page have the size of one of its columns, so that their text is as large as the page's
on a phone; their colours are written as placeholders and replaced by CSS variables, which is how one drawing serves
light, dark and print.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from featcache.console import plain
from featcache.store import files
from trainer.plots import Chart, Matrix, Series, Strips, drawable

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

WIDTH_INCHES, HEIGHT_INCHES = 4.6, 2.9
COLOURS = ("#1a66b0", "#c4541a", "#2a8458", "#8650a6", "#9a7400", "#b3316b", "#23828f", "#6a6f76")  # as in page.css
MAX_POINTS = 600
FEWEST_TO_SMOOTH = 25

_INK, _GRID = "#010101", "#020202"
_PLACEHOLDERS = tuple(f"#0300{index:02x}" for index in range(len(COLOURS)))


def smooth(values: np.ndarray, *, span: int) -> np.ndarray:
    """Mean over about `span` values around each: neither early nor late where the values rise or fall steadily.

    Towards the start the window narrows, so that its centre stays; at the end it stays as wide and goes no further, so that
    the last value is a mean, too.
    """
    n = len(values)
    index = np.arange(n)
    half = np.minimum(index, span // 2)
    last = np.minimum(index + half, n - 1)
    first = np.maximum(last - 2 * half, 0)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    means: np.ndarray = (sums[last + 1] - sums[first]) / (last + 1 - first)
    return means


def smoothed_series(label: str, x: np.ndarray, y: np.ndarray, *, colour: int, breaks: Sequence[float] = ()) -> Series:
    """A line of logged values: smoothed over 4 % of the points, the raw values behind it; raw alone if they are few.

    Values that are not finite are left out. At `breaks` of x (one ends a part) the values may jump: none is averaged with
    those beyond.
    """
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = np.asarray(x)[keep], np.asarray(y)[keep]
    if len(y) < FEWEST_TO_SMOOTH:
        return Series(label=label, x=x, y=y, colour=colour, markers=len(y) == 1)
    parts = np.split(y, np.searchsorted(x, sorted(breaks), side="right"))
    smoothed = np.concatenate([smooth(part, span=smoothing_span(len(y))) for part in parts])
    return Series(label=label, x=x, y=smoothed, raw=y, colour=colour)


def smoothing_span(points: int) -> int:
    """Over how many of so many points a curve is averaged."""
    return max(5, points // 25)


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `MAX_POINTS` points: lowest and highest of each stretch, so that spikes stay visible."""
    if len(x) <= MAX_POINTS:
        return x, y
    chosen = []
    for stretch in np.array_split(np.arange(len(x)), MAX_POINTS // 2):
        chosen += sorted({int(stretch[y[stretch].argmin()]), int(stretch[y[stretch].argmax()])})
    return x[chosen], y[chosen]


def _settings(salt: str, size: int) -> dict[RcKeyType, Any]:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.family": "sans-serif",
        "font.size": size,
        "axes.linewidth": 0.6,
        "axes.formatter.useoffset": False,
    }


def literal(text: str) -> str:
    """Text for matplotlib, which takes what stands between dollars for mathematics and writes control characters."""
    return plain(text).replace("$", r"\$")


def render_svg(chart: Chart) -> str:
    """The chart as one `<svg>` element without fixed colours or ids, title and legend left to the page."""
    with matplotlib.rc_context(_settings(chart.title + chart.y_label + chart.x_label, 11)):
        figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
        FigureCanvasSVG(figure)
        _draw_chart(figure.add_subplot(), chart, _PLACEHOLDERS, _INK, _GRID)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _embed(buffer.getvalue(), chart)


def save(drawing: Chart | Strips | Matrix, stem: Path) -> None:
    """Write `<stem>.svg` and `<stem>.png` (150 dots per inch), with fixed colours, title and legend.

    Raises:
        UserError: the disk refuses.
    """
    with matplotlib.rc_context(_settings("analysis", 10)):
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        if isinstance(drawing, Chart):
            figure.set_size_inches(5.6, 3.6)
            _draw_chart(axes, drawing, COLOURS, "black", "#e4e6e8")
            figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8.5)
        elif isinstance(drawing, Matrix):
            _draw_matrix(figure, axes, drawing)
        else:
            _draw_strips(figure, axes, drawing)
        if isinstance(drawing, Strips):
            figure.suptitle(literal(drawing.title), fontsize=11, fontweight="bold", x=0.01, ha="left")
        else:
            axes.set_title(literal(drawing.title), loc="left", fontsize=11, fontweight="bold")
        for kind, unstable in (("svg", "Date"), ("png", "Software")):
            picture = io.BytesIO()
            figure.savefig(picture, format=kind, dpi=150, metadata={unstable: None})
            files.atomic_write(stem.with_name(f"{stem.name}.{kind}"), [picture.getbuffer()], durable=False)


def _draw_chart(axes: Axes, chart: Chart, colours: Sequence[str], ink: str, grid: str) -> None:
    for series in chart.series:
        colour = colours[series.colour % len(colours)]
        x, y = drawable(series.x), drawable(series.y)
        if series.raw is not None:
            axes.plot(*_thin(x, drawable(series.raw)), color=colour, linewidth=0.6, alpha=0.3)
        axes.plot(
            *_thin(x, y),
            label=literal(series.label),
            color=colour,
            linewidth=1.6,
            linestyle=(0, (4, 2)) if series.dashed else "-",
            marker="o" if series.markers else None,
            markersize=3.5,
            solid_capstyle="round",
        )
        if series.error is not None:
            e = drawable(series.error)
            axes.vlines(x, y - e, y + e, color=colour, linewidth=1.0, alpha=0.6)
    for mark in chart.marks:
        colour = colours[mark.colour % len(colours)]
        if mark.kind == "line":
            axes.axvline(mark.x, color=colour, linewidth=1.2, linestyle=":")
        else:
            above = axes.get_xaxis_transform()
            axes.plot([mark.x], [0.97], marker="v", markersize=4, color=colour, linestyle="", transform=above)
    _limit(axes, chart)
    axes.set_xlabel(literal(chart.x_label), color=ink)
    axes.set_ylabel(literal(chart.y_label), color=ink)
    axes.grid(True, axis="y", color=grid, linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(ink)
    axes.tick_params(colors=ink, width=0.6, length=3)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.set_axisbelow(True)


def _limit(axes: Axes, chart: Chart) -> None:
    """Cut off the first moments of training, which would press everything after them flat."""
    if chart.log_y:
        axes.set_yscale("log")
        return
    tops, bottoms = [], []
    for series in chart.series:
        y = drawable(series.y)
        tail = y[len(y) // 50 :]
        tail = tail[np.isfinite(tail)]
        if series.error is not None and len(
            tail
        ):  # bars as long as the line is high, at most: one must not press all flat
            e = np.clip(np.nan_to_num(drawable(series.error)), 0, np.ptp(tail))[len(y) // 50 :]
            bars = np.stack([y[len(y) // 50 :] - e, y[len(y) // 50 :] + e])
            tail = bars[np.isfinite(bars)]
        if len(tail):
            tops.append(tail.max())
            bottoms.append(tail.min())
        if series.raw is not None:
            raw = drawable(series.raw)[len(y) // 50 :]
            tops.append(np.quantile(raw, 0.995))
            bottoms.append(np.quantile(raw, 0.005))
    if tops:
        low, high = min(bottoms), max(tops)
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
        axes.set_ylim(low - margin, high + margin)


def _draw_matrix(figure: Figure, axes: Axes, matrix: Matrix) -> None:
    R, C = matrix.values.shape
    figure.set_size_inches(2.2 + 0.95 * C, 1.2 + 0.36 * R)
    shown = axes.imshow(matrix.values, vmin=matrix.low, vmax=matrix.high, cmap="Blues", aspect="auto")
    for r in range(R):
        for c in range(C):
            if np.isfinite(matrix.values[r, c]):
                dark = matrix.share(matrix.values[r, c]) > 2 / 3
                text = f"{matrix.values[r, c]:.{matrix.decimals}f}"
                axes.text(c, r, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axes.set_xticks(range(C), [literal(c) for c in matrix.columns], fontsize=8, rotation=30 if C > 6 else 0)
    axes.set_yticks(range(R), [literal(r) for r in matrix.rows], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(shown, ax=axes, shrink=0.8)


def _draw_strips(figure: Figure, axes: Axes, strips: Strips) -> None:
    """All pictures on one canvas: an axes for each would take a hundred times as long to lay out."""
    R, C = len(strips.rows), len(strips.columns)
    side = next(p.shape[0] for row in strips.cells for p in row if p is not None)
    step = side + 2
    canvas = np.full((R * step - 2, C * step - 2, 3), 255, np.uint8)
    for r, row in enumerate(strips.cells):
        for c, picture in enumerate(row):
            if picture is not None:
                canvas[r * step : r * step + side, c * step : c * step + side] = picture
    figure.set_size_inches(1.1 + 0.95 * C, 0.7 + 0.95 * R)
    axes.imshow(canvas, interpolation="none")
    centres = np.arange(max(R, C)) * step + side / 2
    axes.set_xticks(centres[:C], [literal(c).replace(", ", "\n") for c in strips.columns], fontsize=8)
    axes.set_yticks(centres[:R], [literal(r) for r in strips.rows], fontsize=8)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)


def _embed(svg: str, chart: Chart) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # The backend's one rule is for every element of the page, and its ids repeat in every drawing: only the
    # hashed ones (clip paths, tick marks) are referred to, and the salt makes those differ between charts.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="(?![a-z][0-9a-f]{10}")[^"]*"', "", svg)
    svg = svg.replace(_INK, "var(--ink)").replace(_GRID, "var(--grid)")
    svg = re.sub(r"#0300([0-9a-f]{2})", lambda m: f"var(--s{int(m[1], 16)})", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    # Coordinates need no more than two decimals; the text between the tags keeps all of its own.
    svg = re.sub(r"<[^>]*>", lambda m: re.sub(r"(\d\.\d\d)\d+", r"\1", m[0]), svg)
    svg = re.sub(r"\s+", " ", svg)
    label = html.escape(plain(f"{chart.title}: {chart.y_label} over {chart.x_label}"), quote=True)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
