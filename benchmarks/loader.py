"""How fast do batches of cached features reach host memory? Ours beside the loaders that people use.

    python benchmarks/loader.py --records repa --cold --write   # 212 KB per image: moments and DINOv2-B tokens
    python benchmarks/loader.py --records ahpa --write          # 1.06 MB: moments and eight VAE layers
    python benchmarks/loader.py --records repa --whole

Every loader holds the same values and copies whole batches into preallocated, page-aligned buffers, in one
process. The peers appear a second time as their users meet them, a DataLoader's `default_collate` stacking
the samples. Features keep their own arrays, columns or members, as a trainer wants them; only
one-file-per-image stores a sample as a single blob, which suits it best. Rounds are interleaved, so that whatever else the
machine does hits all alike; the figure is the median of the rounds. The raw memory limit copies the same
records from one array in memory, row by row, with as many threads as our reader.

`--whole` has whole loaders instead, as a training loop iterates over them: our `featcache.torch.Loader` and `Dataset`, and the
peers in a DataLoader with two workers each.

`--cold` evicts the files from the page cache before each pass (posix_fadvise; no root needed). `--write`
compares the cache writer (hashing, fsync and rename included) with writing the same bytes to plain files
(fsync included).
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import featcache
from featcache.machine import describe_machine
from featcache.store import DatasetSpec, FeatureSpec
from featcache.store.layout import STATE, recommended_shard_size
from featcache.store.writers import create_writer

BATCH = 64
SAMPLES_A_FILE = 128
RESULTS = Path(__file__).parent / "results"
COLLATED = ", collated"
WORKERS = 2

Batches = Iterator[np.ndarray]


@dataclass(frozen=True)
class Records:
    """Synthetic records: every array's stored values, and the same bytes as one blob per sample."""

    specs: list[FeatureSpec]
    arrays: dict[str, np.ndarray]
    blobs: np.ndarray


def make_records(kind: str, n: int) -> Records:
    """`n` random records of REPA's or AHPA's size."""
    specs = [
        FeatureSpec(name="label", shape=(), codec="raw", dtype="int64"),
        FeatureSpec(name="vae/moments", shape=(8, 32, 32), codec="fp16"),
    ]
    if kind == "repa":
        specs.append(FeatureSpec(name="dinov2-b@11", shape=(256, 768), codec="int8"))
    else:
        specs += [FeatureSpec(name=f"vae/{g}", shape=(4, 256, 512), codec="int8") for g in ("G3", "G4")]
    rng = np.random.default_rng(0)
    lengths = {a: int(np.prod(s)) * d.itemsize for spec in specs for a, (d, s) in spec.arrays.items()}
    blobs = rng.integers(0, 256, (n, sum(lengths.values())), dtype=np.uint8)
    arrays, start = {}, 0
    for spec in specs:
        for array, (dtype, shape) in spec.arrays.items():
            part = np.ascontiguousarray(blobs[:, start : start + lengths[array]])
            arrays[array] = part.reshape(-1).view(dtype).reshape(n, *shape)
            start += lengths[array]
    return Records(specs, arrays, blobs)


def write_cache(path: Path, records: Records, shard_size: int) -> None:
    n = len(records.blobs)
    dataset = DatasetSpec(name="bench", count=n, class_names=("a",), fingerprint="0" * 64)
    with create_writer(path, dataset, shard_size=shard_size) as writer:
        writer.begin(records.specs)
        for shard in writer.pending():
            slots = writer.slots(shard)
            for spec in records.specs:
                parts = {a[len(spec.name) :]: records.arrays[a][slots.start : slots.stop] for a in spec.arrays}
                writer.write_shard(spec.name, shard, parts)
        writer.finish()


# Fills or makes a batch of the samples with these indices.
Reader = Callable[[np.ndarray], None]
# The arrays of one sample.
Samples = Callable[[int], dict[str, np.ndarray]]


