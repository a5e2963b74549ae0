"""Pages: self-contained HTML files without scripts, filled in from templates, in which all text is escaped."""

from __future__ import annotations

import base64
import functools
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from featcache.console import plain
from featcache.errors import UserError
from featcache.sources.pixels import MAX_FILE_BYTES, BadImage, decode
from featcache.store import files
from trainer.plots import Chart
from trainer.report.charts import render_svg
from trainer.runs import folder as runs
from trainer.typeset import measure, number, setting

_TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One embedded picture.

    Attributes:
        image: a PNG file, or uint8 pixels [H, W, 3].
        caption: one or two sentences, plain text.
        alt: what a reader who cannot see it should know.
        title: opens the caption, in bold.
        section: `samples` (beside the runs' own) or `features` (a section of its own below the curves).
        wide: takes the whole width of the page, for strips and contact sheets.
    """

    image: Path | np.ndarray
    caption: str
    alt: str
    title: str = ""
    section: str = "samples"
    wide: bool = False


def write_page(path: Path, template: str, **values: object) -> Path:
    """Fills in a template; the file is replaced whole or not at all, folders are made as needed.

    Raises:
        UserError: a picture that cannot be read, or the file cannot be written.
    """
    runs.write_page(path, _environment().get_template(template).render(values))
    return path


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Marks that reorder text and control characters are shown, as on a terminal.
        finalize=lambda value: value if isinstance(value, Markup) else plain(value),
    )
    filters: dict[str, Any] = {
        "number": number,
        "measure": measure,
        "setting": setting,
        "svg": lambda chart: Markup(render_svg(chart)),
        "picture": picture,
        "is_flat": is_flat,
    }
    environment.filters |= filters
    return environment


def is_flat(chart: Chart) -> bool:
    """Whether a chart would show nothing: all that was measured (levels to compare with are dashed) is zero."""
    return not any(np.any(line.y) for line in chart.series if not line.dashed)


def picture(image: Path | np.ndarray) -> dict[str, object]:
    """What `<img>` needs: the picture as a data URI, its size in pixels, and whether it may grow to its column."""
    data, width, height = _png(image)
    source = Markup(f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}")
    # Grids of small images may grow; larger ones only shrink.
    return {"source": source, "width": width, "height": height, "small": width <= 640}


def read_picture(path: Path) -> tuple[bytes, Image.Image]:
    """A JPEG, PNG or WebP file: its bytes, and the picture in RGB.

    Raises:
        UserError: it is something else, or damaged.
    """
    data = files.read_bounded(path, MAX_FILE_BYTES)
    try:
        return data, decode(data, str(path))
    except BadImage as error:
        raise UserError(
            f"{path} is not an image that can be shown: {error.reason}", remedy="Delete the file or draw it again."
        ) from error


def _png(image: Path | np.ndarray) -> tuple[bytes, int, int]:
    """PNG file, width, height."""
    if isinstance(image, Path):
        data, picture = read_picture(image)
        if data[:4] == b"\x89PNG":
            return data, *picture.size
    else:
        picture = Image.fromarray(np.ascontiguousarray(image))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue(), *picture.size
