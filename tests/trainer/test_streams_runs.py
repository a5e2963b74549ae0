"""Runs with streams: trained by every method, resumed to the bit, compiled as one region, and free of waiting."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_step_cost import FETCHES, READS, counted
from tiny_runs import Listener, assert_identical, keep_only, log_of, losses, settings
from torch._dynamo.utils import counters

import featcache
from featcache.errors import UserError
from featcache.progress import Quiet
from featcache.read.normalization import compute, load, save
from trainer.requests import SampleRequest
from trainer.runs import folder as runs
from trainer.runs.config import RunConfig
from trainer.runs.log import OF_THE_MACHINE
from trainer.runs.normalization import streams_of_run
from trainer.sampling.draw import load_run
from trainer.sampling.run import sample_run
from trainer.training.loop import train

CLS, PCA = "tiny@5.cls", "tiny@5.pca4"
LAYOUTS: dict[str, dict[str, Any]] = {
    "latents": {},
    "own": {CLS: {"weight": 0.03, "normalization": "none"}},
    "merged": {PCA: {"dropout": 0.3}},
}
BACKBONES = ("SiT-Nano/2", "DiT-Nano/2", "LightningDiT-Nano/2")
METHODS = ("none", "repa", "sara", "dya", "ahpa", "sra", "sra2", "ahpa+sra", "repa+sra2", "sara+dya")
# One of each method, backbone and layout beside every other backbone's and layout's; the rest are slow together.
QUICK = {(method, BACKBONES[k % 3], tuple(LAYOUTS)[(k + k // 3) % 3]) for k, method in enumerate(METHODS)}


def run(config: RunConfig, root: Path, *, resume: bool = False) -> Path:
    return train(config, resume=resume, watcher=Listener(), root=root)


def grid() -> list[Any]:
    every = [(m, b, l) for m in METHODS for b in BACKBONES for l in LAYOUTS]
    return [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow) for c in every]


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(("method", "backbone", "layout"), grid())
def test_every_method_trains_beside_streams(
    streams_cache: Path, tmp_path: Path, method: str, backbone: str, layout: str
) -> None:
    """Two steps with finite losses, each stream's among them; DiT has no tokens of streams, and says so."""
    config = settings(streams_cache, method, model=backbone, steps=2, streams=LAYOUTS[layout], batch_size=2)
    if backbone.startswith("DiT") and layout == "own":
        with pytest.raises(UserError, match="would have tokens of its own") as error:
            run(config, tmp_path)
        assert "SiT or LightningDiT" in str(error.value.remedy)
        assert not (tmp_path / "run").exists()
        return
    records = log_of(run(config, tmp_path))
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        assert all(math.isfinite(v) for k, v in record.items() if isinstance(v, float)), record
        assert {k for k in record if k.startswith("denoise/")} == {f"denoise/{name}" for name in LAYOUTS[layout]}
        total = sum(v for k, v in record.items() if k.startswith(("denoise", "align/")) and k != "align/adversary")
        assert total == pytest.approx(record["loss"], rel=1e-5)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    ("method", "backbone"),
    [
        ("reg", "SiT-Nano/2"),
        pytest.param("redi", "DiT-Nano/2", marks=pytest.mark.slow),
        pytest.param("redi+reg", "LightningDiT-Nano/2", marks=pytest.mark.slow),
        pytest.param("redi+repa", "SiT-Nano/2", marks=pytest.mark.slow),
        pytest.param("reg+ahpa", "SiT-Nano/2", marks=pytest.mark.slow),
        pytest.param("reg+sara", "LightningDiT-Nano/2", marks=pytest.mark.slow),
        pytest.param("redi+reg+sra2+dya", "SiT-Nano/2", marks=pytest.mark.slow),
    ],
)
def test_reg_and_redi_train_and_are_drawn_from(streams_cache: Path, tmp_path: Path, method: str, backbone: str) -> None:
    path = run(settings(streams_cache, method, model=backbone, steps=2, batch_size=2), tmp_path)
    assert all(math.isfinite(loss) for loss in losses(path))
    config = runs.load_config(path)
    wanted = {CLS: ("own", 0.03, "none")} if "reg" in method.split("+") else {}
    wanted |= {PCA: ("merged", 1.0, "none")} if "redi" in method.split("+") else {}
    found = {name: (o["embed"], o["weight"], o["normalization"]) for name, o in config.streams.items() if o}
    assert found == wanted
    sampler = "ddim" if backbone.startswith("DiT") else "sde"
    request = SampleRequest(num=2, sampler=sampler, steps=2, device="cpu", guidance=1.5, stream_guidance=1.2)
    images = np.load(sample_run(path, request, Quiet()).images)["arr_0"]
    assert images.shape == (2, 64, 64, 3)


