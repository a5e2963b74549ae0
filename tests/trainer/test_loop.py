"""Whole runs: what they log, keep apart, stop for and learn."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import (
    METHOD_OPTIONS,
    Listener,
    assert_identical,
    checkpoint_files,
    keep_only,
    log_of,
    losses,
    settings,
)
from torch._dynamo.utils import counters

import featcache
from featcache.read.order import stream_indices
from trainer.align.dya import dropped
from trainer.distributed import StopSignal
from trainer.report.run import write_run_report
from trainer.runs import checkpoint
from trainer.runs.config import RunConfig
from trainer.runs.folder import load_config
from trainer.training.loop import Diverged, train
from trainer.training.meters import FirstBadStep, RunningMeans, TrainingClock

CPU = torch.device("cpu")


def run(config: RunConfig, root: Path, watcher: Listener | None = None) -> Path:
    return train(config, resume=False, watcher=watcher or Listener(), root=root)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("repa", {"align": {"repa": {"weight": 0.0, "head_width": 16}}}),
        ("ahpa", {"align": {"ahpa": {"weight": 0.0, "router_width": 8}}}),
        ("dya", {"align": {"dya": {"weight": 0.0, "head_width": 16}}}),
        ("sra", {"align": {"sra": {"weight": 0.0}}}),
        ("sra2", {"align": {"sra2": {"weight": 0.0, "head_width": 16}}}),
        ("sara", {"align_until": 0}),
        ("ahpa+sra", {"align_until": 0}),
    ],
)
def test_none_is_bit_identical_whether_alignment_is_present_or_not(
    shapes_cache: Path, tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    """The backbone's start and way are those of ``none``, clipping included; weights to sample from hold nothing else."""
    common = {"clip": 0.3, "steps": 4}
    plain = checkpoint_files(run(settings(shapes_cache, **common), tmp_path / "plain"), 4)
    beside = checkpoint_files(run(settings(shapes_cache, method, **common, **changes), tmp_path / "beside"), 4)
    for stem in ("model", "ema"):
        assert plain[stem].keys() == beside[stem].keys()
        assert all(torch.equal(value, beside[stem][key]) for key, value in plain[stem].items())
    assert beside["alignment"] or method == "sra"
    grad_norms = [losses(tmp_path / name / "run", "grad_norm") for name in ("plain", "beside")]
    assert grad_norms[0] == grad_norms[1] and max(grad_norms[0]) > 0.3, "clipping must have acted"


@pytest.mark.usefixtures("nano")
def test_every_method_starts_from_the_same_backbone(shapes_cache: Path, tmp_path: Path) -> None:
    first = [
        losses(run(settings(shapes_cache, m, steps=1), tmp_path / m), "denoise")[0] for m in ("none", "repa", "sara")
    ]
    assert first[0] == first[1] == first[2]


@pytest.mark.usefixtures("nano")
def test_streaming_settings_of_a_local_cache_are_noted(shapes_cache: Path, tmp_path: Path) -> None:
    quiet, told = Listener(), Listener()
    run(settings(shapes_cache, steps=1), tmp_path / "a", quiet)
    run(settings(shapes_cache, steps=1, stream_gib=50.0, stream_dir=str(tmp_path)), tmp_path / "b", told)
    assert not any("no effect" in text for text in quiet.warnings)
    assert any("stream_dir and stream_gib have no effect" in text for text in told.warnings)


@pytest.mark.usefixtures("nano")
def test_alignment_can_be_switched_off_at_a_step(shapes_cache: Path, tmp_path: Path) -> None:
    full = log_of(run(settings(shapes_cache, "repa", steps=6), tmp_path / "full"))
    haste = log_of(run(settings(shapes_cache, "repa", steps=6, align_until=3), tmp_path / "haste"))
    assert ["align/cosine" in record for record in haste] == [True] * 3 + [False] * 3
    assert [r["loss"] for r in haste[:3]] == [r["loss"] for r in full[:3]]
    assert [r["denoise"] for r in haste[:4]] == [r["denoise"] for r in full[:4]]
    assert haste[5]["denoise"] != full[5]["denoise"]
    assert all(r["loss"] == r["denoise"] for r in haste[3:])


