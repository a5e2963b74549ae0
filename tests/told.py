"""A progress that remembers."""

from __future__ import annotations

from featcache.progress import Quiet


class Told(Quiet):
    """Keeps what it is told: (name, total, done, unit) of each task, counts with texts, notes."""

    def __init__(self) -> None:
        self.tasks: list[tuple[str, int | None, int, str]] = []
        self.counts: list[int] = []
        self.texts: list[str] = []
        self.notes: list[str] = []

    def begin(self, name: str, total: int | None, *, done: int = 0, unit: str = "images") -> None:
        self.tasks.append((name, total, done, unit))

    def update(self, count: int, text: str = "") -> None:
        self.counts.append(count)
        self.texts.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)
