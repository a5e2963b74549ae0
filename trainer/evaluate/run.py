"""From a run to its numbers: sample, judge, write `metrics.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from featcache.errors import CacheError, UserError, WeightsUnavailable
from featcache.inspect import find_images
from featcache.machine import pick_device
from featcache.paths import typed
from featcache.progress import QUIET, Progress
from featcache.redact import redact
from featcache.settings import to_mapping
from trainer import distributed
from trainer.evaluate.extractors import build_extractor
from trainer.evaluate.images import CacheImages, FolderImages, open_images
from trainer.evaluate.judge import NEED_FEATURES, chosen_metrics, evaluate
from trainer.evaluate.prompt_sets import known_prompts
from trainer.evaluate.prompted import PromptJudge, build_prompt_judges, judge_prompts, split_metrics
from trainer.evaluate.references import Statistics, full_precision, open_reference, reference_statistics
from trainer.evaluate.shelf import Shelf
from trainer.models import forward_flops
from trainer.requests import EvalRequest, SampleRequest, SampleSettings
from trainer.runs import folder as runs
from trainer.runs import locks
from trainer.runs.cache import cache_of_run
from trainer.runs.config import RunConfig
from trainer.runs.published import OTHER_FOLDERS, PROMPTS, REFERENCES, Published, Sampling, parse_published
from trainer.runs.recipes import load_figure
from trainer.runs.records import cache_summary, run_model_config
from trainer.sampling.prompts import Prompts, of_settings, prompts_for
from trainer.sampling.run import check_dropout, sample_run

if TYPE_CHECKING:
    from trainer.evaluate.extractors import Extractor

GPU_SAMPLES, GPU_STEPS = 50_000, 250  # the papers' protocol, with the family's default sampler
CPU_SAMPLES, CPU_STEPS = 512, 32
CPU_SAMPLERS = {"sit": "ode", "dit": "ddim"}
CPU_BUDGET_FLOPS = 20e12  # some minutes on two cores


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """The numbers by the names they are reported under, and the JSON file that holds them."""

    metrics: Mapping[str, float]
    file: Path


@dataclass(frozen=True, kw_only=True)
class Standard:
    """What samples of a run are judged by, made once for any number of judgements.

    extractor, metrics: those that compare with a reference; None and none where only prompts are judged by.
    reference: where it is, or `known`, its statistics. own: it is the run's cache. data: of a cache, the folder of its
    images. stamp: what tells that a file, a folder or a cache under the same name is another one. shelf: where statistics of
    the reference are kept. crop: of the run's images, as its cache names it, by which a folder's images are cropped, too.
    prompts: of samples drawn by prompt. judges: by metrics of prompts.
    """

    extractor: Extractor | None = None
    metrics: Sequence[str] = ()
    reference: str | None = None
    own: bool = False
    data: str | None = None
    known: Statistics | None = None
    stamp: object = None
    shelf: Shelf | None = None
    crop: str | None = None
    prompts: Prompts | None = None
    judges: Mapping[str, PromptJudge] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """What decides numbers of equal samples, but the reference. JSON-able."""
        by_prompt = {"judges": {name: dict(judge.provenance) for name, judge in self.judges.items()}}
        return {
            "extractor": None if self.extractor is None else dict(self.extractor.provenance),
            "metrics": list(self.metrics),
            **(by_prompt if self.judges else {}),
            **({} if self.prompts is None else {"prompts": self.prompts.sha256}),
        }


def evaluate_run(
    run: Path, request: EvalRequest, progress: Progress, *, standard: Standard | None = None
) -> EvalResult | None:
    """Samples a run's averaged weights, compares with the reference and adds the numbers to the run's `metrics.json`.

    Under torchrun all ranks draw; the main one judges, the others return None.

    Args:
        standard: what to judge by, instead of what the request says.

    Raises:
        UserError: no such run, figure or checkpoint, no reference images, settings that do not fit.
        WeightsUnavailable: weights that were asked for by name are not to be had.
    """
    config = runs.load_config(run)
    runs.read_metrics(run)  # what the numbers are added to: if it is damaged, that is said now, not after hours
    device = pick_device(request.settings.device)
    if not distributed.is_main():
        progress = QUIET
    if request.figure is not None:
        request, config = beside_figure(request.figure, request, config, progress)
    prompts = standard.prompts if standard is not None else prompts_for(run, config, request.settings)
    settings = with_defaults(request.settings, run, config, device, progress, figure=request.figure, prompts=prompts)
    if not distributed.is_main():
        sample_run(run, settings, progress, prompts=prompts)
        return None
    standard = standard or standard_of(run, request, settings, config, device, progress, prompts=prompts)
    drawn = sample_run(run, settings, progress, prompts=prompts)
    result = judge(drawn.images, standard, replace(request, settings=settings), progress)
    sampler = {k: v for k, v in drawn.settings.items() if k != "num"}
    entry = {
        "step": drawn.loaded.step,
        "sampler": sampler,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "asked": asked(settings, request, standard, device),
        **({} if request.figure is None else {"figure": config.published}),
        **result,
    }
    _append_metrics(run, entry)
    return EvalResult(metrics=result["metrics"], file=run / "metrics.json")


def standard_of(
    run: Path,
    request: EvalRequest,
    settings: SampleRequest,
    config: RunConfig,
    device: str,
    progress: Progress,
    *,
    prompts: Prompts | None,
) -> Standard:
    """What a request judges by; what would fail after drawing fails now. prompts: what `prompts_for` gave for it."""
    compared, of_prompts = split_metrics(request.metrics, prompts, subject=str(run))
    standard = _by_prompts(prompts, of_prompts, settings, device, progress)
    _check_prompts(prompts, recipe_sampling(config), progress)
    if compared == ():
        return standard
    extractor = choose_extractor(request.extractor, settings.weights_dir, device, progress)
    chosen = chosen_metrics(compared, extractor)
    reference, data = choose_reference(run, request, config, progress)
    resolution = int(_preprocessing(run)["resolution"])
    need = _need_features(chosen)
    _, images = open_reference(reference, extractor, resolution=resolution, need_features=need, data=data)
    path = Path(reference)
    own = request.reference is None and not path.is_file()
    stamp: object = cache_summary(run)["fingerprint"] if own else None
    if path.is_file():
        stamp = [path.stat().st_size, path.stat().st_mtime_ns]
    elif not own and isinstance(images, CacheImages | FolderImages):
        stamp = images.identity
    shelf = Shelf.of_user(progress) if request.reference is None else None
    return replace(
        standard,
        extractor=extractor,
        metrics=chosen,
        reference=reference,
        own=own,
        data=data,
        stamp=stamp,
        shelf=shelf,
        crop=_preprocessing(run).get("crop"),
    )


def _check_prompts(prompts: Prompts | None, published: Sampling | None, progress: Progress) -> None:
    """Says so where a recipe's figures are of other prompts."""
    wanted = None if published is None else published.prompts
    if wanted is not None and prompts is not None and known_prompts(prompts.source) != wanted:
        flags, described = PROMPTS[wanted]
        progress.note(f"the recipe's figures are of {described}: for numbers that may stand beside them type {flags}")


