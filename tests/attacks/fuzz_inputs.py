"""Malformed inputs by the thousand: mutations of valid files, each of which must be read or refused as a `UserError`.

`run(kind, count, seed, folder)` is all there is to call. Case ``n`` of a kind depends on (kind, seed, n) alone, so a failure
that names them can be had again.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import random
import re
import shutil
import signal
import struct
import tarfile
import threading
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from featcache.errors import UserError
from featcache.share.importers import open_latents
from featcache.sources.base import Source, fingerprint
from featcache.sources.captions import open_captions, read_table
from featcache.sources.decoders import decode_pil, decode_turbo
from featcache.sources.open import open_source

TIME_LIMIT_S = 20
MEMORY_LIMIT_BYTES = 1_000_000_000

Mutation = Callable[[random.Random, bytearray], bytes | bytearray]


class Hang(BaseException):
    """A case ran longer than it may. No `Exception`: what is tested translates those."""


# Valid files


def _picture(kind: str, seed: int = 0, size: tuple[int, int] = (17, 13), mode: str = "RGB", **options: object) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def _jpegs() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        _picture("JPEG", exif=exif, icc_profile=bytes(300)),
        _picture("JPEG", mode="L"),
        _picture("JPEG", mode="CMYK"),
        _picture("JPEG", size=(70, 50), progressive=True),
    ]


def _pngs() -> list[bytes]:
    deep = io.BytesIO()
    Image.fromarray(np.arange(221, dtype=np.uint16).reshape(13, 17) * 290).save(deep, "PNG")
    frames = [Image.new("RGB", (9, 9), (i * 80, 0, 0)) for i in range(3)]
    animated = io.BytesIO()
    frames[0].save(animated, "PNG", save_all=True, append_images=frames[1:])
    return [
        *(_picture("PNG", mode=mode) for mode in ("RGB", "RGBA", "LA", "P", "1")),
        deep.getvalue(),
        animated.getvalue(),
    ]


def _webps() -> list[bytes]:
    frames = [Image.new("RGB", (9, 9), (i * 80, 0, 0)) for i in range(3)]
    animated = io.BytesIO()
    frames[0].save(animated, "WEBP", save_all=True, append_images=frames[1:])
    return [
        _picture("WEBP"),
        _picture("WEBP", lossless=True),
        _picture("WEBP", mode="RGBA", exif=bytes(40), icc_profile=bytes(60)),
        animated.getvalue(),
    ]


def tar_of(files: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of these files, with its end mark and without padding to records."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        end = tar.offset
    return buffer.getvalue()[: end + 1024]


def _tars() -> list[bytes]:
    images = {f"train/n0{i % 2}/{'long_' * 25 * (i == 2)}{i}.png": _picture("PNG", i, (5, 4)) for i in range(4)}
    classes = {f"n0{i}.tar": tar_of({f"{i}_{j}.jpg": _picture("JPEG", j, (5, 4)) for j in range(2)}) for i in range(2)}
    return [
        tar_of(images),
        tar_of(images, tarfile.PAX_FORMAT),
        tar_of(classes),
        tar_of({n.replace("long_" * 20, ""): d for n, d in images.items()}, tarfile.USTAR_FORMAT),
    ]


def _webdatasets() -> list[bytes]:
    files: dict[str, bytes] = {}
    for i in range(3):
        files |= {
            f"{i}.jpg": _picture("JPEG", i, (5, 4)),
            f"{i}.cls": str(i).encode(),
            f"{i}.txt": b"a caption\nanother",
            f"{i}.json": json.dumps({"label": i, "caption": ["x", "y"]}).encode(),
        }
    only_json = {name: data for name, data in files.items() if not name.endswith(".cls")}
    return [tar_of(files), tar_of(only_json), tar_of(files, tarfile.PAX_FORMAT)]


def _zips() -> list[bytes]:
    found = []
    for method, comment in ((zipfile.ZIP_STORED, b""), (zipfile.ZIP_DEFLATED, b"a comment")):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            archive.comment = comment
            for i in range(4):
                archive.writestr(f"train/n0{i % 2}/{i}é.png", _picture("PNG", i, (5, 4)))
        found.append(buffer.getvalue())
    return found


def _parquets() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [_picture("PNG", i, (5, 4)) for i in range(6)]
    names = json.dumps({"info": {"features": {"label": {"names": ["a", "b", "c"]}}}})
    structures = pa.table({"image": [{"bytes": data, "path": ""} for data in images], "label": [0, 1, 2, 0, 1, 2]})
    found = []
    for table, options in (
        (structures.replace_schema_metadata({"huggingface": names}), {"compression": "snappy"}),
        (structures, {"compression": "zstd", "use_dictionary": False}),
        (pa.table({"jpg": images, "cls": pa.array([1] * 6, pa.uint8())}), {"compression": "none"}),
    ):
        buffer = io.BytesIO()
        pq.write_table(table, buffer, row_group_size=3, **options)
        found.append(buffer.getvalue())
    return found


def _tables() -> list[bytes]:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["key", "caption", "other"])
    for i in range(12):
        writer.writerow([f"shapes/0/{i:08d}", f'a "quoted", caption {i}', "über\nzwei Zeilen"])
    text = buffer.getvalue()
    return [text.encode(), text.encode("utf-8-sig"), text.encode("utf-16"), text.encode("latin-1")]


def _npys() -> list[bytes]:
    found = []
    for dtype in (np.float32, np.float64, np.float16):
        buffer = io.BytesIO()
        np.save(buffer, np.asfortranarray(np.ones((8, 2, 2), dtype)))
        found.append(buffer.getvalue())
    return found


def _npzs() -> list[bytes]:
    found = []
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        save(buffer, np.zeros((5, 4, 4, 3), np.uint8), np.arange(5))
        found.append(buffer.getvalue())
    return found


def _safetensors() -> list[bytes]:
    import torch
    from safetensors.torch import save

    values = torch.arange(48.0).reshape(3, 4, 2, 2)
    tensors = {"latents": values, "latents_flip": values.flip(3).contiguous(), "labels": torch.arange(3)}
    half = {name: tensor.bfloat16() if name != "labels" else tensor.int() for name, tensor in tensors.items()}
    return [save(tensors), save(half, {"a": "b"})]


# Mutations that need to know nothing of the format

_NUMBERS = (
    0,
    1,
    2,
    127,
    128,
    255,
    256,
    0x7FFF,
    0x8000,
    0xFFFF,
    1 << 24,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 62,
)


def _flip_bits(rng: random.Random, data: bytearray) -> bytearray:
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _cut(rng: random.Random, data: bytearray) -> bytearray:
    return data[: rng.randrange(len(data))]


def _remove(rng: random.Random, data: bytearray) -> bytearray:
    start = rng.randrange(len(data))
    del data[start : start + rng.choice((1, 4, 16, 512, len(data) // 4 + 1))]
    return data


def _double(rng: random.Random, data: bytearray) -> bytearray:
    start = rng.randrange(len(data))
    piece = data[start : start + rng.choice((1, 8, 64, 512, len(data) // 4 + 1))]
    at = rng.randrange(len(data))
    data[at:at] = piece * rng.choice((1, 1, 3, 50))
    return data


def _overwrite(rng: random.Random, data: bytearray) -> bytearray:
    start, size = rng.randrange(len(data)), rng.choice((1, 4, 32, 512))
    data[start : start + size] = rng.randbytes(size)
    return data


def _number(rng: random.Random, data: bytearray) -> bytearray:
    size = rng.choice((1, 2, 4, 8))
    value = (rng.choice(_NUMBERS) + rng.choice((-1, 0, 1))) % (1 << 8 * size)
    at = rng.randrange(max(1, len(data) - size))
    data[at : at + size] = value.to_bytes(size, rng.choice(("little", "big")))
    return data


def _append(rng: random.Random, data: bytearray) -> bytearray:
    return data + rng.choice((bytes(rng.randrange(2000)), rng.randbytes(rng.randrange(1, 300)), data))


GENERIC: tuple[Mutation, ...] = (_flip_bits, _flip_bits, _cut, _remove, _double, _overwrite, _number, _append)

# Mutations of a format's own fields, so that what is behind a checksum or a magic number is reached

_TEXTS = (
    "../../x.jpg",
    "/etc/x.jpg",
    "a\nb.jpg",
    "\x1b[31m.jpg",
    "[red]x[/red].png",
    "x" * 255 + ".jpg",
    ".",
    "",
    "n0/é.png",
)
_TAR_FIELDS = ((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (329, 8), (345, 155))


def _tar_header(rng: random.Random, data: bytearray) -> bytearray:
    """One or two fields of a header, whose checksum is then made right."""
    headers = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    if not headers:
        return _number(rng, data)
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.choice(headers)
        start, size = rng.choice(_TAR_FIELDS)
        field = rng.choice(
            (
                rng.randbytes(size),
                bytes(size),
                b"%0*o" % (size - 1, rng.choice(_NUMBERS) % 8 ** max(1, size - 1)),
                b"\xff" * size,  # a negative number
                b"\x80" + rng.randbytes(size - 1),
                rng.choice(b"0123456789LKxgSVDM").to_bytes(),
                rng.choice(_TEXTS).encode(),
                b"caf\xe9.jpg",
            )
        )
        data[at + start : at + start + size] = field[:size].ljust(size, b"\0")
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return data


def _pax_record(rng: random.Random, data: bytearray) -> bytearray:
    """An extended header in front, with one or more records."""
    records = b""
    for _ in range(rng.choice((1, 1, 3))):
        name = rng.choice(
            ("path", "size", "linkpath", "GNU.sparse.size", "GNU.sparse.map", "hdrcharset", "mtime", "uid")
        )
        value = rng.choice((*_TEXTS, "-512", "99999999999999999999", "1e999", "nan", "0,1,2", "BINARY", "a\0b.jpg"))
        record = f" {name}={value}\n".encode()
        length = len(record) + len(str(len(record) + 2))
        records += rng.choice((b"%d" % length, b"%d" % length, b"0", b"999999", b"-5", b"x")) + record
    member = tarfile.TarInfo("extended")
    member.type, member.size = rng.choice((b"x", b"g", b"L", b"K")), len(records)
    block = member.tobuf(tarfile.USTAR_FORMAT) + records.ljust(-(-len(records) // 512) * 512, b"\0")
    return bytearray(block) * rng.choice((1, 1, 2, 400)) + data


def _zip_field(rng: random.Random, data: bytearray) -> bytearray:
    """A field of a local header, a directory entry or the end record."""
    fields = {b"PK\3\4": (4, 30), b"PK\1\2": (4, 46), b"PK\5\6": (4, 22)}
    places = [(m.start(), fields[m[0]]) for m in re.finditer(rb"PK(?:\x03\x04|\x01\x02|\x05\x06)", bytes(data))]
    if not places:
        return _number(rng, data)
    for _ in range(rng.choice((1, 1, 3))):
        at, (first, last) = rng.choice(places)
        size = rng.choice((2, 4))
        start = at + rng.randrange(first, last - size + 1, 2)
        data[start : start + size] = (rng.choice(_NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")
    return data


def _png_chunk(rng: random.Random, data: bytearray) -> bytearray:
    """A chunk changed, doubled or added, with the right CRC."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((bytes(data[at + 4 : at + 8]), bytearray(data[at + 8 : at + 8 + length])))
        at += 12 + length
    if not chunks:
        return _number(rng, data)
    i = rng.randrange(len(chunks))
    kind, body = chunks[i]
    action = rng.randrange(4)
    if action == 0 and body:
        chunks[i] = (kind, bytearray(_number(rng, body)))
    elif action == 1:
        extra = rng.choice((b"tRNS", b"PLTE", b"iCCP", b"zTXt", b"eXIf", b"acTL", b"fcTL", b"gAMA", b"iTXt", b"IHDR"))
        packed = b"x\0\0" + zlib.compress(bytes(rng.choice((10, 3_000_000))))
        chunks.insert(i, (extra, bytearray(rng.choice((packed, rng.randbytes(30), b"")))))
    elif action == 2:
        chunks.insert(rng.randrange(len(chunks)), (kind, body))
    elif kind == b"IHDR":
        sizes = [rng.choice((0, 1, 5, 60_000, 1 << 14, 1 << 31, (1 << 32) - 1)) for _ in range(2)]
        chunks[i] = (
            kind,
            bytearray(struct.pack(">II", *sizes) + bytes(rng.choice((1, 2, 4, 8, 16, *range(7))) for _ in range(5))),
        )
    else:
        del chunks[i]
    made = bytearray(data[:8])
    for kind, body in chunks:
        made += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + bytes(body)))
    return made


