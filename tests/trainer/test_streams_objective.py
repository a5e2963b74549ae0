"""Losses of REG, ReDi and other streams against a float64 implementation of its own, from what the cache stores."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import settings
from torch import Tensor

import featcache
from featcache.inspect import read_feature
from featcache.read.normalization import Statistics, compute
from trainer.diffusion.ddpm import linear_schedule
from trainer.diffusion.streams import Layout, on_grid
from trainer.distributed import World
from trainer.runs.cache import with_streams
from trainer.runs.normalization import of_tokens, settle_streams
from trainer.training.objective import Draws, draw
from trainer.training.state import Parts, assemble

CPU, BATCH = torch.device("cpu"), 8
CLS, PCA = "tiny@5.cls", "tiny@5.pca4"

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "reg": ("reg", {}),
    "reg normalised, x and cosine": (
        "reg",
        {"streams": {CLS: {"normalization": "channel"}}, "prediction": "x", "time_floor": 0.3, "cosine_weight": 0.7},
    ),
    "reg dropped": ("reg", {"streams": {CLS: {"dropout": 0.4, "weight": 2.0}}, "cosine_weight": 1.0}),
    "redi": ("redi", {"align": {"redi": {"weight": 0.5, "dropout": 0.4}}}),
    "redi by position, noise": (
        "redi",
        {"streams": {PCA: {"normalization": "position"}}, "prediction": "noise", "path": "cosine"},
    ),
    "redi on DiT": ("redi", {"model": "DiT-Nano/2", "align": {"redi": {"dropout": 0.4, "weight": 0.3}}}),
    "redi on DiT by channel": ("redi", {"model": "DiT-Nano/2", "streams": {PCA: {"normalization": "channel"}}}),
    "squares of tokens": (
        "none",
        {
            "streams": {
                PCA: {"embed": "own", "normalization": "position", "dropout": 0.3},
                "tiny@5": {"weight": 0.1},
                CLS: {"normalization": "position"},
            },
            "time_sampling": "lognormal",
        },
    ),
    "all on LightningDiT": ("redi+reg", {"model": "LightningDiT-Nano/2", "align": {"redi": {"dropout": 0.5}}}),
}


class Case:
    """A run's parts with weights that are nowhere zero, and one batch of it."""

    def __init__(self, path: Path, folder: Path, method: str, changes: Mapping[str, Any]) -> None:
        options = {"reg": {"head_width": 24}} if "reg" in method else {}
        changes = {**changes, "align": {**options, **changes.get("align", {})}}
        self.cache = featcache.open(path)
        self.config = with_streams(settings(path, method, **changes).settled(), self.cache)
        found = settle_streams(self.config, self.cache, folder / "no run")
        self.parts: Parts = assemble(self.config, self.cache, CPU, World(), stream_statistics=found)
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parts.objective.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
        self.cfg = self.parts.model.cfg
        self.draws: Draws = draw(
            seed=3,
            step=5,
            batch=BATCH,
            latent_shape=self.cfg.latent_shape,
            time_sampling=self.config.time_sampling,
            device=CPU,
            streams=dict(zip(self.parts.data[1:], Layout(cfg=self.cfg).shapes[1:])),
        )
        names = list(self.parts.reads)
        with self.cache.reader(names) as reader:
            out = reader.allocate(BATCH)
            reader.read(np.arange(BATCH), out)
        self.batch = {name: torch.from_numpy(value) for name, value in out.items()}

    def stored(self, name: str, count: int = BATCH) -> np.ndarray:
        return read_feature(self.cache, name, range(count)).astype(np.float64)


def enlarged(image: np.ndarray, side: int) -> np.ndarray:
    """Bilinear with pixels' centres at halves, the edge repeated: [C, s, s] -> [C, side, side]."""
    s = image.shape[1]
    at = np.clip((np.arange(side) + 0.5) * s / side - 0.5, 0, s - 1)
    low = np.floor(at).astype(int)
    high, share = np.minimum(low + 1, s - 1), at - low
    rows = image[:, low] * (1 - share)[:, None] + image[:, high] * share[:, None]
    result: np.ndarray = rows[:, :, low] * (1 - share) + rows[:, :, high] * share
    return result


