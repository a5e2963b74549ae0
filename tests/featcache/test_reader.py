"""The reader: any batch of any features into the caller's buffers, at any size, from many threads."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_helpers import COUNT, base_features, build, corrupt, dataset, expected, tokens

import featcache
from featcache.errors import CacheError
from featcache.read.reader import _OpenShards
from featcache.store import FeatureSpec, Manifest
from featcache.store.layout import shard_name, shard_samples
from featcache.store.root import root_bytes
from featcache.store.shards import encode_shard

SKIPPED = (0, 15, 16, 49)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return build(
        tmp_path_factory.mktemp("reader") / "cache",
        [*base_features(), tokens("v@1", views=2)],
        skipped=SKIPPED,
    )


@pytest.fixture(scope="module")
def readers(path: Path):
    cache = featcache.open(path)
    features = list(cache.manifest.features)
    made = {t: cache.reader(features, threads=t, access=a) for t, a in ((0, "mmap"), (1, "pread"), (3, "auto"))}
    yield cache, made
    for reader in made.values():
        reader.close()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    indices=st.lists(st.integers(0, COUNT - len(SKIPPED) - 1), max_size=70),
    offset=st.integers(0, 3),
    threads=st.sampled_from([0, 1, 3]),
)
def test_any_batch(readers, indices: list[int], offset: int, threads: int) -> None:
    """Repeats, runs, any order, any place in the buffers; rows outside the batch stay as they are."""
    cache, made = readers
    out = made[threads].allocate(len(indices) + offset + 2)
    for array in out.values():
        array.reshape(-1).view(np.uint8)[:] = 0xA5
    made[threads].read(indices, out, offset)
    present = np.array([slot for slot in range(COUNT) if slot not in SKIPPED])
    for name, array in out.items():
        whole = expected(cache.manifest, name, SKIPPED)
        assert np.array_equal(array[offset : offset + len(indices)], whole[present[indices].astype(int)])
        assert (array[:offset].reshape(-1).view(np.uint8) == 0xA5).all()
        assert (array[offset + len(indices) :].reshape(-1).view(np.uint8) == 0xA5).all()


def test_by_slot(path: Path) -> None:
    cache = featcache.open(path)
    reader = cache.reader(["label"], slots=True)
    out = reader.allocate(COUNT)
    reader.read(range(COUNT), out)
    assert np.flatnonzero(out["label"] == -1).tolist() == list(SKIPPED)
    with pytest.raises(CacheError, match="slot 0 or 50 is outside"):
        reader.read([0, 50], out)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_bad_requests(path: Path) -> None:
    reader = featcache.open(path).reader(["tiny@5"])
    out = reader.allocate(4)
    for indices in ([-1], [46], [0, 10**12]):
        with pytest.raises(CacheError, match="outside the cache's 46 samples"):
            reader.read(indices, out)
    with pytest.raises(CacheError, match="must be contiguous int8"):
        reader.read(range(5), out)
    with pytest.raises(CacheError, match="must be contiguous"):
        reader.read([0], {**out, "tiny@5": out["tiny@5"][:, ::-1]})
    with pytest.raises(CacheError, match="float64"):
        reader.read([0], {**out, "tiny@5.scale": out["tiny@5.scale"].astype(np.float64)})


def test_reads_into_a_torch_tensor(path: Path) -> None:
    import torch

    reader = featcache.open(path).reader(["tiny@5"])
    tensors = {n: torch.from_numpy(a) for n, a in reader.allocate(3).items()}
    reader.read([5, 4, 3], {name: tensor.numpy() for name, tensor in tensors.items()})
    assert tensors["tiny@5"].dtype == torch.int8
    assert torch.equal(tensors["tiny@5"][0], torch.from_numpy(expected(reader.cache.manifest, "tiny@5", SKIPPED)[6]))


def test_many_threads_share_a_reader(path: Path, monkeypatch) -> None:
    cache = featcache.open(path)
    reader = cache.reader(["tiny@5", "vae/moments"], threads=2)
    # So few open shards that every read evicts some that other threads are reading.
    monkeypatch.setattr(reader, "_open", _OpenShards(cache.backend, 1, n_files=99))
    whole = expected(cache.manifest, "vae/moments", SKIPPED)
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        out = reader.allocate(16)
        for _ in range(40):
            indices = rng.integers(0, len(cache), 16)
            reader.read(indices, out)
            if not np.array_equal(out["vae/moments"], whole[cache.slots(indices)]):
                wrong.append(seed)

    before = open_descriptors()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert open_descriptors() <= before + 1


def test_shard_that_shrinks_or_lies(tmp_path: Path) -> None:
    path = build(tmp_path / "cache")
    reader = featcache.open(path).reader(["vae/moments"], threads=0, access="pread")
    out = reader.allocate(COUNT)
    reader.read(range(COUNT), out)
    # Cut under an open descriptor: what was there is gone.
    with (path / "vae/moments/c.1.0.0.0").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(CacheError, match="shorter than its index says"):
        reader.read([20], out)
    fresh = featcache.open(path).reader(["vae/moments"])
    with pytest.raises(CacheError, match="too short to hold its index"):
        fresh.read([20], out)
    corrupt(path / "vae/moments/c.2.0.0.0", lambda data: data.__setitem__(-20, data[-20] ^ 1))
    with pytest.raises(CacheError, match="index does not match its checksum"):
        fresh.read([40], out)
    fresh.read([0, 15, 48], out)


def sparse_cache(path: Path, count: int, shard_size: int = 1024) -> Path:
    """A cache of `count` samples of REPA's size, its data holes in sparse files (but real labels)."""
    specs = [
        FeatureSpec(name="label", shape=(), codec="raw", dtype="int64"),
        FeatureSpec(name="vae/moments", shape=(8, 32, 32), codec="fp16"),
        FeatureSpec(name="dinov2-b@11", shape=(256, 768), codec="int8"),
    ]
    manifest = Manifest(
        dataset=dataset(count, class_names=tuple(f"class {i}" for i in range(1000))),
        shard_size=shard_size,
        features={spec.name: spec for spec in sorted(specs, key=lambda s: s.name)},
    )
    manifest = Manifest(**{**vars_of(manifest), "checksums": dict.fromkeys(manifest.arrays, "0" * 64)})
    for array, (dtype, shape) in manifest.arrays.items():
        (path / array).mkdir(parents=True)
        length = dtype.itemsize * int(np.prod(shape))
        for shard in range(manifest.n_shards):
            n = shard_samples(count, shard_size, shard)
            with (path / array / shard_name(shard, len(shape))).open("wb") as file:
                if array == "label":
                    labels = (np.arange(n) + shard * shard_size) % 1000
                    whole: list[Any] = list(encode_shard(labels, shard_size, None))
                    file.writelines(whole)
                else:
                    parts: list[Any] = list(encode_shard(np.empty((n, length), np.uint8), shard_size, None))
                    file.seek(n * length)
                    file.writelines(parts[-2:])  # index and checksum
    (path / "zarr.json").write_bytes(root_bytes(manifest))
    return path


