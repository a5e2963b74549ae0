"""Time and memory of a training step: vanilla and every alignment method on the same model and batch.

    python benchmarks/step.py --name cpu                                                   # any machine
    python benchmarks/step.py --name h100 --model SiT-XL/2 --batch-size 64 --device cuda    # one GPU
    python benchmarks/step.py --name flops-xl2 --model SiT-XL/2 --count                     # FLOPs alone, any machine

Writes `benchmarks/results/step-<name>.json`. A synthetic cache with records of ImageNet's size (256 px: moments, AHPA's
eight VAE levels, two layers of DINOv2-B; random bytes) is written to a temporary folder. All methods share one backbone
and its optimiser state and take turns in one process: in every round each runs a block of steps, in rotating order, so
that what else the machine does hits all alike. Figures are medians over the rounds; a method's overhead is the median of
its ratio to vanilla within a round. A block holds whole periods of what does not happen at every step (SARA's
discriminator, one step in five); DyA's stochastic dropout skips the steps its coin says. REG and ReDi diffuse a feature
beside the latents, so each has a backbone of its own. Peak memory is taken in a
process per method. FLOPs are counted, not measured: what a method adds at least.

`disk` steps are fed by the trainer's own reader from the cache (its pages warm), `memory` steps by one batch that is
already on the device. The breakdown times each part alone, with the device idle before and after, so its sum exceeds the
step, in which loading and copying are hidden behind the computation.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from datetime import date
from itertools import count, repeat
from pathlib import Path
from typing import Annotated, Any

import typer

RESULTS = Path(__file__).resolve().parent / "results"
METHODS = ("none", "repa", "sra2", "dya", "ahpa", "sara", "sra", "reg", "redi")
OPTIONS: dict[str, dict[str, Any]] = {
    "sara": {"discriminator_weights": "random"},
}
FEATURES = {
    "vae/moments": ((8, 32, 32), "fp16"),
    "vae/G3": ((4, 256, 512), "int8"),
    "vae/G4": ((4, 256, 512), "int8"),
    "dinov2-b@9": ((256, 768), "int8"),
    "dinov2-b@11": ((256, 768), "int8"),
    "dinov2-b@11.cls": ((768,), "fp16"),
    "dinov2-b@11.pca8": ((256, 8), "fp16"),
}


def write_cache(path: Path, samples: int, features: Collection[str] = tuple(FEATURES)) -> None:
    """Records as large as ImageNet's at 256 px, random bytes; labels, keys and so many of `FEATURES`."""
    import numpy as np

    from featcache.store.manifest import DatasetSpec, FeatureSpec
    from featcache.store.writers import create_writer

    vae = {"name": "synthetic", "latent_channels": 4, "scaling_factor": 0.18215, "shift_factor": 0.0, "downsampling": 8}
    dataset = DatasetSpec(
        name="synthetic",
        count=samples,
        class_names=tuple(map(str, range(1000))),
        fingerprint="0" * 64,
        preprocessing={"resolution": 256},
        vae=vae,
        grid=16,
    )
    specs = [FeatureSpec(name=n, shape=shape, codec=codec) for n, (shape, codec) in FEATURES.items() if n in features]
    specs += [
        FeatureSpec(name="label", shape=(), codec="raw", dtype="int64"),
        FeatureSpec(name="key", shape=(8,), codec="raw", dtype="uint8"),
    ]
    rng = np.random.default_rng(0)

    def random(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        if dtype == np.int8:
            return rng.integers(-127, 128, shape, dtype=np.int8)
        if dtype.kind == "f":
            return rng.standard_normal(shape, dtype=np.float32).__abs__().astype(dtype)
        return rng.integers(0, 100, shape).astype(dtype)

    with create_writer(path, dataset, shard_size=64) as writer:
        writer.begin(specs)
        for shard in writer.pending():
            n = len(writer.slots(shard))
            for spec in specs:
                arrays = {name[len(spec.name) :]: random(d, (n, *s)) for name, (d, s) in spec.arrays.items()}
                writer.write_shard(spec.name, shard, arrays)
        writer.finish()


def run_config(options: dict[str, Any], method: str) -> Any:
    """The settings of one method's run."""
    from featcache.settings import from_mapping
    from trainer.runs.config import RunConfig

    return from_mapping(
        RunConfig,
        {
            "method": method,
            "align": {method: OPTIONS[method]} if method in OPTIONS else {},
            "model": options["model"],
            "batch_size": options["batch_size"],
            "precision": options["precision"],
            "compile": options["compile"],
            "clip": 1.0,
            "steps": 1 << 30,
        },
    )


class Bench:
    """One backbone, and a job for each method on it."""

    def __init__(self, options: dict[str, Any], cache_path: Path, methods: tuple[str, ...]) -> None:
        import torch

        import featcache
        from featcache.progress import Quiet
        from featcache.torch.feed import Share
        from trainer.distributed import World
        from trainer.training.loop import Job, prepare_device
        from trainer.training.meters import FirstBadStep, RunningMeans
        from trainer.training.state import assemble, backbone_config

        # Every method has its own variants of the one compiled function.
        torch._dynamo.config.recompile_limit = 8 * len(METHODS)
        self.device = torch.device("cuda", 0) if options["device"] == "cuda" else torch.device(options["device"])
        prepare_device(self.device)
        cache = featcache.open(cache_path)
        share = Share(global_batch=options["batch_size"])
        self.means, self.bad = RunningMeans(), FirstBadStep(self.device)
        self.jobs: dict[str, Any] = {}
        self.streams: dict[tuple[str, str], Iterator[Any]] = {}
        self.steps = {(method, source): count() for method in methods for source in ("disk", "memory")}
        self.feeds: list[Any] = []
        backbones: dict[Any, tuple[Any, Any]] = {}
        states: dict[Any, dict[Any, Any]] = {}
        for method in methods:
            config = run_config(options, method)
            shape = backbone_config(config, cache)
            parts = assemble(config, cache, self.device, World(), backbone=backbones.get(shape))
            backbones[shape] = parts.model, parts.ema
            # One set of Adam's moments for the shared weights, as one run would have.
            states[shape] = states.get(shape) or {p: _moments(p) for p in parts.model.parameters()}
            for parameter, state in states[shape].items():
                parts.optimizer.state[parameter] = state
            self.jobs[method] = Job(
                config=config,
                cache=cache,
                run=cache_path,
                parts=parts,
                world=World(),
                device=self.device,
                share=share,
                watcher=Quiet(),
            )

    def stream(self, method: str, source: str) -> Iterator[Any]:
        """Batches for a method's next steps."""
        if (method, source) not in self.streams:
            from trainer.training.loop import loader

            feed = loader(self.jobs[method], 0, everything=source == "memory")
            if source == "memory":
                batch = {name: value.clone() for name, value in next(iter(feed)).items()}
                feed.close()
                self.streams[method, source] = repeat(batch)
            else:
                self.streams[method, source] = iter(feed)
                self.feeds.append(feed)
        return self.streams[method, source]

    def run(self, method: str, source: str, steps: int) -> float:
        """Seconds per step over a block of steps, the device idle before and after."""
        self.stream(method, source)
        self.wait()
        start = time.perf_counter()
        for _ in range(steps):
            self.one(method, source)
        self.wait()
        seconds = (time.perf_counter() - start) / steps
        self.means.take()
        return seconds

    def one(self, method: str, source: str) -> None:
        """One step, which nobody waits for."""
        from trainer.training.loop import train_step

        job, stream, numbers = self.jobs[method], self.stream(method, source), self.steps[method, source]
        train_step(job, stream, next(numbers), self.means, self.bad, measures=False)

    @property
    def waited_s(self) -> float:
        """Seconds that steps have waited for batches so far."""
        return float(sum(feed.waited_s for feed in self.feeds))

    def warm_up(self, method: str, source: str, steps: int) -> float:
        """Runs steps until every kind that the method has (DyA's coin) was compiled; seconds that it took."""
        from trainer.training.loop import is_aligned

        start, job = time.perf_counter(), self.jobs[method]
        kinds = [is_aligned(job.config, job.parts.alignment, step) for step in range(64)]
        first_of_each = [kinds.index(kind) for kind in set(kinds)]
        self.run(method, source, max(steps, 1 + max(first_of_each)))
        return time.perf_counter() - start

    def wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def reset_peak(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Bytes allocated on the device at most since the last `reset_peak`; 0 on the CPU."""
        import torch

        return int(torch.cuda.max_memory_allocated(self.device)) if self.device.type == "cuda" else 0

    def close(self) -> None:
        for feed in self.feeds:
            feed.close()

    def breakdown(self, method: str, repeats: int) -> dict[str, float]:
        """Median milliseconds of each part alone, alignment on."""
        import torch

        from featcache.read.order import stream_indices
        from trainer.diffusion.streams import Layout
        from trainer.training.loop import optimizer_step
        from trainer.training.objective import draw, update_ema

        job = self.jobs[method]
        parts, cfg, n = job.parts, job.parts.model.cfg, job.config.batch_size
        reader = job.cache.reader(list(parts.reads))
        host = {name: torch.from_numpy(array) for name, array in reader.allocate(n).items()}
        if self.device.type == "cuda":
            host = {name: tensor.pin_memory() for name, tensor in host.items()}
        device = {name: tensor.to(self.device) for name, tensor in host.items()}
        draws = draw(
            seed=0, step=0, batch=n, latent_shape=(cfg.latent_channels, cfg.latent_size, cfg.latent_size),
            time_sampling="uniform", device=self.device,
            streams=dict(zip(parts.data[1:], Layout(cfg=cfg).shapes[1:])),
        )  # fmt: skip
        loss: list[Any] = []

        def load() -> None:
            indices = stream_indices(0, n, count=len(job.cache), seed=len(loss))
            reader.read(indices, {name: tensor.numpy() for name, tensor in host.items()})

        def copy() -> None:
            for name, tensor in host.items():
                device[name].copy_(tensor, non_blocking=True)

        def forward() -> None:
            terms, _ = parts.forward(device, draws)
            loss.append(torch.stack(list(terms.values())).sum())

        phases: dict[str, Callable[[], Any]] = {
            "load": load,
            "copy": copy,
            "forward": forward,
            "backward": lambda: loss.pop().backward(),
            "optimizer": lambda: optimizer_step(parts, job.config),
            "ema": lambda: update_ema(parts.ema, parts.model, 0.9999),
        }
        if self.device.type == "cpu":
            del phases["copy"]
        spent: dict[str, list[float]] = {name: [] for name in phases}
        for repetition in range(repeats + 1):  # the first one warms up
            for name, phase in phases.items():
                self.wait()
                start = time.perf_counter()
                phase()
                self.wait()
                if repetition:
                    spent[name].append(1e3 * (time.perf_counter() - start))
        reader.close()
        return {name: statistics.median(values) for name, values in spent.items()}


def _moments(parameter: Any) -> dict[str, Any]:
    """Adam's state of a parameter before its first step, as fused AdamW keeps it."""
    import torch

    zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), device=parameter.device), **zeros}


