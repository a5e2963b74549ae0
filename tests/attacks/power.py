"""Power losses, simulated from a log of a command's file operations.

POSIX promises little without fsync: written data may be lost, zero or torn, by any write; a directory's new, renamed or
removed entries may be there or not, in any combination. (One rename is atomic.) From a log every state that may be found
after a loss of power at some moment can be made: what was synced is there, of the rest any subset. Whatever such a state
shows as complete must be right, and what a command reported as done must still be there.

The model is stricter than real file systems: fsync of a file does not make its name durable.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from store_helpers import tree

from tests.attacks.campaign import Tally, dice, differences
from tests.attacks.lab import Lab
from tests.attacks.processes import Processes
from tests.attacks.scenes import Scene

_RECORD = struct.Struct("IIIIQQQ")
_SECTOR = 512

# What is worth losing power over; "trainer run" and "trainer resume" save checkpoints.
NAMES = (
    *("build", "build wds", "build resumed", "build into", "repair", "verify repair from", "repair from"),
    *(
        "rm features",
        "rm cache",
        "rm now",
        "restore features",
        "restore cache",
        "pull",
        "pull more",
        "push folder",
        "sign",
    ),
    *("convert to wds", "convert to zarr", "import", "trainer run", "trainer resume", "trainer import"),
)


@dataclass(frozen=True)
class Operation:
    """One record of the shim's log; see `note` in shim.c for the kinds."""

    kind: str
    path: str
    other: str
    inode: int
    offset: int
    length: int
    flag: int
    data: bytes


def read_log(path: Path) -> list[Operation]:
    """All records of a log."""
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        kind, n, m, flag, inode, offset, length = _RECORD.unpack_from(data, at)
        at += _RECORD.size
        first, second = os.fsdecode(data[at : at + n]), os.fsdecode(data[at + n : at + n + m])
        at += n + m
        payload = data[at : at + length] if chr(kind) == "w" else b""
        at += len(payload)
        found.append(Operation(chr(kind), first, second, inode, offset, length, flag, payload))
    return found


@dataclass(eq=False)
class File:
    """`durable`: its bytes as of the last sync; `pending`: changes since, (offset, data) or (length, None). mode: its
    permissions, of files that were there when the log began.
    """

    durable: bytes = b""
    mode: int = 0o644
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def content(self, chosen: list[tuple[int, bytes | None]] | None = None) -> bytes:
        data = bytearray(self.durable)
        for offset, piece in self.pending if chosen is None else chosen:
            if piece is None:
                data[offset:] = bytes(max(0, offset - len(data)))
                continue
            if len(data) < offset:
                data += bytes(offset - len(data))
            data[offset : offset + len(piece)] = piece
        return bytes(data)

    def sync(self) -> None:
        self.durable, self.pending = self.content(), []


@dataclass(eq=False)
class Link:
    target: str


@dataclass(eq=False)
class Folder:
    """`now`: its entries as a process sees them; `first`: as they were when the log began."""

    first: dict[str, Node] = field(default_factory=dict)
    now: dict[str, Node] = field(default_factory=dict)


Node = File | Folder | Link


@dataclass(eq=False)
class Change:
    """One atomic change of entries: (folder, name) -> what it is then."""

    entries: dict[tuple[int, str], Node | None]
    durable: bool = False


