"""What a run is about to take: told before its first step, and again once the first steps are measured."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from featcache.console import amount_text, size_text, time_text
from featcache.errors import UserError
from featcache.machine import cpu_name, memory_bytes, peak_rss_bytes
from featcache.paths import typed
from featcache.read.captions import COUNT, one_caption
from featcache.redact import is_redacted, redact
from featcache.settings import from_mapping, to_mapping
from featcache.store.remote import is_remote
from trainer.align import config_class
from trainer.align.base import Alignment
from trainer.distributed import World
from trainer.models import ModelConfig, empty_model, forward_flops
from trainer.runs.budget import Sizes, room_of
from trainer.runs.cache import missing_features
from trainer.runs.config import RunConfig
from trainer.runs.intervals import GRID_IMAGES, IMAGE_COST
from trainer.training.memory import Size, estimate_bytes
from trainer.training.state import backbone_config, build_alignment, precision_of

if TYPE_CHECKING:
    from featcache import Cache

DAY_S = 86400
MEASURED_S, MEASURED_STEPS = 10.0, 20  # either will do for an estimate
TRIAL_S, TRIAL_BATCH, TRIAL_STEPS = 180.0, 8, (10, 1000)
# Training against matrix products alone: small models spend the larger part beside them.
TRIAL_SLOWNESS = 3.0


class Outlook:
    """Tells what a run on one rank of `world` will take. It says nothing where `note` does nothing.

    Args:
        config: with nothing left open. run: its folder. start: steps that are done already.
    """

    def __init__(
        self,
        config: RunConfig,
        cache: Cache,
        run: Path,
        *,
        world: World,
        device: torch.device,
        start: int,
        note: Callable[[str], None],
    ) -> None:
        self._config, self._cache, self._run = config, cache, run
        self._world, self._device, self._start, self._note = world, device, start, note
        self._begin: tuple[float, int] | None = None
        self._told = start >= config.steps
        self._matrix_rate: float | None = None
        self._cfg: ModelConfig | None = None
        self._bytes = 0

    def before(self, cfg: ModelConfig, alignment: Alignment | None) -> None:
        """One paragraph on what is about to be built, and a warning where that takes days on a CPU."""
        if self._told or not self._world.is_main:
            return
        self._cfg = cfg
        condition = ("label",) if cfg.text is None else (cfg.text.name, COUNT)
        reads = dict.fromkeys(("vae/moments", *(s.name for s in cfg.streams), *condition, *_reads(alignment)))
        stored = (one_caption(self._cache.manifest.features[name]) for name in reads)
        self._bytes = sum(feature.bytes_per_sample // feature.views for feature in stored)  # one view is read
        self._note("\n  ".join(self._lines(cfg, alignment)))
        if self._device.type == "cpu":
            self._matrix_rate = matrix_flops_per_s(torch.bfloat16 if self._is_low else torch.float32)
            flops = 3 * forward_flops(cfg) * self._config.batch_size * (self._config.steps - self._start)
            least_s = flops / (self._matrix_rate * self._world.size)
            if least_s > DAY_S:
                self._warn(f"at least {time_text(least_s)}, going by how fast it multiplies matrices")

    def after(self, done: int, trained_s: float, *, waited: bool) -> None:
        """To be told of each step. Says how long all will take, once enough is measured; the first step, which compiles, is
        left out.

        Args:
            trained_s: clock of the training, without pauses. waited: whether the device has finished this step (a CPU
                always has).
        """
        if self._told or not (waited or self._device.type == "cpu"):
            return
        if self._begin is None:
            self._begin = (trained_s, done)
            return
        since_s, since = self._begin
        spent_s, steps = trained_s - since_s, done - since
        if spent_s < MEASURED_S and steps < MEASURED_STEPS:
            return
        self._told = True
        self._tell(spent_s / steps, self._config.steps - done)

    def _tell(self, step_s: float, left: int) -> None:
        batch = self._config.batch_size
        text = f"a step takes {_seconds(step_s)} ({amount_text(batch / step_s)} images/s"
        if self._bytes:
            text += f", {size_text(self._bytes * batch / step_s)}/s of the cache"
        self._note(
            f"{text}): about {time_text(step_s * left)} for {left:,} more steps, and what is saved, drawn and judged"
        )
        if self._device.type == "cpu" and step_s * left > DAY_S:
            self._warn(f"about {time_text(step_s * left)}, as measured")

    @property
    def _is_low(self) -> bool:
        return precision_of(self._config, self._device) != "fp32"

    def _lines(self, cfg: ModelConfig, alignment: Alignment | None) -> Iterator[str]:
        config, world, dataset = self._config, self._world, self._cache.manifest.dataset
        size = self.size(cfg, alignment)
        beside = f", and {_count(size.heads)} in heads beside it" if size.heads else ""
        if size.adversary:
            beside += f" and {_count(size.adversary)} in a discriminator"
        begun = "begins" if not self._start else f"goes on from step {self._start:,}"
        yield f"training {begun}: {config.method} on {config.model}, {_count(size.backbone)} parameters{beside}"
        px = dataset.resolution
        if cfg.text is None:
            condition = f"{len(dataset.class_names):,} classes"
        else:
            captions = self._cache.manifest.features[cfg.text.name].shape[0]
            condition = f"up to {_number(captions, 'caption')} each ({cfg.text.name})"
        yield (
            f"cache: {redact(str(self._cache.path))} ({dataset.name}), {len(self._cache):,} images of "
            f"{condition}, {px} x {px} pixels"
        )
        epochs = config.steps * config.batch_size / len(self._cache)
        yield (
            f"batch: {config.batch_size:,} = {_number(world.size, 'rank')} x {_number(config.accumulate, 'micro-batch')} "
            f"x {_number(size.rows, 'row')}; reads {size_text(self._bytes * config.batch_size)} a step"
        )
        yield f"steps: {config.steps:,}, or {amount_text(epochs)} epochs; a line of the log every {config.log_every}"
        compiled = ", compiled" if self._compiled else ""
        yield f"device: {self._device_name()}, {precision_of(config, self._device)}{compiled}"
        yield f"memory: {self._memory(size)}"
        yield f"disk: {self._disk(size)}"
        grid = f"as long as about {self._as_steps(GRID_IMAGES)}"
        if config.sample_every:
            yield f"grids of samples: every {config.sample_every:,} steps, each {grid}"
        else:
            yield f"grids of samples: none; one takes {grid} (--set sample_every={config.steps} for one at the end)"
        if config.eval_every:
            judged = self._as_steps(config.eval_num * IMAGE_COST)
            yield f"evaluation: every {config.eval_every:,} steps, each as long as about {judged}, and judging on top"

    def _as_steps(self, images: float) -> str:
        return _number(max(1, round(images / self._config.batch_size)), "step")

    def size(self, cfg: ModelConfig, alignment: Alignment | None) -> Size:
        """What decides on the memory of a rank."""
        config, world = self._config, self._world
        adversary = _parameters(alignment.adversary) if alignment is not None and alignment.adversary is not None else 0
        features = self._cache.manifest.features
        targets = sum(int(torch.Size(features[name].shape).numel()) for name in _reads(alignment))
        sharded = config.shard and world.size > 1
        backbone = _parameters(empty_model(replace(cfg, attention="sdpa")))
        return Size(
            cfg=cfg,
            backbone=backbone,
            heads=(_parameters(alignment) - adversary) if alignment is not None else 0,
            adversary=adversary,
            rows=config.batch_size // world.size // config.accumulate,
            targets=targets,
            low=self._is_low,
            compiled=self._compiled,
            ranks=world.size if sharded else 1,
            averages=len(config.averages),
            recompute=config.recompute == "blocks",
            keeps_gradients=config.accumulate > 1 or (world.size > 1 and not sharded),
        )

    @property
    def _compiled(self) -> bool:
        compiled = self._config.compile
        return compiled if compiled is not None else self._device.type == "cuda"

    def _device_name(self) -> str:
        if self._device.type == "cuda":
            name = torch.cuda.get_device_name(self._device)
            return name if self._world.size == 1 else f"{self._world.size} x {name}"
        return f"the CPU ({cpu_name()}, {_number(torch.get_num_threads(), 'thread')})"

    def _memory(self, size: Size) -> str:
        takes = estimate_bytes(size)
        if self._device.type == "cuda":
            there, where = torch.cuda.get_device_properties(self._device).total_memory, "each GPU"
        else:
            takes, there, where = takes + peak_rss_bytes(), memory_bytes(), "this machine"
            takes *= self._world.size  # on one machine, as far as this process knows
        if takes < there:
            return f"about {size_text(takes)} of the {size_text(there)} of {where}"
        remedy = "take a smaller --batch-size, or --set accumulate=2 or more"
        return f"about {size_text(takes)}, MORE THAN the {size_text(there)} of {where}: {remedy}"

    def _disk(self, size: Size) -> str:
        config = self._config
        assert config.checkpoint_every is not None
        sizes = Sizes(weights=size.backbone, heads=size.heads, adversary=size.adversary)
        room = room_of(self._run, config, sizes, self._start)
        needs = room.budget
        text = (
            f"a checkpoint of {size_text(needs.checkpoint_bytes)} every {config.checkpoint_every:,} steps, "
            f"{config.keep_checkpoints} kept"
        )
        if needs.snapshots:
            text += f", and {_number(needs.snapshots, 'snapshot')} of {size_text(needs.snapshot_bytes)}"
        text += f": up to {size_text(room.needed_bytes)} more of {size_text(room.free_bytes)} free"
        return f"{text}, WHICH IS NOT ENOUGH" if room.needed_bytes > room.free_bytes else text

    def _warn(self, takes: str) -> None:
        command = self.trial()
        text = f"on this CPU all of it takes {takes}."
        if command is not None:
            text += f" A trial on the same cache that ends in minutes:\n  {command}"
        self._note(text)

    def trial(self) -> str | None:
        """A command that trains the smallest model on the same cache for some minutes, by the same method if that can be;
        None where nothing fits."""
        config = self._config
        model = f"{config.model.partition('-')[0]}-Ti/{config.model.partition('/')[2]}"
        options = {method: _changed(method, config.align.get(method) or {}) for method in config.methods}
        for method, align in ((config.method, {}), (config.method, options), ("none", {})):
            streams = list(config.streams) if method != "none" else []
            values: dict[str, Any] = {"method": method, "align": align, "model": model, "cache": config.cache}
            values |= {
                "streams": dict.fromkeys(streams),
                "condition": config.condition,
                "zero_init": config.zero_init,
                "batch_size": TRIAL_BATCH,
                "steps": 1,
                "qk_norm": config.qk_norm,
            }
            try:
                small = from_mapping(RunConfig, values)
                missing_features(small, self._cache)
                cfg = backbone_config(small, self._cache)
                build_alignment(small, self._cache, cfg, calibrate=False)
            except UserError:
                continue
            return self._trial_command(small, cfg)
        return None

    def _trial_command(self, small: RunConfig, cfg: ModelConfig) -> str:
        rate = self._matrix_rate or matrix_flops_per_s(torch.float32)
        step_s = TRIAL_SLOWNESS * 3 * forward_flops(cfg) * TRIAL_BATCH / rate
        least, most = TRIAL_STEPS
        steps = min(max(least, int(TRIAL_S / step_s)), most)
        where = str(self._config.cache)
        words = ["trainer run", f"--method {shlex.quote(small.method)}", f"--model {small.model}"]
        words.append(f"--cache {'URL' if is_redacted(where) else where if is_remote(where) else typed(where)}")
        if small.streams:
            words.append(f"--streams {shlex.quote(','.join(small.streams))}")
        if small.condition is not None:
            words.append(f"--condition {typed(small.condition)}")
        words += [f"--steps {steps}", f"--batch-size {TRIAL_BATCH}", "--device cpu"]
        if small.zero_init:
            words.append("--set zero_init=true")
        if small.qk_norm:
            words.append("--qk-norm")
        for method, given in small.align.items():
            for key, value in (given or {}).items():
                text = yaml.safe_dump(value, default_flow_style=True, width=1 << 20).removesuffix("\n...\n").strip()
                words.append(f"--set {shlex.quote(f'{method}.{key}={text}')}")
        return " ".join(words)


def matrix_flops_per_s(dtype: torch.dtype, *, side: int = 768, repeats: int = 4) -> float:
    """How fast this CPU multiplies matrices, at best: a tenth of a second or so is spent on finding out."""
    a, b = torch.randn(side, side).to(dtype), torch.randn(side, side).to(dtype)
    spent = []
    for _ in range(repeats):
        begin = time.perf_counter()
        a @ b
        spent.append(time.perf_counter() - begin)
    return 2 * side**3 / min(spent)


def _changed(method: str, options: Any) -> dict[str, Any]:
    """Options of a method that are not its defaults."""
    default = to_mapping(config_class(method)())
    return {key: value for key, value in options.items() if value != default.get(key)}


def _reads(alignment: Alignment | None) -> tuple[str, ...]:
    return alignment.reads if alignment is not None else ()


def _parameters(module: torch.nn.Module | None) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad) if module is not None else 0


def _count(number: int) -> str:
    """`675 M`, `1.2 B`, `834 K`."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _number(count: int, what: str) -> str:
    plural = {"micro-batch": "micro-batches"}.get(what, f"{what}s")
    return f"{count:,} {what if count == 1 else plural}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else time_text(seconds)