def peak_memory(options: dict[str, Any], cache: Path, method: str) -> int:
    """Peak bytes of a few steps of one method, in this process: on the device, or of the process on the CPU."""
    import torch

    bench = Bench(options, cache, (method,))
    bench.run(method, "disk", 5 if options["device"] == "cuda" else 2)
    bench.close()
    if options["device"] == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def training_flops(options: dict[str, Any], cache_path: Path, method: str) -> float:
    """Matrix products' floating-point operations per image of a step, see `trainer.training.flops`. With alignment on:
    DyA's coin and HASTE's stop lower it in proportion. Takes no memory at any size."""
    import torch

    import featcache
    from trainer.distributed import World
    from trainer.training.flops import training_flops, weightless
    from trainer.training.state import assemble, backbone_config

    config = run_config({**options, "precision": "fp32", "compile": False}, method)
    cache = featcache.open(cache_path)
    model = weightless(backbone_config(config, cache))
    return training_flops(assemble(config, cache, torch.device("cpu"), World(), backbone=(model, model)), cache)


def peak_memories(options: dict[str, Any], cache: Path, name: str, methods: tuple[str, ...]) -> dict[str, int]:
    """`peak_memory` of each method in a process of its own."""
    peaks = {}
    for method in methods:
        words = ["--one", method, "--cache", str(cache), "--name", name, "--model", options["model"]]
        words += ["--device", options["device"], "--batch-size", str(options["batch_size"])]
        words += ["--precision", options["precision"]]
        if options["compile"] is not None:
            words.append("--compile" if options["compile"] else "--no-compile")
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, env=environment)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            raise typer.Exit(1)
        peaks[method] = int(done.stdout.strip().splitlines()[-1])
    return peaks


