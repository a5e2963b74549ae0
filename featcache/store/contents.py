"""Which files a cache has, by its manifest: shards, metadata, checksum files; and reading the latter at any place."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from featcache.errors import CacheError
from featcache.store import files, wds
from featcache.store.blocks import ShardBlocks, blocks_limit, blocks_path, parse_blocks
from featcache.store.layout import (
    CHECKSUMS,
    ROOT_METADATA,
    ROOT_NAMES,
    SCALE_SUFFIX,
    canonical_json,
    index_bytes,
    sample_bytes,
    shard_name,
    shard_samples,
)
from featcache.store.manifest import Manifest
from featcache.store.places import LocalLocation, Location, read_small
from featcache.store.root import node_metadata, root_bytes

_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True)
class ShardFileEntry:
    """One shard file of a cache as the manifest knows it. `features` are those that it holds (wds: all)."""

    name: str
    features: tuple[str, ...]
    array: str
    shard: int
    n_bytes: int | None  # None where compressed


def shard_files(manifest: Manifest, features: Iterable[str] | None = None) -> Iterator[ShardFileEntry]:
    """Every shard file of the cache (or of some features), by name relative to the cache, one by one."""
    if not manifest.features:
        return
    for array in arrays_with_files(manifest, features):
        yield from array_files(manifest, array)


def arrays_with_files(manifest: Manifest, features: Iterable[str] | None = None) -> list[str]:
    """The arrays whose shard files are separate: in a cache of tars one stands for all."""
    if manifest.format == "wds":
        return sorted(manifest.arrays)[:1]
    wanted = manifest.features if features is None else set(features)
    return [array for feature in sorted(wanted) for array in manifest.features[feature].arrays]


def array_files(manifest: Manifest, array: str, shards: Iterable[int] | None = None) -> Iterator[ShardFileEntry]:
    """The shard files of one array, or some of them."""
    count, size = manifest.dataset.count, manifest.shard_size
    numbers = range(manifest.n_shards) if shards is None else shards
    if manifest.format == "wds":
        layout, every = wds.tar_layout(manifest), tuple(sorted(manifest.features))
        for shard in numbers:
            yield ShardFileEntry(
                wds.tar_name(shard), every, array, shard, layout.tar_bytes(shard_samples(count, size, shard))
            )
        return
    dtype, shape = manifest.arrays[array]
    feature = array.removesuffix(SCALE_SUFFIX)
    length = sample_bytes(dtype, shape)
    for shard in numbers:
        whole = shard_samples(count, size, shard) * length + index_bytes(size)
        n_bytes = whole if manifest.compressor is None else None
        yield ShardFileEntry(f"{array}/{shard_name(shard, len(shape))}", (feature,), array, shard, n_bytes)


def metadata_files(manifest: Manifest) -> dict[str, bytes]:
    """Name -> exact content of every file that follows from the manifest alone, the root document last."""
    nodes = node_metadata(manifest) if manifest.format == "zarr" else {}
    found = {f"{node}/{ROOT_METADATA}": canonical_json(content) for node, content in nodes.items()}
    found[ROOT_NAMES[manifest.format]] = root_bytes(manifest)
    return found


def most_bytes(manifest: Manifest, entry: ShardFileEntry) -> int:
    """The longest that a shard file can be: zstd and blosc hardly lengthen what they cannot shorten."""
    if entry.n_bytes is not None:
        return entry.n_bytes
    length = sample_bytes(*manifest.arrays[entry.array])
    n = shard_samples(manifest.dataset.count, manifest.shard_size, entry.shard)
    return n * (length + length // 64 + 1024) + index_bytes(manifest.shard_size)


# Checksum files


def shard_names(manifest: Manifest, array: str) -> list[str]:
    """Names of the files that hold an array's shards, relative to where its `SHA256SUMS` is."""
    if manifest.format == "wds":
        return [wds.tar_name(shard) for shard in range(manifest.n_shards)]
    ndim = len(manifest.arrays[array][1])
    return [shard_name(shard, ndim) for shard in range(manifest.n_shards)]


def checksums_path(manifest: Manifest, array: str) -> str:
    """Where the `SHA256SUMS` file of an array is, relative to the cache."""
    return CHECKSUMS if manifest.format == "wds" else f"{array}/{CHECKSUMS}"


def checksums_limit(manifest: Manifest) -> int:
    """The most bytes that a `SHA256SUMS` file may have."""
    return manifest.n_shards * 160


def checksums_text(digests: Sequence[str], names: Sequence[str]) -> bytes:
    """A `SHA256SUMS` file, as `sha256sum --check` reads it in its own directory."""
    return "".join(f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True)).encode("ascii")


def parse_checksums(data: bytes, names: Sequence[str], where: str) -> list[str]:
    """The shards' SHA-256 from a `SHA256SUMS` file; raises `CacheError` unless it is exactly as written."""
    digests = [line[:64] for line in data.decode("ascii", "replace").splitlines()]
    whole = len(digests) == len(names) and all(map(_SHA256.match, digests))
    if not whole or checksums_text(digests, names) != data:
        raise CacheError(f"{where} is damaged: it does not list {len(names)} shards and their SHA-256")
    return digests


