"""Damaged and hostile run files: configurations, recipes, JSON, logs, checkpoints, references, imported weights.

Every case takes a sound file, changes it (bytes anywhere, or one value of its structure), and reads it as the commands
do. Reading must succeed or raise UserError: within ten seconds and one GiB, whatever the file says.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import random
import resource
import shutil
import signal
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from safetensors.torch import save as safetensors_bytes

from featcache.errors import UserError

LIMIT_S = 10
LIMIT_BYTES = 1 << 30
KINDS = ("config", "recipe", "cache_json", "metrics", "log", "analysis", "checkpoint", "reference", "import")

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 10**400, -(10**30), 0.5, 1e308, 1e-320),
    *(float("nan"), float("inf"), -float("inf"), "", "x", "a" * 5000, "\x1b]0;pwn\x07", "[/]", "\u202eabc", "\x00"),
    *("../../etc/passwd", "/dev/zero", "https://user:secret@host/x", "<script>alert(1)</script>", "1e999", "null"),
    *([], {}, [[]], [1, 2], {"a": 1}, [None] * 50, {"": ""}, [[[[[[[[]]]]]]]], {"x": {"x": {"x": {"x": 1}}}}),
)


def run(kind: str, count: int, seed: int, folder: Path) -> list[str]:
    """Tries ``count`` damaged files of one of :data:`KINDS`, a function of ``seed``, in the empty ``folder``.

    Returns descriptions of what went wrong: any exception but UserError, hangs, too much memory.
    """
    make = {
        "config": _config,
        "recipe": _recipe,
        "cache_json": _cache_json,
        "metrics": _metrics,
        "log": _log,
        "analysis": _analysis,
        "checkpoint": _checkpoint,
        "reference": _reference,
        "import": _import,
    }[kind]
    rng = random.Random(f"{kind} {seed}")
    failures = []
    case = make(folder, rng)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(count):
            what = case()
            problem = _judge(what)
            if problem is not None:
                kept = folder / f"failed-{kind}-{seed}-{number}"
                shutil.copytree(folder / "case", kept, dirs_exist_ok=True)
                failures.append(f"{kind} {seed} #{number}: {problem} ({kept})")
    return failures


class _TooLong(BaseException):
    """Not an Exception, so that nothing that is tried here swallows it."""


def _judge(read: Callable[[], object]) -> str | None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def stop(*_: object) -> None:
        raise _TooLong

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        with _bounded_memory():
            read()
    except UserError as error:
        if "\n" in error.what.strip() or len(error.what) > 4000:
            return f"not one line: {error.what[:300]!r}"
    except _TooLong:
        return f"took more than {LIMIT_S} s"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]} {_place(error)}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return f"took {grown >> 20} MiB" if grown > LIMIT_BYTES else None


def _place(error: BaseException) -> str:
    at = error.__traceback__
    ours = ""
    while at is not None:
        name = at.tb_frame.f_code.co_filename
        if "/trainer/" in name or "/featcache/" in name:
            ours = f"{Path(name).name}:{at.tb_lineno}"
        at = at.tb_next
    return f"at {ours}"


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Two GiB of addresses more than now: beyond, allocations fail instead of taking the machine."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    former = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + (2 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, former)


# --- changing things


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, removed, added or repeated, or the end cut off."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(out) + 1)
        action = rng.randrange(6)
        if action == 0 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif action == 1:
            out[at:at] = rng.choice(
                (b"\x00", b"\xff\xfe", b"{", b"[" * 3000, b'"', b"\n", b"- " * 500, b": ", b"&a *a ")
            )
        elif action == 2:
            del out[at : at + rng.choice((1, 4, 64))]
        elif action == 3:
            del out[at:]
        elif action == 4:
            out[at:at] = out[at : at + rng.choice((8, 200))]
        else:
            width = rng.choice((1, 4, 8))
            out[at : at + width] = bytes([rng.choice((0, 0xFF, 0x7F, 0x80))]) * width
    return bytes(out)


def change_value(value: Any, rng: random.Random, hostile: tuple[Any, ...] = HOSTILE) -> Any:
    """The structure with one or two of its values replaced, removed, renamed or moved."""
    root = {"": copy.deepcopy(value)}
    for _ in range(rng.choice((1, 1, 2))):
        places: list[tuple[Any, Any]] = []
        todo: list[Any] = [root]
        while todo:
            node = todo.pop()
            items = node.items() if isinstance(node, dict) else enumerate(node)
            for key, child in items:
                places.append((node, key))
                if isinstance(child, dict | list):
                    todo.append(child)
        node, key = rng.choice(places)
        action = rng.randrange(8)
        if action == 0 and len(places) > 1 and node is not root:
            del node[key]
        elif action == 1 and isinstance(node, dict) and node is not root:
            node[rng.choice(("", "x", "step", "base", "\x00", "a" * 300, "__class__", "path"))] = node.pop(key)
        elif action == 2:
            other, there = rng.choice(places)
            node[key] = copy.deepcopy(other[there])
        else:
            node[key] = copy.deepcopy(rng.choice(hostile))
    return root[""]


def _text(value: Any, dump: Callable[[Any], str], rng: random.Random) -> bytes:
    """A structure written down: changed before, after, or both."""
    sound = dump(value).encode("utf-8", "surrogatepass")
    action = rng.randrange(10)
    if action < 6:
        try:
            return dump(change_value(value, rng)).encode("utf-8", "surrogatepass")
        except (ValueError, yaml.YAMLError):  # what the writer itself refuses
            return sound
    return change_bytes(sound, rng)


def _case(folder: Path) -> Path:
    case = folder / "case"
    case.mkdir(parents=True, exist_ok=True)
    return case


# --- kinds


def _settings() -> dict[str, Any]:
    from featcache.settings import to_mapping
    from trainer.runs.config import RunConfig

    published = {
        "source": "AHPA, Table 3",
        "metrics": {"FID": 7.9},
        "sampling": {"sampler": "sde", "steps": 250, "guidance": 1.8, "interval": [0.0, 0.7]},
    }
    config = RunConfig(
        method="ahpa",
        align={"ahpa": {"router": "table", "router_width": 16}},
        cache="caches/shapes",
        name="run",
        model="SiT-S/2",
        steps=100,
        published=published,
    )
    return to_mapping(config)


_YAML_ATTACKS = (
    "a: &a [x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b]\n"
    "d: &d [*c, *c, *c, *c, *c, *c, *c, *c]\nalign: [*d, *d, *d, *d, *d, *d, *d, *d]\n",
    "steps: !!python/object/apply:os.system ['true']\n",
    "steps: !!int abc\n",
    "name: !!timestamp x\n",
    "steps: 2001-99-99\n",
    f"steps: {'9' * 5000}\n",
    "".join(f"k{i}: {i}\n" for i in range(60_000)),
    "[" * 100_000,
    "a: " + "{a: " * 50_000,
    "- " * 50_000,
    "? " * 50_000,
    "&a [*a]\n",
    "<<: {steps: 3}\n",
    "<<: 3\n",
    "? [a]\n: b\n",
    "steps: 1\nsteps: 2\n",
    "---\na: 1\n---\nb: 2\n",
    "%YAML 9.9\n---\na: 1\n",
    "",
    "\x00",
    "a: =\n",
    "1: 2\nnull: 3\n",
    "steps: 190:20:30\n",
)


def _yaml_bytes(values: dict[str, Any], rng: random.Random) -> bytes:
    if rng.randrange(12) == 0:
        text = rng.choice(_YAML_ATTACKS)
        return (text if rng.randrange(2) else yaml.safe_dump(values) + text).encode()
    return _text(values, lambda value: yaml.safe_dump(value, sort_keys=False), rng)


def _config(folder: Path, rng: random.Random) -> Callable[[], Callable[[], object]]:
    from featcache.settings import to_mapping
    from trainer.evaluate.run import recipe_sampling
    from trainer.runs import folder as runs

    case, values = _case(folder), _settings()

    def make() -> Callable[[], object]:
        (case / "config.yaml").write_bytes(_yaml_bytes(values, rng))

        def read() -> None:
            config = runs.load_config(case)
            recipe_sampling(config)
            runs.save_config(case, config)
            assert to_mapping(runs.load_config(case)) == to_mapping(config)
            runs.find_runs(folder)
            runs.run_dir(config, folder / "runs")

        return read

    return make


def _recipe(folder: Path, rng: random.Random) -> Callable[[], Callable[[], object]]:
    from trainer.runs.recipe_pages import describe, listing
    from trainer.runs.recipes import load_recipe_file

    case = _case(folder)
    (case / "base.yaml").write_text("model: SiT-B/2\nsteps: 50\nalign: {ahpa: {weight: 0.5}}\n")
    values = {k: v for k, v in _settings().items() if v is not None and k != "name"}
    values |= {"base": "base.yaml", "title": "A title", "build": "featcache build --encoder tiny@1 --vae-levels G3"}

    def make() -> Callable[[], object]:
        path = case / "recipe.yaml"
        path.write_bytes(_yaml_bytes(values, rng))

        def read() -> None:
            recipe = load_recipe_file(path)
            listing([recipe])
            recipe.config()
            describe(recipe)

        return read

    return make


def _summary() -> dict[str, Any]:
    return {
        "path": "caches/none",
        "fingerprint": "0" * 64,
        "digest": "1" * 64,
        "layout": "zarr 8",
        "checksums": {"vae/moments": "2" * 64},
        "dataset": {
            "name": "shapes",
            "source": "shapes 24",
            "class_names": ["disc", "square", "ring"],
            "preprocessing": {"resolution": 64, "crop": "adm"},
            "vae": {
                "name": "tiny",
                "sha256": "3" * 64,
                "latent_channels": 4,
                "downsampling": 8,
                "scaling_factor": 0.18,
                "shift_factor": 0.0,
            },
        },
        "features": {
            "vae/moments": {"shape": [8, 8, 8], "codec": "fp16", "weights": "embedded"},
            "vae/G3": {"shape": [4, 64, 32], "codec": "int8", "layers": ["a", "b", "c", "d"]},
        },
    }


def _viewer(case: Path, rng: random.Random) -> Callable[[Any], None]:
    """Makes the numbers of a run's page; one time in twenty the whole page, which takes a hundred times as long."""
    from trainer.report.report import write_comparison, write_report
    from trainer.report.table import numbers, settings

    def look(data: Any) -> None:
        numbers([data], [])
        settings([data], "sampler")
        if rng.randrange(20) == 0:
            write_report(case / "report.html", [data], title="t")
            write_comparison(case / "comparison.html", [data, data], title="t")

    return look


