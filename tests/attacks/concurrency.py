"""Several processes on one cache, one bucket, one run: interleaved at exact operations, or started together.

A round stops one process (SIGSTOP) at a random file operation, lets others run to their end beside it, and then lets it go
on (or kills it): a writer that slept through what the others did. Afterwards every process must have ended plainly, what a
process reported as done must be there, and what readers see must be right; a verification beside a builder finds no damage.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import featcache
from featcache.errors import CacheError
from featcache.read.root import read_remote_root
from featcache.share.manage import collect_garbage
from featcache.store.remote import open_location
from tests.attacks.campaign import Tally, dice, differences
from tests.attacks.lab import INTO, MAKE, RUN, Lab, call, trained
from tests.attacks.processes import HUNG, Ended, Processes
from tests.attacks.scenes import TRASH, RemoteScene, Scene, Values, values_of

BESIDE_S = 4.0
TIMEOUT_S = 90
OTHER = (
    "featcache",
    "build",
    "--data",
    "shapes",
    "--into",
    "c",
    "--vae-levels",
    "G2",
    "--batch-size",
    "4",
    "--workers",
    "1",
)


@dataclass(frozen=True, kw_only=True)
class Actor:
    """A command and what it does when it succeeds: features that are there, or are not. checks: exit code 1 says damage."""

    name: str
    argv: tuple[str, ...]
    adds: frozenset[str] = frozenset()
    removes: frozenset[str] = frozenset()
    checks: bool = False
    removes_all: bool = False


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two commands on one scene (of which only the workspace, the target and the truth count). The first is stopped."""

    name: str
    scene: Scene
    first: Actor
    second: Actor
    again: bool = True


def _actors() -> dict[str, Actor]:
    rm = ("featcache", "rm", "c", "--yes")
    return {
        actor.name: actor
        for actor in (
            Actor(name="make", argv=MAKE, adds=frozenset({"tiny@2", "vae/G3", "vae/moments"})),
            Actor(name="build tiny@5", argv=INTO, adds=frozenset({"tiny@5"})),
            Actor(name="build G2", argv=OTHER, adds=frozenset({"vae/G2"})),
            Actor(name="rm tiny@2", argv=(*rm, "--features", "tiny@2"), removes=frozenset({"tiny@2"})),
            Actor(name="rm G3", argv=(*rm, "--features", "vae/G3"), removes=frozenset({"vae/G3"})),
            Actor(name="rm all", argv=rm, removes_all=True),
            Actor(name="gc", argv=("featcache", "gc", "c")),
            Actor(name="verify", argv=("featcache", "verify", "c"), checks=True),
            Actor(name="info", argv=("featcache", "info", "c")),
            Actor(name="ls", argv=("featcache", "ls", ".")),
            Actor(name="pull from", argv=("featcache", "pull", "c", "copy")),
            Actor(name="convert", argv=("featcache", "convert", "c", "copy", "--to", "wds")),
            Actor(name="repair", argv=("featcache", "verify", "c", "--repair", "--device", "cpu")),
            Actor(
                name="pull", argv=("featcache", "pull", "there", "c"), adds=frozenset({"tiny@2", "tiny@5", "vae/G3"})
            ),
            Actor(
                name="pull tiny@5",
                argv=("featcache", "pull", "there", "c", "--features", "tiny@5"),
                adds=frozenset({"tiny@5"}),
            ),
            Actor(
                name="pull G3",
                argv=("featcache", "pull", "there", "c", "--features", "vae/G3"),
                adds=frozenset({"vae/G3"}),
            ),
            Actor(
                name="push G3",
                argv=("featcache", "push", "c", "{url}", "--features", "vae/G3"),
                adds=frozenset({"vae/G3"}),
            ),
            Actor(
                name="push tiny@2",
                argv=("featcache", "push", "c", "{url}", "--features", "tiny@2"),
                adds=frozenset({"tiny@2"}),
            ),
            Actor(
                name="push",
                argv=("featcache", "push", "c", "{url}"),
                adds=frozenset({"tiny@2", "vae/G3", "vae/moments"}),
            ),
            Actor(name="train", argv=RUN),
            Actor(name="resume", argv=(*("9" if word == "3" else word for word in RUN), "--resume")),
        )
    }