@pytest.mark.usefixtures("nano")
def test_stochastic_dropout_skips_whole_steps(shapes_cache: Path, tmp_path: Path) -> None:
    records = log_of(run(settings(shapes_cache, "dya", steps=10, seed=2), tmp_path))
    coins = [dropped(seed=2, step=step, probability=0.5) for step in range(10)]
    assert ["align/semantic" not in record for record in records] == coins
    assert 0 < sum(coins) < 10


@pytest.mark.usefixtures("nano")
def test_the_discriminator_takes_its_turns(shapes_cache: Path, tmp_path: Path) -> None:
    """Every second step here; in the others its weights stay as they are."""
    config = settings(shapes_cache, "sara", steps=4, checkpoint_every=1, keep_checkpoints=9)
    path = run(config, tmp_path)
    assert ["align/adversary" in record for record in log_of(path)] == [True, False, True, False]
    states = [checkpoint_files(path, step)["alignment"] for step in range(1, 5)]
    moved = [
        any(not torch.equal(a[k], b[k]) for k in a if k.startswith("discriminator."))
        for a, b in itertools.pairwise(states)
    ]
    assert moved == [False, True, False]


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("method", ["none", "sara", "ahpa"])
def test_accumulation_changes_only_the_rounding(shapes_cache: Path, tmp_path: Path, method: str) -> None:
    one = losses(run(settings(shapes_cache, method), tmp_path / "one"))
    four = losses(run(settings(shapes_cache, method, accumulate=4), tmp_path / "four"))
    assert four == pytest.approx(one, rel=1e-4)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_follows_float32(shapes_cache: Path, tmp_path: Path, precision: str) -> None:
    expected = losses(run(settings(shapes_cache, "sara"), tmp_path / "fp32"))
    path = run(settings(shapes_cache, "sara", precision=precision), tmp_path / precision)
    assert losses(path) == pytest.approx(expected, rel=0.02)
    assert all(v.dtype is torch.float32 for v in checkpoint_files(path, 6)["model"].values())


@pytest.mark.usefixtures("nano")
def test_a_loss_that_is_not_finite_stops_the_run(shapes_cache: Path, tmp_path: Path) -> None:
    """Step 0 ends with absurd weights, so step 1 is the first bad one; it is noticed at the next line of the log."""
    config = settings(shapes_cache, steps=20, lr=1e30, log_every=5, seed=3)
    with pytest.raises(Diverged, match="in step 1;") as error:
        run(config, tmp_path)
    assert error.value.remedy is not None and "--lr" in error.value.remedy
    report = json.loads((tmp_path / "run" / "diverged.json").read_text())
    cache = featcache.open(shapes_cache)
    indices = stream_indices(4, 8, count=24, seed=3).tolist()
    every = cache.keys()
    assert report == {"step": 1, "seed": 3, "indices": indices, "keys": [every[i] for i in indices]}
    assert not (tmp_path / "run" / "checkpoints").exists(), "broken weights are not saved"


def test_the_first_bad_step_is_remembered() -> None:
    bad = FirstBadStep(CPU)
    for step, value in enumerate([1.0, 2.0]):
        bad.watch(torch.tensor(value), step)
    assert bad.read() is None
    for step, value in enumerate([1.0, math.inf, 3.0, math.nan], start=2):
        bad.watch(torch.tensor(value), step)
    assert bad.read() == 3


def test_means_are_over_what_was_added_since_the_last_time() -> None:
    means = RunningMeans()
    means.add({"a": torch.tensor(1.0), "b": torch.tensor(10.0)})
    means.add({"a": torch.tensor(3.0)})
    assert means.take() == {"a": 2.0, "b": 10.0}
    means.add({"a": torch.tensor(7.0)})
    assert means.take() == {"a": 7.0} and means.take() == {}


def test_the_clock_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = TrainingClock(50.0)
    assert clock.steps_per_s(0) is None
    now[0] += 4
    with clock.paused():
        now[0] += 1000
    now[0] += 1
    assert clock.trained_s == 55.0
    assert clock.steps_per_s(10) == 2.0


def test_one_process_stops_at_once() -> None:
    signals = StopSignal()
    assert [signals.agree(n) for n in (0, 15)] == [0, 15]
    assert signals.wait() == 0


