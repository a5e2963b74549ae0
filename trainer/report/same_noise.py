"""Samples of several runs that start from the same noise, drawn for a comparison where there are none yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featcache.errors import UserError
from featcache.progress import Progress
from trainer.classes import Classes
from trainer.evaluate.images import NpzImages
from trainer.plots import Strips
from trainer.requests import SampleRequest
from trainer.runs import folder as runs
from trainer.runs.records import cache_summary, run_model_config
from trainer.sampling.draw import GRID_SAMPLERS, GRID_STEPS
from trainer.sampling.grid import class_name, spread
from trainer.sampling.run import sample_run


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
        if any(tuple(dataset["class_names"]) != classes for dataset in summaries):
            raise UserError("the runs' classes differ")
        if len(set(shapes)) > 1 or len(set(sides)) > 1:
            raise UserError("the runs' latents differ in shape, so they have no noise in common")
        labels = spread(len(classes), self.num)
        rows, cells = [], []
        for folder, name, cfg in zip(folders, names, configs):
            request = SampleRequest(
                num=self.num,
                sampler=GRID_SAMPLERS[cfg.family],
                steps=GRID_STEPS,
                classes=Classes("chosen", tuple(labels)),
                device=self.device,
                weights_dir=runs.load_config(folder).weights_dir,
            )
            result = sample_run(folder, request, self.progress)
            rows.append(f"{name}, step {result.loaded.step}")
            cells.append([tile for batch in NpzImages(path=result.images).batches(self.num) for tile in batch])
        return Strips(
            title="Same noise, same class",
            columns=[class_name(classes, int(label)) for label in np.resize(labels, self.num)],
            rows=rows,
            cells=cells,
            note=f"Drawn for this page, {GRID_STEPS} steps, without guidance: all images of a column start from the same noise.",
        )
