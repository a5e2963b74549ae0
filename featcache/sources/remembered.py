"""Where the images of a cache lie, as this user's builds saw it: for pictures, later. A cache itself does not say.

One small file a data set, `images/<fingerprint>` in `$FEATCACHE_PLACES`, else `$XDG_CACHE_HOME/featcache`, which nobody
else is given. What is found there is a guess: whoever uses it checks the images' fingerprint.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from featcache.errors import UserError
from featcache.paths import user_cache
from featcache.redact import redact
from featcache.sources.embedded import is_embedded
from featcache.store import files
from featcache.store.remote import is_remote

_MAX_BYTES = 1 << 16


def remember(fingerprint: str, data: str) -> None:
    """Notes what was typed as `--data` for the images of a fingerprint; not where a URL has secrets in it, nor where the
    note cannot be written."""
    place = data if is_remote(data) else str(Path(data).absolute())  # also of a pattern
    if redact(place) != place or is_embedded(data):
        return
    with contextlib.suppress(UserError, OSError):
        note = _note(fingerprint)
        files.make_directory(note.parent)
        files.atomic_write(note, [os.fsencode(place)], durable=False)


def recall(fingerprint: str) -> str | None:
    """Where those images lay when a cache of them was built; None if nobody knows."""
    try:
        return os.fsdecode(files.read_bounded(_note(fingerprint), _MAX_BYTES))
    except (UserError, OSError):
        return None


def _note(fingerprint: str) -> Path:
    """Raises `UserError` where there is no home, or for what is no fingerprint."""
    if not (fingerprint.isalnum() and len(fingerprint) <= 64):
        raise UserError(f"{fingerprint!r:.80} is no fingerprint")
    chosen = os.environ.get("FEATCACHE_PLACES")
    return (Path(chosen) if chosen else user_cache("FEATCACHE_PLACES")) / "images" / fingerprint
