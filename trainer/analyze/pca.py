"""PCA-RGB strips of hidden states beside the cached targets (REPA, Fig. 38; SRA, Fig. 2 left)."""

from __future__ import annotations

from typing import Any

import numpy as np

from featcache.inspect import pca_rgb
from trainer.analyze.pictures import enlarge
from trainer.analyze.result import Result
from trainer.analyze.subject import Subject, pixels_of
from trainer.plots import Plot, Strips

FIT = 64  # images over which components are fitted


def explained(tokens: np.ndarray) -> float:
    """Share of the variance in the first three principal components. [m, C] -> 0 to 1."""
    x = tokens.astype(np.float64)
    x -= x.mean(axis=0)
    values = np.linalg.eigvalsh(x.T @ x)[::-1]
    return float(values[:3].sum() / max(values.sum(), 1e-300))


def run(subject: Subject) -> Result:
    """One strip an image: rows are timesteps, columns blocks, then the cached targets."""
    options = subject.options
    count, fit = min(options.images, len(subject.indices)), min(FIT, len(subject.indices))
    rows = slice(0, fit)
    depths = list(range(1, subject.depth + 1))
    if len(depths) > 8:
        depths = sorted({*np.linspace(1, subject.depth, 7).round().astype(int).tolist(), subject.block})
    states = {t: subject.hidden(rows, t, depths) for t in options.times}
    table: list[dict[str, Any]] = []
    coloured: dict[int, np.ndarray] = {}
    for depth in depths:
        # One fit over all times of a block: the same colour then means the same direction in the whole column.
        tokens = np.concatenate([states[t][depth].cpu().numpy() for t in options.times])  # [times * fit, N, D]
        T, D = tokens.shape[1:]
        coloured[depth] = pca_rgb(tokens).reshape(len(options.times), fit, *_grid(T), 3)
        for i, t in enumerate(options.times):
            share = explained(tokens[i * fit : (i + 1) * fit].reshape(-1, D))
            table.append(
                {
                    "representation": f"block{depth}:{t:g}",
                    "block": depth,
                    "t": t,
                    "variance_in_3_components_percent": 100 * share,
                }
            )
    targets: dict[str, np.ndarray] = {}
    middle = subject.state(rows, 0.5, (subject.block,))
    for name in subject.shown_targets():
        tokens = subject.target(name, rows, middle).cpu().numpy()
        targets[name] = pca_rgb(tokens)
        share = explained(tokens.reshape(-1, tokens.shape[-1]))
        table.append({"representation": name, "block": "", "t": "", "variance_in_3_components_percent": 100 * share})
    images = pixels_of(subject, slice(0, count))
    plots = []
    for i in range(count):
        first = [enlarge(images[i], smooth=True)]
        last = [enlarge(picture[i]) for picture in targets.values()]
        cells = [
            [
                *(first if k == 0 else [None]),
                *(enlarge(coloured[depth][k, i]) for depth in depths),
                *(last if k == 0 else [None] * len(last)),
            ]
            for k in range(len(options.times))
        ]
        label = subject.class_names[int(subject.labels[i])]
        plots.append(
            Plot(
                name=f"pca_{i}",
                drawing=Strips(
                    title=f"Sample {int(subject.indices[i])}: {label}",
                    columns=["image", *(f"block {d}" for d in depths), *targets],
                    rows=[f"t = {t:g}" for t in options.times],
                    cells=cells,
                    note="Look for the object's shape appearing earlier (further left) and at more noise (further "
                    "down) than without alignment (REPA Fig. 38), and for maps that get finer along blocks and with "
                    "less noise (SRA Fig. 2, left).",
                ),
            )
        )
    tapped = [row for row in table if row["block"] == subject.block]
    low, high = tapped[0], tapped[-1]
    return Result(
        what="pca",
        title="Principal components as colours",
        question="What do the hidden states see of the image?",
        finding=f"Three components hold {low['variance_in_3_components_percent']:.0f} % of the variance of block "
        f"{subject.block} at "
        f"t = {low['t']:g} and {high['variance_in_3_components_percent']:.0f} % at t = {high['t']:g}.",
        plots=plots,
        rows=table,
        settings={
            "samples": fit,
            "components": f"first three, fitted over {fit} images and all times of a block, stretched between the "
            "1st and 99th percentile",
            "token grid": f"{subject.info.grid} x {subject.info.grid}",
            "weights": subject.weights,
        },
    )


def _grid(tokens: int) -> tuple[int, int]:
    side = round(tokens**0.5)
    return side, side
