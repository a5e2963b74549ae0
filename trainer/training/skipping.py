"""Steps that are left out because their loss or gradient is not finite: decided, and counted, on the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainer import distributed
from trainer.distributed import local

if TYPE_CHECKING:
    from trainer.training.state import Parts

_NONE = -1


class SkippedSteps:
    """Takes the place of `trainer.training.meters.FirstBadStep` where bad steps are to be left out. One decision for the
    backbone, heads, discriminator and average of all ranks; the host learns of it where it reads, and nowhere else.

    Args:
        bound: how many steps of the run may be left out. known: those left out before.
    """

    def __init__(self, bound: int, device: torch.device, known: Sequence[int] = ()) -> None:
        self.bound, self._before, self._found = bound, len(known), list[int]()
        self._places = torch.arange(max(bound + 1 - len(known), 1), device=device)
        self._bad = torch.zeros((), dtype=torch.bool, device=device)
        self._begin_again()

    def _begin_again(self) -> None:
        self._steps = torch.full_like(self._places, _NONE)
        self._count = torch.zeros_like(self._places[0])

    def watch(self, value: Tensor, step: int) -> None:
        """A scalar of this step that should be finite."""
        self._bad = self._bad | ~torch.isfinite(value.detach())

    def watch_gradients(self, parameters: Iterable[nn.Parameter], step: int) -> None:
        """Of a module whose gradients are not part of the step's norm."""
        found = [local(p.grad) for p in parameters if p.grad is not None]
        if found:
            self.watch(nn.utils.get_total_norm(found, foreach=True), step)

    def decide(self, step: int) -> Tensor:
        """Whether the step is left out, by what was watched in it on all ranks: a float32 scalar, 1 or 0, as optimisers
        take it for `found_inf`."""
        flag = distributed.sum_over_ranks(self._bad.float()).clamp(max=1.0)
        bad = flag > 0
        self._steps = torch.where(bad & (self._places == self._count), step, self._steps)
        self._count = self._count + bad
        self._bad = torch.zeros_like(self._bad)
        return flag

    def read(self) -> list[int]:
        """The steps left out since the last call; the last of them is the one beyond the bound, if there is one. Waits for
        the device."""
        found = [step for step in self._steps.tolist() if step != _NONE]
        self._found += found
        if found:
            self._begin_again()
        return found

    @property
    def first_too_many(self) -> int | None:
        """The step that exceeded the bound, as far as was read. It is none of those left out before, of which there may be
        more: the bound may have been lowered."""
        allowed = max(self.bound - self._before, 0)
        return self._found[allowed] if len(self._found) > allowed else None


def step_unless(optimizer: torch.optim.Optimizer, left_out: Tensor | None) -> None:
    """A step of a fused optimiser, whose kernels leave weights, moments and step counts as they are where `left_out` is 1."""
    if left_out is None:
        optimizer.step()
        return
    optimizer.found_inf = left_out  # type: ignore[attr-defined]  # as torch.amp.GradScaler passes it
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def spoil_gradient(parts: Parts, left_out: Tensor) -> None:
    """Makes one gradient NaN where `left_out` is 1, so that the loss scaling leaves the step out; else changes no bit."""
    gradient = next(p.grad for group in parts.groups for p in group if p.grad is not None)
    gradient.mul_(torch.where(left_out > 0, torch.nan, 1.0))
