"""`trainer`: train, sample, evaluate, report. Thin: parse, call, print. Heavy imports are inside the commands."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featcache import launch
from featcache.console import console, run_app, safe
from featcache.console_progress import RichProgress
from featcache.errors import UserError, os_error
from featcache.machine import usable_cores
from featcache.paths import typed
from featcache.redact import is_redacted
from featcache.settings import Given, flag_of, from_mapping, from_typed, options_of, takes, to_mapping
from trainer import stopping
from trainer.align import split_methods
from trainer.analyze import DIAGNOSTICS
from trainer.analyze.config import AnalyzeConfig, parse_what
from trainer.cli import tools as commands
from trainer.requests import EvalRequest, SampleRequest, SampleSettings
from trainer.runs.config import RunConfig, apply_overrides

if TYPE_CHECKING:
    from featcache.read.reader import Cache
    from trainer.runs.branch import Origin
    from trainer.training.judging import Judge

app = typer.Typer(
    name="trainer",
    help="Train diffusion transformers against a feature cache, then sample and judge them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
@takes(RunConfig)
def run(
    given: Given,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file of settings; options here win over it. \\[default: none]")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE for any other setting; repeatable. \\[default: none]"),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the run of that name from its latest checkpoint. \\[default: off]"),
    ] = False,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="RUN[@STEP]",
            help="Begin a new run from a checkpoint of another, by folder or name; its settings hold unless typed. \\[default: none]",
        ),
    ] = None,
    expect: Annotated[
        str | None, typer.Option(help="Digest that the cache must have (featcache info prints it). \\[default: any]")
    ] = None,
) -> None:
    """Train one model. [dim]Example: trainer run --method ahpa --model SiT-XL/2[/dim]"""
    with _one_voice() as main:
        if resume and from_ is not None:
            raise UserError(
                "--from begins a new run, and --resume continues one",
                remedy="Leave one of them out; a branch that has begun needs --resume alone.",
            )
        origin = None if from_ is None else _origin(from_, recipe, given, set_ or [])
        config = _run_config(recipe, given, set_ or [], resume=resume, origin=origin)
        from trainer.training.loop import train

        _leave_a_core()
        with RichProgress() as progress:
            folder = train(
                config, resume=resume, watcher=progress, expect=expect, origin=origin, make_judge=_small_judge
            )
        if main:
            from trainer.models.config import takes_text
            from trainer.sampling.prompts import sample_command

            follows = sample_command(folder, text=True) if takes_text(config.model) else f"trainer eval {typed(folder)}"
            console.print(f"run: [bold]{safe(folder)}[/bold]   next: {safe(follows)}")


def _small_judge(config: RunConfig, cache: Cache, run: Path, note: Callable[[str], None]) -> Judge:
    """As `trainer.evaluate.during.small_judge`, imported where a run is judged while it goes on."""
    from trainer.evaluate.during import small_judge

    return small_judge(config, cache, run, note)


@contextmanager
def _one_voice() -> Iterator[bool]:
    """Under torchrun the main rank alone speaks; gives whether this one is it.

    An error that all ranks meet is the main rank's to print, whereupon torchrun ends the others. One that is another
    rank's alone is printed when that has not happened for a while.
    """
    rank = launch.rank()
    if rank == 0:
        yield True
        return
    warnings.filterwarnings("ignore", category=UserWarning, module=r"trainer\.")
    try:
        yield False
    except (UserError, OSError) as error:
        time.sleep(5)
        known = os_error(error) if isinstance(error, OSError) else error
        raise UserError(f"rank {rank}: {known.what}", remedy=known.remedy) from error
    except Exception:
        time.sleep(5)
        raise


def _leave_a_core() -> None:
    """One thread less than there are cores, unless $OMP_NUM_THREADS says how many: the cache is read by a thread of its
    own, and OpenMP's threads wait for each other spinning, so that one of them without a core holds up all.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, usable_cores() - 1))


def _typed_values(recipe: Path | None, given: Given) -> dict[str, Any]:
    """A recipe's settings, with the options on top."""
    from trainer.runs.recipes import load_recipe

    return (load_recipe(recipe) if recipe is not None else {}) | given


def _origin(text: str, recipe: Path | None, given: Given, overrides: list[str]) -> Origin:
    """What `--from` names, beside the cache that was typed, if one was."""
    from trainer.runs.branch import find_origin

    typed_cache = apply_overrides(_typed_values(recipe, given), overrides).get("cache")
    return find_origin(text, any_cache=typed_cache is not None)


def _run_config(
    recipe: Path | None, given: Given, overrides: list[str], *, resume: bool, origin: Origin | None = None
) -> RunConfig:
    """The settings of a run: a recipe's, with what was typed on top; to continue one, its own with the same on top; of a
    branch, its origin's."""
    values = _typed_values(recipe, given)
    if resume:
        return _resumed_config(values, overrides)
    if origin is not None:
        from trainer.runs.branch import inherited

        return _on_top(inherited(origin), values, overrides, origin.run, "--from RUN@STEP")
    return from_mapping(RunConfig, apply_overrides(values, overrides))


