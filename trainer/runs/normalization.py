"""How a run normalises its latents: settled when it starts, kept in its folder, used wherever it is trained or sampled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from featcache.errors import CacheError, UserError
from featcache.paths import typed
from featcache.progress import QUIET, Progress
from featcache.read.normalization import MOMENTS, Over, Statistics, compute, load, save
from featcache.store import files
from trainer.distributed import from_main
from trainer.runs import folder as runs
from trainer.runs.cache import build_command
from trainer.runs.config import RunConfig
from trainer.runs.records import cache_summary
from trainer.runs.streams import StreamConfig, stream_config

if TYPE_CHECKING:
    from featcache import Cache

FILE = runs.STATISTICS


@dataclass(frozen=True, kw_only=True)
class Normalization:
    """`x = (z - shift) * scale`: numbers for all channels alike, or float32 tensors `[C, 1, 1]` or `[C, h, w]`."""

    shift: float | Tensor
    scale: float | Tensor


def scalar(vae: Mapping[str, Any]) -> Normalization:
    """As the manifest's `dataset.vae` has it."""
    return Normalization(shift=vae["shift_factor"], scale=vae["scaling_factor"])


def from_statistics(statistics: Statistics) -> Normalization:
    return Normalization(shift=statistics.mean, scale=1 / statistics.std)


def resolve(config: RunConfig, cache: Cache) -> str:
    """`config.normalization` with nothing left open."""
    if config.normalization != "auto":
        return config.normalization
    statistics = config.statistics is not None or (cache.manifest.dataset.vae or {}).get("channel_mean") is not None
    return "channel" if statistics else "scalar"


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """Statistics that a run needs.

    shape: of the feature. path, fingerprint: of the cache; '' of imported runs without one. given: file that the user
    named. file: the run's copy. flags: how they are typed, over and file.
    """

    feature: str
    over: Over
    shape: tuple[int, ...]
    path: str
    fingerprint: str
    given: str | None = None
    file: str
    flags: tuple[str, str] = ("--normalization", "--statistics")


def settle(
    config: RunConfig, cache: Cache, run: Path, *, main: bool = True, watcher: Progress = QUIET
) -> Statistics | None:
    """The statistics that a run (new, or to be resumed) is normalised by; None for `scalar`.

    A run that has begun has its own copy. A new one takes those of `config.statistics`, or those that were imported with
    the latents, or computes them from the whole cache: on the `main` rank, for all of them.

    Raises:
        UserError: they do not fit the latents or the setting, or cannot be computed; a resumed run was given others.
        CacheError: they are of another cache, or the latents cannot be read.
    """
    if config.normalization == "scalar":
        if config.statistics is not None:
            raise UserError(
                "statistics are given, and normalization is scalar, which uses none",
                remedy="Type --normalization channel (or position), or leave --statistics out.",
            )
        return None
    if MOMENTS not in cache.manifest.features:
        raise CacheError(f"{cache.path} holds no VAE moments to train on", remedy=build_command(cache, (MOMENTS,)))
    return _settle(_of_latents(config, _Origin.of(cache)), cache, run, main, watcher)


def settle_streams(
    config: RunConfig, cache: Cache, run: Path, *, main: bool = True, watcher: Progress = QUIET
) -> dict[str, Statistics]:
    """As `settle`, for each stream of a settled configuration that is normalised."""
    found = {}
    for feature, options in config.streams.items():
        stream = stream_config(feature, options)
        if stream.normalization == "none":
            if stream.statistics is not None:
                raise UserError(
                    f"statistics of {feature} are given, and its normalization is none, which uses none",
                    remedy=f"Type --set streams.{feature}.normalization=channel, or leave the statistics out.",
                )
            continue
        found[feature] = _settle(_of_stream(feature, stream, _Origin.of(cache)), cache, run, main, watcher)
    return found


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """What statistics were computed from: the cache itself, or what a run has recorded of it."""

    path: str
    fingerprint: str
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, cache: Cache) -> _Origin:
        shapes = {name: tuple(feature.shape) for name, feature in cache.manifest.features.items()}
        return cls(path=str(cache.path), fingerprint=cache.fingerprint, shapes=shapes)

    @classmethod
    def recorded(cls, run: Path) -> _Origin:
        summary = cache_summary(run)
        shapes = {name: tuple(feature["shape"]) for name, feature in summary["features"].items()}
        return cls(path=summary["path"], fingerprint=summary["fingerprint"], shapes=shapes)

    def shape(self, feature: str) -> tuple[int, ...]:
        if feature not in self.shapes:
            raise UserError(
                f"{feature} is normalised, and the run's cache.json does not say its shape",
                remedy="Bring the file back.",
            )
        return self.shapes[feature]


