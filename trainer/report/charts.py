"""Line charts as inline SVG that follows the page's colours.

Drawn by matplotlib's SVG backend at the size of one column of the page, so that its text is as large as the
page's on a phone. Colours are written as placeholders and replaced by CSS variables, which is how one drawing
serves light, dark and print.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featcache.console import plain

WIDTH_INCHES, HEIGHT_INCHES = 4.6, 2.9
SERIES_COLOURS = 8
MAX_POINTS = 600
FEWEST_TO_SMOOTH = 25

_INK, _GRID = "#010101", "#020202"


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: `y` over `x`, both [n].

    Attributes:
        raw: drawn thin behind the smoothed line; NaN-free like `y`, or None.
        colour: index of the page's series colours, 0 to 7.
        dashed: a second line style, for a second quantity of the same colour.
        markers: mark the points (few points, such as checkpoints).
    """

    label: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    raw: Sequence[float] | np.ndarray | None = None
    colour: int = 0
    dashed: bool = False
    markers: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Several lines on one pair of axes; labels carry the units."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    note: str = ""
    log_y: bool = False


def smooth(values: np.ndarray, *, span: int) -> np.ndarray:
    """Exponential moving average over about `span` values, without the bias of a zero start."""
    decay = 1 - 2 / (span + 1)
    out = np.empty(len(values))
    total = weight = 0.0
    for index, value in enumerate(values):
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        out[index] = total / weight
    return out


def smoothed_series(label: str, x: np.ndarray, y: np.ndarray, *, colour: int) -> Series:
    """A line of logged values: smoothed over 4 % of the points, the raw values behind it; raw alone if they
    are few.

    Values that are not finite are left out.
    """
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = np.asarray(x)[keep], np.asarray(y)[keep]
    if len(y) < FEWEST_TO_SMOOTH:
        return Series(label=label, x=x, y=y, colour=colour, markers=len(y) == 1)
    return Series(label=label, x=x, y=smooth(y, span=max(5, len(y) // 25)), raw=y, colour=colour)


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `MAX_POINTS` points: lowest and highest of each stretch, so that spikes stay visible."""
    if len(x) <= MAX_POINTS:
        return x, y
    chosen = []
    for stretch in np.array_split(np.arange(len(x)), MAX_POINTS // 2):
        chosen += sorted({int(stretch[y[stretch].argmin()]), int(stretch[y[stretch].argmax()])})
    return x[chosen], y[chosen]


def _colour(index: int) -> str:
    return f"#0300{index % SERIES_COLOURS:02x}"


def literal(text: str) -> str:
    """``text`` for matplotlib to draw as it is: what is between two dollar signs it would take for mathematics."""
    return plain(text).replace("$", r"\$")


def render_svg(chart: Chart) -> str:
    """The chart as one `<svg>` element without fixed colours or ids, title and legend left to the page."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": chart.title + chart.y_label + chart.x_label,
        "font.family": "sans-serif",
        "font.size": 11,
        "axes.linewidth": 0.6,
        "axes.formatter.useoffset": False,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for series in chart.series:
            colour = _colour(series.colour)
            x, y = np.asarray(series.x, dtype=float), np.asarray(series.y, dtype=float)
            if series.raw is not None:
                axes.plot(*_thin(x, np.asarray(series.raw, dtype=float)), color=colour, linewidth=0.6, alpha=0.3)
            axes.plot(
                *_thin(x, y),
                color=colour,
                linewidth=1.6,
                linestyle=(0, (4, 2)) if series.dashed else "-",
                marker="o" if series.markers else None,
                markersize=3.5,
                solid_capstyle="round",
            )
        _limit(axes, chart)
        axes.set_xlabel(literal(chart.x_label), color=_INK)
        axes.set_ylabel(literal(chart.y_label), color=_INK)
        axes.grid(True, axis="y", color=_GRID, linewidth=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_INK)
        axes.tick_params(colors=_INK, width=0.6, length=3)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.set_axisbelow(True)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _embed(buffer.getvalue(), chart)


def _limit(axes: Any, chart: Chart) -> None:
    """Cut off the first moments of training, which would press everything after them flat."""
    if chart.log_y:
        axes.set_yscale("log")
        return
    tops, bottoms = [], []
    for series in chart.series:
        y = np.asarray(series.y, dtype=float)
        tail = y[len(y) // 50 :]
        if len(tail):
            tops.append(tail.max())
            bottoms.append(tail.min())
        if series.raw is not None:
            raw = np.asarray(series.raw, dtype=float)[len(y) // 50 :]
            tops.append(np.quantile(raw, 0.995))
            bottoms.append(np.quantile(raw, 0.005))
    if tops:
        low, high = min(bottoms), max(tops)
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
        axes.set_ylim(low - margin, high + margin)


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
    label = html.escape(f"{chart.title}: {chart.y_label} over {chart.x_label}", quote=True)
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{label}" ', svg, count=1)
