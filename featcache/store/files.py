"""Every byte that the store puts on a disk goes through here, so that tests can make any single call fail.

A file appears under its final name only when it is complete and on the disk: write `<name>.<16 hex digits>.part`,
fsync it, rename it, fsync the directory. A crash at any point leaves either nothing, a `.part` file that a rerun
removes, or the whole file. Temporary names are never used twice, so no two writers share a file, and no link lies in
wait under one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shlex
import shutil
import stat
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from featcache.errors import CacheError, os_error
from featcache.store.blocks import BLOCK_BYTES, BlockHasher, ShardBlocks
from featcache.store.layout import Buffer

PART_SUFFIX = ".part"
_LINK_REMEDY = "put what it stands for in its place, or remove it"
_READ_REMEDY = "name a file; in a cache, featcache verify names all that is damaged"
# What file systems without hard links answer to a request for one.
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV)
# What file systems that cannot sync directories (SMB, some in user space) answer.
_NO_DIRECTORY_FSYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_PART = re.compile(r"(.+?)(?:\.[0-9a-f]{16})?\.part\Z", re.DOTALL)
_NEW_PART = re.compile(r"(.+)\.[0-9a-f]{16}\.part\Z", re.DOTALL)
_PIECE_BYTES = 8 << 20


def part_of(name: str) -> str | None:
    """The final name that a temporary file's name belongs to, None if `name` is not temporary."""
    match = _PART.match(name)
    return match[1] if match else None


def is_part(name: str) -> bool:
    """Whether `name` is one that only this module gives: unlike `x.part`, no user's own."""
    return _NEW_PART.match(name) is not None


def remove_parts(folder: Path, of: Collection[str] | None = None) -> None:
    """Remove the temporary files and directories (of the final names `of`, if given) that killed processes left in
    `folder`. The caller holds a lock that whoever else writes them needs too. Raises `CacheError`.
    """
    for name in names_in(folder):
        if is_part(name) and (of is None or part_of(name) in of):
            path = folder / name
            with explained(path, "removed"):
                is_directory = path.is_dir() and not path.is_symlink()
            (remove_tree if is_directory else remove_file)(path)


def inside(root: Path, relative: str) -> Path:
    """`root / relative`, after checking that nothing below `root` on the way there is a symbolic link.

    `root` itself may be one: the user named it. What is below may have come from anybody, and could lead anywhere.

    Raises `CacheError` naming the link, or for a path that leaves `root`.
    """
    path, components = root, Path(relative).parts
    if Path(relative).is_absolute() or ".." in components:
        raise CacheError(f"{relative!r:.200} is no path inside a folder")
    for component in components:
        path = path / component
        with explained(path, "read"):
            linked = path.is_symlink()
        if linked:
            raise CacheError(
                f"{path} is a symbolic link; inside a cache or a run none is followed",
                remedy=_LINK_REMEDY,
            )
    return path


def _write(fd: int, data: memoryview) -> int:
    return os.write(fd, data)


def _fsync(fd: int) -> None:
    os.fsync(fd)


def _rename(source: Path, target: Path) -> None:
    source.replace(target)


def _link(source: Path, target: Path) -> None:
    """A second name; fails where `target` exists."""
    os.link(source, target)


def _unlink(path: Path) -> None:
    path.unlink()


def _bytes_view(buffer: Buffer) -> memoryview:
    """The buffer as flat bytes, without a copy; a non-contiguous array is a programmer's mistake."""
    if isinstance(buffer, np.ndarray):
        assert buffer.flags.c_contiguous
        return buffer.reshape(-1).view(np.uint8).data
    return memoryview(buffer).cast("B")


def explain(error: OSError, path: Path, what: str = "written") -> CacheError:
    """One line for whatever the system answered about `path`, which could not be `what`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CacheError(f"the disk is full: {path} could not be {what}", remedy=os_error(error).remedy)
    if error.errno == errno.ELOOP:
        return CacheError(f"{path} is a symbolic link; inside a cache or a run none is followed", remedy=_LINK_REMEDY)
    return CacheError(f"{path} could not be {what}: {error.strerror or error}", remedy=os_error(error).remedy)


# Answers that say nothing about a file's bytes.
_NOT_THE_FILE = frozenset(
    {
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM),
        *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN),
    }
)


def not_the_file(error: BaseException | None) -> bool:
    """Whether a file could not be read because of the machine, a limit, permissions or the network: so that it is not
    known to be damaged, and must not be called so."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NOT_THE_FILE:
            return True
        error = error.__cause__
    return False


