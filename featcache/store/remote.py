"""Where a cache may lie: a directory, or behind s3://, gs://, hf://, http(s)://. Bytes by name; nothing of caches."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import quote

from featcache.errors import UserError
from featcache.redact import redact
from featcache.store.places import LocalLocation, Location, joined

if TYPE_CHECKING:
    from featcache.store.objects import ObjectLocation

_SCHEME = re.compile(r"([a-z][a-z0-9+]*)://")
REMOTE_SCHEMES = ("s3", "gs", "hf", "http", "https")


class Destination(Location, Protocol):
    """A place that can be written to. Every `put` is atomic: readers see all of a file or nothing.

    conditional: whether `put_if` keeps its promise, as far as is known yet.
    """

    conditional: bool

    def put(self, name: str, content: bytes | Path) -> None: ...

    def put_if(self, name: str, content: bytes, previous: str | None) -> bool:
        """Replace a small file only if its version is still `previous` (None: it must not exist); else False."""

    def version(self, name: str) -> str | None:
        """An identifier of the file's present content, None if there is no such file."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a URL rather than a local path; raises `UserError` for a scheme that is not known."""
    match = _SCHEME.match(os.fspath(path))
    if match is None or match[1] == "file":
        return False
    if match[1] not in REMOTE_SCHEMES:
        raise UserError(
            f"{redact(os.fspath(path))}: there is no way to reach {match[1]}://",
            remedy=f"use a local path or one of {', '.join(s + '://' for s in REMOTE_SCHEMES)}",
        )
    return True


def local_path(path: str | os.PathLike[str]) -> Path:
    return Path(os.fspath(path).removeprefix("file://"))


def address_below(place: Location, directory: str) -> str:
    """The path or URL of one of a place's `directories`, to be opened as a place itself."""
    if isinstance(place, LocalLocation):
        return f"{place.address}/{directory}"
    plain = directory.strip() == directory and _MEANS_SOMETHING.search(directory) is None
    return joined(place.address, directory if plain else quote(directory, safe=""))


# What a URL would take for something else in a name.
_MEANS_SOMETHING = re.compile(r"[%?#\x00-\x1f]")


def parse_hub_url(url: str) -> tuple[str, str, str]:
    """Repository, revision and path of `hf://datasets/OWNER/NAME[@REVISION][/PATH]`; raises `UserError`."""
    match = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.*))?", url.rstrip("/"))
    if match is None or ".." in url:
        raise UserError(f"{redact(url)} is not understood", remedy="write hf://datasets/OWNER/NAME[@REVISION][/PATH]")
    return match[1], match[2] or "main", match[3] or ""


def open_location(url: str | os.PathLike[str]) -> Location:
    """The place that `url` names, for reading; raises `UserError` for a URL that is not understood."""
    if not is_remote(url):
        return LocalLocation(local_path(os.fspath(url).rstrip("/")))
    return open_remote_location(os.fspath(url))


def open_remote_location(url: str) -> ObjectLocation:
    """As `open_location`, of what is known to be a URL."""
    # Late: local caches need no client of object stores.
    from featcache.store import objects

    text = url.rstrip("/")
    if text.startswith("hf://"):
        return objects.hub_location(text, *parse_hub_url(text))
    return objects.object_location(text)


def open_destination(url: str) -> Destination:
    """The object store behind `url`, for writing; raises `UserError` where that is not possible."""
    text = url.rstrip("/")
    if text.split("://")[0] not in ("s3", "gs"):
        raise UserError(f"{redact(url)} can only be read", remedy="push to a local path, s3://, gs:// or hf://")
    return open_remote_location(text)
