"""Every loss against the papers' formulas, written out independently in float64 numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from align_cases import GRID, INFO, EchoTeacher, N, inputs_for, make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainer.align.dya import dropped
from trainer.align.heads import build_head, to_grid
from trainer.align.losses import negative_cosine, normalize_over_space, nt_xent, structure
from trainer.align.sra2 import patchify


def f64(x):
    return x.detach().double().numpy()


def cos64(a, b):
    """Cosine over the last axis of two numpy arrays."""
    return np.sum(a * b, -1) / (np.sqrt(np.sum(a * a, -1)) * np.sqrt(np.sum(b * b, -1)))


def smooth_l1_64(d, beta):
    d = np.abs(d)
    return np.where(d < beta, 0.5 * d * d / beta, d - 0.5 * beta).mean()


def linear64(layer, x):
    return x @ f64(layer.weight).T + f64(layer.bias)


def silu64(x):
    return x / (1 + np.exp(-x))


def mlp64(head, x):
    """An MLP of linear layers with SiLU between them."""
    layers = [layer for layer in head if isinstance(layer, nn.Linear)]
    for layer in layers[:-1]:
        x = silu64(linear64(layer, x))
    return linear64(layers[-1], x)


def conv64(conv, x):
    """3x3 convolution with zero padding on a row-major token map [B, N, D], one tap at a time."""
    B, tokens, D = x.shape
    side = math.isqrt(tokens)
    padded = np.zeros((B, side + 2, side + 2, D))
    padded[:, 1:-1, 1:-1] = x.reshape(B, side, side, D)
    weight, out = f64(conv.weight), np.zeros((B, side, side, conv.out_channels))
    for dy in range(3):
        for dx in range(3):
            out += padded[:, dy : dy + side, dx : dx + side] @ weight[:, :, dy, dx].T
    return (out + f64(conv.bias)).reshape(B, tokens, -1)


def close(a, b, **kw):
    np.testing.assert_allclose(float(torch.as_tensor(a).detach()), b, rtol=2e-5, atol=2e-6, **kw)


def test_repa_is_half_the_negative_patch_cosine():
    module = make("repa", {"head_width": 10})
    x = inputs_for(module)
    p = mlp64(module.heads[0], f64(x.hidden[2]))
    close(module.terms(x)["cosine"], -0.5 * cos64(p, f64(x.targets["tiny@5"])).mean())
    assert [type(layer) for layer in module.heads[0]] == [nn.Linear, nn.SiLU, nn.Linear, nn.SiLU, nn.Linear]


def test_repa_averages_over_encoders():
    module = make("repa", {"head_width": 10, "features": ("tiny@5", "tiny@3"), "weight": 1.0})
    x = inputs_for(module)
    each = [
        cos64(mlp64(head, f64(x.hidden[2])), f64(x.targets[name])).mean()
        for head, name in zip(module.heads, ("tiny@5", "tiny@3"))
    ]
    close(module.terms(x)["cosine"], -(each[0] + each[1]) / 2)


def test_repa_nt_xent():
    module = make("repa", {"head_width": 10, "loss": "nt-xent", "temperature": 0.3})
    x = inputs_for(module)
    p, y = mlp64(module.heads[0], f64(x.hidden[2])), f64(x.targets["tiny@5"])
    losses = []
    for b in range(p.shape[0]):
        for n in range(N):
            logits = np.array([cos64(p[b, n], y[b, m]) for m in range(N)]) / 0.3
            losses.append(np.log(np.exp(logits).sum()) - logits[n])
    close(module.terms(x)["nt-xent"], 0.5 * np.mean(losses))


def test_irepa_normalises_over_space_and_uses_a_convolution():
    module = make("repa", {"head": "conv", "spatial_gamma": 0.6, "weight": 1.0})
    x = inputs_for(module)
    y = f64(x.targets["tiny@5"])
    y = (y - 0.6 * y.mean(1, keepdims=True)) / (y.std(1, ddof=1, keepdims=True) + 1e-6)
    p = conv64(module.heads[0].layers[0], f64(x.hidden[2]))
    close(module.terms(x)["cosine"], -cos64(p, y).mean())


def test_full_spatial_normalisation_has_zero_mean_and_unit_unbiased_std():
    y = normalize_over_space(5 + 3 * torch.randn(2, 64, 7), 1.0)
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 7), atol=1e-6, rtol=0)
    torch.testing.assert_close(y.std(1), torch.ones(2, 7), atol=1e-5, rtol=0)


def test_sara_terms():
    module = make("sara", {"head_width": 10, "discriminator_weights": "random"})
    x = inputs_for(module)
    p, y = mlp64(module.head, f64(x.hidden[2])), f64(x.targets["tiny@5"])
    terms = module.terms(x)
    close(terms["patch"], -0.5 * cos64(p, y).mean())
    squares = [
        (cos64(p[b, i], p[b, j]) - cos64(y[b, i], y[b, j])) ** 2
        for b in range(p.shape[0])
        for i in range(N)
        for j in range(N)
    ]
    close(terms["structure"], 0.5 * np.mean(squares))
    with torch.no_grad():
        fake = f64(module.discriminator(module.head(x.hidden[2])))
        real = f64(module.discriminator(x.targets["tiny@5"]))
    close(terms["adversarial"], 0.05 * np.mean(-np.log(1 / (1 + np.exp(-fake)))))
    expected = -np.mean(np.log(1 / (1 + np.exp(-real)))) - np.mean(np.log(1 - 1 / (1 + np.exp(-fake))))
    close(module.adversary_loss(x), expected)


def test_structure_sum_is_tokens_squared_times_the_mean():
    p, y = torch.randn(2, 9, 5), torch.randn(2, 9, 5)
    torch.testing.assert_close(structure(p, y, "sum"), 81 * structure(p, y, "mean"))


def test_structure_ignores_a_common_rotation_and_vanishes_on_equal_maps():
    y = torch.randn(2, 9, 5)
    rotation = torch.linalg.qr(torch.randn(5, 5)).Q
    assert structure(y @ rotation * 3, y, "mean") < 1e-11
    assert structure(torch.randn(2, 9, 5), y, "mean") > 1e-2


def test_sara_switches_leave_the_other_terms():
    for off, left in (
        ({"structure_weight": 0, "adversarial_weight": 0}, {"patch"}),
        ({"patch_weight": 0, "adversarial_weight": 0}, {"structure"}),
        ({"patch_weight": 0}, {"structure", "adversarial"}),
    ):
        module = make("sara", {"discriminator_weights": "random", "head_width": 10, **off})
        assert set(module.terms(inputs_for(module))) == left
        assert (module.adversary is None) == ("adversarial" not in left)
    without = make("sara", {"adversarial_weight": 0, "head_width": 10})
    with pytest.raises(TypeError, match="no adversary"):
        without.adversary_loss(inputs_for(without))


def test_the_discriminators_step_trains_the_discriminator_alone():
    module = make("sara", {"head_width": 10, "discriminator_weights": "random"})
    x = inputs_for(module, requires_grad=True)
    module.adversary_loss(x).backward()
    assert all(h.grad is None for h in x.hidden.values()) and x.targets["tiny@5"].grad is None
    own = set(module.adversary.parameters())
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None and parameter.grad.norm() > 0) == (parameter in own), name


def test_the_discriminator_tells_real_from_fake_after_a_few_steps():
    module = make("sara", {"head_width": 10, "discriminator_weights": "random"})
    x = inputs_for(module)
    optimizer = torch.optim.AdamW(module.adversary.parameters(), lr=1e-3)
    before = module.adversary_loss(x).item()
    for _ in range(20):
        optimizer.zero_grad()
        module.adversary_loss(x).backward()
        optimizer.step()
    assert module.adversary_loss(x).item() < 0.5 * before


def test_the_discriminator_is_half_a_resnet18_without_running_statistics():
    module = make("sara", {"discriminator_weights": "random"})
    D = module.discriminator
    assert D.conv1.kernel_size == (1, 1) and D.conv1.in_channels == 12 and D.conv1.out_channels == 64
    assert len(D.layer1) == len(D.layer2) == 2 and D.fc.in_features == 128
    assert not hasattr(D, "layer3") and list(D.buffers()) == []
    assert D(torch.randn(5, N, 12)).shape == (5,)


def test_discriminator_weights_from_a_file(tmp_path):
    import timm
    from safetensors.torch import save_file

    from featcache.errors import UserError

    torch.manual_seed(5)
    resnet: Any = timm.create_model("resnet18")
    with torch.no_grad():
        resnet.layer1[0].bn1.weight.normal_()
    save_file(resnet.state_dict(), tmp_path / "r.safetensors")
    options = {"discriminator_weights": str(tmp_path / "r.safetensors")}
    from align_cases import FEATURES

    from trainer.align import build, config_class

    module: Any = build([("sara", config_class("sara")(**options))], INFO, FEATURES)
    assert torch.equal(module.discriminator.layer2[0].conv1.weight, resnet.layer2[0].conv1.weight)
    assert torch.equal(module.discriminator.layer1[0].bn1.weight, resnet.layer1[0].bn1.weight)

    save_file({"x": torch.zeros(1)}, tmp_path / "wrong.safetensors")
    for name in ("wrong.safetensors", "missing.safetensors"):
        config = config_class("sara")(discriminator_weights=str(tmp_path / name))
        with pytest.raises(UserError, match="resnet18"):
            build([("sara", config)], INFO, FEATURES)


@pytest.mark.parametrize("modulation", ["texture", "both"])
def test_dya(modulation):
    module = make("dya", {"head_width": 10, "modulation": modulation, "weight": 0.7})
    x = inputs_for(module)
    p = mlp64(module.head, f64(x.hidden[3]))
    xi = 1 / (1 + np.exp(-linear64(module.temporal, f64(x.time_embedding))[:, 0]))
    texture = cos64(p, f64(x.targets["tiny@3"])).mean(1)
    semantic = cos64(p, f64(x.targets["tiny@5"])).mean(1)
    if modulation == "both":
        expected = {"texture": (1 - xi) * texture, "semantic": xi * semantic}
    else:
        expected = {"texture": xi * texture, "semantic": semantic}
    terms = module.terms(x)
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        close(terms[name], -0.7 * value.mean())


def test_dya_starts_at_half_strength():
    from align_cases import FEATURES

    from trainer.align import build, config_class

    module: Any = build([("dya", config_class("dya")())], INFO, FEATURES)
    assert torch.equal(module.xi(torch.randn(4, INFO.width)), torch.full((4,), 0.5))


def test_sds_drops_a_quarter_of_the_steps_and_is_a_function_of_seed_and_step():
    module = make("dya", {"head_width": 10})
    active = [module.active(step=step, seed=7) for step in range(20_000)]
    rate = 1 - sum(active) / len(active)
    # Five standard deviations of the binomial.
    assert abs(rate - 0.25) < 5 * math.sqrt(0.25 * 0.75 / len(active))
    again = make("dya", {"head_width": 10})
    assert [again.active(step=step, seed=7) for step in range(500)] == active[:500]
    assert [again.active(step=step, seed=8) for step in range(500)] != active[:500]
    # No memory: asking out of order, as a resumed run does, changes nothing.
    assert again.active(step=400, seed=7) == active[400]


def test_sds_draws_are_independent_from_step_to_step():
    draws = np.array([dropped(seed=0, step=step, probability=0.5) for step in range(10_000)], float)
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 5 / math.sqrt(len(draws))


@pytest.mark.parametrize("probability, expected", [(0.0, False), (1.0, True)])
def test_sds_extremes(probability, expected):
    assert {dropped(seed=1, step=step, probability=probability) for step in range(200)} == {expected}


def test_truncation_ends_alignment_for_good():
    module = make("dya", {"head_width": 10, "dropout": 0.0, "truncate_at": 30})
    assert [module.active(step=step, seed=0) for step in range(60)] == [True] * 30 + [False] * 30


@pytest.mark.parametrize("loss", ["smooth-l1", "cosine"])
def test_sra(loss):
    module = make("sra", {"loss": loss})
    teacher = EchoTeacher()
    x = inputs_for(module, teacher=teacher)
    p = mlp64(module.head, f64(x.hidden[2]))
    t = np.maximum(f64(x.t) - 0.2 * f64(x.uniform), 0)
    y = f64(teacher(torch.from_numpy(t), module.teacher_depth))
    expected = -cos64(p, y).mean() if loss == "cosine" else smooth_l1_64(p - y, 0.05)
    close(module.terms(x)[loss], 0.2 * expected)
    assert teacher.calls[-1][1] == module.teacher_depth == 4
    assert [type(layer) for layer in module.head] == [nn.Linear, nn.SiLU, nn.Linear]


def test_the_teachers_time_is_clamped_at_the_data():
    module = make("sra")
    t, u = torch.tensor([0.0, 0.05, 0.15, 1.0]), torch.tensor([0.9, 0.5, 0.5, 1.0])
    x = inputs_for(module, t=t, uniform=u)
    torch.testing.assert_close(module.teacher_time(x), torch.tensor([0.0, 0.0, 0.05, 0.8]))
    fixed = make("sra", {"interval_kind": "fixed", "interval": 0.1})
    torch.testing.assert_close(fixed.teacher_time(x), torch.tensor([0.0, 0.0, 0.05, 0.9]))


@given(t=st.floats(0, 1), u=st.floats(0, 1), interval=st.floats(0, 1))
def test_the_teacher_never_sees_more_noise_nor_leaves_the_interval(t, u, interval):
    module = make("sra", {"interval": interval, "head": False})
    (seen,) = module.teacher_time(inputs_for(module, t=torch.tensor([t]), uniform=torch.tensor([u]))).tolist()
    assert 0 <= seen <= np.float32(t) and np.float32(t) - seen <= interval + 1e-6


@pytest.mark.parametrize("loss", ["smooth-l1", "cosine"])
def test_sra2(loss):
    module = make("sra2", {"head_width": 10, "loss": loss})
    x = inputs_for(module)
    p, z = mlp64(module.head, f64(x.hidden[2])), f64(x.latent)
    B = z.shape[0]
    y = np.zeros((B, N, 16))
    for b in range(B):
        for row in range(GRID):
            for column in range(GRID):
                cell = z[b, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                y[b, row * GRID + column] = np.moveaxis(cell, 0, -1).ravel()
    expected = -cos64(p, y).mean() if loss == "cosine" else smooth_l1_64(p - y, 0.05)
    close(module.terms(x)[loss], 0.2 * expected)
    np.testing.assert_array_equal(patchify(x.latent, 2).double().numpy(), y)


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_stacked_convolutions_are_conv_groupnorm_silu_blocks(depth):
    torch.manual_seed(0)
    head: Any = build_head(f"conv{depth}", 6, 8, grid=4, hidden=4)
    kinds = [type(layer) for layer in head.layers]
    assert kinds == [nn.Conv2d, nn.GroupNorm, nn.SiLU] * (depth - 1) + [nn.Conv2d]
    x = torch.randn(2, 16, 6)
    y = f64(x)
    for layer in head.layers:
        if isinstance(layer, nn.Conv2d):
            y = conv64(layer, y)
        elif isinstance(layer, nn.GroupNorm):
            B, tokens, C = y.shape
            groups = y.reshape(B, tokens, layer.num_groups, C // layer.num_groups)
            mean = groups.mean((1, 3), keepdims=True)
            std = np.sqrt(groups.var((1, 3), keepdims=True) + layer.eps)
            y = ((groups - mean) / std).reshape(B, tokens, C) * f64(layer.weight) + f64(layer.bias)
        else:
            y = silu64(y)
    np.testing.assert_allclose(head(x).detach().numpy(), y, rtol=1e-4, atol=1e-5)


def test_to_grid_averages_whole_cells_and_keeps_equal_grids():
    x = torch.randn(2, 64, 3)
    assert to_grid(x, 8) is x
    maps = x.reshape(2, 8, 8, 3)
    halved = to_grid(x, 4).reshape(2, 4, 4, 3)
    torch.testing.assert_close(halved[:, 1, 2], maps[:, 2:4, 4:6].mean((1, 2)))


@given(st.integers(2, 9), st.integers(1, 9))
@settings(max_examples=30)
def test_to_grid_keeps_constants_and_linear_ramps_centred(source, side):
    constant = torch.full((1, source * source, 2), 3.0)
    torch.testing.assert_close(to_grid(constant, side), torch.full((1, side * side, 2), 3.0))
    rows = torch.arange(source, dtype=torch.float32).repeat_interleave(source)[None, :, None]
    assert abs(to_grid(rows, side).mean() - rows.mean()) < 1e-4


@given(
    scale_p=st.floats(1e-3, 1e3),
    scale_y=st.floats(1e-3, 1e3),
    seed=st.integers(0, 100),
)
@settings(max_examples=40)
def test_cosine_losses_ignore_positive_scales(scale_p, scale_y, seed):
    g = torch.Generator().manual_seed(seed)
    p, y = torch.randn(2, 9, 5, generator=g), torch.randn(2, 9, 5, generator=g)
    torch.testing.assert_close(negative_cosine(scale_p * p, scale_y * y), negative_cosine(p, y))
    torch.testing.assert_close(structure(scale_p * p, scale_y * y, "mean"), structure(p, y, "mean"))
    torch.testing.assert_close(nt_xent(scale_p * p, scale_y * y, 0.1), nt_xent(p, y, 0.1))


@given(st.integers(0, 100))
@settings(max_examples=20)
def test_cosine_is_bounded_and_best_at_the_target(seed):
    g = torch.Generator().manual_seed(seed)
    p, y = torch.randn(2, 9, 5, generator=g), torch.randn(2, 9, 5, generator=g)
    assert -1 <= negative_cosine(p, y) <= 1
    close(negative_cosine(2 * y, y), -1.0)
    assert nt_xent(y, y, 0.1) < nt_xent(p, y, 0.1)


def test_cosine_of_a_zero_token_is_finite_in_value_and_gradient():
    p = torch.zeros(1, 4, 3, requires_grad=True)
    loss = negative_cosine(p, torch.zeros(1, 4, 3))
    loss.backward()
    assert p.grad is not None and torch.isfinite(loss) and torch.isfinite(p.grad).all()
