"""The root `zarr.json`: manifest, consolidated metadata and their checksum in one file. Written last, read first."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from featcache.errors import CacheError
from featcache.paths import typed
from featcache.store import files
from featcache.store.layout import ROOT_NAMES, STATE, Json, array_metadata, canonical_json, group_metadata
from featcache.store.manifest import (
    MAX_METADATA_BYTES,
    Manifest,
    load_json,
    manifest_from_json,
)

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9]+:/")  # a path has made one slash of two
_MANIFEST, _CHECKSUM = "featcache", "featcache_sha256"
DAMAGED_REMEDY = (
    "nothing else says what it said: copy that file from another copy of the same cache, or remove the cache "
    "(featcache rm) and pull or build it again"
)


class NotACache(CacheError):
    """A document that has nothing to do with caches, such as that of a zarr array."""


def node_metadata(manifest: Manifest) -> dict[str, dict[str, Json]]:
    """Node path -> zarr metadata document of every array and every group but the root."""
    nodes: dict[str, dict[str, Json]] = {}
    for name, spec in manifest.features.items():
        if "/" in name:
            nodes[name.split("/")[0]] = group_metadata()
        for array, (dtype, shape) in spec.arrays.items():
            nodes[array] = array_metadata(
                count=manifest.dataset.count,
                shard_size=manifest.shard_size,
                sample_shape=shape,
                dtype=dtype,
                compressor=manifest.compressor,
                attributes={"feature": name, "codec": spec.codec},
            )
    return dict(sorted(nodes.items()))


def root_bytes(manifest: Manifest) -> bytes:
    """The root document of a manifest: always the same bytes for the same manifest."""
    content: dict[str, Json] = {"attributes": {_MANIFEST: manifest.to_json()}}
    if manifest.format == "zarr":
        content |= {
            "consolidated_metadata": {
                "kind": "inline",
                "must_understand": False,
                "metadata": node_metadata(manifest),
            },
            "node_type": "group",
            "zarr_format": 3,
        }
    content["attributes"][_CHECKSUM] = hashlib.sha256(canonical_json(content)).hexdigest()
    return canonical_json(content)


def cache_digest(manifest: Manifest) -> str:
    """The SHA-256 (hex) that names a cache: of its root document, which covers the manifest, the arrays' metadata
    and, through the checksum files, every byte of every shard.
    """
    return hashlib.sha256(root_bytes(manifest)).hexdigest()


def parse_root(data: bytes, where: str) -> Manifest:
    """The manifest of a root document; raises `CacheError` for anything but what `root_bytes` writes.

    The check is by content, not spelling, so that a file passed through another JSON writer still opens.
    """
    try:
        document = load_json(data, where)
    except CacheError as error:
        raise CacheError(error.what, remedy=DAMAGED_REMEDY) from error
    attributes = document.get("attributes") if isinstance(document, dict) else None
    if not isinstance(attributes, dict) or _MANIFEST not in attributes:
        raise NotACache(
            f"{where} is not a featcache cache: it has no attribute {_MANIFEST!r}",
            remedy="featcache ls DIR lists the caches below a folder",
        )
    try:
        manifest = manifest_from_json(attributes[_MANIFEST])
    except CacheError as error:
        raise CacheError(f"{where}: {error.what}", remedy=error.remedy or DAMAGED_REMEDY) from error
    if canonical_json(document) != root_bytes(manifest):
        raise CacheError(
            f"{where} is damaged: its checksum or the arrays' metadata do not agree with its manifest",
            remedy=DAMAGED_REMEDY,
        )
    return manifest


def parse_named_root(data: bytes, name: str, where: str) -> Manifest:
    """As `parse_root`, of the file of that name, which says the format."""
    manifest = parse_root(data, where)
    if ROOT_NAMES[manifest.format] != name:
        raise CacheError(f"{where} is damaged: it describes a cache of format {manifest.format!r}")
    return manifest


def find_root(path: Path) -> Path | None:
    """The root document of the cache in directory `path`, if there is one."""
    for name in ROOT_NAMES.values():
        if (path / name).is_file():
            return path / name
    return None


def _holds_caches(path: Path) -> bool:
    try:
        return any(find_root(child) is not None for child in path.iterdir())
    except OSError:
        return False


def read_root(path: Path) -> Manifest:
    """The manifest of the cache in directory `path`; raises `CacheError` if there is none."""
    root = find_root(path)
    if root is None:
        if _URL.match(str(path)):
            raise CacheError(
                f"{path} is a URL, and this needs a folder on this machine",
                remedy="featcache pull URL FOLDER copies a cache",
            )
        if (path / STATE).is_dir():
            raise CacheError(
                f"{path} holds an unfinished build or pull and nothing complete yet",
                remedy="run the command that began it again (featcache build or featcache pull): it goes on where it stopped",
            )
        if _holds_caches(path):
            raise CacheError(
                f"{path} is no cache, but a folder of caches", remedy=f"featcache ls {typed(path)} lists them: name one"
            )
        raise CacheError(
            f"there is no cache at {path}",
            remedy=f"featcache build --out {typed(path)} makes one; featcache ls DIR lists them",
        )
    return parse_named_root(files.read_bounded(root, MAX_METADATA_BYTES), root.name, str(root))
