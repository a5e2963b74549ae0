"""What is stored where: codecs as array shapes, arrays as zarr metadata, shards as file names. No torch, no zarr.

Zarr metadata is a pure function of the manifest, so a reader compares it instead of trusting it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from featcache.errors import UserError

Json = Any  # a value as JSON holds it

SCALE_SUFFIX = ".scale"
INT4_GROUP = 32
CODECS = ("raw", "fp32", "fp16", "bf16", "int8", "fp8", "int4")
COMPRESSORS = ("zstd", "blosc")
FORMATS = ("zarr", "wds")

_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
RAW_DTYPES = ("bool", *_INTEGERS, "float16", "float32", "float64")

ROOT_METADATA = "zarr.json"
WDS_ROOT = "featcache.json"
Buffer = bytes | bytearray | memoryview | np.ndarray  # of what files are written
ROOT_NAMES: Mapping[str, str] = {"zarr": ROOT_METADATA, "wds": WDS_ROOT}
CHECKSUMS = "SHA256SUMS"
BLOCKS = "BLOCKS"
SIGNATURE = "featcache.sig"
STATE = ".featcache"
# Folders in it: journals of pushes, files on their way of a repair from another copy, marks of sound shards.
PUSHES, RESTORED, SOUND = "push", "restored", "sound"


def stored_arrays(
    codec: str, shape: tuple[int, ...], dtype: str = "float32"
) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Suffix -> (numpy dtype, per-sample stored shape) of a feature of per-sample shape `shape`.

    `dtype` matters only for `raw`. bfloat16 and float8 are stored as uint16 and uint8: numpy has neither.

    Raises `UserError` for an unknown codec or a shape that the codec cannot hold.
    """
    if codec == "raw":
        if dtype not in RAW_DTYPES:
            raise UserError(f"raw features cannot have dtype {dtype!r}", remedy=f"use one of {', '.join(RAW_DTYPES)}")
        return {"": (np.dtype(dtype), shape)}
    plain = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}
    if codec in plain:
        return {"": (np.dtype(plain[codec]), shape)}
    if codec not in CODECS:
        raise UserError(f"there is no codec {codec!r}", remedy=f"use one of {', '.join(CODECS)}")
    if not shape:
        raise UserError(f"codec {codec!r} needs a channel axis, but the feature is a scalar", remedy="use fp32 or raw")
    if codec in ("int8", "fp8"):
        values = np.int8 if codec == "int8" else np.uint8
        return {"": (np.dtype(values), shape), SCALE_SUFFIX: (np.dtype(np.float32), shape[:-1])}
    if shape[-1] % INT4_GROUP:
        raise UserError(
            f"int4 quantises groups of {INT4_GROUP} channels, but the feature has {shape[-1]}",
            remedy="use int8",
        )
    return {
        "": (np.dtype(np.uint8), (*shape[:-1], shape[-1] // 2)),
        SCALE_SUFFIX: (np.dtype(np.float16), (*shape[:-1], shape[-1] // INT4_GROUP)),
    }


def canonical_json(value: object) -> bytes:
    """One spelling for every value: sorted keys, one-space indent, ASCII, final newline."""
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")


def n_shards(count: int, shard_size: int) -> int:
    return -(-count // shard_size)


def shard_samples(count: int, shard_size: int, shard: int) -> int:
    """Samples in shard `shard`: `shard_size`, or less in the last one."""
    return min(shard_size, count - shard * shard_size)


def shard_name(shard: int, sample_ndim: int) -> str:
    """File name of a shard in its array's directory: zarr's default chunk key with separator '.'."""
    return ".".join(["c", str(shard), *("0" * sample_ndim)])


def inner_codecs(dtype: np.dtype, compressor: str | None) -> list[dict[str, Json]]:
    endian: dict[str, Json] = {"name": "bytes"}
    if dtype.itemsize > 1:
        endian["configuration"] = {"endian": "little"}
    codecs = [endian]
    if compressor == "zstd":
        codecs.append({"name": "zstd", "configuration": {"level": 3, "checksum": False}})
    elif compressor == "blosc":
        codecs.append(
            {
                "name": "blosc",
                "configuration": {
                    "cname": "zstd",
                    "clevel": 3,
                    "shuffle": "shuffle" if dtype.itemsize > 1 else "noshuffle",
                    "typesize": dtype.itemsize,
                    "blocksize": 0,
                },
            }
        )
    return codecs


def array_metadata(
    *,
    count: int,
    shard_size: int,
    sample_shape: tuple[int, ...],
    dtype: np.dtype,
    compressor: str | None,
    attributes: Mapping[str, Json],
) -> dict[str, Json]:
    """The zarr v3 metadata document of one array `[count, *sample_shape]`, inner chunk = one sample."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [count, *sample_shape],
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_size, *sample_shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": False if dtype.kind == "b" else 0.0 if dtype.kind == "f" else 0,
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [1, *sample_shape],
                    "codecs": inner_codecs(dtype, compressor),
                    "index_codecs": [
                        {"name": "bytes", "configuration": {"endian": "little"}},
                        {"name": "crc32c"},
                    ],
                    "index_location": "end",
                },
            }
        ],
        "attributes": dict(attributes),
        "storage_transformers": [],
    }


def group_metadata(attributes: Mapping[str, Json] | None = None) -> dict[str, Json]:
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes or {})}


def index_bytes(shard_size: int) -> int:
    """Length of a shard's index: offset and length of each inner chunk (uint64 each), then a crc32c."""
    return shard_size * 16 + 4


def sample_bytes(dtype: np.dtype, sample_shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(sample_shape)


def recommended_shard_size(bytes_per_sample: int, *, target_bytes: int = 128 << 20) -> int:
    """Samples per shard so that the largest shard file has about `target_bytes`: a power of two in [16, 4096]."""
    wanted = max(1, target_bytes // max(1, bytes_per_sample))
    return min(4096, max(16, 1 << (wanted.bit_length() - 1)))
