"""Runs the campaigns: `python -m tests.attacks [--only CAMPAIGN...] [--count N] [--seconds LIMIT] --out FILE`.

Campaigns: kills, power, flips, pairs, fuzz, links, concurrency; two run at a time, each in a process of its own. Each has
a number of trials as its standard; --count sets another. Trial number i of a seed is always the same one, so what failed can be repeated (`--first i --count 1`), and
a run that was cut off by --seconds goes on where it stopped when the same --out and --seed are given again.

The result is a JSON file: per campaign the trials by scene, the failures by kind with a few of each, and how long it
took; and the machine, the versions, the date and the command. Exit code 1 if anything failed. `python -m
tests.attacks.report` puts it into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.attacks.campaign import Tally
from tests.attacks.processes import ROOT, NoCompiler, Processes, processes

# The longest first, so that two beside each other end at about the same time.
COUNTS = {
    "pairs": 1000,
    "fuzz": 200_000,
    "kills": 400,
    "concurrency": 160,
    "links": 600,
    "flips": 10_000,
    "power": 900,
}
PACKAGES = ("torch", "numpy", "zarr", "obstore", "moto", "pillow", "pyarrow", "safetensors")


class Bench:
    """What the campaigns work with, each thing made when it is first asked for."""

    def __init__(self, stack: ExitStack, root: Path) -> None:
        self._stack, self.root = stack, root
        self._processes: Processes | None = None
        self._lab: Any = None

    @property
    def processes(self) -> Processes:
        if self._processes is None:
            self._processes = self._stack.enter_context(processes())
        return self._processes

    @property
    def lab(self) -> Any:
        if self._lab is None:
            from tests.attacks.lab import Lab
            from tests.attacks.s3 import serve_s3

            self._lab = Lab(self.root / "lab", s3=self._stack.enter_context(serve_s3()))
        return self._lab


def run_campaign(name: str, bench: Bench, tally: Tally, given: argparse.Namespace, *, count: int, first: int) -> int:
    """One campaign from trial `first` on; returns the number of the next trial."""
    from tests.attacks import concurrency, flips, fuzz, kills, links, power

    folder = bench.root / name
    folder.mkdir()
    common: dict[str, Any] = {"count": count, "seed": given.seed, "first": first}
    of_scenes: dict[str, Callable[..., int]] = {
        "kills": kills.run,
        "power": power.run,
        "links": links.run,
        "concurrency": concurrency.run,
    }
    if name in of_scenes:
        return of_scenes[name](bench.processes, bench.lab, tally, only=given.scene, **common)
    if name == "flips":
        return flips.run(tally, folder, **common)
    if name == "pairs":
        return flips.run_pairs(bench.processes, tally, folder, **common)
    return fuzz.run(tally, folder, only=given.scene, **common)


def description(given: argparse.Namespace) -> dict[str, Any]:
    """Of the machine, the version and the command."""
    from featcache.machine import describe_machine

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    return {
        "command": shlex.join(["python", "-m", "tests.attacks", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or None,
        "seed": given.seed,
        "machine": describe_machine(*PACKAGES),
    }


def merged(earlier: dict[str, Any], tally: Tally, next_trial: int, seconds: float) -> dict[str, Any]:
    """One campaign's result with what an earlier part of it found."""
    now = tally.to_json()
    result = {**now, "next": next_trial, "seconds": round(seconds + earlier.get("seconds", 0), 1)}
    result["trials"] += earlier.get("trials", 0)
    for key in ("by_scene", "failed"):
        old = earlier.get(key, {})
        result[key] = {name: now[key].get(name, 0) + old.get(name, 0) for name in sorted({*now[key], *old})}
    result["failures"] = [*earlier.get("failures", []), *now["failures"]]
    return result


def part_of(out: Path, name: str) -> Path:
    """Where a campaign that runs beside others keeps its result."""
    return out.with_name(f".{out.stem}.{name}.json")


