"""Why the methods differ: a second look at the runs of a finished part of the experiment (`pipelines.experiments.methods`).

    python -m pipelines.experiments.checks --part photographs-64 --photographs DIR --out experiments/methods

Of each run that has its last checkpoint, into `checks.json` beside `results.json`:

- `angle`: cosine of the denoising and the alignment loss's gradients by interval of t (`trainer.analyze.angle`), of the averaged
  weights (`ema`), which samples are drawn with, and of the trained ones (`model`), with which the alignment heads were trained;
- `router`: what AHPA's router gives each layer of the whole mixture, at the times `TIMES`;
- `denoise`: mean denoising loss of the training steps in the last third, on the same images, noise and times in all runs of a seed;
- `held_out`, beside the runs: what the judges say of the images held out, of these through the VAE, which is what samples of a
  model without fault would get (FID and recall of so many samples, that is), and of these blurred, which tells what a judge sees;
- `judged`: with --sampling-steps, what the judges say of samples drawn with more steps than the experiment's.

Interrupted, the same command goes on; what is there is not measured again.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer

from featcache.console import console, run_app, safe
from featcache.console_progress import RichProgress
from featcache.errors import UserError
from pipelines.experiments.methods import PARTS, Data, Judge, Settings, data_of, read_settings, write_json

BLUR = 8
TIMES = tuple(i / 10 for i in range(11))


def angle(run: Path, *, samples: int, device: str) -> dict[str, list[float | None]]:
    """By weights (`ema`, `model`) the cosine in each interval of t, None where it is not known; {} without alignment."""
    from featcache.machine import pick_device
    from trainer.analyze.angle import run as measure
    from trainer.analyze.config import AnalyzeConfig
    from trainer.analyze.result import NotApplicable
    from trainer.analyze.subject import Subject

    found: dict[str, list[float | None]] = {}
    for weights in ("ema", "model"):
        options = AnalyzeConfig(weights=weights, samples=2 * samples, gradient_samples=samples, checkpoints=1)
        with RichProgress() as progress:
            progress.begin(f"{run.name}: gradient angle, {weights}", None, unit="samples")
            subject = Subject(run, options, device=pick_device(device), gradients=True, progress=progress)
            try:
                cosines: list[Any] = [row["cosine"] for row in measure(subject).rows]
            except NotApplicable:
                return {}
        found[weights] = [None if math.isnan(value) else value for value in cosines]
    return found


def router(run: Path, *, device: str) -> dict[str, list[float]]:
    """Layer -> its weight within the whole mixture at each of `TIMES`; {} without AHPA's router."""
    import torch

    from featcache.machine import pick_device
    from trainer.align.ahpa import Ahpa
    from trainer.analyze.config import AnalyzeConfig
    from trainer.analyze.router import router_weights
    from trainer.analyze.subject import Subject

    subject = Subject(run, AnalyzeConfig(samples=64), device=pick_device(device), gradients=True)
    found: dict[str, list[float]] = {}
    for method in subject.methods.values():
        if isinstance(method, Ahpa):
            intra, inter = router_weights(subject, method, torch.tensor(TIMES, device=subject.device))
            for g, group in enumerate(method.groups):
                shares = intra[g] * inter[:, g, None]  # [times, layers]
                found |= {
                    subject.layers(level)[layer]: share.tolist()
                    for (level, layer), share in zip(group, shares.T, strict=True)
                }
    return found


def training_loss(run: Path, *, steps: int) -> float:
    """Mean denoising loss of the logged training steps in the last third of `steps`."""
    from trainer.runs.folder import read_log

    return statistics.fmean(r["denoise"] for r in read_log(run) if r["step"] > steps * 2 / 3)


