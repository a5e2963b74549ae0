"""What a step does not do: wait for the device, or anything at all for a method that is switched off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import Listener, settings
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import featcache.torch.feed
from trainer.align.dya import dropped
from trainer.training.loop import train

METHODS = ("none", "repa", "sara", "dya", "ahpa", "sra", "sra2", "ahpa+sra")
# Operations whose result, or its shape, the host must know before it can go on: on a GPU each is a synchronisation.
READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim")
# Methods that bring a tensor to the host; of one that is there they dispatch nothing.
FETCHES = ("Tensor.cpu", "Tensor.tolist", "Tensor.numpy", "Tensor.__array__", "Tensor.to cpu")


class Operations(TorchDispatchMode):
    """Counts all operations of forward, backward and optimisers, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Counter[str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.steps:
            name = func.overloadpacket.__name__
            masks = name.startswith("index") and any(i is not None and i.dtype is torch.bool for i in _indices(args))
            self.steps[-1]["masked_select" if masks else name] += 1
        return func(*args, **(kwargs or {}))


class Fetches(TorchFunctionMode):
    """Counts calls of what is in FETCHES in the steps of ``operations``. Modes are a thread's own: the reader may fetch."""

    def __init__(self, operations: Operations) -> None:
        super().__init__()
        self.operations = operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = f"Tensor.{getattr(func, '__name__', '')}"
        if func is torch.Tensor.to and "cpu" in [
            a for a in (*args[1:], *(kwargs or {}).values()) if isinstance(a, str)
        ]:
            name = "Tensor.to cpu"  # typed out; ``to(device)`` of the run's device is no fetch
        if self.operations.steps and name in FETCHES:
            self.operations.steps[-1][name] += 1
        return func(*args, **(kwargs or {}))


def _indices(args: Any) -> list[Any]:
    """The index tensors of ``index`` and its kin; a Boolean one makes the host count its ones."""
    return args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else []


class Cuts(Listener):
    """Begins a new count after every step, logging included."""

    def __init__(self, operations: Operations) -> None:
        super().__init__()
        self.operations = operations

    def start(self, *, run: Path, total: int, done: int, note: str) -> None:
        self.operations.steps.append(Counter())

    def advance(self, step: int, shown: Mapping[str, float]) -> None:
        self.operations.steps.append(Counter())


def counted(config: Any, root: Path) -> list[Counter[str]]:
    """Operations of every step of a run, from the wait for its batch to its log."""
    operations = Operations()
    with operations, Fetches(operations):
        train(config, resume=False, watcher=Cuts(operations), root=root)
    return operations.steps[: config.steps]


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        *((method, {}) for method in METHODS),
        ("sara", {"precision": "bf16", "accumulate": 2}),
        ("sara", {"precision": "fp16", "accumulate": 2}),
        ("dya", {"precision": "fp16"}),
        ("none", {"model": "DiT-Nano/2", "warmup_steps": 5}),
        ("sara", {"skip_nonfinite": 3, "accumulate": 2}),
        ("ahpa+sra", {"skip_nonfinite": 3, "ema_warmup": True}),
        ("sara", {"skip_nonfinite": 3, "precision": "fp16"}),
        ("ahpa", {"time_sampling": "lognormal", "path": "cosine"}),
        ("ahpa+sra", {"recompute": "blocks", "lr_schedule": "cosine", "hold_steps": 2}),
        ("sara", {"recompute": "blocks", "precision": "bf16", "accumulate": 2, "weight_decay": 0.1}),
        ("none", {"lr_schedule": "inverse-sqrt", "warmup_steps": 2, "clip": 0.1}),
        ("repa", {"ema_decays": [0.99, 0.999], "posthoc": True}),
    ],
)
def test_nothing_is_read_back_but_at_logging_steps(
    shapes_cache: Path, tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    """Steps 1, 5 and 10 log. The last also saves."""
    config = settings(shapes_cache, method, steps=10, log_every=5, **changes)
    steps = counted(config, tmp_path)
    reading = [step for step, done in enumerate(steps, start=1) if any(done[n] for n in (*READS, *FETCHES))]
    assert reading == [1, 5, 10]
    assert all(sum(done.values()) > 100 for done in steps), "the steps were seen"


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("method", [m for m in METHODS if m != "none"])
def test_after_the_stop_a_step_is_vanilla_s(
    shapes_cache: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last operation, discriminator's turns and teacher included, and without reading a target."""
    read: list[set[str]] = []
    real = featcache.torch.feed.Feed._read

    def watched(self: Any, reader: Any, step: int, micro: int, into: Any) -> None:
        read.append(set(reader.arrays))
        real(self, reader, step, micro, into)

    vanilla = counted(settings(shapes_cache, "none", steps=8, log_every=100), tmp_path / "none")
    monkeypatch.setattr(featcache.torch.feed.Feed, "_read", watched)
    stopped = settings(shapes_cache, method, steps=8, log_every=100, align_until=3, seed=4)
    steps = counted(stopped, tmp_path / "stopped")
    assert steps[3:-1] == vanilla[3:-1]  # the last saves, heads and all
    assert sum(steps[0].values()) > sum(vanilla[0].values())
    assert all(names == {"vae/moments", "label"} for names in read[3:])
    if method not in ("sra", "sra2"):
        assert all(len(names) > 2 for names in read[:1])


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"dropout": 0.0, "truncate_at": 4}], ids=["SDS", "truncation"])
def test_dropped_and_truncated_steps_are_vanilla_s(shapes_cache: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    common = {"steps": 10, "log_every": 100, "seed": 2}
    vanilla = counted(settings(shapes_cache, "none", **common), tmp_path / "none")
    config = settings(shapes_cache, "dya", align={"dya": {"head_width": 24, **options}}, **common)
    steps = counted(config, tmp_path / "dya")
    if "truncate_at" in options:
        off = [step >= 4 for step in range(10)]
    else:
        off = [dropped(seed=2, step=step, probability=0.5) for step in range(10)]
    assert 0 < sum(off[1:-1]) < 8
    assert [a == b for a, b in zip(steps, vanilla)][1:-1] == off[1:-1]  # the first logs, the last saves


@pytest.mark.usefixtures("nano")
def test_the_teacher_costs_its_blocks_alone(shapes_cache: Path, tmp_path: Path) -> None:
    """Attention runs once a block: four of the student's, and of the teacher's only those up to the one asked for."""
    attention = []
    for depth in (2, 3):
        config = settings(
            shapes_cache,
            "sra",
            align={"sra": {"student_depth": 1, "teacher_depth": depth}},
            steps=3,
            log_every=100,
        )
        steps = counted(config, tmp_path / str(depth))  # its middle step neither logs nor saves
        (name,) = (n for n in steps[1] if "attention" in n and "backward" not in n)
        attention.append(steps[1][name])
    assert attention == [4 + 2, 4 + 3]


def test_the_reading_operations_are_noticed() -> None:
    operations = Operations()
    operations.steps.append(Counter())
    with operations, Fetches(operations):
        x = torch.arange(3.0)
        assert not any(operations.steps[0][name] for name in (*READS, *FETCHES))
        x.to(x.device, torch.float64)
        assert not any(operations.steps[0][name] for name in (*READS, *FETCHES))
        x.cpu()
        x.tolist()
        x.numpy()
        x.to("cpu")
        x.to(device="cpu")
        np.asarray(x)
        float(x.sum())
        bool((x > 1).any())
        x[x > 1]
        torch.equal(x, x)
    seen = {name for name in READS if operations.steps[0][name]}
    assert seen >= {"_local_scalar_dense", "masked_select", "equal"}
    assert [operations.steps[0][name] for name in FETCHES] == [1, 1, 1, 1, 2]


class Strict(Listener):
    """Makes CUDA raise where the host waits for it, in all steps but those that log (every fifth) and the last."""

    def advance(self, step: int, shown: Mapping[str, float]) -> None:
        super().advance(step, shown)
        torch.cuda.set_sync_debug_mode("default" if (step + 1) % 5 == 0 else "error")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA alone says when the host waits for it")
@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("bound", [0, 3])
@pytest.mark.parametrize("method", METHODS)
def test_the_host_never_waits_for_a_gpu_but_at_logging_steps(
    shapes_cache: Path, tmp_path: Path, method: str, bound: int
) -> None:
    """The first step, which loads kernels, logs."""
    watcher = Strict()
    config = settings(shapes_cache, method, steps=10, log_every=5, device="cuda", compile=False, skip_nonfinite=bound)
    try:
        train(config, resume=False, watcher=watcher, root=tmp_path)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watcher.done == 10
