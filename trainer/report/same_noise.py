"""Samples of several runs that start from the same noise, drawn for a comparison where there are none yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.errors import UserError
from featcache.paths import typed
from featcache.progress import Progress
from featcache.store import files
from trainer.classes import Classes
from trainer.evaluate.images import NpzImages
from trainer.plots import Strips
from trainer.requests import SampleRequest
from trainer.runs import folder as runs
from trainer.runs.records import cache_summary, run_model_config
from trainer.sampling.draw import GRID_SAMPLERS, GRID_STEPS
from trainer.sampling.grid import class_name, spread
from trainer.sampling.prompts import load_prompts
from trainer.sampling.run import sample_run

LETTERS = 100  # of a prompt above a column


@dataclass(frozen=True, kw_only=True)
class SameNoise:
    """How they are drawn: `num` of each run, as the grids of training are, from its latest checkpoint.

    They stay in the run's folder, so that another comparison finds them.
    """

    num: int
    device: str
    progress: Progress

    def draw(self, folders: Sequence[Path], names: Sequence[str]) -> Strips | None:
        """A row per run, a column per noise and class. None, with a note why, where none can be drawn."""
        try:
            return self._strips(folders, names)
        except UserError as error:
            self.progress.note(f"no samples from the same noise are drawn: {error.what}")
            return None

    def _strips(self, folders: Sequence[Path], names: Sequence[str]) -> Strips:
        summaries = [cache_summary(folder)["dataset"] for folder in folders]
        classes = tuple(summaries[0]["class_names"])
        configs = [run_model_config(folder, runs.load_config(folder)) for folder in folders]
        shapes = [(cfg.latent_channels, cfg.latent_size) for cfg in configs]
        sides = [dataset["preprocessing"]["resolution"] for dataset in summaries]
        of_text = [cfg.text is not None for cfg in configs]
        if any(of_text) and not all(of_text):
            raise UserError("some of the runs take text, and others classes")
        if not all(of_text) and any(tuple(dataset["class_names"]) != classes for dataset in summaries):
            raise UserError("the runs' classes differ")
        if len(set(shapes)) > 1 or len(set(sides)) > 1:
            raise UserError("the runs' latents differ in shape, so they have no noise in common")
        if all(of_text):
            prompts = _prompts_of(folders)[: self.num]
            columns = [text[:LETTERS] for text in prompts]
            asked: dict[str, Any] = {"prompt": tuple(prompts), "num": len(prompts)}
        else:
            labels = spread(len(classes), self.num)
            columns = [class_name(classes, int(label)) for label in np.resize(labels, self.num)]
            asked = {"classes": Classes("chosen", tuple(labels)), "num": self.num}
        rows, cells = [], []
        for folder, name, cfg in zip(folders, names, configs):
            request = SampleRequest(
                **asked,
                sampler=GRID_SAMPLERS[cfg.family],
                steps=GRID_STEPS,
                device=self.device,
                weights_dir=runs.load_config(folder).weights_dir,
            )
            result = sample_run(folder, request, self.progress)
            rows.append(f"{name}, step {result.loaded.step}")
            cells.append([tile for batch in NpzImages(path=result.images).batches(self.num) for tile in batch])
        return Strips(
            title="Same noise, same prompt" if all(of_text) else "Same noise, same class",
            columns=columns,
            rows=rows,
            cells=cells,
            note=f"Drawn for this page, {GRID_STEPS} steps, without guidance: all images of a column start from the same noise.",
        )


def _prompts_of(folders: Sequence[Path]) -> Sequence[str]:
    """The prompts that one of the runs was sampled by last, the first run before the others.

    Raises:
        UserError: none was sampled by prompt, or a damaged file.
    """
    for folder in folders:
        drawn = files.inside(folder, "samples")
        places = [files.inside(folder, f"samples/{name}") for name in files.names_in(drawn)]
        for place in sorted(
            (place for place in places if place.is_dir()), key=lambda place: place.stat().st_mtime, reverse=True
        ):
            if (prompts := load_prompts(place)) is not None:
                return prompts.texts
    raise UserError(
        "the runs take text, and none of them was sampled yet, so nobody has said what to draw "
        f"(trainer sample {typed(folders[0])} --prompts FILE)"
    )
