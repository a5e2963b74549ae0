"""Damaged shards made again from the images, and nothing else touched."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import featcache
from featcache.builder.derive import DerivingWriter, repair_derived
from featcache.builder.pipeline import Meter, run_shards
from featcache.builder.prepare import prepare
from featcache.builder.request import BuildRequest
from featcache.encoders import EncoderChoice
from featcache.encoders.vae import recorded_resampling
from featcache.errors import CacheError
from featcache.feature_names import layer_feature
from featcache.machine import pick_device
from featcache.progress import Progress
from featcache.sources.embedded import recorded_embedded
from featcache.sources.open import find_data
from featcache.store.manifest import SAMPLE_FEATURES, Manifest
from featcache.store.writers import repair_writer


def repair_shards(
    path: Path,
    damaged: Mapping[str, Sequence[int]],
    *,
    data: str | None,
    weights_dir: Path | None,
    device: str,
    progress: Progress,
    captions: Path | None = None,
) -> None:
    """Makes the `damaged` shards (feature -> numbers) of a cache again and records their checksums: encodes them, or derives
    them of what the cache holds.

    On the hardware and software of the build the bytes are the recorded ones; elsewhere last bits may differ, which the
    new checksums cover. Labels, keys and hashes of the images come out the same everywhere, or the images have changed
    (where shards are compressed, that depends on the compressor's version, too, and is not looked at).

    Args:
        data: the images, as `--data`; not needed for the embedded set.
        captions: the table of captions, where text features were made from one.

    Raises `UserError` if the images or weights are not here, or not the ones the cache was made with, and for tars whose
    features were made with weights from different seeds.
    """
    manifest = featcache.open(path).manifest
    damaged = {
        name: shards for name, shards in damaged.items() if name in manifest.features
    }  # the rest was removed since
    derived = {name: shards for name, shards in damaged.items() if manifest.features[name].derived}
    if manifest.format == "zarr":
        damaged = {name: shards for name, shards in damaged.items() if name not in derived}
    if damaged:
        _encode(path, manifest, damaged, data, weights_dir, device, progress, captions)
    if derived and manifest.format == "zarr":
        repair_derived(path, derived, progress)  # of sources that are sound by now


def _encode(
    path: Path,
    manifest: Manifest,
    damaged: Mapping[str, Sequence[int]],
    data: str | None,
    weights_dir: Path | None,
    device: str,
    progress: Progress,
    captions: Path | None,
) -> None:
    """Encodes shards again, and in tars derives of them what else those hold."""
    source = _data_of(manifest.dataset.source, data, path)
    exact = SAMPLE_FEATURES if manifest.compressor is None else ()
    for names, seed in _passes(manifest, damaged):
        derived = [manifest.features[name] for name in names if manifest.features[name].derived]
        encoded = [name for name in names if not manifest.features[name].derived]
        request = BuildRequest(
            data=source,
            into=path,
            limit=_limit_of(manifest.dataset.source),
            weights_dir=weights_dir,
            random_weights=seed,
            device=device,
            captions=captions if any(name.startswith("text/") for name in names) else None,
            **_encoders_of(manifest, encoded),
        )
        plan = prepare(request, device=pick_device(device), again=encoded)
        shards = {name: list(damaged[name]) for name in names}
        numbers = sorted({shard for numbers in shards.values() for shard in numbers})
        with repair_writer(path, shards, exact=set(names).intersection(exact)) as writer:
            progress.begin("encoding again", sum(len(plan.work.slots(n)) for n in numbers))
            progress.note(f"features: {', '.join(names)}")
            into = DerivingWriter(writer, derived) if derived else writer
            run_shards(plan.work, numbers, into, meter=Meter(), progress=progress)
            writer.finish()


def _data_of(description: str, data: str | None, cache: Path) -> str:
    shapes = recorded_embedded(description)
    if shapes is not None:
        return shapes[0]
    again = f"featcache repair {shlex.quote(str(cache))}"
    return find_data(
        data, remedy=f"Type: {again} --data /path/to/its/images   or, if there is another copy: {again} --from URL"
    )


def _limit_of(description: str) -> int | None:
    shapes = recorded_embedded(description)
    return shapes[1] if shapes is not None else None


def _passes(manifest: Manifest, damaged: Mapping[str, Sequence[int]]) -> list[tuple[list[str], int | None]]:
    """Damaged features, grouped by the seed of random weights (None: pretrained, embedded, or no encoder at all).

    What says which images these were comes first, and by itself: the images that the others are encoded from are compared
    with it. A tar holds all features at once.
    """
    groups: dict[tuple[bool, int | None], list[str]] = {}
    for name in damaged:
        origin = manifest.features[name].provenance
        seed = origin.get("seed") if origin.get("weights") == "random" else None
        groups.setdefault((name not in SAMPLE_FEATURES, seed), []).append(name)
    if manifest.format == "wds":
        seeds = {seed for _, seed in groups if seed is not None}
        if len(seeds) > 1:
            raise CacheError(
                "its features were made with random weights from different seeds, which cannot be made again in one tar",
                remedy="mend it from another copy: featcache repair CACHE --from URL",
            )
        return [(list(damaged), next(iter(seeds), None))]
    order = sorted(groups, key=lambda group: (group[0], group[1] is not None, group[1] or 0))
    return [(groups[group], group[1]) for group in order]


def _encoders_of(manifest: Manifest, names: Sequence[str]) -> dict[str, Any]:
    """The request's fields that make these features the way they were made."""
    choices: dict[str, EncoderChoice] = {}
    norms = set()
    for name in names:
        feature = layer_feature(name)
        if feature is None:
            if "@" in name:
                raise CacheError(f"{name!r} does not name an encoder's layer, so it cannot be made again")
            continue
        choice = choices.get(feature.encoder, EncoderChoice(name=feature.encoder))
        if feature.is_class_token:
            choice = replace(choice, class_tokens=tuple(sorted({*choice.class_tokens, feature.layer})))
        else:
            choice = replace(choice, layers=tuple(sorted({*choice.layers, feature.layer})))
        choices[feature.encoder] = choice
        norms.add(manifest.features[name].provenance.get("final_norm", True))
    if len(norms) > 1:
        last = {"final_norm": "last"}
    else:
        last = {"final_norm": "all"} if norms == {True} else {}
    vae = manifest.dataset.vae if any(name.startswith("vae/") for name in names) else {"name": None}
    if vae is None:
        raise CacheError("the manifest names no VAE, so its features cannot be made again")
    return {
        "encoders": tuple(choice for _, choice in sorted(choices.items())),
        "vae": vae["name"],
        "levels": tuple(sorted(name.split("/")[1] for name in names if name.startswith("vae/G"))),
        "vae_resampling": recorded_resampling({n: spec.provenance for n, spec in manifest.features.items()}),
        **last,
        **_texts_of(manifest, names),
    }


def _texts_of(manifest: Manifest, names: Sequence[str]) -> dict[str, Any]:
    texts = [name.removeprefix("text/") for name in names if name.startswith("text/")]
    if not texts:
        return {}
    if "text/count" not in manifest.features:
        raise CacheError("the manifest does not say of which captions its text features are")
    recorded = manifest.features["text/count"].provenance["captions"]
    return {
        "texts": tuple(sorted({name.partition(".")[0] for name in texts} - {"count"})),
        "caption_key": recorded["key"],
        "captions_per_image": recorded["per_image"],
    }
