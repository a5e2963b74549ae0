"""One contract for every backend, then what is particular to zarr and to tars."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_helpers import (
    COUNT,
    SHARD_SIZE,
    add,
    base_features,
    build,
    corrupt,
    dataset,
    expected,
    moments,
    tokens,
    tree,
    values,
    write_all,
)

import featcache
from featcache.errors import CacheError
from featcache.share.manage import cache_bytes, cache_info, collect_garbage, list_caches, remove_features
from featcache.share.verify import repair_metadata, verify
from featcache.store import FORMAT_VERSION, FeatureSpec, files
from featcache.store.layout import recommended_shard_size
from featcache.store.manifest import check_feature_name
from featcache.store.root import find_root
from featcache.store.writers import create_writer, open_writer, repair_writer

BACKENDS = {
    "zarr": {},
    "zarr-zstd": {"compressor": "zstd"},
    "zarr-blosc": {"compressor": "blosc"},
    "wds": {"format": "wds"},
}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing here loses power; test_crash.py keeps the real calls.
    monkeypatch.setattr(files, "_fsync", lambda fd: None)


@pytest.fixture(params=BACKENDS)
def options(request) -> dict[str, str]:
    return BACKENDS[request.param]


@pytest.fixture
def zarr_cache(tmp_path: Path) -> Path:
    return build(tmp_path / "cache")


# The contract of every backend


def test_what_is_written_is_read(tmp_path: Path, options) -> None:
    skipped = [0, 17, 49]
    path = build(tmp_path / "cache", skipped=skipped, **options)
    cache = featcache.open(path)
    assert len(cache) == COUNT - 3
    assert [(s.slot, s.reason) for s in cache.manifest.skipped] == [(s, "truncated") for s in skipped]
    present = [slot for slot in range(COUNT) if slot not in skipped]
    indices = np.random.default_rng(0).permutation(len(cache))
    with cache.reader(list(cache.manifest.features)) as reader:
        out = reader.allocate(len(cache))
        reader.read(indices, out)
        for array in cache.manifest.arrays:
            whole = expected(cache.manifest, array, skipped)
            assert np.array_equal(out[array], whole[np.array(present)[indices]]), array
    assert np.array_equal(cache.labels(), [slot % 3 for slot in present])
    assert cache.keys(0, 3) == [f"img/{slot:06d}.png" for slot in present[:3]]
    assert verify(path).ok


def test_same_input_same_bytes_nothing_left_over(tmp_path: Path, options) -> None:
    first, second = build(tmp_path / "a", **options), build(tmp_path / "b", **options)
    assert tree(first) == tree(second)
    assert not (first / ".featcache").exists()


def test_interrupted_build_resumes_to_the_same_bytes(tmp_path: Path, options) -> None:
    whole = build(tmp_path / "whole", **options)
    specs = base_features()
    path = tmp_path / "cache"
    for stop_after in (0, 1, 2):
        with create_writer(path, dataset(), shard_size=SHARD_SIZE, **options) as writer:
            writer.begin(specs)
            assert writer.pending()[0] == stop_after
            with pytest.raises(CacheError, match="not written yet"):
                writer.finish()
            shard = writer.pending()[0]
            for spec in specs:
                arrays = {
                    a[len(spec.name) :]: values(a, d, s, writer.slots(shard)) for a, (d, s) in spec.arrays.items()
                }
                writer.write_shard(spec.name, shard, arrays)
        with pytest.raises(CacheError, match="unfinished"):
            featcache.open(path)
    with create_writer(path, dataset(), shard_size=SHARD_SIZE, **options) as writer:
        writer.begin(specs)
        write_all(writer, specs)
        writer.finish()
    assert tree(path) == tree(whole)


def test_a_complete_build_run_again_changes_nothing(tmp_path: Path, options) -> None:
    path = build(tmp_path / "cache", **options)
    before = tree(path)
    build(path, **options)
    assert tree(path) == before


VAE = {
    "name": "sd-ft-ema",
    "sha256": "a" * 64,
    "scaling_factor": 0.18215,
    "shift_factor": 0.0,
    "downsampling": 8,
    "latent_channels": 4,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fingerprint": "1" * 64}, "images: others (50 of 3 classes in both)"),
        ({"preprocessing": {**dataset().preprocessing, "resolution": 128}}, "resolution: 64 there, 128 here"),
        ({"order_seed": 1}, "seed of the order: 0 there, 1 here"),
        ({"count": 51}, "images: 50 of 3 classes there, 51 of 3 classes here"),
        ({"grid": 8}, "grid: 4 there, 8 here"),
        ({"vae": VAE}, "VAE: none there, sd-ft-ema here"),
    ],
)
def test_other_images_or_settings_are_refused_in_words(tmp_path: Path, options, change, words: str) -> None:
    path = build(tmp_path / "cache", **options)
    other = dataset(**change)
    for refused in (
        lambda: create_writer(path, other, shard_size=SHARD_SIZE, **options),
        lambda: open_writer(path, dataset=other),
    ):
        with pytest.raises(CacheError) as caught:
            refused()
        first, *lines = caught.value.what.splitlines()
        assert first.endswith("holds a cache already, of other images or settings:") and lines == [f"  {words}"]


def test_other_weights_of_one_name_are_said_without_hashes(tmp_path: Path) -> None:
    create_writer(tmp_path / "cache", dataset(vae=VAE), shard_size=SHARD_SIZE)
    with pytest.raises(CacheError) as caught:
        create_writer(tmp_path / "cache", dataset(vae={**VAE, "sha256": "b" * 64}), shard_size=SHARD_SIZE)
    assert caught.value.what.endswith("\n  weights: others of the same name") and "aaaa" not in caught.value.what


def test_moved_images_are_the_same_images(zarr_cache: Path) -> None:
    open_writer(zarr_cache, dataset=dataset(source="/elsewhere", name="renamed"))


def test_other_shard_size_or_format_is_refused(zarr_cache: Path) -> None:
    with pytest.raises(CacheError, match="samples per shard: 16 there, 32 here"):
        create_writer(zarr_cache, dataset(), shard_size=32)
    with pytest.raises(CacheError, match="format: zarr there, wds here"):
        create_writer(zarr_cache, dataset(), shard_size=SHARD_SIZE, format="wds")


def test_wrong_arrays_are_refused(tmp_path: Path, options) -> None:
    with create_writer(tmp_path / "cache", dataset(), shard_size=SHARD_SIZE, **options) as writer:
        writer.begin([tokens()])
        good: dict[str, np.ndarray] = {"": np.zeros((16, 16, 32), np.int8), ".scale": np.zeros((16, 16), np.float32)}
        with pytest.raises(CacheError, match=r"int8 \(16, 16, 32\), not int16"):
            writer.write_shard("tiny@5", 0, {**good, "": np.zeros((16, 16, 32), np.int16)})
        with pytest.raises(CacheError, match="shard 3"):
            writer.write_shard("tiny@5", 3, good)
        with pytest.raises(CacheError, match="stores the arrays"):
            writer.write_shard("tiny@5", 0, {"": good[""]})
        with pytest.raises(CacheError, match="outside shard 1"):
            writer.skip(1, [(3, "a", "b")])


def test_verify_names_what_is_damaged_and_repair_mends_it(tmp_path: Path, options) -> None:
    path = build(tmp_path / "cache", skipped=[20], **options)
    before = tree(path)
    shards = [name for name in before if ".1" in Path(name).name or name.endswith("1.tar")]
    victim = path / next(n for n in shards if "moments" in n or n.endswith(".tar"))
    corrupt(victim, lambda data: data.__setitem__(40, data[40] ^ 4))
    report = verify(path)
    assert {p.path for p in report.problems} == {str(victim)}
    damaged = report.damaged
    assert set(damaged.values().__iter__().__next__()) == {1}
    with repair_writer(path, damaged) as writer:
        assert writer.pending() == [1]
        write_all(writer, [writer.manifest.features[name] for name in damaged], [20])
        writer.finish()
    assert verify(path).ok
    assert tree(path) == before


def test_missing_shard(tmp_path: Path, options) -> None:
    path = build(tmp_path / "cache", **options)
    cache = featcache.open(path)
    victim = next(p for p in sorted(path.rglob("*")) if p.name in ("c.2.0.0.0", "00000002.tar"))
    victim.unlink()
    problem = verify(path).problems[0]
    assert (problem.path, problem.what) == (str(victim), "missing or unreadable")
    reader = cache.reader(["vae/moments"])
    with pytest.raises(CacheError, match="cannot be read"):
        reader.read([40], reader.allocate(1))


def test_unexpected_files_are_reported(tmp_path: Path, options) -> None:
    path = build(tmp_path / "cache", **options)
    stray = path / ("00000099.tar" if "format" in options else "label/c.99")
    stray.write_bytes(b"x")
    assert [p.what for p in verify(path).problems] == ["does not belong here"]


# zarr


def test_opens_with_zarr_and_tensorstore(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    tensorstore = pytest.importorskip("tensorstore")
    for name in ("zarr", "zarr-zstd", "zarr-blosc"):
        path = build(tmp_path / name, skipped=[3], **BACKENDS[name])
        manifest = featcache.open(path).manifest
        for consolidated in (True, False):
            group = zarr.open_group(path, mode="r", use_consolidated=consolidated)
            for array in manifest.arrays:
                assert np.array_equal(group[array][:], expected(manifest, array, [3])), (name, array)
        members = {key for key, _ in zarr.open_group(path, mode="r", use_consolidated=False).members(max_depth=None)}
        assert members == {*manifest.arrays, "vae"}
        for array in manifest.arrays:
            store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / array)}}
            opened = tensorstore.open(store, open=True).result()
            assert np.array_equal(opened.read().result(), expected(manifest, array, [3])), (name, array)


def test_uncompressed_shard_bytes_by_hand(zarr_cache: Path) -> None:
    """The format's document, followed literally."""
    import google_crc32c

    data = (zarr_cache / "vae/moments/c.3.0.0.0").read_bytes()
    n, length = COUNT - 3 * SHARD_SIZE, 8 * 4 * 4 * 2
    body, index, crc = data[: n * length], data[n * length : -4], data[-4:]
    assert body == values("vae/moments", np.dtype("<f2"), (8, 4, 4), range(48, 50)).tobytes()
    entries = np.frombuffer(index, "<u8").reshape(SHARD_SIZE, 2)
    assert entries[:n].tolist() == [[0, length], [length, length]]
    assert (entries[n:] == 2**64 - 1).all()
    assert int.from_bytes(crc, "little") == google_crc32c.value(index)


