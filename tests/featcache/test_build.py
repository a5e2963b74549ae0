"""The build as a user types it, and as a function: resuming, adding, bad images, bad input."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from typer.testing import CliRunner

import featcache
from featcache.build.prepare import derived_name
from featcache.build.request import BuildRequest
from featcache.build.run import build
from featcache.cli import app
from featcache.encoders import EncoderChoice, parse_encoders, parse_levels
from featcache.encoders.base import WeightsSource
from featcache.encoders.tiny import load_tiny_vae
from featcache.encoders.vision import VisionEncoder
from featcache.errors import CacheError, UserError
from featcache.inspect import contact_sheet, find_source, images_of, pca_rgb, read_feature
from featcache.progress import Quiet
from featcache.read.statistics import layer_statistics
from featcache.sources.base import sample_order
from featcache.sources.open import find_data, open_source
from featcache.sources.pixels import center_crop
from featcache.sources.remembered import recall, remember
from tests.featcache.store_helpers import tree_digest
from tests.told import Told

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def request(out: Path | None, **kw: object) -> BuildRequest:
    base = BuildRequest(
        data="shapes", encoders=(EncoderChoice(name="tiny"),), limit=20, batch_size=4, shard_size=8, out=out, workers=2
    )
    return replace(base, **kw)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("caches") / "shapes"
    build(request(path), Quiet())
    return path


def test_tiny_caches_what_every_method_needs(cache_path: Path) -> None:
    cache = featcache.open(cache_path)
    assert len(cache) == 20
    assert {"vae/moments", "vae/G1", "vae/G2", "vae/G3", "vae/G4", "label", "key", "content"} <= set(
        cache.manifest.features
    )
    assert len([f for f in cache.manifest.features if f.startswith("tiny@")]) >= 2


def test_stored_features_equal_a_direct_encoding(cache_path: Path) -> None:
    """Independent path: draw the image again, run diffusers' own encode and hooks of our own, compare."""
    cache = featcache.open(cache_path)
    order = sample_order(20, seed=0)
    source = open_source("shapes", resolution=64, limit=20)
    indices = [0, 7, 19]
    pixels = np.stack([source.load(int(order[i]), 64)[0] for i in indices])
    assert np.array_equal(images_of(cache, None, indices), pixels)
    assert cache.labels()[indices].tolist() == [source.label(int(order[i])) for i in indices]
    assert cache.keys(7, 8) == [source.key(int(order[7]))]

    vae = load_tiny_vae()
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    seen: dict[str, torch.Tensor] = {}
    vae.encoder.mid_block.attentions[0].register_forward_hook(lambda _m, _i, out: seen.update(attn=out))
    with torch.no_grad():
        expected = vae.encode(x).latent_dist.parameters.numpy()
    moments = read_feature(cache, "vae/moments", indices)
    assert np.abs(moments - expected).max() < 2e-3 * max(1.0, np.abs(expected).max())  # fp16 storage

    grid = seen["attn"].reshape(3, -1, 4, 2, 4, 2).mean(dim=(3, 5))  # bilinear by exactly 2 is a 2x2 mean
    tokens = grid.flatten(2).transpose(1, 2).numpy()
    stored = read_feature(cache, "vae/G4", indices)[:, 2]  # down3.res1, mid.res0, mid.attn, mid.res1
    step = np.abs(tokens).max(axis=-1, keepdims=True) / 127
    assert (np.abs(stored - tokens) <= 0.51 * step + 1e-4).all()  # int8: half a quantisation step


def test_build_again_does_nothing(cache_path: Path) -> None:
    before = tree_digest(cache_path)
    result = build(request(cache_path), Quiet())
    assert result.encoded == 0
    assert tree_digest(cache_path) == before


