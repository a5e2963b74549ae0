"""Angle between the gradients of the denoising and the alignment loss (DyA, Fig. 8 and 9)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from trainer.analyze.gradients import GradientPair, degrees
from trainer.analyze.result import NotApplicable, Result, Row
from trainer.analyze.subject import Subject
from trainer.plots import Chart, Plot, Series
from trainer.runs import checkpoint
from trainer.training.objective import Draws
from trainer.typeset import measure

Y_LABEL = "cosine of the two gradients"
GROUPS = 8  # at least, of the samples of a bin: the estimate leaves out the products within a group


def shared_gradients(subject: Subject, index: int, bins: int, count: int) -> GradientPair:
    """Gradients of the denoising and of the alignment loss over `count` samples with t in one bin, with respect to what they share.

    Shared are the blocks up to the last tap. DyA does not say which parameters its figures use; this is ours. Embedders are
    reached, too, but would decide the cosine: of a bin's mean gradient the timestep's embedder holds the larger part.
    """
    objective = subject.objective()
    parameters = list(subject.model.blocks.parameters())
    aligned = subject.alignment.reads if subject.alignment is not None else ()
    streams = [stream.name for stream in subject.cfg.streams]
    reads = list(dict.fromkeys(["vae/moments", *objective.condition.reads, *streams, *aligned]))
    pair = GradientPair()
    for rows in subject.chunks(count, size=min(subject.options.batch_size, max(1, count // GROUPS))):
        t = subject.times_in_bin(rows, index, bins)
        draws = Draws(
            time=t,
            posterior=subject.posterior(rows),
            noise=subject.noise(rows),
            drop=torch.ones_like(t),
            align=subject.uniform(rows),
            streams=subject.stream_noise(rows),
            drop_stream={name: torch.ones_like(t) for name in streams},
        )
        terms = objective(subject.stored(reads, rows), draws)[0]
        of_kind = [[v for k, v in terms.items() if k.startswith("align/") == kind] for kind in (False, True)]
        losses = [torch.stack(values).sum() for values in of_kind]
        found = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
        both = [(d, a) for d, a in zip(*found) if d is not None and a is not None]
        pair.add([d for d, _ in both], [a for _, a in both], rows.stop - rows.start)
    return pair


@dataclass(frozen=True, kw_only=True)
class _Angles:
    """cosines, errors: [steps, bins], NaN where it is not known. shared: parameters that both losses reach."""

    steps: list[int]
    cosines: np.ndarray
    errors: np.ndarray
    rows: list[Row]
    shared: int


def run(subject: Subject) -> Result:
    """Cosine between the two gradients over timesteps, at up to `checkpoints` checkpoints."""
    if subject.alignment is None:
        raise NotApplicable(
            f"{subject.run} trained without alignment: there is no second gradient",
            remedy="Analyse a run with a method.",
        )
    options = subject.options
    count = min(options.gradient_samples, len(subject.indices))
    angles = measure_angles(subject, count)
    return Result(
        what="gradient-angle",
        title="Angle between denoising and alignment gradients",
        question="Does the alignment loss pull the shared blocks where the denoising loss wants them?",
        finding=_finding(angles),
        plots=_plots(angles),
        rows=angles.rows,
        settings={
            "samples": count,
            "gradients": f"means over {count} samples; float32, no label dropout, alignment always on",
            "estimator": "unbiased: from products of different samples' gradients alone; bars are standard errors",
            "gradients with respect to": f"the blocks that both losses reach, {angles.shared:,} parameters",
            "weights": subject.weights,
            "timestep bins": options.bins,
            "caution": "neighbouring bins share images and noise; where gradients vary much, more samples are needed",
        },
    )


def _chosen_steps(subject: Subject) -> list[int]:
    """Up to `checkpoints` of the kept checkpoints up to the subject's own, spread evenly."""
    steps = [step for step, _ in checkpoint.list_checkpoints(subject.run) if step <= subject.step]
    places = np.linspace(0, len(steps) - 1, min(subject.options.checkpoints, len(steps))).round().astype(int)
    return sorted({steps[i] for i in places})


