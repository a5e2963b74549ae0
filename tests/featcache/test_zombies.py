"""A worker that is thought dead and lives: in no order of its steps and its replacement's is a wrong checksum published."""

from __future__ import annotations

import itertools
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from store_helpers import dataset, tree

from featcache.errors import CacheError
from featcache.share.verify import verify
from featcache.store import CacheWriter, FeatureSpec, files, writer
from featcache.store.writers import create_writer, join_writer

SPEC = FeatureSpec(name="a@1", shape=(4,), codec="raw", dtype="int8")
COUNT = 4
# What one worker can see of another. Removing its own temporary files is no step where there are links.
STEPS = {"links": ("_write", "_link", "_rename"), "no links": ("_write", "_rename", "_unlink")}


def refuse(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")


class Actor:
    """A worker whose operations on files happen one at a time, when it is told to go on."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.done = False
        self.error: BaseException | None = None
        self._work = work
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        self._stopped.acquire()

    def _run(self) -> None:
        self.pause()
        try:
            self._work()
        except BaseException as error:
            self.error = error
        self.done = True
        self._stopped.release()

    def pause(self) -> None:
        """Called in the worker's thread before each operation."""
        self._stopped.release()
        self._go.acquire()

    def step(self) -> None:
        """Up to the next operation, or to the end."""
        if not self.done:
            self._go.release()
            self._stopped.acquire()

    def finish(self) -> None:
        while not self.done:
            self.step()


@pytest.fixture(params=STEPS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no links":
        monkeypatch.setattr(files, "_link", refuse)
    return request.param


@pytest.fixture
def actors(kind: str, monkeypatch: pytest.MonkeyPatch) -> dict[threading.Thread, Actor]:
    """Thread -> the actor that runs in it."""
    known: dict[threading.Thread, Actor] = {}

    def stepwise(name: str) -> None:
        real = getattr(files, name)

        def call(*arguments):
            actor = known.get(threading.current_thread())
            if actor is not None:
                actor.pause()
            return real(*arguments)

        monkeypatch.setattr(files, name, call)

    for name in STEPS[kind]:
        stepwise(name)
    monkeypatch.setattr(files, "_fsync", lambda fd: None)
    monkeypatch.setattr(writer, "STALE_S", 0.0)
    return known


def write(worker: CacheWriter, value: int) -> None:
    """All shards, of values by which the writer can be told."""
    for shard in range(worker.n_shards):
        n = len(worker.slots(shard))
        worker.write_shard("a@1", shard, {"": np.full((n, 4), value, np.int8)})
    worker.commit()


def orders(first: int, second: int) -> Iterator[tuple[int, ...]]:
    """Every order of so many steps of one actor and of the other."""
    for places in itertools.combinations(range(first + second), first):
        order = [1] * (first + second)
        for place in places:
            order[place] = 0
        yield tuple(order)


def steps_of(actors: dict, path: Path) -> int:
    """How many operations a worker does that writes everything."""
    with join_writer(path, [SPEC]) as worker:
        actor = Actor(lambda: write(worker, 1))
        actors[actor.thread] = actor
        count = 0
        while not actor.done:
            actor.step()
            count += 1
        assert actor.error is None
    return count


def begin(path: Path) -> CacheWriter:
    worker = create_writer(path, dataset(COUNT), shard_size=COUNT)
    worker.begin([SPEC])
    return worker


@pytest.mark.parametrize("most", [pytest.param(300, marks=pytest.mark.slow), 50])
def test_two_workers_of_one_run(tmp_path: Path, actors, kind: str, most: int) -> None:
    """Orders of the operations of two workers that write the same shard with different last bits; with links 300 are
    all of them.
    """
    with begin(tmp_path / "count"):
        steps = steps_of(actors, tmp_path / "count")
    published = set()
    chosen = list(orders(steps, steps))
    assert len(chosen) >= 252
    for order in random.Random(0).sample(chosen, min(most, len(chosen))):
        path = tmp_path / "cache"
        lead = begin(path)
        # As many steps of each in this order, then whatever is left: a loser has more to do.
        with join_writer(path, [SPEC]) as zombie, join_writer(path, [SPEC]) as heir:
            pair = [Actor(partial(write, zombie, 1)), Actor(partial(write, heir, 2))]
            actors.update({actor.thread: actor for actor in pair})
            for which in order:
                pair[which].step()
            for actor in pair:
                actor.finish()
        assert all(a.error is None or isinstance(a.error, CacheError) for a in pair), [a.error for a in pair]
        if all(a.error for a in pair):
            assert kind == "no links"  # each has removed the other's file: both are told, and the build goes on later
        else:
            lead.refresh()
            lead.finish()
            assert verify(path).ok, order
            published.add((path / "a@1" / "c.0.0").read_bytes()[0])
        lead.close()
        shutil.rmtree(path)
    assert published == {1, 2}


@pytest.mark.parametrize("share", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_worker_of_an_earlier_run_at_every_step(tmp_path: Path, actors, share: int) -> None:
    """The build is begun anew, and finished, around a worker of its former run that stands anywhere and goes on at
    any moment.
    """
    with begin(tmp_path / "count"):
        steps = steps_of(actors, tmp_path / "count")
    whole = build_alone(tmp_path / "whole", 2)
    kept = 0
    for stands_at, goes_on_at in itertools.product(range(steps + 1), range(steps + 2)):
        if (stands_at + goes_on_at) % share:
            continue
        path = tmp_path / "cache"
        former = begin(path)
        zombie_writer = join_writer(path, [SPEC])
        zombie = Actor(partial(write, zombie_writer, 1))
        actors[zombie.thread] = zombie
        for _ in range(stands_at):
            zombie.step()
        former.close()
        lead = begin(path)
        pending = lead.pending()
        heir = Actor(partial(write, lead, 2))
        actors[heir.thread] = heir
        for _ in range(goes_on_at):
            heir.step()
        zombie.finish()
        heir.finish()
        assert heir.error is None
        lead.finish()
        assert verify(path).ok, (stands_at, goes_on_at)
        if pending:
            # Nothing of the former run gets in any more.
            assert tree(path) == whole, (stands_at, goes_on_at)
            assert isinstance(zombie.error, CacheError)
        else:
            kept += 1
            assert zombie.error is None
        shutil.rmtree(path)
    assert kept


def build_alone(path: Path, value: int) -> dict[str, bytes]:
    with begin(path) as worker:
        write(worker, value)
        worker.finish()
    return tree(path)


def test_one_name_one_writer(tmp_path: Path) -> None:
    """The accident itself: both have opened the temporary file of one shard before either has written it."""
    path = tmp_path / "cache"
    with begin(path) as lead:
        with join_writer(path, [SPEC]) as zombie, join_writer(path, [SPEC]) as heir:
            for worker, value in ((zombie, 1), (heir, 2)):
                worker.write_shard("a@1", 0, {"": np.full((COUNT, 4), value, np.int8)})
            heir.commit()
            zombie.commit()
        lead.refresh()
        lead.finish()
    assert verify(path).ok
