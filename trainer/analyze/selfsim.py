"""Self-similarity of one patch with its image, as heat maps (SARA, Fig. 2a)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from featcache.errors import UserError
from trainer.analyze.pictures import enlarge, heat, mark, over
from trainer.analyze.result import Result
from trainer.analyze.spectra import self_similarity
from trainer.analyze.subject import Subject, pixels_of
from trainer.plots import Plot, Strips


def salient_patch(tokens: Tensor) -> int:
    """The patch that differs most from its image's mean token. [N, D] -> index.

    Ours, where none is given: SARA does not say how its patches are chosen.
    """
    return int((tokens.float() - tokens.float().mean(dim=0)).square().sum(dim=-1).argmax())


def run(subject: Subject) -> Result:
    """Heat maps for a few images: cached features, then the tapped and the last block at three times."""
    options, grid = subject.options, subject.info.grid
    count = min(options.images, len(subject.indices))
    rows = slice(0, count)
    if options.patch is not None and options.patch >= grid * grid:
        raise UserError(f"there is no patch {options.patch}", remedy=f"The grid has patches 0 to {grid * grid - 1}.")
    state = subject.state(rows, 0.5, (subject.block,))
    features = subject.shown_targets()
    columns: list[tuple[str, Tensor]] = [(name, subject.target(name, rows, state)) for name in features]
    times = options.times[:: max(1, len(options.times) // 2)]
    depths = sorted({subject.block, subject.depth})
    for t in times:
        hidden = subject.hidden(rows, t, depths)
        columns += [(f"block {depth}, t = {t:g}", hidden[depth]) for depth in depths]
    # The reference patch is chosen on the encoder's tokens where there are some.
    against = next((f for f in reversed(features) if "@" in f), columns[0][0])
    reference = dict(columns)[against]
    patches = [options.patch if options.patch is not None else salient_patch(reference[i]) for i in range(count)]
    images = pixels_of(subject, rows)
    cells: list[list[np.ndarray | None]] = []
    table: list[dict[str, Any]] = []
    correlation: dict[str, list[float]] = {}
    for i in range(count):
        maps = {name: self_similarity(tokens[i : i + 1], patches[i])[0].cpu().numpy() for name, tokens in columns}
        cells.append(
            [
                mark(enlarge(images[i], smooth=True), patches[i], grid),
                *(mark(over(heat(m.reshape(grid, grid)), images[i]), patches[i], grid) for m in maps.values()),
            ]
        )
        others = np.arange(grid * grid) != patches[i]
        for name, values in maps.items():
            same = _correlation(values[others], maps[against][others])
            correlation.setdefault(name, []).append(same)
            table += [
                {
                    "image": i,
                    "cache_index": int(subject.indices[i]),
                    "reference_patch": patches[i],
                    "representation": name,
                    "patch": p,
                    "cosine": float(v),
                }
                for p, v in enumerate(values)
            ]
    names = [subject.class_names[int(label)] for label in subject.labels[rows]]
    states = [name for name, _ in columns[len(features) :]]
    means = {
        name: float(np.nanmean(correlation[name]))
        for name in states
        if not all(math.isnan(c) for c in correlation[name])
    }
    best = max(means, key=lambda n: means[n], default=None)
    return Result(
        what="selfsim",
        title="Self-similarity of a patch",
        question="Does a patch recognise the other patches of its own object?",
        finding=f"Over {count} images, the map of {best} follows that of {against} most closely (mean correlation "
        f"{means[best]:.2f})."
        if best
        else "The maps are constant.",
        plots=[
            Plot(
                name="selfsim",
                drawing=Strips(
                    title="Cosine of the marked patch with every patch (purple 0 or less, yellow 1), over the image",
                    columns=["image", *(name for name, _ in columns)],
                    rows=names,
                    cells=cells,
                    note="Look for yellow that fills the object of the marked patch and stops at its edge: SARA Fig. 2a "
                    "shows such regions for DINOv2 and SARA, scattered and weak ones for REPA; an all-yellow map means "
                    "that the block's tokens hardly differ.",
                ),
            )
        ],
        rows=table,
        settings={
            "samples": count,
            "token grid": f"{grid} x {grid}",
            "patch": "given" if options.patch is not None else "largest distance from the mean token",
            "weights": subject.weights,
        },
    )


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if a.std() == 0 or b.std() == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])
