"""Which cache a run uses, and the command that provides what is missing."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import featcache
from featcache.encoders import EncoderChoice
from featcache.errors import CacheError, UserError
from featcache.feature_names import LayerFeature, is_class_token, layer_feature
from featcache.keys import key_text, printable
from featcache.paths import typed
from featcache.settings import suggest, to_mapping
from featcache.store.manifest import UNKNOWN, FeatureSpec
from featcache.store.root import find_root
from trainer import align
from trainer.align.base import FeatureInfo
from trainer.align.features import LAST_LAYER, encoder_layers
from trainer.align.redi import COMPONENTS
from trainer.models.config import takes_text
from trainer.runs import folder as runs
from trainer.runs.config import RunConfig
from trainer.runs.records import cache_summary
from trainer.runs.streams import DIFFUSIBLE, check_shape, stream_config
from trainer.runs.text import EXAMPLE, NEEDED, is_text, only_text, text_shape

ROOT = Path("caches")
DEFAULT_ENCODER, DEFAULT_LAST = "dinov2-b", 11
DEFAULT_VAE = "sd-ft-ema"
# Needs no file that is not installed: the embedded images and encoders.
EMBEDDED = "featcache build --data shapes --limit 1000 --encoder tiny --vae-levels G3,G4"


class WrongCache(CacheError):
    """A cache of another resolution or VAE: adding features to it would not help."""


def check_made_with(config: RunConfig, cache: featcache.Cache) -> None:
    """Refuses a cache of another resolution or VAE than the configuration asks for, and one without images.

    Raises:
        WrongCache: it is one.
    """
    if not len(cache):
        raise WrongCache(
            f"{cache.path} holds no images: all {cache.manifest.dataset.count} were skipped when it was built",
            remedy=f"featcache info {typed(cache.path)} says why; build another one from images that can be read.",
        )
    dataset = cache.manifest.dataset
    asked = {"resolution": config.resolution, "vae": config.vae}
    found = {"resolution": dataset.preprocessing.get("resolution"), "vae": (dataset.vae or {}).get("name")}
    for key, value in asked.items():
        if value is not None and value != found[key]:
            raise WrongCache(
                f"{cache.path} was made with {key} {found[key]}, and the run asks for {value}",
                remedy=f"Build one that fits:{_build_all(config)}\nor train on what there is: --set {key}=null",
            )


def find_cache(config: RunConfig) -> featcache.Cache:
    """The cache that the configuration names, else the newest complete one below `./caches` that fits the method.

    Raises:
        CacheError: none there, or none that fits; the error ends with the command that builds it.
    """
    if config.cache is not None:
        limit = None if config.stream_gib is None else int(config.stream_gib * 2**30)
        named = featcache.open(config.cache, cache_dir=config.stream_dir, cache_bytes=limit)
        check_made_with(config, named)
        return named
    unfit: list[tuple[Path, CacheError]] = []
    for path in _newest_first():
        try:
            cache = featcache.open(path)
            missing_features(config, cache)
            return cache
        except CacheError as error:
            unfit.append((path, error))
    if not unfit:
        derived = any("." in name.partition("@")[2] for name in wanted_features(config))
        fits = not (derived or config.vae or config.resolution)
        fits = fits and config.condition in (None, "text/tiny")
        text = " --text tiny" if takes_text(config.model) else ""
        embedded = f"\nor, of images and encoders that come with it:\n  {EMBEDDED}{text}" if fits else ""
        raise CacheError(f"there is no cache below ./{ROOT}", remedy=f"Build one:{_build_all(config)}{embedded}")
    path, reason = unfit[0]
    asked = f"--method {config.method}" + (f" with --streams {','.join(config.streams)}" if config.streams else "")
    raise CacheError(
        f"none of the {len(unfit)} caches below ./{ROOT} fits {asked}; the newest, {path}: {reason.what}",
        remedy=reason.remedy,
    )


def wanted_features(config: RunConfig) -> list[str]:
    """What the methods read and what is diffused beside the latents; open names in angle brackets."""
    methods = (align.required_features(method, config.method_config(method)) for method in config.methods)
    text = [config.condition or EXAMPLE] if takes_text(config.model) else []
    return [*(name for names in methods for name in names), *filter(layer_feature, config.streams), *text]


def _build_all(config: RunConfig) -> str:
    """The lines that build a cache which is not there yet."""
    lines = build_line(None, wanted_features(config), resolution=config.resolution, vae=config.vae)
    return _indented(lines.splitlines())


def _newest_first() -> list[Path]:
    """What looks like a cache below `./caches`, by when its root document was written."""
    dated = []
    for path in ROOT.iterdir() if ROOT.is_dir() else ():
        with contextlib.suppress(OSError):  # it may go at this moment, or be closed to us
            root = find_root(path)
            if root is not None:
                dated.append((root.stat().st_mtime, path))
    return [path for _, path in sorted(dated, reverse=True)]


def cache_of_run(run: Path) -> featcache.Cache:
    """The cache that a run was trained on, opened.

    Raises:
        CacheError: it is gone, or another one lies in its place.
        UserError: it is a URL whose secrets were not stored.
    """
    summary = cache_summary(run)
    path = runs.cache_path(run, summary)
    if not path:
        raise CacheError(
            f"{run} was imported without a cache, and this looks at one",
            remedy="Import the checkpoint again with a cache of its VAE and classes: trainer import FILE --cache CACHE --name NAME",
        )
    try:
        cache = featcache.open(path)
    except UserError as error:
        raise CacheError(
            f"the cache of {run} cannot be opened: {error.what}",
            remedy="Run the command in the folder where the run was trained, or bring the cache back.",
        ) from error
    if cache.fingerprint != summary["fingerprint"]:
        raise CacheError(f"{path} is not the cache that {run} was trained on", remedy="Bring that cache back.")
    return cache


def available_features(cache: featcache.Cache) -> dict[str, FeatureInfo]:
    """Token features and VAE groups of a cache as the methods see them."""
    features = cache.manifest.features
    return {n: FeatureInfo(shape=tuple(f.shape)) for n, f in features.items() if n not in ("label", "key", "content")}


def missing_features(config: RunConfig, cache: featcache.Cache) -> None:
    """Refuses a cache that the configuration cannot be trained on.

    Raises:
        CacheError: it is of the wrong kind, or lacks what the methods read or what is diffused; then the remedy adds all.
    """
    check_made_with(config, cache)
    available = available_features(cache)
    try:
        cache.require(["vae/moments", "label"])
        for method in config.methods:
            align.resolve(method, config.method_config(method), available)
    except CacheError as error:
        raise CacheError(error.what, remedy=build_command(cache, wanted_features(config))) from error
    fitted(config, cache)


def fitted(config: RunConfig, cache: featcache.Cache) -> RunConfig:
    """`config` with nothing left to the cache: with all streams that its methods ask for, and the text that it is
    conditioned on.

    Raises as `with_streams` and `with_condition`.
    """
    return with_condition(with_streams(config, cache), cache)


def with_condition(config: RunConfig, cache: featcache.Cache) -> RunConfig:
    """`config` with the text feature that its model takes: the one it names, else the cache's only one.

    Raises:
        CacheError: the cache has none, or one without the text of ''.
        UserError: it has several, and none is named.
    """
    if not takes_text(config.model):
        return config
    held = cache.manifest.features
    name = config.condition or only_text(held)
    if name is None and (several := sorted(filter(is_text, held))):
        raise UserError(
            f"{cache.path} holds {' and '.join(several)}, and it is not said which {config.model} takes",
            remedy=f"Type for example: --condition {several[0]}",
        )
    if name is None or name not in held or NEEDED not in held:
        raise CacheError(
            f"{cache.path} does not hold {name or 'any text'}, which {config.model} takes",
            remedy=build_command(cache, wanted_features(config)),
        )
    text_shape(name, {name: tuple(held[name].shape)})
    if held[name].empty is None:
        old = sorted(other for other in held if other.partition(".")[0] == name)
        raise CacheError(
            f"{name} in {cache.path} comes without the text of '', which takes a dropped caption's place: it was made by a "
            "featcache that did not keep it",
            remedy=f"Remove it, featcache rm {typed(cache.path)} --features {','.join(old)}, and then: "
            + build_command(cache, [name]),
        )
    return dataclasses.replace(config, condition=name)


def with_streams(config: RunConfig, cache: featcache.Cache) -> RunConfig:
    """`config` with all streams that its methods ask for, and nothing left open in any.

    Raises:
        CacheError: the cache lacks one.
        UserError: one cannot be diffused, or the methods leave open which is meant.
    """
    available = available_features(cache)
    asked: dict[str, dict[str, Any]] = {}
    for method in config.methods:
        chosen = config.method_config(method)
        try:
            streams = align.data_streams(method, chosen, available)
        except CacheError as error:
            command = build_command(cache, wanted_features(config))
            raise CacheError(f"{cache.path}: {error.what}", remedy=command) from error
        for feature, options in streams.items():
            asked[feature] = {**asked.get(feature, {}), **options}
    for feature, given in config.streams.items():
        asked[feature] = {**asked.get(feature, {}), **(given or {})}
    wanted = wanted_features(config)
    return dataclasses.replace(
        config, streams={name: _settled_stream(name, options, cache, wanted) for name, options in asked.items()}
    )


def stream_spec(feature: str, cache: featcache.Cache, wanted: Sequence[str]) -> FeatureSpec:
    """How a feature that is diffused is stored.

    Raises:
        CacheError: it is not there; the remedy adds all of `wanted`.
    """
    spec, parts = cache.manifest.features.get(feature), layer_feature(feature)
    if spec is not None:
        return spec
    near = suggest(feature, cache.manifest.features)
    remedy = build_command(cache, wanted) if parts else DIFFUSIBLE
    if parts and parts.encoder == UNKNOWN:
        remedy = "Import the checkpoint again with --cache of one that holds what it diffuses."
    raise CacheError(f"{cache.path} does not hold {feature}, which is diffused", remedy=near + remedy)


def _settled_stream(
    feature: str, options: Mapping[str, Any], cache: featcache.Cache, wanted: Sequence[str]
) -> dict[str, Any]:
    config, spec = stream_config(feature, options), stream_spec(feature, cache, wanted)
    check_shape(feature, tuple(spec.shape))
    if spec.codec == "int4":
        raise UserError(
            f"{feature} is stored as int4, whose rounding the model would learn to draw",
            remedy=f"Remove it and store it as fp16, bf16 or int8:\n  featcache rm {typed(cache.path)} --features {feature}\n  "
            f"{_build_into(cache, (feature,))} --tokens-codec int8",
        )
    embed = config.embed if config.embed != "auto" else "own" if is_class_token(feature) else "merged"
    if embed == "merged" and len(spec.shape) == 1:
        raise UserError(
            f"{feature} is one vector, which cannot be merged into the latents' channels",
            remedy=f"Leave embed out, or: --set streams.{feature}.embed=own",
        )
    return to_mapping(dataclasses.replace(config, embed=embed))


def random_features(cache: featcache.Cache) -> list[str]:
    """Features that were made with random encoder weights."""
    return sorted(n for n, f in cache.manifest.features.items() if f.provenance.get("weights") == "random")


def sample_keys(cache: featcache.Cache, indices: np.ndarray) -> list[str]:
    """Keys (source paths) of the samples `indices` [n], as `featcache.keys.printable` writes them."""
    with cache.reader(["key"]) as reader:
        out = reader.allocate(len(indices))
        reader.read(indices, out)
    return [printable(key_text(bytes(row))) for row in out["key"]]


def build_command(cache: featcache.Cache, wanted: Iterable[str]) -> str:
    """The sentence with the commands that add features to a cache: `featcache build`, and `featcache derive` for what is
    derived of tokens that it then holds."""
    wanted, held = _definite(_settle(wanted, cache)), cache.manifest.features
    derived = _derive_lines(cache.path, (name for name in wanted if name not in held))
    built = _built_for(wanted)
    lines = derived if derived and held.keys() >= set(built) else [_build_into(cache, built), *derived]
    return f"Add what is missing:{_indented(lines)}"


def _build_into(cache: featcache.Cache, wanted: Sequence[str]) -> str:
    """The `featcache build` line that adds features to a cache, with the images and weights that it was made with."""
    from featcache.sources.embedded import recorded_embedded  # brings what draws

    dataset, moments = cache.manifest.dataset, cache.manifest.features.get("vae/moments")
    words = [_build(cache.path, wanted)]
    if dataset.vae is not None and any(name.startswith("vae/") for name in wanted):
        if dataset.vae["name"] != DEFAULT_VAE:
            words.append(f"--vae {shlex.quote(dataset.vae['name'])}")
        if moments is not None and moments.provenance.get("weights") == "random":
            words.append(f"--random-weights {moments.provenance['seed']}")
    if NEEDED in cache.manifest.features and any(map(is_text, wanted)):
        captions = str((cache.manifest.features[NEEDED].provenance.get("captions") or {}).get("from", ""))
        for kind in ("table ", "COCO annotations "):
            if captions.startswith(kind):
                words.append(f"--captions {shlex.quote(f'/path/to/{captions.removeprefix(kind)}')}")
    encoders = {parts.encoder for name in wanted if (parts := layer_feature(name))}
    for name, feature in cache.manifest.features.items():
        parts = layer_feature(name)
        if parts and parts.encoder in encoders and feature.provenance.get("weights") == "random":
            words.append(f"--random-weights {feature.provenance['seed']}")
            break
    if recorded_embedded(dataset.source) is None:  # which are drawn anew, so many as there were
        kind, _, name = dataset.source.partition(" ")
        words.append(f"--data {shlex.quote(f'/path/to/{name}' if kind == 'folder' else '/path/to/the/same/images')}")
    return " ".join(words)


def _indented(lines: Iterable[str]) -> str:
    """Commands, each on a line of its own below a sentence."""
    return "".join(f"\n  {line}" for line in lines)


def _settle(wanted: Iterable[str], cache: featcache.Cache) -> list[str]:
    """Open names such as `<encoder>@<last>` made definite where the cache holds tokens of exactly one encoder.

    Its deepest cached layer counts as the last, and the texture layer is DyA's 9 of 11 in proportion.
    """
    encoders = encoder_layers(cache.manifest.features)
    if len(encoders) != 1:
        return list(wanted)
    ((encoder, layers),) = encoders.items()
    texture, last = round(9 * layers[-1] / 11), layers[-1]
    named = (name.replace("<encoder>", encoder).replace("<last>", str(last)) for name in wanted)
    return [name.replace("<texture>", str(texture)) for name in named]


def _definite(wanted: Iterable[str]) -> list[str]:
    """Names with the default encoder's last layer, if a part of an open one is wanted: only then a line names layers."""
    wanted = list(wanted)
    if not any(name.startswith(f"{LAST_LAYER}.") for name in wanted):
        return wanted
    return [name.replace(LAST_LAYER, f"{DEFAULT_ENCODER}@{DEFAULT_LAST}") for name in wanted]


