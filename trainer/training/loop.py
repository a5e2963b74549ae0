"""The training run: set up, loop, log, save."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from featcache.errors import AGAIN, CacheError, UserError, os_error
from featcache.machine import pick_device
from featcache.paths import typed
from featcache.progress import QUIET, RecordingProgress
from featcache.read.order import stream_indices
from featcache.redact import is_redacted, redact
from featcache.store.remote import is_remote
from featcache.store.signing import require_digest
from featcache.torch.feed import Share
from featcache.torch.loader import Loader
from trainer import align, distributed, stopping
from trainer.align.base import Alignment
from trainer.diffusion.streams import Layout
from trainer.distributed import World
from trainer.runs import branch, checkpoint, snapshots
from trainer.runs import folder as runs
from trainer.runs.branch import Origin
from trainer.runs.budget import require_room
from trainer.runs.cache import available_features, find_cache, fitted, random_features, sample_keys
from trainer.runs.config import RunConfig
from trainer.runs.log import RunLog
from trainer.runs.normalization import keep, resolve, settle, settle_streams
from trainer.runs.streams import StreamConfig, never_learned, stream_config
from trainer.training.branching import take_over
from trainer.training.conditions import keep_empty_text, settle_empty_text
from trainer.training.grids import GridMaker
from trainer.training.judging import MakeJudge, SmallEvaluations, is_owed
from trainer.training.meters import FirstBadStep, Pace, RunningMeans, TrainingClock
from trainer.training.objective import Draws, clip_gradients, draw, ema_decay_at, update_ema
from trainer.training.outlook import Outlook
from trainer.training.schedule import learning_rate
from trainer.training.skipping import SkippedSteps, spoil_gradient, step_unless
from trainer.training.spikes import COLUMN, Spikes
from trainer.training.state import (
    RATE_FACTOR,
    Parts,
    assemble,
    backbone_config,
    load_parts,
    precision_of,
    save_averages,
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
    make_judge: MakeJudge | None = None


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """As of `train`."""

    config: RunConfig
    resume: bool
    watcher: RecordingProgress
    root: Path
    expect: str | None
    origin: Origin | None
    make_judge: MakeJudge | None


def train(
    config: RunConfig,
    *,
    resume: bool,
    watcher: RecordingProgress,
    root: Path = runs.ROOT,
    expect: str | None = None,
    origin: Origin | None = None,
    make_judge: MakeJudge | None = None,
) -> Path:
    """Runs (or continues) one training run and returns its folder, which is held against other processes meanwhile.

    Args:
        expect: digest that the cache must have; None takes any. origin: where a new run begins instead of at step 0.
        make_judge: of samples during training (`eval_every`), see `trainer.evaluate.during`.

    Raises:
        UserError: bad input, an origin or a cache that does not fit, a folder in use, or a disk that refuses.
        Diverged: a loss or gradient that is not finite (the step and the batch's keys are saved in `diverged.json`).
        SystemExit: SIGTERM or Ctrl-C, after saving; 128 + the signal's number.
    """
    device_name = pick_device(config.device)
    with distributed.joined(device_name) as world:
        asked = _Asked(
            config=config,
            resume=resume,
            watcher=watcher if world.is_main else QUIET,
            root=root,
            expect=expect,
            origin=origin,
            make_judge=make_judge,
        )
        return _train(asked, world, world.device(device_name))


def _train(asked: _Asked, world: World, device: torch.device) -> Path:
    config, resume, watcher, root, origin = asked.config, asked.resume, asked.watcher, asked.root, asked.origin
    prepare_device(device)
    if origin is not None:
        branch.check(origin, config, root)
    share = Share(
        global_batch=config.batch_size, rank=world.rank, world_size=world.size, micro_batches=config.accumulate
    )
    cache = find_cache(config)
    if config.cache is None and world.is_main:
        watcher.note(f"the cache is {cache.path}, the newest that fits (--cache names another)")
    if asked.expect is not None:
        require_digest(cache.manifest, asked.expect, str(cache.path))
    with runs.claim(config, root) if world.is_main else nullcontext() as claimed:
        if origin is not None:
            config = branch.with_statistics(config, origin, cache)
        run, config = _resolve(config, cache, device, root, claimed)
        runs.check_resumable(run, config, cache, resume=resume)
        remark = runs.check_same_bytes(run, cache)
        model = backbone_config(config, cache)  # what does not fit is said before statistics take a pass over the cache
        if origin is not None:
            remark = branch.check_fits(origin, config, cache, model) or remark
        statistics = settle(config, cache, run, main=world.is_main, watcher=watcher)
        of_streams = settle_streams(config, cache, run, main=world.is_main, watcher=watcher)
        saved = checkpoint.list_checkpoints(run)
        if resume and not saved and runs.is_run(run):
            origin = branch.recorded_origin(run)
        begins = saved[-1][0] if saved else origin.step if origin is not None else 0
        outlook = Outlook(config, cache, run, world=world, device=device, start=begins, note=watcher.note)
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
        settle_empty_text(parts.objective.condition, model, run)
        if origin is None:
            start, state = _restore(parts, run, config)
        else:
            start, state = take_over(parts, origin, config, watcher.note)
        if world.is_main:
            runs.clear_leftovers(run, config.streams)
            checkpoint.tidy(run, keep=config.keep_checkpoints)
            snapshots.tidy(run)
        job = Job(
            config=config,
            cache=cache,
            run=run,
            parts=parts,
            world=world,
            device=device,
            share=share,
            watcher=watcher,
            make_judge=asked.make_judge,
        )
        if world.is_main:
            require_room(run, config, parts.sizes, start)
        _announce(job, start, remark)
        if start < config.steps:
            with _told_how_to_go_on(job):
                if world.is_main:
                    keep(statistics, run, of_streams)  # before config.yaml makes it a run
                    keep_empty_text(parts.objective.condition, run)
                    if not runs.is_run(run):
                        branch.record(run, origin)
                lost = runs.open_folder(run, config, cache, parts.reads, start, main=world.is_main)
                if lost:
                    watcher.note(f"{lost} damaged lines of {run / 'log.jsonl'} were left out")
                pace = Pace()
                with _stop_on_signals(job, pace) as told, _logging(job, start) as log:
                    if origin is not None:  # so that the branch needs its origin no more
                        with pace.doing("saving"):
                            save_parts(parts, run, start, config, world, state=_saved_state(state))
                    _loop(job, log, told, pace, outlook, start=start, state=state)
        return run


def _saved_state(state: Mapping[str, Any]) -> dict[str, object]:
    """What a checkpoint holds beside tensors."""
    found: dict[str, object] = {"time_s": float(state.get("time_s", 0.0))}
    if skipped := state.get("skipped", []):
        found["skipped"] = skipped
    return found


def _loop(
    job: Job,
    log: RunLog | None,
    told: stopping.Stop,
    pace: Pace,
    outlook: Outlook,
    *,
    start: int,
    state: Mapping[str, Any],
) -> None:
    """Steps `start` to the end. The host waits for the device where it logs or saves, and nowhere else."""
    config = job.config
    assert config.log_every is not None and config.sample_every is not None and config.checkpoint_every is not None
    means, clock = RunningMeans(), TrainingClock(float(state.get("time_s", 0.0)))
    bad: FirstBadStep | SkippedSteps = FirstBadStep(job.device)
    if config.skip_nonfinite:
        bad = SkippedSteps(config.skip_nonfinite, job.device, state.get("skipped", []))
    skipped: list[int] = list(state.get("skipped", []))
    spikes = Spikes(branch.lines_before(job.run) if log is not None else ())
    grids = GridMaker(config, job.cache, job.run, job.watcher.note)
    evaluations = SmallEvaluations(job.make_judge, config, job.cache, job.run, job.watcher.note)
    signals = distributed.StopSignal()

    def save(done: int) -> None:
        if log is not None:
            log.sync()
        now = _saved_state({"time_s": clock.trained_s, "skipped": skipped})
        with pace.doing("saving"):
            save_parts(job.parts, job.run, done, config, job.world, state=now)

    def judge(done: int) -> None:
        if (ema := whole_ema(job.parts, job.world)) is not None and log is not None:
            with pace.doing("judging samples"):
                evaluations.judge(ema, done, log, clock.trained_s, told)
        distributed.barrier()  # of the hosts: judging may take longer than a GPU's exchange may

    if (
        start > 0
        and due(config.eval_every, start)
        and distributed.from_main(log is not None and is_owed(job.run, start))
    ):
        with clock.paused():
            judge(start)
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
    lines = _Lines(job=job, log=log, clock=clock, means=means, usage=usage, spikes=spikes)
    try:
        for step in range(start, config.steps):
            done = step + 1
            logs = step == 0 or done % config.log_every == 0 or done == config.steps
            set_learning_rate(job.parts, config, step)
            with pace.doing("this step"):
                norm = train_step(job, stream, step, means, bad, measures=logs)

            stop = signals.agree(told.number)
            saves = done % config.checkpoint_every == 0 or done == config.steps or stop != 0
            # A trial shorter than the interval draws no closing grid: with a large model on a CPU it takes many minutes.
            final = done == config.steps and config.steps >= config.sample_every
            draws = config.sample_every > 0 and (done % config.sample_every == 0 or final)
            keeps, judges = due(config.snapshot_every, done), due(config.eval_every, done)
            if logs or saves or keeps:
                skipped += _check_finite(job, log, bad)
            if logs:
                left_out = {"skipped": len(skipped)} if config.skip_nonfinite else {}
                lines.add(done, norm, left_out, waited_s=batches.waited_s)
            else:
                job.watcher.update(1)
            outlook.after(done, clock.trained_s, waited=logs)
            with clock.paused() if saves or draws or keeps or judges else nullcontext():
                # Both before the checkpoint: a run that is killed in between comes by them again.
                if keeps:
                    save_averages(job.parts, job.run, done, config, job.world)
                if judges:
                    judge(done)
                    if not stop and (stop := distributed.from_main(told.number)):  # it may have been given up
                        skipped += _check_finite(job, log, bad)
                        saves = True
                if saves:
                    save(done)
                if draws and (ema := whole_ema(job.parts, job.world)) is not None and log is not None:
                    with pace.doing("drawing samples"):
                        grids.draw(ema, done, log, told)
                if draws and not stop and job.world.size == 1 and told.number:
                    stop = told.number  # meanwhile; another step may take minutes
                    if not saves:
                        skipped += _check_finite(job, log, bad)
                        save(done)
            if stop and done < config.steps:
                job.watcher.note(f"stopped at step {done}, saved; it goes on with: {_resuming(job)}")
                raise SystemExit(128 + stop)
    finally:
        batches.close()
        signals.wait()


def due(every: int, done: int) -> bool:
    """Whether something that comes every so many steps (0: never) is to be done after `done` of them."""
    return every > 0 and done % every == 0


def loader(job: Job, start: int, *, everything: bool = False) -> Loader:
    """Batches as they are stored, of what each of the run's steps from `start` on reads, or of all that any reads."""
    config, alignment = job.config, job.parts.alignment
    return Loader(
        job.cache,
        [*job.parts.data, *job.parts.objective.condition.reads],
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
        one_caption=job.parts.model.cfg.text is not None,
    )


def train_step(
    job: Job,
    stream: Iterator[Mapping[str, Tensor]],
    step: int,
    means: RunningMeans,
    bad: FirstBadStep | SkippedSteps,
    *,
    measures: bool,
) -> Tensor:
    """One step of the optimiser over all micro-batches, and of the discriminator where it is its turn.

    Returns the gradient's norm before clipping. Nothing here waits for the device.
    """
    config, parts = job.config, job.parts
    skipping = bad if isinstance(bad, SkippedSteps) else None
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
    if config.cuda_graphs:
        torch.compiler.cudagraph_mark_step_begin()  # nothing that graphs have given is used any more
    readings: list[dict[str, Tensor]] = []
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
        if adversarial and skipping is not None:
            bad.watch(measured["align/adversary"], step)
        readings.append({name: value.detach() for name, value in (terms | measured).items()})
    if adversarial and skipping is not None and parts.adversary is not None:
        skipping.watch_gradients(parts.adversary.parameters(), step)
    norm, left_out = optimizer_step(parts, config, skipping, step)
    if parts.scaler is None and skipping is None:  # with loss scaling, overflows are expected and left out now and then
        bad.watch(norm, step)
    for reading in readings:
        means.add(reading, left_out)
    decay = ema_decay_at(step, config.ema_decay, warmup=config.ema_warmup)
    update_ema(parts.ema, parts.model, decay, left_out=left_out)
    parts.averages.update(parts.model, step, warmup=config.ema_warmup, left_out=left_out)
    if adversarial:
        adversary_step(parts, left_out)
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
    with distributed.exchange_gradients(parts.forward, parts.model, now=last):
        terms, kept = parts.forward(batch, draws, aligned=aligned)
        each = torch.stack(list(terms.values()))
        loss = each.sum()
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
    # Copies: a CUDA graph's own outputs are overwritten when it runs again.
    return {"loss": loss, **dict(zip(terms, each.detach().unbind()))}, measured


def optimizer_step(
    parts: Parts, config: RunConfig, skipping: SkippedSteps | None = None, step: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Clips, steps, clears; returns the gradient's norm before clipping and, with `skipping`, 1 on the device if the
    step was left out, else 0.

    An overflow of scaled gradients is the loss scaling's own affair, which leaves such steps out in any case.
    """
    left_out = None
    # The backbone averages its gradients itself, replicated or sharded; the heads beside it do not.
    distributed.average_gradients(p for group in parts.groups[1:] for p in group)
    if parts.scaler is not None:
        if skipping is not None:
            left_out = skipping.decide(step)
            spoil_gradient(parts, left_out)
        parts.scaler.unscale_(parts.optimizer)
    assert config.clip is not None
    norm = clip_gradients(parts.groups, config.clip)
    if parts.scaler is not None:
        parts.scaler.step(parts.optimizer)  # the fused optimiser decides on the device whether to skip
        parts.scaler.update()
    else:
        if skipping is not None:
            skipping.watch(norm, step)
            left_out = skipping.decide(step)
        step_unless(parts.optimizer, left_out)
    parts.optimizer.zero_grad(set_to_none=True)
    return norm, left_out


def adversary_step(parts: Parts, left_out: Tensor | None = None) -> None:
    """One step of the discriminator on the gradients gathered in this step's micro-batches."""
    assert parts.adversary is not None and parts.adversary_optimizer is not None
    distributed.average_gradients(parts.adversary.parameters())
    step_unless(parts.adversary_optimizer, left_out)
    parts.adversary_optimizer.zero_grad(set_to_none=True)


def set_learning_rate(parts: Parts, config: RunConfig, step: int) -> None:
    """The schedule's rate times a group's own factor."""
    lr = learning_rate(config, step)
    for optimizer in (parts.optimizer, parts.adversary_optimizer):
        for group in optimizer.param_groups if optimizer is not None else ():
            group["lr"] = lr * group.get(RATE_FACTOR, 1.0)


@dataclass(frozen=True, kw_only=True)
class _Lines:
    """What lines of the log are made of. log: None on ranks that keep none."""

    job: Job
    log: RunLog | None
    clock: TrainingClock
    means: RunningMeans
    usage: Usage
    spikes: Spikes

    def add(self, done: int, norm: Tensor, beside: Mapping[str, float], *, waited_s: float) -> None:
        """One line: averages since the last one, on every rank alike. beside: what else it holds."""
        shown, job, spikes = self.means.take(), self.job, self.spikes
        rate, trained_s = self.clock.steps_per_s(done), self.clock.trained_s
        speed = {} if rate is None else {"images_per_s": rate * job.config.batch_size}
        with self.clock.paused():  # counting operations is no training
            used = self.usage.read(done, rate=rate, trained_s=trained_s, waited_s=waited_s)
        record = {
            "step": done,
            "time_s": round(trained_s, 3),
            **speed,
            **used,
            "lr": job.parts.optimizer.param_groups[0]["lr"],
            "grad_norm": float(norm),
            **beside,
            **shown,
        }
        if self.log is not None:
            ratio = spikes.see(shown.get("denoise"))
            if ratio is not None:
                record[COLUMN] = round(ratio, 4)
                if spikes.begins:
                    job.watcher.note(f"the denoising loss at step {done} is {ratio:.2f} times its recent median")
            self.log.record(record)
        job.watcher.record(1, *in_words(record, shown))


def _check_finite(job: Job, log: RunLog | None, bad: FirstBadStep | SkippedSteps) -> list[int]:
    """Ends the run after a bad step, or one too many, and says on which images it happened; else the steps left out since
    the last call, whose images it notes."""
    if isinstance(bad, SkippedSteps):
        found = bad.read()
        step = bad.first_too_many if found else None
        counted = f", after {bad.bound} others were left out (skip_nonfinite {bad.bound})"
    else:
        first = bad.read()
        found, step, counted = [], first, ""
    left = [at for at in found if at != step]
    if left and log is not None:
        runs.append_lines(job.run / runs.SKIPPED, [json.dumps(_batch_of(job, at)) for at in left])
        job.watcher.note(f"left out, because the loss or its gradient was not finite: step {', '.join(map(str, left))}")
    if step is None:
        return found
    path = job.run / "diverged.json"
    if job.world.is_main:
        runs.write_text(path, json.dumps(_batch_of(job, step), indent=1))
    distributed.barrier()
    raise Diverged(
        f"the loss or its gradient was not finite in step {step}{counted}; the step and its batch's keys are in {path}",
        remedy=_way_round(job, step),
    )


def _batch_of(job: Job, step: int) -> dict[str, Any]:
    """What a step trained on."""
    config = job.config
    first = step * config.batch_size
    indices = stream_indices(first, first + config.batch_size, count=len(job.cache), seed=config.seed)
    keys = sample_keys(job.cache, indices)
    return {"step": step, "seed": config.seed, "indices": indices.tolist(), "keys": keys}


def _way_round(job: Job, step: int) -> str:
    """How to get past a bad step, where a checkpoint from before it is there as a branch, else in a run of its own."""
    before = [at for at, _ in checkpoint.list_checkpoints(job.run) if at <= step]
    config = job.config
    assert config.lr is not None and config.clip is not None, "nothing of a run's settings is open"
    others = [f"clip harder (--set clip={min(config.clip, 1.0) / 2:g})"]
    if config.precision == "fp16":
        others.append("use --precision bf16")
    if not config.skip_nonfinite:
        others.append("leave a few such steps out (--set skip_nonfinite=10)")
    *most, last = others
    milder = f"{', '.join(most)} or {last}" if most else last
    if not before:
        return (
            f"Nothing was saved before that step: lower --lr (it was {config.lr:g}), {milder}, in another run (--name)."
        )

    def branch(option: str, value: str) -> str:
        # Of a branch that was made by such a command the same part of the name is replaced.
        name = re.sub(rf"-{option}-[^-/]+$", "", str(config.name))
        words = ["trainer run", f"--from {typed(job.run)}@{before[-1]}", f"--{option} {value}"]
        words.append(f"--name {shlex.quote(f'{name}-{option}-{value}')}")
        if is_redacted(str(config.cache)):
            words.append("--cache URL")
        return " ".join(words)

    return (
        f"Go on from before it with other data and draws:\n  {branch('seed', str(config.seed + 1))}\n"
        f"or, where that diverges too, at half the rate:\n  {branch('lr', f'{config.lr / 2:.4g}')}\n"
        f"With --from too one can {milder}."
    )


def prepare_device(device: torch.device) -> None:
    """PyTorch's settings of the process for training on `device`."""
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
        fitted(config.settled(), cache),
        cache=redact(str(cache.path)),
        name=str(run.relative_to(root)),
        precision=precision_of(config, device),  # type: ignore[arg-type]
        normalization=resolve(config, cache),  # type: ignore[arg-type]
    )


def _restore(parts: Parts, run: Path, config: RunConfig) -> tuple[int, dict[str, Any]]:
    """Loads the latest checkpoint if there is one: steps done and its `state.json`."""
    if not checkpoint.list_checkpoints(run):
        return 0, {}
    step, path = checkpoint.find_checkpoint(run)
    state = checkpoint.require_own(path, method=config.method, model=config.model)
    load_parts(parts, path, state)
    return step, state


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
        go_on = f"Training goes on with: {_resuming(job)}"
        if not saved and not runs.is_run(job.run):  # so early that there is nothing to resume
            go_on = "Then type the same command again."
        # The same command would find the run there and refuse.
        remedy = (known.remedy or "").removesuffix(f", {AGAIN}").strip().rstrip(".")
        remedy = f"{remedy}. {go_on}" if remedy else go_on
        kind = CacheError if isinstance(known, CacheError) else UserError
        raise kind(f"training stopped ({kept}): {known.what}", remedy=remedy) from error


def _resuming(job: Job) -> str:
    """The command that continues this run: by its name, because without one `--resume` takes the newest."""
    words = ["trainer run --resume", f"--name {shlex.quote(str(job.config.name))}"]
    if is_redacted(str(job.config.cache)):
        words.append("--cache URL")
    if job.world.size > 1:
        words.append("  (behind torchrun, as before)")
    return " ".join(words)


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


def _stop_on_signals(job: Job, pace: Pace) -> AbstractContextManager[stopping.Stop]:
    """Signals are collected for the loop, and answered at once on the terminal."""

    def saved() -> str:
        steps = [step for step, _ in checkpoint.list_checkpoints(job.run)]
        return f"the last checkpoint is step {steps[-1]}" if steps else "nothing is saved yet"

    def say() -> None:
        after = "this step" if job.world.size == 1 else "the next step"
        left = "" if (text := pace.left()) is None else f" ({text})"
        job.watcher.note(
            f"stopping after {after}, then saving{left}; press Ctrl-C again to stop now ({_or_unknown(saved)})"
        )

    def farewell() -> str:
        return f"stopped in the middle of {pace.name}; {_or_unknown(saved)}" if job.world.is_main else ""

    return stopping.collected(say, farewell)


def _or_unknown(saved: Callable[[], str]) -> str:
    try:
        return saved()
    except (OSError, UserError):
        return "what was saved is kept"
