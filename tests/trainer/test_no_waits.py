"""A step on an accelerator that is not there: nothing is fetched from it, and nothing is copied to it, but by the loader.

PyTorch's `meta` device stands in for the GPU. Its tensors have no values, so whatever reads one cannot go on; and they are
not the host's, so a copy from the host shows, which it does not where the CPU is the device.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import METHOD_OPTIONS, add_nano, settings
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils import _foreach_utils, _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import featcache
import trainer.sampling.draw
import trainer.training.loop
from featcache.progress import QUIET
from featcache.torch.feed import Share
from trainer import stopping
from trainer.diffusion.guidance import Guidance
from trainer.distributed import World
from trainer.interval import Interval
from trainer.models import build_model, model_config
from trainer.sampling.draw import SampleConfig, draw_units
from trainer.sampling.inference import Arithmetic, Network
from trainer.training.loop import Job, train
from trainer.training.meters import Pace
from trainer.training.objective import update_ema
from trainer.training.outlook import Outlook
from trainer.training.state import assemble

DEVICE = torch.device("meta")
STEPS = 4
# Operations whose result, or its shape, the host must know before it can go on.
READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim")


class WaitsError(AssertionError):
    """Something in a step makes the host wait for the device, or copies what the host has just made."""


class Guard(TorchDispatchMode):
    """Raises `WaitsError` where the operation is called, and counts the others. An autograd engine runs the backward pass
    of such tensors in the calling thread, so it is seen, too.

    host: whether the host may compute with tensors of its own.
    """

    def __init__(self, *, host: bool = False) -> None:
        super().__init__()
        self._host = host
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        given = [x for x in _pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in READS and any(x.device == DEVICE for x in given):
            raise WaitsError(f"{func} waits for its result")
        if name.startswith("index") and any(x.dtype is torch.bool for x in given[1:]):
            raise WaitsError(f"{func} counts the ones of a mask")
        if name == "lift_fresh" and given[0].device == DEVICE:
            raise WaitsError("numbers were copied to the device, as torch.tensor(numbers, device=...) does")
        devices = {x.device for x in given}
        if "device" in (kwargs or {}):
            devices.add(torch.device(kwargs["device"]))
        if devices - {DEVICE} and (DEVICE in devices or not self._host):
            raise WaitsError(f"{func} has to do with a tensor of the host")
        self.seen[name] += 1
        return func(*args, **(kwargs or {}))


class Enough(Exception):
    """The steps that were wanted are done."""


class Batches:
    """As the loader's: arrays as they are stored, on the device already."""

    waited_s = 0.0

    def __init__(self, job: Job) -> None:
        with job.cache.reader(list(job.parts.reads)) as reader:
            arrays = reader.allocate(job.share.rows)
        self._batch = {name: torch.from_numpy(values).to(DEVICE) for name, values in arrays.items()}
        self._left = STEPS * job.config.accumulate

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        for _ in range(self._left):
            yield self._batch
        raise Enough

    def close(self) -> None:
        pass


class HostGenerator(torch.Generator):
    """In the place of the device's, which has none; it is asked for nothing, since its numbers have no values."""

    def __new__(cls, device: Any = None) -> HostGenerator:
        return super().__new__(cls)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """`meta` may do what a GPU may: fused and foreach kernels, generators of its own; autocast, which it lacks, is off."""
    for module in (sys.modules["torch.optim.optimizer"], _foreach_utils):
        for kernels in ("foreach", "fused"):
            monkeypatch.setattr(module, f"_get_{kernels}_kernels_supported_devices", lambda: ["meta"])
    monkeypatch.setattr(torch, "Generator", HostGenerator)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())


