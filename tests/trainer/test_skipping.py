"""Steps whose loss or gradient is not finite: left out, counted, and in the end a stop. And spikes of the loss."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Listener, assert_identical, checkpoint_files, keep_only, log_of, losses, settings

from featcache.read.order import stream_indices
from trainer import cli
from trainer.averages import gamma_of, power_decay
from trainer.runs import branch, checkpoint
from trainer.runs.log import OF_THE_MACHINE
from trainer.runs.snapshots import list_snapshots
from trainer.training import loop, objective
from trainer.training.loop import Diverged, train
from trainer.training.skipping import SkippedSteps
from trainer.training.spikes import Spikes

pytestmark = pytest.mark.usefixtures("nano")


@pytest.fixture
def bad_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Steps whose noise has a NaN in its first sample alone, so that loss and gradients have."""
    steps: set[int] = set()
    real = objective.draw

    def draw(**kw: Any) -> Any:
        draws = real(**kw)
        if kw["step"] in steps:
            draws.noise[0, 0, 0, 0] = math.nan
        return draws

    monkeypatch.setattr(loop, "draw", draw)
    yield steps


def run(config: Any, root: Path, watcher: Listener | None = None, **kw: Any) -> Path:
    return train(config, resume=kw.pop("resume", False), watcher=watcher or Listener(), root=root, **kw)


MANY = {"checkpoint_every": 1, "keep_checkpoints": 20}
CASES = [
    ("none", {"weight_decay": 0.1}),
    ("sara", {"accumulate": 2}),
    ("ahpa+sra", {"ema_warmup": True}),
    ("sara", {"precision": "fp16"}),
]


@pytest.mark.parametrize(("method", "changes"), CASES)
def test_a_bad_step_changes_nothing(
    shapes_cache: Path, tmp_path: Path, bad_steps: set[int], method: str, changes: dict[str, Any]
) -> None:
    """Weights, average, heads, discriminator, moments, step counts of the optimisers. Step 2 is the discriminator's turn."""
    bad_steps |= {2, 4}
    path = run(settings(shapes_cache, method, steps=7, skip_nonfinite=2, **MANY, **changes), tmp_path)
    for step in sorted(bad_steps):
        before, after = checkpoint_files(path, step), checkpoint_files(path, step + 1)
        for stem, tensors in before.items():
            assert tensors.keys() == after[stem].keys()
            for key, value in tensors.items():
                assert torch.equal(value, after[stem][key]), (stem, key)
    last = checkpoint_files(path, 7)
    assert all(bool(torch.isfinite(v).all()) for tensors in last.values() for v in tensors.values())
    assert {float(v) for k, v in last["optimizer"].items() if k.startswith("step/model")} == {5.0}
    assert not all(torch.equal(v, last["ema"][k]) for k, v in checkpoint_files(path, 5)["ema"].items())


