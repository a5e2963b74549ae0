"""How a run normalises its latents: settled when it starts, kept in its folder, used wherever it is trained or sampled."""

from __future__ import annotations

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
    # What the user names may be a link, as in the Hugging Face hub's folders; what lies in a run may not.
    given = None if config.statistics is None else _fitting(load(Path(config.statistics).resolve()), config, cache)
    if not runs.is_run(run):  # what a start that was cut short left there is no run's
        return given or _fitting(_imported(config, cache) or _computed(config, cache, main, watcher), config, cache)
    kept = _fitting(_kept(run), config, cache)
    if given is not None and not (torch.equal(given.mean, kept.mean) and torch.equal(given.std, kept.std)):
        raise UserError(
            f"{run} was started with other statistics than {config.statistics}",
            remedy="Leave --statistics out: the run has its own copy. Or start another run with --name.",
        )
    return kept


def keep(statistics: Statistics | None, run: Path) -> None:
    """Writes the copy of a run that begins, before its `config.yaml`; one that has begun keeps its own."""
    if statistics is not None and not runs.is_run(run):
        save(statistics, files.inside(run, FILE))


def of_run(run: Path, config: RunConfig, vae: Mapping[str, Any]) -> Normalization | None:
    """What a run was trained with; None for `scalar` where the run's record of the VAE does not say.

    Raises:
        UserError: its copy is missing or damaged.
    """
    if config.normalization == "scalar":
        return scalar(vae) if "scaling_factor" in vae and "shift_factor" in vae else None
    return from_statistics(_kept(run))


def _kept(run: Path) -> Statistics:
    path = files.inside(run, FILE)
    if not path.is_file():
        raise UserError(
            f"{path} is missing, and the run's latents were normalised by it",
            remedy="Bring it back: without it the run can be neither continued nor sampled from.",
        )
    return load(path)


def _imported(config: RunConfig, cache: Cache) -> Statistics | None:
    """Those of the channels that the latents brought with them."""
    return from_record(cache.manifest.dataset.vae or {}) if config.normalization == "channel" else None


def from_record(vae: Mapping[str, Any]) -> Statistics | None:
    """Those that were imported with latents, from the manifest's `dataset.vae`; None if it has none."""
    mean, std = vae.get("channel_mean"), vae.get("channel_std")
    if mean is None or std is None:
        return None
    return Statistics(mean=torch.tensor(mean)[:, None, None], std=torch.tensor(std)[:, None, None])


def _computed(config: RunConfig, cache: Cache, main: bool, watcher: Progress) -> Statistics:
    found = None
    if main:
        watcher.note(f"no statistics were given: computing them from the latents of {cache.path}, once for this run")
        over: Over = "position" if config.normalization == "position" else "channel"
        found = compute(cache, MOMENTS, over, progress=watcher)
    found = from_main(found)
    assert found is not None
    return found


def _compute(config: RunConfig, cache: Cache) -> str:
    """What to type for statistics that fit."""
    command = f"featcache stats {typed(str(cache.path))} --over {config.normalization} --out stats.safetensors"
    return f"Leave --statistics out, and the run computes them; or once for many runs: {command}"


def _fitting(statistics: Statistics, config: RunConfig, cache: Cache) -> Statistics:
    channels, *sides = cache.manifest.features[MOMENTS].shape
    latent = (channels // 2, *sides)
    shape = (latent[0], 1, 1) if config.normalization == "channel" else latent
    if statistics.feature not in (None, MOMENTS):
        raise UserError(
            f"the statistics are of {statistics.feature}, not of {MOMENTS}",
            remedy=_compute(config, cache),
        )
    if statistics.fingerprint not in (None, cache.fingerprint):
        raise CacheError(
            f"the statistics were computed from a cache with fingerprint {str(statistics.fingerprint)[:12]}, and "
            f"{cache.path} has {cache.fingerprint[:12]}",
            remedy=_compute(config, cache),
        )
    if tuple(statistics.mean.shape) != shape:
        raise UserError(
            f"the statistics have the shape {list(statistics.mean.shape)}, and --normalization {config.normalization} needs "
            f"{list(shape)}",
            remedy="Type --normalization channel or position as they were computed, or compute others with featcache stats.",
        )
    return statistics
