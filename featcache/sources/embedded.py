"""The embedded sets by name: `shapes`, and `shapes-text` with its captions. They are drawn, so a manifest that names one
says all that is needed to have its images again."""

from __future__ import annotations

import re

from featcache.errors import UserError
from featcache.settings import is_number
from featcache.sources.shapes import ShapesSource
from featcache.sources.shapes_text import Part, ShapesTextSource

EMBEDDED = ("shapes", "shapes-text")
DEFAULT_COUNT = 2000
# More than anybody draws; a manifest from anybody may say any number.
MAX_RECORDED_COUNT = 10_000_000


def is_embedded(data: str) -> bool:
    """Whether `--data` names an embedded set."""
    return data.partition(":")[0] in EMBEDDED


def open_embedded(data: str, *, resolution: int, limit: int | None = None) -> ShapesSource | ShapesTextSource:
    """The set that `--data` names: `shapes`, `shapes:SEED`, `shapes-text`, `shapes-text:SEED`, `shapes-text:held-out` or
    `shapes-text:held-out:SEED`.

    limit: how many images exist (default 2,000).

    Raises `UserError` for anything else after the colon.
    """
    name, _, rest = data.partition(":")
    count = limit or DEFAULT_COUNT
    if name == "shapes":
        seed = rest or "0"
        if not is_number(seed):
            raise UserError(f"--data {data}: the part after 'shapes:' must be a seed", remedy="Type --data shapes:0")
        return ShapesSource(count=count, resolution=resolution, seed=int(seed))
    head, _, tail = rest.partition(":")
    part, seed = (Part.held_out, tail or "0") if head == Part.held_out else (Part.seen, rest or "0")
    if not is_number(seed):
        raise UserError(
            f"--data {data}: the part after 'shapes-text:' must be a seed, 'held-out' or 'held-out:SEED'",
            remedy="Type --data shapes-text, --data shapes-text:7 or --data shapes-text:held-out",
        )
    return ShapesTextSource(count=count, resolution=resolution, seed=int(seed), part=part)


def recorded_embedded(description: str) -> tuple[str, int] | None:
    """`--data` and number of images of the embedded set that a manifest's source describes, None for other sources."""
    name = description.partition(" ")[0]
    seed, count = (re.search(rf" {word}=(\d{{1,18}})(?: |$)", description) for word in ("seed", "count"))
    if name not in EMBEDDED or seed is None or count is None or int(count[1]) > MAX_RECORDED_COUNT:
        return None
    held_out = "held-out:" if name == "shapes-text" and description.endswith(f" combinations={Part.held_out}") else ""
    return f"{name}:{held_out}{seed[1]}", int(count[1])
