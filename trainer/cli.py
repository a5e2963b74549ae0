"""``trainer``: train, sample, evaluate, report. Thin: parse, call, print. Heavy imports are inside the commands."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from featcache.console import console, run_app, safe
from trainer import commands

app = typer.Typer(
    name="trainer",
    help="Train diffusion transformers against a feature cache, then sample and judge them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")]
WeightsDir = Annotated[Path | None, typer.Option(help="Folder with pretrained weights, searched before the hub.")]
Classes = Annotated[str, typer.Option(help="balanced, random, or a list such as 207,360,387.")]
Pixels = Annotated[str, typer.Option(help="round (ADM, DiT, SiT) or truncate (REPA) to 8 bits.")]
GuidedChannels = Annotated[int | None, typer.Option(help="Guide only the first so many channels. [default: all]")]
SamplingPrecision = Annotated[
    str,
    typer.Option(
        "--precision", help="fp32, tf32 or bf16 (autocast of the backbone); auto is tf32 on a GPU, else fp32."
    ),
]
Compile = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="Compile the backbone. [default: on a GPU]", show_default=False),
]


@app.command()
def run(
    method: Annotated[str | None, typer.Option(help="none, repa, ahpa, ...; join several with +.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file of settings; options here win over it.")] = None,
    model: Annotated[str | None, typer.Option(help="Backbone, e.g. SiT-S/2, SiT-B/2, SiT-L/2, SiT-XL/2.")] = None,
    cache: Annotated[
        str | None, typer.Option(help="Feature cache. Default: the newest fitting one below ./caches.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Folder below ./runs. Default: from method and model.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Global batch size.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of AdamW.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or auto.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16.")] = None,
    attention: Annotated[str | None, typer.Option(help="sdpa (torch's own, the default) or xformers.")] = None,
    qk_norm: Annotated[
        bool | None, typer.Option("--qk-norm/--no-qk-norm", help="Normalise queries and keys.", show_default=False)
    ] = None,
    weights_dir: WeightsDir = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE for any other setting; repeatable.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run of that name from its latest checkpoint.")
    ] = False,
    expect: Annotated[
        str | None, typer.Option(help="Digest that the cache must have (featcache info prints it).")
    ] = None,
) -> None:
    """Train one model. [dim]Example: trainer run --method ahpa --model SiT-XL/2[/dim]"""
    given = {
        "method": method,
        "model": model,
        "cache": cache,
        "name": name,
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "device": device,
        "precision": precision,
        "attention": attention,
        "qk_norm": qk_norm,
        "weights_dir": None if weights_dir is None else str(weights_dir),
    }
    with _one_voice() as main:
        config = _run_config(recipe, {k: v for k, v in given.items() if v is not None}, set_ or [], resume=resume)
        from trainer.loop import Silent, train

        _leave_a_core()
        if not main:
            train(config, resume=resume, watcher=Silent(), expect=expect)
            return
        from trainer.progress import RichWatcher

        with RichWatcher() as watcher:
            folder = train(config, resume=resume, watcher=watcher, expect=expect)
        console.print(f"run: [bold]{safe(folder)}[/bold]   next: trainer eval {safe(folder)}")


@contextmanager
def _one_voice() -> Iterator[bool]:
    """Under torchrun the main rank alone speaks; gives whether this one is it.

    An error that all ranks meet is the main rank's to print, whereupon torchrun ends the others. One that is another
    rank's alone is printed when that has not happened for a while.
    """
    import warnings

    from featcache.errors import UserError

    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        yield True
        return
    warnings.filterwarnings("ignore", category=UserWarning, module=r"trainer\.")
    try:
        yield False
    except UserError as error:
        time.sleep(5)
        raise UserError(f"rank {rank}: {error.what}", remedy=error.remedy) from error


def _leave_a_core() -> None:
    """One thread less than there are cores, unless $OMP_NUM_THREADS says how many: the cache is read by a thread of its
    own, and OpenMP's threads wait for each other spinning, so that one of them without a core holds up all.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores - 1))


def _run_config(recipe: Path | None, given: dict[str, Any], overrides: list[str], *, resume: bool) -> Any:
    """The settings of a run: a recipe's, with what was typed on top; to continue one, its own with the same on top."""
    from trainer.config import RunConfig, apply_overrides, from_mapping, load_recipe

    values = (load_recipe(recipe) if recipe is not None else {}) | given
    if resume:
        return _resumed_config(values, overrides)
    return from_mapping(RunConfig, apply_overrides(values, overrides))


