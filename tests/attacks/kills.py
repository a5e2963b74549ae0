"""Processes ended with SIGKILL at an exact file operation, in every command that writes.

For each kill: a reader sees only what is right; nothing outside the target changed; `gc` clears up what is left; and the
same command again ends in the bytes of an undisturbed run.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.attacks.campaign import Tally, dice, differences
from tests.attacks.lab import Lab
from tests.attacks.processes import Processes
from tests.attacks.scenes import Scene


def kill_once(processes: Processes, scene: Scene, at: int, torn: bool, work: Path) -> list[str]:
    """One trial: the command is ended at operation `at`; what is wrong afterwards."""
    folder = scene.stage(work / "w")
    before = scene.outside(folder)
    ended = processes.run(scene.job(folder, action="tear" if torn else "kill", at=at))
    if not ended.killed and ended.code != 0:
        return [f"it ended otherwise: {ended}"]
    wrong = scene.wrong_now(folder)
    changed = differences(scene.outside(folder), before)
    if changed:
        wrong.append(f"changed outside: {', '.join(changed)}")
    if scene.gc:
        copy = work / "gc"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy, symlinks=True)
        wrong += scene.wrong_after_gc(copy)
    failed = scene.repeat(processes, folder)
    wrong += failed or scene.wrong_at_end(folder)
    wrong += [f"after the repeated command: {w}" for w in scene.wrong_now(folder)]
    return wrong or scene.wrong_undone(processes, folder)


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
    """`count` kills from number `first` on, going round the scenes; returns the number of the next one."""
    scenes = list(lab.scenes(processes, only))
    tally.notes["operations"] = {scene.name: scene.operations for scene in scenes}
    work = lab.root / "kills"
    work.mkdir(exist_ok=True)
    number = first
    while number < first + count and not tally.late:
        scene = scenes[number % len(scenes)]
        chance = dice("kill", seed, number)
        at, torn = chance.randint(1, max(1, scene.operations)), chance.random() < 0.4
        problems = kill_once(processes, scene, at, torn, work)
        where = f"--only kills --scene '{scene.name}' --seed {seed} --first {number} --count 1: operation {at} of {scene.operations}{', torn' * torn}"
        tally.trial(scene.name, problems, where)
        number += 1
    return number
