"""Options of transport and schedule in whole runs: trained, resumed, sampled, as typed, and refused where they cannot be meant."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny_runs import Listener, assert_identical, checkpoint_files, keep_only, log_of, settings

from featcache.errors import UserError
from featcache.progress import Quiet
from featcache.settings import from_mapping
from trainer.analyze.angle import shared_gradients
from trainer.analyze.config import AnalyzeConfig
from trainer.analyze.subject import Subject
from trainer.diffusion.interpolants import interpolate
from trainer.diffusion.transport import Flow
from trainer.report.data import load_run as read_run
from trainer.report.report import _log_keys
from trainer.report.run import write_run_report
from trainer.requests import SampleRequest
from trainer.runs.config import RunConfig
from trainer.runs.exchange import export_checkpoint
from trainer.runs.folder import load_config
from trainer.sampling.draw import SampleConfig, draw_latents, load_run
from trainer.sampling.run import sample_run
from trainer.training.loop import train
from trainer.training.schedule import learning_rate

OPTIONS: dict[str, Any] = {
    "time_sampling": "lognormal",
    "time_mean": 0.5,
    "time_std": 0.8,
    "time_shift": 2.0,
    "prediction": "x",
    "time_floor": 0.1,
    "cosine_weight": 0.3,
}
SCHEDULE: dict[str, Any] = {"lr_schedule": "linear", "warmup_steps": 2, "hold_steps": 1, "lr_end": 1e-4}


def run(config: RunConfig, root: Path, *, resume: bool = False) -> Path:
    return train(config, resume=resume, watcher=Listener(), root=root)


@pytest.fixture(scope="module")
def trained(shapes_cache: Path, tmp_path_factory: pytest.TempPathFactory, nano_module: None) -> Path:
    """A run of six steps with every option changed, each step saved."""
    root = tmp_path_factory.mktemp("options")
    common: dict[str, Any] = {"steps": 6, "checkpoint_every": 1, "keep_checkpoints": 6}
    return run(settings(shapes_cache, "repa", **OPTIONS, **SCHEDULE, **common), root)


@pytest.fixture(scope="module")
def nano_module() -> Any:
    from tiny_runs import add_nano

    from trainer.models.config import SIZES

    add_nano()
    yield
    SIZES.pop("Nano", None)


def test_the_learning_rate_follows_the_table(trained: Path) -> None:
    """Warm-up over two steps, held for one, down to 1e-4 in the last of six."""
    expected = [5e-4, 1e-3, 1e-3, 7e-4, 4e-4, 1e-4]
    assert [record["lr"] for record in log_of(trained)] == pytest.approx(expected)
    config = load_config(trained)
    assert [learning_rate(config, step) for step in range(6)] == pytest.approx(expected)


def test_the_rate_stays_after_it_has_fallen_and_is_constant_by_default() -> None:
    falling = RunConfig(lr=2e-4, lr_schedule="linear", hold_steps=10, decay_until=30, lr_end=2e-5, steps=100)
    rates = [learning_rate(falling, step) for step in range(100)]
    assert rates[:10] == [2e-4] * 10 and rates[19] == pytest.approx(1.1e-4)
    assert rates[29:] == pytest.approx([2e-5] * 71) and np.diff(rates[9:30]) == pytest.approx(np.full(20, -9e-6))
    plain = RunConfig(lr=3e-4, warmup_steps=4)
    assert [learning_rate(plain, step) for step in (0, 3, 10**6)] == [3e-4 * 0.25, 3e-4, 3e-4]


def test_a_cosine_falls_as_torch_s_does() -> None:
    """Warm-up 5, hold 3, then half a period of a cosine from step 8 to 40, and the end's rate from there on."""
    config = RunConfig(
        lr=3e-4, lr_schedule="cosine", warmup_steps=5, hold_steps=3, decay_until=40, lr_end=1e-5, steps=60
    )
    rates = [learning_rate(config, step) for step in range(60)]
    assert rates[:8] == pytest.approx([6e-5, 1.2e-4, 1.8e-4, 2.4e-4, *[3e-4] * 4])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=32, eta_min=1e-5)
    expected = []
    for _ in range(32):
        optimizer.step()
        theirs.step()
        expected.append(theirs.get_last_lr()[0])
    assert rates[8:40] == pytest.approx(expected, rel=1e-9)
    assert rates[39:] == pytest.approx([1e-5] * 21, rel=1e-12)
    assert rates[23] == pytest.approx((3e-4 + 1e-5) / 2), "half-way"


