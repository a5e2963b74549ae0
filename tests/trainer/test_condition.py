"""Text as the condition: what stands in for it, what it is guided against, which of a cache it is, and the run's own copy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_mmdit import TINY, batch
from test_step import CPU, Spy, numbers
from tiny_runs import Listener
from tiny_runs import settings as run_settings
from torch import Tensor

import featcache
from featcache.errors import CacheError, UserError
from featcache.inspect import read_feature
from featcache.read.captions import one_caption
from featcache.read.order import stream_captions
from trainer.diffusion.guidance import Guidance, guided
from trainer.diffusion.transport import build_transport
from trainer.distributed import World
from trainer.interval import Interval
from trainer.models import TextShape, build_model
from trainer.runs import empty_text
from trainer.runs.cache import find_cache, fitted
from trainer.runs.config import RunConfig
from trainer.runs.normalization import Normalization
from trainer.runs.text import NEEDED, is_text, text_shape
from trainer.sampling.draw import SampleConfig, draw_latents
from trainer.training.conditions import Labels, TextRows, build_condition, cached_conditions
from trainer.training.loop import train
from trainer.training.objective import Objective
from trainer.training.state import Parts, assemble

MODEL = "MMDiT-Nano/2"


def text_settings(cache: Path | str, method: str = "none", **kw: Any) -> RunConfig:
    return run_settings(cache, method, **{"model": MODEL, **kw})


def assembled(path: Path, method: str = "none", **kw: Any) -> tuple[Parts, featcache.Cache]:
    cache = featcache.open(path)
    return assemble(text_settings(path, method, **kw), cache, CPU, World()), cache


def stored(cache: featcache.Cache, names: list[str], indices: Any, captions: Any = None) -> dict[str, Tensor]:
    with cache.reader(names, single_view=True, single_caption=True) as reader:
        out = reader.allocate(len(indices))
        reader.read(np.asarray(indices), out, captions=captions)
    return {name: torch.from_numpy(array) for name, array in out.items()}


@pytest.mark.usefixtures("nano")
def test_text_dropout_has_its_share_and_replaces_the_whole_text(text_cache: Path) -> None:
    parts, cache = assembled(text_cache)
    spy: Any = Spy(parts.model.cfg)
    objective = Objective(
        spy, None, parts.objective._features, normalization=Normalization(scale=1, shift=0),
        transport=build_transport("sit"), label_dropout=0.1, autocast=None, condition=parts.objective.condition,
    )  # fmt: skip
    n = 5000
    one = stored(cache, ["vae/moments", "text/tiny", "text/count"], range(1))
    draws = numbers(n)
    objective({name: value.expand(n, *value.shape[1:]) for name, value in one.items()}, draws)
    (call,) = spy.calls
    empty = torch.from_numpy(cache.features["text/tiny"].empty_text())
    rows = torch.from_numpy(read_feature(cache, "text/tiny", [0]))[0, 0]
    dropped = (call["y"] == empty).flatten(1).all(1)
    assert torch.equal(dropped, draws.drop < 0.1)
    assert abs(dropped.float().mean() - 0.1) < 4 * (0.09 / n) ** 0.5
    assert (call["y"][~dropped] == rows).all()
    assert not torch.equal(rows, empty)


def test_images_without_captions_always_have_the_text_of_nothing(text_cache: Path) -> None:
    cache = featcache.open(text_cache)
    cfg = replace(TINY, text=TextShape(name="text/tiny", tokens=16, width=64))
    condition = build_condition(cfg, cache)
    assert isinstance(condition, TextRows)
    given = stored(cache, list(condition.reads), range(4))
    given["text/count"] = torch.tensor([2, 0, 1, 0], dtype=torch.int32)
    made = condition(given, torch.tensor([False, False, True, True]))
    rows = torch.from_numpy(read_feature(cache, "text/tiny", list(range(4))))[:, 0]
    assert torch.equal(made[0], rows[0])
    assert all(torch.equal(made[i], condition.empty) for i in (1, 2, 3))
    assert made.dtype == torch.float32


def test_labels_are_as_ever() -> None:
    made = Labels(10)({"label": torch.tensor([3, 4])}, torch.tensor([False, True]))
    assert made.tolist() == [3, 10]


@pytest.mark.usefixtures("nano")
def test_each_visit_draws_one_of_the_captions(
    text_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a function of (seed, position): what the model is given, against the cache read whole."""
    seen: list[Tensor] = []
    real = TextRows.forward

    def kept(self: TextRows, *given: Any) -> Tensor:
        seen.append(real(self, *given))
        return seen[-1]

    monkeypatch.setattr(TextRows, "forward", kept)
    config = text_settings(text_cache, steps=3, label_dropout=0.0, seed=5)
    train(config, resume=False, watcher=Listener(), root=tmp_path)
    cache = featcache.open(text_cache)
    from featcache.read.order import stream_indices

    order = stream_indices(0, 12, count=len(cache), seed=5)
    chosen = stream_captions(0, 12, counts=np.full(12, 2), seed=5)
    assert set(chosen.tolist()) == {0, 1}
    expected = torch.from_numpy(read_feature(cache, "text/tiny", order.tolist()))[
        torch.arange(12), torch.from_numpy(chosen)
    ]
    steps = [value for value in seen if len(value) == 4][:3]
    assert torch.equal(torch.cat(steps), expected)


