"""What a run is made of: model, average, alignment, objective and optimisers, and how they are saved and put back."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from featcache.codecs import FeatureCodec
from featcache.errors import CacheError, UserError
from featcache.paths import typed
from featcache.read.normalization import Statistics
from featcache.read.statistics import layer_statistics
from trainer import align, distributed
from trainer.align.base import AlignInputs, Alignment, BackboneInfo
from trainer.diffusion.transport import build_transport
from trainer.distributed import World
from trainer.models import ModelConfig, Transformer, build_model, load_weights
from trainer.models.blocks import token_positions
from trainer.runs import checkpoint, snapshots
from trainer.runs.budget import Sizes
from trainer.runs.cache import available_features, build_command, fitted, stream_spec
from trainer.runs.config import RunConfig
from trainer.runs.normalization import from_statistics, of_tokens, scalar
from trainer.runs.streams import stream_config
from trainer.seeds import derive_seed
from trainer.training.averages import FurtherAverages
from trainer.training.conditions import build_condition
from trainer.training.objective import Objective
from trainer.training.streams import Stream

if TYPE_CHECKING:
    from featcache import Cache

# Key of an optimiser's group: its multiple of the run's learning rate.
RATE_FACTOR = "rate_factor"
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything that a step changes and a checkpoint saves.

    forward: `objective` as a step calls it: compiled, and wrapped for several ranks. groups: trained parameters, the
    backbone's and the alignment's. names: of all of them, as keys of the optimiser's saved state.
    """

    model: Transformer
    ema: Transformer
    alignment: Alignment | None
    objective: Objective
    forward: Callable[..., tuple[dict[str, Tensor], AlignInputs | None]]
    groups: tuple[list[nn.Parameter], ...]
    names: Mapping[Tensor, str]
    optimizer: torch.optim.Optimizer
    adversary_optimizer: torch.optim.Optimizer | None
    scaler: torch.amp.GradScaler | None
    sharded: bool
    averages: FurtherAverages

    @property
    def sizes(self) -> Sizes:
        """What decides how large its checkpoints are."""
        heads = {name: p for p, name in self.names.items() if name.startswith("alignment.")}
        return Sizes(
            weights=sum(p.numel() for p in self.model.parameters()),
            heads=sum(p.numel() for p in heads.values()),
            beside_bytes=sum(v.nbytes for v in self.alignment.state_dict().values())
            if self.alignment is not None
            else 0,
            adversary=sum(p.numel() for p in self.adversary.parameters()) if self.adversary is not None else 0,
        )

    @property
    def data(self) -> tuple[str, ...]:
        """Names of the cached features that are diffused, the latents first."""
        return ("vae/moments", *(stream.name for stream in self.model.cfg.streams))

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the cached features that are trained on."""
        aligned = self.alignment.reads if self.alignment is not None else ()
        return tuple(dict.fromkeys((*self.data, *self.objective.condition.reads, *aligned)))

    @property
    def adversary(self) -> nn.Module | None:
        return self.alignment.adversary if self.alignment is not None else None

    def adversary_steps(self, step: int) -> bool:
        """Whether it is the discriminator's turn in this step."""
        return self.alignment is not None and self.adversary is not None and step % self.alignment.adversary_every == 0


