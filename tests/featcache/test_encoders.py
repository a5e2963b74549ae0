"""The table of encoders against timm and diffusers, preprocessing against formulas, weights from files."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from featcache.encoders.base import Compute, WeightsSource
from featcache.encoders.custom import UserEncoder
from featcache.encoders.keys import from_ijepa, from_mocov3
from featcache.encoders.table import CLIP_MEAN, CLIP_STD, ENCODERS, IMAGENET_MEAN, IMAGENET_STD, TEXTS, VAES, token_grid
from featcache.encoders.tiny import load_tiny_vae
from featcache.encoders.vae import (
    LEVELS,
    VaeEncoder,
    build_vae,
    downsampling_of,
    encoder_layers,
    load_recorded_vae,
    load_vae,
)
from featcache.encoders.vision import Preparation, VisionEncoder, build_vision, on_grid
from featcache.errors import UserError

RANDOM = WeightsSource(random_seed=0)


def some_pixels(side: int, count: int = 1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(side).integers(0, 256, (count, 3, side, side), dtype=np.uint8))


@pytest.mark.parametrize("name", ENCODERS)
def test_each_entry_is_what_timm_builds_at_256_and_512_px(name: str) -> None:
    """At full size on the meta device: name, depth, width, patch, and 16x16 or 32x32 tokens from the final block."""
    entry = ENCODERS[name]
    # Both sizes for one encoder of each kind: building the large ones costs half a second.
    for resolution in (
        (256, 512) if name in ("dinov2-b", "dinov3-s", "dino-b", "clip-l", "siglip-b", "pe-core-b") else (256,)
    ):
        side = entry.input_px(resolution)
        with torch.device("meta"):
            model: Any = build_vision(entry, input_px=side)
            blank = torch.zeros(1, 3, side, side)
        assert (len(model.blocks), model.embed_dim) == (entry.depth, entry.width)
        assert model.patch_embed.patch_size == (entry.patch, entry.patch)
        with torch.no_grad():
            taken = model.forward_intermediates(
                blank, indices=[entry.final_layer], output_fmt="NLC", intermediates_only=True
            )
        assert taken[0].shape == (1, (resolution // 16) ** 2, entry.width)
        assert callable(model.norm)
        assert (model.cls_token is not None) == entry.class_token


@pytest.mark.parametrize("name", [n for n, e in ENCODERS.items() if "." in e.timm_name])
def test_facts_agree_with_timms_own_record(name: str) -> None:
    import timm

    entry = ENCODERS[name]
    record = timm.get_pretrained_cfg(entry.timm_name)
    assert record is not None, f"timm knows no weights {entry.timm_name}"
    assert entry.mean == pytest.approx(record.mean)
    assert entry.std == pytest.approx(record.std)
    assert entry.native_px == record.input_size[-1]
    if record.hf_hub_id and entry.key_format == "timm":
        # timm keeps one file for the two activations of OpenAI's CLIP.
        assert entry.hub_id is not None
        renamed = [name.replace("_clip_224", "_clip_quickgelu_224") for name in (record.hf_hub_id, entry.hub_id)]
        assert renamed[0] == renamed[1]


def cubic_matrix(n_in: int, n_out: int) -> np.ndarray:
    """Keys' cubic convolution with a = -0.75 at half-pixel centres, edges clamped: float64 [n_out, n_in]."""
    a, matrix = -0.75, np.zeros((n_out, n_in))
    for i in range(n_out):
        centre = (i + 0.5) * n_in / n_out - 0.5
        base = int(np.floor(centre))
        for tap in range(base - 1, base + 3):
            d = abs(centre - tap)
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            matrix[i, min(max(tap, 0), n_in - 1)] += near if d <= 1 else far
    return matrix