@pytest.mark.usefixtures("nano")
def test_the_teacher_has_the_same_text(text_cache: Path) -> None:
    parts, cache = assembled(text_cache, "sra", label_dropout=0.5)
    student: Any = Spy(parts.model.cfg)
    teacher: Any = Spy(parts.model.cfg)
    parts.objective.model, parts.objective._teacher = student, [teacher]
    parts.objective(stored(cache, list(parts.reads), range(8)), numbers(8))
    (seen,), (taught,) = student.calls, teacher.calls
    assert seen["y"].shape == (8, 16, 64)
    assert torch.equal(seen["y"], taught["y"])


@given(scale=st.floats(1.1, 8), channels=st.sampled_from([None, 1, 3]))
@settings(max_examples=10, deadline=None)
@torch.no_grad()
def test_guidance_is_against_the_text_of_nothing(scale: float, channels: int | None) -> None:
    """u + w (c - u) with two separate evaluations, in float64."""
    model = build_model(TINY, seed=4).double()
    x, _, text = batch(TINY)
    null = torch.randn(5, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    model_fn = guided(model, text, null=null, guidance=Guidance(scale=scale, channels=channels))
    t = torch.full((3,), 0.4, dtype=torch.float64)
    c, u = model(x, t, text).prediction, model(x, t, null.repeat(3, 1, 1)).prediction
    expected = u + scale * (c - u)
    if channels is not None:
        expected = torch.cat([expected[:, :channels], c[:, channels:]], dim=1)
    torch.testing.assert_close(model_fn(x, 0.4), expected, rtol=1e-9, atol=1e-10)


def test_guidance_of_text_asks_for_the_text_of_nothing() -> None:
    model = build_model(TINY, seed=4).double()
    x, _, text = batch(TINY)
    with pytest.raises(UserError, match="needs the text of ''"):
        guided(model, text, null=None, guidance=Guidance(scale=2))
    assert guided(model, text, null=None)(x, 0.5).shape == x.shape
    with pytest.raises(UserError, match="needs the text of ''"):
        draw_latents(model, text, range(3), SampleConfig(sampler="ode", steps=2, guidance=Guidance(scale=2)))


@torch.no_grad()
def test_drawn_latents_follow_the_guided_field() -> None:
    """Euler's steps by hand; outside the interval the text alone."""
    model = build_model(TINY, seed=4)
    text = batch(TINY, dtype=torch.float32)[2]
    null = torch.zeros(5, 12)
    guidance = Guidance(scale=3.0, interval=Interval(0.3, 1))
    found = draw_latents(
        model, text, [4, 5, 6], SampleConfig(sampler="ode", steps=4, guidance=guidance, seed=1), null=null
    )
    from trainer.diffusion.noise import sample_noise

    x = sample_noise(1, [4, 5, 6], TINY.latent_shape, 0, device=CPU).double()
    for k in range(4):
        at = 1 - k / 4
        t = torch.full((3,), at)
        c = model(x.float(), t, text).prediction
        if at >= 0.3:
            u = model(x.float(), t, null.expand_as(text)).prediction
            c = u + 3.0 * (c - u)
        x = x - c.double() / 4
    torch.testing.assert_close(found, x.float(), rtol=1e-4, atol=1e-4)
    same = draw_latents(model, null.expand_as(text), [4, 5, 6], SampleConfig(sampler="ode", steps=4, seed=1))
    against_itself = draw_latents(
        model,
        null.expand_as(text),
        [4, 5, 6],
        SampleConfig(sampler="ode", steps=4, guidance=guidance, seed=1),
        null=null,
    )
    torch.testing.assert_close(against_itself, same, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "said", "remedy"),
    [
        ({"model": "SiT-B/2", "condition": "text/clip-l"}, "SiT-B/2 takes labels", "--model MMDiT-L/2"),
        ({"model": "DiT-B/2", "condition": "text/clip-l"}, "DiT-B/2 takes labels", "--model MMDiT-L/2"),
        ({"model": "LightningDiT-B/1", "condition": "text/x"}, "LightningDiT-B/1 takes labels", "--condition out"),
        ({"model": "MMDiT-B/2", "condition": "label"}, "label cannot be the condition", "--condition text/clip-l"),
        ({"model": "MMDiT-B/2", "condition": "text/clip-l.pooled"}, "cannot be the condition", "text/clip-l"),
        ({"model": "MMDiT-B/2", "condition": "text/count"}, "cannot be the condition", "text/clip-l"),
        ({"model": "MMDiT-B/2", "condition": "../x"}, "cannot name a feature", "text/clip-l"),
        ({"model": "SiT-B/2", "zero_init": True}, "zero_init is MMDiT's", "zero_init out"),
        ({"model": "MMDiT-B/2", "method": "reg", "align": {}}, "MMDiT-B/2 draws latents alone", "another --method"),
        ({"model": "MMDiT-B/2", "method": "redi+repa"}, "MMDiT-B/2 draws latents alone", "another --method"),
        ({"model": "MMDiT-B/2", "streams": {"tiny@5.cls": {}}}, "MMDiT-B/2 draws latents alone", "--streams out"),
    ],
)
def test_settings_that_do_not_go_together(values: dict[str, Any], said: str, remedy: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        run_settings("c", **values)
    assert remedy in str(caught.value.remedy)


def test_which_features_are_text() -> None:
    assert [
        n for n in ("text/clip-l", "text/tiny", "label", "text/count", "text/", "text/t.pooled", "x@1") if is_text(n)
    ] == [
        "text/clip-l",
        "text/tiny",
    ]
    with pytest.raises(UserError, match="is no text"):
        text_shape("text/x", {"text/x": (77, 768)})
    with pytest.raises(UserError, match="does not say its shape"):
        text_shape("text/x", {})


class Held:
    """A cache as far as its manifest goes."""

    def __init__(self, cache: featcache.Cache, **features: Any) -> None:
        self.path = cache.path
        of_cache = {
            k: v for k, v in cache.manifest.features.items() if features.get(k.replace("/", "_"), v) is not None
        }
        added = {k.replace("_", "/"): v for k, v in features.items() if v is not None}
        self.manifest = replace(cache.manifest, features={**of_cache, **added})
        self.features = self.manifest.features

    def __len__(self) -> int:
        return 24


@pytest.mark.usefixtures("nano")
def test_which_text_a_model_takes(text_cache: Path, shapes_cache: Path) -> None:
    cache, config = featcache.open(text_cache), text_settings(text_cache)
    assert fitted(config, cache).condition == "text/tiny"
    assert fitted(replace(config, condition="text/tiny"), cache).condition == "text/tiny"
    assert fitted(run_settings(text_cache), cache).condition is None, "a SiT trains on labels beside text"
    spec = cache.features["text/tiny"]
    two: Any = Held(cache, text_other=replace(spec, name="text/other"))
    with pytest.raises(UserError, match="holds text/other and text/tiny") as several:
        fitted(config, two)
    assert "--condition text/other" in str(several.value.remedy)
    assert fitted(replace(config, condition="text/other"), two).condition == "text/other"
    with pytest.raises(CacheError, match="does not hold any text") as missing:
        fitted(config, featcache.open(shapes_cache))
    assert "--text clip-l" in str(missing.value.remedy) and str(shapes_cache) in str(missing.value.remedy)
    with pytest.raises(CacheError, match="does not hold text/clip-l") as other:
        fitted(replace(config, condition="text/clip-l"), cache)
    assert "--text clip-l" in str(other.value.remedy)
    old: Any = Held(cache, text_tiny=replace(spec, empty=None))
    with pytest.raises(CacheError, match="without the text of ''") as without:
        fitted(config, old)
    assert f"featcache rm {text_cache} --features text/tiny,text/tiny.length,text/tiny.pooled" in str(without.value)
    assert f"featcache build --into {text_cache} --text tiny" in str(without.value)
    for origin, file in (
        ("table my captions.csv", "'/path/to/my captions.csv'"),
        ("COCO annotations c.json", "/path/to/c.json"),
    ):
        count = cache.features[NEEDED]
        captions = {**count.provenance["captions"], "from": origin}
        listed: Any = Held(cache, text_count=replace(count, provenance={**count.provenance, "captions": captions}))
        with pytest.raises(CacheError) as other:
            fitted(replace(config, condition="text/clip-l"), listed)
        assert str(other.value.remedy).endswith(f"--text clip-l --captions {file}")


def test_without_a_cache_the_command_that_builds_one_has_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CacheError) as caught:
        find_cache(RunConfig(model="MMDiT-B/2"))
    remedy = str(caught.value.remedy)
    assert "--text clip-l" in remedy
    assert "--encoder tiny --vae-levels G3,G4 --text tiny" in remedy
    with pytest.raises(CacheError) as chosen:
        find_cache(RunConfig(model="MMDiT-B/2", condition="text/clip-l"))
    assert "--text clip-l" in str(chosen.value.remedy) and "tiny" not in str(chosen.value.remedy)
    with pytest.raises(CacheError) as labelled:
        find_cache(RunConfig(model="SiT-B/2"))
    assert "--text" not in str(labelled.value.remedy)


