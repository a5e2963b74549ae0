"""The training run: set up, loop, log, save."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from featcache.build import pick_device
from featcache.errors import CacheError, UserError
from trainer import align, checkpoint, distributed, runs
from trainer.align.base import Alignment, BackboneInfo
from trainer.caches import available_features, build_command, find_cache
from trainer.config import RunConfig
from trainer.data import Batches, stream_indices
from trainer.log import RunLog
from trainer.models import ModelConfig, build_model, forward_flops, load_weights, model_config
from trainer.step import CachedFeature, Draws, Objective, draw, ema_decay_at, update_ema

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Watcher(Protocol):
    """Who is told about a run while it goes on."""

    def start(self, *, run: Path, total: int, done: int, note: str) -> None: ...

    def advance(self, step: int, shown: Mapping[str, float]) -> None: ...

    def warn(self, text: str) -> None: ...


class Diverged(UserError):
    """The loss is not finite."""


@dataclass(kw_only=True)
class Parts:
    """Everything that a checkpoint saves and a step changes."""

    model: Any
    ema: nn.Module
    alignment: Alignment | None
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    adversary_optimizer: torch.optim.Optimizer | None
    scaler: torch.amp.GradScaler | None
    names: dict[Tensor, str]


def train(config: RunConfig, *, resume: bool, watcher: Watcher, root: Path = runs.ROOT) -> Path:
    """Runs (or continues) one training run and returns its folder.

    Raises:
        UserError: bad input, a cache that does not fit, or a loss that is not finite (the step and the batch's keys are
            saved in ``diverged.json``).
    """
    device_name = pick_device(config.device)
    world = distributed.join(device_name)
    device = torch.device(device_name, world.local_rank) if device_name == "cuda" else torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if config.batch_size % (world.size * config.accumulate):
        raise UserError(
            f"batch_size {config.batch_size} cannot be shared by {world.size} ranks x {config.accumulate} accumulation steps",
            remedy="Choose a batch size that is a multiple of both together.",
        )

    cache = find_cache(config)
    run = runs.run_dir(config, root)
    config = dataclasses.replace(config, cache=str(cache.path), name=str(run.relative_to(root)))
    warn_random_weights(cache, watcher)
    parts = assemble(config, cache, device, world)
    start = _prepare_run(run, config, cache, parts, resume=resume, world=world)
    if start >= config.steps:
        watcher.warn(f"{run} has {start} steps already; nothing to do (raise --steps to go on)")
        return run

    log = RunLog(run, step=start) if world.is_main else None
    watcher.start(run=run, total=config.steps, done=start, note=f"{config.method} on {config.model}")
    try:
        with _stop_on_signals() as stopped:
            _loop(config, cache, parts, run, log, watcher, world, device, start, stopped)
    finally:
        if log is not None:
            log.close()
        distributed.leave()
    return run


def assemble(config: RunConfig, cache: Any, device: torch.device, world: distributed.World) -> Parts:
    """Builds the model, its average, the alignment, the objective and the optimisers from a configuration and a cache.

    Raises:
        CacheError: the cache lacks a feature that the method needs (the error ends with the command that adds it).
        UserError: model and latents do not fit together.
    """
    dataset = cache.manifest.dataset
    model_cfg = backbone_config(config, cache)
    seed = config.seed * 2
    model = build_model(model_cfg, seed=seed, device=device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    alignment = build_alignment(config, cache, model_cfg, seed=seed + 1)
    if alignment is not None:
        alignment.to(device)
    reads = ("vae/moments", *(alignment.reads if alignment is not None else ()))
    compiled = config.compile if config.compile is not None else device.type == "cuda"
    precision = config.precision if config.precision != "auto" else "bf16" if device.type == "cuda" else "fp32"
    objective: nn.Module = Objective(
        model,
        alignment,
        {name: cached_feature(cache, name) for name in reads},
        scale=dataset.vae["scaling_factor"],
        shift=dataset.vae["shift_factor"],
        path=config.path,
        time_sampling=config.time_sampling,
        label_dropout=config.label_dropout,
        autocast=DTYPES[precision],
        teacher=ema,
    )
    names = {p: f"model.{n}" for n, p in model.named_parameters()}
    adversary_parameters: list[nn.Parameter] = []
    if alignment is not None:
        if alignment.adversary is not None:
            adversary_parameters = list(alignment.adversary.parameters())
            alignment.adversary.requires_grad_(False)  # switched on only while it is trained itself
        theirs = set(adversary_parameters)
        names |= {p: f"alignment.{n}" for n, p in alignment.named_parameters() if p not in theirs}
    if world.size > 1:
        objective = nn.parallel.DistributedDataParallel(
            objective, device_ids=[device.index] if device.type == "cuda" else None, find_unused_parameters=alignment is not None
        )
    if compiled:
        objective = torch.compile(objective)  # type: ignore[assignment]
    adam = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay, "fused": True}
    return Parts(
        model=model,
        ema=ema,
        alignment=alignment,
        objective=objective,
        optimizer=torch.optim.AdamW(list(names), **adam),
        adversary_optimizer=torch.optim.AdamW(adversary_parameters, **adam) if adversary_parameters else None,
        scaler=torch.amp.GradScaler(device.type) if precision == "fp16" else None,
        names=names,
    )


def backbone_config(config: RunConfig, cache: Any) -> ModelConfig:
    """Shape of the backbone for a cache's latents and classes."""
    dataset = cache.manifest.dataset
    if dataset.vae is None or "vae/moments" not in cache.manifest.features:
        raise CacheError(f"{cache.path} holds no VAE moments to train on", remedy=build_command(cache, ("vae/moments",)))
    return model_config(
        config.model,
        latent_channels=dataset.vae["latent_channels"],
        latent_size=dataset.preprocessing["resolution"] // dataset.vae["downsampling"],
        num_classes=len(dataset.class_names),
        qk_norm=config.qk_norm,
        attention=config.attention,
    )


