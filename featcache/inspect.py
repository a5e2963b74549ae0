"""A picture of a cache: images, and PCA-RGB of every cached level and token layer beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from featcache.encoders.vae import LatentDecoder, load_recorded_vae
from featcache.errors import UserError
from featcache.feature_names import layer_feature
from featcache.read.decoded import read_decoded
from featcache.read.reader import Cache
from featcache.sources.base import Source, fingerprint, sample_order
from featcache.sources.open import find_data, open_source
from featcache.sources.pixels import BadImage
from featcache.sources.shapes import recorded_shapes
from featcache.store import files

THUMB = 128
MARGIN = 6
HEADER = 34
MAX_CHANNELS = 1 << 14


def source_of(cache: Cache, data: str | None) -> Source | None:
    """The images a cache was made from: regenerated for the embedded set, from `data` for a folder; None if unknown.

    Raises `UserError` if `data` holds other images than the cache.
    """
    dataset = cache.manifest.dataset
    resolution = dataset.resolution
    shapes = recorded_shapes(dataset.source)
    if shapes is not None:
        return open_source(shapes[0], resolution=resolution, limit=shapes[1])
    if data is None:
        return None
    source = open_source(data, resolution=resolution)
    order = sample_order(len(source), seed=dataset.order_seed)[: dataset.count]
    if fingerprint(source, order) != dataset.fingerprint:
        raise UserError(
            f"{data} does not hold the images that {cache.path} was made from",
            remedy="Pass the folder it was built from.",
        )
    return source


def images_at_hand(cache: Cache) -> str | None:
    """$FEATCACHE_DATA or ./data/imagenet, where it holds the images that the cache was made from; else None."""
    try:
        found = find_data(None)
        source_of(cache, found)
    except UserError:
        return None
    return found


def images_of(cache: Cache, data: str | None, indices: Sequence[int]) -> np.ndarray:
    """Pixels uint8 [n, R, R, 3] of some samples: the originals where they are to be had, else decoded latents.

    Raises `UserError` if neither the images nor the VAE's weights are here.
    """
    dataset = cache.manifest.dataset
    source = source_of(cache, data)
    if source is not None:
        order = sample_order(len(source), seed=dataset.order_seed)
        slots = cache.slots(np.asarray(indices))
        try:
            return np.stack([source.load(int(order[s]), dataset.resolution)[0] for s in slots])
        except BadImage as error:
            raise UserError(f"{error.what}") from error
    return _decoded(cache, indices)


def _decoded(cache: Cache, indices: Sequence[int]) -> np.ndarray:
    cache.require(["vae/moments"])
    dataset, spec = cache.manifest.dataset, cache.manifest.features["vae/moments"]
    if dataset.vae is None:
        raise UserError(
            f"{cache.path} does not say of which VAE its latents are", remedy="Pass the images with --data."
        )
    vae = load_recorded_vae(dataset.vae, spec.provenance)
    moments = read_feature(cache, "vae/moments", indices)
    mean = torch.from_numpy(moments[:, : dataset.vae["latent_channels"]])
    pixels: torch.Tensor = LatentDecoder(vae, dataset.vae, scale=1.0, shift=0.0)(mean)
    return (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def read_feature(cache: Cache, name: str, indices: Sequence[int]) -> np.ndarray:
    """One decoded feature of some samples, float32 [n, *shape] (view 0 of flipped caches)."""
    return torch.cat([batch[name] for batch in read_decoded(cache, [name], indices)]).numpy()


def pca_rgb(tokens: np.ndarray) -> np.ndarray:
    """First three principal components over all tokens of all images as colours. [n, T, C] -> uint8 [n, g, g, 3].

    Components are fitted jointly, so that one colour means one direction in every image; each is stretched between its
    1st and 99th percentile. The sign of a component is chosen so that its largest loading is positive.
    """
    n, T, C = tokens.shape
    flat = np.nan_to_num(tokens.reshape(-1, C).astype(np.float64), posinf=0.0, neginf=0.0)
    flat -= flat.mean(axis=0)
    _, vectors = np.linalg.eigh(flat.T @ flat)
    top = vectors[:, ::-1][:, :3]
    top = top * np.sign(top[np.abs(top).argmax(axis=0), np.arange(top.shape[1])])
    scores = flat @ top
    low, high = np.percentile(scores, [1, 99], axis=0)
    colours: np.ndarray = np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)
    side = round(T**0.5)
    return (colours * 255).round().astype(np.uint8).reshape(n, side, side, 3)


def has_tokens(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a feature is tokens on a square grid, `[T, C]`, or `[L, T, C]` of a group of VAE layers."""
    if len(shape) != (3 if name.startswith("vae/G") else 2) or not (name.startswith("vae/G") or layer_feature(name)):
        return False
    return round(shape[-2] ** 0.5) ** 2 == shape[-2] and 3 <= shape[-1] <= MAX_CHANNELS


def layer_names(cache: Cache, name: str) -> list[str]:
    """Names of a VAE group's layers, their numbers where the cache has no names."""
    spec = cache.manifest.features[name]
    recorded = spec.provenance.get("layers")
    if isinstance(recorded, list) and len(recorded) == spec.shape[0]:
        return [str(layer) for layer in recorded]
    return [str(i) for i in range(spec.shape[0])]


def contact_sheet(cache: Cache, *, data: str | None = None, count: int = 6) -> Image.Image:
    """Rows: samples; columns: the image, then PCA-RGB of each cached layer (levels layer by layer, then tokens)."""
    indices = list(range(min(count, len(cache))))
    if not indices:
        raise UserError(f"{cache.path} holds no images")
    cache.require(["label"])
    title = "image" if source_of(cache, data) is not None else "decoded latent"
    columns: list[tuple[str, np.ndarray]] = [(title, images_of(cache, data, indices))]
    for name, spec in cache.manifest.features.items():
        if not has_tokens(name, spec.shape):
            continue
        if name.startswith("vae/G"):
            features = read_feature(cache, name, indices)
            columns += [
                (f"{name[4:]} {layer}", pca_rgb(features[:, i])) for i, layer in enumerate(layer_names(cache, name))
            ]
        else:
            columns.append((name, pca_rgb(read_feature(cache, name, indices))))
    labels = cache.labels()[: len(indices)]
    names = cache.manifest.dataset.class_names
    width = len(columns) * (THUMB + MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, HEADER + len(indices) * (THUMB + MARGIN + 14)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for c, (title, pictures) in enumerate(columns):
        x = MARGIN + c * (THUMB + MARGIN)
        group, _, layer = title.partition(" ")
        draw.text((x, 4), group, fill="black", font=font)
        draw.text((x, 18), layer, fill="#555", font=font)
        for r, pixels in enumerate(pictures):
            y = HEADER + r * (THUMB + MARGIN + 14)
            smooth = Image.Resampling.LANCZOS if c == 0 else Image.Resampling.NEAREST
            sheet.paste(Image.fromarray(pixels).resize((THUMB, THUMB), smooth), (x, y))
            if c == 0:
                draw.text(
                    (x, y + THUMB),
                    (names[labels[r]] if 0 <= labels[r] < len(names) else str(labels[r]))[:20],
                    fill="#333",
                    font=font,
                )
    return sheet


def save_sheet(cache: Cache, out: Path, *, data: str | None = None, count: int = 6) -> None:
    """`contact_sheet` into a picture file, whole or not at all; folders are made as needed."""
    sheet = contact_sheet(cache, data=data, count=count)
    files.make_directory(out.parent)
    with files.atomic_file(out, durable=False) as file:
        sheet.save(file, Image.registered_extensions()[out.suffix.lower()])
