"""What storage costs as the loss sees it: cosine between alignment gradients from exact and from stored features.

Measured of every codec, of the leading principal components of each token by two of them (`featcache build
--levels-basis`), and of the cache as it is, where its features can be computed anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from featcache.codecs import FeatureCodec
from featcache.encoders.base import WeightsSource
from featcache.encoders.vae import VaeEncoder, recorded_resampling
from featcache.encoders.vision import VisionEncoder
from featcache.errors import UserError
from featcache.read.components import Components
from featcache.store.basis import token_width
from featcache.store.layout import CODECS
from featcache.store.manifest import FeatureSpec
from trainer.align.base import AlignInputs
from trainer.align.heads import to_grid
from trainer.analyze.gradients import degrees, hidden_gradients
from trainer.analyze.probes import OWN, OwnSample, fit_heads, head_loss, own_loss, own_sample, split, taps
from trainer.analyze.result import NotApplicable, Result, Row
from trainer.analyze.subject import Subject, pictures_of
from trainer.plots import Chart, Matrix, Plot, Series
from trainer.typeset import measure as shown_number

MOST_SAMPLES = 64  # cosines vary little from sample to sample
AS_CACHED = "as cached"


@dataclass(frozen=True, kw_only=True)
class Storage:
    """A way to store a feature: a codec, of all channels or of the components that 1 / `part` of them are."""

    codec: str
    part: int = 1

    @property
    def label(self) -> str:
        return self.codec if self.part == 1 else f"{self.codec}, 1/{self.part} components"

    def rank(self, shape: tuple[int, ...]) -> int:
        """Number of components of a feature of that shape; a multiple of 32, which every codec can hold."""
        return token_width(shape) // self.part // 32 * 32

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether that is any components at all."""
        return self.rank(shape) > 0


NAMES = tuple(name for name in CODECS if name != "raw")
PLAIN = tuple(Storage(codec=name) for name in NAMES)
REDUCED = tuple(Storage(codec=codec, part=part) for codec in ("int8", "int4") for part in (2, 4, 8, 16, 32))
# (feature or own loss, label of a storage) -> per-sample gradient cosines in each timestep bin.
Cosines = dict[tuple[str, str], list[Tensor]]


def gradient_cosines(exact: Tensor, stored: Tensor) -> Tensor:
    """Cosine of each sample's two gradients, [B, ...] each -> float64 [B]; NaN where one is zero."""
    a, b = exact.flatten(1).double(), stored.flatten(1).double()
    cosines: Tensor = (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1))
    return cosines


def stored_bits(codec: str, shape: tuple[int, ...]) -> float:
    """Bits per value of one sample's feature, scales included."""
    return 8 * FeatureSpec(name="x", shape=shape, codec=codec).bytes_per_sample / int(np.prod(shape))


def roundtrip(spec: FeatureSpec, x: Tensor) -> Tensor:
    """What the trainer would see of features [B, *shape] stored as `spec` says; float32."""
    codec = FeatureCodec(spec).to(x.device)
    return codec.decode({spec.name + suffix: tensor for suffix, tensor in codec.encode(x).items()})


def storages(subject: Subject) -> dict[str, dict[str, FeatureSpec]]:
    """Label -> feature -> how it is stored. Components are those of samples that nothing is measured on, for the features
    that the run reads and those shown beside it."""
    found: dict[str, dict[str, FeatureSpec]] = {}
    for name in [*subject.token_features, *subject.levels]:
        shape = tuple(subject.cache.manifest.features[name].shape)
        for storage in PLAIN:
            with contextlib.suppress(UserError):  # a width that the codec cannot hold
                spec = FeatureSpec(name=name, shape=shape, codec=storage.codec)
                found.setdefault(storage.label, {})[name] = spec
    components, sizes, shown = Components(), split(subject), _reduced(subject)
    for rows in subject.chunks(sizes.fitted, start=sizes.measured):
        for name in shown:
            components.add(name, subject.read(name, rows).cpu().numpy(), seed=rows.start)
    for name in shown:
        shape = tuple(subject.cache.manifest.features[name].shape)
        for storage in REDUCED:
            rank = storage.rank(shape)
            if storage.fits(shape) and components.count(name) >= rank:
                basis = components.basis(name, rank)
                spec = FeatureSpec(name=name, shape=shape, codec=storage.codec, basis=basis)
                found.setdefault(storage.label, {})[name] = spec
    return found