@pytest.mark.usefixtures("nano")
def test_the_log_is_json_with_the_documented_keys(shapes_cache: Path, tmp_path: Path) -> None:
    listener = Listener()
    config = settings(shapes_cache, "ahpa", steps=5, log_every=2, warmup_steps=4, lr=1e-3)
    records = log_of(run(config, tmp_path, listener))
    assert [r["step"] for r in records] == [1, 2, 4, 5]
    for record in records:
        assert {"time_s", "loss", "denoise", "lr", "grad_norm", "align/cosine", "metric/similarity"} <= set(record)
        assert record["loss"] == pytest.approx(record["denoise"] + record["align/cosine"], abs=1e-5)
    assert [r["lr"] for r in records] == pytest.approx([2.5e-4, 5e-4, 1e-3, 1e-3])
    assert all(r["images_per_s"] > 0 for r in records[1:])
    assert listener.done == 5
    assert list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.usefixtures("nano")
def test_a_router_has_its_own_learning_rate(shapes_cache: Path, tmp_path: Path) -> None:
    """Adam's first step is the learning rate, whatever the gradient; all else is as without the factor."""
    steps = {}
    for name, options in (("one", {}), ("tenth", {"router_lr": 0.1})):
        align = {"ahpa": {**METHOD_OPTIONS["ahpa"]["ahpa"], **options}}
        path = run(settings(shapes_cache, "ahpa", steps=1, lr=1e-3, align=align, name=name), tmp_path)
        steps[name] = checkpoint.load_tensors(checkpoint.find_checkpoint(path)[1], "alignment")
    for key, one in steps["one"].items():
        difference = (one - steps["tenth"][key]).abs().max().item()
        if key == "router.out.weight":  # starts at zero
            assert one.abs().max().item() == pytest.approx(1e-3, rel=1e-2)
            assert steps["tenth"][key].abs().max().item() == pytest.approx(1e-4, rel=1e-2)
        elif not key.startswith("router"):
            assert difference == 0, key


@pytest.mark.usefixtures("nano")
def test_the_run_folder_describes_the_run(shapes_cache: Path, tmp_path: Path) -> None:
    from trainer.runs.folder import load_config

    path = run(settings(shapes_cache, "ahpa", steps=1, clip=None), tmp_path)
    config = load_config(path)
    assert (config.precision, config.clip, config.cache) == ("fp32", 2.0, str(shapes_cache)), "nothing is left open"
    summary = json.loads((path / "cache.json").read_text())
    assert summary["fingerprint"] == featcache.open(shapes_cache).fingerprint
    assert summary["features"]["vae/G3"]["shape"][0] == 4


