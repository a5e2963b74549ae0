"""What all campaigns share: counting, failures, time, and how a trial is named so that it can be repeated."""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_KEPT_OF_A_KIND = 5


@dataclass
class Tally:
    """Trials by scene and failures by kind. `failures` keeps a few of each kind; `counts` has them all."""

    deadline: float | None = None
    trials: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, str]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def trial(self, scene: str, problems: list[str], where: str) -> None:
        """One trial of a scene with what was wrong in it (one line each, without numbers that differ by trial first:
        a problem's kind is what it says up to the first colon)."""
        self.trials[scene] += 1
        for problem in problems:
            kind = f"{scene}: {problem.split(':')[0]}"
            self.failed[kind] += 1
            if self.failed[kind] <= _KEPT_OF_A_KIND:
                self.failures.append({"scene": scene, "where": where, "problem": problem[:1500]})

    @property
    def n_trials(self) -> int:
        return sum(self.trials.values())

    @property
    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def to_json(self) -> dict[str, Any]:
        return {
            "trials": self.n_trials,
            "by_scene": dict(sorted(self.trials.items())),
            "failed": dict(sorted(self.failed.items())),
            "failures": self.failures,
            **self.notes,
        }


def dice(*words: object) -> random.Random:
    """A generator that depends on these words alone."""
    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "little"))


def fingerprint(folder: Path) -> dict[str, str]:
    """Every entry below a folder (links not followed): what it is and, of a file, its SHA-256."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link {path.readlink()}"
        elif path.is_file():
            try:
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
            except PermissionError:
                found[name] = "unreadable"
        else:
            found[name] = "folder" if path.is_dir() else "other"
    return found


def differences(have: dict[str, Any], want: dict[str, Any]) -> list[str]:
    """Names that one of two trees lacks or that differ, a few."""
    wrong = [f"{n} missing" for n in want if n not in have] + [f"{n} is new" for n in have if n not in want]
    wrong += [f"{n} changed" for n in have if n in want and have[n] != want[n]]
    return wrong[:6] + ([f"... {len(wrong)} in all"] if len(wrong) > 6 else [])