def _resumed_config(values: Given, overrides: list[str]) -> RunConfig:
    """The settings of the run to continue (the newest one, unless named), with what was typed on top."""
    from trainer.runs.folder import ROOT, checked_name, load_config, newest_run

    name = apply_overrides(values, overrides).get("name")
    run = ROOT / checked_name(str(name)) if name else newest_run()
    if not name:
        console.print(f"continuing {safe(run)}, the newest run")
    return _on_top(to_mapping(load_config(run)), values, overrides, run, "--resume")


def _on_top(saved: dict[str, Any], values: Given, overrides: list[str], run: Path, how: str) -> RunConfig:
    """The settings of `run` with what was typed on top; of methods that are not trained any more no options are left."""
    methods = split_methods(str(apply_overrides(dict(values), overrides).get("method", saved["method"])))
    typed_options = values.get("align") or {}
    align = {
        m: {**saved["align"].get(m, {}), **(typed_options.get(m) or {})} for m in {**saved["align"], **typed_options}
    }
    kept = {method: options for method, options in align.items() if method in (*methods, *typed_options)}
    config = from_mapping(RunConfig, apply_overrides({**saved, **values, "align": kept}, overrides))
    if config.cache is not None and is_redacted(config.cache):
        raise UserError(
            f"the cache of {run}, {config.cache}, needs a password or token, and none is ever stored",
            remedy=f"Pass its whole URL again: trainer run {how} --cache URL, or keep the secret in the environment.",
        )
    return config


@app.command()
@takes(SampleRequest)
def sample(
    run: Annotated[Path, typer.Argument(help="Folder of the run, e.g. runs/ahpa.", show_default=False)],
    given: Given,
    figure: Annotated[
        str | None,
        typer.Option(
            help="Draw as the samples of this recipe's published figures, at its step; options here win. \\[default: none]"
        ),
    ] = None,
) -> None:
    """Draw images of a run: an npz in ADM's layout, and a picture of them by class or prompt.

    [dim]Example, of a model that takes text: trainer sample runs/text --prompt "a red striped triangle on a dark background"[/dim]
    """
    from trainer import distributed
    from trainer.runs.folder import load_config
    from trainer.sampling.prompts import prompts_for
    from trainer.sampling.run import sample_run

    with RichProgress() as progress:
        if figure is not None:
            from trainer.runs.recipes import load_figure

            given = load_figure(figure).drawn_as(given, f"trainer sample {typed(run)} --figure {typed(figure)}")
        else:
            from trainer.runs.protocol import drawn_as_published

            given = drawn_as_published(run, given, progress.note)
        request = from_typed(SampleRequest, given)
        prompts = prompts_for(run, load_config(run), request)
        if prompts is not None:
            if prompts.remark is not None and distributed.is_main():
                progress.note(prompts.remark)
            if "num" not in given:
                request = replace(request, num=len(prompts.texts))
        result = sample_run(run, request, progress, prompts=prompts)
    if distributed.is_main():
        console.print(f"images: [bold]{safe(result.images)}[/bold]   grid: {safe(result.grid)}")


# Settings of eval that say how to draw, so that they mean nothing where the images are there already.
DRAWING = (
    *(
        "figure",
        "sweep",
        "sampler",
        "steps",
        "shift",
        "guidance",
        "interval",
        "guided_channels",
        "stream_guidance",
        "representation_guidance",
        "classes",
        "pixels",
        "weights",
        "checkpoint",
    ),
    *("precision", "compile"),
)


def _refuse(given: Given, names: Sequence[str], why: str) -> None:
    """Refuses the settings `names`.

    Raises:
        UserError: one of them was typed.
    """
    for name in names:
        if name in given:
            flag = flag_of(EvalRequest if name in ("figure", "sweep") else SampleSettings, name)
            raise UserError(f"{flag} {why}", remedy=f"Leave {flag} out.")


