"""Every snapshot of a run judged alike: how its samples got better, step by step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from featcache.errors import UserError
from featcache.machine import pick_device
from featcache.progress import QUIET, Progress, Quiet
from trainer import distributed
from trainer.averages import Average
from trainer.evaluate.run import Standard, asked, evaluate_run, standard_of, with_defaults, with_statistics
from trainer.requests import EvalRequest, SampleRequest, SampleSettings
from trainer.runs import checkpoint
from trainer.runs import folder as runs
from trainer.runs.snapshots import list_snapshots
from trainer.sampling.prompts import prompts_for


@dataclass(frozen=True, kw_only=True)
class Point:
    """A judged step. time_s: of training; None where the log does not say."""

    step: int
    time_s: float | None
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Judgements that differ by nothing but the step, by rising step; and the JSON file that holds them."""

    weights: str
    points: Sequence[Point]
    asked: Mapping[str, Any]
    file: Path


def evaluate_all(run: Path, request: EvalRequest, progress: Progress) -> Curve | None:
    """Judges every snapshot of a run, and its latest checkpoint, with the same settings and the same noise.

    Steps that were judged with these settings before (`metrics.json` says so) are not judged again, so that a call that was
    killed goes on where it was. Under torchrun all ranks draw; the main one judges, the others return None.

    Raises:
        UserError: as `evaluate_run`; or nothing to judge.
    """
    config = runs.load_config(run)
    runs.read_metrics(run)
    device = pick_device(request.settings.device)
    if not distributed.is_main():
        progress = QUIET
    steps = steps_of(run, Average.parse(request.settings.weights or "ema"))
    prompts = prompts_for(run, config, request.settings)
    full = with_defaults(request.settings, run, config, device, progress, prompts=prompts)
    request = replace(request, settings=_settled(full))
    with distributed.joined(device, patience=distributed.JUDGING) as world:
        standard: Standard | None = None
        wanted: dict[str, Any] = {}
        missing: list[int] = []
        if world.is_main:
            standard = standard_of(run, request, full, config, device, progress, prompts=prompts)
            wanted = asked(full, request, standard, device)
            judged = {entry.get("step") for entry in runs.read_metrics(run) if entry.get("asked") == wanted}
            missing = [step for step in steps if step not in judged]
            if judged & set(steps):
                progress.note(f"{len(steps) - len(missing)} of {len(steps)} steps are judged already")
            standard = with_statistics(standard, request, run, progress) if missing else standard
            progress.begin(f"judging {len(missing)} steps", full.num * len(missing))
        inner = _Within(progress)
        for number, step in enumerate(distributed.from_main(missing)):
            at = replace(request, settings=replace(request.settings, checkpoint=step))
            inner.name = f"step {step:,} ({number + 1} of {len(missing)})"
            evaluate_run(run, at, inner if world.is_main else QUIET, standard=standard)
    return _write(run, full.weights, wanted) if distributed.is_main() else None


def steps_of(run: Path, weights: Average) -> list[int]:
    """Steps whose weights of that name can be judged: the snapshots' and the latest checkpoint's.

    Raises:
        UserError: there is none; or raw weights, which snapshots do not hold.
    """
    if weights.kind == "raw":
        raise UserError(
            "--all judges snapshots, which hold averages alone", remedy="Leave --weights raw out, or --all."
        )
    kept = [step for step, _ in list_snapshots(run)]
    if weights.kind == "power" and weights not in runs.load_config(run).averages:
        if not kept:
            raise UserError(f"{run} has no snapshots to make {weights} of", remedy="Take --weights ema.")
        return kept
    saved = checkpoint.list_checkpoints(run)
    if not kept and not saved:
        checkpoint.find_checkpoint(run)  # which says so
    return sorted({*kept, *(step for step, _ in saved[-1:])})


def _settled(full: SampleRequest) -> SampleSettings:
    """The request's settings with nothing left open, so that every step has the same, and none is remarked upon again."""
    return SampleSettings(**{field.name: getattr(full, field.name) for field in fields(SampleSettings)})


class _Within(Quiet):
    """A step's progress as part of the whole: images that are drawn count, what else is done stands beside. What is to be
    remarked of every step is said once."""

    def __init__(self, whole: Progress) -> None:
        self.name = ""
        self._whole, self._draws = whole, False
        self._said: set[str] = set()

    def begin(self, name: str, total: int | None, *, done: int = 0, unit: str = "images") -> None:
        self._draws = name == "sampling"
        self._whole.update(done if self._draws else 0, f"{self.name}: {name}")

    def update(self, count: int, text: str = "") -> None:
        self._whole.update(count if self._draws else 0)

    def note(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._whole.note(text)


def _write(run: Path, weights: str, wanted: Mapping[str, Any]) -> Curve:
    """`curves/<weights>.json` from `metrics.json`."""
    times = _training_times(run)
    found = {int(e["step"] or 0): e["metrics"] for e in runs.read_metrics(run) if e.get("asked") == wanted}
    points = [Point(step=step, time_s=times(step), metrics=found[step]) for step in sorted(found)]
    file = run / "curves" / f"{Average.parse(weights).stem}.json"
    curve = Curve(weights=weights, points=points, asked=wanted, file=file)
    content = {"weights": weights, "points": [vars(point) for point in points], "asked": wanted}
    runs.write_page(file, json.dumps(content, indent=1))
    return curve


def _training_times(run: Path) -> Any:
    """Step -> seconds of training until then, between lines of the log by interpolation."""
    known = {r["step"]: float(r["time_s"]) for r in runs.read_log(run) if isinstance(r.get("time_s"), int | float)}
    steps = np.array(sorted(known), dtype=np.float64)

    def at(step: int) -> float | None:
        if not len(steps) or not steps[0] <= step <= steps[-1]:
            return None
        return float(np.interp(step, steps, [known[int(s)] for s in steps]))

    return at
