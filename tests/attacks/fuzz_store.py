"""Malformed files of the store's own formats and malformed answers of a server.

`run(kind, count, seed, folder)` tries `count` of them. Nothing may come out but success or `UserError`; success may not
mean other values; nothing outside the folder may change.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from store_helpers import base_features, build, dataset, tokens, tree, values, write_all

import featcache
from featcache.errors import CacheError, UserError
from featcache.share.manage import collect_garbage, list_caches
from featcache.share.transfer import list_remote, pull, verify_remote
from featcache.share.verify import verify
from featcache.store import CacheWriter, files, remote_errors
from featcache.store.blocks import blocks_bytes, parse_blocks
from featcache.store.contents import parse_checksums
from featcache.store.layout import SIGNATURE
from featcache.store.manifest import manifest_from_json
from featcache.store.root import parse_root, read_root, root_bytes
from featcache.store.shards import decompress, encode_shard, parse_index
from featcache.store.signing import sign
from featcache.store.writers import create_writer
from tests.attacks.campaign import dice, fingerprint
from tests.attacks.flips import signing_key, wrong_signature
from tests.attacks.mutate import LEAVES, change_bytes, change_json, change_value, dump
from tests.attacks.scenes import values_of

Try = Callable[[random.Random], None]


class Wrong(Exception):
    """The product took what it should have refused, or gave other values."""


def _specs() -> list[Any]:
    return [*base_features(), tokens("i@4", codec="int4")]


def _cache(folder: Path, **options: Any) -> Path:
    return build(folder / "c", _specs(), count=7, shard_size=4, skipped=(3,), **options)


def _root(folder: Path) -> Try:
    path = _cache(folder)
    original = (path / "zarr.json").read_bytes()
    document = json.loads(original)

    def attempt(chance: random.Random) -> None:
        changed = change_json(original, chance)
        manifest = parse_root(changed, "it")
        if json.loads(changed) != document or root_bytes(manifest) != original:
            raise Wrong(f"another document opens: {changed[:300]!r}")

    return attempt


def _manifest(folder: Path) -> Try:
    path = _cache(folder)
    original = json.loads((path / "zarr.json").read_bytes())["attributes"]["featcache"]

    def attempt(chance: random.Random) -> None:
        manifest = manifest_from_json(change_value(original, chance))
        if manifest_from_json(json.loads(json.dumps(manifest.to_json()))) != manifest:
            raise Wrong("it is not what it writes")
        if parse_root(root_bytes(manifest), "it") != manifest:
            raise Wrong("its root document is another one's")
        for name in manifest.arrays:
            if ".." in name or Path(name).is_absolute():
                raise Wrong(f"an array leaves the cache: {name!r}")

    return attempt


def _sums(folder: Path) -> Try:
    names = ["c.0", "c.1", "c.2"]
    original = b"".join(f"{i:064x}  {name}\n".encode() for i, name in enumerate(names))

    def attempt(chance: random.Random) -> None:
        changed = change_bytes(original, chance)
        digests = parse_checksums(changed, names, "it")
        if b"".join(f"{d}  {n}\n".encode() for d, n in zip(digests, names, strict=True)) != changed:
            raise Wrong(f"{changed!r} passes")

    return attempt


def _block_hashes(folder: Path) -> Try:
    path = _cache(folder, compressor="zstd")
    manifest = read_root(path)
    original = (path / "i@4/BLOCKS").read_bytes()

    def attempt(chance: random.Random) -> None:
        changed = change_bytes(original, chance)
        # As if the manifest named these bytes: what is wrong in them has to be seen by their form.
        named = replace(manifest, blocks={**manifest.blocks, "i@4": hashlib.sha256(changed).hexdigest()})
        for about in (manifest, named):
            with contextlib.suppress(CacheError):
                found = parse_blocks(changed, about, "i@4", "it")
                if blocks_bytes(found) != changed or (about is manifest and changed != original):
                    raise Wrong(f"{changed[:200]!r} passes")

    return attempt


def _signature(folder: Path) -> Try:
    path = _cache(folder)
    key, manifest = signing_key(folder), read_root(path)
    sign(path, key)
    original = (path / SIGNATURE).read_bytes()

    def attempt(chance: random.Random) -> None:
        if wrong := wrong_signature(change_bytes(original, chance), manifest, key):
            raise Wrong(wrong[0])

    return attempt


def _index(folder: Path) -> Try:
    def attempt(chance: random.Random) -> None:
        n, body = chance.randint(1, 4), chance.choice((0, 256, 1000))
        extreme = (0, 1, 64, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 2, body, body - 64, 2**64 - 64)
        table = [(i * 64, 64) if i < n else (2**64 - 1, 2**64 - 1) for i in range(4)]
        for _ in range(chance.randint(0, 3)):
            entry = (chance.choice(extreme) % 2**64, chance.choice(extreme) % 2**64)
            table[chance.randrange(4)] = entry
        raw = np.array(table, np.uint64).tobytes()
        raw += struct.pack("<I", google_crc32c.value(raw))
        if chance.random() < 0.3:
            raw = change_bytes(raw, chance)
        size = chance.choice((64, None))
        offsets, lengths = parse_index(
            raw, n=n, shard_size=4, file_bytes=len(raw) + body, sample_bytes=size, where="it"
        )
        if any(
            o < 0 or length < 0 or o + length > body
            for o, length in zip(offsets.tolist(), lengths.tolist(), strict=True)
        ):
            raise Wrong(f"samples outside the file: {table}")

    return attempt


def _sample(folder: Path) -> Try:
    values = np.random.default_rng(0).integers(0, 9, (1, 256), dtype=np.uint8)
    frames = {name: bytes(encode_shard(values, 1, name)[0]) for name in ("zstd", "blosc")}

    def attempt(chance: random.Random) -> None:
        name = chance.choice(sorted(frames))
        out = np.full(256 + 64, 77, np.uint8)
        data = change_bytes(frames[name], chance) if chance.random() < 0.8 else chance.randbytes(chance.randrange(200))
        try:
            decompress(name, data, out[:256], "it")
        finally:
            if (out[256:] != 77).any():
                raise Wrong("bytes after the buffer were written")

    return attempt


def _file(
    names: Callable[[str], bool], change: Callable[[bytes, random.Random], bytes], **options: Any
) -> Callable[[Path], Try]:
    """One file of a cache changed; then everything that reads caches is tried."""

    def make(folder: Path) -> Try:
        path = _cache(folder, **options)
        whole, truth = tree(path), values_of(path)
        victims = sorted(name for name in whole if names(name))
        assert victims

        def attempt(chance: random.Random) -> None:
            name = chance.choice(victims)
            changed = change(whole[name], chance)
            (path / name).write_bytes(changed)
            try:
                _read_all(path, truth, metadata=name.endswith(".json"), same=changed == whole[name])
            finally:
                (path / name).write_bytes(whole[name])

        return attempt

    return make


def _read_all(path: Path, truth: dict[str, np.ndarray], *, metadata: bool, same: bool) -> None:
    list_caches(path.parent)
    try:
        report = verify(path, threads=1)
    except CacheError:
        report = None
    if report is not None and report.ok and not same:
        raise Wrong("verify calls it sound")
    seen = values_of(path)
    cache = featcache.open(path)
    cache.keys()
    cache.labels()
    repr(cache)
    if metadata and any(not np.array_equal(seen[name], truth[name]) for name in truth):
        raise Wrong("other values without an error")


def _state(folder: Path) -> Try:
    """Files of an unfinished build: journals, specifications, the dataset's record."""
    path = folder / "c"
    specs = _specs()
    with create_writer(path, dataset(7), shard_size=4) as writer:
        # Two features complete, three half-way.
        writer.begin(specs)
        writer.skip(0, [(3, "img/000003.png", "truncated")])
        for spec in specs:
            for shard in range(2 if spec in specs[:2] else 1):
                writer.write_shard(spec.name, shard, _stored(writer, spec, shard))
    template = folder / "template"
    path.rename(template)
    victims = sorted(n for n in tree(template) if n.startswith(".featcache") and n.endswith(".json"))
    assert len(victims) > 4
    whole = tree(_cache(folder / "undisturbed"))

    def attempt(chance: random.Random) -> None:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(template, path)
        name = chance.choice(victims)
        (path / name).write_bytes(change_json((path / name).read_bytes(), chance))
        with contextlib.suppress(UserError):
            list_caches(path)
        try:
            with create_writer(path, dataset(7), shard_size=4) as writer:
                writer.begin(specs)
                write_all(writer, specs, (3,))
                writer.finish()
        except UserError:
            collect_garbage(path)
            return
        have = tree(path)
        if set(whole) != set(have):
            raise Wrong(f"a finished cache has other files after a change of {name}")
        # A wrong checksum in a journal is found by `verify`; it may not make wrong bytes sound.
        if verify(path).ok and any(whole[n] != have[n] for n in whole if _is_shard(n)):
            raise Wrong(f"a finished cache is called sound with other bytes after a change of {name}")

    return attempt


