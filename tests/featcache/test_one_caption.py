"""One caption's row of text features: the right bytes and no others, drawn alike by any number of readers."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from store_helpers import SHARD_SIZE, base_features, build, dataset, expected, tokens
from web_server import serve

import featcache
from featcache.codecs import FeatureCodec
from featcache.errors import CacheError, UserError
from featcache.read.captions import has_captions, one_caption
from featcache.read.order import stream_captions, stream_indices
from featcache.store import FeatureSpec, backends
from featcache.store.writers import create_writer
from featcache.torch import Loader
from tests.featcache.store_helpers import values

C, T, W, P = 3, 4, 32, 8
ORIGIN = {"from": "table t.csv", "key": None, "identity": "x", "per_image": C}


def text_features(codec: str = "int8", rows: tuple[int, int] = (T, W)) -> list[FeatureSpec]:
    return [
        FeatureSpec(name="text/clip-l", shape=(C, *rows), codec=codec),
        FeatureSpec(name="text/clip-l.pooled", shape=(C, P), codec="fp16"),
        FeatureSpec(name="text/clip-l.length", shape=(C,), codec="raw", dtype="int32"),
        FeatureSpec(name="text/count", shape=(), codec="raw", dtype="int32", provenance={"captions": ORIGIN}),
    ]


TEXTS = ("text/clip-l", "text/clip-l.pooled", "text/clip-l.length")
BACKENDS: dict[str, Any] = {"zarr": {}, "zstd": {"compressor": "zstd"}, "wds": {"format": "wds"}}
SKIPPED = (3, 40)


def counts_of(slots: range) -> np.ndarray:
    """0 to C captions, by slot."""
    return np.array([slot % (C + 1) for slot in slots], np.int32)


def build_texts(path: Path, count: int = 50, **options: Any) -> Path:
    """A cache with text features, of which some samples have none and some fewer captions than others."""
    specs = [*base_features(), tokens("v@1", views=2), *text_features()]
    with create_writer(path, dataset(count, flip=True), shard_size=SHARD_SIZE, **options) as writer:
        writer.begin(specs)
        for shard in writer.pending():
            slots = writer.slots(shard)
            writer.skip(shard, [(slot, f"img/{slot:06d}.png", "truncated") for slot in SKIPPED if slot in slots])
            for spec in specs:
                arrays = {
                    a[len(spec.name) :]: values(a, dtype, shape, slots, SKIPPED)
                    for a, (dtype, shape) in spec.arrays.items()
                }
                writer.write_shard(spec.name, shard, {"": counts_of(slots)} if spec.name == "text/count" else arrays)
        writer.finish()
    return path


@pytest.mark.parametrize("access", ["pread", "mmap"])
@pytest.mark.parametrize("options", BACKENDS.values(), ids=BACKENDS)
def test_rows_are_read_from_every_kind_of_cache(tmp_path: Path, options: dict[str, Any], access: str) -> None:
    path = build_texts(tmp_path / "c", **options)
    rng = np.random.default_rng(0)
    with serve(tmp_path) as web:
        for cache in (featcache.open(path), featcache.open(f"{web.url}/c", cache_dir=tmp_path / "blocks")):
            indices, captions = rng.permutation(len(cache))[:30], rng.integers(0, C, 30)
            names = [*TEXTS, "v@1", "label"]
            with cache.reader(names, single_view=True, single_caption=True, access=access) as reader:
                out = reader.allocate(32)
                views = rng.integers(0, 2, 30)
                reader.read(indices, out, 2, views=views, captions=captions)
                slots = cache.slots(indices)
                for name in reader.arrays:
                    whole = expected(cache.manifest, name, SKIPPED)
                    part = {"v@1": [views], "v@1.scale": [views], "label": []}.get(name, [captions])
                    assert np.array_equal(out[name][2:], whole[(slots, *part)]), name
                assert out["text/clip-l"].shape == (32, T, W) and out["text/clip-l.length"].shape == (32,)
                # The first caption unless it is said.
                reader.read(indices, out)
                assert np.array_equal(
                    out["text/clip-l"][:30], expected(cache.manifest, "text/clip-l", SKIPPED)[slots, 0]
                )


def test_other_features_keep_their_axes(tmp_path: Path) -> None:
    cache = featcache.open(build_texts(tmp_path / "c"))
    with cache.reader(list(cache.features), single_caption=True) as reader:
        plain = {name: array for name, array in cache.manifest.arrays.items() if not name.startswith("text/clip-l")}
        assert {name: reader.arrays[name] for name in plain} == plain
    with cache.reader(["text/clip-l"]) as reader:
        assert reader.arrays["text/clip-l"][1] == (C, T, W)


@pytest.mark.parametrize("captions", [[0, 3], [0, -1], [0], [[0, 1]]], ids=str)
def test_captions_that_there_are_not_are_refused(tmp_path: Path, captions: Any) -> None:
    cache = featcache.open(build_texts(tmp_path / "c", 8))
    with (
        cache.reader(["text/clip-l"], single_caption=True) as reader,
        pytest.raises(CacheError, match="captions must be 2 numbers, each 0 to 2"),
    ):
        reader.read([0, 1], reader.allocate(2), captions=captions)


@pytest.mark.parametrize("options", [{}, {"format": "wds"}], ids=["zarr", "wds"])
def test_only_the_rows_bytes_are_read(tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where the operating system is asked: one of C rows of each sample."""
    cache = featcache.open(build_texts(tmp_path / "c", **options))
    taken: list[int] = []
    real = backends._read_exactly

    def counted(fd: int, buffers: list[memoryview], offset: int, where: str) -> None:
        taken.append(sum(map(len, buffers)))
        real(fd, buffers, offset, where)

    monkeypatch.setattr(backends, "_read_exactly", counted)
    indices = np.random.default_rng(1).permutation(len(cache))[:20]
    for single in (True, False):
        with cache.reader(TEXTS, single_caption=single, threads=0) as reader:
            taken.clear()
            reader.read(indices, reader.allocate(20))
            of_a_row = T * W + 4 * T + 2 * P + 4
            assert sum(taken) == 20 * reader.bytes_per_sample == 20 * of_a_row * (1 if single else C)


