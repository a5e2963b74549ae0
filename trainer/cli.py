"""``trainer``: train, sample, evaluate, report. Thin: parse, call, print. Heavy imports are inside the commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from featcache.console import console, run_app
from featcache.errors import UserError

app = typer.Typer(
    name="trainer",
    help="Train diffusion transformers against a feature cache, then sample and judge them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")]
WeightsDir = Annotated[Path | None, typer.Option(help="Folder with pretrained weights, searched before the hub.")]


@app.command()
def run(
    method: Annotated[str | None, typer.Option(help="none, repa, ahpa, ...; join several with +.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file of settings; options here win over it.")] = None,
    model: Annotated[str | None, typer.Option(help="Backbone, e.g. SiT-S/2, SiT-B/2, SiT-L/2, SiT-XL/2.")] = None,
    cache: Annotated[str | None, typer.Option(help="Feature cache. Default: the newest fitting one below ./caches.")] = None,
    name: Annotated[str | None, typer.Option(help="Folder below ./runs. Default: from method and model.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Global batch size.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of AdamW.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or auto.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16.")] = None,
    weights_dir: WeightsDir = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE for any other setting; repeatable.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run of that name from its latest checkpoint.")] = False,
) -> None:
    """Train one model. [dim]Example: trainer run --method ahpa --model SiT-XL/2[/dim]"""
    from trainer.config import RunConfig, apply_overrides, from_mapping, load_recipe
    from trainer.progress import RichWatcher

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
        "weights_dir": None if weights_dir is None else str(weights_dir),
    }
    values = load_recipe(recipe) if recipe is not None else {}
    values |= {key: value for key, value in given.items() if value is not None}
    config = from_mapping(RunConfig, apply_overrides(values, set_ or []))
    if resume and config.name is None:
        config = _newest_config(values, set_ or [])
    from trainer.loop import train

    with RichWatcher() as watcher:
        folder = train(config, resume=resume, watcher=watcher)
    console.print(f"run: [bold]{folder}[/bold]   next: trainer eval {folder}")


def _newest_config(values: dict[str, Any], overrides: list[str]) -> Any:
    """``--resume`` without a name: the newest run's own settings, with what was typed on top."""
    from trainer.config import RunConfig, apply_overrides, from_mapping, to_mapping
    from trainer.runs import load_config, newest_run

    saved = to_mapping(load_config(newest_run()))
    return from_mapping(RunConfig, apply_overrides(saved | values, overrides))


def main() -> None:
    """Entry point of the ``trainer`` command."""
    sys.exit(run_app(app))