def test_the_inverse_square_root_is_edm2_s() -> None:
    """Of its code: ref_lr / sqrt(max(nimg / (ref_batches * batch), 1)) * min(nimg / rampup, 1), with our warm-up as its
    ramp, warm-up and hold as its ref_batches, and nimg counted with the step that is taken."""
    config = RunConfig(lr=1e-2, lr_schedule="inverse-sqrt", warmup_steps=10, hold_steps=60, steps=1000)
    batch = config.batch_size
    for step in (0, 4, 9, 30, 69, 70, 139, 279, 999):
        images = (step + 1) * batch
        theirs = 1e-2 / np.sqrt(max(images / (70 * batch), 1)) * min(images / (10 * batch), 1)
        assert learning_rate(config, step) == pytest.approx(theirs, rel=1e-12)
    assert learning_rate(config, 279) == pytest.approx(0.5e-2)


def test_a_linear_rate_is_what_it_was_to_the_bit() -> None:
    """The formula of before there were others, typed out."""
    config = RunConfig(lr=2e-4, lr_schedule="linear", warmup_steps=7, hold_steps=11, lr_end=3e-6, steps=97)
    for step in range(120):
        lr = 2e-4 * min(1.0, (step + 1) / 7)
        fallen = min(max((step + 1 - 18) / (97 - 18), 0.0), 1.0)
        assert learning_rate(config, step) == lr + fallen * (3e-6 - lr)


@pytest.mark.parametrize(
    ("schedule", "free"),
    [
        ({"lr_schedule": "cosine"}, False),
        ({"lr_schedule": "cosine", "decay_until": 5}, True),
        ({"lr_schedule": "inverse-sqrt", "hold_steps": 2}, True),
    ],
)
def test_schedules_resume_to_the_bit(
    shapes_cache: Path, tmp_path: Path, nano_module: None, schedule: dict[str, Any], free: bool
) -> None:
    """Steps may be added where the rate does not depend on their number."""
    common: dict[str, Any] = {"checkpoint_every": 1, "keep_checkpoints": 6, **schedule}
    whole = run(settings(shapes_cache, steps=6, **common), tmp_path / "whole")
    rates = [record["lr"] for record in log_of(whole)]
    assert rates == [learning_rate(load_config(whole), step) for step in range(6)] and len(set(rates)) > 3
    kept = keep_only(whole, 3, tmp_path / "kept" / "run")
    assert_identical(whole, run(load_config(kept), kept.parent, resume=True), 6)
    short = keep_only(whole, 3, tmp_path / "short" / "run")
    longer = dataclasses.replace(load_config(short), steps=7)
    if free:
        assert len(log_of(run(longer, short.parent, resume=True))) == 7
    else:
        with pytest.raises(UserError, match="started with steps = 6, not 7"):
            run(longer, short.parent, resume=True)


@pytest.mark.parametrize(
    ("method", "given", "lr", "clip"),
    [
        ("ahpa", {}, 2e-4, 2.0),
        ("ahpa+sra", {}, 2e-4, 2.0),
        ("redi", {}, 1e-4, float("inf")),
        ("redi+ahpa", {}, 2e-4, float("inf")),
        ("none", {}, 1e-4, 1.0),
        ("repa", {}, 1e-4, 1.0),
        ("ahpa", {"lr": 1e-4, "clip": 1.0}, 1e-4, 1.0),
    ],
)
def test_a_method_brings_its_rate_and_clip(method: str, given: dict[str, float], lr: float, clip: float) -> None:
    settled = RunConfig(method=method, **given).settled()  # type: ignore[arg-type]
    assert (settled.lr, settled.clip) == (lr, clip) and settled.settled() == settled


def test_the_rate_that_a_run_was_started_with_stays(shapes_cache: Path, tmp_path: Path) -> None:
    """What is written is what it was, also for AHPA's runs of before its rate was its own."""
    config = settings(shapes_cache, "ahpa", steps=1, lr=None)
    path = run(config, tmp_path)
    assert yaml.safe_load((path / "config.yaml").read_text())["lr"] == log_of(path)[0]["lr"] == 2e-4
    values = yaml.safe_load((path / "config.yaml").read_text())
    (path / "config.yaml").write_text(yaml.safe_dump(values | {"lr": 1e-4}))
    assert load_config(path).lr == 1e-4
    run(dataclasses.replace(load_config(path), steps=2), tmp_path, resume=True)
    assert [record["lr"] for record in log_of(path)] == [2e-4, 1e-4]
    with pytest.raises(UserError, match=r"started with lr = 0\.0001, not 0\.0002"):
        run(dataclasses.replace(config, steps=2), tmp_path, resume=True)