@app.command(name="eval")
@takes(SampleSettings, EvalRequest)
def evaluate(
    given: Given,
    run: Annotated[Path | None, typer.Argument(help="Folder of the run. \\[default: the newest below ./runs]")] = None,
    samples: Annotated[
        str | None,
        typer.Option(
            help="Judge these images (npz, tar, folder) by --reference instead of drawing some. \\[default: draw]"
        ),
    ] = None,
    require_labels: Annotated[
        bool,
        typer.Option("--require-labels", help="With --samples: refuse images without class labels. \\[default: off]"),
    ] = False,
    all_: Annotated[
        bool,
        typer.Option("--all", help="Judge every snapshot and the latest checkpoint: a curve. \\[default: off]"),
    ] = False,
) -> None:
    """Sample a run, compare with reference images, write metrics.json and report.html."""
    from trainer.evaluate.curve import evaluate_all
    from trainer.evaluate.run import evaluate_images, evaluate_run
    from trainer.report.curve import write_curve
    from trainer.report.run import write_run_report
    from trainer.runs.folder import newest_run

    if samples is not None and run is not None:
        raise UserError("a run and --samples were both given", remedy="Leave one of them out.")
    if samples is not None:
        _refuse(given, DRAWING, "says how to draw images, and --samples are drawn already")
    elif require_labels:
        raise UserError(
            "--require-labels says what to accept of --samples, which were not given",
            remedy="Leave --require-labels out.",
        )
    if all_:
        _refuse(given, ("checkpoint", "figure"), "names one step, and --all judges every one")
        _refuse(given, ("sweep",), "judges one step at many values, and --all judges every one")
        if samples is not None:
            raise UserError("--all is of a run's steps, and --samples are drawn already", remedy="Leave --all out.")
    drawing = {name: value for name, value in given.items() if name in options_of(SampleSettings)}
    judging = {name: value for name, value in given.items() if name not in drawing}
    request = from_typed(EvalRequest, judging, settings=from_typed(SampleSettings, drawing))
    with RichProgress() as progress:
        if samples is None:
            if run is None:
                run = newest_run()
                progress.note(f"judging {run}, the newest run")
            if request.sweep is not None:
                _sweep(run, request, progress)
                return
            curve = evaluate_all(run, request, progress) if all_ else None
            result = None if all_ else evaluate_run(run, request, progress)
        else:
            result = evaluate_images(samples, request, require_labels=require_labels, progress=progress)
            curve = None
    if curve is not None and run is not None:
        for point in curve.points:
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in point.metrics.items())
            console.print(f"{point.step:>24,}  {safe(numbers)}")
        console.print(f"curve: [bold]{safe(write_curve(run, curve))}[/bold]")
        console.print(f"report: [bold]{safe(write_run_report([run]))}[/bold]")
    if result is None:  # the main rank judges
        return
    for name, value in result.metrics.items():
        console.print(f"{safe(name):>24}  {value:.4g}")
    written = write_run_report([run]) if run is not None else result.file
    console.print(f"report: [bold]{safe(written)}[/bold]")


def _sweep(run: Path, request: EvalRequest, progress: RichProgress) -> None:
    """Judges at each value, then prints the curve and where it is best."""
    from trainer.evaluate.sweep import sweep_run
    from trainer.report.run import write_run_report

    result = sweep_run(run, request, progress)
    if result is None:  # the main rank judges
        return
    curve = result.curve
    names = list(curve.points[0].metrics)
    console.print("  ".join(safe(f"{name:>14}") for name in [curve.setting, *names]))
    for point in curve.points:
        numbers = "  ".join(f"{point.metrics.get(name, float('nan')):>14.4g}" for name in names)
        console.print(f"{point.value:>14g}  {numbers}", soft_wrap=True)
    best = curve.best
    console.print(
        f"best {safe(curve.deciding)}: {best.metrics[curve.deciding]:.4g} at {safe(curve.setting)} {best.value:g} ({curve.remark})"
    )
    console.print(f"curve: [bold]{safe(result.file)}[/bold]   report: [bold]{safe(write_run_report([run]))}[/bold]")


@app.command()
@takes(AnalyzeConfig)
def analyze(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, e.g. runs/ahpa.", show_default=False)],
    given: Given,
    what: Annotated[
        str,
        typer.Option(
            help="gsnr, gradient-angle, router, cknna, probe, spectrum, selfsim, pca, codec (join with commas), or all."
        ),
    ] = "all",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE for any other option; repeatable. \\[default: none]"),
    ] = None,
) -> None:
    """See why an alignment works: diagnostics as numbers, plots and one page. [dim]Example: trainer analyze runs/ahpa[/dim]"""
    from trainer.report.analyze import analyze_runs

    chosen = parse_what(what, tuple(DIAGNOSTICS))
    options = from_mapping(AnalyzeConfig, apply_overrides(given, set_ or []))
    with RichProgress() as progress:
        pages = analyze_runs(runs, chosen, options, progress)
    for page in pages:
        console.print(f"page: [bold]{safe(page)}[/bold]")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="HTML file. \\[default: report.html in the run; comparison.html in the first]")
    ] = None,
) -> None:
    """Write the report of one run; of several, the same page as compare."""
    from trainer.report.run import write_run_report

    written = write_run_report(runs, out) if len(runs) == 1 else commands.compare_runs(runs, out)
    console.print(f"report: [bold]{safe(written)}[/bold]")


@app.command()
def recipes(
    text: Annotated[
        str,
        typer.Argument(
            help="A row (ahpa/xl2) or a file, shown in full; else a part of name, method, model, title, source."
        ),
    ] = "",
) -> None:
    """List the recipes, one per row of the papers' tables, or show one. [dim]Example: trainer recipes ahpa/xl2[/dim]"""
    from trainer.runs.recipe_pages import page

    for line in page(text, width=min(console.width, 120)):
        console.print(safe(line))


@app.command()
def settings(
    text: Annotated[str, typer.Argument(help="A method (ahpa), streams, or a part of a setting's name.")] = "",
) -> None:
    """List all settings of runs and methods: what recipes hold and --set takes. [dim]Example: trainer settings ahpa[/dim]"""
    from trainer.runs.setting_pages import page

    for line in page(text, width=min(console.width, 120)):
        console.print(safe(line))


commands.register(app)


def main() -> None:
    """Entry point of the `trainer` command."""
    with stopping.prompt():
        code = run_app(app)
    sys.exit(code)
