"""MMDiT: its arithmetic a second time in float64, counts, initialisation, what text can and cannot change."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden import position_table
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from featcache.errors import UserError
from trainer.models import (
    MODEL_NAMES,
    ModelConfig,
    TextShape,
    build_model,
    empty_model,
    forward_flops,
    load_weights,
    model_config,
)
from trainer.models.blocks import JointBlock

CLIP = TextShape(name="text/clip-l", tokens=77, width=768)
TINY = ModelConfig(
    family="sit",
    depth=3,
    width=32,
    heads=2,
    patch_size=2,
    latent_channels=4,
    latent_size=8,
    num_classes=1,
    text=TextShape(name="text/tiny", tokens=5, width=12),
)


def batch(cfg: ModelConfig, B: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    assert cfg.text is not None
    x = torch.randn(B, *cfg.latent_shape, generator=generator, dtype=dtype)
    t = torch.rand(B, generator=generator, dtype=torch.float32)
    return x, t, torch.randn(B, cfg.text.tokens, cfg.text.width, generator=generator, dtype=dtype)


def joint_forward(state: dict[str, Tensor], x: Tensor, t: Tensor, text: Tensor, *, heads: int) -> tuple[Tensor, list]:
    """The published computation written anew: one token, one head, one query at a time where that is clearer."""

    def linear(name: str, h: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", h, state[f"{name}.weight"]) + state[f"{name}.bias"]

    def norm(h: Tensor) -> Tensor:
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def head_norm(name: str, h: Tensor) -> Tensor:
        if f"{name}.weight" not in state:
            return h
        return F.layer_norm(h, h.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def silu(h: Tensor) -> Tensor:
        return h * torch.sigmoid(h)

    def gelu(u: Tensor) -> Tensor:
        return u * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))

    patch = state["x_embedder.proj.weight"].shape[-1]
    image = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=patch).flatten(2).mT
    B, N, D = image.shape
    side, d = math.isqrt(N), D // heads
    image = image + torch.from_numpy(position_table(D, side)).float()
    text = linear("context_embedder", text)
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(128).float() / 128)
    features = torch.cat([angles.cos(), angles.sin()], 1).double()
    c = silu(linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", features))))
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    hidden = []
    for i in range(depth):
        halves, qkv, mods = {"context_block": text, "x_block": image}, {}, {}
        for half, h in halves.items():
            name = f"blocks.{i}.{half}"
            mods[half] = linear(f"{name}.adaLN_modulation.1", c)[:, None].split(D, dim=-1)
            u = norm(h) * (1 + mods[half][1]) + mods[half][0]
            q, k, v = (p.unflatten(-1, (heads, d)) for p in linear(f"{name}.attn.qkv", u).split(D, dim=-1))
            qkv[half] = head_norm(f"{name}.attn.q_norm", q), head_norm(f"{name}.attn.k_norm", k), v
        q, k, v = (torch.cat([qkv["context_block"][j], qkv["x_block"][j]], dim=1) for j in range(3))
        share = torch.einsum("bnhd,bmhd->bhnm", q, k).div(math.sqrt(d)).exp()
        share = share / share.sum(-1, keepdim=True)
        found = torch.einsum("bhnm,bmhd->bnhd", share, v).flatten(2)
        parts = {"context_block": found[:, : text.shape[1]], "x_block": found[:, text.shape[1] :]}
        for half in ("context_block", "x_block"):
            name, m = f"blocks.{i}.{half}", mods[half]
            if half == "context_block" and i == depth - 1:
                assert f"{name}.attn.proj.weight" not in state
                assert len(m) == 2
                continue
            h = halves[half] + m[2] * linear(f"{name}.attn.proj", parts[half])
            halves[half] = h + m[5] * linear(
                f"{name}.mlp.fc2", gelu(linear(f"{name}.mlp.fc1", norm(h) * (1 + m[4]) + m[3]))
            )
        text, image = halves["context_block"], halves["x_block"]
        hidden.append(image)
    shift, scale = linear("final_layer.adaLN_modulation.1", c)[:, None].split(D, dim=-1)
    out = linear("final_layer.linear", norm(image) * (1 + scale) + shift)
    channels = out.shape[-1] // patch**2
    out = out.reshape(B, side, side, patch, patch, channels)
    return torch.einsum("bijpqc->bcipjq", out).reshape(B, channels, side * patch, side * patch), hidden


@pytest.mark.parametrize(
    "change",
    [{}, {"qk_norm": True}, {"depth": 1}, {"patch_size": 1, "latent_size": 5}, {"latent_channels": 16}],
)
@torch.no_grad()
def test_forward_in_float64_against_the_computation_written_a_second_time(change: dict) -> None:
    cfg = replace(TINY, **change)
    model = build_model(cfg, seed=2).double()
    x, t, y = batch(cfg)
    out = model(x, t, y, taps=range(1, cfg.depth + 1))
    expected, hidden = joint_forward(model.state_dict(), x, t, y, heads=cfg.heads)
    torch.testing.assert_close(out.prediction, expected, rtol=1e-9, atol=1e-10)
    for depth, tokens in enumerate(hidden, start=1):
        torch.testing.assert_close(out.hidden[depth], tokens, rtol=1e-9, atol=1e-10)
    early = model(x, t, y, taps=(1,), stop_after=1)
    assert early.prediction is None
    assert torch.equal(early.hidden[1], out.hidden[1])


def test_the_published_model_has_so_many_parameters() -> None:
    cfg = model_config("MMDiT-L/2", latent_channels=4, latent_size=32, num_classes=1, text=CLIP)
    assert (cfg.depth, cfg.width, cfg.heads) == (24, 768, 24)
    assert sum(p.numel() for p in empty_model(cfg).parameters()) == 505_070_608


def test_every_size_follows_the_rule_and_is_named() -> None:
    names = [name for name in MODEL_NAMES if name.startswith("MMDiT-")]
    assert {"MMDiT-Ti/2", "MMDiT-S/2", "MMDiT-B/2", "MMDiT-L/2", "MMDiT-XL/2"} <= set(names)
    for name in names:
        cfg = model_config(name, latent_channels=4, latent_size=32, num_classes=1, text=CLIP)
        assert (cfg.width, cfg.heads) == (32 * cfg.depth, cfg.depth)
        assert (cfg.name, cfg.backbone, cfg.family) == (name, "MMDiT", "sit")


def test_a_label_model_and_text_are_kept_apart() -> None:
    sizes: Any = {"latent_channels": 4, "latent_size": 32, "num_classes": 10}
    with pytest.raises(UserError, match="takes labels") as caught:
        model_config("SiT-B/2", **sizes, text=CLIP)
    assert "--model MMDiT-L/2" in str(caught.value)
    with pytest.raises(UserError, match="takes text") as caught:
        model_config("MMDiT-L/2", **sizes)
    assert "--condition text/clip-l" in str(caught.value)
    with pytest.raises(UserError, match="zero_init is MMDiT's"):
        model_config("SiT-B/2", **sizes, zero_init=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope": True}, "no other norm, MLP or position"),
        ({"norm": "rms"}, "no other norm, MLP or position"),
        ({"family": "dit"}, "SiT's layers and family"),
    ],
)
def test_layers_that_go_with_no_text_are_refused(change: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        replace(TINY, **change)


@pytest.mark.parametrize("tokens", [0, -1, 2.0, True, "77"])
def test_a_text_shape_is_of_positive_integers(tokens: Any) -> None:
    with pytest.raises(UserError, match=r"tokens is .* positive integer"):
        TextShape(name="text/x", tokens=tokens, width=768)


def test_streams_beside_text_are_refused() -> None:
    from trainer.models.config import StreamShape

    stream = StreamShape(name="dinov2-b@11.cls", channels=8, side=1, merged=False)
    with pytest.raises(UserError, match=r"dinov2-b@11.cls is to be diffused .* MMDiT draws latents alone"):
        replace(TINY, streams=(stream,))


def test_initialisation_is_pytorchs_default() -> None:
    """Bit by bit what the modules draw for themselves, from a generator of its own."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    state = build_model(TINY, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    reference = empty_model(TINY).to_empty(device="cpu")
    torch.manual_seed(5)
    for module in reference.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.reset_parameters()
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-6, atol=0)
    assert not torch.equal(state["final_layer.linear.weight"], build_model(TINY, seed=6).final_layer.linear.weight)


