"""All methods side by side, several seeds each, on drawn shapes and on photographs, on 16 and on 64 tokens.

    python -m pipelines.experiments.methods --photographs DIR --jobs 2 --out experiments/methods

One model size, the papers' options but small sets, few steps, a high learning rate and projectors as much narrower than
theirs as the backbone is. Every run of a seed sees the same images, noise, timesteps and dropped labels, and its samples
start from the same noise, so differences to the vanilla run are taken seed by seed. A checkpoint is judged by the
embedded judge, with which no method aligns, by the tiny ViT, with which REPA, HASTE, iREPA, SARA and DyA do, and by the
denoising loss on images that were not trained on, at fixed noise and times, by interval of the timestep.

Seeds are the outer loop and methods the inner one, so that a machine that slows down slows all methods down.
Interrupted, the same command goes on; more seeds or methods may be added later. For each part of `PARTS`, a folder of
`--out` gets `results.json` (every evaluation, and what was set), `summary.json` (see `summary.summarise`), `table.md`,
`methods.svg` / `methods.png`, and `samples.jpg`, samples of the first seed's runs. Seconds per step are the runs' own, of each
stretch between evaluations the fastest seed's, until `pipelines.experiments.step_times` has measured them and the command is typed
again.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featcache.console import console, run_app, safe
from featcache.console_progress import RichProgress
from featcache.errors import UserError
from pipelines.experiments.pictures import draw_samples
from pipelines.experiments.summary import draw, summarise, table
from trainer.models.config import SIZES

if TYPE_CHECKING:
    from trainer.evaluate.images import ImageSet


@dataclass(frozen=True, kw_only=True)
class Method:
    """name: of the alignment method, with its options; where nothing is said, its defaults (the papers' choices).

    narrowed: its projector is as wide as twice the backbone; the papers' 2048 is 1.8 times SiT-XL's 1152.
    stop_at: share of the steps after which alignment is off (HASTE).
    """

    title: str
    name: str = "none"
    options: Mapping[str, Any] | None = None
    narrowed: bool = False
    stop_at: float | None = None


METHODS: Mapping[str, Method] = {
    "none": Method(title="vanilla"),
    "repa": Method(title="REPA", name="repa", narrowed=True),
    "haste": Method(title="HASTE", name="repa", narrowed=True, stop_at=0.5),
    "irepa": Method(title="iREPA", name="repa", options={"head": "conv", "spatial_gamma": 0.6, "weight": 1.0}),
    # The same on machines with and without a network.
    "sara": Method(title="SARA", name="sara", options={"discriminator_weights": "random"}, narrowed=True),
    "dya": Method(title="DyA", name="dya", narrowed=True),
    "ahpa": Method(title="AHPA", name="ahpa"),
    "ahpa-whiten": Method(title="AHPA, levels whitened", name="ahpa", options={"normalize": "whiten"}),
    "sra": Method(title="SRA", name="sra"),
    "sra2": Method(title="SRA 2", name="sra2", narrowed=True),
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A data set at a size, and which methods are compared on it with how many seeds."""

    title: str
    photographs: bool
    resolution: int
    methods: tuple[str, ...] = tuple(name for name in METHODS if name != "ahpa-whiten")  # an option of ours: on demand
    seeds: int = 3


_LARGE: Mapping[str, Any] = {"resolution": 128, "methods": ("none", "repa", "ahpa"), "seeds": 5}
PARTS: Mapping[str, Part] = {
    "shapes-16": Part(title="shapes, 16 tokens", photographs=False, resolution=64),
    "photographs-16": Part(title="photographs, 16 tokens", photographs=True, resolution=64),
    "shapes-64": Part(title="shapes, 64 tokens", photographs=False, **_LARGE),
    "photographs-64": Part(title="photographs, 64 tokens", photographs=True, **_LARGE),
}
EXTRACTORS = ("embedded", "embedded-vit")
STEP_TIMES = "step_times.json"  # beside results.json, written by `pipelines.experiments.step_times`


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs of a part have in common. Changing any of it needs another folder.

    model, steps, batch_size, lr: of training (warm-up over the first 50th of the steps). points: evaluations, evenly
    over the steps. images: size of the set. samples, sampling_steps: of an evaluation, drawn by the ODE sampler without
    guidance. held_out: images of the denoising loss, in `bins` intervals of t. precision: of training and sampling.
    device: cpu, cuda or auto.
    """

    part: str = "shapes-16"
    model: str = "SiT-Ti/2"
    steps: int = 3000
    batch_size: int = 16
    lr: float = 2e-3
    points: int = 2
    images: int = 4000
    samples: int = 2000
    sampling_steps: int = 16
    held_out: int = 500
    bins: int = 10
    precision: str = "bf16"
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise UserError(f"there is no part {self.part!r} of the experiment", remedy=f"Parts: {', '.join(PARTS)}")
        for key in ("steps", "batch_size", "points", "images", "samples", "sampling_steps", "held_out", "bins"):
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

    @property
    def width(self) -> int:
        """Of the backbone."""
        return SIZES[self.model.partition("-")[2].partition("/")[0]][1]


@dataclass(frozen=True, kw_only=True)
class Data:
    """The caches of a part: of the images trained on, and of those held out. photographs: their folder, or None."""

    train: Path
    held_out: Path
    photographs: Path | None

    @property
    def images(self) -> str | None:
        """What the training cache was built from, where it cannot draw its images itself."""
        return None if self.photographs is None else str(self.photographs / "train*.zip")


def run_part(
    settings: Settings,
    *,
    methods: Sequence[str],
    seeds: int,
    out: Path,
    photographs: Path | None = None,
    jobs: int = 1,
) -> Path:
    """Trains and judges what is missing, `jobs` runs at a time, then writes table and pictures; returns the figure's path.

    Seconds per step are those of `step_times.json`, where `pipelines.experiments.step_times` has timed all methods, else the
    runs' own.

    Raises:
        UserError: an unknown method, or `out` holds an experiment, or step times, with other settings.
    """
    for method in methods:
        if method not in METHODS:
            raise UserError(f"there is no method {method!r} here", remedy=f"Methods: {', '.join(METHODS)}")
    results = _open_results(out / "results.json", settings, methods, jobs)
    shown = [m for m in METHODS if m in {*methods, *(entry["method"] for entry in results["evaluations"])}]
    data = _build_caches(settings, out, photographs)
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for entry in results["evaluations"]:
        found.setdefault((entry["method"], entry["seed"]), []).append(entry)

    def keep(method: str, seed: int, entries: list[dict[str, Any]]) -> None:
        found[method, seed] = entries
        results["evaluations"] = [entry for listed in found.values() for entry in listed]
        write_json(out / "results.json", results)

    todo = [
        (method, seed)
        for seed in range(seeds)
        for method in methods
        if len(found.get((method, seed), ())) < settings.points
    ]
    if jobs == 1:
        judge = Judge(data, settings) if todo else None
        for method, seed in todo:
            assert judge is not None
            keep(method, seed, _one_run(settings, method, seed, data, out, judge=judge))
    else:
        _many_runs(settings, todo, data, out, jobs, keep)
    results["timed"] = _read_step_times(out, settings, shown)
    write_json(out / "results.json", results)
    found_out = summarise(results["evaluations"], results["timed"] and results["timed"]["step_s"])
    write_json(out / "summary.json", found_out)
    titles = {name: method.title for name, method in METHODS.items()}
    (out / "table.md").write_text(table(found_out, titles))
    about = f"{settings.model} on {PARTS[settings.part].title}, batch {settings.batch_size}"
    figure = draw(found_out, titles, out, about=about, samples=settings.samples)
    _draw_samples(out, settings, shown)
    return figure


def _draw_samples(out: Path, settings: Settings, methods: Sequence[str]) -> None:
    """Of each method's first run, where it has its last checkpoint."""
    from featcache.machine import pick_device
    from trainer.runs.checkpoint import list_checkpoints

    runs = {METHODS[method].title: out / "runs" / f"{method}-0" for method in methods}
    kept = {t: run for t, run in runs.items() if settings.steps in (step for step, _ in list_checkpoints(run))}
    if kept:
        device = pick_device(settings.device)
        draw_samples(kept, out, step=settings.steps, sampling_steps=settings.sampling_steps, device=device)


def _many_runs(
    settings: Settings,
    todo: Sequence[tuple[str, int]],
    data: Data,
    out: Path,
    jobs: int,
    keep: Callable[[str, int, list[dict[str, Any]]], None],
) -> None:
    """Several runs at a time, each in a process with its share of the threads."""
    from multiprocessing import get_context

    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin_worker, (threads,)) as pool:
        pending = {pool.submit(_one_run, settings, m, s, data, out): (m, s) for m, s in todo}
        try:
            for done in as_completed(pending):
                method, seed = pending[done]
                keep(method, seed, done.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin_worker(threads: int) -> None:
    """Takes its share of the threads, and ends where the experiment is killed: the next call goes on in the same folders."""
    from multiprocessing import parent_process

    import torch

    def watch() -> None:
        parent = parent_process()
        assert parent is not None, "a worker was spawned"
        parent.join()
        os._exit(1)

    Thread(target=watch, name="parent", daemon=True).start()
    torch.set_num_threads(threads)


def _one_run(
    settings: Settings, method: str, seed: int, data: Data, out: Path, *, judge: Judge | None = None
) -> list[dict[str, Any]]:
    """Trains a run and judges its checkpoints, both as far as that is not done; its evaluations in order."""
    run = out / "runs" / f"{method}-{seed}"
    record = run / "evaluations.json"
    entries: list[dict[str, Any]] = json.loads(record.read_text()) if record.is_file() else []
    done = {entry["step"] for entry in entries}
    todo = [step for step in range(settings.interval, settings.steps + 1, settings.interval) if step not in done]
    if todo:
        console.print(f"[bold]{METHODS[method].title}, seed {seed}[/bold]")
        _train(settings, method=method, seed=seed, cache=data.train, run=run)
        times = _training_times(run)
        judge = judge or Judge(data, settings)
        for step in todo:
            point = {"method": method, "seed": seed, "step": step, "time_s": times[step], "metrics": judge(run, step)}
            entries.append(point)
            write_json(record, entries)
    _drop_checkpoints(run, before=settings.steps)
    return entries


def _open_results(path: Path, settings: Settings, methods: Sequence[str], jobs: int) -> dict[str, Any]:
    """What `path` holds of these settings, or the start of it. With the options of each of `methods`."""
    results = _read_results(path, settings, jobs)
    for name in methods:
        options = json.loads(json.dumps(asdict(METHODS[name])))
        if results.setdefault("methods", {}).setdefault(name, options) != options:
            raise UserError(f"{path.parent} holds runs of {name} with other options", remedy="Choose another --out.")
    return results


def _read_results(path: Path, settings: Settings, jobs: int) -> dict[str, Any]:
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


def read_settings(out: Path) -> tuple[Settings, dict[str, Any]]:
    """What the runs of a part in `out` have in common, and all that its `results.json` holds.

    Raises:
        UserError: there is no experiment.
    """
    if not (out / "results.json").is_file():
        raise UserError(f"{out} holds no experiment", remedy="Pass its --out, and a --part that has run.")
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    return Settings(**results["settings"]), results


def _read_step_times(out: Path, settings: Settings, methods: Sequence[str]) -> dict[str, Any] | None:
    """What was measured of a part; None where not all of `methods` were.

    Raises:
        UserError: it was measured with other settings.
    """
    path = out / STEP_TIMES
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    again = f"python -m pipelines.experiments.step_times --part {settings.part}"
    if changed := [key for key, value in record["settings"].items() if value != getattr(settings, key)]:
        raise UserError(f"{path} was measured with another {', '.join(changed)}", remedy=f"Remove it, or type: {again}")
    if missing := set(methods) - set(record["step_s"]):
        console.print(safe(f"{', '.join(sorted(missing))} not timed: seconds per step are the runs' own until {again}"))
        return None
    return record


def data_of(name: str, out: Path, photographs: Path | None) -> Data:
    """Where a part's caches lie or will.

    Raises:
        UserError: it needs photographs, and there are none.
    """
    part = PARTS[name]
    if part.photographs and photographs is None:
        raise UserError(f"{name} needs photographs", remedy="Pass --photographs DIR (train*.zip and val.zip).")
    return Data(train=out / "cache", held_out=out / "held-out", photographs=photographs if part.photographs else None)


def _build_caches(settings: Settings, out: Path, photographs: Path | None) -> Data:
    from featcache.builder.request import BuildRequest
    from featcache.builder.run import build
    from featcache.encoders import parse_encoders

    data = data_of(settings.part, out, photographs)
    common = {"resolution": PARTS[settings.part].resolution, "batch_size": 64, "device": settings.device}
    train = BuildRequest(
        data=data.images or "shapes",
        encoders=parse_encoders(["tiny"]),
        vae="tiny",
        levels=("G3", "G4"),
        limit=settings.images,
        out=data.train,
        **common,  # type: ignore[arg-type]
    )
    held_out = BuildRequest(
        data="shapes:1" if data.photographs is None else str(data.photographs / "val.zip"),
        vae="tiny",
        limit=settings.held_out,
        out=data.held_out,
        **common,  # type: ignore[arg-type]
    )
    with RichProgress() as progress:
        for request in (train, held_out):
            build(request, progress)
    return data


def _train(settings: Settings, *, method: str, seed: int, cache: Path, run: Path) -> None:
    from trainer.runs.config import RunConfig
    from trainer.training.loop import train

    with RichProgress() as progress:
        values = run_values(settings, method)
        config = RunConfig(**values, cache=str(cache), name=run.name, seed=seed)
        train(config, resume=(run / "config.yaml").exists(), watcher=progress, root=run.parent)


def run_values(settings: Settings, method: str) -> dict[str, Any]:
    """Keys of a run's configuration but cache, name and seed."""
    chosen = METHODS[method]
    options = dict(chosen.options or {}) | ({"head_width": 2 * settings.width} if chosen.narrowed else {})
    return {
        "method": chosen.name,
        "align": {chosen.name: options} if options else {},
        "align_until": None if chosen.stop_at is None else round(chosen.stop_at * settings.steps),
        "normalization": "scalar",
        "model": settings.model,
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "lr": settings.lr,
        "clip": 1.0,
        "warmup_steps": settings.steps // 50,
        "ema_decay": 0.99,
        "ema_warmup": True,
        "precision": settings.precision,
        "device": settings.device,
        "log_every": settings.log_every,
        "sample_every": 0,
        "checkpoint_every": settings.interval,
        "keep_checkpoints": settings.points,
    }


class Judge:
    """Judges a checkpoint by samples and by its loss on images held out; what they are compared with is measured once."""

    def __init__(self, data: Data, settings: Settings) -> None:
        import featcache
        from featcache.machine import pick_device
        from trainer.evaluate.extractors import build_extractor
        from trainer.evaluate.references import reference_statistics

        self._settings, self._data, self._device = settings, data, pick_device(settings.device)
        self._extractors = [build_extractor(name, device=self._device) for name in EXTRACTORS]
        resolution = featcache.open(data.train).manifest.dataset.resolution
        self._references = [
            reference_statistics(data.train, e, resolution=resolution, need_features=True, data=data.images)
            for e in self._extractors
        ]

    def __call__(self, run: Path, step: int) -> dict[str, float]:
        from trainer.evaluate.images import NpzImages
        from trainer.requests import SampleRequest
        from trainer.sampling.run import sample_run

        settings = self._settings
        request = SampleRequest(
            num=settings.samples,
            sampler="ode",
            steps=settings.sampling_steps,
            checkpoint=step,
            device=settings.device,
            precision=settings.precision,
            out=run / "samples" / f"judged_{step:07d}_{settings.sampling_steps}",
        )
        with RichProgress() as progress:
            drawn = sample_run(run, request, progress)
        found = self.compare(NpzImages(path=drawn.images))
        drawn.images.unlink()  # the grid beside it stays
        return found | held_out_loss(run, step, self._data.held_out, bins=settings.bins, device=self._device)

    def compare(self, images: ImageSet) -> dict[str, float]:
        """All metrics of both judges, by the names they are reported under, against the images trained on."""
        import torch

        from trainer.evaluate.judge import evaluate

        found: dict[str, float] = {}
        with torch.inference_mode():
            for extractor, reference in zip(self._extractors, self._references):
                judged = evaluate(images, reference, extractor)
                found |= {name: float(value) for name, value in judged["metrics"].items()}
        return found


def held_out_loss(run: Path, step: int, cache: Path, *, bins: int, device: str, seed: int = 0) -> dict[str, float]:
    """Mean denoising loss of the averaged weights on all images of a cache, `denoise`, and by interval of t.

    One time in each interval and one noise a sample, functions of (seed, sample, interval) alone: alike for all runs.
    """
    import numpy as np
    import torch

    import featcache
    from featcache.read.decoded import read_decoded
    from trainer.diffusion.noise import sample_noise
    from trainer.diffusion.transport import build_transport
    from trainer.runs.normalization import of_run
    from trainer.sampling.draw import load_run
    from trainer.training.objective import sample_posterior

    loaded, opened = load_run(run, step=step, device=device), featcache.open(cache)
    normalization = of_run(run, loaded.config, loaded.summary["dataset"]["vae"])
    assert normalization is not None, "the run has a cache"
    transport = build_transport(loaded.model.cfg.family, path=loaded.config.path, device=device)
    labels = torch.from_numpy(opened.labels().astype(np.int64)).to(device)
    sums, count = torch.zeros(bins, dtype=torch.float64), 0
    with torch.inference_mode():
        for batch in read_decoded(opened, ["vae/moments"], np.arange(len(opened))):
            moments = batch["vae/moments"].to(device)
            rows = list(range(count, count + len(moments)))
            shape = loaded.model.cfg.latent_shape
            drawn = sample_noise(seed, rows, shape, 0, device=device)
            latent = sample_posterior(moments, drawn, scale=normalization.scale, shift=normalization.shift)
            for index in range(bins):
                noise = sample_noise(seed, rows, shape, 1 + 2 * index, device=device)
                within = torch.special.ndtr(sample_noise(seed, rows, (1,), 2 + 2 * index, device=device)[:, 0])
                t = (index + within) / bins
                noisy = transport.noisy(latent, noise, t)
                out = loaded.model(noisy, transport.model_time(t), labels[rows])
                terms = transport.loss(out, latent, noise, noisy, t)
                sums[index] += len(rows) * torch.stack(list(terms.values())).sum().item()
            count += len(rows)
    found = (sums / count).tolist()
    by_interval = {f"denoise t={i / bins:.1f}-{(i + 1) / bins:.1f}": value for i, value in enumerate(found)}
    return {"denoise": float(np.mean(found)), **by_interval}


def _training_times(run: Path) -> dict[int, float]:
    """Seconds of training, without saving and sampling, up to each logged step."""
    from trainer.runs.folder import read_log

    return {record["step"]: record["time_s"] for record in read_log(run)}


def _drop_checkpoints(run: Path, *, before: int) -> None:
    """Judged checkpoints but the last: dozens of runs would fill gigabytes."""
    from trainer.runs.checkpoint import list_checkpoints

    for step, path in list_checkpoints(run):
        if step < before:
            shutil.rmtree(path)


def write_json(path: Path, values: object) -> None:
    """In one piece, with the folders above it."""
    from trainer.runs.folder import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, indent=1))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    photographs: Annotated[
        Path | None, typer.Option(help="Folder with train*.zip and val.zip, a folder a class. [default: shapes alone]")
    ] = None,
    part: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PARTS)}. [default: all]")] = None,
    methods: Annotated[str | None, typer.Option(help="Joined by commas. [default: those of the part]")] = None,
    seeds: Annotated[int | None, typer.Option(help="Runs of each method. [default: 3, on 64 tokens 5]", min=1)] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time, each on its share of the cores.", min=1)] = 1,
    out: Annotated[Path, typer.Option(help="Folder to write to and to continue from.")] = Path("experiments/methods"),
    model: Annotated[str | None, typer.Option(help="Backbone. [default: SiT-Ti/2]")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps of every run. [default: 3000]")] = None,
    points: Annotated[int | None, typer.Option(help="Evaluations, evenly over the steps. [default: 2]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Batch size. [default: 16]")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of AdamW. [default: 0.002]")] = None,
    images: Annotated[int | None, typer.Option(help="Images trained on. [default: 4000]")] = None,
    samples: Annotated[int | None, typer.Option(help="Samples of an evaluation. [default: 2000]", min=2)] = None,
    sampling_steps: Annotated[int | None, typer.Option(help="Steps of the ODE sampler. [default: 16]")] = None,
    held_out: Annotated[int | None, typer.Option(help="Images of the denoising loss. [default: 500]")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32 or bf16. [default: bf16]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or auto. [default: auto]")] = None,
) -> None:
    """Train every method, judge its checkpoints, and compare them at equal steps and at equal time."""
    given: dict[str, Any] = {
        "model": model,
        "steps": steps,
        "points": points,
        "batch_size": batch_size,
        "lr": lr,
        "images": images,
        "samples": samples,
        "sampling_steps": sampling_steps,
        "held_out": held_out,
        "precision": precision,
        "device": device,
    }
    chosen = part or [name for name, p in PARTS.items() if photographs is not None or not p.photographs]
    for name in chosen:
        of_part = Settings(part=name, **{key: value for key, value in given.items() if value is not None})
        figure = run_part(
            of_part,
            methods=[m.strip() for m in methods.split(",")] if methods is not None else PARTS[name].methods,
            seeds=seeds or PARTS[name].seeds,
            out=out / name,
            photographs=photographs,
            jobs=jobs,
        )
        console.print(f"[bold]{PARTS[name].title}[/bold]")
        console.print(safe((out / name / "table.md").read_text()))
        console.print(f"figure: [bold]{safe(figure)}[/bold]")


if __name__ == "__main__":
    sys.exit(run_app(app))
