"""What a diagnostic hands back: numbers, plots and sentences, independent of how they are written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from featcache.errors import UserError
from trainer.report.charts import Chart, Series


class NotApplicable(UserError):
    """The run has nothing that this diagnostic looks at. ``all`` leaves it out and says so."""


@dataclass(frozen=True, kw_only=True)
class Strips:
    """Pictures in rows and columns. cells[row][column]: uint8 [H, W, 3] or None."""

    title: str
    columns: Sequence[str]
    rows: Sequence[str]
    cells: Sequence[Sequence[np.ndarray | None]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Numbers in rows and columns, shaded from ``low`` to ``high``. values: float [rows, columns], NaN: empty."""

    title: str
    columns: Sequence[str]
    rows: Sequence[str]
    values: np.ndarray
    low: float
    high: float
    unit: str = ""
    note: str = ""
    decimals: int = 2


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One picture. name: file stem; the drawing's note is the sentence that stands under it.

    headline: the one line by which runs are compared where several are analysed; it must mean the same in every run.
    headline_title: what it shows; headline_note: what to look for there, where the drawing's note does not say it.
    """

    name: str
    drawing: Chart | Strips | Matrix
    headline: Series | None = None
    headline_title: str = ""
    headline_note: str = ""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One diagnostic of one run.

    Attributes:
        what: its name on the command line.
        title: heading of its section.
        question: one sentence: what it answers.
        finding: one sentence with what came out, from the numbers.
        plots: see :class:`Plot`.
        rows: the numbers, one mapping a row of the CSV; all have the same keys.
        settings: how they were measured: estimators, samples, seeds.
    """

    what: str
    title: str
    question: str
    finding: str
    plots: Sequence[Plot]
    rows: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
