"""What a run directory holds, read for a report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from featcache.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Column:
    """One logged quantity: `values` [n] at `steps` [n] and `time_s` [n] (NaN where none was logged)."""

    steps: np.ndarray
    time_s: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, kw_only=True)
class RunData:
    """One training run.

    Attributes:
        name: shown in tables and legends.
        path: the run directory, None for runs that were not read from disk.
        config_text: the resolved config as written, shown under "settings to reproduce".
        config: the same, parsed.
        cache: contents of cache.json (path, fingerprint, dataset).
        log: logged quantities by key (`loss`, `align/<term>`, `metric/<name>`, ...).
        evaluations: entries of metrics.json, oldest first. Those of `trainer.evaluate` hold `metrics`,
            `intervals`, `settings` and `warnings`; `step` and `sampler` where the caller added them.
        samples: (step, PNG path), oldest first.
    """

    name: str
    path: Path | None = None
    config_text: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    cache: Mapping[str, Any] = field(default_factory=dict)
    log: Mapping[str, Column] = field(default_factory=dict)
    evaluations: Sequence[Mapping[str, Any]] = ()
    samples: Sequence[tuple[int, Path]] = ()

    def last(self, key: str) -> float | None:
        """Last logged value of `key`, or None."""
        column = self.log.get(key)
        return float(column.values[-1]) if column is not None else None

    @property
    def steps(self) -> int | None:
        """Last logged step."""
        return max((int(c.steps[-1]) for c in self.log.values()), default=None)


def _read_json(path: Path, default: Any) -> Any:
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: {error}",
            remedy="Delete or repair the file; trainer eval writes it anew.",
        ) from error


def read_log(path: Path) -> dict[str, Column]:
    """log.jsonl => quantities by key.

    A last line without its end (the run is still writing, or was killed) is left out. After a resume the log
    may hold
    a step twice: the later entry counts.

    Raises:
        UserError: any other line that is not a JSON object.
    """
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")
    torn = lines.pop()  # "" after a complete last line
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate([*lines, torn], start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) + 1:
                break
            raise UserError(
                f"line {number} of {path} is not a JSON object with a step: {line[:60]!r}",
                remedy="Remove the damaged line; everything else in the log stays usable.",
            ) from error
        # What a killed run logged beyond the checkpoint it resumed from never happened.
        for later in [s for s in rows if s > step]:
            del rows[later]
        rows.setdefault(step, {}).update(entry)
    columns: dict[str, list[tuple[int, float, float]]] = {}
    for step, entry in rows.items():
        time_s = entry.get("time_s")
        time_s = float(time_s) if isinstance(time_s, int | float) else math.nan
        for key, value in entry.items():
            if key not in ("step", "time_s") and isinstance(value, int | float):
                columns.setdefault(key, []).append((step, time_s, float(value)))
    result = {}
    for key, points in columns.items():
        table = np.array(points, dtype=np.float64)
        result[key] = Column(steps=table[:, 0], time_s=table[:, 1], values=table[:, 2])
    return result


def load_run(run_dir: Path | str) -> RunData:
    """Read a run directory; parts a run has not written yet are empty.

    Raises:
        UserError: no such directory, no config.yaml in it, or a damaged file.
    """
    path = Path(run_dir)
    config_path = path / "config.yaml"
    if not config_path.is_file():
        what = (
            f"{path} is not a run directory: it has no config.yaml" if path.is_dir() else f"there is no run at {path}"
        )
        raise UserError(what, remedy="Pass a directory under ./runs, as made by: trainer run --name NAME")
    config_text = config_path.read_text(encoding="utf-8")
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError as error:
        raise UserError(
            f"{config_path} is not valid YAML: {error}", remedy="Restore the file as the run wrote it."
        ) from error
    evaluations = _read_json(path / "metrics.json", [])
    samples = sorted(
        (int(p.stem.removeprefix("step_")), p)
        for p in (path / "samples").glob("step_*.png")
        if p.stem.removeprefix("step_").isdigit()
    )
    return RunData(
        name=path.resolve().name,
        path=path,
        config_text=config_text,
        config=config if isinstance(config, dict) else {},
        cache=_read_json(path / "cache.json", {}),
        log=read_log(path / "log.jsonl"),
        evaluations=[e for e in evaluations if isinstance(e, dict)] if isinstance(evaluations, list) else [],
        samples=samples,
    )
