"""Kill it, starve it, break its calls, flip its bits: what is there is right, or it says that it is not."""

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from store_builder import SKIPPED
from store_helpers import add, base_features, build, expected, tokens, tree

import featcache
from featcache.errors import CacheError
from featcache.share.verify import verify
from featcache.store import files

BUILDER = Path(__file__).with_name("store_builder.py")
COUNT, SHARD_SIZE = 120, 8


def start_builder(path: Path, *features: str) -> subprocess.Popen:
    command = [sys.executable, str(BUILDER), str(path), str(COUNT), str(SHARD_SIZE), *features]
    return subprocess.Popen(command, cwd=BUILDER.parent, stderr=subprocess.PIPE)


def run_builder(path: Path, *features: str) -> None:
    process = start_builder(path, *features)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr.decode()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("whole") / "cache"
    run_builder(path)
    return tree(path)


def kill_at_random_moments(path: Path, whole: dict[str, bytes], kills: int, seed: int) -> int:
    """Build with `kills` SIGKILLs over as many builds as it takes; returns how many builds were completed."""
    rng = random.Random(seed)
    completed = killed = 0
    # The life of a process: imports, then a build that takes some tenths of a second.
    while killed < kills:
        process = start_builder(path)
        # From the first sign of work on, so that the kill falls into the build and not into the imports.
        while process.poll() is None and not (path / ".featcache").exists():
            time.sleep(0.001)
        time.sleep(rng.random() ** 2 * 0.25)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        if process.returncode == -signal.SIGKILL:
            killed += 1
        # Whatever a reader sees at this moment is complete and right.
        with contextlib.suppress(CacheError):
            cache = featcache.open(path)
            assert set(cache.manifest.features) == {"key", "label", "tiny@5", "vae/moments"}
            assert verify(path).ok
        if process.returncode == 0 or killed % 5 == 0:
            run_builder(path)
            assert tree(path) == whole
            completed += 1
            shutil.rmtree(path)
    run_builder(path)
    assert tree(path) == whole
    return completed + 1


def test_sigkill_at_random_moments(tmp_path: Path, whole) -> None:
    assert kill_at_random_moments(tmp_path / "cache", whole, kills=6, seed=0) >= 1


@pytest.mark.slow
def test_sigkill_at_sixty_random_moments(tmp_path: Path, whole) -> None:
    assert kill_at_random_moments(tmp_path / "cache", whole, kills=60, seed=1) >= 12