def vars_of(manifest: Manifest) -> dict:
    return {name: getattr(manifest, name) for name in Manifest.__dataclass_fields__}


@pytest.fixture(scope="module")
def imagenet_sized(tmp_path_factory) -> Path:
    return sparse_cache(tmp_path_factory.mktemp("sparse") / "cache", 1_281_167)


def test_imagenet_sized_cache_opens_at_once(imagenet_sized: Path) -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        cache = featcache.open(imagenet_sized)
        reader = cache.reader(["label", "vae/moments", "dinov2-b@11"])
        out = reader.allocate(8)
        reader.read(featcache.epoch_order(0, 0, len(cache))[:8], out)
        times.append(time.perf_counter() - start)
        reader.close()
    assert len(cache) == 1_281_167
    assert min(times) < 0.5, times
    assert out["label"].tolist() == (featcache.epoch_order(0, 0, len(cache))[:8] % 1000).tolist()


PEAK = """
import sys, tracemalloc, featcache
featcache.open, featcache.epoch_order
tracemalloc.start()
cache = featcache.open(sys.argv[1])
order = featcache.epoch_order(0, 0, len(cache))
with cache.reader(["label"], threads=0) as reader:
    out = reader.allocate(256)
    for start in range(0, 8192, 256):
        reader.read(order[start : start + 256], out)
print(tracemalloc.get_traced_memory()[1])
"""


def test_memory_does_not_grow_with_the_samples(imagenet_sized: Path, tmp_path: Path) -> None:
    """In processes of their own: what is traced is all threads' memory, those of other tests included."""
    small = sparse_cache(tmp_path / "small", 8192)
    peaks = []
    for path in (small, imagenet_sized):
        done = subprocess.run([sys.executable, "-c", PEAK, str(path)], check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout))
    # What is kept of each open shard (1,252 of them, against 8) may differ; 8 bytes per sample would be 10 MB.
    assert peaks[1] - peaks[0] < 4 << 20, peaks


def test_few_descriptors_are_enough(imagenet_sized: Path) -> None:
    """2,504 shards under a limit of 64 open files."""
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
import featcache, numpy as np
cache = featcache.open({str(imagenet_sized)!r})
reader = cache.reader(["label", "vae/moments"], threads=2)
out = reader.allocate(64)
for start in range(0, len(cache), 1024 * 64):
    indices = np.arange(start, min(len(cache), start + 1024 * 64), 1024)
    reader.read(indices, out)
    assert (out["label"][:len(indices)] == indices % 1000).all()
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_labels_of_a_large_cache(imagenet_sized: Path) -> None:
    labels = featcache.open(imagenet_sized).labels()
    assert labels.dtype == np.int64
    assert np.array_equal(labels, np.arange(1_281_167) % 1000)


def test_neighbours_merge_into_few_calls(path: Path, monkeypatch) -> None:
    calls = []
    real = os.preadv

    def counted(*arguments: Any) -> int:
        calls.append(real(*arguments))
        return calls[-1]

    monkeypatch.setattr(os, "preadv", counted)
    with featcache.open(path).reader(["vae/moments"], threads=0, access="pread") as reader:
        out = reader.allocate(46)
        reader.read(np.random.default_rng(0).permutation(46), out)
    # Slots 1..14, 17..31, 32..47, 48: skipped slots and shards divide the runs.
    assert sorted(calls) == [n * 256 for n in (1, 14, 15, 16)]


def test_no_leaks_of_descriptors(path: Path) -> None:
    before = open_descriptors()
    for _ in range(5):
        cache = featcache.open(path)
        with cache.reader(list(cache.manifest.features), threads=2) as reader:
            reader.read(range(46), reader.allocate(46))
        del cache, reader
    assert open_descriptors() == before
