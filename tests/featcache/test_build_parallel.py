"""Builds divided among processes give the bytes of a single one, whoever is killed on the way."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featcache
from featcache.builder import ranks as workers
from featcache.builder.lead import lead
from featcache.builder.pipeline import Meter, Stage, run_shards
from featcache.builder.prepare import prepare
from featcache.builder.ranks import Ranks
from featcache.builder.request import BuildRequest
from featcache.builder.run import _Shared, build, prepare_together
from featcache.encoders import EncoderChoice
from featcache.errors import CacheError, UserError
from featcache.progress import Quiet
from featcache.store.writers import join_writer
from tests.featcache.store_helpers import tree_digest
from tests.told import Told

WORDS = ["--data", "shapes", "--encoder", "tiny", "--limit", "240", "--batch-size", "4", "--shard-size", "8"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def request(out: Path, **changes: object) -> BuildRequest:
    base = BuildRequest(
        data="shapes",
        encoders=(EncoderChoice(name="tiny"),),
        limit=24,
        batch_size=4,
        shard_size=4,
        out=out,
        workers=1,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def test_shards_written_by_several_writers_are_those_of_one(tmp_path: Path) -> None:
    build(request(tmp_path / "one"), Quiet())
    plan = prepare(request(tmp_path / "many"), device="cpu")
    with lead(plan) as leader:
        assert leader.pending() == [0, 1, 2, 3, 4, 5]
        for rank in (1, 0):
            with join_writer(plan.path, plan.specs) as writer:
                shards = leader.pending()[rank::2]
                run_shards(plan.work, shards, writer, meter=Meter(), progress=Quiet())
        leader.refresh()
        assert leader.pending() == []
        leader.finish()
    assert tree_digest(tmp_path / "many") == tree_digest(tmp_path / "one")


def test_joining_needs_a_build_of_the_same_features(tmp_path: Path) -> None:
    plan = prepare(request(tmp_path / "c"), device="cpu")
    with pytest.raises(CacheError, match="no build"):
        join_writer(plan.path, plan.specs)
    with lead(plan):
        other = [replace(spec, provenance={"weights": "others"}) for spec in plan.specs]
        with pytest.raises(CacheError, match="weights: none there, others here"):
            join_writer(plan.path, other)
        with pytest.raises(CacheError, match="at this moment"):
            lead(plan)


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    plan = prepare(request(tmp_path / "c", encoders=(), vae="tiny"), device="cpu")
    encoder: Any = plan.work.encoders[0]
    broken = encoder.module[0].conv_in.bias
    broken[0] = float("nan")
    with (
        lead(plan) as writer,
        pytest.raises(UserError, match=r"vae/moments has values that are not finite"),
    ):
        run_shards(plan.work, writer.pending(), writer, meter=Meter(), progress=Quiet())
    assert not list((tmp_path / "c").rglob("c.0.*"))


def test_padding_batches_changes_no_shape_and_no_label(tmp_path: Path) -> None:
    """What compiled encoders do on the last batch of a shard: one size of batch, the rest cut off."""
    from dataclasses import replace as changed

    build(request(tmp_path / "one", batch_size=3), Quiet())
    plan = prepare(request(tmp_path / "padded", batch_size=3), device="cpu")
    sizes = set()
    encoder: Any = plan.work.encoders[0]

    class Watched:
        title, shapes = encoder.title, encoder.shapes

        def __call__(self, pixels: object) -> object:
            sizes.add(len(pixels))  # type: ignore[arg-type]
            return encoder(pixels)

    watched: Any = Watched()
    work = changed(plan.work, pad_batches=True, encoders=[watched, *plan.work.encoders[1:]])
    with lead(plan) as writer:
        run_shards(work, writer.pending(), writer, meter=Meter(), progress=Quiet())
        writer.finish()
    assert sizes == {3}
    one, padded = featcache.open(tmp_path / "one"), featcache.open(tmp_path / "padded")
    assert np.array_equal(one.labels(), padded.labels())
    from featcache.inspect import read_feature

    for name in ("vae/moments", "tiny@5"):
        a, b = read_feature(one, name, range(24)), read_feature(padded, name, range(24))
        # Another batch size may round differently: a step of int8, an ulp of fp16.
        assert np.abs(a - b).max() <= np.abs(a).max() / 100


def test_rates_of_stages_and_workers_add_up() -> None:
    meter = Meter()
    meter.add("decode", 2.0, 10, lanes=4)
    meter.add("decode", 2.0, 10, lanes=4)
    meter.add("write", 0.5, 20)
    assert meter.stages["decode"].images_per_s == pytest.approx(20)
    meter.merge({"decode": Stage(4, 4.0, 20), "encode x": Stage(1, 2.0, 20)})
    assert meter.stages["decode"].images_per_s == pytest.approx(40)
    assert meter.stages["encode x"].images_per_s == pytest.approx(10)


def test_a_meter_names_the_bottleneck_and_every_stage() -> None:
    meter = Meter()
    assert meter.summary() == ""
    meter.add("decode", 1.0, 40, lanes=2)
    meter.add("encode x", 1.0, 25)
    assert meter.summary() == "bottleneck: encode x\nimages/s of each stage: encode x 25, decode 80"


def test_the_build_reports_every_stage(tmp_path: Path) -> None:
    told = Told()
    result = build(request(tmp_path / "c"), told)
    assert told.tasks == [("encoding", 24, 0, "images")] and sum(told.counts) == 24
    assert told.texts[-1].startswith("bottleneck: ") and [note.partition(":")[0] for note in told.notes[:2]] == [
        "images",
        "features",
    ]
    assert {"decode", "upload", "encode vae tiny", "encode tiny", "quantise", "copy", "write"} == set(result.stages)
    assert result.stages["decode"].images == result.stages["write"].images == 24
    assert all(stage.busy_s > 0 for stage in result.stages.values())


def featcache_command(*words: str) -> list[str]:
    return [sys.executable, "-m", "featcache.cli", "build", *words]


def torchrun(*words: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, "-m", "featcache.cli", "build", *words]


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=540, check=False)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("single")
    result = run(featcache_command(*WORDS, "--out", "c"), place)
    assert result.returncode == 0, result.stderr
    return tree_digest(place / "c")


def children(pid: int) -> list[int]:
    found = []
    for task in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = task.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(task.parent.name))
    return found


def descendants(pid: int) -> list[int]:
    below = children(pid)
    return below + [grand for child in below for grand in descendants(child)]


def kill_when_under_way(process: subprocess.Popen[str], shards: Path, victims: str) -> bool:
    """SIGKILL once the first shards are there: a worker ('worker') or everything ('driver'). False: it was too late."""
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if finished(shards):
            chosen = find_victims(process.pid, victims)
            for pid in chosen:
                os.kill(pid, signal.SIGKILL)
            return bool(chosen)
        time.sleep(0.01)
    return False


def finished(shards: Path) -> int:
    """Shards of an array that have their final name."""
    return len([file for file in shards.glob("c.*") if file.suffix != ".part"])


def find_victims(pid: int, victims: str) -> list[int]:
    below = descendants(pid)
    if victims == "driver":
        return [pid, *below]
    named = []
    for child in below:
        try:
            words = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            continue
        if b"_Actor" in words or (b"featcache.cli" in words and b"torch.distributed" not in words):
            named.append(child)
    return named[-1:]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["dynamic", "static"])
def test_two_torchrun_ranks_give_the_bytes_of_one_process(
    tmp_path: Path, expected: dict[str, str], schedule: str
) -> None:
    result = run(torchrun(*WORDS, "--schedule", schedule, "--out", "c"), tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("cache:") == 1
    assert result.stdout.count("encoding: 240/240 images") == 1
    assert tree_digest(tmp_path / "c") == expected


def test_only_the_first_rank_counts_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []

    def most(*_: object) -> int:
        counted.append(1)
        return 2

    monkeypatch.setattr("featcache.sources.captions.ShapesCaptions.most", most)
    ask = request(tmp_path / "c", texts=("tiny",), encoders=(), vae="tiny")
    numbers: list[int] = []

    class Informed(Ranks):
        def from_first(self, sent: Any) -> list[int]:
            numbers.extend(sent)
            return numbers

    plans = [prepare_together(ask, Informed(rank, 2, rank), device="cpu") for rank in range(2)]
    assert counted == [1]
    assert plans[0].specs == plans[1].specs
    assert [plan.work.captions_per_image for plan in plans] == [2, 2]


def _rank_that_builds(rank: int, port: int, shown: Any) -> None:
    """Rank 0 is done with 10 images at once; rank 1 does 40, the last of them 1.2 s later."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    class Sent(Quiet):
        def update(self, count: int, text: str = "") -> None:
            shown.send(count)

    workers.POLL_S = 0.05
    with Ranks.of_environment() as ranks:
        progress = _Shared(Sent(), ranks)
        progress.update(10)
        for _ in range(3 * rank):
            time.sleep(0.4)
            progress.update(10)
        ranks.wait(lambda: progress.update(0))
    shown.close()