def batch_buffer(records: Records) -> np.ndarray:
    """A batch of blobs, page-aligned like our reader's buffers, so that no loader copies at a
    disadvantage.
    """
    length = records.blobs.shape[1]
    buffer = np.empty(BATCH * length + 4096, np.uint8)
    start = -buffer.ctypes.data % 4096
    return buffer[start : start + BATCH * length].reshape(BATCH, length)


def raw_memory(records: Records, threads: int) -> Reader:
    out = batch_buffer(records)
    pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def copy(rows: list[tuple[int, int]]) -> None:
        for row, index in rows:
            out[row] = records.blobs[index]

    def read(indices: np.ndarray) -> None:
        rows = list(enumerate(indices.tolist()))
        if pool is None:
            copy(rows)
            return
        cuts = [len(rows) * i // threads for i in range(threads + 1)]
        list(pool.map(copy, [rows[a:b] for a, b in itertools.pairwise(cuts)]))

    return read


def ours(path: Path, records: Records, threads: int) -> Reader:
    reader = featcache.open(path).reader([spec.name for spec in records.specs], threads=threads)
    out = reader.allocate(BATCH)
    return lambda indices: reader.read(indices, out)


def zarr_python(path: Path, records: Records) -> Reader:
    import zarr

    group = zarr.open_group(path, mode="r")
    arrays: dict[str, Any] = {name: group[name] for name in records.arrays}
    out = array_buffers(records)

    def read(indices: np.ndarray) -> None:
        for name, array in arrays.items():
            out[name][: len(indices)] = array.get_orthogonal_selection(indices)

    return read


def tensorstore(path: Path, records: Records) -> Reader:
    import tensorstore as ts

    def open_array(name: str) -> Any:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / name)}}
        return ts.open(spec, open=True, recheck_cached_data="open").result()

    arrays = {name: open_array(name) for name in records.arrays}
    out = array_buffers(records)

    def read(indices: np.ndarray) -> None:
        pending = {name: array[indices].read() for name, array in arrays.items()}
        for name, future in pending.items():
            out[name][: len(indices)] = future.result()

    return read


def write_npy(folder: Path, records: Records) -> None:
    folder.mkdir(parents=True)
    for i, blob in enumerate(records.blobs):
        np.save(folder / f"{i:08d}.npy", blob)


def npy_per_image(folder: Path, records: Records) -> Samples:
    def sample(index: int) -> dict[str, np.ndarray]:
        return {"blob": np.load(folder / f"{index:08d}.npy")}

    return sample


def into_buffers(samples: Samples, records: Records) -> Reader:
    """Copies each array of each sample straight into the batch's aligned buffers: kinder than most training code."""
    out: dict[str, np.ndarray] = array_buffers(records) | {"blob": batch_buffer(records)}

    def read(indices: np.ndarray) -> None:
        for row, index in enumerate(indices.tolist()):
            for name, value in samples(index).items():
                out[name][row] = value

    return read


def collated(samples: Samples) -> Reader:
    """What a DataLoader does with a dataset's samples: lists of them, stacked by torch's default_collate."""
    import torch
    from torch.utils.data import default_collate

    torch.set_num_threads(1)  # as in a DataLoader's workers

    def read(indices: np.ndarray) -> None:
        default_collate([samples(index) for index in indices.tolist()])

    return read


def array_buffers(records: Records) -> dict[str, np.ndarray]:
    """A batch's page-aligned buffer for each array."""
    found = {}
    for name, values in records.arrays.items():
        n_bytes = BATCH * values[0].nbytes
        buffer = np.empty(n_bytes + 4096, np.uint8)
        start = -buffer.ctypes.data % 4096
        found[name] = buffer[start : start + n_bytes].view(values.dtype).reshape(BATCH, *values.shape[1:])
    return found


def write_safetensors(folder: Path, records: Records) -> None:
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    for file, start in enumerate(range(0, len(records.blobs), SAMPLES_A_FILE)):
        part = {name: values[start : start + SAMPLES_A_FILE] for name, values in records.arrays.items()}
        save_file(part, folder / f"{file:05d}.st")


