"""Against vectors that the public REPA and DiT code computed, with weights rebuilt from their seeds."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import official_forward, official_weights
from safetensors.torch import save
from torch import Tensor

from featcache.errors import UserError
from trainer.diffusion.guidance import Guidance, guided
from trainer.models import ModelConfig, Transformer, build_model, load_weights
from trainer.models.blocks import sinusoid
from trainer.models.config import SIZES
from trainer.models.dit import split_variance
from trainer.runs.exchange import export_checkpoint, import_checkpoint
from trainer.runs.folder import check_resumable
from trainer.sampling.draw import load_run

DRAWS: dict[str, dict[str, Any]] = {
    "sit_repa": {"projector": (128, 48)},
    "dit_official": {"channels_out": 8},
}
# Float32 outputs of a few hundred summands around 1; the float64 ones below are where a slip would show.
FLOAT32 = {"rtol": 1e-5, "atol": 2e-6}
FLOAT64 = {"rtol": 1e-10, "atol": 1e-10}


class Golden:
    """One set of vectors with its weights and our model that holds them."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.file = folder / f"{name}.npz"
        self.about = json.loads((folder / f"{name}.json").read_text())
        seeds = self.about["seeds"]
        self.weights = official_weights(seed=seeds["init"], seed_redrawn=seeds["rerandomised_layers"], **DRAWS[name])
        with np.load(self.file, allow_pickle=False) as arrays:
            self.arrays = {key: torch.from_numpy(np.array(arrays[key])) for key in arrays}

    def __getitem__(self, key: str) -> Tensor:
        return self.arrays[key]

    def model(self) -> Transformer:
        config = self.about["config"]
        dit = self.name == "dit_official"
        model = build_model(
            ModelConfig(
                family="dit" if dit else "sit",
                depth=config["depth"],
                width=config["hidden_size"],
                heads=config["num_heads"],
                patch_size=config["patch_size"],
                latent_channels=config["in_channels"],
                latent_size=config["input_size"],
                num_classes=config["num_classes"],
                learn_sigma=dit,
            )
        )
        load_weights(model, {k: v for k, v in self.weights.items() if not k.startswith("projectors.")})
        return model.eval()


@pytest.fixture(scope="module", params=list(DRAWS))
def golden(request: pytest.FixtureRequest, golden_folder: Path) -> Golden:
    return Golden(golden_folder, request.param)


@pytest.fixture(scope="module")
def sit(golden_folder: Path) -> Golden:
    return Golden(golden_folder, "sit_repa")


@pytest.fixture(scope="module")
def dit(golden_folder: Path) -> Golden:
    return Golden(golden_folder, "dit_official")


def test_rebuilt_weights_are_the_official_bytes(golden: Golden) -> None:
    stored = save({key: value.contiguous() for key, value in golden.weights.items()})
    assert hashlib.sha256(stored).hexdigest() == golden.about["sha256"][f"{golden.name}_weights.safetensors"]


def test_vectors_are_the_ones_described(golden: Golden) -> None:
    assert hashlib.sha256(golden.file.read_bytes()).hexdigest() == golden.about["sha256"][f"{golden.name}.npz"]


@torch.no_grad()
def test_replica_gives_the_official_output(golden: Golden) -> None:
    key = "velocity_f64" if golden.name == "sit_repa" else "output_f64"
    weights = {name: value.double() for name, value in golden.weights.items()}
    out, _ = official_forward(weights, golden["x"].double(), golden["t"], golden["y"], heads=4)
    torch.testing.assert_close(out, golden[key], **FLOAT64)


@torch.no_grad()
def test_sit_outputs(sit: Golden) -> None:
    model = sit.model()
    out = model(sit["x"], sit["t"], sit["y"], taps=(1, 2))
    torch.testing.assert_close(out.prediction, sit["velocity"], **FLOAT32)
    torch.testing.assert_close(out.hidden[1], sit["hidden_block1"], **FLOAT32)
    torch.testing.assert_close(out.hidden[2], sit["hidden_encoder_depth"], **FLOAT32)
    torch.testing.assert_close(out.time_embedding, sit["t_embed"], **FLOAT32)
    torch.testing.assert_close(model.y_embedder(sit["y"]), sit["y_embed"], rtol=0, atol=0)
    torch.testing.assert_close(model.x_embedder(sit["x"]), sit["x_embed"], **FLOAT32)
    torch.testing.assert_close(sinusoid(sit["t"]), sit["timestep_sinusoid"], rtol=0, atol=0)