def job_on_the_device(cache_path: Path, method: str, changes: Mapping[str, Any]) -> Job:
    """A run whose steps neither log nor save, set up as `train` does it."""
    cache = featcache.open(cache_path)
    changes = {"steps": 100, "log_every": 50, "precision": "fp32", **changes}
    config = settings(cache_path, method, **changes).settled()
    return Job(
        config=config,
        cache=cache,
        run=cache_path.parent / "nowhere",
        parts=assemble(config, cache, DEVICE, World()),
        world=World(),
        device=DEVICE,
        share=Share(global_batch=config.batch_size, micro_batches=config.accumulate),
        watcher=QUIET,
    )


def steps_of(job: Job, monkeypatch: pytest.MonkeyPatch) -> Guard:
    """The training loop from the second step on."""
    outlook = Outlook(job.config, job.cache, job.run, world=World(), device=DEVICE, start=1, note=QUIET.note)
    batches, guard = Batches(job), Guard()
    monkeypatch.setattr(trainer.training.loop, "loader", lambda job, start: batches)
    with guard, pytest.raises(Enough):
        trainer.training.loop._loop(job, None, stopping.Stop(), Pace(), outlook, start=1, state={})
    return guard


CASES: list[Any] = [
    *((method, {}) for method in METHOD_OPTIONS),
    ("ahpa+sra", {"skip_nonfinite": 3, "ema_warmup": True}),
    pytest.param("sara", {"skip_nonfinite": 3, "accumulate": 2}, marks=pytest.mark.slow),
    ("ahpa", {"align": {"ahpa": {"router": "content", "normalize": "rms", "entropy_floor": 0.5}}}),
    ("ahpa", {"align": {"ahpa": {"router": "table", "loss": "smooth-l1", "head": "conv2"}}}),
    ("repa", {"align": {"repa": {"loss": "nt-xent", "head": "conv", "spatial_gamma": 0.6}}}),
    ("none", {"model": "DiT-Nano/2", "warmup_steps": 5, "lr_schedule": "cosine"}),
    ("none", {"time_sampling": "lognormal", "path": "cosine", "clip": 0.1, "recompute": "blocks"}),
    ("none", {"ema_decays": [0.99, 0.999], "posthoc": True, "weight_decay": 0.1}),
]