def safetensors_slices(folder: Path, records: Records) -> Samples:
    from safetensors import safe_open

    files: list[Any] = [safe_open(path, framework="np") for path in sorted(folder.glob("*.st"))]
    slices = {name: [file.get_slice(name) for file in files] for name in records.arrays}

    def sample(index: int) -> dict[str, np.ndarray]:
        file, place = divmod(index, SAMPLES_A_FILE)
        return {name: parts[file][place : place + 1][0] for name, parts in slices.items()}

    return sample


def write_mds(folder: Path, records: Records) -> None:
    from streaming import MDSWriter

    columns = {n.replace("/", "."): "ndarray" if v.ndim > 1 else "int" for n, v in records.arrays.items()}
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for i in range(len(records.blobs)):
            row = {name.replace("/", "."): values[i] for name, values in records.arrays.items()}
            writer.write({name: value if value.ndim else int(value) for name, value in row.items()})


def mosaicml_mds(folder: Path, records: Records) -> Samples:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(folder), shuffle=False, batch_size=BATCH)

    def sample(index: int) -> dict[str, np.ndarray]:
        found = dataset[index]
        return {name: found[name.replace("/", ".")] for name in records.arrays}

    return sample


def write_webdataset(folder: Path, records: Records) -> None:
    import webdataset

    folder.mkdir(parents=True)
    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=SAMPLES_A_FILE, verbose=0) as writer:
        for i in range(len(records.blobs)):
            members = {f"{name.replace('/', '+')}.npy": np.asarray(v[i]) for name, v in records.arrays.items()}
            writer.write({"__key__": f"{i:08d}", **members})


def webdataset_tar(folder: Path, records: Records) -> Samples:
    """Streams; it has no random access, so its figure is the same stream in either order."""
    import webdataset

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    # webdataset lower-cases member names.
    members = {name: f"{name.replace('/', '+')}.npy".lower() for name in records.arrays}

    def stream() -> Iterator[dict[str, Any]]:
        while True:
            yield from webdataset.WebDataset(urls, shardshuffle=False).decode()

    samples = stream()

    def sample(index: int) -> dict[str, np.ndarray]:
        found = next(samples)
        return {name: found[member] for name, member in members.items()}

    return sample


def batches(order: str, n: int, seed: int) -> Batches:
    indices = np.random.default_rng(seed).permutation(n) if order == "random" else np.arange(n)
    for start in range(0, n - BATCH + 1, BATCH):
        yield indices[start : start + BATCH]


def rate(read: Reader, order: str, n: int, seed: int, limit_s: float) -> float:
    """Images per second over one pass, or over as much of it as fits into `limit_s`."""
    done, start = 0, time.perf_counter()
    for indices in batches(order, n, seed):
        read(indices)
        done += len(indices)
        if time.perf_counter() - start > limit_s:
            break
    return done / (time.perf_counter() - start)