def _reduced(subject: Subject) -> list[str]:
    reads = subject.alignment.reads if subject.alignment is not None else ()
    cached = [*subject.token_features, *subject.levels]
    return [name for name in cached if name in {*reads, *subject.shown_targets()}]


def recompute(subject: Subject, names: list[str], rows: slice) -> dict[str, Tensor] | None:
    """The features as the encoders give them, float32; None where images or weights are not at hand.

    Raises:
        UserError: `data` holds other images than the cache was built from.
    """
    features = subject.cache.manifest.features
    if subject.source is None:
        return None
    _, pictures = pictures_of(subject, rows)
    pixels = torch.from_numpy(pictures).to(subject.device).permute(0, 3, 1, 2)
    out: dict[str, Tensor] = {}
    for name in names:
        if name in out:
            continue
        encoder = _encoder(subject, name)
        if encoder is None or encoder.provenance[name]["sha256"] != features[name].provenance.get("sha256"):
            return None
        with torch.no_grad():
            out |= {key: value for key, value in encoder(pixels).items() if key in names}
    return out


def _encoder(subject: Subject, name: str) -> VaeEncoder | VisionEncoder | None:
    spec, options = subject.cache.manifest.features[name], subject.options
    random = spec.provenance.get("seed") if spec.provenance.get("weights") == "random" else None
    weights = WeightsSource(weights_dir=Path(options.weights_dir) if options.weights_dir else None, random_seed=random)
    resolution = subject.cache.manifest.dataset.resolution
    try:
        if name.startswith("vae/"):
            levels = tuple(n.split("/")[1] for n in subject.levels)
            return VaeEncoder(
                spec.provenance["name"],
                weights,
                resolution=resolution,
                levels=levels,
                device=subject.device,
                resampling=recorded_resampling({name: spec.provenance}) or "bilinear",
            )
        encoder, layer = name.split("@")
        norm = "all" if spec.provenance.get("final_norm") else "last"
        return VisionEncoder(
            encoder, (int(layer),), weights, resolution=resolution, final_norm=norm, device=subject.device
        )
    except UserError:
        return None  # weights that are not here


def measure(subject: Subject, ways: Mapping[str, Mapping[str, FeatureSpec]]) -> tuple[Cosines, bool]:
    """The cosines of those storages (see `storages`), and whether the features they are compared with were exact.

    Gradients are with respect to the tapped hidden state. A feature's loss is the negative patch cosine behind a fitted
    head; the own loss reads all its features through one codec.
    """
    options = subject.options
    names = [*subject.token_features, *subject.levels]
    own = _own_reads(subject)
    depths = subject.alignment.taps if subject.alignment is not None else ()
    heads = fit_heads(subject, names)
    losses = {name: head_loss(subject, *head) for name, head in heads.items()}
    found: dict[tuple[str, str], list[list[Tensor]]] = {}
    exact_everywhere = True
    for rows in subject.chunks(min(split(subject).measured, MOST_SAMPLES)):
        exact = recompute(subject, names, rows)
        exact_everywhere &= exact is not None
        cached = {name: subject.read(name, rows) for name in names}
        reference = exact if exact is not None else cached
        stored = {label: {n: roundtrip(s, reference[n]) for n, s in specs.items()} for label, specs in ways.items()}
        if exact is not None:
            stored[AS_CACHED] = cached
        for index in range(options.bins):
            t = subject.times_in_bin(rows, index, options.bins)
            state = subject.state(rows, t, taps(subject), targets=True)

            def gradients(name: str, features: Mapping[str, Tensor], state: AlignInputs = state) -> Tensor:
                if name == OWN:
                    sample = _own(subject, state, own, features)
                    return _flat(hidden_gradients(own_loss(subject), subject.tokens(state, depths), sample))
                target = _target(subject, name, features[name])
                return _flat(hidden_gradients(losses[name], subject.tokens(state, (subject.block,)), target))

            for name in [*names, *([OWN] if own else [])]:
                before = gradients(name, reference)
                for label, features in stored.items():
                    if all(n in features for n in (own if name == OWN else [name])):
                        cells = found.setdefault((name, label), [[] for _ in range(options.bins)])
                        cells[index].append(gradient_cosines(before, gradients(name, features)))
    return {key: [torch.cat(parts) for parts in bins] for key, bins in found.items()}, exact_everywhere