class Disk:
    """What is on a disk while a log is replayed, and what may be on it if the power fails now."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder)
        self.by_inode: dict[int, File] = {}
        self.root = self._load(folder)
        self.changes: list[Change] = []
        self.folders: dict[int, Folder] = {}

    def _load(self, path: Path) -> Folder:
        found = Folder()
        for entry in os.scandir(path):
            node: Node
            if entry.is_symlink():
                node = Link(str(Path(entry.path).readlink()))
            elif entry.is_dir():
                node = self._load(Path(entry.path))
            else:
                node = File(Path(entry.path).read_bytes(), entry.stat().st_mode & 0o777)
                self.by_inode[entry.inode()] = node
            found.first[entry.name] = found.now[entry.name] = node
        return found

    def _find(self, path: str) -> tuple[Folder, str]:
        *parents, name = path[len(self.path) + 1 :].split("/")
        folder: Node = self.root
        for part in parents:
            assert isinstance(folder, Folder)
            folder = folder.now[part]
        assert isinstance(folder, Folder)
        return folder, name

    def _change(self, *entries: tuple[Folder, str, Node | None]) -> None:
        self.changes.append(Change({(id(folder), name): node for folder, name, node in entries}))
        for folder, name, node in entries:
            self.folders[id(folder)] = folder
            if node is None:
                folder.now.pop(name, None)
            else:
                folder.now[name] = node

    def _sync_folder(self, folder: Folder) -> None:
        for change in self.changes:
            if any(number == id(folder) for number, _ in change.entries):
                change.durable = True

    def _follow(self, operation: Operation, file: File) -> None:
        """A rename that the shim did not see (made without libc) shows in the path of a later operation."""
        folder, name = self._find(operation.path)
        if folder.now.get(name) is not file:
            old = next((n for n, node in folder.now.items() if node is file), None)
            if old is not None:
                self._change((folder, old, None), (folder, name, file))

    def apply(self, operation: Operation) -> None:
        """One operation of the log."""
        kind, path = operation.kind, operation.path
        if kind == "s" and operation.flag:
            if path == self.path:
                self._sync_folder(self.root)
                return
            folder, name = self._find(path)
            node = folder.now[name]
            assert isinstance(node, Folder)
            self._sync_folder(node)
            return
        if kind in "wst":
            file = self.by_inode[operation.inode]
            self._follow(operation, file)
            if kind == "w":
                file.pending.append((operation.offset, operation.data))
            elif kind == "t":
                file.pending.append((operation.length, None))
            else:
                file.sync()
            return
        if kind == "o":
            return
        folder, name = self._find(path)
        if kind == "c":
            file = self.by_inode[operation.inode] = File()
            self._change((folder, name, file))
        elif kind == "m":
            self._change((folder, name, Folder()))
        elif kind in "ud":
            self._change((folder, name, None))
        elif kind == "y":
            self._change((folder, name, Link(operation.other)))
        elif kind == "l":
            target, new = self._find(operation.other)
            self._change((target, new, folder.now[name]))
        elif kind == "r":
            if not operation.other.startswith(self.path + "/"):
                self._change((folder, name, None))
                return
            target, new = self._find(operation.other)
            self._change((folder, name, None), (target, new, folder.now[name]))
        else:
            raise AssertionError(kind)

    def materialise(self, target: Path, *, chance: random.Random | None = None, mode: str = "now") -> None:
        """Writes a state to the new folder `target`: "now" as processes see it, else as a loss of power may leave it.

        mode: "least" (nothing that was not synced), "names" (all names, no data), "most" (all), "any" (each change by
        chance), "but one" (all but one change of names).
        """
        chosen: dict[tuple[int, str], Node | None] = {}
        open_ones = [change for change in self.changes if not change.durable]
        left_out = chance.choice(open_ones) if mode == "but one" and chance is not None and open_ones else None
        rate = chance.choice((0.1, 0.5, 0.9)) if chance is not None else 0.0
        for change in self.changes:
            kept = change.durable or mode in ("names", "most") or (mode == "but one" and change is not left_out)
            if mode == "any" and not change.durable:
                assert chance is not None
                kept = chance.random() < rate
            if kept:
                chosen |= change.entries
        self._write(self.root, target, chosen, chance, mode)

    def _entries(self, folder: Folder, chosen: dict[tuple[int, str], Node | None], mode: str) -> dict[str, Node]:
        if mode == "now":
            return folder.now
        entries: dict[str, Node | None] = dict(folder.first)
        entries |= {name: node for (number, name), node in chosen.items() if number == id(folder)}
        return {name: node for name, node in entries.items() if node is not None}

    def _write(
        self,
        folder: Folder,
        path: Path,
        chosen: dict[tuple[int, str], Node | None],
        chance: random.Random | None,
        mode: str,
    ) -> None:
        path.mkdir()
        for name, node in self._entries(folder, chosen, mode).items():
            if isinstance(node, Folder):
                self._write(node, path / name, chosen, chance, mode)
            elif isinstance(node, Link):
                (path / name).symlink_to(node.target)
            else:
                (path / name).write_bytes(self._bytes(node, chance, mode))
                (path / name).chmod(node.mode)

    @staticmethod
    def _bytes(file: File, chance: random.Random | None, mode: str) -> bytes:
        if mode in ("now", "most"):
            return file.content()
        if mode in ("least", "names"):
            return file.durable
        assert chance is not None
        kept: list[tuple[int, bytes | None]] = []
        for offset, piece in file.pending:
            fate = chance.choice(("whole", "whole", "lost", "zero", "torn"))
            if fate == "lost":
                continue
            if piece is None or fate == "whole":
                kept.append((offset, piece))
            elif fate == "zero":
                kept.append((offset, bytes(len(piece))))
            else:
                cut = min(len(piece), chance.randint(0, len(piece) // _SECTOR + 1) * _SECTOR)
                kept.append((offset, piece[:cut]))
        return file.content(kept)


MODES = ("least", "names", "but one", "any", "any", "any")


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A scene with the log of an undisturbed run, and a copy of where it began."""

    scene: Scene
    start: Path
    log: list[Operation]


