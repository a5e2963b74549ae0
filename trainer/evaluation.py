"""From a run to its numbers and its report: sample, judge, write ``metrics.json`` and ``report.html``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.build import pick_device
from featcache.errors import UserError, WeightsUnavailable
from trainer import distributed, locks, runs
from trainer.config import RunConfig
from trainer.diffusion.interval import Interval
from trainer.models import forward_flops
from trainer.published import Sampling, parse_published
from trainer.recipes import load_recipe_file
from trainer.requests import EvalRequest, SampleRequest, SampleSettings
from trainer.sampling import Bar, sample_run

if TYPE_CHECKING:
    from trainer.evaluate.extractors import Extractor

GPU_SAMPLES, GPU_STEPS = 50_000, 250  # the papers' protocol, with the family's default sampler
CPU_SAMPLES, CPU_STEPS = 512, 32
CPU_SAMPLERS = {"sit": "ode", "dit": "ddim"}
CPU_BUDGET_FLOPS = 20e12  # some minutes on two cores
REFERENCE_TILES = (4, 8)  # rows, columns


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """The numbers by the names they are reported under, and the page or file that holds them."""

    metrics: Mapping[str, float]
    report: Path


class _Mute:
    """The bar of ranks other than the main one."""

    def begin(self, name: str, total: int, done: int = 0) -> None: ...

    def advance(self, count: int) -> None: ...

    def note(self, text: str) -> None: ...


def evaluate_run(run: Path, request: EvalRequest, bar: Bar) -> EvalResult | None:
    """Samples a run's averaged weights, compares them with the reference and updates the run's report.

    Under torchrun all ranks draw; the main one judges, the others return None.

    Raises:
        UserError: no such run, figure or checkpoint, no reference images, settings that do not fit.
        WeightsUnavailable: weights that were asked for by name are not to be had.
    """
    config = runs.load_config(run)
    runs.read_metrics(run)  # what the numbers are added to: if it is damaged, that is said now, not after hours
    device = pick_device(request.settings.device)
    if not distributed.is_main():
        bar = _Mute()
    if request.figure is not None:
        request, config = _beside(request.figure, request, config, bar)
    settings = _with_defaults(request.settings, run, config, device, bar)
    if not distributed.is_main():
        sample_run(run, settings, bar)
        return None
    extractor = choose_extractor(request.extractor, settings.weights_dir, device, bar)
    reference, data = _reference(run, request)
    _check_before_drawing(run, request, extractor, reference, data)
    drawn = sample_run(run, settings, bar)
    result = _judge(drawn.images, reference, extractor, replace(request, settings=settings, data=data), bar)
    sampler = {k: v for k, v in drawn.settings.items() if k != "num"}
    entry = {
        "step": drawn.loaded.step,
        "sampler": sampler,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **({} if request.figure is None else {"figure": config.published}),
        **result,
    }
    _append_metrics(run, entry)
    return EvalResult(metrics=result["metrics"], report=write_run_report([run]))


def _check_before_drawing(
    run: Path, request: EvalRequest, extractor: Extractor, reference: str, data: str | None
) -> None:
    """What would fail after drawing fails now."""
    from trainer.evaluate.judge import NEED_FEATURES, chosen_metrics
    from trainer.evaluate.references import open_reference
    from trainer.sample import cache_summary

    chosen = chosen_metrics(request.metrics or None, extractor)
    resolution = int(cache_summary(run)["dataset"]["preprocessing"]["resolution"])
    open_reference(
        reference, extractor, resolution=resolution, need_features=bool(NEED_FEATURES & set(chosen)), data=data
    )


def evaluate_images(samples: str, request: EvalRequest, *, require_labels: bool, bar: Bar) -> EvalResult:
    """Judges images that are there already, by any code, and writes the numbers to ``<samples>.metrics.json``.

    Raises:
        UserError: no reference given; images of a wrong size or type, fewer than asked for, or without labels where they
            are required.
        WeightsUnavailable: as :func:`evaluate_run`.
    """
    if request.reference is None:
        raise UserError(
            "--samples needs something to be compared with",
            remedy="Pass --reference with an npz, a folder, a cache or saved statistics.",
        )
    settings = request.settings
    extractor = choose_extractor(request.extractor, settings.weights_dir, pick_device(settings.device), bar)
    result = _judge(samples, request.reference, extractor, request, bar, require_labels=require_labels)
    out = Path(f"{samples.rstrip('/')}.metrics.json")
    runs.write_page(out, json.dumps(result, indent=1))
    return EvalResult(metrics=result["metrics"], report=out)


def _judge(
    samples: str | Path,
    reference: str,
    extractor: Extractor,
    request: EvalRequest,
    bar: Bar,
    *,
    require_labels: bool = False,
) -> dict[str, Any]:
    import torch

    from trainer.evaluate.judge import evaluate

    with torch.inference_mode():
        result = evaluate(
            samples,
            reference,
            extractor,
            metrics=request.metrics or None,
            count=request.settings.num,
            batch_size=request.settings.batch_size,
            bootstrap=request.bootstrap,
            seed=request.settings.seed,
            require_labels=require_labels,
            data=request.data,
            progress=_stages(bar),
        )
    for warning in result["warnings"]:
        bar.note(warning)
    return result


def _stages(bar: Bar) -> Callable[[str, int, int | None], None]:
    """What the judge reports, as one task of the bar a stage."""
    stage, shown = "", 0

    def progress(name: str, done: int, total: int | None) -> None:
        nonlocal stage, shown
        if name != stage:
            stage, shown = name, 0
            bar.begin(f"features of the {name}" if name in ("samples", "reference") else name, total or 0)
        bar.advance(done - shown)
        shown = done

    return progress


def recipe_sampling(config: RunConfig) -> Sampling | None:
    """How the samples behind the recipe's published figures were drawn, if the run came from a recipe that says so."""
    return parse_published(config.published).sampling if config.published else None


