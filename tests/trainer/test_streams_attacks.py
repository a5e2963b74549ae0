"""Run folders whose streams were meddled with, and settings of streams that would give wrong samples without a word."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_runs import Listener, settings

import featcache
from featcache.builder.derive import DeriveRequest, derive
from featcache.builder.request import BuildRequest
from featcache.builder.run import build
from featcache.encoders import parse_encoders
from featcache.errors import UserError
from featcache.progress import Quiet
from featcache.read.normalization import Statistics, compute, load, save
from trainer.analyze.config import AnalyzeConfig
from trainer.analyze.subject import Subject
from trainer.runs import checkpoint
from trainer.runs import folder as runs
from trainer.runs.config import RunConfig
from trainer.runs.exchange import export_checkpoint, import_checkpoint
from trainer.sampling.draw import load_run
from trainer.training.loop import train

CLS, OTHER, PCA = "tiny@5.cls", "tiny@2.cls", "tiny@5.pca4"


def run(config: RunConfig, root: Path, *, resume: bool = False) -> Path:
    return train(config, resume=resume, watcher=Listener(), root=root)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two class tokens of one width, components, and what is derived under names that differ in a slash alone; latents of
    four channels, which official files have."""
    path = tmp_path_factory.mktemp("caches") / "attacked"
    encoders = parse_encoders(["tiny@2.cls,5,5.cls"])
    vae: dict[str, Any] = {"vae": "sd-ft-ema", "random_weights": 0}
    build(BuildRequest(data="shapes", encoders=encoders, limit=16, batch_size=8, out=path, **vae), Quiet())
    derive(DeriveRequest(cache=path, feature="tiny@5", components=4))
    for name in ("tiny@5.a/b", "tiny@5.a-b"):
        images = 8 if name.endswith("a-b") else None
        derive(DeriveRequest(cache=path, feature="tiny@5", components=4, name=name, images=images))
    return path


@pytest.mark.parametrize(
    "name", ["../x@1.cls", "/etc/x@1.cls", "x@1.cls\n", "x\x1b[31m@1.cls", "x\0@1.cls", "a" * 200 + "@1.cls", ""]
)
def test_a_stream_has_a_name_that_a_feature_can_have(tmp_path: Path, name: str) -> None:
    """Also in the folder of a run that somebody sent: a name becomes part of a file's, and of what is printed."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": "SiT-S/2", "streams": {name: {}}}))
    with pytest.raises(UserError, match="cannot name a feature") as error:
        runs.load_config(tmp_path)
    assert not any(c in error.value.what for c in "\n\x1b\0") and error.value.remedy


@pytest.mark.usefixtures("nano")
def test_names_that_differ_in_a_slash_have_statistics_of_their_own(cache: Path, tmp_path: Path) -> None:
    streams: dict[str, Any] = {"tiny@5.a/b": {}, "tiny@5.a-b": {}}
    run(settings(cache, steps=1, streams=streams), tmp_path)
    run(settings(cache, steps=2, streams=streams), tmp_path, resume=True)


def meddle(path: Path, change: Callable[[Statistics], Statistics]) -> None:
    save(change(load(path)), path)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: dataclasses.replace(s, feature=OTHER), f"are of {OTHER}, not of {CLS}"),
        (lambda s: dataclasses.replace(s, mean=s.mean[:3], std=s.std[:3]), "have the shape"),
        (lambda s: dataclasses.replace(s, fingerprint="0" * 64), "fingerprint 000000000000"),
    ],
)
def test_what_a_stream_was_normalised_by_is_its_own_when_analysed(
    cache: Path, tmp_path: Path, change: Callable[[Statistics], Statistics], said: str
) -> None:
    path = run(settings(cache, steps=1, streams={CLS: {}}), tmp_path)
    meddle(path / f"normalization-{CLS}.safetensors", change)
    with pytest.raises(UserError, match=said) as error:
        Subject(path, AnalyzeConfig(samples=8), device="cpu", gradients=False)
    assert error.value.remedy


@pytest.mark.usefixtures("nano")
def test_what_latents_were_normalised_by_is_their_own_when_drawn(cache: Path, tmp_path: Path) -> None:
    path = run(settings(cache, steps=1, normalization="channel"), tmp_path)
    loaded = load_run(path)
    loaded.decoder(None)
    file = path / "normalization.safetensors"
    known = load(file)
    for change, said in (
        ({"mean": known.mean[:1], "std": known.std[:1]}, "have the shape"),
        ({"feature": CLS}, f"are of {CLS}"),
        ({"fingerprint": "0" * 64}, "fingerprint 000000000000"),
    ):
        save(dataclasses.replace(known, **change), file)
        with pytest.raises(UserError, match=said) as error:
            loaded.decoder(None)
        assert error.value.remedy
    file.unlink()
    save(compute(featcache.open(cache), "vae/moments", "channel"), file)
    loaded.decoder(None)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    ("options", "said", "remedy"),
    [({"weight": 0.0}, "its weight is 0", "weight=1"), ({"dropout": 1.0}, "its dropout is 1", "dropout=0.2")],
)
def test_a_stream_that_is_never_learned_is_told_of(
    cache: Path, tmp_path: Path, options: Any, said: str, remedy: str
) -> None:
    """Its samples are drawn by a prediction that nothing ever taught, and the latents see them."""
    for name, chosen, told in (("run", options, True), ("other", {"weight": 0.1, "dropout": 0.1}, False)):
        listener = Listener()
        train(settings(cache, steps=1, name=name, streams={CLS: chosen}), resume=False, watcher=listener, root=tmp_path)
        notes = [note for note in listener.warnings if "never learned" in note]
        assert bool(notes) == told
        assert all(said in note and f"--set streams.{CLS}.{remedy} " in note for note in notes)


@pytest.mark.usefixtures("nano")
def test_what_does_not_fit_a_backbone_is_said_before_the_cache_is_read(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics take a pass over the whole cache."""
    monkeypatch.setattr("trainer.runs.normalization.compute", lambda *_, **__: pytest.fail("statistics were computed"))
    with pytest.raises(UserError, match="tokens of its own"):
        run(settings(cache, steps=1, model="DiT-Nano/2", streams={CLS: {}}), tmp_path)


