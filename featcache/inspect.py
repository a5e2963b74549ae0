"""A picture of a cache: images, and PCA-RGB of every cached level and token layer beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from featcache.console import plain
from featcache.encoders.vae import LatentDecoder, load_recorded_vae
from featcache.errors import UserError
from featcache.feature_names import layer_feature
from featcache.fonts import font_of, has_letters
from featcache.progress import QUIET, Progress
from featcache.read.decoded import read_decoded
from featcache.read.reader import Cache
from featcache.sources.base import Source, fingerprint, sample_order
from featcache.sources.captions import MemberCaptions, ShapesTextCaptions, open_captions
from featcache.sources.decoders import exact_loader
from featcache.sources.embedded import recorded_embedded
from featcache.sources.open import find_data, open_source
from featcache.sources.pixels import BadImage
from featcache.sources.remembered import recall
from featcache.store import files

TILES = (64, 128)  # pixels of a tile's side, from and to
WIDEST = 1500  # pixels of a sheet, about: a screen shows it with legible letters; more columns go below
HEADING, SMALL, LINE = 15, 13, 19  # sizes of letters, height of a line, in pixels
MARGIN = 8
MAX_LETTERS = 200  # of a name that are looked at
LABEL = 128  # width of a class name, at least
MAX_CHANNELS = 1 << 14


def source_of(cache: Cache, data: str | None) -> Source | None:
    """The images a cache was made from: regenerated for the embedded set, from `data` for a folder; None if unknown.

    Raises `UserError` if `data` holds other images than the cache.
    """
    dataset = cache.manifest.dataset
    resolution = dataset.resolution
    shapes = recorded_embedded(dataset.source)
    if shapes is not None:
        return open_source(shapes[0], resolution=resolution, limit=shapes[1])
    if data is None:
        return None
    source = open_source(data, resolution=resolution)
    order = sample_order(len(source), seed=dataset.order_seed)[: dataset.count]
    if fingerprint(source, order) != dataset.fingerprint:
        raise UserError(
            f"{data} does not hold the images that {cache.path} was made from",
            remedy="Pass those it was built from: --data DIR.",
        )
    return source


def find_source(cache: Cache, data: str | None) -> Source | None:
    """As `source_of`; without `data` also $FEATCACHE_DATA, ./data/imagenet or where they lay when the cache was built, if
    the cache's images are there."""
    found = find_images(cache, data)
    return None if found is None else found[1]


def find_images(cache: Cache, data: str | None) -> tuple[str | None, Source] | None:
    """What `find_source` finds, and where: the place may be passed as `data` again. The embedded set needs none."""
    if recorded_embedded(cache.manifest.dataset.source) is not None:
        data = None
    elif data is None:
        for place in (find_data, lambda _: recall(cache.manifest.dataset.fingerprint)):
            with contextlib.suppress(UserError):
                where = place(None)
                if (source := source_of(cache, where)) is not None:
                    return where, source
        return None
    source = source_of(cache, data)
    return None if source is None else (data, source)


def images_of(cache: Cache, data: str | None, indices: Sequence[int]) -> np.ndarray:
    """`pixels_of` with the images that `source_of` finds; raises as both."""
    return pixels_of(cache, source_of(cache, data), indices)


def pixels_of(
    cache: Cache, source: Source | None, indices: Sequence[int], *, weights_dir: Path | None = None
) -> np.ndarray:
    """Pixels uint8 [n, R, R, 3] of some samples: the originals, else (no source) decoded latents.

    Raises `UserError` if neither the images nor the VAE's weights are here.
    """
    dataset = cache.manifest.dataset
    if source is not None:
        order = sample_order(len(source), seed=dataset.order_seed)
        slots = cache.slots(np.asarray(indices))
        try:
            how = exact_loader(dataset.preprocessing.get("crop"))
            return np.stack([source.load(int(order[s]), dataset.resolution, how)[0] for s in slots])
        except BadImage as error:
            raise UserError(f"{error.what}") from error
    return _decoded(cache, indices, weights_dir)


def find_captions(cache: Cache, indices: Sequence[int]) -> list[tuple[str, ...]] | None:
    """The captions of some samples, in the order in which their texts were encoded; a sample may have none.

    A cache keeps what an encoder says of captions, not their letters. So these are those of the cache's images, found as
    `find_source` does, if it was built from them: None where it holds no texts, where they came from a table, or where
    they are not there, or not the same, any more.
    """
    spec = cache.manifest.features.get("text/count")
    recorded = {} if spec is None else spec.provenance["captions"]
    if not str(recorded.get("from", "")).startswith((ShapesTextCaptions.description, MemberCaptions.kind)):
        return None  # before images are listed that have none
    try:
        source = find_source(cache, None)
        captions = None if source is None else open_captions(source, table=None, key=recorded["key"])
        if source is None or captions is None or captions.identity != recorded["identity"]:
            return None
        order = sample_order(len(source), seed=cache.manifest.dataset.order_seed)
        return [captions.of(int(order[slot]))[: recorded["per_image"]] for slot in cache.slots(np.asarray(indices))]
    except UserError:
        return None


def _decoded(cache: Cache, indices: Sequence[int], weights_dir: Path | None) -> np.ndarray:
    cache.require(["vae/moments"])
    dataset, spec = cache.manifest.dataset, cache.manifest.features["vae/moments"]
    if dataset.vae is None:
        raise UserError(
            f"{cache.path} does not say of which VAE its latents are", remedy="Pass the images with --data."
        )
    vae = load_recorded_vae(dataset.vae, spec.provenance, weights_dir)
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
    """`draw_sheet` with the images that `source_of` finds; raises as both."""
    return draw_sheet(cache, source_of(cache, data), count=count)