def build_alignment(config: RunConfig, cache: Any, model_cfg: ModelConfig, *, seed: int) -> Alignment | None:
    """The method's module, initialised from its own seed so that the backbone's weights do not depend on it."""
    if not config.methods:
        return None
    info = backbone_info(config.model, model_cfg)
    chosen = [(name, config.method_config(name)) for name in config.methods]
    available = available_features(cache)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            alignment = align.build(chosen, info, available)
    except CacheError as error:
        wanted = [f for name, method in chosen for f in align.required_features(name, method)]
        raise CacheError(f"{cache.path}: {error.what}", remedy=build_command(cache, wanted)) from error
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


def cached_feature(cache: Any, name: str) -> CachedFeature:
    spec = cache.manifest.features[name]
    return CachedFeature(name=name, shape=tuple(spec.shape), codec=spec.codec, dtype=spec.dtype)


def warn_random_weights(cache: Any, watcher: Watcher) -> None:
    random = sorted(n for n, s in cache.manifest.features.items() if s.provenance.get("weights") == "random")
    if random:
        watcher.warn(f"{', '.join(random)} in {cache.path} were made with random encoder weights: good for trying out only")


def _prepare_run(run: Path, config: RunConfig, cache: Any, parts: Parts, *, resume: bool, world: distributed.World) -> int:
    """Creates the run folder, or loads the latest checkpoint; returns the number of steps already done."""
    start = 0
    if (run / "config.yaml").exists():
        if not resume:
            raise UserError(
                f"{run} exists already", remedy=f"Type --resume to continue it, or --name with another name (it is --name {config.name})."
            )
        saved = runs.load_config(run)
        _check_same(saved, config)
        seen = runs.read_json(run / "cache.json", {})
        if seen.get("fingerprint") != cache.fingerprint:
            raise CacheError(
                f"{run} was trained on a cache with fingerprint {seen.get('fingerprint', '?')[:12]}, "
                f"but {cache.path} has {cache.fingerprint[:12]}",
                remedy=f"Pass the cache it was started with: --cache {seen.get('path')}",
            )
        if checkpoint.list_checkpoints(run):
            start = load_parts(parts, run)
        if world.is_main:
            runs.truncate_log(run, start)
            runs.save_config(run, config)
    elif world.is_main:
        run.mkdir(parents=True, exist_ok=True)
        dataset = cache.manifest.dataset
        summary = {
            "path": str(cache.path),
            "fingerprint": cache.fingerprint,
            "dataset": dataclasses.asdict(dataset),
            "features": {
                name: {"shape": list(spec.shape), "codec": spec.codec, **spec.provenance}
                for name, spec in cache.manifest.features.items()
                if len(spec.shape) >= 2
            },
        }
        runs.write_text(run / "cache.json", json.dumps(summary, indent=1, default=dict))
        runs.save_config(run, config)
    distributed.barrier()
    return start


