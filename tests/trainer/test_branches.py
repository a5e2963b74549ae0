"""`trainer run --from`: a new run from another one's checkpoint."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Listener, assert_identical, checkpoint_files, keep_only, log_of, settings

from featcache.errors import CacheError, UserError
from featcache.read.normalization import load
from trainer import cli
from trainer.report.data import load_run
from trainer.report.run import write_run_report
from trainer.runs import branch
from trainer.runs.config import RunConfig
from trainer.runs.exchange import export_checkpoint, import_checkpoint
from trainer.runs.folder import load_config
from trainer.runs.log import OF_THE_MACHINE
from trainer.training.loop import train

pytestmark = pytest.mark.usefixtures("nano")
EVERY = {"checkpoint_every": 6, "keep_checkpoints": 9}


def run(config: RunConfig, root: Path, watcher: Listener | None = None, **kw: Any) -> Path:
    return train(config, resume=kw.pop("resume", False), watcher=watcher or Listener(), root=root, **kw)


def branched(origin: str | Path, root: Path, *, watcher: Listener | None = None, **typed: Any) -> Path:
    """As the command does it."""
    found = branch.find_origin(str(origin), any_cache="cache" in typed, root=root)
    config = cli._on_top(branch.inherited(found), {"name": "branch", **typed}, [], found.run, "--from RUN@STEP")
    return run(config, root, watcher, origin=found)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("ahpa+sra", {"ema_warmup": True, "warmup_steps": 8}),
        ("sara", {"precision": "fp16", "accumulate": 2}),
        ("none", {"normalization": "channel"}),
    ],
)
def test_a_branch_at_the_same_settings_equals_its_origin(
    shapes_cache: Path, tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    """Weights, average, heads, discriminator, moments and loss scale; the log's numbers, too."""
    whole = run(settings(shapes_cache, method, steps=12, **EVERY, **changes), tmp_path)
    copy = branched("run@6", tmp_path)
    assert_identical(whole, copy, 6)
    assert_identical(whole, copy, 12)
    ours, theirs = (
        [{k: v for k, v in line.items() if k not in OF_THE_MACHINE} for line in log_of(x)] for x in (copy, whole)
    )
    assert ours == theirs[6:]
    assert log_of(copy)[0]["time_s"] > log_of(whole)[5]["time_s"]


def test_a_branch_with_another_seed_sees_other_data_and_draws(shapes_cache: Path, tmp_path: Path) -> None:
    whole = run(settings(shapes_cache, steps=12, **EVERY), tmp_path)
    other = branched("run@6", tmp_path, seed=1)
    assert log_of(other)[0]["denoise"] != log_of(whole)[6]["denoise"]
    assert all(
        torch.equal(v, checkpoint_files(other, 6)["ema"][k]) for k, v in checkpoint_files(whole, 6)["ema"].items()
    )
    first, second = checkpoint_files(whole, 12)["model"], checkpoint_files(other, 12)["model"]
    assert not all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_branch_is_resumed_without_its_origin(shapes_cache: Path, tmp_path: Path) -> None:
    """Also one that was killed before its first checkpoint, as long as the origin is there."""
    run(settings(shapes_cache, steps=12, **EVERY), tmp_path)
    branched("run@6", tmp_path, steps=14, seed=3, lr=5e-4)
    config = dataclasses.replace(load_config(tmp_path / "branch"))
    cut = keep_only(tmp_path / "branch", 12, tmp_path / "again" / "branch")
    run(config, cut.parent, resume=True)
    assert_identical(tmp_path / "branch", cut, 14)

    bare = tmp_path / "killed" / "branch"
    shutil.copytree(cut, bare, ignore=shutil.ignore_patterns("checkpoints"))
    run(config, bare.parent, resume=True)
    assert_identical(tmp_path / "branch", bare, 14)
    shutil.rmtree(bare / "checkpoints")
    config_file = tmp_path / "run" / "config.yaml"
    config_file.write_text(config_file.read_text() + "# changed\n")
    with pytest.raises(UserError, match="settings of its origin") as error:
        run(config, bare.parent, resume=True)
    assert error.value.remedy is not None and "--from RUN@STEP" in error.value.remedy
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match="its origin cannot be read"):
        run(config, bare.parent, resume=True)
    assert run(config, cut.parent, resume=True) == cut, "what has a checkpoint needs no origin"


def test_the_origin_s_copy_of_statistics_is_taken_over(
    shapes_cache: Path, tmp_path: Path, statistics: dict[str, Path]
) -> None:
    given = tmp_path / "mine.safetensors"
    shutil.copy(statistics["channel"], given)
    changed = settings(shapes_cache, steps=2, normalization="channel", statistics=str(given))
    run(changed, tmp_path)
    given.unlink()
    heard = Listener()
    copy = branched("run", tmp_path, watcher=heard, steps=3)
    assert not any("no statistics were given" in note for note in heard.warnings)
    theirs, ours = (load(path / "normalization.safetensors") for path in (tmp_path / "run", copy))
    assert torch.equal(theirs.mean, ours.mean) and torch.equal(theirs.std, ours.std)


