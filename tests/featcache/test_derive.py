"""Derived features: the algebra, the writing, and that the same command goes on after anything."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

import featcache
from featcache.builder import derive as room
from featcache.builder.derive import DeriveRequest, derive
from featcache.builder.repair import repair_shards
from featcache.builder.request import BuildRequest
from featcache.builder.run import build
from featcache.cli import app
from featcache.codecs import FeatureCodec
from featcache.console import run_app
from featcache.encoders import parse_encoders
from featcache.errors import CacheError, UserError
from featcache.inspect import has_tokens
from featcache.progress import Quiet
from featcache.read.components import Components, TokenMoments, standardised_components
from featcache.read.decoded import read_decoded
from featcache.read.maps import load_map, save_map
from featcache.share.convert import convert
from featcache.share.manage import remove_features
from featcache.share.transfer import pull
from featcache.share.verify import verify
from featcache.store import FeatureSpec
from featcache.store.derived import AffineMap
from featcache.store.manifest import feature_from_json
from featcache.store.writers import create_writer
from tests.featcache.store_helpers import corrupt, dataset, tree
from trainer.align.features import encoder_layers

SOURCE, NAME = "tiny@5", "tiny@5.pca4"
COUNT, T, C, K = 70, 9, 32, 4
SKIPPED = (3, 40)


def some_tokens(count: int = COUNT, seed: int = 0, views: int = 1) -> np.ndarray:
    """float32 [count, (views), T, C] that use some directions more than others, with a mean and a scale by channel."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(C, C)) * 0.8 ** np.arange(C)[:, None]
    lead = (count, views) if views > 1 else (count,)
    scale, mean = 10.0 ** np.linspace(-0.3, 0.3, C), np.linspace(-3, 3, C)
    return ((rng.normal(size=(*lead, T, C)) @ mix + mean) * scale).astype(np.float32)


def cache_of(
    path: Path,
    values: np.ndarray,
    *,
    codec: str = "int8",
    rank: int | None = None,
    views: int = 1,
    skipped: Sequence[int] = SKIPPED,
    shard_size: int = 16,
    sha256: str = "1" * 64,
    fingerprint: str = "",
) -> Path:
    """A cache of one feature, `SOURCE`."""
    basis = None
    if rank is not None:
        found = Components()
        found.add(SOURCE, values.reshape(-1, T, C), seed=0)
        basis = found.basis(SOURCE, rank)
    spec = FeatureSpec(
        name=SOURCE, shape=(T, C), codec=codec, views=views, basis=basis, provenance={"sha256": sha256, "layer": 5}
    )
    encode = FeatureCodec(spec).encode
    about = dataset(len(values), flip=views > 1, **({"fingerprint": fingerprint} if fingerprint else {}))
    with create_writer(path, about, shard_size=shard_size) as writer:
        writer.begin([spec])
        for shard in writer.pending():
            slots = writer.slots(shard)
            writer.skip(shard, [(s, f"{s}.png", "truncated") for s in skipped if s in slots])
            given = torch.from_numpy(values[slots.start : slots.stop])
            stored = encode(given.flatten(0, 1) if views > 1 else given)
            arrays = {suffix: t.unflatten(0, (len(slots), views)) if views > 1 else t for suffix, t in stored.items()}
            for s in skipped:
                if s in slots:
                    for tensor in arrays.values():
                        tensor[s - slots.start] = 0
            writer.write_shard(SOURCE, shard, {suffix: t.contiguous().numpy() for suffix, t in arrays.items()})
        writer.finish()
    return path


def decoded(path: Path, name: str = SOURCE) -> np.ndarray:
    """float64 [samples * views, T, C] as they read back."""
    cache = featcache.open(path)
    parts = read_decoded(cache, [name], np.arange(len(cache)), all_views=True)
    return torch.cat([batch[name] for batch in parts]).double().numpy()


