"""The root document of a cache at any place, and whether it is the expected one."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path

from featcache.errors import CacheError
from featcache.store.layout import ROOT_NAMES
from featcache.store.manifest import MAX_METADATA_BYTES, Manifest
from featcache.store.places import Location, Missing
from featcache.store.root import parse_named_root
from featcache.store.signing import read_signature, require_digest, require_signature


def read_remote_root(place: Location) -> Manifest | None:
    """The manifest of the cache at a place, None if there is none; raises `CacheError` if it is damaged."""
    return versioned_root(place)[0]


def versioned_root(place: Location) -> tuple[Manifest | None, str | None]:
    """The manifest of the cache at a place, and the version of the document that these very bytes are."""
    found = root_document(place)
    if found is None:
        return None, None
    name, data, version = found
    return parse_named_root(data, name, f"{place.url}/{name}"), version


def root_document(place: Location) -> tuple[str, bytes, str | None] | None:
    """The name, bytes and version of the document where a cache's root document would be, None if there is none."""
    for name in ROOT_NAMES.values():
        with contextlib.suppress(Missing):
            return name, *place.read_whole(name, MAX_METADATA_BYTES)
    return None


def required_root(place: Location) -> Manifest:
    """The manifest of the cache at a place; raises `CacheError` if there is none."""
    manifest = read_remote_root(place)
    if manifest is None:
        if place.url.startswith(("http://", "https://")):
            remedy = (
                "give the URL of the folder that holds the cache's zarr.json: web servers do not list what they have"
            )
        else:
            remedy = f"featcache ls {shlex.quote(place.url)} lists what is there"
        raise CacheError(f"there is no cache at {place.url}", remedy=remedy)
    return manifest


def require_authentic(place: Location, manifest: Manifest, expect: str | None, signed_by: Path | None) -> str | None:
    """Raises `CacheError` unless the cache is the expected one, signed by one of the signers. Returns who signed it."""
    require_digest(manifest, expect, place.url)
    if signed_by is None:
        return None
    return require_signature(manifest, read_signature(place), signed_by, place.url)
