"""Planning: sizes are those of a real build, and codec figures those of the formula."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import featcache
from featcache.build.estimate import estimate
from featcache.build.fidelity import fidelity
from featcache.build.request import BuildRequest
from featcache.build.run import build
from featcache.cli import app
from featcache.console import run_app
from featcache.encoders import EncoderChoice
from featcache.encoders.base import Compute, WeightsSource
from featcache.encoders.vision import VisionEncoder
from featcache.errors import UserError
from featcache.progress import Quiet
from featcache.share.manage import cache_bytes
from featcache.sources.base import sample_order
from featcache.sources.open import open_source


@pytest.mark.parametrize("flip", [False, True])
def test_planned_bytes_are_built_bytes(tmp_path: Path, flip: bool) -> None:
    ask = BuildRequest(
        data="shapes", encoders=(EncoderChoice(name="tiny"),), limit=12, resolution=32, flip=flip, out=tmp_path / "c"
    )
    planned = estimate(ask)
    assert not (tmp_path / "c").exists(), "a plan writes nothing"
    build(ask, Quiet())
    manifest = featcache.open(tmp_path / "c").manifest
    assert {s.name for s in planned.specs} == set(manifest.features)
    index = sum(len(spec.arrays) for spec in manifest.features.values()) * (16 * manifest.shard_size + 4)
    assert planned.bytes_per_image * 12 == cache_bytes(manifest) - index
    assert planned.seconds > 0


def test_fidelity_of_int8_against_numpy() -> None:
    x = np.random.default_rng(0).normal(size=(3, 5, 64)).astype(np.float32)
    scale = np.abs(x).max(-1, keepdims=True) / 127
    y = np.round(x / scale) * scale
    cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    found = fidelity("int8", torch.from_numpy(x))
    assert found["mean_cosine"] == pytest.approx(cosine.mean(), abs=1e-6)
    assert found["worst_cosine"] == pytest.approx(cosine.min(), abs=1e-6)
    assert found["relative_error"] == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-4)
    assert found["bytes_per_image"] == 5 * (64 + 4)


def test_features_that_are_all_zero_have_no_fidelity(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = fidelity("int8", torch.zeros(2, 3, 64))
    assert found.pop("bytes_per_image") == 3 * (64 + 4)
    assert all(np.isnan(value) for value in found.values())
    # Of four images one has a caption, which is not among the two that are measured.
    keys = [f"{i}.png" for i in range(4)]
    for i, key in enumerate(keys):
        pixels = np.full((40, 40, 3), 60 * i, np.uint8)
        (tmp_path / "images/a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images/a" / key)
    captioned = keys[int(sample_order(4, seed=0)[3])]
    (tmp_path / "captions.csv").write_text(f"key,caption\na/{captioned},a cat\n")
    typed(
        *("featcache", "plan", "--data", str(tmp_path / "images"), "--vae", "tiny", "--text", "tiny"),
        *("--captions", str(tmp_path / "captions.csv"), "--resolution", "32", "--measure", "--images", "2"),
    )
    rows = capsys.readouterr().out.split("text/tiny.pooled")[-1].splitlines()
    assert any(row.split()[0] == "int8" and row.split()[-3:] == ["-"] * 3 for row in rows if row.split())


def test_rates_begin_when_the_device_is_idle_and_batches_are_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real = VisionEncoder.__call__

    def watched(self: VisionEncoder, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        events.append(f"{len(pixels)} images")
        return real(self, pixels)

    monkeypatch.setattr(VisionEncoder, "__call__", watched)
    monkeypatch.setattr("featcache.build.estimate.synchronise", lambda device: events.append(f"synchronise {device}"))
    choice = (EncoderChoice(name="tiny", layers=(5,)),)
    ask = BuildRequest(data="shapes", vae="tiny", encoders=choice, resolution=32, batch_size=2, device="cpu")
    planned = estimate(ask, measure=3)
    # The VAE's four runs are synchronised too; the encoder's are: as planned, and in each precision.
    run = ["2 images", "synchronise cpu", "2 images", "2 images"]
    assert events == ["synchronise cpu"] * 4 + run * 4
    assert planned.precision["tiny@5"]["fp32"]["relative_error"] == 0
    assert planned.rates["encode tiny"] > 0


def typed(*words: str, code: int = 0) -> None:
    """A command as typed, in this process: importing the encoders' libraries takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", list(words))
        assert run_app(app) == code