def test_a_store_written_by_zarr_reads_alike(tmp_path: Path) -> None:
    """Shards that zarr-python wrote in place of ours (its own order of chunks) are read by their index."""
    zarr = pytest.importorskip("zarr")
    path = build(tmp_path / "cache")
    array = zarr.open_group(path, mode="r+", use_consolidated=False)["vae/moments"]
    data = array[:]
    array[5:9] = -data[5:9]
    reader = featcache.open(path).reader(["vae/moments"])
    out = reader.allocate(COUNT)
    reader.read(range(COUNT), out)
    data[5:9] *= -1
    assert np.array_equal(out["vae/moments"], data)
    assert verify(path).damaged == {"vae/moments": [0]}


def test_checksum_files_are_what_sha256sum_reads(zarr_cache: Path) -> None:
    for folder in ("label", "vae/moments", "tiny@5.scale"):
        done = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=zarr_cache / folder, check=False)
        assert done.returncode == 0


def test_features_added_later_equal_features_built_at_once(tmp_path: Path) -> None:
    extra = [tokens("dino@9"), tokens("dino@11", codec="int4")]
    at_once = build(tmp_path / "a", [*base_features(), *extra], skipped=[7])
    later = build(tmp_path / "b", skipped=[7])
    opened_before = featcache.open(later)
    fingerprint = opened_before.fingerprint
    add(later, extra[1:], skipped=[7])
    add(later, extra[:1], skipped=[7])
    assert tree(at_once) == tree(later)
    assert featcache.open(later).fingerprint == fingerprint
    assert len(opened_before.labels()) == COUNT - 1


