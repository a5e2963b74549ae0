"""G-SNR of alignment gradients by timestep bin and target (AHPA, Sec. 3, Fig. 2, App. E)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.analyze.gradients import GradientMoments, Loss, Moments, block_gradients, gsnr, hidden_gradients
from trainer.analyze.probes import OWN, fit_heads, head_loss, own_loss, own_sample, split, taps
from trainer.analyze.result import Result, Row
from trainer.analyze.subject import MIXTURE, Subject
from trainer.plots import Chart, Plot, Series

MOST_VALUES = 1 << 28  # of per-sample gradients at once: 1 GiB


def measure(subject: Subject) -> dict[str, list[Moments]]:
    """Target -> moments of the per-sample gradients in each timestep bin.

    Gradients are with respect to the hidden state after the tapped block(s), of all tokens, or with `wrt="block"` to the parameters
    of block `subject.block` through its output. Every bin sees the same samples and the same noise.
    """
    options, targets = subject.options, subject.target_names()
    heads = fit_heads(subject, targets)
    losses: dict[str, Loss[Any]] = {name: head_loss(subject, *head) for name, head in heads.items()}
    if subject.alignment is not None:
        losses[OWN] = own_loss(subject)
    found_moments: dict[str, list[Moments]] = {name: [] for name in losses}
    by_block = options.wrt == "block"
    size = options.batch_size
    if by_block:
        parameters = sum(p.numel() for p in subject.model.blocks[subject.block - 1].parameters())
        size = min(size, max(1, MOST_VALUES // parameters))
    for index in range(options.bins):
        moments = {name: GradientMoments() for name in losses}
        for rows in subject.chunks(split(subject).measured, size=size):
            t = subject.times_in_bin(rows, index, options.bins)
            state = subject.state(rows, t, taps(subject), targets=True)
            tokens = subject.tokens(state, taps(subject))
            x, c = subject.block_input(rows, t) if by_block else (None, None)
            for name, loss in losses.items():
                sample = own_sample(subject, state) if name == OWN else subject.target(name, rows, state)
                if by_block:
                    assert x is not None and c is not None
                    block = subject.model.blocks[subject.block - 1]
                    found = block_gradients(loss, block, subject.block, x, c, tokens, sample)
                else:
                    depths = (
                        subject.alignment.taps if name == OWN and subject.alignment is not None else (subject.block,)
                    )
                    by_depth = hidden_gradients(loss, {d: tokens[d] for d in depths}, sample)
                    found = _flat(by_depth)
                moments[name].add(found)
        for name, each in moments.items():
            found_moments[name].append(each.finish())
    return found_moments


def _flat(by_depth: Mapping[int, Tensor]) -> Tensor:
    return torch.cat([g.flatten(1) for g in by_depth.values()], dim=1)


def run(subject: Subject) -> Result:
    """Measure, draw, and say how the run's own loss and the VAE's levels guide at low and at high noise."""
    options = subject.options
    moments = measure(subject)
    values = {name: np.array([gsnr(m, options.gsnr) for m in bins]) for name, bins in moments.items()}
    n = moments["latent"][0].count
    by_block, tapped = options.wrt == "block", subject.alignment.taps if subject.alignment is not None else ()
    where = "the parameters of" if by_block else "the hidden state after"
    own = "the same" if by_block else f"those after block {' and '.join(map(str, tapped))}" if tapped else "none"
    return Result(
        what="gsnr",
        title="Gradient signal-to-noise ratio",
        question="Do the alignment gradients of different images agree with each other, and at which noise levels?",
        finding=_finding(values, subject.levels, n if options.gsnr == "plugin" else None),
        plots=_plots(subject, values, n),
        rows=_rows(moments),
        settings={
            "estimator": options.gsnr,
            "formula": "||mean g||^2 / tr(sample covariance, ddof 1); unbiased = plugin - 1/n",
            "gradients with respect to": f"{where} block {subject.block}; of the run's own loss {own}",
            "samples measured": n,
            "samples to fit heads": split(subject).fitted,
            "timestep bins": options.bins,
            "weights": subject.weights,
            "heads": "own loss: as trained; every other target: linear, ridge-fitted on other samples",
        },
    )


def _rows(moments: dict[str, list[Moments]]) -> list[Row]:
    return [
        {
            "target": name,
            "t_low": i / len(bins),
            "t_high": (i + 1) / len(bins),
            "gsnr_plugin": gsnr(m, "plugin"),
            "gsnr_unbiased": gsnr(m, "unbiased"),
            "squared_mean": m.squared_mean,
            "trace_covariance": m.trace,
            "samples": m.count,
        }
        for name, bins in moments.items()
        for i, m in enumerate(bins)
    ]


def _finding(values: dict[str, np.ndarray], levels: list[str], samples: int | None) -> str:
    """samples: behind a plugin estimate. Heads of other targets are fitted, so their heights do not compare with that of
    the run's own loss, nor those of tokens of an encoder with those of a VAE's level."""
    name, shown = ("the run's own loss", values[OWN]) if OWN in values else ("the latent", values["latent"])
    floor = "" if samples is None else f"; gradients with nothing in common would give {1 / samples:.3f}"
    found = [f"The G-SNR of {name} is {shown[0]:.3f} at the lowest t and {shown[-1]:.3f} at the highest{floor}."]
    if len(levels) > 1:
        low, high = (max(levels, key=lambda level: values[level][place]) for place in (0, -1))
        found.append(
            f"Of the VAE's levels, each through a fitted head, {low} has the highest at the lowest t, {high} at the highest."
        )
    return " ".join(found)


@dataclass(frozen=True, kw_only=True)
class _Axes:
    """What all plots share. centres: of the timestep bins. floors: lines of gradients with nothing in common."""

    centres: np.ndarray
    y_label: str
    floors: list[Series]

    def line(self, label: str, values: np.ndarray, number: int = 0) -> Series:
        return Series(label=label, x=self.centres, y=values, colour=number % 7, dashed=number >= 7, markers=True)

    def chart(self, title: str, lines: list[Series], note: str) -> Chart:
        x_label = "timestep t (0 = data, 1 = noise)"
        return Chart(title=title, x_label=x_label, y_label=self.y_label, series=[*lines, *self.floors], note=note)

    def plot(self, name: str, title: str, values: dict[str, np.ndarray], note: str) -> Plot:
        lines = [self.line(label, v, i) for i, (label, v) in enumerate(values.items())]
        return Plot(name=name, drawing=self.chart(title, lines, note))


def _plots(subject: Subject, values: dict[str, np.ndarray], n: int) -> list[Plot]:
    options = subject.options
    centres = (np.arange(options.bins) + 0.5) / options.bins
    floor = Series(
        label=f"no common direction (1/{n})", x=centres, y=np.full(len(centres), 1 / n), colour=7, dashed=True
    )
    axes = _Axes(
        centres=centres,
        y_label=f"G-SNR ({options.gsnr} estimate)",
        floors=[floor] if options.gsnr == "plugin" else [],
    )
    own = [_own_plot(axes, subject.config.method, values[OWN])] if OWN in values else []
    tokens = [_tokens_plot(axes, {k: values[k] for k in subject.token_features})] if subject.token_features else []
    return [*own, _levels_plot(axes, subject, values), *tokens, *_layer_plots(axes, subject, values)]


def _own_plot(axes: _Axes, method: str, values: np.ndarray) -> Plot:
    mine = axes.line("own loss", values)
    note = (
        "Look for a line that stays up over all t: guidance that points the same way for different "
        "images (AHPA Fig. 2c and Table 7); at the dashed line, gradients of different images have nothing "
        "in common."
    )
    return Plot(
        name="gsnr_own",
        headline=mine,
        headline_title="each run's own loss",
        drawing=axes.chart(f"The run's own loss ({method})", [mine], note),
    )


def _levels_plot(axes: _Axes, subject: Subject, values: dict[str, np.ndarray]) -> Plot:
    plot = axes.plot(
        "gsnr_levels",
        "VAE levels",
        {k: values[k] for k in [*subject.levels, "latent", MIXTURE] if k in values},
        "Look for the level whose line is highest at each t: in AHPA Fig. 2b the deep group leads at high noise "
        "and the middle one as t falls to 0, and a router that follows the leader keeps the whole trajectory high "
        "(Fig. 2c).",
    )
    return dataclasses.replace(
        plot,
        # One target that every run has, the same in all: how well each run's block takes guidance.
        headline=axes.line("latent", values["latent"]),
        headline_title="the latent as target, through a fitted head",
        headline_note="Look for the run whose line is higher: one target and one kind of head for all, so lines differ "
        "by the hidden states alone; AHPA Fig. 2a shows it for SRA 2, which aligns with the latent.",
    )


def _tokens_plot(axes: _Axes, values: dict[str, np.ndarray]) -> Plot:
    return axes.plot(
        "gsnr_tokens",
        "Image encoder",
        values,
        "Look for a fall towards t = 0: a static target that stops guiding where details are made, as AHPA "
        "Fig. 2a shows for REPA and SRA 2.",
    )


def _layer_plots(axes: _Axes, subject: Subject, values: dict[str, np.ndarray]) -> list[Plot]:
    """One plot per VAE group of several layers."""
    plots = []
    for level in subject.levels:
        layers = subject.layers(level)
        if len(layers) > 1:
            short = level.removeprefix("vae/")
            plots.append(
                axes.plot(
                    f"gsnr_{short}",
                    f"Layers of {short}, shallow to deep",
                    {layer.removeprefix(f"{level}/"): values[layer] for layer in layers},
                    "Look for layers that change places over t: they are what a router inside the group can gain from "
                    "(AHPA Fig. 2b compares groups; Fig. 5, middle and right, shows the weights inside them).",
                )
            )
    return plots
