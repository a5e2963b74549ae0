"""What is wrong with a stream is said in a paragraph, with what to type; and options of streams as they are typed."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Listener, keep_only, losses, settings
from typer.testing import CliRunner

import featcache
from featcache.builder.request import BuildRequest
from featcache.builder.run import build
from featcache.cli import app as featcache_app
from featcache.encoders import parse_encoders
from featcache.errors import CacheError, UserError
from featcache.progress import Quiet
from featcache.read.normalization import compute, save
from trainer.cli import app
from trainer.distributed import World
from trainer.evaluate.run import with_defaults
from trainer.requests import SampleRequest, SampleSettings
from trainer.runs import folder as runs
from trainer.runs.cache import with_streams
from trainer.runs.config import RunConfig, apply_overrides
from trainer.runs.normalization import streams_of_run
from trainer.sampling.draw import load_run
from trainer.sampling.run import sample_config, sample_run
from trainer.training.loop import train
from trainer.training.state import assemble

CPU = torch.device("cpu")
CLS, PCA = "tiny@5.cls", "tiny@5.pca4"


def run(config: RunConfig, root: Path, *, resume: bool = False) -> Path:
    return train(config, resume=resume, watcher=Listener(), root=root)


def told(config: RunConfig, root: Path, kind: type[UserError] = UserError) -> UserError:
    """The error of a run that cannot begin; nothing is left of it."""
    with pytest.raises(kind) as error:
        run(config, root)
    assert error.value.remedy, "what to type"
    assert not (root / "run").exists()
    return error.value


def typed(remedy: str | None) -> list[str]:
    """Commands that a remedy names, one a line."""
    return [line.strip() for line in str(remedy).splitlines() if line.strip().startswith("featcache ")]


@pytest.fixture(scope="module")
def tokens_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of one layer as int4, neither a class token nor components."""
    path = tmp_path_factory.mktemp("caches") / "tokens"
    build(
        BuildRequest(
            data="shapes", encoders=parse_encoders(["tiny@5"]), limit=4, batch_size=4, out=path, tokens_codec="int4"
        ),
        Quiet(),
    )
    return path


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    ("feature", "said"),
    [
        ("vae/G4", "of shape 4 x 16 x 88, cannot be diffused"),
        ("vae/moments", "of shape 32 x 8 x 8, cannot be diffused"),
        ("label", "label, a number, cannot be diffused"),
        ("key", "of shape 24, cannot be diffused"),
        ("text/clip-l", "does not hold text/clip-l"),
        ("nothing", "does not hold nothing"),
    ],
)
def test_what_can_be_no_stream_says_what_can(streams_cache: Path, tmp_path: Path, feature: str, said: str) -> None:
    error = told(settings(streams_cache, streams={feature: {}}), tmp_path)
    assert said in error.what and "dinov2-b@11.cls" in str(error.remedy)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("shape", [(77, 768), (16, 4, 4), (7,)])
def test_only_squares_of_tokens_and_class_tokens_are_streams(
    streams_cache: Path, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    """Text states are a row of tokens, levels a stack, and a vector must be a class token."""
    cache = featcache.open(streams_cache)
    cache.manifest.features["text/t5"] = dataclasses.replace(cache.manifest.features["tiny@5"], shape=shape)  # type: ignore[index]
    with pytest.raises(UserError, match=" x ".join(map(str, shape))):
        with_streams(settings(streams_cache, streams={"text/t5": {}}), cache)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    ("method", "changes", "commands"),
    [
        ("none", {"streams": {CLS: {}}}, ["featcache build --into C --encoder tiny@5.cls"]),
        ("none", {"streams": {PCA: {}}}, ["featcache derive C --feature tiny@5 --pca 4"]),
        ("none", {"streams": {"tiny@5.mine": {}}}, ["featcache derive C --feature tiny@5 --pca 8 --name tiny@5.mine"]),
        (
            "none",
            {"streams": {"tiny@2.pca4": {}}},
            ["featcache build --into C --encoder tiny@2", "featcache derive C --feature tiny@2 --pca 4"],
        ),
        ("reg", {}, ["featcache build --into C --encoder tiny@5,5.cls"]),
        ("redi", {}, ["featcache derive C --feature tiny@5 --pca 8"]),
        ("redi", {"align": {"redi": {"feature": "tiny@5.pca3"}}}, ["featcache derive C --feature tiny@5 --pca 3"]),
    ],
)
def test_a_feature_that_is_missing_comes_with_the_commands_that_add_it(
    tokens_only: Path, tmp_path: Path, method: str, changes: dict[str, Any], commands: list[str]
) -> None:
    """Which do: typed one after the other, they leave a cache that trains."""
    copy = tmp_path / "cache"
    shutil.copytree(tokens_only, copy)
    error = told(settings(copy, method, steps=1, **changes), tmp_path, CacheError)
    found = typed(error.remedy)
    assert [line.replace(str(copy), "C") for line in found] == commands
    for line in found:
        result = CliRunner().invoke(featcache_app, shlex.split(line)[1:])
        assert result.exit_code == 0, (line, result.output, result.exception)
    run(settings(copy, method, steps=1, **changes), tmp_path)


