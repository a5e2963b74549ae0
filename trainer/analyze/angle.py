"""Angle between the gradients of the denoising and the alignment loss (DyA, Fig. 8 and 9)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.analyze.gradients import cosine, degrees
from trainer.analyze.result import NotApplicable, Result
from trainer.analyze.subject import Subject
from trainer.plots import Chart, Plot, Series
from trainer.runs import checkpoint
from trainer.training.objective import Draws
from trainer.typeset import measure


def shared_gradients(subject: Subject, index: int, bins: int, count: int) -> tuple[list[Tensor], list[Tensor], int]:
    """Mean gradients of both losses over ``count`` samples with t in one bin, with respect to what they share.

    Shared are all parameters of the backbone that the alignment loss reaches: embedders and the blocks up to the last
    tap. DyA does not say which parameters its figures use; this is ours.

    Returns:
        Gradients of the denoising loss, of the alignment loss, and the number of shared parameters.
    """
    objective = subject.objective()
    parameters = list(subject.model.parameters())
    reads = ["vae/moments", "label", *(subject.alignment.reads if subject.alignment is not None else ())]
    sums: list[list[Tensor | None]] = [[None] * len(parameters) for _ in range(2)]
    seen = 0
    for rows in subject.chunks(count):
        t = subject.times_in_bin(rows, index, bins)
        draws = Draws(
            time=t,
            posterior=subject.posterior(rows),
            noise=subject.noise(rows),
            drop=torch.ones_like(t),
            align=subject.uniform(rows),
        )
        terms = objective(subject.stored(reads, rows), draws)[0]
        losses = [terms["denoise"], torch.stack([v for k, v in terms.items() if k.startswith("align/")]).sum()]
        b = rows.stop - rows.start
        for total, loss in zip(sums, losses):
            found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            for i, g in enumerate(found):
                if g is not None:
                    total[i] = g * b if total[i] is None else total[i] + g * b
        seen += b
    both = [(d / seen, a / seen) for d, a in zip(*sums) if d is not None and a is not None]
    return [d for d, _ in both], [a for _, a in both], sum(d.numel() for d, _ in both)


def run(subject: Subject) -> Result:
    """Cosine between the two gradients over timesteps, at up to ``checkpoints`` checkpoints."""
    if subject.alignment is None:
        raise NotApplicable(
            f"{subject.run} trained without alignment: there is no second gradient",
            remedy="Analyse a run with a method.",
        )
    options = subject.options
    count = min(options.gradient_samples, len(subject.indices))
    steps = [step for step, _ in checkpoint.list_checkpoints(subject.run) if step <= subject.step]
    chosen = sorted(
        {steps[i] for i in np.linspace(0, len(steps) - 1, min(options.checkpoints, len(steps))).round().astype(int)}
    )
    values = np.full((len(chosen), options.bins), np.nan)
    rows: list[dict[str, Any]] = []
    shared = 0
    for s, step in enumerate(chosen):
        at = (
            subject
            if step == subject.step
            else Subject(subject.run, options, device=subject.device, gradients=True, step=step)
        )
        at.model.requires_grad_(True)
        for index in range(options.bins):
            denoise, align, shared = shared_gradients(at, index, options.bins, count)
            values[s, index] = value = cosine(denoise, align)
            norms = [
                float(torch.stack([g.double().square().sum() for g in gs]).sum().sqrt()) for gs in (denoise, align)
            ]
            rows.append(
                {
                    "step": step,
                    "t_low": index / options.bins,
                    "t_high": (index + 1) / options.bins,
                    "cosine": value,
                    "angle_degrees": degrees(value),
                    "norm_denoising": norms[0],
                    "norm_alignment": norms[1],
                    "samples": count,
                }
            )
        at.model.requires_grad_(False)
    centres = (np.arange(options.bins) + 0.5) / options.bins
    zero = Series(label="orthogonal", x=centres, y=np.zeros(len(centres)), colour=7, dashed=True)
    lines = [
        Series(
            label=f"step {step:,}".replace(",", " "),
            x=centres,
            y=values[s],
            colour=(len(chosen) - 1 - s) % 7,
            markers=True,
        )
        for s, step in enumerate(chosen)
    ]
    y_label = "cosine of the two gradients"
    plots = [
        Plot(
            name="angle_over_t",
            headline=lines[-1],
            drawing=Chart(
                title="Over timesteps",
                x_label="timestep t (0 = data, 1 = noise)",
                y_label=y_label,
                series=[*lines, zero],
                note="Look for dips below 0, where alignment pulls against denoising: DyA Fig. 9 finds them near t = 0 "
                "(0.02 to 0.05) and takes them for over-alignment.",
            ),
        )
    ]
    once = (
        ""
        if len(chosen) > 1
        else (
            " Only one checkpoint is kept; checkpoint_every and keep_checkpoints of trainer run say how many there are to follow."
        )
    )
    if len(chosen) > 1:
        plots.append(_over_steps(chosen, values, y_label))
    last = values[-1]
    negative = int((last < 0).sum())
    worst = int(np.nanargmin(last))
    side = f"negative in {negative} of {options.bins} timestep bins" if negative else "positive at all t"
    return Result(
        what="gradient-angle",
        title="Angle between denoising and alignment gradients",
        question="Does the alignment loss pull the shared blocks where the denoising loss wants them?",
        finding=f"At step {chosen[-1]} the cosine is {side}; it is lowest, {measure(last[worst])}, at t = "
        f"{centres[worst]:.2f}, and {measure(float(np.nanmean(last)))} on average.{once}",
        plots=plots,
        rows=rows,
        settings={
            "samples": count,
            "gradients": f"means over {count} samples; float32, no label dropout, alignment always on",
            "shared parameters": shared,
            "weights": "model",
            "timestep bins": options.bins,
            "caution": "means over finitely many samples are noisy, which pulls cosines towards 0",
        },
    )


def _over_steps(steps: list[int], values: np.ndarray, y_label: str) -> Plot:
    _, bins = values.shape
    third = max(1, bins // 3)
    parts = {
        "mean over t": values.mean(axis=1),
        "low noise (lowest third of t)": values[:, :third].mean(axis=1),
        "high noise (highest third of t)": values[:, -third:].mean(axis=1),
    }
    series = [Series(label=k, x=steps, y=v, colour=i, markers=True) for i, (k, v) in enumerate(parts.items())]
    zero = Series(label="orthogonal", x=steps, y=np.zeros(len(steps)), colour=7, dashed=True)
    return Plot(
        name="angle_over_steps",
        headline=series[0],
        drawing=Chart(
            title="Over training",
            x_label="training step",
            y_label=y_label,
            series=[*series, zero],
            note="Look for the step at which a line falls below 0: from there on alignment pulls against denoising "
            "(DyA Fig. 8, where dropping alignment in half of the steps or more keeps the cosine positive throughout).",
        ),
    )
