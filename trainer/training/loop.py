"""The training run: set up, loop, log, save."""

from __future__ import annotations

import dataclasses
import json
import shlex
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from featcache.errors import AGAIN, CacheError, UserError, os_error
from featcache.machine import pick_device
from featcache.progress import QUIET, RecordingProgress
from featcache.read.order import stream_indices
from featcache.redact import is_redacted, redact
from featcache.store.remote import is_remote
from featcache.store.signing import require_digest
from featcache.torch.feed import Share
from featcache.torch.loader import Loader
from trainer import align, distributed
from trainer.align.base import Alignment
from trainer.diffusion.streams import Layout
from trainer.distributed import World
from trainer.runs import checkpoint
from trainer.runs import folder as runs
from trainer.runs.cache import available_features, find_cache, random_features, sample_keys, with_streams
from trainer.runs.config import RunConfig
from trainer.runs.log import RunLog
from trainer.runs.normalization import keep, resolve, settle, settle_streams
from trainer.runs.streams import StreamConfig, never_learned, stream_config
from trainer.training.grids import GridMaker
from trainer.training.meters import FirstBadStep, RunningMeans, TrainingClock
from trainer.training.objective import Draws, clip_gradients, draw, ema_decay_at, update_ema
from trainer.training.outlook import Outlook
from trainer.training.state import (
    RATE_FACTOR,
    Parts,
    assemble,
    backbone_config,
    load_parts,
    precision_of,
    save_parts,
    whole_ema,
)
from trainer.training.usage import Usage, in_words

if TYPE_CHECKING:
    from featcache import Cache


class Diverged(UserError):
    """The loss, or its gradient, is not finite."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run that is set up: everything the loop works with."""

    config: RunConfig
    cache: Cache
    run: Path
    parts: Parts
    world: World
    device: torch.device
    share: Share
    watcher: RecordingProgress


def train(
    config: RunConfig, *, resume: bool, watcher: RecordingProgress, root: Path = runs.ROOT, expect: str | None = None
) -> Path:
    """Runs (or continues) one training run and returns its folder, which is held against other processes meanwhile.

    Args:
        expect: digest that the cache must have; None takes any.

    Raises:
        UserError: bad input, a cache that does not fit, a folder in use, or a disk that refuses.
        Diverged: a loss or gradient that is not finite (the step and the batch's keys are saved in `diverged.json`).
        SystemExit: SIGTERM or Ctrl-C, after saving; 128 + the signal's number.
    """
    device_name = pick_device(config.device)
    with distributed.joined(device_name) as world:
        return _train(
            config, resume, watcher if world.is_main else QUIET, root, world, world.device(device_name), expect
        )


def _train(
    config: RunConfig,
    resume: bool,
    watcher: RecordingProgress,
    root: Path,
    world: World,
    device: torch.device,
    expect: str | None,
) -> Path:
    _prepare_device(device)
    share = Share(
        global_batch=config.batch_size, rank=world.rank, world_size=world.size, micro_batches=config.accumulate
    )
    cache = find_cache(config)
    if config.cache is None and world.is_main:
        watcher.note(f"the cache is {cache.path}, the newest that fits (--cache names another)")
    if expect is not None:
        require_digest(cache.manifest, expect, str(cache.path))
    with runs.claim(config, root) if world.is_main else nullcontext() as claimed:
        run, config = _resolve(config, cache, device, root, claimed)
        runs.check_resumable(run, config, cache, resume=resume)
        remark = runs.check_same_bytes(run, cache)
        backbone_config(config, cache)  # what does not fit is said before statistics take a pass over the cache
        statistics = settle(config, cache, run, main=world.is_main, watcher=watcher)
        of_streams = settle_streams(config, cache, run, main=world.is_main, watcher=watcher)
        saved = checkpoint.list_checkpoints(run)
        outlook = Outlook(
            config, cache, run, world=world, device=device, start=saved[-1][0] if saved else 0, note=watcher.note
        )
        parts = assemble(
            config,
            cache,
            device,
            world,
            statistics=statistics,
            stream_statistics=of_streams,
            begun=bool(saved),
            planned=outlook.before,
        )
        start, trained_s = _restore(parts, run, config)
        if world.is_main:
            runs.clear_leftovers(run, config.streams)
            checkpoint.tidy(run, keep=config.keep_checkpoints)
        job = Job(
            config=config, cache=cache, run=run, parts=parts, world=world, device=device, share=share, watcher=watcher
        )
        _announce(job, start, remark)
        if start < config.steps:
            with _told_how_to_go_on(job):
                if world.is_main:
                    keep(statistics, run, of_streams)  # before config.yaml makes it a run
                lost = runs.open_folder(run, config, cache, parts.reads, start, main=world.is_main)
                if lost:
                    watcher.note(f"{lost} damaged lines of {run / 'log.jsonl'} were left out")
                with _stop_on_signals() as caught, _logging(job, start) as log:
                    _loop(job, log, caught, outlook, start=start, trained_s=trained_s)
        return run


