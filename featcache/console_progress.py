"""Progress on the console: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from featcache.console import amount_text, console, plain, safe, size_text, time_text

PLAIN_EVERY_S = 10.0
SILENT_S = 600.0  # the longest that recorded work says nothing: its next record may be hours away
# Over so many of the latest ones the rate is taken: enough that checkpoints and grids, which come every 100 records, are
# spread over the steps between them.
RECORDS = 200
LEAST_BAR, WIDEST_BAR = 10, 60


@dataclass
class _Task:
    """What is under way. moved_s: when it last advanced; said, said_s: what of it was last printed, and when; records: when
    the latest were made, and what was done by then; recorded, more: what the last one told."""

    name: str
    total: int | None
    done: int
    unit: str
    text: str = ""
    before: int = field(init=False)
    began_s: float = field(init=False)
    moved_s: float = field(init=False)
    said: tuple[int, str] = field(init=False)
    said_s: float = field(init=False)
    records: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=RECORDS), init=False)
    recorded: Sequence[str] = ()
    more: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.before, self.said = self.done, (self.done, "")
        self.began_s = self.moved_s = self.said_s = time.monotonic()

    def numbers(self) -> str:
        """`60/100 images, 12.3 images/s, 3 s left`; the time spent where nothing tells how much is left."""
        spent_s, moving_s = time.monotonic() - self.began_s, max(self.moved_s - self.began_s, 1e-9)
        rate = (self.done - self.before) / moving_s
        unit = "" if self.unit == "bytes" else f" {self.unit}"
        parts = [self._far() + unit]
        if rate:
            parts.append(f"{self._amount(rate)}{unit}/s")
        if rate and self.total is not None and self.done < self.total:
            parts.append(f"{time_text((self.total - self.done) / rate + moving_s - spent_s)} left")
        else:
            parts.append(time_text(spent_s) if rate else f"{time_text(spent_s)} so far")
        return ", ".join(parts)

    def whereabouts(self) -> list[str]:
        """Of recorded work: `60/100 steps`, `60.0 %`, `3 min left`, the time left as of this moment."""
        parts = [f"{self._far()} {self.unit}"]
        if not self.total:
            return parts
        # Rounded down: 100 % is the end.
        parts.append(f"{int(1000 * self.done / self.total) / 10:.1f} %")
        (since_s, since), left = self.records[0], self.total - self.done
        if self.done > since and left:
            idle_s = time.monotonic() - self.moved_s
            parts.append(f"{time_text(left * (self.moved_s - since_s) / (self.done - since) - idle_s)} left")
        return parts

    def _far(self) -> str:
        return "/".join(self._amount(n) for n in (self.done, self.total) if n is not None)

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

    def record(self, count: int, numbers: Sequence[str], more: Sequence[str] = ()) -> None:
        self.update(count)
        task = self._task
        assert task is not None, "a task has begun"
        with self._lock:
            task.records.append((task.moved_s, task.done))
            task.recorded, task.more = [_flat(part) for part in numbers], [_flat(part) for part in more]
        if self._live is None:
            self._say()

    def note(self, text: str) -> None:
        console.print(f"[yellow]note:[/yellow] {safe(text)}")

    def _picture(self) -> RenderableType:
        """The task's bar with its numbers, and the further lines of its text."""
        task = self._task
        assert task is not None
        if task.records:
            return _recorded_picture(task, console.width)
        beside, *below = plain(task.text).splitlines() or [""]
        name, numbers = Text(task.name, style="bold"), Text(", ".join(filter(None, [task.numbers(), beside])))
        width = min(
            WIDEST_BAR, max(LEAST_BAR, console.width - name.cell_len - numbers.cell_len - 2)
        )  # the bar gets what is left
        bar = self._spinner if task.total is None else ProgressBar(task.total, task.done, width=width)
        row = Table.grid("", "", "", padding=(0, 1))
        row.add_row(name, bar, numbers)
        return Group(row, *(Text(line, style="dim") for line in below))

    def _say_regularly(self) -> None:
        while not self._over.wait(PLAIN_EVERY_S):
            task = self._task
            # A record is a line by itself.
            if task is None or not task.records or time.monotonic() - task.said_s >= SILENT_S:
                self._say(always=True)

    def _say(self, *, always: bool = False) -> None:
        """A line about the task, if it has got further since the last one."""
        task = self._task
        if task is None or not (always or (task.done, task.text) != task.said):
            return
        task.said, task.said_s = (task.done, task.text), time.monotonic()
        if task.records:
            parts = [*task.whereabouts(), *task.recorded]
        else:
            parts = [task.numbers(), *plain(task.text).splitlines()]
        console.print(Text(f"{task.name}: {', '.join(parts)}"))


def _flat(text: str) -> str:
    return " ".join(plain(text).split())


def _recorded_picture(task: _Task, width: int) -> RenderableType:
    """Two lines: how far it is, with a bar where there is room; then its numbers, and of the others as many as fit.

    Where the first is too long, the bar goes, then the share, then the name; the time left stays.
    """
    name, (far, *rest) = task.name, task.whereabouts()
    share, left = ", ".join([far, *rest]), ", ".join([far, *rest[1:]])
    # A column stays free: terminals differ in what they do with the last one.
    room = width - 1 - cell_len(name) - cell_len(share) - 2
    if task.total and room >= LEAST_BAR:
        row = Table.grid("", "", "", padding=(0, 1))
        bar = ProgressBar(task.total, task.done, width=min(WIDEST_BAR, room))
        row.add_row(Text(name, style="bold"), bar, Text(share))
        first: RenderableType = row
    else:
        lines = [f"{name} {share}", f"{name} {left}", left]
        line = next((line for line in lines if cell_len(line) < width), left)
        text = Text(line)
        if line.startswith(name):
            text.stylize("bold", 0, len(name))
        first = text
    shown = list(task.recorded)
    for part in task.more:
        if cell_len(", ".join([*shown, part])) >= width:
            break
        shown.append(part)
    return Group(first, Text(", ".join(shown), style="dim"))
