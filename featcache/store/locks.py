"""Locks between processes, on any file system.

A lock is flock's where the file system knows it: the kernel lets go of it when its holder dies. Where it does not
(Lustre without `-o flock`, NFS without a lock manager), a file `<lock>.owner` is the lock: put there whole, by whoever is
first, and it says who holds it. One whose process is dead is taken over on the machine that it ran on; elsewhere nobody
can know, so the user is told. POSIX record locks are not tried in between: file systems that refuse flock refuse them too, and a process
loses them by closing any other descriptor of the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import secrets
import shlex
import time
from datetime import UTC, datetime
from pathlib import Path

from featcache.errors import CacheError
from featcache.store import files

OWNER_SUFFIX = ".owner"
POLL_S = 0.02
# How long a holder on another machine is waited for: locks that are waited for are held for moments.
MAX_WAIT_S = 120.0
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_TOKEN = re.compile(r"[0-9a-f]{16}\Z")
# Of the right to remove a dead owner's file: `<lock>.<its token>`. Earlier versions made `<lock>.<its token>.claim`.
_CLAIM = re.compile(r"(.+)\.[0-9a-f]{16}(\.owner|\.claim)?\Z", re.DOTALL)


class Lock:
    """A lock that is held, on the file `path`."""

    def __init__(self, path: Path, fd: int | None, token: str = "") -> None:
        self.path, self._fd, self._token = path, fd, token  # without a descriptor, the owner file is the lock

    def moved(self, path: Path) -> None:
        """Say that the holder has moved the file, with the folder that it is in."""
        if self.path is not _RELEASED:
            self.path = path

    def release(self, *, remove: bool = False) -> None:
        """Let go of it; `remove` removes its file first, which only a holder may. Twice is once."""
        if self.path is _RELEASED:
            return
        path, self.path = self.path, _RELEASED
        try:
            if remove:
                files.remove_file(path)
        finally:
            if self._fd is None:
                # Unless somebody was told that this process is dead, and has removed it.
                if (_owner(path) or {}).get("token") == self._token:
                    files.remove_file(_owner_file(path))
            else:
                # Not by closing alone: a forked child may have the descriptor too.
                with contextlib.suppress(OSError):
                    fcntl.flock(self._fd, fcntl.LOCK_UN)
                os.close(self._fd)


_RELEASED = Path()


def lock(path: Path) -> Lock:
    """An exclusive lock on the file `path` (made if need be, and the folder that it is in), waited for.

    The holder may remove the file; whoever waited for it then starts over with a new one.

    Raises `CacheError` if it cannot be had, not even the folder of its folder is there, or another machine holds it for
    more than two minutes.
    """
    waited_since, holder = time.monotonic(), None
    while True:
        fd = _open(path)
        if fd is None:
            _make_folder(path.parent)
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:
            os.close(fd)
            if error.errno not in _NO_FLOCK:
                raise files.explain(error, path, "locked") from error
        else:
            if _is_current(fd, path):
                return Lock(path, fd)
            os.close(fd)
            continue
        if (token := _take_owner_file(path)) is not None:
            return Lock(path, None, token)
        owner = _owner(path)
        if owner is None or owner.get("token") != holder:
            waited_since, holder = time.monotonic(), None if owner is None else owner.get("token")
        elif owner.get("machine") != _machine() and time.monotonic() - waited_since > MAX_WAIT_S:
            raise CacheError(f"{path} is held by {_describe(owner)}", remedy=_remedy(path))
        time.sleep(POLL_S)


def try_lock(path: Path) -> Lock | None:
    """An exclusive lock on `path`, or None if another process holds it."""
    while True:
        fd = _open(path)
        if fd is None:
            raise CacheError(f"{path} could not be locked: its folder is gone")
        found = _try(path, fd)
        if found is None or found._fd is None or _is_current(found._fd, path):
            return found
        found.release()  # its former holder removed the file after we had opened it


def _try(path: Path, fd: int) -> Lock | None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError as error:
        os.close(fd)
        if error.errno not in _NO_FLOCK:
            raise files.explain(error, path, "locked") from error
        token = _take_owner_file(path)
        return None if token is None else Lock(path, None, token)
    return Lock(path, fd)


def wait_while_held(path: Path, most_s: float) -> None:
    """Wait until nobody holds the lock on `path`, but no longer than so many seconds. Writes nothing."""
    deadline = time.monotonic() + most_s
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        while _is_held(path, fd) and time.monotonic() < deadline:
            time.sleep(POLL_S)
    finally:
        os.close(fd)


def _is_held(path: Path, fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        owner = _owner(path) if error.errno in _NO_FLOCK else None
        return owner is not None and not _is_dead(owner)
    return False


def holder(path: Path) -> str | None:
    """Who holds the lock on `path`, and what to do about it, where that is known and on another machine."""
    owner = _owner(path)
    if owner is None or owner.get("machine") == _machine():
        return None
    return f"{_describe(owner)}; {_remedy(path)}"


def is_lock_file(name: str) -> bool:
    """Whether a file of this name in a directory of ours is a lock or says who holds it."""
    return name in ("lock", "lock" + OWNER_SUFFIX)


def _make_folder(folder: Path) -> None:
    """Not its parents: a cache that somebody has removed is not to come back as an empty folder."""
    with files.explained(folder, "written"):
        folder.mkdir(exist_ok=True)
        files.fsync_directory(folder.parent)


def _open(path: Path) -> int | None:
    try:
        return files.open_to_write(path)
    except CacheError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def _is_current(fd: int, path: Path) -> bool:
    """Whether the locked file is still the one that others would lock."""
    try:
        held, current = os.fstat(fd), path.stat(follow_symlinks=False)
    except OSError:
        return False
    return (held.st_dev, held.st_ino) == (current.st_dev, current.st_ino)


# Owner files


def _owner_file(path: Path) -> Path:
    return path.with_name(path.name + OWNER_SUFFIX)


def _machine() -> str:
    """Names what process numbers mean something in: this start of this machine, and the container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return platform.node()


