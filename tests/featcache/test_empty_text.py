"""The text of '' in the manifest: what a build writes, what goes with a cache, and what a manifest may say."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from typer.testing import CliRunner

import featcache
from featcache.builder.begun import with_features
from featcache.builder.empty_texts import adopt_empty_texts, settle_empty_texts
from featcache.builder.lead import lead, remarks
from featcache.builder.prepare import prepare
from featcache.builder.repair import repair_shards
from featcache.builder.request import BuildRequest
from featcache.builder.run import build
from featcache.cli import app
from featcache.encoders.base import WeightsSource
from featcache.encoders.text import TextEncoder
from featcache.errors import CacheError
from featcache.progress import Quiet
from featcache.share.convert import convert
from featcache.share.transfer import pull, push
from featcache.share.verify import verify
from featcache.store import FORMAT_VERSION, FeatureSpec
from featcache.store.manifest import feature_from_json, manifest_from_json
from featcache.store.root import cache_digest
from tests.featcache.store_helpers import tree_digest

T, W, P = 16, 64, 32  # of the embedded text encoder
NAMES = ("text/tiny", "text/tiny.pooled")


def request(out: Path | None, **changes: Any) -> BuildRequest:
    base = BuildRequest(
        data="shapes",
        vae="tiny",
        texts=("tiny",),
        limit=24,
        batch_size=8,
        shard_size=8,
        out=out,
        workers=1,
        device="cpu",
    )
    return replace(base, **changes)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("built") / "c"
    build(request(path), Quiet())
    return path


def version_of(path: Path) -> int:
    root = path / ("zarr.json" if (path / "zarr.json").is_file() else "featcache.json")
    version: int = json.loads(root.read_text())["attributes"]["featcache"]["format_version"]
    return version


def empties(path: Path | str) -> dict[str, np.ndarray]:
    features = featcache.open(path).features
    return {name: features[name].empty_text() for name in NAMES}


def expected() -> dict[str, np.ndarray]:
    """What the encoder says of '' among other captions, rounded as a cache rounds."""
    encoder = TextEncoder("tiny", WeightsSource(), captions=3)
    made = encoder(encoder.tokenise([("a dog", "", "one, two")]))
    return {name: value[0, 1].numpy() for name, value in made.items()}


def test_a_build_keeps_what_the_encoder_says_of_nothing(built: Path) -> None:
    found = empties(built)
    for name, values in expected().items():
        assert found[name].dtype == np.float32 and found[name].shape == values.shape
        assert np.allclose(found[name], values, rtol=2**-11, atol=1e-5) and values.any()
        assert np.array_equal(found[name], found[name].astype(np.float16))
    assert version_of(built) == FORMAT_VERSION == 4
    assert featcache.open(built).features["text/tiny.length"].empty is None


def test_it_does_not_depend_on_the_batch(built: Path, tmp_path: Path) -> None:
    for batch_size, kept in ((1, 3), (5, 1), (64, 7)):
        encoder = TextEncoder("tiny", WeightsSource(), captions=kept, batch_size=batch_size)
        for name, values in encoder.empty().items():
            spec = replace(featcache.open(built).features[name], empty=None).with_empty(values)
            assert spec.empty == featcache.open(built).features[name].empty


def test_caches_without_text_are_of_the_version_they_were(tmp_path: Path) -> None:
    build(request(tmp_path / "c", texts=()), Quiet())
    assert version_of(tmp_path / "c") == 2
    assert '"empty"' not in (tmp_path / "c" / "zarr.json").read_text()
    # Text that joins it brings its text of '', and a builder says nothing of what is there already and alike.
    build(request(None, into=tmp_path / "c"), Quiet())
    assert version_of(tmp_path / "c") == 4
    assert {name: values.shape for name, values in empties(tmp_path / "c").items()} == {
        NAMES[0]: (T, W),
        NAMES[1]: (P,),
    }
    again = prepare(request(None, into=tmp_path / "c"), device="cpu")
    assert not [line for line in remarks(again) if "text/tiny" in line]
    # And goes with it.
    cli = CliRunner().invoke(app, ["rm", str(tmp_path / "c"), "--features", "text/tiny,text/tiny.pooled", "--yes"])
    assert cli.exit_code == 0, cli.output
    assert version_of(tmp_path / "c") == 2


def test_a_webdataset_build_keeps_it(built: Path, tmp_path: Path) -> None:
    build(request(tmp_path / "w", format="wds"), Quiet())
    assert version_of(tmp_path / "w") == 4
    for name, values in empties(built).items():
        assert np.array_equal(empties(tmp_path / "w")[name], values)


def test_it_goes_wherever_the_feature_goes(built: Path, tmp_path: Path) -> None:
    whole = empties(built)
    push(built, f"file://{tmp_path / 'there'}")
    pull(str(tmp_path / "there"), tmp_path / "here")
    assert cache_digest(featcache.open(tmp_path / "here").manifest) == cache_digest(featcache.open(built).manifest)
    convert(built, tmp_path / "tars", to="wds")
    convert(tmp_path / "tars", tmp_path / "back", to="zarr")
    assert tree_digest(tmp_path / "back") == tree_digest(built)
    push(built, f"file://{tmp_path / 'part'}", features=["text/tiny", "text/tiny.pooled"])
    push(built, f"file://{tmp_path / 'part'}", features=["vae/moments"])  # merges with what is there
    pull(str(tmp_path / "there"), tmp_path / "some", features=["text/tiny", "text/tiny.pooled"])
    for name in ("there", "here", "tars", "back", "part", "some"):
        for feature, values in empties(tmp_path / name).items():
            assert np.array_equal(values, whole[feature]), (name, feature)
    # A part without text is of the version that it needs.
    pull(str(built), tmp_path / "none", features=["vae/moments"])
    assert version_of(tmp_path / "none") == 2
    assert not verify(tmp_path / "back").problems


def test_repair_keeps_it(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "c")
    shard = next((tmp_path / "c" / "text" / "tiny").glob("c.1.*"))
    shard.unlink()
    damaged = verify(tmp_path / "c").damaged
    assert damaged == {"text/tiny": [1]}
    repair_shards(tmp_path / "c", damaged, data="shapes", weights_dir=None, device="cpu", progress=Quiet())
    assert tree_digest(tmp_path / "c") == tree_digest(built)


def test_an_unfinished_build_goes_on_with_what_it_began_with(tmp_path: Path) -> None:
    """With the text of '' that is written down, be it none: of an earlier featcache, or of another machine's rounding."""
    plan = prepare(request(tmp_path / "c"), device="cpu")
    with lead(plan):  # nothing settled, as before there was any
        pass
    build(request(tmp_path / "c"), Quiet())
    old = featcache.open(tmp_path / "c").features["text/tiny"]
    with pytest.raises(CacheError, match="without the text of ''") as caught:
        old.empty_text()
    assert caught.value.remedy is not None and "featcache build --into CACHE --text tiny" in caught.value.remedy
    # Asked for again, it is said.
    told = [line for line in remarks(prepare(request(None, into=tmp_path / "c"), device="cpu")) if "text of ''" in line]
    assert len(told) == 2 and "no there, yes here" in told[0] and "featcache rm" in told[0]

    settled = settle_empty_texts(prepare(request(tmp_path / "d"), device="cpu"))
    others = {
        spec.name: replace(spec, empty=None).with_empty(spec.empty_text() + 1) for spec in settled.specs if spec.empty
    }
    with lead(with_features(settled, others)):
        pass
    adopted = adopt_empty_texts(prepare(request(tmp_path / "d"), device="cpu"))
    assert {s.name: s.empty for s in adopted.specs if s.empty} == {name: s.empty for name, s in others.items()}
    build(request(tmp_path / "d"), Quiet())
    assert np.array_equal(empties(tmp_path / "d")["text/tiny"], others["text/tiny"].empty_text())
    build(request(tmp_path / "d"), Quiet())  # a finished one is taken for the same