class _NoCache:
    """As much of a cache as comparing a run's record with it takes."""

    path = "caches/none"
    fingerprint = "0" * 64

    class manifest:
        features: dict[str, Any] = {}  # noqa: RUF012
        checksums: dict[str, str] = {}  # noqa: RUF012
        format, shard_size, compressor = "zarr", 8, None


def _cache_json(folder: Path, rng: random.Random) -> Callable[[], Callable[[], object]]:
    from featcache.settings import from_mapping
    from trainer.evaluate.run import _reference
    from trainer.report.data import load_run
    from trainer.report.run import features_layers
    from trainer.requests import EvalRequest
    from trainer.runs import folder as runs
    from trainer.runs.config import RunConfig
    from trainer.runs.records import cache_summary, run_model_config
    from trainer.sampling.draw import load_decoder

    case, values, no_cache = _case(folder), _summary(), cast(Any, _NoCache)
    config = from_mapping(RunConfig, _settings())
    runs.save_config(case, config)
    look = _viewer(case, rng)

    def make() -> Callable[[], object]:
        (case / "cache.json").write_bytes(_text(values, json.dumps, rng))

        def read() -> None:
            look(load_run(case))
            summary = cache_summary(case)
            run_model_config(case, config)
            features_layers(summary, "vae/G3", 4)
            runs.check_resumable(case, config, no_cache, resume=True)
            runs.check_same_bytes(case, no_cache)
            _reference(case, EvalRequest(data="x"))
            moments: Mapping[str, Any] = summary["features"].get("vae/moments") or {}
            if moments.get("weights") != "random":
                load_decoder(summary["dataset"]["vae"], moments, str(case))

        return read

    return make


