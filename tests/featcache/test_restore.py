"""A damaged cache made whole from another copy: only what is damaged comes, and only what is right is taken."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from large_cache import LARGE, LARGE_FILE, build_large, without_blocks
from store_helpers import base_features, build, corrupt, tokens, tree
from web_server import serve

from featcache.errors import CacheError
from featcache.share.restore import restore
from featcache.share.verify import verify
from featcache.store import locks, remote_errors
from featcache.store.blocks import BLOCK_BYTES
from featcache.store.root import read_root

MEBIBYTE = 1 << 20
SKIPPED = (4, 20)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_errors, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return build(tmp_path / "from" / "cache", [*base_features(), tokens("dino@9")], skipped=SKIPPED)


@pytest.fixture
def damaged(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "damaged")


def flip(path: Path, offset: int = 7) -> None:
    corrupt(path, lambda data: data.__setitem__(offset, data[offset] ^ 8))


@pytest.mark.parametrize("options", [{}, {"compressor": "zstd"}, {"format": "wds"}], ids=str)
@pytest.mark.parametrize("over", ["http", "folder"])
def test_anything_but_the_root_document_comes_back(tmp_path: Path, options, over: str) -> None:
    sound = build(tmp_path / "from" / "cache", skipped=SKIPPED, **options)
    names = sorted(name for name in tree(sound) if name not in ("zarr.json", "featcache.json"))
    damaged = shutil.copytree(sound, tmp_path / "damaged")
    for number, name in enumerate(names):
        if number % 3 == 0:
            (damaged / name).unlink()
        elif number % 3 == 1:
            flip(damaged / name)
    with serve(sound.parent) as web:
        done = restore(damaged, f"{web.url}/cache" if over == "http" else str(sound))
    assert tree(damaged) == tree(sound)
    assert done.refused == ()
    assert set(done.files) == {name for number, name in enumerate(names) if number % 3 < 2}


def test_only_damaged_blocks_are_fetched(tmp_path: Path) -> None:
    sound = build_large(tmp_path / "from" / "cache")
    damaged = shutil.copytree(sound, tmp_path / "damaged")
    flip(damaged / LARGE_FILE, 2 * MEBIBYTE + 1)
    flip(damaged / LARGE_FILE, 9 * MEBIBYTE + 1)
    with serve(sound.parent) as web:
        done = restore(damaged, f"{web.url}/cache")
        assert done.n_bytes == 2 * BLOCK_BYTES and done.files == (LARGE_FILE,)
        assert tree(damaged) == tree(sound)
        # Cut short: the blocks that are gone.
        os.truncate(damaged / LARGE_FILE, 7 * MEBIBYTE + 5)
        size = (sound / LARGE_FILE).stat().st_size
        assert restore(damaged, f"{web.url}/cache").n_bytes == size - 7 * MEBIBYTE
        assert tree(damaged) == tree(sound)


def test_whole_shards_without_hashes_of_blocks(tmp_path: Path) -> None:
    sound = build_large(tmp_path / "from" / "cache", mebibytes=3)
    without_blocks(sound)
    damaged = shutil.copytree(sound, tmp_path / "damaged")
    flip(damaged / LARGE_FILE)
    done = restore(damaged, str(sound))
    assert done.n_bytes == (sound / LARGE_FILE).stat().st_size
    assert tree(damaged) == tree(sound)


def test_nothing_wrong_is_taken(sound: Path, damaged: Path, tmp_path: Path) -> None:
    """A copy that is damaged itself, that lacks a feature, that is of other images: each is said, nothing is written."""
    name = "tiny@5/c.1.0.0"
    flip(damaged / name)
    before = tree(damaged)
    flip(sound / name)
    done = restore(damaged, str(sound))
    assert len(done.refused) == 1 and name in done.refused[0] and "is damaged" in done.refused[0]
    assert tree(damaged) == before
    other = build(tmp_path / "other", [f for f in base_features() if f.name != "tiny@5"], skipped=SKIPPED)
    done = restore(damaged, str(other))
    assert done.refused == (f"{name}: {other} does not hold these bytes of 'tiny@5'",)
    assert tree(damaged) == before
    with pytest.raises(CacheError, match="there is no cache at"):
        restore(damaged, str(tmp_path / "nowhere"))


def test_links_are_followed_on_neither_side(sound: Path, damaged: Path, tmp_path: Path) -> None:
    shutil.move(damaged / "tiny@5", tmp_path / "elsewhere")
    (damaged / "tiny@5").symlink_to(tmp_path / "elsewhere")
    before = tree(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="symbolic link"):
        restore(damaged, str(sound))
    assert tree(tmp_path / "elsewhere") == before
    shutil.rmtree(damaged)
    shutil.copytree(sound, damaged)
    (damaged / "tiny@5/c.0.0.0").unlink()
    secret = tmp_path / "secret"
    secret.write_bytes((sound / "tiny@5/c.0.0.0").read_bytes())
    (sound / "tiny@5/c.0.0.0").unlink()
    (sound / "tiny@5/c.0.0.0").symlink_to(secret)
    done = restore(damaged, str(sound))
    assert len(done.refused) == 1 and "symbolic link" in done.refused[0]
    assert not (damaged / "tiny@5/c.0.0.0").exists()


@pytest.mark.parametrize("over", ["http", "folder"])
def test_a_copy_with_shards_cut_off_or_missing_still_gives_the_others(sound: Path, damaged: Path, over: str) -> None:
    """Two faults at once: what one shard of the copy lacks is no reason to leave the others damaged."""
    for number in range(4):
        flip(damaged / f"dino@9/c.{number}.0.0")
    corrupt(sound / "dino@9/c.0.0.0", lambda data: data.__delitem__(slice(100, None)))
    corrupt(sound / "dino@9/c.1.0.0", lambda data: data.__delitem__(slice(0, None)))
    (sound / "dino@9/c.2.0.0").unlink()
    with serve(sound.parent) as web:
        done = restore(damaged, f"{web.url}/cache" if over == "http" else str(sound))
        assert max(web.answers.values(), default=0) <= 6  # what trying again cannot mend is not tried again
    assert done.files == ("dino@9/c.3.0.0",)
    assert [("shorter than it must be" in why, "missing" in why) for why in done.refused] == [
        (True, False),
        (True, False),
        (False, True),
    ]


def test_blocks_that_the_disk_does_not_give_any_more_are_fetched(tmp_path: Path, monkeypatch) -> None:
    """A bad sector in a shard that is otherwise sound."""
    sound = build_large(tmp_path / "from" / "cache")
    damaged = shutil.copytree(sound, tmp_path / "damaged")
    bad, pread = (damaged / LARGE_FILE).stat().st_ino, os.pread
    flip(damaged / LARGE_FILE, 5 * BLOCK_BYTES)

    def failing(fd: int, n_bytes: int, offset: int) -> bytes:
        if os.fstat(fd).st_ino == bad and offset == 2 * BLOCK_BYTES:
            raise OSError(errno.EIO, "Input/output error")
        return pread(fd, n_bytes, offset)

    monkeypatch.setattr(os, "pread", failing)
    with serve(sound.parent) as web:
        done = restore(damaged, f"{web.url}/cache")
    assert done.files == (LARGE_FILE,) and done.n_bytes == 2 * BLOCK_BYTES
    assert tree(damaged) == tree(sound)


def test_a_lost_checksum_file_is_written_as_it_was_checked(sound: Path, damaged: Path) -> None:
    """A server that answers rightly once and wrongly afterwards."""
    (damaged / "dino@9/SHA256SUMS").unlink()
    corrupt(damaged / "dino@9/c.1.0.0", lambda data: data.__setitem__(7, data[7] ^ 8))
    right = (sound / "dino@9/SHA256SUMS").read_bytes()
    with serve(sound.parent) as web:

        def once(handler: BaseHTTPRequestHandler) -> None:
            data = right if web.answers["cache/dino@9/SHA256SUMS"] == 1 else right.replace(b"a", b"b")
            handler.send_response(200)
            handler.send_header("ETag", '"x"')
            handler.send_header("Last-Modified", "Thu, 01 Jan 1970 00:00:00 GMT")
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data)

        web.odd["cache/dino@9/SHA256SUMS"] = once
        restore(damaged, f"{web.url}/cache")
    assert tree(damaged) == tree(sound)


def test_killed_repair_goes_on(tmp_path: Path) -> None:
    sound = build_large(tmp_path / "from" / "cache")
    damaged = shutil.copytree(sound, tmp_path / "damaged")
    (damaged / LARGE_FILE).unlink()
    with serve(sound.parent) as web:
        web.bytes_per_s = 12 * MEBIBYTE
        code = f"from pathlib import Path; from featcache.share.restore import restore; restore(Path({str(damaged)!r}), '{web.url}/cache')"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen([sys.executable, "-c", code], env=environment)
        kept = damaged / f".featcache/restored/{LARGE_FILE.replace('/', '+')}.fetched"
        while not kept.exists() or kept.stat().st_size < 5 * MEBIBYTE:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        web.bytes_per_s = None
        done = restore(damaged, f"{web.url}/cache")
    assert done.n_bytes <= 8 * MEBIBYTE
    assert tree(damaged) == tree(sound)


def test_as_it_is_typed(
    sound: Path, damaged: Path, cli: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    flip(damaged / "dino@9/c.2.0.0")
    found = cli("featcache", "verify", str(damaged))
    assert found.returncode == 1 and f"featcache repair {damaged}" in found.stdout
    with serve(sound.parent) as web:
        done = cli("featcache", "repair", str(damaged), "--from", f"{web.url}/cache")
    assert done.returncode == 0, done.stderr
    assert "mended: dino@9/c.2.0.0" in done.stdout and "repaired and sound" in done.stdout
    # But for what the command line notes beside the cache.
    assert {n: b for n, b in tree(damaged).items() if not n.startswith(".featcache/")} == tree(sound)
    flip(damaged / "dino@9/c.2.0.0")
    flip(sound / "dino@9/c.2.0.0")
    failed = cli("featcache", "repair", str(damaged), "--from", str(sound))
    assert failed.returncode == 1 and "not mended" in failed.stdout and "still damaged" in failed.stdout
    assert LARGE not in read_root(damaged).features


def test_two_repairs_of_one_cache_at_once(sound: Path, damaged: Path) -> None:
    """The second would write into the first one's partial files."""
    flip(damaged / "dino@9" / "c.1.0.0")
    folder = damaged / ".featcache/restored"
    folder.mkdir(parents=True)
    held = locks.lock(folder / "lock")
    with pytest.raises(CacheError, match="another process is repairing"):
        restore(damaged, str(sound))
    held.release()
    assert restore(damaged, str(sound)).files == ("dino@9/c.1.0.0",)
    assert tree(damaged) == tree(sound)


