"""One frozen, validated configuration for a run; recipes are YAML files of its keys.

A key that does not exist is an error with a suggestion, never a silent default.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from featcache.errors import UserError

T = TypeVar("T")

# Beyond these no arithmetic downstream holds: steps times the batch size counts samples in 64 bits.
_COUNT = 2**31 - 1
_MOST: Mapping[str, int] = {
    **dict.fromkeys(("steps", "warmup_steps", "align_until", "log_every", "sample_every", "checkpoint_every"), _COUNT),
    **dict.fromkeys(("batch_size", "accumulate", "keep_checkpoints", "resolution"), _COUNT),
    "seed": 2**63 - 1,
    "stream_gib": _COUNT,
}
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What one training run does.

    What to train:
        method: ``none``, or alignment methods joined by ``+`` (``ahpa``, ``repa``, ``ahpa+sra``).
        align: options of each method by its name, e.g. ``{"ahpa": {"router": "lookup"}}``.
        align_until: step from which alignment is switched off (HASTE); None: never.
        model: backbone, e.g. ``SiT-XL/2``. cache: path or URL of the feature cache. name: folder below ``runs``.
        resolution, vae: side in pixels and VAE (``sd-ft-ema``) that the cache must have been made with; None: any.
    Objective:
        path: interpolant of SiT. time_sampling: how t is drawn. label_dropout: share of null labels.
    Optimisation (AdamW):
        batch_size: global, over all ranks and accumulation steps. clip: maximal gradient norm; None takes the
        method's (2.0 for AHPA, else 1.0). ema_decay: of the weights' average, reached after a short warm-up if
        ema_warmup (min(decay, (1 + step) / (10 + step))).
    Machine:
        precision: ``auto`` is bf16 autocast on a GPU and fp32 on the CPU. compile: None compiles on a GPU only.
        accumulate: micro-batches a step, for batches that do not fit at once. shard: split weights, average and
        optimiser state over the ranks (FSDP2) instead of keeping a copy on each (DDP); a single rank has nothing to
        split. None of these three changes more than rounding. stream_dir, stream_gib: where blocks of a remote cache
        are kept, and how many GiB of them each process keeps at most; None: ``$FEATCACHE_STREAM_DIR`` and 10 GiB.
    Bookkeeping:
        log_every, sample_every, checkpoint_every in steps; sample_every 0 draws no grids. keep_checkpoints: how many of
        the latest stay. published: figures of the paper's row, for the report.
    """

    method: str = "none"
    align: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    align_until: int | None = None
    model: str = "SiT-B/2"
    cache: str | None = None
    resolution: int | None = None
    vae: str | None = None
    name: str | None = None

    path: Literal["linear", "cosine"] = "linear"
    time_sampling: Literal["uniform", "lognormal"] = "uniform"
    label_dropout: float = 0.1
    qk_norm: bool = False

    steps: int = 400_000
    batch_size: int = 256
    accumulate: int = 1
    lr: float = 1e-4
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float | None = None
    ema_decay: float = 0.9999
    ema_warmup: bool = False

    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    attention: Literal["sdpa", "xformers"] = "sdpa"
    compile: bool | None = None
    shard: bool = False
    weights_dir: str | None = None
    stream_dir: str | None = None
    stream_gib: float | None = None

    log_every: int = 100
    sample_every: int = 10_000
    checkpoint_every: int = 10_000
    keep_checkpoints: int = 2
    published: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, key) < 1:
                raise UserError(
                    f"{key} is {getattr(self, key)}, but it must be at least 1", remedy=f"Type --set {key}=1 or more."
                )
        for key in ("warmup_steps", "sample_every", "align_until", "weight_decay", "seed"):
            if (getattr(self, key) or 0) < 0:
                raise UserError(f"{key} is {getattr(self, key)}, but it must not be negative")
        for key, most in _MOST.items():
            if (getattr(self, key) or 0) > most:
                raise UserError(f"{key} is {getattr(self, key)}, but it can be {most:,} at most")
        for key in ("label_dropout", "ema_decay"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"{key} is {getattr(self, key)}, outside [0, 1]")
        if not self.weight_decay < math.inf:
            raise UserError(f"weight_decay is {self.weight_decay}, but it must be finite")
        for key in ("lr", "clip", "stream_gib"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{key} is {value}, but it must be positive and finite")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas are {self.betas}, but each must be in [0, 1)")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"batch_size {self.batch_size} cannot be split into {self.accumulate} equal parts",
                remedy="Choose accumulate so that it divides batch_size.",
            )
        if self.shard and self.precision == "fp16":
            raise UserError(
                "shard does not go with precision fp16: loss scaling does not cover sharded beside whole gradients",
                remedy="Type --precision bf16.",
            )
        self._check_model()
        self._check_methods()
        if self.published:
            from trainer.recipes import parse_published

            parse_published(self.published)

    def _check_model(self) -> None:
        from trainer.models import model_config

        model_config(self.model, latent_channels=4, latent_size=8, num_classes=1)  # unknown names are errors here
        for key in ("path", "time_sampling"):
            default = next(f.default for f in dataclasses.fields(self) if f.name == key)
            if self.model.startswith("DiT") and getattr(self, key) != default:
                raise UserError(
                    f"{key} is {getattr(self, key)!r}, but {self.model} trains on DDPM's own steps and schedule",
                    remedy=f"Leave {key} out, or train {self.model.replace('DiT', 'SiT')}.",
                )

    def _check_methods(self) -> None:
        from trainer.align import split_methods

        split_methods(self.method)  # unknown, repeated and contradicting names are errors here
        stray = sorted(set(self.align) - set(self.methods))
        if stray:
            raise UserError(
                f"options are given for method {stray[0]!r}, but the run uses {self.method!r}",
                remedy=f"Remove them, or type --method {stray[0]}",
            )
        for method in self.methods:
            self.method_config(method)

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the alignment methods in use; empty for ``none``."""
        return tuple(m for m in self.method.split("+") if m != "none")

    def method_config(self, method: str) -> Any:
        """The method's own frozen configuration, validated."""
        from trainer.align import config_class

        return from_mapping(config_class(method), self.align.get(method, {}), where=f"align.{method}")


