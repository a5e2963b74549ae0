"""obstore beside fsspec: ranges of 8 MiB from a web server on this machine, with 1 and 8 requests at a time.

    python benchmarks/transfer.py

fsspec's HTTP file system needs aiohttp. Rounds alternate; the figure is the median.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from loader import machine

RESULTS = Path(__file__).parent / "results"
PIECE = 8 << 20
# A server of its own process, so that it does not share an interpreter lock with what is measured.
SERVER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from web_server import FileServer
server = FileServer(Path(sys.argv[2]))
print(server.url, flush=True)
server.serve_forever()
"""


def with_obstore(url: str) -> Callable[[int, int], bytes]:
    import obstore
    from obstore.store import HTTPStore

    store = HTTPStore.from_url(url, client_options={"allow_http": True})
    return lambda start, stop: bytes(obstore.get_range(store, "file", start=start, end=stop))


def with_fsspec(url: str) -> Callable[[int, int], bytes]:
    import fsspec

    files = fsspec.filesystem("http")
    return lambda start, stop: files.cat_file(f"{url}/file", start=start, end=stop)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS / "transfer.json")
    args = parser.parse_args()
    n_bytes = args.mebibytes << 20
    helpers = Path(__file__).parents[1] / "tests" / "featcache"
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "file").write_bytes(np.random.default_rng(0).bytes(n_bytes))
        command = [sys.executable, "-c", SERVER, str(helpers), folder]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            clients = {"obstore": with_obstore(url), "fsspec": with_fsspec(url)}
            for round_number in range(-1, args.rounds):
                for threads in (1, 8):
                    for name, get in clients.items():
                        start = time.perf_counter()
                        with ThreadPoolExecutor(threads) as pool:
                            sizes = pool.map(lambda at, get=get: len(get(at, at + PIECE)), range(0, n_bytes, PIECE))
                            assert sum(sizes) == n_bytes
                        if round_number >= 0:
                            rate = n_bytes / (time.perf_counter() - start)
                            found.setdefault(f"{name} x{threads}", []).append(rate)
        finally:
            server.terminate()
            server.wait()
    result = {
        "command": "python " + " ".join(sys.argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "bytes_per_s": {name: {"median": statistics.median(v), "rounds": v} for name, v in found.items()},
    }
    for name, values in found.items():
        print(f"{name:12} {statistics.median(values) / 1e6:8.0f} MB/s")
    args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