def test_as_typed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["featcache", "plan", "--data", "shapes", "--encoder", "tiny", "--text", "tiny", "--limit", "8"]
    typed(*words, "--resolution", "32", "--measure", "--images", "2")
    text = capsys.readouterr().out
    for expected in ("vae/moments", "B/s", "free on its disk", "mean cosine", "images in about", "decode (1 thread)"):
        assert expected in text
    for expected in ("tiny@5 against fp32", "text/tiny.pooled against fp32", "--precision bf16", "encode text tiny"):
        assert expected in text


@pytest.mark.parametrize(
    "words", [("--workers", "2"), ("--engine", "ray"), ("--schedule", "static"), ("--ray-workers", "2")]
)
def test_what_would_not_change_a_plan_is_no_option(words: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    typed("featcache", "plan", "--data", "shapes", "--encoder", "tiny", *words, code=2)
    assert "No such option" in capsys.readouterr().err


def test_errors_of_precisions_are_those_of_two_encodings() -> None:
    ask = BuildRequest(data="shapes", vae="tiny", encoders=(EncoderChoice(name="tiny", layers=(5,)),), resolution=64)
    planned = estimate(ask, measure=3)
    assert {"vae/moments", "tiny@5"} <= set(planned.precision)
    assert all(set(kinds) == {"fp32", "tf32", "bf16"} for kinds in planned.precision.values())
    assert planned.precision["tiny@5"]["fp32"]["relative_error"] == 0
    assert set(planned.precision_rates) == {"vae tiny", "tiny"}
    source = open_source("shapes", resolution=64)
    order = sample_order(len(source), seed=0)[:3]
    pixels = torch.from_numpy(np.stack([source.load(int(i), 64)[0] for i in order])).permute(0, 3, 1, 2)
    exact, rough = (
        VisionEncoder("tiny", (5,), WeightsSource(), resolution=64, compute=Compute(precision=kind))(pixels)["tiny@5"]
        for kind in ("fp32", "bf16")
    )
    a, b = exact.double().numpy().reshape(-1, 128), rough.double().numpy().reshape(-1, 128)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    found = planned.precision["tiny@5"]["bf16"]
    assert found["relative_error"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-6)
    assert found["mean_cosine"] == pytest.approx(cosine.mean(), abs=1e-9)
    assert found["worst_cosine"] == pytest.approx(cosine.min(), abs=1e-9)


def test_plans_refuse_what_builds_refuse() -> None:
    with pytest.raises(UserError, match="dinov2-b"):
        estimate(BuildRequest(data="shapes", encoders=(EncoderChoice(name="dinov9"),)))
    with pytest.raises(UserError, match="clip-l"):
        estimate(BuildRequest(data="shapes", vae="tiny", texts=("clip-z",)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("caches") / "plain"
    typed(*PLAIN, "--out", str(path))
    return path


PLAIN = (
    *("featcache", "build", "--data", "shapes", "--encoder", "tiny@5", "--vae", "tiny"),
    *("--limit", "9", "--resolution", "32", "--shard-size", "4"),
)


@pytest.mark.parametrize(("words", "format_name"), [(("--format", "wds"), "wds"), (("--compressor", "zstd"), "zarr")])
def test_build_in_other_formats(tmp_path: Path, plain: Path, words: tuple[str, ...], format_name: str) -> None:
    typed(*PLAIN, *words, "--out", str(tmp_path / "other"))
    caches = [featcache.open(path) for path in (plain, tmp_path / "other")]
    assert caches[1].manifest.format == format_name
    read = []
    for cache in caches:
        with cache.reader(["tiny@5", "vae/moments", "label"]) as reader:
            out = reader.allocate(9)
            reader.read(np.arange(9), out)
        read.append(out)
    assert all(np.array_equal(read[0][name], read[1][name]) for name in read[0])
