"""Linear probing of hidden states by block and timestep (REPA, Fig. 2a, 3a, 7; SRA, Fig. 2 right; REPA App. C.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from featcache.errors import UserError
from trainer.analyze.result import NotApplicable, Result, Row
from trainer.analyze.subject import Subject
from trainer.plots import Chart, Plot, Series

TOGETHER_BYTES = 256 << 20


def folds_of(count: int, folds: int, *, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(training, held-out) indices. `folds=1` holds out one quarter; otherwise each sample is held out once.

    Raises:
        UserError: more folds than samples.
    """
    if folds > count:
        raise UserError(f"{count} samples cannot make {folds} folds", remedy="Use fewer folds or more samples.")
    order = np.random.Generator(np.random.Philox(key=[seed, 0x9B0BE])).permutation(count)
    parts = np.array_split(order, max(folds, 4) if folds == 1 else folds)
    chosen = parts[:1] if folds == 1 else parts
    return [(np.setdiff1d(order, held), np.sort(held)) for held in chosen]


def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    *,
    classes: int,
    epochs: int = 90,
    batch: int = 16_384,
    lr: float = 1e-3,
    seed: int = 0,
) -> Tensor:
    """Classes predicted by a linear classifier behind a parameter-free batch norm. int64 [F, m].

    REPA App. C.1 (after Chen et al. 2024): Adam, learning rate 1e-3 with cosine decay, 90 epochs, batch 16,384. Several
    probes of one shape are trained at once, each on its own features, none touching another. Normalisation uses the
    training set's mean and variance instead of each batch's: with the papers' large batches the two agree, and small
    sets do not suffer (ours). The classifier starts at zero (ours): the result depends on the order of samples alone.

    Args:
        train: [F, n, D]; train_labels: int64 [F, n]; test: [F, m, D].
    """
    F, n, D = train.shape
    mean, std = train.mean(dim=1, keepdim=True), train.std(dim=1, keepdim=True, correction=0)
    scale = (std.square() + 1e-5).rsqrt()  # batch norm's epsilon
    train = (train - mean) * scale
    weight = torch.zeros(F, D, classes, device=train.device, requires_grad=True)
    bias = torch.zeros(F, 1, classes, device=train.device, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=lr, fused=True)
    per_epoch = -(-n // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(n, generator=generator).to(train.device)
        for rows in order.split(batch):
            logits = torch.baddbmm(bias, train[:, rows], weight)  # [F, b, classes]
            # Summed over probes, so that each one's gradient is that of its own mean loss.
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), train_labels[:, rows].flatten()) * F
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return torch.baddbmm(bias, (test - mean) * scale, weight).argmax(dim=-1)


