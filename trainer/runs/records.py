"""What a run records of the cache and the model that it was trained with."""

from __future__ import annotations

from pathlib import Path

from featcache.errors import UserError
from trainer.models import ModelConfig
from trainer.runs import folder as runs
from trainer.runs.config import RunConfig
from trainer.runs.schemas import Summary


def cache_summary(run: Path) -> Summary:
    """`cache.json` of a run: path, fingerprint, dataset and features of the cache it was trained on.

    Raises:
        UserError: the file is missing or damaged.
    """
    summary = runs.read_summary(run)
    if summary is None:
        raise UserError(f"{run} has no cache.json, so its classes and latents are unknown", remedy="Train it again.")
    return summary


def run_model_config(run: Path, config: RunConfig) -> ModelConfig:
    """Shape of a run's backbone, from its configuration and the latents it was trained on."""
    summary = cache_summary(run)
    dataset = summary["dataset"]
    return config.backbone(
        dataset["vae"],
        resolution=dataset["preprocessing"]["resolution"],
        num_classes=len(dataset["class_names"]),
        shapes={name: tuple(feature["shape"]) for name, feature in summary["features"].items()},
    )
