"""The samples that a run was judged by, class by class, beside real images: the first thing that a report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.store import files
from trainer.report.data import RunData
from trainer.report.page import read_picture
from trainer.report.table import latest
from trainer.runs import folder as runs

TILES = 16  # of a class, shared out among the columns


@dataclass(frozen=True, kw_only=True)
class JudgedSamples:
    """A table of pictures.

    names: of its columns. rows: class name -> a strip of samples for each column, uint8 [R, n R, 3], None where there
    are none. note: how they are related.
    """

    names: tuple[str, ...]
    rows: Mapping[str, Sequence[np.ndarray | None]]
    note: str


def judged_samples(
    data: Sequence[RunData], classes: Sequence[int], class_names: Sequence[str], real: Mapping[int, np.ndarray]
) -> JudgedSamples | None:
    """The samples of each run's latest judgement; None where no run has been judged by samples that are still there.

    Args:
        classes: those of the grids' rows. real: class -> real images `[n, R, R, 3]`.
    """
    grids = {run.name: grid for run in data if (grid := _grid(run)) is not None}
    if not grids:
        return None
    tiles = max(3, TILES // (len(grids) + bool(real)))
    drawn: dict[str, list[np.ndarray]] = {}
    for run in data:
        if run.name in grids:
            side = int(run.cache["dataset"]["preprocessing"]["resolution"])
            pixels = np.asarray(read_picture(grids[run.name])[1])[:, : tiles * side]
            drawn[run.name] = [pixels[top : top + side] for top in range(0, len(pixels), side)]
    rows: dict[str, list[np.ndarray | None]] = {}
    for row, label in enumerate(classes):
        images = real.get(label)
        strips: list[np.ndarray | None] = (
            [np.concatenate(list(images[:tiles]), axis=1)] if images is not None else [None]
        )
        strips += [drawn[name][row] if row < len(drawn[name]) else None for name in drawn]
        name = class_names[label] if label < len(class_names) else str(label)
        rows[name if name not in rows else f"{name} ({label})"] = strips
    names = ["real images"] if real else []
    if not real:
        rows = {name: strips[1:] for name, strips in rows.items()}
    return JudgedSamples(names=(*names, *drawn), rows=rows, note=_note(data, list(drawn)))


def _note(data: Sequence[RunData], names: Sequence[str]) -> str:
    seeds = {str(latest(run)["sampler"].get("seed")) for run in data if run.name in names}
    if len(names) < 2:
        return "Every row starts from the same noise; only the class differs."
    if len(seeds) == 1:
        return "The same place in every row and in every run starts from the same noise."
    return "The runs were drawn with different seeds, so their noise differs."


def _grid(run: RunData) -> Path | None:
    """The grid drawn with the samples of a run's latest judgement. Raises `CacheError` for a link in the run's folder."""
    entry = latest(run)
    if run.path is None or not isinstance(entry.get("sampler"), Mapping) or "preprocessing" not in _dataset(run):
        return None
    for name in files.names_in(files.inside(run.path, "samples")):
        settings, grid = (files.inside(run.path, f"samples/{name}/{file}") for file in ("settings.json", "grid.png"))
        there = grid.is_file() and settings.is_file()
        if there and _same(runs.read_json(settings, {}, remedy=runs.RESTORE), entry):
            return grid
    return None


def _dataset(run: RunData) -> Mapping[str, Any]:
    found = run.cache.get("dataset")
    return found if isinstance(found, Mapping) else {}


def _same(settings: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    """Whether a folder's samples were drawn as an evaluation says."""
    sampler = entry["sampler"]
    return settings.get("step") == entry.get("step") and all(settings.get(key) == sampler[key] for key in sampler)
