"""Small synthetic caches for the store's tests: values are a function of (array, slot) alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from featcache.store import CacheWriter, DatasetSpec, FeatureSpec
from featcache.store.writers import create_writer, open_writer

COUNT, SHARD_SIZE = 50, 16
KEY_BYTES = 16


def dataset(count: int = COUNT, **changes) -> DatasetSpec:
    values = {
        "name": "synthetic",
        "count": count,
        "class_names": ("circle", "square", "star"),
        "fingerprint": hashlib.sha256(b"synthetic").hexdigest(),
        "preprocessing": {"resolution": 64, "crop": "adm", "decode": "pillow"},
        "grid": 4,
    }
    return DatasetSpec(**{**values, **changes})


def moments(**changes) -> FeatureSpec:
    return FeatureSpec(**{"name": "vae/moments", "shape": (8, 4, 4), "codec": "fp16", **changes})


def tokens(name: str = "tiny@5", **changes) -> FeatureSpec:
    provenance = {"encoder": name, "weights": "0" * 64}
    return FeatureSpec(**{"name": name, "shape": (16, 32), "codec": "int8", "provenance": provenance, **changes})


def base_features() -> list[FeatureSpec]:
    return [
        FeatureSpec(name="label", shape=(), codec="raw", dtype="int64"),
        FeatureSpec(name="key", shape=(KEY_BYTES,), codec="raw", dtype="uint8"),
        moments(),
        tokens(),
    ]


def values(
    array: str, dtype: np.dtype, shape: tuple[int, ...], slots: range, skipped: Sequence[int] = ()
) -> np.ndarray:
    """Stored values `[n, *shape]` of some slots: reproducible, all different, zeros (label -1) where
    skipped.
    """
    out = np.zeros((len(slots), *shape), dtype)
    for row, slot in enumerate(slots):
        if array == "label":
            out[row] = -1 if slot in skipped else slot % 3
        elif slot in skipped:
            continue
        elif array == "key":
            out[row] = np.frombuffer(f"img/{slot:06d}.png".ljust(KEY_BYTES, "\0").encode(), np.uint8)
        else:
            seed = int.from_bytes(hashlib.sha256(f"{array}/{slot}".encode()).digest()[:8], "little")
            generator = np.random.Generator(np.random.PCG64(seed))
            out[row] = generator.integers(-100, 100, shape).astype(dtype)
    return out


def write_all(writer: CacheWriter, specs: Sequence[FeatureSpec], skipped: Sequence[int] = ()) -> None:
    """The driver loop of a build: pending shards in order, skips first, then every feature."""
    for shard in writer.pending():
        slots = writer.slots(shard)
        writer.skip(shard, [(slot, f"img/{slot:06d}.png", "truncated") for slot in skipped if slot in slots])
        for spec in specs:
            writer.write_shard(
                spec.name,
                shard,
                {
                    array[len(spec.name) :]: values(array, dtype, shape, slots, skipped)
                    for array, (dtype, shape) in spec.arrays.items()
                },
            )


def build(
    path: Path,
    specs: Sequence[FeatureSpec] | None = None,
    *,
    count: int = COUNT,
    shard_size: int = SHARD_SIZE,
    skipped: Sequence[int] = (),
    **options,
) -> Path:
    specs = base_features() if specs is None else specs
    with create_writer(path, dataset(count), shard_size=shard_size, **options) as writer:
        writer.begin(specs)
        write_all(writer, specs, skipped)
        writer.finish()
    return path


def add(path: Path, specs: Sequence[FeatureSpec], skipped: Sequence[int] = ()) -> None:
    with open_writer(path) as writer:
        writer.begin(specs)
        write_all(writer, specs, skipped)
        writer.finish()


def expected(path_manifest, array: str, skipped: Sequence[int] = ()) -> np.ndarray:
    """All slots of an array as `build` wrote them."""
    dtype, shape = path_manifest.arrays[array]
    return values(array, dtype, shape, range(path_manifest.dataset.count), skipped)


def tree(path: Path) -> dict[str, bytes]:
    """Every file below `path` with its bytes."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def corrupt(path: Path, change: Callable[[bytearray], None]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def tree_digest(path: Path) -> dict[str, str]:
    """The hash of every file below `path` but locks."""
    return {
        str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(path.rglob("*"))
        if f.is_file() and f.name != "lock"
    }