def _preprocessing(run: Path) -> Mapping[str, Any]:
    """How the run's images were made, as its cache says."""
    found: Mapping[str, Any] = cache_summary(run)["dataset"]["preprocessing"]
    return found


def _by_prompts(
    prompts: Prompts | None, metrics: Sequence[str], settings: SampleSettings, device: str, progress: Progress
) -> Standard:
    """What judges by prompts alone; says which prompts they are."""
    if prompts is None:
        return Standard()
    judges = build_prompt_judges(metrics, weights_dir=settings.weights_dir, device=device)
    used = prompts.texts[: settings.num]
    for judge in judges.values():
        judge.check(used)
    number = (
        f"the first {len(used):,} of {len(prompts.texts):,}" if len(used) < len(prompts.texts) else f"{len(used):,}"
    )
    progress.note(
        f"{settings.num or 'all'} samples of {number} prompts: {prompts.source}, digest {prompts.sha256[:12]}"
    )
    if prompts.remark is not None:
        progress.note(prompts.remark)
    return Standard(prompts=prompts, judges=judges)


def _need_features(metrics: Sequence[str]) -> bool:
    return bool(NEED_FEATURES & set(metrics))


def with_statistics(standard: Standard, request: EvalRequest, run: Path, progress: Progress) -> Standard:
    """With the reference's statistics, for several judgements by them."""
    if standard.extractor is None or standard.reference is None:
        return standard
    with torch.inference_mode(), full_precision():
        known = reference_statistics(
            standard.reference,
            standard.extractor,
            resolution=int(_preprocessing(run)["resolution"]),
            need_features=_need_features(standard.metrics),
            crop=standard.crop,
            batch_size=request.settings.batch_size,
            data=standard.data,
            shelf=standard.shelf,
            progress=progress,
        )
    return replace(standard, known=known)


