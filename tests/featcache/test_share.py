"""Push, pull, list and stream against a real S3-protocol server and a real web server whose connections
break.
"""

import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gcs_server import serve_gcs
from large_cache import without_blocks
from store_helpers import COUNT, add, base_features, build, corrupt, expected, moments, tokens, tree
from web_server import serve

import featcache
from featcache.errors import CacheError, UserError
from featcache.read.order import sequential_order
from featcache.read.stream import BlockCache, open_remote
from featcache.share.manage import collect_garbage
from featcache.share.transfer import list_remote, pull, push, subset, verify_remote
from featcache.share.verify import verify
from featcache.store import blocks as hashes
from featcache.store import files, remote_errors
from featcache.store import objects as object_stores
from featcache.store.remote import is_remote, open_destination, open_location, parse_hub_url
from tests.told import Told

SKIPPED = (4, 20)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_fsync", lambda fd: None)
    monkeypatch.setattr(remote_errors, "FIRST_PAUSE_S", 0.01)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("share") / "cache"
    return build(path, [*base_features(), tokens("dino@9"), moments(name="vae/G3")], skipped=SKIPPED)


@pytest.fixture
def web(source: Path):
    with serve(source.parent) as server:
        yield server


@pytest.fixture
def plain_web(source: Path, tmp_path: Path):
    """The cache as an earlier version wrote it, without hashes of blocks: so blocks may have any length here."""
    without_blocks(shutil.copytree(source, tmp_path / "plain" / "cache"))
    with serve(tmp_path / "plain") as server:
        yield server


@pytest.fixture
def bucket(s3_server: str, s3_bucket: str):
    """An empty bucket, and the client's view of it."""
    import boto3

    return s3_bucket, boto3.client("s3", endpoint_url=s3_server)


def objects(bucket) -> dict[str, bytes]:
    name, client = bucket
    listed = client.list_objects_v2(Bucket=name).get("Contents", [])
    return {o["Key"]: client.get_object(Bucket=name, Key=o["Key"])["Body"].read() for o in listed}


# Web


def test_pull_over_http(source: Path, web, tmp_path: Path) -> None:
    seen = Told()
    done = pull(f"{web.url}/cache", tmp_path / "copy", progress=seen)
    assert tree(tmp_path / "copy") == tree(source)
    assert sum(seen.counts) == done.n_bytes and seen.tasks == [("copying", None, 0, "bytes")]
    assert done.n_files_before == 0
    again = pull(f"{web.url}/cache", tmp_path / "copy")
    assert (again.n_files, again.n_bytes, again.n_files_before) == (0, 0, done.n_files)


