"""All methods on the embedded set, several seeds each: embedded-FID against steps and against training time.

    python -m pipelines.experiments.methods_on_shapes --seeds 3 --steps 3000 --jobs 2 --out experiments/methods

One model size, one cache, the papers' options but a small set, a high learning rate and projectors as much narrower
than theirs as the backbone is. Seeds are the outer loop and methods the inner one, so that a machine that slows down
slows all methods down. Interrupted, the same command goes on; more seeds or methods may be added later. It writes
`results.json` (every evaluation, and what was set), `summary.json` (means and standard errors over seeds) and
`methods.svg` / `methods.png`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer

from featcache.console import console, run_app, safe
from featcache.console_progress import RichProgress
from featcache.errors import UserError

# Twice SiT-Ti's width of 192; the papers' 2048 is 1.8 times SiT-XL's 1152.
_HEAD = {"head_width": 384}
# Name -> method and its options; where nothing is said, the method's defaults (the papers' choices).
METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "none": ("none", {}),
    "repa": ("repa", _HEAD),
    "irepa": ("repa", {"head": "conv", "spatial_gamma": 0.6, "weight": 1.0}),
    "sara": ("sara", {"discriminator_weights": "random", **_HEAD}),  # the same with and without a network
    "dya": ("dya", _HEAD),
    "ahpa": ("ahpa", {}),
    "sra": ("sra", {}),
    "sra2": ("sra2", _HEAD),
}
NAMES = {
    "none": "vanilla",
    "repa": "REPA",
    "irepa": "iREPA",
    "sara": "SARA",
    "dya": "DyA",
    "ahpa": "AHPA",
    "sra": "SRA",
    "sra2": "SRA 2",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs of an experiment have in common. Changing any of it needs another folder.

    model, steps, batch_size, lr: of training (warm-up over the first 50th of the steps). points: evaluations, evenly
    over the steps. images: size of the set. samples, sampling_steps: of an evaluation, drawn by the ODE sampler without
    guidance. device: cpu, cuda or auto.
    """

    model: str = "SiT-Ti/2"
    steps: int = 3000
    batch_size: int = 64
    lr: float = 2e-3
    points: int = 5
    images: int = 4000
    samples: int = 1000
    sampling_steps: int = 25
    device: str = "auto"

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "points", "images", "samples", "sampling_steps"):
            if getattr(self, key) < 1:
                raise UserError(f"{key} is {getattr(self, key)}, but it must be at least 1")
        if self.steps % self.points:
            raise UserError(
                f"{self.steps} steps cannot be evaluated at {self.points} evenly spaced points",
                remedy="Choose --points so that it divides --steps.",
            )

    @property
    def interval(self) -> int:
        """Steps between evaluations."""
        return self.steps // self.points

    @property
    def log_every(self) -> int:
        """The largest number of steps up to 50 that meets every evaluation."""
        return next(n for n in range(min(50, self.interval), 0, -1) if self.interval % n == 0)


def run_experiment(
    settings: Settings, *, methods: Sequence[str], seeds: int, out: Path, jobs: int = 1, times: Path | None = None
) -> Path:
    """Trains and judges what is missing, `jobs` runs at a time, then draws the figure; returns its path.

    times: another experiment with the same model and batch, whose seconds per step count (see `main`).

    Raises:
        UserError: an unknown method, or `out` or `times` holds an experiment with other settings.
    """
    for method in methods:
        if method not in METHODS:
            raise UserError(f"there is no method {method!r} here", remedy=f"Methods: {', '.join(METHODS)}")
    step_times = _step_times(times, settings, methods) if times is not None else None
    results = _open_results(out / "results.json", settings, jobs)
    cache = _build_cache(settings, out / "cache")
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for entry in results["evaluations"]:
        found.setdefault((entry["method"], entry["seed"]), []).append(entry)

    def keep(method: str, seed: int, entries: list[dict[str, Any]]) -> None:
        found[method, seed] = entries
        results["evaluations"] = [entry for listed in found.values() for entry in listed]
        _write_json(out / "results.json", results)

    todo = [
        (method, seed)
        for seed in range(seeds)
        for method in methods
        if len(found.get((method, seed), ())) < settings.points
    ]
    if jobs == 1:
        judge = _Judge(cache, settings) if todo else None
        for method, seed in todo:
            assert judge is not None
            keep(method, seed, _one_run(settings, method, seed, cache, out, judge=judge))
    else:
        _many_runs(settings, todo, cache, out, jobs, keep)
    summary = summarise(results["evaluations"], step_times)
    _write_json(out / "summary.json", summary)
    return draw(summary, settings, out)