@pytest.mark.slow
def test_ranks_build_the_same_cache(built: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path\n"
        "from tests.featcache.test_empty_text import request, build, Quiet\n"
        "build(request(Path(sys.argv[1])), Quiet())"
    )
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29000 + os.getpid() % 900)}
    root = str(Path(__file__).parents[2])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "c"), root],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    assert tree_digest(tmp_path / "c") == tree_digest(built)


def test_info_says_whether_it_is_there(built: Path, tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["info", str(built)]).output
    assert "text of '' kept" in " ".join(said.split())
    with lead(prepare(request(tmp_path / "c"), device="cpu")):
        pass
    build(request(tmp_path / "c"), Quiet())
    said = CliRunner().invoke(app, ["info", str(tmp_path / "c")]).output
    assert "no text of '' with text/tiny, text/tiny.pooled" in " ".join(said.split())


def of_text(empty: Any = None, **changes: Any) -> dict[str, Any]:
    spec = FeatureSpec(name="text/x", shape=(3, 2, 4), codec="fp16")
    return {**spec.to_json(), **({} if empty is None else {"empty": empty}), **changes}


def text_of(values: np.ndarray) -> str:
    return base64.b64encode(values.astype("<f2").tobytes()).decode()


@given(values=arrays.arrays(np.float16, (2, 4), elements=st.floats(-60000, 60000, width=16)))
@settings(max_examples=50, deadline=None)
def test_it_comes_back_to_the_bit(values: np.ndarray) -> None:
    spec = FeatureSpec(name="text/x", shape=(3, 2, 4), codec="int8").with_empty(values)
    back = feature_from_json(json.loads(json.dumps(spec.to_json())))
    assert back == spec and np.array_equal(back.empty_text(), values.astype(np.float32))