def all_values(lab: Lab) -> Values:
    """Right values of everything that is built here."""
    other = lab.workspace("other")
    call(other, *OTHER)
    return lab.grown | values_of(other / "c")


def pairs(lab: Lab, truth: Values, only: list[str] | None = None) -> list[Pair]:
    """All pairs of commands that are tried, or those named."""
    actors = _actors()

    def on_cache(first: str, second: str, *, start: str = "base", must_open: bool = True, again: bool = True) -> Pair:
        name = f"{first} | {second}"
        folder = lab.workspace(name, start)
        if first == "make":
            shutil.rmtree(folder / "c")
        if first.startswith("pull") and first != "pull from":
            (folder / "c").rename(folder / "there")
        if "repair" in (first, second):
            path = folder / "c/tiny@2/c.1.0.0"
            path.write_bytes(bytes(path.stat().st_size))
        scene = Scene(
            name=name,
            argv=actors[first].argv,
            prepared=folder,
            targets=("c", "copy", TRASH),
            truth=truth,
            must_open=must_open,
            damaged="repair" in (first, second),
        )
        return Pair(name=name, scene=scene, first=actors[first], second=actors[second], again=again)

    def wanted(name: str) -> bool:
        return not only or name in only

    on_caches: list[tuple[str, str, dict[str, Any]]] = [
        *(("build tiny@5", second, {}) for second in ("build tiny@5", "build G2", "rm tiny@2", "gc", "verify")),
        *(("build tiny@5", second, {}) for second in ("info", "ls", "pull from", "convert", "rm G3")),
        ("build tiny@5", "rm all", {"must_open": False, "again": False}),
        *(("make", second, {"must_open": False}) for second in ("make", "gc", "ls")),
        *(("rm tiny@2", second, {}) for second in ("build tiny@5", "verify", "gc", "rm G3", "convert")),
        ("rm all", "build tiny@5", {"must_open": False, "again": False}),
        *(("gc", second, {}) for second in ("build tiny@5", "rm tiny@2")),
        *(("pull", second, {"start": "grown", "must_open": False}) for second in ("pull", "gc")),
        ("pull tiny@5", "pull G3", {"start": "grown", "must_open": False}),
        *(("repair", second, {"must_open": False}) for second in ("build tiny@5", "repair")),
    ]
    found = [on_cache(a, b, **options) for a, b, options in on_caches if wanted(f"{a} | {b}")]
    if wanted("resume | resume"):
        folder = trained(lab, "resume | resume")
        scene = Scene(name="resume | resume", argv=RUN, prepared=folder, targets=("runs",), truth=None, gc=False)
        found.append(Pair(name="resume | resume", scene=scene, first=actors["resume"], second=actors["resume"]))
    if lab.s3 is not None:
        bucket = lab.bucket()
        for first, second in (("push G3", "push tiny@2"), ("push G3", "push"), ("push", "push")):
            name = f"{first} | {second}"
            if not wanted(name):
                continue
            remote = RemoteScene(
                name=name,
                argv=actors[first].argv,
                prepared=lab.workspace(name),
                targets=("c",),
                truth=lab.values,
                network=True,
                bucket=bucket,
            )
            found.append(Pair(name=name, scene=remote, first=actors[first], second=actors[second]))
    return found


def seen_features(scene: Scene, folder: Path) -> set[str]:
    """What is complete at this moment."""
    if isinstance(scene, RemoteScene):
        manifest = read_remote_root(open_location(scene.bucket.url))
        return set() if manifest is None else set(manifest.features)
    try:
        return set(featcache.open(scene.target(folder)).manifest.features)
    except CacheError:
        return set()