def _jpeg_segment(rng: random.Random, data: bytearray) -> bytearray:
    """A byte or a number in the segments before the scan."""
    markers = [m.start() for m in re.finditer(rb"\xff[\xc0-\xfe]", bytes(data[:1500]))]
    at = rng.choice(markers or [0]) + rng.randrange(12)
    if at + 2 < len(data):
        data[at : at + 2] = rng.choice((rng.randbytes(2), struct.pack(">H", rng.choice(_NUMBERS) & 0xFFFF)))
    return data


def _webp_chunk(rng: random.Random, data: bytearray) -> bytearray:
    """A number in a chunk's header, or behind it where sizes and flags are."""
    places = [m.start() for m in re.finditer(rb"RIFF|VP8[ LX]|ANIM|ANMF|ALPH|EXIF|ICCP", bytes(data))]
    at = rng.choice(places or [0]) + rng.choice((4, 4, 8, 12, 14, 16, 18))
    size = rng.choice((1, 2, 3, 4))
    data[at : at + size] = (rng.choice(_NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")
    return data


def _parquet_footer(rng: random.Random, data: bytearray) -> bytearray:
    length = int.from_bytes(data[-8:-4], "little")
    at = len(data) - 8 - rng.randrange(1, max(2, min(length, len(data) - 8)))
    if rng.random() < 0.5:
        data[at] = rng.randrange(256)
    else:
        data[at : at + 4] = rng.choice((b"\xff\xff\xff\x7f", b"\0\0\0\0", rng.randbytes(4)))
    return data


def _text_piece(rng: random.Random, data: bytearray) -> bytearray:
    """Something that means something to a parser of text, anywhere."""
    pieces = (
        b'"',
        b"\0",
        b"\n",
        b",",
        b",,,,",
        b"\r",
        b"\xff",
        b'"""',
        b"[" * 100_000,
        b"9" * 5000,
        b"-1",
        b"1.5",
        b"NaN",
        b"true",
    )
    more = (
        b"null",
        b"\\ud800",
        b"3000000000",
        b"{}",
        b"x" * 200_000,
        b"\xed\xa0\x80",
        b"(",
        b"1e999",
        b"'|O'",
        b"(2,)*9",
    )
    at = rng.randrange(len(data))
    data[at : at + rng.choice((0, 0, 1, 3))] = rng.choice(pieces + more)
    return data


_SHAPES = ("(8,2,2)", "(1<<40,)", "(10**12,)", "(-1,2)", "(1000000000000,0)", "()", "8", "(8.0,2,2)")


def _npy_header(rng: random.Random, data: bytearray) -> bytearray:
    """The header's text replaced, with the right length."""
    header = rng.choice(
        (
            f"{{'descr': '<f4', 'fortran_order': False, 'shape': {rng.choice(_SHAPES)}, }}",
            f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rng.choice(_NUMBERS)}, 2, 2), }}",
            "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
            f"{{'descr': '<f{rng.choice((0, 2, 3, 8, 16))}', 'fortran_order': True, 'shape': (8, 2, 2), }}",
            "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (8, 2, 2), }",
            "{'descr': '<M8[ns]', 'fortran_order': 1, 'shape': (8, 2, 2), }",
            "(" * rng.choice((50, 5000)),
            "{" + "'a': 1, " * 500 + "}",
        )
    ).encode()
    return bytearray(b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + data[-rng.choice((4, 128)) :])


