"""Makes caches and runs with an earlier state of the project's code; the tests beside it go on from them.

    git worktree add --detach /tmp/before 96efbcf
    cp featcache/encoders/tiny/{vae,vit}.{json,safetensors} /tmp/before/featcache/encoders/tiny/
    PYTHONPATH=/tmp/before OMP_NUM_THREADS=1 python tests/before/make_before.py

Everything is made as a user makes it, by the two command lines, below one folder: `caches/zarr`, `caches/wds`,
`caches/unfinished` (its builder was killed), `runs/sit` and `runs/dit` (without their last checkpoint,
their samples and their page). Each becomes one archive here; `recorded.json` holds what that code made of them. The fixtures are not made anew when the code changes: they
stand for what users have on their disks. (They were when the tiny encoders were trained anew, for with others their builds
could not go on: by that code, with the new weights.)
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import featcache
from featcache import codecs
from featcache.machine import cpu_name

HERE = Path(__file__).parent
RECORD = HERE / "recorded.json"
SAVED_AT, STEPS, KILLED_IN_SHARD = 3, 6, 1

SIZE = (2, 4, 1)  # depth, width, heads of the model size "Mini": a backbone of a few thousand weights

_SHAPES = (
    *("build", "--data", "shapes", "--resolution", "32", "--shard-size", "4"),
    *("--vae", "tiny", "--encoder", "tiny@5"),
)
BUILDS = {
    "zarr": (*_SHAPES, "--batch-size", "4", "--limit", "10", "--vae-levels", "G3,G4"),
    "wds": (
        *(*_SHAPES, "--batch-size", "4", "--limit", "6", "--vae-levels", "G4", "--format", "wds", "--flip"),
        *("--moments-codec", "fp32", "--levels-codec", "fp8", "--tokens-codec", "int4"),
    ),
    "unfinished": (
        *(*_SHAPES, "--batch-size", "2", "--limit", "10", "--vae-levels", "G4", "--compressor", "zstd"),
        *("--levels-codec", "bf16", "--tokens-codec", "fp16"),
    ),
}

_RUN = ("run", "--cache", "caches/zarr", "--batch-size", "4", "--lr", "0.001", "--device", "cpu")
_EVERY = ("ema_decay=0.9", "log_every=1", "sample_every=0", f"checkpoint_every={SAVED_AT}")
RUNS = {
    "sit": (
        *(*_RUN, "--method", "ahpa+sra", "--model", "SiT-Mini/2"),
        *("--set", "ahpa.head=linear", "--set", "ahpa.router_width=8", "--set", "ahpa.time_width=4"),
        *("--set", "ahpa.depths=[1]", "--set", "sra.student_depth=1", "--set", "sra.teacher_depth=2"),
    ),
    "dit": (
        *(*_RUN, "--method", "repa", "--model", "DiT-Mini/2"),
        *("--set", "repa.head_width=4", "--set", "repa.depth=1"),
    ),
}
DRAWN = {"sit": ("--sampler", "sde", "--guidance", "1.5", "--interval", "0.1,0.9"), "dit": ("--sampler", "ddpm")}
_ALIKE = ("--num", "8", "--steps", "4", "--step", str(SAVED_AT), "--device", "cpu")


def run_words(name: str) -> list[str]:
    """What is typed to train a run in one go, from the first step to the last."""
    settings = [word for setting in _EVERY for word in ("--set", setting)]
    return [*RUNS[name], *settings, "--name", name, "--steps", str(STEPS)]


def resume_words(name: str) -> list[str]:
    return ["run", "--resume", "--name", name]


def sample_words(name: str, out: str) -> list[str]:
    return ["sample", f"runs/{name}", *DRAWN[name], *_ALIKE, "--out", out]


def eval_words(name: str) -> list[str]:
    return ["eval", f"runs/{name}", *DRAWN[name], *_ALIKE, "--extractor", "embedded"]


def digest(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def decoded(path: Path) -> dict[str, str]:
    """SHA-256 of each feature's decoded values, all samples in order."""
    cache = featcache.open(path)
    found = {}
    for name, spec in cache.manifest.features.items():
        with cache.reader([name]) as reader:
            out = reader.allocate(len(cache))
            reader.read(np.arange(len(cache)), out)
        stored = {array.removeprefix(name): torch.from_numpy(values) for array, values in out.items()}
        found[name] = digest(codecs.decode(spec.codec, stored, spec.shape).contiguous().numpy().tobytes())
    return found