def _stored(writer: CacheWriter, spec: Any, shard: int) -> dict[str, np.ndarray]:
    slots = writer.slots(shard)
    return {
        name[len(spec.name) :]: values(name, dtype, shape, slots, (3,)) for name, (dtype, shape) in spec.arrays.items()
    }


class _Answers(ThreadingHTTPServer):
    """A web server that lies about some of its answers."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Liar)
        self.root = root
        self.chance = random.Random(0)
        self.rate = 0.0

    def handle_error(self, *_: object) -> None:
        pass


class _Liar(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Answers

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.server.root / self.path.lstrip("/")
        chance = self.server.chance
        data = path.read_bytes() if path.is_file() else b""
        status, headers = (200, {}) if path.is_file() else (404, {})
        span = self.headers.get("Range", "")
        if status == 200 and span.startswith("bytes="):
            first, _, last = span[6:].partition("-")
            start, stop = int(first), min(int(last or len(data)) + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            status, data = 206, data[start:stop]
        headers["Content-Length"] = str(len(data))
        headers |= {"ETag": '"x"', "Last-Modified": "Thu, 01 Jan 1970 00:00:00 GMT", "Accept-Ranges": "bytes"}
        if chance.random() < self.server.rate:
            lie = chance.randrange(9)
            if lie == 0:
                status = chance.choice((200, 201, 204, 206, 301, 304, 400, 403, 404, 416, 429, 500, 503, 999))
            elif lie == 1:
                headers["Content-Range"] = chance.choice(
                    ("bytes 0-0/1", "bytes */5", "bytes 9-1/3", "x", f"bytes 0-{2**64}/{2**65}")
                )
            elif lie == 2:
                headers["Content-Length"] = chance.choice(("0", "1", str(len(data) + 7), str(2**63), "-1", "x"))
            elif lie == 3:
                data = change_bytes(data, chance)
                headers["Content-Length"] = str(len(data))
            elif lie == 4:
                data = data[: len(data) // 2]
            elif lie == 5:
                headers.pop(chance.choice(sorted(headers)))
            elif lie == 6:
                headers["Location"] = self.path
                status = 302
            elif lie == 7:
                headers["ETag"] = chance.choice(("", '"y"', "\x7f" * 100, 'W/"x"'))
                headers["Last-Modified"] = chance.choice(("yesterday", "", "Thu, 01 Jan 9999999 00:00:00 GMT"))
            else:
                self.wfile.write(
                    chance.choice((b"", b"\0" * 100, b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/9 x\r\n", b"SSH-2.0\r\n"))
                )
                self._end()
                return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)
        if headers.get("Content-Length") != str(len(data)):
            self._end()

    def _end(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)


def _server(folder: Path) -> Try:
    """Answers of a server that lies: `pull`, `ls` and `verify` of it."""
    path = _cache(folder / "there")
    whole = tree(path)
    server = _Answers(folder / "there")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/c"

    def attempt(chance: random.Random) -> None:
        server.chance, server.rate = random.Random(chance.random()), chance.choice((0.02, 0.1, 0.5))
        target = folder / "copy"
        shutil.rmtree(target, ignore_errors=True)
        what = chance.randrange(4)
        if what == 0:
            list_remote(url)
        elif what == 1:
            report = verify_remote(url, threads=1)
            del report
        else:
            pull(url, target, threads=chance.choice((1, 3)))
            if tree(target) != whole:
                raise Wrong("a pull from a server that lies ends in other bytes")
        if target.exists() and any(p.suffix == ".part" for p in target.rglob("*")):
            raise Wrong("a half-written file is left")

    return attempt


def _blocks(folder: Path) -> Try:
    """Blocks of a stream on this machine's disk, damaged between two readings."""
    path = _cache(folder / "there")
    truth = values_of(path)
    server = _Answers(folder / "there")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/c"
    place = folder / "blocks"

    def read() -> None:
        cache = featcache.open(url, cache_dir=place)
        names = sorted(cache.manifest.features)
        with cache.reader(names, slots=True, threads=0) as reader:
            out = reader.allocate(7)
            reader.read(np.arange(7), out)
        if any(not np.array_equal(out[name], truth[name]) for name in truth):
            raise Wrong("other values from a damaged block")

    read()

    def attempt(chance: random.Random) -> None:
        victim = chance.choice(sorted(p for p in place.rglob("*") if p.is_file()))
        victim.write_bytes(change_bytes(victim.read_bytes(), chance))
        read()

    return attempt