def _safetensors_header(rng: random.Random, data: bytearray) -> bytearray:
    """The header's JSON changed, with the right length."""
    length = int.from_bytes(data[:8], "little")
    text = bytearray(data[8 : 8 + length])
    if text:
        text = bytearray(rng.choice((_text_piece, _flip_bits, _number))(rng, text))
    for old, new in (
        (b'"F32"', b'"I8"'),
        (b'"I64"', b'"F64"'),
        (b"[3,4,2,2]", b"[3,0,2,2]"),
        (b"[3]", b"[1,3]"),
        (b'"F32"', b'"BOOL"'),
    ):
        if rng.random() < 0.15:
            text = text.replace(old, new)
    return bytearray(len(text).to_bytes(8, "little")) + text + data[8 + length :]


# What reads them


def _write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def _use(source: Source) -> None:
    fingerprint(source, range(len(source)))
    assert all(0 <= source.label(i) < len(source.class_names) for i in range(len(source)))
    for i in range(min(6, len(source))):
        with contextlib.suppress(UserError):
            pixels, _ = source.load(i, 32, ("pil", "turbo")[i % 2])
            assert pixels.shape == (32, 32, 3)


def _read_source(name: str) -> Callable[[bytes, Path], None]:
    def read(data: bytes, folder: Path) -> None:
        source = open_source(str(_write(folder, name, data)), resolution=32)
        _use(source)
        if name.startswith("shard"):
            captions = open_captions(source, table=None, key=None)
            for i in range(len(source)):
                with contextlib.suppress(UserError):
                    assert all(caption.encode() for caption in captions.of(i))

    return read