@pytest.mark.usefixtures("nano")
def test_int4_is_no_data(tokens_only: Path, tmp_path: Path) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(tokens_only, copy)
    error = told(settings(copy, streams={"tiny@5": {}}), tmp_path)
    assert "int4" in error.what
    for line in typed(error.remedy):
        words = [*shlex.split(line)[1:], *(["--yes"] if " rm " in line else [])]
        result = CliRunner().invoke(featcache_app, words)
        assert result.exit_code == 0, (line, result.output, result.exception)
    run(settings(copy, steps=1, streams={"tiny@5": {}}), tmp_path)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    ("options", "said", "remedy"),
    [
        ({"embed": "merged"}, "one vector", "embed=own"),
        ({"wieght": 1.0}, rf"unknown key streams\.{re.escape(CLS)}\.wieght", f"streams.{CLS}.weight"),
        ({"weight": -1.0}, "must not be negative", f"streams.{CLS}.weight"),
        ({"normalization": "scalar"}, "is not known", "none, channel, position"),
        ({"statistics": "x.safetensors", "normalization": "none"}, "uses none", "normalization=channel"),
    ],
)
def test_options_that_do_not_fit(
    streams_cache: Path, tmp_path: Path, options: dict[str, Any], said: str, remedy: str
) -> None:
    with pytest.raises(UserError, match=said) as error:
        run(settings(streams_cache, streams={CLS: options}), tmp_path)
    assert remedy in str(error.value.remedy) and not (tmp_path / "run").exists()


@pytest.mark.usefixtures("nano")
def test_statistics_that_do_not_fit(streams_cache: Path, tmp_path: Path) -> None:
    cache = featcache.open(streams_cache)
    known, file = compute(cache, CLS, "channel"), tmp_path / "s.safetensors"
    for changes, kind, said in (
        ({"fingerprint": "0" * 64}, CacheError, "fingerprint 000000000000"),
        ({"feature": "tiny@5"}, UserError, "are of tiny@5, not of tiny@5.cls"),
        ({"mean": known.mean[:3], "std": known.std[:3]}, UserError, "shape"),
    ):
        save(dataclasses.replace(known, **changes), file)
        error = told(settings(streams_cache, streams={CLS: {"statistics": str(file)}}), tmp_path, kind)
        assert said in error.what and "featcache stats" in str(error.remedy)
    save(compute(cache, PCA, "channel"), file)
    by_position = {"statistics": str(file), "normalization": "position"}
    assert "needs [16, 4]" in told(settings(streams_cache, streams={PCA: by_position}), tmp_path).what
    told(settings(streams_cache, streams={CLS: {"statistics": str(tmp_path / "gone.safetensors")}}), tmp_path)

    with pytest.raises(UserError, match="there are no statistics of it") as missing:
        assemble(settings(streams_cache, streams={CLS: {}}), cache, CPU, World())
    command = str(missing.value.remedy).removeprefix("Compute them: ").replace("stats.safetensors", str(file))
    assert CliRunner().invoke(featcache_app, shlex.split(command)[1:]).exit_code == 0
    run(settings(streams_cache, steps=1, streams={CLS: {"statistics": str(file)}}), tmp_path)