MIXED: dict[str, Any] = {
    CLS: {"normalization": "channel", "weight": 0.1, "dropout": 0.2},
    PCA: {"normalization": "position"},
    "tiny@2": {"embed": "own", "normalization": "none", "weight": 0.2},
}


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("none", {"streams": MIXED}),
        ("redi+reg", {"align": {"reg": {"head_width": 24}, "redi": {"dropout": 0.4}}, "precision": "bf16"}),
    ],
)
def test_resuming_at_every_step_changes_nothing(
    streams_cache: Path, tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    """Statistics that the run computed are its own from then on, to the bit."""
    common = {"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 4}
    config = settings(streams_cache, method, **common, **changes)
    whole = run(config, tmp_path / "whole")
    for step in (1, 3):
        root = tmp_path / f"from-{step}"
        keep_only(whole, step, root / "run")
        listener = Listener()
        resumed = train(config, resume=True, watcher=listener, root=root)
        assert not any("computing" in note for note in listener.warnings)
        assert_identical(whole, resumed, 4)
        first, second = (
            [{k: v for k, v in r.items() if k not in OF_THE_MACHINE} for r in log_of(x)] for x in (whole, resumed)
        )
        assert first == second
    kept = streams_of_run(whole, runs.load_config(whole))
    assert set(kept) == ({CLS, PCA} if method == "none" else set())
    for name, found in kept.items():
        wanted = compute(featcache.open(streams_cache), name, MIXED[name]["normalization"])
        assert found.feature == name and found.fingerprint == wanted.fingerprint
        assert torch.equal(found.mean.flatten(), wanted.mean.flatten())
        assert torch.equal(found.std.flatten(), wanted.std.flatten())


@pytest.mark.usefixtures("nano")
def test_streams_leave_the_latents_of_a_step_as_they_are(streams_cache: Path, tmp_path: Path) -> None:
    """A fresh backbone predicts zero, so the first step's loss of the latents is the same to the bit beside any stream."""
    first = [
        losses(run(settings(streams_cache, steps=1, streams=streams, name=name), tmp_path), "denoise")
        for name, streams in {**LAYOUTS, "mixed": MIXED}.items()
    ]
    assert first[0] == first[1] == first[2] == first[3]


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    ("method", "changes", "graphs"),
    [
        ("reg", {}, 2),
        pytest.param("redi", {"align": {"redi": {"dropout": 0.4}}}, 1, marks=pytest.mark.slow),
        pytest.param("none", {"streams": MIXED}, 1, marks=pytest.mark.slow),
        pytest.param("redi", {"model": "DiT-Nano/2"}, 1, marks=pytest.mark.slow),
        pytest.param("redi+reg", {"accumulate": 2, "precision": "bf16"}, 2, marks=pytest.mark.slow),
        pytest.param("reg", {"model": "LightningDiT-Nano/2", "streams": MIXED}, 2, marks=pytest.mark.slow),
    ],
)
def test_a_step_is_one_compiled_region(
    streams_cache: Path,
    tmp_path: Path,
    method: str,
    changes: dict[str, Any],
    graphs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As without streams: one graph with alignment, one without, nothing between them."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, **kw: real(m, **kw, backend="eager"))
    torch.compiler.reset()
    counters.clear()
    common = {"steps": 5, "log_every": 2, "align_until": 3, "seed": 2, **changes}
    compiled = run(settings(streams_cache, method, compile=True, **common), tmp_path / "compiled")
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    eager = run(settings(streams_cache, method, **common), tmp_path / "eager")
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-4)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    ("method", "changes"),
    [("reg", {}), ("redi", {"align": {"redi": {"dropout": 0.4}}}), ("none", {"streams": MIXED, "accumulate": 2})],
)
def test_nothing_is_read_back_but_at_logging_steps(
    streams_cache: Path, tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    streams = {**changes.get("streams", {})}
    for name, options in streams.items():  # computed beforehand: that is no part of a step
        if options["normalization"] != "none":
            file = tmp_path / f"{name}.safetensors"
            save(compute(featcache.open(streams_cache), name, options["normalization"]), file)
            streams[name] = {**options, "statistics": str(file)}
    config = settings(streams_cache, method, steps=5, log_every=4, **{**changes, "streams": streams})
    steps = counted(config, tmp_path)
    reading = [step for step, done in enumerate(steps, start=1) if any(done[n] for n in (*READS, *FETCHES))]
    assert reading == [1, 4, 5]


@pytest.mark.usefixtures("nano")
def test_after_the_stop_reg_reads_the_class_token_alone(
    streams_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import featcache.torch.feed

    read: list[set[str]] = []
    real = featcache.torch.feed.Feed._read

    def watched(self: Any, reader: Any, *args: Any) -> None:
        read.append(set(reader.arrays))
        real(self, reader, *args)

    monkeypatch.setattr(featcache.torch.feed.Feed, "_read", watched)
    path = run(settings(streams_cache, "reg", steps=4, align_until=2), tmp_path)
    assert all(any(name.startswith("tiny@5/") for name in names) or "tiny@5" in names for names in read[:2]), read
    assert all(not any(n.split("/")[0] == "tiny@5" for n in names) for names in read[2:]), read
    assert all(any(CLS in name for name in names) for names in read)
    assert "align/cosine" not in log_of(path)[-1] and f"denoise/{CLS}" in log_of(path)[-1]


@pytest.mark.usefixtures("nano")
def test_statistics_of_a_file_are_the_run_s_own_afterwards(streams_cache: Path, tmp_path: Path) -> None:
    """As those of latents: the file may be gone, and the run goes on by its settings, or by what was typed."""
    mine = tmp_path / "mine.safetensors"
    save(compute(featcache.open(streams_cache), CLS, "channel"), mine)
    common = {"checkpoint_every": 1, "keep_checkpoints": 4}
    given = {CLS: {"statistics": str(mine)}}
    path = run(settings(streams_cache, steps=2, streams=given, **common), tmp_path / "whole")
    computed = run(settings(streams_cache, steps=2, streams={CLS: {}}, **common), tmp_path / "computed")
    assert_identical(path, computed, 2)
    run(settings(streams_cache, steps=3, streams=given, **common), tmp_path / "whole", resume=True)
    mine.unlink()
    run(settings(streams_cache, steps=4, streams={CLS: {}}, **common), tmp_path / "whole", resume=True)
    config = dataclasses.replace(runs.load_config(path), steps=5)
    run(config, tmp_path / "whole", resume=True)
    assert len(losses(path)) == 5
    kept = load(path / f"normalization-{CLS}.safetensors")
    other = dataclasses.replace(kept, mean=kept.mean + 1)
    save(other, mine)
    with pytest.raises(UserError, match="started with other statistics") as error:
        run(settings(streams_cache, steps=6, streams=given, **common), tmp_path / "whole", resume=True)
    assert f"streams.{CLS}.statistics" in str(error.value.remedy)


@pytest.mark.usefixtures("nano")
def test_streams_keep_their_order(streams_cache: Path, tmp_path: Path) -> None:
    """Weights go by it: two class tokens of one width could be taken for each other."""
    streams: dict[str, Any] = {CLS: {}, "tiny@2": {"embed": "own"}}
    path = run(settings(streams_cache, steps=1, streams=streams), tmp_path)
    assert [s.name for s in load_run(path).model.cfg.streams] == list(streams)
    turned = dict(reversed(streams.items()))
    with pytest.raises(UserError, match="was started with streams"):
        run(settings(streams_cache, steps=2, streams=turned), tmp_path, resume=True)
    run(settings(streams_cache, steps=2, streams=streams), tmp_path, resume=True)


@pytest.mark.usefixtures("nano")
def test_what_a_killed_start_left_of_a_stream_s_statistics_goes(streams_cache: Path, tmp_path: Path) -> None:
    part = tmp_path / "run" / f"normalization-{CLS}.safetensors.{'0' * 16}.part"
    part.parent.mkdir()
    part.write_bytes(b"half")
    run(settings(streams_cache, steps=1, streams={CLS: {}}), tmp_path)
    assert not part.exists()
