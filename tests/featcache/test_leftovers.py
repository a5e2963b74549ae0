"""What one killed command leaves is never taken by another for its own work, and never in the way of undoing it."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_helpers import SHARD_SIZE, build, tokens, tree, values, write_all

import featcache
from featcache.store import CacheWriter, FeatureSpec, files, manage, trash
from featcache.store.verify import verify

OTHER = tokens(provenance={"encoder": "tiny@5", "weights": "1" * 64})


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_fsync", lambda fd: None)


def killed_repair(path: Path) -> None:
    """Shards 0 and 1 of a feature written again and journaled, and then the process is gone."""
    writer = CacheWriter.open_for_repair(path, {"tiny@5": [0, 1]})
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
    with CacheWriter.open(path) as writer:
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
    with CacheWriter.open(path) as writer:
        writer.begin([OTHER])
        assert writer.pending() == [0, 1, 2, 3]


def test_a_dead_repair_is_not_in_the_way_of_undoing_a_removal(tmp_path: Path) -> None:
    path = build(tmp_path / "cache")
    before = tree(path)
    killed_repair(path)
    manage.remove_features(path, ["tiny@5"])
    assert manage.restore(path) == f"tiny@5 of {path}"
    assert tree(path) == before
