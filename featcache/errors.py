"""The one exception family that both command lines print as a short paragraph (exit code 2, no traceback)."""

from __future__ import annotations

import errno
import os


class UserError(Exception):
    """Something the user can put right.

    Args:
        what: what is wrong, with the offending value, and why it cannot go on.
        remedy: what to type or do instead.
    """

    def __init__(self, what: str, *, remedy: str | None = None) -> None:
        super().__init__(what if remedy is None else f"{what}\n{remedy}")
        self.what = what
        self.remedy = remedy


class WeightsUnavailable(UserError):
    """Pretrained weights are neither on this machine nor downloadable."""


class CacheError(UserError):
    """A cache is missing, incomplete, damaged, of another format version, or does not hold what is asked of it."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line of at most 300 characters: of one of the system what that says, else the first
    line of its text, or its kind where it has none.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    try:
        lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    except Exception:  # an exception whose own text fails
        lines = []
    return lines[0][:300] if lines else type(error).__name__


AGAIN = "then run the same command again: finished work is kept."
_REMEDIES = {
    errno.ENOSPC: f"Free some space, {AGAIN}",
    errno.EDQUOT: f"Free some space or have the quota raised, {AGAIN}",
    errno.EFBIG: f"Have the limit on file sizes raised (ulimit -f), {AGAIN}",
    errno.EACCES: f"Change its permissions or choose another place, {AGAIN}",
    errno.EPERM: f"Change its permissions or choose another place, {AGAIN}",
    errno.EROFS: f"Choose a place that can be written to, {AGAIN}",
    errno.EIO: f"The disk or its connection fails: check it (dmesg), {AGAIN}",
    errno.ESTALE: f"The network file system lost the file: mount it again, {AGAIN}",
    errno.ETIMEDOUT: f"Check the connection, {AGAIN}",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ENOENT: "Check the path.",
    errno.ENOTDIR: "A file stands where a folder is needed: remove it or choose another place.",
    errno.EISDIR: "A folder stands where a file is needed: remove it or choose another place.",
    errno.ENOTEMPTY: "Something else writes there: choose another place.",
    errno.EEXIST: "Remove it or choose another place.",
    errno.ELOOP: "Links lead in a circle: put them right.",
    errno.EMFILE: f"Have the limit on open files raised (ulimit -n), {AGAIN}",
    errno.ENFILE: f"The machine has too many files open: close programs, {AGAIN}",
    errno.ENOMEM: f"Free some memory, {AGAIN}",
}


def os_error(error: OSError) -> UserError:
    """What the operating system refused, in one line with the file, and what to do about it."""
    places = [
        os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes | os.PathLike)
    ]
    what = error.strerror or " ".join(str(error).split()) or type(error).__name__
    where = f": {' -> '.join(places)}" if places else ""
    return UserError(f"{what}{where}", remedy=_REMEDIES.get(error.errno or 0, f"Put that right, {AGAIN}"))