def read_checksums(place: Location, manifest: Manifest, array: str) -> list[str]:
    """The SHA-256 of an array's shards, from a place; raises `CacheError` unless the manifest names that file."""
    name = checksums_path(manifest, array)
    data = read_small(place, name, checksums_limit(manifest))
    if hashlib.sha256(data).hexdigest() != manifest.checksums[array]:
        raise CacheError(f"{place.url}/{name} is damaged: it is not the file that the manifest names")
    return parse_checksums(data, shard_names(manifest, array), f"{place.url}/{name}")


def sound_file(path: Path, entry: ShardFileEntry, sha256: str) -> tuple[Path, int]:
    """A shard's file in the cache at `path`, and its length; raises `CacheError` if its bytes are not the recorded ones."""
    file = files.inside(path, entry.name)
    if files.sha256_of(file) != sha256:
        raise CacheError(
            f"{file} is damaged: its bytes do not match the recorded SHA-256; it was not copied",
            remedy=f"featcache repair {shlex.quote(str(path))} mends it",
        )
    return file, file.stat().st_size


def shard_checker(path: Path, manifest: Manifest, names: Iterable[str]) -> Callable[[range], None]:
    """A function that raises `CacheError` unless the shards of some features in which a range of slots lies are what
    was recorded. Ranges must come in rising order: each shard is read once.
    """
    place = LocalLocation(path)
    recorded = {array: read_checksums(place, manifest, array) for array in arrays_with_files(manifest, names)}
    size, next_shard = manifest.shard_size, 0

    def check(slots: range) -> None:
        nonlocal next_shard
        shards = range(max(next_shard, slots.start // size), (slots.stop - 1) // size + 1)
        for array, digests in recorded.items():
            for entry in array_files(manifest, array, shards):
                sound_file(path, entry, digests[entry.shard])
        next_shard = max(next_shard, shards.stop)

    return check


def read_blocks(place: Location, manifest: Manifest, array: str) -> list[ShardBlocks] | None:
    """The hashes of an array's blocks, from a place; None where the manifest names none."""
    if array not in manifest.blocks:
        return None
    name = blocks_path(manifest, array)
    data = read_small(place, name, blocks_limit(manifest, array))
    return parse_blocks(data, manifest, array, f"{place.url}/{name}")


def checksum_files(manifest: Manifest, array: str) -> list[tuple[str, str, int]]:
    """(name, SHA-256, the most bytes) of the checksum files of one array, relative to the cache."""
    found = [(checksums_path(manifest, array), manifest.checksums[array], checksums_limit(manifest))]
    if array in manifest.blocks:
        found.append((blocks_path(manifest, array), manifest.blocks[array], blocks_limit(manifest, array)))
    return found


def _recorded(path: Path, manifest: Manifest, array: str) -> tuple[list[str] | None, list[ShardBlocks] | None]:
    """The SHA-256 of an array's shards and the hashes of their blocks, as far as the files that say so are sound."""
    place, checksums, blocks = LocalLocation(path), None, None
    with contextlib.suppress(CacheError):
        checksums = read_checksums(place, manifest, array)
    with contextlib.suppress(CacheError):
        blocks = read_blocks(place, manifest, array)
    return checksums, blocks


def require_recorded(path: Path, manifest: Manifest, array: str, found: Mapping[int, files.Hashes]) -> None:
    """Raise `CacheError` for a shard (number -> hashes) whose bytes are not the recorded ones, where anything says them."""
    checksums, blocks = _recorded(path, manifest, array)
    for shard, hashes in sorted(found.items()):
        other = checksums is not None and hashes.sha256 != checksums[shard]
        if other or (blocks is not None and hashes.blocks != blocks[shard]):
            raise CacheError(
                f"shard {shard} of {array!r} came out otherwise than it was recorded: these are not the images that {path} "
                "was built from",
                remedy="pass the original --data; or mend it from another copy: "
                f"featcache repair {shlex.quote(str(path))} --from URL",
            )


def vouched_for(path: Path, manifest: Manifest, array: str, shards: Collection[int]) -> dict[int, files.Hashes]:
    """Hashes of some shards of an array, of those bytes that the manifest stands for.

    Raises `CacheError` for a shard that has other bytes, and if nothing is left to tell by.
    """
    checksums, blocks = _recorded(path, manifest, array)
    names, found = shard_names(manifest, array), {}
    for shard in sorted(shards):
        if checksums is not None and (blocks is not None or array not in manifest.blocks):
            of_shard = blocks[shard] if blocks is not None else ShardBlocks(0, b"")
            found[shard] = files.Hashes(checksums[shard], of_shard)
            continue
        name = str(Path(checksums_path(manifest, array)).with_name(names[shard]))
        hashes = files.hashes_of(files.inside(path, name))
        by_sum = checksums is not None and hashes.sha256 == checksums[shard]
        by_blocks = checksums is None and blocks is not None and hashes.blocks == blocks[shard]
        if not (by_sum or by_blocks):
            raise CacheError(
                f"{path / name} cannot be told sound from damaged: the checksums of {array!r} are lost",
                remedy=f"encode all its shards again: featcache verify {shlex.quote(str(path))} --repair",
            )
        found[shard] = hashes
    return found
