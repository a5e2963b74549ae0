"""Imports and samples that are killed at any operation: what is seen is whole, and the same command again completes it.
What a loss of power may take: nothing that a saved checkpoint stands for."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import Killed, Operations
from tiny_runs import Listener, add_nano, log_of, settings

from featcache.errors import UserError
from featcache.progress import Quiet
from featcache.store import files
from trainer.models.config import SIZES
from trainer.requests import SampleRequest
from trainer.runs import checkpoint
from trainer.runs import folder as runs
from trainer.runs.exchange import export_checkpoint, import_checkpoint
from trainer.sampling import draw
from trainer.sampling import run as sampling
from trainer.sampling.run import sample_run
from trainer.training.loop import train

pytestmark = pytest.mark.usefixtures("nano")


@pytest.fixture(scope="module")
def trained(shapes_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """``runs/run`` of one step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    add_nano()
    root = tmp_path_factory.mktemp("interrupted")
    train(settings(shapes_cache, steps=1), resume=False, watcher=Listener(), root=root / "runs")
    yield root / "runs" / "run"
    SIZES.pop("Nano", None)
    torch.set_num_threads(threads)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / "run"))


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that cost nothing, each of its own colour."""

    def draw_units(*args: Any, unit: int, **_: Any) -> Iterator[np.ndarray]:
        labels, seed = args[2], args[4].seed
        for start in range(0, len(labels), unit):
            part = labels[start : start + unit].astype(np.uint8)
            yield np.broadcast_to(part[:, None, None, None] + np.uint8(seed), (len(part), 4, 4, 3))

    monkeypatch.setattr(sampling, "draw_units", draw_units)
    monkeypatch.setattr(draw, "load_decoder", lambda *_: torch.nn.Identity())
    loaded: dict[tuple[Path, int | None], Any] = {}
    load = draw.load_run

    def load_once(run: Path, *, step: int | None, device: str, weights: str) -> Any:
        key = (run, step)
        loaded[key] = loaded[key] if key in loaded else load(run, step=step, device=device, weights=weights)
        return loaded[key]

    monkeypatch.setattr(sampling, "load_run", load_once)
    monkeypatch.setattr(sampling, "BLOCK", 4)
    monkeypatch.setattr(sampling, "GROUP", 4)


def request(**kw: Any) -> SampleRequest:
    return SampleRequest(**{"num": 6, "sampler": "ode", "steps": 1, "device": "cpu", **kw})


def tree(folder: Path) -> dict[str, bytes]:
    """Every file, and every folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def killed(folder: Path, reset: Callable[[], None], act: Callable[[], object], *, every: int) -> Iterator[int]:
    """``act`` killed at every so many of its operations, and yielded after each kill."""
    reset()
    with pytest.MonkeyPatch.context() as patch:
        operations = Operations(patch, folder, None, None)
        act()
    assert operations.count > 20
    for number in range(0, operations.count, every):
        reset()
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            Operations(patch, folder, number, Killed())
            act()
        yield number


# --- trainer import


def test_an_import_that_is_killed_shows_no_run_and_can_be_repeated(trained: Path, tmp_path: Path) -> None:
    weights = export_checkpoint(trained, tmp_path / "weights.pt", convention=None, step=None)
    root = tmp_path / "runs"

    def act() -> Path:
        return import_checkpoint(weights, name="official", weights="ema", convention=None, root=root)

    def reset() -> None:
        shutil.rmtree(root, ignore_errors=True)

    act()
    whole = tree(root)
    for number in killed(root, reset, act, every=2):
        for found in runs.find_runs(root):
            assert found.name == "official" and tree(root / "official") == tree(found)
        try:
            act()
        except UserError as error:
            assert "exists already" in error.what
            with pytest.raises(UserError, match="exists already"):  # also without what the killed one left beside it
                act()
            assert {n: d for n, d in tree(root).items() if not n.endswith(".lock")} == whole, number
        else:
            assert tree(root) == whole, number


