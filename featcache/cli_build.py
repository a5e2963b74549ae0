"""The `featcache build` command: parse, call, print; heavy imports are late."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featcache.console import console, safe
from featcache.errors import UserError

_SOURCES = (
    "Images: a folder (one folder a class), a .tar or .zip, webdataset shards, parquet files, s3:// or hf:// shards, "
    "or 'shapes' for the embedded set. Default: $FEATCACHE_DATA, else ./data/imagenet."
)
_CODECS = "fp32, fp16, bf16, int8, fp8 or int4."


def build(
    data: Annotated[str | None, typer.Option(help=_SOURCES)] = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(help="Encoder, with layers after @: dinov2-b, dinov2-b@9,11, tiny, my.py:name. Repeatable."),
    ] = None,
    vae: Annotated[
        str | None, typer.Option(help="VAE or folder of one. [default: sd-ft-ema; tiny with --encoder tiny]")
    ] = None,
    vae_levels: Annotated[str | None, typer.Option(help="VAE encoder groups to keep, e.g. G3,G4 for AHPA.")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Text encoder over captions: clip-l, tiny (docs/encoders.md). Repeatable.")
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(help="CSV with columns key and captions. [default: webdataset's .txt or .json, shapes' own]"),
    ] = None,
    caption_key: Annotated[
        str | None, typer.Option(help="Key of the captions in webdataset's .json. [default: .txt, caption, ...]")
    ] = None,
    captions_per_image: Annotated[
        int | None, typer.Option(help="How many captions to keep. [default: as many as the image with the most]")
    ] = None,
    resolution: Annotated[
        str | None, typer.Option(help="Side of the square crop in pixels. [default: 256; 64 for shapes]")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Encode only so many images, a seeded random choice.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the new cache. [default: ./caches/<name from what is built>]")
    ] = None,
    into: Annotated[Path | None, typer.Option(help="Existing cache to add features to.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images an encoder sees at once.")] = 16,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")] = "auto",
    precision: Annotated[
        str, typer.Option(help="fp32, tf32 or bf16; auto is fp32 on the CPU and tf32 on a GPU.")
    ] = "auto",
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile the encoders. [default: on a GPU]")
    ] = None,
    weights_dir: Annotated[
        Path | None, typer.Option(help="Folder with pretrained weights, searched before the hub.")
    ] = None,
    random_weights: Annotated[
        int | None, typer.Option(help="Seed of random encoder weights, to try things out without pretrained ones.")
    ] = None,
    on_bad_image: Annotated[str, typer.Option(help="fail, or skip (recorded in the manifest).")] = "fail",
    final_norm: Annotated[
        str, typer.Option(help="Encoder's final norm on: all cached layers, last, none, auto (docs/encoders.md).")
    ] = "auto",
    moments_codec: Annotated[str, typer.Option(help="fp32 or fp16.")] = "fp16",
    levels_codec: Annotated[str, typer.Option(help=_CODECS)] = "int8",
    tokens_codec: Annotated[str, typer.Option(help=_CODECS)] = "int8",
    text_codec: Annotated[str, typer.Option(help=_CODECS)] = "fp16",
    flip: Annotated[bool, typer.Option("--flip", help="Also cache mirrored copies, as a second view.")] = False,
    shard_size: Annotated[int | None, typer.Option(help="Samples a shard. [default: by size]")] = None,
    format_: Annotated[str, typer.Option("--format", help="zarr, or wds (webdataset tars).")] = "zarr",
    compressor: Annotated[str | None, typer.Option(help="zstd or blosc, for zarr. [default: none]")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples' order.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Decoding threads. [default: one a core]")] = None,
    decode: Annotated[
        str | None, typer.Option(help="pil (exact, default), turbo or nvjpeg (faster; docs/sources.md).")
    ] = None,
    engine: Annotated[str, typer.Option(help="local (also under torchrun), or ray (docs/clusters.md).")] = "local",
    schedule: Annotated[
        str, typer.Option(help="How torchrun's ranks share shards: dynamic (the next free one) or static.")
    ] = "dynamic",
    ray_workers: Annotated[
        int | None, typer.Option(help="Ray actors. [default: one a GPU of the cluster, or a core]")
    ] = None,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Print each stage's rate, and how far a fast --decode is from the exact one."),
    ] = False,
) -> None:
    """Encode images into a cache, continue a build, or add features (--into).

    [dim]Example: featcache build --encoder dinov2-b --vae-levels G3,G4[/dim]
    """
    from featcache.encoders import parse_encoders, parse_levels
    from featcache.images import find_data

    encoders, levels = parse_encoders(encoder or []), parse_levels(vae_levels)
    data = find_data(data, into=into)
    side = parse_resolution(resolution)
    from featcache import build as builder
    from featcache.pipeline import Meter
    from featcache.progress import RichProgress, stage_table

    request = builder.BuildRequest(
        data=data,
        encoders=encoders,
        vae=vae,
        levels=levels,
        resolution=side,
        limit=limit,
        batch_size=batch_size,
        device=device,
        precision=precision,
        compile=compile,
        weights_dir=weights_dir,
        random_weights=random_weights,
        on_bad_image=on_bad_image,
        final_norm=final_norm,
        out=out,
        into=into,
        codecs={"moments": moments_codec, "levels": levels_codec, "tokens": tokens_codec, "text": text_codec},
        flip=flip,
        shard_size=shard_size,
        format=format_,
        compressor=compressor,
        seed=seed,
        workers=workers,
        decode=decode,
        engine=engine,
        ray_workers=ray_workers,
        texts=parse_names(text),
        captions=captions,
        caption_key=caption_key,
        captions_per_image=captions_per_image,
        schedule=schedule,
    )
    meter = Meter()
    with RichProgress(meter) as progress:
        result = builder.build(request, progress, meter=meter)
    if profile and result.encoded:
        console.print(stage_table(result.stages))
        if result.first and decode not in (None, "pil"):
            _say_difference(data, result.path, decode)
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
    import featcache
    from featcache.build import sample_order
    from featcache.decoders import difference
    from featcache.images import open_source

    dataset = featcache.open(path).manifest.dataset
    resolution = int(dataset.preprocessing["resolution"])
    source = open_source(data, resolution=resolution)
    order = sample_order(len(source), seed=dataset.order_seed)[: min(32, dataset.count)]
    found = difference(source, [int(i) for i in order], resolution, decoder)
    console.print(
        f"--decode {safe(decoder)} against pil on {found.images} images: {found.mean:.3g} grey levels on average, "
        f"{found.largest} at most, {found.psnr_db:.1f} dB"
    )


def parse_names(texts: list[str] | None) -> tuple[str, ...]:
    """``["clip-l,tiny"]`` or ``["clip-l", "tiny"]`` => names, each once."""
    return tuple(dict.fromkeys(name.strip() for text in texts or () for name in text.split(",") if name.strip()))


def parse_resolution(text: str | None) -> int | None:
    """``"256"`` => 256. Raises `UserError` for anything but a number, rectangles among them."""
    if text is None:
        return None
    if not text.isdigit():
        shape = "crops are square, so it is one number" if "x" in text else "it must be a number of pixels"
        raise UserError(f"--resolution {text}: {shape}", remedy="Type --resolution 256 (or 64, 128, 512).")
    return int(text)
