"""Latents that people already have, as caches: no encoding again, and no pretending about where they come from.

Five layouts (of the public code; each states what its numbers are):

- `repa`: a folder of `.npy` `[2C, h, w]` float32, mean then *standard deviation* of SD-VAE's posterior for
  pixels in [-1, 1], with `dataset.json` holding `{"labels": [[file, label], ...]}`; the folder itself or its
  parent with `vae-sd/` in it.
- `edm2`: the same files, folder or `.zip`, but made from pixels in **[0, 1]**. Their posterior is another
  one: the manifest says `pixel_range: [0, 1]`, and a decoder's output is in that range.
- `lightningdit`: a folder of `.safetensors` with `latents` and `latents_flip` `[n, C, h, w]` (one *sample*
  each of the posterior, unscaled; the second mirrored) and `labels` `[n]`; `latents_stats.pt` holds mean and
  std by channel.
- `irepa`: a folder that `datasets` saved (`.arrow` files, `state.json`), column `data` `[2C, h, w]`, mean then standard
  deviation; labels in `imagenet_train_labels.txt` or the images' data set beside it.
- `repae`: an `.h5` file with REPA's files in it.

What a cache stores is mean and log-variance. A standard deviation converts exactly (up to the codec); a
sample has lost its posterior and is stored as a mean with log-variance -30, so that drawing from it gives
the sample back.

An export of `featcache.share.exporters` brings its keys, class names and VAE along (`featcache.share.exported`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from featcache.codecs import encode, numpy_view
from featcache.errors import UserError
from featcache.keys import key_bytes, printable
from featcache.progress import QUIET, Progress
from featcache.read.order import epoch_order
from featcache.share.latents import Latents, NpyLatents, SafetensorsLatents
from featcache.share.repae import ArrowLatents, H5Latents
from featcache.store.layout import recommended_shard_size
from featcache.store.manifest import DatasetSpec, FeatureSpec, Manifest
from featcache.store.writers import create_writer

LAYOUTS = ("repa", "edm2", "lightningdit", "irepa", "repae")


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """What `featcache import` was asked for.

    layout: one of `LAYOUTS`. codec: of the moments. vae: name of the VAE that made the latents, where it is
    not the layout's usual one. statistics: file with the channels' mean and std, for `irepa` and `repae`. order_seed: of the permutation of samples.
    """

    source: Path
    out: Path
    layout: str
    codec: str = "fp16"
    vae: str | None = None
    statistics: Path | None = None
    name: str | None = None
    class_names: tuple[str, ...] | None = None
    order_seed: int = 0
    shard_size: int | None = None


def open_latents(path: Path, layout: str, *, vae: str | None = None, statistics: Path | None = None) -> Latents:
    """The latents at `path`; raises `UserError` for an unknown layout or files that do not follow it."""
    if layout not in LAYOUTS:
        raise UserError(f"there is no layout {layout!r}", remedy=f"use one of {', '.join(LAYOUTS)}")
    if layout in ("irepa", "repae"):
        return (ArrowLatents if layout == "irepa" else H5Latents)(path, vae, statistics)
    if statistics is not None:
        raise UserError(
            f"--statistics is for irepa and repae: {layout} has its own",
            remedy="Leave it out, or put latents_stats.pt there.",
        )
    return SafetensorsLatents(path, layout, vae) if layout == "lightningdit" else NpyLatents(path, layout, vae)


def import_latents(request: ImportRequest, progress: Progress = QUIET) -> Manifest:
    """Turn latents of another project into a cache with `label`, `key` and `vae/moments`; returns its manifest.

    Resumable by shard; `progress` advances with each finished one. The images
    themselves are unknown: the fingerprint is over the latents' names, labels and sizes, so features of
    images cannot be added.

    Raises `UserError` for an unknown layout or files that do not follow it.
    """
    latents = open_latents(Path(request.source), request.layout, vae=request.vae, statistics=request.statistics)
    n, views = len(latents), latents.views
    sample = latents.read(0)
    _, channels, h, w = sample.shape
    n_classes = int(latents.labels.max()) + 1
    exported = latents.exported
    class_names = request.class_names or (exported and exported.class_names) or tuple(str(i) for i in range(n_classes))
    if len(class_names) < n_classes:
        raise UserError(f"there are {n_classes} classes, but only {len(class_names)} names")
    digest = hashlib.sha256(request.layout.encode())
    for i in range(n):
        digest.update(key_bytes(f"{latents.key(i)}\0{latents.labels[i]}\0{latents.signature(i)}\n"))
    dataset = DatasetSpec(
        name=printable(request.name or (exported.name if exported else Path(request.source).name)),
        count=n,
        class_names=class_names,
        fingerprint=digest.hexdigest(),
        preprocessing={
            "resolution": h * latents.vae["downsampling"],
            "crop": "unknown (imported)",
            "decode": "unknown (imported)",
            "available": n,
            "imported_from": request.layout,
        },
        order_seed=request.order_seed,
        flip=views == 2,
        source=f"{request.layout} latents",
        vae=latents.vae,
        grid=max(1, h * latents.vae["downsampling"] // 16),
    )
    longest = max(len(key_bytes(latents.key(i))) for i in range(n))
    provenance = {"imported_from": request.layout} | ({"cache": exported.fingerprint} if exported else {})
    specs = [
        FeatureSpec(name="label", shape=(), codec="raw", dtype="int64", provenance=provenance),
        FeatureSpec(name="key", shape=(longest,), codec="raw", dtype="uint8", provenance=provenance),
        FeatureSpec(
            name="vae/moments",
            shape=(channels, h, w),
            codec=request.codec,
            views=views,
            provenance=latents.provenance | provenance,
        ),
    ]
    shard_size = request.shard_size or min(n, recommended_shard_size(specs[2].bytes_per_sample))
    order = epoch_order(request.order_seed, 0, n)
    with create_writer(request.out, dataset, shard_size=shard_size) as writer:
        writer.begin(specs)
        pending = writer.pending()
        progress.begin("importing", n, done=n - sum(len(writer.slots(s)) for s in pending), unit="samples")
        for shard in pending:
            indices = [order[slot] for slot in writer.slots(shard)]
            keys = np.zeros((len(indices), longest), np.uint8)
            for row, index in enumerate(indices):
                key = key_bytes(latents.key(index))
                keys[row, : len(key)] = np.frombuffer(key, np.uint8)
            moments = np.stack([latents.read(index) for index in indices])  # [n, views, 2C, h, w]
            stored = _encode(moments if views > 1 else moments[:, 0], request.codec)
            writer.write_shard("label", shard, {"": latents.labels[indices]})
            writer.write_shard("key", shard, {"": keys})
            writer.write_shard("vae/moments", shard, stored)
            progress.update(len(indices))
        return writer.finish()


def _encode(values: np.ndarray, codec: str) -> dict[str, np.ndarray]:
    if not np.isfinite(values).all():
        raise UserError("the latents hold values that are not finite", remedy="Make the latents again.")
    return {suffix: numpy_view(tensor) for suffix, tensor in encode(codec, torch.from_numpy(values)).items()}
