"""`featcache`: build, look at, check and share feature caches. Thin: parse, call, print; heavy imports are late."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import featcache
from featcache.cli import caches as commands
from featcache.cli.build import build
from featcache.console import run_app
from featcache.paths import PICTURES, check_output, last_name, on_this_machine, user_cache

# Imports inside the commands: the rooms that they call load numpy or torch, which `featcache --help` does without.

app = typer.Typer(
    name="featcache",
    help="Encode an image dataset once into a feature cache that trainers stream.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

CachePath = Annotated[str, typer.Argument(help="Folder of the cache, or its URL.", show_default=False)]
Data = Annotated[
    str | None,
    typer.Option(
        help="Image folder (one folder per class), or 'shapes' or 'shapes-text' for an embedded set. "
        "\\[default: $FEATCACHE_DATA, ./data/imagenet, or where they lay when the cache was built]"
    ),
]


app.command()(build)


@app.command()
def info(cache: CachePath) -> None:
    """Print what a cache holds and where it came from."""
    from featcache.cli.info import print_info

    print_info(featcache.open(cache), cache)


@app.command()
def inspect(
    cache: CachePath,
    out: Annotated[
        Path | None, typer.Option(help="PNG to write. \\[default: ~/.cache/featcache/pictures/<cache name>.png]")
    ] = None,
    data: Data = None,
    count: Annotated[int, typer.Option(help="Number of samples.", min=1, max=64)] = 6,
    weights_dir: Annotated[
        Path | None,
        typer.Option(help="Pretrained VAE, to decode latents where images are not at hand. \\[default: the hub]"),
    ] = None,
) -> None:
    """Draw samples of a cache: the image, and PCA-RGB of each cached layer; print what each layer is worth."""
    from featcache.cli.info import print_layers, save_picture

    target = out or user_cache("XDG_CACHE_HOME") / "pictures" / f"{last_name(cache)}.png"
    check_output(target, PICTURES, example="cache.png")
    opened = featcache.open(cache)
    save_picture(opened, target, data=data, count=count, weights_dir=weights_dir)
    print_layers(opened)


@app.command()
def stats(
    cache: CachePath,
    feature: Annotated[str, typer.Option(help="Latents (vae/moments), or tokens such as dinov2-b@11.")] = "vae/moments",
    over: Annotated[str, typer.Option(help="channel, or position: each channel at each place.")] = "channel",
    out: Annotated[
        Path | None, typer.Option(help="File to write, .safetensors. \\[default: <cache name>-<over>.safetensors]")
    ] = None,
) -> None:
    """Compute mean and standard deviation of a feature, for `trainer run --normalization`."""
    from featcache.cli.stats import write_statistics

    write_statistics(cache, feature, over, out)


@app.command()
def derive(
    cache: Annotated[Path, typer.Argument(help="Folder of the cache.", show_default=False, callback=on_this_machine)],
    feature: Annotated[str, typer.Option(help="Tokens to derive of, such as dinov2-b@11.")],
    pca: Annotated[
        int | None,
        typer.Option(
            help="How many principal components of its standardised channels. \\[default: as many as --like or --map has]",
            min=1,
        ),
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="How many images they are found in, or all. \\[default: 10000]")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the images' choice. \\[default: 0]", min=0, max=(1 << 63) - 1)
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(help="Another cache (folder or URL) of whose feature to take the map. \\[default: found anew]"),
    ] = None,
    map: Annotated[
        Path | None,
        typer.Option(help="File with the map: of --save-map, or ReDi's dino_pca_model.pth. \\[default: found anew]"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the new feature. \\[default: <feature>.pca<number>]")
    ] = None,
    save_map: Annotated[
        Path | None, typer.Option(help="File to write the map to, .safetensors. \\[default: none]")
    ] = None,
) -> None:
    """Make a smaller feature of a cache's tokens: its principal components, as ReDi diffuses them.

    [dim]Example: featcache derive caches/NAME --feature dinov2-b@11 --pca 8[/dim]
    """
    from featcache.cli.derive import derive_feature

    derive_feature(
        cache,
        feature,
        components=pca,
        like=like,
        map_file=map,
        images=images,
        seed=seed,
        name=name,
        save=save_map,
    )


commands.register(app)


def main() -> None:
    """Entry point of the `featcache` command."""
    sys.exit(run_app(app))