def test_require_names_what_is_missing(zarr_cache: Path) -> None:
    with pytest.raises(CacheError, match=r"does not hold dino@9, vae/G3") as found:
        featcache.open(zarr_cache).require(["label", "dino@9", "vae/G3"])
    assert found.value.remedy == "it holds key, label, tiny@5, vae/moments"


def test_two_builders_of_one_feature(tmp_path: Path) -> None:
    path = build(tmp_path / "cache")
    with open_writer(path) as first, open_writer(path) as second:
        first.begin([tokens("a@1")])
        with pytest.raises(CacheError, match="another process is writing 'a@1'"):
            second.begin([tokens("a@1")])
        second.begin([tokens("b@1")])
        write_all(second, [tokens("b@1")])
        write_all(first, [tokens("a@1")])
        second.finish()
        assert "a@1" not in featcache.open(path).manifest.features
        first.finish()
    assert {"a@1", "b@1"} <= set(featcache.open(path).manifest.features)
    assert verify(path).ok


def test_other_provenance_is_refused(zarr_cache: Path) -> None:
    changed = tokens(provenance={"encoder": "tiny@5", "weights": "1" * 64})
    with (
        open_writer(zarr_cache) as writer,
        pytest.raises(
            CacheError, match=r"'tiny@5' already \(complete\).*made otherwise: weights: 0000.* there, 1111.* here"
        ) as found,
    ):
        writer.begin([changed])
    assert found.value.remedy == f"featcache rm {zarr_cache} --features tiny@5 removes it; or choose another folder"
    with open_writer(zarr_cache) as writer:
        writer.begin([tokens("new@1")])
    with open_writer(zarr_cache) as writer, pytest.raises(CacheError, match="begun") as found:
        writer.begin([tokens("new@1", codec="fp16")])
    # What is not complete, rm cannot remove.
    assert found.value.remedy == f"featcache gc {zarr_cache} clears unfinished builds away; or choose another folder"
    collect_garbage(zarr_cache)
    with open_writer(zarr_cache) as writer:
        writer.begin([tokens("new@1", codec="fp16")])


