"""One writer at a time: a lock file in the folder, held through the operating system, so that it ends with its holder.

A file left behind by a killed process holds nothing. The file says who holds it, for the message to whom comes second.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from featcache.errors import CacheError, UserError
from featcache.store import files, locks

NAME = ".lock"
_MAX_BYTES = 4096


@contextlib.contextmanager
def hold(folder: Path, doing: str, *, remedy: str) -> Iterator[None]:
    """Holds `folder` (made if need be) for the length of a block.

    Args:
        doing: what it is held for, as others read it. remedy: what they may do instead of waiting.

    Raises:
        UserError: another process holds it, or it cannot be written to.
    """
    path = folder / NAME
    lock = _take(path)
    if lock is None:
        raise UserError(f"{folder} is in use: {_holder(path)}", remedy=remedy)
    try:
        with contextlib.suppress(OSError):  # a full disk: held all the same, only nobody can read by whom
            path.write_text(json.dumps(_me(doing)))
        yield
    finally:
        _release(lock)


@contextlib.contextmanager
def waiting(folder: Path, name: str) -> Iterator[None]:
    """Holds `folder` under a name of its own, waiting for whoever has it: for changes that take no time."""
    files.make_directory(folder)
    lock = locks.lock(folder / f".{name}.lock")
    try:
        yield
    finally:
        _release(lock)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Whoever replaces the file `path` (atomically) in such a block is the only one who does; others wait. What killed
    processes left of it goes first."""
    with waiting(path.parent, path.name):
        files.remove_parts(path.parent, of=[path.name])
        yield


def _take(path: Path) -> locks.Lock | None:
    while True:
        files.make_directory(path.parent)
        try:
            return locks.try_lock(path)
        except CacheError:
            if path.parent.exists():  # else it was removed in between, by a start that failed
                raise


def _release(lock: locks.Lock) -> None:
    """Lets go of it, whatever the disk says: the file that may stay holds nothing."""
    with contextlib.suppress(OSError, CacheError):
        lock.release(remove=True)


def _me(doing: str) -> dict[str, str | int]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"doing": doing, "host": platform.node(), "pid": os.getpid(), "since": now}


def _holder(path: Path) -> str:
    """What the lock file says of its holder, which may be nothing yet."""
    try:
        told = json.loads(files.read_bounded(path, _MAX_BYTES))
        return f"{told['doing']} in process {told['pid']} on {told['host']}, since {told['since']}"
    except (UserError, OSError, ValueError, TypeError, KeyError):
        return "another process works in it"