# Called with what is known so far of a method.
Told = Callable[[str, dict[str, Any]], None]


def measure(
    options: dict[str, Any], cache: Path, methods: tuple[str, ...], *, told: Told = lambda method, entry: None
) -> dict[str, Any]:
    """All methods in turn. told: after each round, and at the end."""
    bench = Bench(options, cache, methods)
    pairs = [(m, "disk") for m in methods] + [(m, "memory") for m in methods if m in options["memory_methods"]]
    warm_up_s = {}
    for method, source in pairs:  # compiles and warms up
        warm_up_s[method, source] = bench.warm_up(method, source, options["warmup"])
        print(f"warmed up {method} ({source})", flush=True)
    spent: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    peaks = dict.fromkeys(methods, 0)
    results: dict[str, Any] = {}
    for number in range(options["rounds"]):
        turn = number % len(pairs)
        for pair in pairs[turn:] + pairs[:turn]:
            bench.reset_peak()
            spent[pair].append(bench.run(*pair, options["steps"]))
            peaks[pair[0]] = max(peaks[pair[0]], bench.peak())
        print(f"round {number + 1} of {options['rounds']}", flush=True)
        for method in methods:
            entry = _entry(bench, options, spent, method) | {"warm_up_s": warm_up_s[method, "disk"]}
            # With the heads and optimiser states of all methods beside it, which `peak_bytes` is without.
            results[method] = entry | ({"peak_bytes_together": peaks[method]} if peaks[method] else {})
            told(method, results[method])
    for method in methods if options["breakdown"] else ():
        results[method]["breakdown_ms"] = bench.breakdown(method, options["breakdown"])
        told(method, results[method])
    bench.close()
    return results


