"""What a run measures of itself: averages that stay on the device, time, and the first step that went wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from featcache.console import time_text
from trainer import distributed

_NEVER = 1 << 62


class RunningMeans:
    """Averages of scalars over steps, micro-batches and ranks. Adding never waits for the device, taking does."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._left_out: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], left_out: Tensor | None = None) -> None:
        """left_out: 1 on the device where the values are of a step that does not count, else 0."""
        for name, value in values.items():
            value = value.detach().float()
            if left_out is not None:
                value = torch.where(left_out > 0, 0.0, value)
                self._left_out[name] = self._left_out[name] + left_out if name in self._left_out else left_out
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The averages so far, the same on every rank, and a fresh start. One exchange, one wait. NaN where no step
        counted."""
        if not self._sums:
            return {}
        names = list(self._sums)
        means = torch.stack([self._sums[name] / (self._counts[name] - self._left_out.get(name, 0)) for name in names])
        means = distributed.sum_over_ranks(means) / distributed.world_size()
        self._sums.clear()
        self._counts.clear()
        self._left_out.clear()
        return dict(zip(names, means.tolist()))


class FirstBadStep:
    """Remembers, on the device, the first step with a loss or gradient that is not finite."""

    def __init__(self, device: torch.device) -> None:
        self._step = torch.full((), _NEVER, dtype=torch.int64, device=device)

    def watch(self, value: Tensor, step: int) -> None:
        self._step = torch.where(torch.isfinite(value), self._step, self._step.clamp(max=step))

    def read(self) -> int | None:
        """The step, the same on every rank; None if all went well. Waits for the device."""
        step = int(distributed.min_over_ranks(self._step.clone()))
        return None if step == _NEVER else step


class Pace:
    """What the loop is doing, and how long it took the last times: for whoever asks from another thread."""

    def __init__(self) -> None:
        self.name, self._began_s = "the start", time.monotonic()
        self._took_s: dict[str, float] = {}

    @contextmanager
    def doing(self, name: str) -> Iterator[None]:
        """Around each piece of work; a step's is timed by the host, which a GPU may lag behind."""
        former, self.name, self._began_s = self.name, name, time.monotonic()
        try:
            yield
        finally:
            self._took_s[name] = time.monotonic() - self._began_s
            self.name = former

    def left(self) -> str | None:
        """How long the work under way will take yet, in words, judging by the last time; None if nobody knows."""
        took_s, spent_s = self._took_s.get(self.name), time.monotonic() - self._began_s
        if took_s is None:
            return None
        return f"about {time_text(max(took_s - spent_s, 0.0))} left of {self.name}"


class TrainingClock:
    """Seconds spent training: without what happens in `paused`, and going on where a resumed run stopped."""

    def __init__(self, trained_s: float) -> None:
        self._before_s, self._begin = trained_s, time.perf_counter()
        self._lap: tuple[float, int] | None = None

    @property
    def trained_s(self) -> float:
        return self._before_s + time.perf_counter() - self._begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        pause = time.perf_counter()
        yield
        self._begin += time.perf_counter() - pause

    def steps_per_s(self, done: int) -> float | None:
        """Rate since the last call; None at the first."""
        now, last = self.trained_s, self._lap
        self._lap = (now, done)
        if last is None or done == last[1]:
            return None
        return (done - last[1]) / max(now - last[0], 1e-9)
