"""What one killed command leaves is never taken by another for its own work, and never in the way of undoing it."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from store_helpers import SHARD_SIZE, base_features, build, tokens, tree, values, write_all

import featcache
from featcache.errors import CacheError
from featcache.share import manage, trash
from featcache.share import verification as verified
from featcache.share import verify as verification
from featcache.share.verify import verify
from featcache.store import files, locks
from featcache.store.manifest import FeatureSpec, Manifest
from featcache.store.root import read_root
from featcache.store.writer import CacheWriter, publish
from featcache.store.writers import open_writer, repair_writer

OTHER = tokens(provenance={"encoder": "tiny@5", "weights": "1" * 64})


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_fsync", lambda fd: None)


def killed_repair(path: Path) -> None:
    """Shards 0 and 1 of a feature written again and journaled, and then the process is gone."""
    writer = repair_writer(path, {"tiny@5": [0, 1]})
    write_all(writer, [tokens()])
    writer.close()


def killed_removal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gone from the root document; its files are still where they were."""

    def stop(*_: object) -> int:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(trash, "settle", stop)
        with pytest.raises(Killed):
            manage.remove_features(path, ["tiny@5"])


def write_other(writer: CacheWriter, spec: FeatureSpec) -> None:
    for shard in writer.pending():
        arrays = {a[len(spec.name) :]: 1 + values(a, *d, writer.slots(shard)) for a, d in spec.arrays.items()}
        writer.write_shard(spec.name, shard, arrays)


def test_shards_of_a_dead_repair_are_not_those_of_a_later_build(tmp_path: Path, monkeypatch) -> None:
    path = build(tmp_path / "cache")
    killed_repair(path)
    killed_removal(path, monkeypatch)
    with open_writer(path) as writer:
        writer.begin([OTHER])
        assert writer.pending() == [0, 1, 2, 3]
        write_other(writer, OTHER)
        writer.finish()
    assert verify(path).ok
    with featcache.open(path).reader(["tiny@5"], slots=True) as reader:
        out = reader.allocate(SHARD_SIZE)
        reader.read(range(SHARD_SIZE), out)
    assert (out["tiny@5"] == 1 + values("tiny@5", *OTHER.arrays["tiny@5"], range(SHARD_SIZE))).all()


def test_a_journal_that_does_not_say_of_what_vouches_for_nothing(tmp_path: Path) -> None:
    """As an earlier version leaves it beside a feature that it removed."""
    path = build(tmp_path / "cache")
    killed_repair(path)
    building = path / ".featcache" / "building" / "tiny@5"
    journal = {name: (building / name).read_bytes() for name in files.names_in(building) if name.endswith(".json")}
    assert len(journal) == 2
    shards = tree(path / "tiny@5"), tree(path / "tiny@5.scale")
    manage.remove_features(path, ["tiny@5"], now=True)
    for folder, found in zip(("tiny@5", "tiny@5.scale"), shards, strict=True):
        (path / folder).mkdir()
        for name, data in found.items():
            (path / folder / name).write_bytes(data)
    building.mkdir(parents=True)
    for name, data in journal.items():
        (building / name).write_bytes(data)
    with open_writer(path) as writer:
        writer.begin([OTHER])
        assert writer.pending() == [0, 1, 2, 3]


def test_a_dead_repair_is_not_in_the_way_of_undoing_a_removal(tmp_path: Path) -> None:
    path = build(tmp_path / "cache")
    before = tree(path)
    killed_repair(path)
    manage.remove_features(path, ["tiny@5"])
    assert manage.restore(path) == f"tiny@5 of {path}"
    assert tree(path) == before


