"""The record of verifications: when a cache was checked, how, by whom, with what result.

It lies at `.featcache/verified.json` of a cache, on a disk or at a place that others read, and is no part of the
cache: no digest covers it, and whoever can write there can write anything into it. It says what people did, not that
it is true.
"""

from __future__ import annotations

import getpass
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import featcache
from featcache.errors import CacheError
from featcache.share.verify import Report
from featcache.store import files
from featcache.store.layout import STATE, Json, canonical_json
from featcache.store.manifest import Manifest, load_json
from featcache.store.places import LocalLocation, Location, Missing
from featcache.store.root import cache_digest
from featcache.store.writer import cache_lock

NAME = f"{STATE}/verified.json"
MAX_BYTES = 64 << 10
MAX_ENTRIES = 20
_MAX_FEATURES = 64
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
MODES = ("whole", "sample", "since-last")


@dataclass(frozen=True, kw_only=True)
class Verification:
    """One verification.

    at: UTC, '2026-11-21T14:30:00Z'. by: user@host. version: of featcache. digest: of the cache that was checked.
    mode: 'whole', 'sample' (`fraction` of it, drawn with `seed`) or 'since-last'. features: those checked, None for all
    (or for more than are worth naming, with `n_features`).
    """

    at: str
    by: str
    version: str
    digest: str
    mode: str
    n_files: int
    n_bytes: int
    n_problems: int
    fraction: float | None = None
    seed: int | None = None
    features: tuple[str, ...] | None = None

    @property
    def sound(self) -> bool:
        return self.n_problems == 0

    def words(self, manifest: Manifest | None = None) -> str:
        """The verification in a line; with the cache's manifest also whether the cache is still the one checked."""
        found = "sound" if self.sound else f"{self.n_problems} problem{'s' * (self.n_problems != 1)}"
        how = {
            "whole": "every byte",
            "sample": f"{100 * (self.fraction or 0):g} % of the bytes (seed {self.seed})",
            "since-last": "what had changed",
        }[self.mode]
        if self.features is not None:
            how += f" of {', '.join(self.features)}"
        when = self.at.replace("T", " ").replace("Z", " UTC")
        line = f"{found}: {how}, {when}, by {self.by} with featcache {self.version}"
        if manifest is not None and cache_digest(manifest) != self.digest:
            line += "; the cache has changed since"
        return line


def of_report(report: Report, features: Sequence[str] | None) -> Verification | None:
    """The verification that `report` tells of, made now, by whoever runs this; None without a readable manifest."""
    if report.digest is None:
        return None
    mode = "sample" if report.fraction is not None else "since-last" if report.since_last else "whole"
    return Verification(
        at=datetime.now(UTC).strftime(_TIME),
        by=_who(),
        version=featcache.__version__,
        digest=report.digest,
        mode=mode,
        n_files=report.n_files,
        n_bytes=report.n_bytes,
        n_problems=len(report.problems),
        fraction=report.fraction,
        seed=report.seed,
        features=None if features is None else tuple(sorted(set(features)))[:_MAX_FEATURES],
    )


def _who() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = "unknown"
    return f"{user}@{platform.node() or 'unknown'}"[:200]


def dump(entries: Sequence[Verification]) -> bytes:
    """The bytes of a record: the latest entries that fit into `MAX_BYTES`."""
    kept = list(entries)[-MAX_ENTRIES:]
    while True:
        plain = [{**asdict(e), "features": None if e.features is None else list(e.features)} for e in kept]
        data = canonical_json({"format": 1, "verifications": plain})
        if len(data) <= MAX_BYTES or len(kept) == 1:
            return data
        del kept[0]


def parse(data: bytes, where: str) -> list[Verification]:
    """The entries of a record, the latest last; raises `CacheError` for anything but what `dump` writes."""
    damaged = CacheError(
        f"{where} is damaged: it is no record of verifications", remedy="remove it: it is no part of the cache"
    )
    if len(data) > MAX_BYTES:
        raise damaged
    value = load_json(data, where)
    if not isinstance(value, dict) or set(value) != {"format", "verifications"} or value["format"] != 1:
        raise damaged
    found = value["verifications"]
    if not isinstance(found, list) or len(found) > MAX_ENTRIES:
        raise damaged
    return [_entry(item, damaged) for item in found]


def _entry(item: Json, damaged: CacheError) -> Verification:
    names = {f.name for f in fields(Verification)}
    if not isinstance(item, dict) or set(item) != names:
        raise damaged
    features = item["features"]
    fine = (
        all(isinstance(item[key], str) and 0 < len(item[key]) <= 256 for key in ("at", "by", "version", "mode"))
        and isinstance(item["digest"], str)
        and _SHA256.match(item["digest"]) is not None
        and item["mode"] in MODES
        and all(type(item[key]) is int and 0 <= item[key] < 1 << 63 for key in ("n_files", "n_bytes", "n_problems"))
        and (item["fraction"] is None or (type(item["fraction"]) in (int, float) and 0 < item["fraction"] <= 1))
        and (item["seed"] is None or (type(item["seed"]) is int and 0 <= item["seed"] < 1 << 64))
        and (item["mode"] == "sample") == (item["fraction"] is not None)
        and (features is None or (isinstance(features, list) and len(features) <= _MAX_FEATURES))
        and all(isinstance(name, str) and len(name) <= 128 for name in features or ())
    )
    if not fine:
        raise damaged
    try:
        datetime.strptime(item["at"], _TIME)
    except ValueError as error:
        raise damaged from error
    return Verification(**{**item, "features": None if features is None else tuple(features)})


def read(place: Location) -> tuple[list[Verification], str | None]:
    """The record of the cache at a place, the latest last, and the version of that file; empty without one.

    Raises `CacheError` if it is damaged, cannot be had or is reached through a link.
    """
    try:
        data, version = place.read_whole(NAME, MAX_BYTES)
    except Missing:
        return [], None
    return parse(data, f"{place.url}/{NAME}"), version


def added(entries: Sequence[Verification], entry: Verification) -> bytes:
    """The bytes of a record with one more entry."""
    return dump([*entries, entry])


def record(cache: Path, entry: Verification) -> None:
    """Add a verification to the record of a local cache; a damaged record is begun anew.

    Raises `CacheError` where the cache's folder cannot be written.
    """
    files.inside(cache, STATE)
    with cache_lock(cache):
        try:
            entries, _ = read(LocalLocation(cache))
        except CacheError:
            entries = []
        files.atomic_write(files.inside(cache, NAME), [added(entries, entry)])
