"""Snapshots and further averages: what they hold, that kills change nothing of them, and what is made of them afterwards."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_resume import ForkServer, wait_for
from tiny_runs import Listener, assert_identical, checkpoint_files, keep_only, log_of, settings

import featcache
from featcache.errors import UserError
from trainer.averages import Average, combine, gamma_of, power_decay, width_of
from trainer.evaluate.during import small_judge
from trainer.evaluate.extractors import EXTRACTORS
from trainer.models import build_model
from trainer.runs import budget, checkpoint, snapshots
from trainer.runs.budget import disk_budget, require_room
from trainer.runs.config import RunConfig
from trainer.runs.exchange import export_checkpoint
from trainer.runs.log import OF_THE_MACHINE
from trainer.runs.records import run_model_config
from trainer.sampling.draw import load_run
from trainer.training.averages import FurtherAverages
from trainer.training.loop import train
from trainer.training.objective import update_ema

SEVERAL: dict[str, Any] = {"ema_decays": [0.5, 0.99], "posthoc": True, "snapshot_every": 2}
STEMS = {"ema", "ema-0.5", "ema-0.99", "power-0.05", "power-0.1"}


def run(config: RunConfig, root: Path, *, resume: bool = False) -> Path:
    return train(config, resume=resume, watcher=Listener(), root=root)


def tree(run: Path) -> dict[str, bytes]:
    """Every file of a run's snapshots, by its place there."""
    folder = run / "snapshots"
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- the mathematics


@pytest.mark.parametrize("width", [0.01, 0.05, 0.08, 0.1, 0.15, 0.25])
def test_an_exponent_has_the_width_by_integration(width: float) -> None:
    """sigma_rel is the standard deviation of t^gamma, normalised on [0, 1]: by Gauss-Legendre quadrature."""
    gamma = gamma_of(width)
    assert width_of(gamma) == pytest.approx(width, rel=1e-12)
    nodes, weights = np.polynomial.legendre.leggauss(400)
    t, w = (nodes + 1) / 2, weights / 2
    profile = t**gamma / (w @ t**gamma)
    mean = w @ (profile * t)
    assert np.sqrt(w @ (profile * (t - mean) ** 2)) == pytest.approx(width, rel=1e-9)


def test_the_papers_exponents() -> None:
    """EDM2, Section 3.1: sigma_rel = 0.05 and 0.10 are gamma = 16.97 and 6.94."""
    assert [round(gamma_of(width), 2) for width in (0.05, 0.1)] == [16.97, 6.94]


@pytest.mark.parametrize("width", [0.05, 0.2])
def test_the_recursion_is_the_integral_of_the_profile(width: float) -> None:
    """Step t weighs as much as the profile does between t - 1 and t."""
    gamma, steps = gamma_of(width), 50
    weights = np.zeros(steps)
    for step in range(steps):
        weights *= power_decay(step, gamma)
        weights[step] += 1 - power_decay(step, gamma)
    nodes, along = np.polynomial.legendre.leggauss(40)
    expected = [
        float(along / 2 @ ((gamma + 1) * (t + (nodes + 1) / 2) ** gamma / steps ** (gamma + 1))) for t in range(steps)
    ]
    np.testing.assert_allclose(weights, expected, rtol=1e-9, atol=1e-300)


def by_quadrature(stored: list[tuple[int, float]], wanted: tuple[int, float]) -> tuple[np.ndarray, float]:
    """The combination from profiles on a fine grid, without a formula for their products: coefficients and error."""
    nodes, along = np.polynomial.legendre.leggauss(64)
    edges = sorted({0, *(step for step, _ in stored), wanted[0]})
    t = np.concatenate([a + (b - a) * (nodes + 1) / 2 for a, b in itertools.pairwise(edges)])
    w = np.concatenate([along * (b - a) / 2 for a, b in itertools.pairwise(edges)])

    def profile(step: int, width: float) -> np.ndarray:
        gamma = gamma_of(width)
        return np.where(t <= step, (gamma + 1) * t**gamma / step ** (gamma + 1), 0.0)

    columns = np.stack([profile(*one) for one in stored], axis=1)
    target = profile(*wanted)
    found = np.linalg.lstsq(columns * np.sqrt(w)[:, None], target * np.sqrt(w), rcond=None)[0]
    found /= found.sum()
    rest = target - columns @ found
    return found, float(np.sqrt((w @ rest**2) / (w @ target**2)))


