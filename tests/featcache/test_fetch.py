"""Bytes over the wire: each block checked, each continued where it stopped, by reading and by pulling."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from large_cache import LARGE, LARGE_FILE, build_large, without_blocks
from store_helpers import tree
from web_server import FileServer, serve

import featcache
from featcache.errors import CacheError
from featcache.read.stream import unverified_features
from featcache.share.convert import convert
from featcache.share.transfer import pull
from featcache.store import remote_errors
from featcache.store.blocks import BLOCK_BYTES
from featcache.store.root import read_root

MEBIBYTE = 1 << 20


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_errors, "FIRST_PAUSE_S", 0.01)


@pytest.fixture(params=["blocks", "no blocks"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A cache with a shard of 12 MiB, with and without hashes of its blocks."""
    path = build_large(tmp_path / "from" / "cache")
    if request.param == "no blocks":
        without_blocks(path)
    return path


def first_sample(url: str, directory: Path) -> np.ndarray:
    cache = featcache.open(url, cache_dir=directory)
    with cache.reader([LARGE]) as reader:
        out = reader.allocate(1)
        reader.read([3], out)
    return out[LARGE][0].copy()


def test_a_flipped_bit_is_never_read_as_a_value(source: Path, tmp_path: Path) -> None:
    """Once: fetched again. Always: an error that names the file."""
    right = first_sample(str(source), tmp_path)
    with serve(source.parent) as web:
        offset = 3 * len(right) + 12345
        web.flips[f"cache/{LARGE_FILE}"] = (offset, 1)
        assert np.array_equal(first_sample(f"{web.url}/cache", tmp_path / "once"), right)
        assert web.flips[f"cache/{LARGE_FILE}"] == (offset, 0)
        web.flips[f"cache/{LARGE_FILE}"] = (offset, 1000)
        with pytest.raises(CacheError, match=rf"{LARGE_FILE} is damaged.*(.|\n)*featcache verify"):
            first_sample(f"{web.url}/cache", tmp_path / "always")
        assert web.flips[f"cache/{LARGE_FILE}"] == (offset, 1000 - 3)


def test_a_large_shard_without_hashes_of_blocks_is_named(tmp_path: Path, capsys) -> None:
    """And a copy that `convert` makes, as the note says, has them."""
    path = build_large(tmp_path / "from" / "cache", mebibytes=17)
    with serve(path.parent) as web:
        right = first_sample(f"{web.url}/cache", tmp_path / "a")
        assert "cannot be checked" not in capsys.readouterr().err
        without_blocks(path)
        assert np.array_equal(first_sample(f"{web.url}/cache", tmp_path / "b"), right)
        said = capsys.readouterr().err
        assert f"streamed of {LARGE} cannot be checked" in said and "--to zarr" in said
    convert(path, tmp_path / "new", to="zarr")
    assert unverified_features(read_root(tmp_path / "new")) == []


def test_a_flipped_bit_in_a_pull_is_fetched_again(source: Path, tmp_path: Path) -> None:
    with serve(source.parent) as web:
        web.flips[f"cache/{LARGE_FILE}"] = (5 * MEBIBYTE + 7, 2)
        pull(f"{web.url}/cache", tmp_path / "copy")
        assert tree(tmp_path / "copy") == tree(source)
        if read_root(source).blocks:
            # A damaged block breaks off the request that it came in, of 8 MiB at most.
            assert web.sent_bytes < 12 * MEBIBYTE + 2 * 8 * MEBIBYTE + MEBIBYTE
        web.flips[f"cache/{LARGE_FILE}"] = (5 * MEBIBYTE + 7, 1000)
        with pytest.raises(CacheError, match=f"{LARGE_FILE} is damaged"):
            pull(f"{web.url}/cache", tmp_path / "other")


def start_pull(web: FileServer, target: Path) -> subprocess.Popen[bytes]:
    code = f"from featcache.share.transfer import pull; pull('{web.url}/cache', {str(target)!r}, threads=1)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment)


def kept_bytes(target: Path) -> int:
    sizes = [0]
    for path in target.glob(".featcache/building/*/*.fetched"):
        with contextlib.suppress(FileNotFoundError):  # it has just become a shard
            sizes.append(path.stat().st_size)
    return max(sizes)


