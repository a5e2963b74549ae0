"""The step's mathematics against closed forms, and where its gradients go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import settings
from torch import Tensor, nn

import featcache
from trainer.diffusion.transport import build_transport
from trainer.distributed import World
from trainer.runs.normalization import Normalization
from trainer.training.objective import (
    Draws,
    Objective,
    clip_gradients,
    draw,
    ema_decay_at,
    sample_posterior,
    update_ema,
)
from trainer.training.state import Parts, assemble

CPU = torch.device("cpu")


LATENT = (16, 8, 8)  # of the embedded VAE at 64 px


def numbers(batch: int = 4, *, seed: int = 0, step: int = 0, **kw: Any) -> Draws:
    return draw(**{
        "seed": seed,
        "step": step,
        "batch": batch,
        "latent_shape": LATENT,
        "time_sampling": "uniform",
        "device": CPU,
        **kw,
    })  # fmt: skip


def test_draws_are_a_function_of_seed_and_step() -> None:
    a, b = numbers(seed=1, step=7), numbers(seed=1, step=7)
    assert all(torch.equal(getattr(a, n), v) for n, v in vars(b).items() if isinstance(v, torch.Tensor))
    for other in (numbers(seed=1, step=8), numbers(seed=2, step=7)):
        assert not torch.equal(a.noise, other.noise) and not torch.equal(a.time, other.time)


def test_draws_follow_their_distributions() -> None:
    draws = numbers(batch=4000, latent_shape=(2, 4, 4))
    n = draws.noise.numel()
    for normal in (draws.noise, draws.posterior):
        assert abs(normal.mean()) < 4 / n**0.5
        assert abs(normal.var() - 1) < 4 * (2 / n) ** 0.5
    correlation = (draws.noise * draws.posterior).mean()
    assert abs(correlation) < 4 / n**0.5
    for uniform in (draws.time, draws.drop, draws.align):
        grid = (torch.arange(4000) + 0.5) / 4000
        assert (uniform.sort().values - grid).abs().max() < 1.95 / 4000**0.5  # Kolmogorov-Smirnov at 0.1 %


def test_posterior_samples_have_the_posterior_s_moments() -> None:
    """z = (mean + std n - shift) * scale: mean and variance per entry against the closed form, in float64."""
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 1, 3, 2, 2, generator=generator)
    logvar[0, 0, 0, 0] = -50.0  # clamped to -30
    moments = torch.cat([mean, logvar], dim=1)
    scale, shift, n = 0.7, 0.3, 20_000
    noise = torch.randn(n, 3, 2, 2, generator=generator)
    z = sample_posterior(moments.expand(n, -1, -1, -1), noise, scale=scale, shift=shift).double()
    expected_mean = (mean[0].double() - shift) * scale
    expected_std = scale * (0.5 * logvar[0].double().clamp(-30, 20)).exp()
    assert ((z.mean(0) - expected_mean).abs() <= 4 * expected_std / n**0.5 + 1e-6).all()
    assert ((z.std(0) / expected_std - 1).abs()[expected_std > 1e-3] < 4 / (2 * n) ** 0.5).all()


def test_posterior_equals_diffusers() -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments = torch.randn(2, 8, 4, 4) * 3
    noise = torch.randn(2, 4, 4, 4)
    theirs = DiagonalGaussianDistribution(moments)
    expected = (theirs.mean + theirs.std * noise - 0.1) * 0.18215
    assert torch.allclose(sample_posterior(moments, noise, scale=0.18215, shift=0.1), expected)


def test_ema_equals_its_closed_form() -> None:
    torch.manual_seed(0)
    model, ema = nn.Linear(3, 2), nn.Linear(3, 2)
    weights = [torch.randn(2, 3) for _ in range(12)]
    start, decay = ema.weight.detach().double().clone(), 0.9
    for w in weights:
        with torch.no_grad():
            model.weight.copy_(w)
        update_ema(ema, model, decay)
    n = len(weights)
    expected = decay**n * start
    expected = expected + sum((1 - decay) * decay ** (n - 1 - i) * w.double() for i, w in enumerate(weights))
    assert torch.allclose(ema.weight.double(), expected, atol=1e-6)


def test_ema_leaves_buffers_alone() -> None:
    model, ema = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    assert model.running_mean is not None and ema.running_mean is not None
    model.running_mean.fill_(5.0)
    update_ema(ema, model, 0.5)
    assert ema.running_mean.tolist() == [0.0, 0.0]


def test_ema_warm_up() -> None:
    assert ema_decay_at(0, 0.9999, warmup=True) == 0.1
    assert ema_decay_at(90, 0.9999, warmup=True) == 0.91
    assert ema_decay_at(10**9, 0.9999, warmup=True) == 0.9999
    assert ema_decay_at(0, 0.9999, warmup=False) == 0.9999


def with_gradients(*values: list[float]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(len(v))) for v in values]
    for parameter, value in zip(parameters, values):
        parameter.grad = torch.tensor(value)
    return parameters


def test_clipping_is_by_the_joint_norm_of_all_groups() -> None:
    a, b = with_gradients([3.0, 0.0]), with_gradients([0.0], [4.0])
    norm = clip_gradients([a, b], 1.0)
    assert norm.item() == pytest.approx(5.0)
    assert a[0].grad is not None and b[1].grad is not None
    assert torch.allclose(a[0].grad, torch.tensor([0.6, 0.0]), rtol=1e-5)
    assert torch.allclose(b[1].grad, torch.tensor([0.8]), rtol=1e-5)


def test_clipping_equals_torch_s_and_leaves_small_gradients_alone() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(7).tolist() for _ in range(5)]
    ours, theirs = with_gradients(*gradients), with_gradients(*gradients)
    assert clip_gradients([ours], 0.5) == pytest.approx(float(nn.utils.clip_grad_norm_(theirs, 0.5)))
    assert all(torch.allclose(p.grad, q.grad, rtol=1e-6) for p, q in zip(ours, theirs))  # type: ignore[arg-type]
    small = with_gradients(*gradients)
    clip_gradients([small, [nn.Parameter(torch.zeros(2))]], 1e3)
    assert all(p.grad.tolist() == torch.tensor(g).tolist() for p, g in zip(small, gradients))  # type: ignore[union-attr]


def test_without_a_limit_gradients_are_left_alone_to_the_bit() -> None:
    parameters = with_gradients([3e30, 1e-30], [float("inf"), -0.0])
    assert clip_gradients([parameters], float("inf")) == float("inf")
    assert [p.grad.tolist() for p in parameters if p.grad is not None] == [
        torch.tensor([3e30, 1e-30]).tolist(),
        [float("inf"), 0.0],
    ]
    assert clip_gradients([with_gradients([3.0], [4.0])], float("inf")) == pytest.approx(5.0)


def test_a_group_of_zero_gradients_does_not_change_the_norm_by_a_bit() -> None:
    torch.manual_seed(1)
    gradients = [torch.randn(11).tolist() for _ in range(9)]
    alone = clip_gradients([with_gradients(*gradients)], 0.1)
    beside = clip_gradients([with_gradients(*gradients), with_gradients(*[[0.0] * 5] * 3)], 0.1)
    assert torch.equal(alone, beside)


def assembled(cache: Path, method: str = "none", **kw: Any) -> tuple[Parts, Any]:
    opened = featcache.open(cache)
    return assemble(settings(cache, method, **kw), opened, CPU, World()), opened


def batch_of(cache: Any, features: list[str], indices: range) -> dict[str, Tensor]:
    with cache.reader(features) as reader:
        out = reader.allocate(len(indices))
        reader.read(np.array(indices), out)
    return {name: torch.from_numpy(value) for name, value in out.items()}


@pytest.mark.usefixtures("nano")
def test_a_fresh_model_s_loss_is_the_velocity_s_mean_square(shapes_cache: Path) -> None:
    """A fresh SiT predicts zero, so its loss is mean |e - z|^2, z drawn by hand from the stored moments in float64."""
    parts, cache = assembled(shapes_cache)
    batch, draws = batch_of(cache, ["vae/moments", "label"], range(8)), numbers(8)
    terms, kept = parts.objective(batch, draws)
    mean, logvar = batch["vae/moments"].double().chunk(2, dim=1)
    vae = cache.manifest.dataset.vae
    z = (mean + (0.5 * logvar).exp() * draws.posterior.double() - vae["shift_factor"]) * vae["scaling_factor"]
    assert terms["denoise"].item() == pytest.approx((draws.noise.double() - z).square().mean().item(), rel=1e-5)
    assert kept is None


@pytest.mark.usefixtures("nano")
def test_a_fresh_dit_s_loss_is_that_of_predicting_no_noise(shapes_cache: Path) -> None:
    from trainer.diffusion.ddpm import ddpm_loss, linear_schedule, q_sample, tables

    parts, cache = assembled(shapes_cache, model="DiT-Nano/2")
    batch, draws = batch_of(cache, ["vae/moments", "label"], range(8)), numbers(8)
    terms, _ = parts.objective(batch, draws)
    vae = cache.manifest.dataset.vae
    z = sample_posterior(
        batch["vae/moments"].float(), draws.posterior, scale=vae["scaling_factor"], shift=vae["shift_factor"]
    ).double()
    table = tables(linear_schedule(), dtype=torch.float64)
    t, noise = (draws.time * 1000).long(), draws.noise.double()
    zero = torch.zeros(8, 2 * LATENT[0], *LATENT[1:], dtype=torch.float64)
    expected = ddpm_loss(zero, x0=z, x_t=q_sample(table, z, t, noise), noise=noise, t=t, table=table).loss.mean()
    assert terms["denoise"].item() == pytest.approx(expected.item(), rel=1e-4)


class Spy(nn.Module):
    """A backbone that remembers what it was called with."""

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg, self.zero = cfg, nn.Parameter(torch.zeros(()))
        self.calls: list[dict[str, Any]] = []

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, *, taps: tuple[int, ...] = (), stop_after: int | None = None
    ) -> Any:
        from trainer.models.transformer import ModelOutput

        self.calls.append({"x": x, "t": t, "y": y, "taps": taps, "stop_after": stop_after})
        hidden = {m: self.zero + x.mean() + torch.zeros(len(x), 16, self.cfg.width) for m in taps}
        return ModelOutput(x * self.zero, hidden, torch.zeros(len(x), self.cfg.width))


@pytest.mark.usefixtures("nano")
def test_label_dropout_has_its_share_and_uses_the_null_class(shapes_cache: Path) -> None:
    parts, cache = assembled(shapes_cache)
    spy: Any = Spy(parts.model.cfg)
    objective = Objective(
        spy, None, parts.objective._features, normalization=Normalization(scale=1, shift=0), transport=build_transport("sit"),
        label_dropout=0.1, autocast=None,
    )  # fmt: skip
    n = 5000
    one = batch_of(cache, ["vae/moments", "label"], range(1))
    batch = {name: value.expand(n, *value.shape[1:]) for name, value in one.items()}
    draws = numbers(n)
    objective(batch, draws)
    (call,) = spy.calls
    dropped = call["y"] == spy.cfg.num_classes
    assert torch.equal(dropped, draws.drop < 0.1)
    assert abs(dropped.float().mean() - 0.1) < 4 * (0.09 / n) ** 0.5
    assert (call["y"][~dropped] == one["label"]).all()


@pytest.mark.usefixtures("nano")
def test_the_teacher_sees_the_same_image_noise_and_labels_and_only_its_first_blocks(shapes_cache: Path) -> None:
    parts, cache = assembled(shapes_cache, "sra", label_dropout=0.5)
    student: Any = Spy(parts.model.cfg)
    teacher: Any = Spy(parts.model.cfg)
    parts.objective.model, parts.objective._teacher = student, [teacher]
    batch, draws = batch_of(cache, ["vae/moments", "label"], range(8)), numbers(8)
    parts.objective(batch, draws)
    (seen,), (taught,) = student.calls, teacher.calls
    alignment: Any = parts.alignment
    assert taught["stop_after"] == alignment.teacher_depth and taught["taps"] == (alignment.teacher_depth,)
    assert torch.equal(seen["y"], taught["y"])
    lead = seen["t"] - taught["t"]
    assert torch.allclose(taught["t"], (seen["t"] - 0.2 * draws.align).clamp(min=0))
    assert (lead > 0).any()
    # x_t = z + t (e - z): the same line through latent and noise
    slope = (seen["x"] - taught["x"]) / lead.reshape(-1, 1, 1, 1)
    assert torch.allclose(taught["x"] + slope * (1 - taught["t"]).reshape(-1, 1, 1, 1), draws.noise, atol=1e-3)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("method", ["repa", "sara", "dya", "ahpa", "sra", "sra2", "ahpa+sra"])
def test_gradients_reach_what_is_trained_and_nothing_else(shapes_cache: Path, method: str) -> None:
    parts, cache = assembled(shapes_cache, method)
    with torch.no_grad():  # away from the zero initialisation, where many gradients vanish
        for parameter in parts.objective.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert parts.alignment is not None
    batch = batch_of(cache, ["vae/moments", "label", *parts.alignment.reads], range(4))
    terms, kept = parts.objective(batch, numbers())
    sum(terms.values()).backward()
    trained = set(parts.names)
    for name, parameter in parts.objective.named_parameters():
        assert (parameter.grad is not None) == (parameter in trained), name
    assert all(p.grad is None for p in parts.ema.parameters())
    assert kept is not None and not any(h.requires_grad for h in kept.hidden.values())
    if parts.adversary is not None:
        before = [p.grad.clone() for p in parts.names if p.grad is not None]
        parts.objective.adversary_loss(kept, batch).backward()
        after = [p.grad for p in parts.names if p.grad is not None]
        assert all(torch.equal(a, b) for a, b in zip(before, after))
        assert all(p.grad is not None for p in parts.adversary.parameters())


@pytest.mark.usefixtures("nano")
def test_a_step_without_alignment_computes_none_of_it(shapes_cache: Path) -> None:
    parts, cache = assembled(shapes_cache, "ahpa")
    called: list[str] = []
    assert parts.alignment is not None
    for module in parts.alignment.modules():
        module.register_forward_hook(lambda *_: called.append("head"))
    batch = batch_of(cache, ["vae/moments", "label"], range(4))  # its targets are not even read
    terms, kept = parts.objective(batch, numbers(), aligned=False)
    assert set(terms) == {"denoise"} and kept is None and not called


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("method", ["sara", "sra", "dya"])
def test_bfloat16_autocast_reaches_every_part(shapes_cache: Path, method: str) -> None:
    """Forward, metrics and the discriminator's loss in bf16 stay near float32's."""
    parts, cache = assembled(shapes_cache, method)
    low, _ = assembled(shapes_cache, method, precision="bf16")
    assert parts.alignment is not None
    batch, draws = batch_of(cache, ["vae/moments", "label", *parts.alignment.reads], range(4)), numbers()
    values = []
    for p in (parts, low):
        terms, kept = p.objective(batch, draws)
        terms = terms | p.objective.measure(kept, batch, draws)
        if p.adversary is not None:
            terms["adversary"] = p.objective.adversary_loss(kept, batch)
        assert all(v.dtype is torch.float32 for v in terms.values())
        values.append({k: v.item() for k, v in terms.items()})
    assert values[1] == pytest.approx(values[0], rel=0.05, abs=0.02)
    assert values[1] != values[0]


def test_rows_cut_every_kind_of_draw() -> None:
    draws = numbers(6)
    part = draws.rows(slice(2, 5))
    assert torch.equal(part.noise, draws.noise[2:5]) and part.align.shape == (3,)
    assert replace(part, time=part.time).time.shape == (3,)
