"""Thousands of malformed inputs: each a clear error or harmless; never a crash, a hang, a path outside."""

import copy
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from store_helpers import COUNT, SHARD_SIZE, base_features, build, dataset, tokens

import featcache
from featcache.codecs import decode
from featcache.errors import CacheError, UserError
from featcache.share.verify import verify
from featcache.store import Manifest, files
from featcache.store.contents import parse_checksums
from featcache.store.layout import stored_arrays
from featcache.store.manifest import dataset_from_json, load_json, manifest_from_json
from featcache.store.root import parse_root, root_bytes
from featcache.store.shards import decompress, encode_shard, parse_index
from featcache.store.writer import journal_entry
from featcache.store.writers import create_writer

FUZZ = settings(
    deadline=None,
    max_examples=600,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FUZZ_FILES = settings(FUZZ, max_examples=150)

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["..", "../../etc/passwd", "/etc/passwd", "label", "a/../../b", "raw", "object", "|O", "\ud800"])
)
JSON = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3))


@pytest.fixture(scope="module", autouse=True)
def no_fsync():
    patch = pytest.MonkeyPatch()
    patch.setattr(files, "_fsync", lambda fd: None)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return build(
        tmp_path_factory.mktemp("fuzz") / "cache",
        [*base_features(), tokens("i@4", codec="int4")],
        skipped=[4],
    )


@pytest.fixture(scope="module")
def root(path: Path) -> dict[str, Any]:
    return json.loads((path / "zarr.json").read_bytes())


def places(value: Any, prefix: tuple = ()) -> list[tuple]:
    """Paths of all nodes of a JSON value."""
    found = [prefix]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        found += places(child, (*prefix, key))
    return found


def mutate(draw: st.DataObject, value: Any) -> Any:
    """A copy with up to three nodes replaced, removed, doubled or renamed."""
    value = copy.deepcopy(value)
    for _ in range(draw.draw(st.integers(1, 3))):
        *parents, last = draw.draw(st.sampled_from(places(value)[1:]))
        node = value
        for key in parents:
            node = node[key]
        action = draw.draw(st.sampled_from(["replace", "remove", "rename", "nudge"]))
        if action == "remove":
            del node[last]
        elif action == "rename" and isinstance(node, dict):
            node[draw.draw(st.text(max_size=12) | st.sampled_from(["..", "a/../b", "/abs"]))] = node.pop(last)
        elif action == "nudge" and type(node[last]) is int:
            node[last] += draw.draw(st.sampled_from([-1, 1, 2**32, -(2**63)]))
        else:
            node[last] = draw.draw(JSON)
        if len(places(value)) < 2:
            break
    return value


def dump(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


@FUZZ
@given(draw=st.data())
def test_manifest_mutations(root, draw) -> None:
    original = root["attributes"]["featcache"]
    changed = mutate(draw, original)
    try:
        manifest = manifest_from_json(load_json(dump(changed), "it"))
    except CacheError:
        return
    # What passes is well-formed: it writes, reads back equal and keeps every path inside.
    assert manifest_from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert parse_root(root_bytes(manifest), "it") == manifest
    for array in manifest.arrays:
        assert ".." not in array
        assert not Path(array).is_absolute()
    assert manifest.n_shards <= 1 << 20


@FUZZ
@given(draw=st.data())
def test_root_document_mutations(root, draw) -> None:
    """Manifest, consolidated zarr metadata or checksum changed anywhere: never opens as something else."""
    changed = mutate(draw, root)
    try:
        manifest = parse_root(dump(changed), "it")
    except CacheError:
        return
    assert json.loads(root_bytes(manifest)) == changed == root


@FUZZ
@given(data=st.binary(max_size=200) | JSON.map(dump))
@example(b"[" * 100_000)
@example(b'{"a":' * 50_000)
@example(b"9" * 100_000)
@example(b'{"a": 1e999}')
@example(b'{"a": NaN}')
@example(b'{"a": 1, "a": 2}')
@example(b"\xff\xfe{\x00")
@example(b'"\\ud800"')
def test_arbitrary_documents(data: bytes) -> None:
    with pytest.raises(CacheError):
        parse_root(data, "it")


@FUZZ_FILES
@given(position=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.booleans())
def test_damaged_root_file(path: Path, position: int, byte: int, cut: bool) -> None:
    data = bytearray((path / "zarr.json").read_bytes())
    position %= len(data)
    if cut:
        data = data[:position]
    else:
        assume(data[position] != byte)
        data[position] = byte
    try:
        manifest = parse_root(bytes(data), "it")
    except CacheError:
        return
    # White space may differ; nothing else.
    assert root_bytes(manifest) == (path / "zarr.json").read_bytes()


INDEX_VALUES = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 2, 1024])


