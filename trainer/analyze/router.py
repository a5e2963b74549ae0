"""What AHPA's router and DyA's temporal module have learned to weigh at each timestep (AHPA, Fig. 5; DyA, Eq. 6)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trainer.align.ahpa import Ahpa
from trainer.align.dya import Dya
from trainer.analyze.result import NotApplicable, Result, Row
from trainer.analyze.subject import Subject
from trainer.plots import Chart, Plot, Series

POINTS = 101
X_LABEL = "timestep t (0 = data, 1 = noise)"


@torch.no_grad()
def router_weights(subject: Subject, method: Ahpa, t: Tensor) -> tuple[list[Tensor], Tensor]:
    """Weights within each group [T, L_g] and between the groups [T, G] at times [T].

    The content-adaptive router also looks at the hidden state: its weights are means over one batch of samples.
    """
    if method.config.router != "content":
        weights = method.router(t)
        return list(weights.intra), weights.inter
    rows = next(subject.chunks())
    parts = [subject.state(rows, float(at), method.taps) for at in t]
    found = [method.route(state, state.hidden[method.taps[0]]) for state in parts]
    intra = [torch.stack([w.intra[g].mean(dim=0) for w in found]) for g in range(len(method.groups))]
    return intra, torch.stack([w.inter.mean(dim=0) for w in found])


@torch.no_grad()
def xi(subject: Subject, method: Dya, t: Tensor) -> Tensor:
    """Strength of the texture term at times [T], in (0, 1)."""
    return method.xi(subject.model.t_embedder(subject.transport.model_time(t)))


def run(subject: Subject) -> Result:
    """Curves over t of everything in the run that weighs targets by t."""
    plots: list[Plot] = []
    rows: list[Row] = []
    findings: list[str] = []
    for method in subject.methods.values():
        if isinstance(method, Ahpa):
            _ahpa(subject, method, plots, rows, findings)
        elif isinstance(method, Dya):
            _dya(subject, method, plots, rows, findings)
    if not plots:
        raise NotApplicable(
            f"{subject.run} ({subject.config.method}) has neither a router nor a temporal module",
            remedy="Analyse a run of ahpa or dya.",
        )
    return Result(
        what="router",
        title="Learned weights over time",
        question="Which target does the run listen to at which noise level?",
        finding=" ".join(findings),
        plots=plots,
        rows=rows,
        settings={"weights": subject.weights, "step": subject.step, "points in t": POINTS},
    )


def _level(label: str, x: np.ndarray, value: float) -> Series:
    return Series(label=label, x=x, y=np.full(len(x), value), colour=7, dashed=True)


def _times(count: int, device: str) -> Tensor:
    return torch.linspace(0, 1, count, device=device)


def _ahpa(subject: Subject, method: Ahpa, plots: list[Plot], rows: list[Row], findings: list[str]) -> None:
    t = _times(11 if method.config.router == "content" else POINTS, subject.device)
    intra, inter = router_weights(subject, method, t)
    x = t.cpu().numpy()
    names = [group[0][0].split("/")[1] for group in method.groups]
    if len(set(names)) < len(names):  # a split that cuts one cached group in two
        names = [f"group {g + 1}" for g in range(len(names))]
    between = {name: inter[:, g].cpu().numpy() for g, name in enumerate(names)}
    series = [Series(label=k, x=x, y=v, colour=i) for i, (k, v) in enumerate(between.items())]
    uniform = 1 / len(names)
    # The reference lines also keep the axis from magnifying differences that do not matter.
    start = _level("uniform", x, uniform)
    plots.append(
        Plot(
            name="router_groups",
            headline=series[-1],
            drawing=Chart(
                title="Between groups",
                x_label=X_LABEL,
                y_label="weight (sums to 1)",
                series=[*series, start],
                note="Look for a crossing: in AHPA Fig. 5 (left) the deep group leads at high noise and hands over to "
                f"the middle group as t falls; flat lines at {uniform:.2g} mean that the router has not moved from "
                "its uniform start.",
            ),
        )
    )
    for g, (name, weights) in enumerate(zip(names, intra)):
        layers = _layer_names(subject, method, g)
        lines = [Series(label=layer, x=x, y=weights[:, l].cpu().numpy(), colour=l) for l, layer in enumerate(layers)]
        plots.append(
            Plot(
                name=f"router_{name}".replace(" ", "_"),
                drawing=Chart(
                    title=f"Within {name}, shallow to deep",
                    x_label=X_LABEL,
                    y_label="weight (sums to 1)",
                    series=[*lines, _level("uniform", x, 1 / len(lines))],
                    note="Look for shallower layers gaining as t falls to 0, the fine calibration of AHPA Fig. 5 "
                    "(middle, right).",
                ),
            )
        )
        rows += [
            {"t": float(at), "quantity": f"{name}/{layer}", "weight": float(weights[i, l])}
            for i, at in enumerate(x)
            for l, layer in enumerate(layers)
        ]
    rows += [
        {"t": float(at), "quantity": name, "weight": float(w[i])}
        for name, w in between.items()
        for i, at in enumerate(x)
    ]
    deep, low, high = names[-1], between[names[-1]][0], between[names[-1]][-1]
    moved = max(float(abs(w - uniform).max()) for w in between.values())
    shares = {
        (g, f"{name}/{layer}"): (weights[:, l] * inter[:, g]).cpu().numpy()
        for g, (name, weights) in enumerate(zip(names, intra))
        for l, layer in enumerate(_layer_names(subject, method, g))
    }
    even = {g: uniform / len(method.groups[g]) for g in range(len(names))}
    g, largest = max(shares, key=lambda at: shares[at].mean() / even[at[0]])
    share = shares[g, largest]
    findings.append(
        f"Of single layers {largest} has gained most: {100 * share.min():.1f} to {100 * share.max():.1f} % of the whole mixture, "
        f"{100 * even[g]:.1f} % of a uniform one."
    )
    findings.append(
        f"The deep group {deep} gets {100 * low:.1f} % of the weight at t = 0 and {100 * high:.1f} % at t = 1. A uniform router "
        f"gives each of the {len(names)} groups {100 * uniform:.1f} %; this one is at most {100 * moved:.1f} percentage points "
        "away from that."
    )


def _layer_names(subject: Subject, method: Ahpa, group: int) -> list[str]:
    return [subject.layers(feature)[index].removeprefix(f"{feature}/") for feature, index in method.groups[group]]


def _dya(subject: Subject, method: Dya, plots: list[Plot], rows: list[Row], findings: list[str]) -> None:
    t = _times(POINTS, subject.device)
    values, x = xi(subject, method, t).cpu().numpy(), t.cpu().numpy()
    both = method.config.modulation == "both"  # Table 5, second row: texture by 1 - xi, semantic by xi
    weighed, kind = (method.semantic, "semantic") if both else (method.texture, "texture")
    line = Series(label=f"xi(t): weight of {weighed} ({kind})", x=x, y=values, colour=0)
    others = [Series(label=f"1 - xi(t): weight of {method.texture} (texture)", x=x, y=1 - values, colour=1)] * both
    plots.append(
        Plot(
            name="router_xi",
            headline=line,
            drawing=Chart(
                title="DyA's temporal module",
                x_label=X_LABEL,
                y_label="xi(t), in (0, 1)",
                series=[line, *others, _level("start of training", x, 0.5)],
                note="Look for where the texture layer is switched down: DyA (Eq. 5 and 6; no figure shows it) weighs "
                "it by xi(t) so that texture guides where it helps; a flat line means that time plays no part.",
            ),
        )
    )
    rows += [{"t": float(a), "quantity": "xi", "weight": float(v)} for a, v in zip(x, values)]
    findings.append(
        f"xi(t), the weight of the {kind} target, runs from {values[0]:.3f} at t = 0 to {values[-1]:.3f} at t = 1."
    )
