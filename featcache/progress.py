"""Build progress in the terminal: rate, time left, warnings."""

from __future__ import annotations

import time

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from featcache.console import console

PLAIN_EVERY_S = 10.0


class RichProgress:
    """A bar on a terminal; elsewhere a line every ten seconds."""

    def __init__(self) -> None:
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
        if self._task is not None:
            self._bar.update(self._task, completed=self._done, rate=f"{rate:.1f} images/s")
        if not console.is_terminal and time.monotonic() - self._said > PLAIN_EVERY_S:
            self._said = time.monotonic()
            left = (self._total - self._done) / max(rate, 1e-9)
            console.print(f"{self._done}/{self._total} images, {rate:.1f} images/s, {left:.0f} s left")

    def warn(self, text: str) -> None:
        console.print(f"[yellow]note:[/yellow] {text}")