@contextlib.contextmanager
def explained(path: Path, what: str) -> Iterator[None]:
    """Errors of the system inside the block become a `CacheError` that says what `path` could not be."""
    try:
        yield
    except OSError as error:
        raise explain(error, path, what) from error


def _create_part(path: Path, folder: Path | None = None) -> tuple[int, Path]:
    """A new temporary file for `path`, beside it or in `folder`, open for writing."""
    name = path.name if folder is None else f"{path.parent.name}+{path.name}"
    part = (folder or path.parent) / f"{name}.{secrets.token_hex(8)}{PART_SUFFIX}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(part, flags, 0o666), part


def _put_first(part: Path, target: Path) -> bool:
    """Give `part` its final name unless a file has that already; False if one has.

    Two processes may try at once; whichever is first, the file keeps its name and its bytes.
    """
    try:
        _link(part, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _put_first_without_links(part, target)
    return True


def _put_first_without_links(part: Path, target: Path) -> bool:
    """As `_put_first`, where there are no hard links: whoever writes the same file loses its temporary file before
    we look whether it has put it in place. So of two that do this at once at most one renames.
    """
    final = part_of(part.name)
    for other in part.parent.iterdir():
        if other.name != part.name and part_of(other.name) == final:
            with contextlib.suppress(FileNotFoundError):
                _unlink(other)
    if target.exists():
        return False
    try:
        _rename(part, target)
    except FileNotFoundError:
        if target.exists():
            return False
        raise
    return True


@dataclass(frozen=True)
class Hashes:
    """Of a file's bytes: SHA-256 in hex, and the hashes of its blocks."""

    sha256: str
    blocks: ShardBlocks


class Hasher:
    """SHA-256 and hashes of the blocks as bytes pass, in one go while a block is in the processor's cache."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._blocks = BlockHasher()

    def update(self, view: memoryview) -> None:
        for start in range(0, len(view), BLOCK_BYTES):
            piece = view[start : start + BLOCK_BYTES]
            self._sha256.update(piece)
            self._blocks.update(piece)

    def result(self) -> Hashes:
        """Of what passed so far."""
        return Hashes(self._sha256.hexdigest(), self._blocks.result())


def fsync_directory(path: Path) -> None:
    """Names in it are on the disk then, as far as its file system can say so."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _fsync(fd)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_FSYNC:
            raise
    finally:
        os.close(fd)


def _write_and_hash(fd: int, views: Sequence[memoryview]) -> Hashes:
    """Write `views` one behind the other.

    SHA-256 is taken in a second thread (both release the interpreter lock), a block's hash in this one just before
    the block is written, which then finds it in the processor's cache (`benchmarks/hashing.py` compares the ways).
    """
    sha256, blocks = hashlib.sha256(), BlockHasher()

    def write() -> None:
        for view in views:
            for start in range(0, len(view), BLOCK_BYTES):
                piece = view[start : start + BLOCK_BYTES]
                blocks.update(piece)
                write_all(fd, piece)

    def hash_() -> None:
        for view in views:
            sha256.update(view)

    if sum(map(len, views)) > _PIECE_BYTES:
        with ThreadPoolExecutor(1) as pool:
            hashed = pool.submit(hash_)
            write()
            hashed.result()
    else:  # a thread would take longer than the hash
        hash_()
        write()
    return Hashes(sha256.hexdigest(), blocks.result())


def write_all(fd: int, data: memoryview) -> None:
    """Write all of `data`; the kernel may take less than it is given."""
    while data:
        written = _write(fd, data[:_PIECE_BYTES])
        if written <= 0:
            raise OSError(errno.EIO, "the device took no bytes")
        data = data[written:]


def make_directory(path: Path) -> None:
    """Create `path` and its parents durably."""
    with explained(path, "written"):
        if path.is_dir():
            return
    make_directory(path.parent)
    with explained(path, "written"):
        path.mkdir(exist_ok=True)
        fsync_directory(path.parent)


def atomic_write(path: Path, buffers: Sequence[Buffer], *, folder: Path | None = None, durable: bool = True) -> str:
    """Write the concatenated `buffers` to `path`, all or nothing. Not `durable`: a power loss may leave it
    damaged. folder: where the temporary file is made; by default beside `path`.

    Returns the SHA-256 of the bytes in hex.

    Raises `CacheError` if the file cannot be written; nothing is left behind then.
    """
    group = Group()
    hashes = group.write(path, buffers, folder=folder)
    group.commit(durable=durable)
    return hashes.sha256


@dataclass
class _Entry:
    """A file of a group: open (while `fd` is not None), under its temporary name, to become `target`."""

    fd: int | None
    part: Path
    target: Path
    replace: bool

    def close(self) -> None:
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)


