"""Alignment methods: one file each, found through the table below. Importing this needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from featcache.errors import UserError
from featcache.settings import suggest

if TYPE_CHECKING:
    from trainer.align.base import Alignment, BackboneInfo, FeatureInfo, MethodConfig


# Name -> (module, its options' dataclass, its Alignment subclass). A new method is one file and one line here.
METHODS: dict[str, tuple[str, str, str]] = {
    "none": ("none", "NoneConfig", "NoAlignment"),
    "repa": ("repa", "RepaConfig", "Repa"),
    "sara": ("sara", "SaraConfig", "Sara"),
    "dya": ("dya", "DyaConfig", "Dya"),
    "ahpa": ("ahpa", "AhpaConfig", "Ahpa"),
    "sra": ("sra", "SraConfig", "Sra"),
    "sra2": ("sra2", "Sra2Config", "Sra2"),
}


# Options that runs did not write down before they had another default, or were there at all: what those runs had.
EARLIER: dict[str, dict[str, object]] = {"sra": {"head_ratio": 1.0}}


def _classes(name: str) -> tuple[type[MethodConfig], Callable[..., Alignment]]:
    """A method's options and its module; imported when it is asked for, since it brings torch."""
    file, options, module = METHODS[name]
    found = import_module(f"trainer.align.{file}")
    return getattr(found, options), getattr(found, module)


def method_names() -> tuple[str, ...]:
    """Names that `--method` takes, alone or joined by `+`."""
    return tuple(METHODS)


def split_methods(text: str) -> tuple[str, ...]:
    """`'ahpa+sra'` -> `('ahpa', 'sra')`.

    Raises:
        UserError: an unknown or repeated method, or `none` together with others.
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


def config_class(name: str) -> type[MethodConfig]:
    """Options dataclass of one method: frozen, keyword-only, validated when made.

    Raises:
        UserError: an unknown name.
    """
    (name,) = split_methods(name)
    return _classes(name)[0]


def required_features(name: str, config: MethodConfig) -> tuple[str, ...]:
    """Cached features that `name` will read, without building it.

    Where the options leave the encoder open, the entry is a placeholder in angle brackets
    (`<encoder>@<last>`, `<encoder>@<texture>`) that `resolve` fills in from a cache.
    """
    return config.required()


def resolve(name: str, config: MethodConfig, available: Mapping[str, FeatureInfo]) -> tuple[str, ...]:
    """Names of the cached features `name` reads, in the method's own order.

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
        methods: names and options, e.g. `[("ahpa", AhpaConfig()), ("sra", SraConfig())]`.
        info: the backbone it is attached to.
        features: at least the cached features that `resolve` names; others are ignored.

    Raises:
        CacheError, UserError: as `resolve`; also options that do not fit the backbone.
    """
    split_methods("+".join(name for name, _ in methods))
    built: dict[str, Alignment] = {}
    for name, config in methods:
        chosen = {feature: features[feature] for feature in resolve(name, config, features)}
        built[name] = _classes(name)[1](config, info, chosen)
    if len(built) == 1:
        return next(iter(built.values()))
    from trainer.align.combined import Combined

    return Combined(built)
