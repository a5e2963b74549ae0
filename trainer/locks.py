"""One writer at a time: a lock file in the folder, held through the operating system, so that it ends with its holder.

A file left behind by a killed process holds nothing. The file says who holds it, for the message to whom comes second.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from featcache.errors import UserError
from featcache.store import files

NAME = ".lock"
_MAX_BYTES = 4096


@contextlib.contextmanager
def hold(folder: Path, doing: str, *, remedy: str) -> Iterator[None]:
    """Holds ``folder`` (made if need be) for the length of a block.

    Args:
        doing: what it is held for, as others read it. remedy: what they may do instead of waiting.

    Raises:
        UserError: another process holds it, or it cannot be written to.
    """
    path = folder / NAME
    fd = _take(path)
    if fd is None:
        raise UserError(f"{folder} is in use: {_holder(path)}", remedy=remedy)
    try:
        with contextlib.suppress(OSError):  # a full disk: held all the same, only nobody can read by whom
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps(_me(doing)).encode(), 0)
        yield
    finally:
        _release(path, fd)


@contextlib.contextmanager
def waiting(folder: Path, name: str) -> Iterator[None]:
    """Holds ``folder`` under a name of its own, waiting for whoever has it: for changes that take no time."""
    path = folder / f".{name}.lock"
    fd = files.lock(path)
    try:
        yield
    finally:
        _release(path, fd)


def _take(path: Path) -> int | None:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_symlink():
                raise UserError(f"{path} is a link, which no lock is", remedy="Remove it.")
            fd = files.try_lock(path)
        except FileNotFoundError:  # its folder was removed in between
            continue
        except OSError as error:
            raise UserError(f"{path} could not be made: {error.strerror or error}") from error
        if fd is None or _is_current(path, fd):
            return fd
        files.unlock(fd)  # the former holder removed the file between our opening and locking it


def _release(path: Path, fd: int) -> None:
    with contextlib.suppress(OSError):
        if _is_current(path, fd):
            path.unlink()
    files.unlock(fd)


def _is_current(path: Path, fd: int) -> bool:
    held = os.fstat(fd)
    try:
        now = path.stat()
    except FileNotFoundError:
        return False
    return (held.st_dev, held.st_ino) == (now.st_dev, now.st_ino)


def _me(doing: str) -> dict[str, str | int]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"doing": doing, "host": socket.gethostname(), "pid": os.getpid(), "since": now}


def _holder(path: Path) -> str:
    """What the lock file says of its holder, which may be nothing yet."""
    try:
        told = json.loads(files.read_bounded(path, _MAX_BYTES))
        return f"{told['doing']} in process {told['pid']} on {told['host']}, since {told['since']}"
    except (UserError, OSError, ValueError, TypeError, KeyError):
        return "another process works in it"