def _beside(figure: str, request: EvalRequest, config: RunConfig, bar: Bar) -> tuple[EvalRequest, RunConfig]:
    """The request at the figure's step, with its sampler, and the run's configuration as if it came from that recipe."""
    recipe = load_recipe_file(figure)
    if recipe.published is None:
        raise UserError(
            f"{recipe.name} has no published figures", remedy="Type: trainer recipes   for those that have."
        )
    wanted = recipe.config()
    other = [
        key
        for key in recipe.values
        if key not in ("steps", "published") and getattr(config, key) != getattr(wanted, key)
    ]
    if other:
        verb = "differs" if len(other) == 1 else "differ"
        bar.note(f"the run was not trained as {recipe.training} says: its {', '.join(other)} {verb}")
    sampling = recipe.published.sampling or Sampling()
    asked = request.settings
    settings = replace(
        asked,
        sampler=asked.sampler or sampling.sampler,
        steps=asked.steps or sampling.steps,
        checkpoint=recipe.steps if asked.checkpoint is None else asked.checkpoint,
    )
    return replace(request, settings=settings), replace(config, published=recipe.values["published"])


def _with_defaults(asked: SampleSettings, run: Path, config: RunConfig, device: str, bar: Bar) -> SampleRequest:
    """What was not asked for: the recipe's, else the device's; on the CPU as many samples as a few minutes allow."""
    from trainer.sample import run_model_config

    on_gpu = device.startswith("cuda")
    model = run_model_config(run, config)
    paper = recipe_sampling(config) or Sampling()
    steps = asked.steps or (paper.steps or GPU_STEPS if on_gpu else CPU_STEPS)
    guidance = asked.guidance if asked.guidance is not None else paper.guidance
    if guidance is None:
        bar.note("the recipe's figures were drawn with guidance of a scale its paper does not give; drawing without")
        guidance = 1.0
    interval = asked.interval
    if interval is None:
        interval = paper.interval if guidance == paper.guidance else Interval()
    num = asked.num
    if num is None and on_gpu:
        num = GPU_SAMPLES
    elif num is None:
        cost = forward_flops(model) * steps * (1 if guidance == 1 else 2)
        num = int(max(8, min(CPU_SAMPLES, CPU_BUDGET_FLOPS // cost)))
        bar.note(
            f"on the CPU only {num} samples with {steps} steps; set --num and --steps, or use a GPU for {GPU_SAMPLES:,}"
        )
    sampler = asked.sampler or (paper.sampler if on_gpu else CPU_SAMPLERS[model.family])
    chosen = {"num": num, "sampler": sampler, "steps": steps, "guidance": guidance, "interval": interval}
    return SampleRequest(**{**vars(asked), **chosen, "device": device})


def choose_extractor(name: str, weights_dir: str | None, device: str, bar: Bar) -> Extractor:
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
    from trainer.sample import cache_summary

    if request.reference is not None:
        return request.reference, request.data
    summary = cache_summary(run)
    cache = runs.cache_path(run, summary)
    if not cache:
        raise UserError(
            f"{run} was imported and has no cache, so there are no images to compare with",
            remedy="Pass --reference with an npz, a folder of images or a cache.",
        )
    if not (Path(cache) / "zarr.json").is_file() and "://" not in cache:
        raise UserError(
            f"the cache of {run}, {cache}, is no longer there, so there are no images to compare with",
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


def _append_metrics(run: Path, entry: dict[str, Any]) -> None:
    """Adds an evaluation, replacing an earlier one of the same checkpoint with the same settings."""

    def identity(e: Mapping[str, Any]) -> tuple[Any, ...]:
        return (
            e.get("step"),
            json.dumps(e.get("sampler"), sort_keys=True),
            json.dumps(e.get("settings"), sort_keys=True),
        )

    entry = json.loads(json.dumps(entry))
    with locks.alone(run / "metrics.json"):
        kept = [e for e in runs.read_metrics(run) if identity(e) != identity(entry)]
        runs.write_text(run / "metrics.json", json.dumps([*kept, entry], indent=1))


def write_run_report(
    folders: Sequence[Path], out: Path | None = None, *, title: str | None = None, lead: str = ""
) -> Path:
    """The report of one run (by default its ``report.html``), or one page that compares several.

    The comparison goes to ``comparison.html`` in the first run's folder where ``out`` is None.

    Raises:
        UserError: a folder is not a run, or is named twice.
    """
    from trainer.report.data import load_run
    from trainer.report.report import write_comparison, write_report

    for folder in folders:
        runs.load_config(folder)
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is named twice", remedy="Name each run once.")
    data = [load_run(folder) for folder in folders]
    if len({run.name for run in data}) < len(data):
        data = [replace(run, name=str(folder)) for run, folder in zip(data, folders)]
    given: dict[str, Any] = {
        "title": title or " and ".join(_below_root(folder) for folder in folders),
        "lead": lead,
        "images": _reference_figures(folders[0]),
        "charts": [chart for folder, run in zip(folders, data) for chart in router_charts(folder, run.name)],
        "published": [figure for folder, run in zip(folders, data) for figure in _published(folder, run.name)],
    }
    if len(folders) == 1:
        return write_report(out or folders[0] / "report.html", data, **given)
    return write_comparison(out or folders[0] / "comparison.html", data, **given)


def _below_root(folder: Path) -> str:
    return str(folder.relative_to(runs.ROOT)) if folder.is_relative_to(runs.ROOT) else folder.name


def _reference_figures(folder: Path) -> list[Any]:
    """Real images of the run's cache in the order of the sample grid, and the PCA picture of what is cached."""
    import featcache
    from featcache.errors import CacheError
    from featcache.inspect import contact_sheet, images_of
    from trainer.report.page import Figure
    from trainer.sample import cache_summary, grid_classes

    try:
        summary = cache_summary(folder)
        cache = featcache.open(runs.cache_path(folder, summary))
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


def router_charts(folder: Path, name: str | None = None, points: int = 101) -> list[Any]:
    """AHPA's inter-group and intra-group weights over t at the latest checkpoint (AHPA, Fig. 5); empty for other methods."""
    import torch

    from trainer import checkpoint
    from trainer.align.base import FeatureInfo
    from trainer.report.report import router_chart
    from trainer.sample import cache_summary, run_model_config

    config = runs.load_config(folder)
    if config.methods != ("ahpa",) or not checkpoint.list_checkpoints(folder):
        return []
    from trainer import align
    from trainer.parts import backbone_info

    summary = cache_summary(folder)
    features = {name: FeatureInfo(shape=tuple(f["shape"])) for name, f in summary["features"].items()}
    info = backbone_info(config.model, run_model_config(folder, config))
    module: Any = align.build([("ahpa", config.method_config("ahpa"))], info, features)
    _, latest = checkpoint.find_checkpoint(folder)
    checkpoint.load_module(module, latest, "alignment")
    if config.method_config("ahpa").router == "content":
        return []  # its weights depend on the image, not on t alone
    t = torch.linspace(0, 1, points)
    with torch.no_grad():
        weights = module.router(t)
    groups = config.method_config("ahpa").groups
    name = name or runs.display_name(folder)
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


def _published(folder: Path, name: str) -> list[Any]:
    """The figures that a run's recipe carries from its paper, then those that it was evaluated beside, each once."""
    from trainer.report.table import Published

    config = runs.load_config(folder)
    entries = [config.published, *(e["figure"] for e in runs.read_metrics(folder) if "figure" in e)]
    figures = {}
    for entry in (parse_published(given) for given in entries if given):
        source = entry.source + (f": {entry.sampling}" if entry.sampling is not None else "")
        for metric, value in entry.metrics.items():
            figures[metric, source, value] = Published(metric=metric, value=float(value), source=source, run=name)
    return list(figures.values())