def judge(
    images: Path | str, standard: Standard, request: EvalRequest, progress: Progress, *, require_labels: bool = False
) -> dict[str, Any]:
    """What is found of samples; the entry of `metrics.json` but for how they were drawn.

    Raises:
        UserError: images of a wrong size or type, fewer than asked for, or without labels where they are required.
    """
    settings, parts = request.settings, []
    with torch.inference_mode():
        if standard.extractor is not None:
            against = standard.known or standard.reference
            assert against is not None, "an extractor compares with something"
            found = evaluate(
                images,
                against,
                standard.extractor,
                metrics=standard.metrics,
                count=settings.num,
                batch_size=settings.batch_size,
                bootstrap=request.bootstrap,
                seed=settings.seed,
                require_labels=require_labels,
                data=standard.data,
                shelf=standard.shelf,
                crop=standard.crop,
                by_prompt=standard.prompts is not None,
                progress=progress,
            )
            parts.append(found)
        if standard.prompts is not None and standard.judges:
            found = judge_prompts(
                open_images(images, by_name=True),
                standard.prompts,
                standard.judges,
                count=settings.num,
                batch_size=settings.batch_size,
                bootstrap=request.bootstrap,
                seed=settings.seed,
                progress=progress,
            )
            parts.append(found)
    result: dict[str, Any] = {key: {k: v for part in parts for k, v in part[key].items()} for key in _BY_NAME}
    result["warnings"] = [warning for part in parts for warning in part["warnings"]]
    if standard.prompts is not None:
        result["settings"]["prompts"] = standard.prompts.record()
    for warning in result["warnings"]:
        progress.note(warning)
    return result


_BY_NAME = ("metrics", "intervals", "details", "settings", "time_s")


# Of a request, what moves no number, or is the point of the curve.
_UNASKED = ("checkpoint", "out", "format", "weights_dir", "device", "prompt", "prompts")


def asked(settings: SampleRequest, request: EvalRequest, standard: Standard, device: str) -> dict[str, Any]:
    """Everything that decides the numbers but the checkpoint: equal for judgements that make one curve."""
    drawn = {key: value for key, value in to_mapping(settings).items() if key not in _UNASKED}
    return dict(
        runs.as_json(
            {
                **drawn,
                "device": device.partition(":")[0],
                **standard.record(),
                "bootstrap": request.bootstrap,
                "reference": None if standard.reference is None else redact(standard.reference),
                "stamp": standard.stamp,
            }
        )
    )


def choose_reference(run: Path, request: EvalRequest, config: RunConfig, progress: Progress) -> tuple[str, str | None]:
    """What samples are compared with, and the folder of its images: see `EvalRequest.reference`; says so.

    Raises:
        UserError: there are no images to compare with.
    """
    published = recipe_sampling(config) or Sampling()
    file, described = REFERENCES[published.reference] if published.reference is not None else (None, "")
    if request.reference is None and file is not None:
        found = Path(request.settings.weights_dir or ".") / file
        if request.settings.weights_dir is not None and found.is_file():
            progress.note(f"compared with {found}, {described}, as the recipe's figures were")
            return str(found), request.data
    reference, data = _reference(run, request)
    if request.reference is None:
        beside = f", which are in {data}" if data is not None else ""
        progress.note(redact(f"compared with the images of {reference}{beside}"))
        pass_on = file if file is not None else OTHER_FOLDERS.get(published.reference or "")
        if pass_on is not None:
            progress.note(
                f"the recipe's figures were compared with {described}: for numbers that may stand beside them type "
                f"--reference {pass_on}"
            )
    return reference, data