def has_random_latents(cache: Cache) -> bool:
    """Whether the latents come from a VAE with random weights, so that decoding them would show noise."""
    moments = cache.manifest.features.get("vae/moments")
    return moments is not None and moments.provenance.get("weights") == "random"


def draw_sheet(
    cache: Cache, source: Source | None, *, count: int = 6, weights_dir: Path | None = None, progress: Progress = QUIET
) -> Image.Image:
    """Rows: samples; columns: the image, then PCA-RGB of each cached layer (levels layer by layer, then tokens).

    Tiles are as large as the images, within `TILES`, and whole pixels for each token; columns that are too many for one
    line go below the others, again beside the images. Without a source the first column
    shows decoded latents, or nothing but the classes' names where those are noise (`has_random_latents`).

    Raises `UserError` for an empty cache, and as `pixels_of`.
    """
    indices = list(range(min(count, len(cache))))
    if not indices:
        raise UserError(f"{cache.path} holds no images")
    cache.require(["label"])
    columns = [_first_column(cache, source, indices, weights_dir, progress)]
    shown = [name for name, spec in cache.manifest.features.items() if has_tokens(name, spec.shape)]
    progress.begin("reading layers", len(shown), unit="features")
    for name in shown:
        features = read_feature(cache, name, indices)
        if name.startswith("vae/G"):
            layers = layer_names(cache, name)
            columns += [([name[4:], *layer.split(".")], pca_rgb(features[:, i])) for i, layer in enumerate(layers)]
        else:
            columns.append((name.split("."), pca_rgb(features)))
        progress.update(1)
    names = cache.manifest.dataset.class_names
    labels = [int(label) for label in cache.labels()[: len(indices)]]
    labels_or_keys = (
        [names[label] if 0 <= label < len(names) else str(label) for label in labels],
        [f"class {label}" for label in labels],
    )
    side = min(max(cache.manifest.dataset.resolution, TILES[0]), TILES[1])
    first, *rest = columns
    bands = max(1, -(-len(rest) // max(1, (WIDEST - LABEL) // (side + MARGIN))))
    each = max(1, -(-len(rest) // bands))
    return _stacked(
        [_drawn([first, *rest[i : i + each]], *labels_or_keys, side=side) for i in range(0, len(rest) or 1, each)]
    )


def _stacked(bands: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (max(band.width for band in bands), sum(band.height for band in bands)), "white")
    y = 0
    for band in bands:
        sheet.paste(band, (0, y))
        y += band.height
    return sheet


Column = tuple[Sequence[str], np.ndarray | None]
"""Lines of its heading, and uint8 [n, h, w, 3]."""


def _first_column(
    cache: Cache, source: Source | None, indices: Sequence[int], weights_dir: Path | None, progress: Progress
) -> Column:
    if source is None and has_random_latents(cache):
        return ["class"], None
    title, task = (["image"], "reading images") if source is not None else (["decoded", "latent"], "decoding latents")
    progress.begin(task, len(indices))
    tiles = []
    for index in indices:
        tiles.append(pixels_of(cache, source, [index], weights_dir=weights_dir))
        progress.update(1)
    return title, np.concatenate(tiles)


def _drawn(columns: Sequence[Column], labels: Sequence[str], keys: Sequence[str], *, side: int) -> Image.Image:
    """The sheet: tiles of `side` pixels, `labels` below those of the first column, or `keys` where no font has a label's
    letters."""
    heading, small = font_of("", HEADING), font_of("", SMALL)
    headed = [([_cut(text, heading, LABEL) for text in heads], pictures) for heads, pictures in columns]
    lines = max(len(heads) for heads, _ in headed)
    widths = [
        max([side, *(round((small if i else heading).getlength(text)) for i, text in enumerate(heads))])
        for heads, _ in headed
    ]
    widths[0] = max(widths[0], LABEL)
    above, below = MARGIN + lines * LINE, LINE + MARGIN
    width, height = sum(widths) + MARGIN * (len(widths) + 1), above + len(labels) * (side + below)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    x = MARGIN
    for (heads, pictures), wide in zip(headed, widths):
        for i, text in enumerate(heads):
            draw.text((x, MARGIN + i * LINE), text, fill="#555" if i else "black", font=small if i else heading)
        for r, pixels in enumerate(() if pictures is None else pictures):
            sheet.paste(_tile(pixels, side), (x, above + r * (side + below)))
        x += wide + MARGIN
    for r, (label, key) in enumerate(zip(labels, keys)):
        label = label[:MAX_LETTERS]
        font = font_of(plain(label), SMALL)
        text = label if has_letters(font, plain(label)) else key
        draw.text((MARGIN, above + r * (side + below) + side), _cut(text, font, widths[0]), fill="#333", font=font)
    return sheet


def _tile(pixels: np.ndarray, side: int) -> Image.Image:
    """A picture in a tile: images are made smaller smoothly, tokens enlarged by a whole number, so that each is a square."""
    h, _, _ = pixels.shape
    if h > side:
        return Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)
    whole = side // h * h
    return Image.fromarray(np.ascontiguousarray(pixels)).resize((whole, whole), Image.Resampling.NEAREST)


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """`text`, or as much of its beginning as fits, with dots behind it."""
    text = " ".join(plain(text[:MAX_LETTERS]).split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def save_sheet(sheet: Image.Image, out: Path) -> None:
    """A sheet into a picture file, whole or not at all; folders are made as needed."""
    files.make_directory(out.parent)
    with files.atomic_file(out, durable=False) as file:
        sheet.save(file, Image.registered_extensions()[out.suffix.lower()])
