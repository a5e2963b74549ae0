"""Which cached features a method means. No torch here.

Encoder tokens are cached as `<encoder>@<layer>` with shape (N, C), layers counted from 0; VAE groups as `vae/G1` to
`vae/G4` with shape (L, N, C). A method may leave the encoder open; it is then the only one in the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from featcache.errors import CacheError, UserError
from featcache.feature_names import layer_feature
from featcache.settings import suggest

if TYPE_CHECKING:
    from trainer.align.base import FeatureInfo

# What `required` reports where the encoder is left open: the cache decides.
LAST_LAYER = "<encoder>@<last>"


def split_name(name: str) -> tuple[str, int] | None:
    """`'dinov2-b@11'` -> `('dinov2-b', 11)`; None for a name that is not an encoder's patch tokens."""
    feature = layer_feature(name)
    return (feature.encoder, feature.layer) if feature and feature.is_tokens else None


def check_token_name(method: str, option: str, name: object) -> None:
    """Refuses names of tokens other than `<encoder>@<layer>`.

    Raises:
        UserError: it is one.
    """
    if not isinstance(name, str) or split_name(name) is None:
        raise UserError(
            f"{method}: {option}={name!r:.200} does not name an encoder's tokens",
            remedy="Write <encoder>@<layer>, e.g. dinov2-b@11.",
        )


def encoder_layers(available: Iterable[str]) -> dict[str, list[int]]:
    """Encoder -> its cached layers, ascending."""
    layers: dict[str, list[int]] = {}
    for name in available:
        if parts := split_name(name):
            layers.setdefault(parts[0], []).append(parts[1])
    return {encoder: sorted(found) for encoder, found in sorted(layers.items())}


def only_encoder(method: str, available: Iterable[str], *, option: str) -> str:
    """The one encoder whose tokens are cached.

    option: how the method is told its encoder, such as `feature={name}@LAYER`.

    Raises:
        CacheError: the cache holds none.
        UserError: it holds several, so that the choice must be written down.
    """
    encoders = list(encoder_layers(available))
    if not encoders:
        raise CacheError(
            f"{method} needs the tokens of an image encoder, and the cache holds none",
            remedy="Add them with `featcache build`, e.g. those of dinov2-b@11.",
        )
    if len(encoders) > 1:
        raise UserError(
            f"{method}: the cache holds tokens of several encoders ({', '.join(encoders)})",
            remedy=f"Say which {method} shall use: --set '{method}.{option.format(name=encoders[0])}'",
        )
    return encoders[0]


def last_layer(method: str, available: Iterable[str], *, option: str) -> str:
    """Name of the deepest cached layer of the cache's only encoder.

    Raises:
        CacheError, UserError: as `only_encoder`.
    """
    available = list(available)
    encoder = only_encoder(method, available, option=option)
    return f"{encoder}@{encoder_layers(available)[encoder][-1]}"


def require(method: str, names: Iterable[str], available: Mapping[str, FeatureInfo], *, rank: int) -> tuple[str, ...]:
    """`names` if all are cached with `rank` axes: 2 for tokens (N, C), 3 for VAE groups (L, N, C).

    Raises:
        CacheError: one is missing.
        UserError: one has another shape.
    """
    names = tuple(names)
    missing = [name for name in names if name not in available]
    if missing:
        raise CacheError(
            f"{method} reads {', '.join(missing)}, which the cache does not hold",
            remedy=f"{suggest(missing[0], available)}Add what is missing with `featcache build`.",
        )
    for name in names:
        shape = available[name].shape
        if len(shape) != rank:
            expected = "(tokens, channels)" if rank == 2 else "(layers, tokens, channels)"
            raise UserError(
                f"{method}: feature {name} has shape {shape}, expected {expected}",
                remedy="Name a feature of the right kind.",
            )
    return names