@pytest.mark.parametrize("width", [0.06, 0.08, 0.15])
def test_the_combination_is_the_least_squares_fit_by_integration(width: float) -> None:
    stored = [(step, w) for step in (100, 200, 300, 400) for w in (0.05, 0.1)]
    made = combine(stored, (400, width))
    coefficients, error = by_quadrature(stored, (400, width))
    np.testing.assert_allclose(made.coefficients, coefficients, rtol=1e-6, atol=1e-9)
    assert made.error == pytest.approx(error, rel=1e-6)


def trajectory(steps: int, *, seed: int = 0) -> np.ndarray:
    """Scripted weights float64 [steps, 5]: drifts, oscillations and noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(1, steps + 1)[:, None] / steps
    return np.sin(7 * t * rng.normal(size=5)) + t**2 * rng.normal(size=5) + 0.3 * rng.normal(size=(steps, 5))


def direct(weights: np.ndarray, width: float) -> np.ndarray:
    """The power-function average [5] of all steps, from its closed form."""
    steps, power = len(weights), gamma_of(width) + 1
    t = np.arange(steps + 1) / steps
    return np.asarray(np.diff(t**power) @ weights)


@pytest.mark.parametrize(("width", "within"), [(0.06, 2e-4), (0.08, 2e-4), (0.12, 2e-4), (0.15, 5e-4), (0.2, 2e-3)])
def test_an_average_made_afterwards_is_that_of_the_whole_trajectory(width: float, within: float) -> None:
    """40 snapshots of two widths; the error, as a share of the weights' spread, is float64's and the profile's alone."""
    weights, every = trajectory(2000), 50
    stored = [(step, w) for step in range(every, 2001, every) for w in (0.05, 0.1)]
    averages = np.stack([direct(weights[:step], w) for step, w in stored])
    made = combine(stored, (2000, width))
    error = np.abs(made.coefficients @ averages - direct(weights, width)).max() / weights.std()
    assert error < within
    assert made.error < 30 * within, "as the profile says"


def test_profiles_are_met_as_the_page_says() -> None:
    """docs/evaluation.md: how far off the profile of an average made afterwards is."""

    def error(snapshots: int, width: float) -> float:
        return combine([(step, w) for step in range(1, snapshots + 1) for w in (0.05, 0.1)], (snapshots, width)).error

    assert max(error(40, width) for width in np.linspace(0.05, 0.15, 41)) == pytest.approx(0.0015, rel=0.02)
    assert error(40, 0.2) == pytest.approx(0.0042, rel=0.02)
    assert max(error(4, width) for width in np.linspace(0.05, 0.1, 21)) == pytest.approx(0.036, rel=0.02)


def test_what_is_stored_is_given_back_exactly() -> None:
    stored = [(step, w) for step in range(10, 401, 10) for w in (0.05, 0.1)]
    for wanted in (stored[-1], stored[20], stored[3]):
        made = combine(stored, wanted)
        expected = np.array([float(one == wanted) for one in stored])
        np.testing.assert_allclose(made.coefficients, expected, atol=1e-7)
        assert made.error < 1e-6


