"""One shard file: contiguous samples, then zarr's index (offset, length as uint64 each) and the index's crc32c."""

from __future__ import annotations

import struct

import google_crc32c
import numpy as np
from numcodecs import blosc, zstd
from numcodecs.abc import Codec

from featcache.errors import CacheError
from featcache.store.layout import Buffer, index_bytes, inner_codecs

_EMPTY = np.uint64(2**64 - 1)


def encode_shard(samples: np.ndarray, shard_size: int, compressor: str | None) -> list[Buffer]:
    """The buffers whose concatenation is the shard of `samples` `[n, *shape]`, n <= shard_size.

    Uncompressed samples are not copied (on little-endian machines).
    """
    n = len(samples)
    assert 0 < n <= shard_size
    samples = np.ascontiguousarray(samples, dtype=samples.dtype.newbyteorder("<"))
    index = np.full((shard_size, 2), _EMPTY, "<u8")
    body: list[Buffer]
    if compressor is None:
        length = samples.nbytes // n
        index[:n, 0] = np.arange(n, dtype=np.uint64) * np.uint64(length)
        index[:n, 1] = length
        body = [samples]
    else:
        codec = _numcodec(samples.dtype, compressor)
        body = [bytes(codec.encode(samples[i : i + 1])) for i in range(n)]
        lengths = np.array([len(piece) for piece in body], np.uint64)
        index[:n, 0] = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        index[:n, 1] = lengths
    raw = index.tobytes()
    return [*body, raw, struct.pack("<I", google_crc32c.value(raw))]


def parse_index(
    raw: bytes, *, n: int, shard_size: int, file_bytes: int, sample_bytes: int | None, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and lengths `[n]` (int64) of a shard's samples from its index; raises `CacheError` if it is damaged.

    `sample_bytes` is the length that every sample must have, None for compressed ones. `n` samples must be
    present, inside the file and before the index.
    """
    if len(raw) != index_bytes(shard_size):
        raise CacheError(f"{where} is damaged: it is too short to hold its index")
    if struct.unpack("<I", raw[-4:])[0] != google_crc32c.value(raw[:-4]):
        raise CacheError(f"{where} is damaged: its index does not match its checksum")
    index = np.frombuffer(raw[:-4], "<u8").reshape(shard_size, 2)
    body_bytes = np.uint64(file_bytes - len(raw))
    offsets, lengths = index[:n, 0], index[:n, 1]
    # Each bounded by itself first: their sum could wrap around.
    if (
        (offsets > body_bytes).any()
        or (lengths > body_bytes).any()
        or (offsets + lengths > body_bytes).any()
        or (sample_bytes is not None and (lengths != np.uint64(sample_bytes)).any())
        or (index[n:] != _EMPTY).any()
    ):
        raise CacheError(f"{where} is damaged: its index points outside the file or at samples of another size")
    return offsets.astype(np.int64), lengths.astype(np.int64)


def _numcodec(dtype: np.dtype, compressor: str) -> Codec:
    """The numcodecs codec with the settings that the array's metadata states."""
    settings = inner_codecs(dtype, compressor)[1]["configuration"]
    if compressor == "zstd":
        return zstd.Zstd(level=settings["level"], checksum=settings["checksum"])
    shuffle = blosc.Blosc.SHUFFLE if settings["shuffle"] == "shuffle" else blosc.Blosc.NOSHUFFLE
    return blosc.Blosc(
        cname=settings["cname"], clevel=settings["clevel"], shuffle=shuffle, typesize=settings["typesize"]
    )


def decompress(compressor: str, data: bytes, out: np.ndarray, where: str) -> None:
    """Decode one compressed sample into `out` (contiguous); raises `CacheError` unless it fills it exactly.

    The length that the frame claims is checked before anything is allocated.
    """
    try:
        claimed = _claimed_bytes(compressor, data)
        if claimed is not None and claimed != out.nbytes:
            raise ValueError(f"it claims {claimed} bytes, not {out.nbytes}")
        flat = out.reshape(-1).view(np.uint8)
        decoded = zstd.decompress(data, flat) if compressor == "zstd" else blosc.decompress(data, flat)
        if decoded is not flat and np.frombuffer(decoded, np.uint8).nbytes != out.nbytes:
            raise ValueError("it has another length")
    except (ValueError, RuntimeError, TypeError, struct.error) as error:
        raise CacheError(f"{where} is damaged: a compressed sample cannot be decoded ({error})") from error


def _claimed_bytes(compressor: str, data: bytes) -> int | None:
    if compressor == "blosc":
        if len(data) < 16 or struct.unpack_from("<I", data, 12)[0] != len(data):
            raise ValueError("it is cut off")
        return int(struct.unpack_from("<I", data, 4)[0])
    if len(data) < 6 or data[:4] != b"\x28\xb5\x2f\xfd":
        raise ValueError("it is not a zstd frame")
    # RFC 8878, 3.1.1.1: descriptor byte, optional window byte, dictionary id, frame content size.
    descriptor = data[4]
    size_flag, single_segment = descriptor >> 6, descriptor >> 5 & 1
    start = 5 + (not single_segment) + (0, 1, 2, 4)[descriptor & 3]
    length = (1 if single_segment else 0, 2, 4, 8)[size_flag]
    if length == 0:
        raise ValueError("it does not state its length")
    field = data[start : start + length]
    if len(field) < length:
        raise ValueError("it is cut off")
    return int.from_bytes(field, "little") + (256 if length == 2 else 0)