@pytest.mark.parametrize("options", [{"compressor": "zstd"}, {"format": "wds"}], ids=str)
def test_pull_of_other_formats(tmp_path: Path, options) -> None:
    path = build(tmp_path / "a" / "cache", skipped=SKIPPED, **options)
    with serve(tmp_path / "a") as web:
        web.cut_every = 5
        pull(f"{web.url}/cache", tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(path)


def test_connections_cut_in_the_middle(source: Path, web, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(object_stores, "PIECE_BYTES", 1500)
    web.cut_every = 3
    pull(f"{web.url}/cache", tmp_path / "copy", threads=4)
    assert tree(tmp_path / "copy") == tree(source)
    assert web.served > 100


def test_a_server_that_dies_and_comes_back(source: Path, web, tmp_path: Path) -> None:
    url, target = f"{web.url}/cache", tmp_path / "copy"
    web.cuts["cache/dino@9/c.2.0.0"] = 10**6
    with pytest.raises(CacheError, match=r"c\.2\.0\.0 failed 8 times(.|\n)*run the same command again"):
        pull(url, target, threads=1)
    with pytest.raises(CacheError, match="unfinished"):
        featcache.open(target)
    before = web.answers["cache/dino@9/c.0.0.0"]
    web.cuts.clear()
    done = pull(url, target, threads=1)
    assert done.n_files_before > 0
    assert web.answers["cache/dino@9/c.0.0.0"] == before
    assert tree(target) == tree(source)


def test_killed_pull_resumes(source: Path, web, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    code = f"from featcache.share.transfer import pull; pull('{web.url}/cache', {str(target)!r}, threads=1)"
    rounds = 0
    for delay in (0.01, 0.03, 0.05, 0.08):
        process = subprocess.Popen([sys.executable, "-c", code])
        while process.poll() is None and not (target / ".featcache").exists():
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        rounds += process.wait() == -signal.SIGKILL
    pull(f"{web.url}/cache", target)
    assert rounds >= 1
    assert tree(target) == tree(source)


def test_damage_at_the_source_is_refused(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "a" / "cache"
    shutil.copytree(source, path)
    corrupt(path / "tiny@5" / "c.1.0.0", lambda data: data.__setitem__(7, data[7] ^ 1))
    with serve(tmp_path / "a") as web:
        with pytest.raises(CacheError, match=r"tiny@5/c\.1\.0\.0 is damaged"):
            pull(f"{web.url}/cache", tmp_path / "copy")
        assert not list((tmp_path / "copy").rglob("*.part"))
        (path / "tiny@5" / "c.1.0.0").unlink()
        with pytest.raises(CacheError, match="missing"):
            pull(f"{web.url}/cache", tmp_path / "copy")
        corrupt(path / "tiny@5" / "SHA256SUMS", lambda data: data.__setitem__(7, data[7] ^ 1))
        with pytest.raises(CacheError, match="not the file that the manifest names"):
            pull(f"{web.url}/cache", tmp_path / "copy2")


def test_some_features_then_more(source: Path, web, tmp_path: Path) -> None:
    url, target = f"{web.url}/cache", tmp_path / "copy"
    pull(url, target, features=["dino@9"])
    assert set(featcache.open(target).manifest.features) == {"label", "key", "dino@9"}
    assert not (target / "vae").exists()
    pull(url, target, features=["vae/moments", "vae/G3", "tiny@5"])
    assert tree(target) == tree(source)
    with pytest.raises(CacheError, match="does not hold mae@3"):
        pull(url, target, features=["mae@3"])


def test_some_samples(source: Path, web, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    pull(f"{web.url}/cache", target, samples=20)
    cache = featcache.open(target)
    assert cache.manifest.dataset.count == 32
    assert len(cache) == 32 - len(SKIPPED)
    whole = featcache.open(source)
    assert cache.fingerprint != whole.fingerprint
    assert cache.manifest.dataset.preprocessing["subset_of"] == whole.manifest.dataset.fingerprint
    assert cache.labels().tolist() == whole.labels()[: len(cache)].tolist()
    assert verify(target).ok
    with pytest.raises(CacheError, match="other images"):
        pull(f"{web.url}/cache", target)
    assert subset(whole.manifest, None, 10**9) == whole.manifest


def test_some_samples_of_some_features_then_more(source: Path, web, tmp_path: Path) -> None:
    url, target = f"{web.url}/cache", tmp_path / "copy"
    pull(url, target, features=["tiny@5"], samples=20)
    pull(url, target, features=["dino@9"], samples=32)
    pull(url, target, samples=20)
    pull(url, tmp_path / "at once", samples=20)
    assert tree(target) == tree(tmp_path / "at once")


def test_where_nothing_is(web, tmp_path: Path) -> None:
    """A web server cannot be asked what it has, so the remedy is not to ask it."""
    with pytest.raises(CacheError, match="there is no cache at") as caught:
        pull(f"{web.url}/nothing", tmp_path / "copy")
    assert "featcache ls" not in str(caught.value.remedy) and "zarr.json" in str(caught.value.remedy)


def test_http_is_read_only_and_other_schemes_unknown(source: Path, web) -> None:
    with pytest.raises(UserError, match="can only be read"):
        push(source, f"{web.url}/new")
    with pytest.raises(UserError, match="no way to reach ftp"):
        pull("ftp://host/cache", "x")
    with pytest.raises(CacheError, match="there is no cache at"):
        pull(f"{web.url}/nothing", "x")


# Local paths


def test_push_and_pull_between_directories(source: Path, tmp_path: Path) -> None:
    push(source, str(tmp_path / "a"))
    pull(f"file://{tmp_path / 'a'}", tmp_path / "b")
    assert tree(tmp_path / "b") == tree(source)
    assert [Path(item.url).name for item in list_remote(str(tmp_path))] == ["a", "b"]
    assert list_remote(str(source))[0].n_bytes > 50_000


# S3


def test_push_list_pull_over_s3(source: Path, bucket, tmp_path: Path) -> None:
    url = f"s3://{bucket[0]}/caches/one"
    seen = Told()
    done = push(source, url, progress=seen)
    assert {k.removeprefix("caches/one/"): v for k, v in objects(bucket).items()} == tree(source)
    assert sum(seen.counts) == done.n_bytes > 0 and seen.tasks == [("sending", None, 0, "bytes")]
    assert not (source / ".featcache").exists()
    assert [item.url for item in list_remote(f"s3://{bucket[0]}/caches")] == [url]
    pull(url, tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(source)
    again = push(source, url)
    assert (again.n_files, again.n_files_before) == (0, done.n_files)


def test_root_goes_last_and_nobody_sees_half(source: Path, bucket, monkeypatch) -> None:
    url = f"s3://{bucket[0]}/cache"
    order: list[str] = []
    real_put, real_put_if = object_stores.ObjectLocation.put, object_stores.ObjectLocation.put_if

    def put(self, name, content):
        order.append(name)
        if len(order) == 14:
            raise CacheError("the network is gone")
        with pytest.raises(CacheError, match="no cache at"):
            pull(url, "nowhere")
        return real_put(self, name, content)

    def put_if(self, name, content, previous):
        done = real_put_if(self, name, content, previous)
        order.extend([name] * done)
        return done

    monkeypatch.setattr(object_stores.ObjectLocation, "put", put)
    monkeypatch.setattr(object_stores.ObjectLocation, "put_if", put_if)
    with pytest.raises(CacheError, match="network is gone"):
        push(source, url, threads=1)
    first = order[:13] + order[14:]
    assert objects(bucket).keys() == {f"cache/{name}" for name in first}
    assert collect_garbage(source, dry_run=True)
    # The rerun sends only what is missing, the root document last of all.
    order[:] = [""] * 15
    push(source, url, threads=1)
    resent = order[15:]
    assert not set(first) & set(resent)
    assert resent[-1] == "zarr.json"
    assert {k.removeprefix("cache/"): v for k, v in objects(bucket).items()} == tree(source)


def features_at(url: str) -> set[str]:
    """Of the first cache below `url`."""
    manifest = list_remote(url)[0].manifest
    assert manifest is not None
    return set(manifest.features)


def test_push_more_features_later(source: Path, bucket, tmp_path: Path) -> None:
    url = f"s3://{bucket[0]}/cache"
    push(source, url, features=["dino@9"])
    assert features_at(url) == {"dino@9", "key", "label"}
    done = push(source, url)
    assert done.n_files_before == 3 * 4 + 4  # label, key, dino@9 and its scales: four shards each
    assert {k.removeprefix("cache/"): v for k, v in objects(bucket).items()} == tree(source)


def test_two_pushes_at_once_both_arrive(source: Path, bucket, monkeypatch) -> None:
    """Another push finishes between our look at the root and our replacing it: the result holds both."""
    url = f"s3://{bucket[0]}/cache"
    real = object_stores.ObjectLocation.put_if
    calls = []

    def put_if(self, name, content, previous):
        if name != "zarr.json":
            return real(self, name, content, previous)
        calls.append(name)
        if len(calls) == 1:
            push(source, url, features=["vae/moments"])
        return real(self, name, content, previous)

    monkeypatch.setattr(object_stores.ObjectLocation, "put_if", put_if)
    push(source, url, features=["dino@9"])
    assert features_at(url) == {"dino@9", "vae/moments", "key", "label"}
    assert len(calls) == 3


@pytest.mark.parametrize("store", ["gcs", "s3"])
def test_many_pushes_at_once_all_arrive(source: Path, s3_bucket: str, tmp_path: Path, store: str, monkeypatch) -> None:
    """Of the same and of different features, from two copies of the cache, to one place. Nothing is left here."""
    copy = shutil.copytree(source, tmp_path / "copy")
    names = ["vae/moments", "vae/G3", "dino@9", "tiny@5"]
    jobs = [(cache, name) for cache in (source, copy) for name in names]
    with serve_gcs("shared") as google:
        if store == "gcs":
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", google.url)
        url = "gs://shared/cache" if store == "gcs" else f"s3://{s3_bucket}/cache"
        start = threading.Barrier(len(jobs))

        def one(job: tuple[Path, str]) -> None:
            start.wait()
            push(job[0], url, features=[job[1]], threads=2)

        with ThreadPoolExecutor(len(jobs)) as pool:
            list(pool.map(one, jobs))
        assert features_at(url) == {*names, "label", "key"}
        assert verify_remote(url).ok
    assert tree(copy) == tree(source)
    assert not (source / ".featcache").exists()


def test_a_push_removes_its_own_journal_alone(source: Path, s3_bucket: str) -> None:
    other = source / ".featcache/push/0123456789abcdef.jsonl"
    other.parent.mkdir(parents=True)
    other.write_text("another push's\n")
    try:
        push(source, f"s3://{s3_bucket}/cache", features=["dino@9"])
        assert [p.name for p in other.parent.iterdir()] == [other.name]
    finally:
        shutil.rmtree(source / ".featcache")


def test_pushes_of_other_bytes_do_not_mix(source: Path, s3_bucket: str, tmp_path: Path, monkeypatch) -> None:
    """An unfinished push keeps others from sending other bytes of its features, unless they are told to."""
    url = f"s3://{s3_bucket}/cache"
    real = object_stores.ObjectLocation.put

    def put(self, name, content):
        if name == "dino@9/c.2.0.0":
            raise CacheError("the network is gone")
        return real(self, name, content)

    monkeypatch.setattr(object_stores.ObjectLocation, "put", put)
    with pytest.raises(CacheError, match="network is gone"):
        push(source, url, features=["dino@9"])
    monkeypatch.setattr(object_stores.ObjectLocation, "put", real)
    shutil.rmtree(source / ".featcache")
    # Other bytes under the same name.
    specs = [*base_features(), tokens("dino@9", views=2)]
    other = build(tmp_path / "other", specs, skipped=SKIPPED)
    with pytest.raises(CacheError, match=r"begun to send 'dino@9.*' with other bytes(.|\n)*--replace-unfinished"):
        push(other, url, features=["dino@9"])
    push(other, url, features=["dino@9"], replace_unfinished=True)
    assert verify_remote(url).ok
    with pytest.raises(CacheError, match="with other bytes"):
        push(source, url, features=["dino@9"])


def test_a_store_without_conditional_requests(source: Path, s3_bucket: str, monkeypatch) -> None:
    """The last writer wins; whoever was overwritten notices and merges again."""
    import obstore
    from obstore.exceptions import NotSupportedError

    real = obstore.put
    raced: list[str] = []

    def put(store, name, content, **options):
        if "mode" in options:
            raise NotSupportedError("no conditions here")
        done = real(store, name, content, **options)
        if name == "zarr.json" and not raced:
            # Another push, which began earlier, overwrites what we have just written.
            raced.append(name)
            push(source, f"s3://{s3_bucket}/other", features=["vae/G3"])
            other: Any = open_destination(f"s3://{s3_bucket}/other")
            data = bytes(obstore.get(other._store, name).bytes())
            for key, value in objects_of(s3_bucket, "other/").items():
                if key != name:
                    real(store, key, value)
            real(store, name, data)
        return done

    monkeypatch.setattr(obstore, "put", put)
    push(source, f"s3://{s3_bucket}/cache", features=["dino@9"])
    held = features_at(f"s3://{s3_bucket}/cache")
    assert held == {"label", "key", "dino@9", "vae/G3"} and len(raced) == 1


def objects_of(bucket: str, prefix: str) -> dict[str, bytes]:
    import boto3

    found = objects((bucket, boto3.client("s3")))
    return {name.removeprefix(prefix): data for name, data in found.items() if name.startswith(prefix)}


def test_the_root_document_grows_while_it_is_read(source: Path, tmp_path: Path) -> None:
    """Length and bytes come in one answer: a longer document in between cannot cut it short."""
    shutil.copytree(source, tmp_path / "cache")
    with serve(tmp_path) as web:
        list_remote(f"{web.url}/cache")
        assert web.answers["cache/zarr.json"] == 1


# Links


def test_a_pull_writes_through_no_link(source: Path, web, tmp_path: Path) -> None:
    for name in ("vae", "tiny@5", ".featcache", "zarr.json", "featcache.sig"):
        target, outside = tmp_path / f"target {name}", tmp_path / f"outside {name}"
        outside.mkdir()
        pull(f"{web.url}/cache", target, features=["dino@9"])
        (target / name).unlink(missing_ok=True)
        (target / name).symlink_to(outside)
        with pytest.raises(CacheError, match="symbolic link"):
            pull(f"{web.url}/cache", target)
        assert not list(outside.iterdir())


def test_nothing_is_read_through_a_link_of_a_received_folder(source: Path, tmp_path: Path, s3_bucket: str) -> None:
    for number, name in enumerate(("tiny@5", "tiny@5/c.1.0.0", "tiny@5/SHA256SUMS", "tiny@5/BLOCKS")):
        received = shutil.copytree(source, tmp_path / f"received{number}")
        shutil.move(received / name, tmp_path / f"elsewhere{number}")
        (received / name).symlink_to(tmp_path / f"elsewhere{number}")
        with pytest.raises(CacheError, match="symbolic link"):
            pull(str(received), tmp_path / f"copy{number}")
        with pytest.raises(CacheError, match="symbolic link"):
            push(received, f"s3://{s3_bucket}/cache{number}")


def test_push_refuses_damage_and_conflicts(source: Path, bucket, tmp_path: Path) -> None:
    url = f"s3://{bucket[0]}/cache"
    damaged = tmp_path / "damaged"
    shutil.copytree(source, damaged)
    corrupt(damaged / "dino@9" / "c.0.0.0", lambda data: data.__setitem__(0, data[0] ^ 1))
    with pytest.raises(CacheError, match=r"is damaged(.|\n)*was not copied(.|\n)*featcache repair"):
        push(damaged, url)
    push(source, url)
    other = build(tmp_path / "other", count=20)
    with pytest.raises(CacheError, match="other images"):
        push(other, url)
    changed = build(tmp_path / "changed", base_features(), skipped=(4, 21))
    with pytest.raises(CacheError, match="with other bytes"):
        push(changed, url)


def test_what_arrives_damaged_is_noticed(source: Path, bucket, monkeypatch) -> None:
    real = object_stores.ObjectLocation.put
    broken = lambda self, name, content: real(self, name, b"\0" * Path(content).stat().st_size)  # noqa: E731
    monkeypatch.setattr(object_stores.ObjectLocation, "put", broken)
    with pytest.raises(CacheError, match="did not arrive as it was sent"):
        push(source, f"s3://{bucket[0]}/cache")


def test_wrong_credentials_and_missing_bucket(source: Path, bucket) -> None:
    with pytest.raises(CacheError, match="there is no bucket 'no-such-bucket-here'"):
        push(source, "s3://no-such-bucket-here/cache")
    with pytest.raises(UserError):
        open_destination("s3://")


# Streaming


@pytest.mark.parametrize("options", [{}, {"compressor": "blosc"}, {"format": "wds"}], ids=str)
def test_streaming_equals_reading(tmp_path: Path, options) -> None:
    specs = [*base_features(), tokens("v@1", views=2)]
    build(tmp_path / "a" / "cache", specs, skipped=SKIPPED, **options)
    with serve(tmp_path / "a") as web:
        web.cut_every = 7
        cache = featcache.open(f"{web.url}/cache", cache_dir=tmp_path / "blocks", cache_bytes=8 << 20)
        local = featcache.open(tmp_path / "a" / "cache")
        assert cache.fingerprint == local.fingerprint
        assert cache.labels().tolist() == local.labels().tolist()
        assert cache.keys() == local.keys()
        indices = np.random.default_rng(0).permutation(len(cache))
        with cache.reader(list(cache.manifest.features), threads=4) as reader:
            out = reader.allocate(len(cache))
            reader.read(indices, out)
        for array in cache.manifest.arrays:
            assert np.array_equal(out[array], expected(cache.manifest, array, SKIPPED)[cache.slots(indices)]), array
        with cache.reader(["v@1"], single_view=True) as reader:
            out = reader.allocate(5)
            reader.read(indices[:5], out, views=[0, 1, 1, 0, 1])
            whole = expected(cache.manifest, "v@1", SKIPPED)[cache.slots(indices[:5]), [0, 1, 1, 0, 1]]
            assert np.array_equal(out["v@1"], whole)


def test_stream_over_s3(source: Path, bucket, tmp_path: Path) -> None:
    push(source, f"s3://{bucket[0]}/cache")
    cache = featcache.open(f"s3://{bucket[0]}/cache", cache_dir=tmp_path / "blocks")
    assert cache.labels().tolist() == featcache.open(source).labels().tolist()


def stream_blocks(web, directory: Path, limit: int, block: int, monkeypatch) -> tuple[featcache.Cache, BlockCache]:
    """The cache at `web`, read in blocks of `block` bytes."""
    monkeypatch.setattr(hashes, "BLOCK_BYTES", block)
    cache = open_remote(f"{web.url}/cache", cache_dir=directory.parent / "unused")
    backend: Any = cache.backend
    backend.blocks = BlockCache(open_location(f"{web.url}/cache"), directory, limit)
    return cache, backend.blocks


def directory_bytes(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.iterdir())


def test_local_blocks_stay_within_their_bound(source: Path, plain_web, tmp_path: Path, monkeypatch) -> None:
    limit, block = 20 << 10, 2 << 10
    cache, blocks = stream_blocks(plain_web, tmp_path / "blocks", limit, block, monkeypatch)
    rng = np.random.default_rng(0)
    whole = expected(cache.manifest, "tiny@5", SKIPPED)
    with cache.reader(["tiny@5", "vae/moments"], threads=3) as reader:
        out = reader.allocate(8)
        for _ in range(12):
            indices = rng.integers(0, len(cache), 8)
            reader.read(indices, out)
            assert np.array_equal(out["tiny@5"], whole[cache.slots(indices)])
            assert directory_bytes(tmp_path / "blocks") <= limit + 3 * (block + 4)
    assert blocks.fetched_bytes > limit
    # A new process finds them again, within the bound.
    reopened = BlockCache(open_location(f"{plain_web.url}/cache"), tmp_path / "blocks", 10 << 10)
    assert directory_bytes(tmp_path / "blocks") <= 10 << 10
    assert reopened.fetched_bytes == 0


def test_sequential_order_fetches_every_block_once(source: Path, plain_web, tmp_path: Path, monkeypatch) -> None:
    limit, block = 64 << 10, 4 << 10
    cache, blocks = stream_blocks(plain_web, tmp_path / "blocks", limit, block, monkeypatch)
    order = sequential_order(0, 0, len(cache), cache.manifest.shard_size, window=1)
    with cache.reader(["tiny@5"], threads=0) as reader:
        out = reader.allocate(8)
        for start in range(0, len(cache), 8):
            reader.read(order[start : start + 8], out)
    size = sum((source / "tiny@5" / f"c.{i}.0.0").stat().st_size for i in range(4))
    size += sum((source / "tiny@5.scale" / f"c.{i}.0").stat().st_size for i in range(4))
    assert blocks.fetched_bytes <= size


def test_damaged_local_blocks_are_fetched_again(source: Path, plain_web, tmp_path: Path, monkeypatch) -> None:
    directory = tmp_path / "blocks"
    cache, _ = stream_blocks(plain_web, directory, 1 << 20, 4 << 10, monkeypatch)
    labels = cache.labels()
    for p in directory.iterdir():
        corrupt(p, lambda data: data.__setitem__(0, data[0] ^ 0xFF))
    (directory / "1-2.new").write_bytes(b"left by a dead process")
    cache, blocks = stream_blocks(plain_web, directory, 1 << 20, 4 << 10, monkeypatch)
    assert cache.labels().tolist() == labels.tolist()
    assert blocks.fetched_bytes > 0
    assert not (directory / "1-2.new").exists()


def test_streaming_with_a_full_disk_and_a_dead_server(source: Path, web, tmp_path, monkeypatch) -> None:
    cache, _ = stream_blocks(web, tmp_path / "blocks", 1 << 20, 4 << 10, monkeypatch)

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    labels = cache.labels()
    assert len(labels) == COUNT - len(SKIPPED)
    web.broken = True
    reader = cache.reader(["dino@9"])
    with pytest.raises(CacheError, match="failed 8 times"):
        reader.read([0], reader.allocate(1))


def test_too_small_a_local_cache(web, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="at least"):
        featcache.open(f"{web.url}/cache", cache_dir=tmp_path, cache_bytes=1000)


# Google Cloud Storage


def test_push_list_pull_verify_over_gcs(source: Path, tmp_path: Path, monkeypatch) -> None:
    with serve_gcs("shared") as google:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", google.url)
        url = "gs://shared/caches/one"
        assert open_destination(url).version("zarr.json") is None
        push(source, url, features=["vae/moments"])
        push(source, url)
        sent = {name.removeprefix("caches/one/"): data for name, (data, _) in google.objects.items()}
        assert sent == tree(source)
        assert [item.url for item in list_remote("gs://shared/caches")] == [url]
        assert verify_remote(url).ok
        pull(url, tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(source)


def test_gcs_writes_of_two_pushes_both_arrive(source: Path, monkeypatch) -> None:
    """Another push finishes between our reading and our writing of the root document: ours merges with it."""
    with serve_gcs("shared") as google:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", google.url)
        url = "gs://shared/cache"
        real = object_stores.ObjectLocation.put_if
        raced: list[str] = []

        def put_if(self, name, content, previous):
            if name == "zarr.json" and not raced:
                raced.append(name)
                push(source, url, features=["dino@9"])
            return real(self, name, content, previous)

        monkeypatch.setattr(object_stores.ObjectLocation, "put_if", put_if)
        push(source, url, features=["vae/G3"])
        assert [name for name in google.refused if not name.endswith("SHA256SUMS")] == ["cache/zarr.json"]
        held = features_at(url)
        assert held == {"label", "key", "dino@9", "vae/G3"}
        assert verify_remote(url).ok


# Checking a cache where it lies


def test_verify_remote_finds_what_verify_finds(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "cache")
    local = verify(tmp_path / "cache")
    with serve(tmp_path) as web:
        seen = Told()
        report = verify_remote(f"{web.url}/cache", progress=seen)
        assert report.ok and (report.n_files, sum(seen.counts) > 0) == (local.n_files, True)
        shard = next((tmp_path / "cache" / "dino@9").glob("c/**/*"), None) or next(
            p for p in sorted((tmp_path / "cache" / "dino@9").iterdir()) if p.name.startswith("c.")
        )
        corrupt(shard, lambda data: data.__setitem__(3, data[3] ^ 1))
        other = next(p for p in sorted((tmp_path / "cache" / "vae/G3").iterdir()) if p.name.startswith("c."))
        other.unlink()
        (tmp_path / "cache" / "label" / "zarr.json").write_text("{}")
        found = {p.path.removeprefix(f"{web.url}/cache/"): p.what for p in verify_remote(f"{web.url}/cache").problems}
        expected = {p.path.removeprefix(f"{tmp_path}/cache/"): p.what for p in verify(tmp_path / "cache").problems}
        assert set(found) == set(expected) and len(found) == 3
        assert found[f"dino@9/{shard.name}"] == "its bytes do not match the recorded SHA-256"
        only = verify_remote(f"{web.url}/cache", features=["vae/moments"])
        assert [p.path for p in only.problems] == [f"{web.url}/cache/label/zarr.json"]


def test_info_and_verify_take_urls(source: Path, web, capsys, monkeypatch, tmp_path: Path) -> None:
    from featcache.cli import app
    from featcache.console import run_app

    monkeypatch.setenv("FEATCACHE_STREAM_DIR", str(tmp_path))
    outputs = []
    for words in (["info"], ["verify"], ["verify", "--repair"]):
        monkeypatch.setattr(sys, "argv", ["featcache", words[0], f"{web.url}/cache", *words[1:]])
        code = run_app(app)
        captured = capsys.readouterr()
        outputs.append((code, captured.out + captured.err))
    assert [code for code, _ in outputs] == [0, 0, 2]
    assert "dino@9" in outputs[0][1] and "sound" in outputs[1][1]
    assert "cannot be repaired where it lies" in outputs[2][1]


# The hub's https interface


def test_hub_urls(source: Path, monkeypatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    assert parse_hub_url("hf://datasets/me/set@v1/a/b") == ("me/set", "v1", "a/b")
    assert parse_hub_url("hf://datasets/me/set") == ("me/set", "main", "")
    for bad in ("hf://models/x/y", "hf://datasets/x", "hf://datasets/a/b/../c"):
        with pytest.raises(UserError, match="not understood"):
            parse_hub_url(bad)
    assert is_remote("hf://datasets/a/b")
    assert not is_remote("./a")
    with serve(source.parent) as web:
        web.prefix = "/datasets/me/set/resolve/main"
        monkeypatch.setattr(constants, "ENDPOINT", web.url)
        assert [
            i.manifest.dataset.count for i in list_remote("hf://datasets/me/set/cache") if i.manifest is not None
        ] == [COUNT]
        pull("hf://datasets/me/set/cache", tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(source)


def test_push_to_the_hub_is_one_commit(source: Path, monkeypatch) -> None:
    """The hub's client is replaced by one that records: what would be committed, and that it is one
    commit.
    """
    import huggingface_hub

    commits = []

    class Api:
        def create_repo(self, repository, **options):
            assert (repository, options["repo_type"]) == ("me/set", "dataset")

        def repo_info(self, repository, **options):
            return SimpleNamespace(sha="parent")

        def create_commit(self, repository, operations, **options):
            assert options["parent_commit"] == "parent"
            commits.append({o.path_in_repo: o.path_or_fileobj for o in operations})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr("featcache.share.transfer.read_remote_root", lambda place: None)
    push(source, "hf://datasets/me/set/cache")
    assert len(commits) == 1
    sent = {
        name.removeprefix("cache/"): data if isinstance(data, bytes) else Path(data).read_bytes()
        for name, data in commits[0].items()
    }
    assert sent == tree(source)


def test_add_to_a_pulled_cache(source: Path, web, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    pull(f"{web.url}/cache", target, features=["tiny@5"])
    add(target, [tokens("new@1")], SKIPPED)
    assert verify(target).ok


def test_what_a_pull_into_a_wrong_folder_says_can_be_done(source: Path, tmp_path: Path) -> None:
    """`pull` and `convert` have no --out and no --data."""
    pull(str(source), tmp_path / "part", samples=1)
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_bytes(b"")
    for target in ("part", "file", "folder"):
        with pytest.raises(CacheError) as caught:
            pull(str(source), tmp_path / target)
        assert caught.value.remedy is not None and "--" not in caught.value.remedy
        assert "another folder" in caught.value.remedy
