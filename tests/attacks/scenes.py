"""Scenes: for every command that writes, a small workspace, the command, and what is right before and after it.

A workspace is a folder with everything the command reads, what it may change (`targets`), and `beside/`, which nobody
may touch. It is prepared once and copied for every trial.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from store_helpers import tree
from web_server import FileServer

import featcache
from featcache.console import run_app
from featcache.errors import CacheError, UserError
from featcache.remote import open_location
from featcache.share import pull, read_remote_root
from featcache.store.layout import STATE
from featcache.store.manage import collect_garbage
from featcache.store.verify import verify
from tests.attacks.campaign import differences, fingerprint
from tests.attacks.processes import Job, Processes

Values = dict[str, np.ndarray]
View = Callable[[Path], dict[str, bytes]]

# Where a whole cache goes when it is removed, beside it.
TRASH = ".featcache-trash"
# Of what is told of a finished step: what depends on the clock.
TIMED = ("time_s", "images_per_s", "seconds", "date", "created", "took_s", "duration_s")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One command in one workspace.

    argv: the command. prepared: folder to copy for a trial. targets: what it may change, relative to the workspace;
    the first is the one looked at. truth: right values of every array that may ever be seen (None: not a cache).
    must_open: readers see a complete cache at every moment. damaged: the cache is damaged when the command begins, so
    what is right before its end is only what `verify` calls sound. again: the words of a repeated command where they
    differ. done: what a repeated command may say (exit code 2) when the first had done its work already. undo: what brings back
    what there was before (where this version has it). view: the
    bytes that must be those of an undisturbed run. network: what is sent counts as operations. gc: `featcache gc` is
    for this target. whole, base, operations: of the undisturbed run, what its target held before (which `gc` may
    leave), how many operations it made.
    """

    name: str
    argv: tuple[str, ...]
    prepared: Path
    targets: tuple[str, ...]
    truth: Values | None
    must_open: bool = False
    damaged: bool = False
    again: Callable[[Path], tuple[str, ...]] | None = None
    done: str | None = None
    undo: tuple[str, ...] | None = None
    view: View = field(default=lambda folder: cache_view(folder))
    network: bool = False
    gc: bool = True
    whole: dict[str, bytes] = field(default_factory=dict)
    base: dict[str, bytes] = field(default_factory=dict)
    operations: int = 0

    def stage(self, folder: Path) -> Path:
        """A fresh copy of the workspace at `folder`."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.prepared, folder, symlinks=True)
        return folder

    def target(self, folder: Path) -> Path:
        return folder / self.targets[0]

    def job(self, folder: Path, **changes: Any) -> Job:
        words = changes.pop("argv", self.argv)
        values = {
            "argv": tuple(w.replace("{folder}", str(folder)) for w in words),
            "folder": str(folder),
            "watch": str(folder),
            "output": str(folder.parent / f"{folder.name}.output"),
            "network": self.network,
        }
        return Job(**{**values, **changes})

    def outside(self, folder: Path) -> dict[str, str]:
        """Everything in the workspace that the command may not touch."""
        kept = fingerprint(folder)
        return {n: v for n, v in kept.items() if not any(n == t or n.startswith(t + "/") for t in self.targets)}

    def wrong_now(self, folder: Path) -> list[str]:
        """What a reader would see that is not right, at this moment."""
        if self.truth is None:
            return wrong_in_runs(self.target(folder))
        if self.damaged and not is_sound(self.target(folder)):
            return []
        return wrong_in_cache(self.target(folder), self.truth, must_open=self.must_open)

    def wrong_at_end(self, folder: Path) -> list[str]:
        """Whether the result differs from an undisturbed run's. Locks, journals and temporary files of the interrupted one
        may be there until `gc`: where the work was done already, the repeated command had nothing to do.
        """
        have = self.view(self.target(folder))
        new = set(have) - set(self.whole)
        if self.gc and new and all(name.startswith(STATE) or name.endswith(".part") for name in new):
            collect_garbage(self.target(folder))
            have = self.view(self.target(folder))
        wrong = differences(have, self.whole)
        return [f"not as an undisturbed run leaves it: {', '.join(wrong)}"] if wrong else []

    def repeat(self, processes: Processes, folder: Path) -> list[str]:
        """The same command again, as a user would type it; what goes wrong."""
        words = self.argv if self.again is None else self.again(folder)
        ended = processes.run(self.job(folder, argv=words, group_files=128))
        if ended.code == 2 and "--resume" in ended.output and "--resume" not in words:
            ended = processes.run(self.job(folder, argv=(*words, "--resume"), group_files=128))
        if self.done is not None and ended.code == 2 and re.search(self.done, " ".join(ended.output.split())):
            if self.gc and self.target(folder).exists():
                with contextlib.suppress(CacheError):
                    collect_garbage(self.target(folder))
            return []
        return [] if ended.code == 0 else [f"the repeated command failed: {ended}"]

    def wrong_undone(self, processes: Processes, folder: Path) -> list[str]:
        """Takes the command back; what is not as it was before it."""
        if self.undo is None or not has_option(*self.undo[:2]):
            return []
        ended = processes.run(self.job(folder, argv=self.undo, group_files=128))
        if ended.code != 0:
            return [f"it cannot be undone: {ended}"]
        wrong = differences(cache_view(self.target(folder)), self.base)
        return [f"undone, it is not as it was: {', '.join(wrong)}"] if wrong else []

    def wrong_after_gc(self, folder: Path) -> list[str]:
        """Clears up in an interrupted cache; what should not be there then."""
        target = self.target(folder)
        if not self.gc or not target.is_dir() or not any(target.iterdir()):
            return []
        try:
            collect_garbage(target)
        except UserError as error:
            # An empty folder or a few directories are no cache.
            return [] if not cache_view(target) else [f"gc refuses: {error.what}"]
        except Exception as error:
            return [f"gc raises: {error!r}"]
        have = cache_view(target)
        stray = sorted(set(have) - set(self.whole) - set(self.base))
        wrong = [f"gc leaves: {', '.join(stray[:5])}"] if stray else []
        if not self.must_open and not any(n in have for n in ("zarr.json", "featcache.json")) and have:
            wrong.append(f"gc leaves files of no cache: {', '.join(sorted(have)[:5])}")
        return wrong + [f"after gc: {w}" for w in self.wrong_now(folder)]


# What may lie in a cache's state folder without being part of the cache: records of verifications, the trash.
NOTES = tuple(f"{STATE}/{name}" for name in ("verified.json", "sound/", "trash/"))


def cache_view(folder: Path) -> dict[str, bytes]:
    """The files of a cache without what is noted beside it."""
    return {name: data for name, data in tree(folder).items() if not name.startswith(NOTES)}


@dataclass
class Bucket:
    """An S3 server's bucket; every trial has a prefix of its own in it."""

    endpoint: str
    name: str
    serial: int = 0

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @property
    def prefix(self) -> str:
        return f"{self.serial:06d}/c"

    @property
    def url(self) -> str:
        return f"s3://{self.name}/{self.prefix}"

    def objects(self) -> dict[str, bytes]:
        """Everything under the present prefix."""
        import boto3

        client = boto3.client("s3", endpoint_url=self.endpoint)
        listed = client.list_objects_v2(Bucket=self.name, Prefix=self.prefix + "/").get("Contents", [])
        names = [entry["Key"] for entry in listed]
        found = {n: client.get_object(Bucket=self.name, Key=n)["Body"].read() for n in names}
        return {n.removeprefix(self.prefix + "/"): data for n, data in found.items()}


