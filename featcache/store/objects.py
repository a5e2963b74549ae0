"""Object stores and web servers as places of a cache's files, through obstore.

Credentials come from each ecosystem's usual places (the environment, instance roles, `~/.aws` where boto3 is installed,
application-default credentials, the hub's token).
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable, Generator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore import exceptions
from obstore.exceptions import BaseError
from obstore.store import HTTPStore, from_url

from featcache.errors import CacheError, UserError, first_line
from featcache.paths import home
from featcache.redact import redact
from featcache.store.places import CHUNK_BYTES, Missing, joined, too_long
from featcache.store.remote_errors import Attempts, missing, no_credentials, retrying, status_of

if TYPE_CHECKING:
    from obstore import ObjectMeta, PutMode
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

PIECE_BYTES = 8 << 20

T = TypeVar("T")


class ObjectLocation:
    """A prefix in an object store, or a directory of a web server."""

    def __init__(self, url: str, store: ObjectStore) -> None:
        self.url, self.address = redact(url), url
        self._store = store
        self.conditional = True
        # Google's conditions name an object's generation, the others' its entity tag.
        self._condition: Literal["version", "e_tag"] = "version" if url.startswith("gs://") else "e_tag"

    def _what(self, name: str) -> str:
        return joined(self.url, name)

    def _retrying(self, name: str, call: Callable[[], T]) -> T:
        return retrying(self._what(name), self.address, call)

    def size(self, name: str) -> int:
        return self.size_and_version(name)[0]

    def size_and_version(self, name: str) -> tuple[int, str]:
        """Length in bytes, and an identifier of the present content; raises `Missing`."""
        found = self._retrying(name, lambda: obstore.head(self._store, name))
        return int(found["size"]), self._version(found)

    def read(self, name: str, start: int, stop: int) -> bytes:
        return b"".join(self.chunks(name, start, stop))

    def chunks(self, name: str, start: int, stop: int) -> Generator[bytes, None, None]:
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
        moment = self._retrying(name, lambda: obstore.head(self._store, name))["last_modified"]
        # A web server that does not say is given the beginning of time.
        return moment if moment.timestamp() > 0 else None

    def directories(self) -> list[str]:
        def attempt() -> list[str]:
            try:
                found = obstore.list_with_delimiter(self._store)
            except exceptions.InvalidPathError as error:
                raise CacheError(
                    f"{self.url} cannot be listed, since a name there cannot be part of a path: {redact(first_line(error))}",
                    remedy="have it renamed or removed, or name a cache itself",
                ) from error
            except BaseError as error:
                if status_of(error) not in (405, 501):
                    raise
                raise CacheError(
                    f"there is no cache at {self.url}, and its server does not list what lies below",
                    remedy="give the URL of a cache itself",
                ) from error
            return sorted(str(prefix).rstrip("/").split("/")[-1] for prefix in found["common_prefixes"])

        try:
            return retrying(self.url, self.address, attempt)
        except Missing:
            return []

    def put(self, name: str, content: bytes | Path) -> None:
        try:
            self._retrying(name, lambda: obstore.put(self._store, name, content))
        except Missing as error:
            raise CacheError(f"{self.url} does not exist or may not be written to") from error

    def put_if(self, name: str, content: bytes, previous: str | None) -> bool:
        def attempt() -> bool:
            mode: PutMode = "create"
            if previous is not None:
                mode = {"version": previous} if self._condition == "version" else {"e_tag": previous}
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
        try:
            return self.size_and_version(name)[1]
        except Missing:
            return None

    def _version(self, meta: ObjectMeta) -> str:
        return meta[self._condition] or f"{meta['size']}@{meta['last_modified']}"


def _client_options(url: str) -> ClientConfig:
    # The time is for a request of at most PIECE_BYTES; one that is cut off goes on where it was.
    return {"timeout": "60s", "connect_timeout": "5s", "allow_http": url.startswith("http://")}


# Our own retries start a request anew from where it broke; the library's would multiply with them.
_NO_RETRIES: RetryConfig = {"max_retries": 0}


def object_location(url: str) -> ObjectLocation:
    """The object store or web server behind `url`; raises `UserError` where it cannot be reached."""
    return ObjectLocation(url, _object_store(url, url.split("://")[0]))


def _object_store(url: str, scheme: str) -> ObjectStore:
    options: dict[str, Any] = {"client_options": _client_options(url), "retry_config": _NO_RETRIES}
    try:
        if scheme == "s3":
            options |= _s3_options(url)
        if scheme == "gs":
            options |= _gs_options(url)
        return from_url(url, **options)
    except (BaseError, ValueError) as error:
        what = redact(first_line(error))
        raise UserError(f"{redact(url)} cannot be reached: {what}", remedy="check the URL") from error


_FILES_OF_BOTO3 = ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", "AWS_PROFILE")


def _s3_options(url: str) -> dict[str, Any]:
    """What the store does not take from the environment by itself: plain-http endpoints, profiles of
    `~/.aws`. Raises `CacheError` where there are no credentials.
    """
    found: dict[str, Any] = {}
    endpoint = _endpoint("AWS_ENDPOINT_URL_S3") or _endpoint("AWS_ENDPOINT_URL")
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
    if any(map(os.environ.get, _FILES_OF_BOTO3)) or ((own := home()) is not None and (own / ".aws").is_dir()):
        try:
            # Late: boto3 need not be there.
            from obstore.auth.boto3 import Boto3CredentialProvider

            found["credential_provider"] = Boto3CredentialProvider()
            return found
        except (ImportError, ValueError):
            pass  # no boto3, or nothing of use there: an instance's role is left
        except Exception as error:  # botocore's own, over profiles and files that are wrong
            raise CacheError(
                f"the credentials for {redact(url)} cannot be had: {redact(first_line(error))}",
                remedy="put ~/.aws (or what $AWS_PROFILE, $AWS_CONFIG_FILE, $AWS_SHARED_CREDENTIALS_FILE name) right",
            ) from error
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


def _endpoint(variable: str) -> str | None:
    """The URL of a service that a variable names, None where it names none; raises `UserError` for anything else."""
    value = os.environ.get(variable)
    if value and re.match(r"https?://[^/]", value) is None:
        raise UserError(
            f"${variable} is {value!r:.200}, no URL of a service", remedy="write http:// or https:// before its host"
        )
    return value or None


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def hub_location(url: str, repository: str, revision: str, path: str) -> ObjectLocation:
    """A data-set repository of the hub, read over its https interface."""
    from huggingface_hub import constants, get_token  # late: other places need no client of the hub

    base = f"{constants.ENDPOINT}/datasets/{repository}/resolve/{revision}/{path}".rstrip("/")
    client = _client_options(base)
    token = get_token()
    if token:
        client["default_headers"] = {"authorization": f"Bearer {token}"}
    return ObjectLocation(url, HTTPStore.from_url(base, client_options=client, retry_config=_NO_RETRIES))
