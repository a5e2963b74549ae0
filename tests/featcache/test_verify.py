"""Verification beside builders, of hostile caches, of samples, of what changed; and the record of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_helpers import add, base_features, build, corrupt, dataset, tokens, tree, write_all
from typer.testing import CliRunner

from featcache.errors import CacheError, UserError
from featcache.share import manage
from featcache.share import verification as verified
from featcache.share import verify as verification
from featcache.share.records import last, record
from featcache.share.transfer import pull, push, verify_remote
from featcache.share.verification import Verification
from featcache.share.verify import parse_fraction, repair_metadata, verify
from featcache.store import FeatureSpec, files
from featcache.store.layout import canonical_json
from featcache.store.places import LocalLocation
from featcache.store.root import cache_digest, read_root, root_bytes
from featcache.store.writers import create_writer
from tests.told import Told

WDS = {"format": "wds"}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_fsync", lambda fd: None)


# Beside others


def in_background(work, until: threading.Event) -> threading.Thread:
    def loop() -> None:
        while not until.is_set():
            work()

    thread = threading.Thread(target=loop)
    thread.start()
    return thread


def test_beside_a_builder_that_publishes_and_removes(tmp_path: Path) -> None:
    """Features come and go while the cache is checked: it is sound at every moment."""
    path = build(tmp_path / "cache", count=6, shard_size=4)
    changes = 0

    def publish() -> None:
        nonlocal changes
        add(path, [tokens("new@1")])
        manage.remove_features(path, ["new@1"], now=True)
        changes += 1

    done = threading.Event()
    thread = in_background(publish, done)
    sound = busy = 0
    try:
        for _ in range(60):
            try:
                report = verify(path)
            except CacheError as error:
                assert "changed 10 times" in error.what
                busy += 1
                continue
            assert report.ok, list(map(str, report.problems))
            sound += 1
    finally:
        done.set()
        thread.join()
    assert changes > 3
    assert sound > busy


@pytest.mark.parametrize("added", ["new@1", "gone@1"], ids=["another", "the-same-again"])
def test_a_root_that_changes_between_the_reads(tmp_path: Path, monkeypatch, added: str) -> None:
    """Whatever file is opened just then: a feature goes, and two opened files later one comes, perhaps the same."""
    whole = build(tmp_path / "whole", [*base_features()[:1], tokens("gone@1")], count=2, shard_size=2)
    path = tmp_path / "cache"
    real, state = os.open, {"calls": 0, "at": 0, "busy": False}

    def publishing(*arguments, **options):
        if not state["busy"]:
            state["busy"] = True
            state["calls"] += 1
            if state["calls"] == state["at"]:
                manage.remove_features(path, ["gone@1"], now=True)
            if state["calls"] == state["at"] + 2:
                add(path, [tokens(added)])
            state["busy"] = False
        return real(*arguments, **options)

    for at in range(1, 400):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, path)
        state.update(calls=0, at=at)
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", publishing)
            report = verify(path, threads=1)
        assert report.ok, (at, list(map(str, report.problems)))
        if state["calls"] < at:
            break
    assert 8 < at < 399


def test_damage_is_still_found_beside_a_publication(tmp_path: Path, monkeypatch) -> None:
    path = build(tmp_path / "cache")
    corrupt(path / "tiny@5" / "c.1.0.0", lambda data: data.__setitem__(9, data[9] ^ 1))
    real = verification._check_array
    published: list[object] = []

    def publishing(*arguments):
        if not published:
            published.append(add(path, [tokens("new@1")]))
        return real(*arguments)

    monkeypatch.setattr(verification, "_check_array", publishing)
    report = verify(path)
    assert published
    assert report.damaged == {"tiny@5": [1]}
    assert len(report.problems) == 1
    assert report.digest == cache_digest(read_root(path))


def test_a_cache_that_never_holds_still_is_not_called_damaged(tmp_path: Path, monkeypatch) -> None:
    path = build(tmp_path / "cache")
    monkeypatch.setattr(verification, "_unchanged", lambda *_: False)
    assert verify(path).ok
    (path / "tiny@5" / "c.1.0.0").unlink()
    with pytest.raises(CacheError, match="changed 10 times"):
        verify(path)


def test_a_cache_removed_meanwhile(tmp_path: Path, monkeypatch) -> None:
    path = build(tmp_path / "cache")
    real = verification._check_array

    def removing(*arguments):
        if path.exists():
            manage.remove_cache(path)
        return real(*arguments)

    monkeypatch.setattr(verification, "_check_array", removing)
    with pytest.raises(CacheError, match="no cache at"):
        verify(path)


def test_a_features_temporary_files_are_no_damage(tmp_path: Path) -> None:
    path = build(tmp_path / "cache")
    (path / "tiny@5" / "c.1.0.0.0123456789abcdef.part").write_bytes(b"a repair under way")
    assert verify(path).ok
    (path / "tiny@5" / "c.9.0.0.0123456789abcdef.part").write_bytes(b"nobody's")
    assert [p.what for p in verify(path).problems] == ["does not belong here"]


def test_features_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="does not hold nope@1"):
        verify(build(tmp_path / "cache"), features=["nope@1"])


# Hostile caches


@pytest.mark.parametrize("kind", ["fifo", "link", "folder", "device"])
@pytest.mark.parametrize("victim", ["tiny@5/c.1.0.0", "tiny@5/SHA256SUMS", "tiny@5/zarr.json", "tiny@5/BLOCKS"])
def test_only_regular_files_are_read(tmp_path: Path, kind: str, victim: str) -> None:
    path = build(tmp_path / "cache")
    file = path / victim
    if not file.exists():
        pytest.skip("this cache has no such file")
    (tmp_path / "copy").write_bytes(file.read_bytes())
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "link":
        file.symlink_to(tmp_path / "copy")
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero")
    found = []
    thread = threading.Thread(target=lambda: found.append(verify(path)), daemon=True)
    thread.start()
    thread.join(20)
    assert found, "it hangs"
    assert str(file) in {problem.path for problem in found[0].problems}


def test_a_link_in_place_of_an_array_is_not_followed(tmp_path: Path) -> None:
    path = build(tmp_path / "cache")
    (path / "tiny@5").rename(tmp_path / "elsewhere")
    (path / "tiny@5").symlink_to(tmp_path / "elsewhere")
    assert any("link" in problem.what for problem in verify(path).problems)


def hostile_manifest(path: Path, shards: int) -> None:
    """A manifest of a few kilobytes that claims `shards` shards; there is not one."""
    source = read_root(build(path, [tokens()], count=4, shard_size=2))
    shutil.rmtree(path)
    path.mkdir()
    huge = replace(source, dataset=replace(source.dataset, count=shards), shard_size=1)
    (path / "zarr.json").write_bytes(root_bytes(huge))


def peak_mib(code: str, *arguments: str) -> float:
    """Most memory of a process of its own beyond what the imports take."""
    program = textwrap.dedent(
        f"""
        import resource, sys
        from featcache.share.verify import verify
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        {code}
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
        """
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_million_shards_in_a_small_manifest(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    hostile_manifest(path, 1 << 20)
    assert (path / "zarr.json").stat().st_size < 8192
    started = time.monotonic()
    peak = peak_mib(
        "r = verify(sys.argv[1]); assert not r.ok and len(r.problems) <= 100_100, len(r.problems)", str(path)
    )
    assert peak < 150
    assert time.monotonic() - started < 120


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(verification, "MAX_PROBLEMS", 50)
    path = tmp_path / "cache"
    hostile_manifest(path, 1 << 20)
    submitted = []
    real = verification._check_shard

    def counted(job: Any) -> Any:
        submitted.append(job.entry.shard)
        return real(job)

    monkeypatch.setattr(verification, "_check_shard", counted)
    report = verify(path, threads=2)
    assert len(submitted) < 100
    assert report.problems[-1].what.endswith("the rest was not checked")


def test_a_bomb_of_keys(tmp_path: Path) -> None:
    """Samples of many megabytes that compress to nothing: as keys they are refused before they are read."""
    path = tmp_path / "cache"
    spec = FeatureSpec(name="key", shape=(8 << 20,), codec="raw", dtype="uint8")
    with create_writer(path, dataset(4), shard_size=4, compressor="zstd") as writer:
        writer.begin([spec])
        writer.write_shard("key", 0, {"": np.zeros((4, 8 << 20), np.uint8)})
        writer.finish()
    peak = peak_mib("r = verify(sys.argv[1]); assert 'no paths' in r.problems[0].what, r", str(path))
    assert peak < 40


def test_labels_of_an_odd_shape_are_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    spec = FeatureSpec(name="label", shape=(3,), codec="raw", dtype="float32")
    with create_writer(path, dataset(4), shard_size=4) as writer:
        writer.begin([spec])
        writer.write_shard("label", 0, {"": np.zeros((4, 3), np.float32)})
        writer.finish()
    assert "not one integer" in verify(path).problems[0].what


def test_a_shard_that_claims_to_be_endless(tmp_path: Path) -> None:
    path = build(tmp_path / "cache", compressor="zstd")
    victim = path / "tiny@5" / "c.1.0.0"
    os.truncate(victim, 1 << 41)
    started = time.monotonic()
    report = verify(path)
    assert time.monotonic() - started < 20
    assert report.damaged == {"tiny@5": [1]}


# Samples


def big(path: Path, **options) -> Path:
    """Shards of some blocks each."""
    spec = FeatureSpec(name="wide@1", shape=(64, 512), codec="fp32")
    with create_writer(path, dataset(40), shard_size=20, **options) as writer:
        writer.begin([spec])
        for shard in writer.pending():
            values = np.random.default_rng(shard).standard_normal((20, 64, 512)).astype(np.float32)
            writer.write_shard("wide@1", shard, {"": values})
        writer.finish()
    return path


@pytest.mark.parametrize("options", [{}, WDS], ids=["zarr", "wds"])
def test_a_sample_reads_its_part_and_is_reproducible(tmp_path: Path, options) -> None:
    path = build(tmp_path / "cache", count=200, shard_size=2, **options)
    whole = verify(path)
    read = Told()
    report = verify(path, fraction=0.1, seed=5, progress=read)
    assert report.ok
    assert (report.fraction, report.seed) == (0.1, 5)
    arrays = 1 if options else len(read_root(path).arrays)
    assert len(read.counts) == 10 * arrays
    assert report.n_unread == 90 * arrays
    assert sum(read.counts) < 0.2 * whole.n_bytes
    fresh = {verify(path, fraction=0.1).seed for _ in range(3)}
    assert len(fresh) == 3


def test_a_sample_finds_damage_as_often_as_it_must(tmp_path: Path) -> None:
    path = build(tmp_path / "cache", [tokens()], count=40, shard_size=2)
    corrupt(path / "tiny@5" / "c.7.0.0", lambda data: data.__setitem__(3, data[3] ^ 1))
    found = [not verify(path, fraction=0.25, seed=seed).ok for seed in range(100)]
    assert 10 <= sum(found) <= 42  # 25 expected; both bounds are more than three standard deviations away
    seed = found.index(True)
    assert verify(path, fraction=0.25, seed=seed).damaged == {"tiny@5": [7]}
    assert verify(path, fraction=1.0).damaged == {"tiny@5": [7]}


def test_a_sample_of_blocks(tmp_path: Path) -> None:
    path = big(tmp_path / "cache")
    if not read_root(path).blocks:
        pytest.skip("this cache has no hashes of blocks")
    read = Told()
    assert verify(path, fraction=0.2, seed=1, progress=read).ok
    n_blocks = 2 * 3  # 2.6 MB a shard
    assert sum(read.counts) <= -(-n_blocks // 5) * (1 << 20)
    corrupt(path / "wide@1" / "c.1.0.0", lambda data: data.__setitem__((2 << 20) + 5, data[(2 << 20) + 5] ^ 1))
    found = [verify(path, fraction=1 / 6, seed=seed).damaged for seed in range(60)]
    assert {json.dumps(d) for d in found} == {"{}", '{"wide@1": [1]}'}
    assert 2 <= sum(map(bool, found)) <= 22  # 10 expected


def test_block_hashes_that_disagree_with_the_checksum_are_found(tmp_path: Path) -> None:
    path = big(tmp_path / "cache")
    manifest = read_root(path)
    if not manifest.blocks:
        pytest.skip("this cache has no hashes of blocks")
    corrupt(path / "wide@1" / "BLOCKS", lambda data: data.__setitem__(-1, data[-1] ^ 1))
    assert verify(path).problems
    lying = {"wide@1": hashlib.sha256((path / "wide@1" / "BLOCKS").read_bytes()).hexdigest()}
    (path / "zarr.json").write_bytes(root_bytes(replace(manifest, blocks=lying)))
    assert [p.what for p in verify(path).problems] == ["its bytes do not match the recorded hashes of its blocks"]


def test_lost_block_hashes_are_made_again(tmp_path: Path) -> None:
    path = big(tmp_path / "cache")
    if not read_root(path).blocks:
        pytest.skip("this cache has no hashes of blocks")
    before = tree(path)
    for name in ("BLOCKS", "SHA256SUMS"):
        (path / "wide@1" / name).unlink()
    assert sorted(repair_metadata(path)) == ["wide@1/BLOCKS", "wide@1/SHA256SUMS"]
    assert tree(path) == before


@pytest.mark.parametrize(("text", "value"), [("1%", 0.01), ("0.5", 0.5), ("100%", 1.0), (" 12.5 %", 0.125)])
def test_parts(text: str, value: float) -> None:
    assert parse_fraction(text) == value


@pytest.mark.parametrize("text", ["0", "0%", "-1%", "101%", "2", "nan", "inf%", "some", "%", ""])
def test_odd_parts_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="1%"):
        parse_fraction(text)


# Since the last time


@pytest.mark.parametrize("options", [{}, WDS, {"compressor": "zstd"}], ids=["zarr", "wds", "zstd"])
def test_only_what_changed_is_read(tmp_path: Path, options) -> None:
    path = build(tmp_path / "cache", **options)
    n_shards = sum(name.endswith(".tar") or Path(name).name.startswith("c.") for name in tree(path))
    first = Told()
    report = verify(path, since_last=True, remember=True, progress=first)
    assert (report.ok, len(first.counts), report.n_unread) == (True, n_shards, 0)
    assert first.tasks == [("checking", None, 0, "bytes")]
    second = Told()
    report = verify(path, since_last=True, remember=True, progress=second)
    assert (report.ok, len(second.counts), report.n_unread) == (True, 0, n_shards)
    victim = path / ("00000001.tar" if options == WDS else "tiny@5/c.1.0.0")
    corrupt(victim, lambda data: data.__setitem__(40, data[40] ^ 1))
    report = verify(path, since_last=True, remember=True)
    assert {p.path for p in report.problems} == {str(victim)}
    report = verify(path, since_last=True, remember=True)  # damage is not forgotten
    assert not report.ok
    corrupt(victim, lambda data: data.__setitem__(40, data[40] ^ 1))
    third = Told()
    assert verify(path, since_last=True, remember=True, progress=third).ok
    assert len(third.counts) == 1


def test_a_change_that_keeps_size_and_time_is_seen(tmp_path: Path) -> None:
    path = build(tmp_path / "cache")
    verify(path, remember=True)
    victim = path / "tiny@5" / "c.1.0.0"
    status = victim.stat()
    corrupt(victim, lambda data: data.__setitem__(40, data[40] ^ 1))
    os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert verify(path, since_last=True).damaged == {"tiny@5": [1]}


def test_what_is_remembered_is_of_these_bytes_only(tmp_path: Path) -> None:
    path = build(tmp_path / "cache")
    verify(path, remember=True)
    manage.remove_features(path, ["tiny@5"], now=True)
    add(path, [tokens(codec="fp16")])
    read = Told()
    assert verify(path, since_last=True, remember=True, progress=read).ok
    assert len(read.counts) == len(list((path / "tiny@5").glob("c.*")))
    for file in (path / ".featcache" / "sound").iterdir():
        file.write_bytes(b"\xff" * file.stat().st_size)
    read.counts.clear()
    assert verify(path, since_last=True, progress=read).ok
    assert len(read.counts) == sum(Path(name).name.startswith("c.") for name in tree(path))


def test_a_sample_is_not_remembered_as_the_whole(tmp_path: Path) -> None:
    path = big(tmp_path / "cache")
    verify(path, fraction=0.2, seed=1, remember=True)
    if read_root(path).blocks:
        assert verify(path, since_last=True).n_unread == 0


def test_a_cache_is_left_as_it_was_unless_asked(tmp_path: Path) -> None:
    path = build(tmp_path / "cache")
    before = tree(path)
    verify(path, since_last=True)
    verify(path, fraction=0.5)
    assert tree(path) == before


# The record


def entry(**changes) -> Verification:
    values = {"at": "2026-11-21T14:30:00Z", "by": "ann@lab", "version": "0.1.0", "digest": "0" * 64, "mode": "whole"}
    return Verification(**{**values, "n_files": 3, "n_bytes": 4, "n_problems": 0, **changes})


def test_the_record_keeps_the_latest_and_no_digest_covers_it(tmp_path: Path) -> None:
    path = build(tmp_path / "cache")
    before, digest = tree(path), cache_digest(read_root(path))
    for seed in range(verified.MAX_ENTRIES + 5):
        made = verified.of_report(verify(path, fraction=0.5, seed=seed), ["tiny@5"])
        assert made is not None
        verified.record(path, made)
    found = verified.read(LocalLocation(path))[0]
    assert [e.seed for e in found] == list(range(5, verified.MAX_ENTRIES + 5))
    assert (found[-1].digest, found[-1].mode, found[-1].fraction) == (digest, "sample", 0.5)
    assert found[-1].sound
    assert "@" in found[-1].by
    assert {n: b for n, b in tree(path).items() if not n.startswith(".featcache/")} == before
    assert cache_digest(read_root(path)) == digest
    assert "changed since" not in found[-1].words(read_root(path))
    add(path, [tokens("new@1")])
    assert "changed since" in found[-1].words(read_root(path))
    assert verified.read(LocalLocation(path))[0] == found  # a builder that finishes leaves it


def test_a_record_is_bounded(tmp_path: Path) -> None:
    long = entry(by="x" * 256, features=tuple("f" * 120 + f"{i:03d}" for i in range(64)))
    data = verified.dump([long] * 40)
    assert len(data) <= verified.MAX_BYTES
    assert 2 <= len(verified.parse(data, "x")) < 20
    with pytest.raises(CacheError, match="no record"):
        verified.parse(data + b" " * verified.MAX_BYTES, "x")


def odd_records() -> list[object]:
    good = json.loads(verified.dump([entry()]))
    (item,) = good["verifications"]
    changes: list[dict[str, object]] = [
        {"at": "yesterday"},
        {"at": 5},
        {"by": ""},
        {"by": "x" * 300},
        {"digest": "0" * 63},
        {"mode": "none"},
        {"mode": "sample"},
        {"n_files": -1},
        {"n_bytes": 1.5},
        {"n_problems": True},
        {"fraction": 0.5},
        {"seed": -1},
        {"features": "tiny"},
        {"features": [5]},
        {"features": ["x"] * 65},
        {"extra": 1},
    ]
    odd: list[object] = [{**good, "verifications": [{**item, **change}]} for change in changes]
    odd += [{**good, "verifications": [item] * 21}, {**good, "format": 2}, {**good, "more": 1}, [], None, 5]
    odd += [{**good, "verifications": {}}, {**good, "verifications": [5]}]
    return odd


@pytest.mark.parametrize("value", odd_records())
def test_a_damaged_record_is_refused_and_begun_anew(tmp_path: Path, value: object) -> None:
    path = build(tmp_path / "cache", [tokens()], count=2, shard_size=2)
    assert verified.parse(verified.dump([entry()]), "x") == [entry()]
    (path / ".featcache").mkdir()
    (path / verified.NAME).write_bytes(canonical_json(value))
    with pytest.raises(CacheError):
        verified.read(LocalLocation(path))[0]
    verified.record(path, entry())
    assert verified.read(LocalLocation(path))[0] == [entry()]


def test_a_record_behind_a_link_is_not_followed(tmp_path: Path) -> None:
    path = build(tmp_path / "cache")
    (tmp_path / "outside").mkdir()
    (path / ".featcache").symlink_to(tmp_path / "outside")
    with pytest.raises(CacheError, match="link"):
        verified.record(path, entry())
    assert not list((tmp_path / "outside").iterdir())


def test_verify_as_typed(tmp_path: Path, cli) -> None:
    path = build(tmp_path / "cache")
    done = cli("featcache", "verify", "cache", "--sample", "10%", "--seed", "7")
    assert done.returncode == 0, done.stderr
    assert "a sample of 10 %" in done.stdout
    assert "--seed 7" in done.stdout
    assert cli("featcache", "verify", "cache", "--since-last").returncode == 0
    done = cli("featcache", "verify", "cache", "--since-last")
    assert "as they were when last verified" in done.stdout
    assert [e.mode for e in verified.read(LocalLocation(path))[0]] == ["sample", "since-last", "since-last"]
    (path / "tiny@5" / "c.1.0.0").unlink()
    done = cli("featcache", "verify", "cache", "--no-record")
    assert done.returncode == 1
    done = cli("featcache", "info", "cache")
    assert "sound: what had changed" in done.stdout
    done = cli("featcache", "verify", "cache", "--sample", "lots")
    assert (done.returncode, "1%" in done.stderr) == (2, True)
    for odd in (("--seed", "5"), ("--threads", "0"), ("--threads", "-3")):
        assert cli("featcache", "verify", "cache", *odd).returncode == 2


# At a URL


def test_a_sample_of_a_remote_cache_and_its_record(tmp_path: Path, s3_bucket: str, cli) -> None:
    path = big(tmp_path / "cache")
    url = f"s3://{s3_bucket}/caches/wide"
    push(str(path), url)
    read = Told()
    report = verify_remote(url, fraction=0.2, seed=3, progress=read)
    assert report.ok
    assert (report.seed, report.digest) == (3, cache_digest(read_root(path)))
    assert 0 < sum(read.counts) < 0.75 * verify(path).n_bytes
    assert sum(read.counts) == sum(_read_by(path, 3))  # the same blocks as of a local copy
    assert last(url) is None
    assert record(url, report, None) is None
    done = cli("featcache", "verify", url, "--record")
    assert done.returncode == 0, done.stderr
    found = last(url)
    assert found is not None
    assert (found.mode, found.digest) == ("whole", report.digest)
    pulled = tmp_path / "pulled"
    pull(url, pulled)
    assert cache_digest(read_root(pulled)) == report.digest
    assert "can only be read" in (record("http://127.0.0.1:9/x", report, None) or "")


def _read_by(path: Path, seed: int) -> list[int]:
    read = Told()
    verify(path, fraction=0.2, seed=seed, progress=read)
    return read.counts


def test_a_damaged_root_document_is_not_to_be_repaired(tmp_path: Path, cli) -> None:
    """What is printed is what can be done: the file is copied from elsewhere, or the cache is made anew."""
    path = build(tmp_path / "x")
    before = tree(path)
    root = bytearray((path / "zarr.json").read_bytes())
    root[len(root) // 2] ^= 1
    (path / "zarr.json").write_bytes(root)
    found = cli("featcache", "verify", "x", "--no-record")
    assert found.returncode == 1
    assert "copy that file from another copy" in found.stdout and "repair" not in found.stdout
    for words in (("repair", "x"), ("repair", "x", "--from", str(path)), ("info", "x")):
        refused = cli("featcache", *words)
        assert refused.returncode == 2
        assert refused.stderr.startswith("error: x/zarr.json") and "copy that file from another copy" in refused.stderr
    assert cli("featcache", "rm", "x", "--yes", "--now").returncode == 2  # nothing says what is the cache's
    assert cli("featcache", "rm", "x", "--yes").returncode == 0
    assert cli("featcache", "restore", "x").returncode == 0
    (path / "zarr.json").write_bytes(before["zarr.json"])
    assert verify(path).ok


@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "version 1"])
def test_a_sample_finds_every_shard_that_is_missing_or_cut_short(tmp_path: Path, blocks: bool) -> None:
    """It costs no reading."""
    path = tmp_path / "x"
    with create_writer(path, dataset(32), shard_size=1) as writer:
        writer.begin([tokens()], without_blocks=() if blocks else ["tiny@5"])
        write_all(writer, [tokens()])
        writer.finish()
    read = Told()
    report = verify(path, fraction=0.05, seed=1, progress=read)
    assert report.ok and report.n_unread == 60 and len(read.counts) == 4
    for shard, data in ((7, None), (20, b""), (21, b"x"), (22, (path / "tiny@5/c.22.0.0").read_bytes() + b"x")):
        victim = path / "tiny@5" / f"c.{shard}.0.0"
        sound = victim.read_bytes()
        victim.unlink() if data is None else victim.write_bytes(data)
        for seed in range(3):
            assert verify(path, fraction=0.05, seed=seed).damaged == {"tiny@5": [shard]}
        victim.write_bytes(sound)


def test_a_seed_that_cannot_be_recorded_is_refused(tmp_path: Path, cli) -> None:
    path = build(tmp_path / "x")
    assert cli("featcache", "verify", "x").returncode == 0
    assert cli("featcache", "verify", "x", "--sample", "1%", "--seed", str(1 << 64)).returncode == 2
    assert cli("featcache", "verify", "x", "--sample", "1%", "--seed", str((1 << 64) - 1)).returncode == 0
    entries, _ = verified.read(LocalLocation(path))
    assert [entry.mode for entry in entries] == ["whole", "sample"]


# A folder of caches


def typed_verify(*words: str) -> tuple[int, str]:
    from featcache.cli import app

    result = CliRunner().invoke(app, ["verify", *words])
    return result.exit_code, result.output if result.exception is None else f"{result.output}{result.exception}"


def test_all_caches_of_a_folder_are_checked(tmp_path: Path) -> None:
    for name in ("a", "b"):
        build(tmp_path / name, count=6, shard_size=4)
    begun = create_writer(tmp_path / "c", dataset(count=6), shard_size=4)
    begun.begin(base_features())
    (tmp_path / "photographs").mkdir()
    code, text = typed_verify(str(tmp_path))
    assert code == 0, text
    rows = {line.split()[0].rpartition("/")[2]: line for line in text.splitlines() if line.startswith(str(tmp_path))}
    assert "sound" in rows["a"] and "sound" in rows["b"] and "unfinished" in rows["c"] and "photographs" not in text
    assert last(str(tmp_path / "a")) is not None, "each is recorded"

    corrupt(next((tmp_path / "b").rglob("c.*")), lambda data: data.__setitem__(0, data[0] ^ 1))
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    code, text = typed_verify(str(tmp_path), "--no-record")
    assert code == 1 and "damaged" in text and "1 problem" in text and "a link to nothing" in text
    assert "2 of 4 caches are not sound" in text


@pytest.mark.parametrize("words", [("--repair",), ("--expect", "0" * 64), ("--signed-by", "key.pub")])
def test_what_is_about_one_cache_is_refused_for_several(tmp_path: Path, words: tuple[str, ...]) -> None:
    build(tmp_path / "a", count=6, shard_size=4)
    code, text = typed_verify(str(tmp_path), *words)
    assert code == 1 and f"{words[0]} is about one cache" in text  # the exit code 2 of errors is run_app's


def test_a_cache_that_lost_its_root_is_no_folder_of_caches(tmp_path: Path) -> None:
    path = build(tmp_path / "a", count=6, shard_size=4)
    (path / "zarr.json").unlink()
    assert not manage.holds_caches(path) and not manage.holds_caches(tmp_path / "nothing")
