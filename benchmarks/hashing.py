"""What do hashes of blocks cost beside the write of a shard? Ways to take them, in turn, fsynced at the end.

python benchmarks/hashing.py [--folder DIR] [--rounds 7]
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from featcache.machine import describe_machine
from featcache.store.blocks import BLOCK_BYTES
from featcache.store.files import Hasher, write_all

SHARD_BYTES, SHARDS = 64 << 20, 8


def blocks(data: memoryview) -> list[memoryview]:
    return [data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES)]


def sha256(data: memoryview) -> None:
    hashlib.sha256(data)


def sha256_of_blocks(data: memoryview) -> None:
    for block in blocks(data):
        hashlib.sha256(block)


def blake3_of_blocks(data: memoryview) -> None:
    for block in blocks(data):
        blake3(block).digest()


def both(data: memoryview) -> None:
    Hasher().update(data)


@dataclass(frozen=True)
class Way:
    """`beside`: what is taken of the whole shard, a thread each; `before`: of a piece, before it is written."""

    beside: tuple[Callable[[memoryview], None], ...] = ()
    before: Callable[[memoryview], None] | None = None


WAYS = {
    "none": Way(),
    "SHA-256 of the file": Way((sha256,)),
    "and BLAKE3 of blocks, block by block in the same thread": Way((both,)),
    "and BLAKE3 of blocks, in a third thread": Way((sha256, blake3_of_blocks)),
    "and SHA-256 of blocks, in a third thread": Way((sha256, sha256_of_blocks)),
    "and BLAKE3 of blocks, each just before its write": Way((sha256,), blake3_of_blocks),
}


def gigabytes_a_second(folder: Path, shards: list[memoryview], way: Way) -> float:
    start = time.perf_counter()
    open_files = []
    for i, data in enumerate(shards):
        fd = os.open(folder / str(i), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(hash_, data) for hash_ in way.beside]
            if way.before is None:
                write_all(fd, data)
            else:
                for block in blocks(data):
                    way.before(block)
                    write_all(fd, block)
            for future in running:
                future.result()
        open_files.append(fd)
    for fd in open_files:
        os.fsync(fd)
        os.close(fd)
    return sum(map(len, shards)) / 1e9 / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "hashing.json")
    args = parser.parse_args()
    shards = [memoryview(os.urandom(SHARD_BYTES)) for _ in range(SHARDS)]
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for _ in range(args.rounds):
            for name, way in WAYS.items():
                found[name].append(gigabytes_a_second(Path(folder), shards, way))
    for name, rates in found.items():
        print(f"{statistics.median(rates):5.2f} GB/s (best {max(rates):.2f})  {name}")
    result = {
        "command": "python " + " ".join(sys.argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": describe_machine("blake3"),
        "gigabytes_per_s": {name: {"median": statistics.median(r), "rounds": r} for name, r in found.items()},
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