def test_averages_on_the_device_follow_the_closed_form() -> None:
    """In float64: the recursion of training, and of a constant decay."""
    steps, averages = 300, (Average("power", 0.08), Average("ema", 0.97))
    weights = trajectory(steps)
    model = torch.nn.Linear(5, 1, bias=False).double()
    kept = FurtherAverages.begin(model, averages)
    begun = model.weight.detach().numpy().copy()[0]
    for step in range(steps):
        model.weight.data.copy_(torch.from_numpy(weights[step])[None])
        kept.update(model, step, warmup=False)
    found = [kept.values[average]["weight"][0].numpy() for average in averages]
    np.testing.assert_allclose(found[0], direct(weights, 0.08), rtol=0, atol=1e-13)
    decayed = 0.97 ** np.arange(steps)[::-1]
    np.testing.assert_allclose(found[1], 0.03 * decayed @ weights + 0.97**steps * begun, rtol=0, atol=1e-13)


def test_a_further_average_is_updated_as_the_first() -> None:
    torch.manual_seed(0)
    model, ema = torch.nn.Linear(7, 3), torch.nn.Linear(7, 3)
    ema.load_state_dict(model.state_dict())
    kept = FurtherAverages.begin(model, [Average("ema", 0.9)])
    for step in range(5):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        update_ema(ema, model, 0.9)
        kept.update(model, step, warmup=False)
    for name, p in ema.named_parameters():
        assert torch.equal(kept.values[Average("ema", 0.9)][name], p)


@pytest.mark.parametrize(
    "text", ["", "ema:", "ema:2", "power:0.5", "power:x", "power:nan", "model", "ema:0.9:1", "EMA"]
)
def test_what_names_no_average_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="names no average"):
        Average.parse(text)


# --- snapshots of a run


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    process = ForkServer()
    yield process
    process.close()


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_snapshots_hold_each_average_and_stay(shapes_cache: Path, tmp_path: Path, dtype: str) -> None:
    config = settings(shapes_cache, steps=6, checkpoint_every=2, keep_checkpoints=9, snapshot_dtype=dtype, **SEVERAL)
    whole = run(config, tmp_path / "all")
    few = run(
        settings(shapes_cache, steps=6, checkpoint_every=1, keep_checkpoints=1, snapshot_dtype=dtype, **SEVERAL),
        tmp_path / "few",
    )
    assert [step for step, _ in snapshots.list_snapshots(few)] == [2, 4, 6]
    assert len(checkpoint.list_checkpoints(few)) == 1, "none of them counts as a checkpoint"
    assert tree(whole) == tree(few)
    for step in (2, 4, 6):
        saved, folder = checkpoint_files(whole, step), few / "snapshots" / f"step_{step:07d}"
        assert {path.name for path in folder.iterdir()} == {"state.json", *(f"{stem}.safetensors" for stem in STEMS)}
        assert saved.keys() > STEMS
        for stem in STEMS:
            kept = snapshots.load_snapshot(folder, stem)
            assert all(value.dtype is torch.float32 for value in kept.values()), "whatever was stored"
            stored = load_file(folder / f"{stem}.safetensors")
            for name, value in saved[stem].items():
                assert torch.equal(stored[name], value.to(snapshots.DTYPES[dtype]))
                assert torch.equal(kept[name], stored[name].float())
    assert not torch.equal(saved["ema"]["x_embedder.proj.weight"], saved["ema-0.5"]["x_embedder.proj.weight"])


@pytest.mark.usefixtures("nano")
def test_further_averages_change_nothing_of_the_training(shapes_cache: Path, tmp_path: Path) -> None:
    plain = run(settings(shapes_cache, "ahpa"), tmp_path / "plain")
    several = run(settings(shapes_cache, "ahpa", **SEVERAL), tmp_path / "several")
    first, second = checkpoint_files(plain, 6), checkpoint_files(several, 6)
    assert second.keys() - first.keys() == STEMS - {"ema"}
    for stem in first:
        assert all(torch.equal(value, second[stem][name]) for name, value in first[stem].items()), stem


