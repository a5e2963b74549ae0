"""VA-VAE and its kin: files under latent-diffusion's names, against a forward pass of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from featcache.encoders import hub
from featcache.encoders.base import WeightsSource
from featcache.encoders.keys import from_compvis
from featcache.encoders.missing import require_weights
from featcache.encoders.table import VAES
from featcache.encoders.vae import LEVELS, LatentDecoder, VaeEncoder, build_vae, encoder_layers, load_vae
from featcache.errors import UserError, WeightsUnavailable

State = dict[str, Tensor]
CH, MULTIPLES, Z = 32, (1, 1, 2, 2, 4), 6
SMALL = {
    **VAES["va-vae"].config,
    "block_out_channels": [CH * m for m in MULTIPLES],
    "latent_channels": Z,
    "_class_name": "AutoencoderKL",
}


def layers(ch: int = CH, z: int = Z) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as latent-diffusion has them: ch 32, mult 1 1 2 2 4, two blocks, attention on the last stage."""
    widths = [ch * m for m in MULTIPLES]

    def conv(name: str, a: int, b: int, k: int = 3) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from ((f"{name}.weight", (b, a, k, k)), (f"{name}.bias", (b,)))

    def norm(name: str, a: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from ((f"{name}.weight", (a,)), (f"{name}.bias", (a,)))

    def block(name: str, a: int, b: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from (*norm(f"{name}.norm1", a), *conv(f"{name}.conv1", a, b))
        yield from (*norm(f"{name}.norm2", b), *conv(f"{name}.conv2", b, b))
        if a != b:
            yield from conv(f"{name}.nin_shortcut", a, b, 1)

    def attn(name: str, a: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from norm(f"{name}.norm", a)
        for part in ("q", "k", "v", "proj_out"):
            yield from conv(f"{name}.{part}", a, a, 1)

    def middle(side: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from block(f"{side}.mid.block_1", widths[-1], widths[-1])
        yield from attn(f"{side}.mid.attn_1", widths[-1])
        yield from block(f"{side}.mid.block_2", widths[-1], widths[-1])

    yield from conv("encoder.conv_in", 3, ch)
    now = ch
    for i, width in enumerate(widths):
        for j in range(2):
            yield from block(f"encoder.down.{i}.block.{j}", now, width)
            now = width
            if i == 4:
                yield from attn(f"encoder.down.{i}.attn.{j}", width)
        if i < 4:
            yield from conv(f"encoder.down.{i}.downsample.conv", width, width)
    yield from middle("encoder")
    yield from (*norm("encoder.norm_out", now), *conv("encoder.conv_out", now, 2 * z))
    yield from conv("decoder.conv_in", z, now)
    yield from middle("decoder")
    for i in reversed(range(5)):
        for j in range(3):
            yield from block(f"decoder.up.{i}.block.{j}", now, widths[i])
            now = widths[i]
            if i == 4:
                yield from attn(f"decoder.up.{i}.attn.{j}", now)
        if i > 0:
            yield from conv(f"decoder.up.{i}.upsample.conv", now, now)
    yield from (*norm("decoder.norm_out", now), *conv("decoder.conv_out", now, 3))
    yield from (*conv("quant_conv", 2 * z, 2 * z, 1), *conv("post_quant_conv", z, z, 1))


@pytest.fixture(scope="module")
def state() -> State:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in layers():
        scale = (3 / max(1, torch.Size(shape[1:]).numel())) ** 0.5
        found[name] = scale * torch.randn(shape, generator=generator)
        if "norm" in name:
            found[name] = (1.0 if name.endswith("weight") else 0.0) + 0.2 * torch.randn(shape, generator=generator)
    return found


class Published:
    """The autoencoder's forward pass over such a state, in float64."""

    def __init__(self, state: State) -> None:
        self.state = {key: value.double() for key, value in state.items()}

    def conv(self, name: str, x: Tensor, **kw: Any) -> Tensor:
        weight = self.state[f"{name}.weight"]
        padding = kw.pop("padding", weight.shape[-1] // 2)
        return F.conv2d(x, weight, self.state[f"{name}.bias"], padding=padding, **kw)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps=1e-6)

    def block(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)))
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.state else x)

    def attn(self, name: str, x: Tensor) -> Tensor:
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")  # [B, C, N]
        weights = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k) / q.shape[1] ** 0.5, dim=-1)
        mixed = torch.einsum("bnm,bcm->bcn", weights, v).reshape(x.shape)
        return x + self.conv(f"{name}.proj_out", mixed)

    def stage(self, name: str, x: Tensor, blocks: int, seen: list[Tensor]) -> Tensor:
        for j in range(blocks):
            x = self.block(f"{name}.block.{j}", x)
            seen.append(x)
            if f"{name}.attn.{j}.q.weight" in self.state:
                x = self.attn(f"{name}.attn.{j}", x)
                seen.append(x)
        return x

    def middle(self, side: str, x: Tensor, seen: list[Tensor]) -> Tensor:
        for part in ("block_1", "attn_1", "block_2"):
            step = self.attn if part == "attn_1" else self.block
            x = step(f"{side}.mid.{part}", x)
            seen.append(x)
        return x

    def encode(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.conv("encoder.conv_in", x.double())
        seen = [x]
        for i in range(5):
            x = self.stage(f"encoder.down.{i}", x, 2, seen)
            if i < 4:
                x = self.conv(f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
                seen.append(x)
        x = self.middle("encoder", x, seen)
        x = self.conv("encoder.conv_out", F.silu(self.norm("encoder.norm_out", x)))
        return self.conv("quant_conv", x), seen

    def decode(self, z: Tensor) -> Tensor:
        x = self.middle("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", z.double())), [])
        for i in reversed(range(5)):
            x = self.stage(f"decoder.up.{i}", x, 3, [])
            if i > 0:
                x = self.conv(f"decoder.up.{i}.upsample.conv", x.repeat_interleave(2, -1).repeat_interleave(2, -2))
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)))


