"""Plots as files: SVG and PNG with fixed colours and a legend, for papers and slides. The page draws its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from featcache.store import files
from trainer.analyze.result import Matrix, Strips
from trainer.report.charts import Chart, literal

COLOURS = ("#1a66b0", "#c4541a", "#2a8458", "#8650a6", "#9a7400", "#b3316b", "#23828f", "#6a6f76")
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "analysis",
    "font.size": 10,
    "axes.linewidth": 0.6,
    "axes.formatter.useoffset": False,
}


def save(drawing: Chart | Strips | Matrix, stem: Path) -> list[Path]:
    """Write ``stem.svg`` and ``stem.png`` (150 dots an inch). Raises UserError if the disk refuses."""
    import io

    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        if isinstance(drawing, Chart):
            _chart(figure, drawing)
        elif isinstance(drawing, Matrix):
            _matrix(figure, drawing)
        else:
            _strips(figure, drawing)
        paths = []
        for kind in ("svg", "png"):
            path = stem.with_suffix(f".{kind}")
            metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": None}
            picture = io.BytesIO()
            figure.savefig(picture, format=kind, dpi=150, metadata=metadata)
            files.atomic_write(path, [picture.getbuffer()], durable=False)
            paths.append(path)
    return paths


def _chart(figure: Any, chart: Chart) -> None:
    from matplotlib.ticker import MaxNLocator

    figure.set_size_inches(5.6, 3.6)
    axes = figure.add_subplot()
    for series in chart.series:
        axes.plot(
            np.asarray(series.x, dtype=float),
            np.asarray(series.y, dtype=float),
            label=literal(series.label),
            color=COLOURS[series.colour % len(COLOURS)],
            linestyle=(0, (4, 2)) if series.dashed else "-",
            linewidth=1.5,
            marker="o" if series.markers else None,
            markersize=3.5,
        )
    if chart.log_y:
        axes.set_yscale("log")
    axes.set_title(literal(chart.title), loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(literal(chart.x_label))
    axes.set_ylabel(literal(chart.y_label))
    axes.grid(True, axis="y", color="#e4e6e8", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8.5)


def _matrix(figure: Any, matrix: Matrix) -> None:
    R, C = matrix.values.shape
    figure.set_size_inches(2.2 + 0.95 * C, 1.2 + 0.36 * R)
    axes = figure.add_subplot()
    shown = axes.imshow(matrix.values, vmin=matrix.low, vmax=matrix.high, cmap="Blues", aspect="auto")
    for r in range(R):
        for c in range(C):
            if np.isfinite(matrix.values[r, c]):
                dark = matrix.values[r, c] > (matrix.low + 2 * matrix.high) / 3
                text = f"{matrix.values[r, c]:.{matrix.decimals}f}"
                axes.text(c, r, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axes.set_xticks(range(C), [*map(literal, matrix.columns)], fontsize=8, rotation=30 if C > 6 else 0)
    axes.set_yticks(range(R), [*map(literal, matrix.rows)], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(literal(matrix.title), loc="left", fontsize=11, fontweight="bold")
    figure.colorbar(shown, ax=axes, shrink=0.8)


def _strips(figure: Any, strips: Strips) -> None:
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
    axes = figure.add_subplot()
    axes.imshow(canvas, interpolation="none")
    centres = np.arange(max(R, C)) * step + side / 2
    axes.set_xticks(centres[:C], [literal(c).replace(", ", "\n") for c in strips.columns], fontsize=8)
    axes.set_yticks(centres[:R], [*map(literal, strips.rows)], fontsize=8)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    figure.suptitle(literal(strips.title), fontsize=11, fontweight="bold", x=0.01, ha="left")