SHAPE = TextShape(name="text/tiny", tokens=3, width=4)


def test_the_run_s_copy_there_and_back(tmp_path: Path) -> None:
    text = torch.randn(3, 4)
    empty_text.keep(text, tmp_path)
    assert torch.equal(empty_text.of_run(tmp_path, SHAPE), text)
    (tmp_path / "config.yaml").write_text("")
    empty_text.keep(torch.zeros(3, 4), tmp_path)
    assert torch.equal(empty_text.of_run(tmp_path, SHAPE), text), "a run that has begun keeps its own"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"text": torch.zeros(4, 3)}, r"holds text \[4, 3\]"),
        ({"text": torch.zeros(3, 4, dtype=torch.float64)}, "float64"),
        ({"other": torch.zeros(3, 4)}, "holds other"),
        ({"text": torch.zeros(3, 4), "more": torch.zeros(1)}, "more"),
        ({"text": torch.full((3, 4), torch.nan)}, "not finite"),
        ({}, "holds nothing"),
        (b"", "damaged"),
        (b"\xff" * 100, "damaged"),
        (b"\x10\0\0\0\0\0\0\0{'text': no json", "damaged"),
    ],
)
def test_a_damaged_copy_is_said_to_be(tmp_path: Path, tensors: Any, said: str) -> None:
    path = tmp_path / empty_text.FILE
    if isinstance(tensors, bytes):
        path.write_bytes(tensors)
    else:
        save_file(tensors, path)
    with pytest.raises(UserError, match=said) as caught:
        empty_text.of_run(tmp_path, SHAPE)
    assert "Restore the file" in str(caught.value.remedy)


