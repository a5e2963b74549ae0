"""What `benchmarks/gpu.py` has found, as a table on the terminal and as Markdown for `docs/performance.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from featcache.console import safe

# Overhead over vanilla in percent that each method is to stay below.
GOALS = {"ahpa": 5.0, "repa": 2.5, "sra2": 2.5, "dya": 3.0, "sara": 6.0, "sra": 25.0}
# Images a second of SiT-XL/2 at 256 px on one H100.
RATES = {"goal": 450.0, "stretch": 600.0}
STEP_STAGES = (
    "step-ahpa",
    "step-repa",
    "step-dya",
    "step-sra",
    "step-256",
    "step-64",
    "step-32",
    "step-reg",
    "step-redi",
)


def figures(record: Mapping[str, Any], stage: str) -> Mapping[str, Any]:
    """A stage's figures; empty where there are none."""
    found = record["stages"].get(stage, {}).get("figures", {})
    return found if isinstance(found, Mapping) else {}


def summary(record: Mapping[str, Any], stages: Sequence[str], left: Sequence[str]) -> Table:
    """A line a stage. left: those for which there was no time."""
    table = Table(
        "stage", "status", "seconds", "figures", title="small: says nothing of speed" if record.get("small") else None
    )
    for stage in stages:
        entry = record["stages"].get(stage)
        if entry is None:
            table.add_row(stage, "no time" if stage in left else "-", "", "")
            continue
        said = headline(stage, figures(record, stage)) or _last(entry.get("error", ""))
        table.add_row(stage, str(entry["status"]), f"{entry.get('seconds', 0):.0f}", safe(said))
    return table


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:100] if lines else ""


def headline(stage: str, found: Mapping[str, Any]) -> str:
    """The figures that matter most, in one line; empty where there are none."""
    if stage == "machine":
        return f"{found.get('machine', {}).get('gpu') or 'no GPU'}, bf16 {_number(found.get('matmul_tflops_bfloat16'))} TFLOP/s"
    if stage == "tests":
        return str(found.get("summary", ""))
    if stage in STEP_STAGES:
        return ", ".join(
            f"{name} {_number(e['images_per_s'])} images/s{_percent(e.get('time_against_vanilla'))}"
            for name, e in _methods(found)
        )
    if stage == "peer" and "paired" in found:
        pair = found["paired"]
        return f"ours {_number(pair['ours']['images_per_s'])}, plain {_number(pair['plain']['images_per_s'])} images/s"
    if stage.startswith("encode"):
        return ", ".join(f"{name} {_number(e['images_per_s'])} images/s" for name, e in found.items())
    if stage == "build":
        return ", ".join(f"{name}: {_number(e['images_per_s'])} images/s" for name, e in found.items())
    if stage == "feeding" and found.get("training_cold"):
        return f"waiting {100 * max(w['waiting_share'] for w in found['training_cold']):.2f} % of a step, cold"
    rated = {k: v["images_per_s"] for k, v in found.items() if isinstance(v, Mapping) and "images_per_s" in v}
    return ", ".join(f"{name} {_number(rate)} images/s" for name, rate in rated.items())


def overhead(record: Mapping[str, Any], method: str) -> float | None:
    """A method's time against vanilla's in the first stage that measured both; None of what was tried small."""
    if record.get("small"):
        return None
    entries = (dict(_methods(figures(record, stage))).get(method, {}) for stage in STEP_STAGES)
    return next((float(e["time_against_vanilla"]) for e in entries if "time_against_vanilla" in e), None)


def _methods(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, entry) for name, entry in found.items() if isinstance(entry, Mapping) and "step_ms" in entry]


def _number(value: float | None, digits: int = 3) -> str:
    """Rounded to so many digits."""
    return "-" if value is None else f"{float(f'{value:.{digits}g}'):,.10g}"


def _percent(ratio: float | None) -> str:
    return "" if ratio is None or ratio == 1 else f" ({100 * (ratio - 1):+.1f} %)"


