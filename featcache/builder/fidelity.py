"""What a storage codec loses, measured on real features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from featcache.codecs import decode, encode
from featcache.store.layout import sample_bytes, stored_arrays


def fidelity(codec: str, x: Tensor) -> dict[str, float]:
    """Figures of one codec on features `x` [B, *shape] float32.

    A token is one vector over the last axis. Cosine is the mean and the worst over tokens that are not zero; relative
    error is the root of the summed squared error over the summed squares.

    Raises `UserError` if the codec cannot hold features of this shape.
    """
    shape = tuple(x.shape[1:])
    stored = stored_arrays(codec, shape)
    return {
        "bytes_per_image": sum(sample_bytes(dtype, s) for dtype, s in stored.values()),
        **distance(x, decode(codec, encode(codec, x), shape)),
    }


def distance(x: Tensor, y: Tensor) -> dict[str, float]:
    """How far features `y` are from `x`, both [B, *shape]: cosines of tokens and the relative error.

    As for `fidelity`; tokens that are zero in `x` count for the relative error alone. Where all of them are, as
    those of images without captions, every figure is NaN: there is nothing to compare.
    """
    y = y.double().flatten(0, -2)
    x = x.double().flatten(0, -2)  # [tokens, C]
    keep = x.norm(dim=-1) > 0
    if not keep.any():
        return dict.fromkeys(("mean_cosine", "worst_cosine", "relative_error"), math.nan)
    cosine = torch.nn.functional.cosine_similarity(x[keep], y[keep], dim=-1)
    return {
        "mean_cosine": float(cosine.mean()),
        "worst_cosine": float(cosine.min()),
        "relative_error": float((x - y).norm() / x.norm()),
    }
