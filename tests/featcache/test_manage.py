"""Listing, removing with a way back, and clearing away: nothing outside the cache, nothing of anybody else's, never half."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from store_helpers import COUNT, SHARD_SIZE, add, base_features, build, dataset, moments, tokens, tree, write_all

import featcache
from featcache.errors import CacheError, UserError
from featcache.share import manage, trash
from featcache.share.verify import verify
from featcache.store import files, locks
from featcache.store.layout import canonical_json
from featcache.store.root import read_root, root_bytes
from featcache.store.writers import create_writer, open_writer, repair_writer

DAY_S = 86_400.0
SMALL = {"count": 4, "shard_size": 2}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_fsync", lambda fd: None)


def dead_build(path: Path, name: str = "dead@1") -> None:
    """An unfinished feature whose builder is gone: its first shards are written."""
    with open_writer(path) as writer:
        writer.begin([tokens(name)])
        write_all(writer, [tokens(name)])


# Clearing away


def test_gc_follows_no_link_and_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    other = build(tmp_path / "other")
    (other / "tiny@5" / "c.0.0.0.part").write_bytes(b"of the other cache")
    path = build(tmp_path / "x")
    dead_build(path)
    (path / "link").symlink_to(other, target_is_directory=True)
    (path / "vae" / "link").symlink_to(other / "vae", target_is_directory=True)
    users = [
        *("thesis.part", "mine/c.0.0.0", "mine/zarr.json", "vae/draft.part", "tiny@5/c.9.0.0.part", "00000000.tar"),
        *("tiny@5/c.0.0.part", "tiny@5/c.00.0.0.part", "tiny@5/notes.part", ".featcache/notes.txt"),
    ]
    for name in users:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"mine")
    leftovers = ("dead@1/c.0.0.0.part", "tiny@5/c.1.0.0.part", "zarr.json.0123456789abcdef.part")
    for name in leftovers:
        (path / name).write_bytes(b"half")
    before = tree(other)
    removed = {name for name, _ in manage.collect_garbage(path)}
    assert tree(other) == before
    assert not any((path / name).exists() for name in leftovers)
    assert set(leftovers[:2]) <= removed
    assert {name.split("/")[0] for name in removed} <= {
        "dead@1",
        "dead@1.scale",
        "tiny@5",
        "zarr.json.0123456789abcdef.part",
    }
    assert all((path / name).read_bytes() == b"mine" for name in users)
    assert not (path / "dead@1").exists()
    assert not (path / ".featcache/building").exists()
    assert featcache.open(path).manifest.features.keys() == {"key", "label", "tiny@5", "vae/moments"}


def test_gc_of_a_folder_leaves_caches_that_are_linked_into_it(tmp_path: Path) -> None:
    other = build(tmp_path / "elsewhere" / "x")
    dead_build(other)
    before = tree(other)
    folder = tmp_path / "caches"
    folder.mkdir()
    (folder / "x").symlink_to(other, target_is_directory=True)
    said: list[str] = []
    assert manage.collect_garbage(folder, warn=said.append) == []
    assert tree(other) == before
    assert said == [f"{folder / 'x'} is a symbolic link; for that cache: featcache gc {other}"]
    assert manage.collect_garbage(other)


@pytest.mark.parametrize("linked", ["dead@1", ".featcache", ".featcache/building", ".featcache/building/dead@1"])
def test_gc_refuses_a_link_in_place_of_a_folder_of_its_own(tmp_path: Path, linked: str) -> None:
    path = build(tmp_path / "x")
    dead_build(path)
    outside = tmp_path / "outside"
    (path / linked).rename(outside)
    (path / linked).symlink_to(outside, target_is_directory=True)
    before = tree(outside)
    try:
        manage.collect_garbage(path)
    except CacheError as error:
        assert "link" in error.what
    assert tree(outside) == before


def test_gc_of_tars_leaves_foreign_tars(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with create_writer(path, dataset(), shard_size=SHARD_SIZE, format="wds") as writer:
        writer.begin(base_features())
        shard = writer.pending()[0]
        arrays = {"": __import__("numpy").zeros(SHARD_SIZE, "int64")}
        writer.write_shard("label", shard, arrays)
    (path / "photos.tar").write_bytes(b"mine")
    (path / "00000077.tar").write_bytes(b"mine")
    (path / "00000001.tar").write_bytes(b"of the dead build")
    removed = [name for name, _ in manage.collect_garbage(path)]
    assert "00000001.tar" in removed
    assert sorted(p.name for p in path.iterdir()) == ["00000077.tar", "photos.tar"]


@pytest.mark.parametrize("content", [b"{}", b"", b"\xff[", None], ids=["empty", "nothing", "bytes", "a folder"])
def test_gc_clears_a_dead_build_whose_declaration_is_damaged(tmp_path: Path, content: bytes | None) -> None:
    path = build(tmp_path / "x")
    before = tree(path)
    dead_build(path)
    record = path / ".featcache/building/dead@1/spec.json"
    record.unlink()
    record.write_bytes(content) if content is not None else record.mkdir()
    (path / "dead@1" / "mine.txt").write_bytes(b"mine")
    removed = {name for name, _ in manage.collect_garbage(path)}
    assert {"dead@1/c.0.0.0", "dead@1.scale/c.0.0"} <= removed
    assert tree(path) == before | {"dead@1/mine.txt": b"mine"}


def test_gc_leaves_a_live_build_whose_declaration_is_damaged(tmp_path: Path) -> None:
    path = build(tmp_path / "x")
    with open_writer(path) as writer:
        writer.begin([tokens("live@1")])
        write_all(writer, [tokens("live@1")])
        (path / ".featcache/building/live@1/spec.json").write_bytes(b"{}")
        assert manage.collect_garbage(path) == []
        writer.finish()
    assert verify(path).ok


def test_gc_clears_the_state_that_killed_commands_leave(tmp_path: Path) -> None:
    path = build(tmp_path / "x")
    before = tree(path)
    state = path / ".featcache"
    left = [
        *("restored/tiny@5+c.0.0.0.fetched", "restored/lock", "push/0123456789abcdef.jsonl"),
        *("sound/tiny@5.0123456789abcdef.part", "verified.json.0123456789abcdef.part"),
    ]
    for name in left:
        (state / name).parent.mkdir(parents=True, exist_ok=True)
        (state / name).write_bytes(b"half")
    would = {name for name, _ in manage.collect_garbage(path, dry_run=True)}
    assert {f".featcache/{name}" for name in left if "verified" not in name} == would
    assert {name for name, _ in manage.collect_garbage(path)} == would
    assert tree(path) == before


def test_gc_leaves_what_a_living_repair_and_push_need(tmp_path: Path) -> None:
    path = build(tmp_path / "x")
    state = path / ".featcache"
    names = ("restored/tiny@5+c.0.0.0.fetched", "push/0123456789abcdef.jsonl")
    for name in names:
        (state / name).parent.mkdir(parents=True, exist_ok=True)
        (state / name).write_bytes(b"half")
    held = [locks.try_lock(state / name) for name in ("restored/lock", names[1])]
    assert all(held)
    assert manage.collect_garbage(path) == []
    assert all((state / name).exists() for name in names)
    for lock in held:
        assert lock is not None
        lock.release()


# Removing


def test_a_removed_cache_comes_back(tmp_path: Path) -> None:
    path = build(tmp_path / "cache")
    (path / "notes.txt").write_text("mine")
    before = tree(path)
    where = manage.remove_cache(path)
    assert not path.exists()
    assert where is not None
    assert where.parent == tmp_path / ".featcache-trash"
    assert [info.path for info in manage.list_caches(tmp_path)] == []
    assert manage.restore(path) == str(path)
    assert tree(path) == before
    assert not (tmp_path / ".featcache-trash").exists()
    with pytest.raises(CacheError, match="nothing"):
        manage.restore(tmp_path / "never")


def test_restore_takes_the_latest_and_refuses_what_is_in_the_way(tmp_path: Path, monkeypatch) -> None:
    path = build(tmp_path / "cache", [tokens("first@1")])
    moment = iter(range(1_700_000_000, 1_700_001_000, 100))
    monkeypatch.setattr(trash, "_now_s", lambda: next(moment))
    manage.remove_cache(path)
    build(path, [tokens("second@1")])
    manage.remove_cache(path)
    build(path, [tokens("third@1")])
    with pytest.raises(CacheError, match="in the way"):
        manage.restore(path)
    assert set(read_root(path).features) == {"third@1"}
    shutil.rmtree(path)
    manage.restore(path)
    assert set(read_root(path).features) == {"second@1"}


def test_removed_features_come_back(tmp_path: Path) -> None:
    extra = [moments(name="vae/G3"), tokens("dino@9")]
    path = build(tmp_path / "cache", [*base_features(), *extra], skipped=[3])
    before = tree(path)
    (path / "dino@9" / "mine.txt").write_text("mine")
    freed = manage.remove_features(path, ["vae/G3", "dino@9"])
    assert freed > COUNT * (8 * 4 * 4 * 2 + 16 * 32)
    assert verify(path).ok
    assert (path / "dino@9" / "mine.txt").read_text() == "mine"
    assert not {"vae/G3", "dino@9"} & set(read_root(path).features)
    with pytest.raises(CacheError, match="tiny@9"):
        manage.restore(path, ["tiny@9"])
    manage.restore(path, ["dino@9"])
    assert "vae/G3" not in read_root(path).features
    manage.restore(path)
    (path / "dino@9" / "mine.txt").unlink()
    assert tree(path) == before
    with pytest.raises(CacheError, match="nothing"):
        manage.restore(path)


def test_restored_features_must_not_be_in_the_way(tmp_path: Path) -> None:
    path = build(tmp_path / "cache")
    manage.remove_features(path, ["tiny@5"])
    add(path, [tokens(codec="fp16")])
    with pytest.raises(CacheError, match=r"tiny@5.*in the way"):
        manage.restore(path)
    manage.remove_features(path, ["tiny@5"], now=True)
    with open_writer(path) as writer:
        writer.begin([tokens()])
        with pytest.raises(CacheError, match=r"tiny@5.*in the way"):
            manage.restore(path)
    manage.collect_garbage(path)
    manage.restore(path)
    assert verify(path).ok
    assert read_root(path).features["tiny@5"].codec == "int8"


def test_rm_now_leaves_nothing(tmp_path: Path) -> None:
    path = build(tmp_path / "cache", [*base_features(), tokens("dino@9")])
    without = build(tmp_path / "without")
    manage.remove_features(path, ["dino@9"], now=True)
    assert tree(path) == tree(without)
    (path / "notes.txt").write_text("mine")
    with pytest.raises(CacheError, match=r"notes\.txt"):
        manage.remove_cache(path, now=True)
    assert (path / "notes.txt").read_text() == "mine"
    (path / "notes.txt").unlink()
    assert manage.remove_cache(path, now=True) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["without"]


@pytest.mark.parametrize("now", [False, True], ids=["trash", "now"])
def test_rm_waits_for_no_live_builder(tmp_path: Path, now: bool) -> None:
    path = build(tmp_path / "cache")
    with open_writer(path) as writer:
        writer.begin([tokens("alive@1")])
        with pytest.raises(CacheError, match="another process is writing alive@1"):
            manage.remove_cache(path, now=now)
        assert verify(path).ok
        write_all(writer, [tokens("alive@1")])
        writer.finish()
    with repair_writer(path, {"tiny@5": [0]}), pytest.raises(CacheError, match="writing tiny@5"):
        manage.remove_features(path, ["tiny@5"], now=now)
    manage.remove_features(path, ["tiny@5"], now=now)
    manage.remove_cache(path, now=now)
    assert not path.exists()


def test_a_builder_whose_cache_was_removed_says_so(tmp_path: Path) -> None:
    """It must not publish a root that names features which went to the trash."""
    path = build(tmp_path / "cache")
    with open_writer(path) as writer:
        manage.remove_cache(path)
        with pytest.raises(CacheError, match="removed"):
            writer.begin([tokens("late@1")])
    assert not (path / "zarr.json").exists()
    manage.restore(path)
    assert verify(path).ok


def test_a_linked_cache_is_named_and_left(tmp_path: Path) -> None:
    path = build(tmp_path / "disk" / "cache")
    link = tmp_path / "link"
    link.symlink_to(path, target_is_directory=True)
    before = tree(path)
    with pytest.raises(CacheError, match="symbolic link") as caught:
        manage.remove_cache(link)
    assert str(path) in (caught.value.remedy or "")
    assert tree(path) == before
    assert link.is_symlink()
    manage.remove_features(link, ["tiny@5"])
    manage.restore(link)
    assert tree(path) == before


def test_a_linked_trash_is_refused(tmp_path: Path) -> None:
    path = build(tmp_path / "caches" / "cache")
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "caches" / ".featcache-trash").symlink_to(outside)
    with pytest.raises(CacheError, match="symbolic link"):
        manage.remove_cache(path)
    assert verify(path).ok
    (path / ".featcache").mkdir()
    (path / ".featcache" / "trash").symlink_to(outside)
    with pytest.raises(CacheError, match="symbolic link"):
        manage.remove_features(path, ["tiny@5"])
    assert verify(path).ok
    assert not list(outside.iterdir())


def test_rm_of_the_working_folder_by_a_dot(tmp_path: Path, monkeypatch) -> None:
    path = build(tmp_path / "cache")
    monkeypatch.chdir(path)
    where = manage.remove_cache(Path())
    assert where is not None
    assert where.name.endswith("-cache")
    assert manage.restore(tmp_path / "cache")


# Killed at any operation

_OPERATIONS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open")


def killed_at(operation: int, action: Callable[[], object]) -> bool:
    """Run `action` in a process that dies, as by SIGKILL, before its n-th change of the file system.

    Returns whether it got to its end without dying.
    """
    child = os.fork()
    if child == 0:
        seen = 0

        def audit(event: str, arguments: tuple) -> None:
            nonlocal seen
            if event not in _OPERATIONS:
                return
            if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                return
            seen += 1
            if seen == operation:
                os._exit(9)

        sys.addaudithook(audit)
        try:
            action()
        except BaseException:
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9)
    return code == 0


@pytest.fixture(params=[pytest.param(1, marks=pytest.mark.slow, id="every"), pytest.param(5, id="some")])
def step(request: pytest.FixtureRequest) -> int:
    """Every operation, or every fifth (kills in every command are also what the attacks do)."""
    return request.param


def every_kill(action: Callable[[], object], prepare: Callable[[], object], step: int) -> Iterator[int]:
    for operation in range(2 if step > 1 else 1, 2000, step):
        prepare()
        if killed_at(operation, action):
            assert operation > 3
            return
        yield operation
    raise AssertionError("it does not end")


@pytest.mark.parametrize("now", [False, True], ids=["trash", "now"])
def test_rm_of_a_cache_killed_anywhere(tmp_path: Path, now: bool, step: int) -> None:
    path = tmp_path / "cache"
    whole = tree(build(tmp_path / "whole", **SMALL))

    def prepare() -> None:
        for entry in (path, tmp_path / ".featcache-trash"):
            shutil.rmtree(entry, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", path)

    gone = kept = 0
    for _ in every_kill(lambda: manage.remove_cache(path, now=now), prepare, step):
        if (path / "zarr.json").exists():
            kept += 1
        else:
            gone += 1
            if now:
                with pytest.raises(CacheError, match="nothing"):
                    manage.restore(path)
                manage.collect_garbage(tmp_path)
                assert [p.name for p in tmp_path.iterdir()] == ["whole"]
                continue
            manage.restore(path)
        featcache.open(path)
        assert {n: b for n, b in tree(path).items() if not n.startswith(".featcache/")} == whole
    assert kept >= (2 if step == 1 else 1)
    assert gone >= (10 // step if now else 0)


@pytest.mark.parametrize("now", [False, True], ids=["trash", "now"])
def test_rm_of_features_killed_anywhere(tmp_path: Path, now: bool, step: int) -> None:
    path = tmp_path / "cache"
    specs = [*base_features()[:1], moments(), tokens()]
    whole = tree(build(tmp_path / "whole", specs, **SMALL))
    rest = tree(build(tmp_path / "rest", specs[:1], **SMALL))
    names = ["tiny@5", "vae/moments"]

    def prepare() -> None:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", path)

    gone = kept = 0
    for _ in every_kill(lambda: manage.remove_features(path, names, now=now), prepare, step):
        assert verify(path).ok
        if "tiny@5" in read_root(path).features:
            kept += 1
        elif now:
            gone += 1
            manage.collect_garbage(path)
            assert tree(path) == rest
            continue
        else:
            gone += 1
            manage.restore(path)
        manage.collect_garbage(path, older_than_s=0)
        assert tree(path) == whole
    assert min(gone, kept) >= (3 if step == 1 else 1)


def test_restore_of_features_killed_anywhere(tmp_path: Path, step: int) -> None:
    path = tmp_path / "cache"
    specs = [*base_features()[:1], moments(), tokens()]
    whole = tree(build(tmp_path / "whole", specs, **SMALL))
    shutil.copytree(tmp_path / "whole", tmp_path / "trashed")
    manage.remove_features(tmp_path / "trashed", ["tiny@5", "vae/moments"])

    def prepare() -> None:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(tmp_path / "trashed", path)

    kept = 0
    for _ in every_kill(lambda: manage.restore(path), prepare, step):
        assert verify(path).ok
        if "tiny@5" not in read_root(path).features:
            manage.restore(path)
            kept += 1
        manage.collect_garbage(path, older_than_s=0)
        assert tree(path) == whole
    assert kept >= (3 if step == 1 else 1)


def test_gc_killed_anywhere_can_be_run_again(tmp_path: Path, step: int) -> None:
    path = tmp_path / "cache"
    build(tmp_path / "whole", **SMALL)
    clean = tree(tmp_path / "whole")
    dead_build(tmp_path / "whole")

    def prepare() -> None:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", path)

    for _ in every_kill(lambda: manage.collect_garbage(path), prepare, step):
        assert verify(path).ok
        manage.collect_garbage(path)
        assert tree(path) == clean


# The trash


def test_gc_empties_the_trash_by_age(tmp_path: Path, monkeypatch) -> None:
    path = build(tmp_path / "cache", [*base_features(), tokens("old@1"), tokens("new@1")])
    gone, kept = build(tmp_path / "gone"), build(tmp_path / "kept")
    monkeypatch.setattr(trash, "_now_s", lambda: time.time() - 10 * DAY_S)
    manage.remove_features(path, ["old@1"])
    manage.remove_cache(gone)
    monkeypatch.setattr(trash, "_now_s", time.time)
    manage.remove_features(path, ["new@1"])
    manage.remove_cache(kept)
    would = manage.collect_garbage(tmp_path, dry_run=True)
    assert len(would) == 2
    assert all(n_bytes > 10_000 for _, n_bytes in would)
    assert manage.collect_garbage(tmp_path, older_than_s=30 * DAY_S) == []
    assert manage.collect_garbage(tmp_path) == would
    with pytest.raises(CacheError, match="nothing"):
        manage.restore(gone)
    with pytest.raises(CacheError, match="old@1"):
        manage.restore(path, ["old@1"])
    manage.restore(kept)
    manage.restore(path)
    assert {p.name for p in tmp_path.iterdir()} == {"cache", "kept"}
    assert verify(path).ok
    assert verify(kept).ok


def test_the_trash_keeps_a_users_own_files(tmp_path: Path) -> None:
    path = build(tmp_path / "cache")
    (path / "thesis.txt").write_text("mine")
    manage.remove_cache(path)
    removed = manage.collect_garbage(tmp_path, older_than_s=0)
    assert removed == []
    (trashed,) = (tmp_path / ".featcache-trash").iterdir()
    assert (trashed / "thesis.txt").read_text() == "mine"
    assert manage.kept_in_trash(tmp_path, older_than_s=0) == [(trashed, "thesis.txt")]


@pytest.mark.parametrize(
    ("text", "seconds"), [("7d", 7 * DAY_S), ("0d", 0.0), ("36h", 36 * 3600.0), ("1.5w", 10.5 * DAY_S)]
)
def test_ages(text: str, seconds: float) -> None:
    assert trash.parse_age(text) == seconds


@pytest.mark.parametrize("text", ["7", "-1d", "d", "7 years", "nand", "infd", "1e400d"])
def test_odd_ages_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="7d"):
        trash.parse_age(text)


# Listing


def absurd(path: Path, **changes) -> Path:
    """A cache that is only a manifest: of an enormous set, in a few kilobytes."""
    build(path)
    manifest = read_root(path)
    manifest = replace(manifest, dataset=replace(manifest.dataset, count=1 << 39), shard_size=1 << 20, **changes)
    shutil.rmtree(path)
    path.mkdir()
    (path / "zarr.json").write_bytes(root_bytes(manifest))
    return path


def test_ls_shows_odd_entries_and_lists_the_rest(tmp_path: Path) -> None:
    build(tmp_path / "good")
    build(tmp_path / "[red]\x1b[31mname[bold]")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "readme.txt").write_text("a file beside the caches")
    for name in ("junk", "huge", "manifest-is-a-folder", "state-is-a-file", "building-is-a-file", "odd-feature"):
        (tmp_path / name).mkdir()
    (tmp_path / "junk" / "zarr.json").write_bytes(b"\xff\x00{")
    (tmp_path / "huge" / "zarr.json").write_bytes(b"[" * 100_000)
    (tmp_path / "manifest-is-a-folder" / "zarr.json").mkdir()
    (tmp_path / "state-is-a-file" / ".featcache").write_bytes(b"x")
    (tmp_path / "building-is-a-file" / ".featcache").mkdir()
    (tmp_path / "building-is-a-file" / ".featcache" / "building").write_bytes(b"x")
    (tmp_path / "odd-feature" / ".featcache" / "building" / "[bold]..").mkdir(parents=True)
    absurd(tmp_path / "absurd")
    found = {info.path.name: info for info in manage.list_caches(tmp_path)}
    assert {"good", "absurd", "[red]\x1b[31mname[bold]", "dangling", "loop", "junk", "huge"} <= set(found)
    assert {"manifest-is-a-folder", "state-is-a-file", "building-is-a-file", "odd-feature"} <= set(found)
    assert "readme.txt" not in found
    assert found["good"].problem is None
    odd = set(found) - {"good", "absurd", "[red]\x1b[31mname[bold]", "building-is-a-file", "odd-feature"}
    for name in odd:
        problem = found[name].problem
        assert problem, name
        assert "\n" not in problem
    assert found["absurd"].n_bytes > 1 << 40


def test_ls_command_with_odd_entries(tmp_path: Path, cli) -> None:
    build(tmp_path / "caches" / "good")
    build(tmp_path / "caches" / "[red]\x1b[31mname[bold]")
    (tmp_path / "caches" / "dangling").symlink_to("nowhere")
    (tmp_path / "caches" / "junk").mkdir()
    (tmp_path / "caches" / "junk" / "zarr.json").write_text(json.dumps({"attributes": {"featcache": "[/nonsense]"}}))
    done = cli("featcache", "ls", "caches")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert r"[red]\x1b[31mname[bold]" in done.stdout
    assert all(word in done.stdout for word in ("good", "dangling", "junk"))
    assert len(done.stdout.strip().splitlines()) == 5


def test_ls_of_an_unreadable_folder(monkeypatch) -> None:
    folder = Path(tempfile.mkdtemp(prefix="featcache-ls-"))
    try:
        folder.chmod(0o755)
        build(folder / "good")
        build(folder / "secret")
        (folder / "secret").chmod(0o000)
        superuser = os.geteuid() == 0
        if superuser:
            os.seteuid(65534)
        try:
            found = {info.path.name: info for info in manage.list_caches(folder)}
        finally:
            if superuser:
                os.seteuid(0)
        assert found["good"].problem is None
        assert "ermission" in (found["secret"].problem or "")
    finally:
        (folder / "secret").chmod(0o755)
        shutil.rmtree(folder)


def test_size_of_an_absurd_cache_takes_no_time(tmp_path: Path) -> None:
    started = time.monotonic()
    info = manage.cache_info(absurd(tmp_path / "absurd"))
    assert info.n_bytes > 1 << 40
    assert time.monotonic() - started < 1.0
    whole = build(tmp_path / "whole")
    shards = sum(len(b) for n, b in tree(whole).items() if Path(n).name.startswith("c."))
    assert manage.cache_info(whole).n_bytes == shards
    assert canonical_json(read_root(whole).to_json())


# The commands


def test_rm_of_what_is_not_there_asks_nothing(tmp_path: Path, cli) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("folder", "nothing"):
        done = cli("featcache", "rm", name)
        assert (done.returncode, done.stdout) == (2, "")
        assert "there is no cache at" in done.stderr


def test_rm_and_restore_as_typed(tmp_path: Path, cli) -> None:
    path = build(tmp_path / "caches" / "x")
    before = tree(path)
    done = cli("featcache", "rm", "caches/x", "--yes")
    assert done.returncode == 0, done.stderr
    assert "featcache restore caches/x" in done.stdout
    assert not path.exists()
    done = cli("featcache", "restore", "caches/x")
    assert done.returncode == 0, done.stderr
    assert tree(path) == before
    done = cli("featcache", "rm", "caches/x", "--features", "tiny@5", "--yes")
    assert "featcache restore caches/x" in done.stdout
    # What is printed empties the trash and touches nothing else: another cache's build can still go on.
    other = build(tmp_path / "caches" / "y")
    dead_build(other)
    unfinished = tree(other)
    done = cli("featcache", "rm", "caches/x", "--yes")
    done = cli(*done.stdout.rpartition("now: ")[2].split())
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "caches" / "y") == unfinished
    assert not trash.folder_trash(tmp_path / "caches").exists()
    done = cli("featcache", "restore", "caches/x")
    assert done.returncode == 2
    assert "nothing" in done.stderr
    done = cli("featcache", "gc", "caches", "--older-than", "never")
    assert (done.returncode, "7d" in done.stderr) == (2, True)


def test_entries_of_the_trash_in_which_nothing_lies_go(tmp_path: Path) -> None:
    """Of a removal that was killed before it happened, and of one that was undone but not yet forgotten."""
    path = build(tmp_path / "x")
    before = tree(path)
    for restores in (True, False):
        early = path / ".featcache/trash/20260101T000000.000000Z"
        undone = path / ".featcache/trash/20260102T000000.000000Z"
        early.mkdir(parents=True)
        undone.mkdir()
        (undone / "zarr.json").write_bytes(root_bytes(read_root(path).only(["tiny@5"])))
        if restores:
            manage.remove_features(path, ["tiny@5"])
            manage.restore(path)
        else:
            manage.collect_garbage(path)
        assert tree(path) == before
