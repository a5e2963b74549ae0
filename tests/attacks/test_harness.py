"""The attacks themselves: they do what they say, and they see what they are there to see."""

from __future__ import annotations

import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from store_helpers import tree

from featcache.share import verify
from tests.attacks import flips, fuzz_store, power
from tests.attacks.campaign import Tally, dice
from tests.attacks.lab import Lab
from tests.attacks.mutate import change_json
from tests.attacks.processes import Job, Processes
from tests.attacks.scenes import values_of


def write_three(folder: str) -> None:
    """Six operations: three times open and write. Run by the tests below in a process of its own."""
    for name in "abc":
        Path(folder, name).write_bytes(name.encode() * 10)


def loop() -> None:
    while True:
        pass


def job(folder: Path, **changes: object) -> Job:
    argv = ("tests.attacks.test_harness:write_three", str(folder))
    values = {"argv": argv, "folder": str(folder), "watch": str(folder), "output": str(folder.parent / "output")}
    return Job(**{**values, **changes})  # type: ignore[arg-type]


def test_a_process_ends_at_the_exact_operation(server: Processes, work: Path) -> None:
    assert server.run(job(work)).operations == 6
    for path in work.iterdir():
        path.unlink()
    states = {1: {}, 2: {"a": b""}, 3: {"a": b"a" * 10}, 6: {"a": b"a" * 10, "b": b"b" * 10, "c": b""}}
    for at, expected in states.items():
        ended = server.run(job(work, action="kill", at=at))
        assert ended.killed
        assert ended.operations == at
        assert tree(work) == expected
        for path in work.iterdir():
            path.unlink()
    assert server.run(job(work, action="tear", at=4)).killed
    assert tree(work) == {"a": b"a" * 10, "b": b"b" * 5}


def test_a_process_stops_and_goes_on(server: Processes, work: Path) -> None:
    pid = server.start(job(work, action="stop", at=3))
    assert server.wait(pid).how == "stopped"
    assert set(tree(work)) == {"a"}
    import os

    os.kill(pid, signal.SIGCONT)
    assert server.wait(pid).code == 0
    assert set(tree(work)) == {"a", "b", "c"}


def test_a_process_that_hangs_is_ended(server: Processes, work: Path) -> None:
    assert server.run(job(work, argv=("tests.attacks.test_harness:loop",)), timeout_s=0.2).how == "hung"


def test_a_log_without_syncs_loses_data(server: Processes, lab: Lab, work: Path) -> None:
    """The simulation finds what is wrong with a build that syncs nothing, and nothing wrong with the real one."""
    recorded = power.record(server, lab.measured(server, lab.scene("build into")), work)
    careless = replace(recorded, log=[o for o in recorded.log if o.kind != "s"])
    found: dict[bool, list[str]] = {}
    for one in (recorded, careless):
        chance, problems = dice("careless"), []
        for index, (moment, _, folder) in enumerate(power.states(one, chance, work)):
            if index == (90 if one is careless else 12):
                break
            problems += power.lose_power(server, one, moment, folder, repeats=False)
        found[one is careless] = problems
    assert found[False] == []
    assert len(found[True]) > 5


def test_flips_that_verify_misses_are_reported(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = flips.caches(work)["zarr"]
    truth, names = values_of(path), sorted(tree(path))
    monkeypatch.setattr(verify, "_check_shard", lambda _: verify._Result(None, 0))
    shards = [name for name in names if not flips.is_metadata(name)]
    assert any("does not name it" in w for n in range(5) for w in flips.flip_once(path, truth, shards, dice(n)))


def test_a_parser_that_breaks_is_reported(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(data: bytes, names: list[str], where: str) -> list[str]:
        return [line.split()[0].decode() for line in data.splitlines()]

    monkeypatch.setattr(fuzz_store, "parse_checksums", broken)
    found = fuzz_store.run("checksum file", 60, 0, work / "f")
    assert any(line.startswith(("IndexError", "Wrong", "ValueError", "Unicode")) for line in found)


def test_tallies_and_dice() -> None:
    tally = Tally()
    for _ in range(9):
        tally.trial("scene", ["kind: detail"], "where")
    assert tally.to_json()["failed"] == {"scene: kind": 9}
    assert len(tally.failures) == 5
    assert dice("a", 1).random() == dice("a", 1).random() != dice("a", 2).random()
    chance = random.Random(0)
    assert len({change_json(b'{"a": [1, 2], "b": "x"}', chance) for _ in range(50)}) > 25