def test_a_missing_copy_and_one_that_is_a_link(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing"):
        empty_text.of_run(tmp_path, SHAPE)
    save_file({"text": torch.zeros(3, 4)}, tmp_path / "elsewhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / empty_text.FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError):
        empty_text.of_run(tmp_path / "run", SHAPE)


@given(data=st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_whatever_the_copy_holds_is_an_error_of_ours(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("run")
    (folder / empty_text.FILE).write_bytes(len(data).to_bytes(8, "little") + data)
    with pytest.raises(UserError):
        empty_text.of_run(folder, SHAPE)


def test_cached_conditions_are_the_first_captions(text_cache: Path) -> None:
    cache = featcache.open(text_cache)
    cfg = replace(TINY, text=TextShape(name="text/tiny", tokens=16, width=64))
    found = cached_conditions(build_condition(cfg, cache), cache, np.array([3, 1]))
    assert torch.equal(found, torch.from_numpy(read_feature(cache, "text/tiny", [3, 1]))[:, 0])
    assert one_caption(cache.features["text/tiny"]).shape == (16, 64)


@pytest.mark.usefixtures("nano")
def test_a_run_keeps_the_text_of_nothing_and_goes_on_with_no_other(text_cache: Path, tmp_path: Path) -> None:
    config = text_settings(text_cache, steps=2)
    run = train(config, resume=False, watcher=Listener(), root=tmp_path)
    shape = TextShape(name="text/tiny", tokens=16, width=64)
    kept = empty_text.of_run(run, shape)
    assert torch.equal(kept, torch.from_numpy(featcache.open(text_cache).features["text/tiny"].empty_text()))
    assert json.loads((run / "cache.json").read_text())["features"]["text/tiny"]["shape"] == [2, 16, 64]
    more = replace(config, steps=3)
    save_file({"text": kept + 1}, run / empty_text.FILE)
    with pytest.raises(UserError, match="is not that of text/tiny"):
        train(more, resume=True, watcher=Listener(), root=tmp_path)
    (run / empty_text.FILE).unlink()
    with pytest.raises(UserError, match="is missing"):
        train(more, resume=True, watcher=Listener(), root=tmp_path)
    save_file({"text": kept}, run / empty_text.FILE)
    train(more, resume=True, watcher=Listener(), root=tmp_path)
