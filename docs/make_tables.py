"""Tables of the pages from the code and from `benchmarks/results`: `python docs/make_tables.py` rewrites them in place."""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from featcache.encoders.table import CLIP_MEAN, ENCODERS, HALF, IMAGENET_MEAN, TEXTS, VAES, VisionEntry
from featcache.store.manifest import FeatureSpec
from pipelines.experiments import summary
from pipelines.experiments.checks import BLUR, TIMES
from pipelines.experiments.methods import METHODS, PARTS
from trainer.align import config_class, data_streams, method_names, resolve
from trainer.align.base import FeatureInfo
from trainer.training.flops import peak_tflops

WEIGHTS = {"ema": "averaged weights", "model": "trained weights"}
_CONSTANTS = {IMAGENET_MEAN: "ImageNet", CLIP_MEAN: "CLIP", HALF: "0.5"}


def _preparation(entry: VisionEntry) -> str:
    constants = _CONSTANTS[entry.mean]
    if entry.patch == 16:
        return f"normalise ({constants})"
    steps = f"resize, normalise ({constants})" if entry.resize_first else f"normalise ({constants}), resize"
    return steps + ("" if entry.resize_mode == "bicubic" else f" {entry.resize_mode}")


def _rows(title: list[str], rows: list[list[str]]) -> str:
    lines = [title, ["---"] * len(title), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def vision_table() -> str:
    """One line per encoder, as Markdown."""
    title = ["name", "layers", "width", "patch", "trained at", "input at 256 / 512 px", "preparation", "last norm"]
    title += ["class token", "weights", "licence", "paper"]
    rows = []
    for name, entry in ENCODERS.items():
        inputs = f"{entry.input_px(256)} / {entry.input_px(512)}"
        row = [f"`{name}`", f"0..{entry.final_layer}", entry.width, entry.patch, entry.native_px, inputs]
        row += [_preparation(entry), *("yes" if fact else "no" for fact in (entry.final_norm, entry.class_token))]
        row += [entry.hub_id or entry.weights_page]
        rows.append([str(cell) for cell in [*row, entry.licence, entry.paper]])
    return _rows(title, rows)


def vae_table() -> str:
    """One line per VAE, as Markdown."""
    title = ["name", "class", "downsampling", "channels", "scale", "posterior", "weights", "licence", "what"]
    rows = []
    for name, entry in VAES.items():
        scale = entry.config.get("scaling_factor", 0.18215 if name == "consistency" else "in its file")
        row = [f"`{name}`", entry.model_class, entry.downsampling, entry.latent_channels, scale]
        row += ["yes" if entry.posterior else "no", entry.hub_id or "in the package", entry.licence, entry.note]
        rows.append([str(cell) for cell in row])
    return _rows(title, rows)


def text_table() -> str:
    """One line per text encoder, as Markdown."""
    title = ["name", "tokens", "width", "pooled", "layers", "weights and vocabulary", "licence", "paper", "what"]
    rows = []
    for name, entry in TEXTS.items():
        row = [f"`{name}`", entry.tokens, entry.width, entry.projected or "none", entry.depth, entry.hub_id or "none"]
        rows.append([str(cell) for cell in [*row, entry.licence, entry.paper, entry.note]])
    return _rows(title, rows)


# What the methods read by their defaults at 256 px, the encoder being DINOv2-B: name, decoded shape, codec.
_READ = {
    "vae/moments": ((8, 32, 32), "fp16"),
    "vae/G3": ((4, 256, 512), "int8"),
    "vae/G4": ((4, 256, 512), "int8"),
    "dinov2-b@8": ((256, 768), "int8"),
    "dinov2-b@11": ((256, 768), "int8"),
    "dinov2-b@11.cls": ((768,), "fp16"),
    "dinov2-b@11.pca8": ((256, 8), "fp16"),
}
_IMAGENET, _RATE = 1_281_167, 300


def reading_table() -> str:
    """What each method reads: bytes per image, and at so many images per second."""
    rows = []
    for methods, names in _readers().items():
        specs = [FeatureSpec(name=name, shape=shape, codec=codec) for name, (shape, codec) in _READ.items()]
        read = sum(spec.bytes_per_sample for spec in specs if spec.name in ("vae/moments", *names)) + 8  # the label
        columns = (read / 1e3, read * _RATE / 1e6, 8 * read * _RATE / 1e9, read * _IMAGENET / 1e9)
        features = ", ".join(f"`{name}`" for name in ("vae/moments", *names))
        rows.append(
            [methods, features, *(f"{value:,.{2 if value < 1 else 1 if value < 10 else 0}f}" for value in columns)]
        )
    title = ["method", "reads", "KB an image", "MB/s a GPU", "GB/s for eight", "GB for ImageNet"]
    return _rows(title, rows)


def _readers() -> dict[str, tuple[str, ...]]:
    """Methods, joined where they read alike -> names of what they read beside the latents."""
    available = {name: FeatureInfo(shape=shape) for name, (shape, _) in _READ.items()}
    found: dict[tuple[str, ...], list[str]] = {}
    for method in method_names():
        config = config_class(method)()
        names = {*resolve(method, config, available), *data_streams(method, config, available)}
        found.setdefault(tuple(name for name in _READ if name in names), []).append(f"`{method}`")
    return {", ".join(methods): names for names, methods in found.items()}


_BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
NOT_YET = "Nothing has run on a GPU yet: there is no `gpu.json` among the results."


def _result(name: str) -> Any:
    """A committed result; None where there is none."""
    path = _BENCHMARKS / "results" / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def _gpu_tables() -> ModuleType:
    """`benchmarks/gpu_tables.py`, whose folder has modules named as others are."""
    spec = importlib.util.spec_from_file_location("gpu_tables", _BENCHMARKS / "gpu_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published_rates() -> str:
    """Images a second and GPU as others give them, and how they follow from what is written there."""
    rows = []
    for entry in _result("published")["rates"]:
        if "steps_per_s" in entry:
            rate = entry["steps_per_s"] * entry["batch_size"] / entry["gpus"]
            how = f"{entry['steps_per_s']} steps/s x {entry['batch_size']} / {entry['gpus']}"
        else:
            rate = entry["epochs"] * entry["images_per_epoch"] / (entry["hours"] * 3600) / entry["gpus"]
            how = f"{entry['epochs']} epochs of {entry['images_per_epoch']:,} in {entry['hours']} h / {entry['gpus']}"
        rows.append([entry["what"], entry["gpu"], f"{rate:.0f}", how, entry["source"]])
    return _rows(["what", "GPU", "images/s a GPU", "that is", "source"], rows)


def overhead_table() -> str:
    """A method's goal, what its matrix products add, what the AHPA paper gives, and what was measured on a GPU."""
    tables, record = _gpu_tables(), _result("gpu")
    counted, theirs = _result("step-flops-xl2")["results"], _result("published")["against_vanilla"]["iterations_per_s"]
    rows = []
    for method, goal in tables.GOALS.items():
        published = f"+{100 * (theirs['none'] / theirs[method] - 1):.1f} %" if method in theirs else "-"
        measured = None if record is None else tables.overhead(record, method)
        row = [
            f"`{method}`",
            f"+{goal:g} %",
            f"+{100 * (counted[method]['flops_against_vanilla'] - 1):.1f} %",
            published,
        ]
        rows.append([*row, "not yet" if measured is None else f"{100 * (measured - 1):+.1f} %"])
    return _rows(["method", "goal", "matrix products alone", "AHPA, Table I.21", "measured on a GPU"], rows)


def goal_table() -> str:
    """Goals in images a second, and what share of an H100's data sheet the step's backbone takes at them."""
    tables, peak = _gpu_tables(), peak_tflops("NVIDIA H100 80GB HBM3")
    assert peak is not None, "the table of data sheets has it"
    gflop = _result("step-flops-xl2")["results"]["none"]["gflop_per_image"]
    rows = [
        [name, f"{rate:g}", f"{rate * gflop / 1e3:.0f}", f"{100 * rate * gflop / 1e3 / peak:.0f} %"]
        for name, rate in tables.RATES.items()
    ]
    return _rows(["", "images/s", "TFLOP/s", "MFU"], rows)


def cpu_table() -> str:
    """Steps on a CPU, from `step-cpu.json`."""
    results = _result("step-cpu")["results"]
    rows = []
    for method, entry in results.items():
        over, parts = entry["time_against_vanilla"] - 1, entry["breakdown_ms"]
        row = [f"`{method}`", f"{entry['step_ms']:.0f}", "-" if method == "none" else f"{100 * over:+.0f} %"]
        flops = entry["gflop_per_image"] / results["none"]["gflop_per_image"] - 1
        row.append("-" if method == "none" else f"{100 * flops:+.0f} %")
        rows.append([*row, *(f"{parts[name]:.1f}" for name in ("load", "forward", "backward", "optimizer", "ema"))])
    return _rows(
        [
            "method",
            "ms a step",
            "over `none`",
            "matrix products",
            "load",
            "forward",
            "backward",
            "optimiser",
            "average",
        ],
        rows,
    )


def machine_of(name: str) -> str:
    """Where and how a committed result was taken."""
    found = _result(name)
    machine, options = found["machine"], found["options"]
    return (
        f"`{found['command']}`: {options['model']} at batch {options['batch_size']}, {machine['cores']} cores of "
        f"{machine['device']}, PyTorch {machine['torch']}, {found['date']}."
    )


def gpu_table() -> str:
    """All that `benchmarks/gpu.py` has measured, once there is something."""
    record = _result("gpu")
    return NOT_YET if record is None else str(_gpu_tables().markdown(record))


def methods_table(part: str) -> str:
    """All methods of a part of `pipelines.experiments.methods` side by side, and where and how that was measured."""
    record = _result(f"methods/{part}/results")
    machine, options = record["machine"], record["settings"]
    titles = {name: method.title for name, method in METHODS.items()}
    timed = record.get("timed") or {}
    found = summary.table(summary.summarise(record["evaluations"], timed.get("step_s")), titles)
    photographs = "--photographs DIR " if PARTS[part].photographs else ""
    return (
        f"{found}\n{options['model']}, {options['steps']:,} steps at batch {options['batch_size']} and rate {options['lr']:g}, "
        f"{options['precision']}; {options['samples']:,} samples; {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['jobs']} runs at a time, PyTorch {record['torch']}, from {record['date']}: "
        f"`python -m pipelines.experiments.methods {photographs}--jobs {machine['jobs']} --part {part}`.{_times_of(part, timed)}"
    )


def _times_of(part: str, timed: dict[str, Any]) -> str:
    """How a part's seconds per step were measured; nothing where they are the runs' own."""
    if not timed:
        return ""
    ratios = [
        f"{METHODS[method].title} {middle:.2f} ({low:.2f} to {high:.2f})"
        for method, (low, middle, high) in timed["ratios"].items()
        if method != summary.VANILLA
    ]
    return (
        f" Seconds per step, of vanilla's: {', '.join(ratios)}; medians of {timed['rounds']} rounds with 95 % intervals: "
        f"`python -m pipelines.experiments.step_times --part {part}`, {timed['date']}."
    )


def glance_table() -> str:
    """FID of the judge minus vanilla's, by method and part, at equal steps and at equal time; bold where the interval leaves out 0."""
    parts = {part: _result(f"methods/{part}/results") for part in PARTS}
    found = {
        part: summary.summarise(record["evaluations"], (record.get("timed") or {}).get("step_s"))
        for part, record in parts.items()
        if record is not None
    }

    def cell(values: dict[str, Any] | None) -> str:
        if values is None:
            return ""
        more = f"{summary.JUDGE} minus vanilla"
        text = summary.shown(values[more], values[f"{more} interval"], sign=True)
        return f"**{text}**" if abs(values[more]) > values[f"{more} interval"] else text

    vanilla = [f"{f['equal_steps'][summary.VANILLA][summary.JUDGE]:.1f}" for f in found.values() for _ in range(2)]
    rows = [["vanilla", *vanilla]]
    for method in METHODS:
        if method != summary.VANILLA and any(method in f["equal_steps"] for f in found.values()):
            cells = [cell(f[at].get(method)) for f in found.values() for at in ("equal_steps", "equal_time")]
            rows.append([METHODS[method].title, *cells])
    head = [f"{PARTS[part].title}: equal {at}" for part in found for at in ("steps", "time")]
    return _rows(["FID by the judge, minus vanilla's", *head], rows)


PAIRS = (("ahpa", "repa"), ("haste", "repa"))


def pairs_table() -> str:
    """Methods against each other, seed by seed, in all parts that have both: mean and 95 % interval, and in how many seeds less."""
    rows = []
    for part, of in PARTS.items():
        record = _result(f"methods/{part}/results")
        for method, other in PAIRS:
            if found := summary.apart(record["evaluations"] if record else [], method, other):
                cells = [f"{METHODS[method].title} minus {METHODS[other].title}, {of.title}"]
                for metric in summary.SHOWN:
                    value = summary.shown(*summary.mean_and_interval(found[metric]), sign=True)
                    cells.append(f"{value} (less in {sum(v < 0 for v in found[metric])} of {len(found[metric])})")
                rows.append(cells)
    return _rows(["after the last step", *summary.SHOWN.values()], rows)


def angle_table(part: str) -> str:
    """Cosine of both losses' gradients by interval of t, mean and 95 % interval over the seeds of a part."""
    record = _result(f"methods/{part}/checks")
    rows: list[list[str]] = []
    for method in METHODS:
        runs = [
            run["angle"] for name, run in record["runs"].items() if name.rpartition("-")[0] == method and "angle" in run
        ]
        for weights in runs[0] if runs and runs[0] else ():
            means = [statistics.fmean(v for v in run[weights] if v is not None) for run in runs]
            by_bin = [means, *zip(*(run[weights] for run in runs), strict=True)]
            found = [summary.mean_and_interval(v for v in values if v is not None) for values in by_bin]
            rows.append([f"{METHODS[method].title}, {WEIGHTS[weights]}", *(summary.shown(*values) for values in found)])
    title = [f"t = {i / 10:.1f} to {(i + 1) / 10:.1f}" for i in range(10)]
    return f"{_rows(['cosine', 'all t', *title], rows)}\n\n{_checks_of(part, record)}"


def router_table() -> str:
    """What AHPA's router gives each layer by t, mean and 95 % interval over the seeds; layers with less than 1 % are left out."""
    rows: list[list[str]] = []
    commands: list[str] = []
    for part, of in PARTS.items():
        record = _result(f"methods/{part}/checks")
        named = (record or {"runs": {}})["runs"].items()
        runs = [run["router"] for name, run in named if name.rpartition("-")[0] == "ahpa"]
        if not runs:
            continue
        of_layer = {
            layer: list(zip(*(run[layer] for run in runs), strict=True)) for layer in runs[0]
        }  # by t, over seeds
        kind = f"{'photographs' if of.photographs else 'shapes'}, {len(runs)} seeds"
        for layer, by_t in of_layer.items():
            found = [summary.mean_and_interval(values) for values in by_t]
            if max(mean for mean, _ in found) >= 0.01:
                rows.append([f"{kind}: `{layer}`", *(summary.shown(*values) for values in found)])
        commands.append(_checks_of(part, record, " --no-angles"))
    return f"{_rows(['weight at t =', *map(str, TIMES)], rows)}\n\n{' '.join(commands)}"


def judged_table(part: str) -> str:
    """What more sampling steps change: FID by judge and ViT of the runs that were judged again."""
    record, first = _result(f"methods/{part}/checks"), _result(f"methods/{part}/results")
    last = {f"{e['method']}-{e['seed']}": e["metrics"] for e in first["evaluations"]}  # in order of the steps
    rows = []
    for name, run in record["runs"].items():
        for steps, metrics in run.get("judged", {}).items():
            method, _, seed = name.rpartition("-")
            pairs = [f"{last[name][m]:.1f} | {metrics[m]:.1f}" for m in (summary.JUDGE, "embedded-vit-FID")]
            rows.append([f"{METHODS[method].title}, seed {seed}", *pairs])
            asked = steps
    few = first["settings"]["sampling_steps"]
    head = [f"FID by the {judge}, {n} sampling steps" for judge in ("judge", "ViT") for n in (few, asked)]
    return f"{_rows(['', *head], rows)}\n\n{_checks_of(part, record, f' --sampling-steps {asked}')}"


HELD_OUT = {
    "images": "held out",
    "decoded": "through the VAE",
    "blurred": f"blurred by {BLUR} pixels",
}


def held_out_table() -> str:
    """What the judges say of real images, by part: of those held out, and of these through the VAE."""
    rows, dates = [], set()
    for part, of in PARTS.items():
        record = _result(f"methods/{part}/checks")
        for name, metrics in (record or {}).get("held_out", {}).items():
            values = [f"{metrics[metric]:.3g}".replace("-", "−") for metric in summary.SHOWN if metric != "denoise"]
            kind = "photographs" if of.photographs else "shapes"
            rows.append([f"{kind}, {of.resolution} px: {HELD_OUT[name]}", *values])
            dates.add(record["date"])
    head = [title for metric, title in summary.SHOWN.items() if metric != "denoise"]
    command = "`python -m pipelines.experiments.checks --part PART --photographs DIR`"
    return f"{_rows(['of 500', *head], rows)}\n\n{command}, {', '.join(sorted(dates))}."


def _checks_of(part: str, record: dict[str, Any], options: str = "") -> str:
    photographs = " --photographs DIR" if PARTS[part].photographs else ""
    return f"`python -m pipelines.experiments.checks --part {part}{photographs}{options}`, {record['date']}."


TABLES: dict[str, Callable[[], str]] = {
    "vision": vision_table, "vae": vae_table, "text": text_table, "reading": reading_table, "gpu": gpu_table,
    "published": published_rates, "overheads": overhead_table, "goals": goal_table, "step-cpu": cpu_table,
    "machine-cpu": lambda: machine_of("step-cpu"),
    **{f"methods-{part}": partial(methods_table, part) for part in PARTS},
    "angle-photographs-64": partial(angle_table, "photographs-64"),
    "angle-shapes-64": partial(angle_table, "shapes-64"),
    "judged-photographs-64": partial(judged_table, "photographs-64"),
    "held-out": held_out_table, "router": router_table, "pairs": pairs_table, "glance": glance_table,
}  # fmt: skip


def with_tables(page: str) -> str:
    """The page with its tables put between their markers."""
    for mark, table in TABLES.items():
        start, end = f"<!-- table: {mark} -->\n", f"<!-- end: {mark} -->"
        if start in page:
            before, _, rest = page.partition(start)
            _, _, after = rest.partition(end)
            page = f"{before}{start}{table()}\n{end}{after}"
    return page


def main() -> None:
    """Rewrites the page given as argument, or those beside this file."""
    for path in [Path(sys.argv[1])] if len(sys.argv) > 1 else sorted(Path(__file__).parent.glob("*.md")):
        if (page := with_tables(path.read_text("utf-8"))) != path.read_text("utf-8"):
            path.write_text(page, "utf-8")


if __name__ == "__main__":
    main()