@pytest.mark.parametrize(("method", "options"), [("ahpa", {}), ("repa", {"repa": {"head_width": 40}})])
def test_heads_that_do_not_fit_start_anew(
    shapes_cache: Path, tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    """The backbone, its average and its moments are the origin's."""
    whole = run(settings(shapes_cache, "repa", steps=6, **EVERY), tmp_path)
    heard = Listener()
    typed = {"align": {method: options[method]}} if options else {}
    copy = branched("run", tmp_path, watcher=heard, steps=7, method=method, **typed)
    assert any(f"the heads of {method} start anew" in note for note in heard.warnings)
    first, second = checkpoint_files(whole, 6), checkpoint_files(copy, 6)
    for stem in ("model", "ema"):
        assert all(torch.equal(value, second[stem][key]) for key, value in first[stem].items())
    backbone = {k: v for k, v in first["optimizer"].items() if "/model." in k}
    assert backbone and all(torch.equal(value, second["optimizer"][key]) for key, value in backbone.items())
    assert second["optimizer"].keys() == backbone.keys(), "new heads have no moments yet"
    fresh = run(settings(shapes_cache, method, steps=1, checkpoint_every=1, name="fresh", **typed), tmp_path)
    assert checkpoint_files(fresh, 1)["alignment"].keys() == second["alignment"].keys()


def test_changed_options_that_fit_keep_the_heads(shapes_cache: Path, tmp_path: Path) -> None:
    whole = run(settings(shapes_cache, "repa", steps=6, **EVERY), tmp_path)
    copy = branched("run", tmp_path, steps=7, align={"repa": {"weight": 0.1}})
    first, second = checkpoint_files(whole, 6), checkpoint_files(copy, 6)
    for stem in ("alignment", "optimizer"):
        assert all(torch.equal(value, second[stem][key]) for key, value in first[stem].items())
    assert load_config(copy).align["repa"]["head_width"] == 24  # type: ignore[index]


def test_an_imported_run_is_branched(shapes_cache: Path, tmp_path: Path) -> None:
    whole = run(settings(shapes_cache, steps=6, **EVERY), tmp_path)
    weights = export_checkpoint(whole, tmp_path / "weights.pt", convention=None, step=None)
    imported = import_checkpoint(
        weights, name="official", weights="ema", convention=None, cache=str(shapes_cache), root=tmp_path
    )
    heard = Listener()
    copy = branched(imported, tmp_path, watcher=heard, steps=8, batch_size=4, device="cpu", sample_every=0, log_every=1)
    assert any("averaged weights, which are all that was imported" in note for note in heard.warnings)
    files, ema = checkpoint_files(copy, 6), checkpoint_files(whole, 6)["ema"]
    assert all(torch.equal(files[stem][key], value) for stem in ("model", "ema") for key, value in ema.items())
    assert [line["step"] for line in log_of(copy)] == [7, 8]
    resumed = dataclasses.replace(load_config(copy), steps=9)
    assert run(resumed, tmp_path, resume=True) == copy


def test_what_cannot_be_branched_is_explained(shapes_cache: Path, tmp_path: Path) -> None:
    run(settings(shapes_cache, steps=4, checkpoint_every=2, keep_checkpoints=9), tmp_path)
    with pytest.raises(UserError, match="has no checkpoint at step 3; it has: 2, 4") as error:
        branched("run@3", tmp_path)
    assert error.value.remedy is not None and f"{tmp_path / 'run'}@4" in error.value.remedy
    with pytest.raises(UserError, match="neither a run's folder nor the name"):
        branched("walk@4", tmp_path)
    with pytest.raises(UserError, match="neither a run's folder nor the name"):
        branched("../../etc@4", tmp_path)
    for odd in ("", "-1", "1e9", "٤", "4 ", "9" * 20):
        with pytest.raises(UserError, match="what follows the @ is no step of the run run"):
            branched(f"run@{odd}", tmp_path)
    with pytest.raises(UserError, match="neither a run's folder nor the name"):
        branched("@4", tmp_path)
    with pytest.raises(UserError, match="begins at step 4, and its last step is to be 4"):
        branched("run", tmp_path)
    with pytest.raises(UserError, match="is the run that --from names"):
        branched("run@2", tmp_path, name="run")
    run(settings(shapes_cache, steps=1, name="taken"), tmp_path)
    with pytest.raises(UserError, match="exists already"):
        branched("run@2", tmp_path, name="taken")
    with pytest.raises(UserError, match="do not fit the DiT-Nano/2"):
        branched("run@2", tmp_path, model="DiT-Nano/2")
    with pytest.raises(UserError, match="qk_norm"):
        branched("run@2", tmp_path, qk_norm=True)
    assert not (tmp_path / "branch").exists()


def test_another_cache_has_to_be_typed(shapes_cache: Path, tmp_path: Path) -> None:
    origin = run(settings(shapes_cache, steps=2), tmp_path)
    summary = json.loads((origin / "cache.json").read_text())
    (origin / "cache.json").write_text(json.dumps({**summary, "fingerprint": "0" * 64}))
    with pytest.raises(CacheError, match="fingerprint 000000000000") as error:
        branched("run", tmp_path, steps=3)
    assert error.value.remedy is not None and f"--cache {shapes_cache}" in error.value.remedy
    heard = Listener()
    branched("run", tmp_path, steps=3, cache=str(shapes_cache), watcher=heard)
    assert any("another cache than" in note for note in heard.warnings)
    dataset = {**summary["dataset"], "class_names": ["one", "two"]}
    (origin / "cache.json").write_text(json.dumps({**summary, "fingerprint": "0" * 64, "dataset": dataset}))
    with pytest.raises(UserError, match=r"num_classes \(2, now"):
        branched("run", tmp_path, steps=3, name="third", cache=str(shapes_cache))


def test_from_and_resume_contradict_each_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--from begins a new run"):
        cli.app(["run", "--from", "x", "--resume"], standalone_mode=False)


def test_the_command_takes_what_is_typed_over_the_origin(
    shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(settings(shapes_cache, "repa", steps=6, **EVERY), tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("lr: 5.0e-4\nclip: 0.5\n")
    words = ["--from", "run@6", "--recipe", "recipe.yaml", "--set", "clip=0.25", "--set", "method=none"]
    cli.app(["run", *words, "--steps", "8", "--name", "b"], standalone_mode=False)
    config = load_config(tmp_path / "runs" / "b")
    assert (config.lr, config.clip, config.method, config.steps, config.batch_size) == (5e-4, 0.25, "none", 8, 4)


@pytest.mark.parametrize(
    "name", ["config.yaml", "log.jsonl", "origin.json", "normalization.safetensors", "checkpoints"]
)
def test_no_link_in_a_received_run_is_followed(shapes_cache: Path, tmp_path: Path, name: str) -> None:
    run(settings(shapes_cache, steps=2, normalization="channel"), tmp_path)
    branched("run", tmp_path, steps=3, name="received")
    place = tmp_path / "received" / name
    place.rename(tmp_path / "outside")
    place.symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=f"{name} is a symbolic link|{name} .*link"):
        branched("received", tmp_path, steps=4)


def test_a_received_origin_file_is_checked(shapes_cache: Path, tmp_path: Path) -> None:
    run(settings(shapes_cache, steps=2), tmp_path)
    copy = branched("run", tmp_path, steps=3)
    for text in ('{"origins": 3}', '{"origins": [{"run": 1}]}', "[]", "{"):
        (copy / "origin.json").write_text(text)
        with pytest.raises(UserError, match=r"origin\.json is damaged"):
            branched("branch", tmp_path, steps=4, name="second")


def test_reports_join_the_curves_of_a_chain(shapes_cache: Path, tmp_path: Path) -> None:
    run(settings(shapes_cache, steps=6, checkpoint_every=2, keep_checkpoints=9), tmp_path)
    branched("run@4", tmp_path, name="first", steps=8, seed=1)
    second = branched("first@6", tmp_path, name="second", steps=9, seed=2)
    shutil.rmtree(tmp_path / "run")  # nothing of it is needed
    data = load_run(second)
    assert data.log["loss"].steps.tolist() == list(range(1, 10))
    joined = [*log_of(tmp_path / "first")[:2], *log_of(second)]
    assert data.log["loss"].values.tolist()[4:] == [line["loss"] for line in joined]
    assert [(origin["name"], origin["step"]) for origin in data.origins] == [("run", 4), ("first", 6)]
    page = write_run_report([second]).read_text()
    assert "second is a branch of first at step 6, which is a branch of run at step 4" in page
    assert page.count("begins as a branch") >= 1
    compared = write_run_report([tmp_path / "first", second]).read_text()
    assert "first is a branch of run at step 4" in compared and "second is a branch of first" in compared


def test_a_branch_from_before_its_origin_s_beginning_skips_that_one(shapes_cache: Path, tmp_path: Path) -> None:
    """The first checkpoint of a branch is what it took over."""
    run(settings(shapes_cache, steps=4, checkpoint_every=2, keep_checkpoints=9), tmp_path)
    branched("run@4", tmp_path, name="first", steps=6)
    second = branched("first@4", tmp_path, name="second", steps=5)
    assert [(o["name"], o["step"]) for o in branch.read_origins(second)] == [("run", 4), ("first", 4)]


def test_leftovers_of_a_branch_that_never_began_are_no_origin(shapes_cache: Path, tmp_path: Path) -> None:
    run(settings(shapes_cache, steps=2), tmp_path)
    copy = branched("run", tmp_path, steps=3)
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(copy / name)
    (copy / "config.yaml").unlink()
    fresh = run(settings(shapes_cache, steps=1, name="branch"), tmp_path)
    assert branch.read_origins(fresh) == [] and load_run(fresh).log["loss"].steps.tolist() == [1]