def test_zero_init_predicts_zero_and_leaves_the_tokens_as_they_are() -> None:
    model = build_model(replace(TINY, zero_init=True), seed=5)
    x, t, y = batch(TINY, dtype=torch.float32)
    out = model(x, t, y, taps=(3,))
    assert torch.count_nonzero(out.prediction) == 0
    assert torch.equal(out.hidden[3], model.embed(x))
    default = build_model(TINY, seed=5).state_dict()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, default[key])}
    assert {"adaLN_modulation" in key or key.startswith("final_layer.linear") for key in changed} == {True}
    assert all(
        f"blocks.{i}.{half}.adaLN_modulation.1.weight" in changed
        for i in range(3)
        for half in ("x_block", "context_block")
    )


@given(order=st.permutations(range(5)))
@settings(max_examples=10, deadline=None)
@torch.no_grad()
def test_text_tokens_have_no_position(order: list[int]) -> None:
    model = build_model(TINY, seed=3).double()
    x, t, y = batch(TINY)
    torch.testing.assert_close(model(x, t, y[:, order]).prediction, model(x, t, y).prediction, rtol=1e-10, atol=1e-11)


@torch.no_grad()
def test_every_text_token_is_seen_and_image_tokens_have_positions() -> None:
    model = build_model(TINY, seed=3).double()
    x, t, y = batch(TINY)
    out = model(x, t, y).prediction
    for token in range(5):
        other = y.clone()
        other[:, token] += 1
        assert (model(x, t, other).prediction - out).abs().max() > 1e-4
    turned = model(x.roll(2, -1), t, y).prediction.roll(-2, -1)
    assert (turned - out).abs().max() > 1e-4


