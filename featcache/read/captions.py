"""Features of several captions for each image, one caption's row at a time."""

from __future__ import annotations

from dataclasses import replace

from featcache.store.manifest import FeatureSpec

COUNT = "text/count"  # how many captions each image has
_AXES = {"pooled": 2, "length": 1}  # [C, P] and [C]; hidden states are [C, T, W]


def has_captions(spec: FeatureSpec) -> bool:
    """Whether the first axis of the feature's samples numbers their captions, whose rows lie one after another."""
    encoder, dot, part = spec.name.partition(".")
    if not encoder.startswith("text/") or spec.name == COUNT or spec.views > 1 or spec.basis is not None:
        return False
    return len(spec.shape) == (_AXES.get(part) if dot else 3)


def one_caption(spec: FeatureSpec) -> FeatureSpec:
    """The feature of one caption, [T, W] of [C, T, W], as a reader with `single_caption` fills it: what a `FeatureCodec`
    decodes it by. A feature without captions as it is."""
    return replace(spec, shape=spec.shape[1:], empty=None) if has_captions(spec) else spec
