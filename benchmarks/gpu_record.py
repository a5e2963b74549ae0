"""The file that `benchmarks/gpu.py` keeps its figures in: `gpu.json`, whole at every moment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcache.errors import UserError

NAME = "gpu.json"
DONE, RUNNING, FAILED, CUT = "done", "running", "failed", "out of time"
STATUSES = (DONE, RUNNING, FAILED, CUT)


@dataclass(frozen=True)
class Record:
    """`gpu.json` in a folder: `{"small": bool, "stages": {name: {"status", "seconds", "figures", "error"}}}`.

    One process writes at a time: the stage that runs, else the one that started it. Every change replaces the file.
    """

    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / NAME

    def read(self) -> dict[str, Any]:
        """Everything so far; of a folder without a record nothing.

        Raises:
            UserError: the file is none of ours.
        """
        try:
            found: dict[str, Any] = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {"stages": {}}
        except (ValueError, OSError) as error:
            raise UserError(
                f"{self.path} cannot be read: {error}", remedy="Remove it, or name another --out."
            ) from error
        stages = found.get("stages") if isinstance(found, dict) else None
        if not isinstance(stages, dict) or not all(
            isinstance(entry, dict) and entry.get("status") in STATUSES for entry in stages.values()
        ):
            raise UserError(f"{self.path} holds no stages of benchmarks/gpu.py", remedy="Name another --out.")
        return found

    def _write(self, everything: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".writing")
        with beside.open("w") as file:
            json.dump(everything, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)

    def begin(self, *, small: bool) -> None:
        """Notes which sizes the figures are of.

        Raises:
            UserError: those that are there are of the others.
        """
        everything = self.read()
        if everything["stages"] and everything.get("small") is not small:
            raise UserError(
                f"{self.path} holds figures taken {'without' if small else 'with'} --small",
                remedy="Name another --out.",
            )
        self._write({**everything, "small": small})

    def status(self, stage: str) -> str | None:
        found = self.read()["stages"].get(stage)
        return None if found is None else str(found["status"])

    def update(self, stage: str, **values: Any) -> None:
        """Sets `status`, `seconds`, `error` or `figures` of a stage."""
        everything = self.read()
        entry = everything["stages"].setdefault(stage, {"status": RUNNING, "figures": {}})
        entry.update(values)
        self._write(everything)

    def report(self, stage: str, key: str, value: Any) -> None:
        """One figure, or a group of them, the moment that it exists."""
        figures = {**self.read()["stages"].get(stage, {}).get("figures", {}), key: value}
        self.update(stage, figures=figures)