def test_from_a_copy_without_hashes_of_blocks(sound: Path, damaged: Path, tmp_path: Path) -> None:
    """As an earlier version made it: whole shards come, and ours are made again from them."""
    copy = tmp_path / "copy"
    shutil.copytree(sound, copy)
    without_blocks(copy)
    assert verify(copy).ok
    (damaged / "dino@9" / "BLOCKS").unlink()
    (damaged / "dino@9" / "SHA256SUMS").unlink()
    flip(damaged / "dino@9" / "c.1.0.0")
    (damaged / "dino@9" / "c.0.0.0").unlink()
    done = restore(damaged, str(copy))
    assert done.refused == ()
    assert set(done.files) == {"dino@9/SHA256SUMS", "dino@9/BLOCKS", "dino@9/c.0.0.0", "dino@9/c.1.0.0"}
    assert tree(damaged) == tree(sound)
    # Where a shard stays wrong, so do they.
    (damaged / "dino@9" / "BLOCKS").unlink()
    for path in (damaged, copy):
        flip(path / "dino@9" / "c.1.0.0")
    done = restore(damaged, str(copy))
    assert done.files == () and len(done.refused) == 2
    assert not verify(damaged).ok


def test_pipes_and_folders_in_place_of_files(sound: Path, damaged: Path) -> None:
    """Nothing waits for a pipe; a folder in the way is named."""
    shard = damaged / "dino@9" / "c.1.0.0"
    shard.unlink()
    os.mkfifo(shard)
    partial = damaged / ".featcache/restored/dino@9+c.1.0.0.fetched"
    for make in (os.mkfifo, Path.mkdir):
        partial.parent.mkdir(parents=True, exist_ok=True)
        make(partial)
        with pytest.raises(CacheError, match=r"fetched (is not a file|could not be written)"):
            restore(damaged, str(sound))
        partial.unlink() if partial.is_fifo() else partial.rmdir()
    assert restore(damaged, str(sound)).files == ("dino@9/c.1.0.0",)
    assert tree(damaged) == tree(sound)