def _loop(job: Job, log: RunLog | None, caught: list[int], outlook: Outlook, *, start: int, trained_s: float) -> None:
    """Steps `start` to the end. The host waits for the device where it logs or saves, and nowhere else."""
    config = job.config
    assert config.log_every is not None and config.sample_every is not None and config.checkpoint_every is not None
    means, bad, clock = RunningMeans(), FirstBadStep(job.device), TrainingClock(trained_s)
    grids = GridMaker(config, job.cache, job.run, job.watcher.note)
    signals = distributed.StopSignal()
    batches = loader(job, start)
    stream = iter(batches)
    usage = Usage(
        job.parts,
        job.cache,
        config,
        job.world,
        job.device,
        aligned=lambda step: is_aligned(config, job.parts.alignment, step),
        start=start,
        warn=job.watcher.note,
    )
    try:
        for step in range(start, config.steps):
            done = step + 1
            logs = step == 0 or done % config.log_every == 0 or done == config.steps
            set_learning_rate(job.parts, config, step)
            norm = train_step(job, stream, step, means, bad, measures=logs)

            stop = signals.agree(caught[0] if caught else 0)
            saves = done % config.checkpoint_every == 0 or done == config.steps or stop != 0
            # A trial shorter than the interval draws no closing grid: with a large model on a CPU it takes many minutes.
            final = done == config.steps and config.steps >= config.sample_every
            draws = config.sample_every > 0 and (done % config.sample_every == 0 or final)
            if logs or saves:
                _check_finite(job, bad.read())
            if logs:
                _record(job, log, clock, means, usage, done, norm, waited_s=batches.waited_s)
            else:
                job.watcher.update(1)
            outlook.after(done, clock.trained_s, waited=logs)
            with clock.paused() if saves or draws else nullcontext():
                if saves:
                    if log is not None:
                        log.sync()
                    state = {"time_s": clock.trained_s}
                    save_parts(job.parts, job.run, done, config, job.world, state=state)
                if draws and (ema := whole_ema(job.parts, job.world)) is not None and log is not None:
                    grids.draw(ema, done, log)
            if stop and done < config.steps:
                job.watcher.note(f"stopped at step {done}, saved; continue with the same command and --resume")
                raise SystemExit(128 + stop)
    finally:
        batches.close()
        signals.wait()


def loader(job: Job, start: int, *, everything: bool = False) -> Loader:
    """Batches as they are stored, of what each of the run's steps from `start` on reads, or of all that any reads."""
    config, alignment = job.config, job.parts.alignment
    return Loader(
        job.cache,
        [*job.parts.data, "label"],
        extra=[name for name in alignment.reads if name not in job.parts.data] if alignment is not None else [],
        wanted=lambda step: everything or is_aligned(config, alignment, step),
        batch_size=config.batch_size,
        rank=job.share.rank,
        world_size=job.share.world_size,
        micro_batches=job.share.micro_batches,
        seed=config.seed,
        device=job.device,
        dtype=None,
        start=start,
        stop=config.steps,
    )