def _read_picture(data: bytes, folder: Path) -> None:
    with contextlib.suppress(UserError):
        assert decode_turbo(data, "x", 32).shape == (32, 32, 3)
    assert decode_pil(data, "x", 32).shape == (32, 32, 3)


def _read_table(data: bytes, folder: Path) -> None:
    found = read_table(_write(folder, "captions.csv", data), open_source("shapes", resolution=32, limit=12))
    assert all(isinstance(text, str) for i in range(12) for text in found.of(i))


def _read_npy(data: bytes, folder: Path) -> None:
    _write(folder, "dataset.json", b'{"labels": [["a.npy", 0], ["b.npy", 1]]}')
    _write(folder, "b.npy", _npys()[0])
    _write(folder, "a.npy", data)
    latents = open_latents(folder, "repa")
    assert latents.read(0).shape == latents.read(1).shape


def _read_labels(data: bytes, folder: Path) -> None:
    _write(folder, "a.npy", _npys()[0])
    _write(folder, "b.npy", _npys()[0])
    _write(folder, "dataset.json", data)
    assert open_latents(folder, "repa").labels.min() >= 0


def _read_npz(data: bytes, folder: Path) -> None:
    from trainer.evaluate.images import open_images

    images = open_images(_write(folder, "images.npz", data))
    for batch in images.batches(2):
        assert batch.dtype == np.uint8
    labels = images.labels()
    assert labels is None or labels.dtype == np.int64


