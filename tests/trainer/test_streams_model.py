"""Backbones with streams: their size, positions, initial weights and cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from featcache.errors import UserError
from trainer.models import Transformer, build_model
from trainer.models.blocks import rotary_positions, sincos_positions, token_positions
from trainer.models.config import ModelConfig, StreamShape, forward_flops, model_config
from trainer.sampling.inference import Arithmetic, Network

CLS = StreamShape(name="dinov2-b@11.cls", channels=768, side=1, merged=False)
PCA = StreamShape(name="dinov2-b@11.pca8", channels=8, side=16, merged=True)
SQUARE = StreamShape(name="a@1", channels=5, side=3, merged=False)
LONE = StreamShape(name="a@1.cls", channels=6, side=1, merged=False)


def xl(*streams: StreamShape, name: str = "SiT-XL/2") -> ModelConfig:
    return model_config(name, latent_channels=4, latent_size=32, num_classes=1000, streams=streams)


def small(name: str = "SiT-Ti/2", *streams: StreamShape) -> ModelConfig:
    return model_config(name, latent_channels=4, latent_size=8, num_classes=3, streams=streams)


def on_meta(cfg: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(cfg)


def count(cfg: ModelConfig) -> int:
    return sum(p.numel() for p in on_meta(cfg).parameters())


def test_reg_s_model_has_the_published_number_of_parameters() -> None:
    """REG's SiT-XL/2 at 256 px. What it adds: Linear(768, D), LayerNorm(D), Linear(D, 768)."""
    assert count(xl(CLS)) == 676_589_968
    assert count(xl(CLS)) - count(xl()) == (768 + 1) * 1152 + 2 * 1152 + (1152 + 1) * 768


def test_redi_s_components_are_further_channels() -> None:
    """Of the latents' 4: 12 in and 12 out, in one patch embedding and one last layer; on DiT twice as many out."""
    model = on_meta(xl(PCA))
    assert model.cfg.in_channels == 12 and tuple(model.x_embedder.proj.weight.shape) == (1152, 12, 2, 2)
    assert tuple(model.final_layer.linear.weight.shape) == (4 * 12, 1152)
    assert not model.stream_embedders and tuple(model.pos_embed.shape) == (1, 256, 1152)
    assert count(xl(PCA)) - count(xl()) == 1152 * 8 * 4 + (1152 + 1) * 8 * 4
    assert on_meta(xl(PCA, name="DiT-XL/2")).final_layer.linear.out_features == 4 * 2 * 12


@pytest.mark.parametrize("streams", [(LONE,), (SQUARE,), (LONE, SQUARE), (SQUARE, LONE)])
def test_positions_of_a_lone_token_are_zero_and_of_a_square_sin_cos(streams: tuple[StreamShape, ...]) -> None:
    cfg = small("SiT-Ti/2", *streams)
    table = build_model(cfg).pos_embed
    assert torch.equal(table, token_positions(cfg))
    at = 0
    for stream in streams:
        part = table[:, at : at + stream.tokens]
        wanted = torch.zeros(1, 1, cfg.width) if stream is LONE else sincos_positions(cfg.width, 3)
        assert torch.equal(part, wanted)
        at += stream.tokens
    assert torch.equal(table[:, at:], build_model(small()).pos_embed)


def test_a_lone_token_is_not_rotated() -> None:
    model = build_model(small("LightningDiT-Ti/2", SQUARE, LONE))
    blocks: Any = model.blocks
    rope = blocks[0].attn.rope
    assert all(block.attn.rope is rope for block in blocks)
    x = torch.randn(2, 3, 9 + 1 + 16, 64)
    turned = rope(x)
    assert torch.equal(turned[:, :, 9], x[:, :, 9])
    for rows, side in ((slice(0, 9), 3), (slice(10, 26), 4)):
        cos, sin = rotary_positions(64, side)
        pairs = torch.view_as_complex(x[:, :, rows].unflatten(-1, (-1, 2)).contiguous())
        by = torch.complex(cos[:, ::2], sin[:, ::2])
        torch.testing.assert_close(turned[:, :, rows], torch.view_as_real(pairs * by).flatten(-2))


