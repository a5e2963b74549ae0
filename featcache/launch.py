"""What torchrun tells a process through its environment."""

from __future__ import annotations

import os

from featcache.errors import UserError

_START = "Start the processes with torchrun, or, for one process alone: unset RANK LOCAL_RANK WORLD_SIZE"


def _number(name: str, default: int, least: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and least <= int(text) < 1 << 31):
        raise UserError(f"the environment variable {name} is {text!r:.80}, not a whole number", remedy=_START)
    return int(text)


def world_size() -> int:
    """How many processes work together; 1 without torchrun. Raises `UserError` for a value that is no such number."""
    return _number("WORLD_SIZE", 1, 1)


def rank() -> int:
    """This one's number among them, from 0.

    Raises:
        UserError: it is missing, no number, or beyond their count.
    """
    size = world_size()
    if size > 1 and not os.environ.get("RANK"):
        raise UserError(
            f"WORLD_SIZE={size} says that {size} processes work together, but RANK is not set", remedy=_START
        )
    found = _number("RANK", 0, 0)
    if size > 1 and found >= size:
        raise UserError(f"RANK={found} is not one of {size} processes", remedy=_START)
    return found


def local_rank() -> int:
    """This one's number on its machine, from 0."""
    return _number("LOCAL_RANK", 0, 0)


def require_meeting_point() -> None:
    """Raises `UserError` unless the environment says where the processes find each other."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(f"WORLD_SIZE is {world_size()}, but {' and '.join(missing)} not set", remedy=_START)