@torch.no_grad()
def test_sit_projector_sees_the_official_hidden_state(sit: Golden) -> None:
    h = sit.model()(sit["x"], sit["t"], sit["y"], taps=(2,), stop_after=2).hidden[2]
    for i, act in ((0, True), (2, True), (4, False)):
        w = sit.weights
        h = h @ w[f"projectors.0.{i}.weight"].T + w[f"projectors.0.{i}.bias"]
        h = torch.nn.functional.silu(h) if act else h
    torch.testing.assert_close(h, sit["zs_tilde"], **FLOAT32)


@torch.no_grad()
def test_sit_in_float64(sit: Golden) -> None:
    out = sit.model().double()(sit["x"].double(), sit["t"].double(), sit["y"]).prediction
    torch.testing.assert_close(out, sit["velocity_f64"], **FLOAT64)


@torch.no_grad()
def test_dit_outputs(dit: Golden) -> None:
    out = dit.model()(dit["x"], dit["t"], dit["y"], taps=(2,))
    torch.testing.assert_close(out.prediction, dit["output"], **FLOAT32)
    torch.testing.assert_close(out.hidden[2], dit["hidden_block2"], **FLOAT32)
    torch.testing.assert_close(out.time_embedding, dit["t_embed"], **FLOAT32)
    noise, values = split_variance(out, 4)
    torch.testing.assert_close(noise, dit["output"][:, :4], **FLOAT32)
    assert values is not None
    torch.testing.assert_close(values, dit["output"][:, 4:], **FLOAT32)


@torch.no_grad()
def test_dit_in_float64(dit: Golden) -> None:
    out = dit.model().double()(dit["x"].double(), dit["t"], dit["y"]).prediction
    torch.testing.assert_close(out, dit["output_f64"], **FLOAT64)


@torch.no_grad()
def test_from_an_official_file_to_a_run_and_back(
    golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``trainer import`` of a training checkpoint as the public code writes it, the run's model, ``trainer export``."""
    config, sit = golden.about["config"], golden.name == "sit_repa"
    monkeypatch.setitem(SIZES, "Golden", (config["depth"], config["hidden_size"], config["num_heads"]))
    name = f"{'SiT' if sit else 'DiT'}-Golden/2"
    file = tmp_path / "0400000.pt"
    content = {"model": golden.weights, "ema": golden.weights, "opt": {}, "args": argparse.Namespace(model=name)}
    torch.save(content | {"steps": 400_000}, file)
    run = import_checkpoint(file, name="official", weights="ema", convention=None, root=tmp_path / "runs")
    loaded = load_run(run)
    assert (loaded.config.model, loaded.config.method, loaded.step) == (name, "none", 400_000)
    expected = golden["velocity" if sit else "output"]
    out = loaded.model(golden["x"], golden["t"], golden["y"]).prediction
    torch.testing.assert_close(out, expected, **FLOAT32)

    written = export_checkpoint(run, tmp_path / "back.pt", convention=None, step=None)
    back = torch.load(written, weights_only=True)
    assert back["steps"] == 400_000
    for key, value in golden.weights.items():
        if not key.startswith("projectors."):  # the run holds the backbone alone
            torch.testing.assert_close(back["ema"][key], value, rtol=0, atol=1e-7 if key == "pos_embed" else 0)
    theirs, _ = official_forward(back["ema"], golden["x"], golden["t"], golden["y"], heads=config["num_heads"])
    torch.testing.assert_close(theirs, expected, **FLOAT32)

    with pytest.raises(UserError, match="holds imported weights"):
        check_resumable(run, loaded.config, None, resume=True)


@torch.no_grad()
def test_dit_guidance_of_three_channels(dit: Golden) -> None:
    """Guided noise in both official halves is ours; all other channels are the conditional half's."""
    model, scale = dit.model(), float(dit["cfg_scale"])
    guidance = Guidance(scale=scale, channels=3)
    B = len(dit["t"])
    for i in range(B):  # each sample of the vectors has its own step
        model_fn = guided(model, dit["y"][i : i + 1], null=10, guidance=guidance, time_range=999)
        ours = model_fn(dit["x"][i : i + 1], float(dit["t"][i]))[0]
        # Guidance by 4 amplifies rounding by 7.
        torch.testing.assert_close(ours, dit["output_with_cfg"][i], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[:3], dit["output_with_cfg"][B + i, :3], rtol=1e-5, atol=1e-5)