def held_out(data: Data, judge: Judge) -> dict[str, dict[str, float]]:
    """What the judges say of the images held out: `images` themselves; `decoded` from the means of their latents; `blurred`:
    averaged over squares of `BLUR` pixels, and drawn large again."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    import featcache
    from featcache.inspect import images_of, pixels_of
    from trainer.evaluate.images import ArrayImages

    cache = featcache.open(data.held_out)
    folder = None if data.photographs is None else str(data.photographs / "val.zip")
    parts = np.array_split(np.arange(len(cache)), -(-len(cache) // 50))
    images = np.concatenate([images_of(cache, folder, part.tolist()) for part in parts])
    coarse = F.avg_pool2d(torch.from_numpy(images).permute(0, 3, 1, 2).float(), BLUR)
    blurred = F.interpolate(coarse, scale_factor=BLUR, mode="bilinear").round().to(torch.uint8)
    sets = {
        "images": images,
        "decoded": np.concatenate([pixels_of(cache, None, part.tolist()) for part in parts]),
        "blurred": blurred.permute(0, 2, 3, 1).contiguous().numpy(),
    }
    return {name: judge.compare(ArrayImages(images=images)) for name, images in sets.items()}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    part: Annotated[str, typer.Option(help="Of the experiment.")],
    photographs: Annotated[Path | None, typer.Option(help="As for the experiment. [default: shapes alone]")] = None,
    out: Annotated[Path, typer.Option(help="The experiment's.")] = Path("experiments/methods"),
    samples: Annotated[int, typer.Option(help="Images of each gradient.", min=16)] = 256,
    sampling_steps: Annotated[
        int | None, typer.Option(help="Judge again, with so many steps of the ODE sampler. [default: do not]")
    ] = None,
    judged_seeds: Annotated[int, typer.Option(help="Runs of each method to judge again.")] = 2,
    angles: Annotated[bool, typer.Option(help="Measure gradient angles, which take minutes a run.")] = True,
) -> None:
    """A second look at the runs of a finished part: gradient angles, router, training loss, images held out, more steps."""
    folder = out / part
    settings, runs = _finished_runs(folder)
    record = folder / "checks.json"
    checks: dict[str, Any] = json.loads(record.read_text()) if record.is_file() else {"runs": {}}
    if checks.setdefault("samples", samples) != samples:
        raise UserError(f"{record} was measured with --samples {checks['samples']}", remedy="Type that, or remove it.")
    checks["date"] = date.today().isoformat()
    judge: Judge | None = None
    if "held_out" not in checks and (photographs is not None or not PARTS[part].photographs):
        data = data_of(part, folder, photographs)
        checks["held_out"] = held_out(data, Judge(data, settings))
        write_json(record, checks)
    for name, run in runs.items():
        found = checks["runs"].setdefault(name, {})
        if "router" not in found:
            found["router"] = router(run, device=settings.device)
            found["denoise"] = training_loss(run, steps=settings.steps)
            write_json(record, checks)
        if angles and "angle" not in found:
            found["angle"] = angle(run, samples=samples, device=settings.device)
            write_json(record, checks)
        again = found.setdefault("judged", {})
        if sampling_steps is not None and str(sampling_steps) not in again and _seed(name) < judged_seeds:
            judge = judge or Judge(data_of(part, folder, photographs), replace(settings, sampling_steps=sampling_steps))
            again[str(sampling_steps)] = judge(run, settings.steps)
            write_json(record, checks)
        console.print(safe(f"{name}: {_line(found)}"))
    console.print(f"checks: [bold]{safe(record)}[/bold]")


def _finished_runs(folder: Path) -> tuple[Settings, Mapping[str, Path]]:
    """The experiment's settings, and by name the runs that have their last checkpoint.

    Raises:
        UserError: there are none.
    """
    from trainer.runs.checkpoint import list_checkpoints

    settings, _ = read_settings(folder)
    runs = sorted((folder / "runs").iterdir(), key=lambda run: (_seed(run.name), run.name))
    kept = {run.name: run for run in runs if settings.steps in (step for step, _ in list_checkpoints(run))}
    if not kept:
        raise UserError(f"no run in {folder} has come to its end", remedy="Go on with the experiment first.")
    return settings, kept


def _seed(name: str) -> int:
    return int(name.rpartition("-")[2])


def _line(found: Mapping[str, Any]) -> str:
    angles = [
        f"cosine {statistics.fmean(known):.3f} ({weights})"
        for weights, values in found.get("angle", {}).items()
        if (known := [value for value in values if value is not None])
    ]
    layers = [f"{layer} {min(at):.3f} to {max(at):.3f}" for layer, at in found["router"].items() if max(at) > 0.05]
    judged = [f"FID {metrics['embedded-FID']:.1f} at {steps} steps" for steps, metrics in found["judged"].items()]
    return ", ".join([f"training loss {found['denoise']:.4f}", *angles, *layers, *judged])


if __name__ == "__main__":
    sys.exit(run_app(app))