def evict(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def write_all(work: Path, records: Records) -> None:
    """The same records as each loader wants them."""
    write_cache(work / "cache", records, SAMPLES_A_FILE)
    write_npy(work / "npy", records)
    write_safetensors(work / "safetensors", records)
    write_webdataset(work / "webdataset", records)
    try:
        write_mds(work / "mds", records)
    except ImportError as error:
        print(f"without MosaicML streaming: {error}", file=sys.stderr)


def measure_reading(args: argparse.Namespace, records: Records, work: Path) -> dict[str, Any]:
    n, threads = len(records.blobs), args.threads
    loaders: dict[str, tuple[Path | None, Callable[[], Reader]]] = {
        "raw memory x1": (None, lambda: raw_memory(records, 1)),
        f"raw memory x{threads}": (None, lambda: raw_memory(records, threads)),
        "featcache x1": (work / "cache", lambda: ours(work / "cache", records, 0)),
        f"featcache x{threads}": (work / "cache", lambda: ours(work / "cache", records, threads)),
        "tensorstore": (work / "cache", lambda: tensorstore(work / "cache", records)),
        "zarr-python": (work / "cache", lambda: zarr_python(work / "cache", records)),
    }
    peers: dict[str, tuple[Path, Callable[[Path, Records], Samples]]] = {
        "safetensors slices": (work / "safetensors", safetensors_slices),
        "one .npy per image": (work / "npy", npy_per_image),
        "webdataset": (work / "webdataset", webdataset_tar),
    }
    if (work / "mds").is_dir():
        peers["MosaicML streaming"] = (work / "mds", mosaicml_mds)
    for name, (place, open_peer) in peers.items():
        loaders[name] = (place, lambda f=place, o=open_peer: into_buffers(o(f, records), records))  # type: ignore[misc]
        loaders[f"{name}{COLLATED}"] = (place, lambda f=place, o=open_peer: collated(o(f, records)))  # type: ignore[misc]
    readers = {name: make() for name, (_, make) in loaders.items()}
    conditions = ["warm", "cold"] if args.cold else ["warm"]
    rates: dict[str, dict[str, list[float]]] = {name: {} for name in loaders}
    for condition in conditions:
        for order in ("random", "sequential"):
            key = f"{condition} {order}"
            for round_number in range(-1 if condition == "warm" else 0, args.rounds):
                for name, (folder, make) in loaders.items():
                    if condition == "cold":
                        if folder is None:
                            continue
                        # Pages that anybody maps stay: whoever else reads these files lets go of them first.
                        for other, (theirs, _) in loaders.items():
                            if theirs == folder:
                                readers.pop(other, None)
                        gc.collect()
                        readers[name] = make()
                        evict(folder)
                    found = rate(readers[name], order, n, round_number + 1, args.limit_s)
                    if round_number >= 0:  # the first pass warms up
                        rates[name].setdefault(key, []).append(found)
    return {
        name: {key: {"median": statistics.median(v), "rounds": v} for key, v in by_key.items()}
        for name, by_key in rates.items()
    }


def of_dataloader(dataset: Any, **options: Any) -> Iterator[Any]:
    """Batches of a DataLoader with two workers, epoch after epoch."""
    from torch.utils.data import DataLoader

    loader = DataLoader(dataset, batch_size=BATCH, num_workers=WORKERS, persistent_workers=True, **options)
    while True:
        yield from loader


class SafetensorsDataset:
    """Samples of many in a file, as people write it."""

    def __init__(self, folder: Path, records: Records) -> None:
        self._sample, self._count = safetensors_slices(folder, records), len(records.blobs)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._sample(index)


def of_webdataset(folder: Path) -> Iterator[Any]:
    import webdataset

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    stream = webdataset.WebDataset(urls, shardshuffle=len(urls), nodesplitter=None, seed=0).shuffle(256).decode()
    loader = webdataset.WebLoader(stream, batch_size=BATCH, num_workers=WORKERS, persistent_workers=True)
    while True:
        for batch in loader:
            if len(batch["__key__"]) == BATCH:  # each worker's last is short
                yield batch


def of_mds(folder: Path) -> Iterator[Any]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    return of_dataloader(StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH))


def of_reader(cache: Path, names: list[str], threads: int) -> Iterator[Any]:
    """Our reader in the training process, without a thread that reads ahead: what a loader is compared with."""
    opened = featcache.open(cache)
    reader = opened.reader(names, threads=threads)
    out = reader.allocate(BATCH)
    for epoch in itertools.count():
        order = featcache.epoch_order(0, epoch, len(opened))
        for start in range(0, len(opened) - BATCH + 1, BATCH):
            reader.read(np.asarray(order[start : start + BATCH]), out)
            yield out


