"""Every byte that the store puts on a disk goes through here, so that tests can make any single call fail.

A file appears under its final name only when it is complete and on the disk: write `<name>.<16 hex digits>.part`,
fsync it, rename it, fsync the directory. A crash at any point leaves either nothing, a `.part` file that a rerun
removes, or the whole file. Temporary names are never used twice, so no two writers share a file, and no link lies in
wait under one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shlex
import shutil
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from featcache.errors import CacheError

PART_SUFFIX = ".part"
_PART = re.compile(r"(.+?)(?:\.[0-9a-f]{16})?\.part\Z", re.DOTALL)
_PIECE_BYTES = 8 << 20


def part_of(name: str) -> str | None:
    """The final name that a temporary file's name belongs to, None if `name` is not temporary."""
    match = _PART.match(name)
    return match[1] if match else None


def inside(root: Path, relative: str) -> Path:
    """`root / relative`, after checking that nothing below `root` on the way there is a symbolic link.

    `root` itself may be one: the user named it. What is below may have come from anybody, and could lead anywhere.

    Raises `CacheError` naming the link, or for a path that leaves `root`.
    """
    path, components = root, Path(relative).parts
    if Path(relative).is_absolute() or ".." in components:
        raise CacheError(f"{relative!r:.200} is no path inside a cache")
    for component in components:
        path = path / component
        if path.is_symlink():
            raise CacheError(
                f"{path} is a symbolic link; inside a cache none is followed",
                remedy=f"put what it stands for in its place, or remove it: rm {shlex.quote(str(path))}",
            )
    return path


Buffer = bytes | bytearray | memoryview | np.ndarray


def _write(fd: int, data: memoryview) -> int:
    return os.write(fd, data)


def _fsync(fd: int) -> None:
    os.fsync(fd)


def _rename(source: Path, target: Path) -> None:
    source.replace(target)