def _step_times(folder: Path, settings: Settings, methods: Sequence[str]) -> dict[str, float]:
    """Seconds per step by method of the experiment in `folder`."""
    try:
        timed: dict[str, Any] = json.loads((folder / "results.json").read_text())["settings"]
        step_s: dict[str, float] = json.loads((folder / "summary.json").read_text())["step_s"]
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no finished experiment", remedy="Pass the --out of one to --times.") from error
    for key in ("model", "batch_size"):
        if timed[key] != getattr(settings, key):
            raise UserError(f"{folder} timed {key} {timed[key]}, but this experiment has {getattr(settings, key)}")
    if missing := set(methods) - set(step_s):
        raise UserError(f"{folder} did not time {', '.join(sorted(missing))}")
    return step_s


def _many_runs(
    settings: Settings,
    todo: Sequence[tuple[str, int]],
    cache: Path,
    out: Path,
    jobs: int,
    keep: Callable[[str, int, list[dict[str, Any]]], None],
) -> None:
    """Several runs at a time, each in a process with its share of the threads."""
    from multiprocessing import get_context

    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), _limit_threads, (threads,)) as pool:
        pending = {pool.submit(_one_run, settings, m, s, cache, out): (m, s) for m, s in todo}
        try:
            for done in as_completed(pending):
                method, seed = pending[done]
                keep(method, seed, done.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _limit_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _one_run(
    settings: Settings, method: str, seed: int, cache: Path, out: Path, *, judge: _Judge | None = None
) -> list[dict[str, Any]]:
    """Trains a run and judges its checkpoints, both as far as that is not done; its evaluations in order."""
    run = out / "runs" / f"{method}-{seed}"
    record = run / "evaluations.json"
    entries: list[dict[str, Any]] = json.loads(record.read_text()) if record.is_file() else []
    done = {entry["step"] for entry in entries}
    todo = [step for step in range(settings.interval, settings.steps + 1, settings.interval) if step not in done]
    if todo:
        console.print(f"[bold]{NAMES[method]}, seed {seed}[/bold]")
        _train(settings, method=method, seed=seed, cache=cache, run=run)
        times = _training_times(run)
        judge = judge or _Judge(cache, settings)
        for step in todo:
            point = {"method": method, "seed": seed, "step": step, "time_s": times[step], "metrics": judge(run, step)}
            entries.append(point)
            _write_json(record, entries)
    _drop_checkpoints(run, before=settings.steps)
    return entries


def _open_results(path: Path, settings: Settings, jobs: int) -> dict[str, Any]:
    from featcache.machine import describe_machine

    if path.is_file():
        results: dict[str, Any] = json.loads(path.read_text())
        if results["settings"] != asdict(settings):
            changed = [k for k, v in asdict(settings).items() if results["settings"].get(k) != v]
            raise UserError(
                f"{path.parent} holds an experiment with another {', '.join(changed)}",
                remedy="Type the same settings to go on with it, or choose another --out.",
            )
        return results
    found = describe_machine("torch")
    threads = found["threads"] if jobs == 1 else max(1, (os.cpu_count() or 1) // jobs)
    machine = {**{key: found[key] for key in ("cpu", "cores", "gpu", "system")}, "threads": threads, "jobs": jobs}
    return {
        "date": date.today().isoformat(),
        "settings": asdict(settings),
        "machine": machine,
        "torch": found["packages"]["torch"],
        "evaluations": [],
    }


def _build_cache(settings: Settings, path: Path) -> Path:
    from featcache.build.request import BuildRequest
    from featcache.build.run import build
    from featcache.encoders import parse_encoders

    request = BuildRequest(
        data="shapes",
        encoders=parse_encoders(["tiny"]),
        limit=settings.images,
        batch_size=64,
        device=settings.device,
        out=path,
    )
    with RichProgress() as progress:
        return build(request, progress).path


def _train(settings: Settings, *, method: str, seed: int, cache: Path, run: Path) -> None:
    from trainer.runs.config import RunConfig
    from trainer.training.loop import train

    name, options = METHODS[method]
    config = RunConfig(
        method=name,
        align={name: options} if options else {},
        model=settings.model,
        cache=str(cache),
        name=run.name,
        steps=settings.steps,
        batch_size=settings.batch_size,
        lr=settings.lr,
        warmup_steps=settings.steps // 50,
        ema_decay=0.99,
        ema_warmup=True,
        seed=seed,
        device=settings.device,
        log_every=settings.log_every,
        sample_every=0,
        checkpoint_every=settings.interval,
        keep_checkpoints=settings.points,
    )
    with RichProgress() as progress:
        train(config, resume=(run / "config.yaml").exists(), watcher=progress, root=run.parent)


class _Judge:
    """Draws samples of a checkpoint and measures them with the embedded extractor; the reference is measured once."""

    def __init__(self, cache: Path, settings: Settings) -> None:
        import featcache
        from featcache.machine import pick_device
        from trainer.evaluate.extractors import build_extractor
        from trainer.evaluate.references import reference_statistics

        self._settings = settings
        self._extractor = build_extractor("embedded", device=pick_device(settings.device))
        resolution = featcache.open(cache).manifest.dataset.preprocessing["resolution"]
        self._reference = reference_statistics(cache, self._extractor, resolution=resolution, need_features=True)

    def __call__(self, run: Path, step: int) -> dict[str, float]:
        import torch

        from trainer.evaluate.judge import evaluate
        from trainer.requests import SampleRequest
        from trainer.sampling.run import sample_run

        folder = run / "samples" / f"judged_{step:07d}"
        request = SampleRequest(
            num=self._settings.samples,
            sampler="ode",
            steps=self._settings.sampling_steps,
            checkpoint=step,
            device=self._settings.device,
            out=folder,
        )
        with RichProgress() as progress:
            drawn = sample_run(run, request, progress)
        with torch.inference_mode():
            judged = evaluate(drawn.images, self._reference, self._extractor)
        drawn.images.unlink()  # the grid beside it stays
        return {name: float(value) for name, value in judged["metrics"].items()}


def _training_times(run: Path) -> dict[int, float]:
    """Seconds of training, without saving and sampling, up to each logged step."""
    from trainer.runs.folder import read_log

    return {record["step"]: record["time_s"] for record in read_log(run)}


def _drop_checkpoints(run: Path, *, before: int) -> None:
    """Judged checkpoints but the last: 8 methods with 3 seeds would fill gigabytes."""
    from trainer.runs.checkpoint import list_checkpoints

    for step, path in list_checkpoints(run):
        if step < before:
            shutil.rmtree(path)


def _write_json(path: Path, values: object) -> None:
    from trainer.runs.folder import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, indent=1))


