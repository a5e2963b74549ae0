"""Gradients of alignment losses with respect to hidden states, for the run's own loss and for targets it never saw.

The run's own loss goes through its own trained head. For any other target no trained head exists: there, a linear head
is fitted by ridge regression from the tapped hidden state to the target's directions, on samples that are not measured,
at all times together. The papers do not say how they probe foreign targets; this choice is ours, and puts all targets
on an equal footing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.align.base import AlignInputs, cosine_per_token
from trainer.analyze.gradients import Loss, RidgeHeads
from trainer.analyze.subject import MIXTURE, Subject

OWN = "own loss"


class OwnSample(TypedDict):
    """What the run's own loss sees beside hidden states: a pytree whose tensors have samples in front.

    teacher: its answers (SRA), in the order in which the loss asks for them.
    """

    t: Tensor
    targets: dict[str, Tensor]
    time_embedding: Tensor
    latent: Tensor
    uniform: Tensor
    teacher: list[Tensor]


class Split(NamedTuple):
    """Samples to measure on, and the following ones to fit heads on."""

    measured: int
    fitted: int


def split(subject: Subject) -> Split:
    """At most `gradient_samples` each, at most half of the chosen samples for measuring."""
    measured = min(subject.options.gradient_samples, len(subject.indices) // 2)
    return Split(measured, min(subject.options.gradient_samples, len(subject.indices) - measured))


@torch.no_grad()
def fit_heads(subject: Subject, targets: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Target -> weights [D, C] and offset [C] of a head from block `subject.block`, fitted over all timestep bins."""
    heads = RidgeHeads()
    sizes, bins = split(subject), subject.options.bins
    depths = taps(subject)
    for rows in subject.chunks(sizes.fitted, start=sizes.measured):
        fixed: dict[str, Tensor] = {}
        for index in range(bins):
            state = subject.state(rows, subject.times_in_bin(rows, index, bins), depths, targets=MIXTURE in targets)
            hidden = state.hidden[subject.block].flatten(0, 1)  # [b * N, D]
            for name in targets:
                if name == MIXTURE or name not in fixed:  # the mixture alone depends on t
                    fixed[name] = F.normalize(subject.target(name, rows, state).flatten(0, 1).float(), dim=-1)
            heads.add(hidden, fixed)
    return heads.solve()


def taps(subject: Subject) -> tuple[int, ...]:
    """Blocks whose hidden states are needed: the method's and the one looked at."""
    own = subject.alignment.taps if subject.alignment is not None else ()
    return tuple(sorted({subject.block, *own}))


def head_loss(subject: Subject, weight: Tensor, offset: Tensor) -> Loss[Tensor]:
    """Negative mean patch cosine of the fitted head's output: (block -> [T + N, D], target [N, C]) -> scalar. The tokens of
    streams have no target."""
    depth, before = subject.block, subject.cfg.stream_tokens

    def loss(tokens: Mapping[int, Tensor], target: Tensor) -> Tensor:
        return -cosine_per_token(tokens[depth][before:] @ weight + offset, target).mean()

    return loss


def own_sample(subject: Subject, state: AlignInputs) -> OwnSample:
    """A state as `OwnSample`."""
    answers: list[Tensor] = []
    if state.teacher is not None and subject.alignment is not None:
        ask = state.teacher

        def record(t: Tensor, depth: int) -> Tensor:
            answers.append(ask(t, depth))
            return answers[-1]

        with torch.no_grad():
            subject.alignment.terms(_replace(state, record))
    return {
        "t": state.t,
        "targets": dict(state.targets),
        "time_embedding": state.time_embedding,
        "latent": state.latent,
        "uniform": state.uniform,
        "teacher": answers,
    }


def own_loss(subject: Subject) -> Loss[OwnSample]:
    """The run's alignment loss of one sample: (depth -> [T + N, D], one row of `own_sample`) -> scalar."""
    alignment = subject.alignment
    assert alignment is not None, "the run has no alignment"

    def loss(tokens: Mapping[int, Tensor], sample: OwnSample) -> Tensor:
        hidden, of_streams = subject.split_tokens({depth: h[None] for depth, h in tokens.items()})
        answers = iter(sample["teacher"])
        inputs = AlignInputs(
            hidden=hidden,
            t=sample["t"][None],
            targets={name: y[None] for name, y in sample["targets"].items()},
            time_embedding=sample["time_embedding"][None],
            latent=sample["latent"][None],
            uniform=sample["uniform"][None],
            # The teacher's part has no gradient and was computed before, for all samples at once.
            teacher=(lambda t, depth: next(answers)[None]) if sample["teacher"] else None,
            stream_hidden=of_streams,
        )
        return torch.stack(list(alignment.terms(inputs).values())).sum()

    return loss


def _replace(state: AlignInputs, teacher: Callable[[Tensor, int], Tensor]) -> AlignInputs:
    return dataclasses.replace(state, teacher=teacher)