def test_an_import_does_not_take_a_name_that_is_taken(trained: Path, tmp_path: Path) -> None:
    weights = export_checkpoint(trained, tmp_path / "weights.pt", convention=None, step=None)
    root = tmp_path / "runs"
    root.mkdir()
    (root / "empty").mkdir()
    (root / "file").write_text("mine")
    (root / "link").symlink_to(tmp_path / "nothing")
    for name in ("empty", "file", "link"):
        with pytest.raises(UserError, match="exists already"):
            import_checkpoint(weights, name=name, weights="ema", convention=None, root=root)
    assert sorted(p.name for p in root.iterdir()) == ["empty", "file", "link"]
    (tmp_path / "a file").write_text("mine")
    with pytest.raises(UserError, match="a file could not be written"):
        import_checkpoint(weights, name="x", weights="ema", convention=None, root=tmp_path / "a file")


# --- trainer export


def test_an_export_makes_its_folder_or_says_why_not(trained: Path, tmp_path: Path) -> None:
    out = export_checkpoint(trained, tmp_path / "new" / "folder" / "weights.pt", convention=None, step=None)
    assert torch.load(out, weights_only=True).keys() >= {"ema", "model"}
    with pytest.raises(UserError, match="could not be written"):
        export_checkpoint(trained, out / "weights.pt", convention=None, step=None)
    with pytest.raises(UserError, match="folder is a folder, and a file is to be written"):
        export_checkpoint(trained, out.parent, convention=None, step=None)
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, former[1]))
    try:
        with pytest.raises(UserError, match=os.strerror(errno.EFBIG)):
            export_checkpoint(trained, out, convention=None, step=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert [p.name for p in out.parent.iterdir()] == ["weights.pt"], "the former one stays, and nothing beside it"
    assert torch.load(out, weights_only=True).keys() >= {"ema", "model"}


# --- trainer sample


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(("format", "every"), [("npz", 1), ("wds", 7), ("png", 7)])
def test_sampling_that_is_killed_is_completed(run: Path, format: Any, every: int) -> None:
    """Where the images are there already, what was to come after them comes all the same."""
    folder = run / "samples"

    def act() -> Path:
        return sample_run(run, request(format=format), Quiet()).images

    def reset() -> None:
        shutil.rmtree(folder, ignore_errors=True)

    images = act()
    whole = tree(folder)
    assert sorted(p.name for p in images.parent.iterdir()) == sorted(["grid_6.png", "settings.json", images.name])
    for number in killed(folder, reset, act, every=every):
        assert act() == images
        assert {n: d for n, d in tree(folder).items() if not n.endswith(".lock")} == whole, number


@pytest.mark.usefixtures("quickly")
def test_images_of_a_killed_call_are_not_passed_off_as_others(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def act(seed: int = 0) -> np.ndarray:
        with np.load(sample_run(run, request(out=out, seed=seed), Quiet()).images) as found:
            return np.asarray(found["arr_0"][:, 0, 0, 0])

    def reset() -> None:
        shutil.rmtree(out, ignore_errors=True)

    first, second = act(), None
    reset()
    second = act(seed=1)
    assert not np.array_equal(first, second)
    for number in killed(out, reset, act, every=3):
        try:
            assert np.array_equal(act(seed=1), second), number
        except UserError as error:
            assert "samples of other settings" in error.what


@pytest.mark.usefixtures("quickly")
def test_samples_that_are_there_need_no_lock_and_a_grid_that_is_gone_is_drawn(run: Path) -> None:
    images = sample_run(run, request(), Quiet()).images
    before = images.stat().st_mtime_ns
    (images.parent / "grid_6.png").unlink()
    sample_run(run, request(), Quiet())
    assert (images.parent / "grid_6.png").is_file()
    assert images.stat().st_mtime_ns == before and not (images.parent / "blocks").exists()


@pytest.mark.usefixtures("quickly")
def test_blocks_of_a_larger_job_that_was_cut_stay_beside_finished_samples(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = sample_run(run, request(num=4), Quiet()).images

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "_write_npz", die)
        with pytest.raises(KeyboardInterrupt):
            sample_run(run, request(num=20), Quiet())
    left = sorted(p.name for p in (small.parent / "blocks").iterdir())
    assert len(left) == 6
    sample_run(run, request(num=4), Quiet())
    assert sorted(p.name for p in (small.parent / "blocks").iterdir()) == left


# --- power


class Journal:
    """The calls that say when something is on the disk: ("fsync", path), ("mkdir", path), ("rename", from, to)."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.entries: list[tuple[str, ...]] = []
        fsync = os.fsync

        def synced(fd: int) -> None:
            self.entries.append(("fsync", str(Path(f"/proc/self/fd/{fd}").readlink())))
            fsync(fd)

        patch.setattr(os, "fsync", synced)
        for name in ("mkdir", "rename", "replace"):
            patch.setattr(os, name, self._noted("mkdir" if name == "mkdir" else "rename", getattr(os, name)))

    def _noted(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kw: Any) -> Any:
            result = real(*args, **kw)
            self.entries.append((kind, *(os.fspath(a) for a in args if isinstance(a, str | Path))))
            return result

        return call


def test_a_checkpoint_s_name_comes_after_all_that_it_stands_for(
    shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folders are synced into their parents, and the log's lines are on the disk; steps without one sync nothing."""
    root = tmp_path / "new" / "runs"
    config = settings(shapes_cache, steps=6, checkpoint_every=2, keep_checkpoints=1)
    with monkeypatch.context() as patch:
        journal = Journal(patch)
        train(config, resume=False, watcher=Listener(), root=root)
    log, entries = str(root / "run" / "log.jsonl"), journal.entries
    saved = [i for i, entry in enumerate(entries) if entry[0] == "rename" and re.search(r"/step_\d+$", entry[-1])]
    assert len(saved) == 3
    assert entries.count(("fsync", log)) == 3, "once per checkpoint, not once per step"
    for start, stop in zip([0, *saved], saved):
        assert ("fsync", log) in entries[start:stop]
        assert entries[stop + 1] == ("fsync", str(root / "run" / "checkpoints"))
    made = [entry[1] for entry in entries[: saved[0]] if entry[0] == "mkdir" and entry[1].startswith(str(tmp_path))]
    assert {str(root), str(root / "run"), str(root / "run" / "checkpoints")} < set(made)
    for folder in made:
        if "tensorboard" not in folder and ".partial" not in folder:
            assert ("fsync", str(Path(folder).parent)) in entries[entries.index(("mkdir", folder)) : saved[0]], folder
    removals = [i for i, entry in enumerate(entries) if entry[-1].endswith(".removed")]
    assert len(removals) == 2
    assert all(entries[i + 1] == ("fsync", str(root / "run" / "checkpoints")) for i in removals)


def test_a_log_that_cannot_be_synced_ends_the_run_in_one_sentence(
    shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refuse(fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").readlink().name == "log.jsonl":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(UserError, match=r"nothing is saved yet\): Input/output error: .*log\.jsonl"):
            train(settings(shapes_cache, steps=2), resume=False, watcher=Listener(), root=tmp_path)


def test_leftovers_of_a_killed_run_go_when_it_is_resumed(shapes_cache: Path, run: Path) -> None:
    """Also where nothing is left to train; files with a user's names stay."""
    part = f"{'0123456789abcdef'}.part"
    left = [run / f"{name}.{part}" for name in ("config.yaml", "cache.json", "log.jsonl")]
    left += [run / "samples" / f"step_0000001.png.{part}", run / "checkpoints" / ".step_0000002.partial" / "x"]
    mine = [run / "notes.part", run / f"report.html.{part}", run / "checkpoints" / "notes.txt"]
    for path in (*left, *mine):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    old = run / "checkpoints" / "step_0000000"
    shutil.copytree(checkpoint.find_checkpoint(run)[1], old)
    (old / "state.json").write_text('{"step": 0}')
    for steps in (1, 2):
        config = settings(shapes_cache, steps=steps, keep_checkpoints=1)
        train(config, resume=True, watcher=Listener(), root=run.parent)
        assert not any(path.exists() for path in left) and not old.exists()
        assert all(path.exists() for path in mine)
        assert [record["step"] for record in log_of(run)] == list(range(1, steps + 1))


# --- links, pipes, files for folders and folders for files


@pytest.mark.usefixtures("quickly")
def test_nothing_is_written_or_read_through_a_link_in_a_run(run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    images = sample_run(run, request(), Quiet()).images
    named = images.parent
    for place in (run / "samples", named, named / "blocks", images, named / "grid_6.png"):
        kept = place.with_name("kept")
        if place.exists():
            place.rename(kept)
        place.symlink_to(outside)
        with pytest.raises(UserError, match=f"{place.name} is a symbolic link"):
            sample_run(run, request(), Quiet())
        assert not list(outside.iterdir())
        place.unlink()
        if kept.exists():
            kept.rename(place)
    (run / "checkpoints").rename(run / "kept")
    (run / "checkpoints").symlink_to("kept")
    with pytest.raises(UserError, match="checkpoints is a symbolic link"):
        checkpoint.find_checkpoint(run)
    (run / "checkpoints").unlink()
    (run / "kept").rename(run / "checkpoints")
    link = tmp_path / "link"
    link.symlink_to(run)
    assert sample_run(link, request(num=3), Quiet()).images.exists(), "what was typed may be a link"


@pytest.mark.parametrize("name", ["tensorboard", "samples", "checkpoints"])
def test_training_follows_no_link_in_its_folder(shapes_cache: Path, run: Path, tmp_path: Path, name: str) -> None:
    shutil.rmtree(run / name, ignore_errors=True)
    (tmp_path / "outside").mkdir()
    (run / name).symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=f"{name} is a symbolic link"):
        train(settings(shapes_cache, steps=2), resume=True, watcher=Listener(), root=run.parent)
    assert not list((tmp_path / "outside").iterdir())


@pytest.mark.parametrize("name", ["model", "ema"])
def test_a_pipe_in_place_of_tensors_holds_nobody_up(run: Path, name: str) -> None:
    folder = checkpoint.find_checkpoint(run)[1]
    (folder / f"{name}.safetensors").unlink()
    os.mkfifo(folder / f"{name}.safetensors")
    with pytest.raises(UserError, match=f"{name}.safetensors is not a file"):
        checkpoint.load_tensors(folder, name)


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(
    "place", ["", "named", "named/samples_6.npz", "named/grid_6.png", "named/settings.json", "named/blocks"]
)
def test_a_file_for_a_folder_or_a_folder_for_a_file_is_explained(run: Path, place: str) -> None:
    named = sample_run(run, request(), Quiet()).images.parent
    path = run / "samples" / place.replace("named", named.name)
    was_file = path.is_file()
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if was_file:
        path.mkdir()
        (path / "own.txt").write_text("mine")
    else:
        path.write_text("mine")
    if place == "named/blocks":  # nothing is left to do, so nobody looks
        (named / "grid_6.png").unlink()
    with pytest.raises(UserError) as error:
        sample_run(run, request(), Quiet())
    assert path.name in error.value.what and "\n" not in error.value.what
    assert (path / "own.txt" if was_file else path).read_text() == "mine"


@pytest.mark.usefixtures("quickly")
def test_a_user_s_file_among_the_blocks_stays(run: Path) -> None:
    named = sample_run(run, request(), Quiet()).images.parent
    (named / "grid_6.png").unlink()
    (named / "blocks").mkdir()
    (named / "blocks" / "notes.txt").write_text("mine")
    for _ in range(2):
        sample_run(run, request(), Quiet())
        assert [p.name for p in (named / "blocks").iterdir()] == ["notes.txt"]


def test_temporary_names_are_told_from_a_user_s(tmp_path: Path) -> None:
    (tmp_path / f"x.{'0' * 16}.part").write_text("")
    (tmp_path / f"y.{'0' * 16}.part").mkdir()
    (tmp_path / "x.part").write_text("")
    (tmp_path / f"{'0' * 16}.part").write_text("")
    files.remove_parts(tmp_path, of=["y"])
    assert len(list(tmp_path.iterdir())) == 3
    files.remove_parts(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{'0' * 16}.part", "x.part"]