@pytest.mark.usefixtures("nano")
def test_a_run_without_its_copy_of_the_statistics_is_not_continued(streams_cache: Path, tmp_path: Path) -> None:
    streams: dict[str, Any] = {CLS: {}, PCA: {"normalization": "position"}}
    path = run(settings(streams_cache, steps=1, streams=streams), tmp_path)
    for feature in streams:
        copy = keep_only(path, 1, tmp_path / feature / "run")
        (copy / f"normalization-{feature}.safetensors").unlink()
        with pytest.raises(UserError, match=rf"normalization-{re.escape(feature)}\.safetensors is missing") as error:
            run(settings(streams_cache, steps=2, streams=streams), copy.parent, resume=True)
        assert "Bring it back" in str(error.value.remedy)
        with pytest.raises(UserError, match="is missing"):
            streams_of_run(copy, runs.load_config(copy))


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    ("key", "value"), [("weight", 0.5), ("dropout", 0.1), ("normalization", "none"), ("embed", "own")]
)
def test_a_run_is_not_continued_with_other_options_of_a_stream(
    streams_cache: Path, tmp_path: Path, key: str, value: Any
) -> None:
    run(settings(streams_cache, steps=1, streams={PCA: {}}), tmp_path)
    with pytest.raises(UserError, match=rf"started with streams\.{re.escape(PCA)}\.{key} = .*, not {value!r}") as error:
        run(settings(streams_cache, steps=2, streams={PCA: {key: value}}), tmp_path, resume=True)
    assert "--name" in str(error.value.remedy)
    others: list[dict[str, Any]] = [{}, {PCA: {}, CLS: {}}]
    for streams in others:
        with pytest.raises(UserError, match=r"started with streams = \['tiny@5\.pca4'\]"):
            run(settings(streams_cache, steps=2, streams=streams), tmp_path, resume=True)
    run(settings(streams_cache, steps=2, streams={PCA: {"embed": "merged", "weight": 1.0}}), tmp_path, resume=True)