def clean_stream(case: Case, name: str) -> Tensor:
    """As the backbone is to see it, but for what is dropped."""
    options = case.config.streams[name] or {}
    values = case.stored(name)
    everything = case.stored(name, len(case.cache))
    if options["normalization"] == "channel":
        axes = tuple(range(everything.ndim - 1))
        values = (values - everything.mean(axes)) / everything.std(axes)
    elif options["normalization"] == "position":
        values = (values - everything.mean(0)) / everything.std(0)
    if values.ndim == 2:
        return torch.from_numpy(values)[:, :, None]
    B, T, C = values.shape
    if options["embed"] == "own":
        return torch.from_numpy(values.transpose(0, 2, 1).copy())
    side = math.isqrt(T)
    images = values.transpose(0, 2, 1).reshape(B, C, side, side)
    return torch.from_numpy(np.stack([enlarged(image, case.cfg.latent_size) for image in images]))


def expected(case: Case) -> dict[str, float]:
    """All terms of the loss, in float64."""
    config, cfg, draws = case.config, case.cfg, case.draws
    vae = case.cache.manifest.dataset.vae
    assert vae is not None
    mean, logvar = np.split(case.stored("vae/moments"), 2, axis=1)
    noise = draws.posterior.double().numpy()
    clean = [torch.from_numpy((mean + np.exp(logvar / 2) * noise - vae["shift_factor"]) * vae["scaling_factor"])]
    noises, weights, kept = [draws.noise.double()], [1.0], [torch.ones(BATCH, dtype=torch.float64)]
    for name, options in config.streams.items():
        assert options is not None
        there = (draws.drop_stream[name] >= options["dropout"]).double()
        x0 = clean_stream(case, name)
        clean.append(x0 * there.reshape(-1, *[1] * (x0.ndim - 1)))
        noises.append(draws.streams[name].double())
        weights.append(options["weight"])
        kept.append(there)
    t = draws.time.double()
    if config.time_sampling == "lognormal":
        t = 1 / (1 + (-t).exp())
    dit = config.model.startswith("DiT")
    if dit:
        step = (t * 1000).floor().long()
        assert (step > 0).all(), "the first step's loss is another matter"
        alpha_bar = torch.from_numpy(linear_schedule().alpha_bar)
        a, b, da, db = alpha_bar[step].sqrt(), (1 - alpha_bar[step]).sqrt(), t, t  # DDPM has no velocity here
    elif config.path == "linear":
        a, b, da, db = 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    else:
        q = math.pi / 2
        a, b, da, db = (q * t).cos(), (q * t).sin(), -q * (q * t).sin(), q * (q * t).cos()

    def wide(column: Tensor, like: Tensor) -> Tensor:
        return column.reshape(-1, *[1] * (like.ndim - 1))

    noisy = [wide(a, x) * x + wide(b, x) * e for x, e in zip(clean, noises)]
    merged = [x for x, s in zip(noisy[1:], cfg.streams) if s.merged]
    own = [x for x, s in zip(noisy[1:], cfg.streams) if not s.merged]
    label = torch.where(draws.drop < config.label_dropout, cfg.num_classes, case.batch["label"])
    model = copy.deepcopy(case.parts.model).double()
    alignment = copy.deepcopy(case.parts.alignment)
    taps = () if alignment is None else alignment.taps
    with torch.no_grad():
        output = model(torch.cat([noisy[0], *merged], 1), step if dit else t, label, streams=own, taps=taps)
    assert output.prediction is not None
    image, rest = output.prediction, list(output.streams)
    variance = image[:, cfg.in_channels :]
    found, at = [(image[:, : cfg.latent_channels], variance[:, : cfg.latent_channels])], cfg.latent_channels
    for s in cfg.streams:
        if s.merged:
            found.append((image[:, at : at + s.channels], variance[:, at : at + s.channels]))
            at += s.channels
        else:
            found.append((rest.pop(0), variance))
    terms: dict[str, float] = {}
    names = ["denoise", *(f"denoise/{name}" for name in config.streams)]
    for name, (out, values), x0, e, x_t, weight, there in zip(names, found, clean, noises, noisy, weights, kept):
        if dit:
            each = (out - e).square().flatten(1).mean(1) + variational_bound(x0, x_t, out, values, step)
            terms[name] = weight * float((each * there).sum()) / BATCH
            continue
        A, S, dA, dS = (wide(c, x0) for c in (a, b, da, db))
        determinant = dA * S - A * dS
        if config.prediction == "velocity":
            v, truth = out, dA * x0 + dS * e
        elif config.prediction == "x":
            divisor = S.clamp(min=config.time_floor)
            v, truth = ((dS * x_t + determinant * z) / divisor for z in (out, x0))
        else:
            divisor = A.clamp(min=config.time_floor)
            v, truth = ((dA * x_t - determinant * n) / divisor for n in (out, e))
        each = (v - truth).square().flatten(1).mean(1)
        terms[name] = weight * float((each * there).sum()) / BATCH
        if config.cosine_weight:
            lengths = v.norm(dim=1).clamp(min=1e-2) * truth.norm(dim=1).clamp(min=1e-2)
            cosine = ((v * truth).sum(1) / lengths).flatten(1).mean(1)
            terms[f"{name}/cosine"] = weight * config.cosine_weight * float(((1 - cosine) * there).sum()) / BATCH
    if alignment is not None:
        hidden = torch.cat([reg_token(case, output), output.hidden[taps[0]]], 1)
        class_token, tokens = torch.from_numpy(case.stored(CLS)), torch.from_numpy(case.stored("tiny@5"))
        target = torch.cat([class_token[:, None], tokens], 1)
        with torch.no_grad():
            projected = alignment.double().heads[0](hidden)  # type: ignore[index,operator]
        assert projected.shape == target.shape == (BATCH, 1 + 16, 128)
        cosines = (projected * target).sum(-1) / (projected.norm(dim=-1) * target.norm(dim=-1))
        terms["align/cosine"] = -0.5 * float(cosines.sum()) / (BATCH * 17)
    return terms