def _of_latents(config: RunConfig, origin: _Origin) -> _Wanted:
    return _Wanted(
        feature=MOMENTS,
        over="position" if config.normalization == "position" else "channel",
        shape=origin.shape(MOMENTS),
        path=origin.path,
        fingerprint=origin.fingerprint,
        given=config.statistics,
        file=FILE,
    )


def _of_stream(feature: str, stream: StreamConfig, origin: _Origin) -> _Wanted:
    assert stream.normalization != "none", "what is not normalised has no statistics"
    return _Wanted(
        feature=feature,
        over=stream.normalization,
        shape=origin.shape(feature),
        path=origin.path,
        fingerprint=origin.fingerprint,
        given=stream.statistics,
        file=runs.stream_statistics(feature),
        flags=(f"streams.{feature}.normalization", f"streams.{feature}.statistics"),
    )


def _settle(wanted: _Wanted, cache: Cache, run: Path, main: bool, watcher: Progress) -> Statistics:
    # What the user names may be a link, as in the Hugging Face hub's folders; what lies in a run may not.
    given = None if wanted.given is None else _fitting(load(Path(wanted.given).resolve()), wanted)
    if not runs.is_run(run):  # what a start that was cut short left there is no run's
        return given or _fitting(_imported(wanted, cache) or _computed(wanted, cache, main, watcher), wanted)
    kept = _kept(run, wanted)
    if given is not None and not (torch.equal(given.mean, kept.mean) and torch.equal(given.std, kept.std)):
        raise UserError(
            f"{run} was started with other statistics than {wanted.given}",
            remedy=f"Leave {wanted.flags[1]} out: the run has its own copy. Or start another run with --name.",
        )
    return kept


def keep(statistics: Statistics | None, run: Path, of_streams: Mapping[str, Statistics] | None = None) -> None:
    """Writes the copies of a run that begins, before its `config.yaml`; one that has begun keeps its own."""
    if runs.is_run(run):
        return
    if statistics is not None:
        save(statistics, files.inside(run, FILE))
    for feature, found in (of_streams or {}).items():
        save(found, files.inside(run, runs.stream_statistics(feature)))


def streams_of_run(run: Path, config: RunConfig) -> dict[str, Statistics]:
    """What a run's streams were normalised by.

    Raises:
        UserError: a copy is missing or damaged, or is not of the feature and the cache that the run was trained on.
    """
    streams = {feature: stream_config(feature, options) for feature, options in config.streams.items()}
    normalised = {feature: stream for feature, stream in streams.items() if stream.normalization != "none"}
    if not normalised:
        return {}
    origin = _Origin.recorded(run)
    return {feature: _kept(run, _of_stream(feature, stream, origin)) for feature, stream in normalised.items()}


def of_tokens(statistics: Statistics) -> Normalization:
    """Of tokens or a class token, for values `[B, C, T]`: tensors `[C, 1]` or `[C, T]`."""

    def columns(values: Tensor) -> Tensor:
        if values.ndim == 3:  # of a file: [C, 1, 1], or RAE's [C, h, w]
            return values.flatten(1)
        return values[:, None] if values.ndim == 1 else values.T

    return Normalization(shift=columns(statistics.mean), scale=1 / columns(statistics.std))


