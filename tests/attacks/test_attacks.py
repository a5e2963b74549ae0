"""A few seeds of every campaign; `python -m tests.attacks` runs them at length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.attacks import concurrency, flips, fuzz, fuzz_store, kills, links, power
from tests.attacks.campaign import Tally
from tests.attacks.lab import Lab
from tests.attacks.processes import Processes


def nothing_failed(tally: Tally, at_least: int) -> None:
    assert tally.n_trials >= at_least
    assert not tally.failures, "\n".join(f"{f['where']}\n    {f['problem']}" for f in tally.failures)


def test_kills(server: Processes, lab: Lab) -> None:
    tally = Tally()
    only = ["build", "build into", "repair", "rm features", "rm cache", "pull", "convert to wds"]
    kills.run(server, lab, tally, count=7, seed=1, only=only)
    nothing_failed(tally, 7)


def test_power_losses(server: Processes, lab: Lab) -> None:
    tally = Tally()
    only = ["build wds", "build into", "rm features", "repair"]
    power.run(server, lab, tally, count=48, seed=1, only=only, repeat_every=24)
    nothing_failed(tally, 48)


def test_flips(tmp_path: Path) -> None:
    tally = Tally()
    flips.run(tally, tmp_path, count=80, seed=1)
    nothing_failed(tally, 80)


def test_pairs_of_faults(server: Processes, tmp_path: Path) -> None:
    tally = Tally()
    flips.run_pairs(server, tally, tmp_path, count=4, seed=1)
    nothing_failed(tally, 4)


@pytest.mark.parametrize("kind", fuzz_store.KINDS)
def test_malformed_files_of_the_store(kind: str, tmp_path: Path) -> None:
    quick = ("root document", "manifest", "checksum file", "shard index", "compressed sample")
    count = 200 if kind in quick else 8
    assert fuzz_store.run(kind, count, 1, tmp_path / "f") == []


def test_links_and_foreign_files(server: Processes, lab: Lab) -> None:
    tally = Tally()
    only = ["build into", "rm features", "gc", "pull more", "verify", "push from"]
    links.run(server, lab, tally, count=12, seed=1, only=only)
    nothing_failed(tally, 12)


def test_processes_beside_each_other(server: Processes, lab: Lab) -> None:
    tally = Tally()
    only = ["build tiny@5 | rm tiny@2", "rm tiny@2 | verify"]
    concurrency.run(server, lab, tally, count=3, seed=1, only=only)
    nothing_failed(tally, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("campaign", "count"), [(kills.run, 120), (power.run, 300), (links.run, 200), (concurrency.run, 60)]
)
def test_more_of_each(whole_server: Processes, whole_lab: Lab, campaign: Callable[..., int], count: int) -> None:
    tally = Tally()
    campaign(whole_server, whole_lab, tally, count=count, seed=2)
    nothing_failed(tally, count)


@pytest.mark.slow
def test_more_pairs_of_faults(whole_server: Processes, tmp_path: Path) -> None:
    tally = Tally()
    flips.run_pairs(whole_server, tally, tmp_path, count=150, seed=2)
    nothing_failed(tally, 150)


@pytest.mark.slow
def test_more_malformed_input(tmp_path: Path) -> None:
    tally = Tally()
    fuzz.run(tally, tmp_path, count=30_000, seed=2)
    nothing_failed(tally, 30_000)