def reg_token(case: Case, output: Any) -> Tensor:
    """The class token's hidden state: it stands behind the tokens of streams that come before it."""
    before = 0
    for s in case.cfg.own_streams:
        if s.name == CLS:
            break
        before += s.tokens
    (hidden,) = output.stream_hidden.values()
    found: Tensor = hidden[:, before : before + 1]
    return found


def variational_bound(x0: Tensor, x_t: Tensor, eps: Tensor, values: Tensor, step: Tensor) -> Tensor:
    """KL divergence of q(x_{t-1} | x_t, x_0) and the model's step in bits per dimension, [B]."""
    from torch.distributions import Normal, kl_divergence

    alpha_bar = torch.from_numpy(linear_schedule().alpha_bar)
    now, before = (alpha_bar[i].reshape(-1, 1, 1, 1) for i in (step, step - 1))
    beta = 1 - now / before
    posterior = beta * (1 - before) / (1 - now)

    def mean(x: Tensor) -> Tensor:
        return beta * before.sqrt() / (1 - now) * x + (1 - before) * (1 - beta).sqrt() / (1 - now) * x_t

    guess = (x_t - (1 - now).sqrt() * eps) / now.sqrt()
    share = (values + 1) / 2
    std = (0.5 * (share * beta.log() + (1 - share) * posterior.log())).exp()
    divergence: Tensor = kl_divergence(Normal(mean(x0), posterior.sqrt().expand_as(x0)), Normal(mean(guess), std))
    return divergence.flatten(1).mean(1) / math.log(2)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("name", CASES)
def test_terms_equal_their_formulas(streams_cache: Path, tmp_path: Path, name: str) -> None:
    method, changes = CASES[name]
    case = Case(streams_cache, tmp_path, method, changes)
    terms, _ = case.parts.objective(case.batch, case.draws)
    wanted = expected(case)
    assert terms.keys() == wanted.keys()
    assert {key: value.item() for key, value in terms.items()} == pytest.approx(wanted, rel=2e-4)
    if any((options or {})["dropout"] for options in case.config.streams.values()):
        (draws,) = (d for n, d in case.draws.drop_stream.items() if (case.config.streams[n] or {})["dropout"])
        assert (draws < 0.3).sum() > 0 and (draws >= 0.5).sum() > 0, "some are dropped and some are not"


@pytest.mark.usefixtures("nano")
def test_a_stream_that_is_dropped_teaches_nothing_but_its_noise_is_seen(streams_cache: Path, tmp_path: Path) -> None:
    """All dropped: no loss and no gradient of its output layer, and the latents' loss still depends on its noise."""
    from dataclasses import replace

    case = Case(streams_cache, tmp_path, "none", {"streams": {CLS: {"dropout": 1.0}}})
    terms, _ = case.parts.objective(case.batch, case.draws)
    assert terms[f"denoise/{CLS}"].item() == 0
    torch.stack(list(terms.values())).sum().backward()
    last: Any = case.parts.model.final_layer.stream_linears[0]
    assert last.weight.grad is not None and not last.weight.grad.any()
    other = replace(case.draws, streams={CLS: -case.draws.streams[CLS]})
    assert case.parts.objective(case.batch, other)[0]["denoise"].item() != terms["denoise"].item()


