"""The samples that a run was judged by, class by class beside real images, or above their prompts: the first thing that a
report shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featcache.store import files
from trainer.evaluate.images import NpzImages
from trainer.evaluate.prompt_sets import PromptSet
from trainer.report.data import RunData
from trainer.report.table import latest, prompt_sets
from trainer.runs import folder as runs
from trainer.sampling.grid import class_name, first_of_classes
from trainer.sampling.prompts import Prompts, load_prompts

TILES = 16  # of a class, shared out among the columns
ROWS = 10  # of as many tiles
READ = 64  # images at once
PROMPTS, PROMPT_TILES = 48, 8  # samples by prompt that are shown of all runs together, and of one prompt
LETTERS = 200  # of a prompt
SETS = 3  # of prompts

# Classes, how many of each => class -> real images, uint8 [n, R, R, 3]; classes without one are left out.
RealImages = Callable[[Sequence[int], int], Mapping[int, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class JudgedSamples:
    """Pictures by class, or by prompt.

    rows: (class name or prompt, column -> a strip of images, uint8 [R, n R, 3]); a column without images of the class is
    left out. note: which samples they are, and how those of several runs are related. same_noise: of all runs, and the same
    place in each starts from the same noise. columns: how many there are. of_prompts: whether rows are prompts.
    """

    rows: Sequence[tuple[str, Mapping[str, np.ndarray]]]
    note: str
    same_noise: bool = False
    columns: int = 1
    of_prompts: bool = False


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """The samples that a run was judged by. entry: of its `metrics.json`. prompts: of a model that takes text."""

    run: RunData
    entry: Mapping[str, Any]
    images: NpzImages
    prompts: Prompts | None

    def subjects(self) -> np.ndarray:
        """Of each image its class, or its prompt's number: int64 [n]; empty where the file tells no classes."""
        if self.prompts is not None:
            return np.arange(self.images.count or 0) % len(self.prompts.texts)
        known = self.images.labels()
        return np.zeros(0, np.int64) if known is None else known


def judged_samples(data: Sequence[RunData], class_names: Sequence[str], real: RealImages) -> list[JudgedSamples]:
    """The samples of each run's latest judgement by class, then of those by each set of prompts, `SETS` at most. Empty
    where no run has been judged by samples that are still there.

    Raises:
        UserError: a damaged file, or a link in a run's folder.
    """
    together: dict[str | None, dict[str, _Drawn]] = {}
    for of in sorted(prompt_sets(data), key=lambda of: of is not None):
        for run in data:
            found = _drawn(run, latest(run, of))
            if found is not None and len(found.subjects()):
                of_these = together.setdefault(None if found.prompts is None else found.prompts.sha256, {})
                of_these.setdefault(run.name, found)
    shown = list(together.values())[:SETS]
    return [_side_by_side(list(each.values()), class_names, real, of=len(data)) for each in shown]


def _side_by_side(drawn: Sequence[_Drawn], class_names: Sequence[str], real: RealImages, *, of: int) -> JudgedSamples:
    """The samples of runs that were judged by the same prompts, or all by class. of: how many runs there are."""
    subjects, prompts = {one.run.name: one.subjects() for one in drawn}, drawn[0].prompts
    first = next(iter(subjects.values()))
    if prompts is None:
        tiles = max(3, TILES // (len(drawn) + 1))
        chosen = list(first_of_classes(first, columns=tiles, rows=ROWS))
        columns = {"real images": real(chosen, tiles)}
        names = [class_name(class_names, i) for i in chosen]
        names = [name if names.count(name) == 1 else f"{name} ({i})" for i, name in zip(chosen, names)]
        note = "The first samples of each class, in the order they were drawn."
    else:
        # From the beginning: of as many prompts as samples, those spread over all would mean reading all samples.
        chosen = list(range(min(len(prompts.texts), len(first), max(1, PROMPTS // len(drawn)))))
        tiles = max(1, min(PROMPT_TILES, PROMPTS // (len(chosen) * len(drawn))))
        columns, names = {}, [_shortened(prompts.texts[i]) for i in chosen]
        which = "each prompt" if len(chosen) == len(prompts.texts) else f"the first {len(chosen)} prompts"
        note = f"The first samples of {which}: {PromptSet.of(drawn[0].entry)}."
    columns |= {one.run.name: _first(one.images, subjects[one.run.name], chosen, tiles) for one in drawn}
    rows = [
        (name, {column: np.concatenate(list(held[i][:tiles]), axis=1) for column, held in columns.items() if i in held})
        for i, name in zip(chosen, names)
    ]
    alike = all(_drawing(one) == _drawing(drawn[0]) for one in drawn)
    return JudgedSamples(
        rows=rows,
        note=_note(note, len(drawn), alike),
        same_noise=alike and len(drawn) == of,
        columns=len(columns),
        of_prompts=prompts is not None,
    )


def _shortened(prompt: str) -> str:
    return prompt if len(prompt) <= LETTERS else f"{prompt[: LETTERS - 1].rstrip()}…"


def _first(images: NpzImages, labels: np.ndarray, classes: Sequence[int], count: int) -> dict[int, np.ndarray]:
    """Class -> its first `count` images. Reads the file no further than they reach."""
    wanted = {label: found for label in classes if len(found := np.flatnonzero(labels == label)[:count])}
    positions = {int(i) for found in wanted.values() for i in found}
    kept: dict[int, np.ndarray] = {}
    for start, batch in zip(range(0, max(positions, default=-1) + 1, READ), images.batches(READ)):
        kept |= {i: batch[i - start] for i in range(start, start + len(batch)) if i in positions}
    return {label: np.stack([kept[int(i)] for i in found]) for label, found in wanted.items()}


def _note(note: str, runs: int, alike: bool) -> str:
    if runs < 2:
        return note
    if alike:
        return f"{note} The same place in every run starts from the same noise."
    return f"{note} The runs' samples were drawn with different settings: they do not start from the same noise."


def _drawing(drawn: _Drawn) -> tuple[object, ...]:
    """What decides from which noise which sample of which class is drawn."""
    sampler = drawn.entry["sampler"]
    return tuple(sampler.get(key) for key in ("sampler", "seed", "classes", "prompts"))


def _drawn(run: RunData, entry: Mapping[str, Any]) -> _Drawn | None:
    """The samples of one of a run's judgements. Raises `CacheError` for a link in the run's folder."""
    judged = entry.get("settings")
    if run.path is None or not isinstance(entry.get("sampler"), Mapping) or not isinstance(judged, Mapping):
        return None
    for name in files.names_in(files.inside(run.path, "samples")):
        place = f"samples/{name}"
        settings = files.inside(run.path, f"{place}/settings.json")
        images = files.inside(run.path, f"{place}/samples_{judged.get('sample_count')}.npz")
        there = images.is_file() and settings.is_file()
        if there and _same(runs.read_json(settings, {}, remedy=runs.RESTORE), entry):
            by_prompt = entry["sampler"].get("prompts") is not None
            prompts = load_prompts(images.parent, sha256=entry["sampler"]["prompts"]) if by_prompt else None
            if not by_prompt or prompts is not None:
                return _Drawn(run=run, entry=entry, images=NpzImages(path=images), prompts=prompts)
    return None


def _same(settings: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    """Whether a folder's samples were drawn as an evaluation says."""
    saved, judged = ({"weights": "ema", "stored": None, **of} for of in (settings, entry["sampler"]))
    return saved.get("step") == entry.get("step") and all(saved.get(key) == judged[key] for key in judged)