@dataclass(frozen=True, kw_only=True)
class RemoteScene(Scene):
    """A scene whose result lies in a bucket; `{url}` in the command is the place. The local target is the source."""

    bucket: Bucket

    def stage(self, folder: Path) -> Path:
        self.bucket.serial += 1
        return super().stage(folder)

    def job(self, folder: Path, **changes: Any) -> Job:
        words = changes.pop("argv", self.argv)
        argv = tuple(word.replace("{url}", self.bucket.url) for word in words)
        return super().job(folder, **{"argv": argv, "environment": self.bucket.environment, **changes})

    def wrong_now(self, folder: Path) -> list[str]:
        os.environ |= self.bucket.environment
        wrong = wrong_in_cache(self.target(folder), self.truth or {}, must_open=True)
        if read_remote_root(open_location(self.bucket.url)) is None:
            return wrong
        copy = folder.parent / "pulled"
        shutil.rmtree(copy, ignore_errors=True)
        try:
            pull(self.bucket.url, copy, threads=4)
        except CacheError as error:
            return [*wrong, f"seen in the bucket, but not whole: {error.what}"]
        return wrong + wrong_in_cache(copy, self.truth or {}, must_open=True)

    def wrong_at_end(self, folder: Path) -> list[str]:
        wrong = differences(self.bucket.objects(), self.whole) if self.whole else []
        wrong += differences(cache_view(self.target(folder)), self.base)
        return [f"not as an undisturbed run leaves it: {', '.join(wrong)}"] if wrong else []


