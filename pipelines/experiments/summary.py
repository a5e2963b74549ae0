"""What an experiment on methods found: means over seeds with intervals, differences by seed, a table and a figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

VANILLA = "none"
JUDGE = "embedded-FID"
SHOWN = {  # by what the tables call them
    JUDGE: "FID by the judge",
    "embedded-KID": "KID by the judge",
    "embedded-Precision": "precision",
    "embedded-Recall": "recall",
    "embedded-vit-FID": "FID by the ViT",
    "denoise": "denoising loss",
}
_CONFIDENCE = 0.95


def mean_and_interval(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % interval by Student's t, `t(n - 1) s / sqrt(n)`; no interval of one value."""
    from scipy.stats import t

    listed = list(values)
    if len(listed) < 2:
        return statistics.fmean(listed), None
    width = t.ppf((1 + _CONFIDENCE) / 2, len(listed) - 1) * statistics.stdev(listed) / math.sqrt(len(listed))
    return statistics.fmean(listed), float(width)


def summarise(
    evaluations: Sequence[Mapping[str, Any]], step_times: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Curves and end points by method, over the seeds that have all of a method's points.

    `step_s`: a method's seconds per step, from each stretch between evaluations the fastest of its seeds (a pause of the
    machine or other work only adds to a time), or `step_times` where given. `curves`: per method and step the number of seeds,
    the time `step * step_s`, and mean and interval of each metric. `equal_steps`, `earlier`, `equal_time`: each metric at the
    last step, at each evaluation before, by its step, and at the time at which the fastest method ends (between two evaluations
    linearly in the logarithm of the steps, for curves flatten); with `minus vanilla`, the difference to the vanilla run of the
    same seed.
    """
    runs = _finished(evaluations)
    last = max((e["step"] for e in evaluations), default=0)
    step_s = {method: _seconds_per_step(list(by_seed.values())) for method, by_seed in runs.items()}
    step_s = {method: (step_times or step_s)[method] for method in step_s}
    budget = last * min(step_s.values(), default=0.0)
    ends = {method: budget / step_s[method] for method in runs}
    return {
        "last_step": last,
        "budget_s": budget,
        "step_s": step_s,
        "curves": {method: _curve(by_seed, step_s[method]) for method, by_seed in runs.items()},
        "equal_steps": _at_equal_steps(runs, last),
        "earlier": {
            str(step): _at_equal_steps(runs, step) for step in sorted({e["step"] for e in evaluations} - {last})
        },
        "equal_time": {method: _at(runs, method, ends[method], ends) for method in runs},
    }


_Runs = Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]


def _finished(evaluations: Sequence[Mapping[str, Any]]) -> _Runs:
    """Method -> seed -> its evaluations in order, of runs that came to the end."""
    runs: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for entry in sorted(evaluations, key=lambda e: int(e["step"])):
        runs.setdefault(entry["method"], {}).setdefault(entry["seed"], []).append(entry)
    last = max((e["step"] for e in evaluations), default=0)
    ended = {
        m: {s: entries for s, entries in seeds.items() if entries[-1]["step"] == last} for m, seeds in runs.items()
    }
    return {method: by_seed for method, by_seed in ended.items() if by_seed}


def _curve(by_seed: Mapping[int, Sequence[Mapping[str, Any]]], step_s: float) -> list[dict[str, Any]]:
    curve = []
    for rows in zip(*by_seed.values(), strict=True):
        step = rows[0]["step"]
        assert all(row["step"] == step for row in rows)
        point: dict[str, Any] = {"step": step, "seeds": len(rows), "time_s": step * step_s}
        for metric in rows[0]["metrics"]:
            point[metric], point[f"{metric} interval"] = mean_and_interval(row["metrics"][metric] for row in rows)
        curve.append(point)
    return curve


def apart(evaluations: Sequence[Mapping[str, Any]], method: str, other: str) -> dict[str, list[float]]:
    """By metric what a method has more than another one at the last step, for each seed that both have."""
    runs = _finished(evaluations)
    ours, theirs = runs.get(method, {}), runs.get(other, {})
    pairs = [(ours[seed][-1]["metrics"], theirs[seed][-1]["metrics"]) for seed in sorted(ours.keys() & theirs.keys())]
    return {metric: [own[metric] - them[metric] for own, them in pairs] for metric in (pairs[0][0] if pairs else ())}


def _at_equal_steps(runs: _Runs, step: int) -> dict[str, dict[str, Any]]:
    return {method: _at(runs, method, step, dict.fromkeys(runs, float(step))) for method in runs}


def _at(runs: _Runs, method: str, step: float, steps: Mapping[str, float]) -> dict[str, Any]:
    """All metrics of a method at a step, and what they differ from vanilla's at its own."""
    by_seed, vanilla = runs[method], runs.get(VANILLA, {})
    found: dict[str, Any] = {"step": step, "seeds": len(by_seed)}
    for metric in next(iter(by_seed.values()))[0]["metrics"]:
        values = {seed: _at_step(entries, metric, step) for seed, entries in by_seed.items()}
        found[metric], found[f"{metric} interval"] = mean_and_interval(values.values())
        shared = [seed for seed in values if seed in vanilla]
        if shared and method != VANILLA:
            more = [values[seed] - _at_step(vanilla[seed], metric, steps[VANILLA]) for seed in shared]
            name = f"{metric} minus vanilla"
            found[name], found[f"{name} interval"] = mean_and_interval(more)
    return found