def _read_safetensors(data: bytes, folder: Path) -> None:
    path = _write(folder, f"{zlib.crc32(data):08x}.safetensors", data)  # files are kept open by name
    try:
        latents = open_latents(folder, "lightningdit")
        for i in range(len(latents)):
            assert latents.read(i).ndim == 4
    finally:
        path.unlink()


Reader = Callable[[bytes, Path], None]
KINDS: dict[str, tuple[Callable[[], list[bytes]], tuple[Mutation, ...], Reader]] = {
    "tar": (_tars, (_tar_header, _tar_header, _pax_record), _read_source("set.tar")),
    "webdataset": (_webdatasets, (_tar_header, _pax_record, _text_piece), _read_source("shard.tar")),
    "zip": (_zips, (_zip_field, _zip_field), _read_source("set.zip")),
    "parquet": (_parquets, (_parquet_footer, _parquet_footer), _read_source("set.parquet")),
    "jpeg": (_jpegs, (_jpeg_segment, _jpeg_segment), _read_picture),
    "png": (_pngs, (_png_chunk, _png_chunk), _read_picture),
    "webp": (_webps, (_webp_chunk, _webp_chunk), _read_picture),
    "csv": (_tables, (_text_piece, _text_piece), _read_table),
    "npy": (_npys, (_npy_header, _text_piece), _read_npy),
    "json": (lambda: [b'{"labels": [["a.npy", 0], ["b.npy", 1]]}'], (_text_piece, _text_piece), _read_labels),
    "npz": (_npzs, (_zip_field,), _read_npz),
    "safetensors": (_safetensors, (_safetensors_header, _safetensors_header), _read_safetensors),
}


