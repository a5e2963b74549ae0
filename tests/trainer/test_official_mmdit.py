"""REPA's text-to-image checkpoints in and out, against a small replica of its modules, loaded strictly."""

from __future__ import annotations

import argparse
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import position_table
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_mmdit import joint_forward
from torch import Tensor, nn
from typer.testing import CliRunner

import featcache
from featcache.errors import CacheError, UserError
from trainer.cli import app
from trainer.models import ModelConfig, TextShape, build_model, empty_model, load_weights, model_config
from trainer.runs import joint_weights
from trainer.runs.exchange import import_checkpoint
from trainer.runs.folder import load_config
from trainer.runs.weights_io import export_official, import_official
from trainer.sampling.draw import load_run

CLIP = TextShape(name="text/clip-l", tokens=77, width=768)
DEPTH, PATCH, CHANNELS, GRID = 2, 2, 4, 16
SMALL = ModelConfig(
    family="sit",
    depth=DEPTH,
    width=32 * DEPTH,
    heads=DEPTH,
    patch_size=PATCH,
    latent_channels=CHANNELS,
    latent_size=GRID * PATCH,
    num_classes=1,
    text=CLIP,
)


def half(width: int, *, last: bool = False) -> nn.Module:
    """Text or image in one block."""
    layers: dict[str, nn.Module] = {
        "attn": nn.ModuleDict({"qkv": nn.Linear(width, 3 * width)}),
        "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, (2 if last else 6) * width)),
    }
    if not last:
        layers["attn"]["proj"] = nn.Linear(width, width)  # type: ignore[operator]
        layers["mlp"] = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
    return nn.ModuleDict(layers)


class Official(nn.Module):
    """MMDiT's weights as REPA's code has them, by their names; its table of positions is a buffer."""

    pos_embed: Tensor

    def __init__(self, depth: int, *, text: int = 768, channels: int = CHANNELS, grid: int = GRID) -> None:
        super().__init__()
        width = 32 * depth
        self.register_buffer("pos_embed", torch.from_numpy(position_table(width, grid)).float())
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, PATCH, PATCH)})
        mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.context_embedder = nn.Linear(text, width)
        self.joint_blocks = nn.ModuleList(
            nn.ModuleDict({"context_block": half(width, last=i == depth - 1), "x_block": half(width)})
            for i in range(depth)
        )
        self.final_layer = nn.ModuleDict({"linear": nn.Linear(width, PATCH**2 * channels)})
        self.final_layer["adaLN_modulation"] = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        head = [nn.Linear(width, 2048), nn.SiLU(), nn.Linear(2048, 2048), nn.SiLU(), nn.Linear(2048, 768)]
        self.projectors = nn.ModuleList([nn.Sequential(*head)])


def official(seed: int = 1, depth: int = DEPTH, **kw: Any) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Official(depth, **kw).state_dict()


def save(path: Path, ema: Any, model: Any = None, **args: Any) -> Path:
    """As its training script does: with its options, none of which says anything of the model."""
    content: dict[str, Any] = {"model": model or ema, "ema": ema, "opt": {"state": {}, "param_groups": []}}
    said = {"path_type": "linear", "prediction": "v", "qk_norm": False, "resolution": 256, "encoder_depth": 8, **args}
    torch.save({**content, "args": argparse.Namespace(**said), "steps": 150_000}, path)
    return path


@pytest.mark.parametrize(("choice", "seed"), [("ema", 1), ("model", 2)])
@torch.no_grad()
def test_a_training_checkpoint_gives_its_output(tmp_path: Path, choice: Any, seed: int) -> None:
    path = save(tmp_path / "0150000.pt", official(1), official(2))
    imported = import_official(path, weights=choice)
    assert (imported.convention, imported.weights, imported.step, imported.path) == ("repa", choice, 150_000, "linear")
    assert imported.config == SMALL
    assert sorted(imported.heads) == sorted(
        f"projectors.0.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")
    )
    model = build_model(imported.config)
    load_weights(model, imported.state)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 32, 32, generator=generator, dtype=torch.float64)
    y = torch.randn(2, 77, 768, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.2, 0.9])
    theirs = {key.replace("joint_blocks.", "blocks."): value.double() for key, value in official(seed).items()}
    expected, _ = joint_forward(theirs, x, t, y, heads=DEPTH)
    torch.testing.assert_close(model.double()(x, t, y).prediction, expected, rtol=1e-9, atol=1e-10)


