"""The `featcache build` command: parse, call, print; heavy imports are late."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import featcache
from featcache.build.request import BuildRequest
from featcache.console import console, safe
from featcache.settings import Given, from_typed, takes

# Imports inside the command: the rooms that it calls load numpy or torch, which `featcache --help` does without.


@takes(BuildRequest)
def build(
    given: Given,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Print each stage's rate, and how far a fast --decode is from the exact one."),
    ] = False,
) -> None:
    """Encode images into a cache, continue a build, or add features (--into).

    [dim]Example: featcache build --encoder dinov2-b --vae-levels G3,G4[/dim]
    """
    request = request_of(given)
    from featcache.build import pipeline, run
    from featcache.progress import RichProgress, stage_table

    meter = pipeline.Meter()
    with RichProgress(meter) as progress:
        result = run.build(request, progress, meter=meter)
    if profile and result.encoded:
        console.print(stage_table(result.stages))
        if result.first and request.decode not in (None, "pil"):
            _say_difference(request.data, result.path, request.decode)
    if not result.first:
        return
    if not result.encoded:
        console.print(f"{safe(result.path)} is complete already: nothing to encode")
    if result.skipped:
        console.print(f"[yellow]skipped {len(result.skipped)} bad images[/yellow], recorded in the manifest")
    images = result.count - len(result.skipped)
    console.print(
        f"cache: [bold]{safe(result.path)}[/bold]   ({images} images)   next: featcache info {safe(result.path)}"
    )


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


def request_of(given: Given) -> BuildRequest:
    """What was typed, with the images found by convention where none are named."""
    from featcache.sources.open import find_data

    data, into = given.get("data"), given.get("into")
    return from_typed(BuildRequest, {**given, "data": find_data(data, into=into)})