def _metrics(folder: Path, rng: random.Random) -> Callable[[], Callable[[], object]]:
    from featcache.settings import from_mapping
    from trainer.evaluate.run import _append_metrics
    from trainer.report.data import load_run
    from trainer.runs import folder as runs
    from trainer.runs.config import RunConfig

    case = _case(folder)
    runs.save_config(case, from_mapping(RunConfig, _settings()))
    entry = {
        "step": 100,
        "sampler": {"sampler": "sde", "steps": 250, "guidance": {"scale": 1.0}},
        "date": "2025-01-01T00:00:00",
        "metrics": {"FID": 8.1, "IS": 100.0},
        "intervals": {"FID": [8.0, 8.2]},
        "settings": {"extractor": "inception"},
        "warnings": ["few samples"],
    }
    values = [entry, {**entry, "step": 50}]
    look = _viewer(case, rng)

    def make() -> Callable[[], object]:
        (case / "metrics.json").write_bytes(_text(values, json.dumps, rng))

        def read() -> None:
            look(load_run(case))
            _append_metrics(case, entry)

        return read

    return make


def _log(folder: Path, rng: random.Random) -> Callable[[], Callable[[], object]]:
    from featcache.settings import from_mapping
    from trainer.report.data import load_run
    from trainer.runs import folder as runs
    from trainer.runs.config import RunConfig

    case = _case(folder)
    runs.save_config(case, from_mapping(RunConfig, _settings()))
    records = [
        {
            "step": s,
            "time_s": s / 10,
            "images_per_s": 9.5,
            "lr": 1e-4,
            "loss": 1 / s,
            "denoise": 0.9 / s,
            "align/a": 0.1,
        }
        for s in range(1, 13)
    ]

    look = _viewer(case, rng)

    def make() -> Callable[[], object]:
        lines = [json.dumps(record).encode() for record in records]
        if rng.randrange(2):
            at = rng.randrange(len(lines))
            lines[at] = _text(records[at], json.dumps, rng)
            data = b"\n".join(lines) + b"\n"
        else:
            data = change_bytes(b"\n".join(lines) + b"\n", rng)
        (case / "log.jsonl").write_bytes(data)

        def read() -> None:
            try:
                look(load_run(case))
            finally:
                runs.truncate_log(case, 6)
            assert all(record["step"] <= 6 for record in runs.read_log(case))
            look(load_run(case))

        return read

    return make