def _resumed_config(values: dict[str, Any], overrides: list[str]) -> Any:
    """The settings of the run to continue (the newest one, unless named), with what was typed on top."""
    from featcache.errors import UserError
    from featcache.redact import is_redacted
    from trainer.config import RunConfig, apply_overrides, from_mapping, to_mapping
    from trainer.runs import ROOT, checked_name, load_config, newest_run

    name = apply_overrides(values, overrides).get("name")
    run = ROOT / checked_name(str(name)) if name else newest_run()
    config = from_mapping(RunConfig, apply_overrides(to_mapping(load_config(run)) | values, overrides))
    if config.cache is not None and is_redacted(config.cache):
        raise UserError(
            f"the cache of {run}, {config.cache}, needs a password or token, and none is ever stored",
            remedy="Pass its whole URL again: trainer run --resume --cache URL, or keep the secret in the environment.",
        )
    return config


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="Folder of the run, e.g. runs/ahpa.", show_default=False)],
    num: Annotated[int, typer.Option(help="How many images.", min=1)] = 64,
    sampler: Annotated[
        str | None, typer.Option(help="SiT: sde (default), ode, heun, dopri5. DiT: ddpm (default), ddim.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=1)] = 250,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 is none.")] = 1.0,
    interval: Annotated[str, typer.Option(help="Interval of t in which to guide: LOW,HIGH.")] = "0,1",
    classes: Classes = "balanced",
    seed: Annotated[int, typer.Option(help="With its index it fixes a sample's noise.")] = 0,
    step: Annotated[int | None, typer.Option(help="Checkpoint. [default: the latest]")] = None,
    batch_size: Annotated[int, typer.Option(help="Images at once.", min=1)] = 64,
    device: Device = "auto",
    weights_dir: WeightsDir = None,
    format_: Annotated[
        str, typer.Option("--format", help="npz (ADM's layout), wds (a WebDataset shard) or png.")
    ] = "npz",
    pixels: Pixels = "round",
    guided_channels: GuidedChannels = None,
    precision: SamplingPrecision = "auto",
    compile_: Compile = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to. [default: RUN/samples/<settings>]")] = None,
) -> None:
    """Draw images from a run's averaged weights: an npz in ADM's layout and a grid PNG."""
    from featcache.progress import RichBar
    from trainer import distributed
    from trainer.sampling import SampleRequest, sample_run

    request = SampleRequest(
        num=num,
        sampler=sampler,
        steps=steps,
        guidance=guidance,
        interval=interval,
        classes=classes,
        seed=seed,
        checkpoint=step,
        batch_size=batch_size,
        device=device,
        weights_dir=None if weights_dir is None else str(weights_dir),
        format=format_,
        pixels=pixels,
        guided_channels=guided_channels,
        precision=precision,
        compile=compile_,
        out=out,
    )
    with RichBar("sampling", unit="images") as bar:
        result = sample_run(run, request, bar)
    if distributed.is_main():
        console.print(f"images: [bold]{safe(result.images)}[/bold]   grid: {safe(result.grid)}")


# Options of eval that say how to draw, so that they mean nothing where the images are there already.
DRAWING = [
    "sampler",
    "steps",
    "guidance",
    "interval",
    "guided_channels",
    "classes",
    "pixels",
    "step",
    "precision",
    "compile_",
]


def _refuse_typed(context: typer.Context, names: Sequence[str], why: str) -> None:
    """Raises UserError if any of the options ``names`` (of the command's parameters) was typed."""
    from featcache.errors import UserError

    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name in names and source is not None and source.name == "COMMANDLINE":
            raise UserError(f"{option.opts[0]} {why}", remedy=f"Leave {option.opts[0]} out.")