def by_svd(tokens: np.ndarray, components: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores [n, K] of standardised tokens [n, C] and their variances, by another way than the code's."""
    standard = (tokens - tokens.mean(0)) / tokens.std(0)
    _, singular, vectors = np.linalg.svd(standard, full_matrices=False)
    vectors = vectors[:components]
    for vector in vectors:
        size = np.abs(vector)
        if vector[np.flatnonzero(size > 0.999999 * size.max())[0]] < 0:  # the first of the largest is positive
            vector *= -1
    return standard @ vectors.T, (singular**2 / len(tokens))[:components]


def within_fp16(found: np.ndarray, exact: np.ndarray) -> None:
    """Equal but for one rounding to float16 (half a step), and what float64 loses before it."""
    step = np.spacing(np.abs(exact).astype(np.float16)).astype(np.float64)
    np.testing.assert_array_less(np.abs(found - exact), 0.5 * step + 1e-9)


# The algebra


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**32 - 1), st.floats(-1e4, 1e4), st.integers(1, 5), st.data())
def test_components_are_those_of_the_standardised_tokens(
    channels: int, seed: int, mean: float, batches: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-2, 2, channels)
    tokens = (rng.normal(size=(40 * batches, channels)) @ rng.normal(size=(channels, channels)) + mean) * scale
    components = data.draw(st.integers(1, channels))
    moments = TokenMoments()
    for part in np.array_split(tokens, batches):
        moments.add(part)
    centre, covariance = moments.result()
    np.testing.assert_allclose(centre, tokens.mean(0), rtol=1e-9)
    found, variance, total = standardised_components(centre, covariance, components)
    assert total == channels
    scores, expected = by_svd(tokens, components)
    np.testing.assert_allclose(variance, expected, rtol=1e-6, atol=1e-9)
    gaps = np.abs(np.diff(by_svd(tokens, channels)[1]))[:components]
    assume(len(gaps) == 0 or gaps.min() > 1e-3)  # of equal variances any rotation is right
    ours = tokens @ found.matrix + found.offset
    np.testing.assert_allclose(ours, scores, atol=1e-5, rtol=1e-5)
    # Uncorrelated, and centred.
    np.testing.assert_allclose(ours.T @ ours / len(ours), np.diag(variance), atol=1e-6)
    np.testing.assert_allclose(ours.mean(0), 0, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_a_map_survives_the_manifest(channels: int, components: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    made = AffineMap(matrix=rng.normal(size=(channels, components)), offset=rng.normal(size=components))
    back = AffineMap.from_json(json.loads(json.dumps(made.to_json())), components)
    assert np.array_equal(made.matrix, back.matrix) and np.array_equal(made.offset, back.offset)
    first = made.first(1)
    assert np.array_equal(first.matrix, made.matrix[:, :1]) and np.array_equal(first.offset, made.offset[:1])


def test_a_channel_that_never_changes_is_left_out() -> None:
    tokens = np.random.default_rng(0).normal(size=(100, 3))
    tokens[:, 1] = 0.1
    moments = TokenMoments()
    moments.add(tokens)
    found, _, total = standardised_components(*moments.result(), 2)
    assert total == 2 and not found.matrix[1].any()
    np.testing.assert_allclose(tokens[:, [0, 2]] @ found.matrix[[0, 2]] + found.offset, by_svd(tokens[:, [0, 2]], 2)[0])
    with pytest.raises(UserError, match="use 2 directions"):
        standardised_components(*moments.result(), 3)
    with pytest.raises(UserError, match="have 3 channels"):
        standardised_components(*moments.result(), 4)


# Against an independent computation


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize(
    ("codec", "rank"),
    [("fp32", None), ("fp16", None), ("bf16", None), ("int8", None), ("fp8", None), ("int4", None), ("int8", 12)],
)
def test_equals_numpy_within_the_rounding_of_fp16(tmp_path: Path, codec: str, rank: int | None, views: int) -> None:
    path = cache_of(tmp_path / "c", some_tokens(views=views), codec=codec, rank=rank, views=views)
    made = derive(DeriveRequest(cache=path, feature=SOURCE, components=K))
    assert made.images == COUNT and made.spec.name == NAME and made.spec.codec == "fp16"
    assert (made.spec.shape, made.spec.views) == ((T, K), views)
    tokens = decoded(path)
    scores, variance = by_svd(tokens.reshape(-1, C), K)
    within_fp16(decoded(path, NAME), scores.reshape(-1, T, K))
    assert made.spec.derived is not None
    np.testing.assert_allclose(made.spec.derived.how["variance"], variance, rtol=1e-6)
    cache = featcache.open(path)
    with cache.reader([NAME], slots=True) as reader:
        out = reader.allocate(COUNT)
        reader.read(np.arange(COUNT), out)
    assert (
        not out[NAME][list(SKIPPED)].any()
        and out[NAME][[s for s in range(COUNT) if s not in SKIPPED]].any((1, 2)).all()
    )
    assert verify(path, remember=False).ok


def test_int8_tokens_by_hand(tmp_path: Path) -> None:
    """Nothing of the codec's own code: stored integers times stored scales."""
    path = cache_of(tmp_path / "c", some_tokens())
    cache = featcache.open(path)
    with cache.reader([SOURCE]) as reader:
        out = reader.allocate(len(cache))
        reader.read(np.arange(len(cache)), out)
    tokens = out[SOURCE].astype(np.float64) * out[f"{SOURCE}.scale"][..., None]
    tokens = tokens.astype(np.float32).astype(np.float64)
    derive(DeriveRequest(cache=path, feature=SOURCE, components=K))
    within_fp16(decoded(path, NAME), by_svd(tokens.reshape(-1, C), K)[0].reshape(-1, T, K))


def test_a_sample_of_images_is_drawn_by_the_seed(tmp_path: Path) -> None:
    path = cache_of(tmp_path / "c", some_tokens())
    maps = {}
    for seed in (0, 1):
        made = derive(
            DeriveRequest(cache=path, feature=SOURCE, components=K, images=20, seed=seed, name=f"{SOURCE}.seed{seed}")
        )
        assert made.spec.derived is not None
        chosen = np.sort(np.random.default_rng(seed).choice(COUNT - 2, 20, replace=False))
        tokens = decoded(path)
        scores, _ = by_svd(tokens[chosen].reshape(-1, C), K)
        maps[seed] = made.spec.derived.map
        np.testing.assert_allclose(
            tokens[chosen].reshape(-1, C) @ maps[seed].matrix + maps[seed].offset, scores, atol=1e-7, rtol=1e-7
        )
        how = made.spec.derived.how
        assert (how["images"], how["seed"], how["cache"]) == (20, seed, featcache.open(path).fingerprint)
    assert not np.allclose(maps[0].matrix, maps[1].matrix)


# Going on


class Stops(Quiet):
    """Stops the process's work, as Ctrl-C does, after so many calls."""

    def __init__(self, after: int) -> None:
        self.left = after

    def update(self, count: int, text: str = "") -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_an_interrupted_one_goes_on_with_the_map_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, path = cache_of(tmp_path / "whole", some_tokens()), cache_of(tmp_path / "c", some_tokens())
    request = DeriveRequest(cache=path, feature=SOURCE, components=K)
    derive(replace(request, cache=whole))
    with pytest.raises(KeyboardInterrupt):
        derive(request, Stops(3 + 3))  # three batches of the fit, three shards
    assert NAME not in featcache.open(path).manifest.features
    for other, said in (({"components": 5, "name": NAME}, "components"), ({"images": 20}, "images 68, not 20")):
        with pytest.raises(CacheError, match=said) as told:
            derive(replace(request, **other))
        assert "featcache gc" in str(told.value.remedy)

    def never(*_: object) -> None:
        raise AssertionError("it was found before")

    monkeypatch.setattr(room, "fit", never)
    assert derive(request).images == COUNT - 3 * 16
    assert tree(path) == tree(whole)
    assert derive(request).images == 0
    with pytest.raises(CacheError, match="made otherwise: images 68, not 20; seed 0, not 7") as told:
        derive(replace(request, images=20, seed=7))
    assert f"featcache rm {path} --features {NAME}" in str(told.value.remedy)


@contextlib.contextmanager
def forks() -> Iterator[Any]:
    """A function that starts a command line in a process of its own, and one that waits for it."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("fork_cli.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    stdin, stdout = server.stdin, server.stdout
    assert stdin is not None and stdout is not None

    def start(words: Sequence[str], folder: Path) -> int:
        stdin.write(json.dumps({"argv": list(words), "folder": str(folder), "errors": str(folder / "errors")}) + "\n")
        stdin.flush()
        return int(stdout.readline())

    try:
        yield start, lambda: int(stdout.readline())
    finally:
        stdin.close()
        assert server.wait(timeout=60) == 0


def wait_for(there: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not there() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert there()


def test_killed_and_two_at_once(tmp_path: Path) -> None:
    many = some_tokens(2000, seed=3)
    whole = cache_of(tmp_path / "whole", many, shard_size=4)
    path = tmp_path / "c"
    shutil.copytree(whole, path)
    words = ["featcache", "derive", "c", "--feature", SOURCE, "--pca", str(K), "--images", "200"]
    shards = path / NAME
    with forks() as (start, ended):
        for more in (5, 100, 180):  # more and more of 500
            child = start(words, tmp_path)
            wait_for(lambda: len(list(shards.glob("c.*"))) > more)  # noqa: B023
            os.kill(child, signal.SIGKILL)
            assert ended() == -signal.SIGKILL
            assert set(featcache.open(path).manifest.features) == {SOURCE}
            assert verify(path, remember=False).ok
        # While one writes, another says so; and when it has finished, there is nothing left to do.
        child = start(words, tmp_path)
        before = len(list(shards.glob("c.*")))
        wait_for(lambda: len(list(shards.glob("c.*"))) > before)  # in the midst of it, and without the cache's lock
        os.kill(child, signal.SIGSTOP)
        request = DeriveRequest(cache=path, feature=SOURCE, components=K, images=200)
        try:
            with pytest.raises(CacheError, match="another process is writing"):
                derive(request)
        finally:
            os.kill(child, signal.SIGCONT)
        assert ended() == 0, (tmp_path / "errors").read_text()
    assert derive(request).images == 0
    derive(replace(request, cache=whole))
    assert tree(path) == tree(whole)


@pytest.mark.parametrize("moment", ["fit", "write"])
def test_damage_of_the_source_is_not_copied(tmp_path: Path, moment: str) -> None:
    path = cache_of(tmp_path / "c", some_tokens())
    request = DeriveRequest(cache=path, feature=SOURCE, components=K)
    if moment == "write":
        with pytest.raises(KeyboardInterrupt):
            derive(request, Stops(3 + 1))
    file = path / SOURCE / "c.2.0.0"
    whole = file.read_bytes()
    corrupt(file, lambda data: data.__setitem__(7, data[7] ^ 1))
    with pytest.raises(CacheError, match="damaged"):
        derive(request)
    assert set(featcache.open(path).manifest.features) == {SOURCE}
    file.write_bytes(whole)
    derive(request)
    within_fp16(decoded(path, NAME), by_svd(decoded(path).reshape(-1, C), K)[0].reshape(-1, T, K))


# Maps from elsewhere


def test_like_another_cache(tmp_path: Path) -> None:
    ours = cache_of(tmp_path / "a", some_tokens())
    theirs = cache_of(tmp_path / "b", some_tokens(30, seed=5), fingerprint="ab" * 32, codec="fp16", skipped=())
    with pytest.raises(UserError, match="holds nothing derived"):
        derive(DeriveRequest(cache=theirs, feature=SOURCE, like=str(ours)))
    spec = derive(DeriveRequest(cache=ours, feature=SOURCE, components=K)).spec
    made = derive(DeriveRequest(cache=theirs, feature=SOURCE, like=str(ours)))
    assert spec.derived is not None and made.spec.derived is not None
    assert made.spec.name == NAME and made.spec.derived.to_json() == spec.derived.to_json()
    found = spec.derived.map
    within_fp16(decoded(theirs, NAME), decoded(theirs) @ found.matrix + found.offset)
    derive(DeriveRequest(cache=ours, feature=SOURCE, components=2))
    with pytest.raises(UserError, match=r"tiny@5\.pca2.*tiny@5\.pca4|tiny@5\.pca4.*tiny@5\.pca2") as told:
        derive(DeriveRequest(cache=theirs, feature=SOURCE, like=str(ours)))
    assert "--name" in str(told.value.remedy)
    named = derive(DeriveRequest(cache=theirs, feature=SOURCE, like=str(ours), name=f"{SOURCE}.pca2"))
    assert named.spec.shape == (T, 2)
    other = cache_of(tmp_path / "other", some_tokens(), sha256="2" * 64)
    with pytest.raises(CacheError, match="of other tokens than tiny@5 here: sha256"):
        derive(DeriveRequest(cache=other, feature=SOURCE, like=str(ours), name=NAME))


def test_a_saved_map_gives_the_same(tmp_path: Path) -> None:
    path = cache_of(tmp_path / "c", some_tokens())
    spec = derive(DeriveRequest(cache=path, feature=SOURCE, components=K)).spec
    assert spec.derived is not None
    file = tmp_path / "map.safetensors"
    save_map(spec.derived.map, file)
    again = derive(DeriveRequest(cache=path, feature=SOURCE, map=file, components=3, name=f"{SOURCE}.saved")).spec
    np.testing.assert_array_equal(decoded(path, f"{SOURCE}.saved"), decoded(path, NAME)[..., :3])
    assert again.derived is not None and again.derived.how["file"] == "map.safetensors"
    for components in (0, K + 1):
        with pytest.raises(UserError, match=f"has 4 components, not {components}"):
            load_map(file, components)
    narrow = tmp_path / "narrow.safetensors"
    save_map(AffineMap(matrix=np.ones((C - 1, 2)), offset=np.ones(2)), narrow)
    with pytest.raises(UserError, match="takes tokens of 31 channels"):
        derive(DeriveRequest(cache=path, feature=SOURCE, map=narrow))


# Refused


@pytest.mark.parametrize(
    ("feature", "changes", "said"),
    [
        ("label", {}, "only an encoder's tokens"),
        ("vae/moments", {}, "only an encoder's tokens"),
        ("vae/G4", {}, "only an encoder's tokens"),
        ("tiny@5.cls", {}, "only an encoder's tokens"),
        ("tiny@5.small", {}, "only an encoder's tokens"),
        ("tiny@9", {}, "does not hold tiny@9"),
        ("tiny@5", {"components": None}, "nothing says what to derive"),
        ("tiny@5", {"components": 129}, "has 128 channels"),
        ("tiny@5", {"name": "other"}, "is named after it"),
        ("tiny@5", {"name": "tiny@5"}, "is named after it"),
        ("tiny@5", {"name": "tiny@5.cls"}, "is named after it"),
        ("tiny@5", {"name": "tiny@5.scale"}, "cannot name a feature"),
        ("tiny@5", {"name": "tiny@5./../x"}, "cannot name a feature"),
    ],
)
def test_what_cannot_be_derived(encoded: Path, feature: str, changes: dict[str, Any], said: str) -> None:
    before = tree(encoded)
    with pytest.raises(UserError, match=said):
        derive(DeriveRequest(**{"cache": encoded, "feature": feature, "components": 4, **changes}))
    assert tree(encoded) == before


def spec_json(**changes: Any) -> dict[str, Any]:
    made = AffineMap(matrix=np.ones((C, K)), offset=np.ones(K)).to_json()
    derived = {"from": SOURCE, "how": {"method": "pca"}, "map": made, **changes}
    provenance = {"derived": derived}
    plain = {"name": NAME, "shape": [T, K], "codec": "fp16", "dtype": "float32", "views": 1}
    return {**plain, "provenance": provenance}


@pytest.mark.parametrize(
    "changes",
    [
        {"from": 3},
        {"from": "../x"},
        {"from": NAME},
        {"how": []},
        {"map": None},
        {"map": {"matrix": "AAAA", "offset": "AAAA"}},
        {"map": {"matrix": "?", "offset": "?"}},
        {"map": {"matrix": 1, "offset": 2}},
        {"map": {"matrix": "", "offset": ""}},
        {"map": AffineMap(matrix=np.ones((C, K + 1)), offset=np.ones(K + 1)).to_json()},
        {"map": {**AffineMap(matrix=np.ones((C, K)), offset=np.ones(K)).to_json(), "more": 1}},
        {"map": AffineMap(matrix=np.ones((C, K)), offset=np.ones(K)).to_json() | {"offset": "AAAAAAAA+H8=" * K}},
        {"more": 1},
    ],
)
def test_a_manifest_that_says_nonsense_of_it_is_damaged(changes: dict[str, Any]) -> None:
    assert feature_from_json(spec_json()).derived is not None
    with pytest.raises(CacheError, match=r"damaged|cannot name a feature"):
        feature_from_json(spec_json(**changes))


# In a cache of images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(11):
        place = root / "ab"[i % 2]
        place.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(place / f"{i}.png")
    (root / "a/broken.jpg").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """Tokens, a class token and a derived feature of images, one of them skipped; two views."""
    path = tmp_path_factory.mktemp("encoded") / "c"
    request = BuildRequest(
        data=str(images),
        encoders=parse_encoders(["tiny@5,5.cls"]),
        vae="tiny",
        levels=("G4",),
        resolution=64,
        out=path,
        batch_size=4,
        shard_size=4,
        flip=True,
        on_bad_image="skip",
        workers=1,
    )
    build(request, Quiet())
    derive(DeriveRequest(cache=path, feature="tiny@5", components=4, name="tiny@5.small"))
    return path


def damage(path: Path, *names: str) -> dict[str, list[int]]:
    for name in names:
        corrupt(next((path / name).glob("c.1*")), lambda data: data.__setitem__(5, data[5] ^ 4))
    return dict(verify(path, remember=False).damaged)


@pytest.mark.parametrize("names", [("tiny@5.small",), ("tiny@5", "tiny@5.small"), ("label", "tiny@5.small")])
def test_damaged_shards_are_derived_again(encoded: Path, images: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    path = tmp_path / "c"
    shutil.copytree(encoded, path)
    found = damage(path, *names)
    assert found == {name: [1] for name in names}
    data = None if names == ("tiny@5.small",) else str(images)  # no image is needed for what is derived
    repair_shards(path, found, data=data, weights_dir=None, device="cpu", progress=Quiet())
    assert tree(path) == tree(encoded)


def test_without_its_source_it_comes_from_another_copy(encoded: Path, tmp_path: Path) -> None:
    path = tmp_path / "c"
    shutil.copytree(encoded, path)
    remove_features(path, ["tiny@5"], now=True)
    found = damage(path, "tiny@5.small")
    with pytest.raises(CacheError, match="derived of tiny@5, which is not in the cache any more") as told:
        repair_shards(path, found, data=None, weights_dir=None, device="cpu", progress=Quiet())
    assert f"featcache repair {path} --from URL" in str(told.value.remedy)
    assert not list((path / ".featcache").glob("building/*"))


def test_it_travels_and_tars_are_made_again(encoded: Path, images: Path, tmp_path: Path) -> None:
    tars = tmp_path / "wds"
    convert(encoded, tars, to="wds")
    with pytest.raises(CacheError, match="take no more features"):
        derive(DeriveRequest(cache=tars, feature="tiny@5", components=2))
    whole = (tars / "00000001.tar").read_bytes()
    corrupt(tars / "00000001.tar", lambda data: data.__setitem__(6000, data[6000] ^ 1))
    found = verify(tars, remember=False).damaged
    repair_shards(tars, found, data=str(images), weights_dir=None, device="cpu", progress=Quiet())
    assert (tars / "00000001.tar").read_bytes() == whole
    convert(tars, tmp_path / "back", to="zarr")
    assert tree(tmp_path / "back") == tree(encoded)
    pull(str(encoded), tmp_path / "part", features=["tiny@5.small"])
    np.testing.assert_array_equal(decoded(tmp_path / "part", "tiny@5.small"), decoded(encoded, "tiny@5.small"))


def test_nothing_takes_it_for_an_encoders_tokens(encoded: Path) -> None:
    features = featcache.open(encoded).manifest.features
    assert encoder_layers(features) == {"tiny": [5]}
    assert has_tokens("tiny@5.small", features["tiny@5.small"].shape)  # a picture of it can be drawn
    assert features["tiny@5.small"].provenance["sha256"] == features["tiny@5"].provenance["sha256"]


def test_as_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cache_of(tmp_path / "c", some_tokens())
    monkeypatch.chdir(tmp_path)

    def typed(line: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", line.split())
        code = run_app(app)
        return code, "".join(capsys.readouterr())

    code, told = typed(f"featcache derive c --feature {SOURCE} --pca {K} --save-map map.safetensors")
    assert code == 0 and NAME in told, told
    cache = featcache.open("c")
    derived = cache.manifest.features[NAME].derived
    assert derived is not None
    variance = derived.how["variance"]
    row = next(line.split() for line in told.splitlines() if line.split()[:1] == ["2"])
    assert row[1] == f"{variance[1]:.4g}" and row[3] == f"{100 * variance[1] / C:.2f}"
    assert row[5] == f"{100 * sum(variance[:2]) / C:.2f}"
    saved = load_map(Path("map.safetensors"), None).map
    assert np.array_equal(saved.matrix, derived.map.matrix)
    code, told = typed(f"featcache derive c --feature {SOURCE} --pca {K} --images all")
    assert code == 0 and "complete already" in told
    code, told = typed("featcache info c")
    assert code == 0 and NAME in told
    assert typed("featcache verify c")[0] == 0
    for words, said in (
        ("", "nothing says what to derive"),
        ("--pca 99", "has 32 channels"),
        ("--pca 2 --images some", "is not a number of images"),
        ("--like c --map map.safetensors", "both say which map"),
        ("--like c --seed 3", "are found already"),
        ("--like nowhere", "nowhere"),
        ("--map absent.pth", "absent.pth"),
        ("--pca 2 --save-map c/zarr.json", "safetensors"),
    ):
        code, told = typed(f"featcache derive c --feature {SOURCE} {words}")
        assert code == 2 and said in told and "Traceback" not in told, (words, told)
