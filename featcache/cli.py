"""``featcache``: build, look at, check and share feature caches. Thin: parse, call, print; heavy imports are late."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from featcache import commands
from featcache.console import console, run_app

app = typer.Typer(
    name="featcache",
    help="Encode an image dataset once into a feature cache that trainers stream.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

CachePath = Annotated[Path, typer.Argument(help="Folder of the cache.", show_default=False)]
Data = Annotated[
    str | None,
    typer.Option(help="Image folder (one folder a class), or 'shapes' for the embedded set. Default: $FEATCACHE_DATA, else ./data/imagenet."),
]


@app.command()
def build(
    data: Data = None,
    encoder: Annotated[
        list[str] | None, typer.Option(help="Encoder, with layers after @: dinov2-b, dinov2-b@9,11, tiny. Repeatable.")
    ] = None,
    vae: Annotated[str | None, typer.Option(help="sd-ft-ema (default), sd-ft-mse, or tiny (default with --encoder tiny).")] = None,
    vae_levels: Annotated[str | None, typer.Option(help="VAE encoder groups to keep, e.g. G3,G4 for AHPA.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Side of the crop in pixels. [default: 256; 64 for shapes]")] = None,
    limit: Annotated[int | None, typer.Option(help="Encode only so many images, a seeded random choice.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the new cache. [default: ./caches/<name from what is built>]")] = None,
    into: Annotated[Path | None, typer.Option(help="Existing cache to add features to.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images an encoder sees at once.")] = 16,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")] = "auto",
    weights_dir: Annotated[Path | None, typer.Option(help="Folder with pretrained weights, searched before the hub.")] = None,
    random_weights: Annotated[int | None, typer.Option(help="Seed of random encoder weights, to try things out without pretrained ones.")] = None,
    on_bad_image: Annotated[str, typer.Option(help="fail, or skip (recorded in the manifest).")] = "fail",
    final_norm: Annotated[str, typer.Option(help="Encoder's final norm on: all cached layers, last, none, auto.")] = "auto",
    moments_codec: Annotated[str, typer.Option(help="fp32 or fp16.")] = "fp16",
    levels_codec: Annotated[str, typer.Option(help="fp32, fp16, bf16, int8, fp8 or int4.")] = "int8",
    tokens_codec: Annotated[str, typer.Option(help="fp32, fp16, bf16, int8, fp8 or int4.")] = "int8",
    flip: Annotated[bool, typer.Option("--flip", help="Also cache mirrored copies, as a second view.")] = False,
    shard_size: Annotated[int | None, typer.Option(help="Samples a shard. [default: by size]")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples' order.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Decoding threads. [default: one a core]")] = None,
) -> None:
    """Encode images into a cache, continue a build, or add features (--into).

    [dim]Example: featcache build --encoder dinov2-b --vae-levels G3,G4[/dim]
    """
    from featcache.encoders import parse_encoders, parse_levels
    from featcache.images import find_data

    encoders, levels, data = parse_encoders(encoder or []), parse_levels(vae_levels), find_data(data)
    from featcache import build as builder
    from featcache.progress import RichProgress

    request = builder.BuildRequest(
        data=data,
        encoders=encoders,
        vae=vae,
        levels=levels,
        resolution=resolution,
        limit=limit,
        batch_size=batch_size,
        device=device,
        weights_dir=weights_dir,
        random_weights=random_weights,
        on_bad_image=on_bad_image,
        final_norm=final_norm,
        out=out,
        into=into,
        codecs={"moments": moments_codec, "levels": levels_codec, "tokens": tokens_codec},
        flip=flip,
        shard_size=shard_size,
        seed=seed,
        workers=workers,
    )
    with RichProgress() as progress:
        result = builder.build(request, progress)
    if not result.encoded:
        console.print(f"{result.path} is complete already: nothing to encode")
    if result.skipped:
        console.print(f"[yellow]skipped {len(result.skipped)} bad images[/yellow], recorded in the manifest")
    console.print(f"cache: [bold]{result.path}[/bold]   ({result.count - len(result.skipped)} images)   next: featcache info {result.path}")


@app.command()
def info(cache: CachePath) -> None:
    """Print what a cache holds and where it came from."""
    import featcache
    from featcache.describe import print_info

    print_info(featcache.open(cache))


@app.command()
def inspect(
    cache: CachePath,
    out: Annotated[Path | None, typer.Option(help="PNG to write. [default: <cache name>.png]")] = None,
    data: Data = None,
    count: Annotated[int, typer.Option(help="Number of samples.", min=1, max=64)] = 6,
) -> None:
    """Draw samples of a cache: the image, and PCA-RGB of each cached layer."""
    import featcache
    from featcache.inspect import save_sheet

    opened = featcache.open(cache)
    target = out or Path(f"{cache.resolve().name}.png")
    save_sheet(opened, target, data=data, count=count)
    console.print(f"picture: [bold]{target}[/bold]")


commands.register(app)


def main() -> None:
    """Entry point of the ``featcache`` command."""
    sys.exit(run_app(app))
