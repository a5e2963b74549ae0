"""Where a cache may lie: a directory, or behind s3://, gs://, hf://, http(s)://. Bytes by name; nothing of
caches.

Object stores are spoken to through obstore; credentials come from each ecosystem's usual places (the
environment, instance roles, `~/.aws` where boto3 is installed, application-default credentials, the hub's
token).
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from featcache.errors import CacheError, UserError

_SCHEME = re.compile(r"([a-z][a-z0-9+]*)://")
REMOTE_SCHEMES = ("s3", "gs", "hf", "http", "https")
PIECE_BYTES = 8 << 20
_ATTEMPTS = 6
_FIRST_PAUSE_S = 0.1

T = TypeVar("T")


class Missing(Exception):
    """There is nothing of that name."""


class Location(Protocol):
    """A place that holds files by name. Names use '/' and never begin with it."""

    url: str

    def size(self, name: str) -> int:
        """Length in bytes; raises `Missing`."""

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes `start` to `stop` of a file, exactly; raises `Missing`, or `CacheError` after retries."""

    def directories(self) -> list[str]:
        """Names of the immediate subdirectories, as far as the place can list them."""


class Destination(Location, Protocol):
    """A place that can be written to. Every `put` is atomic: readers see all of a file or nothing."""

    def put(self, name: str, content: bytes | Path) -> None: ...

    def put_if(self, name: str, content: bytes, previous: str | None) -> bool:
        """Replace a small file only if its version is still `previous` (None: it must not exist); else
        False.
        """

    def version(self, name: str) -> str | None:
        """An identifier of the file's present content, None if there is no such file."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a URL rather than a local path; raises `UserError` for a scheme that is not known."""
    match = _SCHEME.match(os.fspath(path))
    if match is None or match[1] == "file":
        return False
    if match[1] not in REMOTE_SCHEMES:
        raise UserError(
            f"{path}: there is no way to reach {match[1]}://",
            remedy=f"use a local path or one of {', '.join(s + '://' for s in REMOTE_SCHEMES)}",
        )
    return True


def local_path(path: str | os.PathLike[str]) -> Path:
    return Path(os.fspath(path).removeprefix("file://"))


def retrying(what: str, call: Callable[[], T]) -> T:
    """The result of `call`, tried again with growing pauses while the network fails; raises `CacheError` in
    the end.

    What a retry cannot mend (missing, forbidden) is raised at once.
    """
    from obstore import exceptions

    final = (
        exceptions.PermissionDeniedError,
        exceptions.UnauthenticatedError,
        exceptions.InvalidPathError,
        exceptions.NotSupportedError,
        exceptions.UnknownConfigurationKeyError,
    )
    for attempt in range(_ATTEMPTS):
        try:
            return call()
        except FileNotFoundError as error:
            raise Missing(what) from error
        except final as error:
            raise CacheError(
                f"{what} was refused: {_first_line(error)}",
                remedy="check the URL and the credentials (docs/sharing.md says where they are taken from)",
            ) from error
        except (exceptions.BaseError, OSError, ValueError) as error:
            if attempt == _ATTEMPTS - 1:
                raise CacheError(
                    f"{what} failed {_ATTEMPTS} times: {_first_line(error)}",
                    remedy="run the same command again when the connection is better: it goes on where it stopped",
                ) from error
            time.sleep(_FIRST_PAUSE_S * 2**attempt)
    raise AssertionError


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]