def _flat(by_depth: Mapping[int, Tensor]) -> Tensor:
    return torch.cat([g.flatten(1) for g in by_depth.values()], dim=1)


def _target(subject: Subject, name: str, feature: Tensor) -> Tensor:
    return to_grid(feature.mean(dim=1) if name.startswith("vae/") else feature, subject.info.grid)


def _own(subject: Subject, state: AlignInputs, reads: list[str], features: Mapping[str, Tensor]) -> OwnSample:
    """What the method reads beside `reads` (REG's class token) is as the cache holds it."""
    targets = {**state.targets, **{name: features[name] for name in reads}}
    return own_sample(subject, dataclasses.replace(state, targets=targets))


def run(subject: Subject) -> Result:
    """Cosines by codec, feature and timestep."""
    if not subject.token_features and not subject.levels:
        raise NotApplicable(
            f"{subject.cache.path} holds no features besides latents", remedy="Add some with featcache build."
        )
    ways = storages(subject)
    found, exact = measure(subject, ways)
    names = list(dict.fromkeys(name for name, _ in found))
    means = np.array([[_mean(found, name, codec) for codec in NAMES] for name in names])
    shown = OWN if OWN in names else names[0]
    basis = (
        "features computed anew from the images"
        if exact
        else "the features as the cache holds them (images or weights are not here)"
    )
    return Result(
        what="codec",
        title="Fidelity of storage codecs",
        question="Does rounding the cached features change the direction in which alignment pulls?",
        finding=f"{_finding(subject, found, means[names.index(shown)], shown, exact=exact)} Compared with {basis}.",
        plots=[
            _matrix(names, means),
            _over_t(found, shown, subject.options.bins),
            *(_over_bytes(subject, found, ways, name) for name in dict.fromkeys([shown, *_reduced(subject)])),
        ],
        rows=_rows(subject, found, ways),
        settings={
            "reference": basis,
            "gradients with respect to": f"hidden state after block {subject.block}",
            "samples": len(next(iter(found.values()))[0]),
            "weights": subject.weights,
        },
    )


def _mean(found: Cosines, name: str, codec: str) -> float:
    """Over samples and timestep bins; NaN where the codec cannot hold the feature."""
    return float(torch.cat(found[name, codec]).nanmean()) if (name, codec) in found else np.nan


def _own_reads(subject: Subject) -> list[str]:
    reads = subject.alignment.reads if subject.alignment is not None else ()
    return [n for n in (*subject.token_features, *subject.levels) if n in reads]