@pytest.mark.usefixtures("nano")
def test_resuming_at_every_step_keeps_averages_and_snapshots(shapes_cache: Path, tmp_path: Path) -> None:
    config = settings(shapes_cache, "ahpa", steps=6, checkpoint_every=1, keep_checkpoints=6, ema_warmup=True, **SEVERAL)
    whole = run(config, tmp_path / "whole")
    for step in range(1, 6):
        root = tmp_path / f"from-{step}"
        copy = keep_only(whole, step, root / "run")
        left = copy / "snapshots" / ".step_0000006.partial"
        left.mkdir()
        (left / "ema.safetensors").write_bytes(b"half")
        resumed = run(config, root, resume=True)
        assert_identical(whole, resumed, 6)
        assert tree(resumed) == tree(whole)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(("kills", "steps"), [(2, 12), pytest.param(12, 80, marks=pytest.mark.slow)])
def test_sigkill_at_random_moments_changes_no_snapshot(
    server: ForkServer, shapes_cache: Path, tmp_path: Path, kills: int, steps: int
) -> None:
    """Killed while a snapshot is being written, and anywhere else; checkpoints come less often than snapshots."""
    config = settings(
        shapes_cache, "repa", steps=steps, checkpoint_every=4, **{**SEVERAL, "snapshot_every": 1}, snapshot_dtype="bf16"
    )
    expected = run(config, tmp_path / "whole")
    rng, folder, in_save = random.Random(3), tmp_path / "killed" / "run", 0
    for attempt in range(kills):
        child = server.start(config, tmp_path / "killed", resume=attempt > 0)
        at = checkpoint.list_checkpoints(folder)[-1][0] if attempt else 0
        wait_for(lambda: any(s > at for s, _ in checkpoint.list_checkpoints(folder)))  # noqa: B023
        if attempt % 2:
            wait_for(lambda: any((folder / "snapshots").glob(".step_*")))
        else:
            time.sleep(rng.random() * 0.05)
        os.kill(child, signal.SIGKILL)
        status = server.status()
        if status == 0:  # it was over before
            break
        assert status == -signal.SIGKILL
        in_save += bool(list((folder / "snapshots").glob(".step_*")))
        for step, path in snapshots.list_snapshots(folder):  # whatever has its name is whole
            name = f"step_{step:07d}"
            assert {f: d for f, d in tree(folder).items() if f.startswith(f"{name}/")} == {
                f: d for f, d in tree(expected).items() if f.startswith(f"{name}/")
            }, path
    assert in_save >= 1, "a kill has to hit the writing of a snapshot to mean anything"
    server.start(config, tmp_path / "killed", resume=True)
    assert server.status() == 0
    assert tree(folder) == tree(expected)
    assert_identical(expected, folder, steps)


@pytest.mark.usefixtures("nano")
def test_a_damaged_snapshot_is_noticed(shapes_cache: Path, tmp_path: Path) -> None:
    path = run(settings(shapes_cache, steps=4, snapshot_every=2, checkpoint_every=1), tmp_path)
    folder = path / "snapshots" / "step_0000002"
    state = json.loads((folder / "state.json").read_text())
    file = folder / "ema.safetensors"
    assert state["sha256"] == {"ema": hashlib.sha256(file.read_bytes()).hexdigest()}
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(UserError, match="not those that were written") as error:
        load_run(path, step=2)
    assert error.value.remedy is not None and "--step" in error.value.remedy
    file.write_bytes(bytes(data[:1000]))
    with pytest.raises(UserError, match=r"ema\.safetensors"):
        load_run(path, step=2)
    (path / "snapshots").rename(tmp_path / "elsewhere")
    (path / "snapshots").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="snapshots is a symbolic link"):
        load_run(path, step=2)