def test_the_first_rank_shows_the_others_images_while_it_waits_for_them() -> None:
    import multiprocessing

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    both = [context.Process(target=_rank_that_builds, args=(rank, port, sender)) for rank in range(2)]
    for process in both:
        process.start()
    sender.close()
    seen = []
    try:
        while True:
            seen.append(receiver.recv())
    except EOFError:
        pass
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert sum(seen) == 50
    assert sum(image > 0 for image in seen) >= 3, "bit by bit, not all at the end"


def test_ranks_share_shards_one_by_one_or_by_position() -> None:
    """Two ranks as threads with the kind of counter that processes have between them."""
    import threading

    import torch.distributed as dist

    shards, store = list(range(10, 30)), dist.HashStore()
    both = [Ranks(rank, 2, rank) for rank in range(2)]
    taken: list[list[int]] = [[], []]
    begun = threading.Barrier(2)

    def work(rank: int) -> None:
        both[rank]._store = store
        begun.wait()
        for shard in both[rank].share(shards, "dynamic"):
            taken[rank].append(shard)
            both[rank].done(4)
            time.sleep(0.05 * rank)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken[0] + taken[1]) == shards
    assert all(part == sorted(part) for part in taken)
    assert len(taken[0]) > len(taken[1]) >= 1, "the slow rank takes fewer"
    assert both[0].done(0) == both[1].done(0) == 80, "both ranks' images are counted"
    assert [list(ranks.share(shards, "static")) for ranks in both] == [shards[0::2], shards[1::2]]
    assert list(Ranks(0, 1, 0).share(shards, "dynamic")) == shards