def record(processes: Processes, scene: Scene, work: Path) -> Recorded:
    """Runs the command once; raises AssertionError if the replay of its log is not the folder it left."""
    folder = scene.stage(work / "recorded" / scene.name.replace(" ", "-"))
    start = Disk(folder)
    log = work / f"{scene.name}.log"
    ended = processes.run(scene.job(folder, log=str(log)))
    assert ended.code == 0, ended
    operations = read_log(log)
    for operation in operations:
        start.apply(operation)
    replayed = work / "replayed"
    shutil.rmtree(replayed, ignore_errors=True)
    start.materialise(replayed)
    wrong = differences(tree(replayed), tree(folder))
    assert not wrong, f"the log of {scene.name} does not hold all that it did: {wrong}"
    return Recorded(scene=scene, start=folder, log=operations)


def states(recorded: Recorded, chance: random.Random, work: Path) -> Iterator[tuple[int, str, Path]]:
    """Endless: (number of operations made, mode, folder) of states after a loss of power at random moments."""
    scene = recorded.scene
    while True:
        # The inodes are those of the recorded run; the start is the same for both.
        disk = Disk(scene.stage(work / "start"))
        disk.path = str(recorded.start)
        disk.by_inode = _inodes(recorded, disk)
        whole = chance.random() < 0.15
        moment = len(recorded.log) if whole else chance.randint(0, len(recorded.log))
        for operation in recorded.log[:moment]:
            disk.apply(operation)
        for mode in MODES:
            target = work / "state"
            shutil.rmtree(target, ignore_errors=True)
            disk.materialise(target, chance=chance, mode=mode)
            yield moment, mode, target


def _inodes(recorded: Recorded, disk: Disk) -> dict[int, File]:
    """The files of the start by the inodes that they had in the recorded run: by their first appearance in the log."""
    found: dict[int, File] = {}
    created: set[int] = set()
    for operation in recorded.log:
        if operation.kind == "c":
            created.add(operation.inode)
        elif operation.kind in "ost" and not operation.flag and operation.inode not in created | set(found):
            folder: Node = disk.root
            for part in operation.path[len(disk.path) + 1 :].split("/"):
                folder = folder.first.get(part, Folder()) if isinstance(folder, Folder) else Folder()
            if isinstance(folder, File):
                found[operation.inode] = folder
    return found


def lose_power(processes: Processes, recorded: Recorded, moment: int, folder: Path, *, repeats: bool) -> list[str]:
    """What is wrong in one state."""
    scene = recorded.scene
    wrong = scene.wrong_now(folder)
    if moment == len(recorded.log) and not wrong:
        wrong += _lost(scene, folder)
    if repeats:
        failed = scene.repeat(processes, folder)
        wrong += failed or scene.wrong_at_end(folder)
        wrong += [f"after the repeated command: {w}" for w in scene.wrong_now(folder)]
    return wrong


def _lost(scene: Scene, folder: Path) -> list[str]:
    """What the command had reported as done and is not there any more."""
    import featcache
    from featcache.errors import CacheError
    from trainer.runs import checkpoint

    target = scene.target(folder)
    if scene.truth is None:
        want = sorted(n for n in scene.whole if n.endswith("state.json"))
        have = [
            str((p / "state.json").relative_to(target))
            for r in target.glob("*")
            for _, p in checkpoint.list_checkpoints(r)
        ]
        return [] if set(want) <= set(have) else [f"a saved checkpoint is lost: {want} {have}"]
    root = next((n for n in ("zarr.json", "featcache.json") if n in scene.whole), None)
    if root is None:
        return []
    try:
        featcache.open(target)
    except CacheError as error:
        return [f"what was finished is lost: {error.what}"]
    return [] if (target / root).read_bytes() == scene.whole[root] else ["what was finished is not what is seen"]


def run(
    processes: Processes,
    lab: Lab,
    tally: Tally,
    *,
    count: int,
    seed: int,
    first: int = 0,
    only: list[str] | None = None,
    repeat_every: int = 8,
) -> int:
    """`count` states from number `first` on, going round the scenes; returns the number of the next one."""
    work = lab.root / "power"
    work.mkdir(exist_ok=True)
    names = only or list(NAMES)
    recorded = [record(processes, s, work) for s in lab.scenes(processes, [n for n in names if n in _known()])]
    tally.notes["operations"] = {r.scene.name: len(r.log) for r in recorded}
    number = first
    while number < first + count and not tally.late:
        # A block of states from one moment, so that the log is replayed once for all of them.
        block = number // len(MODES)
        one = recorded[block % len(recorded)]
        chance = dice("power", seed, block)
        for index, (moment, mode, folder) in enumerate(states(one, chance, work)):
            if index == len(MODES):
                break
            state = block * len(MODES) + index
            if state < number:
                continue
            repeats = state % repeat_every == 0
            problems = lose_power(processes, one, moment, folder, repeats=repeats)
            where = f"--only power --scene '{one.scene.name}' --seed {seed} --first {state} --count 1: after {moment} of {len(one.log)} operations, {mode}"
            tally.trial(one.scene.name, problems, where)
            number = state + 1
    return number


def _known() -> set[str]:
    from tests.attacks.lab import SCENES

    return set(SCENES)
