"""Alignment methods: one file each, found through the table below. Importing this needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from featcache.errors import UserError
from featcache.settings import suggest

if TYPE_CHECKING:
    from trainer.align.base import Alignment, BackboneInfo, FeatureInfo, MethodConfig


def _none() -> tuple[type[Any], type[Any]]:
    from trainer.align.none import NoAlignment, NoneConfig

    return NoneConfig, NoAlignment


def _repa() -> tuple[type[Any], type[Any]]:
    from trainer.align.repa import Repa, RepaConfig

    return RepaConfig, Repa


def _ahpa() -> tuple[type[Any], type[Any]]:
    from trainer.align.ahpa import Ahpa, AhpaConfig

    return AhpaConfig, Ahpa


def _sara() -> tuple[type[Any], type[Any]]:
    from trainer.align.sara import Sara, SaraConfig

    return SaraConfig, Sara


def _dya() -> tuple[type[Any], type[Any]]:
    from trainer.align.dya import Dya, DyaConfig

    return DyaConfig, Dya


def _sra() -> tuple[type[Any], type[Any]]:
    from trainer.align.sra import Sra, SraConfig

    return SraConfig, Sra


def _sra2() -> tuple[type[Any], type[Any]]:
    from trainer.align.sra2 import Sra2, Sra2Config

    return Sra2Config, Sra2


# Name -> () -> (options dataclass, Alignment subclass). A new method is one file and one line here.
METHODS: dict[str, Callable[[], tuple[type[Any], type[Any]]]] = {
    "none": _none,
    "repa": _repa,
    "sara": _sara,
    "dya": _dya,
    "ahpa": _ahpa,
    "sra": _sra,
    "sra2": _sra2,
}


def method_names() -> tuple[str, ...]:
    """Names that ``--method`` takes, alone or joined by ``+``."""
    return tuple(METHODS)


def split_methods(text: str) -> tuple[str, ...]:
    """``'ahpa+sra'`` -> ``('ahpa', 'sra')``.

    Raises:
        UserError: an unknown or repeated method, or ``none`` together with others.
    """
    names = tuple(part.strip() for part in text.split("+"))
    for name in names:
        if name not in METHODS:
            raise UserError(
                f"there is no alignment method {name!r}",
                remedy=f"{suggest(name, METHODS)}Methods: {', '.join(METHODS)}; join several by +.",
            )
    if len(set(names)) != len(names):
        raise UserError(f"method {text!r} names a method twice", remedy="Name each method once.")
    if "none" in names and len(names) > 1:
        raise UserError(f"method {text!r} combines none with others", remedy="Leave out none.")
    return names


def config_class(name: str) -> type[Any]:
    """Options dataclass of one method: frozen, keyword-only, validated when made. UserError: unknown name."""
    (name,) = split_methods(name)
    return METHODS[name]()[0]


def required_features(name: str, config: MethodConfig) -> tuple[str, ...]:
    """Cached features that ``name`` will read, without building it.

    Where the options leave the encoder open, the entry is a placeholder in angle brackets
    (``features.LAST_LAYER``, ``features.TEXTURE_LAYER``) that :func:`resolve` fills in from a cache.
    """
    return config.required()


def resolve(name: str, config: MethodConfig, available: Mapping[str, FeatureInfo]) -> tuple[str, ...]:
    """Names of the cached features ``name`` reads, in the method's own order.

    Args:
        available: the cache's features by name; only token features and VAE groups matter.

    Raises:
        CacheError: the cache lacks what the method needs.
        UserError: the options leave open which of several encoders is meant, or a feature's shape is wrong.
    """
    return config.resolve(available)


def build(
    methods: Sequence[tuple[str, MethodConfig]], info: BackboneInfo, features: Mapping[str, FeatureInfo]
) -> Alignment:
    """The alignment module for one method, or for several together.

    Args:
        methods: names and options, e.g. ``[("ahpa", AhpaConfig()), ("sra", SraConfig())]``.
        info: the backbone it is attached to.
        features: at least the cached features that :func:`resolve` names; others are ignored.

    Raises:
        CacheError, UserError: as :func:`resolve`; also options that do not fit the backbone.
    """
    split_methods("+".join(name for name, _ in methods))
    built: dict[str, Alignment] = {}
    for name, config in methods:
        chosen = {feature: features[feature] for feature in resolve(name, config, features)}
        built[name] = METHODS[name]()[1](config, info, chosen)
    if len(built) == 1:
        return next(iter(built.values()))
    from trainer.align.combined import Combined

    return Combined(built)