@FUZZ
@given(draw=st.data(), n=st.integers(1, 4), file_bytes=st.integers(0, 5000))
def test_shard_indices(draw, n: int, file_bytes: int) -> None:
    """Any index with a right checksum: refused, or all samples lie inside the file."""
    entries = draw.draw(st.lists(st.tuples(INDEX_VALUES, INDEX_VALUES), min_size=4, max_size=4))
    good = draw.draw(st.integers(0, 4))
    table = [(i * 64, 64) for i in range(good)] + entries[good:]
    for i in range(n, 4):
        if draw.draw(st.booleans()):
            table[i] = (2**64 - 1, 2**64 - 1)
    raw = np.array(table, np.uint64).tobytes()
    raw += struct.pack("<I", google_crc32c.value(raw))
    size = draw.draw(st.sampled_from([64, None]))
    try:
        offsets, lengths = parse_index(
            raw, n=n, shard_size=4, file_bytes=len(raw) + file_bytes, sample_bytes=size, where="it"
        )
    except CacheError:
        return
    assert (offsets >= 0).all()
    assert (lengths >= 0).all()
    assert all(int(o) + int(length) <= file_bytes for o, length in zip(offsets, lengths, strict=True))


@FUZZ
@given(raw=st.binary(max_size=100))
def test_arbitrary_indices(raw: bytes) -> None:
    with pytest.raises(CacheError):
        parse_index(raw, n=1, shard_size=4, file_bytes=1000, sample_bytes=8, where="it")


@pytest.mark.parametrize("options", [{}, {"compressor": "zstd"}, {"compressor": "blosc"}, {"format": "wds"}], ids=str)
def test_damaged_shard_files(tmp_path: Path, options) -> None:
    """Reading through any damaged shard or tar: an error, or as many bytes as asked for."""
    path = build(tmp_path / "cache", base_features()[2:], **options)
    victims = [p for p in path.rglob("*") if p.suffix == ".tar" or p.name.startswith("c.")]

    @FUZZ_FILES
    @given(draw=st.data())
    def damage(draw) -> None:
        victim = draw.draw(st.sampled_from(sorted(victims)))
        original = victim.read_bytes()
        data = bytearray(original)
        if draw.draw(st.booleans()):
            data = data[: draw.draw(st.integers(0, len(data) - 1))]
        else:
            start = draw.draw(st.integers(0, len(data) - 1))
            patch = draw.draw(st.binary(min_size=1, max_size=600))
            data[start : start + len(patch)] = patch[: len(data) - start]
        try:
            victim.write_bytes(data)
            cache = featcache.open(path)
            with cache.reader(list(cache.manifest.features), threads=0) as reader:
                out = reader.allocate(COUNT)
                try:
                    reader.read(range(COUNT), out)
                except CacheError as error:
                    assert "damaged" in str(error) or "shorter" in str(error)
            assert verify(path, threads=1).ok == (bytes(data) == original)
        finally:
            victim.write_bytes(original)

    damage()


@pytest.mark.parametrize("compressor", ["zstd", "blosc"])
def test_compressed_bombs_are_refused_before_they_grow(compressor: str) -> None:
    huge = np.zeros((1, 64 << 20), np.uint8)
    body, *_ = encode_shard(huge, 1, compressor)
    out = np.zeros(1024, np.uint8)
    tracemalloc.start()
    with pytest.raises(CacheError, match="claims 67108864 bytes, not 1024"):
        decompress(compressor, bytes(body), out, "it")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@FUZZ
