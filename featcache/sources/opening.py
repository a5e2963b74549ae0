"""Where data that others made are opened: regular files only, and library errors as one line."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from featcache.errors import UserError, first_line
from featcache.store.places import Missing

# The machine or the network, not the file: the same file may be read the next time.
_PASSING = (errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EHOSTDOWN, errno.ENOTCONN)
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class Unreadable(Exception):
    """One file that cannot be read, for a reason that lies in the file; the message is one line."""


@contextlib.contextmanager
def explained(what: str, remedy: str, *, wrong: str = "is damaged") -> Iterator[None]:
    """Turns what libraries raise over a malformed or unreadable file into a `UserError` about `what`.

    The readers of tars, zips, parquet and numpy files raise many kinds of exceptions over hostile bytes, and more with
    every version, so all are translated; the cause stays attached. Keep the body to the library's calls.
    """
    try:
        yield
    except UserError:
        raise
    except Missing as error:
        raise UserError(f"{what} is gone", remedy="Bring it again, or check --data.") from error
    except OSError as error:
        if error.errno is None:  # not the system's: pyarrow and PIL report damage so
            raise UserError(f"{what} {wrong}: {first_line(error)}", remedy=remedy) from error
        raise_unreadable(what, error)
    except RecursionError as error:
        raise UserError(f"{what} {wrong}: nested too deeply", remedy=remedy) from error
    except MemoryError as error:
        raise UserError(f"{what} claims more than fits into memory", remedy=remedy) from error
    except Exception as error:
        raise UserError(f"{what} {wrong}: {first_line(error)}", remedy=remedy) from error


def raise_unreadable(what: str, error: OSError) -> NoReturn:
    """Raises `UserError`: the system refused to read `what`."""
    raise UserError(
        f"{what} cannot be read: {first_line(error)}",
        remedy="Check the path, its permissions and the disk it lies on; then run the same command again.",
    ) from error


def file_size(path: Path | str) -> int:
    """Bytes of a regular file, links followed.

    Raises `Unreadable` if it is missing or no regular file; `UserError` if the disk or the network fails.
    """
    try:
        return _regular(os.stat(path)).st_size  # noqa: PTH116 (once per image: a Path costs more than the call)
    except OSError as error:
        _classify(path, error)


def read_file(path: Path | str, limit_bytes: int) -> bytes:
    """The bytes of a regular file, links followed; a FIFO or a device is refused without waiting for it.

    Raises `Unreadable` if it is missing, no regular file, or larger than `limit_bytes`; `UserError` if the disk or
    the network fails.
    """
    try:
        _regular(os.stat(path))  # noqa: PTH116 (before opening, which some devices take for an order)
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # noqa: PTH123
            size = _regular(os.fstat(file.fileno())).st_size
            if size > limit_bytes:
                raise Unreadable(f"it has {size} bytes, more than the {limit_bytes} it may have")
            return file.read(size)
    except OSError as error:
        _classify(path, error)


def _regular(found: os.stat_result) -> os.stat_result:
    if not stat.S_ISREG(found.st_mode):
        kind = next((text for test, text in _KINDS if test(found.st_mode)), "something else")
        raise Unreadable(f"it is {kind}, no file")
    return found


def _classify(path: Path | str, error: OSError) -> NoReturn:
    if error.errno in _PASSING:
        raise_unreadable(str(path), error)
    raise Unreadable(first_line(error)) from error
