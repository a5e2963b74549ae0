"""What `featcache info` prints, and `featcache inspect` beside its picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from featcache.console import console, safe, size_text
from featcache.console_progress import RichProgress
from featcache.errors import UserError
from featcache.read.captions import has_captions
from featcache.read.reader import Cache
from featcache.share import records as verified
from featcache.store.manifest import Manifest
from featcache.store.remote import is_remote
from featcache.store.root import cache_digest


def _last_verification(cache: Cache, place: str) -> str:
    """The latest verification on record, in a line."""
    try:
        found = verified.last(place)
    except UserError as error:
        return f"[yellow]{safe(error.what)}[/yellow]"
    return "never (on record)" if found is None else safe(found.words(cache.manifest))


def _empty_texts(manifest: Manifest) -> str:
    """Which text features lack the text of '', which guidance needs; nothing where there are no text features."""
    texts = [spec for spec in manifest.features.values() if has_captions(spec) and spec.codec != "raw"]
    without = [spec.name for spec in texts if spec.empty is None]
    if without:
        return f"; no text of '' with {safe(', '.join(without))}"
    return "; text of '' kept" if texts else ""


def print_info(cache: Cache, place: str | None = None) -> None:
    """Dataset, last verification, VAE, then one line per feature with its layout, codec, size and origin.

    place: the path or URL that the cache was opened by.
    """
    manifest, dataset = cache.manifest, cache.manifest.dataset
    console.print(f"[bold]{safe(cache.path)}[/bold]   fingerprint {cache.fingerprint[:16]}")
    console.print(f"digest {cache_digest(manifest)}")
    console.print(
        f"{len(cache)} images of {len(dataset.class_names)} classes from {safe(dataset.source)}; "
        f"{safe(dataset.preprocessing.get('resolution', '?'))} px {safe(dataset.preprocessing.get('crop', ''))}; "
        f"shards of {manifest.shard_size}; order seed {dataset.order_seed}"
        + ("; mirrored view" if dataset.flip else "")
    )
    console.print(f"verified: {_last_verification(cache, place or str(cache.path))}")
    if dataset.vae:
        console.print(
            f"VAE {safe(dataset.vae['name'])}: {dataset.vae['latent_channels']} channels, 1/{dataset.vae['downsampling']} size, "
            f"scale {dataset.vae['scaling_factor']:g}"
        )
    if "text/count" in manifest.features:
        captions = manifest.features["text/count"].provenance["captions"]
        console.print(
            f"captions: {safe(captions['from'])}; up to {safe(captions['per_image'])} per image{_empty_texts(manifest)}"
        )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("feature", "shape", "codec", "per image", "total", "weights"):
        table.add_column(title, justify="right" if title in ("per image", "total") else "left", no_wrap=True)
    for name, spec in manifest.features.items():
        size = spec.bytes_per_sample
        origin = spec.provenance
        weights = safe(origin.get("weights", ""))
        if weights == "random":
            weights = f"[yellow]RANDOM, seed {safe(origin.get('seed'))}[/yellow]"
        elif "sha256" in origin:
            weights += f"  {safe(str(origin['sha256'])[:12])}"
        table.add_row(
            safe(name),
            spec.shape_text,
            spec.stored_as,
            size_text(size),
            size_text(size * dataset.count),
            weights,
        )
    console.print_table(table)
    for entry in manifest.skipped:
        console.print(f"[yellow]skipped[/yellow] {safe(entry.key)}: {safe(entry.reason)}")


def save_picture(cache: Cache, out: Path, *, data: str | None, count: int, weights_dir: Path | None) -> None:
    """Draws the picture of `featcache inspect` and says where it is, and what its first column shows."""
    from featcache.inspect import draw_sheet, find_source, has_random_latents, save_sheet  # late: they load torch

    source = find_source(cache, data)
    if source is None and has_random_latents(cache):
        console.print(
            "the images are not at hand (--data, $FEATCACHE_DATA), and the latents are of a VAE with random weights, which "
            "would decode them to noise: no images are drawn"
        )
    elif source is None:
        console.print("the images are not at hand (--data, $FEATCACHE_DATA): latents are decoded instead")
    with RichProgress() as progress:
        sheet = draw_sheet(cache, source, count=count, weights_dir=weights_dir, progress=progress)
    save_sheet(sheet, out)
    console.print(f"picture: [bold]{safe(out)}[/bold]")


# Beyond these a layer teaches little: a copy of the one before, a handful of directions, one constant vector.
ALIKE, FEW_DIRECTIONS, MOSTLY_MEAN = 0.99, 8.0, 0.5
IMAGES_ELSEWHERE = 64


def print_layers(cache: Cache) -> None:
    """One line per layer of tokens: size, share of the mean vector, effective rank, likeness to the layer before."""
    from featcache.inspect import has_tokens, layer_names  # late: they load torch
    from featcache.read.statistics import IMAGES, layer_statistics

    names = [name for name, spec in cache.manifest.features.items() if has_tokens(name, spec.shape)]
    if not names:
        return
    # Elsewhere each image is some blocks of 1 MiB to fetch, of each feature.
    images = min(IMAGES_ELSEWHERE if is_remote(cache.path) else IMAGES, len(cache))
    console.print(f"layers, from {images} images:")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("layer", "channels", "rms", "mean share", "effective rank", "cosine to the layer before"):
        table.add_column(title, justify="left" if title == "layer" else "right", no_wrap=True)
    poor = False
    for name, found in layer_statistics(cache, names, images=images).items():
        layers = [f" {layer}" for layer in layer_names(cache, name)] if name.startswith("vae/") else [""]
        columns = (found.rms, found.mean_share, found.effective_rank, found.neighbour)
        for layer, rms, share, rank, cosine in zip(layers, *(column.tolist() for column in columns)):
            few = rank < min(FEW_DIRECTIONS, found.mean.shape[-1] / 2)
            marks = (False, share > MOSTLY_MEAN, few, cosine >= ALIKE)
            poor = poor or any(marks)
            figures = (f"{rms:.3g}", f"{share:.2f}", f"{rank:.1f}", "" if math.isnan(cosine) else f"{cosine:.4f}")
            cells: Sequence[str] = [f"[yellow]{f}[/yellow] *" if mark else f for f, mark in zip(figures, marks)]
            table.add_row(safe(name + layer), str(found.mean.shape[-1]), *cells)
    console.print_table(table)
    if poor:
        console.print(
            "[yellow]*[/yellow] most of the tokens is one constant vector, or few directions are used, or a layer repeats "
            "the one before. AHPA has little to align with there; try --set ahpa.normalize=whiten (docs/methods.md)."
        )
