"""In which settings two caches, or two features, differ: in words, for whoever asked for one and found the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from featcache.store.manifest import FeatureSpec, Manifest

_WORDS = {
    "resolution": "resolution",
    "crop": "crop",
    "decode": "decoder",
    "order_seed": "seed of the order",
    "flip": "mirrored copies",
    "vae.name": "VAE",
    "shard_size": "samples per shard",
    "guidance.scale": "guidance scale",
    "guidance.interval": "guidance interval",
}
# What of a manifest says which images they are.
_IMAGES = ("count", "class_names", "fingerprint", "preprocessing.available")
# What follows from other settings, or changes nothing.
_SILENT = ("name", "source", "grid")
_SHOWN = 40


def dataset_differences(have: Manifest, want: Manifest) -> list[str]:
    """A line for each setting in which a cache differs from what is asked for; empty if it is the same cache."""
    there, here = (flat(m.dataset.to_json()) | _layout(m) for m in (have, want))
    differing = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    lines = []
    if any(key in _IMAGES for key in differing):
        before, now = (f"{m.dataset.count:,} of {len(m.dataset.class_names):,} classes" for m in (have, want))
        lines.append(f"images: {before} there, {now} here" if before != now else f"images: others ({now} in both)")
    rest = [key for key in differing if key not in _IMAGES and key not in _SILENT]
    if "vae.name" in rest:  # the rest of its record follows from it
        rest = [key for key in rest if key == "vae.name" or not key.startswith("vae.")]
    if not lines and not rest:
        rest = [key for key in differing if key == "grid"]
    return lines + [difference(key, there.get(key), here.get(key)) for key in rest]


def feature_differences(have: FeatureSpec, want: FeatureSpec) -> list[str]:
    """As `dataset_differences`, of one feature; versions of packages are told only where nothing else differs."""
    there, here = flat(have.to_json()), flat(want.to_json())
    differing = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    telling = [key for key in differing if not key.startswith("provenance.versions.")] or differing
    return [difference(key, there.get(key), here.get(key)) for key in telling]


def _layout(manifest: Manifest) -> dict[str, Any]:
    return {key: getattr(manifest, key) for key in ("shard_size", "compressor", "format")}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` => `{"a.b": 1}`."""

    def items() -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, Mapping) and value:
                yield from flat(value, f"{prefix}{key}.").items()
            else:
                yield f"{prefix}{key}", value

    return dict(items())


def difference(key: str, there: object, here: object) -> str:
    """`resolution: 64 there, 32 here`; of hashes and long values only that they differ."""
    short = key.removeprefix("preprocessing.").removeprefix("provenance.")
    name = _WORDS.get(short, short.rpartition(".")[2].replace("_", " "))
    if name == "sha256":
        return "weights: others of the same name"
    if any(isinstance(value, list | Mapping) and len(str(value)) > _SHOWN for value in (there, here)):
        return f"{name}: another"
    return f"{name}: {_value(there)} there, {_value(here)} here"


def _value(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:12]}..."
