"""The `featcache build` command: parse, call, print; heavy imports are late."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

import featcache
from featcache.builder.asked import refuse_other_layout, request_of
from featcache.builder.request import BuildRequest
from featcache.console import amount_text, console, safe
from featcache.console_progress import RichProgress
from featcache.paths import typed
from featcache.settings import Given, takes

if TYPE_CHECKING:
    from featcache.builder.pipeline import Stage

# Imports inside the command: the rooms that it calls load numpy or torch, which `featcache --help` does without.


@takes(BuildRequest)
def build(
    given: Given,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Print each stage's rate, and how far a fast --decode is from the exact one. \\[default: off]",
        ),
    ] = False,
    remember: Annotated[
        bool,
        typer.Option(
            "--remember/--no-remember",
            help="Note in ~/.cache/featcache, for inspect, eval and analyze, where the images lie. \\[default: --remember]",
            show_default=False,
        ),
    ] = True,
) -> None:
    """Encode images into a cache, continue a build, or add features (--into).

    [dim]Example: featcache build --encoder dinov2-b --vae-levels G3,G4[/dim]
    """
    request = request_of(given)
    refuse_other_layout(given)
    from featcache.builder import pipeline, run

    meter = pipeline.Meter()
    with RichProgress() as progress:
        result = run.build(request, progress, meter=meter)
    if profile and result.encoded:
        console.print_table(_stage_table(result.stages))
        if result.first and request.decode not in (None, "pil"):
            _say_difference(request.data, result.path, request.decode)
    if not result.first:
        return
    if remember:
        from featcache.sources import remembered

        remembered.remember(featcache.open(result.path).manifest.dataset.fingerprint, request.data)
    if not result.encoded:
        console.print(f"{safe(result.path)} is complete already: nothing to encode")
    if result.skipped:
        console.print(f"[yellow]skipped {len(result.skipped)} bad images[/yellow], recorded in the manifest")
    images = result.count - len(result.skipped)
    console.print(
        f"cache: [bold]{safe(result.path)}[/bold]   ({images} images)   next: featcache info {safe(typed(result.path))}"
    )


def _stage_table(stages: Mapping[str, Stage]) -> Table:
    """What each stage could do alone, slowest first."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("stage", "images/s", "ms per image", "lanes", "images"):
        table.add_column(title, justify="left" if title == "stage" else "right")
    for name, stage in sorted(stages.items(), key=lambda item: item[1].images_per_s):
        milliseconds = 1000 * stage.busy_s / max(1, stage.images)
        table.add_row(
            name, amount_text(stage.images_per_s), f"{milliseconds:.3g}", str(stage.lanes), f"{stage.images:,}"
        )
    return table


def _say_difference(data: str, path: Path, decoder: str) -> None:
    """How far the fast decoder is from the exact one on up to 32 of the cache's images."""
    from featcache.sources import base, difference, open

    dataset = featcache.open(path).manifest.dataset
    resolution = dataset.resolution
    source = open.open_source(data, resolution=resolution)
    order = base.sample_order(len(source), seed=dataset.order_seed)[: min(32, dataset.count)]
    found = difference.difference(source, [int(i) for i in order], resolution, decoder)
    console.print(
        f"--decode {safe(decoder)} against pil on {found.images} images: {found.mean:.3g} grey levels on average, "
        f"{found.largest} at most, {found.psnr_db:.1f} dB"
    )