def test_nested_names_are_refused(zarr_cache: Path) -> None:
    with open_writer(zarr_cache) as writer, pytest.raises(CacheError, match="one contains the other"):
        writer.begin([tokens("label/x")])
    with open_writer(zarr_cache) as writer, pytest.raises(CacheError, match="one contains the other"):
        writer.begin([tokens("vae")])


UNSAFE_NAMES: tuple[Any, ...] = (
    "",
    ".",
    "..",
    "../x",
    "a/../b",
    "/etc",
    "a//b",
    "a/b/c",
    "x.scale",
    "c",
    "a/c",
    "zarr.json",
    "a..b",
    *("a b", "-x", "a\n", "a/", ".x", "a/.b", "x.part", "é", "a\0", "a+b", "x" * 200, 5, None),
)


@pytest.mark.parametrize("name", UNSAFE_NAMES)
def test_unsafe_names(name) -> None:
    with pytest.raises(CacheError):
        check_feature_name(name)


@pytest.mark.parametrize("name", ["vae/moments", "vae/G3", "dinov2-b@11", "label", "clip-vit_l@23", "a.b"])
def test_good_names(name: str) -> None:
    assert check_feature_name(name) == name


def test_rm(tmp_path: Path) -> None:
    path = build(tmp_path / "cache", [*base_features(), moments(name="vae/G3"), tokens("dino@9")])
    without = build(tmp_path / "without")
    freed = remove_features(path, ["vae/G3", "dino@9"], now=True)
    assert freed > COUNT * (8 * 4 * 4 * 2 + 16 * 32)
    assert tree(path) == tree(without)
    remove_features(path, ["vae/moments"], now=True)
    assert not (path / "vae").exists()
    with pytest.raises(CacheError, match="does not hold vae/moments"):
        remove_features(path, ["vae/moments"])
    add(path, [moments()])
    assert tree(path) == tree(without)