def of_run(run: Path, config: RunConfig, vae: Mapping[str, Any]) -> Normalization | None:
    """What a run was trained with; None for `scalar` where the run's record of the VAE does not say.

    Raises:
        UserError: its copy is missing or damaged, or is not of the latents and the cache that the run was trained on.
    """
    if config.normalization == "scalar":
        return scalar(vae) if "scaling_factor" in vae and "shift_factor" in vae else None
    return from_statistics(_kept(run, _of_latents(config, _Origin.recorded(run))))


def _kept(run: Path, wanted: _Wanted) -> Statistics:
    path = files.inside(run, wanted.file)
    if not path.is_file():
        raise UserError(
            f"{path} is missing, and what the run trains on was normalised by it",
            remedy="Bring it back: without it the run can be neither continued nor "
            f"{'sampled from' if wanted.file == FILE else 'analysed'}.",
        )
    return _fitting(load(path), wanted, copy=path)


def _imported(wanted: _Wanted, cache: Cache) -> Statistics | None:
    """Those of the channels that the latents brought with them."""
    of_channels = wanted.feature == MOMENTS and wanted.over == "channel"
    return from_record(cache.manifest.dataset.vae or {}) if of_channels else None


def from_record(vae: Mapping[str, Any]) -> Statistics | None:
    """Those that were imported with latents, from the manifest's `dataset.vae`; None if it has none."""
    mean, std = vae.get("channel_mean"), vae.get("channel_std")
    if mean is None or std is None:
        return None
    return Statistics(mean=torch.tensor(mean)[:, None, None], std=torch.tensor(std)[:, None, None])


def _computed(wanted: _Wanted, cache: Cache, main: bool, watcher: Progress) -> Statistics:
    found = None
    if main:
        of = "the latents" if wanted.feature == MOMENTS else wanted.feature
        watcher.note(f"no statistics were given: computing them from {of} of {cache.path}, once for this run")
        found = compute(cache, wanted.feature, wanted.over, progress=watcher)
    found = from_main(found)
    assert found is not None
    return found


def _compute(wanted: _Wanted) -> str:
    """What to type for statistics that fit."""
    feature = "" if wanted.feature == MOMENTS else f" --feature {wanted.feature}"
    command = f"featcache stats {typed(wanted.path)}{feature} --over {wanted.over} --out stats.safetensors"
    return f"Leave {wanted.flags[1]} out, and the run computes them; or once for many runs: {command}"


def _shapes(wanted: _Wanted) -> tuple[tuple[int, ...], ...]:
    """That the statistics may have: as they are computed here, and as files hold them."""
    shape = wanted.shape
    if wanted.feature == MOMENTS:
        latent = (shape[0] // 2, *shape[1:])
        return ((latent[0], 1, 1),) if wanted.over == "channel" else (latent,)
    channels = shape[-1]
    if wanted.over == "channel" or len(shape) == 1:
        return (channels,), (channels, 1, 1)
    side = math.isqrt(shape[0])
    return shape, (channels, side, side)


def _fitting(statistics: Statistics, wanted: _Wanted, *, copy: Path | None = None) -> Statistics:
    """copy: the run's own, which nothing that is typed replaces."""
    where, back = (f"{copy}: ", "Bring the run's own file back.") if copy is not None else ("", None)
    if statistics.feature not in (None, wanted.feature):
        raise UserError(
            f"{where}the statistics are of {statistics.feature!s:.200}, not of {wanted.feature}",
            remedy=back or _compute(wanted),
        )
    if wanted.fingerprint and statistics.fingerprint not in (None, wanted.fingerprint):
        raise CacheError(
            f"{where}the statistics were computed from a cache with fingerprint {statistics.fingerprint!s:.12}, and "
            f"{wanted.path} has {wanted.fingerprint[:12]}",
            remedy=back or _compute(wanted),
        )
    shapes = _shapes(wanted)
    if tuple(statistics.mean.shape) not in shapes:
        raise UserError(
            f"{where}the statistics have the shape {list(statistics.mean.shape)}, and {wanted.flags[0]} {wanted.over} needs "
            f"{list(shapes[0])}",
            remedy=back
            or f"Give {wanted.flags[0]} channel or position as they were computed, or compute others with featcache stats.",
        )
    return statistics
