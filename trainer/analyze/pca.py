"""PCA-RGB strips of hidden states beside the cached targets (REPA, Fig. 38; SRA, Fig. 2 left)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from featcache.inspect import pca_rgb
from trainer.analyze.pictures import enlarge
from trainer.analyze.result import Result, Row
from trainer.analyze.subject import Subject, pictures_of
from trainer.plots import Plot, Strips

FIT = 64  # images over which components are fitted


def explained(tokens: np.ndarray) -> float:
    """Share of the variance in the first three principal components. [m, C] -> 0 to 1."""
    x = tokens.astype(np.float64)
    x -= x.mean(axis=0)
    values = np.linalg.eigvalsh(x.T @ x)[::-1]
    return float(values[:3].sum() / max(values.sum(), 1e-300))


@dataclass(frozen=True, kw_only=True)
class _Coloured:
    """First three principal components as colours, uint8 [..., h, w, 3].

    blocks: depth -> [times, samples, ...]. targets: cached feature -> [samples, ...].
    """

    blocks: dict[int, np.ndarray]
    targets: dict[str, np.ndarray]
    rows: list[Row]
    fitted: int


def run(subject: Subject) -> Result:
    """One strip per image: rows are timesteps, columns blocks, then the cached targets."""
    found = measure(subject)
    return Result(
        what="pca",
        title="Principal components as colours",
        question="What do the hidden states see of the image?",
        finding=_finding(subject, found.rows),
        plots=_plots(subject, found),
        rows=found.rows,
        settings={
            "samples": found.fitted,
            "components": f"first three, fitted over {found.fitted} images and all times of a block, stretched between "
            "the 1st and 99th percentile; shares of variance are by components of each time alone",
            "token grid": f"{subject.info.grid} x {subject.info.grid}",
            "weights": subject.weights,
        },
    )


def measure(subject: Subject) -> _Coloured:
    """The colours of some blocks at all times and of the cached targets, and how much of the variance they show."""
    times, fit = subject.options.times, min(FIT, len(subject.indices))
    rows = slice(0, fit)
    depths = list(range(1, subject.depth + 1))
    if len(depths) > 8:
        depths = sorted({*np.linspace(1, subject.depth, 7).round().astype(int).tolist(), subject.block})
    states = {t: subject.hidden(rows, t, depths) for t in times}
    table: list[Row] = []
    blocks: dict[int, np.ndarray] = {}
    for depth in depths:
        # One fit over all times of a block: the same colour then means the same direction in the whole column.
        tokens = np.concatenate([states[t][depth].cpu().numpy() for t in times])  # [times * fit, N, D]
        _, T, _ = tokens.shape
        blocks[depth] = pca_rgb(tokens).reshape(len(times), fit, *_grid(T), 3)
        table += [
            _row(f"block{depth}:{t:g}", tokens[i * fit : (i + 1) * fit], block=depth, t=t) for i, t in enumerate(times)
        ]
    targets: dict[str, np.ndarray] = {}
    middle = subject.state(rows, 0.5, (subject.block,))
    for name in subject.shown_targets():
        tokens = subject.target(name, rows, middle).cpu().numpy()
        targets[name] = pca_rgb(tokens)
        table.append(_row(name, tokens))
    return _Coloured(blocks=blocks, targets=targets, rows=table, fitted=fit)


def _row(name: str, tokens: np.ndarray, *, block: int | str = "", t: float | str = "") -> Row:
    share = explained(tokens.reshape(-1, tokens.shape[-1]))
    return {"representation": name, "block": block, "t": t, "variance_in_3_components_percent": 100 * share}


def _finding(subject: Subject, rows: list[Row]) -> str:
    tapped = [row for row in rows if row["block"] == subject.block]
    low, high = tapped[0], tapped[-1]
    return (
        f"Three components hold {low['variance_in_3_components_percent']:.0f} % of the variance of block "
        f"{subject.block} at "
        f"t = {low['t']:g} and {high['variance_in_3_components_percent']:.0f} % at t = {high['t']:g}."
    )


def _plots(subject: Subject, found: _Coloured) -> list[Plot]:
    """One strip per image."""
    count, times = min(subject.options.images, len(subject.indices)), subject.options.times
    title, images = pictures_of(subject, slice(0, count))
    plots = []
    for i in range(count):
        first = [enlarge(images[i], smooth=True)]
        last = [enlarge(picture[i]) for picture in found.targets.values()]
        cells = [
            [
                *(first if k == 0 else [None]),
                *(enlarge(coloured[k, i]) for coloured in found.blocks.values()),
                *(last if k == 0 else [None] * len(last)),
            ]
            for k in range(len(times))
        ]
        label = subject.class_names[int(subject.labels[i])]
        plots.append(
            Plot(
                name=f"pca_{i}",
                drawing=Strips(
                    title=f"Sample {int(subject.indices[i])}: {label}",
                    columns=[title, *(f"block {d}" for d in found.blocks), *found.targets],
                    rows=[f"t = {t:g}" for t in times],
                    cells=cells,
                    note="Look for the object's shape appearing earlier (further left) and at more noise (further "
                    "down) than without alignment (REPA Fig. 38), and for maps that get finer along blocks and with "
                    "less noise (SRA Fig. 2, left).",
                ),
            )
        )
    return plots


def _grid(tokens: int) -> tuple[int, int]:
    side = round(tokens**0.5)
    return side, side
