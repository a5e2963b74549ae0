"""The workspaces: made once below a folder, by the commands themselves, and copied for every trial; and the scenes in
them, one for every command that writes.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from store_helpers import tree
from web_server import FileServer

from featcache.console import run_app
from featcache.errors import CacheError
from tests.attacks.processes import Processes
from tests.attacks.scenes import TRASH, Bucket, RemoteScene, Scene, cache_view, has_option, run_view, values_of


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
        done="exists already",
        targets=("runs",),
        truth=None,
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
