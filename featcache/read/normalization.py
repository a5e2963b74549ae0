"""Mean and standard deviation that latents (or tokens) are normalised by, computed from a cache or read from a file.

The convention here is always `x = (z - mean) / std`. Public files say it in three ways, told apart by their names:

| keys | who | meaning |
| --- | --- | --- |
| `mean`, `std` | featcache, LightningDiT (`latents_stats.pt`) | as here |
| `latents_bias`, `latents_scale` | iREPA, REPA-E (`*-latents-stats.pt`) | mean, and 1 / std |
| `mean`, `var` | RAE (`stat.pt`) | mean, and std = sqrt(var + 1e-5) |
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from featcache.errors import CacheError, UserError, first_line
from featcache.feature_names import is_class_token, layer_feature
from featcache.progress import QUIET, Progress
from featcache.read.decoded import read_decoded
from featcache.read.reader import Cache
from featcache.store import files

Over = Literal["channel", "position"]
OVER: tuple[Over, ...] = ("channel", "position")
MOMENTS = "vae/moments"
LOGVAR_RANGE = (-30.0, 20.0)  # diffusers' clamp of a posterior's log-variance
RAE_EPSILON = 1e-5
DEAD = 1e-6  # of the largest standard deviation: what is less is rounding
MAX_FILE_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """mean, std: float32, `[C, 1, 1]` of each channel or `[C, h, w]` of each position as well, for latents; `[C]` or
    `[T, C]` for tokens, `[C]` for a class token. feature, fingerprint, count: of the cache they were computed from, None where a file does not
    say.
    """

    mean: Tensor
    std: Tensor
    feature: str | None = None
    fingerprint: str | None = None
    count: int | None = None

    @property
    def over(self) -> Over:
        """What they were taken over."""
        spread = self.mean.shape[1:] if self.mean.ndim == 3 else self.mean.shape[:-1]
        return "position" if any(side > 1 for side in spread) else "channel"


def compute(cache: Cache, feature: str, over: Over, *, progress: Progress = QUIET) -> Statistics:
    """Statistics of all images of a cache in one pass, sums in float64; both views of a flipped cache count.

    Of `vae/moments` they are those of latents drawn from the posterior, exactly: the variance is that of the means plus
    the mean of the variances. The variance is divided by the number of values.

    Raises `CacheError` if the cache lacks the feature or holds values that are not finite, `UserError` for a feature that
    is neither moments nor tokens nor a class token.
    """
    cache.require([feature])
    spec = cache.manifest.features[feature]
    shape = tuple(spec.shape)
    moments = feature == MOMENTS
    if not moments and len(shape) != 2 and not is_class_token(feature):
        raise UserError(
            f"{feature} has the shape {spec.shape_text}: statistics are of {MOMENTS} or of tokens",
            remedy=f"Name one: {', '.join(n for n in cache.manifest.features if n == MOMENTS or layer_feature(n))}",
        )
    if not len(cache):
        raise CacheError(f"{cache.path} holds no images")
    progress.begin(f"statistics of {feature}", len(cache))
    total = squares = spread = torch.zeros(())
    count = 0
    for batch in read_decoded(cache, [feature], np.arange(len(cache)), all_views=True):
        values = batch[feature].double()
        progress.update(len(values) // spec.views)
        if moments:
            values, logvar = values.chunk(2, dim=1)
            spread = spread + logvar.clamp(*LOGVAR_RANGE).exp().sum(0)
        total, squares, count = total + values.sum(0), squares + values.square().sum(0), count + len(values)
    over_axes = () if over == "position" or len(shape) == 1 else (1, 2) if moments else (0,)

    def averaged(sums: Tensor) -> Tensor:
        per_place = sums / count
        return per_place.mean(over_axes, keepdim=moments) if over_axes else per_place

    mean = averaged(total)
    variance = (averaged(squares) - mean.square()).clamp(min=0)
    if moments:
        variance = variance + averaged(spread)
    found = Statistics(
        mean=mean.float(), std=variance.sqrt().float(), feature=feature, fingerprint=cache.fingerprint, count=count
    )
    _check(found, f"{feature} in {cache.path}")
    return found


def save(statistics: Statistics, path: Path) -> None:
    """Writes a safetensors file, whole or not at all; raises `CacheError` where that cannot be."""
    from safetensors.torch import save as serialize

    about = {
        key: str(value)
        for key in ("feature", "fingerprint", "count")
        if (value := getattr(statistics, key)) is not None
    }
    data = serialize({"mean": statistics.mean.contiguous(), "std": statistics.std.contiguous()}, metadata=about)
    files.make_directory(path.parent)
    with files.atomic_file(path) as file:
        file.write(data)


def load(path: Path) -> Statistics:
    """Statistics from a `.safetensors` or PyTorch file, by the names of its keys (see the module).

    Nothing is unpickled but tensors. Raises `UserError` if the file cannot be read or does not hold such a pair.
    """
    try:
        tensors, about = _read(path)
        mean, std = _pair(tensors, path)
    except UserError:
        raise
    except Exception as error:  # whatever a library says of a file that comes from anywhere
        raise UserError(
            f"{path} holds no statistics that can be read: {first_line(error)}",
            remedy="Bring the file again, or compute statistics: featcache stats CACHE --over channel --out FILE",
        ) from error
    if mean.ndim == 4 and len(mean) == 1:  # [1, C, 1, 1]
        mean, std = mean[0], std[0]
    if mean.ndim == 1:
        mean, std = mean[:, None, None], std[:, None, None]
    count = about.get("count", "")
    found = Statistics(
        mean=mean,
        std=std,
        feature=about.get("feature"),
        fingerprint=about.get("fingerprint"),
        count=int(count) if count.isascii() and count.isdigit() and len(count) < 16 else None,
    )
    _check(found, str(path))
    return found


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    data = files.read_bounded(path, MAX_FILE_BYTES)
    if path.suffix == ".safetensors":
        from safetensors.torch import load as parse

        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = header.get("__metadata__", {})
        return parse(data), about if isinstance(about, dict) else {}
    stream = io.BytesIO(data)
    if zipfile.is_zipfile(stream):
        with zipfile.ZipFile(stream) as archive:
            if sum(member.file_size for member in archive.infolist()) > MAX_FILE_BYTES:
                raise UserError(
                    f"{path} would take more than {MAX_FILE_BYTES >> 20} MiB", remedy="Bring the file again."
                )
        stream.seek(0)
    loaded = torch.load(stream, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds no tensors by name", remedy="It should hold mean and std, or another pair.")
    return {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)}, {}


def _pair(tensors: Mapping[str, Tensor], path: Path) -> tuple[Tensor, Tensor]:
    """mean and std in float32."""
    values = {name: tensor.double() for name, tensor in tensors.items() if _is_plain(tensor)}
    if {"latents_bias", "latents_scale"} <= values.keys():
        mean, std = values["latents_bias"], 1 / values["latents_scale"]
    elif {"mean", "std"} <= values.keys():
        mean, std = values["mean"], values["std"]
    elif {"mean", "var"} <= values.keys():
        mean, std = values["mean"], (values["var"] + RAE_EPSILON).sqrt()
    else:
        raise UserError(
            f"{path} holds {', '.join(sorted(tensors)[:8]) or 'no tensors'}, and no pair of statistics",
            remedy="It should hold mean and std, latents_bias and latents_scale, or mean and var.",
        )
    return mean.float(), std.float()


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is real numbers in memory: a PyTorch file may also hold sparse tensors, shapes without values, and one
    value repeated to any size."""
    held = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return (
        held and not tensor.is_complex() and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _check(statistics: Statistics, where: str) -> None:
    mean, std = statistics.mean, statistics.std
    if mean.shape != std.shape or not mean.numel():
        raise UserError(f"{where}: the mean has shape {list(mean.shape)} and the std {list(std.shape)}")
    finite = bool(torch.isfinite(mean).all() and torch.isfinite(std).all() and torch.isfinite(1 / std).all())
    # Sums in float64 leave a channel that never changes some 1e-8 of its mean, a posterior without spread 3e-7.
    if not finite or not bool((std > DEAD * std.max()).all()):
        raise UserError(
            f"{where}: a mean is not finite, or a standard deviation is zero beside the others, so nothing can be divided by it",
            remedy="Look at the cache: featcache inspect CACHE. A channel that never changes cannot be normalised; a feature "
            "diffused beside the latents can be taken as it is: --set streams.FEATURE.normalization=none",
        )
