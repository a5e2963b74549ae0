"""The report of a run, or of several: everything that its folder and its cache can show."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import featcache
from featcache.errors import CacheError, UserError
from featcache.inspect import draw_sheet, find_captions, find_source, pixels_of
from featcache.paths import PAGES, check_output
from featcache.sources.base import Source
from trainer import align
from trainer.align import split_methods
from trainer.align.ahpa import Ahpa
from trainer.align.base import FeatureInfo
from trainer.plots import Chart
from trainer.report.data import RunData, load_run
from trainer.report.judged import judged_samples
from trainer.report.page import Figure
from trainer.report.report import common_steps, router_chart, write_comparison, write_report
from trainer.report.same_noise import SameNoise
from trainer.report.sweeps import sweep_charts
from trainer.report.table import PublishedFigure, is_text
from trainer.runs import checkpoint
from trainer.runs import folder as runs
from trainer.runs.published import parse_published
from trainer.runs.recipes import figures_of, list_recipes
from trainer.runs.records import cache_summary, run_model_config
from trainer.runs.schemas import Summary
from trainer.sampling.grid import class_picture, first_of_classes, prompt_picture, prompts_shown
from trainer.training.state import backbone_info

if TYPE_CHECKING:
    from featcache.read.reader import Cache

REFERENCE_ROWS = 10  # of real images
CAPTIONED = 24


def write_run_report(
    folders: Sequence[Path],
    out: Path | None = None,
    *,
    title: str | None = None,
    lead: str = "",
    same_noise: SameNoise | None = None,
) -> Path:
    """The report of one run (by default its `report.html`), or one page that compares several.

    The comparison goes to `comparison.html` in the first run's folder where `out` is None. Samples of its runs from the same
    noise are those of training or of judging; where there are none, `same_noise` draws some.

    Raises:
        UserError: a folder is not a run, or is named twice; `out` is no name for a page.
    """
    if out is not None:
        check_output(out, PAGES, example="report.html")
    for folder in folders:
        runs.load_config(folder)
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is named twice", remedy="Name each run once.")
    data = [load_run(folder) for folder in folders]
    data = [replace(run, published=_published_curve(folder)) for folder, run in zip(folders, data)]
    if len({run.name for run in data}) < len(data):
        data = [replace(run, name=str(folder)) for run, folder in zip(data, folders)]
    given: dict[str, Any] = {
        "title": title or " and ".join(_below_root(folder) for folder in folders),
        "lead": lead,
        **_pictures(folders[0], data),
        "charts": [chart for folder, run in zip(folders, data) for chart in router_charts(folder, run.name)],
        "published": [figure for folder, run in zip(folders, data) for figure in _published(folder, run.name)],
    }
    if len(folders) == 1:
        given["charts"] += sweep_charts(folders[0])
        return write_report(out or folders[0] / "report.html", data, **given)
    drawn = None
    alike = common_steps(data) or any(judged.same_noise for judged in given["judged_samples"])
    if same_noise is not None and not alike:
        drawn = same_noise.draw(folders, [run.name for run in data])
    return write_comparison(out or folders[0] / "comparison.html", data, **given, drawn=drawn)


def _below_root(folder: Path) -> str:
    return str(folder.relative_to(runs.ROOT)) if folder.is_relative_to(runs.ROOT) else folder.name


def _pictures(folder: Path, data: Sequence[RunData]) -> dict[str, Any]:
    """Judged samples beside real images, or real images alone; and what is cached."""
    names, cache, source = _cache_of(folder)

    def real(classes: Sequence[int], count: int) -> Mapping[int, np.ndarray]:
        if cache is None:
            return {}
        try:
            labels = cache.labels()
            return _real_images(cache, source, {c: np.flatnonzero(labels == c)[:count] for c in classes})
        except (CacheError, UserError):
            return {}

    judged = judged_samples(data, names, real)
    figures = []
    if cache is not None:
        with contextlib.suppress(CacheError, UserError):
            if not judged and is_text(data[0]):
                figures.append(_captioned_figure(cache, source))
            elif not judged:
                shown = first_of_classes(cache.labels(), rows=REFERENCE_ROWS)
                figures.append(_real_figure(_real_images(cache, source, shown), names))
            figures.append(_sheet(cache, source))
    return {"images": figures, "judged_samples": judged}


def _cache_of(folder: Path) -> tuple[tuple[str, ...], Cache | None, Source | None]:
    """Names of a run's classes, its cache and that one's images; None for both where one is missing: the report shows what
    the run itself holds."""
    names: tuple[str, ...] = ()
    try:
        summary = cache_summary(folder)
        names = tuple(summary["dataset"]["class_names"])
        cache = featcache.open(runs.cache_path(folder, summary))
        source = find_source(cache, None)
        return names, cache if source is not None else None, source
    except (CacheError, UserError):
        return names, None, None


def _real_images(cache: Cache, source: Source | None, of: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Class -> its images at some positions, uint8 [n, R, R, 3]; classes without a position are left out.

    Raises:
        UserError: an image cannot be read.
    """
    positions = [int(i) for found in of.values() for i in found]
    if not positions:
        return {}
    pixels = pixels_of(cache, source, positions)
    ends = np.cumsum([len(found) for found in of.values()])
    return {label: part for label, part in zip(of, np.split(pixels, ends[:-1])) if len(part)}


