"""AHPA: adaptive hierarchical prior alignment with the frozen VAE encoder's own layers.

Reads groups of VAE encoder layers on the token grid (no external encoder), taps an early block. A
timestep-conditioned router mixes the layers of each group and weighs the groups; the hidden state is aligned
with the result. Equation, table and appendix numbers are the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from featcache.errors import UserError
from featcache.settings import Count, Counts, Distinct, NotNegative, Positive, Share, settings
from trainer.align.base import (
    AlignInputs,
    Alignment,
    BackboneInfo,
    FeatureInfo,
    TakeStatistics,
    cosine_per_token,
)
from trainer.align.features import require
from trainer.align.heads import build_head, square_side, tap_depth, to_grid
from trainer.align.losses import l1, negative_cosine, smooth_l1, unit_rms
from trainer.align.router import (
    AttentionRouter,
    MlpRouter,
    Router,
    RouterWeights,
    ScheduleRouter,
    StaticRouter,
    TableRouter,
    build_time_embedding,
    entropy_shortfall,
    largest_weight,
)

if TYPE_CHECKING:
    from featcache.read.statistics import LayerStatistics

Group = Literal["G1", "G2", "G3", "G4"]
RouterKind = Literal["mlp", "static", "linear", "table", "attention", "content"]
TimeEmbedding = Literal["linear", "sinusoidal", "fourier"]
Head = Literal["conv1", "conv2", "conv3", "conv5", "linear", "mlp3", "mlp5"]
Loss = Literal["cosine", "l1", "smooth-l1"]
Normalize = Literal["none", "rms", "standardize", "whiten"]

# Of `whiten`: directions of less than a thousandth of the mean variance are mostly the codec's rounding.
SHRINKAGE = 1e-3
# Intervals of t for which the router's largest weight is logged.
TIME_BINS = 5

# Table A.9: a quarter of the blocks.
DEPTHS = {"B": 3, "L": 6, "XL": 7}


@settings(where="ahpa")
class AhpaConfig:
    """Options of AHPA; the defaults are the paper's final configuration (Table A.9, row (l) of Table D.13).

    groups: VAE groups to align with, shallow to deep, any of G1, G2, G3, G4 (Table 2).
    split: how the layers of two groups of equal width are shared out anew, e.g. `(2, 6)` (Table D.14);
        None: as cached.
    router: `mlp`; `static` uniform weights; `linear` schedule; lookup `table`; `attention`; `content`-adaptive.
    time_embedding: of the router's t, for `mlp`, `attention` and `content`.
    router_depth, router_width, time_width: hidden layers and widths of the router's MLP.
    bins: rows of the lookup table; ours, as the paper's value is not legible in our copy.
    prototypes: size of the attention router's bank; ours for the same reason.
    fourier_scale: std of the Fourier frequencies; ours for the same reason.
    head: `conv<k>` (k 3x3 convolutions), `linear`, `mlp<k>` (Table D.13).
    head_width: inner width of deeper heads; None: 2048 for MLPs, the target's width for convolutions (ours).
    loss: `cosine` (Eq. 5), `l1` or `smooth-l1` (beta 1, ours). The last two take the target's tokens at root mean
        square 1 (ours): activations of a VAE reach hundreds, and the loss would drown the denoising loss.
    weight: lambda.
    normalize: of the levels before they are mixed (ours; the paper has `none`). `rms`: each token by its own root mean
        square; `standardize`: each channel by its mean and standard deviation; `whiten`: decorrelated as well. The
        statistics are taken from the cache when the run is set up, and saved with it.
    router_lr: the router's learning rate as a multiple of the run's (ours; the paper has 1).
    entropy_floor: share of the largest entropy below which the router's weights cost (ours; the paper has 0). Eq. 5
        sends the router to whatever is easiest to align with; this keeps it from leaving the rest unused. The term
        `entropy` is the shortfall in nats.
    depths: blocks (1-based) to align; empty: 3 for B, 6 for L, 7 for XL, in proportion elsewhere. With
        several, each has its own head and their losses are averaged (ours; Table 1 says "simultaneously").
    """

    groups: Annotated[tuple[Group, ...], Field(strict=False, min_length=1), Distinct] = ("G3", "G4")
    split: Counts | None = None
    router: RouterKind = "mlp"
    time_embedding: TimeEmbedding = "linear"
    router_depth: Count = 4
    router_width: Count = 256
    time_width: Count = 128
    bins: Count = 10
    prototypes: Count = 16
    fourier_scale: Positive = 16.0
    head: Head = "conv1"
    head_width: Count | None = None
    loss: Loss = "cosine"
    weight: NotNegative = 1.0
    depths: Annotated[Counts, Distinct] = ()
    normalize: Normalize = "none"
    router_lr: Positive = 1.0
    entropy_floor: Annotated[Share, Field(lt=1)] = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(sorted(self.groups)))
        if self.split is not None and len(self.split) != len(self.groups):
            raise UserError(
                f"ahpa: split={list(self.split)} does not give {len(self.groups)} numbers of layers",
                remedy="Write e.g. split=[2, 6] with groups=[G3, G4].",
            )
        fixed = self.router in ("static", "linear")
        if fixed and (self.router_lr != 1 or self.entropy_floor):
            raise UserError(
                f"ahpa: router={self.router} learns nothing, so router_lr and entropy_floor have no effect",
                remedy="Leave them out, or use router=mlp.",
            )
        if self.time_width % 2:
            raise UserError(f"ahpa: time_width={self.time_width} is odd", remedy="Use an even width, e.g. 128.")

    def required(self) -> tuple[str, ...]:
        return tuple(f"vae/{group}" for group in self.groups)

    def resolve(self, available: Mapping[str, FeatureInfo]) -> tuple[str, ...]:
        return require("ahpa", self.required(), available, rank=3)


def group_layers(config: AhpaConfig, features: Mapping[str, FeatureInfo]) -> list[list[tuple[str, int]]]:
    """Layers of each routed group as (feature, index within the feature), shallow to deep.

    Raises:
        UserError: `split` does not add up, or moves layers between groups of different width.
    """
    layers = [[(name, i) for i in range(feature.shape[0])] for name, feature in features.items()]
    if config.split is None:
        return layers
    flat = [layer for group in layers for layer in group]
    widths = {feature.shape[-1] for feature in features.values()}
    if sum(config.split) != len(flat) or len(widths) > 1:
        raise UserError(
            f"ahpa: split={config.split} cannot share out {len(flat)} layers of widths {sorted(widths)}",
            remedy=f"Give numbers that sum to {len(flat)}, for groups of one width (G3 and G4).",
        )
    rest = iter(flat)
    return [[next(rest) for _ in range(count)] for count in config.split]


def build_router(config: AhpaConfig, layers: tuple[int, ...], content_width: int) -> Router:
    """The router that `config` names; `layers` per group, `content_width` of the hidden state."""
    if config.router == "static":
        return StaticRouter(layers)
    if config.router == "linear":
        return ScheduleRouter(layers)
    if config.router == "table":
        return TableRouter(layers, bins=config.bins)
    time = build_time_embedding(config.time_embedding, config.time_width, config.fourier_scale)
    if config.router == "attention":
        return AttentionRouter(layers, time=time, time_width=config.time_width, prototypes=config.prototypes)
    return MlpRouter(
        layers,
        time=time,
        time_width=config.time_width,
        width=config.router_width,
        depth=config.router_depth,
        content_width=content_width if config.router == "content" else None,
    )


class LevelNormalizer(nn.Module):
    """Normalises one cached level, `[B, N, C]`, by statistics that are its buffers (see `AhpaConfig.normalize`).

    Args:
        layers, width: L and C of the feature.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, kind: Normalize, layers: int, width: int) -> None:
        super().__init__()
        self.kind = kind
        if kind in ("standardize", "whiten"):
            shape = (layers, width) if kind == "standardize" else (layers, width, width)
            self.register_buffer("mean", torch.zeros(layers, width))
            self.register_buffer("scale", torch.full(shape, torch.nan))  # to be calibrated, or read from a checkpoint

    def calibrate(self, statistics: LayerStatistics) -> None:
        self.mean.copy_(statistics.mean)
        if self.kind == "whiten":
            self.scale.copy_(statistics.whitening(SHRINKAGE))
        else:
            std = statistics.std
            dead = std <= 1e-6 * std.amax(-1, keepdim=True)  # a constant channel says nothing: it stays constant
            self.scale.copy_(torch.where(dead, 0, 1 / std))

    def forward(self, level: Tensor, index: int) -> Tensor:
        if self.kind == "none":
            return level
        if self.kind == "rms":
            return unit_rms(level)
        centred = level.float() - self.mean[index]
        return centred * self.scale[index] if self.kind == "standardize" else centred @ self.scale[index]