@pytest.fixture(scope="module")
def folder(state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small one with a training checkpoint's further contents, its configuration beside it."""
    path = tmp_path_factory.mktemp("vae")
    (path / "config.json").write_text(json.dumps(SMALL))
    beside = {
        "loss.logvar": torch.zeros(()),
        "loss.discriminator.main.0.weight": torch.zeros(2, 2),
        "foundation_model.model.blocks.0.attn.proj.weight": torch.zeros(2, 2),
        "linear_proj.weight": torch.zeros(2, 2, 1, 1),
    }
    content = {"epoch": 3, "global_step": 7, "state_dict": state | beside}
    torch.save(content, path / "diffusion_pytorch_model.bin")
    return path


def pixels(count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=generator)


def test_encoder_levels_and_decoder_are_the_published_ones(state: State, folder: Path) -> None:
    encoder = VaeEncoder(str(folder), WeightsSource(), resolution=64, levels=LEVELS)
    features = encoder(pixels())
    published = Published(state)
    moments, seen = published.encode(pixels() / 127.5 - 1)
    torch.testing.assert_close(features["vae/moments"].double(), moments, rtol=1e-4, atol=1e-4 * float(moments.std()))
    assert moments.std() > 0.1
    # 5 stages: conv_in, two blocks and a downsampling each; the last with attention, no downsampling, and the middle.
    groups = {"G1": seen[4:7], "G2": seen[7:10], "G3": seen[10:13], "G4": seen[13:20]}
    assert len(seen) == 20
    for level, maps in groups.items():
        side = encoder.grid
        expected = torch.stack(
            [
                F.interpolate(m, (side, side), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
                for m in maps
            ],
            dim=1,
        )
        found = features[f"vae/{level}"].double()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.std()))

    vae, _ = load_vae(str(folder), WeightsSource())
    mean, std = torch.randn(Z, 1, 1), torch.rand(Z, 1, 1) + 0.5
    decoder = LatentDecoder(vae, encoder.info, scale=1 / std, shift=mean)
    latents = torch.randn(2, Z, 4, 4)
    expected = published.decode(latents.double() * std + mean)
    torch.testing.assert_close(decoder(latents).double(), expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
    assert expected.shape == (2, 3, 64, 64)


def test_the_full_size_has_the_published_tensors() -> None:
    """342 of them, and every name has a place; the public code's count of parameters follows from the shapes."""
    full = dict(layers(ch=128, z=32))
    with torch.device("meta"):
        vae = build_vae(VAES["va-vae"].model_class, VAES["va-vae"].config)
    converted = from_compvis({name: torch.empty(shape, device="meta") for name, shape in full.items()})
    own = {key: tuple(value.shape) for key, value in vae.state_dict().items()}
    assert len(full) == 342
    assert {key: tuple(value.shape) for key, value in converted.items()} == own
    names = [layer.name for layer in encoder_layers(vae) if layer.level == "G4"]
    assert names == ["down4.res0", "down4.attn0", "down4.res1", "down4.attn1", "mid.res0", "mid.attn", "mid.res1"]
    assert {layer.level for layer in encoder_layers(vae) if layer.name.startswith(("conv_in", "down0"))} == {None}


def test_states_under_other_names_are_left_alone(state: State) -> None:
    theirs = {"encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(1), "x": torch.ones(1)}
    assert from_compvis(theirs) is theirs
    converted = from_compvis(state)
    assert converted["decoder.up_blocks.0.attentions.2.to_out.0.weight"].shape == (128, 128)
    assert torch.equal(converted["decoder.up_blocks.4.resnets.1.conv1.bias"], state["decoder.up.0.block.1.conv1.bias"])


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("va-vae", "vavae-imagenet256-f16d32-dinov2.pt"),
        ("va-vae", "va-vae.safetensors"),
        ("in-vae", "invae.pt"),
        ("e2e-va-vae", "e2e-vavae-400k.pt"),
        ("e2e-va-vae", "e2e-vavae/e2e-vavae-400k.pt"),
        ("e2e-in-vae", "e2e-in-vae.pt"),
    ],
)
def test_files_are_found_in_a_folder_of_weights(
    name: str, file: str, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = dict(VAES) | {name: type(VAES[name])(**{**vars(VAES[name]), "config": SMALL})}
    monkeypatch.setattr("featcache.encoders.vae.VAES", entries)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    if file.endswith(".pt"):
        torch.save(state, tmp_path / file)
    else:
        save_file(state, tmp_path / file)
    require_weights(WeightsSource(weights_dir=tmp_path), vae_name=name)
    vae, origin = load_vae(name, WeightsSource(weights_dir=tmp_path))
    assert origin["weights"] == VAES[name].hub_id
    assert torch.equal(vae.state_dict()["encoder.conv_in.weight"], state["encoder.conv_in.weight"])


def test_the_hub_is_asked_for_the_published_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, tuple[str, ...]]] = []

    def refuse(repo: str, names: tuple[str, ...]) -> Path:
        asked.append((repo, names))
        raise hub.HubUnreachable("test")

    monkeypatch.setattr("featcache.encoders.vae.hub_file", refuse)
    with pytest.raises(WeightsUnavailable, match="va-vae"):
        load_vae("va-vae", WeightsSource())
    with pytest.raises(WeightsUnavailable):
        load_vae("sd-ft-ema", WeightsSource())
    assert asked[0][0] == "hustvl/vavae-imagenet256-f16d32-dinov2"
    assert asked[0][1][0] == "vavae-imagenet256-f16d32-dinov2.pt"
    assert asked[1][1] == ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def test_what_is_missing_is_named(state: State, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    save_file(
        {k: v for k, v in state.items() if "down.2.block.1" not in k}, tmp_path / "diffusion_pytorch_model.safetensors"
    )
    with pytest.raises(UserError, match=r"do not fit a AutoencoderKL"):
        load_vae(str(tmp_path), WeightsSource())
