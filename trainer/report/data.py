"""What a run directory holds, read for a report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from featcache.errors import UserError
from featcache.redact import redact
from featcache.settings import is_number
from featcache.store import files
from trainer.analyze.result import Result, read_results
from trainer.plots import LARGEST
from trainer.runs import branch
from trainer.runs import folder as runs
from trainer.runs.log import EVALUATION, EVALUATION_OF
from trainer.runs.schemas import OriginEntry
from trainer.runs.yaml_text import MAX_BYTES, read_yaml


@dataclass(frozen=True, kw_only=True)
class Column:
    """One logged quantity: `values` [n] at `steps` [n] and `time_s` [n] (NaN where none was logged).

    conditions: of an evaluation during training, how all these were measured, in words; empty where the log does not say.
    others: how many more there are that were measured otherwise before, or by a version that did not say how, and are left out.
    """

    steps: np.ndarray
    time_s: np.ndarray
    values: np.ndarray
    conditions: str = ""
    others: int = 0


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
        diagnostics: what `trainer analyze` found.
        origins: of a branch, the runs it came from and the steps where it left them, the oldest first; `log` begins
            with theirs.
        published: by metric the (step, value) that the paper gives for this training, drawn as these samples.
    """

    name: str
    path: Path | None = None
    config_text: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    cache: Mapping[str, Any] = field(default_factory=dict)
    log: Mapping[str, Column] = field(default_factory=dict)
    evaluations: Sequence[Mapping[str, Any]] = ()
    samples: Sequence[tuple[int, Path]] = ()
    diagnostics: Sequence[Result] = ()
    origins: Sequence[OriginEntry] = ()
    published: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)

    def last(self, key: str) -> float | None:
        """Last logged value of `key`, or None."""
        column = self.log.get(key)
        return float(column.values[-1]) if column is not None else None

    @property
    def steps(self) -> int | None:
        """Last logged step."""
        return max((int(c.steps[-1]) for c in self.log.values()), default=None)


def read_columns(*paths: Path) -> dict[str, Column]:
    """`log.jsonl`, or several that follow each other => quantities by key.

    A last line without its end (the run is still writing, or was killed) is left out. After a resume the log
    may hold a step twice: the later entry counts. Values that are not finite numbers are left out, too, and of evaluations
    during training those that were measured otherwise than the last: a line through both would look like progress.

    Raises:
        UserError: any other line that is not a JSON object with a step.
    """
    rows: dict[int, dict[str, Any]] = {}
    lines = [(path, *line) for path in paths for line in runs.log_lines(path)]
    for path, number, line, entry in lines:
        if entry is None:
            if (path, number) == lines[-1][:2]:
                break
            raise UserError(
                f"line {number} of {path} is not a JSON object with a step: {line[:60].decode('utf-8', 'replace')!r}",
                remedy="Remove the damaged line; everything else in the log stays usable.",
            )
        # What a killed run logged beyond the checkpoint it resumed from never happened.
        step = entry["step"]
        if next(reversed(rows), -1) >= step:
            rows = {earlier: row for earlier, row in rows.items() if earlier <= step}
        rows.setdefault(step, {}).update(entry)
    columns: dict[str, list[tuple[int, float, float]]] = {}
    told = {k: str(entry[EVALUATION_OF]) for entry in rows.values() if EVALUATION_OF in entry for k in entry}
    others: Counter[str] = Counter()
    for step, entry in rows.items():
        time_s = _finite(entry.get("time_s"))
        for key, value in entry.items():
            known = _finite(value)
            if known is None or key in ("step", "time_s"):
                continue
            if key.startswith(EVALUATION) and str(entry.get(EVALUATION_OF, "")) != told.get(key, ""):
                others[key] += 1
            else:
                columns.setdefault(key, []).append((step, math.nan if time_s is None else time_s, known))
    result = {}
    for key, points in columns.items():
        table = np.array(points, dtype=np.float64)
        how = told.get(key, "") if key.startswith(EVALUATION) else ""
        result[key] = Column(
            steps=table[:, 0], time_s=table[:, 1], values=table[:, 2], conditions=how, others=others[key]
        )
    return result


def _finite(value: object) -> float | None:
    """A number of a log as a float; None for anything else, and for what no training measures."""
    if isinstance(value, int | float) and -LARGEST < value < LARGEST:
        return float(value)
    return None


def load_run(run_dir: Path | str) -> RunData:
    """Read a run directory; parts a run has not written yet are empty.

    Raises:
        UserError: no such directory, no config.yaml in it, or a damaged file or link.
    """
    path = Path(run_dir)
    config_path = path / "config.yaml"
    if not config_path.is_file():
        what = (
            f"{path} is not a run directory: it has no config.yaml" if path.is_dir() else f"there is no run at {path}"
        )
        raise UserError(what, remedy="Pass a directory under ./runs, as made by: trainer run --name NAME")
    config = read_yaml(config_path)
    # Read again for the page, which shows it as written; settings of earlier versions may hold a URL's secrets.
    config_text = redact(files.read_bounded(config_path, MAX_BYTES).decode("utf-8"))
    samples = sorted(
        (int(p.stem.removeprefix("step_")), p)
        for p in files.inside(path, "samples").glob("step_*.png")
        if is_number(p.stem.removeprefix("step_"))
    )
    return RunData(
        name=path.resolve().name,
        path=path,
        config_text=config_text,
        config=config if isinstance(config, dict) else {},
        cache=_shown(runs.read_json(path / "cache.json", {}, remedy=runs.RESTORE)),
        log=read_columns(files.inside(path, branch.LOG), path / "log.jsonl"),
        evaluations=runs.read_metrics(path),
        samples=samples,
        diagnostics=read_results(files.inside(path, "analysis")),
        origins=branch.read_origins(path),
    )


def _shown(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary without the secrets that earlier versions left in it."""
    return {key: redact(value) if isinstance(value, str) else value for key, value in summary.items()}
