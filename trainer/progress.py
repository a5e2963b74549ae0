"""Training progress in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from featcache.console import console, safe
from featcache.progress import Bar


class RichWatcher(Bar):
    """A training run's bar with its latest numbers; plain lines where the output is not a terminal."""

    def __init__(self) -> None:
        super().__init__()
        self._total = 0

    def start(self, *, run: Path, total: int, done: int, note: str) -> None:
        self._total = total
        console.print(f"training {safe(note)}: steps {done} to {total}, in {safe(run)}")
        self.show(note, total, done)

    def advance(self, step: int, shown: Mapping[str, float]) -> None:
        text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        if text and not console.is_terminal:
            console.print(f"step {step}/{self._total}  {safe(text)}")
        self.update(step, text or None)
