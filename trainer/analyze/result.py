"""What a diagnostic hands back (numbers, plots and sentences), and the files that keep it.

`<what>.json` holds all of it but the pictures of strips, which lie in `tiles/<plot>.png`, and `<what>.csv` the rows
once more. Several runs' common plots are kept in the same form in `comparison.json`. Pages are made from these files.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from featcache.errors import UserError
from featcache.sources.pixels import MAX_FILE_BYTES, BadImage, decode
from featcache.store import files
from trainer.analyze import DIAGNOSTICS
from trainer.plots import Plot, Strips
from trainer.runs import folder as runs
from trainer.runs import locks, schemas

_T = TypeVar("_T")
_S = TypeVar("_S", bound="Section")

_REMEDY = "Delete the file; trainer analyze makes it anew."


class NotApplicable(UserError):
    """The run has nothing that this diagnostic looks at. `all` leaves it out and says so."""


Row = Mapping[str, object]
"""One row of a CSV: name of the column -> number or text."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """What stands under one heading.

    Attributes:
        what: the diagnostic's name on the command line.
        title: heading of its section.
        question: one sentence: what it answers.
        plots: see `Plot`.
    """

    what: str
    title: str
    question: str
    plots: Sequence[Plot]


@dataclass(frozen=True, kw_only=True)
class Result(Section):
    """One diagnostic of one run.

    Attributes:
        finding: one sentence with what came out, from the numbers.
        rows: the numbers, one mapping per row of the CSV; all have the same keys.
        settings: how they were measured: estimators, samples, seeds.
        run: name, step, method and model. measured: on what and for how long, in a few words. Both are put in after
            the diagnostic has run.
    """

    finding: str
    run: Mapping[str, object] = field(default_factory=dict)
    measured: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    rows: Sequence[Row]


@dataclass(frozen=True, kw_only=True)
class Compared(Section):
    """One diagnostic of several runs. findings: run => its finding."""

    findings: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class About:
    """What a run's page says beside the results, `about.json`. left_out: diagnostic => why it does not apply."""

    lead: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def writing(run: Path) -> Iterator[Path]:
    """The folder of a run's diagnostics, for one process at a time: what another has written meanwhile is added to.

    Raises:
        UserError: it cannot be written to, or is a link.
    """
    folder = files.inside(run, "analysis")
    with locks.waiting(folder, "writing"):
        for place in (folder, files.inside(folder, "tiles")):
            if place.is_dir():
                files.remove_parts(place)
        yield folder


def write_about(folder: Path, about: About, *, asked: Sequence[str]) -> None:
    """Replaces `about.json`; what is left out of diagnostics that were not asked for now stays."""
    path = folder / "about.json"
    try:
        earlier = read_about(folder).left_out
    except UserError:
        earlier = {}
    left_out = {what: why for what, why in earlier.items() if what not in asked} | dict(about.left_out)
    runs.write_text(path, json.dumps({"lead": about.lead, "left_out": left_out}, indent=1) + "\n")


def read_about(folder: Path) -> About:
    """Empty where an earlier version wrote the folder.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / "about.json"
    return schemas.parse(runs.read_json(path, {}), About, path, remedy=_REMEDY)


def write_result(folder: Path, result: Result) -> None:
    """Replaces what an earlier call wrote for this diagnostic, and all that was drawn of it."""
    remove_result(folder, result.what)
    runs.write_text(folder / f"{result.what}.json", json.dumps(_document(result, folder), indent=1) + "\n")
    buffer = io.StringIO()
    if result.rows:
        writer = csv.DictWriter(buffer, list(result.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(result.rows)
    runs.write_text(folder / f"{result.what}.csv", buffer.getvalue())


def remove_result(folder: Path, what: str) -> None:
    """Deletes a diagnostic's files, its plots among them; it may not have been measured yet."""
    earlier = _earlier(folder / f"{what}.json", schemas.Diagnostic)
    _remove_plots(folder, earlier["plots"] if earlier is not None else ())
    for kind in ("json", "csv"):
        files.remove_file(folder / f"{what}.{kind}")


def _remove_plots(folder: Path, names: Iterable[str]) -> None:
    """Deletes drawn plots and the pictures in them."""
    tiles = files.inside(folder, "tiles")
    for name in names:
        for path in (folder / f"{name}.svg", folder / f"{name}.png", tiles / f"{name}.png"):
            files.remove_file(path)


def read_results(folder: Path) -> list[Result]:
    """The results in a run's analysis folder, in the order of `DIAGNOSTICS`.

    Raises:
        UserError: a file is damaged.
    """
    found = []
    for what in DIAGNOSTICS:
        path = folder / f"{what}.json"
        if path.exists():
            stored = schemas.check(runs.read_json(path, {}), schemas.Diagnostic, path, remedy=_REMEDY)
            found.append(_section(Result, what, stored, path))
    return found


