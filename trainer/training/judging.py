"""Small evaluations while a run goes on. Who judges is handed in: measuring stands above training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from featcache.redact import redact
from trainer.runs import branch
from trainer.runs.config import RunConfig
from trainer.runs.log import EVALUATION, EVALUATION_OF, RunLog
from trainer.stopping import Stop
from trainer.training.grids import GivenUp, given_up_when, what_happened
from trainer.training.state import backbone_config

if TYPE_CHECKING:
    from featcache.read.reader import Cache
    from trainer.models import Transformer

# The averaged model => numbers by the names they are reported under.
Judge = Callable[["Transformer"], Mapping[str, float]]
# Made of the run's settings, its cache, its folder, and where remarks go.
MakeJudge = Callable[[RunConfig, "Cache", Path, Callable[[str], None]], Judge]


class SmallEvaluations:
    """Judges the averaged weights, always in the same way, and puts the numbers into the log as `eval/<metric>`.

    Whatever goes wrong is said, and ends no run; where there is nobody to judge, or nothing to compare with, it gives up,
    once and aloud. What a step draws does not depend on it: the generators of random numbers stay as they were.
    """

    def __init__(
        self, make: MakeJudge | None, config: RunConfig, cache: Cache, run: Path, warn: Callable[[str], None]
    ) -> None:
        self._make, self._config, self._cache, self._run, self._warn = make, config, cache, run, warn
        self._broken = make is None
        self._judge: Judge | None = None

    def judge(self, ema: Transformer, step: int, log: RunLog, trained_s: float, told: Stop) -> None:
        """One line of the log. Given up when the run is `told` to stop: it is owed then (`is_owed`)."""
        if self._broken or self._make is None:
            return
        device = next(ema.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            try:
                with given_up_when(told):
                    self._judge = self._judge or self._make(self._config, self._cache, self._run, self._warn)
            except GivenUp:
                return
            except Exception as error:
                self._broken = True
                self._warn(f"no evaluation during training: {what_happened(error)}")
                return
            try:
                with given_up_when(told):
                    numbers = self._judge(ema)
            except GivenUp:
                return
            except Exception as error:  # memory, say
                self._warn(f"no evaluation at step {step}: {what_happened(error)}")
                return
        named = {f"{EVALUATION}{k}": v for k, v in numbers.items()}
        log.record(
            {"step": step, "time_s": round(trained_s, 3), **named, EVALUATION_OF: conditions(self._config, self._cache)}
        )


def conditions(config: RunConfig, cache: Cache) -> str:
    """What decides the figures of a run's evaluations beside the model and the extractor, whose name they carry. A reference
    and prompts that were named go by their names."""
    images = cache.manifest.dataset
    own = f"the images of cache {images.name} ({images.fingerprint[:12]})"
    compared = own if config.eval_reference is None else redact(str(config.eval_reference))
    prompts = f"captions of cache {images.name}" if config.eval_prompts is None else redact(str(config.eval_prompts))
    drawn = "" if backbone_config(config, cache).text is None else f" (prompts: {prompts})"
    return f"{config.eval_num:,} samples{drawn} compared with {compared}"


def is_owed(run: Path, step: int) -> bool:
    """Whether the log has no evaluation at a step where the run goes on: one that stopped there gave it up."""
    here = (line for line in branch.lines_before(run) if line["step"] == step)
    return not any(key.startswith(EVALUATION) for line in here for key in line)
