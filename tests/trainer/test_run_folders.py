"""Run folders: one process at a time, only the cache they were begun with, no secrets in them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import Listener, log_of, settings

import featcache
from featcache.console_progress import RichProgress
from featcache.errors import CacheError, UserError
from featcache.progress import Quiet
from trainer.runs import folder as runs
from trainer.runs import locks
from trainer.runs.config import RunConfig
from trainer.training.loop import train


def run(config: RunConfig, root: Path, *, resume: bool = False, **kw: Any) -> Path:
    return train(config, resume=resume, watcher=Listener(), root=root, **kw)


HOLDER = """
import sys, time
from pathlib import Path
from trainer.runs import locks
with locks.hold(Path(sys.argv[1]), "training", remedy=""):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder ``run``."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.usefixtures("nano")
def test_a_second_process_is_told_who_has_the_run(
    shapes_cache: Path, tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    before = sorted((tmp_path / "run").iterdir())
    with pytest.raises(UserError, match=rf"in use: training in process {holder.pid} on \S+, since 20") as error:
        run(settings(shapes_cache), tmp_path)
    assert error.value.remedy is not None and "another --name than run" in error.value.remedy
    assert sorted((tmp_path / "run").iterdir()) == before, "nothing was written"
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    run(settings(shapes_cache, steps=1), tmp_path)
    assert not (tmp_path / "run" / locks.NAME).exists()


@pytest.mark.usefixtures("nano")
def test_a_second_resume_leaves_the_first_ones_log_alone(shapes_cache: Path, tmp_path: Path) -> None:
    """From within: while the first is at step 3, another one is started on the same run."""
    config = settings(shapes_cache, steps=6, checkpoint_every=2)
    errors: list[str] = []

    class Meddler(Listener):
        def advance(self, step: int, shown: Any) -> None:
            if step == 5:
                with pytest.raises(UserError, match="in use") as error:
                    run(config, tmp_path, resume=True)
                errors.append(error.value.what)

    train(config, resume=False, watcher=Meddler(), root=tmp_path)
    assert len(errors) == 1
    assert [record["step"] for record in log_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_runs_started_at_the_same_moment_get_folders_of_their_own(tmp_path: Path) -> None:
    config = RunConfig(model="SiT-S/2")
    barrier, done = threading.Barrier(8), threading.Barrier(8)
    found: list[Path] = []

    def start() -> None:
        barrier.wait()
        with runs.claim(config, tmp_path) as folder:
            found.append(folder)
            done.wait()

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 8
    assert not list(tmp_path.iterdir()), "folders without a run go again"


def test_locks_come_and_go_without_two_holders(tmp_path: Path) -> None:
    """Many processes' worth of threads, each a file descriptor of its own, removing the lock file as they leave."""
    inside, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal inside, most
        for _ in range(200):
            try:
                with locks.hold(tmp_path / "x", "testing", remedy=""):
                    with lock:
                        inside += 1
                        most = max(most, inside)
                    with lock:
                        inside -= 1
            except UserError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_a_lock_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("text")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / locks.NAME).symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="link"), locks.hold(tmp_path / "run", "x", remedy=""):
        pass
    assert (tmp_path / "precious").read_text() == "text"


@pytest.mark.usefixtures("nano")
def test_a_failed_start_leaves_no_folder(shapes_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        run(settings(shapes_cache, "repa", align={"repa": {"encoder": "dinov2-b"}}), tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 20 + "b", "", ".", "x\x00y", "x\x1b[31m", "../x", "/x"])
def test_names_that_no_folder_can_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--name"):
        runs.run_dir(RunConfig(model="SiT-S/2", name=name), tmp_path)


@pytest.mark.usefixtures("nano")
def test_two_evaluations_do_not_draw_into_one_folder(shapes_cache: Path, tmp_path: Path) -> None:
    from trainer.requests import SampleRequest
    from trainer.sampling.run import sample_run

    path = run(settings(shapes_cache, steps=1), tmp_path)
    request = SampleRequest(num=2, sampler="ode", steps=1, device="cpu", out=tmp_path / "out")
    with locks.hold(tmp_path / "out", "sampling", remedy=""), pytest.raises(UserError, match="out is in use") as error:
        sample_run(path, request, Quiet())
    assert error.value.remedy is not None and "--out" in error.value.remedy
    made = sample_run(path, request, Quiet())
    with locks.hold(tmp_path / "out", "sampling", remedy=""):
        assert sample_run(path, request, Quiet()).images == made.images, "what is drawn already needs no lock"
    assert not (tmp_path / "out" / locks.NAME).exists() and not (tmp_path / "out" / "blocks").exists()


