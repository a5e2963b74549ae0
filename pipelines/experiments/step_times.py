"""Seconds per training step of the experiment's methods, side by side, for its figures at equal time.

    python -m pipelines.experiments.step_times --part photographs-64 --out experiments/methods

The long runs of `pipelines.experiments.methods` share the machine with each other and with whatever else it does, and not
all alike. Here all methods of a part take turns in one process: in every round each takes a block of steps of its own run's
settings, fed from the part's cache, in rotating order. A method's seconds per step are vanilla's median times the median of
its ratio to vanilla within a round. A method that stops aligning (HASTE) costs what the aligned and vanilla cost, each for its
share. Written to `step_times.json` beside `results.json`, which the experiment reads when it summarises.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer

from featcache.console import console, run_app, safe
from featcache.console_progress import RichProgress
from pipelines.experiments.methods import METHODS, STEP_TIMES, Settings, read_settings, run_values, write_json
from pipelines.experiments.summary import VANILLA

BLOCK = 5  # steps: a whole period of SARA's discriminator


def measure(part: Path, *, rounds: int) -> dict[str, Any]:
    """The record of a part's step times: `step_s` (seconds per step by method), `ratios` to vanilla by round, and how.

    Raises:
        UserError: the part has no runs.
    """
    import torch

    from featcache.machine import describe_machine

    settings, results = read_settings(part)
    methods, threads = list(results["methods"]), results["machine"]["threads"]
    torch.set_num_threads(threads)
    timed = [m for m in METHODS if m in {*methods, VANILLA} and METHODS[m].stop_at is None]
    timed += [m for m in (_aligned(name) for name in methods) if m not in timed]
    with ExitStack() as stack, RichProgress() as progress:
        steppers = {method: stack.enter_context(closing(_Steps(settings, method, part / "cache"))) for method in timed}
        progress.begin("timing steps", (rounds + 1) * len(timed) * BLOCK, unit="steps")
        seconds = take_turns({m: s.run for m, s in steppers.items()}, rounds=rounds, told=progress.update)
    found = describe_machine("torch")
    return {
        "date": date.today().isoformat(),
        "machine": {key: found[key] for key in ("cpu", "cores", "gpu", "system")} | {"threads": threads},
        "torch": found["packages"]["torch"],
        "settings": {key: getattr(settings, key) for key in ("part", "model", "batch_size", "precision")},
        "rounds": rounds,
        "block": BLOCK,
        **of_rounds(seconds, methods),
    }


def take_turns(
    blocks: Mapping[str, Callable[[int], float]], *, rounds: int, told: Callable[[int], None]
) -> dict[str, list[float]]:
    """By name the seconds per step of a block in each round; a first round warms up and does not count.

    told: how many more steps were taken.
    """
    names = list(blocks)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for at in range(rounds + 1):
        first = at % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(blocks[name](BLOCK))
            told(BLOCK)
    return {name: values[1:] for name, values in seconds.items()}


def of_rounds(seconds: Mapping[str, Sequence[float]], methods: Sequence[str]) -> dict[str, Any]:
    """`step_s` of `methods`, and `ratios`: by timed method the median of its ratios to vanilla's block of the same round,
    between the ends of the median's 95 % interval."""
    vanilla = seconds[VANILLA]
    of = {m: sorted(own / other for own, other in zip(v, vanilla, strict=True)) for m, v in seconds.items()}
    rank = _rank(len(vanilla))
    ratio = {method: statistics.median(values) for method, values in of.items()}
    base = statistics.median(vanilla)

    def cost(method: str) -> float:
        stop = METHODS[method].stop_at
        return ratio[method] if stop is None else stop * ratio[_aligned(method)] + (1 - stop)

    return {
        "step_s": {method: base * cost(method) for method in methods},
        "ratios": {method: [values[rank], ratio[method], values[-1 - rank]] for method, values in of.items()},
    }


def _rank(n: int) -> int:
    """How many of `n` sorted values lie outside the 95 % interval of their median at each end, whatever their distribution: of
    `n` tosses of a coin, at least 6, so few or fewer are heads in 2.5 % of all cases at most."""
    from scipy.stats import binom

    return max(int(binom.ppf(0.025, n, 0.5)) - 1, 0)


def _aligned(method: str) -> str:
    """The method of the table that does all along what this one does until it stops."""
    chosen = METHODS[method]
    if chosen.stop_at is None:
        return method
    same = (chosen.name, chosen.options, chosen.narrowed)
    return next(n for n, m in METHODS.items() if m.stop_at is None and (m.name, m.options, m.narrowed) == same)


class _Steps:
    """A run of a method that only takes steps, fed by its own loader."""

    def __init__(self, settings: Settings, method: str, path: Path) -> None:
        import torch

        import featcache
        from featcache.machine import pick_device
        from featcache.progress import Quiet
        from featcache.torch.feed import Share
        from trainer.distributed import World
        from trainer.runs.config import RunConfig
        from trainer.training.loop import Job, loader, prepare_device
        from trainer.training.meters import FirstBadStep, RunningMeans
        from trainer.training.state import assemble

        device = torch.device(pick_device(settings.device))
        prepare_device(device)
        values = run_values(settings, method) | {"steps": 1 << 30}  # its batches do not end
        cache, config = featcache.open(path), RunConfig(**values, cache=str(path), name=method)
        parts = assemble(config, cache, device, World())
        share = Share(global_batch=settings.batch_size)
        self._job = Job(
            config=config, cache=cache, run=path, parts=parts, world=World(), device=device, share=share, watcher=Quiet()
        )  # fmt: skip
        self._means, self._bad, self._at = RunningMeans(), FirstBadStep(device), 0
        self._feed = loader(self._job, 0)
        self._batches: Iterator[Any] = iter(self._feed)

    def run(self, steps: int) -> float:
        """Seconds per step, the device idle before and after."""
        import torch

        from trainer.training.loop import train_step

        def wait() -> None:
            if self._job.device.type == "cuda":
                torch.cuda.synchronize()

        wait()
        start = time.perf_counter()
        for _ in range(steps):
            train_step(self._job, self._batches, self._at, self._means, self._bad, measures=False)
            self._at += 1
        wait()
        seconds = (time.perf_counter() - start) / steps
        self._means.take()
        return seconds

    def close(self) -> None:
        self._feed.close()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    part: Annotated[str, typer.Option(help="Of the experiment.")],
    out: Annotated[Path, typer.Option(help="The experiment's.")] = Path("experiments/methods"),
    rounds: Annotated[int, typer.Option(help="In each of which every method takes its turn.", min=6)] = 40,
) -> None:
    """Time the methods of a part side by side. Nothing else should run meanwhile."""
    record = measure(out / part, rounds=rounds)
    write_json(out / part / STEP_TIMES, record)
    for method, seconds in record["step_s"].items():
        spread = record["ratios"].get(method)
        beside = "" if spread is None else f", {spread[1]:.3f} of vanilla's ({spread[0]:.3f} to {spread[2]:.3f})"
        console.print(safe(f"{METHODS[method].title}: {1000 * seconds:.1f} ms a step{beside}"))
    console.print(
        f"times: [bold]{safe(out / part / STEP_TIMES)}[/bold]; the experiment's command takes them into its tables"
    )


if __name__ == "__main__":
    sys.exit(run_app(app))