@pytest.mark.usefixtures("nano")
def test_an_imported_run_is_analysed_by_its_average_and_not_continued(cache: Path, tmp_path: Path) -> None:
    """It has nothing but that; no remedy may have its only checkpoint removed."""
    given = settings(cache, "reg", steps=1)
    file = export_checkpoint(run(given, tmp_path), tmp_path / "w.pt", convention=None, step=None)
    back = import_checkpoint(file, name="back", weights="ema", convention=None, cache=str(cache), root=tmp_path)
    for gradients in (False, True):
        subject = Subject(back, AnalyzeConfig(samples=8), device="cpu", gradients=gradients)
        assert subject.weights == "ema"
    with pytest.raises(UserError, match="holds imported weights") as error:
        run(dataclasses.replace(given, name="back", steps=9), tmp_path, resume=True)
    assert "trainer sample" in str(error.value.remedy)
    _, folder = checkpoint.find_checkpoint(back)
    with pytest.raises(UserError) as missing:
        checkpoint.load_tensors(folder, "model")
    assert "averaged" in missing.value.what and "Remove" not in str(missing.value.remedy)


@pytest.mark.usefixtures("nano")
def test_options_of_a_method_that_differ_are_named(cache: Path, tmp_path: Path) -> None:
    run(settings(cache, "reg", steps=1), tmp_path)
    other = {"reg": {"head_width": 24, "class_weight": 0.1}}
    with pytest.raises(UserError) as error:
        run(settings(cache, "reg", steps=2, align=other), tmp_path, resume=True)
    assert error.value.what.endswith("was started with align.reg.class_weight = 0.03, not 0.1")


@pytest.mark.usefixtures("nano")
def test_weights_without_a_stream_say_that_it_counts(cache: Path, tmp_path: Path) -> None:
    path = run(settings(cache, steps=1, streams={CLS: {}}), tmp_path)
    config = yaml.safe_load((path / "config.yaml").read_text())
    (path / "config.yaml").write_text(yaml.safe_dump({**config, "streams": {}}))
    with pytest.raises(UserError, match="does not fit the model") as error:
        load_run(path)
    assert "beside the latents" in str(error.value.remedy)


def test_a_channel_that_never_changes_can_be_taken_as_it_is(tmp_path: Path) -> None:
    save(Statistics(mean=torch.zeros(3), std=torch.tensor([1.0, 0.0, 1.0])), tmp_path / "s.safetensors")
    with pytest.raises(UserError, match="standard deviation is zero") as error:
        load(tmp_path / "s.safetensors")
    assert "normalization=none" in str(error.value.remedy)