def linear_matrix(n_in: int, n_out: int) -> np.ndarray:
    matrix = np.zeros((n_out, n_in))
    for i in range(n_out):
        centre = max((i + 0.5) * n_in / n_out - 0.5, 0.0)
        low = min(int(centre), n_in - 1)
        matrix[i, low] += 1 - (centre - low)
        matrix[i, min(low + 1, n_in - 1)] += centre - low
    return matrix


@pytest.mark.parametrize(
    "name", ["dinov2-b", "dino-b", "mae-l", "mocov3-b", "ijepa-h", "clip-l", "siglip-so400m", "pe-core-l"]
)
@pytest.mark.parametrize("resolution", [256, 512])
def test_preprocessing_equals_an_independent_formula(name: str, resolution: int) -> None:
    """The public code's steps per encoder, in float64 and with interpolation matrices of our own."""
    pixels = some_pixels(resolution)
    x = pixels[0].numpy() / 255.0
    mean, std = {
        "clip-l": (CLIP_MEAN, CLIP_STD),
        "siglip-so400m": ((0.5,) * 3, (0.5,) * 3),
        "pe-core-l": ((0.5,) * 3, (0.5,) * 3),
    }.get(name, (IMAGENET_MEAN, IMAGENET_STD))
    side = (
        {"dinov2-b": 14, "ijepa-h": 14, "clip-l": 14, "siglip-so400m": 14, "pe-core-l": 14}.get(name, 16)
        * resolution
        // 16
    )

    def normalise(y: np.ndarray) -> np.ndarray:
        return (y - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]

    def resize(y: np.ndarray) -> np.ndarray:
        matrix = (linear_matrix if name == "pe-core-l" else cubic_matrix)(resolution, side)
        return matrix @ y @ matrix.T

    expected = normalise(resize(x)) if name in ("clip-l", "pe-core-l") else resize(normalise(x))
    entry = ENCODERS[name]
    prepare = Preparation(
        mean=entry.mean,
        std=entry.std,
        input_px=entry.input_px(resolution),
        resize_first=entry.resize_first,
        mode=entry.resize_mode,
    )
    got = prepare(pixels)[0].numpy()
    assert got.shape == (3, side, side)
    # PyTorch computes coordinates in float32: half an ulp at 512 px is 3.1e-5 px, times a slope of at most 4.5 a pixel,
    # on two axes, forward and back.
    assert np.abs(got - expected).max() < 2 * 2 * 3.1e-5 * 4.5


def test_tokens_of_another_grid_are_resampled_and_square() -> None:
    ramp = torch.arange(8.0).view(1, 8, 1).expand(8, 8, 1).reshape(1, 64, 1)  # varies along x only
    half = on_grid(ramp, 4).reshape(4, 4)
    # Triangle filter of radius 2 over a ramp: the mean of the pair inside, 1/7 of a pixel inwards at the borders.
    weights = np.array([1.0, 3.0, 3.0, 1.0])
    inner = (weights * np.array([1, 2, 3, 4])).sum() / 8
    edge = (weights[1:] * np.array([0, 1, 2])).sum() / 7
    assert torch.allclose(half[0], torch.tensor([edge, inner, inner + 2, 7 - edge], dtype=torch.float32))
    assert on_grid(ramp, 8) is ramp
    with pytest.raises(UserError, match="square"):
        on_grid(torch.zeros(1, 6, 1), 4)


def test_token_grid_follows_the_latent() -> None:
    assert [token_grid(256, f) for f in (4, 8, 16, 32, 64)] == [16, 16, 16, 8, 4]
    assert token_grid(512, 8) == 32
    assert VisionEncoder("tiny", (5,), WeightsSource(), resolution=64, grid=2).shapes == {"tiny@5": (4, 128)}