@pytest.mark.usefixtures("nano")
def test_runs_without_a_name_get_folders_of_their_own(shapes_cache: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    config = replace(settings(shapes_cache, steps=1), name=None)
    assert [run(config, tmp_path).name for _ in range(2)] == ["none-SiT-Nano-2", "none-SiT-Nano-2-2"]


@pytest.mark.usefixtures("nano")
def test_grids_are_drawn_from_the_average(shapes_cache: Path, tmp_path: Path) -> None:
    from PIL import Image

    path = run(settings(shapes_cache, steps=1, sample_every=1), tmp_path)
    pixels = np.asarray(Image.open(path / "samples" / "step_0000001.png"))
    classes = len(featcache.open(shapes_cache).manifest.dataset.class_names)
    assert pixels.shape == (64 * min(10, classes), 64 * 8, 3)


@pytest.mark.usefixtures("nano")
def test_training_learns(shapes_cache: Path, tmp_path: Path) -> None:
    """Two dozen images are soon known: the loss falls well below the untrained value, the cosine rises."""
    config = settings(shapes_cache, "repa", steps=240, batch_size=16, lr=2e-3, log_every=40, checkpoint_every=1000)
    records = log_of(run(config, tmp_path))
    assert records[-1]["denoise"] < 0.75 * records[0]["denoise"]
    (name,) = (k for k in records[0] if k.startswith("metric/similarity"))
    assert records[-1][name] > records[0][name] + 0.3


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    ("method", "changes", "graphs"),
    [
        ("none", {}, 1),
        ("sara", {"accumulate": 2}, 2),
        ("none", {"skip_nonfinite": 2}, 1),
        ("dya", {"recompute": "blocks", "lr_schedule": "cosine"}, 2),
        *(
            pytest.param(method, changes, graphs, marks=pytest.mark.slow)
            for method, changes, graphs in (
                ("dya", {}, 2),
                ("sara", {"recompute": "blocks", "accumulate": 2, "precision": "bf16"}, 2),
                ("sra", {"recompute": "blocks", "lr_schedule": "inverse-sqrt", "hold_steps": 2}, 2),
                ("repa", {"precision": "bf16"}, 2),
                ("ahpa", {"precision": "fp16"}, 2),
                ("ahpa", {"align": {"ahpa": {"router": "content", "depths": [1, 3]}}}, 2),
                ("ahpa", {"align": {"ahpa": {"normalize": "whiten"}}, "normalization": "channel"}, 2),
                ("sra", {"accumulate": 2}, 2),
                ("sra2", {}, 2),
                ("ahpa+sra", {}, 2),
                ("none", {"model": "DiT-Nano/2"}, 1),
                ("ahpa", {"model": "DiT-Nano/2", "warmup_steps": 3}, 2),
                ("repa", {"ema_decays": [0.99], "posthoc": True, "snapshot_every": 2}, 2),
            )
        ),
    ],
)
def test_a_step_is_one_compiled_region(
    shapes_cache: Path,
    statistics: dict[str, Path],
    tmp_path: Path,
    method: str,
    changes: dict[str, Any],
    graphs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One graph with alignment and one without, nothing between them, and none compiled anew: not for lines of the log,
    the discriminator's turns, DyA's coin, the stop, micro-batches or a changed learning rate.

    With the tracer alone, which decides all this; the slow code generator has a test of its own.
    """
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, **kw: real(m, **kw, backend="eager"))
    torch.compiler.reset()
    counters.clear()
    common = {"steps": 10, "log_every": 3, "align_until": 8, "seed": 2, **changes}
    if over := changes.get("normalization"):
        common["statistics"] = str(statistics[over])
    compiled = run(settings(shapes_cache, method, compile=True, **common), tmp_path / "compiled")
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    eager = run(settings(shapes_cache, method, **common), tmp_path / "eager")
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-4)
    if method == "dya":
        coins = [dropped(seed=2, step=step, probability=0.5) for step in range(8)]
        assert 0 < sum(coins) < 8, "alignment must have come and gone"


@pytest.mark.slow
@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("method", ["ahpa", "sara", "sra"])
def test_a_compiled_run_follows_an_uncompiled_one(shapes_cache: Path, tmp_path: Path, method: str) -> None:
    """With the real code generator."""
    torch.compiler.reset()
    common = {"steps": 4, "align_until": 3, "log_every": 2}
    eager = run(settings(shapes_cache, method, **common), tmp_path / "eager")
    compiled = run(settings(shapes_cache, method, compile=True, **common), tmp_path / "compiled")
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("method", ["none", "sara", "sra", "ahpa"])
def test_no_step_waits_for_the_gpu(
    shapes_cache: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any synchronising call inside a step that logs nothing is an error; the discriminator's turns are included."""
    import trainer.training.loop

    real = trainer.training.loop.train_step
    seen: list[int] = []

    def watched(*args: Any, measures: bool, **kw: Any) -> Any:
        if measures or len(seen) < 2:  # first steps set up handles
            seen.append(0)
            return real(*args, measures=measures, **kw)
        torch.cuda.set_sync_debug_mode("error")
        try:
            seen.append(1)
            return real(*args, measures=measures, **kw)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(trainer.training.loop, "train_step", watched)
    run(settings(shapes_cache, method, device="cuda", compile=False, steps=8, log_every=100), tmp_path)
    assert sum(seen) >= 4


@pytest.mark.usefixtures("nano")
def test_a_run_without_clipping_is_one_with_a_limit_never_reached(shapes_cache: Path, tmp_path: Path) -> None:
    common = {"steps": 4, "checkpoint_every": 2}
    free = run(settings(shapes_cache, clip=float("inf"), **common), tmp_path / "free")
    assert "clip: .inf" in (free / "config.yaml").read_text()
    assert load_config(free).clip == float("inf")
    wide = run(settings(shapes_cache, clip=1e9, **common), tmp_path / "wide")
    tight = run(settings(shapes_cache, clip=1e-3, **common), tmp_path / "tight")
    models = [checkpoint_files(path, 4)["model"] for path in (free, wide, tight)]
    assert all(torch.equal(value, models[1][key]) for key, value in models[0].items())
    assert not all(torch.equal(value, models[2][key]) for key, value in models[0].items())
    assert write_run_report([free]).is_file()
    cut = keep_only(free, 2, tmp_path / "cut" / "run")
    resumed = train(load_config(cut), resume=True, watcher=Listener(), root=tmp_path / "cut")
    assert_identical(free, resumed, 4)
