"""AHPA's routers and its target, against formulas written out in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from align_cases import CASES, FEATURES, INFO, SMALL_ROUTER, N, inputs_for, make, statistics
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.errors import UserError
from trainer.align import build, config_class
from trainer.align.base import BackboneInfo, FeatureInfo
from trainer.align.router import (
    FourierTime,
    RouterWeights,
    ScheduleRouter,
    SinusoidalTime,
    TableRouter,
    entropy_shortfall,
)

ROUTERS = ["mlp", "static", "linear", "table", "attention", "content"]


def f64(x):
    return x.detach().double().numpy()


def softmax64(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def weights_of(module, x):
    return module.route(x, x.hidden[module.taps[0]])


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("groups", [("G4",), ("G3", "G4"), ("G1", "G2", "G3", "G4")])
def test_router_weights_sum_to_one(kind, groups):
    module = make("ahpa", {**SMALL_ROUTER, "router": kind, "groups": groups})
    for t in (0.0, 0.3, 0.999, 1.0):
        weights = weights_of(module, inputs_for(module, t=torch.full((3,), t)))
        assert [w.shape[1] for w in weights.intra] == [FEATURES[f"vae/{g}"].shape[0] for g in groups]
        for w in (*weights.intra, weights.inter):
            assert w.dtype == torch.float32 and (w >= 0).all()
            torch.testing.assert_close(w.sum(-1), torch.ones(3))


@given(t=st.floats(0, 1), seed=st.integers(0, 50), kind=st.sampled_from(ROUTERS))
@settings(max_examples=40, deadline=None)
def test_router_weights_sum_to_one_for_any_time_and_parameters(t, seed, kind):
    module = make("ahpa", {**SMALL_ROUTER, "router": kind})
    with torch.no_grad():
        g = torch.Generator().manual_seed(seed)
        for parameter in module.router.parameters():
            parameter.copy_(3 * torch.randn(parameter.shape, generator=g))
    weights = weights_of(module, inputs_for(module, t=torch.full((3,), t)))
    for w in (*weights.intra, weights.inter):
        torch.testing.assert_close(w.sum(-1), torch.ones(3))


@pytest.mark.parametrize("kind", ["mlp", "content", "table", "attention"])
def test_learned_routers_start_as_the_static_uniform_mixture(kind):
    module = build([("ahpa", config_class("ahpa")(**SMALL_ROUTER, router=kind))], INFO, FEATURES)
    weights = weights_of(module, inputs_for(module))
    torch.testing.assert_close(torch.cat(weights.intra, 1), torch.full((3, 8), 0.25))
    torch.testing.assert_close(weights.inter, torch.full((3, 2), 0.5))


def test_mlp_router_formula():
    module = make("ahpa", {**SMALL_ROUTER, "router_depth": 3})
    x = inputs_for(module)
    router = module.router
    h = f64(x.t)[:, None] @ f64(router.time.projection.weight).T + f64(router.time.projection.bias)
    linears = [layer for layer in router.mlp if isinstance(layer, torch.nn.Linear)]
    assert len(linears) == 3
    for layer in linears:
        h = h @ f64(layer.weight).T + f64(layer.bias)
        h = h / (1 + np.exp(-h))
    logits = h @ f64(router.out.weight).T + f64(router.out.bias)
    weights = weights_of(module, x)
    np.testing.assert_allclose(f64(weights.intra[0]), softmax64(logits[:, :4]), rtol=1e-4)
    np.testing.assert_allclose(f64(weights.intra[1]), softmax64(logits[:, 4:8]), rtol=1e-4)
    np.testing.assert_allclose(f64(weights.inter), softmax64(logits[:, 8:]), rtol=1e-4)


def test_attention_router_formula():
    module = make("ahpa", {**SMALL_ROUTER, "router": "attention", "prototypes": 5})
    x, router = inputs_for(module), module.router
    e = f64(x.t)[:, None] @ f64(router.time.projection.weight).T + f64(router.time.projection.bias)
    bank = f64(router.bank)
    q, k, v = (a @ f64(w.weight).T for a, w in ((e, router.query), (bank, router.key), (bank, router.value)))
    logits = softmax64(q @ k.T / np.sqrt(bank.shape[1])) @ v
    np.testing.assert_allclose(f64(weights_of(module, x).inter), softmax64(logits[:, 8:]), rtol=1e-4)


def test_table_router_is_piecewise_constant_with_a_bin_edge_at_each_tenth():
    router = TableRouter((4, 4), bins=10)
    torch.nn.init.normal_(router.table)
    t = torch.tensor([0.0, 0.0999, 0.1001, 0.8999, 0.9001, 1.0])
    inter = router(t).inter
    expected = router.table[[0, 0, 1, 8, 9, 9], 8:].softmax(-1)
    torch.testing.assert_close(inter, expected)


def test_linear_schedule_hands_over_from_deep_to_shallow():
    t = torch.tensor([0.0, 0.25, 1.0])
    inter = ScheduleRouter((4, 4))(t).inter
    torch.testing.assert_close(inter, torch.stack([1 - t, t], dim=1))
    four = ScheduleRouter((4, 3, 4, 4))(torch.tensor([0.0, 1 / 3, 0.5, 1.0])).inter
    expected = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 1.0]])
    torch.testing.assert_close(four, expected, atol=1e-6, rtol=0)
    assert torch.equal(ScheduleRouter((4,))(t).inter, torch.ones(3, 1))


def test_time_embeddings():
    t = torch.tensor([0.0, 0.123])
    sinusoidal = SinusoidalTime(8)(t)
    frequencies = 1000 * 10000.0 ** (-np.arange(4) / 4)
    expected = np.concatenate([np.cos(0.123 * frequencies), np.sin(0.123 * frequencies)])
    np.testing.assert_allclose(sinusoidal[1].numpy(), expected, atol=2e-5)
    fourier = FourierTime(8, 16.0)
    phase = 2 * np.pi * 0.123 * f64(fourier.frequencies)
    np.testing.assert_allclose(fourier(t)[1].numpy(), np.concatenate([np.cos(phase), np.sin(phase)]), atol=1e-4)
    assert "frequencies" in fourier.state_dict() and not list(fourier.parameters())
    torch.manual_seed(0)
    assert abs(FourierTime(20_000, 16.0).frequencies.std() - 16) < 0.5


def test_content_router_follows_the_pooled_hidden_state_without_a_gradient_to_it():
    module = make("ahpa", {**SMALL_ROUTER, "router": "content"})
    x = inputs_for(module, requires_grad=True)
    weights = weights_of(module, x)
    weights.inter[:, 0].sum().backward()
    assert all(h.grad is None for h in x.hidden.values())
    assert module.router.content.weight.grad.norm() > 0
    shuffled = {tap: h[:, torch.randperm(N)] for tap, h in x.hidden.items()}
    torch.testing.assert_close(module.route(x, shuffled[2]).inter, weights.inter)
    assert not torch.allclose(module.route(x, shuffled[2] + 1).inter, weights.inter)


@pytest.mark.parametrize(
    "options, layers",
    [
        ({}, [[("vae/G3", i) for i in range(4)], [("vae/G4", i) for i in range(4)]]),
        (
            {"split": (2, 6)},
            [
                [("vae/G3", 0), ("vae/G3", 1)],
                [("vae/G3", 2), ("vae/G3", 3), *[("vae/G4", i) for i in range(4)]],
            ],
        ),
        (
            {"split": (6, 2)},
            [
                [*[("vae/G3", i) for i in range(4)], ("vae/G4", 0), ("vae/G4", 1)],
                [("vae/G4", 2), ("vae/G4", 3)],
            ],
        ),
        ({"groups": ("G1", "G4")}, [[("vae/G1", i) for i in range(4)], [("vae/G4", i) for i in range(4)]]),
    ],
)
def test_target_and_loss(options, layers):
    module = make("ahpa", {**SMALL_ROUTER, **options})
    x = inputs_for(module)
    weights = weights_of(module, x)
    parts = []
    for g, group in enumerate(layers):
        a, s = f64(weights.intra[g]), f64(weights.inter)[:, g]
        mixed = sum(a[:, l, None, None] * f64(x.targets[name])[:, i] for l, (name, i) in enumerate(group))
        parts.append(s[:, None, None] * mixed)
    T = np.concatenate(parts, -1)
    target = module.target(x, weights)
    assert target.shape == T.shape and target.dtype == torch.float32
    np.testing.assert_allclose(f64(target), T, rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        p = f64(module.heads[0](x.hidden[2]))
    cosine = np.sum(p * T, -1) / (np.linalg.norm(p, axis=-1) * np.linalg.norm(T, axis=-1))
    np.testing.assert_allclose(module.terms(x)["cosine"].item(), -cosine.mean(), rtol=1e-4)


def rms64(x):
    return np.sqrt((x * x).mean(-1, keepdims=True))


@pytest.mark.parametrize("loss", ["l1", "smooth-l1"])
@pytest.mark.parametrize("size", [1, 1000])
def test_other_distances(loss, size):
    """Targets are taken at root mean square 1, however large a VAE's activations are."""
    module = make("ahpa", {**SMALL_ROUTER, "loss": loss, "weight": 0.5})
    x = inputs_for(module)
    x = dataclasses.replace(x, targets={name: size * y for name, y in x.targets.items()})
    with torch.no_grad():
        T = f64(module.target(x, weights_of(module, x)))
        d = f64(module.heads[0](x.hidden[2])) - T / rms64(T)
    d = np.abs(d)
    expected = d.mean() if loss == "l1" else np.where(d < 1, 0.5 * d * d, d - 0.5).mean()
    np.testing.assert_allclose(module.terms(x)[loss].item(), 0.5 * expected, rtol=1e-4)


