"""One checkpoint judged at many values of a setting of its guidance: a curve, and where it is best.

All points share noise, labels, number of samples and judge. A point is drawn, judged and written to the sweep's file, and
then its samples are removed: a sweep that was cut off goes on with the point, and the block of samples, that it was at, and a
wider one adds points to the same file. What points have in common is computed once: the steps before guidance acts
(`trainer.sampling.trunk`) and the reference's statistics. A point without guidance takes one evaluation a step, others two
where guidance acts. Nothing else can be shared: after the first guided step the states differ, and with them what the model
says of them, also without a label.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.console import time_text
from featcache.errors import UserError
from featcache.machine import pick_device
from featcache.progress import QUIET, Progress
from featcache.redact import redact
from featcache.store import files
from trainer import distributed
from trainer.averages import Average
from trainer.evaluate import run as evaluation
from trainer.evaluate.prompt_sets import PromptSet
from trainer.evaluate.table import higher_is_better, in_words
from trainer.interval import Interval, plain
from trainer.requests import EvalRequest, SampleRequest, SampleSettings
from trainer.runs import folder as runs
from trainer.runs import locks, schemas
from trainer.runs.published import Sampling
from trainer.runs.records import run_model_config
from trainer.runs.snapshots import find_weights
from trainer.sampling.draw import check_sampler, sampling_times
from trainer.sampling.inference import choose_arithmetic
from trainer.sampling.prompts import Prompts, prompts_for
from trainer.sampling.run import sample_run
from trainer.sweep import Sweep

if TYPE_CHECKING:
    from trainer.runs.config import RunConfig

FOLDER = "sweeps"
_BY_REFERENCE = "chosen by the reference that it is measured against, as the papers choose theirs"
_BY_PROMPTS = "chosen by the prompts and the judge that it is measured by"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One value of the setting, and the numbers there by the names they are reported under."""

    value: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What a sweep found. common: what all points share. points: ascending, at least one. prompts: what its samples were
    drawn for, in words; empty for classes."""

    setting: str
    step: int
    common: Mapping[str, Any]
    points: Sequence[Point]
    prompts: str = ""

    @property
    def deciding(self) -> str:
        """The metric that decides which point is best: the FID or its like, else the first."""
        names = [name for name in self.points[0].metrics if all(name in point.metrics for point in self.points)]
        distances = [name for name in names if name.endswith(("FID", "FD-DINOv2")) and not name.endswith("sFID")]
        return (distances or names or list(self.points[0].metrics))[0]

    @property
    def best(self) -> Point:
        """The point with the best value of the metric that decides."""
        name = self.deciding
        known = [point for point in self.points if name in point.metrics]
        return (max if higher_is_better(name) else min)(known, key=lambda point: point.metrics[name])

    @property
    def remark(self) -> str:
        """What is to be said of choosing a point so."""
        return _BY_REFERENCE if in_words(self.deciding) is None else _BY_PROMPTS


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """The curve, and the JSON file that holds it."""

    curve: Curve
    file: Path


def read_curves(run: Path) -> list[Curve]:
    """All sweeps of a run, by file name.

    Raises:
        UserError: a damaged file.
    """
    folder = files.inside(run, FOLDER)
    found = [_read(path) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []
    return [_curve(content) for content in found if content is not None]


def _read(path: Path) -> schemas.Sweep | None:
    """What a sweep's file holds; None where there is none yet."""
    remedy = "Remove it; trainer eval --sweep makes it again."
    content = runs.read_json(path, {}, remedy=remedy)
    return schemas.check(content, schemas.Sweep, path, remedy=remedy) if content else None


def _curve(content: schemas.Sweep) -> Curve:
    points = [Point(value=point["value"], metrics=point["metrics"]) for point in content["points"]]
    points.sort(key=lambda point: point.value)
    judged = PromptSet.of(content["points"][0])
    return Curve(
        setting=content["setting"],
        step=content["step"],
        common=content["common"],
        points=points,
        prompts="" if judged is None else str(judged),
    )


