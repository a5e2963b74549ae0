"""What an export says of itself beside the files of its layout: the keys, classes and VAE for which those have no place.

Two files that the other trainers pass over: `featcache-export.json`, what was exported and how, and
`featcache-keys.json`, the keys of the samples in the order of the layout. An export that goes on knows its own by the
first one, and `featcache import` takes from both what it would have to guess otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from featcache.errors import CacheError, UserError
from featcache.keys import from_printable, key_bytes, printable
from featcache.store.layout import Json
from featcache.store.manifest import DatasetSpec, load_json

MARKER, KEYS = "featcache-export.json", "featcache-keys.json"
VERSION = 1
MAX_MARKER_BYTES = 64 << 20
MAX_KEYS_BYTES = 1 << 30
_MAX_KEY_BYTES = 4096
_REMEDY = f"Bring the export again, as a whole, or remove {MARKER} and {KEYS}: what they say is guessed then."


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export says of the cache that it was made of. `vae`, `class_names`: as in a `DatasetSpec`."""

    name: str
    fingerprint: str
    class_names: tuple[str, ...]
    vae: dict[str, Json]
    keys: tuple[str, ...]


def keys_json(keys: Sequence[str]) -> bytes:
    """The content of the file of keys."""
    return (json.dumps([printable(key) for key in keys], ensure_ascii=False, indent=0) + "\n").encode()


def read_exported(read: Callable[[str, int], bytes], where: Path, layout: str, count: int) -> Exported:
    """What an export of `count` samples in `layout` at `where` says; `read` gives a file's bytes, by name and limit.

    Raises `UserError` for files that say something else, or nothing that makes sense.
    """
    try:
        said = load_json(read(MARKER, MAX_MARKER_BYTES), MARKER)
        keys = load_json(read(KEYS, MAX_KEYS_BYTES), KEYS)
        return _parsed(said, keys, layout, count)
    except CacheError as error:
        raise UserError(f"{where}: {error.what}", remedy=_REMEDY) from error
    except UserError as error:
        raise UserError(error.what, remedy=_REMEDY) from error


def _parsed(said: Json, keys: Json, layout: str, count: int) -> Exported:
    if not isinstance(said, dict) or said.get("featcache_export") != VERSION or said.get("layout") != layout:
        raise CacheError(f"{MARKER} is not of an export to {layout} by this version of featcache")
    if not isinstance(keys, list) or len(keys) != count or not all(isinstance(key, str) for key in keys):
        raise CacheError(f"{KEYS} does not list the keys of the {count} samples that are there")
    found = tuple(from_printable(key) for key in keys)
    try:
        too_long = next((key for key in found if not 0 < len(key_bytes(key)) <= _MAX_KEY_BYTES or "\0" in key), None)
    except UnicodeEncodeError:
        raise CacheError(f"{KEYS} holds text that is not Unicode") from None
    if too_long is not None:
        raise CacheError(f"{KEYS} holds a key that no file name is: {too_long!r:.80}")
    cache = said.get("cache")
    if (
        not isinstance(cache, dict)
        or not isinstance(said.get("vae"), dict)
        or not isinstance(said.get("classes"), list)
    ):
        raise CacheError(f"{MARKER} does not say what was exported")
    spec = DatasetSpec(  # checks them
        name=cache.get("name"),  # type: ignore[arg-type]
        count=count,
        class_names=tuple(said["classes"]),
        fingerprint=cache.get("fingerprint"),  # type: ignore[arg-type]
        vae=said["vae"],
    )
    return Exported(
        name=spec.name,
        fingerprint=spec.fingerprint,
        class_names=spec.class_names,
        vae=dict(spec.vae or {}),
        keys=found,
    )