def losses(run: Path) -> list[dict[str, float]]:
    """The log without what the machine says; spelled out, because this runs with earlier code, too."""
    machine = ("time_s", "images_per_s", "data_wait", "rss_bytes", "gpu_allocated_bytes", "gpu_reserved_bytes")
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in (*machine, "tflop_per_s", "mfu")} for record in records]


def _tensors(run: Path, step: int) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted((run / "checkpoints" / f"step_{step:07d}").glob("*.safetensors")):
        for key, value in sorted(load_file(file).items()):
            yield f"{file.stem}/{key}", value


def weights(run: Path, step: int) -> dict[str, str]:
    """SHA-256 of each file's tensors in a checkpoint: weights, average, optimisers."""
    files: dict[str, Any] = {}
    for name, value in _tensors(run, step):
        stem, _, key = name.partition("/")
        files.setdefault(stem, hashlib.sha256()).update(key.encode() + value.contiguous().numpy().tobytes())
    return {stem: digest.hexdigest() for stem, digest in files.items()}


def norms(run: Path, step: int) -> dict[str, float]:
    """Root mean square of each of the model's and the method's tensors in a checkpoint."""
    kept = (pair for pair in _tensors(run, step) if pair[0].startswith(("model/", "alignment/")))
    return {name: float(f"{value.double().square().mean().sqrt().item():.6g}") for name, value in kept}


def pixels(folder: Path) -> np.ndarray:
    """The images that were drawn, uint8 [8, 32, 32, 3]."""
    (file,) = folder.rglob("*.npz")
    return np.load(file)["arr_0"]


def metrics(run: Path) -> dict[str, float]:
    return dict(json.loads((run / "metrics.json").read_text())[-1]["metrics"])


def made_by() -> dict[str, str]:
    """What the last bits of computed values depend on, beside the code."""
    vectors = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "numpy": np.__version__, "cpu": cpu_name(), "vectors": vectors}


# The earlier code in a process of its own.

_WITH_SIZE = f"from trainer.models.config import SIZES; SIZES['Mini'] = {SIZE}\nfrom trainer.cli import main; main()"
_KILLED = f"""
import os, signal
from featcache.store import writer
def record(self, feature, shard, checksums, record=writer.CacheWriter._record):
    record(self, feature, shard, checksums)
    if shard == {KILLED_IN_SHARD} and feature == "vae/moments":
        os.kill(os.getpid(), signal.SIGKILL)
writer.CacheWriter._record, writer.GROUP_S = record, 0
from featcache.cli import main; main()
"""


def _type(folder: Path, code: str, words: list[str]) -> int:
    return subprocess.run([sys.executable, "-c", code, *words], cwd=folder, check=False).returncode


def _featcache(folder: Path, words: list[str]) -> None:
    assert _type(folder, "from featcache.cli import main; main()", words) == 0, words


def _trainer(folder: Path, words: list[str]) -> None:
    assert _type(folder, _WITH_SIZE, words) == 0, words


def _make(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = {"made by": made_by(), "caches": {}, "runs": {}}
    for name, words in BUILDS.items():
        _featcache(folder, [*words, "--out", f"caches/{name}"])
        record["caches"][name] = decoded(folder / "caches" / name)
    shutil.rmtree(folder / "caches/unfinished")
    assert _type(folder, _KILLED, [*BUILDS["unfinished"], "--out", "caches/unfinished"]) == -9
    for name in RUNS:
        run = folder / "runs" / name
        _trainer(folder, run_words(name))
        last = run / "checkpoints" / f"step_{STEPS:07d}"
        _trainer(folder, sample_words(name, f"drawn/{name}"))
        _trainer(folder, eval_words(name))
        drawn = pixels(folder / "drawn" / name)
        record["runs"][name] = {
            "log": losses(run),
            "weights": weights(run, STEPS),
            "norms": norms(run, STEPS),
            "pixels": {"sha256": digest(drawn.tobytes()), "means": drawn.mean((1, 2)).tolist()},
            "metrics": metrics(run),
        }
        shutil.rmtree(last)
        shutil.rmtree(run / "samples")
        (run / "report.html").unlink()
        shutil.rmtree(run / "tensorboard", ignore_errors=True)
    return record


def main() -> None:
    assert not Path(featcache.__file__).is_relative_to(HERE.parents[1]), "these are made by earlier code: see above"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        record = _make(folder)
        RECORD.write_text(json.dumps(record, indent=None, separators=(",", ":")).replace('},"', '},\n"') + "\n")
        for part in sorted(p for above in ("caches", "runs") for p in (folder / above).iterdir()):
            with tarfile.open(HERE / f"{part.parent.name}-{part.name}.tar.xz", "w:xz", preset=9) as archive:
                archive.add(part, part.relative_to(folder), filter=_anonymous)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    main()