def values_of(path: Path | str) -> Values:
    """All stored values of a cache by array, slots included that are skipped."""
    cache = featcache.open(path)
    names = sorted(cache.manifest.features)
    with cache.reader(names, slots=True, threads=0, access="pread") as reader:
        out = reader.allocate(cache.manifest.dataset.count)
        reader.read(np.arange(cache.manifest.dataset.count), out)
    return {name: array.copy() for name, array in out.items()}


def is_sound(path: Path) -> bool:
    """Whether `verify` says so."""
    try:
        return verify(path, threads=1).ok
    except CacheError:
        return False


def wrong_in_cache(path: Path | str, truth: Values, *, must_open: bool = False) -> list[str]:
    """A cache that opens reads right values, and `verify` calls it sound; else it says that it does not open."""
    try:
        cache = featcache.open(path)
    except CacheError as error:
        return [f"does not open: {error.what}"] if must_open else []
    except Exception as error:
        return [f"opening raises: {error!r}"]
    if not cache.manifest.features:
        return []
    try:
        seen = values_of(path)
    except Exception as error:
        return [f"opens but cannot be read: {error!r}"]
    wrong = []
    for name, array in seen.items():
        if name not in truth:
            wrong.append(f"an array that nobody wrote: {name}")
        elif len(array) > len(truth[name]) or not np.array_equal(array, truth[name][: len(array)]):
            wrong.append(f"wrong values: {name}")
    if isinstance(path, Path):
        report = verify(path, threads=1)
        if not report.ok:
            wrong.append(f"verify is not content: {'; '.join(map(str, report.problems[:3]))}")
    return wrong


def wrong_in_runs(root: Path) -> list[str]:
    """Every run below has a readable configuration and log, and checkpoints that are whole."""
    from trainer import checkpoint, runs

    wrong = []
    for run in {p.parent for p in root.glob("**/config.yaml")} if root.is_dir() else set():
        try:
            runs.load_config(run)
            list(runs.read_log(run))
            for step, path in checkpoint.list_checkpoints(run):
                if int(path.name.removeprefix("step_")) != step or checkpoint.load_state(path) is None:
                    wrong.append(f"a checkpoint of another step: {path}")
                for file in path.glob("*.safetensors"):
                    checkpoint.load_tensors(path, file.stem)
        except UserError as error:
            wrong.append(f"a run that cannot be read: {error.what}")
        except Exception as error:
            wrong.append(f"reading a run raises: {error!r}")
    return wrong


def run_view(root: Path) -> dict[str, bytes]:
    """The files of run folders without what depends on the clock, and without locks (files that stay, empty)."""
    found = {}
    for name, data in tree(root).items():
        if "tensorboard/" in name or name.endswith("/.lock"):
            continue
        if name.endswith((".jsonl", ".json")):
            with contextlib.suppress(ValueError):
                lines = [_timeless(json.loads(line)) for line in (data.splitlines() if ".jsonl" in name else [data])]
                data = json.dumps(lines, sort_keys=True).encode()
        if name.endswith(".html"):
            data = b"a page"
        found[name] = data
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in TIMED}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def call(folder: Path, *argv: str) -> None:
    """A command in this process; raises RuntimeError if it fails."""
    import importlib

    program = importlib.import_module(f"{argv[0]}.cli")
    before, sys.argv = (Path.cwd(), sys.argv), list(argv)
    os.chdir(folder)
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = run_app(program.app)
    finally:
        os.chdir(before[0])
        sys.argv = before[1]
    if code:
        raise RuntimeError(f"{' '.join(argv)}: exit code {code}: {out.getvalue()}")


def has_option(program: str, command: str, option: str | None = None) -> bool:
    """Whether a command (and an option of it) exists."""
    import importlib

    import typer

    group = typer.main.get_command(importlib.import_module(f"{program}.cli").app)
    found = group.commands.get(command)  # type: ignore[attr-defined]
    return found is not None and (option is None or any(option in p.opts for p in found.params))


