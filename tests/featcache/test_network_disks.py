"""Builds where NFS or Lustre would be: flock refused, open files kept when removed, directories seen as they were."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from store_helpers import build, tokens, tree, values

from featcache.errors import CacheError
from featcache.share.manage import restore
from featcache.share.trash import remove_cache
from featcache.share.verify import verify
from featcache.store import locks
from featcache.store.files import atomic_write
from featcache.store.writers import open_writer, repair_writer

HERE = Path(__file__).parent
LIFE = HERE / "nfs_life.py"
REFUSALS = ["ENOSYS", "ENOLCK", "EOPNOTSUPP"]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler here, so no file system that behaves like NFS can be put underneath")
    library = tmp_path_factory.mktemp("shim") / "nfs_shim.so"
    source = HERE / "nfs_shim.c"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the compiler here does not make the preloaded library: {done.stderr[:300]}")
    return library


def environment(shim: Path, root: Path, refusal: str | None = None, stale_ms: int = 0) -> dict[str, str]:
    added = {"LD_PRELOAD": str(shim), "SHIM_ROOT": str(root), "SHIM_STALE_MS": str(stale_ms)}
    if refusal is not None:
        added["SHIM_FLOCK_ERRNO"] = str(getattr(errno, refusal))
    return {**os.environ, **added}


def run(what: str, path: Path, env: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, str(LIFE), what, str(path)], env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_shim_keeps_what_is_open(shim: Path, tmp_path: Path) -> None:
    """What the other tests rely on."""
    code = f"""