def test_of_a_remote_cache_only_the_rows_blocks_are_fetched(tmp_path: Path) -> None:
    """A row as long as a block of 1 MiB: one row is one or two blocks, a sample of three rows at least three."""
    specs = [*base_features()[:2], *text_features("fp16", (512, 1024))[:1]]
    build(tmp_path / "c", specs, count=4, shard_size=4)
    with serve(tmp_path) as web:
        for single in (True, False):
            cache: Any = featcache.open(f"{web.url}/c", cache_dir=tmp_path / f"blocks{single}")
            with cache.reader(["text/clip-l"], single_caption=single, threads=0) as reader:
                opened = reader.allocate(1)
                reader.read([3], opened)  # also fetches the shard's end, with its index
                before = cache.backend.blocks.fetched_bytes
                reader.read([0], opened)
                assert cache.backend.blocks.fetched_bytes - before == (1 << 20) * (1 if single else C)


@pytest.mark.parametrize("codec", ["fp32", "fp16", "bf16", "int8", "fp8", "int4"])
def test_the_codec_of_one_row_decodes_what_the_whole_ones_decodes(codec: str) -> None:
    spec = FeatureSpec(name="text/clip-l", shape=(C, T, W), codec=codec)
    row = one_caption(spec)
    assert row.shape == (T, W) and row.bytes_per_sample * C == spec.bytes_per_sample
    x = torch.randn(5, C, T, W, generator=torch.Generator().manual_seed(0))
    stored = {spec.name + suffix: part for suffix, part in FeatureCodec(spec).encode(x).items()}
    whole = FeatureCodec(spec).decode(stored)
    chosen = torch.tensor([0, 2, 1, 1, 0])
    rows = {name: part[torch.arange(5), chosen] for name, part in stored.items()}
    assert torch.equal(FeatureCodec(row).decode(rows), whole[torch.arange(5), chosen])


def test_which_features_have_captions() -> None:
    for spec in text_features():
        assert has_captions(spec) == (spec.name != "text/count")
    assert one_caption(text_features()[3]) == text_features()[3]
    for other in (
        tokens(),
        FeatureSpec(name="vae/G3", shape=(C, T, W), codec="fp16"),
        one_caption(text_features()[0]),
        FeatureSpec(name="text/x", shape=(C, T, W), codec="fp16", views=2),
    ):
        assert not has_captions(other) and one_caption(other) == other


@given(seed=st.integers(0, 1 << 40), cuts=st.lists(st.integers(0, 10_000), min_size=2, max_size=5))
@settings(max_examples=40, deadline=None)
def test_the_draws_are_the_same_however_the_stream_is_cut(seed: int, cuts: list[int]) -> None:
    cuts = sorted(cuts)
    first, last = cuts[0], cuts[-1]
    counts = np.random.default_rng(seed).integers(0, 8, last - first)
    whole = stream_captions(first, last, counts=counts, seed=seed)
    pieces = [
        stream_captions(a, b, counts=counts[a - first : b - first], seed=seed) for a, b in itertools.pairwise(cuts)
    ]
    assert whole.dtype == np.int64 and np.array_equal(whole, np.concatenate(pieces))
    assert ((whole >= 0) & (whole < np.maximum(counts, 1))).all()


@pytest.mark.parametrize("count", [2, 5, 7])
def test_each_caption_is_drawn_as_often(count: int) -> None:
    """Chi-square against the uniform distribution, also of pairs that follow each other; the seed is fixed."""
    n = 60_000
    drawn = stream_captions(1000, 1000 + n, counts=np.full(n, count), seed=3)
    assert stats.chisquare(np.bincount(drawn, minlength=count)).pvalue > 1e-3
    pairs = drawn[::2] * count + drawn[1::2]
    assert stats.chisquare(np.bincount(pairs, minlength=count**2)).pvalue > 1e-3
    assert not np.array_equal(drawn, stream_captions(1000, 1000 + n, counts=np.full(n, count), seed=4))