def train_step(
    job: Job,
    stream: Iterator[Mapping[str, Tensor]],
    step: int,
    means: RunningMeans,
    bad: FirstBadStep,
    *,
    measures: bool,
) -> Tensor:
    """One step of the optimiser over all micro-batches, and of the discriminator where it is its turn.

    Returns the gradient's norm before clipping. Nothing here waits for the device.
    """
    config, parts = job.config, job.parts
    aligned = is_aligned(config, parts.alignment, step)
    adversarial = aligned and parts.adversary_steps(step)
    draws = draw(
        seed=config.seed,
        step=step,
        batch=config.batch_size,
        latent_shape=parts.model.cfg.latent_shape,
        time_sampling=config.time_sampling,
        device=job.device,
        streams=dict(zip(parts.data[1:], Layout(cfg=parts.model.cfg).shapes[1:])),
    )
    for micro in range(config.accumulate):
        terms, measured = forward_backward(
            parts,
            next(stream),
            draws.rows(job.share.slice(micro)),
            aligned=aligned,
            adversarial=adversarial,
            measures=measures and aligned,
            share=1 / config.accumulate,
            last=micro == config.accumulate - 1,
        )
        bad.watch(terms["loss"], step)
        means.add(terms | measured)
    norm = optimizer_step(parts, config)
    if parts.scaler is None:  # with loss scaling an overflow is expected now and then, and that step is left out
        bad.watch(norm, step)
    update_ema(parts.ema, parts.model, ema_decay_at(step, config.ema_decay, warmup=config.ema_warmup))
    if adversarial:
        adversary_step(parts)
    return norm


def is_aligned(config: RunConfig, alignment: Alignment | None, step: int) -> bool:
    """Whether alignment is computed, and its targets read, in this step: a function of the step, alike on all ranks."""
    if alignment is None or (config.align_until is not None and step >= config.align_until):
        return False
    return alignment.active(step=step, seed=config.seed)