@pytest.mark.parametrize("kind", ["rms", "standardize", "whiten"])
def test_levels_are_normalized_before_they_are_mixed(kind):
    module = make("ahpa", {**SMALL_ROUTER, "normalize": kind})
    x = inputs_for(module)
    weights = weights_of(module, x)
    known = statistics(module.reads)
    parts = []
    for g, name in enumerate(module.reads):
        a, s = f64(weights.intra[g]), f64(weights.inter)[:, g]
        mixed = 0
        for l in range(4):
            level = f64(x.targets[name])[:, l]
            if kind == "rms":
                level = level / rms64(level)
            elif kind == "standardize":
                level = (level - f64(known[name].mean[l])) / np.sqrt(np.diag(f64(known[name].covariance[l])))
            else:
                covariance = f64(known[name].covariance[l])
                floor = 1e-3 * np.trace(covariance) / len(covariance)
                values, vectors = np.linalg.eigh(covariance + floor * np.eye(len(covariance)))
                root = vectors @ np.diag(values**-0.5) @ vectors.T
                level = (level - f64(known[name].mean[l])) @ root
            mixed = mixed + a[:, l, None, None] * level
        parts.append(s[:, None, None] * mixed)
    np.testing.assert_allclose(f64(module.target(x, weights)), np.concatenate(parts, -1), rtol=1e-3, atol=1e-4)