def test_a_pull_killed_inside_a_shard_goes_on_inside_it(source: Path, tmp_path: Path) -> None:
    """Three kills. What is fetched twice is less than a block a kill, and what was on its way."""
    target = tmp_path / "copy"
    with serve(source.parent) as web:
        web.bytes_per_s = 12 * MEBIBYTE
        for kill in range(1, 4):
            process = start_pull(web, target)
            deadline = time.monotonic() + 30
            while kept_bytes(target) < kill * 3 * MEBIBYTE and time.monotonic() < deadline:
                assert process.poll() is None
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            assert kept_bytes(target) >= kill * 3 * MEBIBYTE
        web.bytes_per_s = None
        done = pull(f"{web.url}/cache", target)
        assert done.n_bytes <= 3 * MEBIBYTE + BLOCK_BYTES
        # The server counts what it wrote into the sockets' buffers too.
        metadata = sum(p.stat().st_size for p in source.rglob("*") if p.is_file()) - 12 * MEBIBYTE
        assert web.sent_bytes <= 12 * MEBIBYTE + 4 * metadata + 3 * (BLOCK_BYTES + 4 * MEBIBYTE)
    assert tree(target) == tree(source)


def test_what_is_kept_is_checked_before_it_is_continued(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    with serve(source.parent) as web:
        web.bytes_per_s = 12 * MEBIBYTE
        process = start_pull(web, target)
        while kept_bytes(target) < 4 * MEBIBYTE:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        process.wait()
        web.bytes_per_s = None
        [kept] = [p for p in target.glob(".featcache/building/*/*.fetched") if p.stat().st_size]
        with kept.open("r+b") as file:
            file.seek(2 * MEBIBYTE + 99)
            file.write(b"damaged")
        done = pull(f"{web.url}/cache", target)
    assert tree(target) == tree(source)
    if read_root(source).blocks:
        assert 10 * MEBIBYTE <= done.n_bytes < 10.5 * MEBIBYTE


def test_a_pull_from_another_cache_takes_nothing_of_the_first(tmp_path: Path) -> None:
    """An interrupted pull, continued from a place with other bytes of the same feature."""
    from store_helpers import build, corrupt

    ours = build(tmp_path / "ours" / "cache")
    theirs = build(tmp_path / "theirs" / "cache")
    # Other values, and checksums that say so.
    shard = theirs / "vae/moments/c.0.0.0.0"
    corrupt(shard, lambda data: data.__setitem__(5, data[5] ^ 1))
    from featcache.share.verify import verify

    assert not verify(theirs).ok
    rebuild_checksums(theirs, "vae/moments")
    assert verify(theirs).ok
    target = tmp_path / "copy"
    with serve(tmp_path) as web:
        web.cuts["theirs/cache/tiny@5/c.3.0.0"] = 10**6
        with pytest.raises(CacheError, match="failed 8 times"):
            pull(f"{web.url}/theirs/cache", target, threads=1)
        pull(f"{web.url}/ours/cache", target)
        assert tree(target) == tree(ours)
        with pytest.raises(CacheError, match="holds 'vae/moments' already, with other bytes"):
            pull(f"{web.url}/theirs/cache", target)
        pull(f"{web.url}/ours/cache", tmp_path / "part", samples=1)
        with pytest.raises(CacheError, match="holds 'vae/moments' already, with other bytes"):
            pull(f"{web.url}/theirs/cache", tmp_path / "part", samples=1)


def rebuild_checksums(path: Path, feature: str) -> None:
    """Record the shards of a feature as they are."""
    import hashlib
    from dataclasses import replace

    from featcache.store import files
    from featcache.store.blocks import BlockHasher, blocks_bytes, blocks_path
    from featcache.store.contents import checksums_path, checksums_text, shard_names
    from featcache.store.writer import publish

    manifest = read_root(path)
    for array in manifest.features[feature].arrays:
        shards = [(path / array / name).read_bytes() for name in shard_names(manifest, array)]
        text = checksums_text([hashlib.sha256(data).hexdigest() for data in shards], shard_names(manifest, array))
        (path / checksums_path(manifest, array)).write_bytes(text)
        manifest = replace(manifest, checksums={**manifest.checksums, array: hashlib.sha256(text).hexdigest()})
        if array in manifest.blocks:
            found = []
            for data in shards:
                hasher = BlockHasher()
                hasher.update(memoryview(data))
                found.append(hasher.result())
            (path / blocks_path(manifest, array)).write_bytes(blocks_bytes(found))
            digest = hashlib.sha256(blocks_bytes(found)).hexdigest()
            manifest = replace(manifest, blocks={**manifest.blocks, array: digest})
    publish(path, manifest, {feature}, files.Group())