@pytest.mark.usefixtures("nano")
def test_weights_are_found_by_name_and_step(shapes_cache: Path, tmp_path: Path) -> None:
    config = settings(shapes_cache, steps=6, checkpoint_every=3, keep_checkpoints=1, snapshot_dtype="bf16", **SEVERAL)
    path = run(config, tmp_path)

    def first(**kw: Any) -> torch.Tensor:
        return next(iter(load_run(path, **kw).model.parameters()))

    saved = checkpoint_files(path, 6)
    name = next(name for name, _ in load_run(path).model.named_parameters())
    assert torch.equal(first(), saved["ema"][name]), "the latest checkpoint, not rounded"
    assert torch.equal(first(weights="raw"), saved["model"][name])
    assert torch.equal(first(weights="ema:0.5"), saved["ema-0.5"][name])
    assert torch.equal(first(weights="ema:0.9"), saved["ema"][name]), "ema_decay by its number"
    assert torch.equal(first(step=6), saved["ema"][name].bfloat16().float()), "what stays"
    assert load_run(path, step=6).stored == "bf16" and load_run(path).stored is None
    assert torch.equal(first(step=6, weights="power:0.1"), saved["power-0.1"][name].bfloat16().float())
    assert load_run(path, step=2).step == 2
    for wrong, match in (
        ({"weights": "ema:0.7"}, "keeps no average ema:0.7"),
        ({"step": 3}, "neither a checkpoint nor a snapshot at step 3"),
        ({"step": 2, "weights": "raw"}, "snapshots hold averages alone"),
        ({"step": 5, "weights": "power:0.08"}, "no snapshot at step 5"),
    ):
        with pytest.raises(UserError, match=match) as error:
            load_run(path, **wrong)
        assert error.value.remedy is not None
    plain = run(settings(shapes_cache, steps=2, name="plain"), tmp_path)
    with pytest.raises(UserError, match="keeps no power-function averages") as error:
        load_run(plain, weights="power:0.08")
    assert error.value.remedy is not None and "posthoc=true" in error.value.remedy


@pytest.mark.usefixtures("nano")
def test_an_average_is_made_of_a_run_s_snapshots(
    shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the average of the weights that the run went through, each of them kept by a raw checkpoint."""
    steps = 24
    config = settings(
        shapes_cache, steps=steps, checkpoint_every=1, keep_checkpoints=steps, snapshot_every=2, posthoc=True
    )
    path = run(config, tmp_path)
    went = [checkpoint_files(path, step)["model"] for step in range(1, steps + 1)]
    model = build_model(run_model_config(path, config))
    power = gamma_of(0.08) + 1
    weights = np.diff((np.arange(steps + 1) / steps) ** power)
    loaded = load_run(path, weights="power:0.08")
    assert loaded.step == steps and loaded.stored is None
    apart, moved = 0.0, 0.0
    for name, value in loaded.model.named_parameters():
        expected = sum(w * one[name].double() for w, one in zip(weights.tolist(), went))
        apart = max(apart, float((value.double() - expected).abs().max()))
        moved = max(moved, float((went[-1][name] - went[0][name]).abs().max()))
    assert apart < 2e-3 * moved
    assert len(dict(model.named_parameters())) == len(list(loaded.model.named_parameters()))
    listener = Listener()
    out = export_checkpoint(
        path, tmp_path / "power.pt", convention=None, step=4, weights="power:0.2", progress=listener
    )
    assert len(listener.warnings) == 1 and torch.load(out, weights_only=True)["steps"] == 4
    told = load_run(path, step=2, weights="power:0.2").notes
    assert len(told) == 1 and "2 stored averages" in told[0] and "% off" in told[0]


# --- disk


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("none", {}),
        ("repa", {"posthoc": True, "snapshot_dtype": "bf16"}),
        ("sara", {"ema_decays": [0.5]}),
        ("ahpa+sra", {"snapshot_every": 3, "keep_checkpoints": 1}),
    ],
)
def test_the_budget_is_what_the_files_hold(
    shapes_cache: Path, tmp_path: Path, method: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte but for AdamW's step counts; the files' headers come on top."""
    seen: list[budget.Sizes] = []
    real = budget.disk_budget

    def noted(config: RunConfig, sizes: budget.Sizes, **kw: int) -> budget.Budget:
        seen.append(sizes)
        return real(config, sizes, **kw)

    monkeypatch.setattr(budget, "disk_budget", noted)
    common = {"steps": 8, "checkpoint_every": 2, "keep_checkpoints": 3, "snapshot_every": 2}
    config = settings(shapes_cache, method, **{**common, **changes})
    path = run(config, tmp_path)
    expected = disk_budget(config, seen[-1])  # the last one knows all that the method keeps

    def counted(folder: Path) -> tuple[int, int]:
        """Bytes of tensors without AdamW's step counts, and of files."""
        files_ = sorted(folder.glob("*.safetensors"))
        tensors = [(k, v) for file in files_ for k, v in load_file(file).items() if not k.startswith("step/")]
        return sum(v.nbytes for _, v in tensors), sum(p.stat().st_size for p in folder.iterdir())

    kept = checkpoint.list_checkpoints(path)
    assert len(kept) == expected.checkpoints - 1 == config.keep_checkpoints
    for _, folder in kept:
        tensors, whole = counted(folder)
        assert tensors == expected.checkpoint_bytes
        assert 0 < whole - tensors < 200_000
    made = snapshots.list_snapshots(path)
    assert len(made) == expected.snapshots
    assert {counted(folder)[0] for _, folder in made} == {expected.snapshot_bytes}
    assert expected.total_bytes == expected.checkpoints_bytes + expected.snapshots_bytes


def test_the_page_says_what_the_code_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import disk_budget as benchmark

    rows = benchmark.rows()
    assert benchmark.table(rows) in (root / "docs" / "evaluation.md").read_text()
    assert json.loads((root / "benchmarks/results/disk-budget.json").read_text())["rows"] == rows
    assert [row["snapshots"] for row in rows] == [40] * 4


def test_a_run_that_does_not_fit_on_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = budget.Sizes(weights=1_000_000)
    config = RunConfig(steps=400_000, snapshot_every=100_000).settled()
    free = {"bytes": 10**12}
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free["bytes"]}))
    require_room(tmp_path, config, sizes, 0)
    free["bytes"] = 47_000_000  # three checkpoints of 16 MB
    with pytest.raises(UserError, match="checkpoints need") as error:
        require_room(tmp_path, config, sizes, 0)
    assert error.value.remedy is not None and "keep_checkpoints=1" in error.value.remedy
    saved = tmp_path / "checkpoints" / "step_0010000"
    saved.mkdir(parents=True)
    (saved / "state.json").touch()
    (saved / "model.safetensors").write_bytes(bytes(4_000_000))
    require_room(tmp_path, config, sizes, 10_000)  # what is there already counts