def head_width(run: Path, step: int) -> int:
    """Of SRA's MLP, as saved."""
    (inner,) = {len(v) for k, v in checkpoint_files(run, step)["alignment"].items() if k.endswith("0.weight")}
    return inner


def test_sra_s_head_is_twice_as_wide_and_old_runs_keep_theirs(shapes_cache: Path, tmp_path: Path) -> None:
    """A run of before has no trace of the width, or of any option that was not typed."""
    common = {"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 4}
    depths = {"student_depth": 1, "teacher_depth": 2}
    now = run(settings(shapes_cache, "sra", align={"sra": depths}, name="now", **common), tmp_path / "runs")
    assert head_width(now, 4) == 2 * 48 and load_config(now).align["sra"]["head_ratio"] == 2  # type: ignore[index]
    narrow = {"sra": {**depths, "head_ratio": 1.0}}
    then = run(settings(shapes_cache, "sra", align=narrow, name="then", **common), tmp_path / "runs")
    assert head_width(then, 4) == 48
    old = keep_only(then, 2, tmp_path / "old" / "then")
    values = yaml.safe_load((old / "config.yaml").read_text())
    assert values["align"]["sra"].keys() >= {"weight", "beta", "interval", "head_ratio", "head_width"}
    for written in ({"sra": depths}, {"sra": {**depths, "head_width": None, "weight": 0.2}}):
        (old / "config.yaml").write_text(yaml.safe_dump(values | {"align": written}))
        assert load_config(old) == load_config(then), "what is not said is as it was"
    run(load_config(old), tmp_path / "old", resume=True)
    assert_identical(then, old, 4)
    wider = keep_only(then, 2, tmp_path / "wider" / "then")
    (wider / "config.yaml").write_text(yaml.safe_dump(values | {"align": {"sra": {**depths, "head_width": 96}}}))
    with pytest.raises(UserError, match="alignment"):
        run(load_config(wider), tmp_path / "wider", resume=True)


def test_what_a_recipe_leaves_open_stays_as_the_run_has_it(
    shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`trainer run --recipe R --resume`, as the recipes' pages say, also for runs of before SRA's head was wider."""
    from trainer.cli import _run_config

    monkeypatch.chdir(tmp_path)
    config = settings(shapes_cache, "sra", align={"sra": {"head_ratio": 1.0, "beta": 0.1}}, steps=1)
    run(config, tmp_path / "runs")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("method: sra\nalign: {sra: {beta: 0.1, weight: 0.2}}\n")
    resumed = _run_config(recipe, {"name": "run"}, ["steps=2"], resume=True)
    assert resumed == dataclasses.replace(load_config(tmp_path / "runs/run"), steps=2)
    other = _run_config(None, {"name": "run", "method": "none"}, [], resume=True)
    assert (other.method, other.align) == ("none", {})


def test_resuming_in_mid_schedule_changes_no_bit(trained: Path, tmp_path: Path) -> None:
    keep_only(trained, 4, tmp_path / "run")
    assert_identical(trained, run(load_config(trained), tmp_path, resume=True), 6)


def test_a_schedule_that_ends_with_the_run_keeps_its_end(trained: Path, shapes_cache: Path, tmp_path: Path) -> None:
    keep_only(trained, 4, tmp_path / "run")
    longer = settings(shapes_cache, "repa", **OPTIONS, **SCHEDULE, steps=8)
    with pytest.raises(UserError, match="started with steps = 6, not 8"):
        run(longer, tmp_path, resume=True)
    common = {**SCHEDULE, "decay_until": 4, "checkpoint_every": 1}
    short = run(settings(shapes_cache, steps=5, **common), tmp_path / "short")
    assert len(log_of(run(settings(shapes_cache, steps=6, **common), short.parent, resume=True))) == 6


def test_what_a_run_was_trained_with_is_used_wherever_it_is_sampled(trained: Path) -> None:
    loaded = load_run(trained)
    assert loaded.transport == Flow(**OPTIONS)
    with torch.no_grad():
        for parameter in loaded.model.parameters():  # which predicts zero for a while
            parameter.add_(0.02)
    labels, config = torch.tensor([1, 2]), SampleConfig(sampler="ode", steps=1)
    drawn = draw_latents(loaded.model, labels, [0, 1], config, transport=loaded.transport)
    # One step from t = 1, with x predicted, is the prediction itself.
    from trainer.diffusion.noise import sample_noise

    x = sample_noise(0, [0, 1], loaded.model.cfg.latent_shape, 0, device=torch.device("cpu"))
    with torch.no_grad():
        said = loaded.model(x, torch.ones(2), labels).prediction
    torch.testing.assert_close(drawn, said, rtol=1e-5, atol=1e-5)


def test_diagnostics_take_the_run_s_loss_at_times_of_their_own(trained: Path) -> None:
    subject = Subject(trained, AnalyzeConfig(samples=16), device="cpu", gradients=True)
    t = torch.tensor([0.1, 0.7])
    assert OPTIONS["time_sampling"] == "lognormal" and OPTIONS["time_shift"] != 1
    assert torch.equal(subject.objective()._transport.times(t), t), "not drawn again, nor shifted"
    rows = slice(0, 2)
    x = interpolate(subject.config.path, subject.latent(rows), subject.noise(rows), t)[0]
    with torch.no_grad():
        expected = subject.model(x, t, subject.conditioning(rows), taps=(1, 2)).hidden
    found = subject.state(rows, t, (1, 2))
    assert torch.equal(found.t, t)
    for depth in (1, 2):
        torch.testing.assert_close(found.hidden[depth], expected[depth])
    subject.model.requires_grad_(True)
    norms = []
    for weight in (OPTIONS["cosine_weight"], 0.0):
        subject.config = dataclasses.replace(subject.config, cosine_weight=weight)
        denoise, _ = shared_gradients(subject, 1, 2, 4).means
        norms.append(torch.stack([g.square().sum() for g in denoise]).sum().sqrt().item())
    assert norms[0] > 1.01 * norms[1] > 0, "the direction's term belongs to the denoising loss"


def test_the_direction_s_term_is_logged_and_shown(trained: Path) -> None:
    for record in log_of(trained):
        parts = record["denoise"] + record["denoise/cosine"] + record["align/cosine"]
        assert record["loss"] == pytest.approx(parts, rel=1e-5) and 0 < record["denoise/cosine"] <= 0.6
    titles = [title for _, title, _ in _log_keys([read_run(trained)])]
    assert titles[:4] == ["Loss", "Denoising term", "Denoising: cosine", "Alignment: cosine"]
    page = write_run_report([trained]).read_text()
    assert "Denoising: cosine" in page


def test_a_run_says_what_it_diffuses_beside_the_latents(shapes_cache: Path, tmp_path: Path, nano_module: None) -> None:
    heard = Listener()
    config = settings(shapes_cache, streams={"tiny@5": {"weight": 0.5, "normalization": "none"}}, steps=1)
    folder = train(config, resume=False, watcher=heard, root=tmp_path)
    told = "diffused beside the latents: tiny@5 (merged into their channels, weight 0.5, normalization none)"
    assert told in heard.warnings
    titles = [title for _, title, _ in _log_keys([read_run(folder)])]
    assert titles[:3] == ["Loss", "Denoising loss of the latents", "Denoising loss of tiny@5"]


def test_a_run_without_the_keys_is_of_before_them(trained: Path, tmp_path: Path) -> None:
    kept = keep_only(trained, 4, tmp_path / "run")
    values = yaml.safe_load((kept / "config.yaml").read_text())
    since = (*OPTIONS.keys() - {"time_sampling"}, "lr_schedule", "hold_steps", "decay_until", "lr_end")
    (kept / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if k not in since}))
    assert load_run(kept).transport == Flow(time_sampling="lognormal")
    assert load_config(kept).lr_schedule == "constant"


def test_what_the_public_code_would_misread_is_not_exported(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="predicts x"):
        export_checkpoint(trained, tmp_path / "weights.pt", convention=None, step=None)


def test_the_grid_s_shift_is_recorded_and_changes_the_samples(trained: Path) -> None:
    ask: dict[str, Any] = {"num": 2, "sampler": "ode", "steps": 3, "device": "cpu"}
    drawn = {shift: sample_run(trained, SampleRequest(**ask, shift=shift), Quiet()) for shift in (1.0, 3.0)}
    pixels = [np.load(result.images)["arr_0"] for result in drawn.values()]
    assert (pixels[0] != pixels[1]).any()
    records = {shift: json.loads((r.images.parent / "settings.json").read_text()) for shift, r in drawn.items()}
    assert records[3.0]["shift"] == 3 and "shift" not in records[1.0]
    assert "shift3" in drawn[3.0].images.parent.name and "shift" not in drawn[1.0].images.parent.name
    for shift, other in ((1.0, 3.0), (3.0, 1.0)):
        with pytest.raises(UserError, match=rf"other settings \(shift: {other} there, {shift} here\)"):
            sample_run(trained, SampleRequest(**ask, shift=shift, out=drawn[other].images.parent), Quiet())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        *(
            ({"model": "DiT-B/2", key: value}, f"{key} is {value!r}, but DiT-B/2 trains on DDPM")
            for key, value in OPTIONS.items()
        ),
        ({"time_mean": 0.5}, "no effect while time_sampling is uniform"),
        ({"time_std": 2.0}, "no effect while time_sampling is uniform"),
        ({"time_floor": 0.1}, "no effect while prediction is velocity"),
        ({"hold_steps": 5}, "no effect while lr_schedule is constant"),
        ({"decay_until": 5}, "no effect while lr_schedule is constant"),
        ({"lr_end": 1e-5}, "no effect while lr_schedule is constant"),
        ({"lr_schedule": "linear", "steps": 10, "warmup_steps": 4, "hold_steps": 6}, "fall until step 10"),
        ({"lr_schedule": "linear", "hold_steps": 6, "decay_until": 6}, "fall until step 6"),
        ({"lr_schedule": "cosine", "hold_steps": 6, "decay_until": 6}, "fall until step 6"),
        ({"lr_schedule": "inverse-sqrt"}, "both are 0 steps"),
        (
            {"lr_schedule": "inverse-sqrt", "hold_steps": 5, "lr_end": 1e-5},
            "no effect while lr_schedule is inverse-sqrt",
        ),
        ({"lr_schedule": "inverse-sqrt", "hold_steps": 5, "decay_until": 9}, "no effect while lr_schedule is inverse"),
        ({"lr_schedule": "polynomial"}, "lr_schedule"),
        ({"time_shift": 0.0}, "time_shift"),
        ({"time_std": 0.0, "time_sampling": "lognormal"}, "time_std"),
        ({"time_mean": float("nan"), "time_sampling": "lognormal"}, "time_mean"),
        ({"prediction": "score"}, "prediction"),
        ({"prediction": "x", "time_floor": 0.0}, "time_floor"),
        ({"prediction": "x", "time_floor": 2.0}, "time_floor"),
        ({"cosine_weight": -1.0}, "cosine_weight"),
    ],
)
def test_what_cannot_be_meant_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        from_mapping(RunConfig, values)
    assert error.value.remedy


@pytest.mark.parametrize("sampler", ["dopri5", "ddpm", "ddim"])
def test_a_shift_without_a_grid_is_refused(sampler: str) -> None:
    from trainer.sampling.draw import sampling_times

    with pytest.raises(UserError, match=f"--shift 2 has no effect on --sampler {sampler}"):
        sampling_times(sampler, 10, 2.0)


@pytest.mark.slow
def test_as_typed(cli: Callable[..., subprocess.CompletedProcess[str]], shapes_cache: Path, tmp_path: Path) -> None:
    """As a user types it, from training to samples."""
    words = [word for key, value in {**OPTIONS, **SCHEDULE}.items() for word in ("--set", f"{key}={value}")]
    small = ["--steps", "4", "--batch-size", "4", "--lr", "1e-3", "--device", "cpu", "--model", "SiT-Ti/2"]
    done = cli("trainer", "run", "--cache", str(shapes_cache), "--name", "typed", *small, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = load_config(tmp_path / "runs/typed")
    assert {key: getattr(config, key) for key in (*OPTIONS, *SCHEDULE)} == {**OPTIONS, **SCHEDULE}
    typed = ["--num", "2", "--steps", "2", "--sampler", "heun", "--shift", "3.333", "--device", "cpu"]
    done = cli("trainer", "sample", "runs/typed", *typed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = cli("trainer", "run", "--set", "time_shift=0", cwd=tmp_path)
    assert done.returncode == 2 and "time_shift" in done.stderr and "Traceback" not in done.stderr