def test_a_sample_without_captions_takes_row_0_and_changes_nobody_elses() -> None:
    counts = np.full(100, 5)
    some = np.where(np.arange(100) % 3 == 0, 0, counts)
    a, b = stream_captions(0, 100, counts=counts, seed=1), stream_captions(0, 100, counts=some, seed=1)
    assert not b[::3].any() and np.array_equal(a[some > 0], b[some > 0])
    assert len(stream_captions(5, 5, counts=[], seed=1)) == 0


def load(cache: featcache.Cache, batch: int, steps: range, **kw: Any) -> dict[str, torch.Tensor]:
    """What a loader delivers at the positions of `steps`, one after another."""
    names = ["text/clip-l", "text/clip-l.length", "text/count", "label"]
    loader = Loader(cache, names, batch_size=batch, start=steps.start, stop=steps.stop, seed=5, one_caption=True, **kw)
    batches = list(loader)
    return {name: torch.cat([b[name] for b in batches]) for name in batches[0]}


@pytest.mark.parametrize("batch", [4, 12])
def test_the_loader_takes_the_drawn_caption_whatever_the_batch_and_the_ranks(tmp_path: Path, batch: int) -> None:
    cache = featcache.open(build_texts(tmp_path / "c"))
    n = len(cache)
    positions = range(24, 96)  # across the end of an epoch
    indices = stream_indices(positions.start, positions.stop, count=n, seed=5)
    slots = cache.slots(indices)
    counts = expected_counts = np.array([slot % (C + 1) for slot in slots])
    captions = stream_captions(positions.start, positions.stop, counts=counts, seed=5)
    with cache.reader(["text/clip-l"], threads=0) as reader:
        stored = reader.allocate(len(indices))
        reader.read(indices, stored)
    tensors = {name: torch.from_numpy(values) for name, values in stored.items()}
    whole = FeatureCodec(cache.features["text/clip-l"]).decode(tensors)[torch.arange(len(indices)), captions]
    steps = range(positions.start // batch, positions.stop // batch)
    alone = load(cache, batch, steps)
    assert torch.equal(alone["text/clip-l"], whole) and whole.shape[1:] == (T, W)
    assert np.array_equal(alone["text/count"], expected_counts)
    assert np.array_equal(
        alone["text/clip-l.length"], expected(cache.manifest, "text/clip-l.length", SKIPPED)[slots, captions]
    )
    # Begun later, it goes on with the same.
    later = load(cache, batch, range(steps.start + 2, steps.stop))
    assert torch.equal(later["text/clip-l"], whole[2 * batch :])
    # Two ranks of two micro-batches read the halves of each quarter.
    for rank in range(2):
        part = load(cache, batch, steps, rank=rank, world_size=2, micro_batches=2)["text/clip-l"]
        quarters = whole.reshape(len(steps), 2, 2, batch // 4, T, W)
        assert torch.equal(part, quarters[:, :, rank].flatten(0, 2))


def test_stored_rows_reach_the_training_step(tmp_path: Path) -> None:
    cache = featcache.open(build_texts(tmp_path / "c"))
    loader = Loader(
        cache, ["label"], batch_size=4, dtype=None, stop=2, one_caption=True, extra=["text/clip-l"], wanted=bool
    )
    first, second = ({name: array.shape for name, array in batch.items()} for batch in loader)
    assert set(first) == {"label"} and second["text/clip-l"] == (4, T, W) and second["text/clip-l.scale"] == (4, T)


def test_states_say_whether_one_caption_is_read(tmp_path: Path) -> None:
    cache = featcache.open(build_texts(tmp_path / "c"))
    one = Loader(cache, ["text/clip-l"], batch_size=4, one_caption=True)
    all_ = Loader(cache, ["text/clip-l"], batch_size=4)
    before = {name: value for name, value in all_.state_dict().items() if name != "one_caption"}
    for loader, states in ((one, [one.state_dict()]), (all_, [all_.state_dict(), before])):
        for state in states:
            loader.load_state_dict(state)
    for loader, states in ((one, [all_.state_dict(), before]), (all_, [one.state_dict()])):
        for state in states:
            with pytest.raises(UserError, match="one_caption"):
                loader.load_state_dict(state)


def test_a_cache_without_counts_is_refused(tmp_path: Path) -> None:
    cache = featcache.open(build(tmp_path / "c"))
    with pytest.raises(CacheError, match="text/count"):
        Loader(cache, ["label"], batch_size=4, one_caption=True)


def test_no_torch_is_needed_to_choose_rows() -> None:
    import subprocess

    code = "import sys, featcache.read.captions, featcache.read.order; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