# What may differ between the two halves of a resumed run.
_FREE_KEYS = frozenset(
    "steps cache name device compile log_every sample_every checkpoint_every keep_checkpoints weights_dir published".split()
)


def _check_same(saved: RunConfig, config: RunConfig) -> None:
    for field in dataclasses.fields(RunConfig):
        if field.name not in _FREE_KEYS and getattr(saved, field.name) != getattr(config, field.name):
            raise UserError(
                f"the run was started with {field.name} = {getattr(saved, field.name)!r}, not {getattr(config, field.name)!r}",
                remedy="Resume with the same settings, or start another run with --name.",
            )


def save_parts(parts: Parts, run: Path, step: int, config: RunConfig) -> None:
    tensors: dict[str, Mapping[str, Tensor]] = {
        "model": parts.model.state_dict(),
        "ema": parts.ema.state_dict(),
        "optimizer": checkpoint.optimizer_tensors(parts.optimizer, parts.names),
    }
    if parts.alignment is not None:
        tensors["alignment"] = parts.alignment.state_dict()
    if parts.adversary_optimizer is not None:
        tensors["adversary"] = checkpoint.optimizer_tensors(parts.adversary_optimizer, _adversary_names(parts))
    state: dict[str, Any] = {"model": config.model, "method": config.method}
    if parts.scaler is not None:
        state["scaler"] = parts.scaler.state_dict()
    checkpoint.save_checkpoint(run, step, tensors, state, keep=config.keep_checkpoints)


def load_parts(parts: Parts, run: Path) -> int:
    """Puts the latest checkpoint back; returns its step."""
    step, path = checkpoint.find_checkpoint(run)
    load_weights(parts.model, checkpoint.load_tensors(path, "model"), source=str(path))
    load_weights(parts.ema, checkpoint.load_tensors(path, "ema"), source=str(path))  # type: ignore[arg-type]
    if parts.alignment is not None:
        parts.alignment.load_state_dict(checkpoint.load_tensors(path, "alignment"))
    checkpoint.load_optimizer(parts.optimizer, checkpoint.load_tensors(path, "optimizer"), parts.names)
    if parts.adversary_optimizer is not None:
        saved = checkpoint.load_tensors(path, "adversary")
        checkpoint.load_optimizer(parts.adversary_optimizer, saved, _adversary_names(parts))
    if parts.scaler is not None:
        parts.scaler.load_state_dict(runs.read_json(path / "state.json", {})["scaler"])
    return step


def _adversary_names(parts: Parts) -> dict[Tensor, str]:
    assert parts.alignment is not None and parts.alignment.adversary is not None
    return {p: n for n, p in parts.alignment.adversary.named_parameters()}


