"""What the log says of the machine: waiting for data, memory, operations per second."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Listener, log_of, settings

import featcache
import featcache.torch.feed
from featcache.machine import peak_rss_bytes
from trainer.distributed import World
from trainer.models import forward_flops
from trainer.report.data import load_run
from trainer.report.report import _log_keys
from trainer.training import usage
from trainer.training.flops import PEAK_TFLOPS, peak_tflops, training_flops
from trainer.training.loop import train
from trainer.training.state import assemble
from trainer.training.usage import in_words

CPU = torch.device("cpu")


class Records(Listener):
    """Keeps what is told at lines of the log."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[list[str], list[str]]] = []

    def record(self, count: int, numbers: Any, more: Any = ()) -> None:
        self.told.append((list(numbers), list(more)))
        super().record(count, numbers, more)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("slow", [False, True])
def test_waiting_for_data_is_a_share_of_the_time(
    shapes_cache: Path, tmp_path: Path, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a reader of 0.2 s nearly all is waiting; with steps of 0.2 s, for which everything is there, nearly nothing."""
    where = featcache.torch.feed.Feed if slow else torch.optim.AdamW
    name = "_read" if slow else "step"
    real = getattr(where, name)

    def slowly(*args: Any, **kw: Any) -> Any:
        time.sleep(0.2)
        return real(*args, **kw)

    monkeypatch.setattr(where, name, slowly)
    watcher = Records()
    config = settings(shapes_cache, steps=12, log_every=6)
    records = log_of(train(config, resume=False, watcher=watcher, root=tmp_path))
    assert "data_wait" not in records[0], "the first line is about starting"
    shares = [record["data_wait"] for record in records[1:]]
    assert len(shares) == 2 and all(0 <= share <= 1 for share in shares)
    assert min(shares) > 0.5 if slow else max(shares) < 0.2
    told = f"{100 * shares[-1]:.0f} % waiting for data"
    numbers, more = watcher.told[-1]
    assert numbers[1] == told and numbers[0].endswith(" images/s") and numbers[2].startswith("loss ")
    assert any(part.startswith("denoise ") for part in more)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("method", ["none", "sara"])
def test_operations_per_second_are_the_step_s(
    streams_cache: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "COUNT_AFTER_S", 0.0)
    config = settings(streams_cache, method, steps=6, log_every=2, align_until=4 if method != "none" else None)
    run = train(config, resume=False, watcher=Records(), root=tmp_path)
    records = log_of(run)
    cache = featcache.open(streams_cache)
    parts = assemble(config, cache, CPU, World())
    aligned, plain = (training_flops(parts, cache, aligned=kind) for kind in (True, False))
    # The step's own count: three times the forward pass, less the gradient of the input, which nobody asks for.
    assert plain == pytest.approx(3 * forward_flops(parts.model.cfg), rel=0.05)
    assert aligned > plain if method != "none" else aligned == plain
    for record, flops in zip(records[1:], (aligned, aligned, plain)):
        assert record["tflop_per_s"] == pytest.approx(flops * record["images_per_s"] / 1e12, abs=1e-4)
    assert not any("mfu" in record for record in records), "nobody knows the CPU's peak"
    assert all(record["rss_bytes"] <= peak_rss_bytes() for record in records)
    keys = {key for key, _, _ in _log_keys([load_run(run)])}
    assert {"images_per_s", "data_wait"} <= keys


@pytest.mark.usefixtures("nano")
def test_counting_runs_nothing_of_the_run_s_own_model(shapes_cache: Path) -> None:
    """Neither the teacher, which may be split over ranks that are not counting now, nor what is compiled around the model."""
    parts = assemble(settings(shapes_cache, "sra"), featcache.open(shapes_cache), CPU, World())
    expected = training_flops(parts, featcache.open(shapes_cache))

    def refuse(*args: Any, **kw: Any) -> None:
        raise AssertionError("that is the run's own")

    for model in (parts.model, parts.ema):
        model.register_forward_pre_hook(refuse)
    assert training_flops(parts, featcache.open(shapes_cache)) == expected
    parts.objective.compile_around_the_model()
    parts.objective._before.register_forward_pre_hook(refuse)  # type: ignore[attr-defined]
    assert training_flops(parts, featcache.open(shapes_cache)) == expected


@pytest.mark.usefixtures("nano")
def test_what_cannot_be_counted_is_said_once(
    shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kw: Any) -> float:
        raise RuntimeError("no fake of this operation")

    monkeypatch.setattr(usage, "COUNT_AFTER_S", 0.0)
    monkeypatch.setattr(usage, "training_flops", fail)
    watcher = Records()
    records = log_of(train(settings(shapes_cache, steps=5), resume=False, watcher=watcher, root=tmp_path))
    assert len(records) == 5 and not any("tflop_per_s" in record for record in records)
    assert len([note for note in watcher.warnings if "no MFU: no fake of this operation" in note]) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("nano")
def test_counting_leaves_the_training_as_it_is(
    shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a bit of the numbers, and not a graph more of a compiled step."""
    from torch._dynamo.utils import counters

    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, **kw: real(m, **kw, backend="eager"))
    found = {}
    for name, after in (("with", 0.0), ("without", 1e9)):
        torch.compiler.reset()
        counters.clear()
        monkeypatch.setattr(usage, "COUNT_AFTER_S", after)
        config = settings(shapes_cache, "ahpa", steps=8, log_every=2, align_until=6, compile=True, name=name)
        records = log_of(train(config, resume=False, watcher=Records(), root=tmp_path))
        assert ("tflop_per_s" in records[-1]) == (name == "with")
        graphs = counters["stats"]["unique_graphs"]
        found[name] = (graphs, dict(counters["graph_break"]), [(r["loss"], r["grad_norm"]) for r in records])
    assert found["with"] == found["without"] and found["with"][:2] == (2, {})


def test_peaks_are_known_by_the_device_s_name() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989 and peak_tflops("NVIDIA H100 80GB HBM3", "fp32") == 494
    assert peak_tflops("NVIDIA H100 PCIe") == 756 and peak_tflops("NVIDIA H200") == 989
    assert peak_tflops("NVIDIA H200 NVL") == 835 and peak_tflops("NVIDIA A100-SXM4-80GB") == 312
    assert peak_tflops("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None and peak_tflops("A card of tomorrow") is None
    names = list(PEAK_TFLOPS)
    for i, name in enumerate(names):
        assert not any(earlier in name for earlier in names[:i]), "an earlier name would be taken for it"


def test_details_stay_in_the_log() -> None:
    record = {"step": 3, "images_per_s": 120.4, "data_wait": 0.126, "mfu": 0.414, "loss": 0.5}
    shown = {"loss": 0.5, "denoise": 0.4, "metric/similarity": 0.3, "metric/router/G3 t=0.5": 0.2}
    numbers, more = in_words(record, shown)
    assert numbers == ["120 images/s", "13 % waiting for data", "loss 0.5"]
    assert more == ["MFU 41 %", "denoise 0.4", "metric/similarity 0.3"]