@pytest.mark.parametrize("damage", ["flipped", "missing", "unreadable"])
def test_removed_features_stay_though_their_record_is_damaged(tmp_path: Path, monkeypatch, damage: str) -> None:
    path = build(tmp_path / "cache")
    manage.remove_features(path, ["tiny@5"])
    (entry,) = trash.entries(trash.cache_trash(path))
    record = entry.path / "zarr.json"
    if damage == "missing":
        record.unlink()
    elif damage == "flipped":
        data = bytearray(record.read_bytes())
        data[len(data) // 2] ^= 1
        record.write_bytes(data)
    else:
        read = read_root

        def refuse(path: Path) -> Manifest:
            if path == entry.path:
                raise CacheError(f"{record} cannot be read: Stale file handle")
            return read(path)

        monkeypatch.setattr(trash, "read_root", refuse)
    kept = tree(entry.path)
    assert len(kept) > 10
    assert manage.collect_garbage(path) == []
    with pytest.raises(CacheError, match=r"nothing in the trash|cannot be read or is damaged"):
        manage.restore(path)
    assert tree(entry.path) == kept
    monkeypatch.undo()
    if damage == "unreadable":
        manage.restore(path)
        assert verify(path).ok


def test_what_is_in_the_way_of_a_restoration_goes_as_the_error_says(tmp_path: Path, cli) -> None:
    path = build(tmp_path / "cache")
    before = tree(path)
    manage.remove_features(path, ["tiny@5"])
    with open_writer(path) as writer:
        writer.begin([OTHER])
        write_other(writer, OTHER)
        writer.finish()
    with pytest.raises(CacheError, match="in the way") as found:
        manage.restore(path)
    assert found.value.remedy is not None
    words = found.value.remedy.partition(": featcache ")[2].split()
    assert cli("featcache", *words, "--yes").returncode == 0
    manage.restore(path)
    assert tree(path) == before


# A cache that is removed while somebody is at it


def check_that_it_comes_back(path: Path, before: dict[str, bytes]) -> None:
    assert not path.exists()
    manage.restore(path)
    assert {name: data for name, data in tree(path).items() if not name.startswith(".featcache/")} == before


def test_a_removed_cache_is_not_made_again_by_who_waits_for_its_lock(tmp_path: Path) -> None:
    path = build(tmp_path / "cache")
    before = tree(path)
    held = locks.lock(path / ".featcache" / "lock")
    found: list[object] = []

    def wait() -> None:
        try:
            found.append(manage.collect_garbage(path))
        except CacheError as error:
            found.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    trash.folder_trash(tmp_path).mkdir()
    path.rename(trash.folder_trash(tmp_path) / "20260101T000000.000000Z-cache")
    held.release()
    thread.join(10)
    assert isinstance(found[0], CacheError)
    check_that_it_comes_back(path, before)


def test_a_removed_cache_is_not_made_again_by_a_verification(tmp_path: Path, monkeypatch) -> None:
    path = build(tmp_path / "cache")
    before = tree(path)
    check, n_checked = verification._check_shard, 0

    def check_and_remove(job: Any) -> Any:
        nonlocal n_checked
        n_checked += 1
        if n_checked == 3:
            manage.remove_cache(path)
        return check(job)

    monkeypatch.setattr(verification, "_check_shard", check_and_remove)
    with pytest.raises(CacheError, match="there is no cache"):
        verify(path, remember=True, threads=1)
    check_that_it_comes_back(path, before)


def test_a_removed_cache_is_not_made_again_by_a_record(tmp_path: Path) -> None:
    path = build(tmp_path / "cache")
    before = tree(path)
    entry = verified.of_report(verify(path), None)
    assert entry is not None
    manage.remove_cache(path)
    with pytest.raises(CacheError):
        verified.record(path, entry)
    check_that_it_comes_back(path, before)


def test_an_empty_folder_is_not_in_the_way(tmp_path: Path) -> None:
    path = build(tmp_path / "cache")
    before = tree(path)
    manage.remove_cache(path)
    path.mkdir()
    manage.restore(path)
    assert tree(path) == before
    path.with_name("empty").mkdir()
    with pytest.raises(CacheError):
        manage.restore(path.with_name("empty"))
    assert path.with_name("empty").is_dir()


def test_gc_leaves_what_is_no_cache(tmp_path: Path) -> None:
    """A folder of some zarr array or other, alone and among caches."""
    array = tmp_path / "array"
    array.mkdir()
    (array / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    (array / "SHA256SUMS.part").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(CacheError, match="not a featcache cache"):
        manage.collect_garbage(array)
    said: list[str] = []
    assert manage.collect_garbage(tmp_path, warn=said.append) == []
    assert len(said) == 1 and "not a featcache cache" in said[0]
    assert tree(tmp_path) == before


def test_a_repair_does_not_keep_builders_waiting_while_it_reads(tmp_path: Path, monkeypatch) -> None:
    path = build(tmp_path / "cache")
    before = tree(path)
    (path / "tiny@5" / "SHA256SUMS").unlink()
    (path / "tiny@5" / "BLOCKS").unlink()
    (path / "tiny@5" / "zarr.json").unlink()
    hashes_of, free = files.hashes_of, []

    def hashes(shard: Path) -> files.Hashes:
        held = locks.try_lock(path / ".featcache" / "lock") if (path / ".featcache").exists() else None
        assert held is not None or not (path / ".featcache").exists()
        if held is not None:
            held.release()
        free.append(shard)
        return hashes_of(shard)

    monkeypatch.setattr(files, "hashes_of", hashes)
    rewritten = verification.repair_metadata(path)
    assert len(free) == 4
    assert sorted(rewritten) == ["tiny@5/BLOCKS", "tiny@5/SHA256SUMS", "tiny@5/zarr.json"]
    assert tree(path) == before


@pytest.mark.parametrize("stays", [True, False], ids=["its folder stays", "its folder goes"])
@pytest.mark.parametrize("number", [0, 3], ids=["label", "tiny@5"])
def test_a_build_publishes_without_what_was_removed_meanwhile(tmp_path: Path, number: int, stays: bool) -> None:
    """Declared and complete when the build began: published again, without checksums, it made the cache unreadable."""
    path, complete = build(tmp_path / "cache"), base_features()[number]
    with open_writer(path) as writer:
        writer.begin([complete, tokens("new@1")])
        write_all(writer, [tokens("new@1")])
        for array in complete.arrays if stays else ():
            (path / array / "a user's own").write_text("mine")
        manage.remove_features(path, [complete.name])
        assert complete.name not in writer.finish().features
    left = {spec.name for spec in base_features()} - {complete.name}
    assert featcache.open(path).manifest.features.keys() == left | {"new@1"}
    manage.restore(path)
    assert complete.name in featcache.open(path).manifest.features


def test_a_root_document_that_would_not_open_is_not_published(tmp_path: Path) -> None:
    path = build(tmp_path / "cache")
    before = tree(path)
    manifest = featcache.open(path).manifest
    with pytest.raises(CacheError, match="checksums must be one for each"):
        publish(path, replace(manifest, checksums={}, blocks={}), set())
    assert tree(path) == before


def test_who_comes_second_to_remove_a_cache_is_told(tmp_path: Path) -> None:
    path = build(tmp_path / "cache")
    held = locks.lock(path / ".featcache" / "lock")
    said: list[object] = []

    def remove() -> None:
        try:
            said.append(manage.remove_cache(path))
        except CacheError as error:
            said.append(error)

    threads = [threading.Thread(target=remove) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    held.release()
    for thread in threads:
        thread.join(10)
    (error,) = (one for one in said if isinstance(one, CacheError))
    assert "was removed meanwhile" in error.what
    assert not path.exists() and len(trash.entries(trash.folder_trash(tmp_path))) == 1


def test_an_odd_folder_among_the_builds_holds_nobody_up(tmp_path: Path) -> None:
    path = build(tmp_path / "cache")
    (path / ".featcache" / "building" / "..odd").mkdir(parents=True)
    info = manage.cache_info(path)
    assert info.problem is None and info.unfinished == ()
    with open_writer(path) as writer:
        writer.begin([tokens("new@1")])
        write_all(writer, [tokens("new@1")])
        writer.finish()
    assert verify(path).ok