@pytest.mark.slow
@pytest.mark.parametrize("victims", ["worker", "driver"])
def test_killed_torchrun_builds_are_finished_by_a_rerun(tmp_path: Path, expected: dict[str, str], victims: str) -> None:
    command = torchrun(*WORDS, "--out", "c")
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    )
    killed = kill_when_under_way(process, tmp_path / "c/vae/moments", victims)
    assert process.wait(timeout=240) != 0
    assert killed
    assert not (tmp_path / "c/zarr.json").exists()
    assert 0 < finished(tmp_path / "c/vae/moments") < 30
    again = run(command, tmp_path)
    assert again.returncode == 0, again.stderr
    assert tree_digest(tmp_path / "c") == expected


SCONTROL = """#!/bin/bash
[ "$1 $2 $3" = "show hostnames node[1-2]" ] && printf 'localhost\\nsecond\\n'
"""

# One task a node, as the script asks; both nodes are this machine. Fails if any task does.
SRUN = """#!/bin/bash
tasks=()
for node in $(seq "$SLURM_NNODES"); do "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task" || exit 1; done
"""


@pytest.mark.slow
def test_the_slurm_script_works_as_written(tmp_path: Path, expected: dict[str, str]) -> None:
    """The page's script with stand-ins for the two programs of Slurm that it calls, on two "nodes" of one rank each."""
    page = (Path(__file__).resolve().parents[2] / "docs/clusters.md").read_text("utf-8")
    script = page.split("```bash\n")[1].split("```")[0]
    assert script.startswith("#!/bin/bash\n#SBATCH")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A fixed port suits a node of one's own; here something else may listen on it.
    (tmp_path / "featcache.sbatch").write_text(script.replace(":29500", f":{port}"))
    (tmp_path / "bin").mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    place = Path(sys.executable).parent
    environment = {
        **ENVIRONMENT,
        "PATH": f"{tmp_path / 'bin'}:{place}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_CPUS_PER_TASK": "2",
        "SLURM_JOB_ID": "4711",
    }
    command = ["bash", "featcache.sbatch", *WORDS, "--out", "c"]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=540, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "(2 ranks)" in result.stdout
    assert tree_digest(tmp_path / "c") == expected


@pytest.mark.slow
def test_two_ray_workers_give_the_bytes_of_one_process(tmp_path: Path, expected: dict[str, str]) -> None:
    pytest.importorskip("ray")
    result = run(featcache_command(*WORDS, "--out", "c", "--engine", "ray", "--ray-workers", "2"), tmp_path)
    assert result.returncode == 0, result.stderr
    assert tree_digest(tmp_path / "c") == expected


@pytest.mark.slow
@pytest.mark.parametrize("victims", ["worker", "driver"])
def test_killed_ray_workers_and_drivers(tmp_path: Path, expected: dict[str, str], victims: str) -> None:
    """A worker's shards are tried again within the same run; after the driver's death a rerun finishes."""
    pytest.importorskip("ray")
    command = featcache_command(*WORDS, "--out", "c", "--engine", "ray", "--ray-workers", "2")
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    killed = kill_when_under_way(process, tmp_path / "c/vae/moments", victims)
    text, _ = process.communicate(timeout=400)
    assert killed
    if victims == "worker":
        assert process.returncode == 0, text
        assert "tried again" in text
    else:
        assert process.returncode != 0
        assert not (tmp_path / "c/zarr.json").exists()
        again = run(command, tmp_path)
        assert again.returncode == 0, again.stderr
    assert tree_digest(tmp_path / "c") == expected