def in_training(work: Path, records: Records, threads: int) -> dict[str, Callable[[], Iterator[Any]]]:
    """What a training loop iterates over: batches of tensors in the training process, in shuffled order."""
    import torch

    from featcache.torch import Dataset, Loader

    cache, names = work / "cache", [spec.name for spec in records.specs]
    ways: dict[str, Callable[[], Iterator[Any]]] = {
        "featcache Reader, stored": lambda: of_reader(cache, names, threads),
        "featcache Loader, stored": lambda: iter(Loader(cache, names, batch_size=BATCH, dtype=None)),
        "featcache Loader, decoded": lambda: iter(Loader(cache, names, batch_size=BATCH, dtype=torch.float16)),
        "featcache Dataset, stored": lambda: of_dataloader(Dataset(cache, names, dtype=None), shuffle=True),
        "featcache Dataset, decoded": lambda: of_dataloader(Dataset(cache, names, dtype=torch.float16), shuffle=True),
        "safetensors": lambda: of_dataloader(SafetensorsDataset(work / "safetensors", records), shuffle=True),
        "webdataset": lambda: of_webdataset(work / "webdataset"),
    }
    if (work / "mds").is_dir():
        ways["MosaicML streaming"] = lambda: of_mds(work / "mds")
    return ways


def measure_training(args: argparse.Namespace, records: Records, work: Path) -> dict[str, Any]:
    """Images per second of whole loaders, started anew in each round; their first batches are not counted."""
    rates: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for name, make in in_training(work, records, args.threads).items():
            batches, count = make(), 0
            for _ in range(2 * WORKERS):
                next(batches)
            start = time.perf_counter()
            while time.perf_counter() - start < args.limit_s:
                next(batches)
                count += BATCH
            rates.setdefault(name, []).append(count / (time.perf_counter() - start))
            batches.close()  # type: ignore[attr-defined]
            del batches
            gc.collect()
    return {name: {"median": statistics.median(values), "rounds": values} for name, values in rates.items()}


def write_plainly(folder: Path, records: Records, shard_size: int) -> None:
    folder.mkdir()
    for i, first in enumerate(range(0, len(records.blobs), shard_size)):
        with (folder / str(i)).open("wb", buffering=0) as file:
            data = memoryview(records.blobs[first : first + shard_size].reshape(-1).data)
            while data:
                data = data[file.write(data[: 8 << 20]) :]
            os.fsync(file.fileno())


def measure_writing(args: argparse.Namespace, records: Records, work: Path) -> dict[str, Any]:
    """Bytes per second of the cache writer and of plain sequential writes of the same bytes, alternating."""
    total = records.blobs.nbytes
    shard_size = recommended_shard_size(max(spec.bytes_per_sample for spec in records.specs))
    found: dict[str, list[float]] = {"plain write + fsync": [], "featcache": []}
    peak = 0
    plain, ours = work / "plain", work / "written"
    ways: dict[str, tuple[Path, Callable[[], None]]] = {
        "plain write + fsync": (plain, lambda: write_plainly(plain, records, shard_size)),
        "featcache": (ours, lambda: write_cache(ours, records, shard_size)),
    }
    # Each is first as often as the other: who writes first finds fewer pages that are free and warm.
    for round_number in range(2 * args.rounds):
        for name, (folder, write) in list(ways.items())[:: 1 if round_number % 2 else -1]:
            os.sync()
            start = time.perf_counter()
            write()
            found[name].append(total / (time.perf_counter() - start))
            if folder == ours:
                assert not (folder / STATE).exists()
                peak = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
            shutil.rmtree(folder)
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {
        "bytes_per_s": {name: {"median": medians[name], "rounds": values} for name, values in found.items()},
        "ratio": medians["featcache"] / medians["plain write + fsync"],
        "payload_bytes": total,
        "bytes_on_disk": peak,
    }


def machine() -> dict[str, Any]:
    packages = ("numpy", "zarr", "tensorstore", "safetensors", "webdataset", "mosaicml-streaming")
    return {**describe_machine(*packages), "load_average": os.getloadavg()}


