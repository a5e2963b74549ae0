"""Where the files of a cache are read: what every place can do, and the place that is a directory."""

from __future__ import annotations

import os
from collections.abc import Generator
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Protocol

from featcache.errors import CacheError
from featcache.store import files

CHUNK_BYTES = 1 << 16
_TELL = "tell whoever shares the cache; featcache verify checks it at its source"


class Missing(Exception):
    """There is nothing of that name."""


class Unreadable(CacheError):
    """One file cannot be read, or is longer than it may be; others at that place may be fine."""


class DamagedSource(CacheError):
    """A place lacks a file of a cache, or sends other bytes than are wanted."""

    def __init__(self, what: str) -> None:
        super().__init__(what, remedy=_TELL)


def too_long(where: str, limit: int) -> Unreadable:
    return Unreadable(f"{where} is longer than the {limit} bytes that such a file may have")


def is_missing(place: Location, name: str) -> DamagedSource:
    return DamagedSource(f"{place.url}/{name} is missing")


def read_small(place: Location, name: str, limit: int) -> bytes:
    """A small file that must be there; raises `CacheError` if it cannot be had or is longer than `limit`."""
    try:
        return place.read_whole(name, limit)[0]
    except Missing as error:
        raise is_missing(place, name) from error


def joined(url: str, name: str) -> str:
    """A URL with a name after its path, before its query."""
    path, mark, query = url.partition("?")
    return f"{path}/{name}{mark}{query}"


class Location(Protocol):
    """A place that holds files by name. Names use '/' and never begin with it.

    `url` is for people: without the secrets that `address` may hold.
    """

    url: str
    address: str

    def size(self, name: str) -> int:
        """Length in bytes; raises `Missing`."""

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes `start` to `stop` of a file, exactly; raises `Missing`, or `CacheError` after retries."""

    def chunks(self, name: str, start: int, stop: int) -> Generator[bytes, None, None]:
        """As `read`, in order and as they come; a broken connection goes on where it broke."""

    def read_whole(self, name: str, limit: int) -> tuple[bytes, str | None]:
        """A small file and the version that these bytes are, in one request.

        Raises `Missing`, or `CacheError` if it is longer than `limit` or cannot be had.
        """

    def modified(self, name: str) -> datetime | None:
        """When a file was written, None where the place does not say; raises `Missing`."""

    def directories(self) -> list[str]:
        """Names of the immediate subdirectories, as far as the place can list them."""


class LocalLocation:
    """A directory, read-only (writing goes through `featcache.store.files`). No link below it is followed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = self.address = str(path)

    def open(self, name: str) -> FileIO:
        """A regular file; raises `Missing`, `Unreadable`, or another `CacheError` where that says nothing of the file."""
        try:
            return os.fdopen(files.open_to_read(files.inside(self.path, name)), "rb", buffering=0)
        except CacheError as error:
            if files.not_the_file(error):
                raise
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                raise Missing(name) from error
            raise Unreadable(error.what, remedy=error.remedy) from error

    def size(self, name: str) -> int:
        with self.open(name) as file:
            return os.fstat(file.fileno()).st_size

    def read(self, name: str, start: int, stop: int) -> bytes:
        return b"".join(self.chunks(name, start, stop))

    def chunks(self, name: str, start: int, stop: int) -> Generator[bytes, None, None]:
        with self.open(name) as file:
            file.seek(start)
            while start < stop:
                try:
                    data = file.read(min(CHUNK_BYTES, stop - start))
                except OSError as error:
                    if files.not_the_file(error):
                        raise files.explain(error, self.path / name, "read") from error
                    raise Unreadable(f"{self.path / name} cannot be read: {error.strerror}") from error
                if not data:
                    raise DamagedSource(f"{self.path / name} is shorter than it must be")
                start += len(data)
                yield data

    def read_whole(self, name: str, limit: int) -> tuple[bytes, str | None]:
        try:
            with self.open(name) as file:
                return files.read_all(file.fileno(), self.path / name, limit), None
        except CacheError as error:
            if files.not_the_file(error):
                raise
            raise Unreadable(error.what, remedy=error.remedy) from error

    def modified(self, name: str) -> datetime | None:
        with self.open(name) as file:
            return datetime.fromtimestamp(os.fstat(file.fileno()).st_mtime, UTC)

    def directories(self) -> list[str]:
        return sorted(p.name for p in self.path.iterdir() if p.is_dir()) if self.path.is_dir() else []
