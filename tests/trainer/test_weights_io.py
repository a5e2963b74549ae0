"""Official checkpoints in and out, against an independent forward pass and, where they are, golden
vectors."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from golden import official_forward, official_weights
from safetensors.torch import save_file
from tiny_runs import Listener, settings
from torch import Tensor

from featcache.errors import CacheError, UserError
from featcache.share.manage import remove_features
from trainer.models import Transformer, build_model, load_weights
from trainer.runs.exchange import export_checkpoint, import_checkpoint
from trainer.runs.weights_io import CONVENTIONS, Convention, Imported, export_official, import_official, reverse_time
from trainer.training.loop import train

SMALL: dict[str, Any] = {"depth": 2, "grid": 4, "width": 32, "classes": 5}


def weights(seed: int = 1, **kw: Any) -> dict[str, Tensor]:
    state = official_weights(seed=seed, seed_redrawn=seed + 100, **(SMALL | kw))
    generator = torch.Generator().manual_seed(seed)
    for key, value in state.items():  # no layer may be left at zero
        if key != "pos_embed":
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
        if key.startswith("t_embedder"):  # so that the output depends on time as much as on anything
            value.mul_(10)
    return state


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def loaded(imported: Imported) -> Transformer:
    model = build_model(imported.config)
    load_weights(model, imported.state)
    return model.eval()


def inputs(size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, size, size, generator=generator)
    return x, torch.tensor([0.0, 0.1, 0.5, 0.77, 1.0]), torch.tensor([0, 1, 2, 4, 5])


@torch.no_grad()
def test_official_sit_runs_time_the_other_way_and_drops_its_variance(tmp_path: Path) -> None:
    """Its velocity at its own time 1 - t is the negative of ours at t."""
    official = weights(channels_out=8)
    path = save(tmp_path / "SiT-XL-2-256x256.pt", official)
    imported = import_official(path, heads=4)
    assert (imported.convention, imported.weights, imported.path) == ("sit", "bare", "linear")
    assert imported.config.out_channels == 4
    x, t, y = inputs()
    theirs, _ = official_forward(official, x, 1 - t, y, heads=4)
    ours = loaded(imported)(x, t, y).prediction
    torch.testing.assert_close(ours, -theirs[:, :4], rtol=1e-4, atol=1e-5)
    at_t, _ = official_forward(official, x, t, y, heads=4)
    assert (ours + at_t[:, :4]).abs().max() > 0.1


@torch.no_grad()
def test_reversal_of_time_is_exact_and_its_own_inverse() -> None:
    """In float64 only the float32 sinusoid rounds."""
    official = {key: value.double() for key, value in weights().items()}
    x, t, y = inputs()
    theirs, _ = official_forward(official, x.double(), 1 - t.double(), y, heads=4)
    ours, _ = official_forward(reverse_time(official), x.double(), t.double(), y, heads=4)
    torch.testing.assert_close(ours, -theirs, rtol=1e-5, atol=1e-6)
    twice = reverse_time(reverse_time(official))
    for key, value in official.items():
        torch.testing.assert_close(twice[key], value, rtol=0, atol=1e-14)


@torch.no_grad()
@pytest.mark.parametrize("form", ["ema", "bare", "safetensors"])
def test_official_dit(tmp_path: Path, form: str) -> None:
    official = weights(channels_out=8)
    if form == "safetensors":
        path = tmp_path / "DiT-XL-2-256x256.safetensors"
        save_file(official, path)
    else:
        content = official if form == "bare" else {"ema": official, "model": weights(2, channels_out=8)}
        path = save(tmp_path / "DiT-XL-2-256x256.pt", content)
    imported = import_official(path, heads=4)
    assert imported.convention == "dit"
    assert (imported.config.family, imported.config.out_channels) == ("dit", 8)
    x, _, y = inputs()
    t = torch.tensor([0, 1, 500, 998, 999])
    theirs, _ = official_forward(official, x, t, y, heads=4)
    torch.testing.assert_close(loaded(imported)(x, t, y).prediction, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("choice", "seed"), [("ema", 1), ("model", 2)])
def test_repa_training_checkpoint(tmp_path: Path, choice: Any, seed: int) -> None:
    content = {
        "model": weights(2, projector=(16, 12)),
        "ema": weights(1, projector=(16, 12)),
        "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(model="SiT-B/2", path_type="linear", prediction="v", seed=0),
        "steps": 400000,
    }
    imported = import_official(save(tmp_path / "0400000.pt", content), weights=choice, heads=4)
    assert (imported.convention, imported.weights, imported.step) == ("repa", choice, 400000)
    assert sorted(imported.heads) == sorted(
        f"projectors.0.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")
    )
    x, t, y = inputs()
    theirs, _ = official_forward(weights(seed, projector=(16, 12)), x, t, y, heads=4)
    torch.testing.assert_close(loaded(imported)(x, t, y).prediction, theirs, rtol=1e-4, atol=1e-5)


def test_sra_checkpoints_of_both_families(tmp_path: Path) -> None:
    head = {"ap_head.linear1.weight": torch.ones(64, 32), "ap_head.linear1.bias": torch.ones(64)}
    for channels_out, family in ((4, "sit"), (8, "dit")):
        content = {"ema": weights(channels_out=channels_out) | head}
        imported = import_official(save(tmp_path / "last.pt", content), heads=4)
        assert (imported.convention, imported.config.family) == ("sra", family)
        assert imported.heads.keys() == head.keys()


def test_blocks_that_early_repa_checkpoints_count_twice(tmp_path: Path) -> None:
    official = weights(depth=3)
    early = {}
    for key, value in official.items():
        index = int(key.split(".")[1]) if key.startswith("blocks.") else 0
        early[key.replace(f"blocks.{index}", f"decoder_blocks.{index - 1}") if index >= 1 else key] = value
    assert sum(key.startswith("decoder_blocks.1.") for key in early) == 10
    imported = import_official(save(tmp_path / "old.pt", {"ema": early}), heads=4)
    assert imported.config.depth == 3
    assert all(torch.equal(imported.state[key], official[key]) for key in official)


def test_wrappers_prefixes_are_removed(tmp_path: Path) -> None:
    wrapped = {f"module._orig_mod.{key}": value for key, value in weights().items()}
    imported = import_official(save(tmp_path / "c.pt", {"ema": wrapped}), heads=4)
    assert imported.state.keys() == weights().keys()


def test_qk_norm_tells_the_number_of_heads(tmp_path: Path) -> None:
    state = weights()
    for i, norm, kind in ((i, n, k) for i in range(2) for n in "qk" for k in ("weight", "bias")):
        state[f"blocks.{i}.attn.{norm}_norm.{kind}"] = torch.rand(16)
    imported = import_official(save(tmp_path / "c.pt", {"ema": state}))
    assert (imported.config.heads, imported.config.qk_norm) == (2, True)
    x, t, y = inputs()
    theirs, _ = official_forward(state, x, t, y, heads=2)
    with torch.no_grad():
        torch.testing.assert_close(loaded(imported)(x, t, y).prediction, theirs, rtol=1e-4, atol=1e-5)


def test_named_sizes_are_recognised(tmp_path: Path) -> None:
    state = official_weights(seed=0, seed_redrawn=1, depth=6, width=192, grid=2, classes=3, patch=4)
    imported = import_official(save(tmp_path / "c.pt", {"ema": state}))
    assert imported.name == "SiT-Ti/4"
    assert (imported.config.latent_size, imported.config.num_classes, imported.config.heads) == (8, 3, 3)


def test_cosine_path_is_read_from_the_arguments(tmp_path: Path) -> None:
    for given, path in (("Linear", "linear"), ("GVP", "cosine")):
        args = argparse.Namespace(model="SiT-XL/2", path_type=given, prediction="velocity")
        content = {"ema": weights(channels_out=8), "args": args}
        imported = import_official(save(tmp_path / "c.pt", content), heads=4)
        assert (imported.convention, imported.path) == ("sit", path)


@pytest.mark.parametrize("option", [{"path_type": "VP"}, {"prediction": "score"}])
def test_models_of_another_kind_are_refused(tmp_path: Path, option: dict[str, str]) -> None:
    content = {"ema": weights(), "args": argparse.Namespace(model="SiT-XL/2", **option)}
    with pytest.raises(UserError, match="only velocity models"):
        import_official(save(tmp_path / "c.pt", content), heads=4)


@torch.no_grad()
def test_a_drifted_position_table_is_kept(tmp_path: Path) -> None:
    state = weights()
    state["pos_embed"] = state["pos_embed"] * (1 - 1e-3)
    imported = import_official(save(tmp_path / "c.pt", {"ema": state}), heads=4)
    x, t, y = inputs()
    theirs, _ = official_forward(state, x, t, y, heads=4)
    torch.testing.assert_close(loaded(imported)(x, t, y).prediction, theirs, rtol=1e-4, atol=1e-5)


def test_another_position_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the sin-cos table of a 4 x 4 grid"):
        import_official(save(tmp_path / "c.pt", {"ema": weights() | {"pos_embed": torch.randn(1, 16, 32)}}), heads=4)


class Bomb:
    """Runs code when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("place", ["entry", "namespace"])