def summarise(reading: dict[str, Any], threads: int) -> dict[str, float]:
    """The ratios that matter, warm and in random order."""

    def of(name: str) -> float:
        return float(reading[name]["warm random"]["median"])

    names = ("safetensors slices", "one .npy per image", "webdataset", "MosaicML streaming")
    straight = max(of(name) for name in names if name in reading)
    stacked = max(of(name + COLLATED) for name in names if name in reading)
    limit = max(of(name) for name in reading if name.startswith("raw memory"))
    found: dict[str, float] = {}
    for n in (1, threads):
        mine = of(f"featcache x{n}")
        found |= {
            f"ours x{n} / raw memory x{n}": mine / of(f"raw memory x{n}"),
            f"ours x{n} / best raw memory": mine / limit,
            f"ours x{n} / best of npy, safetensors, MDS, webdataset, copied into our buffers": mine / straight,
            f"ours x{n} / best of them through default_collate": mine / stacked,
        }
    return {**found, "raw memory / best of them, copied into our buffers": limit / straight}


def described(args: argparse.Namespace, records: Records) -> dict[str, Any]:
    return {
        "command": "python " + " ".join(sys.argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "records": {"kind": args.records, "samples": len(records.blobs), "bytes": records.blobs.shape[1]},
    }


def save(result: dict[str, Any], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(f"saved {target}")


def report_training(args: argparse.Namespace, records: Records, found: dict[str, Any]) -> None:
    print(f"images/s of whole loaders, {records.blobs.shape[1]:,} bytes per record, DataLoaders with {WORKERS} workers")
    for name, rates in found.items():
        print(f"{name:30}{rates['median']:>18,.0f}")
    result = {**described(args, records), "workers": WORKERS, "images_per_s": found}
    save(result, args.json or RESULTS / f"loader-whole-{args.records}.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", choices=("repa", "ahpa"), default="repa")
    parser.add_argument("--samples", type=int, help="default 2048 (repa) or 512 (ahpa): about half a gigabyte")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--limit-s", type=float, default=1.0, help="longest pass of a slow loader")
    parser.add_argument("--whole", action="store_true", help="measure whole loaders instead, and nothing else")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--write-samples", type=int, help="default four times --samples")
    parser.add_argument("--out", type=Path, help="where the files go (default: a temporary directory)")
    parser.add_argument("--json", type=Path, help="default benchmarks/results/loader-<records>.json, loader-whole-...")
    args = parser.parse_args()
    records = make_records(args.records, args.samples or (2048 if args.records == "repa" else 512))
    with tempfile.TemporaryDirectory(dir=args.out, prefix="loader-") as folder:
        write_all(Path(folder), records)
        if args.whole:
            report_training(args, records, measure_training(args, records, Path(folder)))
            return
        reading = measure_reading(args, records, Path(folder))
    writing = None
    if args.write:
        # More than one commit's worth, so that the fixed cost of finishing a cache does not decide.
        larger = make_records(args.records, args.write_samples or 4 * len(records.blobs))
        with tempfile.TemporaryDirectory(dir=args.out, prefix="writer-") as folder:
            writing = measure_writing(args, larger, Path(folder))
    summary = summarise(reading, args.threads)
    result = {
        **described(args, records),
        "images_per_s": reading,
        "summary": summary,
        "writing": writing,
    }
    columns = sorted({key for by_key in reading.values() for key in by_key}, reverse=True)
    print(f"images/s, {records.blobs.shape[1]:,} bytes per record, {len(records.blobs)} records")
    print(f"{'':30}" + "".join(f"{c:>18}" for c in columns))
    for name, by_key in reading.items():
        cells = (f"{by_key[c]['median']:>18,.0f}" if c in by_key else f"{'-':>18}" for c in columns)
        print(f"{name:30}" + "".join(cells))
    for name, value in summary.items():
        print(f"{name}: {value:.2f}")
    if writing is not None:
        for name, values in writing["bytes_per_s"].items():
            print(f"{name}: {values['median'] / 1e9:.2f} GB/s")
        print(f"writing, ours / plain: {writing['ratio']:.2f}")
    save(result, args.json or RESULTS / f"loader-{args.records}.json")


if __name__ == "__main__":
    main()
