"""Links, pipes, folders for files, files for folders, unreadable files and users' own files, at every place that a command
reads or writes.

A cache or run that was received may hold anything. Whatever a command meets: nothing outside the folder changes, nothing
from outside (a secret that a link points to) gets into what is printed or written, users' own files stay, and the command
ends by itself with a plain message.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from featcache.store.layout import STATE
from tests.attacks.campaign import Tally, dice, differences, fingerprint
from tests.attacks.lab import RUN, SCENES, Lab, available, trained
from tests.attacks.power import read_log
from tests.attacks.processes import HUNG, Processes
from tests.attacks.scenes import TRASH, Scene, has_option

SECRET = b"SECRET-5b1e0c77"
OWN = b"a user's own file\n"
TIMEOUT_S = 40

KINDS = (
    *("link to a file outside", "link to a folder outside", "link to nothing outside", "link to its like outside"),
    *("pipe", "folder or file instead", "unreadable", "part is a link", "part is a user's", "part is a hard link"),
    "removed",
)
_HEX = re.compile(r"[0-9a-f]{16}|\d{4,}\.partial")


def readers(lab: Lab, only: list[str] | None = None) -> dict[str, Scene]:
    """Scenes of commands that only read (or write elsewhere)."""
    cache = {
        "info": ("featcache", "info", "c"),
        "ls": ("featcache", "ls", "."),
        "verify": ("featcache", "verify", "c"),
        "gc dry": ("featcache", "gc", "c", "--dry-run"),
        "inspect": ("featcache", "inspect", "c", "--count", "2", "--out", "c.png"),
        "convert": ("featcache", "convert", "c", "copy", "--to", "wds"),
        "pull from": ("featcache", "pull", "c", "copy"),
        "push from": ("featcache", "push", "c", "{folder}/place"),
        "train from": RUN,
    }
    runs = {
        "sample": ("trainer", "sample", "runs/r", "--num", "2", "--steps", "2", "--device", "cpu"),
        "report": ("trainer", "report", "runs/r"),
        "export": ("trainer", "export", "runs/r", "weights.pt"),
        "compare": ("trainer", "compare", "runs/r", "runs/s"),
        "stats": ("trainer", "stats", "runs", "--out", "stats.npz", "--extractor", "embedded", "--device", "cpu"),
    }
    found = {}
    folder = lab.workspace("readers of a cache", "grown")
    for name, argv in cache.items():
        if has_option(argv[0], argv[1]):
            outputs = ("copy", "place", "runs", "c.png")
            found[name] = Scene(name=name, argv=argv, prepared=folder, targets=("c", *outputs), truth=lab.grown)
    if only and not any(name.startswith("trainer") for name in only):
        return found
    folder = trained(lab, "readers of a run")
    shutil.copytree(folder / "runs/r", folder / "runs/s")
    for name, argv in runs.items():
        targets = ("runs/r", "weights.pt", "stats.npz")
        found[f"trainer {name}"] = Scene(
            name=f"trainer {name}", argv=argv, prepared=folder, targets=targets, truth=None
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """A scene and the places in its targets, relative to the workspace."""

    scene: Scene
    places: tuple[str, ...]


def places_of(processes: Processes, scene: Scene, work: Path) -> tuple[str, ...]:
    """Everything in the target before the command, and what an undisturbed run touches there."""
    folder = scene.stage(work / "places")
    found = {str(p.relative_to(folder)) for p in scene.target(folder).rglob("*")} | {scene.targets[0]}
    log = work / "places.log"
    processes.run(scene.job(folder, log=str(log)))
    for operation in read_log(log):
        for path in (operation.path, operation.other):
            if path.startswith(f"{folder}/"):
                found.add(path[len(str(folder)) + 1 :])
    inside = {n for n in found if any(n == t or n.startswith(t + "/") for t in scene.targets)}
    # What a user typed may be a link: it is the user's own.
    typed = {word.replace("{folder}/", "") for word in scene.argv} | {"runs", *(f"runs/{w}" for w in scene.argv)}
    return tuple(sorted(n for n in inside - typed if not _HEX.search(n) and not _parent_of(n, typed)))


def _parent_of(place: str, typed: set[str]) -> bool:
    return any(path.startswith(place + "/") for path in typed)


def ours(folder: Path, place: Path) -> bool:
    """Whether a place is in a folder that is kept by the product alone: a cache's state, a checkpoint."""
    parts = place.relative_to(folder).parts
    return STATE in parts or any(re.fullmatch(r"\.?step_\d+(\.\w+)?", part) for part in parts)