def _analysis(folder: Path, rng: random.Random) -> Callable[[], Callable[[], object]]:
    import numpy as np

    from featcache.settings import from_mapping
    from trainer.analyze.compare import compare
    from trainer.analyze.result import About, Result, Row, write_about, write_comparison, write_result
    from trainer.plots import Chart, Matrix, Plot, Series, Strips
    from trainer.report.analysis import write_diagnostics, write_diagnostics_comparison
    from trainer.report.data import load_run
    from trainer.runs import folder as runs
    from trainer.runs.config import RunConfig

    case = _case(folder)
    runs.save_config(case, from_mapping(RunConfig, _settings()))
    line = Series(label="a", x=[0.1, 0.2], y=[1.0, float("nan")])
    axes: dict[str, Any] = {"title": "t", "columns": ["a"], "rows": ["b"]}
    drawings: dict[str, Chart | Strips | Matrix] = {
        "lines": Chart(title="t", x_label="x", y_label="y", series=[line]),
        "strips": Strips(**axes, cells=[[np.zeros((4, 4, 3), np.uint8)]]),
        "matrix": Matrix(**axes, values=np.ones((1, 1)), low=0.0, high=1.0),
    }
    plots = [Plot(name=name, drawing=drawing, headline=line) for name, drawing in drawings.items()]
    rows: list[Row] = [{"a": 1, "b": "x"}, {"a": None, "b": 2.5}]
    result = Result(what="gsnr", title="t", question="q", finding="f", plots=plots, rows=rows, settings={"k": 3})
    place = case / "analysis"
    place.mkdir()
    write_result(place, result)
    write_about(place, About(lead="l", left_out={"router": "none"}), asked=[])
    write_comparison(place, ["a 1", "b 1"], compare({"a": [result], "b": [result]}))
    sound = {name: json.loads((place / f"{name}.json").read_text()) for name in ("gsnr", "about", "comparison")}

    def make() -> Callable[[], object]:
        for name, values in sound.items():
            (place / f"{name}.json").write_text(json.dumps(values))
        name = rng.choice(list(sound))
        (place / f"{name}.json").write_bytes(_text(sound[name], json.dumps, rng))
        write = write_diagnostics_comparison if name == "comparison" else write_diagnostics
        drawn = ["gsnr"] if rng.randrange(20) == 0 else []

        def read() -> None:
            load_run(case)
            write(case, drawn)

        return read

    return make