def test_a_channel_that_is_constant_stays_out_of_the_standardized_target():
    module = make("ahpa", {**SMALL_ROUTER, "normalize": "standardize", "groups": ("G4",)})
    known = statistics(["vae/G4"])["vae/G4"]
    known.covariance[:, 0] = known.covariance[:, :, 0] = 0
    module.calibrate(lambda names: {"vae/G4": known})
    x = inputs_for(module)
    target = module.target(x, weights_of(module, x))
    assert torch.isfinite(target).all() and (target[..., 0] == 0).all() and (target[..., 1] != 0).any()


@pytest.mark.parametrize("kind", ["standardize", "whiten"])
def test_statistics_are_saved_with_the_module_and_without_them_nothing_trains(kind):
    module = make("ahpa", {**SMALL_ROUTER, "normalize": kind})
    x = inputs_for(module)
    fresh = build([("ahpa", config_class("ahpa")(**SMALL_ROUTER, normalize=kind))], INFO, FEATURES)
    assert fresh.terms(x)["cosine"].isnan()
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh.terms(x)["cosine"], module.terms(x)["cosine"])


def test_the_plain_method_saves_what_it_saved_before():
    module = make("ahpa", SMALL_ROUTER)
    assert {name.split(".")[0] for name in module.state_dict()} == {"router", "heads"}


