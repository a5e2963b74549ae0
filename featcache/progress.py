"""Build progress in the terminal: rate, time left, the bottleneck, warnings; and the table of stages."""

from __future__ import annotations

import time
from collections.abc import Mapping

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

from featcache.console import console
from featcache.pipeline import Meter, Stage

PLAIN_EVERY_S = 10.0


class RichProgress:
    """A bar on a terminal; elsewhere a line every ten seconds."""

    def __init__(self, meter: Meter | None = None) -> None:
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._total = self._done = self._since = 0
        self._start = self._said = 0.0
        self._meter = meter or Meter()

    def __enter__(self) -> RichProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, *, total: int, done: int, note: str) -> None:
        self._total, self._done, self._since = total, done, done
        self._start = self._said = time.monotonic()
        console.print(f"encoding {total - done} of {total} images: {note}")
        self._task = self._bar.add_task("encoding", total=total, completed=done, rate="")

    def advance(self, images: int) -> None:
        self._done += images
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rate = (self._done - self._since) / elapsed
        text = f"{rate:.3g} images/s{_bottleneck(self._meter)}"
        if self._task is not None:
            self._bar.update(self._task, completed=self._done, rate=text)
        if not console.is_terminal and time.monotonic() - self._said > PLAIN_EVERY_S:
            self._said = time.monotonic()
            left = (self._total - self._done) / max(rate, 1e-9)
            console.print(f"{self._done}/{self._total} images, {text}, {left:.0f} s left")

    def warn(self, text: str) -> None:
        console.print(f"[yellow]note:[/yellow] {text}")


def _bottleneck(meter: Meter) -> str:
    slowest = meter.slowest()
    if slowest is None:
        return ""
    return f" (slowest: {slowest}, {meter.stages[slowest].images_per_s:.3g}/s)"


def stage_table(stages: Mapping[str, Stage]) -> Table:
    """What each stage could do alone, slowest first."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("stage", "images/s", "ms an image", "lanes", "images"):
        table.add_column(title, justify="left" if title == "stage" else "right")
    for name, stage in sorted(stages.items(), key=lambda item: item[1].images_per_s):
        milliseconds = 1000 * stage.busy_s / max(1, stage.images)
        table.add_row(name, f"{stage.images_per_s:.4g}", f"{milliseconds:.4g}", str(stage.lanes), str(stage.images))
    return table