def test_clip_and_mae_tokens_leave_without_the_final_norm_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's rule on a small stand-in of the class: REPA takes MAE's and CLIP's tokens before the last norm."""
    from dataclasses import replace

    small = replace(ENCODERS["mae-l"], timm_name="vit_tiny_patch16_224", depth=12, width=192)
    monkeypatch.setattr("featcache.encoders.vision.ENCODERS", {"mae-l": small})
    pixels = some_pixels(32)
    plain = VisionEncoder("mae-l", (), RANDOM, resolution=32)
    normed = VisionEncoder("mae-l", (), RANDOM, resolution=32, final_norm="all")
    assert plain.provenance["mae-l@11"]["final_norm"] is False
    with torch.no_grad():
        expected = plain.module.norm(plain(pixels)["mae-l@11"])
    assert torch.allclose(normed(pixels)["mae-l@11"], expected, atol=1e-5)
    assert [n for n, e in ENCODERS.items() if not e.final_norm] == [
        "mae-l", "clip-l", "pe-core-b", "pe-core-l", "pe-spatial-b", "pe-spatial-l"
    ]  # fmt: skip


def test_ijepa_weights_of_the_hub_give_transformers_own_tokens() -> None:
    from timm.models.vision_transformer import VisionTransformer
    from transformers import IJepaConfig, IJepaModel

    torch.manual_seed(0)
    theirs = IJepaModel(
        IJepaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=56,
            patch_size=14,
        ),
        add_pooling_layer=False,
    ).eval()
    torch.nn.init.normal_(theirs.embeddings.position_embeddings)
    ours: Any = VisionTransformer(
        img_size=56,
        patch_size=14,
        embed_dim=32,
        depth=2,
        num_heads=2,
        mlp_ratio=2,
        num_classes=0,
        class_token=False,
        global_pool="",
    ).eval()
    ours.norm.eps = theirs.layernorm.eps
    for block in ours.blocks:
        block.norm1.eps = block.norm2.eps = theirs.config.layer_norm_eps
    former = {}
    for key, value in theirs.state_dict().items():
        key = key.replace("layers.", "encoder.layer.", 1) if key.startswith("layers.") else key
        for new, old in (
            ("attention.o_proj", "attention.output.dense"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
        ):
            key = key.replace(new, old)
        for part, word in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            key = key.replace(f"attention.{part}", f"attention.attention.{word}")
        former[key] = value
    assert "encoder.layer.0.attention.attention.query.weight" in former
    x = torch.randn(2, 3, 56, 56)
    for state in (theirs.state_dict(), former):
        ours.load_state_dict(from_ijepa(dict(state)))
        with torch.no_grad():
            assert torch.allclose(ours.forward_features(x), theirs(x).last_hidden_state, atol=1e-5)
    original = {f"module.{key}": value for key, value in ours.state_dict().items()}
    assert from_ijepa(original).keys() == ours.state_dict().keys()


def test_mocov3_checkpoint_becomes_the_base_encoder() -> None:
    state = {
        "module.base_encoder.blocks.13.norm13.weight": torch.ones(1),
        "module.base_encoder.blocks.13.mlp.fc13.bias": torch.ones(1),
        "module.base_encoder.blocks.14.norm14.weight": torch.ones(1),
        "module.base_encoder.blocks.14.mlp.fc14.bias": torch.ones(1),
        "module.base_encoder.head.0.weight": torch.ones(1),
        "module.momentum_encoder.norm.weight": torch.ones(1),
        "module.base_encoder.norm.weight": torch.ones(1),
        "module.predictor.0.weight": torch.ones(1),
    }
    assert sorted(from_mocov3(state)) == [
        "blocks.13.mlp.fc1.bias",
        "blocks.13.norm1.weight",
        "blocks.14.mlp.fc2.bias",
        "blocks.14.norm2.weight",
        "norm.weight",
    ]


def test_mocov3_file_at_224_px_loads_with_its_position_table_resampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    import timm
    from timm.layers import resample_abs_pos_embed

    small = replace(ENCODERS["mocov3-b"], timm_name="vit_tiny_patch16_224", depth=12, width=192)
    monkeypatch.setattr("featcache.encoders.vision.ENCODERS", {"mocov3-b": small})
    torch.manual_seed(1)
    trained: Any = timm.create_model("vit_tiny_patch16_224", num_classes=7)
    state = {f"module.base_encoder.{key}": value for key, value in trained.state_dict().items()}
    torch.save({"epoch": 300, "state_dict": state}, tmp_path / "mocov3-b.pth")
    loaded: Any = VisionEncoder("mocov3-b", (), WeightsSource(weights_dir=tmp_path), resolution=256).module
    assert torch.equal(loaded.blocks[5].mlp.fc1.weight, trained.blocks[5].mlp.fc1.weight)
    expected = resample_abs_pos_embed(trained.pos_embed, [16, 16], num_prefix_tokens=1)
    assert torch.equal(loaded.pos_embed, expected)
    with pytest.raises(UserError, match="no hub has them") as caught:
        VisionEncoder("mocov3-b", (), WeightsSource(), resolution=256)
    assert "moco-v3" in str(caught.value)


@pytest.mark.parametrize("name", VAES)
def test_each_vae_is_what_diffusers_builds(name: str) -> None:
    """At full size on the meta device: class, latent shape at 256 px, and the levels' widths and layers."""
    entry = VAES[name]
    vae: Any
    if name == "tiny":
        vae = load_tiny_vae()
    else:
        with torch.device("meta"):
            vae = build_vae(entry.model_class, entry.config)
    assert downsampling_of(vae) == entry.downsampling
    assert vae.config.latent_channels == entry.latent_channels
    assert float(vae.config.scaling_factor) > 0
    layers = encoder_layers(vae)
    seen: dict[int, tuple[int, ...]] = {}
    for i, layer in enumerate(layers):
        layer.module.register_forward_hook(lambda _m, _i, out, i=i: seen.update({i: tuple(out.shape)}))
    device = next(vae.parameters()).device
    with torch.no_grad():
        latent = vae.encoder(torch.zeros(1, 3, 256, 256, device=device))
    side = 256 // entry.downsampling
    assert latent.shape == (1, entry.latent_channels * (2 if entry.posterior else 1), side, side)
    assert [seen[i][1] for i in range(len(layers))] == [layer.width for layer in layers]
    for level in LEVELS:
        assert len({layer.width for layer in layers if layer.level == level}) == 1
    lowest = [seen[i][2] for i, layer in enumerate(layers) if layer.level == "G4"]
    assert set(lowest) == {side}


def test_published_scales_of_the_latents() -> None:
    expected = {
        "sd-ft-ema": 0.18215,
        "sd-ft-mse": 0.18215,
        "sdxl": 0.13025,
        "taesd": 1.0,
        "dc-ae-f32c32": 0.3189,
        "dc-ae-f64c128": 0.2889,
    }
    assert {name: VAES[name].config["scaling_factor"] for name in expected} == expected


@pytest.mark.parametrize("name", ["taesd", "sdxl"])
def test_vae_features_have_the_declared_shapes(name: str) -> None:
    encoder = VaeEncoder(name, RANDOM, resolution=64, levels=LEVELS)
    pixels = some_pixels(64, 2)
    features = encoder(pixels)
    assert {k: tuple(v.shape[1:]) for k, v in features.items()} == encoder.shapes
    assert encoder.info["latent_channels"] == 4
    again = encoder(pixels)
    assert all(torch.equal(features[k], again[k]) for k in features)


def test_vae_without_a_posterior_gives_its_latent_and_no_spread() -> None:
    vae: Any
    vae, _ = load_vae("taesd", RANDOM)
    pixels = some_pixels(64)
    moments = VaeEncoder("taesd", RANDOM, resolution=64)(pixels)["vae/moments"]
    with torch.no_grad():
        expected = vae.encode(pixels.float() / 127.5 - 1).latents
    assert torch.allclose(moments[:, :4], expected, atol=1e-5)
    assert (moments[:, 4:] == -30).all()


def test_a_vae_in_a_folder_of_another_depth_and_shift(tmp_path: Path) -> None:
    """Five stages, 16 channels, no quantising convolution, a shift: as diffusers saves it, and back."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 5, up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=(8, 8, 16, 16, 24), layers_per_block=1, norm_num_groups=4, latent_channels=16,
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip
    vae.save_pretrained(tmp_path / "mine")
    encoder = VaeEncoder(str(tmp_path / "mine"), WeightsSource(), resolution=64, levels=("G3", "G4"))
    assert encoder.info | {"sha256": ""} == {
        "name": str(tmp_path / "mine"),
        "sha256": "",
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "downsampling": 16,
    }
    assert encoder.grid == 4
    assert encoder.shapes == {"vae/moments": (32, 4, 4), "vae/G3": (2, 16, 16), "vae/G4": (4, 16, 24)}
    pixels = some_pixels(64)
    with torch.no_grad():
        expected = vae.encode(pixels.float() / 127.5 - 1).latent_dist.parameters
    assert torch.allclose(encoder(pixels)["vae/moments"], expected, atol=1e-5)
    by_dir = VaeEncoder("mine", WeightsSource(weights_dir=tmp_path), resolution=64)
    assert by_dir.info["sha256"] == encoder.info["sha256"]
    with pytest.raises(UserError, match="multiple of 16"):
        VaeEncoder("mine", WeightsSource(weights_dir=tmp_path), resolution=72)
    (tmp_path / "mine/config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(UserError, match="UNet2DModel"):
        load_vae("mine", WeightsSource(weights_dir=tmp_path))


def test_bf16_is_near_fp32_and_says_so() -> None:
    pixels = some_pixels(64)
    exact = VisionEncoder("tiny", (5,), WeightsSource(), resolution=64)
    rough = VisionEncoder("tiny", (5,), WeightsSource(), resolution=64, compute=Compute(precision="bf16"))
    a, b = exact(pixels)["tiny@5"], rough(pixels)["tiny@5"]
    assert a.dtype == b.dtype == torch.float32
    error = float((a - b).norm() / a.norm())
    assert 1e-4 < error < 0.05
    assert rough.provenance["tiny@5"]["precision"] == "bf16"
    with pytest.raises(UserError, match="fp8"):
        Compute(precision="fp8")


CUSTOM = """
import torch
from featcache.encoders.custom import CustomEncoder

class Patches(torch.nn.Module):
    def forward(self, x):
        coarse = torch.nn.functional.avg_pool2d(x, 8).flatten(2).transpose(1, 2)
        return [coarse, coarse * 2]

def patches(resolution):
    return CustomEncoder(module=Patches(), mean=(0, 0, 0), std=(1, 1, 1), weights="none")

def wrong(resolution):
    return CustomEncoder(module=torch.nn.Identity())
"""


def test_a_users_encoder(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(CUSTOM)
    encoder = UserEncoder(f"{file}:patches", (), resolution=64, grid=8)
    assert encoder.shapes == {"patches@0": (64, 3), "patches@1": (64, 3)}
    pixels = some_pixels(64)
    expected = pixels[0].double().reshape(3, 8, 8, 8, 8).mean(dim=(2, 4)).flatten(1).T / 255
    assert torch.allclose(encoder(pixels)["patches@0"][0].double(), expected, atol=1e-6)
    assert UserEncoder(f"{file}:patches", (1,), resolution=64).shapes == {"patches@1": (16, 3)}
    for name, message in ((f"{file}:wrong", "tokens"), (f"{file}:nothing", "no function"), ("absent.py:f", "no file")):
        with pytest.raises(UserError, match=message):
            UserEncoder(name, (), resolution=64)
    with pytest.raises(UserError, match="no layer 2"):
        UserEncoder(f"{file}:patches", (2,), resolution=64)


def test_fifteen_layers_are_grouped_as_the_paper_groups_them() -> None:
    layers = encoder_layers(load_tiny_vae())
    by_group = {level: [layer.name for layer in layers if layer.level == level] for level in LEVELS}
    assert by_group == {
        "G1": ["conv_in", "down0.res0", "down0.res1", "down0.downsample"],
        "G2": ["down1.res0", "down1.res1", "down1.downsample"],
        "G3": ["down2.res0", "down2.res1", "down2.downsample", "down3.res0"],
        "G4": ["down3.res1", "mid.res0", "mid.attn", "mid.res1"],
    }


def test_sd_vae_has_the_published_widths() -> None:
    encoder = VaeEncoder("sd-ft-ema", WeightsSource(random_seed=0), resolution=64, levels=LEVELS)
    assert {k: v[0] for k, v in encoder.shapes.items() if "G" in k} == {
        "vae/G1": 4,
        "vae/G2": 3,
        "vae/G3": 4,
        "vae/G4": 4,
    }
    assert {k: v[2] for k, v in encoder.shapes.items() if "G" in k} == {
        "vae/G1": 128,
        "vae/G2": 256,
        "vae/G3": 512,
        "vae/G4": 512,
    }
    features = encoder(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert {k: tuple(v.shape[1:]) for k, v in features.items()} == encoder.shapes
    assert encoder.info["scaling_factor"] == 0.18215


def test_dinov2_layers_and_final_norm() -> None:
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    both = VisionEncoder("dinov2-s", (9, 11), WeightsSource(random_seed=0), resolution=64)
    last = VisionEncoder("dinov2-s", (9, 11), WeightsSource(random_seed=0), resolution=64, final_norm="last")
    assert both.shapes == {"dinov2-s@9": (16, 384), "dinov2-s@11": (16, 384)}
    normed, plain = both(pixels), last(pixels)
    model = both.module
    with torch.no_grad():
        full = model.forward_features(both.prepare(pixels))
    assert torch.allclose(normed["dinov2-s@11"], full[:, model.num_prefix_tokens :], atol=1e-5)
    assert torch.allclose(plain["dinov2-s@11"], normed["dinov2-s@11"], atol=1e-5)
    assert torch.allclose(model.norm(plain["dinov2-s@9"]), normed["dinov2-s@9"], atol=1e-5)
    assert not torch.allclose(plain["dinov2-s@9"], normed["dinov2-s@9"], atol=1e-2)


def test_random_weights_are_a_function_of_the_seed_and_marked() -> None:
    a = VisionEncoder("dinov2-s", (), WeightsSource(random_seed=3), resolution=64)
    torch.manual_seed(99)
    b = VisionEncoder("dinov2-s", (), WeightsSource(random_seed=3), resolution=64)
    c = VisionEncoder("dinov2-s", (), WeightsSource(random_seed=4), resolution=64)
    origin = [e.provenance["dinov2-s@11"] for e in (a, b, c)]
    assert origin[0]["sha256"] == origin[1]["sha256"] != origin[2]["sha256"]
    assert origin[0]["weights"] == "random"
    assert origin[0]["seed"] == 3


def test_weights_dir_is_found_and_loaded(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = VisionEncoder("dinov2-s", (), WeightsSource(random_seed=5), resolution=224).module
    save_file(model.state_dict(), tmp_path / "dinov2-s.safetensors")
    loaded = VisionEncoder("dinov2-s", (), WeightsSource(weights_dir=tmp_path), resolution=224)
    assert torch.equal(loaded.module.blocks[3].attn.qkv.weight, model.blocks[3].attn.qkv.weight)
    assert loaded.provenance["dinov2-s@11"]["weights"] == "timm/vit_small_patch14_dinov2.lvd142m"
    (tmp_path / "dinov2-s.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="cannot read weights"):
        VisionEncoder("dinov2-s", (), WeightsSource(weights_dir=tmp_path), resolution=224)


def test_sd_vae_files_under_former_attention_names_load(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from featcache.encoders.vae import load_vae

    vae, _ = load_vae("sd-ft-mse", WeightsSource(random_seed=1))
    former = {}
    for key, value in vae.state_dict().items():
        if "attentions" in key:
            for old, new in (
                (".query.", ".to_q."),
                (".key.", ".to_k."),
                (".value.", ".to_v."),
                (".proj_attn.", ".to_out.0."),
            ):
                key = key.replace(new, old)
        former[key] = value
    assert any(".query." in k for k in former)
    (tmp_path / "sd-vae-ft-mse").mkdir()
    save_file(former, tmp_path / "sd-vae-ft-mse/diffusion_pytorch_model.safetensors")
    loaded, origin = load_vae("sd-ft-mse", WeightsSource(weights_dir=tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(vae.state_dict().values(), loaded.state_dict().values()))
    assert origin["weights"] == "stabilityai/sd-vae-ft-mse"


def test_offline_without_weights_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcache.encoders.hub._hub_problem", lambda: "the model hub does not answer: test")
    monkeypatch.setenv("HF_HUB_CACHE", "/nonexistent")
    with pytest.raises(UserError) as caught:
        VisionEncoder("dinov2-s", (), WeightsSource(), resolution=64)
    assert "--weights-dir" in str(caught.value)
    assert "--random-weights" not in str(caught.value), "an option of builds alone"


DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_tables_in_the_docs_are_those_of_the_code() -> None:
    with_tables = runpy.run_path(str(DOCS / "make_tables.py"))["with_tables"]
    for name in ("training.md", "performance.md", "side-by-side.md", "encoders.md"):
        page = (DOCS / name).read_text("utf-8")
        assert "<!-- table:" in page and with_tables(page) == page, "run: python docs/make_tables.py"
    for name in (*ENCODERS, *VAES, *TEXTS):
        assert f"| `{name}` |" in page


def test_adding_an_encoder_by_following_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex

    import featcache
    from featcache.cli import app
    from featcache.console import run_app

    page = (DOCS / "adding-an-encoder.md").read_text("utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    command = page.split("```python\n")[1].split("```\n")[2].split("```")[0].strip()
    assert len([line for line in code.splitlines() if line.strip()]) < 20
    (tmp_path / "my_encoder.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", shlex.split(command))
    assert run_app(app) == 0
    (path,) = (tmp_path / "caches").iterdir()
    spec = featcache.open(path).manifest.features["resnet@0"]
    assert spec.shape == (16, 256)
    assert spec.provenance["weights"] == "random, seed 0"


@pytest.mark.slow
def test_compiled_encoders_give_the_same_features_every_time() -> None:
    """Hooks, levels and layers survive compilation; rounding differs by a few ulp of the largest value."""
    pixels = some_pixels(64, 4)
    for make in (
        lambda compute: VisionEncoder("tiny", (3, 5), WeightsSource(), resolution=64, compute=compute),
        lambda compute: VaeEncoder("tiny", WeightsSource(), resolution=64, levels=("G3", "G4"), compute=compute),
    ):
        plain, compiled = make(Compute()), make(Compute(compile=True))
        expected, got, again = plain(pixels), compiled(pixels), compiled(pixels)
        assert list(got) == list(expected)
        for name, value in expected.items():
            assert float((value - got[name]).abs().max()) < 1e-5 * float(value.abs().max())
            assert torch.equal(got[name], again[name])


@pytest.mark.parametrize("record", [{}, {"seed": None}, {"seed": "3"}, {"seed": True}, {"seed": -1}, {"seed": 1 << 64}])
def test_random_weights_of_a_damaged_record_are_refused(record: dict[str, Any]) -> None:
    """A run's cache.json may come from anybody."""
    with pytest.raises(UserError, match="random weights, and of no seed that could be theirs") as caught:
        load_recorded_vae({"name": "sd-ft-ema"}, {"weights": "random", **record})
    assert "cache.json" in str(caught.value)