def test_the_papers_model_key_by_key_without_its_weights() -> None:
    """505,070,608 parameters on both sides, and 7,344,896 in REPA's head."""
    with torch.device("meta"):
        state = Official(24).state_dict()
    backbone = {key: value for key, value in state.items() if not key.startswith("projectors.")}
    assert sum(v.numel() for k, v in backbone.items() if k != "pos_embed") == 505_070_608
    assert sum(v.numel() for k, v in state.items() if k.startswith("projectors.")) == 7_344_896
    cfg = joint_weights.joint_config(backbone, {}, Path("0150000.pt"))
    assert cfg == model_config("MMDiT-L/2", latent_channels=4, latent_size=32, num_classes=1, text=CLIP)
    ours = empty_model(cfg)
    assert sum(p.numel() for p in ours.parameters()) == 505_070_608
    named = {key: value.shape for key, value in joint_weights.our_names(backbone).items()}
    assert named == {key: v.shape for key, v in {**ours.state_dict(), "pos_embed": ours.pos_embed}.items()}
    assert joint_weights.their_names(joint_weights.our_names(backbone)).keys() == backbone.keys()
    assert joint_weights.why_not_there(cfg) is None


@pytest.mark.parametrize("depth", [1, 2])
def test_an_export_is_loaded_strictly_and_comes_back_bit_by_bit(tmp_path: Path, depth: int) -> None:
    cfg = replace(SMALL, depth=depth, width=32 * depth, heads=depth)
    ema, model = build_model(cfg, seed=1), build_model(cfg, seed=2)
    path = export_official(tmp_path / "w.pt", cfg, ema=ema.state_dict(), model=model.state_dict(), step=7)
    content = torch.load(path, weights_only=True)
    there = Official(depth)
    for name, ours in (("ema", ema), ("model", model)):
        there.load_state_dict(content[name])  # strictly: projectors and positions too
        assert torch.equal(there.pos_embed, ours.pos_embed)
        again = import_official(path, weights=name)  # type: ignore[arg-type]
        assert (again.config, again.step, again.convention) == (cfg, 7, "repa")
        assert all(torch.equal(again.state[key], value) for key, value in ours.state_dict().items())
    assert torch.count_nonzero(there.projectors[0][0].weight) == 0  # type: ignore[index]
    own = {"projectors.0.0.weight": torch.ones(3, cfg.width)}
    path = export_official(tmp_path / "w.pt", cfg, ema=ema.state_dict(), heads=own)
    assert torch.equal(
        torch.load(path, weights_only=True)["ema"]["projectors.0.0.weight"], own["projectors.0.0.weight"]
    )


@given(seed=st.integers(0, 2**31), depth=st.integers(1, 3), text=st.sampled_from([3, 768]))
@hypothesis_settings(max_examples=15, deadline=None)
def test_names_there_and_back_lose_nothing(seed: int, depth: int, text: int) -> None:
    cfg = replace(SMALL, depth=depth, width=32 * depth, heads=depth, text=replace(CLIP, width=text))
    state = build_model(cfg, seed=seed).state_dict()
    there = joint_weights.their_names(state)
    assert len(there) == len(state)
    assert not any(key.startswith("blocks.") for key in there)
    back = joint_weights.our_names(there)
    assert list(back) == list(state)
    assert all(torch.equal(back[key], value) for key, value in state.items())


def test_missing_and_unknown_keys_are_named(tmp_path: Path) -> None:
    state = official()
    del state["joint_blocks.0.context_block.mlp.fc2.bias"]
    state["joint_blocks.1.context_block.attn.proj.bias"] = torch.ones(3)
    with pytest.raises(UserError) as caught:
        import_official(save(tmp_path / "c.pt", state))
    assert "missing blocks.0.context_block.mlp.fc2.bias" in str(caught.value)
    assert "unexpected blocks.1.context_block.attn.proj.bias" in str(caught.value)
    gap = {key.replace("joint_blocks.1.", "joint_blocks.3."): value for key, value in official().items()}
    with pytest.raises(UserError, match="2 joint blocks, but they are not numbered from 0 to 1"):
        import_official(save(tmp_path / "c.pt", gap))
    odd = {**official(), "joint_blocks.x.weight": torch.ones(1)}
    with pytest.raises(UserError, match="3 joint blocks, but they are not numbered"):
        import_official(save(tmp_path / "c.pt", odd))
    for key in ("context_embedder.weight", "pos_embed"):
        less = {name: value for name, value in official().items() if name != key}
        with pytest.raises(UserError, match=f"not an MMDiT state dict: it has no {key}"):
            import_official(save(tmp_path / "c.pt", less))
        with pytest.raises(UserError, match=rf"{key} has the shape \[2\]"):
            import_official(save(tmp_path / "c.pt", {**official(), key: torch.ones(2)}))