BUILD = ("--data", "shapes", "--limit", "10", "--shard-size", "4", "--batch-size", "4", "--workers", "1")
MAKE = ("featcache", "build", *BUILD, "--vae", "tiny", "--vae-levels", "G3", "--encoder", "tiny@2", "--out", "c")
INTO = (
    *("featcache", "build", "--data", "shapes", "--into", "c", "--encoder", "tiny@5"),
    "--batch-size",
    "4",
    "--workers",
    "1",
)
RUN = (
    *("trainer", "run", "--model", "SiT-Nano/2", "--cache", "c", "--name", "r", "--steps", "3", "--batch-size", "4"),
    *("--device", "cpu", "--set", "checkpoint_every=1", "--set", "keep_checkpoints=2", "--set", "log_every=1"),
    *("--set", "sample_every=0"),
)


class _Server(FileServer):
    """A client that is killed is nothing to speak of."""

    def handle_error(self, *_: object) -> None:
        pass


class Lab:
    """Makes the workspaces below a folder. Caches are built once, by the commands themselves."""

    def __init__(self, root: Path, *, s3: str | None = None) -> None:
        """s3: URL of an S3 server, for the scenes that need one."""
        self.root = root
        self.s3 = s3
        self._made: dict[str, Scene] = {}
        self._measured: dict[str, Scene] = {}
        self._web: FileServer | None = None
        self.base = root / "base"
        self.base.mkdir(parents=True)
        beside = self.base / "beside"
        beside.mkdir()
        (beside / "notes.txt").write_text("a user's own notes\n")
        (beside / "more").mkdir()
        (beside / "more" / "data.bin").write_bytes(bytes(range(256)) * 16)
        call(self.base, *MAKE)
        shutil.copytree(self.base, root / "grown")
        call(root / "grown", *INTO)
        self.values = values_of(self.base / "c")
        self.grown = values_of(root / "grown" / "c")

    @property
    def web(self) -> str:
        """URL of a web server that serves the lab's folder."""
        if self._web is None:
            self._web = _Server(self.root)
            threading.Thread(target=self._web.serve_forever, daemon=True).start()
        return self._web.url

    def bucket(self) -> Bucket:
        import boto3

        assert self.s3 is not None
        found = Bucket(endpoint=self.s3, name=f"attacks-{time.monotonic_ns()}")
        os.environ |= found.environment
        boto3.client("s3", endpoint_url=self.s3).create_bucket(Bucket=found.name)
        return found

    def workspace(self, name: str, start: str = "base") -> Path:
        """A new copy of a workspace to prepare further."""
        serial = len(list((self.root / "scenes").glob("*")))
        folder = self.root / "scenes" / f"{serial:03d}-{re.sub('[^a-z0-9]+', '-', name.lower())}"
        shutil.copytree(self.root / start, folder)
        return folder

    def scene(self, name: str) -> Scene:
        """The scene of that name; raises KeyError."""
        if name not in self._made:
            self._made[name] = SCENES[name](self)
        return self._made[name]

    def scenes(self, processes: Processes, names: list[str] | None = None) -> Iterator[Scene]:
        """Scenes with the result of an undisturbed run of each."""
        for name in names or list(SCENES):
            if not available(name) or (name in _NEED_S3 and self.s3 is None):
                continue
            yield self.measured(processes, self.scene(name))

    def measured(self, processes: Processes, scene: Scene) -> Scene:
        """The scene with its undisturbed result and number of operations."""
        if scene.name in self._measured:
            return self._measured[scene.name]
        folder = scene.stage(self.root / "whole" / scene.name)
        base = cache_view(scene.target(folder)) if scene.target(folder).is_dir() else {}
        ended = processes.run(scene.job(folder))
        if ended.code != 0:
            raise RuntimeError(f"the scene {scene.name} fails undisturbed: {ended}")
        whole = scene.bucket.objects() if isinstance(scene, RemoteScene) else scene.view(scene.target(folder))
        self._measured[scene.name] = replace(scene, whole=whole, operations=ended.operations, base=base)
        return self._measured[scene.name]