def _bytes(subject: Subject, ways: Mapping[str, Mapping[str, FeatureSpec]], name: str, label: str) -> int:
    """Stored bytes per image of one feature, or of all that the own loss reads."""
    features = subject.cache.manifest.features
    specs = features if label == AS_CACHED else ways[label]
    return sum(specs[n].bytes_per_sample // specs[n].views for n in (_own_reads(subject) if name == OWN else [name]))


def _rows(subject: Subject, found: Cosines, ways: Mapping[str, Mapping[str, FeatureSpec]]) -> list[Row]:
    bins = subject.options.bins
    return [
        {
            "target": name,
            "codec": codec,
            "bytes_per_image": _bytes(subject, ways, name, codec),
            "t_low": i / bins,
            "t_high": (i + 1) / bins,
            "cosine_mean": float(v.nanmean()),
            "cosine_lowest": float(v[~v.isnan()].min()) if (~v.isnan()).any() else float("nan"),
            "samples": len(v),
        }
        for (name, codec), cosines in found.items()
        for i, v in enumerate(cosines)
    ]


def _whose(shown: str) -> str:
    return "the run's own loss" if shown == OWN else shown


def _finding(subject: Subject, found: Cosines, means: np.ndarray, shown: str, *, exact: bool) -> str:
    """What the storage in use and the coarsest codec do to the loss `shown`.

    means: its mean cosine by codec [codecs]. exact: whether they were compared with exact features; else they were rounded once
    already, and of the storage in use nothing is known: rounding again changes nothing.
    """
    features = subject.cache.manifest.features
    used = features[(_own_reads(subject) or [*subject.token_features, *subject.levels])[0]]
    cosine = _mean(found, shown, AS_CACHED)
    if np.isnan(cosine) and used.basis is None and used.codec in NAMES:
        cosine = float(means[NAMES.index(used.codec)])
    sentence = ""
    if exact and not np.isnan(cosine):
        by = f"{shown_number(degrees(cosine))} degrees"
        sentence = f"The cache stores {used.stored_as}: that turns the gradient of {_whose(shown)} by {by}. "
    lowest = int(np.nanargmin(means))
    by = f"{shown_number(degrees(float(means[lowest])))} degrees"
    return f"{sentence}The coarsest codec of all channels, {NAMES[lowest]}, turns it by {by}."


def _matrix(names: list[str], means: np.ndarray) -> Plot:
    """means: cosines [names, codecs]."""
    matrix = Matrix(
        title="Mean cosine between gradients from exact and from stored features",
        columns=[f"{c} ({stored_bits(c, (16, 64)):.3g} bit)" for c in NAMES],
        rows=names,
        values=means,
        low=0.995,
        high=1.0,
        decimals=5,
        note="Look for the cheapest codec whose column stays at 0.999 or above for the features you read; the papers "
        "store nothing, so no figure of theirs corresponds (bits per value at width 64, scales included; a dash: the "
        "codec cannot hold that width).",
    )
    return Plot(name="codec_matrix", drawing=matrix)


def _over_t(found: Cosines, shown: str, bins: int) -> Plot:
    """One line per codec for the loss `shown`."""
    centres = (np.arange(bins) + 0.5) / bins
    # int8 and friends miss 1 by parts in a thousand or less: only the distance from 1 shows differences.
    lines = [
        Series(
            label=c, x=centres, y=[max(1 - float(v.nanmean()), 1e-12) for v in found[shown, c]], colour=i, markers=True
        )
        for i, c in enumerate(NAMES)
        if c != "fp32" and (shown, c) in found
    ]
    whose = _whose(shown)
    return Plot(
        name="codec_over_t",
        drawing=Chart(
            title=f"{whose[0].upper() + whose[1:]} over timesteps",
            x_label="timestep t (0 = data, 1 = noise)",
            y_label="1 - cosine (0 = no change)",
            series=lines,
            log_y=True,
            note="Look for lines below 0.001: there, rounding turns the gradient by less than 3 degrees, far "
            "less than gradients of different images differ (see G-SNR); no figure of the papers corresponds.",
        ),
    )


def _over_bytes(subject: Subject, found: Cosines, ways: Mapping[str, Mapping[str, FeatureSpec]], name: str) -> Plot:
    """Bytes per image against cosine: all channels by each codec, and components by two of them."""
    lines = []
    families: list[tuple[str, list[str]]] = [("all channels", [s.label for s in PLAIN if s.codec != "fp32"])]
    families += [(f"components, {codec}", [s.label for s in REDUCED if s.codec == codec]) for codec in ("int8", "int4")]
    families += [("the cache itself", [AS_CACHED])]
    for colour, (title, labels) in enumerate(families):
        points: dict[float, float] = {}  # of two ways that take the same bytes, the better
        for label in labels:
            if (name, label) in found:
                size = _bytes(subject, ways, name, label) / 1000
                points[size] = min(points.get(size, 2.0), max(1 - _mean(found, name, label), 1e-12))
        if points:
            x = sorted(points)
            lines.append(Series(label=title, x=x, y=[points[size] for size in x], colour=colour, markers=True))
    whose = _whose(name)
    return Plot(
        name=f"codec_bytes_{name.replace('/', '_').replace('@', '_').replace(' ', '_')}",
        drawing=Chart(
            title=f"{whose[0].upper() + whose[1:]}: bytes against fidelity",
            x_label="stored, KB per image",
            y_label="1 - cosine (0 = no change)",
            series=lines,
            log_y=True,
            note="Look for the leftmost point below 0.01 (8 degrees): featcache build --levels-basis, --tokens-basis and "
            "--levels-codec, --tokens-codec store features like that (here in multiples of 32 components); no figure of the papers corresponds.",
        ),
    )
