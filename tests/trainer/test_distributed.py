"""Two ranks over gloo on the CPU: the same run as one rank's, to rounding, replicated (DDP) or sharded (FSDP2)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Listener, add_nano, checkpoint_files, log_of, losses, settings
from two_ranks import spoiling

import trainer.training.loop
from featcache.errors import UserError
from featcache.settings import to_mapping
from trainer.distributed import World, join
from trainer.runs.log import OF_THE_MACHINE
from trainer.runs.snapshots import list_snapshots, load_snapshot
from trainer.training.loop import train

METHODS = ("none", "ahpa", "dya", "sara", "sra")
STEPS = 6


@dataclass(frozen=True)
class Outcome:
    """What two ranks did in one launch."""

    root: Path
    cache: Path
    ranks: tuple[dict[str, Any], dict[str, Any]]


def changes(name: str, cache: Path) -> dict[str, Any]:
    """Settings of the job of that name beyond its method. cache: with files of statistics beside it."""
    values: dict[str, Any] = {"steps": STEPS, "clip": 0.5}
    if "-sharded" in name:
        values["shard"] = True
    if "-accumulated" in name:
        values["accumulate"] = 2
    if "-compiled" in name:
        values |= {"compile": True, "align_until": STEPS - 2, "log_every": 2}
    if "-fp16" in name:
        values["precision"] = "fp16"
    if "-bf16" in name:
        values["precision"] = "bf16"
    if "-recomputed" in name:
        values["recompute"] = "blocks"
    if "-whitened" in name:
        values |= {"align": {"ahpa": {"normalize": "whiten"}}, "normalization": "channel"}
        values["statistics"] = str(cache.with_name("channel.safetensors"))
    if "-lightning" in name:
        values["model"] = "LightningDiT-Nano/2"
    if "-streams" in name:
        beside = {"tiny@5": {"embed": "own", "weight": 0.1}, "tiny@2": {"normalization": "position", "dropout": 0.3}}
        values["streams"] = beside
    if "-drawn" in name:
        values["sample_every"] = STEPS
    return values


# Snapshots of several averages, and an evaluation in between.
KEPT: dict[str, Any] = {
    **{"ema_decays": [0.5], "posthoc": True, "snapshot_every": 2},
    **{"eval_every": 3, "eval_num": 8, "eval_extractor": "embedded"},
}
JOBS = (*METHODS, "ahpa-sharded", "sra-sharded", "repa-sharded-streams")
SKIPPING = ("sara", "repa-sharded", "none-sharded-streams")
MORE_JOBS = (
    *("sara-accumulated", "none-sharded", "sara-sharded", "dya-sharded-accumulated", "repa-sharded-drawn"),
    *(
        "ahpa-compiled",
        "sara-compiled-accumulated",
        "sra-sharded-compiled",
        "ahpa-fp16-accumulated",
        "ahpa+sra",
        "ahpa-whitened-compiled",
        "sra-sharded-lightning-drawn",
    ),
)
EVERY_JOB = [
    *((name, "two_ranks") for name in JOBS),
    *(pytest.param(name, "more_of_two_ranks", marks=pytest.mark.slow) for name in MORE_JOBS),
]


def launch(jobs: list[dict[str, Any]], root: Path, seen: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    seen.mkdir()
    (seen / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("two_ranks.py")
    command = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [*command, str(seen / "jobs.json"), str(root), str(seen)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((seen / f"rank{rank}.json").read_text()) for rank in range(2))
    return first, second


def plain(cache: Path, job: str, **kw: Any) -> dict[str, Any]:
    """A job's settings as the ranks get them."""
    add_nano()
    return to_mapping(settings(cache, job.split("-")[0], **{**changes(job, cache), "name": job, **kw}))


