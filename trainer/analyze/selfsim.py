"""Self-similarity of one patch with its image, as heat maps (SARA, Fig. 2a)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from featcache.errors import UserError
from featcache.feature_names import is_tokens
from trainer.analyze.pictures import enlarge, heat, mark, over
from trainer.analyze.result import Result, Row
from trainer.analyze.spectra import self_similarity
from trainer.analyze.subject import Subject, pictures_of
from trainer.plots import Plot, Strips


def salient_patch(tokens: Tensor) -> int:
    """The patch that differs most from its image's mean token. [N, D] -> index.

    Ours, where none is given: SARA does not say how its patches are chosen.
    """
    return int((tokens.float() - tokens.float().mean(dim=0)).square().sum(dim=-1).argmax())


@dataclass(frozen=True, kw_only=True)
class _Maps:
    """Cosines of one patch with every patch.

    patches: the chosen patch of each image. maps: per image, representation -> [N]. against: the representation that
    the others are compared with. targets: how many of them are cached features; hidden states follow.
    """

    patches: list[int]
    maps: list[dict[str, np.ndarray]]
    against: str
    targets: int


def run(subject: Subject) -> Result:
    """Heat maps for a few images: cached features, then the tapped and the last block at three times."""
    options, grid = subject.options, subject.info.grid
    if options.patch is not None and options.patch >= grid * grid:
        raise UserError(f"there is no patch {options.patch}", remedy=f"The grid has patches 0 to {grid * grid - 1}.")
    found = measure(subject)
    return Result(
        what="selfsim",
        title="Self-similarity of a patch",
        question="Does a patch recognise the other patches of its own object?",
        finding=_finding(found),
        plots=[_plot(subject, found)],
        rows=_rows(subject, found),
        settings={
            "samples": len(found.maps),
            "token grid": f"{grid} x {grid}",
            "patch": "given" if options.patch is not None else "largest distance from the mean token",
            "weights": subject.weights,
        },
    )


def measure(subject: Subject) -> _Maps:
    """The maps of the first few samples."""
    options = subject.options
    count = min(options.images, len(subject.indices))
    rows = slice(0, count)
    state = subject.state(rows, 0.5, (subject.block,))
    features = subject.shown_targets()
    tokens: dict[str, Tensor] = {name: subject.target(name, rows, state) for name in features}
    depths = sorted({subject.block, subject.depth})
    for t in options.times[:: max(1, len(options.times) // 2)]:
        hidden = subject.hidden(rows, t, depths)
        tokens |= {f"block {depth}, t = {t:g}": hidden[depth] for depth in depths}
    # The reference patch is chosen on the encoder's tokens where there are some.
    against = next((f for f in reversed(features) if is_tokens(f)), next(iter(tokens)))
    patches = [options.patch if options.patch is not None else salient_patch(tokens[against][i]) for i in range(count)]
    maps = [
        {name: self_similarity(x[i : i + 1], patches[i])[0].cpu().numpy() for name, x in tokens.items()}
        for i in range(count)
    ]
    return _Maps(patches=patches, maps=maps, against=against, targets=len(features))


def _rows(subject: Subject, found: _Maps) -> list[Row]:
    return [
        {
            "image": i,
            "cache_index": int(subject.indices[i]),
            "reference_patch": found.patches[i],
            "representation": name,
            "patch": p,
            "cosine": float(v),
        }
        for i, maps in enumerate(found.maps)
        for name, values in maps.items()
        for p, v in enumerate(values)
    ]


def _finding(found: _Maps) -> str:
    means: dict[str, float] = {}
    for name in list(found.maps[0])[found.targets :]:
        likeness = []
        for maps, patch in zip(found.maps, found.patches):
            others = np.arange(len(maps[name])) != patch
            likeness.append(_correlation(maps[name][others], maps[found.against][others]))
        if not all(map(math.isnan, likeness)):
            means[name] = float(np.nanmean(likeness))
    if not means:
        return "The maps are constant."
    best = max(means, key=lambda name: means[name])
    return (
        f"Over {len(found.maps)} images, the map of {best} follows that of {found.against} most closely (mean "
        f"correlation {means[best]:.2f})."
    )


def _plot(subject: Subject, found: _Maps) -> Plot:
    """One row per image: the image, then the maps over it."""
    grid, rows = subject.info.grid, slice(0, len(found.maps))
    cells: list[list[np.ndarray | None]] = []
    title, images = pictures_of(subject, rows)
    for image, maps, patch in zip(images, found.maps, found.patches):
        pictures = [enlarge(image, smooth=True), *(over(heat(m.reshape(grid, grid)), image) for m in maps.values())]
        cells.append([mark(picture, patch, grid) for picture in pictures])
    return Plot(
        name="selfsim",
        drawing=Strips(
            title="Cosine of the marked patch with every patch (purple 0 or less, yellow 1), over the image",
            columns=[title, *found.maps[0]],
            rows=[subject.class_names[int(label)] for label in subject.labels[rows]],
            cells=cells,
            note="Look for yellow that fills the object of the marked patch and stops at its edge: SARA Fig. 2a "
            "shows such regions for DINOv2 and SARA, scattered and weak ones for REPA; an all-yellow map means "
            "that the block's tokens hardly differ.",
        ),
    )


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if a.std() == 0 or b.std() == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])
