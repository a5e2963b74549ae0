"""The training loop that the three networks share: it says how far it is, and a killed training goes on where it stopped."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featcache.console import time_text
from featcache.errors import UserError

SAY_EVERY_S = 30.0
SAVE_EVERY_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a training changes, by name; all of it is in its state on disk. average: of `network`, by `update_average`."""

    network: nn.Module
    average: nn.Module
    heads: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]

    def state(self) -> dict[str, Any]:
        modules = [m.state_dict() for m in (self.network, self.average, self.heads)]
        return {"modules": modules, "optimizers": [o.state_dict() for o in self.optimizers]}

    def restore(self, saved: Mapping[str, Any]) -> None:
        for module, values in zip((self.network, self.average, self.heads), saved["modules"], strict=True):
            module.load_state_dict(values)
        for optimizer, values in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)


def averaged(network: nn.Module) -> nn.Module:
    """A frozen copy for `update_average`."""
    return copy.deepcopy(network).eval().requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, step: int) -> None:
    """Moving average of weights; buffers are copied. A short memory at the start keeps untrained weights out."""
    decay = min(0.998, (1 + step) / (10 + step))
    for kept, now in zip(average.parameters(), network.parameters(), strict=True):
        kept.lerp_(now, 1 - decay)
    for held, counted in zip(average.buffers(), network.buffers(), strict=True):
        held.copy_(counted)


def rate(step: int, steps: int) -> float:
    """Factor of the learning rate: linear over the first 2 % of the steps, then a cosine to 1 %."""
    done = step / steps
    return min(1.0, (done + 1 / steps) / 0.02) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def run(
    name: str,
    parts: Parts,
    update: Callable[[int], dict[str, Tensor]],
    *,
    steps: int,
    settings: Mapping[str, Any],
    out: Path,
    measure: Callable[[nn.Module], str] | None = None,
) -> float:
    """`update(step)` for each step that is not done yet; returns the seconds of all sessions together.

    Args:
        update: one step of the optimisers; returns the terms of the loss, by name.
        settings: what makes a state of another training useless: a state with others is refused.
        measure: figures of the averaged network in few words, asked for with each line of progress.

    Raises:
        UserError: `out` holds the state of a training with other settings.
    """
    path = out / f"{name}-state.pt"
    first, spent = 0, 0.0
    if path.is_file():
        saved = torch.load(path, weights_only=True)
        if saved["settings"] != dict(settings):
            raise UserError(
                f"{path} belongs to a training with other settings: {saved['settings']} against {dict(settings)}",
                remedy="Choose another --out, or delete that file to begin again.",
            )
        parts.restore(saved)
        first, spent = int(saved["step"]), float(saved["seconds"])
        say(name, f"goes on at step {first:,} of {steps:,}")
    began = said = kept = time.monotonic()

    def save(step: int) -> None:
        partial = path.with_suffix(".partial")
        state = parts.state() | {"settings": dict(settings), "step": step, "seconds": spent + time.monotonic() - began}
        torch.save(state, partial)
        partial.replace(path)

    for step in range(first, steps):
        terms = update(step)
        update_average(parts.average, parts.network, step)
        now, done = time.monotonic(), step + 1
        if now - said >= SAY_EVERY_S or done == steps:
            speed = (done - first) / (now - began)
            left = time_text((steps - done) / speed)
            seen = f"; {measure(parts.average)}" if measure is not None else ""
            shown = ", ".join(f"{kind} {value.item():.3f}" for kind, value in terms.items())
            say(name, f"{done:,}/{steps:,}, {speed:.2f} steps/s, {left} left; {shown}{seen}")
            said = time.monotonic()
        if now - kept >= SAVE_EVERY_S or done == steps:
            save(done)
            kept = time.monotonic()
    return spent + time.monotonic() - began


def say(name: str, text: str) -> None:
    """A plain line: two trainings write to one terminal."""
    print(f"{name:>5} | {text}", flush=True)