def build_line(
    cache: str | Path | None, wanted: Iterable[str], *, resolution: int | None = None, vae: str | None = None
) -> str:
    """`featcache build ...` for feature names, and a `featcache derive ...` line for each that is derived of tokens; open
    names (in angle brackets) become the default encoder's.

    cache: None for one that is not there yet, which derive lines call CACHE.
    """
    wanted = _definite(wanted)
    line = _build(cache, _built_for(wanted), resolution=resolution, vae=vae)
    return "\n".join([line, *_derive_lines(cache or "CACHE", wanted)])


def _derived(name: str) -> LayerFeature | None:
    """What the name of a feature that is derived of tokens says; None for any other."""
    feature = layer_feature(name)
    return feature if feature and feature.is_derived else None


def _source(feature: LayerFeature) -> str:
    """The tokens that it is derived of."""
    return str(dataclasses.replace(feature, part=""))


def _built_for(wanted: Iterable[str]) -> list[str]:
    """What `featcache build` makes of `wanted`: in the place of what is derived, the tokens."""
    names = (_source(feature) if (feature := _derived(name)) else name for name in wanted)
    return list(dict.fromkeys(names))


def _derive_lines(cache: str | Path, wanted: Iterable[str]) -> list[str]:
    """`featcache derive ...` for each derived feature; a name that does not say the number of components is given."""
    lines = []
    for name in dict.fromkeys(wanted):
        if feature := _derived(name):
            number = re.fullmatch(r"pca([1-9][0-9]{0,4})", feature.part)
            given = "" if number else f" --name {typed(name)}"
            words = f"featcache derive {typed(cache)} --feature {typed(_source(feature))}"
            lines.append(f"{words} --pca {number[1] if number else COMPONENTS}{given}")
    return lines