@pytest.mark.parametrize(
    ("key", "shape", "said"),
    [
        ("y_embedder.mlp.0.weight", (64, 2048), "a pooled text vector"),
        ("register", (1, 4, 64), "register tokens"),
        ("joint_blocks.0.x_block.attn.ln_q.weight", (32,), "norms of queries and keys"),
        ("joint_blocks.0.x_block.mlp.w1.weight", (192, 64), "gated MLPs"),
        ("final_layer.linear.weight", (32, 64), "twice as many channels"),
    ],
)
def test_what_that_code_could_build_and_never_trains_says_why(
    tmp_path: Path, key: str, shape: tuple[int, ...], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        import_official(save(tmp_path / "c.pt", {**official(), key: torch.ones(shape)}))


@functools.cache
def _bare() -> dict[str, Tensor]:
    return {key: value for key, value in official(1, 1).items() if not key.startswith("projectors.")}


def bare_state() -> dict[str, Any]:
    """The backbone alone, of one block."""
    return dict(_bare())


@given(data=st.data())
@hypothesis_settings(max_examples=40, deadline=None)
def test_whatever_a_file_holds_it_is_read_or_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    state = bare_state()
    names = sorted(state)
    shapes = st.lists(st.integers(0, 5), max_size=5).map(tuple)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(names))
        other = data.draw(
            st.none()
            | shapes.map(torch.zeros)
            | st.sampled_from([torch.zeros(3, dtype=torch.int64), torch.zeros(()), 3])
        )
        if other is None:
            state.pop(key, None)
        else:
            state[data.draw(st.sampled_from([key, f"{key}.more", key.replace("0", "10000"), f"module.{key}"]))] = other
    path = tmp_path_factory.mktemp("file") / "c.pt"
    torch.save({"ema": state}, path)
    try:
        assert import_official(path).config.depth >= 1
    except UserError as error:
        assert "c.pt" in error.what


def test_another_position_table_width_and_convention_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the sin-cos table of a 16 x 16 grid"):
        import_official(save(tmp_path / "c.pt", {**official(), "pos_embed": torch.randn(1, 256, 64)}))
    with pytest.raises(UserError, match="which 'sit' checkpoints do not") as caught:
        import_official(save(tmp_path / "c.pt", official()), convention="sit")
    assert "Leave --convention out" in str(caught.value)
    state = {key: value for key, value in official().items() if not key.startswith("joint_blocks.1.")}
    path = save(tmp_path / "c.pt", state)
    with pytest.raises(UserError, match=r"depth 1 and width 64, not 32 \* depth"):
        import_official(path)