def test_what_is_too_large_saturates_as_fp16_features_do() -> None:
    values = np.full((2, 4), 1e6)
    values[0] = -1e6
    spec = FeatureSpec(name="text/x", shape=(3, 2, 4), codec="fp16").with_empty(values)
    assert spec.empty_text().tolist() == [[-65504] * 4, [65504] * 4]


GOOD = text_of(np.ones((2, 4)))


@pytest.mark.parametrize(
    "item",
    [
        of_text(GOOD[:-4]),
        of_text(GOOD + "AAAA"),
        of_text(GOOD.replace("A", "é", 1)),
        of_text(GOOD[:5] + "!" + GOOD[6:]),
        of_text("=" * len(GOOD)),
        of_text(text_of(np.full((2, 4), np.nan))),
        of_text(text_of(np.full((2, 4), np.inf))),
        of_text(list(range(8))),
        of_text(12),
        of_text({}),
        of_text(""),
        of_text(GOOD, name="vae/G3"),
        of_text(GOOD, name="clip-l"),
        of_text(text_of(np.ones(())), shape=[3]),
        of_text(GOOD, codec="raw", dtype="int32"),
        of_text(GOOD, shape=[3, 1 << 11, 1 << 11]),
        of_text(GOOD, more=1),
    ],
    ids=lambda item: str(item)[:0] or None,
)
def test_manifests_that_say_something_else_are_refused(item: dict[str, Any]) -> None:
    assert feature_from_json(of_text(GOOD)).empty == GOOD
    with pytest.raises(CacheError, match="damaged"):
        feature_from_json(item)


@pytest.mark.parametrize(
    "values", [np.ones((4, 2)), np.ones(8), np.full((2, 4), np.nan)], ids=["turned", "flat", "nan"]
)
def test_what_is_no_text_of_the_feature_is_not_taken(values: np.ndarray) -> None:
    with pytest.raises(CacheError, match=r"empty|text of ''"):
        FeatureSpec(name="text/x", shape=(3, 2, 4), codec="fp16").with_empty(values)


def test_a_changed_text_is_noticed(built: Path, tmp_path: Path) -> None:
    """It is under the manifest's checksum; and earlier programs refuse the version instead of the key."""
    shutil.copytree(built, tmp_path / "c")
    root = tmp_path / "c" / "zarr.json"
    document = json.loads(root.read_text())
    feature = document["attributes"]["featcache"]["features"]["text/tiny"]
    feature["empty"] = text_of(np.zeros((T, W)))
    root.write_text(json.dumps(document))
    with pytest.raises(CacheError):
        featcache.open(tmp_path / "c")
    manifest = featcache.open(built).manifest
    assert manifest_from_json(manifest.to_json()) == manifest
    assert manifest.only(["label", "key"]).to_json()["format_version"] == 2