import os
folder = {str(tmp_path)!r}
fd = os.open(folder + "/file", os.O_CREAT | os.O_RDWR)
os.unlink(folder + "/file")
left = os.listdir(folder)
assert len(left) == 1 and left[0].startswith(".nfs"), left
os.close(fd)
assert os.listdir(folder) == []
"""
    subprocess.run([sys.executable, "-c", code], env=environment(shim, tmp_path), check=True)


@pytest.mark.parametrize(
    "refusal", [None, REFUSALS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in REFUSALS[1:])]
)
def test_life_of_a_cache(shim: Path, tmp_path: Path, refusal: str | None) -> None:
    run("life", tmp_path / "cache", environment(shim, tmp_path, refusal))
    assert tree(tmp_path / "cache") == tree(build(tmp_path / "local"))


@pytest.mark.parametrize("refusal", [None, pytest.param("ENOSYS", marks=pytest.mark.slow)])
def test_another_machine_writes_shards(shim: Path, tmp_path: Path, refusal: str | None) -> None:
    said = run("lead", tmp_path / "cache", environment(shim, tmp_path, refusal, stale_ms=4000))
    assert "seen at once: [0]\n" in said  # so the view was old, and waiting mattered
    assert tree(tmp_path / "cache") == tree(build(tmp_path / "local"))


# Locks without flock


@pytest.fixture(params=REFUSALS)
def no_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(getattr(errno, request.param), request.param)

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_lock_excludes_and_is_let_go(no_flock, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = locks.try_lock(path)
    assert first is not None and locks.try_lock(path) is None
    assert locks.holder(path) is None  # on this machine: nothing to be said
    first.release()
    second = locks.lock(path)
    waiting: list[locks.Lock] = []
    thread = threading.Thread(target=lambda: waiting.append(locks.lock(path)))
    thread.start()
    time.sleep(0.2)
    assert not waiting
    second.release(remove=True)
    thread.join(10)
    waiting[0].release(remove=True)
    assert list(tmp_path.iterdir()) == []


def test_only_one_of_many_gets_it(no_flock, tmp_path: Path) -> None:
    inside, most = [0], [0]

    def work() -> None:
        for _ in range(10):
            held = locks.lock(tmp_path / "lock")
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.001)
            inside[0] -= 1
            held.release()

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1]


def test_the_lock_of_a_dead_process_is_taken_over(shim: Path, no_flock, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, str(LIFE), "hold", str(path)]
    process = subprocess.Popen(command, env=environment(shim, tmp_path, "ENOSYS"), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        assert locks.try_lock(path) is None
    finally:
        process.kill()
        process.wait()
    held = locks.try_lock(path)
    assert held is not None
    # A number used again is not the process that had it.
    owner = json.loads((tmp_path / "lock.owner").read_text())
    (tmp_path / "lock.owner").write_text(json.dumps({**owner, "started": "1", "token": "0" * 16}))
    assert locks.try_lock(path) is not None


def test_a_holder_on_another_machine_is_named(no_flock, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(locks, "MAX_WAIT_S", 0.1)
    path = build(tmp_path / "cache")
    writer = open_writer(path)
    writer.begin([tokens("new@1")])
    owner_file = next(path.rglob("building/*/lock.owner"))
    owner = json.loads(owner_file.read_text())
    owner_file.write_text(json.dumps({**owner, "machine": "elsewhere", "host": "node7"}))
    with open_writer(path) as other, pytest.raises(CacheError) as found:
        other.begin([tokens("new@1")])
    assert "another process is writing" in found.value.what
    assert found.value.remedy and f"on node7 since {owner['time']}" in found.value.remedy
    assert f"rm {owner_file}" in found.value.remedy
    (path / ".featcache" / "lock.owner").write_text(json.dumps({**owner, "machine": "elsewhere", "host": "node7"}))
    with pytest.raises(CacheError, match=r"is held by process .* on node7"):
        open_writer(path)


def owner_of_a_dead_process(lock: Path, token: str) -> None:
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    owner = {"host": "here", "machine": locks._machine(), "pid": gone.pid, "started": "1", "time": "then"}
    lock.with_name(lock.name + ".owner").write_text(json.dumps({**owner, "token": token}))


def test_who_dies_while_taking_over_is_taken_over_too(no_flock, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first, second, third = "a" * 16, "b" * 16, "c" * 16
    owner_of_a_dead_process(path, first)
    owner_of_a_dead_process(tmp_path / f"lock.{first}", second)  # it was about to remove the first one's file
    owner_of_a_dead_process(tmp_path / f"lock.{second}", third)
    (tmp_path / f"lock.{first}.claim").write_bytes(b"")  # of an earlier version
    held = locks.try_lock(path)
    assert held is not None and locks.try_lock(path) is None
    held.release(remove=True)
    assert list(tmp_path.iterdir()) == []


def test_many_take_over_the_lock_of_a_dead_process(no_flock, tmp_path: Path) -> None:
    owner_of_a_dead_process(tmp_path / "lock", "a" * 16)
    owner_of_a_dead_process(tmp_path / ("lock." + "a" * 16), "b" * 16)
    got: list[locks.Lock] = []
    start = threading.Barrier(6)

    def take() -> None:
        start.wait()
        held = locks.try_lock(tmp_path / "lock")
        if held is not None:
            got.append(held)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(got) <= 1  # none, if each found another one at it
    last = locks.lock(tmp_path / "lock") if not got else got[0]
    last.release(remove=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"token": "../../x"}', b'{"token": 5}'])
def test_an_owner_that_cannot_be_read_is_not_waited_for_for_ever(
    no_flock, tmp_path: Path, monkeypatch, content: bytes
) -> None:
    """What a machine leaves that loses its power while it makes the file."""
    monkeypatch.setattr(locks, "MAX_WAIT_S", 0.1)
    path = build(tmp_path / "cache")
    owner = path / ".featcache" / "lock.owner"
    owner.parent.mkdir()
    owner.write_bytes(content)
    with pytest.raises(CacheError, match="cannot be told") as found:
        open_writer(path)
    assert found.value.remedy is not None and f"rm {owner}" in found.value.remedy
    assert locks.try_lock(owner.with_name("lock")) is None
    assert f"rm {owner}" in str(locks.holder(owner.with_name("lock")))
    owner.unlink()
    open_writer(path)


def test_a_sleeper_does_not_let_go_of_another_ones_lock(no_flock, tmp_path: Path) -> None:
    """Its owner file was removed by somebody who was told that it is gone."""
    sleeper = locks.lock(tmp_path / "lock")
    (tmp_path / "lock.owner").unlink()
    other = locks.try_lock(tmp_path / "lock")
    assert other is not None
    sleeper.release()
    assert locks.try_lock(tmp_path / "lock") is None
    other.release()


@pytest.mark.parametrize("dies", [False, True])
def test_a_cache_comes_back_on_another_machine(no_flock, tmp_path: Path, monkeypatch, dies: bool) -> None:
    monkeypatch.setattr(locks, "MAX_WAIT_S", 0.1)
    path = build(tmp_path / "cache")
    with open_writer(path) as writer:
        writer.begin([tokens("dead@1")])
    if dies:
        monkeypatch.setattr(locks.Lock, "release", lambda *_, **__: None)
    remove_cache(path)
    monkeypatch.undo()
    refuse = OSError(errno.ENOSYS, "no flock")
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(refuse))
    monkeypatch.setattr(locks, "MAX_WAIT_S", 0.1)
    monkeypatch.setattr(locks, "_machine", lambda: "elsewhere")
    restore(path)
    if not dies:
        with open_writer(path) as writer:
            writer.begin([tokens("dead@1")])


def test_a_verification_waits_for_a_publisher(no_flock, tmp_path: Path) -> None:
    """Between the checksum files and the root document the cache looks damaged."""
    path = build(tmp_path / "cache")
    root, sums = path / "zarr.json", path / "tiny@5" / "SHA256SUMS"
    old = root.read_bytes(), sums.read_bytes()
    with repair_writer(path, {"tiny@5": [1]}) as writer:
        changed = {a[6:]: 1 + values(a, *d, writer.slots(1)) for a, d in tokens().arrays.items()}
        writer.write_shard("tiny@5", 1, changed)
        writer.finish()
    new = root.read_bytes()
    root.write_bytes(old[0])
    held = locks.lock(path / ".featcache" / "lock")

    def publish() -> None:
        time.sleep(0.5)
        atomic_write(root, [new])
        held.release()

    thread = threading.Thread(target=publish)
    thread.start()
    report = verify(path)
    thread.join()
    assert report.ok, report.problems


@pytest.mark.parametrize("durable", [True, False])
def test_what_fails_when_a_file_is_closed_takes_no_name(tmp_path: Path, monkeypatch, durable: bool) -> None:
    """NFS sends what was written, and finds the quota exceeded, at the latest then."""
    atomic_write(tmp_path / "file", [b"before"])
    close = os.close

    def refuse(fd: int) -> None:
        written = Path(f"/proc/self/fd/{fd}").readlink().suffix == ".part"
        close(fd)
        if written:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "close", refuse)
    with pytest.raises(CacheError, match="disk is full"):
        atomic_write(tmp_path / "file", [b"after"], durable=durable)
    monkeypatch.undo()
    assert tree(tmp_path) == {"file": b"before"}