def _safetensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with its header's structure or any of its bytes changed."""
    if rng.randrange(2):
        return change_bytes(data, rng)
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    hostile = (*HOSTILE, "F64", "I64", "BF16", "F8_E4M3", "F8_E8M0", "F4", "BOOL", "U16", "C64", [1], [2, 2], [0, 4])
    changed = json.dumps(change_value(header, rng, hostile)).encode()
    return len(changed).to_bytes(8, "little") + changed + rest


@functools.cache
def _nano() -> Any:
    from trainer.models import ModelConfig, build_model

    config = ModelConfig(
        family="sit", depth=2, width=12, heads=2, patch_size=2, latent_channels=4, latent_size=4, num_classes=3
    )
    return build_model(config, seed=0)


def _checkpoint(folder: Path, rng: random.Random) -> Callable[[], Callable[[], object]]:
    from trainer.models import load_weights
    from trainer.runs import checkpoint

    model, head = _nano(), torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    names: dict[torch.Tensor, str] = {p: n for n, p in head.named_parameters()}

    def fresh() -> torch.optim.Optimizer:
        return torch.optim.AdamW(head.parameters(), fused=True)

    def step(optimizer: torch.optim.Optimizer) -> None:
        head(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    optimizer = fresh()
    step(optimizer)
    tensors = {
        "ema": dict(model.state_dict()),
        "alignment": dict(head.state_dict()),
        "optimizer": checkpoint.optimizer_tensors(optimizer, names),
    }
    state = {"time_s": 3.5, "scaler": {"scale": 65536.0}, "model": "SiT-S/2"}
    case = _case(folder)
    shutil.rmtree(case)
    sound = checkpoint.save_checkpoint(case, 5, tensors, state, keep=1)
    original = {path.name: path.read_bytes() for path in sound.iterdir()}

    def make() -> Callable[[], object]:
        for name, data in original.items():
            (sound / name).write_bytes(data)
        victim = rng.choice(sorted(original))
        data = original[victim]
        if victim == "state.json":
            (sound / victim).write_bytes(_text(json.loads(data), json.dumps, rng))
        elif rng.randrange(8) == 0:  # sound, and another file's
            (sound / victim).write_bytes(original[rng.choice(sorted(original))])
        elif rng.randrange(4) == 0:
            (sound / victim).write_bytes(_other_tensors(tensors[victim.split(".")[0]], rng))
        else:
            (sound / victim).write_bytes(_safetensors(data, rng))

        def read() -> None:
            _, path = checkpoint.find_checkpoint(case)
            float(checkpoint.load_state(path).get("time_s", 0.0))
            load_weights(model, checkpoint.load_tensors(path, "ema"))
            checkpoint.load_module(head, path, "alignment")
            again = fresh()
            checkpoint.load_optimizer(again, checkpoint.load_tensors(path, "optimizer"), names)
            step(again)

        return read

    return make


def _other_tensors(tensors: dict[str, torch.Tensor], rng: random.Random) -> bytes:
    """The same names with one tensor of another type or shape, or without one."""
    changed = {key: value.clone().contiguous() for key, value in tensors.items()}
    name = rng.choice(sorted(changed))
    value = changed[name]
    kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn)
    action = rng.randrange(5)
    if action == 0:
        changed[name] = value.to(rng.choice(kinds))
    elif action == 1:
        changed[name] = value.reshape(-1)[: rng.randrange(value.numel() + 1)].clone()
    elif action == 2:
        del changed[name]
    elif action == 3:
        changed[rng.choice(("x", "exp_avg/x", "/", "step/0.weight", "a" * 300))] = changed.pop(name)
    else:
        changed[name] = value[None].clone()
    return safetensors_bytes(changed)


