"""Backbones: initialisation, taps, counting, compilation, errors."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from golden import official_forward, position_table
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from featcache.errors import UserError
from trainer.models import (
    MODEL_NAMES,
    ModelConfig,
    TextShape,
    Transformer,
    build_model,
    forward_flops,
    load_weights,
    model_config,
)
from trainer.models.blocks import sincos_positions

TINY = ModelConfig(
    family="sit",
    depth=3,
    width=32,
    heads=2,
    patch_size=2,
    latent_channels=4,
    latent_size=8,
    num_classes=5,
)


def randomised(cfg: ModelConfig, seed: int = 0) -> Transformer:
    """A model in which no layer is left at zero."""
    model = build_model(cfg)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(cfg: ModelConfig, B: int = 3, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, cfg.latent_channels, cfg.latent_size, cfg.latent_size, generator=generator)
    t = torch.rand(B, generator=generator)
    if cfg.family == "dit":
        t = (t * 1000).floor()
    return x, t, torch.arange(B) % (cfg.num_classes + 1)


@pytest.mark.parametrize("name", ["SiT-Ti/2", "DiT-Ti/4"])
def test_a_fresh_model_predicts_exactly_zero(name: str) -> None:
    cfg = model_config(name, latent_channels=4, latent_size=16, num_classes=10)
    out = build_model(cfg, seed=3)(*batch(cfg)).prediction
    assert out.shape == (3, cfg.out_channels, 16, 16)
    assert cfg.out_channels == (8 if name.startswith("DiT") else 4)
    assert torch.count_nonzero(out) == 0


def test_a_fresh_model_is_the_identity_on_its_tokens() -> None:
    model = build_model(TINY)
    x, t, y = batch(TINY)
    out = model(x, t, y, taps=(1, 3))
    embedded = model.x_embedder(x) + model.pos_embed
    assert torch.equal(out.hidden[1], embedded)
    assert torch.equal(out.hidden[3], embedded)


def test_initialisation_is_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a = build_model(TINY, seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    b, c = build_model(TINY, seed=7).state_dict(), build_model(TINY, seed=8).state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["blocks.0.attn.qkv.weight"], c["blocks.0.attn.qkv.weight"])


def test_initialisation_has_the_official_distributions() -> None:
    cfg = replace(TINY, width=256, heads=4, qk_norm=True, num_classes=1000)
    state = build_model(cfg).state_dict()

    def uniform(key: str, fan_in: int, fan_out: int) -> None:
        bound = (6 / (fan_in + fan_out)) ** 0.5
        weight = state[key]
        assert bound * 0.98 < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)

    uniform("x_embedder.proj.weight", 4 * 2 * 2, 256)
    uniform("blocks.1.attn.qkv.weight", 256, 3 * 256)
    uniform("blocks.2.mlp.fc2.weight", 1024, 256)
    for key in ("y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"):
        assert state[key].std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(state["blocks.0.attn.q_norm.weight"], torch.ones(64))
    for key, value in state.items():
        if key.endswith("bias") or "adaLN_modulation" in key or key.startswith("final_layer.linear"):
            assert torch.count_nonzero(value) == 0, key


@pytest.mark.parametrize(("width", "grid"), [(8, 1), (64, 5), (1152, 16)])
def test_positions(width: int, grid: int) -> None:
    expected = torch.from_numpy(position_table(width, grid)).float()
    torch.testing.assert_close(sincos_positions(width, grid), expected, rtol=0, atol=1e-7)


def test_positions_are_neither_trained_nor_saved() -> None:
    model = build_model(TINY)
    assert "pos_embed" in dict(model.named_buffers())
    assert "pos_embed" not in model.state_dict()
    assert "pos_embed" not in dict(model.named_parameters())


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"qk_norm": True},
        {"patch_size": 4},
        {"patch_size": 1, "latent_size": 5},
        {"latent_channels": 16},
        {"family": "dit", "learn_sigma": True},
    ],
)
@torch.no_grad()
def test_forward_in_float64_against_an_independent_formula(change: dict) -> None:
    cfg = replace(TINY, **change)
    model = randomised(cfg).double()
    x, t, y = batch(cfg)
    out = model(x.double(), t, y, taps=(1, 2, 3))
    expected, hidden = official_forward(
        model.state_dict() | {"pos_embed": model.pos_embed}, x.double(), t, y, heads=cfg.heads
    )
    torch.testing.assert_close(out.prediction, expected, rtol=1e-10, atol=1e-10)
    for depth in (1, 2, 3):
        torch.testing.assert_close(out.hidden[depth], hidden[depth - 1], rtol=1e-10, atol=1e-10)


@settings(max_examples=15, deadline=None)
@given(
    depth=st.integers(1, 3),
    heads=st.integers(1, 3),
    patch=st.sampled_from([1, 2, 4]),
    channels=st.integers(1, 5),
    classes=st.integers(1, 9),
    dit=st.booleans(),
    qk_norm=st.booleans(),
)
def test_counts_agree_with_the_module(
    depth: int, heads: int, patch: int, channels: int, classes: int, dit: bool, qk_norm: bool
) -> None:
    cfg = ModelConfig(
        family="dit" if dit else "sit",
        depth=depth,
        width=8 * heads,
        heads=heads,
        patch_size=patch,
        latent_channels=channels,
        latent_size=8,
        num_classes=classes,
        qk_norm=qk_norm,
        learn_sigma=dit,
    )
    model = build_model(cfg)
    inputs = torch.zeros(1, channels, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    # Plain attention, because the counter does not know the fused kernel of the CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*inputs)
    assert forward_flops(cfg) == counter.get_total_flops()


# DiT, Table 1 and 4 (Gflops are multiply-adds there); SiT, Table 1, prints the same parameter counts.
@pytest.mark.parametrize(
    ("size", "millions", "gmacs"),
    [("S", 33, 6.06), ("B", 130, 23.01), ("L", 458, 80.71), ("XL", 675, 118.64)],
)
def test_counts_agree_with_the_papers(size: str, millions: int, gmacs: float) -> None:
    for family in ("SiT", "DiT"):
        cfg = model_config(f"{family}-{size}/2", latent_channels=4, latent_size=32, num_classes=1000)
        with torch.device("meta"):
            model = Transformer(cfg)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
        assert forward_flops(cfg) / 2e9 == pytest.approx(gmacs, rel=2e-3)


def test_a_partial_pass_costs_its_blocks() -> None:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        build_model(TINY)(*batch(TINY, B=1), taps=(2,), stop_after=2)
    assert counter.get_total_flops() == forward_flops(TINY, depth=2) < forward_flops(TINY)


def test_stop_after_runs_only_the_blocks_it_needs() -> None:
    model = randomised(TINY)
    ran: list[str] = []
    for name, module in (*model.blocks.named_children(), ("final", model.final_layer)):
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    whole = model(*batch(TINY), taps=(1, 2))
    assert ran == ["0", "1", "2", "final"]
    ran.clear()
    partial = model(*batch(TINY), taps=(2,), stop_after=2)
    assert ran == ["0", "1"]
    assert partial.prediction is None
    assert list(partial.hidden) == [2]
    assert torch.equal(partial.hidden[2], whole.hidden[2])
    assert torch.equal(partial.time_embedding, whole.time_embedding)


def test_taps_do_not_change_the_prediction() -> None:
    model = randomised(TINY)
    inputs = batch(TINY)
    assert torch.equal(model(*inputs).prediction, model(*inputs, taps=(1, 3)).prediction)


def test_taps_beyond_the_blocks_that_run_are_a_mistake() -> None:
    model = build_model(TINY)
    with pytest.raises(AssertionError, match="outside"):
        model(*batch(TINY), taps=(3,), stop_after=2)
    with pytest.raises(AssertionError, match="outside"):
        model(*batch(TINY), taps=(4,))


def test_every_parameter_gets_a_gradient_and_hidden_states_reach_only_what_is_below() -> None:
    model = randomised(TINY)
    out = model(*batch(TINY), taps=(2,))
    out.prediction.square().mean().backward(retain_graph=True)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.zero_grad()
    out.hidden[2].square().mean().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {name.split(".")[1] for name in reached if name.startswith("blocks")} == {"0", "1"}
    assert not any(name.startswith("final_layer") for name in reached)


def test_samples_do_not_see_each_other() -> None:
    model = randomised(TINY)
    x, t, y = batch(TINY, B=4)
    whole = model(x, t, y).prediction
    torch.testing.assert_close(whole[1:2], model(x[1:2], t[1:2], y[1:2]).prediction, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_graph_breaks(autocast: bool) -> None:
    torch._dynamo.reset()
    cfg = replace(TINY, depth=2)
    model, inputs = randomised(cfg), batch(cfg)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for options in ({"taps": (1, 2)}, {"taps": (1,), "stop_after": 1}):
            ours, expected = compiled(*inputs, **options), model(*inputs, **options)
            assert ours.hidden.keys() == expected.hidden.keys()
            for depth in ours.hidden:
                torch.testing.assert_close(ours.hidden[depth], expected.hidden[depth])
            if expected.prediction is not None:
                torch.testing.assert_close(ours.prediction, expected.prediction)


def test_time_embedding_stays_in_float32_under_autocast() -> None:
    model = randomised(TINY)
    x, _, y = batch(TINY, B=2)
    t = torch.tensor([0.5, 0.5005])  # the same number in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, y, taps=(1,))
    assert out.time_embedding.dtype == torch.float32
    assert torch.equal(out.time_embedding, model.t_embedder(t))
    assert not torch.equal(out.time_embedding[0], out.time_embedding[1])
    assert out.prediction.dtype == torch.bfloat16


def test_xformers_without_xformers_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(UserError, match="not installed") as caught:
        build_model(replace(TINY, attention="xformers"))
    assert "sdpa" in str(caught.value.remedy)


def test_xformers_gets_the_layout_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that computes attention over [B, N, heads, d], as xformers documents it."""
    import types

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)

    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = attention  # type: ignore[attr-defined]
    package.ops = ops  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    model, other = randomised(TINY), randomised(replace(TINY, attention="xformers"))
    torch.testing.assert_close(model(*batch(TINY)).prediction, other(*batch(TINY)).prediction, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"latent_size": 9}, "9 x 9 cannot be cut into patches"),
        ({"heads": 3}, "divisible by the number of heads"),
        ({"depth": 0}, "positive integer"),
        ({"num_classes": True}, "positive integer"),
        ({"learn_sigma": True}, "no variance"),
        ({"family": "uvit"}, "Unknown model family"),
        ({"attention": "flash"}, "Unknown attention"),
    ],
)
def test_impossible_configurations_are_explained(change: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        replace(TINY, **change)


def test_the_remedy_for_a_patch_names_those_that_fit() -> None:
    with pytest.raises(UserError) as caught:
        model_config("SiT-B/8", latent_channels=4, latent_size=28, num_classes=10)
    assert "patch size 1 or 2 or 4" in str(caught.value)


@pytest.mark.parametrize("name", ["SiT-B2", "sit-B/2", "SiT-M/2", "SiT-B/3", "UViT-B/2", ""])
def test_unknown_names_are_explained(name: str) -> None:
    with pytest.raises(UserError, match="Unknown model") as caught:
        model_config(name, latent_channels=4, latent_size=32, num_classes=10)
    if name == "SiT-B2":
        assert "'SiT-B/2'" in str(caught.value)


def test_every_named_model_has_a_configuration() -> None:
    for name in MODEL_NAMES:
        text = TextShape(name="text/clip-l", tokens=77, width=768) if name.startswith("MMDiT") else None
        cfg = model_config(name, latent_channels=4, latent_size=32, num_classes=1000, text=text)
        assert cfg.learn_sigma == name.startswith("DiT")
        assert cfg.tokens == (32 // int(name.rsplit("/", 1)[1])) ** 2


def test_weights_that_do_not_fit_are_named() -> None:
    model = build_model(TINY)
    state = model.state_dict()
    load_weights(model, state)
    del state["final_layer.linear.bias"]
    state["projectors.0.weight"] = torch.zeros(1)
    state["t_embedder.mlp.0.bias"] = torch.zeros(5)
    with pytest.raises(UserError) as caught:
        load_weights(model, state, source="last.pt")
    for said in (
        "last.pt",
        "missing final_layer.linear.bias",
        "unexpected projectors.0.weight",
        "[5], expected [32]",
    ):
        assert said in str(caught.value)


def test_a_stored_position_table_is_loaded() -> None:
    model = randomised(TINY)
    before = model(*batch(TINY)).prediction
    load_weights(model, model.state_dict() | {"pos_embed": model.pos_embed + 0.01})
    assert not torch.equal(model(*batch(TINY)).prediction, before)


def test_the_configuration_needs_no_torch() -> None:
    code = (
        "import sys; from trainer.models import forward_flops, model_config;"
        "forward_flops(model_config('SiT-XL/2', latent_channels=4, latent_size=32, num_classes=1000));"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
