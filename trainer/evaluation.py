"""From a run to its numbers and its report: sample, judge, write ``metrics.json`` and ``report.html``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from featcache.build import pick_device
from featcache.errors import UserError, WeightsUnavailable
from trainer import runs
from trainer.config import RunConfig
from trainer.models import forward_flops
from trainer.sampling import Bar, SampleRequest, sample_run

GPU_SAMPLES, GPU_STEPS = 50_000, 250  # the papers' protocol, with the family's default sampler
CPU_SAMPLES, CPU_STEPS = 512, 32
CPU_SAMPLERS = {"sit": "ode", "dit": "ddim"}
CPU_BUDGET_FLOPS = 20e12  # some minutes on two cores
REFERENCE_TILES = (4, 8)  # rows, columns


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """What ``trainer eval`` was asked for; None takes the defaults of the device (see the module's constants)."""

    num: int | None = None
    sampler: str | None = None
    steps: int | None = None
    guidance: float = 1.0
    interval: str = "0,1"
    extractor: str = "auto"
    reference: str | None = None
    data: str | None = None
    seed: int = 0
    checkpoint: int | None = None
    batch_size: int = 64
    device: str = "auto"
    weights_dir: str | None = None
    bootstrap: int = 0
    metrics: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    metrics: Mapping[str, float]
    report: Path


def evaluate_run(run: Path, request: EvalRequest, bar: Bar) -> EvalResult:
    """Samples a run's averaged weights, compares them with the reference and updates the run's report.

    Raises:
        UserError: no such run, no reference images, settings that do not fit.
        WeightsUnavailable: weights that were asked for by name are not to be had.
    """
    import torch

    from trainer.evaluate.judge import evaluate

    config = runs.load_config(run)
    device = pick_device(request.device)
    settings = _with_defaults(request, run, config, device, bar)
    extractor = choose_extractor(request.extractor, request.weights_dir, device, bar)
    reference, data = _reference(run, request)
    drawn = sample_run(run, settings, bar)

    stage = ""

    def progress(name: str, done: int, total: int | None) -> None:
        nonlocal stage
        if name != stage:
            stage = name
            bar.begin(f"features of {name}", total or 0)

    with torch.inference_mode():
        result = evaluate(
            drawn.images,
            reference,
            extractor,
            metrics=request.metrics or None,
            count=settings.num,
            batch_size=request.batch_size,
            bootstrap=request.bootstrap,
            seed=request.seed,
            data=data,
            progress=progress,
        )
    for warning in result["warnings"]:
        bar.note(warning)
    sampler = {k: v for k, v in drawn.settings.items() if k != "num"}
    entry = {
        "step": drawn.loaded.step,
        "sampler": sampler,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **result,
    }
    _append_metrics(run / "metrics.json", entry)
    return EvalResult(metrics=result["metrics"], report=write_run_report([run]))


def _with_defaults(request: EvalRequest, run: Path, config: RunConfig, device: str, bar: Bar) -> SampleRequest:
    """The device's defaults where nothing was asked for; on the CPU as many samples as a few minutes allow."""
    from trainer.sample import run_model_config

    on_gpu = device.startswith("cuda")
    steps = request.steps or (GPU_STEPS if on_gpu else CPU_STEPS)
    num = request.num
    model = run_model_config(run, config)
    if num is None and on_gpu:
        num = GPU_SAMPLES
    elif num is None:
        cost = forward_flops(model) * steps
        num = int(max(8, min(CPU_SAMPLES, CPU_BUDGET_FLOPS // cost)))
        bar.note(
            f"on the CPU only {num} samples with {steps} steps; set --num and --steps, or use a GPU for {GPU_SAMPLES:,}"
        )
    return SampleRequest(
        num=num,
        sampler=request.sampler or (None if on_gpu else CPU_SAMPLERS[model.family]),
        steps=steps,
        guidance=request.guidance,
        interval=request.interval,
        seed=request.seed,
        checkpoint=request.checkpoint,
        batch_size=request.batch_size,
        device=device,
        weights_dir=request.weights_dir,
    )


def choose_extractor(name: str, weights_dir: str | None, device: str, bar: Bar) -> Any:
    """The feature extractor of that name; ``auto`` is Inception where its weights are to be had, else the embedded one."""
    from trainer.evaluate.extractors import build_extractor

    folder = None if weights_dir is None else Path(weights_dir)
    if name != "auto":
        return build_extractor(name, weights_dir=folder, device=device)
    try:
        return build_extractor("inception", weights_dir=folder, device=device)
    except WeightsUnavailable as error:
        bar.note(f"{error.what}; judging with the embedded extractor: its numbers are named embedded-* and are not FID")
        return build_extractor("embedded", device=device)


def _reference(run: Path, request: EvalRequest) -> tuple[str, str | None]:
    """What to compare with: ``--reference``, else the cache's own images. Returns (where, data folder)."""
    if request.reference is not None:
        return request.reference, request.data
    summary = runs.read_json(run / "cache.json", {})
    cache = summary.get("path", "")
    if not (Path(cache) / "zarr.json").is_file() and "://" not in cache:
        raise UserError(
            f"the cache of this run, {cache}, is no longer there, so there are no images to compare with",
            remedy="Pass --reference with an npz or a folder of images.",
        )
    return cache, _data_folder(summary, request.data)


def _data_folder(summary: Mapping[str, Any], data: str | None) -> str | None:
    if summary["dataset"]["source"].startswith("shapes "):
        return None
    from featcache.images import find_data

    try:
        return find_data(data)
    except UserError as error:
        raise UserError(
            "no images to compare with: the cache holds features, and its images were not found "
            "(--data was not given, $FEATCACHE_DATA is not set and ./data/imagenet does not exist)",
            remedy="Type: trainer eval --data /path/to/images   (the ones the cache was built from), or pass --reference",
        ) from error


def _append_metrics(path: Path, entry: dict[str, Any]) -> None:
    """Adds an evaluation, replacing an earlier one of the same checkpoint with the same settings."""

    def identity(e: Mapping[str, Any]) -> tuple[Any, ...]:
        return (
            e.get("step"),
            json.dumps(e.get("sampler"), sort_keys=True),
            json.dumps(e.get("settings"), sort_keys=True),
        )

    entry = json.loads(json.dumps(entry))
    kept = [e for e in runs.read_json(path, []) if identity(e) != identity(entry)]
    runs.write_text(path, json.dumps([*kept, entry], indent=1))


def write_run_report(
    folders: Sequence[Path], out: Path | None = None, *, title: str | None = None, lead: str = ""
) -> Path:
    """The report of one run, or one page with several side by side.

    Raises:
        UserError: a folder is not a run.
    """
    from trainer.report.data import load_run
    from trainer.report.report import write_report

    for folder in folders:
        runs.load_config(folder)
    data = [load_run(folder) for folder in folders]
    images, charts = [], []
    images += _reference_figures(folders[0])
    for folder in folders:
        charts += router_charts(folder)
    return write_report(
        out or folders[0] / "report.html",
        data,
        title=title
        or " and ".join(str(f.relative_to(runs.ROOT)) if f.is_relative_to(runs.ROOT) else f.name for f in folders),
        lead=lead,
        images=images,
        charts=charts,
        published=_published(folders),
    )


def _reference_figures(folder: Path) -> list[Any]:
    """Real images of the run's cache in the order of the sample grid, and the PCA picture of what is cached."""
    import featcache
    from featcache.errors import CacheError
    from featcache.inspect import contact_sheet, images_of
    from trainer.report.page import Figure
    from trainer.sample import grid_classes

    summary = runs.read_json(folder / "cache.json", {})
    try:
        cache = featcache.open(summary["path"])
        data = None
        if not summary["dataset"]["source"].startswith("shapes "):
            data = _data_folder(summary, None)
        labels = cache.labels()
        rows = []
        for label in grid_classes(len(cache.manifest.dataset.class_names)):
            chosen = np.flatnonzero(labels == label)[: REFERENCE_TILES[1]]
            if len(chosen):
                rows.append(images_of(cache, data, chosen.tolist()))
        width = max(len(row) for row in rows)
        blank = np.full((1, *rows[0].shape[1:]), 255, np.uint8)
        padded = [np.concatenate([row, blank.repeat(width - len(row), axis=0)]) for row in rows]
        grid = np.concatenate([np.concatenate(list(row), axis=1) for row in padded], axis=0)
        sheet = np.asarray(contact_sheet(cache, data=data))
    except (CacheError, UserError):
        return []  # the cache or its images are elsewhere: the report shows what the run itself holds
    return [
        Figure(
            image=grid,
            title="Real images",
            caption="From the training set, one row a class, the same rows as in the sample grids.",
            alt="Grid of training images, one row a class",
            section="samples",
        ),
        Figure(
            image=sheet,
            title="What the cache holds",
            caption="PCA of each cached layer as colours: the first three principal components over all tokens shown. "
            "Look for object outlines that get coarser and more uniform inside objects with depth.",
            alt="Principal components of cached VAE levels and encoder tokens beside their images",
            section="features",
            wide=True,
        ),
    ]


def router_charts(folder: Path, points: int = 101) -> list[Any]:
    """AHPA's inter-group and intra-group weights over t at the latest checkpoint (AHPA, Fig. 5); empty for other methods."""
    import torch

    from trainer import checkpoint
    from trainer.align.base import FeatureInfo
    from trainer.report.report import router_chart
    from trainer.sample import run_model_config

    config = runs.load_config(folder)
    if config.methods != ("ahpa",) or not checkpoint.list_checkpoints(folder):
        return []
    from trainer import align
    from trainer.parts import backbone_info

    summary = runs.read_json(folder / "cache.json", {})
    features = {name: FeatureInfo(shape=tuple(f["shape"])) for name, f in summary["features"].items()}
    info = backbone_info(config.model, run_model_config(folder, config))
    module: Any = align.build([("ahpa", config.method_config("ahpa"))], info, features)
    _, latest = checkpoint.find_checkpoint(folder)
    module.load_state_dict(checkpoint.load_tensors(latest, "alignment"))
    if config.method_config("ahpa").router == "content":
        return []  # its weights depend on the image, not on t alone
    t = torch.linspace(0, 1, points)
    with torch.no_grad():
        weights = module.router(t)
    groups = config.method_config("ahpa").groups
    name = runs.display_name(folder)
    charts = [
        router_chart(
            t.numpy(),
            {group: weights.inter[:, g].numpy() for g, group in enumerate(groups)},
            title=f"Router weights between groups ({name})",
        )
    ]
    for g, group in enumerate(groups):
        layers = features_layers(summary, f"vae/{group}", weights.intra[g].shape[1])
        charts.append(
            router_chart(
                t.numpy(),
                {layer: weights.intra[g][:, i].numpy() for i, layer in enumerate(layers)},
                title=f"Router weights within {group} ({name})",
            )
        )
    return charts


def features_layers(summary: Mapping[str, Any], feature: str, count: int) -> list[str]:
    """Names of a VAE group's layers; numbers where a regrouping left the recorded ones behind."""
    named = summary["features"].get(feature, {}).get("layers", [])
    return list(named) if len(named) == count else [f"layer {i + 1}" for i in range(count)]


def _published(folders: Sequence[Path]) -> list[Any]:
    """The figures that the recipes of these runs carry from their papers."""
    from trainer.report.table import Published

    found = []
    for folder in folders:
        published = runs.load_config(folder).published
        for metric, value in published.get("metrics", {}).items():
            found.append(
                Published(
                    metric=metric,
                    value=float(value),
                    source=str(published.get("source", "")),
                    run=runs.display_name(folder),
                )
            )
    return found