def _npz(arrays: dict[str, Any], rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array, allow_pickle=True)
            data = member.getvalue()
            if rng.randrange(8) == 0:  # the array's own header: a gigantic shape, another type
                data = data.replace(
                    rng.choice((b"(4,", b"<f8", b"<f4", b"|u1", b"False")),
                    rng.choice((b"(9999999999,", b"<f2", b"|O", b"|S9", b"<c16", b"True", b"(-1,", b"<i8")),
                )
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def _reference(folder: Path, rng: random.Random) -> Callable[[], Callable[[], object]]:
    from trainer.evaluate.images import open_images
    from trainer.evaluate.references import load_statistics

    case = _case(folder)
    generator = np.random.default_rng(0)
    record = {"format": 1, "count": 10, "resolution": 8, "extractor": {"name": "embedded"}, "versions": {}}
    moments = {
        "mu": np.zeros(4),
        "sigma": np.eye(4),
        "mu_s": np.zeros(4),
        "sigma_s": np.eye(4),
        "pool": np.zeros((6, 4), np.float32),
    }
    pictures = {
        "arr_0": generator.integers(0, 255, (4, 8, 8, 3), dtype=np.uint8),
        "arr_1": np.arange(4),
    }
    others: tuple[Any, ...] = (
        np.zeros((3, 5)),
        np.zeros(0),
        np.array(3.5),
        np.array([{"a": 1}], dtype=object),
        np.array(["text"]),
        np.full(4, np.nan),
        np.zeros(4, np.complex64),
        np.zeros((4, 4), np.int8),
        np.zeros((2, 3, 4, 5, 6)),
        np.zeros((4, 8, 9, 3), np.uint8),
        np.zeros((4, 8, 8, 1), np.float32),
        np.zeros(4, dtype=[("a", "f4")]),
        np.zeros(4, "M8[s]"),
    )

    def make() -> Callable[[], object]:
        text = json.dumps(record).encode()
        if rng.randrange(3) == 0:
            text = _text(record, json.dumps, rng)
        arrays: dict[str, Any] = dict(rng.choice((moments, pictures, {**moments, **pictures})))
        if "mu" in arrays:
            arrays["provenance"] = np.frombuffer(text, np.uint8)
        for _ in range(rng.choice((0, 1, 1, 2))):
            name = rng.choice(sorted(arrays))
            if rng.randrange(4) == 0:
                del arrays[name]
            else:
                arrays[name] = rng.choice(others)
            if not arrays:
                break
        data = _npz(arrays, rng)
        path = case / "reference.npz"
        path.write_bytes(change_bytes(data, rng) if rng.randrange(3) == 0 else data)

        def read() -> None:
            try:
                load_statistics(path)
            finally:
                for batch in open_images(path).batches(2):
                    assert batch.dtype == np.uint8

        return read

    return make


def _import(folder: Path, rng: random.Random) -> Callable[[], Callable[[], object]]:
    from trainer.runs.weights_io import export_official, import_official

    case = _case(folder)
    model = _nano()
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    export_official(case / "sound.pt", model.cfg, ema=state, step=7)
    sound = (case / "sound.pt").read_bytes()
    content = torch.load(case / "sound.pt", weights_only=True)
    bare = safetensors_bytes({key: value.contiguous() for key, value in content["ema"].items()})
    hostile = (
        *(item for item in HOSTILE if not isinstance(item, int) or abs(item) < 2**62),
        *(torch.zeros(3), torch.zeros(0), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(12, 12, 12, 12, 12)[:0]),
        *(torch.tensor(1.0), torch.zeros(1, 4, 12), torch.zeros(4, dtype=torch.complex64)),
        *(torch.zeros(1).expand(2**33), torch.zeros(3).to_sparse(), torch.nn.Parameter(torch.zeros(2))),
    )

    def make() -> Callable[[], object]:
        kind = rng.randrange(3)
        path = case / ("file.safetensors" if kind == 0 else "file.pt")
        if kind == 0:
            path.write_bytes(_safetensors(bare, rng))
        elif kind == 1:
            path.write_bytes(change_bytes(sound, rng))
        else:
            changed = change_value(content, rng, hostile)
            torch.save(changed, path, _use_new_zipfile_serialization=rng.randrange(4) > 0)

        def read() -> None:
            weights: Any = rng.choice(("ema", "model"))
            import_official(path, weights=weights, convention=rng.choice((None, "repa", "sit")), heads=2)

        return read

    return make
