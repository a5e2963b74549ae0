"""Which cache a run uses, and the command that provides what is missing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import featcache
from featcache.errors import CacheError
from trainer import align
from trainer.align.base import FeatureInfo
from trainer.config import RunConfig

ROOT = Path("caches")
DEFAULT_ENCODER = "dinov2-b"


def find_cache(config: RunConfig) -> Any:
    """The cache that the configuration names, else the newest complete one below ``./caches`` that fits the method.

    Raises:
        CacheError: none there, or none that fits; the error ends with the command that builds it.
    """
    if config.cache is not None:
        return featcache.open(config.cache)
    found = sorted(
        (p.parent for p in ROOT.glob("*/zarr.json")), key=lambda p: (p / "zarr.json").stat().st_mtime, reverse=True
    )
    wanted = [name for method in config.methods for name in align.required_features(method, config.method_config(method))]
    unfit: list[tuple[Any, CacheError]] = []
    for path in found:
        try:
            cache = featcache.open(path)
            missing_features(config, cache)
            return cache
        except CacheError as error:
            unfit.append((path, error))
    if not unfit:
        raise CacheError(f"there is no cache below ./{ROOT}", remedy=f"Build one:\n  {build_line(None, wanted)}")
    path, error = unfit[0]
    raise CacheError(
        f"none of the {len(unfit)} caches below ./{ROOT} fits --method {config.method}; the newest, {path}: {error.what}",
        remedy=f"Add what is missing:\n  {build_line(path, wanted)}",
    )


def available_features(cache: Any) -> dict[str, FeatureInfo]:
    """Token features and VAE groups of a cache as the methods see them."""
    features = cache.manifest.features
    return {n: FeatureInfo(shape=tuple(f.shape)) for n, f in features.items() if n not in ("label", "key", "content")}


def missing_features(config: RunConfig, cache: Any) -> None:
    """Raises CacheError if the cache lacks what the configuration's methods read."""
    cache.require(["vae/moments", "label"])
    available = available_features(cache)
    for method in config.methods:
        align.resolve(method, config.method_config(method), available)


def build_command(cache: Any, wanted: Iterable[str]) -> str:
    """The sentence with the ``featcache build`` line that adds features to a cache."""
    return f"Add what is missing:\n  {build_line(cache.path, wanted)}"


def build_line(cache: str | Path | None, wanted: Iterable[str]) -> str:
    """``featcache build ...`` for the given feature names; placeholders in angle brackets become the default encoder."""
    levels = sorted({name.split("/")[1] for name in wanted if name.startswith("vae/G")})
    layers: dict[str, set[int]] = {}
    for name in wanted:
        encoder, at, layer = name.partition("@")
        if not at:
            continue
        encoder = DEFAULT_ENCODER if encoder.startswith("<") else encoder
        layers.setdefault(encoder, set())
        if layer.isdigit():
            layers[encoder].add(int(layer))
        elif "texture" in layer:
            layers[encoder] |= {9, 11}
    words = ["featcache build"]
    if cache is not None:
        words.append(f"--into {cache}")
    for encoder, numbers in layers.items():
        words.append(f"--encoder {encoder}" + ("@" + ",".join(map(str, sorted(numbers))) if numbers else ""))
    if levels:
        words.append(f"--vae-levels {','.join(levels)}")
    if cache is not None:
        words.append("--data <the same images>")
    return " ".join(words)