def _bytes_view(buffer: Buffer) -> memoryview:
    """The buffer as flat bytes, without a copy; a non-contiguous array is a programmer's mistake."""
    if isinstance(buffer, np.ndarray):
        assert buffer.flags.c_contiguous
        return memoryview(buffer.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    return memoryview(buffer).cast("B")


def _explain(error: OSError, path: Path) -> CacheError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CacheError(
            f"the disk is full: {path} could not be written",
            remedy="free some space and run the same command again: it goes on where it stopped",
        )
    return CacheError(
        f"{path} could not be written: {error.strerror or error}",
        remedy="put that right and run the same command again: it goes on where it stopped",
    )


def _create_part(path: Path) -> tuple[int, Path]:
    """A new temporary file for `path`, open for writing."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}{PART_SUFFIX}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(part, flags, 0o666), part


def _update_all(digest: hashlib._Hash, views: list[memoryview]) -> None:
    for view in views:
        digest.update(view)


def fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: memoryview) -> None:
    """Write all of `data`; the kernel may take less than it is given."""
    while data:
        written = _write(fd, data[:_PIECE_BYTES])
        if written <= 0:
            raise OSError(errno.EIO, "the device took no bytes")
        data = data[written:]


def make_directory(path: Path) -> None:
    """Create `path` and its parents durably."""
    if path.is_dir():
        return
    make_directory(path.parent)
    try:
        path.mkdir(exist_ok=True)
        fsync_directory(path.parent)
    except OSError as error:
        raise _explain(error, path) from error


def atomic_write(path: Path, buffers: Sequence[Buffer], *, hashing: bool = False, durable: bool = True) -> str:
    """Write the concatenated `buffers` to `path`, all or nothing. Not `durable`: a power loss may leave it
    damaged.

    Returns the SHA-256 of the bytes in hex if `hashing`, else an empty string.

    Raises `CacheError` if the file cannot be written; nothing is left behind then.
    """
    group = Group()
    digest = group.write(path, buffers, hashing=hashing)
    group.commit(durable=durable)
    return digest


class Group:
    """Files that become visible and durable together, at `commit`.

    A disk needs some milliseconds to confirm an fsync, whatever its size, and confirms several in a row
    sooner than each by itself: so small files are written as they come and confirmed in groups.
    """

    def __init__(self) -> None:
        self._open: list[tuple[int, Path, Path]] = []
        self.n_bytes = 0

    def __len__(self) -> int:
        return len(self._open)

    def write(self, path: Path, buffers: Sequence[Buffer], *, hashing: bool = True) -> str:
        """Write a temporary file; returns the SHA-256 (hex) of the bytes, empty unless `hashing`.

        The hash runs in a second thread beside the write (both release the interpreter lock), so it costs
        nothing where the disk is slower than 1 GB/s.

        Raises `CacheError` if it cannot be written; that file is removed then.
        """
        digest = hashlib.sha256()
        views = [_bytes_view(buffer) for buffer in buffers]
        n_bytes = sum(view.nbytes for view in views)
        try:
            fd, part = _create_part(path)
        except OSError as error:
            raise _explain(error, path) from error
        try:
            if hashing and n_bytes > _PIECE_BYTES:
                with ThreadPoolExecutor(1) as pool:
                    hashed = pool.submit(_update_all, digest, views)
                    for view in views:
                        write_all(fd, view)
                    hashed.result()
            else:
                if hashing:
                    _update_all(digest, views)
                for view in views:
                    write_all(fd, view)
        except BaseException as error:
            os.close(fd)
            with contextlib.suppress(OSError):
                part.unlink()
            if isinstance(error, OSError):
                raise _explain(error, path) from error
            raise
        self._open.append((fd, part, path))
        self.n_bytes += n_bytes
        return digest.hexdigest() if hashing else ""

    def commit(self, *, durable: bool = True) -> None:
        """fsync every file, give each its name, fsync their directories.

        Raises `CacheError` if any of that fails; files of the group may then have their names or be gone.
        """
        entries, self._open, self.n_bytes = self._open, [], 0
        path = Path()
        try:
            if durable:
                for fd, _, target in entries:
                    path = target
                    _fsync(fd)
            for _, part, path in entries:
                _rename(part, path)
            if durable:
                for path in dict.fromkeys(target.parent for _, _, target in entries):
                    fsync_directory(path)
        except OSError as error:
            for _, part, _ in entries:
                with contextlib.suppress(OSError):
                    part.unlink()
            raise _explain(error, path) from error
        finally:
            for fd, _, _ in entries:
                os.close(fd)

    def abandon(self) -> None:
        """Remove what is not committed."""
        for fd, part, _ in self._open:
            os.close(fd)
            with contextlib.suppress(OSError):
                part.unlink()
        self._open, self.n_bytes = [], 0


class Stream:
    """A file being written in pieces; see `atomic_stream`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._digest = hashlib.sha256()

    def write(self, data: Buffer) -> None:
        view = _bytes_view(data)
        self._digest.update(view)
        write_all(self._fd, view)

    def digest(self) -> str:
        """SHA-256 (hex) of what was written so far."""
        return self._digest.hexdigest()


@contextlib.contextmanager
def atomic_stream(path: Path) -> Iterator[Stream]:
    """Write `path` in pieces; it takes its name, durably, when the block ends without an exception.

    Raises `CacheError` if the disk refuses; nothing is left behind then, nor after any other exception.
    """
    try:
        fd, part = _create_part(path)
    except OSError as error:
        raise _explain(error, path) from error
    try:
        try:
            yield Stream(fd)
            _fsync(fd)
        finally:
            os.close(fd)
        _rename(part, path)
        fsync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            raise _explain(error, path) from error
        raise


def remove_file(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def remove_tree(path: Path) -> None:
    """Remove a directory and all in it; a missing one is fine."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def remove_empty_directory(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rmdir()


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """The whole file; raises `CacheError` if it is longer than `limit_bytes` or not a regular file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror}") from error
    with os.fdopen(fd, "rb") as file:
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise CacheError(f"{path} is not a file")
            # By its length, not by the limit: read(n) allocates n bytes at once.
            data = file.read(min(status.st_size, limit_bytes) + 1)
        except OSError as error:
            raise CacheError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > limit_bytes:
        raise CacheError(f"{path} is longer than the {limit_bytes} bytes that such a file may have")
    return data


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex, read in pieces (constant memory)."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(path: Path) -> int:
    """A descriptor holding an exclusive lock on the file `path` (created if need be), waiting for it.

    The holder may unlink the file; whoever waited for it then starts over with a new one.
    """
    while True:
        make_directory(path.parent)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue  # the directory was removed in between
        except OSError as error:
            raise _explain(error, path) from error
        fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            held, current = os.fstat(fd), path.stat()
        except FileNotFoundError:
            os.close(fd)
            continue
        if (held.st_dev, held.st_ino) == (current.st_dev, current.st_ino):
            return fd
        os.close(fd)


def try_lock(path: Path) -> int | None:
    """A descriptor holding an exclusive lock on `path`, or None if another process holds it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def unlock(fd: int) -> None:
    """Let go of a lock that `lock` or `try_lock` gave."""
    os.close(fd)


def append(fd: int, data: bytes, path: Path) -> None:
    """Write all of `data` to the open file `path`; raises `CacheError` if the disk refuses."""
    try:
        write_all(fd, memoryview(data))
    except OSError as error:
        raise _explain(error, path) from error


def publish(fd: int, part: Path, target: Path) -> None:
    """Give the finished file `part`, open as `fd`, its final name on the same disk, durably; raises `CacheError`."""
    try:
        _fsync(fd)
        _rename(part, target)
        fsync_directory(target.parent)
    except OSError as error:
        raise _explain(error, target) from error