@pytest.mark.usefixtures("nano")
def test_the_teacher_sees_the_streams_of_the_same_sample(streams_cache: Path, tmp_path: Path) -> None:
    """SRA's: same data, noise and what is dropped, at its own time."""
    streams = {PCA: {"dropout": 0.4}, CLS: {}}
    case = Case(streams_cache, tmp_path, "sra", {"streams": streams, "align": {"sra": {"head_ratio": 1.0}}})
    seen: list[dict[str, Any]] = []
    for model in (case.parts.model, case.parts.ema):
        model.register_forward_pre_hook(
            lambda _m, args, kw: seen.append({"x": args[0], "t": args[1], "c": kw["streams"][0]}), with_kwargs=True
        )
    _, kept = case.parts.objective(case.batch, case.draws)
    assert kept is not None
    with torch.no_grad():
        case.parts.objective.measure(kept, case.batch, case.draws)
    student, teacher = seen[:2]
    lead = student["t"] - teacher["t"]
    there = lead > 0.02
    assert there.any()
    noise = torch.cat([case.draws.noise, case.draws.streams[PCA]], 1)
    for key, wanted in (("x", noise), ("c", case.draws.streams[CLS])):
        wide = [-1, *[1] * (wanted.ndim - 1)]
        slope = (student[key] - teacher[key]) / lead.reshape(wide)
        at_one = teacher[key] + slope * (1 - teacher["t"]).reshape(wide)
        torch.testing.assert_close(at_one[there], wanted[there], rtol=0, atol=2e-3)


def test_grids_grow_bilinearly_and_shrink_by_averages() -> None:
    tokens = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = tokens.reshape(2, 3, 4, 4)
    assert torch.equal(on_grid(tokens, 4, to=4), images)
    for side in (5, 8, 32):
        wanted = np.stack([enlarged(image, side) for image in images.numpy()])
        torch.testing.assert_close(on_grid(tokens, 4, to=side), torch.from_numpy(wanted))
    torch.testing.assert_close(on_grid(tokens, 4, to=2), images.reshape(2, 3, 2, 2, 2, 2).mean((3, 5)))


@pytest.mark.parametrize(("over", "shape"), [("channel", (4, 1, 1)), ("position", (4, 4, 4))])
def test_statistics_of_tokens_are_the_same_in_a_file_s_shape(streams_cache: Path, over: Any, shape: Any) -> None:
    """`[C, 1, 1]` and RAE's `[C, h, w]` beside our own, as values `[B, C, T]` take them."""
    ours = compute(featcache.open(streams_cache), PCA, over)  # [C], or [T, C]
    theirs = Statistics(mean=ours.mean.T.reshape(shape), std=ours.std.T.reshape(shape))
    for found in (of_tokens(ours), of_tokens(theirs)):
        assert torch.equal(torch.as_tensor(found.shift).expand(4, 16), ours.mean.expand(16, 4).T)
        assert torch.equal(torch.as_tensor(found.scale).expand(4, 16), 1 / ours.std.expand(16, 4).T)


def test_the_noise_of_streams_leaves_all_other_draws_as_they_are() -> None:
    def drawn(streams: dict[str, tuple[int, ...]]) -> Draws:
        return draw(
            seed=1, step=2, batch=3, latent_shape=(2, 4, 4), time_sampling="uniform", device=CPU, streams=streams
        )

    alone, one = drawn({}), drawn({"a@1.cls": (5, 1)})
    two = drawn({"a@2": (4, 9), "a@1.cls": (5, 1)})
    for name in ("time", "posterior", "noise", "drop", "align"):
        assert torch.equal(getattr(alone, name), getattr(one, name)), name
        assert torch.equal(getattr(alone, name), getattr(two, name)), name
    assert torch.equal(one.streams["a@1.cls"], two.streams["a@1.cls"])
    assert torch.equal(one.drop_stream["a@1.cls"], two.drop_stream["a@1.cls"])
    assert not torch.equal(two.streams["a@1.cls"].flatten(), two.streams["a@2"].flatten()[:15])
    cut = two.rows(slice(1, 3))
    assert torch.equal(cut.streams["a@2"], two.streams["a@2"][1:]) and cut.drop_stream["a@2"].shape == (2,)