def test_metrics_of_two_evaluations_both_stay(tmp_path: Path) -> None:
    from trainer.evaluate.run import _append_metrics

    def add(first: int) -> None:
        for step in range(first, first + 20):
            _append_metrics(tmp_path, {"step": step, "metrics": {"FID": 1.0}})

    threads = [threading.Thread(target=add, args=(100 * i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs.read_metrics(tmp_path)) == 60


# --- which cache


@pytest.mark.usefixtures("nano")
def test_what_was_trained_on_is_recorded_and_compared(shapes_cache: Path, tmp_path: Path) -> None:
    from featcache.store.root import cache_digest

    path = run(settings(shapes_cache, "repa", steps=1), tmp_path)
    summary = json.loads((path / "cache.json").read_text())
    manifest = featcache.open(shapes_cache).manifest
    assert summary["digest"] == cache_digest(manifest)
    assert {"vae/moments", "label"} < summary["checksums"].keys() < manifest.checksums.keys()
    resumed = settings(shapes_cache, "repa", steps=2)

    def record(**changes: Any) -> None:
        (path / "cache.json").write_text(json.dumps({k: v for k, v in (summary | changes).items() if v is not None}))

    record(checksums=summary["checksums"] | {"vae/moments": "0" * 64})
    with pytest.raises(CacheError, match=r"vae/moments in .* holds other bytes"):
        run(resumed, tmp_path, resume=True)
    for changes, remark in (
        ({"digest": "0" * 64}, "but not in what this run reads"),
        ({"layout": "wds 4", "checksums": {"vae/moments": "0" * 64}}, "another layout"),
    ):
        record(**changes)
        listener = Listener()
        train(resumed, resume=True, watcher=listener, root=tmp_path)
        assert any(remark in warning for warning in listener.warnings)
    record(digest=None, checksums=None, layout=None)  # of an earlier version
    listener = Listener()
    train(settings(shapes_cache, "repa", steps=3), resume=True, watcher=listener, root=tmp_path)
    assert not any("changed" in warning for warning in listener.warnings)
    assert json.loads((path / "cache.json").read_text())["digest"] == summary["digest"]


@pytest.mark.usefixtures("nano")
def test_a_digest_can_be_demanded(shapes_cache: Path, tmp_path: Path) -> None:
    from featcache.store.root import cache_digest

    digest = cache_digest(featcache.open(shapes_cache).manifest)
    with pytest.raises(CacheError, match="not the cache that was expected"):
        run(settings(shapes_cache, steps=1), tmp_path, expect="0" * 64)
    # Of two caches that begin alike, which are soon made, one could be shown and the other sent.
    for part in (digest[:8], digest[:12], digest[:63], ""):
        with pytest.raises(UserError, match="64 hexadecimal digits"):
            run(settings(shapes_cache, steps=1), tmp_path, expect=part)
    assert not (tmp_path / "run").exists()
    run(settings(shapes_cache, steps=1), tmp_path, expect=f"sha256:{digest.upper()}")


# --- secrets


@pytest.mark.usefixtures("nano")
def test_no_secret_of_a_url_is_stored_or_shown(
    shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cache behind a URL with a password and a signed query; all that lands in the run folder and on the screen."""
    import trainer.training.loop
    from trainer.cli import _resumed_config
    from trainer.evaluate.run import _reference
    from trainer.report.run import write_run_report
    from trainer.requests import EvalRequest

    url = "https://someone:hunter2@host/shapes?X-Amz-Signature=deadbeef"
    opened = featcache.open(shapes_cache)
    opened.path = url
    monkeypatch.setattr(trainer.training.loop, "find_cache", lambda config: opened)
    config = settings(url, steps=2, stream_gib=1.0)
    with RichProgress() as progress:
        path = train(config, resume=False, watcher=progress, root=tmp_path / "runs")
    write_run_report([path])
    shown = capsys.readouterr()
    texts = [file.read_bytes() for file in path.rglob("*") if file.is_file()]
    for secret in ("hunter2", "deadbeef", "someone"):
        assert not any(secret.encode() in text for text in texts)
        assert secret not in shown.out + shown.err
    assert "https://***@host/shapes" in (path / "config.yaml").read_text()

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="needs a password or token") as error:
        _resumed_config({"name": "run"}, [])
    assert error.value.remedy is not None and "--resume --cache URL" in error.value.remedy
    resumed = _resumed_config({"name": "run", "cache": url}, ["steps=3"])
    train(resumed, resume=True, watcher=Listener(), root=tmp_path / "runs")
    assert [record["step"] for record in log_of(path)] == [1, 2, 3]
    with pytest.raises(UserError, match="needs a password or token"):
        _reference(path, EvalRequest())


def test_a_report_of_an_old_run_hides_its_secrets(tmp_path: Path) -> None:
    from trainer.report.data import load_run
    from trainer.report.report import write_report

    url = "https://someone:hunter2@host/x"
    config = replace(RunConfig(model="SiT-S/2"), cache=url)
    runs.save_config(tmp_path, config)
    (tmp_path / "cache.json").write_text(json.dumps({"path": url, "fingerprint": "0"}))
    page = write_report(tmp_path / "page.html", [load_run(tmp_path)], title="x").read_text()
    assert "hunter2" not in page and "https://***@host/x" in page


def test_the_lock_outlives_no_process(tmp_path: Path) -> None:
    """Killed in the middle; the file stays, and holds nothing."""
    code = textwrap.dedent(HOLDER).replace("time.sleep(600)", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL and (tmp_path / locks.NAME).exists()
    with locks.hold(tmp_path, "testing", remedy=""):
        assert json.loads((tmp_path / locks.NAME).read_text())["pid"] == os.getpid()
