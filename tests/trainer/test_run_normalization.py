"""Runs whose latents are normalised by statistics: trained, resumed, sampled and diagnosed with the same ones."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import Listener, assert_identical, keep_only, losses, settings

import featcache
from featcache.errors import CacheError, UserError
from featcache.inspect import read_feature
from featcache.progress import Quiet
from featcache.read.normalization import Statistics, load, save
from featcache.share.importers import ImportRequest, import_latents
from trainer.analyze.config import AnalyzeConfig
from trainer.analyze.subject import Subject
from trainer.cli.tools import export
from trainer.report.data import RunData
from trainer.report.report import incomparable
from trainer.requests import SampleRequest
from trainer.runs import folder as runs
from trainer.runs.config import RunConfig
from trainer.runs.normalization import FILE
from trainer.sampling.draw import load_run
from trainer.sampling.run import sample_run
from trainer.training.loop import train
from trainer.training.objective import sample_posterior

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def run(config: RunConfig, root: Path, *, resume: bool = False) -> Path:
    return train(config, resume=resume, watcher=Listener(), root=root)


def test_scalar_numbers_keep_their_bits() -> None:
    g = torch.Generator().manual_seed(0)
    moments, noise = torch.randn(3, 8, 4, 4, generator=g), torch.randn(3, 4, 4, 4, generator=g)
    mean, logvar = moments.chunk(2, dim=1)
    expected = (mean + torch.exp(0.5 * logvar) * noise - 0.1) * 0.18215
    assert torch.equal(sample_posterior(moments, noise, scale=0.18215, shift=0.1), expected)
    column = torch.full((4, 1, 1), 0.18215), torch.full((4, 1, 1), 0.1)
    torch.testing.assert_close(sample_posterior(moments, noise, scale=column[0], shift=column[1]), expected)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("over", ["channel", "position"])
def test_training_sampling_and_diagnostics_use_one_normalization(
    shapes_cache: Path, statistics: dict[str, Path], tmp_path: Path, over: str
) -> None:
    config = settings(shapes_cache, steps=2, normalization=over, statistics=str(statistics[over]), sample_every=1)
    path = run(config, tmp_path)
    assert len(list((path / "samples").glob("*.png"))) == 2
    plain = run(settings(shapes_cache, steps=2, name="plain"), tmp_path)
    assert losses(path) != losses(plain)
    known = load(statistics[over])
    assert torch.equal(load(path / FILE).std, known.std)

    subject = Subject(path, AnalyzeConfig(samples=16), device="cpu", gradients=False)
    latents = subject.latent(slice(0, 16))
    moments = torch.from_numpy(read_feature(featcache.open(shapes_cache), "vae/moments", subject.indices[:16].tolist()))
    mean, logvar = moments.chunk(2, dim=1)
    drawn = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * subject.posterior(slice(0, 16))
    torch.testing.assert_close(latents, (drawn - known.mean) / known.std, rtol=1e-4, atol=1e-4)

    by_run = load_run(path).decoder(None)((drawn - known.mean) / known.std)
    by_factor = load_run(plain).decoder(None)
    assert isinstance(by_factor.scale, float)
    torch.testing.assert_close(by_run, by_factor((drawn - by_factor.shift) * by_factor.scale), rtol=1e-3, atol=1e-3)
    drawn_file = sample_run(
        path, SampleRequest(num=2, sampler="ode", steps=2, device="cpu", batch_size=2), Quiet()
    ).images
    assert np.load(drawn_file)["arr_0"].shape[0] == 2
    subject.device = "meta"  # stands for a GPU
    assert {buffer.device.type for buffer in subject.objective().buffers()} == {subject.device}


@pytest.mark.usefixtures("nano")
def test_a_resumed_run_needs_no_file_but_its_own(
    shapes_cache: Path, statistics: dict[str, Path], tmp_path: Path
) -> None:
    mine = tmp_path / "mine.safetensors"
    shutil.copy(statistics["channel"], mine)
    common = {"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 4, "normalization": "channel"}
    config = settings(shapes_cache, "ahpa", statistics=str(mine), **common)
    whole = run(config, tmp_path / "whole")
    root = tmp_path / "half"
    keep_only(whole, 2, root / "run")
    mine.unlink()
    resumed = run(settings(shapes_cache, "ahpa", **common), root, resume=True)
    assert_identical(whole, resumed, 4)

    other = load(whole / FILE)
    save(Statistics(mean=other.mean + 1, std=other.std), tmp_path / "other.safetensors")
    keep_only(whole, 2, tmp_path / "third" / "run")
    changed = settings(shapes_cache, "ahpa", statistics=str(tmp_path / "other.safetensors"), **common)
    with pytest.raises(UserError, match="started with other statistics"):
        run(changed, tmp_path / "third", resume=True)
    with pytest.raises(UserError, match="normalization = 'channel', not 'scalar'"):
        run(settings(shapes_cache, "ahpa", **(common | {"normalization": "scalar"})), tmp_path / "third", resume=True)
    (whole / FILE).unlink()
    with pytest.raises(UserError, match="is missing"):
        load_run(whole).decoder(None)


@pytest.mark.usefixtures("nano")
def test_runs_from_before_there_was_a_choice_are_scalar(shapes_cache: Path, tmp_path: Path) -> None:
    common = {"steps": 3, "checkpoint_every": 1, "keep_checkpoints": 3}
    whole = run(settings(shapes_cache, **common), tmp_path / "whole")
    assert runs.load_config(whole).normalization == "scalar" and not (whole / FILE).exists()
    keep_only(whole, 1, tmp_path / "old" / "run")
    old = tmp_path / "old" / "run" / "config.yaml"
    old.write_text(
        "".join(l for l in old.read_text().splitlines(True) if not l.startswith(("normalization", "statistics")))
    )
    assert runs.load_config(old.parent).normalization == "scalar"
    assert_identical(whole, run(settings(shapes_cache, **common), tmp_path / "old", resume=True), 3)


@pytest.mark.usefixtures("nano")
def test_statistics_that_were_imported_with_the_latents_are_used(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    files = tmp_path / "files"
    files.mkdir()
    spread = torch.tensor([1.0, 5.0, 0.2, 3.0])[:, None, None]
    latents = {name: spread * torch.randn(8, 4, 4, 4, generator=g) + spread for name in ("latents", "latents_flip")}
    save_file(latents | {"labels": torch.arange(8) % 2}, files / "latents_rank00_shard000.safetensors")
    torch.save({"mean": spread[None], "std": spread[None]}, files / "latents_stats.pt")
    cache = tmp_path / "cache"
    import_latents(ImportRequest(source=files, out=cache, layout="lightningdit"))
    path = run(settings(cache, steps=1), tmp_path / "runs")
    assert runs.load_config(path).normalization == "channel"
    torch.testing.assert_close(load(path / FILE).std, spread)
    subject = Subject(path, AnalyzeConfig(samples=8), device="cpu", gradients=False)
    drawn = subject.latent(slice(0, 8))
    assert (drawn.std((0, 2, 3)) - 1).abs().max() < 0.3, "each channel has unit spread"


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("over", ["channel", "position"])
def test_a_run_without_statistics_computes_them_once(
    shapes_cache: Path, statistics: dict[str, Path], tmp_path: Path, over: str
) -> None:
    """The same as those of `featcache stats`, to the bit; a resumed run computes nothing."""
    common = {"steps": 3, "checkpoint_every": 1, "keep_checkpoints": 3, "normalization": over}
    given = run(settings(shapes_cache, **common, statistics=str(statistics[over])), tmp_path / "given")
    listener = Listener()
    path = train(settings(shapes_cache, **common), resume=False, watcher=listener, root=tmp_path / "computed")
    assert any("computing them" in note for note in listener.warnings)
    known, found = load(statistics[over]), load(path / FILE)
    assert torch.equal(known.mean, found.mean) and torch.equal(known.std, found.std)
    assert found.fingerprint == featcache.open(shapes_cache).fingerprint
    assert_identical(given, path, 3)
    keep_only(path, 1, tmp_path / "half" / "run")
    listener = Listener()
    train(settings(shapes_cache, **common), resume=True, watcher=listener, root=tmp_path / "half")
    assert_identical(path, tmp_path / "half" / "run", 3)
    assert not any("computing" in note for note in listener.warnings)


@pytest.mark.usefixtures("nano")
def test_statistics_that_cannot_be_computed_are_an_error(
    shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flat(*_args: object, **_kwargs: object) -> None:
        raise UserError("a standard deviation is zero", remedy="featcache inspect")

    monkeypatch.setattr("trainer.runs.normalization.compute", flat)
    with pytest.raises(UserError, match="standard deviation is zero"):
        run(settings(shapes_cache, normalization="channel"), tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("nano")
def test_statistics_that_do_not_fit_say_what_to_type(
    shapes_cache: Path, statistics: dict[str, Path], tmp_path: Path
) -> None:
    known = load(statistics["channel"])
    stranger, half, tokens = (tmp_path / f"{name}.safetensors" for name in ("stranger", "half", "tokens"))
    save(Statistics(mean=known.mean, std=known.std, feature="vae/moments", fingerprint="0" * 64), stranger)
    save(Statistics(mean=known.mean[:2], std=known.std[:2]), half)
    save(Statistics(mean=known.mean, std=known.std, feature="tiny@5"), tokens)
    for options, kind, said in (
        ({"normalization": "position", "statistics": str(statistics["channel"])}, UserError, "needs"),
        ({"normalization": "scalar", "statistics": str(statistics["channel"])}, UserError, "uses none"),
        ({"normalization": "channel", "statistics": str(stranger)}, CacheError, "fingerprint 000000000000"),
        ({"normalization": "channel", "statistics": str(half)}, UserError, "shape"),
        ({"normalization": "channel", "statistics": str(tokens)}, UserError, "not of vae/moments"),
    ):
        with pytest.raises(kind, match=said) as error:
            run(settings(shapes_cache, **options), tmp_path)
        assert error.value.remedy
        assert not (tmp_path / "run").exists(), "no folder is left of a run that did not begin"


@pytest.mark.usefixtures("nano")
def test_a_file_alone_means_channel(shapes_cache: Path, statistics: dict[str, Path], tmp_path: Path) -> None:
    path = run(settings(shapes_cache, steps=1, statistics=str(statistics["channel"])), tmp_path)
    assert runs.load_config(path).normalization == "channel"


@pytest.mark.usefixtures("nano")
def test_a_run_is_continued_by_its_settings_when_the_file_has_gone(
    shapes_cache: Path, statistics: dict[str, Path], tmp_path: Path
) -> None:
    mine = tmp_path / "mine.safetensors"
    mine.symlink_to(statistics["channel"])  # as in the folders of the Hugging Face hub
    path = run(settings(shapes_cache, steps=1, statistics=str(mine)), tmp_path)
    mine.unlink()
    config = dataclasses.replace(runs.load_config(path), steps=2)
    run(config, tmp_path, resume=True)
    assert runs.load_config(path).normalization == "channel" and len(losses(path)) == 2
    (path / FILE).unlink()
    with pytest.raises(UserError, match="is missing"):
        run(dataclasses.replace(config, steps=3, statistics=str(statistics["channel"])), tmp_path, resume=True)
    (path / FILE).symlink_to(statistics["channel"])
    with pytest.raises(CacheError, match="symbolic link"):
        run(dataclasses.replace(config, steps=3), tmp_path, resume=True)


@pytest.mark.usefixtures("nano")
def test_what_a_start_that_was_cut_short_left_is_no_runs(
    shapes_cache: Path, statistics: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    known = load(statistics["channel"])
    save(Statistics(mean=known.mean + 1, std=known.std, fingerprint="0" * 64), folder / FILE)
    part = folder / f"{FILE}.{'0' * 16}.part"
    part.write_bytes(b"half")
    run(settings(shapes_cache, steps=1, statistics=str(statistics["channel"])), tmp_path)
    assert torch.equal(load(folder / FILE).mean, known.mean) and not part.exists()


@pytest.mark.usefixtures("nano")
def test_a_damaged_level_is_not_said_to_be_missing(
    shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise CacheError("a shard is damaged", remedy="featcache repair it")

    monkeypatch.setattr("trainer.training.state.layer_statistics", refuse)
    options = {"ahpa": {"router_width": 16, "time_width": 8, "normalize": "whiten"}}
    with pytest.raises(CacheError) as error:
        run(settings(shapes_cache, "ahpa", align=options), tmp_path)
    assert error.value.what == "a shard is damaged" and error.value.remedy == "featcache repair it"


@pytest.mark.usefixtures("nano")
def test_an_exported_checkpoint_is_not_said_to_be_complete(
    shapes_cache: Path, statistics: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    normalised = run(settings(shapes_cache, steps=1, statistics=str(statistics["channel"])), tmp_path)
    plain = run(settings(shapes_cache, steps=1, name="plain"), tmp_path)
    for path, said, unsaid in (
        (normalised, f"--statistics {normalised / FILE}", "one factor"),
        (plain, "back again", "normalised"),
    ):
        export(path, path / "weights.pt")
        printed = capsys.readouterr().out
        assert f"back again: trainer import {path / 'weights.pt'} --cache {shapes_cache}" in printed
        assert said in printed and unsaid not in printed


def test_a_comparison_of_other_normalizations_says_so() -> None:
    a, b = (RunData(name=name, config={"normalization": name}) for name in ("scalar", "channel"))
    old = RunData(name="old")
    assert not incomparable([a, old])
    (said,) = incomparable([a, old, b])
    assert "scalar: scalar, old; channel: channel" in said
