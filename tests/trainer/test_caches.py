"""Which cache a run takes, and the command that adds what it lacks."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_runs import Listener, settings
from typer.testing import CliRunner

import featcache
from featcache.cli import app as featcache_app
from featcache.errors import CacheError
from featcache.share.manage import remove_features
from trainer.runs.cache import build_command, build_line, find_cache, missing_features, sample_keys
from trainer.runs.config import RunConfig
from trainer.training.loop import train


def without(cache: Path, target: Path, *names: str) -> Path:
    """A copy of a cache without some features."""
    shutil.copytree(cache, target)
    remove_features(target, list(names))
    return target


def build_words(error: CacheError) -> list[str]:
    """The first command to build with that an error names."""
    assert error.remedy is not None
    line, *_ = re.findall(r"^\s*(featcache build .*)$", error.remedy, flags=re.M)
    return shlex.split(line)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    ("method", "removed", "expected"),
    [
        ("ahpa", ("vae/G3",), ["--vae-levels", "G3,G4", "--vae", "tiny"]),
        ("repa", ("tiny@2", "tiny@4", "tiny@5"), ["--encoder", "dinov2-b"]),
        ("dya", ("tiny@4", "tiny@2"), ["--encoder", "tiny@4,5"]),
    ],
)
def test_a_missing_feature_is_named_with_the_command_that_adds_it(
    shapes_cache: Path, tmp_path: Path, method: str, removed: tuple[str, ...], expected: list[str]
) -> None:
    cache = without(shapes_cache, tmp_path / "less", *removed)
    with pytest.raises(CacheError) as error:
        train(settings(cache, method), resume=False, watcher=Listener(), root=tmp_path / "runs")
    words = build_words(error.value)
    assert words[:4] == ["featcache", "build", "--into", str(cache)]
    assert words[4:] == expected  # the images of the embedded set follow from the cache
    assert not (tmp_path / "runs" / "run").exists(), "a run that cannot start leaves nothing behind"


def test_the_command_names_a_folder_to_find_and_random_weights(shapes_cache: Path) -> None:
    manifest = featcache.open(shapes_cache).manifest
    spec = manifest.features["tiny@5"]
    drawn = replace(spec, name="dinov2-b@11", provenance={"weights": "random", "seed": 3})
    dataset = replace(manifest.dataset, source="folder my photos")
    manifest = replace(manifest, dataset=dataset, features={**manifest.features, "dinov2-b@11": drawn})
    cache: Any = SimpleNamespace(path="c", manifest=manifest)
    command = build_command(cache, ["dinov2-b@9", "dinov2-b@11"])
    expected = ["--encoder", "dinov2-b@9,11", "--random-weights", "3", "--data", "/path/to/my photos"]
    assert shlex.split(command.splitlines()[1])[4:] == expected


@pytest.mark.slow
@pytest.mark.usefixtures("nano")
def test_the_printed_command_works(
    shapes_cache: Path, tmp_path: Path, cli: Callable[..., CompletedProcess[str]]
) -> None:
    cache = without(shapes_cache, tmp_path / "less", "vae/G3")
    run = settings(cache, "ahpa")
    with pytest.raises(CacheError) as error:
        train(run, resume=False, watcher=Listener(), root=tmp_path / "runs")
    done = cli(*build_words(error.value))
    assert done.returncode == 0, done.stderr
    assert np.array_equal(featcache.open(cache).labels(), featcache.open(shapes_cache).labels())
    train(run, resume=False, watcher=Listener(), root=tmp_path / "runs")


def test_the_newest_fitting_cache_is_found(shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = replace(settings("none named", "ahpa", model="SiT-Ti/2"), cache=None)
    with pytest.raises(CacheError, match="no cache below") as error:
        find_cache(config)
    assert build_words(error.value) == ["featcache", "build", "--vae-levels", "G3,G4"]
    Path("caches").mkdir()
    shutil.copytree(shapes_cache, "caches/old")
    without(shapes_cache, Path("caches/new"), "vae/G4")
    for age, name in enumerate(("new", "old")):
        os.utime(f"caches/{name}/zarr.json", (2_000_000_000 - age, 2_000_000_000 - age))
    assert find_cache(config).path == "caches/old"
    shutil.rmtree("caches/old")
    with pytest.raises(CacheError, match="none of the 1 caches") as error:
        find_cache(config)
    assert build_words(error.value)[2:4] == ["--into", "caches/new"]


def test_what_is_derived_of_tokens_is_added_by_derive(shapes_cache: Path) -> None:
    cache = featcache.open(shapes_cache)
    lines = build_command(cache, ["tiny@5", "tiny@5.pca4", "<encoder>@<last>.pca8"]).splitlines()
    derive = f"featcache derive {shapes_cache} --feature tiny@5 --pca"
    assert [line.strip() for line in lines[1:]] == [f"{derive} 4", f"{derive} 8"]
    assert build_command(cache, ["tiny@5.pca4"]).splitlines()[1:] == [f"  {derive} 4"], "its tokens are there"
    lines = build_command(cache, ["tiny@1.rest", "tiny@5.cls"]).splitlines()
    assert lines[1].strip() == f"featcache build --into {shapes_cache} --encoder tiny@1,5.cls"
    assert lines[2].strip() == f"featcache derive {shapes_cache} --feature tiny@1 --pca 8 --name tiny@1.rest"


def test_build_lines_name_encoders_with_their_layers_once() -> None:
    wanted = ["dinov2-b@9", "dinov2-b@11", "vae/G4", "vae/G3", "clip-l@23"]
    assert build_line("caches/x", wanted) == (
        "featcache build --into caches/x --encoder dinov2-b@9,11 --encoder clip-l@23 --vae-levels G3,G4"
    )
    assert build_line(None, ["<encoder>@<last>"]) == "featcache build --encoder dinov2-b"
    assert build_line(None, ["<encoder>@<texture>", "<encoder>@<last>"]) == "featcache build --encoder dinov2-b@9,11"


def test_keys_of_any_samples(shapes_cache: Path) -> None:
    cache = featcache.open(shapes_cache)
    every = cache.keys()
    assert sample_keys(cache, np.array([5, 0, 23, 5])) == [every[5], every[0], every[23], every[5]]


def test_keys_that_are_no_utf8_keep_their_bytes() -> None:
    """They go into ``diverged.json``: two images must not get one name."""
    stored = {"key": np.array([[0xE9, 0x61, 0], [0xE8, 0x61, 0]], np.uint8)}
    reader = SimpleNamespace(allocate=lambda n: stored, read=lambda indices, out: None)
    cache: Any = SimpleNamespace(reader=lambda names: nullcontext(reader))
    assert sample_keys(cache, np.array([0, 1])) == ["\\xe9a", "\\xe8a"]


def type_in(words: list[str]) -> None:
    """A featcache command, run by its own command line."""
    assert words[0] == "featcache"
    done = CliRunner().invoke(featcache_app, words[1:])
    assert done.exit_code == 0, done.exception


def test_lines_for_what_is_derived_and_for_class_tokens() -> None:
    derive = "featcache derive {} --feature {} --pca {}"
    assert build_line("caches/x", ["dinov2-b-reg@11.pca8", "dinov2-b-reg@11"]).splitlines() == [
        "featcache build --into caches/x --encoder dinov2-b-reg@11",
        derive.format("caches/x", "dinov2-b-reg@11", 8),
    ]
    open_names = ["<encoder>@<last>.pca8", "<encoder>@<last>"]
    assert build_line(None, open_names, resolution=512).splitlines() == [
        "featcache build --resolution 512 --encoder dinov2-b@11",
        derive.format("CACHE", "dinov2-b@11", 8),
    ]
    assert build_line(None, ["<encoder>@<last>", "<encoder>@<last>.cls"]) == (
        "featcache build --encoder dinov2-b@11,11.cls"
    )
    both = build_line("c d", ["dinov2-b@11.pca4", "clip-l@23.mine"]).splitlines()
    assert both[1:] == [
        derive.format("'c d'", "dinov2-b@11", 4),
        derive.format("'c d'", "clip-l@23", 8) + " --name clip-l@23.mine",
    ]


def test_no_cache_at_all_gets_both_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = replace(settings("none named", model="SiT-Ti/2"), cache=None, method="redi+repa")
    with pytest.raises(CacheError, match="no cache below") as error:
        find_cache(config)
    assert (error.value.remedy or "").splitlines() == [
        "Build one:",
        "  featcache build --encoder dinov2-b@11",
        "  featcache derive CACHE --feature dinov2-b@11 --pca 8",
    ]
    with pytest.raises(CacheError) as error:
        find_cache(replace(config, method="reg"))
    assert (error.value.remedy or "").splitlines()[1:] == ["  featcache build --encoder dinov2-b@11,11.cls"]


@pytest.mark.parametrize("method", ["none", "ahpa", "repa", "sra2"])
def test_who_has_nothing_at_hand_is_told_what_comes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The line works as it is typed, and what it builds is found and fits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEATCACHE_DATA", raising=False)
    config = replace(settings("none named", method, model="SiT-Ti/2"), cache=None)
    with pytest.raises(CacheError, match="no cache below") as error:
        find_cache(config)
    *_, said, line = (error.value.remedy or "").splitlines()
    assert said == "or, of images and encoders that come with it:"
    with pytest.raises(CacheError) as larger:
        find_cache(replace(config, resolution=512))
    assert "that come with it" not in str(larger.value.remedy), "it is of 64 pixels"
    words = line.strip().replace("--limit 1000", "--limit 8").split()
    assert CliRunner().invoke(featcache_app, words[1:]).exit_code == 0
    missing_features(config, find_cache(config))


def test_streams_of_one_s_own_are_among_what_is_to_be_built(
    shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether there is no cache, or one that lacks them, found or named; together with what the method reads."""
    monkeypatch.chdir(tmp_path)
    streams: dict[str, Any] = {"tiny@5.cls": {}, "tiny@2.pca4": {}}
    config = replace(settings("none named", "ahpa", model="SiT-Ti/2", streams=streams), cache=None)

    def lines(config: RunConfig) -> list[str]:
        with pytest.raises(CacheError) as error:
            missing_features(config, find_cache(config))
        return [line.strip() for line in (error.value.remedy or "").splitlines()[1:]]

    derive = "featcache derive {} --feature tiny@2 --pca 4"
    assert lines(config) == ["featcache build --encoder tiny@2,5.cls --vae-levels G3,G4", derive.format("CACHE")]
    Path("caches").mkdir()
    without(shapes_cache, Path("caches/one"), "vae/G4", "tiny@2")
    both = "featcache build --into caches/one --encoder tiny@2,5.cls --vae-levels G3,G4 --vae tiny"
    assert lines(config) == lines(replace(config, cache="caches/one")) == [both, derive.format("caches/one")]
    alone = replace(config, method="none", align={})
    assert lines(alone) == ["featcache build --into caches/one --encoder tiny@2,5.cls", derive.format("caches/one")]
    for line in lines(config):
        type_in(shlex.split(line))
    assert find_cache(config).path == "caches/one"
    with pytest.raises(CacheError, match="does not hold nothing") as error:
        find_cache(replace(alone, streams={"nothing": {}}))
    assert "What can be" in str(error.value.remedy) and "featcache build" not in str(error.value.remedy)


def test_the_newest_cache_without_components_gets_the_derive_line(
    shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("caches").mkdir()
    shutil.copytree(shapes_cache, "caches/one")
    config = replace(settings("none named", model="SiT-Ti/2"), cache=None, method="redi")
    with pytest.raises(CacheError, match="none of the 1 caches") as error:
        find_cache(config)
    assert (error.value.remedy or "").splitlines()[1:] == ["  featcache derive caches/one --feature tiny@5 --pca 8"]
