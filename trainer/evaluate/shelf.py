"""Where statistics of references are kept, so that a data set passes through the network once and not at each judgement.

One npz a key in `$FEATCACHE_REFERENCES`, else `$XDG_CACHE_HOME/featcache/references`, which may be removed at any time.
The key holds all that the bits depend on (`trainer.evaluate.references.images_key`), so that what is taken from here
equals what would be computed. Runs and processes share it: the first computes, others wait for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from featcache.errors import UserError
from featcache.paths import user_cache
from featcache.progress import Progress
from featcache.store import files
from featcache.store import locks as file_locks
from trainer.evaluate.references import Statistics, load_statistics, save_statistics

VARIABLE = "FEATCACHE_REFERENCES"
_RECORD = "kept"  # of the provenance, beside what the statistics say themselves


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """A folder of statistics by key."""

    folder: Path

    @classmethod
    def of_user(cls, progress: Progress) -> Shelf | None:
        """The user's; None, with a note, where there is no place for one."""
        chosen = os.environ.get(VARIABLE)
        try:
            return cls(folder=Path(chosen) if chosen else user_cache(VARIABLE) / "references")
        except UserError as error:
            progress.note(f"the reference's statistics are not kept: {error.what}")
            return None

    def path(self, key: Mapping[str, Any]) -> Path:
        return self.folder / f"{hashlib.sha256(_text(key).encode()).hexdigest()[:40]}.npz"

    def get(self, key: Mapping[str, Any], compute: Callable[[], Statistics], progress: Progress) -> Statistics:
        """What is kept under `key`, else what `compute` gives, which is then kept.

        What is damaged, or of another key, is computed again; where nothing can be kept, a note says why.

        Raises:
            UserError: as `compute`.
        """
        path = self.path(key)
        found = _load(path, key, progress)
        if found is not None:
            return found
        with self._alone(path, progress) as kept:
            found = _load(path, key, progress) if kept else None  # whoever was waited for may have put it there
            if found is not None:
                return found
            statistics = compute()
            if kept:
                _store(path, key, statistics, progress)
            return statistics

    @contextlib.contextmanager
    def _alone(self, path: Path, progress: Progress) -> Iterator[bool]:
        """Holds a key while its statistics are computed; gives whether there is a place to keep them."""
        name = self.folder / f".{path.stem}.computing"
        lock = None
        try:
            files.make_directory(self.folder)
            lock = file_locks.try_lock(name)
            if lock is None:
                progress.note("another evaluation computes the statistics of this reference now: waiting for them")
                lock = file_locks.lock(name)
        except (UserError, OSError) as error:
            progress.note(f"the reference's statistics are not kept: {error}")
        try:
            yield lock is not None
        finally:
            if lock is not None:
                with contextlib.suppress(UserError, OSError):
                    lock.release(remove=True)


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _digest(statistics: Statistics) -> str:
    """SHA-256 of all numbers that are kept."""
    digest = hashlib.sha256()
    features = None if statistics.features is None else statistics.features.numpy()
    arrays = (
        *(statistics.mean, statistics.covariance),
        *(statistics.spatial_mean, statistics.spatial_covariance),
        features,
    )
    for array in arrays:
        digest.update(b"none" if array is None else f"{array.shape} {array.dtype.str}".encode())
        if array is not None:
            digest.update(array.tobytes())
    return digest.hexdigest()


def _load(path: Path, key: Mapping[str, Any], progress: Progress) -> Statistics | None:
    """What is kept in `path`, if it is whole and of that key."""
    if not path.is_file():  # a pipe, too, which nobody waits for
        return None
    try:
        statistics = load_statistics(path)
        provenance = dict(statistics.provenance)
        record = provenance.pop(_RECORD, None)
        if not isinstance(record, dict) or _text(record.get("key") or {}) != _text(key):
            raise UserError(f"{path} holds the statistics of another reference")
        if record.get("sha256") != _digest(statistics):
            raise UserError(f"{path} is damaged: its checksum differs")
    except (UserError, OSError) as error:
        progress.note(f"{error}: computing it again")
        return None
    progress.note(f"reference statistics from {path} (computed on {record.get('computed')!s:.10})")
    return replace(statistics, provenance=provenance)


def _store(path: Path, key: Mapping[str, Any], statistics: Statistics, progress: Progress) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    record = {"key": dict(key), "computed": now, "sha256": _digest(statistics)}
    try:
        save_statistics(path, replace(statistics, provenance={**statistics.provenance, _RECORD: record}))
        progress.note(f"reference statistics kept in {path}")
    except (UserError, OSError) as error:
        progress.note(f"the reference's statistics are not kept: {error}")
