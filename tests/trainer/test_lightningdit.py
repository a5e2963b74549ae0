"""LightningDiT: its layers against formulas of their own, its counts, its official files, and methods that train on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning import published_forward, rotated
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from featcache.errors import UserError
from trainer.models import ModelConfig, Transformer, build_model, forward_flops, model_config
from trainer.models.blocks import RMSNorm, RotaryEmbedding, SwiGlu, rotary_positions

TINY = ModelConfig(
    family="sit",
    depth=3,
    width=48,
    heads=2,
    patch_size=1,
    latent_channels=6,
    latent_size=5,
    num_classes=5,
    norm="rms",
    mlp="swiglu",
    rope=True,
)


def randomised(cfg: ModelConfig, seed: int = 0) -> Transformer:
    """A model in which no layer is left as it was initialised, and time matters as much as anything."""
    model = build_model(cfg)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((0.5 if "t_embedder" in name else 0.1) * torch.randn(parameter.shape, generator=generator))
    return model


def batch(cfg: ModelConfig, B: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, *cfg.latent_shape, generator=generator)
    return x, torch.linspace(0, 1, B), torch.arange(B) % (cfg.num_classes + 1)


@pytest.mark.parametrize(("width", "grid"), [(4, 3), (24, 5), (72, 16)])
def test_rotation_is_multiplication_by_complex_numbers(width: int, grid: int) -> None:
    rope = RotaryEmbedding(width, grid).double()
    rope.cos, rope.sin = (table.double() for table in rotary_positions(width, grid))
    x = torch.randn(2, 3, grid * grid, width, dtype=torch.float64)
    torch.testing.assert_close(rope(x), rotated(x, grid), rtol=0, atol=3e-6)  # tables are float32


def test_rotated_products_depend_on_the_offset_alone() -> None:
    """In float64, with exact tables: moving both tokens by the same rows and columns changes nothing."""
    grid, d = 6, 16
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    frequencies = 10000.0 ** -(torch.arange(0, d // 2, 2, dtype=torch.float64) / (d // 2))
    angles = torch.cat(
        [
            rows.reshape(-1, 1) * frequencies.repeat_interleave(2),
            columns.reshape(-1, 1) * frequencies.repeat_interleave(2),
        ],
        dim=1,
    )
    rope = RotaryEmbedding(d, grid)
    for table, exact in zip(rotary_positions(d, grid), (angles.cos(), angles.sin())):
        torch.testing.assert_close(table, exact.float(), rtol=0, atol=1e-7)
    rope.cos, rope.sin = angles.cos(), angles.sin()
    q, k = torch.randn(2, d, dtype=torch.float64)
    products = rope(q.expand(1, 1, grid * grid, d))[0, 0] @ rope(k.expand(1, 1, grid * grid, d))[0, 0].T
    products = products.reshape(grid, grid, grid, grid)
    moved = products[1:, 2:, 1:, 2:] - products[:-1, :-2, :-1, :-2]
    assert moved.abs().max() < 1e-12
    assert products.std() > 0.1, "they do depend on the offset"
    torch.testing.assert_close(rope(q.expand(1, 1, 36, d)).norm(dim=-1), q.norm().expand(1, 1, 36))


def test_rms_norm_is_the_formula_in_float32_whatever_comes_in() -> None:
    norm = RMSNorm(72, eps=1e-6)
    nn.init.normal_(norm.weight)
    x = torch.randn(4, 7, 72) * 3 + 1

    def formula(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight

    torch.testing.assert_close(norm(x), formula(x), rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        half = norm(x.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, formula(x.bfloat16().float()), rtol=1e-6, atol=1e-6)
    tiny = torch.full((72,), 1e-6)
    torch.testing.assert_close(norm(tiny), formula(tiny))


def test_gated_mlp_is_the_formula() -> None:
    mlp = SwiGlu(12, 7).double()
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    gate, value = x @ mlp.w12.weight[:7].T + mlp.w12.bias[:7], x @ mlp.w12.weight[7:].T + mlp.w12.bias[7:]
    expected = (gate / (1 + (-gate).exp()) * value) @ mlp.w3.weight.T + mlp.w3.bias
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize(
    "change", [{}, {"qk_norm": True}, {"patch_size": 2, "latent_size": 6}, {"heads": 12}, {"latent_channels": 32}]
)
@torch.no_grad()
def test_forward_in_float64_against_an_independent_formula(change: dict[str, Any]) -> None:
    cfg = replace(TINY, **change)
    model = randomised(cfg).double()
    x, t, y = batch(cfg)
    expected = published_forward({**model.state_dict(), "pos_embed": model.pos_embed}, x, t, y, heads=cfg.heads)
    found = model(x.double(), t, y).prediction
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.std()))  # float32 rotary tables
    assert expected.std() > 0.1


@pytest.mark.parametrize(
    ("change", "least"), [({"rope": False}, 1e-3), ({"norm": "layer"}, 1e-3), ({"mlp": "gelu"}, 1e-3)]
)
def test_every_flag_changes_the_function(change: dict[str, Any], least: float) -> None:
    """Alone too: weights that both models have are the same."""
    model, other = randomised(TINY), build_model(replace(TINY, **change))
    other.load_state_dict(model.state_dict(), strict=False)
    x, t, y = batch(TINY)
    difference = (model(x, t, y).prediction - other(x, t, y).prediction).abs().max()
    assert difference > least


def test_initialisation_is_sit_s_with_norms_of_one() -> None:
    cfg = replace(TINY, width=256, heads=4, qk_norm=True, num_classes=1000)
    model = build_model(cfg, seed=3)
    state = model.state_dict()
    for key, (fan_out, fan_in) in {
        "blocks.1.mlp.w12.weight": (2 * 682, 256),
        "blocks.2.mlp.w3.weight": (256, 682),
        "blocks.0.attn.qkv.weight": (3 * 256, 256),
        "x_embedder.proj.weight": (256, 6),
    }.items():
        bound = (6 / (fan_in + fan_out)) ** 0.5
        assert state[key].shape[:2] == (fan_out, fan_in)
        assert bound * 0.98 < state[key].abs().max() <= bound
        assert state[key].std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    for key, value in state.items():
        if "norm" in key:
            assert torch.equal(value, torch.ones_like(value)), key
        elif key.endswith("bias") or "adaLN_modulation" in key or key.startswith("final_layer.linear"):
            assert torch.count_nonzero(value) == 0, key
    assert sorted(key for key in state if "norm" in key and key.startswith(("blocks.0", "final"))) == [
        *("blocks.0.attn.k_norm.weight", "blocks.0.attn.q_norm.weight", "blocks.0.norm1.weight"),
        *("blocks.0.norm2.weight", "final_layer.norm_final.weight"),
    ]
    assert torch.count_nonzero(model(*batch(cfg)).prediction) == 0


def test_rotary_tables_are_neither_trained_nor_saved() -> None:
    model = build_model(TINY)
    assert not any("rope" in key for key in (*model.state_dict(), *dict(model.named_parameters())))
    cos, sin = rotary_positions(24, 5)
    for block in model.blocks:
        assert torch.equal(block.attn.rope.cos, cos) and torch.equal(block.attn.rope.sin, sin)


# Computed with the public code (depth 28, width 1152, patch 1, 32 channels, 1000 classes and the null label).
def test_counts_are_the_public_code_s() -> None:
    cfg = model_config("LightningDiT-XL/1", latent_channels=32, latent_size=16, num_classes=1000)
    with torch.device("meta"):
        model = Transformer(cfg)
    assert sum(p.numel() for p in model.parameters()) == 674_961_824
    assert round(forward_flops(cfg) / 1e9) == 237


@pytest.mark.parametrize(
    ("name", "shape", "hidden"),
    [
        ("LightningDiT-B/1", (12, 768, 12), 2048),
        ("LightningDiT-L/2", (24, 1024, 16), 2730),
        ("LightningDiT-XL/2", (28, 1152, 16), 3072),
        ("LightningDiT-1p0B/1", (24, 1536, 24), 4096),
        ("LightningDiT-1p6B/2", (28, 1792, 28), 4778),
    ],
)
def test_sizes_are_the_public_code_s(name: str, shape: tuple[int, int, int], hidden: int) -> None:
    cfg = model_config(name, latent_channels=32, latent_size=16, num_classes=1000)
    assert (cfg.depth, cfg.width, cfg.heads) == shape
    assert (cfg.mlp_width, cfg.name, cfg.family) == (hidden, name, "sit")


@pytest.mark.parametrize("change", [{}, {"qk_norm": True, "patch_size": 5}, {"rope": False}, {"mlp": "gelu"}])
def test_counted_operations_are_the_module_s(change: dict[str, Any]) -> None:
    cfg = replace(TINY, **change)
    inputs = batch(cfg, B=1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        build_model(cfg)(*inputs)
    assert forward_flops(cfg) == counter.get_total_flops()


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_graph_breaks(autocast: bool) -> None:
    torch._dynamo.reset()
    cfg = replace(TINY, depth=2, qk_norm=True)
    model, inputs = randomised(cfg), batch(cfg)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for options in ({"taps": (1, 2)}, {"taps": (1,), "stop_after": 1}):
            ours, expected = compiled(*inputs, **options), model(*inputs, **options)
            for depth in expected.hidden:
                torch.testing.assert_close(ours.hidden[depth], expected.hidden[depth])
            if expected.prediction is not None:
                torch.testing.assert_close(ours.prediction, expected.prediction)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"norm": "batch"}, "Unknown norm"),
        ({"mlp": "relu"}, "Unknown MLP"),
        ({"width": 36, "heads": 6}, "divisible by 4"),
    ],
)
def test_impossible_configurations_are_explained(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        replace(TINY, **change)


@pytest.mark.parametrize("name", ["SiT-1p0B/1", "LightningDiT-1p0B/3", "LightningDiT-M/1", "lightningdit-xl/1"])
def test_unknown_names_are_explained(name: str) -> None:
    with pytest.raises(UserError, match="Unknown model"):
        model_config(name, latent_channels=32, latent_size=16, num_classes=10)


def test_mixtures_of_flags_have_no_name() -> None:
    cfg = model_config("LightningDiT-B/1", latent_channels=32, latent_size=16, num_classes=10)
    assert replace(cfg, rope=False).name is None
    assert replace(cfg, norm="layer", mlp="gelu", rope=False).name == "SiT-B/1"
    assert replace(cfg, depth=11).name is None
