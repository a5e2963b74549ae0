"""Scenes: for every command that writes, a small workspace, the command, and what is right before and after it.

A workspace is a folder with everything the command reads, what it may change (`targets`), and `beside/`, which nobody
may touch. It is prepared once and copied for every trial.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from store_helpers import tree

import featcache
from featcache.errors import CacheError, UserError
from featcache.read.root import read_remote_root
from featcache.share.manage import collect_garbage
from featcache.share.transfer import pull
from featcache.share.verify import verify
from featcache.store.layout import STATE
from featcache.store.remote import open_location
from tests.attacks.campaign import differences, fingerprint
from tests.attacks.processes import Job, Processes
from trainer.runs.log import OF_THE_MACHINE

Values = dict[str, np.ndarray]
View = Callable[[Path], dict[str, bytes]]

# Where a whole cache goes when it is removed, beside it.
TRASH = ".featcache-trash"
# Of what is told of a finished step: what depends on the clock.
TIMED = (*OF_THE_MACHINE, "seconds", "date", "created", "took_s", "duration_s")


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
    from trainer.runs import checkpoint
    from trainer.runs import folder as runs

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


def has_option(program: str, command: str, option: str | None = None) -> bool:
    """Whether a command (and an option of it) exists."""
    import importlib

    import typer

    group = typer.main.get_command(importlib.import_module(f"{program}.cli").app)
    found = group.commands.get(command)  # type: ignore[attr-defined]
    return found is not None and (option is None or any(option in p.opts for p in found.params))