@contextmanager
def _stop_on_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT (once) instead of dying, so that the loop can save and leave."""
    caught: list[int] = []

    def catch(number: int, _frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt  # the second time: at once
        caught.append(number)

    try:
        former = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: signals go elsewhere
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _loop(
    config: RunConfig,
    cache: Any,
    parts: Parts,
    run: Path,
    log: RunLog | None,
    watcher: Watcher,
    world: distributed.World,
    device: torch.device,
    start: int,
    stopped: list[int],
) -> None:
    alignment = parts.alignment
    model_cfg: ModelConfig = parts.model.cfg
    latent_shape = (model_cfg.latent_channels, model_cfg.latent_size, model_cfg.latent_size)
    features = ["vae/moments", "label", *(alignment.reads if alignment is not None else ())]
    batches = Batches(
        cache,
        list(dict.fromkeys(features)),
        global_batch=config.batch_size,
        seed=config.seed,
        device=device,
        start_step=start,
        stop_step=config.steps,
        rank=world.rank,
        world_size=world.size,
        micro_batches=config.accumulate,
    )
    clip = config.clip if config.clip is not None else 2.0 if "ahpa" in config.methods else 1.0
    part = config.batch_size // world.size // config.accumulate
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    first_bad = torch.full((), -1, dtype=torch.long, device=device)
    logged_at, logged_time = start, time.perf_counter()
    trained_s = _trained_seconds(run, start)
    grid = _GridMaker(config, cache, watcher) if world.is_main else None

    stream = iter(batches)
    try:
        for step in range(start, config.steps):
            logs_now = (step + 1) % config.log_every == 0 or step + 1 == config.steps or step == start
            aligned = (
                alignment is not None
                and (config.align_until is None or step < config.align_until)
                and alignment.active(step=step, seed=config.seed)
            )
            feeds_adversary = aligned and alignment is not None and alignment.adversary is not None
            feeds_adversary = feeds_adversary and step % alignment.adversary_every == 0  # type: ignore[union-attr]
            if config.warmup_steps:
                for group in parts.optimizer.param_groups:
                    group["lr"] = config.lr * min(1.0, (step + 1) / config.warmup_steps)
            draws = draw(
                seed=config.seed,
                step=step,
                batch=config.batch_size,
                latent_shape=latent_shape,
                time_sampling=config.time_sampling,
                device=device,
            )
            kept = []
            for micro in range(config.accumulate):
                batch, _ = next(stream)
                rows = (micro * world.size + world.rank) * part
                last = micro == config.accumulate - 1
                terms, metrics, inputs = _forward_backward(
                    parts,
                    batch,
                    draws.rows(rows, rows + part),
                    aligned=aligned,
                    metrics=logs_now,
                    keep=feeds_adversary,
                    share=1.0 / config.accumulate,
                    synchronise=last,
                )
                kept += [inputs] if inputs is not None else []
                total = torch.stack(list(terms.values())).sum()
                first_bad = torch.where((first_bad < 0) & ~torch.isfinite(total), step, first_bad)
                for name, value in {"loss": total, **terms, **metrics}.items():
                    sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach().float()
                    counts[name] = counts.get(name, 0) + 1
            if parts.scaler is not None:
                parts.scaler.unscale_(parts.optimizer)
            grad_norm = nn.utils.clip_grad_norm_(list(parts.names), clip, foreach=True)
            if parts.scaler is not None:
                parts.scaler.step(parts.optimizer)
                parts.scaler.update()
            else:
                parts.optimizer.step()
            parts.optimizer.zero_grad(set_to_none=True)
            update_ema(parts.ema, parts.model, ema_decay_at(step, config.ema_decay, warmup=config.ema_warmup))
            if kept:
                _adversary_step(parts, kept, sums, counts)

            done = step + 1
            saves_now = done % config.checkpoint_every == 0 or done == config.steps or bool(stopped)
            if logs_now or saves_now:
                # The only places where the host waits for the device.
                _check_finite(first_bad, run, cache, config)
            if logs_now:
                now = time.perf_counter()
                rate = (done - logged_at) * config.batch_size / max(now - logged_time, 1e-9)
                trained_s += now - logged_time
                values = distributed.mean_over_ranks(torch.stack([sums[n] / counts[n] for n in sums])).tolist()
                shown = dict(zip(sums, values))
                record = {
                    "step": done,
                    "time_s": round(trained_s, 3),
                    "images_per_s": rate,
                    "lr": parts.optimizer.param_groups[0]["lr"],
                    "grad_norm": float(grad_norm),
                    **shown,
                }
                if log is not None:
                    log.record(record)
                watcher.advance(done, shown | {"images/s": rate})
                sums.clear()
                counts.clear()
                logged_at, logged_time = done, time.perf_counter()
            else:
                watcher.advance(done, {})
            pause = time.perf_counter()
            if saves_now:
                if world.is_main:
                    save_parts(parts, run, done, config)
                distributed.barrier()
            if grid is not None and log is not None and config.sample_every and (
                done % config.sample_every == 0 or done == config.steps
            ):
                grid.draw(parts.ema, run, done, log)
            logged_time += time.perf_counter() - pause  # saving and drawing do not count as training
            if stopped and done < config.steps:
                watcher.warn(f"stopped at step {done}, saved; continue with the same command and --resume")
                raise SystemExit(128 + stopped[0])
    finally:
        batches.close()


def _forward_backward(
    parts: Parts,
    batch: Mapping[str, Tensor],
    draws: Draws,
    *,
    aligned: bool,
    metrics: bool,
    keep: bool,
    share: float,
    synchronise: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    objective: Any = parts.objective
    quiet = nullcontext() if synchronise or not hasattr(objective, "no_sync") else objective.no_sync()
    with quiet:
        terms, measured, inputs = objective(batch, draws, aligned=aligned, metrics=metrics, keep=keep)
        loss = torch.stack(list(terms.values())).sum() * share
        (parts.scaler.scale(loss) if parts.scaler is not None else loss).backward()
    return terms, measured, inputs


def _adversary_step(parts: Parts, kept: list[Any], sums: dict[str, Tensor], counts: dict[str, int]) -> None:
    """One step of the discriminator on this step's real and (detached) fake tokens."""
    alignment, optimizer = parts.alignment, parts.adversary_optimizer
    assert alignment is not None and alignment.adversary is not None and optimizer is not None
    parameters = list(alignment.adversary.parameters())
    alignment.adversary.requires_grad_(True)
    for inputs in kept:
        loss = alignment.adversary_loss(inputs) / len(kept)
        loss.backward()
        sums["align/adversary"] = sums.get("align/adversary", torch.zeros_like(loss)) + loss.detach().float()
    counts["align/adversary"] = counts.get("align/adversary", 0) + 1
    distributed.average_gradients(parameters)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    alignment.adversary.requires_grad_(False)