@pytest.fixture(scope="module")
def two_ranks(shapes_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("two-ranks")
    jobs: list[dict[str, Any]] = [{"name": name, "settings": plain(shapes_cache, name)} for name in JOBS]
    stopped = plain(shapes_cache, "ahpa-sharded", name="stopped")
    jobs += [
        {"name": "unnamed", "settings": plain(shapes_cache, "none", name=None, steps=1)},
        {"name": "uneven", "settings": plain(shapes_cache, "none", name="uneven", batch_size=3)},
        {"name": "diverged", "settings": plain(shapes_cache, "none", name="diverged", lr=1e30, log_every=3)},
        {"name": "stopped", "settings": {**stopped, "steps": 50}, "signal_rank": 1, "signal_step": 3},
        {"name": "stopped-again", "settings": stopped, "resume": True},
        {"name": "kept", "settings": plain(shapes_cache, "none-sharded", name="kept", **KEPT)},
    ]
    for name in SKIPPING:
        bad = plain(shapes_cache, name, name=f"skipping-{name}", skip_nonfinite=1, log_every=2, accumulate=2)
        bad |= {"checkpoint_every": 1, "keep_checkpoints": 3, "steps": 4}
        jobs.append({"name": f"skipping-{name}", "settings": bad, "bad_steps": [2]})
    jobs.append({"name": "beyond", "settings": {**bad, "name": "beyond", "checkpoint_every": 9}, "bad_steps": [1, 2]})
    return Outcome(folder / "runs", shapes_cache, launch(jobs, folder / "runs", folder / "seen"))


@pytest.fixture(scope="module")
def more_of_two_ranks(
    shapes_cache: Path, statistics: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    folder = tmp_path_factory.mktemp("more-of-two-ranks")
    jobs = [{"name": name, "settings": plain(shapes_cache, name)} for name in MORE_JOBS]
    return Outcome(folder / "runs", shapes_cache, launch(jobs, folder / "runs", folder / "seen"))


def alone(outcome: Outcome, name: str, root: Path, **kw: Any) -> Path:
    """The same run on one rank."""
    config = settings(
        outcome.cache, name.split("-")[0], **{**changes(name, outcome.cache), "name": name, "compile": False, **kw}
    )
    return train(config, resume=False, watcher=Listener(), root=root)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("name", SKIPPING)
def test_all_ranks_leave_out_the_same_step(
    two_ranks: Outcome, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank alone meets the bad sample, in one of its two micro-batches. Nothing of any rank's changes."""
    path = two_ranks.root / f"skipping-{name}"
    before, after = checkpoint_files(path, 2), checkpoint_files(path, 3)
    for stem, tensors in before.items():
        assert all(torch.equal(value, after[stem][key]) for key, value in tensors.items()), stem
    monkeypatch.setattr(trainer.training.loop, "draw", spoiling([2]))
    one = log_of(alone(two_ranks, name, tmp_path, skip_nonfinite=1, log_every=2, accumulate=2, steps=4))
    two = log_of(path)
    assert [line["skipped"] for line in two] == [line["skipped"] for line in one] == [0, 0, 1]
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=2e-4)
    for rank in two_ranks.ranks:
        assert "in step 2, after 1 others" in rank["beyond"]["error"]
    assert json.loads((two_ranks.root / "beyond" / "diverged.json").read_text())["step"] == 2


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(("name", "fixture"), EVERY_JOB)
def test_two_ranks_follow_the_curve_of_one(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, fixture: str
) -> None:
    """Losses, gradient norms and the method's own numbers at every step; the order of the sums is all that differs."""
    ranks: Outcome = request.getfixturevalue(fixture)
    one, two = log_of(alone(ranks, name, tmp_path)), log_of(ranks.root / name)
    for a, b in zip(one, two, strict=True):
        numbers = [k for k in a if k not in OF_THE_MACHINE]
        relative, absolute = (2e-3, 1e-3) if "-fp16" in name else (2e-4, 2e-5)
        assert {k: b[k] for k in numbers} == pytest.approx({k: a[k] for k in numbers}, rel=relative, abs=absolute)
    assert max(r["grad_norm"] for r in one) > 0.5, "clipping must have acted"


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("method", ["ahpa", "sra"])
def test_sharded_checkpoints_are_laid_out_as_whole_ones(two_ranks: Outcome, method: str) -> None:
    whole = checkpoint_files(two_ranks.root / method, STEPS)
    sharded = checkpoint_files(two_ranks.root / f"{method}-sharded", STEPS)
    assert whole.keys() == sharded.keys()
    for stem, tensors in whole.items():
        assert tensors.keys() == sharded[stem].keys()
        for key, value in tensors.items():
            other = sharded[stem][key]
            assert (other.shape, other.dtype) == (value.shape, value.dtype), key
    assert all(torch.allclose(v, sharded["ema"][k], atol=2e-3) for k, v in whole["ema"].items())


@pytest.mark.usefixtures("nano")
def test_a_sharded_run_goes_on_alone(two_ranks: Outcome, tmp_path: Path) -> None:
    """From its checkpoint, on one rank, and equal to the run that was alone from the start."""
    import shutil

    shutil.copytree(two_ranks.root / "ahpa-sharded", tmp_path / "ahpa-sharded")
    config = settings(
        two_ranks.cache, "ahpa", **{**changes("ahpa", two_ranks.cache), "name": "ahpa-sharded", "steps": STEPS + 3}
    )
    train(config, resume=True, watcher=Listener(), root=tmp_path)
    expected = losses(alone(two_ranks, "ahpa", tmp_path, steps=STEPS + 3))
    assert losses(tmp_path / "ahpa-sharded") == pytest.approx(expected, rel=2e-4)


@pytest.mark.usefixtures("nano")
def test_snapshots_of_a_sharded_run_are_whole(two_ranks: Outcome, tmp_path: Path) -> None:
    """Bit by bit what its checkpoint holds, and to rounding those of one rank. The main rank evaluates for all."""
    sharded, one = two_ranks.root / "kept", alone(two_ranks, "none", tmp_path, **KEPT)
    assert [step for step, _ in list_snapshots(sharded)] == [2, 4, 6]
    saved = checkpoint_files(sharded, STEPS)
    for stem in ("ema", "ema-0.5", "power-0.05", "power-0.1"):
        for step in (2, 4, 6):
            found, expected = (load_snapshot(run / "snapshots" / f"step_{step:07d}", stem) for run in (sharded, one))
            assert all(torch.allclose(value, expected[name], atol=2e-3) for name, value in found.items())
        assert found.keys() == saved[stem].keys()
        assert all(torch.equal(value, saved[stem][name]) for name, value in found.items())
    judged = [record["step"] for record in log_of(sharded) if "eval/embedded-FID" in record]
    assert judged == [3, 6]
    assert losses_but_evaluations(sharded) == pytest.approx(losses_but_evaluations(one), rel=2e-4)


def losses_but_evaluations(run: Path) -> list[float]:
    return [record["loss"] for record in log_of(run) if "loss" in record]


@pytest.mark.usefixtures("nano")
def test_a_signal_to_one_rank_stops_all_after_the_same_step(two_ranks: Outcome, tmp_path: Path) -> None:
    """Rank 1 is told in step 3 (the fourth); what it says is known to both one step later. Resuming then goes on."""
    assert [seen["stopped"]["exit"] for seen in two_ranks.ranks] == [128 + 15] * 2
    assert two_ranks.ranks[0]["stopped"]["told"] == 5
    assert two_ranks.ranks[0]["stopped-again"]["told"] == STEPS
    expected = losses(alone(two_ranks, "ahpa", tmp_path))
    assert losses(two_ranks.root / "stopped") == pytest.approx(expected, rel=2e-4)


def test_all_ranks_learn_of_a_flag_in_the_same_round(two_ranks: Outcome) -> None:
    assert [seen["flags"] for seen in two_ranks.ranks] == [[0, 0, 0, 0, 15, 0, 0]] * 2


def test_gradients_are_averaged_and_missing_ones_stay_missing(two_ranks: Outcome) -> None:
    assert [seen["averaged"] for seen in two_ranks.ranks] == [[[1.5, 3.0], None, [15.0, 0.0]]] * 2


def test_the_main_rank_decides(two_ranks: Outcome) -> None:
    assert [seen["from_main"] for seen in two_ranks.ranks] == [{"rank": 0}] * 2
    folders = [seen["unnamed"]["folder"] for seen in two_ranks.ranks]
    assert folders[0] == folders[1] and Path(folders[0]).is_dir()
    assert two_ranks.ranks[1]["none"]["told"] == 0, "only the main rank reports"


def test_errors_reach_every_rank(two_ranks: Outcome) -> None:
    for seen in two_ranks.ranks:
        assert "batch_size 3 cannot be shared by 2 ranks" in seen["uneven"]["error"]
        assert "not finite in step 1" in seen["diverged"]["error"]


@pytest.mark.slow
def test_a_sharded_run_draws_its_grids(more_of_two_ranks: Outcome) -> None:
    assert (more_of_two_ranks.root / "repa-sharded-drawn" / "samples" / f"step_{STEPS:07d}.png").is_file()


def test_one_rank_speaks_for_all(shapes_cache: Path, tmp_path: Path) -> None:
    """As it is typed: every line once, warnings included (SARA's discriminator has no pretrained weights here)."""
    folder = Path(sys.executable).parent
    words = (
        f"run --method sara --model SiT-Ti/2 --steps 1 --batch-size 2 --device cpu --name two --cache {shapes_cache}"
    )
    done = subprocess.run(
        [folder / "torchrun", "--standalone", "--nproc-per-node", "2", folder / "trainer", *words.split()],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for said in ("training sara on", "1/1 steps", "run: "):
        assert done.stdout.count(said) == 1, said
    assert done.stderr.count("starts from random weights") == 1


@pytest.mark.parametrize("fault", ["train_step", pytest.param("assemble", marks=pytest.mark.slow)])
def test_a_fault_of_another_rank_ends_all(shapes_cache: Path, tmp_path: Path, fault: str) -> None:
    """One that nobody foresaw, of rank 1 alone, while rank 0 trains or waits: told in a paragraph, and soon over."""
    folder = Path(sys.executable).parent
    words = f"run --model SiT-Nano/2 --steps 50 --batch-size 2 --device cpu --name two --cache {shapes_cache}"
    script = Path(__file__).with_name("fault_of_a_rank.py")
    done = subprocess.run(
        [folder / "torchrun", "--standalone", "--nproc-per-node", "2", script, fault, *words.split()],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "error: rank 1: an unforeseen fault ended the command: RuntimeError: nobody foresaw this" in told
    # Rank 0 may notice it before torchrun has ended it.
    assert set(told[1:]) <= {"error: the connection to the other ranks broke: one has ended, or is out of reach"}
    assert script.name not in done.stderr.partition("ChildFailedError")[0], "no traceback of ours"
    assert "FEATCACHE_DEBUG" in done.stderr and "exitcode  : 70" in done.stderr


def test_an_error_of_another_rank_is_printed_late_and_with_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Late, so that torchrun has ended this rank by then if the main one met the error, too."""
    from trainer.cli import _one_voice

    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setenv("RANK", "3")
    with warnings.catch_warnings():
        with pytest.raises(UserError, match="rank 3: no such thing") as error, _one_voice() as main:
            assert not main
            raise UserError("no such thing", remedy="Do this.")
        assert error.value.remedy == "Do this." and slept == [5]
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"^no such thing"), _one_voice() as main:
        assert main
        raise UserError("no such thing")
    assert slept == [5]


def test_ranks_cannot_share_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="cannot share cuda:0"):
        join("cuda:0")


def test_devices_of_ranks() -> None:
    world = World(rank=5, size=8, local_rank=1)
    assert world.device("cuda") == torch.device("cuda", 1)
    assert world.device("cuda:3") == torch.device("cuda", 3)
    assert world.device("cpu") == torch.device("cpu")
    assert not world.is_main


@pytest.mark.slow
@pytest.mark.parametrize(("patience", "lost"), [("None", False), ("timedelta(seconds=1)", True)])
def test_a_rank_waits_as_long_as_it_is_told_to(patience: str, lost: bool) -> None:
    """While the main rank computes what the others need."""
    folder = Path(sys.executable).parent
    program = (
        "import time; from datetime import timedelta; from trainer import distributed\n"
        f"with distributed.joined('cpu', patience={patience}) as world:\n"
        "    world.is_main and time.sleep(3)\n"
        "    assert distributed.from_main(world.rank) == 0"
    )
    done = subprocess.run(
        [folder / "torchrun", "--standalone", "--nproc-per-node", "2", "--no-python", sys.executable, "-c", program],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode != 0) == lost, done.stderr[-2000:]
    assert ("the connection to the other ranks broke" in done.stderr) == lost
