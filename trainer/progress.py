"""Training progress in the terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

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


class RichBar:
    """One named task after another with a rate and the time left."""

    def __init__(self, name: str, *, unit: str) -> None:
        self._unit = unit
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
        self._name = name
        self._task: TaskID | None = None
        self._done, self._start = 0, 0.0

    def __enter__(self) -> RichBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, name: str, total: int, done: int = 0) -> None:
        if not console.is_terminal:
            console.print(f"{name}: {total - done} {self._unit}")
        self._done, self._start = 0, time.monotonic()
        self._task = self._bar.add_task(name, total=total, completed=done, rate="")

    def advance(self, count: int) -> None:
        self._done += count
        rate = self._done / max(time.monotonic() - self._start, 1e-9)
        if self._task is not None:
            self._bar.update(self._task, advance=count, rate=f"{rate:.1f} {self._unit}/s")

    def note(self, text: str) -> None:
        console.print(f"[yellow]note:[/yellow] {text}")


class RichWatcher:
    """A progress bar with rate and time left; plain lines where the output is not a terminal."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._total = 0

    def __enter__(self) -> RichWatcher:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, *, run: Path, total: int, done: int, note: str) -> None:
        self._total = total
        console.print(f"training {note}: steps {done} to {total}, in {run}")
        self._task = self._bar.add_task(note, total=total, completed=done, shown="")

    def advance(self, step: int, shown: Mapping[str, float]) -> None:
        if shown and not console.is_terminal:
            console.print(f"step {step}/{self._total}  {_line(shown)}")
        if self._task is not None:
            self._bar.update(self._task, completed=step)
            if shown:
                self._bar.update(self._task, shown=_line(shown))

    def warn(self, text: str) -> None:
        console.print(f"[yellow]note:[/yellow] {text}")


def _line(shown: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
