"""Alignment methods: one file each, found through the table below. Importing this needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from featcache.errors import UserError
from featcache.settings import suggest

if TYPE_CHECKING:
    from trainer.align.base import Alignment, BackboneInfo, FeatureInfo, MethodConfig


# Name -> (module, its options' dataclass, its Alignment subclass; None for one that only says what is diffused). A new
# method is one file and one line here.
METHODS: dict[str, tuple[str, str, str | None]] = {
    "none": ("none", "NoneConfig", "NoAlignment"),
    "repa": ("repa", "RepaConfig", "Repa"),
    "sara": ("sara", "SaraConfig", "Sara"),
    "dya": ("dya", "DyaConfig", "Dya"),
    "ahpa": ("ahpa", "AhpaConfig", "Ahpa"),
    "sra": ("sra", "SraConfig", "Sra"),
    "sra2": ("sra2", "Sra2Config", "Sra2"),
    "reg": ("reg", "RegConfig", "Reg"),
    "redi": ("redi", "RediConfig", None),
}


@runtime_checkable
class DiffusesFeatures(Protocol):
    """Options of a method that diffuses features of its own."""

    def streams(self, available: Mapping[str, FeatureInfo]) -> Mapping[str, Mapping[str, object]]: ...


# Settings of a run that a method's authors launch with and its tables do not show: the defaults under that method.
LAUNCHED: dict[str, dict[str, float]] = {"ahpa": {"lr": 2e-4, "clip": 2.0}, "redi": {"clip": math.inf}}

# Options that runs did not write down before they had another default, or were there at all: what those runs had.
EARLIER: dict[str, dict[str, object]] = {"sra": {"head_ratio": 1.0}}


def _classes(name: str) -> tuple[type[MethodConfig], Callable[..., Alignment] | None]:
    """A method's options and its module; imported when it is asked for, since it brings torch."""
    file, options, module = METHODS[name]
    found = import_module(f"trainer.align.{file}")
    return getattr(found, options), None if module is None else getattr(found, module)


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


def launched(methods: Sequence[str], setting: str, otherwise: float) -> float:
    """What `setting` is where a run leaves it out: as the first of its methods that says something about it has it."""
    said = (LAUNCHED[name][setting] for name in methods if setting in LAUNCHED.get(name, {}))
    return next(said, otherwise)


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


def aligns(name: str) -> bool:
    """Whether the method has a loss of alignment; others only say what is diffused."""
    return METHODS[name][2] is not None


def data_streams(
    name: str, config: MethodConfig, available: Mapping[str, FeatureInfo]
) -> Mapping[str, Mapping[str, object]]:
    """Features that `name` diffuses beside the latents, each with options of `trainer.runs.streams.StreamConfig`.

    Raises:
        CacheError, UserError: as `resolve`.
    """
    return config.streams(available) if isinstance(config, DiffusesFeatures) else {}


def build(
    methods: Sequence[tuple[str, MethodConfig]], info: BackboneInfo, features: Mapping[str, FeatureInfo]
) -> Alignment:
    """The alignment module for one method, or for several together, all of them with a loss (`aligns`).

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
        module = _classes(name)[1]
        assert module is not None, f"{name} has no loss of alignment"
        built[name] = module(config, info, chosen)
    if len(built) == 1:
        return next(iter(built.values()))
    from trainer.align.combined import Combined

    return Combined(built)