def available(name: str) -> bool:
    """Whether the command that a scene needs exists in this version."""
    if name == "sign" and shutil.which("ssh-keygen") is None:
        return False
    needs = _NEEDS.get(name)
    return needs is None or has_option(*needs)


_NEED_S3 = ("push s3",)
_NEEDS: dict[str, tuple[str, ...]] = {
    "repair from": ("featcache", "repair", "--from"),
    "verify repair from": ("featcache", "verify", "--from"),
    "rm now": ("featcache", "rm", "--now"),
    "restore features": ("featcache", "restore"),
    "restore cache": ("featcache", "restore"),
    "sign": ("featcache", "sign"),
}


def _build(lab: Lab) -> Scene:
    folder = lab.workspace("build")
    shutil.rmtree(folder / "c")
    return Scene(name="build", argv=MAKE, prepared=folder, targets=("c",), truth=lab.values)


def _build_wds(lab: Lab) -> Scene:
    folder = lab.workspace("build wds")
    shutil.rmtree(folder / "c")
    argv = (*MAKE[: MAKE.index("--encoder")], "--format", "wds", "--out", "c")
    return Scene(name="build wds", argv=argv, prepared=folder, targets=("c",), truth=lab.values)


def stop_before_the_end(folder: Path, argv: tuple[str, ...]) -> None:
    """A build that is stopped when all its shards are written and nothing is visible yet."""
    from featcache.store import writer

    saved, real = writer.GROUP_FILES, writer.CacheWriter.finish

    def stop(self: Any) -> Any:
        raise CacheError("stopped")

    try:
        writer.GROUP_FILES, writer.CacheWriter.finish = 1, stop  # type: ignore[method-assign]
        with contextlib.suppress(RuntimeError):
            call(folder, *argv)
    finally:
        writer.GROUP_FILES, writer.CacheWriter.finish = saved, real  # type: ignore[method-assign]


def _resumed(lab: Lab) -> Scene:
    folder = lab.workspace("build resumed")
    cache = folder / "c"
    # As a kill between the journal's and the root document's writing leaves it.
    shutil.rmtree(cache)
    stop_before_the_end(folder, MAKE)
    for entry in [*cache.glob("vae/moments/c.1.*"), *cache.glob(".featcache/building/*/00000002.json")]:
        entry.unlink()
    return Scene(name="build resumed", argv=MAKE, prepared=folder, targets=("c",), truth=lab.values)


def _into(lab: Lab) -> Scene:
    return Scene(
        name="build into",
        argv=INTO,
        prepared=lab.workspace("build into"),
        targets=("c",),
        truth=lab.grown,
        must_open=True,
    )


def _flip(path: Path, at: int = 100) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 8
    path.write_bytes(data)


def _repair(lab: Lab) -> Scene:
    folder = lab.workspace("repair", "grown")
    _flip(folder / "c/tiny@2/c.1.0.0")
    _flip(folder / "c/label/c.0")
    (folder / "c/vae/moments/c.2.0.0.0").unlink()
    _flip(folder / "c/tiny@5/SHA256SUMS")
    _flip(folder / "c/vae/zarr.json", 5)
    return Scene(
        name="repair",
        argv=("featcache", "verify", "c", "--repair", "--device", "cpu"),
        prepared=folder,
        targets=("c",),
        truth=lab.grown,
        damaged=True,
    )


def _repair_from(lab: Lab, argv: tuple[str, ...], name: str) -> Scene:
    scene = _repair(lab)
    folder = lab.workspace(name, "grown")
    shutil.copytree(folder / "c", folder / "sound")
    shutil.rmtree(folder / "c")
    shutil.copytree(scene.prepared / "c", folder / "c")
    shutil.rmtree(scene.prepared)
    return replace(scene, name=name, argv=argv, prepared=folder)


def _rm(lab: Lab) -> Scene:
    return Scene(
        name="rm features",
        argv=("featcache", "rm", "c", "--features", "tiny@5,vae/G3", "--yes"),
        prepared=lab.workspace("rm features", "grown"),
        targets=("c",),
        truth=lab.grown,
        must_open=True,
        done="does not hold",
        undo=("featcache", "restore", "c"),
    )


def _rm_all(lab: Lab) -> Scene:
    return Scene(
        name="rm cache",
        argv=("featcache", "rm", "c", "--yes"),
        prepared=lab.workspace("rm cache"),
        targets=("c", TRASH),
        truth=lab.values,
        done="there is no cache",
        undo=("featcache", "restore", "c"),
        gc=False,
    )


