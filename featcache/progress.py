"""Progress in the terminal: bars with rate and time left, plain lines elsewhere; and the table of a build's stages."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Self

from rich.console import RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from featcache.build.pipeline import Meter, Stage
from featcache.console import console, safe

PLAIN_EVERY_S = 10.0


class _Lined(Progress):
    """Bars with a line of text below them."""

    line = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.line:
            yield Text(self.line, style="dim")


class Bar:
    """A context with one bar after another: name, bar, count, a text, time spent, time left; only on a terminal."""

    def __init__(self) -> None:
        self._progress = _Lined(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, name: str, total: int, done: int) -> None:
        """A new bar."""
        self._task = self._progress.add_task(safe(name), total=total, completed=done, text="")

    def update(self, done: int, text: str | None = None) -> None:
        """Moves the bar; the text stays if there is no new one."""
        if self._task is None:
            return
        self._progress.update(self._task, completed=done)
        if text is not None:
            self._progress.update(self._task, text=safe(text))

    def warn(self, text: str) -> None:
        """A remark above the bar."""
        console.print(f"[yellow]note:[/yellow] {safe(text)}")


class RichBar(Bar):
    """One task after another with a rate; ``name`` is that of tasks without one."""

    def __init__(self, name: str, *, unit: str) -> None:
        super().__init__()
        self._name, self._unit = name, unit
        self._done, self._since, self._start_s = 0, 0, 0.0

    def begin(self, name: str, total: int, done: int = 0) -> None:
        """A new task of ``total`` units, of which ``done`` are behind it and do not count for the rate."""
        name = name or self._name
        if not console.is_terminal:
            console.print(f"{safe(name)}: {total - done} {self._unit}")
        self._done, self._since, self._start_s = done, done, time.monotonic()
        self.show(name, total, done)

    def advance(self, count: int) -> None:
        """``count`` more units of the task are done."""
        self._done += count
        rate = (self._done - self._since) / max(time.monotonic() - self._start_s, 1e-9)
        self.update(self._done, f"{rate:.1f} {self._unit}/s")

    def note(self, text: str) -> None:
        """A remark above the bar."""
        self.warn(text)


class RichProgress(Bar):
    """Of a build: rate, bottleneck, and each stage's rate below; where there is no terminal, a line every ten seconds."""

    def __init__(self, meter: Meter | None = None) -> None:
        super().__init__()
        self._total = self._done = self._since = 0
        self._start_s = self._said_s = 0.0
        self._meter = meter or Meter()

    def start(self, *, total: int, done: int, note: str) -> None:
        self._total, self._done, self._since = total, done, done
        self._start_s = self._said_s = time.monotonic()
        console.print(f"encoding {total - done} of {total} images: {safe(note)}")
        self.show("encoding", total, done)

    def advance(self, images: int) -> None:
        self._done += images
        elapsed = max(time.monotonic() - self._start_s, 1e-9)
        rate = (self._done - self._since) / elapsed
        slowest, stages = _stages(self._meter)
        text = f"{rate:.3g} images/s{slowest}"
        self._progress.line = stages
        self.update(self._done, text)
        if not console.is_terminal and time.monotonic() - self._said_s > PLAIN_EVERY_S:
            self._said_s = time.monotonic()
            left = (self._total - self._done) / max(rate, 1e-9)
            console.print(f"{self._done}/{self._total} images, {text}, {left:.0f} s left; {stages}")


def _stages(meter: Meter) -> tuple[str, str]:
    """The bottleneck, and every stage with its rate, the slowest first."""
    rates = sorted((stage.images_per_s, name) for name, stage in list(meter.stages.items()))
    if not rates:
        return "", ""
    every = ", ".join(f"{name} {rate:.3g}" for rate, name in rates)
    return f" (bottleneck: {rates[0][1]})", f"images/s of each stage: {every}"


def stage_table(stages: Mapping[str, Stage]) -> Table:
    """What each stage could do alone, slowest first."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("stage", "images/s", "ms an image", "lanes", "images"):
        table.add_column(title, justify="left" if title == "stage" else "right")
    for name, stage in sorted(stages.items(), key=lambda item: item[1].images_per_s):
        milliseconds = 1000 * stage.busy_s / max(1, stage.images)
        table.add_row(name, f"{stage.images_per_s:.4g}", f"{milliseconds:.4g}", str(stage.lanes), str(stage.images))
    return table