@pytest.mark.usefixtures("nano", "accelerator")
@pytest.mark.parametrize(("method", "changes"), CASES)
def test_a_step_neither_waits_nor_copies(
    request: pytest.FixtureRequest, method: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = request.getfixturevalue("streams_cache" if method in ("reg", "redi") else "shapes_cache")
    seen = steps_of(job_on_the_device(cache, method, changes), monkeypatch).seen
    assert seen["_fused_adamw_"] >= STEPS and seen["_foreach_lerp_"] >= STEPS, "whole steps were seen"
    assert seen["gelu_backward"] >= STEPS, "and the backward pass"


FAULTS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool((x > 0).any()),
    "if": lambda x: 1 if x.isfinite().all() else 2,
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "cpu": lambda x: x.cpu(),
    "tolist": lambda x: x.tolist(),
    "tensor": lambda x: x * torch.tensor(2.0, device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "scalar of the host": lambda x: x * torch.tensor(2.0),
    "to": lambda x: torch.zeros(3).to(x.device),
    "copy_": lambda x: torch.zeros_like(x).copy_(torch.zeros(x.shape)),
    "index of the host": lambda x: x[torch.tensor([0])],
    "list as index": lambda x: x[[0]],
    "arange of the host": lambda x: torch.arange(3),
}


@pytest.mark.usefixtures("nano", "accelerator")
def test_a_step_that_waits_is_noticed(shapes_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fault in the place of the average's update."""
    job = job_on_the_device(shapes_cache, "none", {})
    for name, fault in FAULTS.items():
        done: list[str] = []

        def faulty(ema: Any, model: Any, decay: float, fault: Any = fault, done: list[str] = done, **kw: Any) -> None:
            update_ema(ema, model, decay, **kw)
            done.append("the average")
            fault(next(iter(model.parameters())).detach())

        monkeypatch.setattr(trainer.training.loop, "update_ema", faulty)
        with pytest.raises(WaitsError):
            steps_of(job, monkeypatch)
        assert len(done) == 1, f"{name}: not noticed at once"


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize(
    "sampler", ["sde", "ddpm", *(pytest.param(s, marks=pytest.mark.slow) for s in ("ode", "heun", "ddim"))]
)
def test_sampling_neither_waits_nor_copies(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two units and a half, guided in part of the steps. Noise and labels come of the host, by way of pinned memory."""
    add_nano()
    model = "DiT-Nano/2" if sampler.startswith("dd") else "SiT-Nano/2"
    network = Network(
        build_model(model_config(model, latent_channels=4, latent_size=8, num_classes=3), device=DEVICE), Arithmetic()
    )
    decoder: Any = torch.nn.Conv2d(4, 3, 1, device=DEVICE)
    uploads, guard = [], Guard(host=True)

    def upload(tensor: Tensor, device: Any) -> Tensor:
        assert torch.device(device) == DEVICE
        uploads.append(tensor)
        with torch.utils._python_dispatch._disable_current_modes():
            return tensor.to(device)

    monkeypatch.setattr(trainer.sampling.draw, "upload", upload)
    monkeypatch.setattr(trainer.diffusion.noise, "upload", upload)
    # As on a GPU, but that there is nothing to be fetched.
    monkeypatch.setattr(trainer.sampling.draw, "_each_by_one_thread", lambda draw, starts: map(draw, starts))
    config = SampleConfig(sampler=sampler, steps=4, guidance=Guidance(scale=2.0, interval=Interval(0.0, 0.6)))
    with guard:
        units = list(draw_units(network, decoder, np.array([0, 1, 2, 0, 1]), range(5), config, unit=2))
    assert [tuple(unit.shape) for unit in units] == [(2, 8, 8, 3), (2, 8, 8, 3), (1, 8, 8, 3)]
    assert sum(x.dtype is torch.int64 for x in uploads) == 3 and guard.seen["gelu"] >= 3 * 4 * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA alone says when the host waits for it")
@pytest.mark.parametrize("sampler", ["sde", "heun", "ddpm"])
def test_sampling_never_waits_for_a_gpu(sampler: str) -> None:
    """But for events, by which finished units are fetched. The first pass loads kernels."""
    add_nano()
    model = "DiT-Nano/2" if sampler == "ddpm" else "SiT-Nano/2"
    cfg = model_config(model, latent_channels=4, latent_size=8, num_classes=3)
    network = Network(build_model(cfg, device="cuda").eval(), Arithmetic(precision="bf16"))
    decoder: Any = torch.nn.Conv2d(4, 3, 1, device="cuda")
    config = SampleConfig(sampler=sampler, steps=4, guidance=Guidance(scale=2.0, interval=Interval(0.0, 0.6)))
    drawn = []
    try:
        for mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            units = draw_units(network, decoder, np.array([0, 1, 2, 0, 1]), range(5), config, unit=2)
            drawn.append(np.concatenate(list(units)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert np.array_equal(drawn[0], drawn[1])


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Regions are captured as ever and run as they are, which takes no compiler; the call gives how many graphs there were
    since it was called last, none of them for want of a better one."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **kw: real(module, **kw, backend="eager"))
    torch.compiler.reset()
    counters.clear()

    def count() -> int:
        assert not counters["graph_break"]
        found = counters["stats"]["unique_graphs"]
        torch.compiler.reset()
        counters.clear()
        return int(found)

    return count


def sampled(config: Any, cache: Any, run: Path, note: Any) -> Callable[[Any], Mapping[str, float]]:
    """As an evaluation does: samples of the averaged model, which is a teacher too."""

    decoder: Any = torch.nn.Conv2d(16, 3, 1)  # of the embedded latents

    def judge(model: Any) -> Mapping[str, float]:
        labels, sample = np.zeros(3, dtype=np.int64), SampleConfig(sampler="ode", steps=2)
        (drawn,) = draw_units(model, decoder, labels, range(3), sample, unit=3)
        return {"fid": float(drawn.mean())}

    return judge


COMPILED: list[Any] = [
    ("sra2", {"align_until": 5, "sample_every": 0}, 2),  # two kinds of steps; grids take long
    *((method, {}, 2 if method == "dya" else 1) for method in METHOD_OPTIONS),
    ("ahpa+sra", {"align_until": 5}, 2),
    ("sara", {"accumulate": 2, "skip_nonfinite": 3}, 1),
    (
        "none",
        {"lr_schedule": "inverse-sqrt", "warmup_steps": 3, "ema_decays": [0.99], "posthoc": True, "ema_warmup": True},
        1,
    ),
]
COMPILED = [COMPILED[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in COMPILED[1:])]


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(("method", "changes", "expected"), COMPILED)
def test_each_kind_of_step_compiles_once(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    graphs: Callable[[], int],
    method: str,
    changes: dict[str, Any],
    expected: int,
) -> None:
    """With lines of the log, grids, evaluations, snapshots and checkpoints in between, past the end of an epoch, and again
    where the run goes on."""
    cache = request.getfixturevalue("streams_cache" if method in ("reg", "redi") else "shapes_cache")
    common: dict[str, Any] = {
        "compile": True, "log_every": 2, "sample_every": 3, "eval_every": 3, "snapshot_every": 4, "checkpoint_every": 4,
        "seed": 2,
    }  # fmt: skip
    config = settings(cache, method, steps=8, **{**common, **changes})
    train(config, resume=False, watcher=QUIET, root=tmp_path, make_judge=sampled)
    assert graphs() == expected
    if "align_until" not in changes:
        train(settings(cache, method, steps=12, **{**common, **changes}), resume=True, watcher=QUIET, root=tmp_path)
        assert graphs() == expected


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    "fault", ["number", *(pytest.param(f, marks=pytest.mark.slow) for f in ("shape", "precision"))]
)
def test_a_step_that_compiles_anew_is_noticed(
    shapes_cache: Path, tmp_path: Path, graphs: Callable[[], int], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number that changes from step to step, a smaller batch, a setting that is not put back."""
    real = trainer.training.loop.forward_backward

    def faulty(parts: Any, batch: Any, draws: Any, **kw: Any) -> Any:
        seen.append(None)
        if fault == "number":
            parts.objective._label_dropout = 0.1 / len(seen)
        elif fault == "shape" and len(seen) == 3:
            batch, draws = {name: x[:3] for name, x in batch.items()}, draws.rows(slice(3))
        elif fault == "precision" and len(seen) == 3:
            torch.set_float32_matmul_precision("high")
        return real(parts, batch, draws, **kw)

    seen: list[None] = []
    monkeypatch.setattr(trainer.training.loop, "forward_backward", faulty)
    before = torch.get_float32_matmul_precision()
    try:
        train(settings(shapes_cache, "none", steps=4, compile=True), resume=False, watcher=QUIET, root=tmp_path)
    finally:
        torch.set_float32_matmul_precision(before)
    assert graphs() > 1


def test_blocks_of_a_sampled_model_compile_once_for_each_batch(graphs: Callable[[], int]) -> None:
    """Two units and a half: a graph for the batch, and one for the doubled batch of guidance, whatever the block."""
    add_nano()
    cfg = model_config("SiT-Nano/2", latent_channels=4, latent_size=8, num_classes=3)
    network = Network(build_model(cfg).eval().requires_grad_(False), Arithmetic(compile=True))
    config = SampleConfig(sampler="sde", steps=4, guidance=Guidance(scale=2.0, interval=Interval(0.0, 0.6)))
    decoder: Any = torch.nn.Conv2d(4, 3, 1)
    assert len(list(draw_units(network, decoder, np.array([0, 1, 2, 0, 1]), range(5), config, unit=2))) == 3
    assert graphs() == 2