def forward_backward(
    parts: Parts,
    batch: Mapping[str, Tensor],
    draws: Draws,
    *,
    aligned: bool,
    adversarial: bool,
    measures: bool,
    share: float,
    last: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of one micro-batch, added up; its loss terms with their sum `loss`, and what was measured.

    Args:
        share: weight of this micro-batch in the step. last: ranks exchange gradients only after the last one.
    """
    quiet = nullcontext() if last or not hasattr(parts.forward, "no_sync") else parts.forward.no_sync()
    with quiet:
        terms, kept = parts.forward(batch, draws, aligned=aligned)
        loss = torch.stack(list(terms.values())).sum()
        scaled = loss * share
        (scaled if parts.scaler is None else parts.scaler.scale(scaled)).backward()
    measured: dict[str, Tensor] = {}
    if measures:
        assert kept is not None, "only a method measures"
        measured |= parts.objective.measure(kept, batch, draws)
    if adversarial:
        assert kept is not None, "only a method has an adversary"
        adversary_loss = parts.objective.adversary_loss(kept, batch)
        (adversary_loss * share).backward()
        measured["align/adversary"] = adversary_loss
    return {"loss": loss, **terms}, measured


def optimizer_step(parts: Parts, config: RunConfig) -> Tensor:
    """Clips, steps, clears; returns the gradient's norm before clipping."""
    # The backbone averages its gradients itself, replicated or sharded; the heads beside it do not.
    distributed.average_gradients(p for group in parts.groups[1:] for p in group)
    if parts.scaler is not None:
        parts.scaler.unscale_(parts.optimizer)
    assert config.clip is not None
    norm = clip_gradients(parts.groups, config.clip)
    if parts.scaler is not None:
        parts.scaler.step(parts.optimizer)  # the fused optimiser decides on the device whether to skip
        parts.scaler.update()
    else:
        parts.optimizer.step()
    parts.optimizer.zero_grad(set_to_none=True)
    return norm


def adversary_step(parts: Parts) -> None:
    """One step of the discriminator on the gradients gathered in this step's micro-batches."""
    assert parts.adversary is not None and parts.adversary_optimizer is not None
    distributed.average_gradients(parts.adversary.parameters())
    parts.adversary_optimizer.step()
    parts.adversary_optimizer.zero_grad(set_to_none=True)


def set_learning_rate(parts: Parts, config: RunConfig, step: int) -> None:
    """The schedule's rate times a group's own factor."""
    lr = learning_rate(config, step)
    for optimizer in (parts.optimizer, parts.adversary_optimizer):
        for group in optimizer.param_groups if optimizer is not None else ():
            group["lr"] = lr * group.get(RATE_FACTOR, 1.0)


def learning_rate(config: RunConfig, step: int) -> float:
    """Of step 0, 1, ...: linear warm-up over `warmup_steps`, then as `config.lr_schedule` says."""
    assert config.lr is not None
    lr = config.lr * min(1.0, (step + 1) / max(config.warmup_steps, 1))
    if config.lr_schedule == "constant":
        return lr
    held, end = config.warmup_steps + config.hold_steps, config.decay_until or config.steps
    fallen = min(max((step + 1 - held) / (end - held), 0.0), 1.0)
    return lr + fallen * (config.lr_end - lr)


def _record(
    job: Job,
    log: RunLog | None,
    clock: TrainingClock,
    means: RunningMeans,
    usage: Usage,
    done: int,
    norm: Tensor,
    *,
    waited_s: float,
) -> None:
    """One line of the log: averages since the last line, on every rank alike."""
    shown = means.take()
    rate, trained_s = clock.steps_per_s(done), clock.trained_s
    speed = {} if rate is None else {"images_per_s": rate * job.config.batch_size}
    with clock.paused():  # counting operations is no training
        used = usage.read(done, rate=rate, trained_s=trained_s, waited_s=waited_s)
    lr = job.parts.optimizer.param_groups[0]["lr"]
    record = {"step": done, "time_s": round(trained_s, 3), **speed, **used, "lr": lr, "grad_norm": float(norm), **shown}
    if log is not None:
        log.record(record)
    job.watcher.record(1, *in_words(record, shown))


def _check_finite(job: Job, step: int | None) -> None:
    """Ends the run after a bad step and says on which images it happened."""
    if step is None:
        return
    config, path = job.config, job.run / "diverged.json"
    first = step * config.batch_size
    indices = stream_indices(first, first + config.batch_size, count=len(job.cache), seed=config.seed)
    if job.world.is_main:
        report = {
            "step": step,
            "seed": config.seed,
            "indices": indices.tolist(),
            "keys": sample_keys(job.cache, indices),
        }
        runs.write_text(path, json.dumps(report, indent=1))
    distributed.barrier()
    raise Diverged(
        f"the loss or its gradient was not finite in step {step}; the step and its batch's keys are in {path}",
        remedy="Lower --lr, clip harder (--set clip=0.5) or use --precision bf16, in another run (--name); "
        "checkpoints from before that step are intact.",
    )


def _prepare_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
        # Heads and discriminator convolve at one shape all run long, so trying out cuDNN's algorithms pays once for all.
        # The choice is by timing, so it may differ from start to start: the price is bit-exact resuming on a GPU.
        torch.backends.cudnn.benchmark = True


def _resolve(
    config: RunConfig, cache: Cache, device: torch.device, root: Path, claimed: Path | None
) -> tuple[Path, RunConfig]:
    """The run's folder (the main rank's) and its settings with nothing left open, as `config.yaml` has them."""
    run = distributed.from_main(claimed)
    assert run is not None
    return run, dataclasses.replace(
        with_streams(config.settled(), cache),
        cache=redact(str(cache.path)),
        name=str(run.relative_to(root)),
        precision=precision_of(config, device),  # type: ignore[arg-type]
        normalization=resolve(config, cache),  # type: ignore[arg-type]
    )


def _restore(parts: Parts, run: Path, config: RunConfig) -> tuple[int, float]:
    """Loads the latest checkpoint if there is one: steps done and seconds trained."""
    if not checkpoint.list_checkpoints(run):
        return 0, 0.0
    step, path = checkpoint.find_checkpoint(run)
    state = checkpoint.require_own(path, method=config.method, model=config.model)
    load_parts(parts, path, state)
    return step, float(state.get("time_s", 0.0))


@contextmanager
def _told_how_to_go_on(job: Job) -> Iterator[None]:
    """Whatever ends the training of a sound run early, a full disk first of all, says what is kept and how to go on."""
    try:
        yield
    except Diverged:
        raise
    except (OSError, UserError) as error:
        known = os_error(error) if isinstance(error, OSError) else error
        try:
            saved = checkpoint.list_checkpoints(job.run)
        except (OSError, UserError):
            saved = []
        kept = f"step {saved[-1][0]} is saved" if saved else "nothing is saved yet"
        words = ["trainer run --resume", f"--name {shlex.quote(str(job.config.name))}"]
        if is_redacted(str(job.config.cache)):
            words.append("--cache URL")
        go_on = f"Training goes on with: {' '.join(words)}"
        if not saved and not runs.is_run(job.run):  # so early that there is nothing to resume
            go_on = "Then type the same command again."
        # The same command would find the run there and refuse.
        remedy = (known.remedy or "").removesuffix(f", {AGAIN}").strip().rstrip(".")
        remedy = f"{remedy}. {go_on}" if remedy else go_on
        kind = CacheError if isinstance(known, CacheError) else UserError
        raise kind(f"training stopped ({kept}): {known.what}", remedy=remedy) from error


def _announce(job: Job, start: int, remark: str | None) -> None:
    config = job.config
    if remark is not None:
        job.watcher.note(remark)
    random = [n for n in random_features(job.cache) if n in job.parts.reads]
    if random:
        job.watcher.note(
            f"{', '.join(random)} in {job.cache.path} were made with random encoder weights: good for trying out only"
        )
    if config.streams:
        beside = (f"{name} ({_as_diffused(stream_config(name, given))})" for name, given in config.streams.items())
        job.watcher.note(f"diffused beside the latents: {', '.join(beside)}")
        for name, given in config.streams.items():
            if (useless := never_learned(name, stream_config(name, given))) is not None:
                job.watcher.note(useless)
    for method in config.methods:
        asked = align.data_streams(method, config.method_config(method), available_features(job.cache))
        for name, options in asked.items():
            for key, value in options.items():
                if (chosen := (config.streams[name] or {})[key]) != value:
                    job.watcher.note(f"streams.{name}.{key} = {chosen} goes before {method}'s {value}")
    unused = [name for name in ("stream_dir", "stream_gib") if getattr(config, name) is not None]
    if unused and not is_remote(job.cache.path):
        job.watcher.note(
            f"{' and '.join(unused)} {'has' if len(unused) == 1 else 'have'} no effect: {job.cache.path} is on this machine, so nothing streams"
        )
    if start >= config.steps:
        job.watcher.note(f"{job.run} has {start} steps already; nothing to do (raise --steps to go on)")
    else:
        name = f"training {config.method} on {config.model}"
        job.watcher.begin(name, config.steps, done=start, unit="steps")
        job.watcher.note(f"the run's folder is {job.run}")


def _as_diffused(stream: StreamConfig) -> str:
    place = "tokens of its own" if stream.embed == "own" else "merged into their channels"
    return f"{place}, weight {stream.weight:g}, normalization {stream.normalization}"


@contextmanager
def _logging(job: Job, start: int) -> Iterator[RunLog | None]:
    """The run's log on the main rank, None elsewhere."""
    if not job.world.is_main:
        yield None
        return
    log = RunLog(job.run, step=start, warn=job.watcher.note, config=job.config)
    try:
        yield log
    finally:
        log.close()


@contextmanager
def _stop_on_signals() -> Iterator[list[int]]:
    """Collects SIGTERM, SIGINT and SIGHUP (the terminal is gone) instead of dying, so that the loop can save and leave.
    What is ignored already (`nohup`) stays so.

    They often come twice (a scheduler signals every process, and torchrun passes its own on), so only a second Ctrl-C
    that a person must have typed, a second or more after the first, ends the process at once.
    """
    caught: list[int] = []
    first_s = 0.0

    def catch(number: int, _frame: FrameType | None) -> None:
        nonlocal first_s
        if not caught:
            first_s = time.monotonic()
            caught.append(number)
        elif number == signal.SIGINT and time.monotonic() - first_s > 1:
            raise KeyboardInterrupt

    try:
        wanted = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        former = {number: signal.signal(number, catch) for number in wanted}
    except ValueError:  # not the main thread: signals go elsewhere
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