def sweep_run(run: Path, request: EvalRequest, progress: Progress) -> SweepResult | None:
    """Judges a run at every value of `request.sweep` and writes `RUN/sweeps/<name>.json`; what is there already stays.

    Under torchrun all ranks draw; the main one judges, the others return None.

    Raises:
        UserError: as `trainer.evaluate.run.evaluate_run`; a setting that is both swept and given, or an interval to be
            swept without guidance.
    """
    assert request.sweep is not None
    sweep, config = request.sweep, runs.load_config(run)
    device = pick_device(request.settings.device)
    if not distributed.is_main():
        progress = QUIET
    if request.figure is not None:
        request, config = evaluation.beside_figure(request.figure, request, config, progress)
    prompts = prompts_for(run, config, request.settings)
    base = _base(request.settings, sweep, run, config, device, progress, prompts)
    step = find_weights(run, config, base.checkpoint, Average.parse(base.weights)).step
    base = replace(base, checkpoint=step)
    points = {value: _at(base, sweep, value) for value in sweep.values}
    common = _common(run, base, sweep, device, step)
    # One group for all points: the ranks that do not judge wait for the one that does.
    with distributed.joined(device, patience=distributed.JUDGING):
        if not distributed.is_main():
            _draw_all(run, files.inside(run, f"{FOLDER}/{distributed.from_main('')}.json"), points, prompts)
            return None
        standard = evaluation.standard_of(run, request, base, config, device, progress, prompts=prompts)
        request = replace(request, settings=base)
        common |= _judging(request, standard)
        digest = hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()[:10]
        name = distributed.from_main(f"{sweep.setting}-step_{step:07d}-{digest}")
        file, folder = files.inside(run, f"{FOLDER}/{name}.json"), files.inside(run, f"{FOLDER}/{name}")
        busy = "Wait until it has ended, and type the same command again: what it has judged is kept."
        with locks.hold(folder, "a sweep", remedy=busy):
            judge = _Judge(run, request, standard, progress)
            curve = _judge_all(file, points, sweep, common, judge, run, progress, prompts)
        files.remove_tree(folder)
    return SweepResult(curve=curve, file=file)


def _base(
    asked: SampleSettings,
    sweep: Sweep,
    run: Path,
    config: RunConfig,
    device: str,
    progress: Progress,
    prompts: Prompts | None,
) -> SampleRequest:
    """What all points have in common, with the interval and channels of the recipe also where its scale is what is swept."""
    given = "guidance" if sweep.setting == "guidance" else "interval"
    if getattr(asked, given) is not None:
        raise UserError(
            f"--{given} and --sweep {sweep.setting} were both given: the sweep sets it", remedy=f"Leave --{given} out."
        )
    if asked.representation_guidance not in (None, 1):
        raise UserError(
            "--sweep is of classifier-free guidance, and --representation-guidance takes its place",
            remedy="Leave --representation-guidance out.",
        )
    paper = evaluation.recipe_sampling(config) or Sampling()
    if sweep.setting == "guidance":
        scale = paper.guidance if paper.guidance not in (None, 1) else max(sweep.values)
        asked = replace(asked, guidance=scale, representation_guidance=1.0)
    base = evaluation.with_defaults(asked, run, config, device, progress, prompts=prompts)
    if sweep.setting != "guidance" and base.guidance == 1:
        raise UserError(
            f"--sweep {sweep.setting} is of the times in which to guide, and these samples are not guided",
            remedy=f"Add a scale: --guidance 1.8 --sweep {sweep}",
        )
    return base


def _at(base: SampleRequest, sweep: Sweep, value: float) -> SampleRequest:
    """One point.

    Raises:
        UserError: an interval whose ends lie the wrong way around.
    """
    if sweep.setting == "guidance":
        # Streams are guided where the latents are, so without guidance of those nothing is.
        return replace(base, guidance=value, stream_guidance=None if value == 1 else base.stream_guidance)
    low, high = base.interval.low, base.interval.high
    return replace(base, interval=Interval(value, high) if sweep.setting == "interval_low" else Interval(low, value))


def _common(run: Path, base: SampleRequest, sweep: Sweep, device: str, step: int) -> dict[str, Any]:
    """What all points share of how they are drawn. JSON-able."""
    sampler = check_sampler(run_model_config(run, runs.load_config(run)).family, base.sampler)
    sampling_times(sampler, base.steps, base.shift)
    ends = {"low": base.interval.low, "high": base.interval.high}
    fixed: dict[str, Any] = {key: end for key, end in ends.items() if sweep.setting != f"interval_{key}"}
    fixed |= {} if sweep.setting == "guidance" else {"guidance": base.guidance}
    return {
        "checkpoint": step,
        "weights": str(base.weights),
        "sampler": sampler,
        "steps": base.steps,
        "shift": base.shift,
        "num": base.num,
        "seed": base.seed,
        "classes": str(base.classes),
        "pixels": base.pixels,
        "guided_channels": base.guided_channels,
        "stream_guidance": base.stream_guidance,
        **fixed,
        **asdict(choose_arithmetic(device, base.precision, base.compile)),
    }


def _judging(request: EvalRequest, standard: evaluation.Standard) -> dict[str, Any]:
    """What all points share of how they are judged. JSON-able."""
    compared: dict[str, Any] = {"reference": "the run's cache"}
    if not standard.own and standard.reference is not None:
        compared = {"reference": redact(standard.reference)}
        compared |= {} if standard.stamp is None else {"stamp": standard.stamp}
    return {**standard.record(), **compared, "bootstrap": request.bootstrap}


