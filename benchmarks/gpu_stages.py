"""What each stage of `benchmarks/gpu.py` measures, with the functions of the benchmarks beside it.

A stage is a function of the same name (`_` for `-`) that reports each figure as soon as it has it. `small` takes the same
path at sizes for a CPU: what it reports says nothing of speed.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_record import Record

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "timm", "diffusers", "transformers", "numpy", "zarr", "numcodecs", "pillow")


@dataclass(frozen=True, kw_only=True)
class Context:
    """work: an empty folder, removed afterwards. report: takes a figure, or a group of them, by its key."""

    small: bool
    photographs: Path | None
    work: Path
    report: Callable[[str, Any], None]

    @property
    def device(self) -> str:
        return "cpu" if self.small else "cuda"

    def size(self, full: Any, small: Any) -> Any:
        return small if self.small else full


def run_stage(name: str, record: Record, *, small: bool, photographs: Path | None, work: Path) -> None:
    """Runs a stage in this process and reports into `record`."""
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work, prefix=f"{name}-") as folder:
        context = Context(
            small=small,
            photographs=photographs,
            work=Path(folder),
            report=lambda key, value: record.report(name, key, value),
        )
        STAGES[name](context)


def end_with(parent: int, work: Path) -> None:
    """Has this process, its group, and its folder `work` end where `parent` is killed, which cannot end them itself: what
    went on would take the device from the next call. The process leads a group of its own."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        shutil.rmtree(work, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def synchronise(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], device: str, *, repeats: int, warm: int = 2) -> float:
    """Seconds of one call, the mean of `repeats` after `warm` that do not count."""
    for _ in range(warm):
        work()
    synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronise(device)
    return (time.perf_counter() - start) / repeats


# --- 1: the machine, the tests, the whole path ---