def test_gc_clears_dead_builds_only(tmp_path: Path) -> None:
    path = build(tmp_path / "cache")
    clean = tree(path)
    dead = open_writer(path)
    dead.begin([tokens("dead@1")])
    write_all(dead, [tokens("dead@1")])
    dead.close()
    (path / "dead@1" / "c.0.0.0.part").write_bytes(b"half")
    (path / "gone@1").mkdir()
    (path / "gone@1" / "c.0.0.0").write_bytes(b"orphan")
    (path / "notes.txt").write_text("mine")
    alive = open_writer(path)
    alive.begin([tokens("alive@1")])
    assert cache_info(path).unfinished == ("alive@1", "dead@1")
    would = collect_garbage(path, dry_run=True)
    assert not [name for name, _ in would if name.startswith("gone@1")]  # nothing says that these files are ours
    assert ("dead@1/c.0.0.0.part", 4) in would
    assert collect_garbage(path) == would
    assert collect_garbage(path) == []
    write_all(alive, [tokens("alive@1")])
    alive.finish()
    remove_features(path, ["alive@1"])
    collect_garbage(path, older_than_s=0)
    assert tree(path) == {**clean, "notes.txt": b"mine", "gone@1/c.0.0.0": b"orphan"}


def test_repair_of_metadata(tmp_path: Path, options) -> None:
    path = build(tmp_path / "cache", **options)
    before = tree(path)
    victims = [n for n in before if n.endswith(("SHA256SUMS", "/zarr.json"))]
    assert victims
    for victim in victims:
        corrupt(path / victim, lambda data: data.__setitem__(5, data[5] ^ 1))
    assert {p.path for p in verify(path).problems} >= {str(path / v) for v in victims}
    assert sorted(repair_metadata(path)) == sorted(victims)
    assert tree(path) == before


