"""The samples that a run was judged by, class by class, beside real images: the first thing that a report shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featcache.store import files
from trainer.evaluate.images import NpzImages
from trainer.report.data import RunData
from trainer.report.table import latest
from trainer.runs import folder as runs
from trainer.sampling.grid import class_name, first_of_classes

TILES = 16  # of a class, shared out among the columns
ROWS = 10  # of as many tiles
READ = 64  # images at once

# Classes, how many of each => class -> real images, uint8 [n, R, R, 3]; classes without one are left out.
RealImages = Callable[[Sequence[int], int], Mapping[int, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class JudgedSamples:
    """Pictures by class.

    rows: class name -> column -> a strip of images, uint8 [R, n R, 3]; a column without images of the class is left out.
    note: which samples they are, and how those of several runs are related. same_noise: of all runs, and the same place
    in each starts from the same noise.
    """

    rows: Mapping[str, Mapping[str, np.ndarray]]
    note: str
    same_noise: bool = False


def judged_samples(data: Sequence[RunData], class_names: Sequence[str], real: RealImages) -> JudgedSamples | None:
    """The samples of each run's latest judgement; None where no run has been judged by samples that are still there.

    Raises:
        UserError: a damaged file, or a link in a run's folder.
    """
    images = {run.name: found for run in data if (found := _images(run)) is not None}
    labels = {name: known for name, set_ in images.items() if (known := set_.labels()) is not None and len(known)}
    if not labels:
        return None
    tiles = max(3, TILES // (len(labels) + 1))
    classes = list(first_of_classes(next(iter(labels.values())), columns=tiles, rows=ROWS))
    columns = {"real images": real(classes, tiles)} | {
        name: _first(images[name], known, classes, tiles) for name, known in labels.items()
    }
    shown = [class_name(class_names, label) for label in classes]
    rows = {
        (name if shown.count(name) == 1 else f"{name} ({label})"): {
            column: np.concatenate(list(of[label][:tiles]), axis=1) for column, of in columns.items() if label in of
        }
        for label, name in zip(classes, shown)
    }
    judged = [run for run in data if run.name in labels]
    alike = all(_drawing(run) == _drawing(judged[0]) for run in judged)
    return JudgedSamples(rows=rows, note=_note(len(judged), alike), same_noise=alike and len(judged) == len(data))


def _first(images: NpzImages, labels: np.ndarray, classes: Sequence[int], count: int) -> dict[int, np.ndarray]:
    """Class -> its first `count` images. Reads the file no further than they reach."""
    wanted = {label: found for label in classes if len(found := np.flatnonzero(labels == label)[:count])}
    positions = {int(i) for found in wanted.values() for i in found}
    kept: dict[int, np.ndarray] = {}
    for start, batch in zip(range(0, max(positions, default=-1) + 1, READ), images.batches(READ)):
        kept |= {i: batch[i - start] for i in range(start, start + len(batch)) if i in positions}
    return {label: np.stack([kept[int(i)] for i in found]) for label, found in wanted.items()}


def _note(runs: int, alike: bool) -> str:
    note = "The first samples of each class, in the order they were drawn."
    if runs < 2:
        return note
    if alike:
        return f"{note} The same place in every run starts from the same noise."
    return f"{note} The runs' samples were drawn with different settings: they do not start from the same noise."


def _drawing(run: RunData) -> tuple[object, ...]:
    """What decides from which noise which sample of which class is drawn."""
    sampler = latest(run)["sampler"]
    return tuple(sampler.get(key) for key in ("sampler", "seed", "classes"))


def _images(run: RunData) -> NpzImages | None:
    """The samples of a run's latest judgement. Raises `CacheError` for a link in the run's folder."""
    entry = latest(run)
    judged = entry.get("settings")
    if run.path is None or not isinstance(entry.get("sampler"), Mapping) or not isinstance(judged, Mapping):
        return None
    for name in files.names_in(files.inside(run.path, "samples")):
        place = f"samples/{name}"
        settings = files.inside(run.path, f"{place}/settings.json")
        images = files.inside(run.path, f"{place}/samples_{judged.get('sample_count')}.npz")
        there = images.is_file() and settings.is_file()
        if there and _same(runs.read_json(settings, {}, remedy=runs.RESTORE), entry):
            return NpzImages(path=images)
    return None


def _same(settings: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    """Whether a folder's samples were drawn as an evaluation says."""
    saved, judged = ({"weights": "ema", "stored": None, **of} for of in (settings, entry["sampler"]))
    return saved.get("step") == entry.get("step") and all(saved.get(key) == judged[key] for key in judged)