def test_nothing_in_a_checkpoint_is_run(tmp_path: Path, place: str) -> None:
    bomb = Bomb(tmp_path / "ran")
    args = argparse.Namespace(hook=bomb) if place == "namespace" else bomb
    path = save(tmp_path / "evil.pt", {"ema": weights(), "args": args})
    with pytest.raises(UserError, match="was refused: it pickles an object of type") as caught:
        import_official(path, heads=4)
    assert "mkdir" in str(caught.value)
    assert not (tmp_path / "ran").exists()
    # The bomb is live: without the guard it goes off.
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04broken"])
def test_files_that_are_no_checkpoints_are_explained(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(UserError):
        import_official(tmp_path / "c.pt")
    (tmp_path / "c.safetensors").write_bytes(content)
    with pytest.raises(UserError):
        import_official(tmp_path / "c.safetensors")


def test_contents_that_are_no_checkpoints_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint at"):
        import_official(tmp_path / "absent.pt")
    with pytest.raises(UserError, match="holds a list"):
        import_official(save(tmp_path / "c.pt", [1, 2]))
    with pytest.raises(UserError, match="no 'ema' weights") as caught:
        import_official(save(tmp_path / "c.pt", {"model": weights(), "epoch": 3}))
    assert "'model'" in str(caught.value.remedy)
    with pytest.raises(UserError, match="not a SiT or DiT state dict"):
        import_official(save(tmp_path / "c.pt", {"ema": {"conv.weight": torch.ones(1)}}))
    with pytest.raises(UserError, match=r"'x_embedder\.proj\.weight' is not a tensor"):
        import_official(save(tmp_path / "c.pt", {"ema": {"x_embedder.proj.weight": 3}}))


def test_keys_are_checked_one_by_one(tmp_path: Path) -> None:
    state = weights()
    del state["blocks.1.mlp.fc2.bias"]
    state["blocks.1.mlp.fc3.bias"] = torch.ones(3)
    with pytest.raises(UserError) as caught:
        import_official(save(tmp_path / "c.pt", {"ema": state}), heads=4)
    assert "missing blocks.1.mlp.fc2.bias" in str(caught.value)
    assert "unexpected blocks.1.mlp.fc3.bias" in str(caught.value)


def test_what_cannot_be_told_must_be_said(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoint.pt", weights(channels_out=8))
    with pytest.raises(UserError, match="number of heads"):
        import_official(path)
    with pytest.raises(UserError, match="may be an official SiT or an official DiT"):
        import_official(path, heads=4)
    assert import_official(path, heads=4, convention="dit").config.family == "dit"
    assert import_official(path, heads=4, convention="sit").config.family == "sit"
    with pytest.raises(UserError, match="twice as many channels"):
        import_official(path, heads=4, convention="repa")


def small_model(family: str, seed: int) -> Transformer:
    imported_from = weights(seed, channels_out=8 if family == "dit" else 4)
    config = build_config(family)
    model = build_model(config)
    load_weights(model, imported_from)
    return model


def build_config(family: str) -> Any:
    from trainer.models import ModelConfig

    return ModelConfig(
        family="dit" if family == "dit" else "sit",
        depth=2,
        width=32,
        heads=4,
        patch_size=2,
        latent_channels=4,
        latent_size=8,
        num_classes=5,
        learn_sigma=family == "dit",
    )


@pytest.mark.parametrize(
    ("family", "convention"),
    [("sit", "repa"), ("sit", "sra"), ("sit", "sit"), ("dit", "dit"), ("dit", "sra")],
)
def test_export_and_import_again(tmp_path: Path, family: str, convention: Any) -> None:
    ema, model = small_model(family, 1), small_model(family, 2)
    path = export_official(
        tmp_path / "out.pt",
        ema.cfg,
        ema=ema.state_dict(),
        model=model.state_dict(),
        convention=convention,
        step=7,
    )
    # The public code's own way of reading, in torch's safe mode.
    content = torch.load(path, weights_only=True)
    assert {"ema", "model", "args", "steps"} == set(content)
    both: tuple[tuple[Literal["ema", "model"], Transformer], ...] = (("ema", ema), ("model", model))
    for choice, original in both:
        again = import_official(path, weights=choice, heads=4, convention=convention)
        assert again.config == original.cfg
        assert again.step == 7
        tolerance = 1e-6 if convention == "sit" else 0  # time is turned round twice
        for key, value in original.state_dict().items():
            torch.testing.assert_close(again.state[key], value, rtol=0, atol=tolerance)


@pytest.mark.parametrize("convention", ["repa", "sit", "sra"])
@pytest.mark.parametrize("interpolant", ["linear", "cosine"])
def test_exports_say_which_path_they_were_trained_on(tmp_path: Path, convention: Any, interpolant: str) -> None:
    model = small_model("sit", 1)
    path = export_official(
        tmp_path / "o.pt", model.cfg, ema=model.state_dict(), convention=convention, interpolant=interpolant
    )
    assert import_official(path, heads=4, convention=convention).path == interpolant


@torch.no_grad()
def test_exported_sit_gives_the_official_output(tmp_path: Path) -> None:
    model = small_model("sit", 1)
    path = export_official(tmp_path / "o.pt", model.cfg, ema=model.state_dict(), convention="sit")
    x, t, y = inputs()
    theirs, _ = official_forward(torch.load(path, weights_only=True)["ema"], x, 1 - t, y, heads=4)
    assert theirs.shape[1] == 8
    torch.testing.assert_close(-theirs[:, :4], model(x, t, y).prediction, rtol=1e-4, atol=1e-5)
    assert torch.count_nonzero(theirs[:, 4:]) == 0


@pytest.mark.parametrize("convention", ["repa", "sra"])
def test_exports_carry_the_heads_that_strict_loading_wants(tmp_path: Path, convention: Any) -> None:
    model = small_model("sit", 1)
    path = export_official(tmp_path / "o.pt", model.cfg, ema=model.state_dict(), convention=convention)
    shapes = {key: list(value.shape) for key, value in torch.load(path, weights_only=True)["ema"].items()}
    extra = {key: shape for key, shape in shapes.items() if key.startswith(("projectors", "ap_head"))}
    D = 32
    if convention == "repa":
        expected = {0: [2048, D], 2: [2048, 2048], 4: [768, 2048]}
        assert extra == {f"projectors.0.{i}.weight": shape for i, shape in expected.items()} | {
            f"projectors.0.{i}.bias": shape[:1] for i, shape in expected.items()
        }
    else:
        assert extra == {
            "ap_head.linear1.weight": [2 * D, D],
            "ap_head.linear1.bias": [2 * D],
            "ap_head.linear2.weight": [D, 2 * D],
            "ap_head.linear2.bias": [D],
        }
    assert "pos_embed" in shapes
    given = {"projectors.0.0.weight": torch.ones(3, D)}
    path = export_official(tmp_path / "o.pt", model.cfg, ema=model.state_dict(), heads=given)
    assert torch.equal(
        torch.load(path, weights_only=True)["ema"]["projectors.0.0.weight"], given["projectors.0.0.weight"]
    )


def test_exports_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    sit, dit = small_model("sit", 1), small_model("dit", 1)
    pairs: tuple[tuple[Transformer, Convention], ...] = ((sit, "dit"), (dit, "sit"), (dit, "repa"))
    for model, convention in pairs:
        with pytest.raises(UserError, match="cannot be written as"):
            export_official(tmp_path / "o.pt", model.cfg, ema=model.state_dict(), convention=convention)
    with pytest.raises(UserError, match=r"missing blocks\.2"):
        export_official(tmp_path / "o.pt", replace(sit.cfg, depth=3), ema=sit.state_dict())
    assert not (tmp_path / "o.pt").exists()
    assert CONVENTIONS == ("repa", "sra", "sit", "dit", "lightningdit", "reg", "redi")


@torch.no_grad()
@pytest.mark.parametrize("name", ["sit_repa", "dit_official"])
def test_golden_checkpoint(golden_folder: Path, tmp_path: Path, name: str) -> None:
    """The public code's vectors through a file as its training script writes it."""
    about = json.loads((golden_folder / f"{name}.json").read_text())
    seeds, sit = about["seeds"], name == "sit_repa"
    state = official_weights(
        seed=seeds["init"],
        seed_redrawn=seeds["rerandomised_layers"],
        projector=(128, 48) if sit else None,
        channels_out=4 if sit else 8,
    )
    model_name = "SiT-S/2" if sit else "DiT-S/2"
    content = {"ema": state, "model": state, "args": argparse.Namespace(model=model_name), "steps": 1}
    imported = import_official(save(tmp_path / "0000001.pt", content), heads=4)
    assert imported.convention == ("repa" if sit else "dit")
    with np.load(golden_folder / f"{name}.npz", allow_pickle=False) as arrays:
        x, t, y = (torch.from_numpy(arrays[key]) for key in "xty")
        expected = torch.from_numpy(arrays["velocity" if sit else "output"])
    torch.testing.assert_close(loaded(imported)(x, t, y).prediction, expected, rtol=1e-5, atol=2e-6)

    heads = imported.heads or None
    model = loaded(imported)
    path = export_official(tmp_path / "o.pt", model.cfg, ema=model.state_dict(), heads=heads)
    back = torch.load(path, weights_only=True)["ema"]
    listed = about["weights"][f"{name}_weights.safetensors"]
    assert {key: [list(value.shape), "float32"] for key, value in back.items()} == listed
    for key in sorted(listed):
        torch.testing.assert_close(back[key], state[key], rtol=0, atol=1e-7 if key == "pos_embed" else 0)


@pytest.mark.usefixtures("nano")
def test_an_export_comes_back_with_its_cache(shapes_cache: Path, tmp_path: Path) -> None:
    """Checkpoints do not say which VAE made their latents; the cache does."""
    run = train(settings(shapes_cache, steps=1), resume=False, watcher=Listener(), root=tmp_path)
    file = export_checkpoint(run, tmp_path / "weights.pt", convention=None, step=None)
    common: dict[str, Any] = {"weights": "ema", "convention": None, "root": tmp_path}
    back = import_checkpoint(file, name="back", cache=str(shapes_cache), **common)
    assert (back / "cache.json").read_text() == (run / "cache.json").read_text()
    shutil.copytree(shapes_cache, tmp_path / "bare")
    remove_features(tmp_path / "bare", ["vae/moments"])
    with pytest.raises(CacheError, match="does not hold vae/moments"):
        import_checkpoint(file, name="other", cache=str(tmp_path / "bare"), **common)
    assert not (tmp_path / "other").exists()
