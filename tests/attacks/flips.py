"""Single bits flipped anywhere in a cache, and pairs of faults followed by a repair.

Single flips: `verify` names every one; and a flip in metadata is an error on opening or reading, or changes no value that is read.
A flip in a signature has it refused, or it still says the same of the same cache (a bit of its base64 that means nothing).
Pairs: after two faults `verify --repair` may fail, and say so; it never calls a cache sound that has a wrong byte.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
from store_builder import SKIPPED
from store_helpers import base_features, build, tokens, tree

from featcache.errors import CacheError, UserError
from featcache.share.verify import verify
from featcache.store import files
from featcache.store.layout import SIGNATURE
from featcache.store.manifest import Manifest
from featcache.store.root import read_root
from featcache.store.signing import require_signature, sign
from tests.attacks.campaign import Tally, dice, differences, fingerprint
from tests.attacks.lab import INTO, MAKE, call
from tests.attacks.processes import Processes
from tests.attacks.scenes import Values, has_option, values_of

FORMATS = {
    "zarr": {},
    "zarr zstd": {"compressor": "zstd"},
    "zarr blosc": {"compressor": "blosc"},
    "wds": {"format": "wds"},
}


def caches(root: Path) -> dict[str, Path]:
    """Small caches in every format; signed ones where this version signs."""
    saved, files._fsync = files._fsync, lambda fd: None
    try:
        found = {}
        for name, options in FORMATS.items():
            path = root / name.replace(" ", "-") / "c"
            path.parent.mkdir(parents=True)
            specs = [*base_features(), tokens("i@4", codec="int4")]
            found[name] = build(path, specs, count=7, shard_size=4, skipped=SKIPPED[:1], **options)
            if shutil.which("ssh-keygen") is not None:
                sign(path, signing_key(path.parent))
    finally:
        files._fsync = saved
    return found


def signing_key(folder: Path) -> Path:
    """A key for signatures in a folder, made if need be."""
    key = folder / "key"
    if not key.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    return key


def wrong_signature(signature: bytes, manifest: Manifest, key: Path) -> list[str]:
    """What a changed signature is taken for that it is not: of another cache, by anybody else, or a fault."""
    signers = key.with_suffix(".pub")
    wrong = []
    for about, who in ((manifest, [key.stem]), (replace(manifest, versions={"x": "1"}), [])):
        try:
            name = require_signature(about, signature, signers, "it")
            wrong += [] if name in who else [f"a changed signature is taken for {name}'s: {signature!r}"]
        except UserError:
            pass
        except Exception as error:
            wrong.append(f"a changed signature raises: {error!r}: {signature!r}")
    return wrong


def flip_at_random(path: Path, names: list[str], chance: random.Random) -> tuple[Path, int, bytes]:
    """Flips one bit of one file; returns the file, the bit and what the file held. Half of the flips are spread evenly over
    the bytes, half over the files, so that small files get their share.
    """
    sizes = [(path / name).stat().st_size for name in names]
    (name,) = chance.choices(names, weights=sizes if chance.random() < 0.5 else [float(s > 0) for s in sizes])
    victim = path / name
    original = victim.read_bytes()
    bit = chance.randrange(len(original) * 8)
    flipped = bytearray(original)
    flipped[bit // 8] ^= 1 << bit % 8
    victim.write_bytes(flipped)
    return victim, bit, original


def is_metadata(name: str) -> bool:
    return name.endswith((".json", "SHA256SUMS", "SIGNATURE", ".sig", "BLOCKS"))


def flip_once(path: Path, truth: Values, names: list[str], chance: random.Random) -> list[str]:
    """One flip, what is wrong then; the cache is as before afterwards."""
    victim, bit, original = flip_at_random(path, names, chance)
    name = str(victim.relative_to(path))
    try:
        if name == SIGNATURE:
            return wrong_signature(victim.read_bytes(), read_root(path), path.parent / "key")
        wrong = []
        try:
            report = verify(path, threads=1)
            if not any(problem.path.startswith(str(victim)) for problem in report.problems):
                seen = "; ".join(map(str, report.problems[:2])) or "nothing"
                wrong.append(f"verify does not name it: bit {bit} of {name}, it says {seen}")
        except CacheError:
            pass  # there is no cache: an error, so nobody takes it for sound
        except Exception as error:
            wrong.append(f"verify raises: {error!r} at bit {bit} of {name}")
        if is_metadata(name):
            wrong += _wrong_reads(path, truth, f"bit {bit} of {name}")
        return wrong
    finally:
        victim.write_bytes(original)


def _wrong_reads(path: Path, truth: Values, where: str) -> list[str]:
    try:
        seen = values_of(path)
    except CacheError:
        return []
    except Exception as error:
        return [f"reading raises: {error!r} at {where}"]
    same = seen.keys() == truth.keys() and all(np.array_equal(seen[name], truth[name]) for name in truth)
    return [] if same else [f"other values without an error: {where}"]


def run(tally: Tally, root: Path, *, count: int, seed: int, first: int = 0) -> int:
    """`count` single flips from number `first` on, going round the formats; returns the number of the next one."""
    made = list(caches(root / "flips").items())
    names = {name: sorted(tree(path)) for name, path in made}
    truth = {name: values_of(path) for name, path in made}
    number = first
    while number < first + count and not tally.late:
        kind, path = made[number % len(made)]
        problems = flip_once(path, truth[kind], names[kind], dice("flip", seed, number))
        tally.trial(kind, problems, f"--only flips --seed {seed} --first {number}")
        number += 1
    for kind, path in made:
        assert verify(path).ok, f"{kind} is not as it was"
    return number


# Pairs

# A second fault of the same file as the first, or of its checksum file, is the hard case.
FAULTS = ("flip", "flip", "delete", "shorten", "swap", "sums flip", "sums delete", "metadata flip")
SUMS = ("SHA256SUMS", "BLOCKS")


def damage(path: Path, fault: str, names: list[str], chance: random.Random) -> str:
    """Does one kind of harm; says what."""
    present = [n for n in names if (path / n).is_file()]
    shards = [n for n in present if not is_metadata(n)]
    sums = [n for n in present if n.endswith(SUMS)]
    if fault.startswith("sums") and sums:
        name = chance.choice(sums)
        if fault == "sums delete":
            (path / name).unlink()
            return f"{name} deleted"
        flip_at_random(path, [name], chance)
        return f"bit of {name}"
    if fault == "metadata flip":
        # The root document is the one thing that nothing in the cache can bring back.
        nodes = [n for n in present if is_metadata(n) and n not in ("zarr.json", "featcache.json")]
        if nodes:
            name = chance.choice(nodes)
            flip_at_random(path, [name], chance)
            return f"bit of {name}"
    if fault == "swap":
        name = chance.choice(shards)
        like = [n for n in shards if n != name and Path(n).parent == Path(name).parent]
        if like:
            other = chance.choice(like)
            a, b = (path / name).read_bytes(), (path / other).read_bytes()
            (path / name).write_bytes(b)
            (path / other).write_bytes(a)
            return f"{name} and {other} swapped"
    name = chance.choice(shards or present)
    if fault == "delete":
        (path / name).unlink()
        return f"{name} deleted"
    if fault == "shorten":
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: chance.randrange(len(data))])
        return f"{name} cut short"
    _, bit, _ = flip_at_random(path, [name], chance)
    return f"bit {bit} of {name}"


def pair_scenes(root: Path) -> dict[str, tuple[Path, tuple[str, ...]]]:
    """Name -> (workspace with a cache `c` and a sound copy `sound`, the command that repairs it)."""
    base = root / "pairs"
    base.mkdir(parents=True)
    call(base, *MAKE)
    call(base, *INTO)
    shutil.copytree(base / "c", base / "sound")
    wds = root / "pairs-wds"
    wds.mkdir()
    call(wds, *MAKE[: MAKE.index("--encoder")], "--format", "wds", "--out", "c")
    shutil.copytree(wds / "c", wds / "sound")
    again = ("featcache", "verify", "c", "--repair", "--device", "cpu")
    found: dict[str, tuple[Path, tuple[str, ...]]] = {
        "encoded again": (base, again),
        "encoded again, wds": (wds, again),
    }
    if has_option("featcache", "verify", "--from"):
        found["from a sound copy"] = (base, ("featcache", "verify", "c", "--repair", "--from", "sound"))
    elif has_option("featcache", "repair", "--from"):
        found["from a sound copy"] = (base, ("featcache", "repair", "c", "--from", "sound"))
    return found


def pair_once(
    processes: Processes, base: Path, argv: tuple[str, ...], chance: random.Random, work: Path
) -> tuple[list[str], str]:
    """Two faults, the repair; (what is wrong then, what was done)."""
    from tests.attacks.processes import Job

    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(base, work)
    whole, path = tree(base / "sound"), work / "c"
    names = sorted(whole)
    done = [damage(path, chance.choice(FAULTS), names, chance) for _ in range(2)]
    if chance.random() < 0.3:
        # The shard and its own checksum file.
        shard = next((n for n in names if f" {n}" in f" {done[0]}" and not is_metadata(n)), None)
        sums = str(Path(shard).parent / chance.choice(SUMS)) if shard else ""
        if (path / sums).is_file():
            done.append(damage(path, chance.choice(("sums flip", "sums delete")), [sums], chance))
    beside = fingerprint(work / "sound")
    job = Job(argv=argv, folder=str(work), watch=str(work), output=str(work.parent / "pair.output"), group_files=128)
    ended = processes.run(job)
    wrong = [] if ended.clean else [f"not a plain error: {ended}"]
    if differences(fingerprint(work / "sound"), beside):
        wrong.append("the sound copy was changed")
    have = tree(path)
    try:
        sound = verify(path, threads=1).ok
    except CacheError:
        sound = False
    off = differences({n: d for n, d in have.items() if not n.startswith(".featcache")}, whole)
    if sound and off:
        wrong.append(f"called sound with wrong bytes: {', '.join(off)}")
    if ended.code == 0 and not sound:
        wrong.append("the repair reports success, verify finds damage")
    return wrong, "; ".join(done)


def run_pairs(processes: Processes, tally: Tally, root: Path, *, count: int, seed: int, first: int = 0) -> int:
    """`count` pairs of faults from number `first` on; returns the number of the next one."""
    made = list(pair_scenes(root).items())
    number = first
    while number < first + count and not tally.late:
        name, (base, argv) = made[number % len(made)]
        problems, done = pair_once(processes, base, argv, dice("pair", seed, number), root / "pair")
        tally.trial(name, problems, f"--only pairs --seed {seed} --first {number}: {done}")
        number += 1
    return number