def _started(pid: int) -> str:
    """When a process was started, in the kernel's own count, so that a number used again is not taken for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _take_owner_file(path: Path) -> str | None:
    """Become the owner, if there is none or it is dead: the token that says so, else None."""
    token = _create_owner(path) or _take_over(path)
    if token is not None:
        # What processes left that were killed while they took over. A live one has found, or will, that it is too late.
        for name in files.names_in(path.parent):
            claim = _CLAIM.match(name)
            if claim is not None and claim[2] and claim[1] == path.name:
                files.remove_file(path.with_name(name))
    return token


def _take_over(path: Path) -> str | None:
    owner = _owner(path)
    if not owner or not _is_dead(owner):
        return None
    # One process only may remove the file of one dead owner: whoever holds the lock that is named for it. It may die too.
    claim = path.with_name(f"{_lock_name(path)}.{owner['token']}")
    if _take_owner_file(claim) is None:
        return None
    try:
        if (_owner(path) or {}).get("token") == owner["token"]:
            files.remove_file(_owner_file(path))
    finally:
        files.remove_file(_owner_file(claim))
    return _create_owner(path)


def _lock_name(path: Path) -> str:
    """The lock that a claim is about in the end, so that names do not grow."""
    claim = _CLAIM.match(path.name)
    return path.name if claim is None else claim[1]


def _create_owner(path: Path) -> str | None:
    pid, token = os.getpid(), secrets.token_hex(8)
    owner = {
        "host": platform.node(),
        "machine": _machine(),
        "pid": pid,
        "started": _started(pid),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "token": token,
    }
    # NFS may answer that the file is there to the very request that made it, if its first answer was lost.
    made = _create(_owner_file(path), json.dumps(owner).encode()) or (_owner(path) or {}).get("token") == token
    return token if made else None


def _create(path: Path, data: bytes) -> bool:
    """Make a file that is not there yet, with all its bytes at once; False if it is."""
    group = files.Group()
    try:
        group.write(path, [data], replace=False)
        return not group.commit()  # durable: an empty file would say of nobody that he is dead
    except CacheError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return False  # the directory was removed in between
        raise


def _owner(path: Path) -> dict[str, object] | None:
    """What an owner file says, None if there is none. Nothing where it is damaged."""
    try:
        owner = json.loads(files.read_bounded(_owner_file(path), 4096))
    except CacheError as error:
        return None if isinstance(error.__cause__, FileNotFoundError) else {}
    except (ValueError, RecursionError):
        return {}
    told = isinstance(owner, dict) and isinstance(owner.get("token"), str) and _TOKEN.match(owner["token"])
    return owner if told else {}


def _is_dead(owner: dict[str, object]) -> bool:
    pid = owner.get("pid")
    if owner.get("machine") != _machine() or type(pid) is not int or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return _started(pid) != str(owner.get("started"))


def _describe(owner: dict[str, object]) -> str:
    if not owner:
        return "a process that cannot be told: what it wrote down is damaged"
    return f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('time')}"


def _remedy(path: Path) -> str:
    return f"if that process is gone, remove the file it left: rm {shlex.quote(str(_owner_file(path)))}"