def from_mapping(cls: type[T], values: Mapping[str, Any], *, where: str = "") -> T:
    """Builds the frozen dataclass ``cls`` from plain values (YAML, ``--set``), strictly.

    Raises:
        UserError: an unknown key (with the nearest valid one), or a value of the wrong type.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    clean: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"Did you mean {prefix}{near[0]}?" if near else f"Valid keys: {', '.join(sorted(fields))}"
            raise UserError(f"unknown key {prefix}{key!s:.80}", remedy=hint)
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(hints[key], config=ConfigDict(arbitrary_types_allowed=True))
            clean[key] = adapter.validate_python(value)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise UserError(f"{prefix}{key} = {value!r:.200} is not valid: {problem}") from error
        if isinstance(value, bool) and not isinstance(clean[key], bool):  # True would pass for 1
            raise UserError(f"{prefix}{key} = {value!r} is not valid: a number is expected")
    return cls(**clean)


def load_recipe(path: Path) -> dict[str, Any]:
    """The settings in a YAML recipe, its bases resolved (see :mod:`trainer.recipes`).

    Raises:
        UserError: as :func:`trainer.recipes.load_recipe_file`.
    """
    from trainer.recipes import load_recipe_file

    return dict(load_recipe_file(path).values)


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``["steps=1000", "align.ahpa.router=lookup"]`` on top of a recipe's values; values are parsed as YAML.

    A dotted key whose first part is a method's name may leave out ``align.``.

    Raises:
        UserError: an override without ``=``, or one below something that is no mapping.
    """
    from trainer.align import method_names
    from trainer.yaml_text import parse_yaml

    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"--set {override!r} is not KEY=VALUE", remedy="Type for example: --set steps=1000")
        *parents, leaf = key.split(".")
        if parents and parents[0] in method_names():
            parents.insert(0, "align")
        node: dict[str, Any] = result
        for parent in parents:
            child = node.get(parent)
            if child is None:
                child = {}
            elif not isinstance(child, Mapping):
                raise UserError(f"--set {override!r}: {parent} is a value, not a group of keys")
            node[parent] = dict(child)
            node = node[parent]
        node[leaf] = number(parse_yaml(text, f"the value of --set {override!r:.200}"))
    return result


def number(value: Any) -> Any:
    """``1e-4``, which YAML 1.1 takes for text, as the number it looks like; anything else as it is."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def to_mapping(config: RunConfig) -> dict[str, Any]:
    """Plain values of a configuration: what ``config.yaml`` holds and :func:`from_mapping` reads back."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        return value

    return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