def case(kind: str, number: int, seed: int, valid: list[bytes]) -> bytes:
    """Case ``number`` of a kind: one of the valid files, changed once to three times, or joined with another."""
    rng = random.Random(f"{kind} {seed} {number}")
    data: bytes | bytearray = rng.choice(valid)
    if rng.random() < 0.05:
        other = rng.choice(valid)
        return bytes(data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :])
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        mutations = KINDS[kind][1] if rng.random() < 0.5 else GENERIC
        # A mutation needs something to change; what an earlier one has left may be nothing.
        data = rng.choice(mutations)(rng, bytearray(data)) if len(data) > 64 or (kind == "json" and data) else data
    return bytes(data)


def run(kind: str, count: int, seed: int, folder: Path) -> list[str]:
    """Reads ``count`` malformed files of a kind (a key of `KINDS`); returns a description of each failure.

    A failure is any exception but `UserError`, a case of more than 20 s, or one that takes more than 1 GB of memory. Needs
    the main thread (for the clock) and Linux (for the memory). Files are written below ``folder``, which must exist.
    """
    assert threading.current_thread() is threading.main_thread()
    make, _, read = KINDS[kind]
    valid, failures = make(), []
    # A file where the index of archives would lie: none is kept.
    blocked = _write(folder, "no-index", b"")
    quiet = {"FEATCACHE_INDEX": str(blocked)}
    with mock.patch.dict(os.environ, quiet), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(count):
            data = case(kind, number, seed, valid)
            place = folder / f"{kind}-case"
            place.mkdir()
            problem = _problem(lambda: read(data, place))  # noqa: B023 (called at once)
            if problem is not None:
                failures.append(f"{kind}, seed {seed}, case {number}: {problem}")
            shutil.rmtree(place)
    return failures


def _problem(attempt: Callable[[], None]) -> str | None:
    """What is wrong with how a case ended; None if nothing is."""
    _forget_peak()
    before = _memory_bytes("VmRSS")
    start = time.monotonic()
    try:
        with _clock():
            attempt()
    except UserError as error:
        if "\n" in error.what or len(error.what) > 2000:
            return f"the message is no short line: {error.what!r:.300}"
    except Hang:
        return f"took more than {TIME_LIMIT_S} s"
    except BaseException:
        return traceback.format_exc(limit=-4)
    grown = _memory_bytes("VmHWM") - before
    if grown > MEMORY_LIMIT_BYTES:
        return f"took {grown / 1e9:.1f} GB of memory"
    if time.monotonic() - start > TIME_LIMIT_S:
        return f"took {time.monotonic() - start:.0f} s"
    return None


@contextlib.contextmanager
def _clock() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _memory_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from the present use


if __name__ == "__main__":
    import argparse
    import sys
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    total = 0
    for chosen in given.kinds:
        with tempfile.TemporaryDirectory() as made:
            began = time.monotonic()
            wrong = run(chosen, given.count, given.seed, Path(made))
        total += len(wrong)
        print(f"{chosen}: {len(wrong)} of {given.count} failed, {time.monotonic() - began:.0f} s", flush=True)
        print("\n".join(wrong[:10]), flush=True)
    sys.exit(total > 0)