@pytest.mark.parametrize(("method", "changes"), CASES)
def test_the_setting_alone_changes_no_bit(
    shapes_cache: Path, tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    plain = run(settings(shapes_cache, method, **changes), tmp_path / "plain")
    ready = run(settings(shapes_cache, method, skip_nonfinite=5, **changes), tmp_path / "ready")
    assert_identical(plain, ready, 6)
    assert losses(plain) == losses(ready) and losses(ready, "skipped") == [0] * 6


def test_what_was_left_out_is_counted_and_logged(shapes_cache: Path, tmp_path: Path, bad_steps: set[int]) -> None:
    bad_steps |= {1, 4}
    heard = Listener()
    config = settings(shapes_cache, steps=9, skip_nonfinite=3, log_every=3, seed=3)
    path = run(config, tmp_path, heard)
    records = log_of(path)
    assert [(r["step"], r["skipped"]) for r in records] == [(1, 0), (3, 1), (6, 2), (9, 2)]
    assert all(math.isfinite(r["loss"]) for r in records), "means are over the steps that count"
    lines = [json.loads(line) for line in (path / "skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 4]
    assert lines[0]["indices"] == stream_indices(4, 8, count=24, seed=3).tolist() and len(lines[0]["keys"]) == 4
    assert [note for note in heard.warnings if "left out" in note] == [
        f"left out, because the loss or its gradient was not finite: step {step}" for step in (1, 4)
    ]
    assert checkpoint.load_state(checkpoint.find_checkpoint(path)[1])["skipped"] == [1, 4]


def test_one_too_many_ends_the_run_and_a_branch_goes_on(
    shapes_cache: Path, tmp_path: Path, bad_steps: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command in the message works as it stands."""
    bad_steps |= {3, 5, 6}
    monkeypatch.chdir(tmp_path)
    config, heard = settings(shapes_cache, steps=9, skip_nonfinite=2, checkpoint_every=4, log_every=4), Listener()
    with pytest.raises(Diverged, match=r"in step 6, after 2 others were left out \(skip_nonfinite 2\)") as error:
        run(config, Path("runs"), watcher=heard)
    notes = [note for note in heard.warnings if note.startswith("left out")]
    assert notes and not any(note.endswith("6") for note in notes)  # that step is not left out: it ends the run
    assert [step for step, _ in checkpoint.list_checkpoints(Path("runs/run"))] == [4]
    assert json.loads(Path("runs/run/diverged.json").read_text())["step"] == 6
    assert len(Path("runs/run/skipped.jsonl").read_text().splitlines()) == 2
    remedy = error.value.remedy or ""
    commands = [line.strip() for line in remedy.splitlines() if "trainer run" in line]
    assert commands == [
        "trainer run --from runs/run@4 --seed 1 --name run-seed-1",
        "trainer run --from runs/run@4 --lr 0.0005 --name run-lr-0.0005",
    ]
    assert "skip_nonfinite" not in remedy and "bf16" not in remedy  # the one is set, the other is for fp16
    with pytest.raises(Diverged) as again:
        cli.app(shlex.split(commands[0])[1:], standalone_mode=False)
    assert "--from runs/run-seed-1@4 --seed 2 --name run-seed-2" in (again.value.remedy or "")
    assert "--from runs/run-seed-1@4 --lr 0.0005 --name run-seed-1-lr-0.0005" in (again.value.remedy or "")
    bad_steps.clear()
    cli.app(shlex.split(commands[1])[1:], standalone_mode=False)
    assert checkpoint.find_checkpoint(Path("runs/run-lr-0.0005"))[0] == 9


def test_resuming_keeps_the_count(shapes_cache: Path, tmp_path: Path, bad_steps: set[int]) -> None:
    bad_steps |= {2, 5}
    config = settings(shapes_cache, "ahpa", steps=8, skip_nonfinite=2, log_every=2, **MANY)
    whole = run(config, tmp_path / "whole")
    for step in (2, 3, 4, 6):
        cut = keep_only(whole, step, tmp_path / str(step) / "run")
        run(config, cut.parent, resume=True)
        assert_identical(whole, cut, 8)
        assert (cut / "skipped.jsonl").read_bytes() == (whole / "skipped.jsonl").read_bytes()
        assert losses(cut, "skipped") == losses(whole, "skipped")
    cut = keep_only(whole, 4, tmp_path / "more" / "run")
    bad_steps |= {7}
    with pytest.raises(Diverged, match="in step 7, after 2 others"):
        run(config, cut.parent, resume=True)
    more = dataclasses.replace(config, skip_nonfinite=3)
    assert losses(run(more, cut.parent, resume=True), "skipped")[-1] == 3, "the bound may be raised"


def test_without_the_setting_the_first_bad_step_stops(shapes_cache: Path, tmp_path: Path, bad_steps: set[int]) -> None:
    bad_steps |= {3}
    with pytest.raises(Diverged, match=r"in step 3; the step") as error:
        run(settings(shapes_cache, steps=8, checkpoint_every=2), tmp_path)
    assert f"--from {tmp_path / 'run'}@2 --seed 1" in (error.value.remedy or "")
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path / "run")] == [2]


def test_further_averages_know_of_a_step_that_was_left_out(
    shapes_cache: Path, tmp_path: Path, bad_steps: set[int]
) -> None:
    """With a constant decay they stay; in power-function averages it is a step in which the weights stayed."""
    bad_steps |= {3}
    path = run(
        settings(shapes_cache, steps=5, skip_nonfinite=1, ema_decays=[0.5], posthoc=[0.1], lr=0.1, **MANY), tmp_path
    )
    before, after = checkpoint_files(path, 3), checkpoint_files(path, 4)
    keep = power_decay(3, gamma_of(0.1))
    for name, weights in before["model"].items():
        assert torch.equal(before["ema-0.5"][name], after["ema-0.5"][name])
        expected = keep * before["power-0.1"][name].double() + (1 - keep) * weights.double()
        assert torch.allclose(after["power-0.1"][name].double(), expected, rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(v, after["power-0.1"][k]) for k, v in before["power-0.1"].items())
    moved = checkpoint_files(path, 5)["ema-0.5"]
    assert any(not torch.equal(v, moved[k]) for k, v in after["ema-0.5"].items())


def test_all_that_is_kept_of_a_run_is_the_same_after_resuming_and_in_a_branch(
    shapes_cache: Path, tmp_path: Path, bad_steps: set[int]
) -> None:
    """Skipped steps, snapshots of several averages, micro-batches and evaluations that draw random numbers, together."""
    bad_steps |= {2, 5}
    further = {"ema_decays": [0.5], "posthoc": True, "snapshot_every": 3, "snapshot_dtype": "bf16", "eval_every": 2}
    config = settings(
        shapes_cache, "sara", steps=8, skip_nonfinite=2, accumulate=2, log_every=2, keep_checkpoints=9, **further
    )
    config = dataclasses.replace(config, checkpoint_every=2)

    def make_judge(*_: Any) -> Any:
        return lambda ema: {"of-weights": _first(ema) + 0 * float(torch.rand(()))}

    def content(path: Path) -> dict[str, bytes]:
        return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.glob("snapshots/*/*"))}

    def lines(path: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in record.items() if k not in OF_THE_MACHINE} for record in log_of(path)]

    whole = run(config, tmp_path / "whole", make_judge=make_judge)
    assert len(content(whole)) == 2 * 5 and [r["step"] for r in lines(whole) if "eval/of-weights" in r] == [2, 4, 6, 8]
    for step in (2, 4, 6):
        cut = keep_only(whole, step, tmp_path / str(step) / "run")
        run(config, cut.parent, resume=True, make_judge=make_judge)
        assert_identical(whole, cut, 8)
        assert content(cut) == content(whole) and lines(cut) == lines(whole)
    origin = branch.find_origin(f"{whole}@4", any_cache=False)
    again = cli._on_top(branch.inherited(origin), {"name": "branch"}, [], whole, "--from RUN@STEP")
    copy = run(again, tmp_path, origin=origin, make_judge=make_judge)
    assert_identical(whole, copy, 8)
    later = {name: data for name, data in content(whole).items() if "0000006" in name}
    assert later and content(copy) == later
    assert lines(copy) == [line for line in lines(whole) if line["step"] > 4]


def _first(model: torch.nn.Module) -> float:
    return float(next(model.parameters()).detach().double().sum())


def test_a_discriminator_whose_gradient_alone_is_bad_is_noticed(
    shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The square root's derivative at zero is infinite, and its value is not. Step 2 is the discriminator's second turn."""
    real, turns = objective.Objective.adversary_loss, list[int]()

    def adversary_loss(self: objective.Objective, *args: Any) -> torch.Tensor:
        loss = real(self, *args)
        turns.append(1)
        return loss + torch.sqrt(0 * loss) if len(turns) == 2 else loss

    monkeypatch.setattr(objective.Objective, "adversary_loss", adversary_loss)
    path = run(settings(shapes_cache, "sara", steps=4, skip_nonfinite=1, **MANY), tmp_path)
    before, after = checkpoint_files(path, 2), checkpoint_files(path, 3)
    assert all(torch.equal(value, after[stem][key]) for stem, of in before.items() for key, value in of.items())
    assert losses(path, "skipped") == [0, 0, 1, 1]


def test_no_snapshot_is_taken_of_weights_that_are_not_finite(
    shapes_cache: Path, tmp_path: Path, bad_steps: set[int]
) -> None:
    bad_steps |= {3}
    with pytest.raises(Diverged, match=r"in step 3; the step"):
        run(settings(shapes_cache, steps=9, log_every=9, snapshot_every=2), tmp_path)
    assert [step for step, _ in list_snapshots(tmp_path / "run")] == [2]


def test_a_bound_that_was_lowered_ends_at_the_next_bad_step() -> None:
    """Not at one that was left out long ago."""
    skipped = SkippedSteps(1, torch.device("cpu"), [2, 5, 7])
    assert skipped.first_too_many is None, "what is over stays allowed"
    for step, loss in ((8, 0.5), (9, math.nan), (10, math.nan)):
        skipped.watch(torch.tensor(loss), step)
        skipped.decide(step)
    assert skipped.read() == [9] and skipped.first_too_many == 9


# --- spikes


def test_a_loss_far_above_its_course_is_a_spike() -> None:
    spikes = Spikes()
    course = [1.0 + 0.01 * (k % 5) for k in range(30)]
    assert [spikes.see(5.0 if k == 3 else loss) for k, loss in enumerate(course)] == [None] * 30, "not at the start"
    assert spikes.see(1.15) is None, "many deviations, but close"
    assert spikes.see(2.04) == pytest.approx(2.0, rel=0.01) and spikes.begins
    assert spikes.see(2.04) is not None and not spikes.begins, "told once"
    assert spikes.see(1.02) is None and not spikes.begins
    assert spikes.see(2.04) is not None and spikes.begins
    assert spikes.see(math.nan) is None and spikes.see(None) is None
    noisy = Spikes({"denoise": 1.0 + 0.5 * (k % 3)} for k in range(30))
    assert noisy.see(2.9) is None, "within the noise"
    assert noisy.see(9.0) is not None
    lasting = Spikes({"denoise": value} for value in course)
    seen = [lasting.see(2.0 + 0.01 * (k % 5)) is not None for k in range(60)]
    assert seen[0] and sum(seen) <= 26 and not any(seen[30:]), "a lasting rise is the course in the end"


def test_a_spike_is_noted_and_drawn(shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.report.run import write_run_report

    real = objective.draw

    def draw(**kw: Any) -> Any:
        draws = real(**kw)
        if kw["step"] in (20, 21):
            draws.noise.mul_(30)
        return draws

    monkeypatch.setattr(loop, "draw", draw)
    heard = Listener()
    config = settings(shapes_cache, steps=24, checkpoint_every=21, lr=1e-5)
    path = run(config, tmp_path / "whole", heard)
    assert [r["step"] for r in log_of(path) if "spike" in r] == [21, 22]
    noted = [note for note in heard.warnings if "times its recent median" in note]
    assert len(noted) == 1 and "at step 21 " in noted[0], "a run of spikes is noted once"
    assert "▾" in write_run_report([path]).read_text()
    cut = keep_only(path, 21, tmp_path / "cut" / "run")
    again = Listener()
    run(config, cut.parent, again, resume=True)
    assert [r.get("spike") for r in log_of(cut)] == [r.get("spike") for r in log_of(path)]
    assert not any("times its recent median" in note for note in again.warnings)