def markdown(record: Mapping[str, Any]) -> str:
    """All that was measured, as the tables of `docs/performance.md`."""
    parts = [
        _about(record),
        _steps(record),
        _peer(record),
        _profiles(record),
        _feeding(record),
        _encoding(record),
        _sampling(record),
    ]
    failed = [f"`{name}`: {entry['status']}" for name, entry in record["stages"].items() if entry["status"] != "done"]
    parts.append(f"Not finished: {', '.join(failed)}." if failed else "")
    return "\n\n".join(part for part in parts if part)


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table; all but the first `left` columns to the right. Empty without rows."""
    if not rows:
        return ""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def _about(record: Mapping[str, Any]) -> str:
    found = figures(record, "machine")
    if not found:
        return ""
    described = found.get("machine", {})
    packages = described.get("packages", {})
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "triton", "timm") if packages.get(name))
    rates = {
        "matmul_tflops_bfloat16": "bf16 products {} TFLOP/s",
        "device_copy_gb_per_s": "copies on the device {} GB/s (read and written)",
        "host_to_device_gb_per_s": "to the device {} GB/s",
    }
    measured = [words.format(_number(found[key])) for key, words in rates.items() if key in found]
    where = f"{described.get('gpu') or 'no GPU'}, {described.get('cores')} cores of {described.get('cpu')}, {versions}"
    small = " Tried small on a CPU: these figures say nothing of speed." if record.get("small") else ""
    return f"On {where}, measured: {'; '.join(measured)}.{small}"


def _steps(record: Mapping[str, Any]) -> str:
    rows = []
    for stage in STEP_STAGES:
        found = figures(record, stage)
        batch = found.get("options", {}).get("batch_size")
        for name, entry in _methods(found):
            mfu = entry.get("mfu")
            ratio, goal = entry.get("time_against_vanilla"), GOALS.get(name)
            peak = entry.get("peak_bytes_together")
            rows.append(
                [
                    f"`{name}`",
                    str(batch),
                    _number(entry["step_ms"]),
                    _number(entry["images_per_s"]),
                    "-" if mfu is None else f"{100 * mfu:.1f} %",
                    "-" if ratio is None or name == "none" else f"{100 * (ratio - 1):+.1f} %",
                    "-" if goal is None else f"+{goal:g} %",
                    "-" if peak is None else f"{peak / 2**30:.1f}",
                ]
            )
    return _rows(["method", "batch", "ms/step", "images/s", "MFU", "over `none`", "goal", "peak GiB"], rows)


def _peer(record: Mapping[str, Any]) -> str:
    found = figures(record, "peer")
    named = [
        ("ours, vanilla", found.get("paired", {}).get("ours")),
        ("plain loop", found.get("paired", {}).get("plain")),
    ]
    named += [("plain loop alone", found.get("plain")), ("plain REPA, DINOv2 online", found.get("repa_online"))]
    rows = [
        [
            name,
            str(entry["batch_size"]),
            _number(entry["step_ms"]),
            _number(entry["images_per_s"]),
            "-" if entry["mfu"] is None else f"{100 * entry['mfu']:.1f} %",
        ]
        for name, entry in named
        if entry
    ]
    table = _rows(["loop", "batch", "ms/step", "images/s", "MFU"], rows)
    times = found.get("paired", {}).get("ours_times_plain")
    return table + (f"\n\nWithin the rounds ours did {times:.2f} times the plain loop's images." if times else "")


def _profiles(record: Mapping[str, Any]) -> str:
    found = {name: entry for name, entry in figures(record, "profile").items() if "ms_per_step" in entry}
    if not found:
        return ""
    kinds = list(next(iter(found.values()))["ms_per_step"])
    rows = [[kind, *(f"{entry['ms_per_step'][kind]:.1f}" for entry in found.values())] for kind in kinds]
    idle = ["-" if e["idle_share"] is None else f"{100 * e['idle_share']:.1f} %" for e in found.values()]
    rows += [["nothing runs", *idle], ["kernels a step", *(f"{e['kernels_per_step']:.0f}" for e in found.values())]]
    return _rows(["ms a step", *(f"`{name}`" for name in found)], rows)


def _feeding(record: Mapping[str, Any]) -> str:
    found = figures(record, "feeding")
    rows = [
        [f"loader alone, {kind}", _number(max(found[f"loader_{kind}_images_per_s"])), "-"]
        for kind in ("cold", "warm")
        if found.get(f"loader_{kind}_images_per_s")
    ]
    if waits := found.get("training_cold"):
        share = max(wait["waiting_share"] for wait in waits)
        rows.append(["AHPA, cold", _number(min(w["images_per_s"] for w in waits)), f"{100 * share:.2f} %"])
    return _rows(["fed from disk", "images/s", "waiting"], rows)


def _encoding(record: Mapping[str, Any]) -> str:
    rows = []
    for stage, how in (("encode", "no"), ("encode-compiled", "yes")):
        for name, entry in figures(record, stage).items():
            errors = entry["relative_error"]
            worst = max(errors, key=errors.__getitem__)
            cells = [name, how, _number(entry["images_per_s"]), f"{entry['imagenet_minutes']:.0f}"]
            rows.append([*cells, f"{errors[worst]:.1e} (`{worst}`)"])
    table = _rows(["precision", "compiled", "images/s", "minutes for ImageNet", "largest relative error"], rows, left=2)
    built = [
        [name, _number(e["images_per_s"]), f"{e['imagenet_minutes']:.0f}", _number(1e3 * e["cpu_s_per_image"])]
        for name, e in figures(record, "build").items()
    ]
    whole = _rows(["whole build", "images/s", "minutes for ImageNet", "CPU ms an image"], built)
    return "\n\n".join(part for part in (table, whole) if part)


def _sampling(record: Mapping[str, Any]) -> str:
    rows = [
        [f"`{name}`", str(entry["images"]), _number(entry["images_per_s"]), f"{entry['minutes_for_50000']:.1f}"]
        for name, entry in figures(record, "sampling").items()
        if "minutes_for_50000" in entry
    ]
    table = _rows(["sampling, SiT-XL/2", "images drawn", "images/s", "minutes for 50,000 (projected)"], rows)
    judged = [
        [f"`{name}`", _number(entry.get("images_per_s")), _number(entry["seconds"])]
        for name, entry in figures(record, "evaluation").items()
        if "seconds" in entry
    ]
    return "\n\n".join(part for part in (table, _rows(["evaluation", "images/s", "seconds"], judged)) if part)