class Ahpa(Alignment):
    """`L = -weight * mean cos(head(h), T)`, `T = concat_g s_g(t) sum_l softmax(a_g(t))_l f_gl` (Eq. 3-5).

    The router is trained through T; the cached features receive no gradient. The weights multiply inside the
    sum, `T_g = sum_l (s_g w_gl) f_gl`, one layer at a time, and accumulate in float32: no float32 copy of
    all levels ever exists, only T itself ([B, N, 1024]: 1 MiB per sample). Under `torch.compile` the sum is
    unrolled pointwise work, so that the decoding of int8 or fp16 levels, the weights and the reductions of
    the cosine fuse into passes over the stored bytes; folding the codec's per-token scale into the weights by
    hand would save nothing more.
    """

    def __init__(self, config: AhpaConfig, info: BackboneInfo, features: Mapping[str, FeatureInfo]) -> None:
        super().__init__()
        self.config = config
        self.grid = info.grid
        self.reads = tuple(features)
        chosen: tuple[int | None, ...] = config.depths or (None,)
        self.taps = tuple(tap_depth("ahpa", d, DEPTHS, info) for d in chosen)
        for name, feature in features.items():
            square_side("ahpa", name, feature.shape[1])
        self.groups = group_layers(config, features)
        self.widths = [features[group[0][0]].shape[-1] for group in self.groups]
        self.router = build_router(config, tuple(len(group) for group in self.groups), info.width)
        self.normalizers = nn.ModuleDict(
            {_key(name): LevelNormalizer(config.normalize, f.shape[0], f.shape[2]) for name, f in features.items()}
        )
        self.heads = nn.ModuleList(
            build_head(config.head, info.width, sum(self.widths), grid=info.grid, hidden=config.head_width)
            for _ in self.taps
        )

    def calibrate(self, take: TakeStatistics) -> None:
        if self.config.normalize in ("standardize", "whiten"):
            for name, statistics in take(self.reads).items():
                self._normalizer(name).calibrate(statistics)

    def rate_factors(self) -> dict[str, float]:
        return {} if self.config.router_lr == 1 else {"router": self.config.router_lr}

    def _normalizer(self, name: str) -> LevelNormalizer:
        found = self.normalizers[_key(name)]
        assert isinstance(found, LevelNormalizer)
        return found

    def route(self, inputs: AlignInputs, hidden: Tensor) -> RouterWeights:
        """Weights for this batch. `hidden` [B, N, D] only matters to the content-adaptive router.

        The content is detached (ours): otherwise the backbone could lower the loss by steering the choice
        of its target.
        """
        content = hidden.detach().float().mean(dim=1) if self.config.router == "content" else None
        weights: RouterWeights = self.router(inputs.t, content)
        return weights

    def target(self, inputs: AlignInputs, weights: RouterWeights) -> Tensor:
        """T of Eq. 4: float32 [B, N, sum of the groups' widths], on the backbone's token grid."""
        parts = []
        for g, group in enumerate(self.groups):
            w = weights.intra[g] * weights.inter[:, g : g + 1]  # [B, L]
            mixed: Tensor | None = None
            for l, (name, index) in enumerate(group):
                level = self._normalizer(name)(inputs.targets[name].detach()[:, index], index)  # [B, N, C]
                weighted = w[:, l, None, None] * level
                mixed = weighted if mixed is None else mixed + weighted
            assert mixed is not None
            parts.append(to_grid(mixed, self.grid))  # linear, so resampling the mixture is resampling the levels
        return torch.cat(parts, dim=-1)

    def _distance(self, p: Tensor, y: Tensor) -> Tensor:
        if self.config.loss == "cosine":
            return negative_cosine(p, y)
        y = unit_rms(y)
        return l1(p, y) if self.config.loss == "l1" else smooth_l1(p, y, beta=1.0)

    def terms(self, inputs: AlignInputs) -> dict[str, Tensor]:
        losses, shortfalls = [], []
        y: Tensor | None = None
        for tap, head in zip(self.taps, self.heads, strict=True):
            hidden = inputs.hidden[tap]
            if y is None or self.config.router == "content":
                weights = self.route(inputs, hidden)
                y = self.target(inputs, weights)
                if self.config.entropy_floor:
                    shortfalls.append(entropy_shortfall(weights, self.config.entropy_floor))
            losses.append(self._distance(head(hidden), y))
        terms = {self.config.loss: self.config.weight * torch.stack(losses).mean()}
        return terms | ({"entropy": torch.stack(shortfalls).mean()} if shortfalls else {})

    def metrics(self, inputs: AlignInputs) -> dict[str, Tensor]:
        hidden = inputs.hidden[self.taps[0]]
        weights = self.route(inputs, hidden)
        y = self.target(inputs, weights)
        values = {"similarity": cosine_per_token(self.heads[0](hidden), y).mean()}
        for g, name in enumerate(self.config.groups):
            values[f"router/{name}"] = weights.inter[:, g].mean()
        # By bin of t, at the bins' centres: batches need not reach all of them.
        bins = torch.arange(TIME_BINS, device=inputs.t.device)
        centres = ((bins + 0.5) / TIME_BINS).repeat_interleave(len(inputs.t))
        repeated = hidden.repeat(TIME_BINS, 1, 1) if self.config.router == "content" else hidden
        largest = largest_weight(self.route(replace(inputs, t=centres), repeated)).view(TIME_BINS, -1).mean(1)
        for i, value in enumerate(largest.unbind()):
            values[f"router/largest t={i / TIME_BINS:.1f}-{(i + 1) / TIME_BINS:.1f}"] = value
        return values


def _key(name: str) -> str:
    """A feature's name as a submodule's."""
    return name.replace("/", "_")