class Group:
    """Files that become visible and durable together, at `commit`.

    A disk needs some milliseconds to confirm an fsync, whatever its size, and confirms several in a row
    sooner than each by itself: so small files are written as they come and confirmed in groups.
    """

    def __init__(self) -> None:
        self._open: list[_Entry] = []
        self.n_bytes = 0

    def __len__(self) -> int:
        return len(self._open)

    def write(
        self, path: Path, buffers: Sequence[Buffer], *, folder: Path | None = None, replace: bool = True
    ) -> Hashes:
        """Write a temporary file for `path` (in `folder`, if given); returns the hashes of the bytes.

        replace: whether the file takes the place of one that has its name at `commit`. If not, that one stays.

        Raises `CacheError` if it cannot be written; that file is removed then.
        """
        views = [_bytes_view(buffer) for buffer in buffers]
        with explained(path, "written"):
            fd, part = _create_part(path, folder)
        try:
            hashes = _write_and_hash(fd, views)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.close(fd)
            with contextlib.suppress(OSError):
                _unlink(part)
            if isinstance(error, OSError):
                raise explain(error, path) from error
            raise
        self._open.append(_Entry(fd, part, path, replace))
        self.n_bytes += hashes.blocks.n_bytes
        return hashes

    def commit(self, *, durable: bool = True) -> list[Path]:
        """fsync every file, give each its name, fsync their directories.

        Returns the files that had their names already and were not to be replaced: what lies there was put there,
        complete, by another process.

        Raises `CacheError` if any of that fails; files of the group may then have their names or be gone.
        """
        entries, self._open, self.n_bytes = self._open, [], 0
        path, there = Path(), []
        try:
            for entry in entries:
                path = entry.target
                if durable:
                    assert entry.fd is not None
                    _fsync(entry.fd)
                # Before it takes its name: NFS sends what was written, and says that it failed, when a file is closed.
                entry.close()
            for entry in entries:
                path = entry.target
                if entry.replace:
                    _rename(entry.part, path)
                elif not _put_first(entry.part, path):
                    there.append(path)
            if durable:
                for path in dict.fromkeys(entry.target.parent for entry in entries):
                    fsync_directory(path)
        except OSError as error:
            raise explain(error, path) from error
        finally:
            _discard(entries)
        return there

    def abandon(self) -> None:
        """Remove what is not committed."""
        entries, self._open, self.n_bytes = self._open, [], 0
        _discard(entries)


def _discard(entries: Sequence[_Entry]) -> None:
    """Close the files and remove what is left of their temporary names."""
    for entry in entries:
        with contextlib.suppress(OSError):
            entry.close()
        with contextlib.suppress(OSError):
            _unlink(entry.part)


def write_new(path: Path, buffers: Sequence[Buffer]) -> None:
    """Write a file that is not there yet, neither at once nor durably: into a folder of `atomic_directory`, and for
    `sync_all`. Raises `CacheError`."""
    with explained(path, "written"):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            for buffer in buffers:
                write_all(fd, _bytes_view(buffer))
        finally:
            os.close(fd)


def sync_all() -> None:
    """All that was written before is on its disk then: for so many small files that an fsync of each takes hours."""
    os.sync()


