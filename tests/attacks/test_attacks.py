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
    kills.run(server, lab, tally, count=14, seed=1, only=only)
    nothing_failed(tally, 14)


def test_power_losses(server: Processes, lab: Lab) -> None:
    tally = Tally()
    only = ["build wds", "build into", "rm features", "repair"]
    power.run(server, lab, tally, count=72, seed=1, only=only, repeat_every=24)
    nothing_failed(tally, 72)


def test_flips(tmp_path: Path) -> None:
    tally = Tally()
    flips.run(tally, tmp_path, count=120, seed=1)
    nothing_failed(tally, 120)


def test_pairs_of_faults(server: Processes, tmp_path: Path) -> None:
    tally = Tally()
    flips.run_pairs(server, tally, tmp_path, count=6, seed=1)
    nothing_failed(tally, 6)


@pytest.mark.parametrize("kind", fuzz_store.KINDS)
def test_malformed_files_of_the_store(kind: str, tmp_path: Path) -> None:
    quick = ("root document", "manifest", "checksum file", "shard index", "compressed sample")
    count = 300 if kind in quick else 15
    assert fuzz_store.run(kind, count, 1, tmp_path / "f") == []


def test_links_and_foreign_files(server: Processes, lab: Lab) -> None:
    tally = Tally()
    only = ["build into", "rm features", "gc", "pull more", "verify", "push from"]
    links.run(server, lab, tally, count=18, seed=1, only=only)
    nothing_failed(tally, 18)


def test_processes_beside_each_other(server: Processes, lab: Lab) -> None:
    tally = Tally()
    only = ["build tiny@5 | rm tiny@2", "build tiny@5 | gc", "rm tiny@2 | verify"]
    concurrency.run(server, lab, tally, count=6, seed=1, only=only)
    nothing_failed(tally, 6)


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