def evaluate_images(samples: str, request: EvalRequest, *, require_labels: bool, progress: Progress) -> EvalResult:
    """Judges images that are there already, by any code, and writes the numbers to `<samples>.metrics.json`.

    Raises:
        UserError: no reference given; images of a wrong size or type, fewer than asked for, or without labels where
            they are required.
        WeightsUnavailable: as `evaluate_run`.
    """
    settings, device = request.settings, pick_device(request.settings.device)
    prompts = of_settings(settings)
    compared, of_prompts = split_metrics(request.metrics, prompts, subject=f"--samples {samples}")
    standard = _by_prompts(prompts, of_prompts, settings, device, progress)
    if compared != () and request.reference is None:
        raise UserError(
            "--samples needs something to be compared with",
            remedy="Pass --reference with an npz, a folder, a cache or saved statistics.",
        )
    if compared != ():
        extractor = choose_extractor(request.extractor, settings.weights_dir, device, progress)
        chosen = chosen_metrics(compared, extractor)
        standard = replace(
            standard, extractor=extractor, metrics=chosen, reference=request.reference, data=request.data
        )
    result = judge(samples, standard, request, progress, require_labels=require_labels)
    out = Path(f"{samples.rstrip('/')}.metrics.json")
    runs.write_page(out, json.dumps(result, indent=1))
    return EvalResult(metrics=result["metrics"], file=out)


def recipe_figures(config: RunConfig) -> Published | None:
    """What the paper reports for the recipe that a run came from; None if it came from none."""
    return parse_published(config.published) if config.published else None


def recipe_sampling(config: RunConfig) -> Sampling | None:
    """How the samples behind the recipe's published figures were drawn, if the run came from a recipe that says so."""
    published = recipe_figures(config)
    return published.sampling if published is not None else None


def beside_figure(
    figure: str, request: EvalRequest, config: RunConfig, progress: Progress
) -> tuple[EvalRequest, RunConfig]:
    """The request at the figure's step and with its sampler; the run's configuration as if it came from that recipe."""
    recipe = load_figure(figure)
    assert recipe.published is not None
    wanted, config = recipe.config().settled(), config.settled()
    other = [
        key
        for key in recipe.values
        if key not in ("steps", "published") and getattr(config, key) != getattr(wanted, key)
    ]
    if other:
        verb = "differs" if len(other) == 1 else "differ"
        progress.note(f"the run was not trained as {recipe.training} says: its {', '.join(other)} {verb}")
    sampling = recipe.published.sampling or Sampling()
    asked = request.settings
    settings = replace(
        asked,
        sampler=asked.sampler or sampling.sampler,
        steps=asked.steps or sampling.steps,
        checkpoint=recipe.steps if asked.checkpoint is None else asked.checkpoint,
    )
    return replace(request, settings=settings), replace(config, published=recipe.values["published"])


