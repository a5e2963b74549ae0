"""What is drawn, as data: made by diagnostics and from logs, kept as JSON, drawn by `trainer.report.charts`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, PlainValidator, TypeAdapter

LARGEST = 1e30  # beyond it, axes and averages of a page overflow

_Stored = list[Annotated[float, Field(strict=True)] | None]  # JSON has no NaN: null stands for it
_LINE, _TABLE = TypeAdapter[Any](_Stored), TypeAdapter[Any](list[_Stored])
_SHOWN = TypeAdapter[Any](list[list[bool]])


def _numbers(value: object, stored: TypeAdapter[Any] = _LINE) -> np.ndarray:
    """Numbers of a JSON file => float64, NaN for null and for what no axis can hold."""
    numbers = value if isinstance(value, np.ndarray) else np.array(stored.validate_python(value), dtype=np.float64)
    return drawable(numbers)


def drawable(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """float64, NaN for what no axis can hold."""
    numbers = np.asarray(values, dtype=np.float64)
    return np.where(np.abs(numbers) < LARGEST, numbers, np.nan)


Numbers = Annotated[Sequence[float] | np.ndarray, PlainValidator(_numbers)]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: `y` over `x`, both [n].

    Attributes:
        raw: drawn thin behind the smoothed line; NaN-free like `y`, or None.
        error: half the length of the bar at each point, NaN for none; or None.
        colour: index of the page's series colours, 0 to 7.
        dashed: a second line style, for a second quantity of the same colour.
        markers: mark the points (few points, such as checkpoints).
    """

    label: str
    x: Numbers
    y: Numbers
    raw: Numbers | None = None
    error: Numbers | None = None
    colour: Annotated[int, Field(ge=0)] = 0
    dashed: bool = False
    markers: bool = False

    def __post_init__(self) -> None:
        if any(len(y) != len(self.x) for y in (self.y, self.raw, self.error) if y is not None):
            raise ValueError("x and y have different lengths")


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Something that happened at `x`, which the chart's note explains: a dotted upright line, or a small triangle above.
    colour: as of a series."""

    x: float
    colour: Annotated[int, Field(ge=0)] = 0
    kind: Literal["line", "triangle"] = "line"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Several lines on one pair of axes; labels carry the units."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    marks: tuple[Mark, ...] = ()
    note: str = ""
    log_y: bool = False
    kind: Literal["chart"] = "chart"


@dataclass(frozen=True, kw_only=True)
class Strips:
    """Pictures in rows and columns. cells[row][column]: uint8 [S, S, 3], all of one size, or None.

    JSON says of each cell whether there is a picture; `trainer.analyze.result` keeps the pictures themselves.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[str]
    cells: Annotated[Sequence[Sequence[np.ndarray | None]], PlainValidator(_SHOWN.validate_python)]
    note: str = ""
    kind: Literal["strips"] = "strips"


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Numbers in rows and columns, shaded from `low` to `high`. values: float [rows, columns], NaN: empty."""

    title: str
    columns: Sequence[str]
    rows: Sequence[str]
    values: Annotated[np.ndarray, PlainValidator(lambda value: _numbers(value, _TABLE))]
    low: float
    high: float
    note: str = ""
    decimals: Annotated[int, Field(ge=0, le=20)] = 2
    kind: Literal["matrix"] = "matrix"

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.rows), len(self.columns)) or not -LARGEST < self.low < self.high < LARGEST:
            raise ValueError("values do not fit the rows, the columns or the range")

    def share(self, value: float) -> float:
        """Where a value lies between `low` and `high`, 0 to 1."""
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One picture. name: file stem; the drawing's note is the sentence that stands under it.

    drawing: None of results of an earlier version, which kept the drawn files alone.
    headline: the one line by which runs are compared where several are analysed; it must mean the same in every run.
    headline_title: what it shows; headline_note: what to look for there, where the drawing's note does not say it.
    """

    name: Annotated[str, Field(pattern=r"^[^/\\\x00-\x1f]{1,200}$")]
    drawing: Annotated[Chart | Strips | Matrix, Field(discriminator="kind")] | None
    headline: Series | None = None
    headline_title: str = ""
    headline_note: str = ""