def assemble(
    config: RunConfig,
    cache: Cache,
    device: torch.device,
    world: World,
    *,
    backbone: tuple[Transformer, Transformer] | None = None,
    statistics: Statistics | None = None,
    stream_statistics: Mapping[str, Statistics] | None = None,
    begun: bool = False,
    planned: Callable[[ModelConfig, Alignment | None], None] = lambda cfg, alignment: None,
) -> Parts:
    """Builds everything from a configuration and a cache.

    The backbone's initial weights are a function of the seed alone, whatever the method.

    Args:
        backbone: model and average to use instead of new ones, for comparing methods on one.
        statistics: that the latents are normalised by; None by the VAE's scaling factor. stream_statistics: of the
            streams that are normalised.
        begun: a checkpoint is about to be loaded: what the alignment takes of the cache when it starts is in it.
        planned: called with what is going to be built, before the backbone takes time and memory.

    Raises:
        CacheError: the cache lacks a feature that the method needs (the error ends with the command that adds it).
        UserError: model and latents do not fit together.
    """
    config, dataset = fitted(config.settled(), cache), cache.manifest.dataset
    model_cfg = backbone_config(config, cache)
    assert dataset.vae is not None, "a cache with a backbone has latents"
    sharded = config.shard and world.size > 1
    compiled = config.compile if config.compile is not None else device.type == "cuda"
    alignment = build_alignment(config, cache, model_cfg, calibrate=not begun)
    planned(model_cfg, alignment)
    # A model that is to be sharded never lies whole on a device: its blocks move there one by one.
    if backbone is None:
        model = build_model(model_cfg, seed=derive_seed(config.seed, "backbone"), device="cpu" if sharded else device)
        backbone = model, copy.deepcopy(model).eval().requires_grad_(False)
    model, ema = backbone
    model.set_recompute(config.recompute == "blocks")
    autocast = DTYPES[precision_of(config, device)]
    if config.cuda_graphs:
        _check_cuda_graphs(device, world, compiled=compiled)
    if sharded:
        for module in (model, ema):
            if compiled:
                _compile_between_gatherings(module)
            distributed.shard(module, world, device, autocast=autocast)
    if alignment is not None:
        alignment.to(device)
        distributed.like_main(alignment)  # pretrained weights may be there on one machine and not on another
    reads = ("vae/moments", *(alignment.reads if alignment is not None else ()))
    objective = Objective(
        model,
        alignment,
        {name: FeatureCodec(cache.manifest.features[name]) for name in reads},
        streams=build_streams(config, cache, model_cfg, stream_statistics or {}),
        normalization=scalar(dataset.vae) if statistics is None else from_statistics(statistics),
        transport=build_transport(model_cfg.family, device=next(model.parameters()).device, **config.flow),
        label_dropout=config.label_dropout,
        autocast=autocast,
        teacher=ema,
        condition=build_condition(model_cfg, cache),
    ).to(device)
    adversary = (
        list(alignment.adversary.parameters()) if alignment is not None and alignment.adversary is not None else []
    )
    names, groups, factors = _trained(model, alignment, without=set(adversary))
    adam: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay, "fused": True}
    return Parts(
        model=model,
        ema=ema,
        alignment=alignment,
        objective=objective,
        forward=_wrapped(objective, world, device, sharded=sharded, compiled=compiled, cuda_graphs=config.cuda_graphs),
        groups=groups,
        names=names,
        optimizer=torch.optim.AdamW(
            [{"params": group, RATE_FACTOR: factor} for group, factor in zip(groups, factors)], **adam
        ),
        adversary_optimizer=torch.optim.AdamW(adversary, **adam) if adversary else None,
        scaler=torch.amp.GradScaler(device.type) if precision_of(config, device) == "fp16" else None,
        sharded=sharded,
        averages=FurtherAverages.begin(model, config.averages[1:]),
    )


def _trained(
    model: Transformer, alignment: Alignment | None, *, without: set[nn.Parameter]
) -> tuple[dict[Tensor, str], tuple[list[nn.Parameter], ...], tuple[float, ...]]:
    """Names of the trained parameters, the parameters in groups of one kind (sharded or not, backbone or heads, one
    learning rate), and the groups' multiples of the run's learning rate."""
    names: dict[Tensor, str] = {p: f"model.{n}" for n, p in model.named_parameters()}
    groups: dict[float, list[nn.Parameter]] = {}
    if alignment is not None:
        factors = {f"alignment.{part}.": f for part, f in alignment.rate_factors().items()}
        for n, p in alignment.named_parameters():
            if p not in without:
                names[p] = name = f"alignment.{n}"
                factor = next((f for part, f in factors.items() if name.startswith(part)), 1.0)
                groups.setdefault(factor, []).append(p)
    return names, (list(model.parameters()), *groups.values()), (1.0, *groups)


def _check_cuda_graphs(device: torch.device, world: World, *, compiled: bool) -> None:
    """Refuses what the settings alone do not show to be impossible."""
    if device.type != "cuda" or not compiled:
        raise UserError(
            f"cuda_graphs was asked for, and this run is on {device.type}, {'' if compiled else 'not '}compiled",
            remedy="Leave out cuda_graphs.",
        )
    if world.size > 1:
        raise UserError(
            f"cuda_graphs was asked for with {world.size} ranks: where gradients are exchanged the step is cut, "
            "and what is exchanged is no part of a graph",
            remedy="Leave out cuda_graphs, or train on one GPU.",
        )


def _compile_between_gatherings(model: Transformer) -> None:
    """Compiles a model that is to be sharded piece by piece: gathering weights cannot be part of a compiled region. All
    blocks share one graph."""
    for module in (*model.blocks, model.x_embedder, model.t_embedder, model.condition_embedder, model.final_layer):
        module.compile(dynamic=False)


