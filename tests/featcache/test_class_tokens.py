"""Class tokens: what is typed, what is cached, and that nothing takes them for patch tokens."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import featcache
from featcache.build.estimate import estimate
from featcache.build.prepare import derived_name
from featcache.build.repair import repair_shards
from featcache.build.request import BuildRequest
from featcache.build.run import build
from featcache.cli import app
from featcache.console import run_app
from featcache.encoders import EncoderChoice, parse_encoders
from featcache.encoders.base import WeightsSource
from featcache.encoders.custom import UserEncoder
from featcache.encoders.tiny import load_tiny_vit
from featcache.encoders.vision import VisionEncoder
from featcache.errors import UserError
from featcache.feature_names import LayerFeature, is_class_token, is_tokens, layer_feature
from featcache.inspect import contact_sheet, has_tokens, read_feature
from featcache.progress import Quiet
from featcache.read.normalization import compute
from featcache.share.catalogue import encoders
from featcache.share.convert import convert
from featcache.share.transfer import pull
from featcache.share.verify import verify
from tests.featcache.store_helpers import tree
from trainer.align.features import encoder_layers
from trainer.analyze.subject import Subject
from trainer.runs.cache import build_line


def pixels(count: int = 2, side: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


# What is typed, and what names say


@pytest.mark.parametrize(
    ("typed", "choices"),
    [
        ("dinov2-b@11.cls", [EncoderChoice(name="dinov2-b", class_tokens=(11,))]),
        ("dinov2-b@11,11.cls", [EncoderChoice(name="dinov2-b", layers=(11,), class_tokens=(11,))]),
        (
            "dinov2-b@9.cls,11,tiny,tiny2@3,5.cls",
            [
                EncoderChoice(name="dinov2-b", layers=(11,), class_tokens=(9,)),
                EncoderChoice(name="tiny"),
                EncoderChoice(name="tiny2", layers=(3,), class_tokens=(5,)),
            ],
        ),
        ("a@b/my.py:net@0,1.cls", [EncoderChoice(name="a@b/my.py:net", layers=(0,), class_tokens=(1,))]),
    ],
)
def test_layers_and_class_tokens_are_typed_in_one_list(typed: str, choices: list[EncoderChoice]) -> None:
    assert list(parse_encoders([typed])) == choices
    assert parse_encoders([str(choice) for choice in choices]) == tuple(choices)


@pytest.mark.parametrize("typed", ["dinov2-b@cls", "dinov2-b@11.reg", "dinov2-b@.cls", "dinov2-b@-1.cls", "@11.cls"])
def test_other_spellings_are_refused_by_one_that_works(typed: str) -> None:
    with pytest.raises(UserError, match="not an encoder or a layer") as told:
        parse_encoders([typed])
    assert parse_encoders([str(told.value.remedy).rpartition("--encoder ")[2].split()[0]])


@given(st.text("abz@./09-", max_size=12))
def test_a_name_means_at_most_one_thing(name: str) -> None:
    found = layer_feature(name)
    assert [is_tokens(name), is_class_token(name), found is None].count(True) <= 1
    if found is not None:
        assert layer_feature(str(found)) == found


def test_names() -> None:
    assert layer_feature("dinov2-b@11") == LayerFeature(encoder="dinov2-b", layer=11)
    assert is_class_token("dinov2-b@11.cls") and not is_tokens("dinov2-b@11.cls")
    derived = layer_feature("dinov2-b@11.pca8")
    assert derived is not None and not derived.is_tokens and not derived.is_class_token
    for other in ("label", "vae/moments", "vae/G3", "text/clip-l.pooled", "x/y@3", "tiny@", "tiny@x", "tiny@3x"):
        assert layer_feature(other) is None


# What encoders give


@pytest.mark.parametrize("name", ["dinov2-s", "dinov2-s-reg", "dinov3-s"])
def test_class_token_is_the_first_of_the_same_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = WeightsSource(random_seed=0)
    encoder = VisionEncoder(name, (11,), weights, resolution=64, class_tokens=(11, 9))
    plain = VisionEncoder(name, (11,), weights, resolution=64)
    assert encoder.shapes == {f"{name}@11": (16, 384), f"{name}@9.cls": (384,), f"{name}@11.cls": (384,)}
    calls = []
    block = encoder.module.blocks[0]
    block.register_forward_hook(lambda *_: calls.append(1))
    made = encoder(pixels())
    assert len(calls) == 1
    model, x = encoder.module, encoder.prepare(pixels())
    with torch.no_grad():
        full = model.forward_features(x)  # after the final norm: x_norm_clstoken, registers, x_norm_patchtokens
        inner = model.forward_intermediates(x, indices=[9], norm=True, return_prefix_tokens=True, output_fmt="NLC")
    torch.testing.assert_close(made[f"{name}@11.cls"], full[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made[f"{name}@9.cls"], inner[1][0][1][:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made[f"{name}@11"], full[:, model.num_prefix_tokens :], atol=1e-5, rtol=1e-5)
    assert torch.equal(made[f"{name}@11"], plain(pixels())[f"{name}@11"])
    assert encoder.provenance[f"{name}@11.cls"]["final_norm"] is True
    assert encoder.provenance[f"{name}@11.cls"]["sha256"] == plain.provenance[f"{name}@11"]["sha256"]


def test_class_token_goes_through_the_norm_where_the_patch_tokens_do() -> None:
    weights = WeightsSource(random_seed=0)
    raw = VisionEncoder("dinov2-s", (), weights, resolution=64, class_tokens=(9, 11), final_norm="last")
    made = raw(pixels())
    assert list(made) == ["dinov2-s@9.cls", "dinov2-s@11.cls"]  # no patch tokens where only these are asked for
    both = VisionEncoder("dinov2-s", (), weights, resolution=64, class_tokens=(9, 11))(pixels())
    torch.testing.assert_close(raw.module.norm(made["dinov2-s@9.cls"]), both["dinov2-s@9.cls"])
    assert torch.equal(made["dinov2-s@11.cls"], both["dinov2-s@11.cls"])
    assert [p["final_norm"] for p in raw.provenance.values()] == [False, True]


@pytest.mark.parametrize("name", ["siglip-b", "ijepa-h"])
def test_encoders_without_one_say_so_before_weights_are_looked_for(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} has no class token") as told:
        VisionEncoder(name, (), WeightsSource(), resolution=64, class_tokens=(0,))
    assert "dinov2-b," in str(told.value.remedy) and f" {name}," not in str(told.value.remedy)


CUSTOM = """
import torch
from featcache.encoders.custom import CustomEncoder