def test_the_text_is_clips_what_the_file_says_or_the_caches(tmp_path: Path) -> None:
    path = save(tmp_path / "c.pt", official(text=12))
    with pytest.raises(UserError, match="takes text that is 12 wide") as caught:
        import_official(path)
    assert "--cache" in str(caught.value)
    tiny, t5, other = (
        TextShape(name=f"text/{name}", tokens=5, width=w) for name, w in (("a", 12), ("b", 768), ("c", 12))
    )
    assert import_official(path, texts=[t5, tiny]).config.text == tiny
    with pytest.raises(UserError, match=r"cannot be told: text/a \(12\), text/c \(12\)"):
        import_official(path, texts=[tiny, other])
    with pytest.raises(UserError, match="cannot be told"):
        import_official(path, texts=[t5])
    said = {"text": "text/c", "text_tokens": 5, "text_width": 12}
    assert import_official(save(tmp_path / "d.pt", official(text=12), **said)).config.text == other
    assert import_official(tmp_path / "d.pt", texts=[tiny, other]).config.text == other
    for wrong in ({"text": "text/../c"}, {"text_tokens": 10**9}, {"text_tokens": True}, {"text": "text/\x1b[2J"}):
        with pytest.raises(UserError, match="does not say of which encoder"):
            import_official(save(tmp_path / "e.pt", official(text=12), **{**said, **wrong}))
    path = save(tmp_path / "f.pt", official())
    clip = replace(CLIP, tokens=64)
    assert import_official(path, texts=[t5, clip]).config.text == clip
    assert import_official(path, texts=[t5]).config.text == t5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"text": TextShape(name="text/tiny", tokens=16, width=64)},
            "takes text 768 wide alone, and text/tiny is 64 wide",
        ),
        ({"latent_size": 64}, "positions for 16 x 16 tokens alone, and these latents have 32 x 32"),
        ({"qk_norm": True}, "trains without norms of queries and keys"),
        ({"heads": 4}, r"width 32 \* depth with as many heads as blocks"),
    ],
)
def test_weights_that_code_has_no_place_for_are_not_written(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    cfg = replace(SMALL, **change)
    with pytest.raises(UserError, match=said) as caught:
        export_official(tmp_path / "w.pt", cfg, ema=build_model(cfg).state_dict())
    assert "trainer sample" in str(caught.value)
    assert not (tmp_path / "w.pt").exists()


def test_other_codes_have_no_place_for_text(tmp_path: Path) -> None:
    for convention in ("sra", "sit", "dit", "lightningdit", "reg", "redi"):
        with pytest.raises(UserError, match="MMDiT weights cannot be written as") as caught:
            export_official(tmp_path / "w.pt", SMALL, ema={}, convention=convention)
        assert "Use one of: repa" in str(caught.value)


def typed(command: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, command)
    return result.exit_code, " ".join(result.output.split()) + str(result.exception or "")


def official_of(cache: Path, seed: int = 1) -> dict[str, Tensor]:
    """A checkpoint of MMDiT-Ti/2 for a cache."""
    features = featcache.open(cache).manifest.features
    channels, side = features["vae/moments"].shape[0] // 2, features["vae/moments"].shape[1]
    return official(seed, 6, text=features["text/tiny"].shape[2], channels=channels, grid=side // PATCH)


def test_as_typed_import_sample_and_export(text_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = official_of(text_cache)
    save(tmp_path / "0150000.pt", state)
    code, said = typed(["import", "0150000.pt", "--name", "repa"], tmp_path, monkeypatch)
    assert code != 0 and "--cache" in said
    command = ["import", "0150000.pt", "--name", "repa", "--cache", str(text_cache)]
    code, said = typed(command, tmp_path, monkeypatch)
    assert code == 0, said
    assert 'next: trainer sample runs/repa --prompt "what to draw"' in said
    run = tmp_path / "runs/repa"
    config = load_config(run)
    assert (config.model, config.condition, config.steps) == ("MMDiT-Ti/2", "text/tiny", 150_000)
    loaded = load_run(run)
    for key, value in joint_weights.our_names(state).items():
        if not key.startswith("projectors.") and key != "pos_embed":
            assert torch.equal(loaded.model.state_dict()[key], value)
    empty = featcache.open(text_cache).manifest.features["text/tiny"].empty_text()
    assert loaded.null is not None and torch.equal(loaded.null, torch.from_numpy(empty))
    # Guided, by prompts, without the cache.
    sample = ["sample", "runs/repa", "--prompt", "a red disc", "--num", "2", "--steps", "2", "--guidance", "2.0"]
    code, said = typed([*sample, "--device", "cpu"], tmp_path, monkeypatch)
    assert code == 0, said
    # The public code has no place for the tiny encoder's text.
    code, said = typed(["export", "runs/repa", "w.pt"], tmp_path, monkeypatch)
    assert code != 0 and "takes text 768 wide alone" in said
    side = featcache.open(text_cache).manifest.features["vae/moments"].shape[1]
    monkeypatch.setattr(joint_weights, "_CLIP", TextShape(name="text/tiny", tokens=16, width=64))
    monkeypatch.setattr(joint_weights, "_GRID", side // PATCH)
    code, said = typed(["export", "runs/repa", "w.pt"], tmp_path, monkeypatch)
    assert code == 0, said
    content = torch.load(tmp_path / "w.pt", weights_only=True)
    assert content["steps"] == 150_000 and content["args"]["text"] == "text/tiny"
    for key, value in state.items():
        same = torch.equal(content["ema"][key], value)
        assert same or key.startswith("projectors."), key


def test_a_cache_that_does_not_fit_a_text_checkpoint(text_cache: Path, shapes_cache: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"weights": "ema", "convention": None, "root": tmp_path / "runs", "name": "x"}
    with pytest.raises(UserError, match="holds moments"):
        import_checkpoint(save(tmp_path / "c.pt", official(1, 6, text=64, channels=8)), cache=str(text_cache), **common)
    with pytest.raises(UserError, match="takes text that is 64 wide"):
        import_checkpoint(save(tmp_path / "c.pt", official_of(text_cache)), cache=str(shapes_cache), **common)
    with pytest.raises(CacheError, match="does not hold text/clip-l, which the checkpoint takes") as caught:
        import_checkpoint(save(tmp_path / "c.pt", official(1, 6)), cache=str(shapes_cache), **common)
    assert "--text clip-l" in str(caught.value)
    assert not (tmp_path / "runs").exists()