def _check_finite(first_bad: Tensor, run: Path, cache: Any, config: RunConfig) -> None:
    step = int(first_bad)
    if step < 0:
        return
    indices = stream_indices(
        step * config.batch_size, (step + 1) * config.batch_size, count=len(cache), seed=config.seed
    )
    keys = [key for i in indices for key in cache.keys(int(i), int(i) + 1)]
    report = {"step": step, "seed": config.seed, "indices": indices.tolist(), "keys": keys}
    runs.write_text(run / "diverged.json", json.dumps(report, indent=1))
    raise Diverged(
        f"the loss was not finite in step {step}; the step and its batch's keys are in {run / 'diverged.json'}",
        remedy="Lower --lr, clip harder (--set clip=0.5) or use --precision bf16, then --resume from the last checkpoint.",
    )


def _trained_seconds(run: Path, start: int) -> float:
    """Training time already logged, so that curves over time go on where they stopped."""
    return max((r.get("time_s", 0.0) for r in runs.read_log(run) if r.get("step", math.inf) <= start), default=0.0)


class _GridMaker:
    """Periodic sample grids from the averaged weights; gives up, once and aloud, where the VAE is not to be had."""

    def __init__(self, config: RunConfig, cache: Any, watcher: Watcher) -> None:
        self._config, self._cache, self._watcher = config, cache, watcher
        self._broken = False
        self._vae: Any = None

    def draw(self, ema: Any, run: Path, step: int, log: RunLog) -> None:
        from featcache.errors import WeightsUnavailable
        from trainer.sample import class_grid, load_decoder

        if self._broken:
            return
        try:
            device = next(ema.parameters()).device
            if self._vae is None:
                moments = self._cache.manifest.features["vae/moments"].provenance
                self._vae = load_decoder(self._cache.manifest.dataset.vae, moments, self._config.weights_dir)
            self._vae.to(device)
            pixels = class_grid(ema, self._vae, path=self._config.path, seed=self._config.seed)
            self._vae.to("cpu")
        except WeightsUnavailable as error:
            self._broken = True
            self._watcher.warn(f"no sample grids: {error.what}")
            return
        from trainer.sample import save_png

        save_png(pixels, run / "samples" / f"step_{step:07d}.png")
        log.image("samples", pixels, step)


def flops_per_image(cfg: ModelConfig) -> int:
    """Training FLOPs of one image: three times the forward pass."""
    return 3 * forward_flops(cfg)