@pytest.mark.usefixtures("nano")
def test_guidance_of_a_run_that_was_never_trained_without_classes(
    shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run(settings(shapes_cache, steps=1, label_dropout=0.0), tmp_path)
    guided = SampleSettings(num=8, steps=1, sampler="ode", device="cpu", guidance=2.0)
    for call in (
        lambda: sample_run(path, SampleRequest(num=8, steps=1, sampler="ode", device="cpu", guidance=2.0), Quiet()),
        lambda: with_defaults(guided, path, runs.load_config(path), "cpu", Quiet()),
    ):
        with pytest.raises(UserError, match="never without a class or caption: guidance of scale 2") as error:
            call()
        assert "--guidance 1" in str(error.value.remedy)
    with_defaults(replace(guided, guidance=1.0), path, runs.load_config(path), "cpu", Quiet())
    monkeypatch.setattr("trainer.sampling.run.read_origins", lambda _: [{"step": 1}])
    with_defaults(guided, path, runs.load_config(path), "cpu", Quiet())  # what it branched off may have been


@pytest.mark.usefixtures("nano")
def test_guidance_that_the_run_cannot_give(streams_cache: Path, tmp_path: Path) -> None:
    def refused(name: str, said: str, training: dict[str, Any], **options: Any) -> None:
        path = tmp_path / name
        if not path.exists():
            run(settings(streams_cache, steps=1, name=name, **training), tmp_path)
        with pytest.raises(UserError, match=said) as error:
            sample_config(SampleRequest(**options), load_run(path))
        assert error.value.remedy

    alone: dict[str, Any] = {"streams": {}}
    always: dict[str, Any] = {"streams": {PCA: {"dropout": 0.5}, CLS: {}}}
    sometimes: dict[str, Any] = {"streams": {PCA: {"dropout": 0.5}}}
    refused("alone", "diffuses the latents alone", alone, guidance=2.0, stream_guidance=2.0)
    refused("alone", "diffuses the latents alone", alone, representation_guidance=1.5)
    refused("always", "never trained without", always, representation_guidance=1.5)
    refused("sometimes", "both asked for", sometimes, guidance=2.0, representation_guidance=1.5)
    refused("sometimes", "no effect without --guidance", sometimes, stream_guidance=2.0)
    refused("of x", "predicts x", {**sometimes, "prediction": "x"}, representation_guidance=1.5)
    asked = SampleRequest(representation_guidance=1.5)
    assert sample_config(asked, load_run(tmp_path / "sometimes")).guidance.representation == 1.5


@pytest.mark.usefixtures("nano")
def test_configurations_from_before_there_were_streams(streams_cache: Path, tmp_path: Path) -> None:
    common = {"checkpoint_every": 1, "keep_checkpoints": 3}
    path = run(settings(streams_cache, "repa", steps=2, **common), tmp_path)
    file = path / "config.yaml"
    text = file.read_text()
    assert "streams: {}\n" in text
    file.write_text(text.replace("streams: {}\n", ""))
    assert runs.load_config(path).streams == {} and load_run(path).model.cfg.streams == ()
    run(settings(streams_cache, "repa", steps=3, **common), tmp_path, resume=True)
    assert len(losses(path)) == 3


@pytest.mark.parametrize(
    ("typed", "streams"),
    [
        (["streams.tiny@5.cls.weight=0.1"], {CLS: {"weight": 0.1}}),
        (["streams.tiny@5.cls.weight=1e-2", "streams.tiny@5.cls.embed=own"], {CLS: {"weight": 0.01, "embed": "own"}}),
        (["streams.tiny@5.pca4.dropout=0.2", "streams.tiny@5.cls.weight=2"], {PCA: {"dropout": 0.2}, CLS: {"weight": 2}}),
        (["streams.tiny@5={weight: 0.5}"], {"tiny@5": {"weight": 0.5}}),
        (["streams.tiny@5={}"], {"tiny@5": {}}),
        (["streams.tiny@5.cls=null"], {CLS: None}),
        (["streams.tiny@5.weight=0.5"], {"tiny@5": {"weight": 0.5}}),
        (["streams.tiny@5.cls.statistics=null"], {CLS: {"statistics": None}}),
    ],
)  # fmt: skip
def test_options_of_streams_as_they_are_typed(typed: list[str], streams: dict[str, Any]) -> None:
    assert RunConfig(**apply_overrides({}, typed)).streams == streams
    beside = apply_overrides({"streams": {CLS: {"weight": 3.0}}}, ["streams.tiny@5.cls.dropout=0.5"])
    assert beside == {"streams": {CLS: {"weight": 3.0, "dropout": 0.5}}}


@pytest.mark.parametrize("key", ["tiny@5.cls.wieght", "tiny@5.pca4.wieght", "tiny@5.wieght"])
def test_a_mistyped_option_is_named_with_its_nearest(key: str) -> None:
    with pytest.raises(UserError, match=rf"unknown key streams\.{re.escape(key)}") as error:
        RunConfig(**apply_overrides({}, [f"streams.{key}=0.1"]))
    assert error.value.remedy == f"Did you mean streams.{key.replace('wieght', 'weight')}?"


@pytest.mark.usefixtures("nano")
def test_a_run_says_where_options_of_a_stream_go_before_the_method_s(
    streams_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a run's configuration is another's recipe: all options of its streams stand in it."""
    monkeypatch.chdir(tmp_path)

    def told(config: RunConfig) -> list[str]:
        listener = Listener()
        train(config, resume=False, watcher=listener, root=tmp_path / "runs")
        return [note for note in listener.warnings if "goes before" in note]

    assert not told(settings(streams_cache, "reg", steps=1, name="plain"))
    assert not told(settings(streams_cache, "reg", steps=1, name="same", streams={CLS: {"weight": 0.03}}))
    streams = {CLS: {"weight": 0.1, "normalization": "channel"}}
    first, second = told(settings(streams_cache, "reg", steps=1, name="typed", streams=streams))
    assert first == f"streams.{CLS}.weight = 0.1 goes before reg's 0.03"
    assert second == f"streams.{CLS}.normalization = channel goes before reg's none"
    words = ["run", "--recipe", "runs/plain/config.yaml", "--name", "again", "--set", "reg.class_weight=0.5"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and f"streams.{CLS}.weight = 0.03 goes before reg's 0.5" in result.output


@pytest.mark.usefixtures("nano")
def test_streams_on_the_command_line(streams_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--streams a,b` and `--set`, then `--resume` with nothing and with another weight."""
    monkeypatch.chdir(tmp_path)
    common = f"run --model SiT-Nano/2 --batch-size 2 --device cpu --name typed --cache {streams_cache}".split()
    begun = [*common, "--steps", "1", "--streams", f"{CLS}, {PCA}", "--set", f"streams.{CLS}.weight=0.1"]
    result = CliRunner().invoke(app, begun)
    assert result.exit_code == 0, (result.output, result.exception)
    config = runs.load_config(tmp_path / "runs" / "typed")
    assert [(name, (o or {})["weight"], (o or {})["embed"]) for name, o in config.streams.items()] == [
        (CLS, 0.1, "own"),
        (PCA, 1.0, "merged"),
    ]
    resumed = ["run", "--resume", "--name", "typed", "--steps", "2"]
    result = CliRunner().invoke(app, [*resumed, "--set", f"streams.{CLS}.weight=0.2"])
    assert isinstance(result.exception, UserError), result.output
    assert f"started with streams.{CLS}.weight = 0.1, not 0.2" in result.exception.what
    result = CliRunner().invoke(app, resumed)
    assert result.exit_code == 0, (result.output, result.exception)
    assert len(losses(tmp_path / "runs" / "typed")) == 2
