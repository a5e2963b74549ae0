"""Records of verifications wherever a cache lies: beside it on a disk, or at a place that others read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from featcache.errors import CacheError, UserError
from featcache.share import verification as verified
from featcache.share.verification import Verification
from featcache.share.verify import Report
from featcache.store.remote import is_remote, local_path, open_destination, open_location

_ATTEMPTS = 5


def last(cache: str) -> Verification | None:
    """The latest verification of a cache that is on record, None if there is none.

    Raises `CacheError` if the record is damaged or cannot be had.
    """
    entries, _ = verified.read(open_location(cache))
    return entries[-1] if entries else None


def record(cache: str, report: Report, features: Sequence[str] | None) -> str | None:
    """Add what `report` says to the cache's record; returns why that was not possible, None if it was."""
    entry = verified.of_report(report, features)
    if entry is None:
        return "its root document is damaged"
    try:
        if is_remote(cache):
            _record_remote(cache, entry)
        else:
            verified.record(Path(local_path(cache)), entry)
    except UserError as error:
        return error.what
    return None


def _record_remote(url: str, entry: Verification) -> None:
    place = open_destination(url)
    for _ in range(_ATTEMPTS):
        try:
            entries, version = verified.read(place)
        except CacheError:
            entries, version = [], place.version(verified.NAME)
        if place.put_if(verified.NAME, verified.added(entries, entry), version):
            return
    raise CacheError(f"the record of verifications at {place.url} changed {_ATTEMPTS} times while it was written")