def with_defaults(
    asked: SampleSettings,
    run: Path,
    config: RunConfig,
    device: str,
    progress: Progress,
    *,
    figure: str | None = None,
    prompts: Prompts | None = None,
) -> SampleRequest:
    """What was not asked for: the recipe's, else the device's; on the CPU as many samples as a few minutes allow.

    prompts: what `prompts_for` gave for `asked`; of them there is one sample each.

    Raises:
        UserError: the recipe's figures were drawn with guidance of a scale that its paper does not give, and none is
            asked for; or guidance of a run that was never trained without classes.
    """
    on_gpu = device.startswith("cuda")
    model = run_model_config(run, config)
    published = recipe_figures(config)
    paper = (published.sampling if published is not None else None) or Sampling()
    steps = asked.steps or (paper.steps or GPU_STEPS if on_gpu else CPU_STEPS)
    sampler = asked.sampler or (paper.sampler if on_gpu else CPU_SAMPLERS[model.family])
    given = {**vars(asked), "sampler": sampler, "steps": steps, "device": device}
    if published is not None:
        command = f"trainer eval {typed(run)}" + (f" --figure {typed(figure)}" if figure is not None else "")
        command += f" --prompts {typed(asked.prompts)}" if asked.prompts is not None else ""
        chosen = published.settings(given, command)
        if asked.guidance is None and paper.guidance is not None:
            for other in paper.variants:
                progress.note(f"the recipe's figures may have been drawn otherwise, {other.why}: {other.flags}")
    else:
        chosen = paper.settings(given)
    num = asked.num
    if num is None and on_gpu:
        num = paper.num or (GPU_SAMPLES if prompts is None else max(2, len(prompts.texts)))
    elif num is None:
        unguided = chosen["guidance"] == chosen["representation_guidance"] == 1
        cost = forward_flops(model) * steps * (1 if unguided else 2)
        num = int(max(8, min(CPU_SAMPLES, CPU_BUDGET_FLOPS // cost)))
        usual = GPU_SAMPLES if prompts is None else len(prompts.texts)
        if prompts is None or num < usual:
            progress.note(
                f"on the CPU only {num} samples with {steps} steps; set --num and --steps, or use a GPU for {usual:,}"
            )
        num = num if prompts is None else min(num, max(2, usual))
    request = SampleRequest(**{**chosen, "num": num})
    check_dropout(request, run, config)
    if prompts is None and model.text is None and str(request.classes) == "balanced" and num < model.num_classes:
        progress.note(
            f"{num} samples are of the first {num} of {model.num_classes:,} classes, and the reference is of all: draw "
            f"--num {model.num_classes} or more, or --classes random"
        )
    return request


def choose_extractor(name: str, weights_dir: str | None, device: str, progress: Progress) -> Extractor:
    """The extractor of that name; `auto` is Inception where its weights are to be had, else the embedded one."""
    folder = None if weights_dir is None else Path(weights_dir)
    if name != "auto":
        return build_extractor(name, weights_dir=folder, device=device)
    try:
        return build_extractor("inception", weights_dir=folder, device=device)
    except WeightsUnavailable as error:
        progress.note(
            f"{error.what}; judging with the embedded extractor: its numbers are named embedded-* and are not FID"
        )
        return build_extractor("embedded", device=device)


def _reference(run: Path, request: EvalRequest) -> tuple[str, str | None]:
    """What to compare with: `--reference`, else the cache's own images. Returns (where, data folder)."""
    if request.reference is not None:
        return request.reference, request.data
    summary = cache_summary(run)
    cache = runs.cache_path(run, summary)
    if not cache:
        raise UserError(
            f"{run} was imported and has no cache, so there are no images to compare with",
            remedy="Pass --reference with an npz, a folder of images or a cache.",
        )
    try:
        opened = cache_of_run(run)
    except CacheError as error:
        raise CacheError(
            f"{error.what}: so there are no images to compare with",
            remedy="Bring the cache back, or pass --reference with an npz, a folder of images or a cache.",
        ) from error
    found = find_images(opened, request.data)
    if found is None:
        raise UserError(
            "no images to compare with: the cache holds features, and the images it was made from were not found (looked "
            "for in --data, $FEATCACHE_DATA, ./data/imagenet, and where they lay when it was built)",
            remedy="Type: trainer eval --data /path/to/images   (the ones the cache was built from), or pass --reference",
        )
    return cache, found[0]


def _append_metrics(run: Path, entry: dict[str, Any]) -> None:
    """Adds an evaluation, replacing an earlier one of the same checkpoint with the same settings."""

    def identity(e: Mapping[str, Any]) -> tuple[Any, ...]:
        return (
            e.get("step"),
            json.dumps(e.get("sampler"), sort_keys=True),
            json.dumps(e.get("settings"), sort_keys=True),
        )

    entry = runs.as_json(entry)
    with locks.alone(run / "metrics.json"):
        kept = [e for e in runs.read_metrics(run) if identity(e) != identity(entry)]
        runs.write_text(run / "metrics.json", json.dumps([*kept, entry], indent=1))