def interleave(
    processes: Processes, pair: Pair, operations: int, chance: random.Random, work: Path
) -> tuple[list[str], str]:
    """One round: (what is wrong, what was done)."""
    scene = pair.scene
    folder = scene.stage(work / "w")
    before = scene.outside(folder)
    at = chance.randint(1, max(1, operations))
    ends = chance.random() < 0.25

    def job(actor: Actor, **changes: object) -> object:
        output = str(work / f"{'first' if changes else 'second'}.output")
        return replace(scene.job(folder, argv=actor.argv, **changes), output=output)

    first = processes.start(job(pair.first, action="stop", at=at))  # type: ignore[arg-type]
    stopped = processes.wait(first, TIMEOUT_S)
    second = processes.start(job(pair.second))  # type: ignore[arg-type]
    # It may have to wait for the one that is stopped.
    other = processes.wait(second, BESIDE_S if stopped.how == "stopped" else TIMEOUT_S, end=False)
    wrong = [f"beside the stopped one: {w}" for w in scene.wrong_now(folder)] if other.how != "running" else []
    mine = stopped
    if stopped.how == "stopped":
        if ends:
            processes.kill(first)
        else:
            os.kill(first, signal.SIGCONT)
        mine = processes.wait(first, TIMEOUT_S)
    if other.how == "running":
        other = processes.wait(second, TIMEOUT_S)
    what = f"{pair.first.name} {'killed' if ends else 'stopped'} at {at} of {operations}, {pair.second.name} beside it"
    wrong += _ended(pair.first, mine, may_be_killed=ends) + _ended(pair.second, other)
    wrong += [f"in the end: {w}" for w in scene.wrong_now(folder)]
    wrong += _missing(pair, mine, other, seen_features(scene, folder))
    changed = differences(scene.outside(folder), before)
    if changed:
        wrong.append(f"changed outside: {', '.join(changed)}")
    if pair.again:
        wrong += _again(processes, pair, folder)
    return wrong, what


def _ended(actor: Actor, ended: Ended, *, may_be_killed: bool = False) -> list[str]:
    if ended.killed and may_be_killed:
        return []
    if ended.how == HUNG:
        return [f"{actor.name} hangs: {ended.output[-300:]}"]
    if not ended.clean:
        return [f"{actor.name} ends otherwise: {ended}"]
    if actor.checks and ended.code == 1:
        return [f"{actor.name} finds damage where there is none: {ended}"]
    return []


def _missing(pair: Pair, first: Ended, second: Ended, seen: set[str]) -> list[str]:
    if pair.scene.truth is None or pair.first.removes_all or pair.second.removes_all:
        return []
    done = [actor for actor, ended in ((pair.first, first), (pair.second, second)) if ended.code == 0]
    adds = {name for actor in done for name in actor.adds}
    removes = {name for actor in done for name in actor.removes}
    wrong = [f"reported as done, but not there: {name}" for name in sorted(adds - removes - seen)]
    return wrong + [f"reported as removed, but there: {name}" for name in sorted((removes - adds) & seen)]


def _again(processes: Processes, pair: Pair, folder: Path) -> list[str]:
    """Both commands once more, one after the other: they succeed, or there is nothing left to do for them."""
    wrong = []
    # A copy of the cache as it was then is not one of the cache as it is now.
    shutil.rmtree(folder / "copy", ignore_errors=True)
    for actor in (pair.first, pair.second):
        ended = processes.run(pair.scene.job(folder, argv=actor.argv, group_files=128))
        fine = ended.code == 0 or (ended.code == 2 and bool(actor.removes))
        if not fine and not (
            ended.code == 2 and ("there is no cache" in ended.output or "exists already" in ended.output)
        ):
            wrong.append(f"{actor.name} once more fails: {ended}")
    wrong += [f"after both once more: {w}" for w in pair.scene.wrong_now(folder)]
    if pair.scene.gc and pair.scene.target(folder).is_dir():
        with contextlib.suppress(CacheError):
            collect_garbage(pair.scene.target(folder))
        left = [str(p) for p in pair.scene.target(folder).rglob("*.part")] + [
            str(p) for p in pair.scene.target(folder).glob(".featcache/building/*")
        ]
        wrong += [f"left after gc: {', '.join(left[:4])}"] if left else []
        wrong += [f"after gc: {w}" for w in pair.scene.wrong_now(folder)]
    return wrong