def probe_accuracy(
    features: Tensor, labels: Tensor, *, classes: int, folds: int, epochs: int, batch: int | None, seed: int
) -> tuple[list[float], int]:
    """Top-1 accuracy in [0, 1] of each representation on held-out samples, and how many were held out.

    Representations are probed together as long as their training sets take less than `TOGETHER_BYTES`.

    Args:
        features: [R, n, D]. labels: int64 [n]. folds: see `folds_of`.
        batch: None takes 16,384, but at most an eighth of the training set (ours, for small sets).
    """
    _, n, D = features.shape
    parts = folds_of(n, folds, seed=seed)
    # Folds train together, so all get the size of the smallest; held-out sets are padded and cut again.
    size, longest = min(len(train) for train, _ in parts), max(len(held) for _, held in parts)
    train = torch.stack([torch.from_numpy(rows[:size]) for rows, _ in parts]).to(features.device)  # [F, size]
    held = torch.stack([torch.from_numpy(np.resize(rows, longest)) for _, rows in parts]).to(features.device)
    real = torch.stack([torch.arange(longest) < len(rows) for _, rows in parts]).to(features.device)
    F = len(parts)
    together = max(1, TOGETHER_BYTES // (4 * F * size * D))
    hits: list[float] = []
    for some in features.float().split(together):
        r = len(some)
        predicted = linear_probe(
            some[:, train].flatten(0, 1),
            labels[train].repeat(r, 1),
            some[:, held].flatten(0, 1),
            classes=classes,
            epochs=epochs,
            batch=batch or min(16_384, max(1, size // 8)),
            seed=seed,
        ).reshape(r, F, longest)
        hits += ((predicted == labels[held]) & real).sum(dim=(1, 2)).tolist()
    tested = int(real.sum())
    return [h / tested for h in hits], tested


@dataclass(frozen=True, kw_only=True)
class _Accuracies:
    """Top-1 accuracies in percent. blocks: [times, depth]. references: cached feature -> accuracy.
    tested: held-out predictions."""

    blocks: np.ndarray
    references: dict[str, float]
    rows: list[Row]
    tested: int
    largest_error: float


def run(subject: Subject) -> Result:
    """Accuracy of a probe on every block at every time, and on the cached features for comparison."""
    options = subject.options
    present, counts = np.unique(subject.labels.cpu().numpy(), return_counts=True)
    if len(subject.class_names) < 2 or len(present) < 2:
        raise NotApplicable(
            "the samples belong to one class: there is nothing to tell apart", remedy="Use more samples."
        )
    _require_pairs(subject, len(present))
    folds = options.probe_folds or (4 if len(subject.indices) < 2000 else 1)
    found = measure(subject, folds)
    chance = 100 * counts.max() / counts.sum()
    return Result(
        what="probe",
        title="Linear probing",
        question="Where in the network, and at which noise level, can the class be read off linearly?",
        finding=_finding(found, options.times, chance),
        plots=_plots(found, options.times, chance),
        rows=found.rows,
        settings={
            "probe": "mean over tokens, parameter-free batch norm, linear layer, Adam 1e-3 with cosine decay",
            "epochs": options.probe_epochs,
            "batch size": options.probe_batch or "16,384, at most an eighth of the training part",
            "folds": folds if folds > 1 else "one quarter held out",
            "held-out predictions": found.tested,
            "labels": "the model gets the null label"
            if not subject.labelled
            else "the model gets the true label, which gives the class away",
            "weights": subject.weights,
        },
    )


def _require_pairs(subject: Subject, present: int) -> None:
    """Refuses samples of which most are alone in their class: whichever is held out, its class was never seen.

    Raises:
        NotApplicable: there are fewer than two of each class.
    """
    samples, cached = len(subject.indices), len(subject.cache)
    if samples >= 2 * present:
        return
    needed = 2 * len(subject.class_names)
    remedy = f"Look at {needed:,} or more: --samples {needed}"
    if cached < needed:
        remedy = f"It would take a cache of {needed:,} images or more, and {subject.cache.path} holds {cached:,}."
    raise NotApplicable(
        f"a probe learns from some images of a class and is tested on others, and the {samples:,} samples are of {present:,} "
        f"classes: {samples / present:.1f} of each, where it takes at least two",
        remedy=remedy,
    )


def measure(subject: Subject, folds: int) -> _Accuracies:
    """One probe on each block at each time and on each reference."""
    options, rows, errors = subject.options, list[Row](), list[float]()
    tested = 0

    def record(names: list[tuple[str, int | str, float | str]], features: Tensor) -> list[float]:
        nonlocal tested
        found, tested = probe_accuracy(
            features,
            subject.labels,
            classes=len(subject.class_names),
            folds=folds,
            epochs=options.probe_epochs,
            batch=options.probe_batch,
            seed=options.seed,
        )
        for (name, block, t), value in zip(names, found):
            errors.append(100 * math.sqrt(value * (1 - value) / tested))
            rows.append(
                {
                    "representation": name,
                    "block": block,
                    "t": t,
                    "accuracy_percent": 100 * value,
                    "standard_error_percent": errors[-1],
                    "held_out": tested,
                }
            )
        return [100 * value for value in found]

    def told(what: str, features: Tensor) -> Tensor:
        subject.progress.update(0, f"probing {what}")
        return features

    depths = range(1, subject.depth + 1)
    blocks = np.array(
        [
            record([(f"block{d}:{t:g}", d, t) for d in depths], told(f"the blocks at t = {t:g}", subject.pooled(t)))
            for t in options.times
        ]
    )
    references = {
        name: record([(name, "", "")], told(name, subject.pooled_feature(name)[None]))[0]
        for name in _references(subject)
    }
    return _Accuracies(blocks=blocks, references=references, rows=rows, tested=tested, largest_error=max(errors))


def _finding(found: _Accuracies, times: tuple[float, ...], chance: float) -> str:
    i, j = np.unravel_index(found.blocks.argmax(), found.blocks.shape)
    reference = "; ".join(f"{name} reaches {value:.1f} %" for name, value in found.references.items())
    return (
        f"Block {j + 1} at t = {times[i]:g} reads best: {found.blocks[i, j]:.1f} % (the most frequent "
        f"class is {chance:.1f} % of the samples{'; ' + reference if reference else ''}; standard errors up to "
        f"{found.largest_error:.1f})."
    )


def _plots(found: _Accuracies, times: tuple[float, ...], chance: float) -> list[Plot]:
    _, depth = found.blocks.shape
    blocks = np.arange(1, depth + 1)
    lines = [
        Series(label=f"t = {t:g}", x=blocks, y=found.blocks[i], colour=i % 7, markers=True) for i, t in enumerate(times)
    ]
    over_t = Series(label="best block", x=times, y=found.blocks.max(axis=1), colour=0, markers=True)
    flat = [
        ("most frequent class", chance, 7),
        *((name, value, 5 + i) for i, (name, value) in enumerate(found.references.items())),
    ]

    def levels(x: Sequence[float] | np.ndarray) -> list[Series]:
        return [Series(label=label, x=x, y=np.full(len(x), v), colour=c % 8, dashed=True) for label, v, c in flat]

    return [
        Plot(
            name="probe_over_blocks",
            headline=lines[len(lines) // 2],
            headline_title="by block",
            drawing=Chart(
                title="By block",
                x_label="block",
                y_label="top-1 accuracy (%)",
                series=[*lines, *levels(blocks)],
                note="Look for the block where classes are easiest to read and the gap to the encoder's line: REPA "
                "Fig. 2a, 3a; SRA Fig. 2 (right), 7a.",
            ),
        ),
        Plot(
            name="probe_over_t",
            drawing=Chart(
                title="Best block, by timestep",
                x_label="timestep t (0 = data, 1 = noise)",
                y_label="top-1 accuracy (%)",
                series=[over_t, *levels(times)],
                note="Look for how fast meaning is lost in noise; alignment lifts the whole line in REPA Fig. 7 "
                "(linear probing) and SRA Fig. 7b.",
            ),
        ),
    ]


def _references(subject: Subject) -> list[str]:
    """The deepest cached layer of each encoder (of the first two), and the deepest VAE group."""
    last: dict[str, str] = {}
    for name in subject.token_features:  # shallow to deep
        last[name.split("@")[0]] = name
    return [*list(last.values())[:2], *subject.levels[-1:]]