def _is_shard(name: str) -> bool:
    return name.rpartition("/")[2].startswith("c.") or name.endswith(".tar")


def _anything(data: bytes, chance: random.Random) -> bytes:
    return chance.choice(
        (dump(chance.choice(LEAVES)), chance.randbytes(chance.randrange(300)), change_bytes(data, chance))
    )


def _is_node(name: str) -> bool:
    return name.endswith("zarr.json")


KINDS: dict[str, Callable[[Path], Try]] = {
    "root document": _root,
    "manifest": _manifest,
    "checksum file": _sums,
    "block hashes": _block_hashes,
    "blocks of a cache": _file(lambda n: n.endswith("BLOCKS"), _anything),
    **({"signature": _signature} if shutil.which("ssh-keygen") else {}),
    "shard index": _index,
    "compressed sample": _sample,
    "metadata of a zarr cache": _file(_is_node, change_json),
    "metadata of a wds cache": _file(lambda n: n == "featcache.json", change_json, format="wds"),
    "checksums of a cache": _file(lambda n: n.endswith("SHA256SUMS"), _anything),
    "zarr shard": _file(_is_shard, change_bytes),
    "zstd shard": _file(_is_shard, change_bytes, compressor="zstd"),
    "blosc shard": _file(_is_shard, change_bytes, compressor="blosc"),
    "tar shard": _file(_is_shard, change_bytes, format="wds"),
    "unfinished build": _state,
    "server answers": _server,
    "stream blocks": _blocks,
}


@contextlib.contextmanager
def _quick() -> Iterator[None]:
    """No disk is waited for, nor a server that refuses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_fsync", lambda fd: None)
        patch.setattr(remote_errors, "FIRST_PAUSE_S", 0.0)
        yield


def run(kind: str, count: int, seed: int, folder: Path) -> list[str]:
    """Tries `count` malformed inputs of a kind (a key of `KINDS`) in the new folder `folder`; a line for each failure."""
    beside = folder / "beside"
    beside.mkdir(parents=True)
    (beside / "file").write_bytes(b"a user's own")
    before, found = fingerprint(beside), []
    with _quick():
        attempt = KINDS[kind](folder)
        for number in range(count):
            chance = dice("fuzz", kind, seed, number)
            try:
                attempt(chance)
            except UserError:
                pass
            except Exception as error:
                found.append(f"{type(error).__name__}: {str(error)[:300]} (input {number})")
    if fingerprint(beside) != before:
        found.append("outside: something beside it changed")
    return found