@pytest.mark.parametrize("low", [False, True])
@torch.no_grad()
def test_attention_is_one_fused_call_a_block_over_text_and_image_without_a_mask(low: bool) -> None:
    """A mask would keep CUDA's flash kernels from being taken; here torch may take no other than the fused one."""
    model = build_model(TINY, seed=3)
    calls: list[tuple[tuple[int, ...], ...]] = []

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append((tuple(q.shape), tuple(k.shape), tuple(v.shape)))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)

    for block in model.blocks:
        assert isinstance(block, JointBlock)
        block.x_block.attn.attend = block.context_block.attn.attend = fused
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        model(*batch(TINY, dtype=torch.float32))
    joint, image = (3, 2, 5 + 16, 16), (3, 2, 16, 16)
    assert calls == [(joint,) * 3, (joint,) * 3, (image, joint, joint)]


def test_samples_of_a_batch_do_not_see_each_other() -> None:
    model = build_model(TINY, seed=3).double()
    x, t, y = batch(TINY)
    one = model(x[1:2], t[1:2], y[1:2]).prediction
    torch.testing.assert_close(model(x, t, y).prediction[1:2], one, rtol=1e-10, atol=1e-12)


def test_gradients_of_the_last_text_half() -> None:
    """It has no projection and no MLP, and its queries (never asked) get no gradient; everything else gets one."""
    model = build_model(TINY, seed=3).double()
    x, t, y = batch(TINY)
    model(x, t, y).prediction.square().sum().backward()
    last = "blocks.2.context_block."
    names = {name.removeprefix(last) for name, _ in model.named_parameters() if name.startswith(last)}
    assert names == {f"{layer}.{part}" for layer in ("attn.qkv", "adaLN_modulation.1") for part in ("weight", "bias")}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        if name.startswith(f"{last}attn.qkv"):
            queries, rest = gradient[: TINY.width], gradient[TINY.width :]
            assert torch.count_nonzero(queries) == 0
            if name.endswith("weight"):
                assert torch.count_nonzero(rest) == rest.numel()
        else:
            assert torch.count_nonzero(gradient) > 0, name


@pytest.mark.parametrize("depth", [None, 1, 2, 3])
@pytest.mark.parametrize("change", [{}, {"depth": 4, "width": 64, "heads": 4, "text": CLIP}])
def test_flops_against_torchs_counter(change: dict, depth: int | None) -> None:
    cfg = replace(TINY, **change)
    model = build_model(cfg)
    x, t, y = batch(cfg, B=1, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        model(x, t, y, stop_after=depth)
    assert counter.get_total_flops() == forward_flops(cfg, depth=depth)


def test_recomputation_changes_no_bit_of_a_gradient() -> None:
    def gradients(*, recompute: bool) -> list[Tensor]:
        model = build_model(TINY, seed=3)
        model.set_recompute(recompute)
        model(*batch(TINY, dtype=torch.float32)).prediction.square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(gradients(recompute=False), gradients(recompute=True), strict=True))


def test_weights_there_and_back_and_what_does_not_fit() -> None:
    model = build_model(TINY, seed=1)
    other = build_model(TINY, seed=2)
    load_weights(other, model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(UserError, match=r"MMDiT, depth 3.*context_embedder.weight is \[32, 12\], expected \[32, 9\]"):
        load_weights(
            build_model(replace(TINY, text=TextShape(name="text/tiny", tokens=5, width=9))), model.state_dict()
        )


def test_autocast_casts_all_but_times_weights() -> None:
    model = build_model(TINY)
    kept = set(model.parameters()) - model.autocast_parameters()
    assert kept == set(model.t_embedder.parameters())


def test_low_precision_is_near() -> None:
    model = build_model(TINY, seed=3)
    x, t, y = batch(TINY, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = model(x, t, y).prediction
    torch.testing.assert_close(low.float(), model(x, t, y).prediction, rtol=0.05, atol=0.05)