@contextlib.contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file for other libraries to write to and seek in; it takes the name `path` when the block ends without an exception.

    Not `durable`: as `atomic_write`. Raises `CacheError` if the disk refuses; nothing is left behind then, nor after any
    other exception.
    """
    with explained(path, "written"):
        fd, part = _create_part(path)
    try:
        try:
            with os.fdopen(fd, "wb", closefd=False) as file:
                yield file
            if durable:
                _fsync(fd)
        finally:
            os.close(fd)
        _rename(part, path)
        if durable:
            fsync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            _unlink(part)
        if isinstance(error, OSError):
            raise explain(error, path) from error
        raise


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A new directory, to be filled durably by the block; it takes the name `path`, durably, when the block ends.

    Raises `CacheError` if the disk refuses or something else has that name; nothing is left behind after an exception.
    """
    make_directory(path.parent)
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}{PART_SUFFIX}")
    try:
        with explained(path, "written"):
            part.mkdir()
        yield part
        with explained(path, "written"):
            fsync_directory(part)
            _rename(part, path)
            fsync_directory(path.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def rename_directory(path: Path, target: Path) -> None:
    """Give a directory another name on the same disk, durably: one that is free, or an empty directory's. Raises
    `CacheError`."""
    with explained(target, "written"):
        _rename(path, target)
        fsync_directory(target.parent)


def remove_file(path: Path) -> None:
    """Remove a file; a missing one is fine. Raises `CacheError` if it cannot be removed."""
    with explained(path, "removed"), contextlib.suppress(FileNotFoundError):
        _unlink(path)


def remove_tree(path: Path) -> None:
    """Remove a directory and all in it; a missing one is fine. Raises `CacheError` if it cannot be removed."""
    with explained(path, "removed"), contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def remove_empty_directory(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rmdir()


def names_in(path: Path) -> list[str]:
    """Names in a directory, sorted; none if it does not exist. Raises `CacheError` if it cannot be read.

    Without those that NFS keeps for files that were removed while open.
    """
    try:
        return sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(".nfs"))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise explain(error, path, "read") from error


def open_regular(path: Path, flags: int, *, remedy: str) -> int:
    """A descriptor of a regular file. Neither follows a link in the last place nor waits for anything (a pipe).

    Raises `OSError` as `os.open` does, `CacheError` if it is something else.
    """
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY, 0o666)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CacheError(f"{path} is not a file", remedy=remedy)
    return fd


def open_to_read(path: Path) -> int:
    """`open_regular` for reading; raises `CacheError` if that cannot be."""
    try:
        return open_regular(path, os.O_RDONLY, remedy=_READ_REMEDY)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise explain(error, path) from error
        gone = error.errno in (errno.ENOENT, errno.ENOTDIR)
        remedy = _READ_REMEDY if gone else os_error(error).remedy
        raise CacheError(f"{path} cannot be read: {error.strerror}", remedy=remedy) from error


def open_to_write(path: Path, flags: int = 0) -> int:
    """`open_regular` for reading and writing, made if it is not there; raises `CacheError` if that cannot be, or if the
    file has another name as well (a hard link), which may lie anywhere.
    """
    remedy = f"remove it: rm -r {shlex.quote(str(path))}"
    with explained(path, "written"):
        fd = open_regular(path, os.O_RDWR | os.O_CREAT | flags, remedy=remedy)
    if os.fstat(fd).st_nlink > 1:
        os.close(fd)
        raise CacheError(f"{path} is a hard link: another name of a file that is not to be changed", remedy=remedy)
    return fd


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """The whole file; raises `CacheError` if it is longer than `limit_bytes`, or cannot be read (`open_to_read`)."""
    with os.fdopen(open_to_read(path), "rb") as file:
        return read_all(file.fileno(), path, limit_bytes)


def read_all(fd: int, path: Path, limit_bytes: int) -> bytes:
    """As `read_bounded`, of the open file `path`."""
    try:
        with os.fdopen(os.dup(fd), "rb") as file:
            # By its length, not by the limit: read(n) allocates n bytes at once.
            data = file.read(min(os.fstat(fd).st_size, limit_bytes) + 1)
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > limit_bytes:
        raise CacheError(f"{path} is longer than the {limit_bytes} bytes that such a file may have")
    return data


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex, read in pieces (constant memory); raises `CacheError` as `open_to_read`."""
    with os.fdopen(open_to_read(path), "rb", buffering=0) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CacheError(f"{path} cannot be read: {error.strerror}") from error


def hashes_of(path: Path) -> Hashes:
    """As `sha256_of`, with the hashes of the blocks."""
    hasher = Hasher()
    with os.fdopen(open_to_read(path), "rb", buffering=0) as file:
        piece = memoryview(bytearray(_PIECE_BYTES))
        try:
            while got := file.readinto(piece):
                hasher.update(piece[:got])
        except OSError as error:
            raise CacheError(f"{path} cannot be read: {error.strerror}") from error
    return hasher.result()


def append(fd: int, data: bytes, path: Path) -> None:
    """Write all of `data` to the open file `path`; raises `CacheError` if the disk refuses."""
    with explained(path, "written"):
        write_all(fd, memoryview(data))


def publish(fd: int, part: Path, target: Path) -> None:
    """Give the finished file `part`, open as `fd`, its final name on the same disk, durably; raises `CacheError`."""
    with explained(target, "written"):
        _fsync(fd)
        _rename(part, target)
        fsync_directory(target.parent)
