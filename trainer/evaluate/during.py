"""The judge of small evaluations during training: few samples, few steps, always from the same noise.

Its numbers show where a run is going. They are of too few samples to be compared with anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from featcache.errors import UserError
from featcache.inspect import find_images
from featcache.machine import pick_device
from featcache.progress import Quiet
from featcache.store import files
from trainer.diffusion.transport import build_transport
from trainer.evaluate.extractors import Extractor
from trainer.evaluate.images import ArrayImages, CacheImages
from trainer.evaluate.judge import evaluate
from trainer.evaluate.prompted import build_prompt_judges, judge_prompts, split_metrics
from trainer.evaluate.references import Statistics, compute_statistics, reference_statistics, save_statistics
from trainer.evaluate.run import choose_extractor
from trainer.runs.config import RunConfig
from trainer.sampling.draw import GRID_SAMPLERS, GRID_STEPS, SampleConfig, draw_units
from trainer.sampling.prompts import PromptEncoder, Prompts, open_prompts
from trainer.training.conditions import build_condition, cached_conditions
from trainer.training.grids import decoder_of
from trainer.training.judging import Judge
from trainer.training.state import backbone_config

if TYPE_CHECKING:
    from featcache.read.reader import Cache
    from trainer.models import Transformer

METRICS = ("fid", "kid")  # KID of few samples is not biased
REFERENCE_IMAGES = 10_000  # at most, of the cache's own
CPU_UNIT, GPU_UNIT = 8, 64  # samples drawn at once


class _Remarks(Quiet):
    """Shows nothing but remarks: what is under way is the training."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note

    def note(self, text: str) -> None:
        self._note(text)


def small_judge(config: RunConfig, cache: Cache, run: Path, note: Callable[[str], None]) -> Judge:
    """Judges `config.eval_num` samples of balanced classes, drawn as the grids are, by `config.eval_extractor`; of a model
    that takes text, of `config.eval_prompts` or of the first images' captions.

    Raises:
        UserError: nothing to compare with, or an unknown extractor.
        WeightsUnavailable: weights that were asked for by name, or the VAE's, are not to be had.
    """
    device = pick_device(config.device)
    extractor = choose_extractor(config.eval_extractor, config.weights_dir, device, _Remarks(note))
    reference = _reference(config, cache, run, extractor)
    decoder = decoder_of(run, config, cache)
    prompts = None if config.eval_prompts is None else open_prompts(config.eval_prompts, seed=config.seed)
    condition = _conditions(config, cache) if prompts is None else _encoded(prompts, config, cache, device)
    _, of_prompts = split_metrics((), prompts, subject=str(run))
    judges = build_prompt_judges(of_prompts, weights_dir=config.weights_dir, device=device)
    metrics = [name for name in METRICS if name in extractor.metric_names]

    def judge(model: Transformer) -> Mapping[str, float]:
        where = next(model.parameters()).device
        drawn = SampleConfig(sampler=GRID_SAMPLERS[model.cfg.family], steps=GRID_STEPS, seed=config.seed)
        transport = build_transport(model.cfg.family, device=where, **config.flow)
        unit = CPU_UNIT if where.type == "cpu" else GPU_UNIT
        try:
            units = draw_units(
                model,
                decoder.to(where),
                condition,
                range(config.eval_num),
                drawn,
                transport=transport,
                unit=unit,
            )
            pixels = np.concatenate(list(units))
        finally:
            decoder.to("cpu")
        images = ArrayImages(images=pixels)
        with torch.inference_mode():
            found = dict(evaluate(images, reference, extractor, metrics=metrics, seed=config.seed)["metrics"])
            if prompts is not None and judges:
                found |= judge_prompts(images, prompts, judges, seed=config.seed)["metrics"]
        return found

    return judge


def _conditions(config: RunConfig, cache: Cache) -> np.ndarray | Callable[[Sequence[int]], Tensor]:
    """Of each sample: labels in turn, int64 [n], or the captions of the images in turn, read as they are drawn."""
    cfg = backbone_config(config, cache)
    if cfg.text is None:
        return np.arange(config.eval_num) % len(cache.manifest.dataset.class_names)
    condition = build_condition(cfg, cache)
    return lambda chosen: cached_conditions(condition, cache, np.asarray(chosen) % len(cache))


def _encoded(prompts: Prompts, config: RunConfig, cache: Cache, device: str) -> np.ndarray:
    """Text rows of each sample, float32 [n, T, W]. The encoder is gone again when they are there."""
    text = backbone_config(config, cache).text
    assert text is not None, "eval_prompts are of models that take text"
    record = cache.manifest.features[text.name].provenance
    encode = PromptEncoder(text.name, record, weights_dir=config.weights_dir, device=device)
    starts = range(0, config.eval_num, GPU_UNIT)
    texts = (prompts.of(range(start, min(start + GPU_UNIT, config.eval_num))) for start in starts)
    return np.concatenate([encode(part).cpu().numpy() for part in texts])


def _reference(config: RunConfig, cache: Cache, run: Path, extractor: Extractor) -> Statistics:
    """What is compared with. The statistics of the cache's images are computed once and stay in the run's folder."""
    resolution = cache.manifest.dataset.resolution
    if config.eval_reference is not None:
        crop = cache.manifest.dataset.preprocessing.get("crop")
        return reference_statistics(
            config.eval_reference, extractor, resolution=resolution, crop=crop, need_features=True
        )
    path = files.inside(run, f"eval/reference-{extractor.name}.npz")
    if not path.is_file():
        found = find_images(cache, None)
        if found is None:
            raise UserError("the images that the cache was made from were not found, and eval_reference names none")
        images = CacheImages(cache=cache, data=found[0], limit=REFERENCE_IMAGES)
        files.make_directory(path.parent)
        save_statistics(path, compute_statistics(images, extractor, keep_features=REFERENCE_IMAGES))
    return reference_statistics(path, extractor, resolution=resolution, need_features=True)
