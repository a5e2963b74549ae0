"""The trainer's smaller commands: import, export, stats, compare. Thin: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from featcache.console import console, safe
from featcache.console_progress import RichProgress
from featcache.errors import UserError
from featcache.machine import pick_device
from featcache.paths import typed


def import_(
    path: Annotated[Path, typer.Argument(help="Official .pt checkpoint or state dict.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Folder below ./runs. \\[default: the file's name]")] = None,
    weights: Annotated[str, typer.Option(help="ema or model.")] = "ema",
    convention: Annotated[
        str | None, typer.Option(help="repa, sra, sit, dit, lightningdit, reg or redi. \\[default: told from the file]")
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="Cache whose VAE and classes (MMDiT: text) it was trained with. \\[default: ImageNet, and sd-ft-ema or va-vae]"
        ),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="File of mean and std that its latents were normalised by, e.g. latents_stats.pt. \\[default: none, the VAE's factor]"
        ),
    ] = None,
) -> None:
    """Make a run folder from an official SiT, DiT, MMDiT, REPA, SRA, LightningDiT, REG or ReDi checkpoint."""
    from trainer.models.config import takes_text
    from trainer.runs.exchange import import_checkpoint
    from trainer.runs.folder import load_config
    from trainer.sampling.prompts import sample_command

    run = import_checkpoint(path, name=name, weights=weights, convention=convention, cache=cache, statistics=statistics)
    follows = sample_command(run, text=takes_text(load_config(run).model))
    console.print(f"run: [bold]{safe(run)}[/bold]   next: {safe(follows)}")


def export(
    run: Annotated[Path, typer.Argument(help="Folder of the run.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="File to write, e.g. weights.pt.", show_default=False)],
    to: Annotated[
        str | None,
        typer.Option(
            help="Whose code is to load it: repa, sra, sit, dit, lightningdit, reg or redi. "
            "\\[default: repa, or the model's own]"
        ),
    ] = None,
    step: Annotated[int | None, typer.Option(help="Checkpoint or snapshot. \\[default: the latest checkpoint]")] = None,
    weights: Annotated[str, typer.Option(help="Average: ema, ema:DECAY or power:SIGMA_REL, as for sample.")] = "ema",
) -> None:
    """Write a run's averaged weights as a checkpoint that the public code loads."""
    from trainer.runs.exchange import export_checkpoint
    from trainer.runs.folder import STATISTICS, load_config, read_summary

    with RichProgress() as progress:
        written = export_checkpoint(run, out, convention=to, step=step, weights=weights, progress=progress)
    console.print(f"checkpoint: [bold]{safe(written)}[/bold]")
    statistics = ""
    if (normalization := load_config(run).normalization) != "scalar":
        console.print(
            f"[yellow]its latents are normalised by {normalization}[/yellow], and the file does not hold the numbers: whoever "
            f"decodes them needs {safe(run / STATISTICS)}"
        )
        statistics = f" --statistics {typed(run / STATISTICS)}"
    summary = read_summary(run)
    if summary is not None and summary["path"]:
        console.print(
            f"back again: trainer import {safe(typed(out))} --cache {safe(typed(summary['path']))}{safe(statistics)}",
            soft_wrap=True,
        )


def stats(
    images: Annotated[str, typer.Argument(help="Images: npz, folder, tar shards or a cache.", show_default=False)],
    out: Annotated[Path, typer.Option(help="npz file to write.")],
    extractor: Annotated[str, typer.Option(help="inception, dinov2, embedded or embedded-vit.")] = "inception",
    resolution: Annotated[
        int | None, typer.Option(help="Crop a folder's images to this side. \\[default: as they are]", min=1)
    ] = None,
    crop: Annotated[
        Literal["adm", "lanczos-square"],
        typer.Option(help="How to crop them: adm, or lanczos-square (docs/sources.md)."),
    ] = "adm",
    features: Annotated[
        int, typer.Option(help="Activations kept for precision, recall and KID, drawn of all.", min=0)
    ] = 10_000,
    limit: Annotated[
        int | None,
        typer.Option(help="Only so many images: of a folder drawn of all, else the first. \\[default: all]", min=2),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="For a cache: where its images lie. \\[default: $FEATCACHE_DATA, ./data/imagenet, or where they lay when the cache was built]"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at once.", min=1)] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")] = "auto",
    weights_dir: Annotated[
        Path | None, typer.Option(help="Folder with pretrained weights. \\[default: the hub alone]")
    ] = None,
) -> None:
    """Make reference statistics once, to judge many runs by (trainer eval --reference FILE)."""
    from featcache.sources.pixels import CROPS
    from trainer.evaluate.extractors import build_extractor
    from trainer.evaluate.references import write_statistics

    network = build_extractor(extractor, weights_dir=weights_dir, device=pick_device(device))
    with RichProgress() as progress:
        made = write_statistics(
            images,
            out,
            network,
            resolution=resolution,
            crop=CROPS[crop],
            features=features,
            limit=limit,
            batch_size=batch_size,
            data=data,
            progress=progress,
        )
    console.print(f"statistics of {made.count} images: [bold]{safe(out)}[/bold]")


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two or more run folders.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write. \\[default: comparison.html in the first run]")
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Same-noise samples to draw of each run where there are none yet; 0 draws none.", min=0)
    ] = 8,
    device: Annotated[str, typer.Option(help="To draw on: cpu, cuda, cuda:N or auto.")] = "auto",
) -> None:
    """Put runs side by side in one page: samples from the same noise, curves at equal steps and equal time."""
    if len(runs) < 2:
        raise UserError("compare needs at least two runs", remedy="For one run: trainer report RUN")
    console.print(f"page: [bold]{safe(compare_runs(runs, out, samples=samples, device=device))}[/bold]")


def compare_runs(runs: list[Path], out: Path | None, *, samples: int = 8, device: str = "auto") -> Path:
    """The page that compares runs, with what has to be drawn for it."""
    from trainer.report.run import write_run_report
    from trainer.report.same_noise import SameNoise

    with RichProgress() as progress:
        drawing = SameNoise(num=samples, device=pick_device(device), progress=progress) if samples else None
        return write_run_report(runs, out, same_noise=drawing)


def register(app: typer.Typer) -> None:
    """Adds the commands to the application."""
    app.command(name="import")(import_)
    app.command()(export)
    app.command()(stats)
    app.command()(compare)