def _build(
    cache: str | Path | None, wanted: Iterable[str], *, resolution: int | None = None, vae: str | None = None
) -> str:
    levels = sorted({name.split("/")[1] for name in wanted if name.startswith("vae/G")})
    layers: dict[str, set[int]] = {}
    class_tokens: dict[str, set[int]] = {}
    for name in wanted:
        encoder, at, layer = name.partition("@")
        if not at:
            continue
        encoder = DEFAULT_ENCODER if encoder.startswith("<") else encoder
        layers.setdefault(encoder, set())
        if feature := layer_feature(name):
            of_kind = class_tokens if feature.is_class_token else layers
            of_kind.setdefault(encoder, set()).add(feature.layer)
        elif "texture" in layer:
            layers[encoder] |= {9, DEFAULT_LAST}
    words = ["featcache build"]
    if cache is not None:
        words.append(f"--into {typed(cache)}")
    if resolution is not None:
        words.append(f"--resolution {resolution}")
    if vae is not None:
        words.append(f"--vae {vae}")
    for encoder, numbers in layers.items():
        choice = EncoderChoice(
            name=encoder,
            layers=tuple(sorted(numbers)),
            class_tokens=tuple(sorted(class_tokens.get(encoder, ()))),
        )
        words.append(f"--encoder {choice}")
    if levels:
        words.append(f"--vae-levels {','.join(levels)}")
    if texts := list(dict.fromkeys(name.removeprefix("text/") for name in wanted if is_text(name))):
        words.append(f"--text {','.join(texts)}")
    return " ".join(words)
