"""How long work tells how far it is: one protocol for builds, transfers, checks, sampling, judging and training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Progress(Protocol):
    """Who is told how far a piece of work is: one task after another. Any thread may call it."""

    def begin(self, name: str, total: int | None, *, done: int = 0, unit: str = "images") -> None:
        """A new task of `total` units (None: nobody knows), of which `done` were done before and tell nothing of the
        rate. `bytes` are a unit that is shown as sizes."""

    def update(self, count: int, text: str = "") -> None:
        """`count` more units are done. `text`: the latest numbers, shown beside the bar until there are newer ones;
        lines after its first one stand below."""

    def note(self, text: str) -> None:
        """A remark that stays."""


class RecordingProgress(Progress, Protocol):
    """Progress of work that writes down where it stands again and again: of training."""

    def record(self, count: int, numbers: Sequence[str], more: Sequence[str] = ()) -> None:
        """`count` more units are done, and the work has written down where it stands, as it will again and again.

        numbers: what to see of it at any width. more: what to see where there is room, the most telling first. Where lines
        are printed, each record is one, with `numbers` alone. Rates and the time left are told from the first record on:
        what comes before it, such as compiling, is not like what follows.
        """


class Quiet:
    """Says nothing: for ranks other than the main one, and for callers who do not watch."""

    def begin(self, name: str, total: int | None, *, done: int = 0, unit: str = "images") -> None: ...

    def update(self, count: int, text: str = "") -> None: ...

    def record(self, count: int, numbers: Sequence[str], more: Sequence[str] = ()) -> None:
        self.update(count, "  ".join(numbers))

    def note(self, text: str) -> None: ...


QUIET: RecordingProgress = Quiet()
