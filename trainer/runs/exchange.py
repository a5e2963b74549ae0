"""Checkpoints from and for the public SiT, DiT, REPA, SRA, LightningDiT, REG and ReDi code, as run folders of ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import featcache
from featcache.errors import CacheError, UserError
from featcache.feature_names import layer_feature
from featcache.paths import CHECKPOINTS, check_output
from featcache.progress import QUIET, Progress
from featcache.read.normalization import Statistics, load
from featcache.settings import to_mapping
from featcache.store import files
from featcache.store.manifest import UNKNOWN
from trainer.align.redi import RediConfig
from trainer.align.reg import RegConfig
from trainer.averages import Average
from trainer.models.config import StreamShape, TextShape
from trainer.runs import checkpoint, empty_text, locks, normalization
from trainer.runs import folder as runs
from trainer.runs.cache import build_command
from trainer.runs.config import RunConfig
from trainer.runs.records import run_model_config
from trainer.runs.snapshots import find_weights
from trainer.runs.streams import StreamConfig, stream_config
from trainer.runs.text import NEEDED, is_text, text_shape
from trainer.runs.weights_io import CONVENTIONS, Imported, export_official, import_official

# What the public checkpoints were trained on; the VAE's weights are checked only where a hash is known. LightningDiT's have
# 32 channels.
_VAE: dict[str, Any] = {
    "name": "sd-ft-ema",
    "sha256": None,
    "scaling_factor": 0.18215,
    "shift_factor": 0.0,
    "downsampling": 8,
}
_VA_VAE: dict[str, Any] = {
    "name": "va-vae",
    "sha256": None,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "downsampling": 16,
}
_VA_VAE_CHANNELS = 32


def _summary_of(cache: featcache.Cache, shape: object, text: TextShape | None) -> dict[str, Any]:
    """What a run records of its cache.

    Raises:
        UserError: its latents are not of this shape.
    """
    cache.require(["vae/moments"])
    found = list(cache.manifest.features["vae/moments"].shape)
    if found != shape:
        raise UserError(
            f"{cache.path} holds moments {found}, but the checkpoint is of a backbone for {shape}",
            remedy="Pass the cache of the VAE and resolution that it was trained with.",
        )
    reads = ("vae/moments", "label") if text is None else ("vae/moments", text.name, NEEDED)
    return runs.summary_of(cache, [name for name in reads if name in cache.manifest.features])


def _texts_of(cache: featcache.Cache | None) -> list[TextShape]:
    """What a model may have been conditioned on, of a cache."""
    features = {} if cache is None else cache.manifest.features
    shapes = {name: tuple(features[name].shape) for name in features if is_text(name)}
    return [text for name in shapes if (text := text_shape(name, shapes)) is not None]


def _empty_text(text: TextShape, cache: featcache.Cache | None, path: Path) -> torch.Tensor:
    """The text of '', float32 [T, W]: no checkpoint holds it.

    Raises:
        CacheError: the cache does not hold it either, or not these texts. UserError: there is no cache.
    """
    if cache is None:
        raise UserError(
            f"{path} holds an MMDiT, and neither the text encoder's record nor its rows of '' for guidance, which a run needs",
            remedy=f"Type --cache with a cache of its VAE, resolution and text ({text.name}); one image is enough.",
        )
    spec = cache.manifest.features.get(text.name)
    if spec is None:
        raise CacheError(
            f"{cache.path} does not hold {text.name}, which the checkpoint takes",
            remedy=build_command(cache, [text.name]),
        )
    return torch.from_numpy(spec.empty_text())


def _stream_shape(stream: StreamShape) -> list[int]:
    """Of the feature: [C] of a class token, [T, C] of tokens."""
    return [stream.side**2, stream.channels] if stream.merged else [stream.channels]


def _named_in(stream: StreamShape, features: Mapping[str, Any]) -> str:
    """The feature of a cache that a file's stream is: that of its name, else the only one of its kind and channels."""

    def fits(name: str) -> bool:
        parts, shape = layer_feature(name), features[name]["shape"]
        kind = parts is not None and bool(parts.part) and parts.is_class_token != stream.merged
        return kind and len(shape) == len(_stream_shape(stream)) and bool(shape[-1] == stream.channels)

    fitting = [name for name in features if fits(name)]
    return fitting[0] if len(fitting) == 1 and stream.name not in fitting else stream.name


