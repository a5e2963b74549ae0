"""Kernel alignment between hidden states and cached features: CKNNA, CKA, mutual k-NN (REPA, Fig. 2, 3, 7, 8)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from featcache.errors import UserError
from featcache.feature_names import is_tokens
from trainer.analyze import kernels
from trainer.analyze.result import NotApplicable, Result, Row
from trainer.analyze.subject import Subject
from trainer.plots import Chart, Matrix, Plot, Series

_STATE = re.compile(r"block(\d+):(0?\.\d+)")
T_LABEL = "timestep t (0 = data, 1 = noise)"

# Features [n, C], their neighbours without and with themselves.
Prepared = tuple[Tensor, kernels.Neighbours, kernels.Neighbours]


class _Measure:
    """The three similarities between representations whose neighbours are found once each."""

    def __init__(self, subject: Subject) -> None:
        self.options = subject.options
        self.k = min(self.options.k, len(subject.indices) - 1)

    def prepare(self, x: Tensor) -> Prepared:
        x = x.float()
        if self.options.normalize == "l2":
            x = torch.nn.functional.normalize(x, dim=-1)
        others = kernels.neighbours(x, self.k)
        biased = self.options.cknna == "biased"
        return x, others, kernels.neighbours(x, self.k, include_self=True) if biased else others

    def __call__(self, a: Prepared, b: Prepared) -> dict[str, float]:
        return {
            "cknna": kernels.cknna_from_neighbours(a[2], b[2], estimator=self.options.cknna),
            "cka": kernels.cka(a[0], b[0], estimator=self.options.cka),
            "mutual_knn": kernels.mutual_knn_from_neighbours(a[1], b[1]),
        }


def representation(subject: Subject, name: str) -> Tensor:
    """Pooled features [n, C] of a cached feature or a layer of a VAE group, or `block3:0.5`: block 3 at t = 0.5.

    Raises:
        UserError: neither.
    """
    if match := _STATE.fullmatch(name):
        depth, t = int(match[1]), float(match[2])
        if not 1 <= depth <= subject.depth:
            raise UserError(f"{name}: the model has {subject.depth} blocks", remedy=f"Choose 1 to {subject.depth}.")
        return subject.pooled(t)[depth - 1]
    known = [*subject.token_features, *subject.levels]
    layers = [layer for level in subject.levels for layer in subject.layers(level)]
    if name not in (*known, *layers):
        raise UserError(
            f"{name!r} is neither a cached feature nor a hidden state",
            remedy=f"Use {', '.join([*known, *layers[:1]])}, or e.g. block3:0.5.",
        )
    return subject.pooled_feature(name)


def run(subject: Subject) -> Result:
    """Compare every block at every time with every cached feature, and the features among each other."""
    options, measure = subject.options, _Measure(subject)
    names = list(options.against) or [*subject.token_features, *subject.levels]
    if not names:
        raise NotApplicable(
            f"{subject.cache.path} holds no features to compare with", remedy="Add some with featcache build."
        )
    features = {name: measure.prepare(representation(subject, name)) for name in names}
    times = options.times
    shape = (len(times), subject.depth, len(names))
    found = {key: np.full(shape, np.nan) for key in ("cknna", "cka", "mutual_knn")}
    rows: list[Row] = []
    for i, t in enumerate(times):
        pooled = subject.pooled(t)
        for depth in range(subject.depth):
            state = measure.prepare(pooled[depth])
            for j, name in enumerate(names):
                values = measure(state, features[name])
                for key, value in values.items():
                    found[key][i, depth, j] = value
                rows.append({"a": f"block{depth + 1}:{t:g}", "b": name, "block": depth + 1, "t": t, **values})
    for text in options.pairs:
        a, comma, b = (part.strip() for part in text.partition(","))
        if not comma or not b:
            raise UserError(
                f"pairs: {text!r} is not a pair", remedy="""Type e.g. --set 'pairs=["block3:0.5,vae/G3"]'."""
            )
        values = measure(measure.prepare(representation(subject, a)), measure.prepare(representation(subject, b)))
        rows.append({"a": a, "b": b, "block": "", "t": "", **values})
    among = np.array([[measure(features[a], features[b])["cknna"] for b in names] for a in names])
    rows += [
        {"a": a, "b": b, "block": "", "t": "", **measure(features[a], features[b])}
        for i, a in enumerate(names)
        for b in names[:i]
    ]
    main = _main_target(subject, names)
    j = names.index(main)
    plots = [*_plots(subject, names, main, found, measure.k), _matrix(names, among)]
    taps = sorted({tap for method in subject.methods.values() if main in method.reads for tap in method.taps})
    aligned = f" ({main} was aligned with after block {' and '.join(map(str, taps))})" if taps else ""
    best = np.unravel_index(np.nanargmax(found["cknna"][:, :, j]), shape[:2])
    return Result(
        what="cknna",
        title="Alignment of representations",
        question="How alike are the geometry of the model's hidden states and that of the cached features?",
        finding=f"CKNNA with {main} peaks at {found['cknna'][(*best, j)]:.3f}, after block {best[1] + 1} at "
        f"t = {times[best[0]]:g}{aligned}; mutual k-NN is {found['mutual_knn'][(*best, j)]:.3f} there, "
        f"{measure.k / (len(subject.indices) - 1):.3f} would be chance."
        + _above_one(rows, options.cknna, len(subject.indices)),
        plots=plots,
        rows=rows,
        settings={
            "CKNNA estimator": options.cknna,
            "CKA estimator": options.cka,
            "k": measure.k,
            "samples": len(subject.indices),
            "pooling": "mean over tokens; the deepest layer of a VAE group",
            "normalisation": options.normalize,
            "weights": subject.weights,
        },
    )


def _above_one(rows: Sequence[Row], estimator: str, samples: int) -> str:
    """What to make of values above 1, where there are any."""
    values = [row["cknna"] for row in rows]
    if not any(isinstance(value, float) and value > 1 for value in values):
        return ""
    return (
        f" A value above 1 says no more than 1 would: the {estimator} estimator divides by two estimates over other pairs of samples, so "
        f"nothing bounds it where samples are as few as {samples}. Take more (--samples), or --set cknna=paper, which never "
        "exceeds 1."
    )


def _main_target(subject: Subject, names: list[str]) -> str:
    """The deepest feature the run aligned with, else the deepest encoder layer, else the last."""
    reads = [n for n in (subject.alignment.reads if subject.alignment is not None else ()) if n in names]
    return reads[-1] if reads else _deepest(names)


def _deepest(names: list[str]) -> str:
    return ([n for n in names if is_tokens(n)] or names)[-1]


def _plots(subject: Subject, names: list[str], main: str, found: dict[str, np.ndarray], k: int) -> list[Plot]:
    times, blocks = subject.options.times, np.arange(1, subject.depth + 1)
    j, middle = names.index(main), len(times) // 2
    # Runs of different methods are compared by one target, whatever each was aligned with.
    yardstick = _deepest(names)
    shared = Series(
        label="CKNNA", x=blocks, y=found["cknna"][middle, :, names.index(yardstick)], colour=0, markers=True
    )
    by_block = [
        Series(label=f"t = {t:g}", x=blocks, y=found["cknna"][i, :, j], colour=i % 7, markers=True)
        for i, t in enumerate(times)
    ]
    by_time = [
        Series(
            label=name, x=times, y=np.nanmax(found["cknna"][:, :, i], axis=1), colour=i % 7, dashed=i >= 7, markers=True
        )
        for i, name in enumerate(names)
    ]
    kinds = {"cknna": f"CKNNA (k = {k})", "cka": f"CKA ({subject.options.cka})", "mutual_knn": f"mutual k-NN (k = {k})"}
    three = [
        Series(label=label, x=blocks, y=found[key][middle, :, j], colour=i, markers=True)
        for i, (key, label) in enumerate(kinds.items())
    ]
    return [
        Plot(
            name="cknna_over_blocks",
            headline=shared,
            headline_title=f"with {yardstick}, at t = {times[middle]:g}",
            drawing=Chart(
                title=f"With {main}, by block",
                x_label="block",
                y_label=f"CKNNA (k = {k})",
                series=by_block,
                note="Look for the block where alignment peaks and whether it falls off behind it, as REPA Fig. 3b "
                "shows (Fig. 2b without alignment).",
            ),
        ),
        Plot(
            name="cknna_over_t",
            drawing=Chart(
                title="Best block, by timestep",
                x_label=T_LABEL,
                y_label="largest CKNNA of any block",
                series=by_time,
                note="Look for how far alignment survives noise (REPA Fig. 7, CKNNA) and with which target it is "
                "closest (REPA Fig. 8).",
            ),
        ),
        Plot(
            name="cknna_three_measures",
            drawing=Chart(
                title=f"Three measures, with {main} at t = {times[middle]:g}",
                x_label="block",
                y_label="similarity (1 = same)",
                series=three,
                note="Look for whether the local measures (CKNNA, mutual k-NN) agree with the global one (CKA), which "
                "counts all pairs and can be high through a few dominant directions: REPA App. C.1 therefore takes "
                "CKNNA (Eq. 21 to 24; no figure compares the three).",
            ),
        ),
    ]


def _matrix(names: list[str], values: np.ndarray) -> Plot:
    return Plot(
        name="cknna_features",
        drawing=Matrix(
            title="Cached features among each other (CKNNA)",
            columns=names,
            rows=names,
            values=values,
            low=0.0,
            high=1.0,
            note="Look for features that are near copies of each other: aligning with both adds little; REPA Fig. 2b "
            "draws such values between encoders as its yardstick.",
        ),
    )