def _seconds_per_step(runs: Sequence[Sequence[Mapping[str, Any]]]) -> float:
    """The fastest run's seconds of each stretch between an evaluation and the one before it (or the start), over all steps."""
    ends = [[0.0, *(entry["time_s"] for entry in entries)] for entries in runs]
    stretches = [[end - start for start, end in pairwise(run)] for run in ends]
    seconds: float = sum(min(of_stretch) for of_stretch in zip(*stretches, strict=True))
    return seconds / float(runs[0][-1]["step"])


def _at_step(entries: Sequence[Mapping[str, Any]], metric: str, step: float) -> float:
    import numpy as np

    steps = np.log([e["step"] for e in entries])
    return float(np.interp(np.log(step), steps, [e["metrics"][metric] for e in entries]))


def table(summary: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """Markdown tables, a line a method: at equal steps, at the time at which the fastest method has taken them, and at the
    evaluations before.

    In brackets what a method differs from vanilla by, seed by seed.
    """
    by_step, by_time, step_s = summary["equal_steps"], summary["equal_time"], summary["step_s"]
    shown = [method for method in titles if method in by_step]
    at_steps = [[f"after {summary['last_step']:,} steps", "seeds"]]
    at_steps += [[titles[m], str(by_step[m]["seeds"])] for m in shown]
    at_time = [[f"after {summary['budget_s']:,.0f} s of training", "ms per step", "steps"]]
    at_time += [[titles[m], f"{1000 * step_s[m]:.0f}", f"{by_time[m]['step']:,.0f}"] for m in shown]
    all_rows = [(at_steps, by_step), (at_time, by_time)]
    for step, found in summary["earlier"].items():
        all_rows.append(([[f"after {int(step):,} steps"], *([titles[m]] for m in shown)], found))
    return "\n".join(_table(rows, [found[m] for m in shown]) for rows, found in all_rows)


def _table(rows: Sequence[Sequence[str]], found: Sequence[Mapping[str, Any]]) -> str:
    """`rows`, the first of which is the head, with a column for each metric: its value, in brackets the difference to vanilla's."""
    head, *lines = [list(row) for row in rows]
    head += SHOWN.values()
    for line, values in zip(lines, found, strict=True):
        for metric in SHOWN:
            cell = shown(values[metric], values[f"{metric} interval"])
            if (more := f"{metric} minus vanilla") in values:
                cell += f" ({shown(values[more], values[f'{more} interval'], sign=True)})"
            line.append(cell)
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, rule, *lines))


def shown(value: float, interval: float | None, *, sign: bool = False) -> str:
    """`5.17 ± 0.13`, as many decimals as the interval's second digit; without one, three digits."""
    scale = interval if interval else abs(value) / 100
    decimals = max(0, 1 - math.floor(math.log10(scale))) if scale else 3
    text = f"{value:{'+' if sign else ''}.{decimals}f}".replace("-", "−")
    return text if interval is None else f"{text} ± {interval:.{decimals}f}"


def draw(
    summary: Mapping[str, Any],
    titles: Mapping[str, str],
    out: Path,
    *,
    about: str,
    samples: int,
    metric: str = JUDGE,
) -> Path:
    """The figure: the metric against steps and against training time, and the loss minus vanilla's by interval of t."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    seeds = {point["seeds"] for curve in summary["curves"].values() for point in curve}
    count = str(*seeds) if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    figure, (by_step, by_time, by_t) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    drawn = [method for method in titles if method in summary["curves"]]
    for number, (method, title) in enumerate(titles.items()):  # a method keeps its colour whichever others are there
        if method not in drawn:
            continue
        curve = summary["curves"][method]
        aside = (drawn.index(method) - (len(drawn) - 1) / 2) / 100  # else bars would hide each other
        style: dict[str, Any] = {"color": f"C{number % 10}", "marker": "osD^vPX*<>"[number % 10], "markersize": 5}
        style |= {"capsize": 3, "linewidth": 1.3}
        errors = [point[f"{metric} interval"] or 0.0 for point in curve]
        values = [point[metric] for point in curve]
        by_step.errorbar([p["step"] * (1 + aside) for p in curve], values, yerr=errors, label=title, **style)
        by_time.errorbar([p["time_s"] for p in curve], values, yerr=errors, label=title, **style)
        end = summary["equal_steps"][method]
        bins = [key for key in end if key.startswith("denoise t=") and key.endswith("minus vanilla")]
        if bins:
            centres = [(i + 0.5 + 8 * aside) / len(bins) for i in range(len(bins))]
            widths = [end[f"{key} interval"] or 0.0 for key in bins]
            by_t.errorbar(centres, [end[key] for key in bins], yerr=widths, label=title, **style)
    by_t.axhline(0, color="0.5", linewidth=0.8)
    by_time.axvline(summary["budget_s"], color="0.6", linewidth=0.8, linestyle=":")
    by_step.set_xticks(sorted({p["step"] for curve in summary["curves"].values() for p in curve}))
    by_step.set(xlabel="training steps", ylabel=f"{SHOWN.get(metric, metric)}, {samples:,} samples", yscale="log")
    by_time.set(xlabel="training time (s), without saving and sampling", yscale="log")
    by_t.set(xlabel="timestep t (0 = data, 1 = noise)", ylabel="held-out denoising loss minus vanilla's")
    by_step.legend(ncols=2, frameon=False, fontsize=8)
    for axes in (by_step, by_time):
        for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatted(ScalarFormatter())  # 40, not 4 x 10^1
    for axes in (by_step, by_time, by_t):
        axes.grid(alpha=0.25, which="both")
    bars = f"mean and 95 % interval over {count} seeds" if max(seeds, default=0) > 1 else "one seed"
    figure.suptitle(f"{about}, {bars}")
    for suffix in ("svg", "png"):
        figure.savefig(out / f"methods.{suffix}", dpi=150)
    plt.close(figure)
    return out / "methods.svg"