def _restore(lab: Lab) -> Scene:
    folder = lab.workspace("restore features", "grown")
    call(folder, "featcache", "rm", "c", "--features", "tiny@5,vae/G3", "--yes")
    return Scene(
        name="restore features",
        argv=("featcache", "restore", "c"),
        prepared=folder,
        targets=("c",),
        truth=lab.grown,
        must_open=True,
        done="trash|nothing|removed",
    )


def _restore_all(lab: Lab) -> Scene:
    folder = lab.workspace("restore cache")
    call(folder, "featcache", "rm", "c", "--yes")
    return Scene(
        name="restore cache",
        argv=("featcache", "restore", "c"),
        prepared=folder,
        targets=("c", TRASH),
        truth=lab.values,
        done="trash|nothing|in the way|is there",
    )


def _sign(lab: Lab) -> Scene:
    folder = lab.workspace("sign")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
    return Scene(
        name="sign",
        argv=("featcache", "sign", "c", "--key", "key"),
        prepared=folder,
        targets=("c",),
        truth=lab.values,
        must_open=True,
    )


def _gc(lab: Lab) -> Scene:
    folder = lab.workspace("gc")
    stop_before_the_end(folder, INTO)
    (folder / "c/tiny@5/c.2.0.0").rename(folder / "c/tiny@5/c.2.0.0.part")
    (folder / "c/zarr.json.part").write_bytes(b"half")
    return Scene(
        name="gc",
        argv=("featcache", "gc", "c"),
        prepared=folder,
        targets=("c",),
        truth=lab.grown,
        must_open=True,
        gc=False,
    )


def _pull(lab: Lab) -> Scene:
    folder = lab.workspace("pull", "grown")
    return Scene(
        name="pull", argv=("featcache", "pull", "c", "copy"), prepared=folder, targets=("copy",), truth=lab.grown
    )


def _pull_more(lab: Lab) -> Scene:
    folder = lab.workspace("pull more", "grown")
    call(folder, "featcache", "pull", "c", "copy", "--features", "vae/moments")
    return Scene(
        name="pull more",
        argv=("featcache", "pull", "c", "copy"),
        prepared=folder,
        targets=("copy",),
        truth=lab.grown,
        must_open=True,
    )


def _push(lab: Lab) -> Scene:
    folder = lab.workspace("push folder", "grown")
    return Scene(
        name="push folder",
        argv=("featcache", "push", "c", "{folder}/place/c"),
        prepared=folder,
        targets=("place/c", "place"),
        truth=lab.grown,
    )


def _pull_web(lab: Lab) -> Scene:
    return Scene(
        name="pull web",
        argv=("featcache", "pull", f"{lab.web}/grown/c", "copy"),
        prepared=lab.workspace("pull web"),
        targets=("copy",),
        truth=lab.grown,
        network=True,
    )


def _push_s3(lab: Lab) -> Scene:
    return RemoteScene(
        name="push s3",
        argv=("featcache", "push", "c", "{url}"),
        prepared=lab.workspace("push s3", "grown"),
        targets=("c",),
        truth=lab.grown,
        network=True,
        bucket=lab.bucket(),
    )


def _convert(to: str) -> Callable[[Lab], Scene]:
    def make(lab: Lab) -> Scene:
        folder = lab.workspace(f"convert to {to}", "grown")
        if to == "zarr":
            call(folder, "featcache", "convert", "c", "w", "--to", "wds")
        argv = ("featcache", "convert", "w" if to == "zarr" else "c", "copy", "--to", to)
        return Scene(name=f"convert to {to}", argv=argv, prepared=folder, targets=("copy",), truth=lab.grown)

    return make


def _import(lab: Lab) -> Scene:
    folder = lab.workspace("import")
    source = folder / "latents"
    source.mkdir()
    rng = np.random.default_rng(0)
    labels = []
    for i in range(9):
        values = np.abs(rng.standard_normal((8, 4, 4))).astype(np.float32) + 0.1
        np.save(source / f"img{i:08d}.npy", values)
        labels.append([f"img{i:08d}.npy", i % 3])
    (source / "dataset.json").write_text(json.dumps({"labels": labels}))
    whole = folder / "whole"
    call(folder, "featcache", "import", "latents", "--from", "repa", "--out", "whole")
    truth = values_of(whole)
    shutil.rmtree(whole)
    return Scene(
        name="import",
        argv=("featcache", "import", "latents", "--from", "repa", "--out", "i"),
        prepared=folder,
        targets=("i",),
        truth=truth,
    )