@pytest.mark.parametrize("kind", ["mlp", "table", "attention", "content"])
def test_the_entropy_floor_costs_what_lies_below_it(kind):
    module = make("ahpa", {**SMALL_ROUTER, "router": kind, "entropy_floor": 0.999})
    x = inputs_for(module)
    for p in module.router.parameters():
        p.data.mul_(2)
    weights = weights_of(module, x)
    expected = 0.0
    for w in (*weights.intra, weights.inter):
        w = f64(w)
        entropy = -(w * np.log(np.maximum(w, 1e-300))).sum(-1)
        expected += np.maximum(0.999 * np.log(w.shape[-1]) - entropy, 0).mean()
    assert expected > 0
    terms = module.terms(x)
    np.testing.assert_allclose(terms["entropy"].item(), expected, rtol=1e-3)
    terms["entropy"].backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in module.router.parameters())


def test_a_router_that_has_saturated_gets_finite_gradients_from_the_entropy_floor():
    logits = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    shortfall = entropy_shortfall(RouterWeights((logits.softmax(-1),), torch.ones(1, 1)), 0.5)
    assert shortfall.item() == pytest.approx(0.5 * np.log(3))
    shortfall.backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()


def test_the_entropy_floor_keeps_the_router_from_leaving_layers_unused():
    """The setting of `test_the_router_learns_which_group_can_be_predicted`, where it ends above 0.8."""
    torch.manual_seed(0)
    module = build([("ahpa", config_class("ahpa")(**SMALL_ROUTER, entropy_floor=0.95))], INFO, FEATURES)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    mixing = torch.randn(INFO.width, 8)
    for seed in range(80):
        x = inputs_for(module, seed=seed)
        x.targets["vae/G4"].copy_((x.hidden[2] @ mixing)[:, None].expand(-1, 4, -1, -1))
        optimizer.zero_grad()
        torch.stack(list(module.terms(x).values())).sum().backward()
        optimizer.step()
    inter = f64(weights_of(module, inputs_for(module)).inter)
    entropy = -(inter * np.log(inter)).sum(-1) / np.log(2)
    assert (entropy > 0.9).all() and (inter[:, 1] > 0.5).all(), inter


@pytest.mark.parametrize("kind", ROUTERS)
def test_the_largest_weight_is_logged_by_time(kind):
    module = make("ahpa", {**SMALL_ROUTER, "router": kind})
    x = inputs_for(module)
    found = {k: v.item() for k, v in module.metrics(x).items() if k.startswith("router/largest")}
    assert list(found) == [f"router/largest t={a}-{b}" for a, b in
                           [("0.0", "0.2"), ("0.2", "0.4"), ("0.4", "0.6"), ("0.6", "0.8"), ("0.8", "1.0")]]  # fmt: skip
    for t, value in zip((0.1, 0.3, 0.5, 0.7, 0.9), found.values()):
        weights = weights_of(module, dataclasses.replace(x, t=torch.full((3,), t)))
        shares = np.concatenate([f64(w) * f64(weights.inter)[:, g : g + 1] for g, w in enumerate(weights.intra)], 1)
        np.testing.assert_allclose(value, shares.max(1).mean(), rtol=1e-5)


@pytest.mark.parametrize("options", [{"router_lr": 0.1}, {"entropy_floor": 0.5}])
@pytest.mark.parametrize("router", ["static", "linear"])
def test_settings_of_a_router_that_learns_nothing_are_refused(router, options):
    with pytest.raises(UserError, match="learns nothing"):
        config_class("ahpa")(router=router, **options)