def _streams_of(imported: Imported, summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the run says of the features that are diffused beside the latents; the summary learns the shapes that it lacks."""
    found = {}
    for stream in imported.config.streams:
        name = _named_in(stream, summary["features"])
        summary["features"].setdefault(name, {"shape": _stream_shape(stream), "weights": UNKNOWN})
        options = StreamConfig(
            weight=RediConfig().weight if stream.merged else RegConfig().class_weight,
            normalization="none",
            embed="merged" if stream.merged else "own",
            dropout=imported.dropout,
        )
        found[name] = to_mapping(options)
    return found


def import_checkpoint(
    path: Path,
    *,
    name: str | None,
    weights: str,
    convention: str | None,
    cache: str | None = None,
    statistics: Path | None = None,
    root: Path = runs.ROOT,
) -> Path:
    """A run folder, ready for `trainer sample` and `trainer eval`, from an official checkpoint.

    Args:
        weights: `ema` or `model`. convention: one of `CONVENTIONS`, None tells it from the file.
        cache: one whose VAE and classes the checkpoint was trained with; without it those of the public checkpoints. Of an
            MMDiT one whose text it takes, which has to be there.
        statistics: file that its latents were normalised by (see `featcache.read.normalization`).

    Raises:
        UserError: an unreadable or refused file, a size without a name, statistics that are missing or do not fit, an
            MMDiT without a cache, or a run folder that exists.
    """
    if convention is not None and convention not in CONVENTIONS:
        raise UserError(f"--convention {convention!r} is not known", remedy=f"Type one of: {', '.join(CONVENTIONS)}")
    if weights not in ("ema", "model"):
        raise UserError(f"--weights {weights!r} is neither ema nor model", remedy="Type one of the two.")
    opened = None if cache is None else featcache.open(cache)
    imported = import_official(path, weights=weights, convention=convention, texts=_texts_of(opened))  # type: ignore[arg-type]
    if imported.name is None:
        cfg = imported.config
        raise UserError(
            f"{path} holds a backbone of depth {cfg.depth} and width {cfg.width}, which no model name describes",
            remedy="Load it from Python: trainer.runs.weights_io.import_official",
        )
    cfg = imported.config
    empty = None if cfg.text is None else _empty_text(cfg.text, opened, path)
    vae = _VA_VAE if cfg.latent_channels == _VA_VAE_CHANNELS else _VAE
    dataset = {
        "name": UNKNOWN,
        "source": f"imported checkpoint {path.name}",
        "class_names": [str(i) for i in range(cfg.num_classes)],
        "preprocessing": {"resolution": cfg.latent_size * vae["downsampling"]},
        "vae": {**vae, "latent_channels": cfg.latent_channels},
    }
    features = {
        "vae/moments": {"shape": [2 * cfg.latent_channels, cfg.latent_size, cfg.latent_size], "weights": UNKNOWN}
    }
    summary: dict[str, Any] = {"path": "", "fingerprint": "", "dataset": dataset, "features": features}
    if opened is not None:
        summary = _summary_of(opened, features["vae/moments"]["shape"], cfg.text)
    numbers = _statistics_of(imported, summary, statistics, path)
    streams = _streams_of(imported, summary)
    config = RunConfig(
        model=imported.name,
        name=name or path.stem,
        normalization="scalar" if numbers is None else numbers.over,
        path=imported.path,  # type: ignore[arg-type]
        qk_norm=cfg.qk_norm,
        streams=streams,
        condition=None if cfg.text is None else cfg.text.name,
        steps=max(1, imported.step or 1),
    )
    run = runs.run_dir(config, root)
    state = {
        "model": imported.name,
        "method": "none",
        "imported": {"file": path.name, "convention": imported.convention, "weights": imported.weights},
    }
    with locks.waiting(run.parent, f"{run.name}.import"):
        if run.exists() or run.is_symlink():
            raise UserError(f"{run} exists already", remedy="Type --name with another name.")
        files.remove_parts(run.parent, of=[run.name])
        with files.atomic_directory(run) as folder:
            checkpoint.save_checkpoint(folder, imported.step or 0, {"ema": imported.state}, state, keep=1)
            runs.write_text(folder / "cache.json", json.dumps(summary, indent=1))
            normalization.keep(numbers, folder)
            if empty is not None:
                empty_text.keep(empty, folder)
            runs.save_config(folder, config)
    return run


def _statistics_of(imported: Imported, summary: Mapping[str, Any], given: Path | None, path: Path) -> Statistics | None:
    """What the checkpoint's latents were normalised by: the file given, else what came with the cache's latents; None
    for the VAE's factor.

    Raises:
        UserError: the checkpoint wants statistics and there are none, or they do not fit its latents or its cache.
    """
    if given is not None:
        found: Statistics | None = load(given.resolve())  # may be a link, as in the Hugging Face hub's folders
    elif imported.normalization == "scalar":
        return None
    else:
        found = normalization.from_record(summary["dataset"]["vae"])
    if found is None:
        raise UserError(
            f"{path} is of latents that were normalised by channel, and does not hold the numbers",
            remedy="Type --statistics FILE (LightningDiT publishes latents_stats.pt beside its weights; a run of ours has "
            "normalization.safetensors), or --cache with imported latents that brought them.",
        )
    C, h, w = imported.config.latent_shape
    if tuple(found.mean.shape) not in ((C, 1, 1), (C, h, w)):
        raise UserError(
            f"the statistics have the shape {list(found.mean.shape)}, and the checkpoint's latents {[C, h, w]}",
            remedy="Bring those that it was trained with.",
        )
    if summary["fingerprint"] and found.fingerprint not in (None, summary["fingerprint"]):
        raise UserError(
            f"the statistics were computed from another cache than {summary['path']}",
            remedy="Bring those that the checkpoint was trained with, or its cache.",
        )
    return found


def export_checkpoint(
    run: Path, out: Path, *, convention: str | None, step: int | None, weights: str = "ema", progress: Progress = QUIET
) -> Path:
    """Writes a run's averaged weights (and its raw ones, where they are kept) as a file that the public code loads.

    Args:
        weights: which average, see `trainer.averages.Average`.

    Raises:
        UserError: no such run, an unknown convention, a model the convention has no place for, or `out` is no name
            for a checkpoint.
    """
    if convention is not None and convention not in CONVENTIONS:
        raise UserError(f"--to {convention!r} is not known", remedy=f"Type one of: {', '.join(CONVENTIONS)}")
    check_output(out, CHECKPOINTS, example="weights.pt")
    config = runs.load_config(run)
    if config.prediction != "velocity":
        raise UserError(
            f"{run} predicts {config.prediction}, and the public code takes what a SiT says for a velocity",
            remedy="Draw from it here: trainer sample, trainer eval.",
        )
    average = Average.parse(weights)
    if average.kind == "raw":
        raise UserError("raw weights are no average", remedy="Leave --weights out: the file holds both.")
    # A checkpoint has the raw ones, too.
    saved = average in config.averages and step in dict(checkpoint.list_checkpoints(run))
    found = find_weights(run, config, step, average, snapshots=not saved)
    for text in found.notes:
        progress.note(text)
    folder = found.path
    raw = checkpoint.load_tensors(folder, "model") if (folder / "model.safetensors").exists() else None
    options: dict[str, Any] = {"convention": convention} if convention else {}
    ema = found.load("cpu")
    cfg = run_model_config(run, config)
    streams = {name: stream_config(name, given) for name, given in config.streams.items()}
    for name, stream in streams.items():
        if stream.normalization != "none":
            raise UserError(
                f"{run} diffuses {name} normalised by {stream.normalization}, and the public code has no place for the numbers: "
                "it diffuses features as the encoder gave them",
                remedy="Draw from it here: trainer sample, trainer eval.",
            )
        options["dropout"] = stream.dropout
    options |= {"interpolant": config.path, "normalization": config.normalization}
    return export_official(out, cfg, ema=ema, model=raw, step=found.step, **options)