def together(processes: Processes, lab: Lab, chance: random.Random, work: Path, truth: Values) -> tuple[list[str], str]:
    """One round of four or five processes started at about the same time, readers among them."""
    actors = _actors()
    writers = ["build tiny@5", "build G2", "rm tiny@2", "rm G3", "gc", "build tiny@5"]
    names = chance.sample(writers, 3) + chance.sample(["verify", "info", "convert", "ls", "pull from"], 2)
    chance.shuffle(names)
    scene = Scene(
        name="together", argv=(), prepared=lab.base, targets=("c", "copy", TRASH), truth=truth, must_open=True
    )
    folder = scene.stage(work / "w")
    running = []
    ended: dict[int, Ended] = {}
    for number, name in enumerate(names):
        stop = {"action": "stop", "at": chance.randint(1, 120)} if chance.random() < 0.4 else {}
        job = replace(scene.job(folder, argv=actors[name].argv, **stop), output=str(work / f"{number}.output"))
        running.append((actors[name], processes.start(job)))
        if chance.random() < 0.5:
            found = processes.wait(running[-1][1], chance.random() * 0.3, end=False)
            if found.how not in ("stopped", "running"):
                ended[number] = found
    while len(ended) < len(running):
        for number, (_, pid) in enumerate(running):
            if number in ended:
                continue
            found = processes.wait(pid, 0.2, end=False)
            if found.how == "stopped" or found.how == "running":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            else:
                ended[number] = found
    wrong = [w for number, (actor, _) in enumerate(running) for w in _ended(actor, ended[number])]
    wrong += scene.wrong_now(folder)
    seen = seen_features(scene, folder)
    done = [actor for number, (actor, _) in enumerate(running) if ended[number].code == 0]
    adds = {name for actor in done for name in actor.adds}
    removes = {name for actor in done for name in actor.removes}
    wrong += [f"reported as done, but not there: {name}" for name in sorted(adds - seen)]
    wrong += [f"reported as removed, but there: {name}" for name in sorted(removes & seen)]
    return wrong, " & ".join(names)


def run(
    processes: Processes,
    lab: Lab,
    tally: Tally,
    *,
    count: int,
    seed: int,
    first: int = 0,
    only: list[str] | None = None,
) -> int:
    """`count` rounds from number `first` on, going round the pairs; returns the number of the next one."""
    work = lab.root / "concurrency"
    work.mkdir(exist_ok=True)
    truth = all_values(lab)
    found = pairs(lab, truth, only)
    operations: dict[str, int] = {}
    for pair in found:
        folder = pair.scene.stage(work / "w")
        operations[pair.name] = processes.run(pair.scene.job(folder, argv=pair.first.argv)).operations
    rounds: list[Pair | None] = [*found] + ([None] * 4 if not only or "together" in only else [])
    number = first
    while number < first + count and not tally.late:
        one = rounds[number % len(rounds)]
        chance = dice("concurrency", seed, number)
        if one is None:
            problems, what = together(processes, lab, chance, work, truth)
        else:
            problems, what = interleave(processes, one, operations[one.name], chance, work)
        name = "together" if one is None else one.name
        tally.trial(
            name, problems, f"--only concurrency --scene '{name}' --seed {seed} --first {number} --count 1: {what}"
        )
        number += 1
    return number