def test_several_blocks_share_one_target_and_average_their_losses():
    module = make("ahpa", {**SMALL_ROUTER, "depths": (1, 3, 5)})
    x = inputs_for(module)
    assert module.taps == (1, 3, 5) and len(module.heads) == 3
    T = f64(module.target(x, weights_of(module, x)))
    cosines = []
    for tap, head in zip(module.taps, module.heads):
        with torch.no_grad():
            p = f64(head(x.hidden[tap]))
        cosines.append((np.sum(p * T, -1) / (np.linalg.norm(p, axis=-1) * np.linalg.norm(T, axis=-1))).mean())
    np.testing.assert_allclose(module.terms(x)["cosine"].item(), -np.mean(cosines), rtol=1e-4)


@pytest.mark.parametrize("split, groups", [((3, 4), ("G3", "G4")), ((2, 5), ("G2", "G3"))])
def test_splits_that_do_not_fit_are_refused(split, groups):
    with pytest.raises(UserError, match="cannot share out"):
        make("ahpa", {"split": split, "groups": groups})


def test_the_paper_configuration_adds_the_heads_it_states():
    """SiT-XL/2 on SD-VAE levels: one 3x3 convolution 1152 -> 1024, and a small router (App. A)."""
    info = BackboneInfo(name="SiT-XL/2", depth=28, width=1152, patch_size=2, latent_channels=4, latent_size=32)
    levels = {f"vae/{g}": FeatureInfo(shape=(4, 256, 512)) for g in ("G3", "G4")}
    module: Any = build([("ahpa", config_class("ahpa")())], info, levels)
    assert module.taps == (7,) and module.reads == ("vae/G3", "vae/G4")
    assert sum(p.numel() for p in module.heads.parameters()) == 9 * 1152 * 1024 + 1024
    assert [tuple(p.shape) for p in module.router.mlp.parameters() if p.ndim == 2] == [
        (256, 128),
        (256, 256),
        (256, 256),
        (256, 256),
    ]
    assert module.router.out.weight.shape == (4 + 4 + 2, 256)


def test_the_router_learns_which_group_can_be_predicted():
    """With G4 predictable from the hidden state and G3 pure noise, the weight moves to G4."""
    torch.manual_seed(0)
    module = build([("ahpa", config_class("ahpa")(**SMALL_ROUTER))], INFO, FEATURES)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    mixing = torch.randn(INFO.width, 8)
    for seed in range(80):
        x = inputs_for(module, seed=seed)
        clean = (x.hidden[2] @ mixing)[:, None].expand(-1, 4, -1, -1)
        x.targets["vae/G4"].copy_(clean)
        optimizer.zero_grad()
        module.terms(x)["cosine"].backward()
        optimizer.step()
    inter = weights_of(module, inputs_for(module)).inter
    assert (inter[:, 1] > 0.8).all(), inter


def test_the_backward_pass_keeps_no_float32_copy_of_the_levels():
    """Autograd saves the levels as they came (here float16), and float32 of at most one target each."""
    module = make("ahpa", SMALL_ROUTER)
    x = inputs_for(module)
    half = dataclasses.replace(x, targets={name: y.half() for name, y in x.targets.items()})
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    sizes = {torch.float32: [0], torch.float16: [0]}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own and tensor.dtype in sizes:
            sizes[tensor.dtype].append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module.terms(half)
    one_target, one_level = 3 * N * 16, 3 * N * 8
    assert max(sizes[torch.float32]) == one_target
    assert max(sizes[torch.float16]) == one_level and sizes[torch.float16].count(one_level) == 8


def test_every_ablation_of_the_paper_is_a_case():
    options = [o for name, o in CASES.values() if name == "ahpa"]
    assert {o.get("router", "mlp") for o in options} == set(ROUTERS)
    assert {o.get("time_embedding", "linear") for o in options} == {"linear", "sinusoidal", "fourier"}
    assert {o.get("router_depth", 4) for o in options} == {3, 4, 8}
    assert {o.get("head", "conv1") for o in options} == {
        "conv1",
        "conv2",
        "conv3",
        "conv5",
        "linear",
        "mlp3",
        "mlp5",
    }