def measure_angles(subject: Subject, count: int) -> _Angles:
    """The angle in every timestep bin at every chosen checkpoint, from `count` samples each."""
    options, chosen = subject.options, _chosen_steps(subject)
    cosines, errors = (np.full((len(chosen), options.bins), np.nan) for _ in range(2))
    rows: list[Row] = []
    shared = 0
    for s, step in enumerate(chosen):
        at = subject
        if step != subject.step:
            at = Subject(
                subject.run, options, device=subject.device, gradients=True, step=step, progress=subject.progress
            )
        at.model.requires_grad_(True)
        for index in range(options.bins):
            pair = shared_gradients(at, index, options.bins, count)
            cosines[s, index], errors[s, index] = value, error = pair.unbiased, pair.standard_error
            shared, (denoise, align) = pair.parameters, pair.norms
            rows.append(
                {
                    "step": step,
                    "t_low": index / options.bins,
                    "t_high": (index + 1) / options.bins,
                    "cosine": value,
                    "standard_error": error,
                    "cosine_plugin": pair.plugin,
                    "angle_degrees": degrees(value),
                    "norm_denoising": denoise,
                    "norm_alignment": align,
                    "samples": count,
                }
            )
        at.model.requires_grad_(False)
    return _Angles(steps=chosen, cosines=cosines, errors=errors, rows=rows, shared=shared)


def _centres(angles: _Angles) -> np.ndarray:
    """Of the timestep bins."""
    _, bins = angles.cosines.shape
    centres: np.ndarray = (np.arange(bins) + 0.5) / bins
    return centres


def _finding(angles: _Angles) -> str:
    last = angles.cosines[-1]
    if np.isnan(last).all():
        return (
            f"At step {angles.steps[-1]} the gradients vary so much that their mean's direction is not known; look at more "
            "samples (--set gradient_samples=...)."
        )
    unknown, worst, error = int(np.isnan(last).sum()), int(np.nanargmin(last)), angles.errors[-1]
    known = int(np.isfinite(error).sum())
    above, below = (int((sign * last > 2 * error).sum()) for sign in (1, -1))
    side = f"above 0 by more than two standard errors in {above} of {known} timestep bins, below in {below}"
    if not known:
        side = f"above 0 in {int((last > 0).sum())} of {len(last) - unknown} timestep bins (no standard errors: too few samples)"
    few = f" In {unknown} more the samples are too few to tell." if unknown else ""
    spread = f" (standard error {measure(error[worst])})" if np.isfinite(error[worst]) else ""
    once = " Only one checkpoint is kept; checkpoint_every and keep_checkpoints of trainer run say how many there are to follow."
    return (
        f"At step {angles.steps[-1]} the cosine is {side}; it is lowest, {measure(last[worst])}{spread}, at t = "
        f"{_centres(angles)[worst]:.2f}, and {measure(_mean(last))} on average.{few}"
        f"{once if len(angles.steps) == 1 else ''}"
    )


def _plots(angles: _Angles) -> list[Plot]:
    centres, steps = _centres(angles), angles.steps
    zero = Series(label="orthogonal", x=centres, y=np.zeros(len(centres)), colour=7, dashed=True)
    lines = [
        Series(
            label=f"step {step:,}".replace(",", " "),
            x=centres,
            y=angles.cosines[s],
            error=angles.errors[s],
            colour=(len(steps) - 1 - s) % 7,
            markers=True,
        )
        for s, step in enumerate(steps)
    ]
    over_t = Plot(
        name="angle_over_t",
        headline=lines[-1],
        drawing=Chart(
            title="Over timesteps",
            x_label="timestep t (0 = data, 1 = noise)",
            y_label=Y_LABEL,
            series=[*lines, zero],
            note="Look for dips below 0 by more than the bars, standard errors: there alignment pulls against denoising. DyA "
            "Fig. 9 finds them near t = 0 (0.02 to 0.05: more bins show them, --set bins=40) and takes them for over-alignment.",
        ),
    )
    return [over_t, _over_steps(steps, angles.cosines)] if len(steps) > 1 else [over_t]


def _mean(values: np.ndarray) -> float:
    """Of the bins in which the cosine is known."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan


def _over_steps(steps: list[int], values: np.ndarray) -> Plot:
    _, bins = values.shape
    third = max(1, bins // 3)
    thirds = {
        "mean over t": values,
        "low noise (lowest third of t)": values[:, :third],
        "high noise (highest third of t)": values[:, -third:],
    }
    parts = {name: [_mean(row) for row in part] for name, part in thirds.items()}
    series = [Series(label=k, x=steps, y=v, colour=i, markers=True) for i, (k, v) in enumerate(parts.items())]
    zero = Series(label="orthogonal", x=steps, y=np.zeros(len(steps)), colour=7, dashed=True)
    return Plot(
        name="angle_over_steps",
        headline=series[0],
        drawing=Chart(
            title="Over training",
            x_label="training step",
            y_label=Y_LABEL,
            series=[*series, zero],
            note="Look for the step at which a line falls below 0: from there on alignment pulls against denoising "
            "(DyA Fig. 8, where dropping alignment in half of the steps or more keeps the cosine positive throughout).",
        ),
    )