def test_inconsistent_labels_and_keys_are_found(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    specs = base_features()[:2]
    with create_writer(path, dataset(8), shard_size=8) as writer:
        writer.begin(specs)
        writer.skip(0, [(2, "img/2", "bad")])
        labels = np.array([0, 1, -1, 3, -1, 2, 0, 1])
        keys = np.zeros((8, 16), np.uint8)
        keys[:, 0] = [65, 66, 0, 68, 69, 0, 65, 255]
        writer.write_shard("label", 0, {"": labels})
        writer.write_shard("key", 0, {"": keys})
        writer.finish()
    found = [p.what for p in verify(path).problems]
    assert any("label 3 in slot 3" in what for what in found)
    assert any("is empty" in what for what in found)
    assert any("same key" in what for what in found)


def test_other_versions_and_foreign_directories(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no cache at"):
        featcache.open(tmp_path / "nothing")
    path = build(tmp_path / "cache")
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["featcache"]["format_version"] = FORMAT_VERSION + 1
    (path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(CacheError, match=f"format version {FORMAT_VERSION + 1}"):
        featcache.open(path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    with pytest.raises(CacheError, match="not empty and is not a cache"):
        create_writer(tmp_path / "photos", dataset(), shard_size=4)
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["a.jpg"]


def test_listing(tmp_path: Path) -> None:
    build(tmp_path / "b")
    build(tmp_path / "a", format="wds")
    with create_writer(tmp_path / "c", dataset(), shard_size=4) as writer:
        writer.begin([moments()])
        (tmp_path / "other").mkdir()
        found = list_caches(tmp_path)
    assert [i.path.name for i in found] == ["a", "b", "c"]
    assert found[2].manifest is None
    assert found[2].unfinished == ("vae/moments",)
    shards = sum(len(b) for n, b in tree(tmp_path / "b").items() if Path(n).name.startswith("c."))
    assert found[1].n_bytes == shards
    tars = sum(len(b) for n, b in tree(tmp_path / "a").items() if n.endswith(".tar"))
    assert found[0].manifest is not None and cache_bytes(found[0].manifest) == tars


def test_recommended_shard_size() -> None:
    assert recommended_shard_size(1_060_000) == 64
    assert recommended_shard_size(8) == 4096
    assert recommended_shard_size(1 << 30) == 16


def test_store_imports_neither_torch_nor_zarr() -> None:
    code = "import sys, featcache, featcache.share.verify, featcache.share.manage; featcache.open; "
    code += "sys.exit(any(m in sys.modules for m in ('torch', 'zarr')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# webdataset


def test_a_plain_webdataset_pipeline_reads_it(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    path = build(tmp_path / "cache", format="wds", skipped=[1])
    manifest = featcache.open(path).manifest
    urls = [str(p) for p in sorted(path.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [s["__key__"] for s in samples] == [f"{slot:09d}" for slot in range(COUNT)]
    for array in manifest.arrays:
        got = np.stack([s[array.replace("/", "+") + ".npy"] for s in samples])
        assert np.array_equal(got, expected(manifest, array, [1]))
        assert got.dtype == manifest.arrays[array][0]


def test_tars_take_no_new_features(tmp_path: Path) -> None:
    path = build(tmp_path / "cache", format="wds")
    with open_writer(path) as writer, pytest.raises(CacheError, match="cannot take new@1"):
        writer.begin([tokens("new@1")])
    with pytest.raises(CacheError, match="cannot be removed"):
        remove_features(path, ["tiny@5"])
    with pytest.raises(CacheError, match="same shards of all"):
        repair_writer(path, {"label": [0]})
    with pytest.raises(CacheError, match="too long for a tar"):
        build(tmp_path / "long", [FeatureSpec(name="x" * 120, shape=(1,), codec="fp32")], format="wds")


def test_views_are_stored_and_selected(tmp_path: Path) -> None:
    for options in BACKENDS.values():
        path = build(tmp_path / str(len(list(tmp_path.iterdir()))), [tokens(views=2)], **options)
        cache = featcache.open(path)
        whole = expected(cache.manifest, "tiny@5")
        assert whole.shape == (COUNT, 2, 16, 32)
        indices = np.random.default_rng(1).permutation(COUNT)[:20]
        views = np.random.default_rng(2).integers(0, 2, 20)
        with cache.reader(["tiny@5"], single_view=True) as reader:
            assert reader.arrays["tiny@5"][1] == (16, 32)
            out = reader.allocate(20)
            reader.read(indices, out, views=views)
            assert np.array_equal(out["tiny@5"], whole[indices, views])
            reader.read(indices, out)
            assert np.array_equal(out["tiny@5"], whole[indices, 0])


@pytest.mark.parametrize("operation", ["_write", "_rename", "_link", "_unlink", "rmtree"])
@pytest.mark.parametrize("options", [{}, {"format": "wds"}], ids=["zarr", "wds"])
def test_death_before_any_operation_leaves_nothing_for_ever(tmp_path: Path, monkeypatch, operation, options) -> None:
    """Die before each operation on files in turn; whoever opens the cache next for writing clears what was left."""
    owner = shutil if operation == "rmtree" else files
    real = getattr(owner, operation)
    specs = base_features()[:2]
    whole = tree(build(tmp_path / "whole", specs, count=10, shard_size=8, **options))
    calls, fatal = [0], [0]

    def call(*arguments):
        calls[0] += 1
        if calls[0] == fatal[0]:
            os._exit(9)
        return real(*arguments)

    monkeypatch.setattr(owner, operation, call)
    build(tmp_path / "count", specs, count=10, shard_size=8, **options)
    left = 0
    for point in range(1, calls[0] + 1):
        path = tmp_path / "cache"
        child = os.fork()
        if not child:
            calls[0], fatal[0] = 0, point
            with contextlib.suppress(BaseException):
                build(path, specs, count=10, shard_size=8, **options)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        if find_root(path) is not None and (path / ".featcache").exists():
            # Published: there is nothing left to build, yet something left to clear.
            left += 1
            assert cache_info(path).unfinished == ()
            open_writer(path).close()
        else:
            build(path, specs, count=10, shard_size=8, **options)
        assert tree(path) == whole, point
        assert not (path / ".featcache").exists(), point
        shutil.rmtree(path)
    assert left or operation != "rmtree"


def test_a_cache_of_version_1_stays_what_it_is(tmp_path: Path) -> None:
    """Read, verified, re-written to the same bytes; new features have hashes of blocks, the old ones none."""
    path = tmp_path / "old"
    specs = base_features()
    with create_writer(path, dataset(), shard_size=SHARD_SIZE) as writer:
        writer.begin(specs, without_blocks=[spec.name for spec in specs])
        write_all(writer, specs)
        writer.finish()
    before = tree(path)
    assert json.loads(before["zarr.json"])["attributes"]["featcache"]["format_version"] == 1
    assert not list(path.rglob("BLOCKS")) and verify(path).ok
    from featcache.share.transfer import pull

    pull(str(path), tmp_path / "copy")
    assert tree(tmp_path / "copy") == before
    corrupt(path / "tiny@5" / "c.1.0.0", lambda data: data.__setitem__(40, data[40] ^ 4))
    with repair_writer(path, verify(path).damaged) as writer:
        write_all(writer, [tokens()])
        writer.finish()
    assert tree(path) == before
    add(path, [tokens("new@1")])
    manifest = featcache.open(path).manifest
    assert set(manifest.blocks) == {"new@1", "new@1.scale"} and verify(path).ok
    pull(str(path), tmp_path / "copy", features=["new@1"])
    pull(str(path), tmp_path / "whole")
    assert tree(tmp_path / "whole") == tree(path)
    remove_features(path, ["new@1"], now=True)
    assert tree(path) == before


def test_a_build_begun_by_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """Its journal has no hashes of blocks: they are taken from the shards, which must be what was journaled."""
    whole = tree(build(tmp_path / "whole", [tokens()]))
    path = tmp_path / "cache"
    for damage in (True, False):
        with create_writer(path, dataset(), shard_size=SHARD_SIZE) as writer:
            writer.begin([tokens()])
            write_all(writer, [tokens()])
        for entry in path.rglob("0000*.json"):
            content = json.loads(entry.read_text())
            content.pop("blocks", None)
            entry.write_text(json.dumps(content))
        shard = path / "tiny@5" / "c.2.0.0"
        if damage:
            corrupt(shard, lambda data: data.__setitem__(40, data[40] ^ 4))
        with create_writer(path, dataset(), shard_size=SHARD_SIZE) as writer:
            writer.begin([tokens()])
            assert writer.pending() == []
            if damage:
                with pytest.raises(CacheError, match=r"c\.2\.0\.0 is damaged: its bytes do not match"):
                    writer.finish()
                shard.unlink()
            else:
                writer.finish()
    assert tree(path) == whole