def run_process(options: list[str]) -> int:
    return subprocess.run([sys.executable, "-m", "tests.attacks", *options], check=False).returncode


def side_by_side(given: argparse.Namespace, found: dict[str, Any]) -> int:
    """Each campaign in a process of its own, some at a time; their results become one file. Returns how many failed."""
    given.out.parent.mkdir(parents=True, exist_ok=True)
    options = ["--seed", str(given.seed), "--workers", "1"]
    for name in ("scene", "count", "seconds", "folder"):
        value = getattr(given, name)
        options += [] if value is None else [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    names = [name for name in COUNTS if name in given.only]
    for name in names:
        # What an earlier call found is gone on with.
        if name in found["campaigns"] and not part_of(given.out, name).exists():
            earlier = {"seed": given.seed, "campaigns": {name: found["campaigns"][name]}}
            part_of(given.out, name).write_text(json.dumps(earlier))

    def run(name: str) -> int:
        return run_process(["--only", name, "--out", str(part_of(given.out, name)), *options])

    with ThreadPoolExecutor(given.workers) as pool:
        codes = dict(zip(names, pool.map(run, names), strict=True))
    for name in names:
        if part_of(given.out, name).exists():
            found["campaigns"] |= json.loads(part_of(given.out, name).read_text())["campaigns"]
    given.out.write_text(json.dumps({**description(given), "campaigns": found["campaigns"]}, indent=1) + "\n")
    for name, code in codes.items():
        if code in (0, 1):
            part_of(given.out, name).unlink(missing_ok=True)
    return sum(code != 0 for code in codes.values())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attacks", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON file of the results; gone on with if it is there."
    )
    parser.add_argument("--only", nargs="+", choices=sorted(COUNTS), default=list(COUNTS), help="Campaigns.")
    parser.add_argument("--scene", nargs="+", help="Only these scenes (kinds of input) of the campaigns.")
    parser.add_argument("--count", type=int, help="Trials of each campaign in all. [default: by campaign]")
    parser.add_argument("--first", type=int, help="Number of the first trial. [default: where --out stopped, else 0]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="Limit for each campaign.")
    parser.add_argument("--workers", type=int, default=2, help="Campaigns at a time. [default: 2]")
    parser.add_argument("--folder", type=Path, help="Where to work. [default: a temporary folder]")
    given = parser.parse_args()
    found: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {}
    if found and found.get("seed") != given.seed:
        parser.error(f"{given.out} holds results of another seed ({found.get('seed')})")
    campaigns = found.setdefault("campaigns", {})
    if given.workers > 1 and len(given.only) > 1 and given.first is None:
        return 1 if side_by_side(given, found) else 0
    os.nice(10)
    import torch

    torch.set_num_threads(1)
    failed = 0
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="attacks-", dir=given.folder)))
        bench = Bench(stack, root)
        for name in given.only:
            earlier = campaigns.get(name, {}) if given.first is None else {}
            first = given.first if given.first is not None else earlier.get("next", 0)
            count = (given.count or COUNTS[name]) - earlier.get("trials", 0)
            if count <= 0:
                continue
            start = time.monotonic()
            tally = Tally(deadline=None if given.seconds is None else start + given.seconds)
            try:
                following = run_campaign(name, bench, tally, given, count=count, first=first)
            except NoCompiler as error:
                print(f"{name}: left out, {error}", flush=True)
                continue
            campaigns[name] = merged(earlier, tally, following, time.monotonic() - start)
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps({**description(given), "campaigns": campaigns}, indent=1) + "\n")
            wrong = sum(campaigns[name]["failed"].values())
            failed += wrong
            print(
                f"{name}: {campaigns[name]['trials']} trials, {wrong} failures, {campaigns[name]['seconds']:.0f} s",
                flush=True,
            )
            for kind, times in campaigns[name]["failed"].items():
                print(f"  {times} x {kind}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
