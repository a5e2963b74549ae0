"""One frozen, validated configuration for a run; recipes are YAML files of its keys.

A key that does not exist is an error with a suggestion, never a silent default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from featcache.errors import UserError
from featcache.settings import Count, Index, Limit, NotNegative, Option, Positive, Share, from_mapping, number, settings
from trainer.align import config_class, method_names, split_methods
from trainer.models import model_config
from trainer.models.config import Attention
from trainer.runs.published import parse_published

if TYPE_CHECKING:
    from trainer.align.base import MethodConfig
    from trainer.models import ModelConfig

Beta = Annotated[float, Field(ge=0, lt=1)]


@settings
class RunConfig:
    """What one training run does.

    What to train:
        method: `none`, or alignment methods joined by `+` (`ahpa`, `repa`, `ahpa+sra`).
        align: options of each method by its name, e.g. `{"ahpa": {"router": "lookup"}}`.
        align_until: step from which alignment is switched off (HASTE); None: never.
        model: backbone, e.g. `SiT-XL/2`, `LightningDiT-XL/1`. cache: path or URL of the feature cache. name: folder below `runs`.
        resolution, vae: side in pixels and VAE (`sd-ft-ema`) that the cache must have been made with; None: any.
    Objective:
        normalization: of the latents: `scalar`, by the VAE's scaling factor; by the mean and standard deviation of each
        `channel`, or of each `position` too; `auto` is `channel` where statistics were imported with the latents. Results under different ones are not comparable: it decides at which times
        which detail is noise. statistics: file of the last two (`featcache stats`, or iREPA's, REPA-E's, LightningDiT's,
        RAE's); None takes those imported with the latents. A run keeps a copy. path: interpolant of SiT and LightningDiT. time_sampling: how t is drawn. label_dropout: share of null labels.
    Optimisation (AdamW):
        batch_size: global, over all ranks and accumulation steps. clip: maximal gradient norm; None takes the
        method's (2.0 for AHPA, else 1.0), `.inf` is no clipping. ema_decay: of the weights' average, reached after a short warm-up if
        ema_warmup (min(decay, (1 + step) / (10 + step))).
    Machine:
        precision: `auto` is bf16 autocast on a GPU and fp32 on the CPU. compile: None compiles on a GPU only.
        accumulate: micro-batches per step, for batches that do not fit at once. shard: split weights, average and
        optimiser state over the ranks (FSDP2) instead of keeping a copy on each (DDP); a single rank has nothing to
        split. None of these three changes more than rounding. stream_dir, stream_gib: where blocks of a remote cache
        are kept, and how many GiB of them each process keeps at most; None: `$FEATCACHE_STREAM_DIR` and 10 GiB.
    Bookkeeping:
        log_every, sample_every, checkpoint_every in steps; sample_every 0 draws no grids. keep_checkpoints: how many of
        the latest stay. published: figures of the paper's row, for the report.
    """

    method: Annotated[str, Option("none, repa, ahpa, ...; join several with +.")] = "none"
    align: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    align_until: Index | None = None
    model: Annotated[str, Option("Backbone, e.g. SiT-B/2, SiT-XL/2, DiT-XL/2, LightningDiT-XL/1.")] = "SiT-B/2"
    cache: Annotated[str | None, Option("Feature cache. Default: the newest fitting one below ./caches.")] = None
    resolution: Count | None = None
    vae: str | None = None
    name: Annotated[str | None, Option("Folder below ./runs. Default: from method and model.")] = None

    normalization: Annotated[
        Literal["auto", "scalar", "channel", "position"],
        Option("Of the latents: scalar (by the VAE's factor), channel or position (by --statistics), or auto."),
    ] = "auto"
    statistics: Annotated[
        str | None,
        Option(
            "File of mean and std, from featcache stats. Default: imported with the latents.", typed=Path, parse=str
        ),
    ] = None
    path: Literal["linear", "cosine"] = "linear"
    time_sampling: Literal["uniform", "lognormal"] = "uniform"
    label_dropout: Share = 0.1
    qk_norm: Annotated[bool, Option("Normalise queries and keys.", flag="--qk-norm/--no-qk-norm")] = False

    steps: Annotated[Count, Option("Training steps.")] = 400_000
    batch_size: Annotated[Count, Option("Global batch size.")] = 256
    accumulate: Count = 1
    lr: Annotated[Positive, Option("Learning rate of AdamW.")] = 1e-4
    warmup_steps: Index = 0
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    weight_decay: NotNegative = 0.0
    clip: Limit | None = None
    ema_decay: Share = 0.9999
    ema_warmup: bool = False

    seed: Annotated[Index, Option("Seed of everything random.")] = 0
    device: Annotated[str, Option("cpu, cuda or auto.")] = "auto"
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], Option("auto, fp32, bf16 or fp16.")] = "auto"
    attention: Annotated[Attention, Option("sdpa (torch's own, the default) or xformers.")] = "sdpa"
    compile: bool | None = None
    shard: bool = False
    weights_dir: Annotated[
        str | None, Option("Folder with pretrained weights, searched before the hub.", typed=Path, parse=str)
    ] = None
    stream_dir: str | None = None
    stream_gib: Annotated[float, Field(gt=0, le=2**31 - 1, allow_inf_nan=False)] | None = None

    log_every: Count = 100
    sample_every: Index = 10_000
    checkpoint_every: Count = 10_000
    keep_checkpoints: Count = 2
    published: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
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
            parse_published(self.published)

    def _check_model(self) -> None:
        model_config(self.model, latent_channels=4, latent_size=8, num_classes=1)  # unknown names are errors here
        for key in ("path", "time_sampling"):
            default = next(f.default for f in dataclasses.fields(self) if f.name == key)
            if self.model.startswith("DiT") and getattr(self, key) != default:
                raise UserError(
                    f"{key} is {getattr(self, key)!r}, but {self.model} trains on DDPM's own steps and schedule",
                    remedy=f"Leave {key} out, or train {self.model.replace('DiT', 'SiT')}.",
                )

    def _check_methods(self) -> None:
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
        """Names of the alignment methods in use; empty for `none`."""
        return tuple(name for name in split_methods(self.method) if name != "none")

    def backbone(self, vae: Mapping[str, Any], *, resolution: int, num_classes: int) -> ModelConfig:
        """Shape of the backbone for images of `resolution` pixels per side, given the manifest's `dataset.vae`.

        Raises:
            UserError: patch and latent sizes do not fit.
        """
        return model_config(
            self.model,
            latent_channels=vae["latent_channels"],
            latent_size=resolution // vae["downsampling"],
            num_classes=num_classes,
            qk_norm=self.qk_norm,
            attention=self.attention,
        )

    def method_config(self, method: str) -> MethodConfig:
        """The method's own frozen configuration, validated."""
        return from_mapping(config_class(method), self.align.get(method) or {}, where=f"align.{method}")


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`["steps=1000", "align.ahpa.router=lookup"]` on top of a recipe's values; values are parsed as YAML.

    A dotted key whose first part is a method's name may leave out `align.`.

    Raises:
        UserError: an override without `=`, or one below something that is no mapping.
    """
    from trainer.runs.yaml_text import parse_yaml

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
