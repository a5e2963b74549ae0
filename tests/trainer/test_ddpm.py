"""DDPM schedule and loss against formulas written out per number."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from torch.distributions import Normal, kl_divergence

from featcache.errors import UserError
from trainer.diffusion.ddpm import (
    ddpm_loss,
    discretized_log_likelihood,
    linear_schedule,
    q_sample,
    respace,
    tables,
)

FULL = linear_schedule()
TABLE = tables(FULL, dtype=torch.float64)


def test_schedule_by_running_product() -> None:
    alpha_bar = 1.0
    for k in range(1000):
        beta = 1e-4 + (0.02 - 1e-4) * k / 999
        alpha_bar *= 1 - beta
        assert FULL.beta[k] == pytest.approx(beta, rel=1e-10)
        assert FULL.alpha_bar[k] == pytest.approx(alpha_bar, rel=1e-10)
    assert FULL.alpha_bar.dtype == np.float64


@pytest.mark.parametrize("count", [1000, 250, 10])
def test_posterior_by_bayes(count: int) -> None:
    """x_{k-1} given x_k and x_0: the product of two Gaussian likelihoods in x_{k-1}."""
    s = respace(FULL, count)
    for k in (1, 2, count // 2, count - 1):
        previous = s.alpha_bar[k - 1]
        alpha = s.alpha_bar[k] / previous
        precision = alpha / (1 - alpha) + 1 / (1 - previous)
        assert s.posterior_variance[k] == pytest.approx(1 / precision, rel=1e-9)
        assert s.mean_from_xt[k] == pytest.approx(math.sqrt(alpha) / (1 - alpha) / precision, rel=1e-9)
        assert s.mean_from_x0[k] == pytest.approx(math.sqrt(previous) / (1 - previous) / precision, rel=1e-9)
    assert s.posterior_variance[0] == 0
    assert s.posterior_log_variance[0] == s.posterior_log_variance[1]


def test_q_sample_by_composing_single_steps() -> None:
    """Mean and variance after k noising steps, one by one."""
    mean, variance = 1.0, 0.0
    for k in range(1000):
        beta = FULL.beta[k]
        mean, variance = mean * math.sqrt(1 - beta), variance * (1 - beta) + beta
        if k in (0, 1, 500, 999):
            t, one, zero = torch.tensor([k]), torch.ones(1, 1), torch.zeros(1, 1)
            assert q_sample(TABLE, one, t, zero).item() == pytest.approx(mean, rel=1e-9)
            assert q_sample(TABLE, zero, t, one).item() == pytest.approx(math.sqrt(variance), rel=1e-9)


def test_respacing_known_values() -> None:
    assert respace(FULL, 10).steps.tolist() == list(range(0, 1000, 111))
    assert respace(FULL, 10, spacing="stride").steps.tolist() == list(range(0, 1000, 100))
    assert respace(FULL, 3).steps.tolist() == [0, 500, 999]  # 499.5 rounds to even
    assert respace(FULL, 1000).steps.tolist() == list(range(1000))


@given(st.integers(2, 1000))
def test_respacing_keeps_the_process(count: int) -> None:
    s = respace(FULL, count)
    assert len(s) == count
    assert (s.steps[0], s.steps[-1]) == (0, 999)
    assert (np.diff(s.steps) > 0).all()
    assert np.diff(s.steps).max() - np.diff(s.steps).min() <= 1
    np.testing.assert_array_equal(s.alpha_bar, FULL.alpha_bar[s.steps])
    np.testing.assert_allclose(np.cumprod(1 - s.beta), s.alpha_bar, rtol=1e-9)


@pytest.mark.parametrize("count", [0, 1001])
def test_impossible_counts_are_explained(count: int) -> None:
    with pytest.raises(UserError, match="1000"):
        respace(FULL, count)


def test_impossible_strides_are_explained() -> None:
    with pytest.raises(UserError, match="No whole stride") as caught:
        respace(FULL, 999, spacing="stride")
    assert "1000 steps" in str(caught.value)


def example(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    t = torch.tensor([0, 0, 1, 400, 999])
    x0, noise = torch.randn(2, 5, 3, 2, 2, dtype=torch.float64, generator=generator)
    x0 = x0.clamp(-1.1, 1.1)
    prediction = torch.randn(5, 6, 2, 2, dtype=torch.float64, generator=generator) * 0.7
    return {"prediction": prediction, "x0": x0, "noise": noise, "t": t, "x_t": q_sample(TABLE, x0, t, noise)}


def test_loss_number_by_number() -> None:
    e = example()
    ours = ddpm_loss(**e, table=TABLE)
    for b in range(5):
        k = int(e["t"][b])
        beta, bar = FULL.beta[k], FULL.alpha_bar[k]
        previous = FULL.alpha_bar[k - 1] if k else 1.0
        smallest = max(k, 1)
        variance = FULL.beta[smallest] * (1 - FULL.alpha_bar[smallest - 1]) / (1 - FULL.alpha_bar[smallest])
        bits, errors = [], []
        for c, i, j in np.ndindex(3, 2, 2):
            x0, x_t, noise = (float(e[key][b, c, i, j]) for key in ("x0", "x_t", "noise"))
            eps, value = float(e["prediction"][b, c, i, j]), float(e["prediction"][b, c + 3, i, j])
            errors.append((eps - noise) ** 2)
            guess = (x_t - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
            at = [
                (math.sqrt(previous) * beta * z + math.sqrt(1 - beta) * (1 - previous) * x_t) / (1 - bar)
                for z in (x0, guess)
            ]
            log_variance = (1 + value) / 2 * math.log(beta) + (1 - value) / 2 * math.log(variance)
            std = math.exp(log_variance / 2)
            if k:
                true = Normal(torch.tensor(at[0]).double(), torch.tensor(math.sqrt(variance)).double())
                model = Normal(torch.tensor(at[1]).double(), torch.tensor(std).double())
                nats = kl_divergence(true, model).item()
            else:

                def cdf(z: float) -> float:
                    return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

                upper = 1.0 if x0 > 0.999 else cdf((x0 + 1 / 255 - at[1]) / std)
                lower = 0.0 if x0 < -0.999 else cdf((x0 - 1 / 255 - at[1]) / std)
                nats = -math.log(max(upper - lower, 1e-12))
            bits.append(nats / math.log(2))
        assert ours.vb is not None
        assert ours.mse[b].item() == pytest.approx(np.mean(errors), rel=1e-10)
        assert ours.vb[b].item() == pytest.approx(np.mean(bits), rel=1e-7)
        assert ours.loss[b].item() == pytest.approx(np.mean(errors) + np.mean(bits), rel=1e-7)


def test_bound_of_the_exact_step_is_zero() -> None:
    e = example()
    exact = torch.cat([e["noise"], -torch.ones_like(e["noise"])], dim=1)
    vb = ddpm_loss(**(e | {"prediction": exact}), table=TABLE).vb
    assert vb is not None
    torch.testing.assert_close(vb[2:], torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_bound_trains_the_variance_and_the_error_trains_the_noise() -> None:
    e = example()
    prediction = e["prediction"].requires_grad_()
    loss = ddpm_loss(**e, table=TABLE)
    assert loss.vb is not None
    (of_vb,) = torch.autograd.grad(loss.vb.sum(), prediction, retain_graph=True)
    (of_mse,) = torch.autograd.grad(loss.mse.sum(), prediction)
    assert torch.count_nonzero(of_vb[:, :3]) == 0
    assert torch.count_nonzero(of_mse[:, 3:]) == 0
    # Bins at step 0 whose probability is cut off at 1e-12 have no gradient; KL terms always have one.
    assert (of_vb[2:, 3:] != 0).all()
    assert torch.isfinite(of_vb).all()


def test_without_a_learned_variance_the_loss_is_the_error() -> None:
    e = example()
    loss = ddpm_loss(**(e | {"prediction": e["prediction"][:, :3]}), table=TABLE)
    assert loss.vb is None
    assert torch.equal(loss.loss, loss.mse)


def test_loss_of_a_low_precision_prediction_is_computed_in_float32() -> None:
    e = {key: value.float() if value.is_floating_point() else value for key, value in example().items()}
    half = e["prediction"].bfloat16()
    table = tables(FULL)
    ours = ddpm_loss(**(e | {"prediction": half}), table=table)
    expected = ddpm_loss(**(e | {"prediction": half.float()}), table=table)
    assert ours.loss.dtype == torch.float32
    assert torch.equal(ours.loss, expected.loss)


def test_float32_tables_lose_little() -> None:
    e = example()
    exact = ddpm_loss(**e, table=TABLE)
    single = {key: value.float() if value.is_floating_point() else value for key, value in e.items()}
    ours = ddpm_loss(**single, table=tables(FULL))
    torch.testing.assert_close(ours.mse.double(), exact.mse, rtol=1e-5, atol=1e-6)
    assert ours.vb is not None
    torch.testing.assert_close(ours.vb.double(), exact.vb, rtol=1e-4, atol=1e-5)


def test_likelihood_of_a_bin_against_scipy() -> None:
    """The tanh stands for the normal distribution function: within 4e-4 in probability."""
    x = torch.linspace(-1, 1, 41, dtype=torch.float64)
    mean, std = torch.tensor(0.2, dtype=torch.float64), 0.3
    log_std = torch.full_like(x, math.log(std))
    ours = discretized_log_likelihood(x, mean.expand(41), log_std).exp()
    upper = np.where(x > 0.999, 1.0, norm.cdf((x.numpy() + 1 / 255 - 0.2) / std))
    lower = np.where(x < -0.999, 0.0, norm.cdf((x.numpy() - 1 / 255 - 0.2) / std))
    np.testing.assert_allclose(ours.numpy(), upper - lower, atol=4e-4)


def test_loss_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    e = example()
    compiled = torch.compile(ddpm_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**e, table=TABLE).loss, ddpm_loss(**e, table=TABLE).loss)