def _train(lab: Lab) -> Scene:
    return Scene(
        name="trainer run",
        argv=RUN,
        prepared=lab.workspace("trainer run"),
        targets=("runs",),
        truth=None,
        view=run_view,
        gc=False,
    )


def trained(lab: Lab, name: str) -> Path:
    """A new workspace with a run `runs/r` of three steps."""
    folder = lab.workspace(name)
    ready = lab.root / "trained"
    if not ready.exists():
        from tiny_runs import add_nano

        add_nano()
        shutil.copytree(lab.base, ready)
        call(ready, *RUN)
    shutil.copytree(ready / "runs", folder / "runs")
    return folder


def _resume(lab: Lab) -> Scene:
    folder = trained(lab, "trainer resume")
    argv = tuple("5" if word == "3" else word for word in RUN)
    return Scene(
        name="trainer resume",
        argv=(*argv, "--resume"),
        prepared=folder,
        targets=("runs",),
        truth=None,
        view=run_view,
        gc=False,
    )


def _sample(lab: Lab) -> Scene:
    argv = ("trainer", "sample", "runs/r", "--num", "4", "--steps", "2", "--device", "cpu", "--batch-size", "2")
    return Scene(
        name="trainer sample",
        argv=argv,
        prepared=trained(lab, "trainer sample"),
        targets=("runs",),
        truth=None,
        view=run_view,
        gc=False,
    )


def _eval(lab: Lab) -> Scene:
    argv = ("trainer", "eval", "runs/r", "--num", "8", "--steps", "2", "--device", "cpu", "--batch-size", "8")
    return Scene(
        name="trainer eval",
        argv=argv,
        prepared=trained(lab, "trainer eval"),
        targets=("runs",),
        truth=None,
        view=run_view,
        gc=False,
    )


def _export(lab: Lab) -> Scene:
    folder = trained(lab, "trainer export")
    (folder / "out").mkdir()
    return Scene(
        name="trainer export",
        argv=("trainer", "export", "runs/r", "out/weights.pt"),
        prepared=folder,
        targets=("out",),
        truth=None,
        view=lambda folder: dict.fromkeys(tree(folder), b""),
        gc=False,
    )


def _trainer_import(lab: Lab) -> Scene:
    folder = trained(lab, "trainer import")
    call(folder, "trainer", "export", "runs/r", "weights.pt")
    shutil.rmtree(folder / "runs")
    return Scene(
        name="trainer import",
        argv=("trainer", "import", "weights.pt", "--name", "official"),
        prepared=folder,
        targets=("runs",),
        truth=None,
        done="exists already",
        view=run_view,
        gc=False,
    )


SCENES: dict[str, Callable[[Lab], Scene]] = {
    "build": _build,
    "build wds": _build_wds,
    "build resumed": _resumed,
    "build into": _into,
    "repair": _repair,
    "verify repair from": lambda lab: _repair_from(
        lab, ("featcache", "verify", "c", "--repair", "--from", "sound"), "verify repair from"
    ),
    "repair from": lambda lab: _repair_from(lab, ("featcache", "repair", "c", "--from", "sound"), "repair from"),
    "rm features": _rm,
    "rm cache": _rm_all,
    "rm now": lambda lab: replace(
        _rm_all(lab),
        name="rm now",
        argv=("featcache", "rm", "c", "--yes", "--now"),
        prepared=lab.workspace("rm now"),
        undo=None,
    ),
    "restore features": _restore,
    "restore cache": _restore_all,
    "sign": _sign,
    "gc": _gc,
    "pull": _pull,
    "pull more": _pull_more,
    "pull web": _pull_web,
    "push folder": _push,
    "push s3": _push_s3,
    "convert to wds": _convert("wds"),
    "convert to zarr": _convert("zarr"),
    "import": _import,
    "trainer run": _train,
    "trainer resume": _resume,
    "trainer sample": _sample,
    "trainer eval": _eval,
    "trainer export": _export,
    "trainer import": _trainer_import,
}