def mean_and_error(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and its standard error, `s / sqrt(n)` with the sample's deviation s; no error of a single value."""
    listed = list(values)
    error = statistics.stdev(listed) / math.sqrt(len(listed)) if len(listed) > 1 else None
    return statistics.fmean(listed), error


def summarise(
    evaluations: Sequence[Mapping[str, Any]], step_times: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Curves and end points by method, over the seeds that have all of a method's points.

    `step_s`: a method's seconds per step, the median over its seeds and the stretches between evaluations (so that a
    pause of the machine counts little), or `step_times` where given. `curves`: per method and step the number of seeds,
    the time `step * step_s`, and mean and standard error of each metric. `equal_time`: each metric at the time at which
    the fastest method ends, between two evaluations by linear interpolation.
    """
    runs: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for entry in evaluations:
        runs.setdefault(entry["method"], {}).setdefault(entry["seed"], []).append(entry)
    last = max((e["step"] for e in evaluations), default=0)
    for by_seed in runs.values():
        for seed, entries in list(by_seed.items()):
            entries.sort(key=lambda e: e["step"])
            if entries[-1]["step"] < last:
                del by_seed[seed]
    finished = {method: by_seed for method, by_seed in runs.items() if by_seed}
    step_s = {method: statistics.median(_seconds_per_step(by_seed.values())) for method, by_seed in finished.items()}
    step_s = {method: (step_times or step_s)[method] for method in step_s}
    budget = last * min(step_s.values(), default=0.0)
    summary: dict[str, Any] = {"last_step": last, "budget_s": budget, "step_s": step_s, "curves": {}, "equal_time": {}}
    for method, by_seed in finished.items():
        curve = []
        for rows in zip(*by_seed.values(), strict=True):
            step = rows[0]["step"]
            assert all(row["step"] == step for row in rows)
            point: dict[str, Any] = {"step": step, "seeds": len(rows), "time_s": step * step_s[method]}
            for metric in rows[0]["metrics"]:
                point[metric], point[f"{metric}_error"] = mean_and_error(row["metrics"][metric] for row in rows)
            curve.append(point)
        summary["curves"][method] = curve
        summary["equal_time"][method] = {"step": budget / step_s[method]}
        for metric in next(iter(by_seed.values()))[0]["metrics"]:
            mean, error = mean_and_error(
                _at_step(entries, metric, budget / step_s[method]) for entries in by_seed.values()
            )
            summary["equal_time"][method] |= {metric: mean, f"{metric}_error": error}
    return summary


def _seconds_per_step(runs: Iterable[Sequence[Mapping[str, Any]]]) -> list[float]:
    """Seconds per step between each evaluation and the one before it (or the start) in the same run."""
    found = []
    for entries in runs:
        step, time_s = 0, 0.0
        for entry in entries:
            found.append((entry["time_s"] - time_s) / (entry["step"] - step))
            step, time_s = entry["step"], entry["time_s"]
    return found


def _at_step(entries: Sequence[Mapping[str, Any]], metric: str, step: float) -> float:
    import numpy as np

    return float(np.interp(step, [e["step"] for e in entries], [e["metrics"][metric] for e in entries]))


def draw(summary: Mapping[str, Any], settings: Settings, out: Path, *, metric: str = "embedded-FID") -> Path:
    """The figure: the metric against steps (left) and against training time (right), bars of one standard error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    seeds = {point["seeds"] for curve in summary["curves"].values() for point in curve}
    count = str(*seeds) if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    for number, method in enumerate(METHODS):  # a method keeps its colour whichever others are there
        curve = summary["curves"].get(method)
        if curve is None:
            continue
        errors = [point[f"{metric}_error"] or 0.0 for point in curve]
        style = {
            "color": f"C{number}",
            "marker": "osD^vPX*"[number % 8],
            "markersize": 5,
            "capsize": 3,
            "linewidth": 1.3,
        }
        values = [point[metric] for point in curve]
        by_step.errorbar([p["step"] for p in curve], values, yerr=errors, label=NAMES[method], **style)
        by_time.errorbar([p["time_s"] for p in curve], values, yerr=errors, label=NAMES[method], **style)
    by_time.axvline(summary["budget_s"], color="0.6", linewidth=0.8, linestyle=":")
    by_step.set(xlabel="training steps", ylabel=f"{metric} of {settings.samples:,} samples", yscale="log")
    by_time.set(xlabel="training time (s), without saving and sampling")
    by_step.legend(ncols=2, frameon=False)
    for axes in (by_step, by_time):
        axes.grid(alpha=0.25, which="both")
    bars = f"mean and standard error over {count} seeds" if max(seeds) > 1 else "one seed"
    figure.suptitle(f"{settings.model} on the embedded set, batch {settings.batch_size}, {bars}")
    for suffix in ("svg", "png"):
        figure.savefig(out / f"methods.{suffix}", dpi=150)
    plt.close(figure)
    return out / "methods.svg"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_DEFAULT = Settings()


@app.command()
def main(
    methods: Annotated[str, typer.Option(help="Joined by commas.")] = ",".join(METHODS),
    seeds: Annotated[int, typer.Option(help="Runs of each method, seeds 0, 1, ...", min=1)] = 3,
    jobs: Annotated[int, typer.Option(help="Runs at a time, each on its share of the cores.", min=1)] = 1,
    times: Annotated[
        Path | None, typer.Option(help="Folder of a short experiment on a quiet machine, whose seconds per step count.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write to and to continue from.")] = Path("experiments/methods"),
    model: Annotated[str, typer.Option(help="Backbone.")] = _DEFAULT.model,
    steps: Annotated[int, typer.Option(help="Training steps of every run.")] = _DEFAULT.steps,
    points: Annotated[int, typer.Option(help="Evaluations, evenly over the steps.")] = _DEFAULT.points,
    batch_size: Annotated[int, typer.Option(help="Batch size.")] = _DEFAULT.batch_size,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = _DEFAULT.lr,
    images: Annotated[int, typer.Option(help="Images of the embedded set.")] = _DEFAULT.images,
    samples: Annotated[int, typer.Option(help="Samples of an evaluation.", min=2)] = _DEFAULT.samples,
    sampling_steps: Annotated[int, typer.Option(help="Steps of the ODE sampler.")] = _DEFAULT.sampling_steps,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = _DEFAULT.device,
) -> None:
    """Train every method on the embedded set, judge its checkpoints, and plot embedded-FID against steps and time.

    Where long runs share the machine with other work, their times say little: repeat the experiment with few steps and
    samples on the quiet machine, into another folder, and name it with --times.
    """
    settings = Settings(
        model=model,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        points=points,
        images=images,
        samples=samples,
        sampling_steps=sampling_steps,
        device=device,
    )
    figure = run_experiment(
        settings, methods=[m.strip() for m in methods.split(",")], seeds=seeds, out=out, jobs=jobs, times=times
    )
    for method, values in json.loads((out / "summary.json").read_text())["equal_time"].items():
        error = values["embedded-FID_error"]
        shown = f"{values['embedded-FID']:.3g}" + (f" +- {error:.2g}" if error is not None else "")
        console.print(f"{NAMES[method]:>8}  embedded-FID at equal time {shown}")
    console.print(f"figure: [bold]{safe(figure)}[/bold]")


if __name__ == "__main__":
    sys.exit(run_app(app))