class Faults:
    """Fails the n-th call of one of the file layer's primitives, or cuts every write short."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.fail_at: int | None = None
        self.error = errno.ENOSPC
        self.stay_broken = False
        self.target = ""
        self.real = {name: getattr(files, name) for name in ("_write", "_fsync", "_rename")}
        for name in self.real:
            monkeypatch.setattr(files, name, self._wrap(name))

    def _wrap(self, name: str):
        def call(*arguments):
            if name == self.target:
                self.calls += 1
                if self.fail_at is not None and (
                    self.calls == self.fail_at or (self.stay_broken and self.calls > self.fail_at)
                ):
                    if name == "_write":
                        # A full disk takes part of the bytes first.
                        self.real["_write"](arguments[0], arguments[1][: len(arguments[1]) // 2])
                    raise OSError(self.error, os.strerror(self.error))
            if name == "_fsync":
                return None  # no power is lost in this test
            return self.real[name](*arguments)

        return call


FAULTS = (("_write", errno.ENOSPC), ("_write", errno.EIO), ("_rename", errno.EIO), ("_fsync", errno.EIO))


@pytest.mark.parametrize(("primitive", "error"), FAULTS)
@pytest.mark.parametrize("options", [{}, {"format": "wds"}], ids=["zarr", "wds"])
def test_every_call_may_fail(tmp_path: Path, monkeypatch, primitive: str, error: int, options) -> None:
    """Fail each single call of a build in turn: a clear error, nothing half-written, and a rerun mends it."""
    faults = Faults(monkeypatch)
    specs = [spec for spec in base_features() if spec.name in ("label", "tiny@5")]
    options = {"count": 12, "shard_size": 8, "skipped": (3,), **options}
    whole = tree(build(tmp_path / "whole", specs, **options))
    faults.target, faults.error = primitive, error
    build(tmp_path / "count", specs, **options)
    total = faults.calls
    assert total >= 10
    for fail_at in range(1, total + 1):
        path = tmp_path / f"cache{fail_at}"
        faults.calls, faults.fail_at = 0, fail_at
        with pytest.raises(CacheError, match="disk is full" if error == errno.ENOSPC else "could not be written"):
            build(path, specs, **options)
        assert not list(path.rglob("*" + files.PART_SUFFIX))
        with contextlib.suppress(CacheError):
            # The very last calls may fail after everything became visible.
            featcache.open(path)
            assert verify(path).ok
        faults.fail_at = None
        build(path, specs, **options)
        assert tree(path) == whole
        shutil.rmtree(path)


def test_disk_that_stays_full(tmp_path: Path, monkeypatch) -> None:
    faults = Faults(monkeypatch)
    path = build(tmp_path / "cache")
    before = tree(path)
    faults.target, faults.fail_at, faults.stay_broken = "_write", 7, True
    for _ in range(2):
        with pytest.raises(CacheError, match=r"disk is full.*\n.*run the same command again"):
            add(path, [tokens("new@1")])
        faults.calls = 7
    assert featcache.open(path).manifest.features.keys() == {"key", "label", "tiny@5", "vae/moments"}
    faults.fail_at = None
    add(path, [tokens("new@1")])
    assert before.items() <= {**tree(path), "zarr.json": before["zarr.json"]}.items()
    assert verify(path).ok


def test_short_writes(tmp_path: Path, monkeypatch) -> None:
    whole = tree(build(tmp_path / "whole"))
    real = files._write
    monkeypatch.setattr(files, "_write", lambda fd, data: real(fd, data[: max(1, min(len(data), 777))]))
    assert tree(build(tmp_path / "cache")) == whole


@pytest.mark.parametrize("options", [{}, {"compressor": "zstd"}, {"format": "wds"}], ids=["zarr", "zstd", "wds"])
def test_verify_finds_every_bit_flip(tmp_path: Path, options) -> None:
    """200 random bits over all bytes of the cache, metadata and checksum files included."""
    path = build(tmp_path / "cache", skipped=SKIPPED, **options)
    assert verify(path).ok
    names = sorted(tree(path))
    sizes = np.array([(path / name).stat().st_size for name in names])
    rng = np.random.default_rng(0)
    for trial in range(200):
        # Half of them evenly over the bytes, half over the files, so that small files get their share.
        weights = sizes / sizes.sum() if trial % 2 else np.ones(len(names)) / len(names)
        victim = path / names[rng.choice(len(names), p=weights)]
        original = victim.read_bytes()
        data = bytearray(original)
        bit = int(rng.integers(0, len(data) * 8))
        data[bit // 8] ^= 1 << bit % 8
        victim.write_bytes(data)
        report = verify(path, threads=1)
        assert str(victim) in {problem.path for problem in report.problems}, (victim, bit)
        victim.write_bytes(original)
    assert verify(path).ok


def test_two_builders_and_a_looping_reader(tmp_path: Path) -> None:
    """Two processes add features while a reader opens, reads and checks without a pause."""
    path = tmp_path / "cache"
    run_builder(path)
    builders = [start_builder(path, "a@1", "a@2"), start_builder(path, "b@1")]
    seen, rounds = set(), 0
    try:
        while any(builder.poll() is None for builder in builders) or rounds < 3:
            cache = featcache.open(path)
            features = frozenset(cache.manifest.features)
            seen.add(features)
            with cache.reader(sorted(features), threads=2) as reader:
                out = reader.allocate(len(cache))
                reader.read(range(len(cache)), out)
            slots = cache.slots(range(len(cache)))
            for array, got in out.items():
                assert np.array_equal(got, expected(cache.manifest, array, SKIPPED)[slots]), array
            rounds += 1
    finally:
        errors = [builder.communicate(timeout=120)[1] for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0], errors
    # Each builder's features appear together, never one by one.
    base = {"key", "label", "tiny@5", "vae/moments"}
    allowed = [base, base | {"a@1", "a@2"}, base | {"b@1"}, base | {"a@1", "a@2", "b@1"}]
    assert all(set(features) in allowed for features in seen)
    assert verify(path).ok
    assert not (path / ".featcache").exists()


def test_rm_while_a_reader_reads(tmp_path: Path) -> None:
    from featcache.share.manage import remove_features

    path = build(tmp_path / "cache")
    cache = featcache.open(path)
    reader = cache.reader(["tiny@5"])
    out = reader.allocate(1)
    for index in (0, 16, 32, 48):
        reader.read([index], out)
    remove_features(path, ["tiny@5"])
    reader.read([20], out)  # its shard is open already
    assert np.array_equal(out["tiny@5"][0], expected(cache.manifest, "tiny@5")[20])
    with pytest.raises(CacheError, match="does not hold tiny@5"):
        featcache.open(path).reader(["tiny@5"])
    with pytest.raises(CacheError, match="cannot be read"):
        cache.reader(["tiny@5"]).read([20], out)