def plant(folder: Path, place: str, kind: str) -> str | None:
    """Puts something at a place; what the user's own file there is called, if it is one. Raises OSError where that cannot be."""
    path, beside = folder / place, folder / "beside"
    if kind.startswith("part"):
        path = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    was_folder = path.is_dir() and not path.is_symlink()
    if kind == "unreadable":
        if not path.exists():
            path.write_bytes(b"")
        path.chmod(0)
        return None
    if kind == "link to its like outside" and path.exists():
        like = beside / "like"
        (shutil.copytree if was_folder else shutil.copy)(path, like)
    if was_folder:
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if kind in ("link to a file outside", "part is a link"):
        path.symlink_to(beside / "secret.txt")
    elif kind == "link to a folder outside":
        path.symlink_to(beside / "more")
    elif kind == "link to nothing outside":
        path.symlink_to(beside / "nothing")
    elif kind == "link to its like outside":
        path.symlink_to(beside / "like")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "part is a hard link":
        path.hardlink_to(beside / "secret.txt")
    elif kind == "folder or file instead":
        if was_folder:
            path.write_bytes(b"a file")
        else:
            path.mkdir()
            (path / "own.txt").write_bytes(OWN)
            return str((path / "own.txt").relative_to(folder))
    elif kind == "part is a user's":
        # Under the old names of temporary files a builder may take it for one of its own; in a folder it may not.
        path.mkdir()
        (path / "own.txt").write_bytes(OWN)
        return str((path / "own.txt").relative_to(folder))
    return None


def attack(processes: Processes, attacked: Attacked, chance: random.Random, work: Path) -> tuple[list[str], str]:
    """One trial: (what is wrong, what was done)."""
    scene = attacked.scene
    folder = scene.stage(work / "w")
    beside = folder / "beside"
    (beside / "secret.txt").write_bytes(SECRET)
    (beside / "more" / "zarr.json").write_bytes(SECRET)
    place, kind = chance.choice(attacked.places), chance.choice(KINDS)
    own: dict[str, bytes] = {}
    target = scene.target(folder)
    if target.is_dir():
        parents = sorted(p for p in {target, *target.rglob("*")} if p.is_dir() and not ours(folder, p))
        mine = chance.choice(parents) / "my notes.txt"
        mine.write_bytes(OWN)
        own[str(mine.relative_to(folder))] = OWN
    what = f"{kind} at {place}"
    try:
        planted = plant(folder, place, kind)
    except OSError as error:
        return [], f"{what}: cannot be ({error})"
    own = {n: data for n, data in own.items() if (folder / n).is_file()}
    if planted is not None and not ours(folder, folder / planted):
        own[planted] = OWN
    before = fingerprint(beside)
    ended = processes.run(scene.job(folder, unprivileged=kind == "unreadable", group_files=128), TIMEOUT_S)
    wrong = []
    if ended.how == HUNG:
        wrong.append(f"hangs: {what}")
    elif not ended.clean:
        wrong.append(f"no plain error: {what}: {ended}")
    changed = differences(fingerprint(beside), before)
    if changed:
        wrong.append(f"changed outside: {', '.join(changed)} by {what}")
    lost = [name for name, data in own.items() if not _is_kept(folder, scene, name, data)]
    if lost:
        wrong.append(f"a user's file is gone: {', '.join(lost)}, {what}")
    if SECRET.decode() in ended.output or _holds_secret(folder):
        wrong.append(f"bytes from outside are copied: {what}")
    return wrong, what


def _is_kept(folder: Path, scene: Scene, name: str, data: bytes) -> bool:
    """Whether a user's own file is where it was; one in a cache that was removed whole is with it in the trash."""
    target = scene.targets[0]
    trashed = [
        p / Path(name).relative_to(target) for p in folder.glob(f"{TRASH}/*-{target}") if name.startswith(target)
    ]
    return any(p.is_file() and p.read_bytes() == data for p in (folder / name, *trashed))


def _holds_secret(folder: Path) -> bool:
    for base, names, files in os.walk(folder):
        if Path(base) == folder:
            names.remove("beside")
        for name in files:
            path = Path(base, name)
            if not path.is_symlink() and path.is_file() and path.stat().st_nlink == 1 and SECRET in path.read_bytes():
                return True
    return False


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
    """`count` trials from number `first` on, going round the scenes; returns the number of the next one."""
    work = lab.root / "links"
    work.mkdir(exist_ok=True)
    reading = readers(lab, only)
    names = [n for n in SCENES if available(n) and n not in ("push s3", "pull web") and (not only or n in only)]
    scenes = [lab.scene(n) for n in names]
    scenes += [scene for scene in reading.values() if not only or scene.name in only]
    found = (Attacked(scene=s, places=places_of(processes, s, work)) for s in scenes)
    attacked = [one for one in found if one.places]  # some write nothing but what was typed
    tally.notes["places"] = {a.scene.name: len(a.places) for a in attacked}
    number = first
    while number < first + count and not tally.late:
        one = attacked[number % len(attacked)]
        problems, what = attack(processes, one, dice("links", seed, number), work)
        tally.trial(
            one.scene.name,
            problems,
            f"--only links --scene '{one.scene.name}' --seed {seed} --first {number} --count 1: {what}",
        )
        number += 1
    return number