def write_comparison(folder: Path, compared: Sequence[str], sections: Sequence[Compared]) -> None:
    """Adds sections to `comparison.json`, in place of those on the same diagnostics; of other runs, none is kept.

    Args:
        compared: the runs and their checkpoints.
    """
    path = folder / "comparison.json"
    old = _earlier(path, schemas.Comparison)
    kept = old["diagnostics"] if old is not None else {}
    new = [section.what for section in sections]
    for what in list(kept):
        if old is None or old["compared"] != list(compared) or what in new:
            _remove_plots(folder, kept.pop(what)["plots"])
    written = {**kept, **{section.what: _document(section, folder) for section in sections}}
    runs.write_text(path, json.dumps({"compared": list(compared), "diagnostics": written}, indent=1) + "\n")


def read_comparison(folder: Path) -> list[Compared]:
    """The sections of `comparison.json`, in the order of `DIAGNOSTICS`.

    Raises:
        UserError: it is damaged.
    """
    path = folder / "comparison.json"
    document = schemas.check(runs.read_json(path, {}), schemas.Comparison, path, remedy=_REMEDY)
    stored = document["diagnostics"]
    return [_section(Compared, what, stored[what], path) for what in DIAGNOSTICS if what in stored]


def _earlier(path: Path, schema: type[_T]) -> _T | None:
    """What an earlier call wrote; None where it is not what one writes."""
    try:
        return schemas.check(runs.read_json(path, {}), schema, path, remedy=_REMEDY)
    except UserError:
        return None


def _document(section: Section, folder: Path) -> dict[str, Any]:
    """A section as its file has it; the pictures of strips are written beside it."""
    values = dataclasses.asdict(section)
    drawings = values.pop("plots")
    for plot, stored in zip(section.plots, drawings):
        if isinstance(plot.drawing, Strips):
            _write_tiles(_tiles(folder, plot), plot.drawing)
            stored["drawing"]["cells"] = [[p is not None for p in row] for row in plot.drawing.cells]
    names = [plot.name for plot in section.plots]
    document: dict[str, Any] = _finite({"diagnostic": values.pop("what"), **values, "plots": names})
    return document | {"drawings": _finite(drawings)}


def _section(kind: type[_S], what: str, stored: schemas.Diagnostic | schemas.ComparedDiagnostic, path: Path) -> _S:
    drawings = {str(plot.get("name")): plot for plot in stored.get("drawings", ())}
    plots = [drawings.get(name, {"name": name, "drawing": None}) for name in stored["plots"]]
    values = {"title": what, "question": "", **stored, "what": what, "plots": plots}
    section = schemas.parse(values, kind, path, remedy=_REMEDY)
    return dataclasses.replace(section, plots=[_with_pictures(plot, path.parent) for plot in section.plots])


def _tiles(folder: Path, plot: Plot) -> Path:
    return files.inside(folder, "tiles") / f"{plot.name}.png"


def _write_tiles(path: Path, strips: Strips) -> None:
    """All pictures of strips in one file, edge to edge."""
    side = next(len(picture) for row in strips.cells for picture in row if picture is not None)
    blank = np.full((side, side, 3), 255, np.uint8)
    rows = [np.concatenate([blank if p is None else p for p in row], axis=1) for row in strips.cells]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(rows)).save(buffer, format="PNG", optimize=True)
    files.make_directory(path.parent)
    files.atomic_write(path, [buffer.getvalue()])


def _with_pictures(plot: Plot, folder: Path) -> Plot:
    """Strips with their pictures; without a drawing where these are not there any more or do not fit."""
    if not isinstance(plot.drawing, Strips):
        return plot
    shown, path = plot.drawing.cells, _tiles(folder, plot)
    try:
        pixels = np.asarray(decode(files.read_bounded(path, MAX_FILE_BYTES), str(path)))
        side = len(pixels) // len(plot.drawing.rows)
        tiles = pixels.reshape(len(plot.drawing.rows), side, len(plot.drawing.columns), side, 3).swapaxes(1, 2)
        cells = [[t if s else None for t, s in zip(*row, strict=True)] for row in zip(tiles, shown, strict=True)]
    except (UserError, BadImage, ValueError, ZeroDivisionError):
        return dataclasses.replace(plot, drawing=None)
    return dataclasses.replace(plot, drawing=dataclasses.replace(plot.drawing, cells=cells))


def _finite(value: object) -> Any:
    """JSON knows neither NaN nor infinity: they become null."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
