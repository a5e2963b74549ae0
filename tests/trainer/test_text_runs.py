"""Runs of a model that takes text: by every method, resumed to the bit, branched, compiled as one region, told rightly, as
they are typed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_branches import branched
from test_condition import assembled, text_settings
from test_step_cost import FETCHES, READS, counted
from tiny_runs import Listener, assert_identical, checkpoint_files, keep_only, log_of, losses, settings
from torch._dynamo.utils import counters
from typer.testing import CliRunner

import featcache
from featcache.errors import CacheError, UserError
from featcache.inspect import find_captions
from trainer import align
from trainer.align import config_class
from trainer.align.base import BackboneInfo, FeatureInfo
from trainer.cli import app
from trainer.models import TextShape, forward_flops, model_config
from trainer.runs.config import RunConfig
from trainer.runs.folder import load_config
from trainer.runs.log import OF_THE_MACHINE
from trainer.sampling.draw import load_run
from trainer.sampling.grid import row_names
from trainer.training import grids
from trainer.training.flops import training_flops
from trainer.training.loop import train
from trainer.training.memory import activation_bytes

METHODS = ("none", "repa", "ahpa", "sra", "sra2", "sara", "dya", "ahpa+sra")


def run(config: RunConfig, root: Path, *, resume: bool = False) -> Path:
    return train(config, resume=resume, watcher=Listener(), root=root)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_text(text_cache: Path, tmp_path: Path, method: str) -> None:
    path = run(text_settings(text_cache, method, steps=2, batch_size=2), tmp_path)
    for record in log_of(path):
        assert all(math.isfinite(v) for k, v in record.items() if isinstance(v, float)), record
        total = sum(v for k, v in record.items() if k.startswith(("denoise", "align/")) and k != "align/adversary")
        assert total == pytest.approx(record["loss"], rel=1e-5)
    assert load_config(path).condition == "text/tiny"
    loaded = load_run(path)
    assert loaded.model.cfg.text == TextShape(name="text/tiny", tokens=16, width=64)
    assert loaded.null is not None and loaded.null.shape == (16, 64)


@pytest.mark.usefixtures("nano")
def test_a_run_learns_what_text_says(tmp_path: Path, text_cache: Path) -> None:
    """The gradient reaches the text's half: its embedding moves, and so does each joint block."""
    path = run(text_settings(text_cache, steps=2, checkpoint_every=1), tmp_path)
    first, second = (checkpoint_files(path, step)["model"] for step in (1, 2))
    assert not torch.equal(first["context_embedder.weight"], second["context_embedder.weight"])
    for i in range(4):
        name = f"blocks.{i}.context_block.attn.qkv.weight"
        assert not torch.equal(first[name], second[name])


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    ("method", "graphs"), [("none", 1), *(pytest.param(m, 2, marks=pytest.mark.slow) for m in METHODS[1:])]
)
def test_a_step_is_one_compiled_region(
    text_cache: Path, tmp_path: Path, method: str, graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, **kw: real(m, **kw, backend="eager"))
    torch.compiler.reset()
    counters.clear()
    common = {"steps": 5, "log_every": 2, "align_until": 3, "seed": 2}
    compiled = run(text_settings(text_cache, method, compile=True, **common), tmp_path / "compiled")
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    eager = run(text_settings(text_cache, method, **common), tmp_path / "eager")
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-4)


