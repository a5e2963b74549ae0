"""The methods of an experiment in one picture: samples of each, from the same noise and of the same classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

COLUMNS = 8
QUALITY = 90  # of the JPEG


def draw_samples(runs: Mapping[str, Path], out: Path, *, step: int, sampling_steps: int, device: str) -> Path:
    """One row of `COLUMNS` samples for each run, its title below, to `out/samples.jpg`; returns its path.

    A column has the same class (evenly spread over all) and the same noise in each row. Averaged weights, the ODE sampler
    without guidance, float32.

    Args:
        runs: title -> run folder, at least one; of the same classes and resolution, each with a checkpoint of `step`.
    """
    from PIL import Image

    from trainer.sampling.draw import SampleConfig, draw_units, load_run
    from trainer.sampling.grid import named_rows, spread

    config = SampleConfig(sampler="ode", steps=sampling_steps)
    rows = []
    for run in runs.values():
        loaded = load_run(run, step=step, device=device)
        labels = np.resize(spread(loaded.model.cfg.num_classes, COLUMNS), COLUMNS)
        decoder, indices = loaded.decoder(None).to(device), list(range(COLUMNS))
        units = draw_units(loaded.model, decoder, labels, indices, config, transport=loaded.transport, unit=COLUMNS)
        rows.append(np.concatenate(list(np.concatenate(list(units))), axis=1))  # [R, COLUMNS R, 3]
    path = out / "samples.jpg"
    Image.fromarray(named_rows(np.stack(rows), list(runs))).save(path, quality=QUALITY)
    return path