def _entry(bench: Bench, options: dict[str, Any], spent: dict[tuple[str, str], list[float]], method: str) -> Any:
    """Figures of a method after some rounds."""
    from trainer.models import forward_flops

    peak = options["peak_tflops"]
    step_s = statistics.median(spent[method, "disk"])
    rate = options["batch_size"] / step_s
    entry: dict[str, Any] = {
        "step_ms": 1e3 * step_s,
        "images_per_s": rate,
        "round_step_ms": [1e3 * s for s in spent[method, "disk"]],
        "mfu": 3 * forward_flops(bench.jobs[method].parts.model.cfg) * rate / (peak * 1e12) if peak else None,
    }
    if ("none", "disk") in spent:
        ratios = [a / b for a, b in zip(spent[method, "disk"], spent["none", "disk"])]
        entry["time_against_vanilla"] = statistics.median(ratios)
    if (method, "memory") in spent:
        ratios = [a / b for a, b in zip(spent[method, "disk"], spent[method, "memory"])]
        entry["disk_against_memory"] = statistics.median(ratios)
        entry["memory_step_ms"] = 1e3 * statistics.median(spent[method, "memory"])
    return entry


def machine(device: str) -> dict[str, Any]:
    from featcache.machine import describe_machine

    found = describe_machine("torch", "numpy", "timm")
    packages = found.pop("packages")
    return {"device": found["gpu" if device == "cuda" else "cpu"], **found, **packages}


