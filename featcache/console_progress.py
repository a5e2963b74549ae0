"""Progress on the console: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from featcache.console import amount_text, console, plain, safe, size_text, time_text

PLAIN_EVERY_S = 10.0


@dataclass
class _Task:
    """What is under way. moved_s: when it last advanced; said: what of it was last printed."""

    name: str
    total: int | None
    done: int
    unit: str
    text: str = ""
    before: int = field(init=False)
    began_s: float = field(init=False)
    moved_s: float = field(init=False)
    said: tuple[int, str] = field(init=False)

    def __post_init__(self) -> None:
        self.before, self.said = self.done, (self.done, "")
        self.began_s = self.moved_s = time.monotonic()

    def numbers(self) -> str:
        """`60/100 images, 12.3 images/s, 3 s left`; the time spent where nothing tells how much is left."""
        spent_s, moving_s = time.monotonic() - self.began_s, max(self.moved_s - self.began_s, 1e-9)
        rate = (self.done - self.before) / moving_s
        unit = "" if self.unit == "bytes" else f" {self.unit}"
        parts = ["/".join(self._amount(n) for n in (self.done, self.total) if n is not None) + unit]
        if rate:
            parts.append(f"{self._amount(rate)}{unit}/s")
        if rate and self.total is not None and self.done < self.total:
            parts.append(f"{time_text((self.total - self.done) / rate + moving_s - spent_s)} left")
        else:
            parts.append(time_text(spent_s))
        return ", ".join(parts)

    def _amount(self, count: float) -> str:
        return size_text(count) if self.unit == "bytes" else amount_text(count)


class RichProgress:
    """Shows tasks while the context is open (`featcache.progress.Progress`): on a terminal a bar with rate and time
    left, or a spinner; elsewhere a line every ten seconds. Of each task that advanced a line stays."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._task: _Task | None = None
        self._over = threading.Event()
        self._spinner = Spinner("dots")
        self._live: Live | None = None
        self._lines: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._live is not None:
            self._live.stop()
        if self._lines is not None:
            self._lines.join()
        self._say()

    def begin(self, name: str, total: int | None, *, done: int = 0, unit: str = "images") -> None:
        self._say()
        self._task = _Task(" ".join(plain(name).split()), total, done, unit)
        if self._live is not None or self._lines is not None:
            return
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(get_renderable=self._picture, console=console, refresh_per_second=10, transient=True)
            self._live.start()
        else:
            lines = threading.Thread(target=self._say_regularly, name="progress", daemon=True)
            lines.start()
            self._lines = lines

    def update(self, count: int, text: str = "") -> None:
        task = self._task
        assert task is not None, "a task has begun"
        with self._lock:
            task.done += count
            if count:
                task.moved_s = time.monotonic()
            if text:
                task.text = text

    def note(self, text: str) -> None:
        console.print(f"[yellow]note:[/yellow] {safe(text)}")

    def _picture(self) -> RenderableType:
        """The task's bar with its numbers, and the further lines of its text."""
        task = self._task
        assert task is not None
        beside, *below = plain(task.text).splitlines() or [""]
        name, numbers = Text(task.name, style="bold"), Text(", ".join(filter(None, [task.numbers(), beside])))
        width = min(60, max(10, console.width - name.cell_len - numbers.cell_len - 2))  # the bar gets what is left
        bar = self._spinner if task.total is None else ProgressBar(task.total, task.done, width=width)
        row = Table.grid("", "", "", padding=(0, 1))
        row.add_row(name, bar, numbers)
        return Group(row, *(Text(line, style="dim") for line in below))

    def _say_regularly(self) -> None:
        while not self._over.wait(PLAIN_EVERY_S):
            self._say(always=True)

    def _say(self, *, always: bool = False) -> None:
        """A line about the task, if it has got further since the last one."""
        task = self._task
        if task is None or not (always or (task.done, task.text) != task.said):
            return
        task.said = (task.done, task.text)
        texts = plain(task.text).splitlines()
        console.print(Text(f"{task.name}: {', '.join([task.numbers(), *texts])}"))
