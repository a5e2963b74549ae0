"""One frozen, validated configuration for a run; recipes are YAML files of its keys.

A key that does not exist is an error with a suggestion, never a silent default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from featcache.errors import UserError
from featcache.settings import (
    Count,
    Distinct,
    Finite,
    Index,
    Limit,
    NotNegative,
    Option,
    Positive,
    Share,
    from_mapping,
    number,
    settings,
    to_mapping,
)
from trainer.align import DiffusesFeatures, config_class, launched, method_names, split_methods
from trainer.averages import Average, Width, widths
from trainer.models import model_config
from trainer.models.config import Attention, TextShape, takes_text
from trainer.runs import intervals
from trainer.runs.published import parse_published
from trainer.runs.streams import OPTIONS, stream_config, stream_names, stream_shapes
from trainer.runs.text import check_condition, text_shape

if TYPE_CHECKING:
    from trainer.align.base import MethodConfig
    from trainer.diffusion.transport import FlowOptions
    from trainer.models import ModelConfig

Beta = Annotated[float, Field(ge=0, lt=1)]


@settings
class RunConfig:
    """What one training run does.

    What to train:
        method: `none`, or alignment methods joined by `+` (`ahpa`, `repa`, `ahpa+sra`).
        align: options of each method by its name, e.g. `{"ahpa": {"router": "table"}}`.
        align_until: step from which alignment is switched off (HASTE); None: never.
        model: backbone, e.g. `SiT-XL/2`, `LightningDiT-XL/1`.
        cache: path or URL of the feature cache.
        name: folder below `runs`.
        resolution: side in pixels that the cache must have; None: any.
        vae: the one that the cache must have been made with, e.g. `sd-ft-ema`; None: any.
    Objective:
        normalization: of the latents: `scalar`, by the VAE's scaling factor; by the mean and standard deviation of each
            `channel`, or of each `position` too; `auto` is `channel` where statistics were imported with the latents.
            Results under different ones are not comparable: it decides at which times which detail is noise.
        statistics: file of the last two (`featcache stats`, or iREPA's, REPA-E's, LightningDiT's, RAE's); None takes
            those imported with the latents, else computes them from the cache. A run keeps a copy.
        condition: what is generated from where it is no label: an encoder's captions, e.g. `text/clip-l`, for MMDiT, which
            takes the cache's only one by itself.
        zero_init: of MMDiT: begin with modulations and output at zero, as all other backbones do; ours. Published is
            PyTorch's default everywhere.
        streams: features diffused beside the latents, each with options of `trainer.runs.streams.StreamConfig`; some
            methods bring their own.
        path: interpolant of SiT and LightningDiT, see `trainer.diffusion.transport.Flow`.
        time_sampling: how t is drawn.
        time_mean, time_std: of the normal draws where they are `lognormal`.
        time_shift: s, which moves t to s t / (1 + (s - 1) t): above 1 towards noise.
        prediction: what the backbone says of x_t; the loss is the velocity's in each case.
        time_floor: smallest divisor where the velocity follows from x or the noise.
        cosine_weight: of the velocity's direction.
        label_dropout: share of null labels; of text, of captions that are replaced by the empty one.
        qk_norm: normalise queries and keys.
    Optimisation (AdamW):
        steps: of the optimiser, from the run's beginning.
        batch_size: global, over all ranks and accumulation steps.
        accumulate: micro-batches per step, for batches that do not fit at once.
        lr: after the warm-up; None takes the method's (2e-4 for AHPA, else 1e-4).
        lr_schedule: `constant`, or what follows warm-up and hold: `linear` or `cosine`, down to `lr_end`, or
            `inverse-sqrt`, lr * sqrt(K / step) after their K steps (EDM2).
        warmup_steps: in which the rate rises from zero.
        hold_steps: at the full rate after the warm-up, before it falls.
        decay_until: step at which `linear` and `cosine` reach `lr_end`; None: the last.
        lr_end: rate to which `linear` and `cosine` fall, and which stays from there on.
        betas, weight_decay: AdamW's.
        skip_nonfinite: how many steps of the run may be left out because their loss or gradient is not finite, before it
            stops; 0 stops at the first one.
        clip: maximal gradient norm; None takes the method's (2.0 for AHPA, none for ReDi, else 1.0), `.inf` is no
            clipping.
        ema_decay: of the weights' average.
        ema_warmup: begin with a smaller one, min(decay, (1 + step) / (10 + step)).
        ema_decays: of further averages, e.g. `[0.999, 0.99995]`, kept in checkpoints and snapshots beside the first; each
            takes as much memory as the weights.
        posthoc: widths sigma_rel of EDM2's power-function averages, from which snapshots let an average of any width be made
            after the run; `true` is `[0.05, 0.1]`. Each takes as much memory as the weights.
    Machine:
        seed: of everything random.
        device: `cpu`, `cuda` or `auto`.
        precision: `auto` is bf16 autocast on a GPU and fp32 on the CPU.
        attention: `sdpa` is torch's own, `xformers` needs a GPU.
        compile: the training step; None compiles on a GPU only.
        recompute: `blocks` keeps of each block of the backbone only its input, and runs it again in the backward pass: a
            third more computation for a fraction of the memory. The same numbers; compiled, but for rounding.
        cuda_graphs: replay the compiled step's kernels as CUDA graphs, which saves their launches: where a small model or
            batch leaves the GPU waiting for the host. One GPU, and a batch in one piece.
        shard: split weights, average and optimiser state over the ranks (FSDP2) instead of keeping a copy on each
            (DDP); a single rank has nothing to split. Like compile and accumulate it changes no more than rounding.
        weights_dir: folder with pretrained weights, searched before the hub.
        stream_dir, stream_gib: where blocks of a remote cache are kept, and how many GiB of them each process keeps at
            most; None: `$FEATCACHE_STREAM_DIR` and 10 GiB.
    Bookkeeping:
        log_every: steps between lines of the log; None takes 100, or so few that there are 50 lines.
        sample_every: steps between grids of samples, each of which costs about as much as training on 850 images; 0
            draws none. None takes 10,000, or four in the run, or so many as add a tenth to the training at most.
        checkpoint_every: steps between checkpoints; None takes 10,000, or a fifth of the run, but no fewer than 100.
        keep_checkpoints: how many of the latest stay.
        snapshot_every: steps from one snapshot to the next, the averaged weights alone, which all stay; 0 keeps none.
        snapshot_dtype: in which they are stored; `bf16` is half as large, and rounded.
        eval_every: steps from one small evaluation during training to the next, 0: none. It changes nothing of the training
            and is no published protocol.
        eval_num, eval_extractor: samples it draws, always from the same noise, and who judges them (as `trainer eval
            --extractor`).
        eval_reference: what it compares with, as `trainer eval --reference`; None: up to 10,000 of the cache's own images.
        eval_prompts: of a model that takes text, what it draws, as `trainer eval --prompts`; None: the captions of the cache's
            first images.
        published: figures of the paper's row, for the report.
    """

    method: Annotated[str, Option("none, repa, ahpa, ...; join several with +.")] = "none"
    align: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    align_until: Index | None = None
    model: Annotated[str, Option("Backbone, e.g. SiT-B/2, SiT-XL/2, DiT-XL/2, LightningDiT-XL/1, MMDiT-L/2.")] = (
        "SiT-B/2"
    )
    cache: Annotated[str | None, Option("Feature cache. [default: the newest fitting one below ./caches]")] = None
    resolution: Count | None = None
    vae: str | None = None
    name: Annotated[str | None, Option("Folder below ./runs. [default: from method and model]")] = None

    normalization: Annotated[
        Literal["auto", "scalar", "channel", "position"],
        Option("Of the latents: scalar (by the VAE's factor), channel or position (by mean and std), or auto."),
    ] = "auto"
    statistics: Annotated[
        str | None,
        Option(
            "File of mean and std. [default: imported with the latents, else computed from the cache]",
            typed=Path,
            parse=str,
        ),
    ] = None
    streams: Annotated[
        Mapping[str, Mapping[str, Any] | None],
        Option(
            "Features to diffuse beside the latents, joined by commas: dinov2-b@11.cls,... [default: those of the method]",
            typed=str,
            parse=stream_names,
        ),
    ] = field(default_factory=dict)
    condition: Annotated[
        str | None,
        Option("Text to generate from, e.g. text/clip-l (MMDiT). [default: MMDiT takes the cache's only one]"),
    ] = None
    zero_init: bool = False
    path: Literal["linear", "cosine"] = "linear"
    time_sampling: Literal["uniform", "lognormal"] = "uniform"
    time_mean: Finite = 0.0
    time_std: Positive = 1.0
    time_shift: Positive = 1.0
    prediction: Literal["velocity", "x", "noise"] = "velocity"
    time_floor: Annotated[Positive, Field(le=1)] = 0.05
    cosine_weight: NotNegative = 0.0
    label_dropout: Share = 0.1
    qk_norm: Annotated[bool, Option("Normalise queries and keys.", flag="--qk-norm/--no-qk-norm")] = False

    steps: Annotated[Count, Option("Training steps.")] = 400_000
    batch_size: Annotated[Count, Option("Global batch size.")] = 256
    accumulate: Count = 1
    lr: Annotated[
        Positive | None, Option("Learning rate of AdamW. [default: the method's, 2e-4 for AHPA, else 1e-4]")
    ] = None
    lr_schedule: Literal["constant", "linear", "cosine", "inverse-sqrt"] = "constant"
    warmup_steps: Index = 0
    hold_steps: Index = 0
    decay_until: Count | None = None
    lr_end: NotNegative = 0.0
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    weight_decay: NotNegative = 0.0
    clip: Limit | None = None
    skip_nonfinite: Annotated[Index, Field(le=1000)] = 0
    ema_decay: Share = 0.9999
    ema_warmup: bool = False
    ema_decays: Annotated[tuple[Share, ...], Field(strict=False), Distinct] = ()
    posthoc: Annotated[tuple[Width, ...], Field(strict=False), Distinct, BeforeValidator(widths)] = ()

    seed: Annotated[Index, Option("Seed of everything random.")] = 0
    device: Annotated[str, Option("cpu, cuda or auto.")] = "auto"
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], Option("auto, fp32, bf16 or fp16.")] = "auto"
    attention: Annotated[Attention, Option("sdpa (torch's own) or xformers.")] = "sdpa"
    compile: bool | None = None
    recompute: Literal["none", "blocks"] = "none"
    cuda_graphs: bool = False
    shard: bool = False
    weights_dir: Annotated[
        str | None,
        Option(
            "Folder with pretrained weights, searched before the hub. [default: the hub alone]", typed=Path, parse=str
        ),
    ] = None
    stream_dir: str | None = None
    stream_gib: Annotated[float, Field(gt=0, le=2**31 - 1, allow_inf_nan=False)] | None = None

    log_every: Count | None = None
    sample_every: Index | None = None
    checkpoint_every: Count | None = None
    keep_checkpoints: Count = 2
    snapshot_every: Index = 0
    snapshot_dtype: Literal["bf16", "fp32"] = "fp32"
    eval_every: Index = 0
    eval_num: Annotated[int, Field(ge=2, le=2**31 - 1)] = 256
    eval_extractor: Literal["auto", "inception", "dinov2", "embedded", "embedded-vit"] = "auto"
    eval_reference: str | None = None
    eval_prompts: str | None = None
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
        self._check_cuda_graphs()
        self._check_model()
        self._check_unused()
        self._check_schedule()
        self._check_methods()
        self._check_averages()
        for feature, options in self.streams.items():
            stream_config(feature, options)
        if self.published:
            parse_published(self.published)

    def _check_model(self) -> None:
        # Unknown names are errors here.
        text = TextShape(name="text", tokens=1, width=1) if takes_text(self.model) else None
        model_config(self.model, latent_channels=4, latent_size=8, num_classes=1, text=text, zero_init=self.zero_init)
        if self.condition is not None:
            check_condition(self.condition, self.model)
        if takes_text(self.model) and self.streams:
            raise UserError(
                f"{', '.join(self.streams)}: to be diffused beside the latents, and {self.model} draws latents alone",
                remedy="Leave --streams out, or train a SiT or LightningDiT on labels.",
            )
        if self.eval_prompts is not None and not takes_text(self.model):
            raise UserError(
                f"eval_prompts are for models that take text, and {self.model} takes labels",
                remedy="Leave eval_prompts out, or take a model that takes text: --model MMDiT-L/2",
            )
        for key in self.flow:
            if self.model.startswith("DiT") and self._is_changed(key):
                raise UserError(
                    f"{key} is {getattr(self, key)!r}, but {self.model} trains on DDPM's own steps and schedule",
                    remedy=f"Leave {key} out, or train {self.model.replace('DiT', 'SiT')}.",
                )

    def _check_cuda_graphs(self) -> None:
        """Whether what a GPU is to replay is one compiled region whose gradients are used before it runs again."""
        for key, clashes, why in (
            ("compile", self.compile is False, "they are made of the compiled step"),
            ("accumulate", self.accumulate > 1, "the next micro-batch would overwrite the gradients of the one before"),
            ("shard", self.shard, "the gathering between blocks is not part of a compiled region"),
            ("device", self.device == "cpu", "they need a GPU"),
        ):
            if self.cuda_graphs and clashes:
                raise UserError(
                    f"cuda_graphs does not go with {key} {str(getattr(self, key)).lower()}: {why}",
                    remedy=f"Leave out cuda_graphs or {key}.",
                )

    def _is_changed(self, key: str) -> bool:
        default = next(field.default for field in dataclasses.fields(self) if field.name == key)
        return bool(getattr(self, key) != default)

    def _check_unused(self) -> None:
        """Refuses settings that another setting leaves without effect."""
        for key, other, value, wanted in (
            ("time_mean", "time_sampling", "uniform", "lognormal"),
            ("time_std", "time_sampling", "uniform", "lognormal"),
            ("time_floor", "prediction", "velocity", "x or noise"),
            ("hold_steps", "lr_schedule", "constant", "linear, cosine or inverse-sqrt"),
            *(
                (key, "lr_schedule", schedule, "linear or cosine")
                for key in ("decay_until", "lr_end")
                for schedule in ("constant", "inverse-sqrt")
            ),
        ):
            if getattr(self, other) == value and self._is_changed(key):
                raise UserError(
                    f"{key} is {getattr(self, key)!r}, which has no effect while {other} is {value}",
                    remedy=f"Leave {key} out, or set {other} to {wanted}.",
                )

    def _check_schedule(self) -> None:
        held, end = self.warmup_steps + self.hold_steps, self.decay_until or self.steps
        if self.lr_schedule == "inverse-sqrt" and not held:
            raise UserError(
                "lr_schedule inverse-sqrt falls from the end of warm-up and hold on, and both are 0 steps",
                remedy="Say how long the rate stays: --set hold_steps=70000 (EDM2 on ImageNet-512).",
            )
        if self.lr_schedule in ("linear", "cosine") and held >= end:
            raise UserError(
                f"the learning rate is to fall until step {end}, and warm-up and hold last until step {held}",
                remedy="Take fewer warmup_steps or hold_steps.",
            )

    def _check_averages(self) -> None:
        if self.ema_decay in self.ema_decays:
            raise UserError(
                f"ema_decays names {self.ema_decay:g}, which is the first average's (ema_decay)",
                remedy="Leave it out of ema_decays.",
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
            options = self.method_config(method)
            if takes_text(self.model) and isinstance(options, DiffusesFeatures):
                raise UserError(
                    f"method {method} diffuses features beside the latents, and {self.model} draws latents alone",
                    remedy="Take another --method, or train a SiT or LightningDiT on labels.",
                )

    @property
    def flow(self) -> FlowOptions:
        """What `trainer.diffusion.transport.build_transport` takes of it."""
        return {
            "path": self.path,
            "time_sampling": self.time_sampling,
            "time_mean": self.time_mean,
            "time_std": self.time_std,
            "time_shift": self.time_shift,
            "prediction": self.prediction,
            "time_floor": self.time_floor,
            "cosine_weight": self.cosine_weight,
        }

    @property
    def falls_until_the_end(self) -> bool:
        """Whether the learning rate depends on the number of steps."""
        return self.lr_schedule in ("linear", "cosine") and self.decay_until is None

    @property
    def averages(self) -> tuple[Average, ...]:
        """Those of the weights that training keeps: the first, then the further ones."""
        further = [Average("ema", decay) for decay in self.ema_decays]
        return (Average(), *further, *(Average("power", width) for width in self.posthoc))

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the alignment methods in use; empty for `none`."""
        return tuple(name for name in split_methods(self.method) if name != "none")

    def settled(self) -> RunConfig:
        """With nothing left to the method or to the length of the run, and all options of the method: as a run's
        `config.yaml` has it, so that a later version's defaults change nothing of it."""
        return dataclasses.replace(
            self,
            **self._intervals(),
            lr=self.lr if self.lr is not None else launched(self.methods, "lr", 1e-4),
            clip=self.clip if self.clip is not None else launched(self.methods, "clip", 1.0),
            align={method: to_mapping(self.method_config(method)) for method in self.methods},
        )

    def _intervals(self) -> dict[str, Any]:
        chosen = {
            "log_every": intervals.log_interval(self.steps),
            "sample_every": intervals.grid_interval(self.steps, self.batch_size),
            "checkpoint_every": intervals.save_interval(self.steps),
        }
        return {name: value for name, value in chosen.items() if getattr(self, name) is None}

    def backbone(
        self,
        vae: Mapping[str, Any],
        *,
        resolution: int,
        num_classes: int,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> ModelConfig:
        """Shape of the backbone for images of `resolution` pixels per side, given the manifest's `dataset.vae` and the
        shapes of the features that are diffused beside the latents or are the condition.

        Raises:
            UserError: patch and latent sizes do not fit, or a stream or the condition has another shape.
        """
        return model_config(
            self.model,
            latent_channels=vae["latent_channels"],
            latent_size=resolution // vae["downsampling"],
            num_classes=num_classes,
            qk_norm=self.qk_norm,
            attention=self.attention,
            streams=stream_shapes(self.streams, shapes or {}),
            text=text_shape(self.condition, shapes or {}),
            zero_init=self.zero_init,
        )

    def method_config(self, method: str) -> MethodConfig:
        """The method's own frozen configuration, validated."""
        return from_mapping(config_class(method), self.align.get(method) or {}, where=f"align.{method}")


def _parts(key: str, value: object) -> list[str]:
    """Of a dotted key; the name of a stream's feature may have dots of its own, and has options for its value."""
    first, _, rest = key.partition(".")
    if first != "streams" or not rest:
        return key.split(".")
    feature, _, option = rest.rpartition(".")
    has_options = option not in OPTIONS and (value is None or isinstance(value, Mapping))
    return [first, rest] if has_options or not feature else [first, feature, option]


def _check_owner(method: str, key: str, text: str) -> None:
    """Refuses what is a setting of the run's and none of the method's."""
    own = {field.name for field in dataclasses.fields(config_class(method))}
    if key not in own and key in {field.name for field in dataclasses.fields(RunConfig)}:
        raise UserError(
            f"--set {method}.{key}={text}: {key} is a setting of the run, not of {method}",
            remedy=f"Type --set {key}={text}",
        )


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
        value = number(parse_yaml(text, f"the value of --set {override!r:.200}"))
        *parents, leaf = _parts(key, value)
        if parents and parents[0] in method_names():
            _check_owner(parents[0], leaf, text)
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
        node[leaf] = value
    return result