@pytest.mark.parametrize(
    ("start", "there", "more"),
    [(0, 0, 3), (50, 0, 3), (380, 2, 1), (380, 1, 2), (390, 2, 1), (395, 0, 2), (400, 2, 0)],
)
def test_checkpoints_that_lie_there_at_once_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int, there: int, more: int
) -> None:
    """Two are kept, and a third is being written. A run that begins at a step and has none there is a branch, which saves
    that step first."""
    config, sizes = RunConfig(steps=400, checkpoint_every=10), budget.Sizes(weights=1_000_000)
    size = disk_budget(config, sizes).checkpoint_bytes
    for step in range(start, start - 10 * there, -10):
        folder = checkpoint.checkpoint_path(tmp_path, step)
        folder.mkdir(parents=True)
        (folder / "state.json").touch()
        with (folder / "model.safetensors").open("wb") as file:
            file.truncate(size)
    free = {"bytes": more * size}
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free["bytes"]}))
    require_room(tmp_path, config, sizes, start)
    free["bytes"] -= 1
    if more:
        with pytest.raises(UserError, match="checkpoints need"):
            require_room(tmp_path, config, sizes, start)


# --- evaluation during training


def judged(config: RunConfig, root: Path, *, resume: bool = False) -> tuple[Path, Listener]:
    listener = Listener()
    return train(config, resume=resume, watcher=listener, root=root, make_judge=small_judge), listener


