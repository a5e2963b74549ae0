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
import socket
from collections.abc import Callable, Generator
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from featcache.errors import CacheError, UserError
from featcache.paths import home
from featcache.redact import redact
from featcache.remote_errors import Attempts, first_line, missing, no_credentials, retrying
from featcache.store.places import CHUNK_BYTES, LocalLocation, Location, Missing, too_long

_SCHEME = re.compile(r"([a-z][a-z0-9+]*)://")
REMOTE_SCHEMES = ("s3", "gs", "hf", "http", "https")
PIECE_BYTES = 8 << 20

T = TypeVar("T")


class Destination(Location, Protocol):
    """A place that can be written to. Every `put` is atomic: readers see all of a file or nothing.

    conditional: whether `put_if` keeps its promise, as far as is known yet.
    """

    conditional: bool

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
            f"{redact(os.fspath(path))}: there is no way to reach {match[1]}://",
            remedy=f"use a local path or one of {', '.join(s + '://' for s in REMOTE_SCHEMES)}",
        )
    return True


def local_path(path: str | os.PathLike[str]) -> Path:
    return Path(os.fspath(path).removeprefix("file://"))


class ObjectLocation:
    """A prefix in an object store, or a directory of a web server."""

    def __init__(self, url: str, store: Any) -> None:
        self.url, self.address = redact(url), url
        self._store = store
        self.conditional = True
        # Google's conditions name an object's generation, the others' its entity tag.
        self._condition = "version" if url.startswith("gs://") else "e_tag"

    def _what(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _retrying(self, name: str, call: Callable[[], T]) -> T:
        return retrying(self._what(name), self.address, call)

    def size(self, name: str) -> int:
        import obstore

        return int(self._retrying(name, lambda: obstore.head(self._store, name))["size"])

    def read(self, name: str, start: int, stop: int) -> bytes:
        return b"".join(self.chunks(name, start, stop))

    def chunks(self, name: str, start: int, stop: int) -> Generator[bytes, None, None]:
        import obstore
        from obstore.exceptions import BaseError

        attempts, counted = Attempts(self._what(name), self.address), start
        while start < stop:
            end = min(start + PIECE_BYTES, stop)
            try:
                answer = obstore.get(self._store, name, options={"range": (start, end)})
                for chunk in answer.stream(min_chunk_size=CHUNK_BYTES):
                    data = bytes(chunk)
                    if len(data) > end - start:
                        raise OSError(f"more bytes came than the {end - start} that were asked for")
                    start += len(data)
                    yield data
                if start < end:
                    raise OSError(f"{end - start} bytes less came than were asked for")
            except FileNotFoundError as error:
                raise missing(error, self._what(name), self.address) from error
            except (BaseError, OSError, ValueError) as error:
                # A server that sends a few bytes and breaks off, again and again, is not making progress.
                if start - counted >= min(CHUNK_BYTES, PIECE_BYTES):
                    attempts.progress()
                    counted = start
                attempts.failed(error)

    def read_whole(self, name: str, limit: int) -> tuple[bytes, str | None]:
        import obstore

        where = self._what(name)

        def attempt() -> tuple[bytes, str | None]:
            answer = obstore.get(self._store, name)
            size = int(answer.meta["size"])
            if size > limit:
                raise too_long(where, limit)
            content = bytearray()
            for chunk in answer.stream(min_chunk_size=CHUNK_BYTES):
                content += bytes(chunk)
                if len(content) > size:
                    break
            if len(content) != size:
                raise OSError(f"{len(content)} bytes came instead of {size}")
            return bytes(content), self._version(answer.meta)

        return self._retrying(name, attempt)

    def modified(self, name: str) -> datetime | None:
        import obstore

        moment = self._retrying(name, lambda: obstore.head(self._store, name))["last_modified"]
        # A web server that does not say is given the beginning of time.
        return moment if moment.timestamp() > 0 else None

    def directories(self) -> list[str]:
        import obstore

        def attempt() -> list[str]:
            found = obstore.list_with_delimiter(self._store)
            return sorted(str(prefix).rstrip("/").split("/")[-1] for prefix in found["common_prefixes"])

        return retrying(self.url, self.address, attempt)

    def put(self, name: str, content: bytes | Path) -> None:
        import obstore

        try:
            self._retrying(name, lambda: obstore.put(self._store, name, content))
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
                self.conditional = False
                obstore.put(self._store, name, content)
            return True

        try:
            return self._retrying(name, attempt)
        except Missing as error:
            if previous is None:
                raise CacheError(f"{self.url} does not exist or may not be written to") from error
            return False  # what was to be replaced has been removed meanwhile

    def version(self, name: str) -> str | None:
        import obstore

        try:
            return self._version(self._retrying(name, lambda: obstore.head(self._store, name)))
        except Missing:
            return None

    def _version(self, meta: Any) -> str:
        condition = meta["version"] if self._condition == "version" else meta["e_tag"]
        return condition or f"{meta['size']}@{meta['last_modified']}"


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
        raise UserError(f"{redact(url)} can only be read", remedy="push to a local path, s3://, gs:// or hf://")
    return ObjectLocation(text, _object_store(text, scheme))


def _client_options(url: str) -> Any:
    # The time is for a request of at most PIECE_BYTES; one that is cut off goes on where it was.
    return {"timeout": "60s", "connect_timeout": "5s", "allow_http": url.startswith("http://")}


# Our own retries start a request anew from where it broke; the library's would multiply with them.
_NO_RETRIES: Any = {"max_retries": 0}


def _object_store(url: str, scheme: str) -> Any:
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    options: dict[str, Any] = {"client_options": _client_options(url), "retry_config": _NO_RETRIES}
    try:
        if scheme == "s3":
            options |= _s3_options(url)
        if scheme == "gs":
            options |= _gs_options(url)
        return from_url(url, **options)
    except (BaseError, ValueError) as error:
        raise UserError(f"{redact(url)} cannot be reached: {first_line(error)}", remedy="check the URL") from error


def _s3_options(url: str) -> dict[str, Any]:
    """What the store does not take from the environment by itself: plain-http endpoints, profiles of
    `~/.aws`. Raises `CacheError` where there are no credentials.
    """
    found: dict[str, Any] = {}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        found = {"config": {"endpoint": endpoint}, "client_options": _client_options(endpoint)}
    from_environment = {
        "AWS_ACCESS_KEY_ID",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    }
    if not from_environment.isdisjoint(os.environ) or _is_true("AWS_SKIP_SIGNATURE"):
        return found
    if (own := home()) is not None and (own / ".aws").is_dir():
        try:
            from obstore.auth.boto3 import Boto3CredentialProvider

            found["credential_provider"] = Boto3CredentialProvider()
            return found
        except (ImportError, ValueError):
            pass  # no boto3, or nothing of use in that folder: an instance's role is left
    metadata = os.environ.get("AWS_METADATA_ENDPOINT", _METADATA)
    if _is_true("AWS_EC2_METADATA_DISABLED") or not _answers(metadata):
        raise no_credentials(url)
    return found


def _gs_options(url: str) -> dict[str, Any]:
    """What Google's own clients understand: an emulator, spoken to without credentials. Raises `CacheError` where
    there are no credentials.
    """
    if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
        base = emulator if "://" in emulator else f"http://{emulator}"
        account = {
            "gcs_base_url": base,
            "disable_oauth": True,
            "client_email": "",
            "private_key": "",
            "private_key_id": "",
        }
        return {"config": {"service_account_key": json.dumps(account)}, "client_options": _client_options(base)}
    names = ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH")
    configured = any(os.environ.get(name) for name in (*names, "GOOGLE_SERVICE_ACCOUNT_KEY"))
    own = home()
    adc = own is not None and (own / ".config" / "gcloud" / "application_default_credentials.json").is_file()
    if configured or adc or _is_true("GOOGLE_SKIP_SIGNATURE"):
        return {}
    if not _answers(f"http://{os.environ.get('GCE_METADATA_HOST', urlsplit(_METADATA).netloc)}"):
        raise no_credentials(url)
    return {}


# Where a cloud's machine asks for the credentials of its role.
_METADATA = "http://169.254.169.254"
_METADATA_TIMEOUT_S = 1.0


def _answers(endpoint: str) -> bool:
    """Whether anything listens at a metadata service: elsewhere than in a cloud nothing does, and waiting for it in
    every request would take minutes.
    """
    parts = urlsplit(endpoint)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 80), timeout=_METADATA_TIMEOUT_S).close()
    except (OSError, ValueError):
        return False
    return True


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def parse_hub_url(url: str) -> tuple[str, str, str]:
    """Repository, revision and path of `hf://datasets/OWNER/NAME[@REVISION][/PATH]`; raises `UserError`."""
    match = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.*))?", url.rstrip("/"))
    if match is None or ".." in url:
        raise UserError(f"{redact(url)} is not understood", remedy="write hf://datasets/OWNER/NAME[@REVISION][/PATH]")
    return match[1], match[2] or "main", match[3] or ""


def _hub_location(url: str) -> ObjectLocation:
    """A data-set repository of the hub, read over its https interface."""
    from huggingface_hub import constants, get_token
    from obstore.store import HTTPStore

    repository, revision, path = parse_hub_url(url)
    base = f"{constants.ENDPOINT}/datasets/{repository}/resolve/{revision}/{path}".rstrip("/")
    client = _client_options(base)
    token = get_token()
    if token:
        client["default_headers"] = {"authorization": f"Bearer {token}"}
    return ObjectLocation(url, HTTPStore.from_url(base, client_options=client, retry_config=_NO_RETRIES))