def table(results: dict[str, Any]) -> str:
    """The results in columns: time, FLOPs and memory are against vanilla's, disk is against features in memory."""
    if "step_ms" not in next(iter(results.values())):
        return "\n".join(
            f"{method:>6}  {r['gflop_per_image']:8.1f} GFLOP/image  {100 * (r.get('flops_against_vanilla', 1) - 1):+6.2f} %"
            for method, r in results.items()
        )
    phases = list(next(iter(results.values())).get("breakdown_ms", ()))
    heads = ["method", "ms/step", "images/s", "MFU", "time", "FLOPs", "memory", "disk", "peak GiB"]
    rows = [[*heads, *(f"{phase} ms" for phase in phases)]]

    def cell(value: Any, form: str) -> str:
        return "-" if value is None else format(value, form)

    def more(ratio: float | None) -> str:
        return "-" if ratio is None else f"{100 * (ratio - 1):+.1f} %"

    for method, r in results.items():
        rows.append(
            [
                method,
                cell(r["step_ms"], ".1f"),
                cell(r["images_per_s"], ".1f"),
                cell(r["mfu"], ".1%"),
                *(more(r.get(f"{what}_against_vanilla")) for what in ("time", "flops", "memory")),
                more(r.get("disk_against_memory")),
                cell(r["peak_bytes"] / 2**30, ".2f"),
                *(cell(r["breakdown_ms"][phase], ".1f") for phase in phases),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(row, widths)) for row in rows)


def main(
    name: Annotated[str, typer.Option(help="Names the result file.")],
    model: Annotated[str, typer.Option(help="Backbone.")] = "SiT-S/2",
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    precision: Annotated[str, typer.Option(help="auto (bf16 on a GPU, fp32 on the CPU), fp32, bf16 or fp16.")] = "auto",
    compile_: Annotated[bool | None, typer.Option("--compile/--no-compile", help="[default: on a GPU]")] = None,
    methods: Annotated[str, typer.Option(help="Comma-separated; `none` is vanilla.")] = ",".join(METHODS),
    memory_methods: Annotated[str, typer.Option(help="Also fed from memory, to see what reading costs.")] = "none,ahpa",
    rounds: Annotated[int, typer.Option(help="Turns of every method.")] = 5,
    steps: Annotated[int, typer.Option(help="Steps a turn; a multiple of 5 for SARA.")] = 5,
    warmup: Annotated[int, typer.Option(help="Steps before the first round.")] = 5,
    breakdown: Annotated[int, typer.Option(help="Repetitions of each part alone.")] = 5,
    samples: Annotated[int, typer.Option(help="Records in the synthetic cache (1.6 MB each).")] = 256,
    peak_tflops: Annotated[float | None, typer.Option(help="For MFU. [default: known for common GPUs]")] = None,
    count_only: Annotated[bool, typer.Option("--count", help="Count FLOPs and measure nothing.")] = False,
    one: Annotated[str, typer.Option(hidden=True)] = "",
    cache: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure, print a table, write JSON."""
    options = {
        "model": model,
        "batch_size": batch_size,
        "device": device,
        "precision": precision,
        "compile": compile_,
        "memory_methods": memory_methods.split(","),
        "rounds": rounds,
        "steps": steps,
        "warmup": warmup,
        "breakdown": breakdown,
        "samples": samples,
        "peak_tflops": peak_tflops,
    }
    if one:
        print(peak_memory(options, Path(cache), one))
        return
    described = machine(device)
    if peak_tflops is None and device == "cuda":
        from trainer.training.flops import peak_tflops as known_peak

        options["peak_tflops"] = known_peak(described["device"])
    chosen = tuple(methods.split(","))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        write_cache(path, 64 if count_only else samples)
        if count_only:
            results = {method: {"gflop_per_image": training_flops(options, path, method) / 1e9} for method in chosen}
        else:
            peaks = peak_memories(options, path, name, chosen)
            results = measure(options, path, chosen)
            for method, peak in peaks.items():
                results[method]["peak_bytes"] = peak
                results[method]["gflop_per_image"] = training_flops(options, path, method) / 1e9
    for entry in results.values() if "none" in results else ():
        for key, ratio in (("peak_bytes", "memory_against_vanilla"), ("gflop_per_image", "flops_against_vanilla")):
            if key in entry:
                entry[ratio] = entry[key] / results["none"][key]
    print(table(results))
    report = {
        "command": " ".join(["python", "benchmarks/step.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": described,
        "options": options,
        "results": results,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"step-{name}.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