@pytest.mark.usefixtures("nano")
def test_nothing_is_read_back_but_at_logging_steps(text_cache: Path, tmp_path: Path) -> None:
    steps = counted(text_settings(text_cache, "repa", steps=5, log_every=4), tmp_path)
    reading = [step for step, done in enumerate(steps, start=1) if any(done[n] for n in (*READS, *FETCHES))]
    assert reading == [1, 4, 5]


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("sara", {"precision": "bf16", "label_dropout": 0.5, "zero_init": True}),
        pytest.param("ahpa+sra", {"accumulate": 2, "normalization": "channel"}, marks=pytest.mark.slow),
    ],
)
def test_resuming_at_every_step_changes_nothing(
    text_cache: Path, tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    config = text_settings(text_cache, method, steps=4, checkpoint_every=1, keep_checkpoints=4, **changes)
    whole = run(config, tmp_path / "whole")
    for step in (1, 3):
        root = tmp_path / f"from-{step}"
        keep_only(whole, step, root / "run")
        resumed = run(config, root, resume=True)
        assert_identical(whole, resumed, 4)
        first, second = (
            [{k: v for k, v in r.items() if k not in OF_THE_MACHINE} for r in log_of(x)] for x in (whole, resumed)
        )
        assert first == second


@pytest.mark.usefixtures("nano")
def test_recomputed_blocks_give_the_same_bits(text_cache: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"steps": 3, "checkpoint_every": 3}
    plain = run(text_settings(text_cache, "repa", **common), tmp_path / "plain")
    again = run(text_settings(text_cache, "repa", recompute="blocks", **common), tmp_path / "again")
    assert_identical(plain, again, 3)


@pytest.mark.usefixtures("nano")
def test_a_branch_equals_its_origin_and_none_changes_the_condition(text_cache: Path, tmp_path: Path) -> None:
    config = text_settings(text_cache, "repa", steps=6, checkpoint_every=3, keep_checkpoints=9)
    whole = run(config, tmp_path)
    copy = branched("run@3", tmp_path)
    assert_identical(whole, copy, 6)
    assert (copy / "empty_text.safetensors").read_bytes() == (whole / "empty_text.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"SiT-Nano/2 takes labels, and the condition is to be text/tiny"):
        branched("run@3", tmp_path, name="other", model="SiT-Nano/2")


@pytest.mark.usefixtures("nano")
def test_a_label_run_beside_text_reads_no_text(
    text_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import featcache.torch.feed

    read: list[set[str]] = []
    real = featcache.torch.feed.Feed._read

    def watched(self: Any, reader: Any, *args: Any) -> None:
        read.append(set(reader.arrays))
        real(self, reader, *args)

    monkeypatch.setattr(featcache.torch.feed.Feed, "_read", watched)
    run(settings(text_cache, steps=2), tmp_path / "labels")
    run(text_settings(text_cache, steps=2), tmp_path / "text")
    of_labels, of_text = set().union(*read[:2]), set().union(*read[-2:])
    assert of_labels == {"vae/moments", "label"}
    assert of_text == {"vae/moments", "text/tiny", "text/count"}


def test_depths_of_the_methods() -> None:
    """L's as SiT-L (24 blocks both), SRA 8 -> 16; other sizes keep L's share of the blocks."""
    features = {"e@9": FeatureInfo(shape=(256, 8)), "e@11": FeatureInfo(shape=(256, 8))}
    features |= {f"vae/{group}": FeatureInfo(shape=(4, 256, 8)) for group in ("G3", "G4")}

    def depths(method: str, depth: int, size: str) -> tuple[int, ...]:
        info = BackboneInfo(
            name=f"MMDiT-{size}/2", depth=depth, width=32 * depth, patch_size=2, latent_channels=4, latent_size=32
        )
        options: dict[str, Any] = {"head_width": 8} if method in ("repa", "sra2", "sara", "dya") else {}
        options |= {"discriminator_weights": "random"} if method == "sara" else {}
        with torch.device("meta"):
            built: Any = align.build([(method, config_class(method)(**options))], info, features)
        return (*built.taps, built.teacher_depth) if method == "sra" else built.taps

    assert {m: depths(m, 24, "L") for m in METHODS[1:-1]} == {
        "repa": (8,),
        "sra2": (8,),
        "sara": (8,),
        "dya": (8,),
        "sra": (8, 16),
        "ahpa": (6,),
    }
    assert depths("sra", 6, "Ti") == (2, 4)
    assert depths("repa", 16, "B") == (5,)
    assert depths("repa", 28, "XL") == (9,)


@pytest.mark.usefixtures("nano")
def test_operations_of_a_step_are_three_forward_passes(text_cache: Path) -> None:
    parts, cache = assembled(text_cache)
    assert training_flops(parts, cache) == pytest.approx(3 * forward_flops(parts.model.cfg), rel=0.05)


@pytest.mark.parametrize("name", ["MMDiT-Ti/2", pytest.param("MMDiT-L/2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("low", [False, True])
def test_what_autograd_keeps_is_told_within_a_tenth(name: str, low: bool) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from trainer.models.mmdit import MMDiT

    text = TextShape(name="text/clip-l", tokens=77, width=768)
    cfg = model_config(name, latent_channels=4, latent_size=32, num_classes=1, text=text)

    def kept(batch: int) -> int:
        held: dict[int, Any] = {}
        with FakeTensorMode():
            model = MMDiT(cfg)
            own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}

            def pack(tensor: Any) -> Any:
                storage = tensor.untyped_storage()
                if storage._cdata not in own:
                    held[storage._cdata] = storage
                return tensor

            given = torch.randn(batch, *cfg.latent_shape), torch.rand(batch), torch.randn(batch, 77, 768)
            hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
            with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
                out = model(*given)
            assert out.prediction is not None
            return sum(storage.nbytes() for storage in held.values())

    assert activation_bytes(cfg, low=low, compiled=False) == pytest.approx(kept(3) - kept(2), rel=0.1)


@pytest.mark.usefixtures("nano")
def test_what_a_run_is_about_is_told(text_cache: Path, tmp_path: Path) -> None:
    listener = Listener()
    train(text_settings(text_cache, steps=1), resume=False, watcher=listener, root=tmp_path)
    (told,) = [note for note in listener.warnings if note.startswith("training begins")]
    assert "none on MMDiT-Nano/2" in told
    assert "24 images of up to 2 captions each (text/tiny), 64 x 64 pixels" in told
    features = featcache.open(text_cache).features
    row = features["vae/moments"].bytes_per_sample + features["text/tiny"].bytes_per_sample // 2 + 4
    assert f"reads {4 * row / 1e3:.3g} KB a step" in told


@pytest.mark.usefixtures("nano")
def test_grids_are_of_the_first_captions_which_stand_below(
    text_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grids, "GRID_ROWS", 2)
    path = run(text_settings(text_cache, steps=2, sample_every=2), tmp_path)
    with Image.open(path / "samples" / "step_0000002.png") as image:
        assert image.size[0] == 8 * 128, "tiles of 64 pixels are enlarged"
        picture, names = np.asarray(image), row_names(image)
    step = picture.shape[0] // 2
    assert 128 < step < 256
    cache = featcache.open(text_cache)
    assert names == [captions[0] for captions in find_captions(cache, [0, 1]) or ()] and len(names) == 2
    assert not np.array_equal(picture[:128], picture[step : step + 128])
    assert (picture[128:step] < 128).any() and (picture[128:step] == 255).any(), "words on white"
    # Where captions are not the images' own, the images' keys stand there.
    keys = [key.decode() if isinstance(key, bytes) else key for key in list(cache.keys())[:2]]
    monkeypatch.setattr(grids, "find_captions", lambda cache, indices: None)
    assert grids._captions(cache, np.arange(2)) == keys


@pytest.mark.slow
@pytest.mark.usefixtures("nano")
def test_small_evaluations_draw_from_captions(text_cache: Path, tmp_path: Path) -> None:
    from trainer.evaluate.during import small_judge

    config = text_settings(text_cache, steps=2, eval_every=2, eval_num=8, eval_extractor="embedded")
    path = train(config, resume=False, watcher=Listener(), root=tmp_path, make_judge=small_judge)
    record = log_of(path)[-1]
    assert {"eval/embedded-FID", "eval/embedded-KID"} <= record.keys()


def typed(*words: str) -> Any:
    return CliRunner().invoke(app, [*words])


QUICK = ("--steps", "2", "--batch-size", "2", "--device", "cpu", "--set", "sample_every=0")


@pytest.mark.usefixtures("nano")
def test_as_typed(text_cache: Path, shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = ("--model", "MMDiT-Nano/2")
    done = typed("run", *model, "--condition", "text/tiny", "--cache", str(text_cache), "--name", "a", *QUICK)
    assert done.exit_code == 0, done.output
    assert load_config(Path("runs/a")).condition == "text/tiny"
    again = typed("run", *model, "--cache", str(text_cache), "--name", "a", "--resume", *QUICK, "--steps", "3")
    assert again.exit_code == 0, again.output
    for words, said in (
        (("--model", "SiT-Nano/2", "--condition", "text/tiny", "--cache", str(text_cache)), "takes labels"),
        ((*model, "--cache", str(shapes_cache)), "--text clip-l"),
        ((*model, "--condition", "text/t5", "--cache", str(text_cache)), "does not hold text/t5"),
        ((*model, "--method", "reg", "--cache", str(text_cache)), "draws latents alone"),
    ):
        failed = typed("run", *words, *QUICK)
        assert failed.exit_code != 0
        assert isinstance(failed.exception, SystemExit | UserError | CacheError)
        shown = failed.output + str(failed.exception) + str(getattr(failed.exception, "remedy", ""))
        assert said in shown.replace("\n", " "), shown


@pytest.mark.slow
@pytest.mark.usefixtures("nano")
def test_diagnostics_of_a_text_run(text_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = text_settings(text_cache, "ahpa+sra", steps=3, checkpoint_every=1, keep_checkpoints=3)
    path = run(config, tmp_path / "runs")
    done = typed(
        "analyze", str(path), "--set", "samples=16", "--set", "bins=2", "--set", "batch_size=8", "--device", "cpu"
    )
    assert done.exit_code == 0, done.output