def machine(context: Context) -> None:
    """What the machine is, and what it does at best: the ceilings that other figures are held against."""
    import torch

    from featcache.machine import describe_machine
    from trainer.training.flops import peak_tflops

    described = describe_machine(*PACKAGES)
    context.report("machine", {**described, "cuda": torch.version.cuda})
    if shutil.which("nvidia-smi"):
        query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
        done = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv"], capture_output=True, text=True)
        context.report("nvidia-smi", done.stdout.strip().splitlines()[-1:])
    context.report("peak_tflops", peak_tflops(str(described["gpu"])) if described["gpu"] else None)
    device, n = torch.device(context.device), context.size(8192, 256)
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        torch.set_float32_matmul_precision("high")
        spent = seconds_of(lambda a=a, b=b: a @ b, context.device, repeats=10)  # type: ignore[misc]
        context.report(f"matmul_tflops_{str(dtype).removeprefix('torch.')}", 2 * n**3 / spent / 1e12)
    count = context.size(1 << 30, 1 << 20)
    source, target = (torch.empty(count, dtype=torch.uint8, device=device) for _ in range(2))
    spent = seconds_of(lambda: target.copy_(source), context.device, repeats=10)
    context.report("device_copy_gb_per_s", 2 * count / spent / 1e9)
    host = torch.empty(count // 4, dtype=torch.uint8, pin_memory=context.device == "cuda")
    spent = seconds_of(lambda: target[: len(host)].copy_(host, non_blocking=True), context.device, repeats=10)
    context.report("host_to_device_gb_per_s", len(host) / spent / 1e9)
    context.report("disk_gb_per_s", _disk(context))


def _disk(context: Context) -> dict[str, float]:
    """Of one large file in the folder for temporary files: written and synchronised, read cold."""
    from loader import evict

    path, block = context.work / "disk", os.urandom(1 << 24)
    blocks = context.size(128, 2)
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(blocks):
            file.write(block)
        os.fsync(file.fileno())
    written = time.perf_counter() - start
    evict(context.work)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass
    total = blocks * len(block) / 1e9
    return {"write": total / written, "read": total / (time.perf_counter() - start)}


GPU_TESTS = (
    "tests/trainer/test_loop.py::test_no_step_waits_for_the_gpu",
    "tests/trainer/test_step_cost.py::test_the_host_never_waits_for_a_gpu_but_at_logging_steps",
    "tests/trainer/test_step_options.py::test_recomputation_holds_less_on_a_gpu",
    "tests/trainer/test_on_a_gpu.py",
    "tests/trainer/test_no_waits.py::test_sampling_never_waits_for_a_gpu",
    "tests/trainer/test_step_options.py::test_a_captured_run_follows_a_compiled_one",
)


def tests(context: Context) -> None:
    """Fails where one of them fails, or where on a GPU one is skipped."""
    words = [sys.executable, "-m", "pytest", "-rfEs", "--tb=short", "-p", "no:cacheprovider", *GPU_TESTS]
    if not context.small:
        words += ["--numprocesses", "4"]
    done = subprocess.run(words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(done.stdout, flush=True)
    lines = done.stdout.splitlines()
    context.report("summary", lines[-1] if lines else "")
    context.report(
        "counts", counts := {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", lines[-1])}
    )
    context.report("failed", [line for line in lines if line.startswith(("FAILED", "ERROR"))][:40])
    if done.returncode or (counts.get("skipped") and not context.small):
        raise SystemExit(f"pytest ended with {done.returncode}: {lines[-1] if lines else ''}")


def typed(context: Context, step: str, *words: str) -> None:
    """One command, as it would be typed in the folder for temporary files; its time is reported under `step`."""
    start = time.perf_counter()
    print("$", *words, flush=True)
    subprocess.run([sys.executable, "-m", *words], cwd=context.work, check=True)
    context.report(f"{step}_s", round(time.perf_counter() - start, 1))


def end_to_end(context: Context) -> None:
    """The README's commands on photographs, weights of encoders random."""
    data = str(context.photographs or "shapes")
    context.report("data", data if data == "shapes" else "photographs")
    limit = context.size(120, 8)
    tiny = "--encoder tiny --vae tiny --vae-levels G3,G4 --resolution 64 --batch-size 4"
    full = "--encoder dinov2-b@9,11,11.cls --vae-levels G3,G4 --resolution 256 --random-weights 0 --batch-size 32"
    encoders = context.size(full, tiny).split()
    build = ("featcache.cli", "build", "--data", data, "--limit", str(limit), *encoders, "--device", context.device)
    typed(context, "build", *build, "--out", "caches/photographs")
    typed(context, "verify", "featcache.cli", "verify", "caches/photographs")
    model, batch, steps = context.size(("SiT-B/2", 32, 60), ("SiT-Ti/2", 4, 4))
    sizes = ("--model", model, "--batch-size", str(batch), "--device", context.device)
    every = f"{steps // 2}"
    kept = (
        "--set",
        f"log_every={max(1, steps // 6)}",
        "--set",
        f"checkpoint_every={every}",
        "--set",
        f"sample_every={4 * steps}",
    )
    for method in context.size(("ahpa", "sara"), ("ahpa",)):
        run = ("trainer.cli", "run", "--method", method, "--cache", "caches/photographs", "--name", method)
        random = ("--set", "sara.discriminator_weights=random") if method == "sara" else ()
        typed(context, f"train_{method}", *run, *sizes, "--steps", str(steps), *kept, *random)
        typed(context, f"resume_{method}", *run, *sizes, "--steps", str(2 * steps), *kept, *random, "--resume")
        context.report(f"log_{method}", _log_of(context.work / "runs" / method))
    sampling = ("--num", str(context.size(64, 4)), "--device", context.device)
    steps = context.size(50, 2)
    typed(
        context,
        "evaluate",
        "trainer.cli",
        "eval",
        "runs/ahpa",
        *sampling,
        "--steps",
        str(steps),
        "--extractor",
        "embedded",
    )


def _log_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, shortened to what tells whether it went well."""
    from trainer.runs.folder import read_log

    kept = ("step", "images_per_s", "data_wait", "loss", "denoise", "grad_norm", "gpu_allocated_bytes", "mfu")
    return [{key: line[key] for key in kept if key in line} for line in read_log(run)]


def demo(context: Context) -> None:
    """`make demo` without the installation; on a CPU it takes minutes, so `small` leaves it out."""
    if context.small:
        context.report("left_out", "it takes five minutes on a CPU: make demo")
        return
    typed(context, "demo", "pipelines.demo")
    for method in ("none", "ahpa"):
        context.report(f"log_{method}", _log_of(context.work / "runs/demo" / method)[-2:])


# --- 2: the step ---


def step_options(context: Context, batch: int, **changes: Any) -> dict[str, Any]:
    """Options of `step.measure`."""
    from trainer.training.flops import peak_tflops

    options: dict[str, Any] = {
        "model": context.size("SiT-XL/2", "SiT-Ti/2"),
        "batch_size": context.size(batch, 2),
        "device": context.device,
        "precision": "auto",
        "compile": context.size(None, False),
        "memory_methods": [],
        "rounds": context.size(4, 2),
        "steps": context.size(5, 1),
        "warmup": context.size(5, 1),
        "breakdown": context.size(3, 1),
        "samples": context.size(512, 64),
        "peak_tflops": None,
        **changes,
    }
    if not context.small:
        import torch

        options["peak_tflops"] = peak_tflops(torch.cuda.get_device_name())
    return options


def _steps(context: Context, batch: int, *methods: str, **changes: Any) -> None:
    import step

    options = step_options(context, batch, **changes)
    context.report("options", options)
    cache = context.work / "cache"
    step.write_cache(cache, options["samples"])
    step.measure(options, cache, methods, told=context.report)


def step_ahpa(context: Context) -> None:
    _steps(context, 128, "none", "ahpa", memory_methods=["none", "ahpa"])


def step_repa(context: Context) -> None:
    _steps(context, 128, "none", "repa", "sra2")


def step_dya(context: Context) -> None:
    _steps(context, 128, "none", "dya", "sara")


def step_sra(context: Context) -> None:
    _steps(context, 128, "none", "sra")


def step_256(context: Context) -> None:
    _steps(context, 256, "none", "ahpa", breakdown=0)


def step_64(context: Context) -> None:
    _steps(context, 64, "none", "ahpa", breakdown=0)


def step_32(context: Context) -> None:
    _steps(context, 32, "none", "ahpa", breakdown=0)


def step_reg(context: Context) -> None:
    _steps(context, 64, "none", "reg")


def step_redi(context: Context) -> None:
    _steps(context, 64, "none", "redi")


def peer(context: Context) -> None:
    """A plain loop and the trainer's vanilla step in turns, at a batch at which both fit on one device; then the plain
    loops alone, at the batch of the other stages."""
    import statistics

    import step

    options = step_options(context, 64)
    cache = context.work / "cache"
    step.write_cache(cache, options["samples"])
    bench = step.Bench(options, cache, ("none",))
    plain = _plain(context, options["batch_size"], online=False)
    warm_up_s = bench.warm_up("none", "disk", options["warmup"])
    seconds_of(plain.step, context.device, repeats=1)
    spent: dict[str, list[float]] = {"ours": [], "plain": []}
    for number in range(options["rounds"]):
        for name in ("ours", "plain")[:: 1 if number % 2 else -1]:
            if name == "ours":
                spent[name].append(bench.run("none", "disk", options["steps"]))
            else:
                spent[name].append(seconds_of(plain.step, context.device, repeats=options["steps"], warm=0))
        found = {name: _rates(options, values) for name, values in spent.items()}
        times = statistics.median(a / b for a, b in zip(spent["plain"], spent["ours"]))
        context.report("paired", {**found, "warm_up_s": warm_up_s, "ours_times_plain": times})
    bench.close()
    del bench, plain
    for name, batch, online in (("plain", 128, False), ("repa_online", 128, True)):
        _free(context)
        options = step_options(context, batch)
        loop = _plain(context, options["batch_size"], online=online)
        values = [
            seconds_of(loop.step, context.device, repeats=options["steps"], warm=2) for _ in range(options["rounds"])
        ]
        context.report(name, {**_rates(options, values), "peak_bytes": _peak(context)})
        del loop


def _plain(context: Context, batch: int, *, online: bool) -> Any:
    import torch
    from plain import PlainLoop

    from trainer.models import model_config

    model = context.size("SiT-XL/2", "SiT-Ti/2")
    cfg = model_config(model, latent_channels=4, latent_size=32, num_classes=1000)
    precision = context.size("bf16", "fp32")
    torch.set_float32_matmul_precision("high")
    return PlainLoop(cfg, batch, torch.device(context.device), online=online, precision=precision)


def _rates(options: Mapping[str, Any], seconds: list[float]) -> dict[str, Any]:
    """Of one way of training SiT; MFU as `step.measure` counts it."""
    import statistics

    from trainer.models import forward_flops, model_config

    rate = options["batch_size"] / statistics.median(seconds)
    cfg = model_config(options["model"], latent_channels=4, latent_size=32, num_classes=1000)
    peak = options["peak_tflops"]
    return {
        "batch_size": options["batch_size"],
        "step_ms": 1e3 * statistics.median(seconds),
        "images_per_s": rate,
        "round_step_ms": [1e3 * value for value in seconds],
        "mfu": 3 * forward_flops(cfg) * rate / (peak * 1e12) if peak else None,
    }


def _free(context: Context) -> None:
    import gc

    import torch

    gc.collect()
    if context.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(context: Context) -> int | None:
    import torch

    return int(torch.cuda.max_memory_allocated()) if context.device == "cuda" else None


# --- 3: the profile ---


def profile(context: Context) -> None:
    import step
    from kernels import profiled

    steps = context.size(3, 1)
    options = step_options(context, 128)
    cache = context.work / "cache"
    step.write_cache(cache, options["samples"])
    bench = step.Bench(options, cache, ("none", "ahpa"))
    for method in bench.jobs:
        bench.warm_up(method, "memory", options["warmup"])
        one = functools.partial(bench.one, method, "memory")
        context.report(method, profiled(one, context.device, steps=steps))
    bench.close()
    del bench, one
    _free(context)
    loop = _plain(context, options["batch_size"], online=False)
    seconds_of(loop.step, context.device, repeats=1)
    context.report("plain", profiled(loop.step, context.device, steps=steps))


# --- 4: feeding ---


def feeding(context: Context) -> None:
    """AHPA's records, evicted from the page cache before each pass: what the loader gives, and how long steps wait for it."""
    import loader as loaders
    import step
    import torch

    import featcache
    from featcache.torch import Loader

    count = context.size(4096, 64)
    options = step_options(context, 128, samples=count, breakdown=0)
    cache = context.work / "cache"
    start = time.perf_counter()
    features = ("vae/moments", "vae/G3", "vae/G4")
    step.write_cache(cache, count, features)
    stored = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    context.report(
        "cache", {"images": count, "bytes_per_image": stored / count, "written_s": time.perf_counter() - start}
    )
    batch = options["batch_size"]
    rates: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(context.size(3, 1)):
        for kind, found in rates.items():
            if kind == "cold":
                loaders.evict(cache)
            stream = Loader(
                featcache.open(cache), [*features, "label"], batch_size=batch, dtype=None, device=torch.device(context.device),
                stop=count // batch,
            )  # fmt: skip
            start, images = time.perf_counter(), 0
            for _batch in stream:
                images += batch
            synchronise(context.device)
            found.append(images / (time.perf_counter() - start))
            stream.close()
            context.report(f"loader_{kind}_images_per_s", found)
    bench = step.Bench(options, cache, ("ahpa",))
    bench.warm_up("ahpa", "disk", options["warmup"])
    waits = []
    for _ in range(context.size(3, 1)):
        loaders.evict(cache)
        before, steps = bench.waited_s, context.size(16, 2)
        spent = bench.run("ahpa", "disk", steps) * steps
        waits.append({"images_per_s": steps * batch / spent, "waiting_share": (bench.waited_s - before) / spent})
        context.report("training_cold", waits)
    bench.close()


# --- 5: encoding ---


def _images(context: Context, count: int) -> str:
    """A folder of so many JPEGs: the photographs again and again, or shapes."""
    import encode

    folder = context.work / "images"
    if context.photographs is None:
        encode.draw_images(folder, count, context.size(500, 80))
        return str(folder)
    files = [path for path in sorted(context.photographs.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")]
    for index in range(count):
        source = files[index % len(files)]
        place = folder / source.parent.name
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, place / f"{index:06d}.jpg")
    return str(folder)


def _request(context: Context, count: int, **changes: Any) -> Any:
    from featcache.builder.request import BuildRequest
    from featcache.encoders import parse_encoders, parse_levels

    return BuildRequest(
        data=_images(context, count),
        encoders=parse_encoders([context.size("dinov2-b", "tiny")]),
        vae=context.size("sd-ft-ema", "tiny"),
        levels=parse_levels("G3,G4"),
        resolution=context.size(256, 64),
        batch_size=context.size(128, 8),
        device=context.device,
        random_weights=0,
        **changes,
    )


def _encode(context: Context, precisions: tuple[str, ...], *, compiled: bool) -> None:
    """Images/s of all encoders and of each, and errors against float32 that is not compiled."""
    import encode
    import torch

    batch = context.size(128, 8)
    request = _request(context, batch)
    exact: dict[str, Any] = {}
    for precision in ("fp32", *(p for p in precisions if compiled or p != "fp32")):
        reference = not exact
        encoders, pixels = encode.encoders_and_pixels(request, precision, compiled=compiled and not reference)
        features: dict[str, Any] = {}
        for encoder in encoders:
            features.update(encoder(pixels))
        synchronise(context.device)
        if reference:
            exact = {name: value.clone() for name, value in features.items()}
            if compiled:
                continue  # which `encode` has measured
        entry: dict[str, Any] = {
            "relative_error": {
                name: float((value.double() - exact[name].double()).norm() / exact[name].double().norm())
                for name, value in features.items()
            }
        }
        least_s = context.size(4.0, 0.2)
        entry["images_per_s"] = encode.encoding_rate(encoders, pixels, context.device, at_least_s=least_s)
        entry["each_images_per_s"] = {
            encoder.title: encode.encoding_rate([encoder], pixels, context.device, at_least_s=least_s / 2)
            for encoder in encoders
        }
        entry["imagenet_minutes"] = 1_281_167 / entry["images_per_s"] / 60
        entry["peak_bytes"] = _peak(context)
        context.report(precision, entry)
        del encoders, pixels
        torch.compiler.reset()
        _free(context)


def encode(context: Context) -> None:
    _encode(context, context.size(("fp32", "tf32", "bf16"), ("fp32", "bf16")), compiled=False)


def encode_compiled(context: Context) -> None:
    _encode(context, context.size(("tf32", "bf16", "fp32"), ("bf16",)), compiled=not context.small)


def build(context: Context) -> None:
    """A whole build in the default precision, and in bf16, from JPEGs on the disk to the finished cache."""
    import encode as encoding

    count = context.size(4096, 16)
    request = _request(context, count, compile=context.size(None, False))
    for precision in context.size(("auto", "bf16"), ("auto",)):
        from dataclasses import replace

        one = replace(request, precision=precision)
        for decoder in context.size(("pil", "turbo"), ("pil",)):
            folder = context.work / f"{precision}-{decoder}"
            found = encoding.whole_build(replace(one, decode=decoder), folder)
            rate = found.pop("rate")
            context.report(
                f"{precision}, {decoder}",
                {
                    "images_per_s": rate.images_per_s,
                    "cpu_s_per_image": rate.cpu_s,
                    "imagenet_minutes": 1_281_167 / rate.images_per_s / 60,
                    **found,
                },
            )
            shutil.rmtree(folder, ignore_errors=True)


# --- 6: sampling and evaluation ---


def sampling(context: Context) -> None:
    """Batches of XL/2 as `trainer sample` draws them; 50,000 images are projected from them, and it is said from how many."""
    import sample
    import torch

    options = {
        "model": context.size("SiT-XL/2", "SiT-Ti/2"),
        "steps": context.size(250, 2),
        "batch_size": context.size(128, 1),
        "decoded": context.size(64, 1),
        "precisions": context.size("bf16", "fp32"),
        "sampler": None,
        "guidance": 1.8,
        "latent_size": context.size(32, 4),
    }
    context.report("options", options)
    device = torch.device(context.device)
    kind = context.size("compiled", "eager")
    for name, job in sample.jobs_of(options, device).items():
        if not name.startswith(kind) and name != "decode":
            continue
        warm_s = sample.timed(job, device)
        rounds = 1 if name != "decode" else 3
        spent = sum(sample.timed(job, device) for _ in range(rounds)) / rounds
        images = options["decoded"] if name == "decode" else options["batch_size"]
        figures = {"images": images * rounds, "images_per_s": images / spent, "warm_up_s": warm_s}
        context.report(name, figures | {"minutes_for_50000": 50_000 * spent / images / 60})


def evaluation(context: Context) -> None:
    """`evaluate.py`'s measurements on this device."""
    import evaluate

    options = {
        "samples": context.size(50_000, 64),
        "dim": context.size(2048, 16),
        "images": context.size(4000, 4),
        "resolution": context.size(256, 64),
        "batch_size": context.size(128, 2),
        "device": context.device,
    }
    context.report("options", options)
    for metric in context.size(
        ("extract_array", "frechet_distance", "precision_recall", "inception_score", "kid", "extract_png"),
        ("extract_array", "moments"),
    ):
        context.report(metric, evaluate.measure(metric, options))


# --- 7: the experiment ---


def experiment(context: Context) -> None:
    """`pipelines.experiments.methods`; photographs where there are archives of them, else shapes."""
    photographs = context.photographs
    archives = (
        photographs is not None and bool(list(photographs.glob("train*.zip"))) and (photographs / "val.zip").is_file()
    )
    part = "photographs-64" if archives else "shapes-64"
    words = ["pipelines.experiments.methods", "--part", part, "--out", "experiment", "--device", context.device]
    words += ["--photographs", str(photographs)] if archives else []
    words += ["--seeds", "1", "--methods", context.size("none,ahpa,repa", "none")]
    if context.small:
        words += ["--model", "SiT-Ti/2", "--steps", "2", "--points", "1", "--images", "8", "--samples", "4"]
        words += ["--sampling-steps", "2", "--held-out", "4", "--batch-size", "2", "--precision", "fp32"]
    else:
        words += ["--model", "SiT-S/2", "--steps", "4000", "--points", "2", "--batch-size", "64"]
    try:
        typed(context, "experiment", *words)
    finally:
        import json

        for found in (context.work / "experiment").rglob("results.json"):
            context.report(found.parent.name, json.loads(found.read_text()))


STAGES: Mapping[str, Callable[[Context], None]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        machine, tests, end_to_end, step_ahpa, peer, profile, step_repa, encode, encode_compiled, build, feeding,
        step_dya, sampling, evaluation, step_sra, demo, step_256, step_64, step_32, step_reg, step_redi, experiment,
    )
}  # fmt: skip