def _real_figure(images: Mapping[int, np.ndarray], names: Sequence[str]) -> Figure:
    return Figure(
        image=class_picture(images, names),
        title="Real images",
        caption="From the training set, by class.",
        alt="Training images under the names of their classes",
        section="samples",
    )


def _captioned_figure(cache: Cache, source: Source | None) -> Figure:
    """The first images of a run on text, with their captions as far as these are to be had."""
    indices = prompts_shown(min(len(cache), CAPTIONED))
    found = find_captions(cache, indices)
    captions = [""] * len(indices) if found is None else [of[0] if of else "" for of in found]
    return Figure(
        image=prompt_picture(list(pixels_of(cache, source, indices)), captions),
        title="Real images",
        caption="From the training set, each with its first caption."
        if found is not None
        else "From the training set.",
        alt="Training images above their captions",
        section="samples",
    )


def _sheet(cache: Cache, source: Source | None) -> Figure:
    return Figure(
        image=np.asarray(draw_sheet(cache, source)),
        title="What the cache holds",
        caption="PCA of each cached layer as colours: the first three principal components over all tokens shown. "
        "Look for object outlines that get coarser and more uniform inside objects with depth.",
        alt="Principal components of cached VAE levels and encoder tokens beside their images",
        section="features",
        wide=True,
    )


def router_charts(folder: Path, name: str | None = None, points: int = 101) -> list[Chart]:
    """AHPA's weights between and within groups over t at the latest checkpoint (Fig. 5); empty for other methods."""
    config = runs.load_config(folder)
    if config.methods != ("ahpa",) or not checkpoint.list_checkpoints(folder):
        return []

    summary = cache_summary(folder)
    features = {name: FeatureInfo(shape=tuple(f["shape"])) for name, f in summary["features"].items()}
    info = backbone_info(config.model, run_model_config(folder, config))
    module = align.build([("ahpa", config.method_config("ahpa"))], info, features)
    assert isinstance(module, Ahpa)
    _, latest = checkpoint.find_checkpoint(folder)
    checkpoint.load_module(module, latest, "alignment")
    if module.config.router == "content":
        return []  # its weights depend on the image, not on t alone
    t = torch.linspace(0, 1, points)
    with torch.no_grad():
        weights = module.router(t)
    groups = module.config.groups
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


def features_layers(summary: Summary, feature: str, count: int) -> list[str]:
    """Names of a VAE group's layers; numbers where a regrouping left the recorded ones behind."""
    recorded = summary["features"].get(feature)
    named = recorded.get("layers", []) if recorded is not None else []
    return list(named) if len(named) == count else [f"layer {i + 1}" for i in range(count)]


def _published_curve(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What the paper gives for a run's training at any step, of samples drawn as its own figures were."""
    config = runs.load_config(folder)
    if not config.published:
        return {}
    own, points = parse_published(config.published), dict[str, list[tuple[int, float]]]()
    for row in list_recipes():
        if (
            row.published != own
            or row.model != config.model
            or split_methods(row.method) != split_methods(config.method)
        ):
            continue
        for figure in figures_of(row):
            if figure.published is not None and figure.published.sampling == own.sampling:
                for metric, value in figure.published.metrics.items():
                    points.setdefault(metric, []).append((figure.steps, float(value)))
        break
    return points


def _published(folder: Path, name: str) -> list[PublishedFigure]:
    """The figures that a run's recipe carries from its paper, then those that it was evaluated beside, each once."""
    config = runs.load_config(folder)
    entries = [config.published, *(e["figure"] for e in runs.read_metrics(folder) if "figure" in e)]
    figures = {}
    for entry in (parse_published(given) for given in entries if given):
        source = entry.source + (f": {entry.sampling}" if entry.sampling is not None else "")
        prompts = None if entry.sampling is None else entry.sampling.prompts
        for metric, value in entry.metrics.items():
            figures[metric, source, value] = PublishedFigure(
                metric=metric, value=float(value), source=source, run=name, prompts=prompts
            )
    return list(figures.values())