@pytest.mark.usefixtures("nano")
def test_evaluation_during_training_changes_nothing_and_resumes(shapes_cache: Path, tmp_path: Path) -> None:
    common = {"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 9}
    plain = run(settings(shapes_cache, "dya", **common), tmp_path / "plain")
    asked = {"eval_every": 2, "eval_num": 16, "eval_extractor": "embedded"}
    config = settings(shapes_cache, "dya", **common, **asked)
    whole, listener = judged(config, tmp_path / "judged")
    assert not [text for text in listener.warnings if "no evaluation" in text]
    assert_identical(plain, whole, 4)

    def numbers(path: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in r.items() if k.startswith("eval/") or k == "step"} for r in log_of(path)]

    found = [record for record in numbers(whole) if len(record) > 1]
    assert [record["step"] for record in found] == [2, 4]
    assert all({"eval/embedded-FID", "eval/embedded-KID"} < record.keys() for record in found)
    images = featcache.open(shapes_cache).manifest.dataset
    how = f"16 samples compared with the images of cache {images.name} ({images.fingerprint[:12]})"
    assert {r.get("eval_of") for r in log_of(whole)} == {None, how}
    assert [r["step"] for r in log_of(plain)] == sorted({r["step"] for r in log_of(whole)})
    for step in (1, 2, 3):
        copy = keep_only(whole, step, tmp_path / f"from-{step}" / "run")
        resumed, _ = judged(config, copy.parent, resume=True)
        assert numbers(resumed) == numbers(whole), "from the same noise, and none lost"
        assert_identical(plain, resumed, 4)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("at", [2, 4])
def test_ctrl_c_gives_an_evaluation_up_and_resuming_makes_up_for_it(
    shapes_cache: Path, tmp_path: Path, at: int
) -> None:
    config = settings(
        shapes_cache, steps=5, checkpoint_every=3, eval_every=2, eval_num=8, eval_extractor="embedded", skip_nonfinite=1
    )
    whole, _ = judged(config, tmp_path / "whole")
    images: list[int] = []

    def interrupted(*given: Any) -> Any:
        real = small_judge(*given)

        def judge(model: Any) -> Any:
            if (
                not (tmp_path / "cut" / "run" / "checkpoints" / f"step_{at:07d}").exists()
                and len(images) == at // 2 - 1
            ):
                os.kill(os.getpid(), signal.SIGINT)
                images.append(0)
                found = real(model)
                raise AssertionError(f"went on to {found}")
            images.append(8)
            return real(model)

        return judge

    listener = Listener()
    with pytest.raises(SystemExit) as caught:
        train(config, resume=False, watcher=listener, root=tmp_path / "cut", make_judge=interrupted)
    assert caught.value.code == 130 and images[-1] == 0
    cut = tmp_path / "cut" / "run"
    assert checkpoint.find_checkpoint(cut)[0] == at, "nothing but the evaluation is missing"
    assert not [text for text in listener.warnings if "no evaluation" in text]
    judged(config, tmp_path / "cut", resume=True)
    assert_identical(whole, cut, 5)
    logs = [
        [{k: v for k, v in line.items() if k not in OF_THE_MACHINE} for line in log_of(path)] for path in (whole, cut)
    ]
    assert logs[0] == logs[1]


@pytest.mark.usefixtures("nano")
def test_a_judge_that_there_is_not_is_refused_before_the_first_step(shapes_cache: Path) -> None:
    for name in ("auto", *EXTRACTORS):
        assert settings(shapes_cache, eval_extractor=name).eval_extractor == name
    with pytest.raises(UserError, match="eval_extractor"):
        settings(shapes_cache, eval_extractor="nobody")


@pytest.mark.usefixtures("nano")
def test_an_evaluation_that_fails_ends_no_run(shapes_cache: Path, tmp_path: Path) -> None:
    reference = str(tmp_path / "nothing.npz")
    config = settings(shapes_cache, steps=4, eval_every=1, eval_extractor="embedded", eval_reference=reference)
    path, listener = judged(config, tmp_path / "a")
    (said,) = (text for text in listener.warnings if "no evaluation" in text)  # once
    assert said.startswith("no evaluation during training: ") and "nothing.npz" in said
    assert checkpoint.find_checkpoint(path)[0] == 4