def _wrapped(
    objective: Objective,
    world: World,
    device: torch.device,
    *,
    sharded: bool,
    compiled: bool,
    cuda_graphs: bool = False,
) -> nn.Module:
    """`objective` for several ranks and compiled as one region; sharded models look after themselves."""
    if sharded:
        if compiled:
            objective.compile_around_the_model()
        return objective
    if compiled:
        # In place and inside DDP, which cuts it where gradients are exchanged. reduce-overhead captures forward and
        # backward pass as CUDA graphs and copies whatever moves (batch, draws) to fixed places; weights and average stay
        # where they are. The optimiser and the average are a handful of launches already.
        objective.compile(dynamic=False, **({"mode": "reduce-overhead"} if cuda_graphs else {}))
    forward: nn.Module = objective
    if world.size > 1:
        # DDP averages the backbone's gradients alone: what does not require gradients now is left to us. Steps without
        # alignment give its heads none, and to learn that, DDP would have the host wait for the device in each of them.
        heads = list(objective.alignment.parameters()) if objective.alignment is not None else []
        trained = [parameter for parameter in heads if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        wrap = nn.parallel.DistributedDataParallel
        # The buffers are constants. The option was renamed in PyTorch, and the old name warns.
        known = inspect.signature(wrap).parameters
        constant_buffers: Any = {
            "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
        }
        forward = wrap(
            objective,
            device_ids=[device.index] if device.type == "cuda" else None,
            **constant_buffers,
            gradient_as_bucket_view=True,
        )
        for parameter in trained:
            parameter.requires_grad_(True)
    return forward


def precision_of(config: RunConfig, device: torch.device) -> str:
    """`auto` is bf16 on a GPU, fp32 on the CPU."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if device.type == "cuda" else "fp32"


def backbone_config(config: RunConfig, cache: Cache) -> ModelConfig:
    """Shape of the backbone for a cache's latents and classes.

    Raises:
        CacheError: the cache holds no latents. UserError: patch and latent sizes do not fit.
    """
    dataset = cache.manifest.dataset
    if dataset.vae is None or "vae/moments" not in cache.manifest.features:
        raise CacheError(
            f"{cache.path} holds no VAE moments to train on", remedy=build_command(cache, ("vae/moments",))
        )
    return fitted(config, cache).backbone(
        dataset.vae,
        resolution=dataset.resolution,
        num_classes=len(dataset.class_names),
        shapes={name: tuple(feature.shape) for name, feature in cache.manifest.features.items()},
    )


def build_streams(
    config: RunConfig, cache: Cache, model_cfg: ModelConfig, statistics: Mapping[str, Statistics]
) -> list[Stream]:
    """What is diffused beside the latents.

    Raises:
        CacheError: the cache lacks one.
        UserError: one is to be normalised, and its statistics are not given.
    """
    found = []
    for shape in model_cfg.streams:
        stream = stream_config(shape.name, config.streams[shape.name])
        if stream.normalization != "none" and shape.name not in statistics:
            raise UserError(
                f"{shape.name} is to be normalised by {stream.normalization}, and there are no statistics of it",
                remedy=f"Compute them: featcache stats {typed(cache.path)} --feature {shape.name} --over "
                f"{stream.normalization} --out stats.safetensors",
            )
        normalization = None if stream.normalization == "none" else of_tokens(statistics[shape.name])
        codec = FeatureCodec(stream_spec(shape.name, cache, (shape.name,)))
        size = model_cfg.latent_size
        found.append(Stream(shape, codec, stream, normalization=normalization, latent_size=size))
    return found


def build_alignment(config: RunConfig, cache: Cache, model_cfg: ModelConfig, *, calibrate: bool) -> Alignment | None:
    """The method's module on the CPU, initialised from a seed of its own; `calibrate`: with the cache's statistics where
    it asks, which a checkpoint would bring.

    Raises:
        CacheError: the cache lacks what the method reads.
    """
    chosen = [(name, config.method_config(name)) for name in config.methods if align.aligns(name)]
    if not chosen:
        return None
    info = backbone_info(config.model, model_cfg)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "alignment"))
            alignment = align.build(chosen, info, available_features(cache))
    except CacheError as error:
        wanted = [f for name, method in chosen for f in align.required_features(name, method)]
        raise CacheError(f"{cache.path}: {error.what}", remedy=build_command(cache, wanted)) from error
    if calibrate:
        alignment.calibrate(lambda names: layer_statistics(cache, names, seed=derive_seed(config.seed, "statistics")))
    return alignment


def backbone_info(name: str, cfg: ModelConfig) -> BackboneInfo:
    """What a method may know of the backbone."""
    return BackboneInfo(
        name=name,
        depth=cfg.depth,
        width=cfg.width,
        patch_size=cfg.patch_size,
        latent_channels=cfg.latent_channels,
        latent_size=cfg.latent_size,
    )


def save_parts(
    parts: Parts, run: Path, step: int, config: RunConfig, world: World, *, state: Mapping[str, object]
) -> None:
    """Writes a checkpoint from the main rank. The files are the same whether the model is sharded or not.

    Every rank must call it: sharded tensors are put together by all.
    """
    files: dict[str, Mapping[str, Tensor]] = {
        "model": model_tensors(parts.model),
        "ema": model_tensors(parts.ema),
        "optimizer": checkpoint.optimizer_tensors(parts.optimizer, parts.names),
    }
    files |= parts.averages.tensors(model_tensors(parts.model))
    if parts.alignment is not None:
        files["alignment"] = parts.alignment.state_dict()
    if parts.adversary_optimizer is not None:
        files["adversary"] = checkpoint.optimizer_tensors(parts.adversary_optimizer, adversary_names(parts))
    whole = {stem: distributed.gather(tensors, keep=world.is_main) for stem, tensors in files.items()}
    if world.is_main:
        described: dict[str, object] = {"model": config.model, "method": config.method, **state}
        if parts.scaler is not None:
            described["scaler"] = parts.scaler.state_dict()
        checkpoint.save_checkpoint(run, step, whole, described, keep=config.keep_checkpoints)
    distributed.barrier()


def save_averages(parts: Parts, run: Path, step: int, config: RunConfig, world: World) -> None:
    """Writes a snapshot from the main rank; every rank must call it, as `save_parts`."""
    averages = {"ema": model_tensors(parts.ema), **parts.averages.tensors(model_tensors(parts.model))}
    whole = {stem: distributed.gather(tensors, keep=world.is_main) for stem, tensors in averages.items()}
    if world.is_main:
        snapshots.save_snapshot(run, step, whole, config, dtype=config.snapshot_dtype)
    distributed.barrier()


def load_parts(parts: Parts, path: Path, state: Mapping[str, Any]) -> None:
    """Puts a checkpoint back, bit by bit.

    Raises:
        UserError: a file is missing, damaged or of another model.
    """
    for model, stem in ((parts.model, "model"), (parts.ema, "ema")):
        load_backbone(model, path, stem)
    parts.averages.load(lambda stem: checkpoint.load_tensors(path, stem), source=path)
    if parts.alignment is not None:
        checkpoint.load_module(parts.alignment, path, "alignment")
    checkpoint.load_optimizer(parts.optimizer, checkpoint.load_tensors(path, "optimizer"), parts.names)
    if parts.adversary_optimizer is not None:
        moments = checkpoint.load_tensors(path, "adversary")
        checkpoint.load_optimizer(parts.adversary_optimizer, moments, adversary_names(parts))
    if parts.scaler is not None:
        load_scaler(parts.scaler, path, state.get("scaler"))


def load_backbone(model: Transformer, path: Path, stem: str) -> None:
    """One file of a checkpoint into a model, whole or sharded.

    Raises:
        UserError: as `load_parts`.
    """
    own = {**model.state_dict(), "pos_embed": model.pos_embed}
    saved = checkpoint.load_tensors(path, stem)
    whole = {k: distributed.like(v, own[k]) if k in own else v for k, v in saved.items()}
    load_weights(model, whole, source=str(path / stem))


def load_scaler(scaler: torch.amp.GradScaler, path: Path, saved: Mapping[str, float] | None) -> None:
    if saved is None or saved.keys() != scaler.state_dict().keys() or not saved["scale"] > 0:
        raise UserError(
            f"{path / 'state.json'} holds no loss scale, which precision fp16 needs",
            remedy="Remove this checkpoint's folder to go on from the one before.",
        )
    scaler.load_state_dict(dict(saved))


def model_tensors(model: Transformer) -> dict[str, Tensor]:
    """State dict, with the position table only where it is not the computed one (imported weights bring their own)."""
    tensors = dict(model.state_dict())
    computed = token_positions(model.cfg).to(model.pos_embed)
    if not torch.equal(model.pos_embed, computed):
        tensors["pos_embed"] = model.pos_embed
    return tensors


def whole_ema(parts: Parts, world: World) -> Transformer | None:
    """The averaged model to sample from, on the main rank (None elsewhere). Every rank must call it."""
    if not parts.sharded:
        return parts.ema if world.is_main else None
    tensors = distributed.gather(model_tensors(parts.ema), keep=world.is_main)
    if not world.is_main:
        return None
    model = build_model(parts.ema.cfg).eval().requires_grad_(False)
    load_weights(model, tensors)
    return model.to(next(parts.objective.buffers()).device)


def adversary_names(parts: Parts) -> dict[Tensor, str]:
    assert parts.adversary is not None
    return {p: n for n, p in parts.adversary.named_parameters()}