@app.command(name="eval")
def evaluate(
    context: typer.Context,
    run: Annotated[Path | None, typer.Argument(help="Folder of the run. [default: the newest below ./runs]")] = None,
    samples: Annotated[
        str | None, typer.Option(help="Judge these images (npz, tar, folder) by --reference instead of drawing some.")
    ] = None,
    num: Annotated[
        int | None, typer.Option(help="Samples to judge. [default: 50,000; fewer on the CPU]", min=2)
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="As for sample. [default: the recipe's, else sde or ddpm; on the CPU ode or ddim]"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps. [default: the recipe's, else 250; 32 on the CPU]", min=1)
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance scale. [default: the recipe's, else 1: none]")
    ] = None,
    interval: Annotated[
        str | None,
        typer.Option(
            help="Interval of t in which to guide: LOW,HIGH. [default: the recipe's at its --guidance, else 0,1]"
        ),
    ] = None,
    classes: Classes = "balanced",
    extractor: Annotated[
        str,
        typer.Option(help="inception, dinov2, embedded; auto takes inception where its weights are, else embedded."),
    ] = "auto",
    reference: Annotated[
        str | None,
        typer.Option(help="Reference images or statistics: npz or folder. [default: the cache's own images]"),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="fid,sfid,is,precision,recall,kid. [default: all of the extractor]")
    ] = None,
    bootstrap: Annotated[int, typer.Option(help="Replicates behind 95 % intervals; 0 is none.", min=0)] = 0,
    data: Annotated[
        str | None, typer.Option(help="Where the cache's images lie. [default: $FEATCACHE_DATA, else ./data/imagenet]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    step: Annotated[int | None, typer.Option(help="Checkpoint. [default: the latest]")] = None,
    batch_size: Annotated[int, typer.Option(help="Images at once.", min=1)] = 64,
    device: Device = "auto",
    weights_dir: WeightsDir = None,
    pixels: Pixels = "round",
    guided_channels: GuidedChannels = None,
    precision: SamplingPrecision = "auto",
    compile_: Compile = None,
    require_labels: Annotated[
        bool, typer.Option("--require-labels", help="With --samples: refuse images without class labels.")
    ] = False,
) -> None:
    """Sample a run, compare with reference images, write metrics.json and report.html."""
    from featcache.errors import UserError
    from featcache.progress import RichBar
    from trainer.evaluation import EvalRequest, evaluate_images, evaluate_run
    from trainer.runs import newest_run

    if samples is None:
        _refuse_typed(context, ("require_labels",), "says what to accept of --samples, which were not given")
    elif run is not None:
        raise UserError("a run and --samples were both given", remedy="Leave one of them out.")
    else:
        _refuse_typed(context, DRAWING, "says how to draw images, and --samples are drawn already")
    request = EvalRequest(
        num=num,
        sampler=sampler,
        steps=steps,
        guidance=guidance,
        interval=interval,
        classes=classes,
        pixels=pixels,
        guided_channels=guided_channels,
        precision=precision,
        compile=compile_,
        extractor=extractor,
        reference=reference,
        data=data,
        seed=seed,
        checkpoint=step,
        batch_size=batch_size,
        device=device,
        weights_dir=None if weights_dir is None else str(weights_dir),
        bootstrap=bootstrap,
        metrics=tuple(m.strip() for m in metrics.split(",")) if metrics else (),
    )
    with RichBar("evaluating", unit="images") as bar:
        if samples is None:
            result = evaluate_run(run or newest_run(), request, bar)
        else:
            result = evaluate_images(samples, request, require_labels=require_labels, bar=bar)
    if result is None:  # the main rank judges
        return
    for name, value in result.metrics.items():
        console.print(f"{safe(name):>24}  {value:.4g}")
    console.print(f"report: [bold]{safe(result.report)}[/bold]")


@app.command()
def analyze(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, e.g. runs/ahpa.", show_default=False)],
    what: Annotated[
        str,
        typer.Option(
            help="gsnr, gradient-angle, router, cknna, probe, spectrum, selfsim, pca, codec (join with commas), or all."
        ),
    ] = "all",
    samples: Annotated[
        int | None, typer.Option(help="Samples to look at. [default: 10,000; 512 on the CPU]", min=8)
    ] = None,
    step: Annotated[int | None, typer.Option(help="Checkpoint. [default: the latest]")] = None,
    data: Annotated[
        str | None, typer.Option(help="Where the cache's images lie, for pictures. [default: decode the latents]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of samples, noise and times.")] = 0,
    device: Device = "auto",
    weights_dir: WeightsDir = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE for any other option; repeatable.")] = None,
) -> None:
    """See why an alignment works: diagnostics as numbers, plots and one page. [dim]Example: trainer analyze runs/ahpa[/dim]"""
    from trainer.analyze import DIAGNOSTICS
    from trainer.analyze.config import AnalyzeConfig, parse_what
    from trainer.config import apply_overrides, from_mapping

    chosen = parse_what(what, tuple(DIAGNOSTICS))
    values = {"samples": samples, "step": step, "data": data, "seed": seed, "device": device}
    values |= {"weights_dir": None if weights_dir is None else str(weights_dir)}
    options = from_mapping(AnalyzeConfig, apply_overrides(values, set_ or []))
    from featcache.progress import RichBar
    from trainer.analyze.command import analyze_runs

    with RichBar("analysing", unit="diagnostics") as bar:
        pages = analyze_runs(runs, chosen, options, bar)
    for page in pages:
        console.print(f"page: [bold]{safe(page)}[/bold]")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="HTML file. [default: report.html in the run; comparison.html in the first]")
    ] = None,
) -> None:
    """Write the report of one run; of several, the same page as compare."""
    from trainer.evaluation import write_run_report

    console.print(f"report: [bold]{safe(write_run_report(runs, out))}[/bold]")


@app.command()
def recipes(
    text: Annotated[
        str, typer.Argument(help="Only those whose file, method, model, title or source contains this.")
    ] = "",
) -> None:
    """List the recipes: one for each row of the papers' tables. [dim]Example: trainer recipes ahpa/xl2[/dim]"""
    from trainer.recipes import list_recipes, listing

    found = list_recipes(text)
    for line in listing(found):
        console.print(safe(line))
    console.print(f"{len(found)} recipes   next: trainer run --recipe RECIPE")


commands.register(app)


def main() -> None:
    """Entry point of the ``trainer`` command."""
    sys.exit(run_app(app))


if __name__ == "__main__":
    main()