class _Judge:
    """Judges samples of all points by one reference, whose statistics are taken once."""

    def __init__(self, run: Path, request: EvalRequest, standard: evaluation.Standard, progress: Progress) -> None:
        self._run, self._request, self._standard, self._progress = run, request, standard, progress

    def __call__(self, images: Path) -> dict[str, Any]:
        if self._standard.known is None:
            self._standard = evaluation.with_statistics(self._standard, self._request, self._run, self._progress)
        return evaluation.judge(images, self._standard, self._request, self._progress)


def _order(points: Mapping[float, SampleRequest]) -> list[float]:
    """Those guided from the first before those guided later, whose common steps go on from theirs; what is not guided at
    all comes last, for the same reason. Else ascending."""

    def key(value: float) -> tuple[bool, float, float]:
        point = points[value]
        return point.guidance == 1, -point.interval.high, value

    return sorted(points, key=key)


def _shared(points: Mapping[float, SampleRequest]) -> bool:
    """Whether some steps come before guidance at any point, for more than one of them."""
    return len(points) > 1 and any(point.interval.high < 1 for point in points.values())


def _draw_all(run: Path, file: Path, points: Mapping[float, SampleRequest], prompts: Prompts | None) -> None:
    """The share of a rank that does not judge, of the points that are left."""
    left = _left(file, points)
    for value in _order(left):
        _draw(run, file.with_suffix(""), points, value, QUIET, prompts)


def _left(file: Path, points: Mapping[float, SampleRequest]) -> dict[float, SampleRequest]:
    """Points that have not been judged. All ranks ask before any draws, so that all get the same."""
    content = _read(file)
    done = {point["value"] for point in content["points"]} if content is not None else set()
    return {value: point for value, point in points.items() if value not in done}


def _draw(
    run: Path,
    folder: Path,
    points: Mapping[float, SampleRequest],
    value: float,
    progress: Progress,
    prompts: Prompts | None,
) -> tuple[Path, dict[str, Any]]:
    """The samples of a point, and how they were drawn."""
    trunk = folder / "trunk" if _shared(points) else None
    request = replace(points[value], out=folder / plain(value))
    drawn = sample_run(run, request, progress, trunk=trunk, prompts=prompts)
    return drawn.images, {k: v for k, v in drawn.settings.items() if k != "num"}


class _Named:
    """Progress of one point: its tasks are named after it."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._name = progress, name

    def begin(self, name: str, total: int | None, *, done: int = 0, unit: str = "images") -> None:
        self._progress.begin(f"{self._name}: {name}", total, done=done, unit=unit)

    def update(self, count: int, text: str = "") -> None:
        self._progress.update(count, text)

    def note(self, text: str) -> None:
        self._progress.note(text)


def _judge_all(
    file: Path,
    points: Mapping[float, SampleRequest],
    sweep: Sweep,
    common: Mapping[str, Any],
    judge: Callable[[Path], dict[str, Any]],
    run: Path,
    progress: Progress,
    prompts: Prompts | None,
) -> Curve:
    folder, left = file.with_suffix(""), _left(file, points)
    done = len(points) - len(left)
    if done:
        progress.note(f"{done} of {len(points)} points are in {file} already")
    order, costs = _order(left), {value: _cost(point) for value, point in left.items()}
    began = time.monotonic()
    for number, value in enumerate(order, start=1):
        at = f"{sweep.setting} {plain(value)}"
        named = _Named(progress, f"{at} ({done + number}/{len(points)})")
        images, sampler = _draw(run, folder, points, value, named, prompts)
        result = judge(images)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        _add(file, sweep, common, {"value": value, "sampler": sampler, "date": now, **result})
        files.remove_tree(folder / plain(value))
        rate = (time.monotonic() - began) / sum(costs[v] for v in order[:number])
        ahead = sum(costs[v] for v in order[number:]) * rate
        numbers = ", ".join(f"{name} {measured:.4g}" for name, measured in result["metrics"].items())
        left_over = f"; {len(order) - number} points left, about {time_text(ahead)}" if number < len(order) else ""
        progress.note(f"{at}: {numbers}{left_over}")
    content = _read(file)
    assert content is not None, "a sweep has points"
    return _curve(content)


def _cost(point: SampleRequest) -> float:
    """Evaluations of a point for each step, about."""
    return 1.0 if point.guidance == 1 else 1 + point.interval.high - point.interval.low


def _add(file: Path, sweep: Sweep, common: Mapping[str, Any], point: Mapping[str, Any]) -> None:
    """Writes the file with one more point, whole or not at all."""
    with locks.alone(file):
        before = _read(file)
        others = [p for p in before["points"] if p["value"] != point["value"]] if before is not None else []
        points = sorted([*others, runs.as_json(point)], key=lambda p: p["value"])
        content = {"setting": sweep.setting, "step": common["checkpoint"], "common": dict(common), "points": points}
        curve = _curve(schemas.check(content, schemas.Sweep, file, remedy=runs.RESTORE))
        best = {"value": curve.best.value, "metric": curve.deciding, "remark": curve.remark}
        runs.write_text(file, json.dumps({**content, "best": best}, indent=1))