@given(data=st.binary(max_size=80), compressor=st.sampled_from(["zstd", "blosc"]), magic=st.booleans())
def test_arbitrary_compressed_samples(data: bytes, compressor: str, magic: bool) -> None:
    if magic and compressor == "zstd":
        data = b"\x28\xb5\x2f\xfd" + data
    if magic and compressor == "blosc":
        data = b"\x02\x01\x01\x01" + struct.pack("<III", 32, 32, 16 + len(data)) + data
    out = np.zeros(32, np.uint8)
    try:
        decompress(compressor, data, out, "it")
    except CacheError:
        return
    assert out.nbytes == 32


@FUZZ
@given(data=st.binary(max_size=200) | st.text(max_size=200).map(lambda s: s.encode("utf-8", "surrogatepass")))
def test_checksum_files(data: bytes) -> None:
    with pytest.raises(CacheError):
        parse_checksums(data, ["c.0", "c.1"], "it")


def test_journal_mutations(tmp_path: Path) -> None:
    """A damaged journal stops the build with a clear error that says what to do."""
    spec = tokens()
    with create_writer(tmp_path / "cache", dataset(), shard_size=SHARD_SIZE) as writer:
        writer.begin([spec])
        arrays = {s: np.zeros((16, *shape), dtype) for s, (dtype, shape) in stored_arrays("int8", (16, 32)).items()}
        writer.skip(0, [(3, "key", "reason")])
        writer.write_shard("tiny@5", 0, arrays)
    entry_path = next((tmp_path / "cache").rglob("00000000.json"))
    original = json.loads(entry_path.read_bytes())

    @FUZZ_FILES
    @given(draw=st.data())
    def damage(draw) -> None:
        changed = dump(mutate(draw, original))
        target = tmp_path / "entry.json"
        target.write_bytes(changed)
        try:
            entry = journal_entry(target, spec, COUNT)
        except CacheError:
            return
        assert set(entry.checksums) == set(spec.arrays) >= set(entry.blocks)
        assert all(len(digest) == 64 for digest in entry.checksums.values())
        assert all(0 <= skipped.slot < COUNT for skipped in entry.skipped)

    damage()


@FUZZ
@given(draw=st.data())
def test_dataset_mutations(draw) -> None:
    try:
        found = dataset_from_json(mutate(draw, dataset().to_json()))
    except CacheError:
        return
    assert 1 <= found.count <= 1 << 40


@settings(deadline=None, max_examples=300)
@given(draw=st.data(), codec=st.sampled_from(["int8", "fp8", "int4", "fp16", "bf16"]))
def test_any_stored_bytes_decode(draw, codec: str) -> None:
    """Values and scales of any bits (NaN, infinite, negative): a tensor of the right shape, no exception."""
    shape = (3, 64)
    stored = {}
    for suffix, (dtype, stored_shape) in stored_arrays(codec, shape).items():
        n_bytes = 2 * dtype.itemsize * int(np.prod(stored_shape))
        raw = draw.draw(st.binary(min_size=n_bytes, max_size=n_bytes) | st.just(b"\xff" * n_bytes))
        array = np.frombuffer(bytearray(raw), dtype).reshape(2, *stored_shape)
        stored[suffix] = torch.from_numpy(array)
    assert decode(codec, stored, shape).shape == (2, *shape)


def test_a_manifest_that_claims_too_much_allocates_nothing(tmp_path: Path) -> None:
    """A trillion samples in a hundred bytes: opening and asking for labels fail fast and small."""
    specs = base_features()[:1]
    manifest = Manifest(
        dataset=dataset(2**39), shard_size=2**20, features={"label": specs[0]}, checksums={"label": "0" * 64}
    )
    (tmp_path / "label").mkdir()
    (tmp_path / "zarr.json").write_bytes(root_bytes(manifest))
    tracemalloc.start()
    cache = featcache.open(tmp_path)
    reader = cache.reader(["label"])
    out = reader.allocate(4)
    with pytest.raises(CacheError, match="cannot be read"):
        reader.read([0, 1, 2**38, 2**39 - 1], out)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    with pytest.raises(CacheError):
        cache.labels()


def test_objects_are_never_stored() -> None:
    for dtype in ("object", "|O", "O", "V8", "<U8", "datetime64"):
        with pytest.raises(UserError):
            tokens(codec="raw", dtype=dtype)
