"""Features that a run diffuses beside the latents: what is said of each, and which of a cache they can be."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from featcache.errors import CacheError, UserError
from featcache.feature_names import is_class_token
from featcache.settings import NotNegative, Share, from_mapping, settings
from trainer.models.config import StreamShape


@settings
class StreamConfig:
    """How one feature is diffused.

    weight: of its loss beside the latents'. normalization: by the mean and standard deviation of each `channel`, or of each
    `position` too; `none`: as it is stored (REG, ReDi). statistics: file of those (`featcache stats`); None computes
    them from the cache, once for a run. embed: with tokens of its `own`, or `merged` into the latents' channels; `auto`
    is `own` for a class token and `merged` for tokens. dropout: share of samples whose feature is zero before the noise is
    added and has no loss, so that samples can be guided by it (ReDi's representation guidance).
    """

    weight: NotNegative = 1.0
    normalization: Literal["none", "channel", "position"] = "channel"
    statistics: str | None = None
    embed: Literal["auto", "own", "merged"] = "auto"
    dropout: Share = 0.0


DIFFUSIBLE = (
    "What can be: an encoder's tokens (dinov2-b@11), what is derived of them (dinov2-b@11.pca8), or a class token "
    "(dinov2-b@11.cls)."
)
OPTIONS = tuple(field.name for field in dataclasses.fields(StreamConfig))


def stream_config(feature: str, options: Mapping[str, Any] | None) -> StreamConfig:
    """Validated; raises `UserError`.

    So is the name, which may come from anybody's `config.yaml`: it becomes part of a file's name, and is printed.
    """
    from featcache.store.manifest import check_feature_name  # brings numpy

    try:
        check_feature_name(feature)
    except CacheError as error:
        raise UserError(f"streams: {error.what}", remedy=DIFFUSIBLE) from error
    return from_mapping(StreamConfig, options or {}, where=f"streams.{feature}")


def stream_names(text: str) -> dict[str, Any]:
    """`a@1.cls,b@2.pca8` as a configuration has it: feature -> options."""
    return {name.strip(): {} for name in text.split(",") if name.strip()}


def never_learned(feature: str, stream: StreamConfig) -> str | None:
    """A remark on a stream that training never takes out of its noise: sampling draws it all the same, and the latents see
    it. None for any other."""
    for option, value, never in (("weight", stream.weight, 0), ("dropout", stream.dropout, 1)):
        if value == never:
            return (
                f"{feature} is never learned (its {option} is {never}), and samples are drawn together with it: they are of "
                f"no use; for those, type --set streams.{feature}.{option}={1 - never or 0.2:g} or another value"
            )
    return None


def check_shape(feature: str, shape: tuple[int, ...]) -> None:
    """Raises `UserError` for a shape that is no stream's."""
    square = len(shape) == 2 and math.isqrt(shape[0]) ** 2 == shape[0]
    if not square and not (len(shape) == 1 and is_class_token(feature)):
        text = f"of shape {' x '.join(map(str, shape))}" if shape else "a number"
        raise UserError(f"{feature}, {text}, cannot be diffused beside the latents", remedy=DIFFUSIBLE)


def stream_shapes(
    streams: Mapping[str, Mapping[str, Any] | None], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[StreamShape, ...]:
    """How the backbone sees the streams of a settled configuration, given the shapes of the features.

    Raises:
        UserError: a shape is not there, or is no stream's.
    """
    found = []
    for name, options in streams.items():
        if name not in shapes:
            raise UserError(
                f"{name} is diffused, and the run's cache.json does not say its shape", remedy="Bring the file back."
            )
        check_shape(name, shapes[name])
        *tokens, channels = shapes[name]
        found.append(
            StreamShape(
                name=name,
                channels=channels,
                side=math.isqrt(tokens[0]) if tokens else 1,
                merged=stream_config(name, options).embed == "merged",
            )
        )
    return tuple(found)