def test_adding_features_leaves_the_rest_untouched(tmp_path: Path) -> None:
    path = tmp_path / "grown"
    build(request(path, encoders=(), vae="tiny", levels=("G4",)), Quiet())
    before = tree_digest(path)
    build(request(None, into=path, encoders=(EncoderChoice(name="tiny", layers=(5,)),)), Quiet())
    after = tree_digest(path)
    assert {k: v for k, v in after.items() if k in before and k != "zarr.json"} == {
        k: v for k, v in before.items() if k != "zarr.json"
    }
    assert "tiny@5" in featcache.open(path).manifest.features
    with pytest.raises(CacheError, match="64 px"):
        build(request(None, into=path, resolution=128), Quiet())
    with pytest.raises(CacheError, match="not the images"):
        build(request(None, into=path, data="shapes:7", encoders=(EncoderChoice(name="tiny", layers=(4,)),)), Quiet())


def test_adding_takes_images_vae_and_number_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cache knows need not be typed again: a second call names only the new features."""
    shapes = tmp_path / "shapes"
    build(request(shapes, encoders=(), vae="tiny", levels=("G4",)), Quiet())
    build(BuildRequest(data=find_data(None, into=shapes), into=shapes, levels=("G3",)), Quiet())
    folder = image_folder(tmp_path / "data", 6)
    photos = tmp_path / "photos"
    build(request(photos, data=str(folder), encoders=(), vae="tiny", resolution=32, limit=4), Quiet())
    build(BuildRequest(data=str(folder), into=photos, levels=("G3",)), Quiet())
    for path in (shapes, photos):
        manifest = featcache.open(path).manifest
        level, moments = manifest.features["vae/G3"].provenance, manifest.features["vae/moments"].provenance
        assert level["sha256"] == moments["sha256"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEATCACHE_DATA", raising=False)
    with pytest.raises(UserError, match="no images to encode"):
        find_data(None, into=photos)


def test_a_changed_image_is_noticed_when_features_are_added(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", 6)
    path = tmp_path / "cache"
    build(request(path, data=str(folder), encoders=(), vae="tiny", resolution=32, limit=None), Quiet())
    victim = folder / "b/3.png"
    with Image.open(victim) as image:
        flipped = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    size = victim.stat().st_size
    flipped.save(victim)
    victim.write_bytes(victim.read_bytes().ljust(size, b"\0")[: max(size, victim.stat().st_size)])
    if victim.stat().st_size != size:
        pytest.fail("the changed file must keep its size for this test")
    with pytest.raises(CacheError, match="changed"):
        build(
            request(None, into=path, data=str(folder), encoders=(EncoderChoice(name="tiny"),), limit=None),
            Quiet(),
        )


def test_what_is_no_image_is_recorded_alike_in_every_build(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", 3)
    (folder / "b/text.jpg").write_text("no picture")
    digests = []
    for name in ("one", "two"):
        ask = request(tmp_path / name, data=str(folder), encoders=(), vae="tiny", resolution=32, limit=None)
        build(replace(ask, on_bad_image="skip"), Quiet())
        digests.append(tree_digest(tmp_path / name))
    assert digests[0] == digests[1]
    (skipped,) = featcache.open(tmp_path / "one").manifest.skipped
    assert "not an image" in skipped.reason


def image_folder(root: Path, count: int) -> Path:
    rng = np.random.default_rng(1)
    for i in range(count):
        folder = root / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((40, 48, 3), np.uint8)
        pixels[:] = rng.integers(0, 256, (1, 48, 1))
        pixels[i : i + 4] = 255
        Image.fromarray(pixels).save(folder / f"{i}.png", compress_level=0)
    return root


def test_bad_image_fails_by_name_or_is_skipped_and_recorded(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", 7)
    bad = folder / "b/broken.jpg"
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((90, 90, 3), np.uint8)).save(buffer, "JPEG")
    bad.write_bytes(buffer.getvalue()[:300])
    ask = request(
        tmp_path / "cache",
        data=str(folder),
        encoders=(),
        vae="tiny",
        resolution=32,
        limit=None,
        shard_size=3,
        batch_size=2,
    )
    with pytest.raises(UserError, match=r"b/broken\.jpg"):
        build(ask, Quiet())
    progress = Told()
    result = build(replace(ask, on_bad_image="skip"), progress)
    assert result.skipped == ("b/broken.jpg",)
    assert any("b/broken.jpg" in text for text in progress.notes)
    cache = featcache.open(tmp_path / "cache")
    assert len(cache) == 7
    assert [s.key for s in cache.manifest.skipped] == ["b/broken.jpg"]
    assert sorted(cache.keys()) == sorted(f"{'ab'[i % 2]}/{i}.png" for i in range(7))
    for i, key in enumerate(cache.keys()):
        assert cache.labels()[i] == "ab".index(key[0])
        with Image.open(folder / key) as image:
            assert np.array_equal(images_of(cache, str(folder), [i])[0], center_crop(image.convert("RGB"), 32))
    build(
        request(None, into=tmp_path / "cache", data=str(folder), encoders=(EncoderChoice(name="tiny"),), limit=None),
        Quiet(),
    )
    assert np.isfinite(read_feature(featcache.open(tmp_path / "cache"), "tiny@5", range(7))).all()


def test_flip_caches_the_mirror_image_as_second_view(tmp_path: Path) -> None:
    build(
        request(tmp_path / "f", flip=True, limit=4, moments_codec="fp32", levels_codec="fp32", tokens_codec="fp32"),
        Quiet(),
    )
    cache = featcache.open(tmp_path / "f")
    encoder = VisionEncoder("tiny", (5,), WeightsSource(), resolution=64)
    pixels = torch.from_numpy(images_of(cache, None, range(4))).permute(0, 3, 1, 2)
    with cache.reader(["tiny@5"]) as reader:
        out = reader.allocate(4)
        reader.read(range(4), out)
    assert out["tiny@5"].shape[1] == 2
    assert np.allclose(out["tiny@5"][:, 0], encoder(pixels)["tiny@5"].numpy(), atol=1e-4)
    assert np.allclose(out["tiny@5"][:, 1], encoder(pixels.flip(-1))["tiny@5"].numpy(), atol=1e-4)


def test_names_are_derived_from_what_is_built(cache_path: Path) -> None:
    manifest = featcache.open(cache_path).manifest
    specs = list(manifest.features.values())
    assert derived_name(manifest.dataset, specs).startswith("shapes-64-tiny-G1-G2-G3-G4-tiny@")


def test_parsing_of_encoders_and_levels() -> None:
    assert parse_encoders(["dinov2-b@9,11"]) == (EncoderChoice(name="dinov2-b", layers=(9, 11)),)
    assert parse_encoders(["dinov2-b@9,11,tiny"]) == (
        EncoderChoice(name="dinov2-b", layers=(9, 11)),
        EncoderChoice(name="tiny"),
    )
    assert parse_levels("g3,G4") == ("G3", "G4")
    for wrong in ("dinov2-b@x", "@3", "tiny,tiny"):
        with pytest.raises(UserError):
            parse_encoders([wrong])


def test_pca_colours_follow_the_main_direction() -> None:
    tokens = np.zeros((1, 16, 8))
    tokens[0, :, 3] = np.arange(16)
    colours = pca_rgb(tokens)
    red = colours[0, ..., 0].reshape(-1).astype(int)
    assert (np.diff(red) >= 0).all()
    assert red[0] == 0
    assert red[-1] == 255


def test_contact_sheet_shows_every_layer(cache_path: Path) -> None:
    cache = featcache.open(cache_path)
    sheet = contact_sheet(cache, count=2)
    layers = 15 + len([f for f in cache.manifest.features if "@" in f])
    assert layers * 64 < sheet.width < 1600, "tiles of the images' 64 pixels"
    assert np.asarray(sheet).std() > 10


def test_wide_sheets_go_on_below(cache_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = featcache.open(cache_path)
    whole = contact_sheet(cache, count=2)
    monkeypatch.setattr("featcache.inspect.WIDEST", 700)
    folded = contact_sheet(cache, count=2)
    assert folded.width < 800 and folded.height == 3 * whole.height


@pytest.mark.parametrize(
    ("name", "shown"),
    [("goldfish", "goldfish"), ("ж-птицы", "ж-птицы"), ("\ue000\ue001", "class 3"), ("a" * 900, "aaa")],
)
def test_class_names_are_drawn_in_letters_or_by_number(
    cache_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, shown: str
) -> None:
    """Letters that no font has were empty boxes."""
    drawn: list[str] = []
    cache = featcache.open(cache_path)
    names = tuple(name for _ in cache.manifest.dataset.class_names)
    cache.manifest = replace(cache.manifest, dataset=replace(cache.manifest.dataset, class_names=names))
    real = ImageDraw.ImageDraw.text

    def text(self: Any, at: Any, shown: str, **how: Any) -> None:
        drawn.append(shown)
        real(self, at, shown, **how)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    contact_sheet(cache, count=1)
    expected = f"class {cache.labels()[0]}" if shown.startswith("class") else shown
    assert any(line.startswith(expected) for line in drawn)
    assert all(len(line) < 40 for line in drawn)
    assert "\ue000" not in "".join(drawn)


def test_noise_is_not_decoded(cache_path: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents of random weights, and no images at hand: the layers alone are drawn, and why is said."""
    folder = tmp_path / "photographs" / "a"
    folder.mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (64, 64), (60 * i, 0, 0)).save(folder / f"{i}.png")
    words = ("--vae", "sd-ft-ema", "--vae-levels", "G1", "--random-weights", "0", "--resolution", "64")
    monkeypatch.delenv("FEATCACHE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    built = cli("featcache", "build", "--data", "photographs", "--out", "c", "--no-remember", *words)
    assert built.returncode == 0 and "images: 4 of 1 class from folder photographs" in built.stdout, built.stderr
    looked = cli("featcache", "inspect", "c")
    assert looked.returncode == 0 and "to noise" in looked.stdout and "decoding" not in looked.stdout, looked.stderr
    assert (tmp_path / "home/featcache/pictures/c.png").exists() and not list(tmp_path.glob("*.png"))
    seen = cli("featcache", "inspect", "c", "--data", "photographs")
    assert "reading images" in seen.stdout and "to noise" not in seen.stdout


@pytest.mark.parametrize("data", ["https://me:secret@host/x.tar", "s3://bucket/x.tar?X-Amz-Signature=abc", "shapes"])
def test_secrets_are_not_remembered(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATCACHE_PLACES", str(tmp_path))
    remember("ab" * 32, data)
    assert recall("ab" * 32) is None and not list(tmp_path.rglob("*"))


def test_where_images_lay_is_remembered_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEATCACHE_DATA", raising=False)
    monkeypatch.setenv("FEATCACHE_PLACES", str(tmp_path / "places"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photographs/a").mkdir(parents=True)
    Image.new("RGB", (64, 64), (60, 0, 0)).save(tmp_path / "photographs/a/1.png")
    words = ["build", "--data", "photographs", "--encoder", "tiny", "--vae", "tiny", "--resolution", "64", "--out", "c"]
    assert CliRunner().invoke(app, words).exit_code == 0
    cache = featcache.open(tmp_path / "c")
    assert "photographs/" not in (tmp_path / "c/zarr.json").read_text(), "the cache itself does not say"
    monkeypatch.chdir("/")
    assert recall(cache.manifest.dataset.fingerprint) == str(tmp_path / "photographs")
    assert find_source(cache, None) is not None
    Image.effect_noise((64, 64), 50).save(tmp_path / "photographs/a/1.png")
    assert find_source(cache, None) is None, "they are others now"
    remember("../escape", "/somewhere")
    assert not (tmp_path / "escape").exists() and recall("../escape") is None


def test_inspect_prints_what_each_layer_is_worth(cache_path: Path, tmp_path: Path, cli: Cli) -> None:
    printed = cli("featcache", "inspect", str(cache_path), "--out", str(tmp_path / "c.png"))
    assert printed.returncode == 0, printed.stderr
    assert (tmp_path / "c.png").exists() and "decoded instead" not in printed.stdout
    rows = {line.rsplit(maxsplit=5)[0].strip(): line.split() for line in printed.stdout.splitlines()}
    found = layer_statistics(featcache.open(cache_path), [f"vae/G{g}" for g in (1, 2, 3, 4)])["vae/G4"]
    *_, channels, rms, share, rank, cosine = rows["vae/G4 mid.res1"]
    assert int(channels) == found.mean.shape[1]
    figures = (found.rms[3], found.mean_share[3], found.effective_rank[3], found.neighbour[3])
    for text, value, digits in zip((rms, share, rank, cosine), figures, (None, 2, 1, 4)):
        assert text == (f"{value:.3g}" if digits is None else f"{value:.{digits}f}")


def test_levels_are_averaged_over_each_token_on_request(tmp_path: Path) -> None:
    """Adaptive average pooling of the layers' own outputs, by hooks of our own."""
    path = build(
        request(tmp_path / "c", encoders=(), vae="tiny", levels=("G2",), vae_resampling="average"), Quiet()
    ).path
    cache = featcache.open(path)
    outputs = []
    vae = load_tiny_vae()
    stage: Any = vae.encoder.down_blocks[1]
    for module in (*stage.resnets, stage.downsamplers[0]):
        module.register_forward_hook(lambda _m, _i, out: outputs.append(out))
    pixels = torch.from_numpy(images_of(cache, None, range(4))).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        vae.encode(pixels)
    side = cache.manifest.dataset.grid
    stored = read_feature(cache, "vae/G2", range(4))
    for i, output in enumerate(outputs):
        r = output.shape[-1] // side
        means = output.unflatten(2, (side, r)).unflatten(4, (side, r)).mean((3, 5)).flatten(2).mT.numpy()
        np.testing.assert_allclose(stored[:, i], means, atol=0.01 * np.abs(means).max())
    bilinear = torch.nn.functional.interpolate(outputs[0], size=(side, side), mode="bilinear").flatten(2).mT.numpy()
    assert np.abs(stored[:, 0] - bilinear).max() > 0.1 * np.abs(bilinear).max(), "the two differ here"


def test_one_cache_has_levels_of_one_resampling(tmp_path: Path) -> None:
    out = request(tmp_path / "c", encoders=(), vae="tiny", levels=("G3",), vae_resampling="average")
    path = build(out, Quiet()).path
    more = request(None, encoders=(), vae="tiny", levels=("G4",), into=path)
    with pytest.raises(CacheError, match="resampled by 'average'"):
        build(replace(more, vae_resampling="bilinear"), Quiet())
    build(more, Quiet())
    features = featcache.open(path).manifest.features
    assert {features[f"vae/{g}"].provenance["resampling"] for g in ("G3", "G4")} == {"adaptive average pooling"}


CASES = [
    (("--data", "nowhere", "--encoder", "tiny"), "nowhere"),
    (("--data", "shapes", "--encoder", "dinov9"), "dinov2-b"),
    (("--data", "shapes", "--encoder", "tiny", "--vae-levels", "G7"), "G1,G2,G3,G4"),
    (("--data", "shapes", "--encoder", "tiny@77"), "no layer 77"),
    (("--data", "shapes", "--encoder", "tiny", "--resolution", "100"), "multiple of 32"),
    (("--data", "shapes", "--encoder", "tiny", "--resolution", "256x384"), "square"),
    (("--data", "shapes", "--encoder", "tiny", "--precision", "fp8"), "bf16"),
    (("--data", "shapes", "--encoder", "tiny", "--final-norm", "some"), "auto, all"),
    (("--data", "shapes", "--vae", "tiny", "--encoder", "absent.py:net"), "absent.py"),
    (("--data", "shapes", "--encoder", "tiny", "--vae", "nowhere"), "config.json"),
    (("--data", "shapes", "--encoder", "tiny", "--limit", "0"), "--limit"),
    (("--data", "shapes", "--encoder", "tiny", "--on-bad-image", "ignore"), "fail, skip"),
    (("--encoder", "tiny"), "--data"),
    (("--data", "shapes", "--encoder", "tiny", "--decode", "gif"), "pil, turbo"),
    (("--data", "shapes", "--encoder", "tiny", "--schedule", "random"), "dynamic, static"),
    (("--data", "shapes", "--encoder", "tiny", "--text", "tiny", "--text-codec", "int3"), "int3"),
    (("--data", "shapes", "--encoder", "tiny", "--caption-key", "alt"), "--text clip-l"),
    (("--data", "shapes", "--into", "nocache", "--encoder", "tiny"), "nocache"),
    (("--data", "shapes", "--encoder", "tiny", "--nonsense"), "--nonsense"),
]


@pytest.mark.parametrize(("words", "expected"), CASES, ids=[" ".join(c[0]) for c in CASES])
def test_bad_input_is_one_paragraph_and_exit_code_2(words: tuple[str, ...], expected: str) -> None:
    from featcache.cli import app
    from featcache.console import run_app

    err, out = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, ["featcache", "build", *words]
    environment = os.environ.pop("FEATCACHE_DATA", None)
    try:
        from featcache import console

        saved, console.errors = console.errors, type(console.errors)(file=err)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run_app(app)
        console.errors = saved
    finally:
        sys.argv = argv
        if environment is not None:
            os.environ["FEATCACHE_DATA"] = environment
    text = err.getvalue()
    assert code == 2
    assert expected in text
    assert "Traceback" not in text


def test_ctrl_c_and_kill_leave_a_cache_that_the_same_command_completes(
    tmp_path: Path, cache_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featcache.cli import app
    from featcache.console import run_app

    words = ["featcache", "build", "--data", "shapes", "--encoder", "tiny", "--limit", "20"]
    words += ["--batch-size", "4", "--shard-size", "8", "--workers", "2", "--out", "c"]
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("fork_cli.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    shards, errors = tmp_path / "c/vae/moments", tmp_path / "errors"
    for number in (signal.SIGKILL, signal.SIGINT):
        before = len(list(shards.glob("c.*")))
        server.stdin.write(json.dumps({"argv": words, "folder": str(tmp_path), "errors": str(errors)}) + "\n")
        server.stdin.flush()
        child = int(server.stdout.readline())
        deadline = time.monotonic() + 120
        while len(list(shards.glob("c.*"))) == before and time.monotonic() < deadline:
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)
        status = int(server.stdout.readline())
        if number == signal.SIGKILL:
            assert status == -signal.SIGKILL
        elif status:
            assert status == 130
        assert "Traceback" not in errors.read_text()
    server.stdin.close()
    assert server.wait(timeout=60) == 0
    # In this process: it has imported already what takes a new one seconds.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", words)
    assert run_app(app) == 0
    assert tree_digest(tmp_path / "c") == tree_digest(cache_path)


def test_help_is_quick_and_lists_the_commands(cli: Cli) -> None:
    took = []
    for program in ("featcache", "trainer"):
        start = time.monotonic()
        result = cli(program, "--help")
        took.append(time.monotonic() - start)
        assert result.returncode == 0
        assert "build" in result.stdout or "run" in result.stdout
    code = "import sys, featcache.cli, trainer.cli; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