class LocalLocation:
    """A directory, read-only (writing goes through `featcache.store.files`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = str(path)

    def size(self, name: str) -> int:
        try:
            return (self.path / name).stat().st_size
        except FileNotFoundError as error:
            raise Missing(name) from error

    def read(self, name: str, start: int, stop: int) -> bytes:
        try:
            with (self.path / name).open("rb") as file:
                file.seek(start)
                data = file.read(stop - start)
        except FileNotFoundError as error:
            raise Missing(name) from error
        except OSError as error:
            raise CacheError(f"{self.path / name} cannot be read: {error.strerror}") from error
        if len(data) != stop - start:
            raise CacheError(f"{self.path / name} is shorter than expected")
        return data

    def directories(self) -> list[str]:
        return sorted(p.name for p in self.path.iterdir() if p.is_dir()) if self.path.is_dir() else []


class ObjectLocation:
    """A prefix in an object store, or a directory of a web server."""

    def __init__(self, url: str, store: Any) -> None:
        self.url = url
        self._store = store
        # Google's conditions name an object's generation, the others' its entity tag.
        self._condition = "version" if url.startswith("gs://") else "e_tag"

    def _what(self, name: str) -> str:
        return f"{self.url}/{name}"

    def size(self, name: str) -> int:
        import obstore

        return int(retrying(self._what(name), lambda: obstore.head(self._store, name))["size"])

    def read(self, name: str, start: int, stop: int) -> bytes:
        import obstore

        def attempt() -> bytes:
            data = bytes(obstore.get_range(self._store, name, start=start, end=stop))
            if len(data) != stop - start:
                raise OSError(f"{len(data)} bytes came instead of {stop - start}")
            return data

        if stop <= start:
            return b""
        return retrying(self._what(name), attempt)

    def directories(self) -> list[str]:
        import obstore

        def attempt() -> list[str]:
            found = obstore.list_with_delimiter(self._store)
            return sorted(str(prefix).rstrip("/").split("/")[-1] for prefix in found["common_prefixes"])

        return retrying(self.url, attempt)

    def put(self, name: str, content: bytes | Path) -> None:
        import obstore

        try:
            retrying(self._what(name), lambda: obstore.put(self._store, name, content))
        except Missing as error:
            raise CacheError(f"{self.url} does not exist or may not be written to") from error

    def put_if(self, name: str, content: bytes, previous: str | None) -> bool:
        import obstore
        from obstore import exceptions

        def attempt() -> bool:
            mode: Any = "create" if previous is None else {self._condition: previous}
            try:
                obstore.put(self._store, name, content, mode=mode)
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
                return False
            except exceptions.NotSupportedError:
                # Stores without conditional requests: the last writer wins.
                obstore.put(self._store, name, content)
            return True

        return retrying(self._what(name), attempt)

    def version(self, name: str) -> str | None:
        import obstore

        try:
            head = retrying(self._what(name), lambda: obstore.head(self._store, name))
        except Missing:
            return None
        condition = head["version"] if self._condition == "version" else head["e_tag"]
        return condition or f"{head['size']}@{head['last_modified']}"


def open_location(url: str | os.PathLike[str]) -> Location:
    """The place that `url` names, for reading; raises `UserError` for a URL that is not understood."""
    text = os.fspath(url).rstrip("/")
    if not is_remote(text):
        return LocalLocation(local_path(text))
    scheme = text.split("://")[0]
    if scheme == "hf":
        return _hub_location(text)
    return ObjectLocation(text, _object_store(text, scheme))


def open_destination(url: str) -> ObjectLocation:
    """The object store behind `url`, for writing; raises `UserError` where that is not possible."""
    text = url.rstrip("/")
    scheme = text.split("://")[0]
    if scheme not in ("s3", "gs"):
        raise UserError(f"{url} can only be read", remedy="push to a local path, s3://, gs:// or hf://")
    return ObjectLocation(text, _object_store(text, scheme))


def _object_store(url: str, scheme: str) -> Any:
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    options: dict[str, Any] = {"client_options": {"timeout": "120s", "connect_timeout": "10s"}}
    # Our own retries start a request anew from where it broke; the library's would add to each of them.
    options["retry_config"] = {"max_retries": 2}
    if scheme == "http":
        options["client_options"]["allow_http"] = True
    if scheme == "s3":
        options |= _s3_options(options)
    # What Google's own clients understand: an emulator, spoken to without credentials.
    if scheme == "gs" and (emulator := os.environ.get("STORAGE_EMULATOR_HOST")):
        base = emulator if "://" in emulator else f"http://{emulator}"
        account = {
            "gcs_base_url": base,
            "disable_oauth": True,
            "client_email": "",
            "private_key": "",
            "private_key_id": "",
        }
        options["config"] = {"service_account_key": json.dumps(account)}
        options["client_options"]["allow_http"] = base.startswith("http://")
    try:
        return from_url(url, **options)
    except (BaseError, ValueError) as error:
        raise UserError(f"{url} cannot be reached: {_first_line(error)}") from error


def _s3_options(options: dict[str, Any]) -> dict[str, Any]:
    """What the store does not take from the environment by itself: plain-http endpoints, profiles of
    `~/.aws`.
    """
    found: dict[str, Any] = {}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        found["config"] = {"endpoint": endpoint}
        if endpoint.startswith("http://"):
            found["client_options"] = {**options["client_options"], "allow_http": True}
    from_environment = {"AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SKIP_SIGNATURE"}
    if from_environment.isdisjoint(os.environ) and (Path.home() / ".aws").is_dir():
        try:
            from obstore.auth.boto3 import Boto3CredentialProvider
        except ImportError:
            return found
        found["credential_provider"] = Boto3CredentialProvider()
    return found


def parse_hub_url(url: str) -> tuple[str, str, str]:
    """Repository, revision and path of `hf://datasets/OWNER/NAME[@REVISION][/PATH]`; raises `UserError`."""
    match = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.*))?", url.rstrip("/"))
    if match is None or ".." in url:
        raise UserError(f"{url} is not understood", remedy="write hf://datasets/OWNER/NAME[@REVISION][/PATH]")
    return match[1], match[2] or "main", match[3] or ""


def _hub_location(url: str) -> ObjectLocation:
    """A data-set repository of the hub, read over its https interface."""
    from huggingface_hub import constants, get_token
    from obstore.store import HTTPStore

    repository, revision, path = parse_hub_url(url)
    base = f"{constants.ENDPOINT}/datasets/{repository}/resolve/{revision}/{path}".rstrip("/")
    client: Any = {"timeout": "120s", "connect_timeout": "10s"}
    client["allow_http"] = base.startswith("http://")
    token = get_token()
    if token:
        client["default_headers"] = {"authorization": f"Bearer {token}"}
    return ObjectLocation(url, HTTPStore.from_url(base, client_options=client, retry_config={"max_retries": 2}))