class Patches(torch.nn.Module):
    def forward(self, x):
        patches = torch.nn.functional.avg_pool2d(x, 16).flatten(2).transpose(1, 2)
        tokens = torch.cat([patches.mean(1, keepdim=True), patches], dim=1)
        return [tokens, tokens * 2]

def patches(resolution):
    return CustomEncoder(module=Patches(), mean=(0, 0, 0), std=(1, 1, 1), class_token=True)

def without(resolution):
    return CustomEncoder(module=torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten(2)), class_token=False)
"""


def test_a_users_encoder_says_that_its_first_token_is_one(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(CUSTOM)
    encoder = UserEncoder(f"{file}:patches", (0,), resolution=64, class_tokens=(1,))
    assert encoder.shapes == {"patches@0": (16, 3), "patches@1.cls": (3,)}
    made = encoder(pixels())
    mean = (pixels().double() / 255).mean(dim=(2, 3))
    torch.testing.assert_close(made["patches@1.cls"].double(), 2 * mean, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(made["patches@0"].double().mean(1), mean, atol=1e-6, rtol=1e-6)
    assert list(UserEncoder(f"{file}:patches", (), resolution=64).shapes) == ["patches@0", "patches@1"]
    with pytest.raises(UserError, match="without has no class token") as told:
        UserEncoder(f"{file}:without", (), resolution=64, class_tokens=(0,))
    assert "class_token=True" in str(told.value.remedy)


# Caches


def request(out: Path, *encoder: str, **changes: Any) -> BuildRequest:
    base = BuildRequest(
        data="shapes",
        encoders=parse_encoders(encoder),
        vae="tiny",
        levels=("G4",),
        limit=22,
        batch_size=4,
        shard_size=8,
        out=out,
        workers=1,
    )
    return replace(base, **changes)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cached") / "c"
    build(request(path, "tiny@2,5,5.cls", flip=True), Quiet())
    return path


def test_a_cache_holds_both_views_of_it_in_fp16(cached: Path) -> None:
    cache = featcache.open(cached)
    spec = cache.manifest.features["tiny@5.cls"]
    assert (spec.shape, spec.codec, spec.views, spec.basis) == ((128,), "fp16", 2, None)
    with cache.reader(["tiny@5.cls", "content"]) as reader:
        found = reader.allocate(len(cache))
        reader.read(np.arange(len(cache)), found)
    model = load_tiny_vit()
    images = torch.from_numpy(_pixels(cache)).permute(0, 3, 1, 2)
    x = (images.float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        expected = torch.stack([model.forward_features(v)[:, 0] for v in (x, x.flip(-1))], dim=1)
    torch.testing.assert_close(torch.from_numpy(found["tiny@5.cls"]).float(), expected, atol=4e-3, rtol=2e-3)


def _pixels(cache: featcache.Cache) -> np.ndarray:
    from featcache.inspect import images_of

    return images_of(cache, "shapes", range(len(cache)))


def test_added_later_it_is_the_same_and_the_tokens_stay(cached: Path, tmp_path: Path) -> None:
    path = tmp_path / "later"
    build(request(path, "tiny@2,5", flip=True), Quiet())
    before = tree(path)
    build(BuildRequest(data="shapes", into=path, encoders=parse_encoders(["tiny@5,5.cls"]), batch_size=4), Quiet())
    for name, data in tree(path).items():
        if name.startswith("tiny@5.cls/"):
            assert data == (cached / name).read_bytes(), name
        elif name != "zarr.json":
            assert data == before[name], name


def test_nothing_takes_it_for_patch_tokens(cached: Path) -> None:
    manifest = featcache.open(cached).manifest
    assert not has_tokens("tiny@5.cls", manifest.features["tiny@5.cls"].shape)
    assert encoder_layers(manifest.features) == {"tiny": [2, 5]}
    assert encoders(manifest) == ["VAE tiny", "tiny"]
    subject = Subject.__new__(Subject)
    subject.cache = featcache.open(cached)
    assert subject.token_features == ["tiny@2", "tiny@5"]
    assert contact_sheet(featcache.open(cached), data="shapes", count=1).width > 0
    name = derived_name(manifest.dataset, list(manifest.features.values()))
    assert name == "shapes-64-tiny-G4-tiny@2,5,5.cls-flip"


def test_the_command_that_provides_it(tmp_path: Path) -> None:
    line = build_line("c", ["dinov2-b@11", "dinov2-b@11.cls", "vae/G3"])
    assert line == "featcache build --into c --encoder dinov2-b@11,11.cls --vae-levels G3"
    assert build_line("c", ["dinov2-b@11.cls"]).endswith("--encoder dinov2-b@11.cls")


def test_statistics_over_channels(cached: Path) -> None:
    cache = featcache.open(cached)
    found = compute(cache, "tiny@5.cls", "channel")
    with cache.reader(["tiny@5.cls"]) as reader:
        out = reader.allocate(len(cache))
        reader.read(np.arange(len(cache)), out)
    values = out["tiny@5.cls"].astype(np.float64).reshape(-1, 128)
    np.testing.assert_allclose(found.mean, values.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.std, values.std(0), rtol=1e-5)
    with pytest.raises(UserError, match="key has the shape"):
        compute(cache, "key", "channel")


@pytest.mark.parametrize("which", [("tiny@5.cls",), ("tiny@5", "tiny@5.cls", "tiny@2")])
def test_damaged_shards_are_encoded_again(cached: Path, tmp_path: Path, which: tuple[str, ...]) -> None:
    path = tmp_path / "c"
    shutil.copytree(cached, path)
    for name in which:
        file = next((path / name).glob("c.1.*"))
        data = bytearray(file.read_bytes())
        data[5] ^= 4
        file.write_bytes(bytes(data))
    report = verify(path, remember=False)
    assert report.damaged == {name: [1] for name in which}
    repair_shards(path, report.damaged, data=None, weights_dir=None, device="cpu", progress=Quiet())
    assert tree(path) == tree(cached)


def test_it_travels_and_changes_format(cached: Path, tmp_path: Path) -> None:
    convert(cached, tmp_path / "wds", to="wds")
    assert verify(tmp_path / "wds", remember=False).ok
    damaged = tmp_path / "wds" / "00000001.tar"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    report = verify(tmp_path / "wds", remember=False)
    repair_shards(tmp_path / "wds", report.damaged, data=None, weights_dir=None, device="cpu", progress=Quiet())
    assert damaged.read_bytes() == whole
    convert(tmp_path / "wds", tmp_path / "zarr", to="zarr")
    assert tree(tmp_path / "zarr") == tree(cached)
    pull(str(cached), tmp_path / "pulled", features=["tiny@5.cls"])
    ours = read_feature(featcache.open(tmp_path / "pulled"), "tiny@5.cls", range(22))
    np.testing.assert_array_equal(ours, read_feature(featcache.open(cached), "tiny@5.cls", range(22)))


def test_a_plan_says_what_it_takes(tmp_path: Path) -> None:
    planned = estimate(request(tmp_path / "p", "dinov2-s@11.cls", levels=(), random_weights=0), measure=2)
    (spec,) = [spec for spec in planned.specs if spec.name == "dinov2-s@11.cls"]
    assert spec.bytes_per_sample == 2 * 384
    assert set(planned.fidelity["dinov2-s@11.cls"]) == {"fp32", "fp16", "bf16"}
    assert planned.fidelity["dinov2-s@11.cls"]["fp16"]["mean_cosine"] > 0.999


@pytest.mark.parametrize("codec", ["int8", "fp8", "int4"])
def test_codecs_with_scales_are_refused(codec: str) -> None:
    with pytest.raises(UserError, match=f"cls_codec = {codec!r} is not known") as told:
        BuildRequest(data="shapes", cls_codec=codec)  # type: ignore[arg-type]
    assert "fp32, fp16, bf16" in str(told.value.remedy)


def test_as_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)

    def typed(line: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", line.split())
        code = run_app(app)
        return code, "".join(capsys.readouterr())

    code, told = typed("featcache build --data shapes --limit 8 --encoder tiny@5.cls --out c")
    assert code == 0, told
    code, info = typed("featcache info c")
    assert code == 0 and "tiny@5.cls" in info and "fp16" in info and "tiny@5 " not in info
    code, told = typed("featcache build --into c --encoder siglip-b@11.cls")
    assert code == 2 and "siglip-b has no class token" in told
    code, told = typed("featcache rm c --features tiny@5.cls --yes")
    assert code == 0 and "tiny@5.cls" not in featcache.open(tmp_path / "c").manifest.features, told