@pytest.mark.parametrize("backbone", ["SiT-Ti/2", "LightningDiT-Ti/2"])
def test_streams_with_tokens_leave_all_other_weights_as_the_seed_gives_them(backbone: str) -> None:
    alone, beside = build_model(small(backbone), seed=4), build_model(small(backbone, LONE, SQUARE), seed=4)
    ours = beside.state_dict()
    for name, value in alone.state_dict().items():
        assert torch.equal(ours[name], value), name
    new = set(ours) - set(alone.state_dict())
    assert {name.split(".")[0] for name in new} == {"stream_embedders", "final_layer"}
    embed: Any
    last: Any
    for k, (embed, last) in enumerate(zip(beside.stream_embedders, beside.final_layer.stream_linears)):
        bound = (6 / sum(embed.proj.weight.shape)) ** 0.5  # Xavier's
        assert 0.9 * bound < embed.proj.weight.abs().max() <= bound, k
        assert not embed.proj.bias.any() and (embed.norm.weight == 1).all() and not embed.norm.bias.any()
        assert not last.weight.any() and not last.bias.any()


@pytest.mark.parametrize("streams", [(), (LONE,), (SQUARE, LONE), (PCA,), (PCA, LONE)])
@pytest.mark.parametrize("backbone", ["SiT-Ti/2", "LightningDiT-Ti/2"])
def test_the_flops_count_the_tokens(backbone: str, streams: tuple[StreamShape, ...]) -> None:
    """As torch counts the products of a forward pass of one image."""
    cfg = small(backbone, *streams)
    model = build_model(cfg)
    own = tuple(torch.zeros(1, s.channels, s.tokens) for s in cfg.own_streams)
    x, t, y = torch.zeros(1, cfg.in_channels, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t, y, streams=own)
    assert counter.get_total_flops() == forward_flops(cfg)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t, y, streams=own, stop_after=2)
    assert counter.get_total_flops() == forward_flops(cfg, depth=2)


def test_hidden_states_are_the_image_s_and_the_streams_stand_before_them() -> None:
    cfg = small("SiT-Ti/2", SQUARE, LONE)
    model = build_model(cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 1])
    own = (torch.randn(2, 5, 9), torch.randn(2, 6, 1))
    caught: dict[str, Any] = {}
    model.blocks[2].register_forward_hook(lambda _m, _a, out: caught.update(h=out))
    output = model(x, t, y, streams=own, taps=(3,))
    assert output.stream_hidden is not None
    assert torch.equal(torch.cat([output.stream_hidden[3], output.hidden[3]], 1), caught["h"])
    assert [tuple(part.shape) for part in output.streams] == [(2, 5, 9), (2, 6, 1)]
    stopped = model(x, t, y, streams=own, taps=(3,), stop_after=3)
    assert stopped.prediction is None and torch.equal(stopped.hidden[3], output.hidden[3])
    from trainer.diffusion.streams import Layout

    layout = Layout(cfg=cfg)
    hidden = layout.hidden(output)
    assert torch.equal(hidden["a@1"][3], caught["h"][:, :9]) and torch.equal(hidden["a@1.cls"][3], caught["h"][:, 9:10])


def test_a_dit_with_tokens_of_streams_is_refused() -> None:
    with pytest.raises(UserError, match=r"a@1\.cls would have tokens of its own") as error:
        small("DiT-Ti/2", LONE)
    assert "SiT or LightningDiT" in str(error.value.remedy)


def test_weights_rounded_for_sampling_change_no_bit_of_what_autocast_computes() -> None:
    cfg = small("LightningDiT-Ti/2", SQUARE, LONE)
    model = build_model(cfg).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    x, t, y = torch.randn(2, 4, 8, 8, generator=g), torch.rand(2, generator=g), torch.tensor([0, 1])
    own = (torch.randn(2, 5, 9, generator=g), torch.randn(2, 6, 1, generator=g))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = model(x, t, y, streams=own)
    with torch.no_grad():
        found = Network(model, Arithmetic(precision="bf16"))(x, t, y, streams=own)
    for a, b in zip((wanted.prediction, *wanted.streams), (found.prediction, *found.streams), strict=True):
        assert a is not None and b is not None and b.dtype == torch.float32
        assert torch.equal(a.float(), b)
