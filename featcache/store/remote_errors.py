"""What went wrong between here and a remote place, by cause: one line each, and a remedy where there is one."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

from obstore import exceptions
from obstore.exceptions import BaseError

from featcache.errors import CacheError, first_line
from featcache.redact import redact
from featcache.store.places import DamagedSource, Missing

ATTEMPTS = 8
FIRST_PAUSE_S = 0.1

_AGAIN = "run the same command again when the connection is better: it goes on where it stopped"
_DOCUMENTED = "docs/sharing.md says where credentials are taken from"
_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_REFUSED_HOST = re.compile(r"\"tcp connect error\",\s*([\d.:\[\]a-f]+:\d+)")

T = TypeVar("T")


class Attempts:
    """Tries of one request: `failed` waits a little, or raises `CacheError` once trying again is of no use."""

    def __init__(self, what: str, address: str) -> None:
        self._what, self._address = what, address
        self._failures = 0

    def progress(self) -> None:
        """Something came: failures are counted anew."""
        self._failures = 0

    def failed(self, error: Exception) -> None:
        final = final_cause(error, self._what, self._address)
        if final is not None:
            raise final from error
        self._failures += 1
        if self._failures == ATTEMPTS:
            raise CacheError(
                f"{self._what} failed {ATTEMPTS} times: {passing_cause(error, self._address)}", remedy=_AGAIN
            ) from error
        time.sleep(FIRST_PAUSE_S * 2 ** (self._failures - 1))


def retrying(what: str, address: str, call: Callable[[], T]) -> T:
    """The result of `call`, tried again with growing pauses while the network fails.

    Raises `Missing` where there is nothing, `CacheError` at once for what no retry mends and in the end for the rest.
    """
    attempts = Attempts(what, address)
    while True:
        try:
            return call()
        except FileNotFoundError as error:
            raise missing(error, what, address) from error
        except (BaseError, OSError, ValueError) as error:
            attempts.failed(error)


def missing(error: Exception, what: str, address: str) -> Missing | CacheError:
    """What a 404 means: nothing of that name, or not even the bucket."""
    if "NoSuchBucket" in str(error):
        parts = urlsplit(address)
        return CacheError(
            f"there is no bucket {_host(address)!r} ({parts.scheme}) at the service that was asked",
            remedy="check the name and the service (AWS_ENDPOINT_URL, AWS_REGION), or have the bucket made",
        )
    return Missing(what)


def final_cause(error: Exception, what: str, address: str) -> CacheError | None:
    """The error to raise at once; None if another try may help."""
    text = str(error)
    status = status_of(error)
    if "Wanted range starting at" in text or status == 416:
        return DamagedSource(f"{what} is shorter than it must be")
    if isinstance(error, exceptions.UnauthenticatedError):
        return CacheError(f"{what}: the server wants credentials that it knows (401)", remedy=_DOCUMENTED)
    if isinstance(error, exceptions.PermissionDeniedError):
        return CacheError(f"{what}: access is forbidden (403)", remedy=_rights(address))
    if "/metadata/" in text or "/meta-data/" in text or "/latest/api/token" in text or "credentials from" in text:
        return no_credentials(address)
    if isinstance(error, exceptions.NotSupportedError) and "Range request" in text:
        return CacheError(
            f"{what}: the server does not send parts of files (byte ranges)",
            remedy="serve the cache with a web server that does, or copy its folder by other means",
        )
    if "InvalidCertificate" in text or "InvalidContentType" in text or "HandshakeFailure" in text:
        why = "does not speak TLS" if "InvalidContentType" in text else "shows a certificate that cannot be trusted"
        return CacheError(
            f"{what}: the server {why}",
            remedy="check the address (https or http) and this machine's clock; SSL_CERT_FILE names further authorities",
        )
    if "BareRedirect" in text:
        return CacheError(
            f"{what}: the service sends on to another region without saying which",
            remedy="set AWS_REGION to the bucket's region",
        )
    if "kind: Redirect" in text:
        return CacheError(f"{what}: the server sends from address to address without end", remedy="check the URL")
    if "BadScheme" in text:
        return CacheError(f"{what}: the server sends from https to an address without TLS, which is not followed")
    if status is not None and 300 <= status < 500 and status not in (408, 409, 425, 429):
        return CacheError(f"{what}: the server answered with status {status}", remedy="check the URL")
    if isinstance(
        error,
        exceptions.InvalidPathError | exceptions.NotSupportedError | exceptions.UnknownConfigurationKeyError,
    ):
        return CacheError(f"{what} was refused: {redact(first_line(error))}", remedy="check the URL")
    return None


def status_of(error: Exception) -> int | None:
    """The HTTP status that a request failed with, None if that is not why."""
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None


def passing_cause(error: Exception, address: str) -> str:
    """In a few words, why a request failed that might work another time."""
    text = str(error)
    host = _host(address) or redact(address)
    if "dns error" in text:
        return f"the name of the server is not known here (for {redact(address)})"
    if "ConnectionRefused" in text:
        found = _REFUSED_HOST.search(text)
        return f"{found[1] if found else host} refuses connections"
    if "kind: Timeout" in text or "TimedOut" in text:
        return f"no answer from the server in time (for {redact(address)})"
    if "kind: Connect" in text:
        return f"the server cannot be reached (for {redact(address)})"
    if (status := status_of(error)) is not None:
        return f"the server answered with status {status}"
    return redact(first_line(error))


def _host(address: str) -> str:
    """Host or bucket, without user and password."""
    return urlsplit(address).netloc.rpartition("@")[2]


def no_credentials(address: str) -> CacheError:
    """No credentials are configured for a place that wants some."""
    scheme = urlsplit(address).scheme
    ways = {
        "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE, with pip install boto3); "
        "for a public bucket AWS_SKIP_SIGNATURE=true",
        "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or log in: gcloud auth application-default login; "
        "for a public bucket GOOGLE_SKIP_SIGNATURE=true",
    }
    return CacheError(
        f"no credentials for {redact(address)} are configured on this machine", remedy=ways.get(scheme, _DOCUMENTED)
    )


def _rights(address: str) -> str:
    scheme = urlsplit(address).scheme
    if scheme == "s3":
        return "check AWS_ACCESS_KEY_ID or AWS_PROFILE and what they may do there (reading needs s3:GetObject, pushing also s3:PutObject)"
    if scheme == "gs":
        return "check which account GOOGLE_APPLICATION_CREDENTIALS names and what it may do there"
    if scheme == "hf":
        return "log in (hf auth login) with an account that may read that repository"
    return "check the URL, and with whoever runs the server that it may be read"
