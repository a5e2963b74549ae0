"""Recomputation and CUDA graphs: the same numbers, less memory, and refusals where they cannot work."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_step import batch_of, numbers
from tiny_runs import Listener, assert_identical, keep_only, log_of, losses, settings
from torch import Tensor, nn
from torch._dynamo.utils import counters

import featcache
import trainer.training.loop
from featcache.errors import UserError
from trainer.distributed import World
from trainer.models import Transformer, build_model, model_config
from trainer.runs.config import RunConfig
from trainer.runs.folder import load_config
from trainer.runs.log import OF_THE_MACHINE
from trainer.training.loop import forward_backward, train
from trainer.training.meters import RunningMeans
from trainer.training.state import _check_cuda_graphs, _wrapped, assemble

CPU = torch.device("cpu")
MODELS: dict[str, dict[str, Any]] = {
    "SiT": {"name": "SiT-Nano/2"},
    "SiT with norms": {"name": "SiT-Nano/2", "qk_norm": True},
    "LightningDiT": {"name": "LightningDiT-Nano/2", "qk_norm": True},
    "DiT": {"name": "DiT-Nano/2"},
}


def run(config: RunConfig, root: Path, *, resume: bool = False) -> Path:
    return train(config, resume=resume, watcher=Listener(), root=root)


def model_of(name: str, **options: Any) -> Transformer:
    """A small model without a weight that is zero."""
    model = build_model(model_config(name, latent_channels=4, latent_size=8, num_classes=10, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def loss_of(model: nn.Module, low: torch.dtype | None = None) -> Tensor:
    """A loss of prediction and hidden states at two blocks, as methods that tap them have."""
    generator = torch.Generator().manual_seed(2)
    x, t = torch.randn(3, 4, 8, 8, generator=generator), torch.rand(3, generator=generator)
    with torch.autocast("cpu", dtype=low or torch.bfloat16, enabled=low is not None):
        output = model(x, t, torch.tensor([1, 2, 10]), taps=(1, 3))
    hidden = [h.float().abs().mean() for h in output.hidden.values()]
    return output.prediction.float().square().mean() + sum(hidden)


def gradients(model: Transformer, *, recompute: bool, low: torch.dtype | None, backend: str | None) -> list[Tensor]:
    """The loss and every gradient."""
    model.set_recompute(recompute)
    model.zero_grad()
    called: Any = model
    if backend is not None:
        torch.compiler.reset()
        called = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
    loss = loss_of(called, low)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("low", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", [None, pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_recomputation_changes_no_bit(name: str, low: torch.dtype | None, backend: str | None) -> None:
    """Eager, and differentiated ahead of time in one graph."""
    model = model_of(**MODELS[name])
    kept, again = (gradients(model, recompute=r, low=low, backend=backend) for r in (False, True))
    assert len(kept) == len(again) > 20
    assert all(torch.equal(a, b) for a, b in zip(kept, again)) and all(a.abs().sum() > 0 for a in kept)


@pytest.mark.slow
@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("low", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_recomputation_in_generated_code_changes_rounding_alone(name: str, low: torch.dtype | None) -> None:
    """What is fused stays in float32 between operations, and recomputation fuses otherwise. Rounded after each operation,
    as eager does, no more than the order of sums differs."""
    model = model_of(**MODELS[name])
    with torch._inductor.config.patch(emulate_precision_casts=True):
        kept, again = (gradients(model, recompute=r, low=low, backend="inductor") for r in (False, True))
    assert len(kept) == len(again) > 20
    for a, b in zip(kept, again):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(a.norm()))


@pytest.mark.usefixtures("nano")
def test_blocks_are_run_again_and_only_for_gradients() -> None:
    model, calls = model_of("SiT-Nano/2"), list[str]()
    for block in model.blocks:
        block.get_submodule("attn.qkv").register_forward_hook(lambda *_: calls.append("attention"))
    counts = []
    for recompute in (False, True):
        model.set_recompute(recompute)
        loss_of(model).backward()
        counts.append(len(calls))
        with torch.no_grad():
            loss_of(model)
        counts.append(len(calls))
        calls.clear()
    assert counts == [4, 8, 8, 12]


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("name", MODELS)
def test_what_autocast_casts_is_what_is_gathered_low(name: str) -> None:
    """With those parameters in bfloat16 beforehand, autocast gives the same prediction and the same gradients to the
    bit; with the embedding of time in it too, it does not."""
    wanted, model = model_of(**MODELS[name]), model_of(**MODELS[name])
    chosen = model.autocast_parameters()
    low = [n for n, p in model.named_parameters() if p in chosen]
    for parameter in chosen:
        parameter.data = parameter.data.bfloat16()
    losses_found = [loss_of(m, torch.bfloat16) for m in (wanted, model)]
    for loss in losses_found:
        loss.backward()
    assert torch.equal(*losses_found)
    for (key, a), b in zip(wanted.named_parameters(), model.parameters()):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad.float()), key
    assert not any(part in key for key in low for part in ("norm", "t_embedder", "y_embedder"))
    assert sum(p.numel() for p in chosen) > 0.8 * sum(p.numel() for p in model.parameters())
    model.t_embedder.to(torch.bfloat16)
    assert not torch.equal(loss_of(model, torch.bfloat16), losses_found[0])


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("none", {"model": "LightningDiT-Nano/2"}),
        ("ahpa+sra", {"align": {"ahpa": {"router_width": 8, "depths": [1, 3]}, "sra": {"head_ratio": 1.0}}}),
        ("sara", {"accumulate": 2, "precision": "bf16", "align_until": 4}),
        pytest.param("dya", {"precision": "fp16"}, marks=pytest.mark.slow),
        pytest.param("repa", {"model": "DiT-Nano/2"}, marks=pytest.mark.slow),
    ],
)
def test_a_recomputing_run_is_the_same_run(
    shapes_cache: Path, tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    """Weights, averages, moments and log, to the bit; either goes on as the other."""
    common: dict[str, Any] = {"steps": 6, "checkpoint_every": 3, **changes}
    kept = run(settings(shapes_cache, method, **common), tmp_path / "kept")
    again = run(settings(shapes_cache, method, recompute="blocks", **common), tmp_path / "again")
    assert_identical(kept, again, 6)
    for a, b in zip(log_of(kept), log_of(again), strict=True):
        assert {k: v for k, v in a.items() if k not in OF_THE_MACHINE} == {
            k: v for k, v in b.items() if k not in OF_THE_MACHINE
        }
    half = keep_only(kept, 3, tmp_path / "half" / "run")
    resumed = settings(shapes_cache, method, recompute="blocks", **common)
    assert_identical(kept, run(resumed, half.parent, resume=True), 6)
    assert load_config(again).recompute == "blocks" and load_config(kept).recompute == "none"


@pytest.mark.usefixtures("nano")
def test_streams_go_with_recomputation(streams_cache: Path, tmp_path: Path) -> None:
    runs = [run(settings(streams_cache, "reg", recompute=r), tmp_path / r) for r in ("none", "blocks")]
    assert_identical(*runs, 6)


@pytest.fixture(scope="module")
def memory() -> Any:
    path = Path(__file__).parents[2] / "benchmarks/memory.py"
    spec = importlib.util.spec_from_file_location("benchmark_memory", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_recomputation_keeps_a_block_s_input_alone(memory: Any) -> None:
    """[256, 768] in float32 for each of 12 blocks, and what embedding and last layer keep; counted as the docs' table."""
    found = memory.measure("SiT-B/2", 32)
    inputs = 12 * 256 * 768 * 4
    assert inputs < found["blocks"]["per_image"] < 1.25 * inputs
    assert found["blocks"]["per_image"] < found["none"]["per_image"] / 8
    in_blocks = found["none"]["per_image"] - found["blocks"]["per_image"]
    assert 12 * found["recomputed_block_per_image"] == pytest.approx(in_blocks, abs=12)
    assert found["blocks"]["batch"] == found["blocks"]["fixed"] + 32 * found["blocks"]["per_image"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"compile": False}, "does not go with compile false"),
        ({"accumulate": 2}, "does not go with accumulate 2"),
        ({"shard": True}, "does not go with shard true"),
        ({"device": "cpu"}, "does not go with device cpu"),
    ],
)
def test_cuda_graphs_are_refused_by_the_settings(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        RunConfig(cuda_graphs=True, **values)
    assert error.value.remedy


@pytest.mark.usefixtures("nano")
def test_cuda_graphs_are_refused_by_the_machine(shapes_cache: Path) -> None:
    cuda = torch.device("cuda", 0)
    _check_cuda_graphs(cuda, World(), compiled=True)
    with pytest.raises(UserError, match="with 8 ranks"):
        _check_cuda_graphs(cuda, World(size=8), compiled=True)
    config = settings(shapes_cache, device="auto", cuda_graphs=True)
    with pytest.raises(UserError, match="on cpu, not compiled"):
        assemble(config, featcache.open(shapes_cache), CPU, World())


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_the_compiled_region_is_captured(
    shapes_cache: Path, monkeypatch: pytest.MonkeyPatch, cuda_graphs: bool
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **kw: asked.append(kw))
    objective = assemble(settings(shapes_cache, "repa"), featcache.open(shapes_cache), CPU, World()).objective
    _wrapped(objective, World(), CPU, sharded=False, compiled=True, cuda_graphs=cuda_graphs)
    assert asked == [{"dynamic": False} | ({"mode": "reduce-overhead"} if cuda_graphs else {})]


class Replayed:
    """Stands in for a captured forward pass: each call spoils all that the calls before it gave."""

    def __init__(self, forward: Any) -> None:
        self.forward, self.given = forward, list[Tensor]()

    def __call__(self, *args: Any, **kw: Any) -> Any:
        for tensor in self.given:
            tensor.data.fill_(float("nan"))
        terms, kept = self.forward(*args, **kw)
        terms = {name: value * 1 for name, value in terms.items()}
        self.given = [*terms.values(), *(kept.hidden.values() if kept is not None else ())]
        return terms, kept


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("method", ["none", "sara"])
def test_nothing_is_kept_of_what_a_graph_overwrites(shapes_cache: Path, method: str) -> None:
    """Averages of the log over several steps, metrics and the discriminator's loss included."""
    cache = featcache.open(shapes_cache)
    taken: list[Mapping[str, float]] = []
    for replayed in (False, True):
        parts = assemble(settings(shapes_cache, method), cache, CPU, World())
        batch, means = batch_of(cache, list(parts.reads), range(4)), RunningMeans()
        if replayed:
            object.__setattr__(parts, "forward", Replayed(parts.forward))
        for step in range(3):
            on = method != "none"
            found = forward_backward(
                parts, batch, numbers(step=step), aligned=on, adversarial=on, measures=on, share=1.0, last=True
            )
            means.add(found[0] | found[1])
        taken.append(means.take())
    assert taken[0] == taken[1] and len(taken[0]) >= 2


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@needs_gpu
@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        *((method, {}) for method in ("none", "repa", "sara", "dya", "ahpa", "sra")),
        ("ahpa", {"precision": "fp16"}),
        ("repa", {"recompute": "blocks"}),
    ],
)
def test_a_captured_run_follows_a_compiled_one(
    shapes_cache: Path, tmp_path: Path, method: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alignment ends at step 20, so both graphs are recorded; replayed steps do not make the host wait."""
    common: dict[str, Any] = {
        "steps": 30,
        "align_until": 20,
        "log_every": 15,
        "device": "cuda",
        "compile": True,
        **changes,
    }
    torch.compiler.reset()
    compiled = run(settings(shapes_cache, method, **common), tmp_path / "compiled")
    torch.compiler.reset()
    counters.clear()
    real, watched = trainer.training.loop.train_step, list[int]()

    def strict(job: Any, stream: Any, step: int, *args: Any, measures: bool, **kw: Any) -> Any:
        if not (12 <= step < 20 or step >= 26) or measures:  # tracing and recording wait
            return real(job, stream, step, *args, measures=measures, **kw)
        watched.append(step)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return real(job, stream, step, *args, measures=measures, **kw)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(trainer.training.loop, "train_step", strict)
    captured = run(settings(shapes_cache, method, cuda_graphs=True, **common), tmp_path / "captured")
    assert counters["stats"]["unique_graphs"] == (1 if method == "none" else 2)
    assert not counters["graph_break"] and not counters["inductor"]["cudagraph_skips"]
    assert len(watched) > 8
    assert losses(captured) == pytest.approx(losses(compiled), rel=1e-4)


@needs_gpu
@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("method", ["none", "ahpa", "sra"])
def test_recomputation_holds_less_on_a_gpu(shapes_cache: Path, tmp_path: Path, method: str) -> None:
    peaks = []
    for recompute in ("none", "blocks"):
        torch.cuda.reset_peak_memory_stats()
        common: dict[str, Any] = {"device": "cuda", "compile": False, "model": "SiT-S/2", "batch_size": 24}
        run(settings(shapes_cache, method, steps=2, recompute=recompute, **common), tmp_path / recompute)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0]
