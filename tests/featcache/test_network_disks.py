"""Builds where NFS or Lustre would be: flock refused, open files kept when removed, directories seen as they were."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from store_helpers import build, tokens, tree

from featcache.errors import CacheError
from featcache.store import locks
from featcache.store.writers import open_writer

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

    monkeypatch.setattr(locks.fcntl, "flock", refuse)


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
