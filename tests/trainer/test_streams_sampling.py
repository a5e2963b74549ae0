"""Several features drawn at once: from the exact model of a joint Gaussian, and guided by formulas written out here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from featcache.errors import UserError
from trainer.diffusion.ddpm import linear_schedule
from trainer.diffusion.guidance import Guidance
from trainer.diffusion.noise import sample_noise
from trainer.diffusion.samplers import euler, euler_maruyama, ode_grid, sde_grid
from trainer.diffusion.transport import Flow
from trainer.interval import Interval
from trainer.models import ModelOutput, Transformer, build_model
from trainer.models.config import ModelConfig, StreamShape
from trainer.requests import SampleRequest
from trainer.sampling.draw import SampleConfig, draw_latents, draw_streams
from trainer.sampling.inference import Arithmetic
from trainer.sampling.run import folder_name
from trainer.seeds import derive_seed

COUNT = 4000
TOKEN = StreamShape(name="a@1.cls", channels=3, side=1, merged=False)
SQUARE = StreamShape(name="a@2", channels=2, side=2, merged=False)
MERGED = StreamShape(name="a@1.pca2", channels=2, side=2, merged=True)
LAYOUTS = {"own": (TOKEN,), "merged": (MERGED,), "mixed": (SQUARE, MERGED, TOKEN)}


def config(streams: Sequence[StreamShape], **changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "family": "sit", "depth": 2, "width": 16, "heads": 2, "patch_size": 1, "latent_channels": 2, "latent_size": 2,
        "num_classes": 3, "streams": tuple(streams),
    }  # fmt: skip
    return ModelConfig(**(values | changes))


def take_apart(cfg: ModelConfig, x: Tensor, own: Sequence[Tensor]) -> list[Tensor]:
    """The latents and each stream in the order of the configuration, from what a backbone is given (or gives)."""
    parts, channel, rest = [x[:, : cfg.latent_channels]], cfg.latent_channels, list(own)
    for stream in cfg.streams:
        if stream.merged:
            parts.append(x[:, channel : channel + stream.channels])
            channel += stream.channels
        else:
            parts.append(rest.pop(0))
    assert not rest
    return parts


def put_together(cfg: ModelConfig, parts: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    merged = [part for part, stream in zip(parts[1:], cfg.streams) if stream.merged]
    own = tuple(part for part, stream in zip(parts[1:], cfg.streams) if not stream.merged)
    return torch.cat([parts[0], *merged], dim=1), own


class Gaussian:
    """Stands in for a backbone that has learned N(mean, covariance) of all parts, [D] and [D, D], without an error."""

    def __init__(self, cfg: ModelConfig, *, predicts: str = "velocity", variance: float | None = None) -> None:
        self.cfg, self.predicts, self.variance = cfg, predicts, variance
        self.shapes: list[tuple[int, ...]] = [cfg.latent_shape]
        for s in cfg.streams:
            self.shapes.append((s.channels, 2, 2) if s.merged else (s.channels, s.side**2))
        size = sum(map(math.prod, self.shapes))
        g = torch.Generator().manual_seed(3)
        mixing = torch.randn(size, size, generator=g, dtype=torch.float64) / size**0.5
        self.mean = torch.randn(size, generator=g, dtype=torch.float64)
        self.covariance = 0.3 * torch.eye(size, dtype=torch.float64) + mixing @ mixing.T

    def row(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.flatten(1).double() for part in parts], dim=1)

    def expected(self, row: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
        """E[data | x] and E[noise | x] of x = a data + b noise."""
        size = len(self.mean)
        gain = torch.linalg.inv(a * a * self.covariance + b * b * torch.eye(size, dtype=torch.float64))
        residual = (row - a * self.mean) @ gain
        return self.mean + a * residual @ self.covariance, b * residual

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, *, streams: Sequence[Tensor] = ()) -> ModelOutput:
        row = self.row(take_apart(self.cfg, x, streams))
        time = float(t[0])
        if self.predicts == "noise":
            alpha_bar = float(linear_schedule().alpha_bar[int(time)])
            said = self.expected(row, alpha_bar**0.5, (1 - alpha_bar) ** 0.5)[1]
        else:
            data, noise = self.expected(row, 1 - time, time)
            said = data if self.predicts == "x" else noise - data
        cut = said.split([math.prod(shape) for shape in self.shapes], dim=1)
        parts = [part.reshape(len(x), *shape).to(x.dtype) for part, shape in zip(cut, self.shapes)]
        image, own = put_together(self.cfg, parts)
        if self.variance is not None:
            image = torch.cat([image, torch.full_like(image, self.variance)], dim=1)
        return ModelOutput(image, {}, torch.zeros(len(x), 1), own)

    def check(self, drawn: Sequence[Tensor]) -> None:
        """Mean, covariance across all parts, and squared distance within 5 of their standard errors."""
        assert [tuple(part.shape[1:]) for part in drawn] == self.shapes
        row = self.row(drawn)
        n, size = row.shape
        variance = self.covariance.diagonal()
        assert ((row.mean(0) - self.mean).abs() < 5 * (variance / n).sqrt()).all()
        found = (row - self.mean).T @ (row - self.mean) / n
        error = ((variance[:, None] * variance + self.covariance.square()) / n).sqrt()
        assert ((found - self.covariance).abs() < 5 * error).all()
        distance = ((row - self.mean) @ torch.linalg.inv(self.covariance) * (row - self.mean)).sum(1)
        assert abs(float(distance.mean()) - size) < 5 * (2 * size / n) ** 0.5
        latents = math.prod(self.shapes[0])
        assert (self.covariance[:latents, latents:].abs() > 10 * error[:latents, latents:]).any(), (
            "else it shows nothing"
        )


def quick_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of a batch as one tensor, still apart by seed and step: rows of their own take Python's time."""

    def drawn(seed: int, indices: Sequence[int], shape: Sequence[int], step: int, **_kw: Any) -> Tensor:
        g = torch.Generator().manual_seed(derive_seed(seed, "test", step))
        return torch.randn(len(indices), *shape, generator=g)

    def stream(seed: int, indices: Sequence[int], shape: Sequence[int], **_kw: Any) -> Callable[[int], Tensor]:
        return lambda step: drawn(seed, indices, shape, step)

    monkeypatch.setattr("trainer.sampling.draw.sample_noise", drawn)
    monkeypatch.setattr("trainer.sampling.draw.noise_stream", stream)


def draws(model: Any, how: SampleConfig, count: int = COUNT, **kw: Any) -> list[Tensor]:
    labels = torch.zeros(count, dtype=torch.int64)
    return draw_streams(model, labels, range(count), how, **kw)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("sampler", "steps"), [("sde", 250), ("ode", 250), ("heun", 40), ("dopri5", 1)])
def test_flow_samplers_draw_the_joint_distribution(
    layout: str, sampler: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick_noise(monkeypatch)
    model = Gaussian(config(LAYOUTS[layout]))
    model.check(draws(model, SampleConfig(sampler=sampler, steps=steps)))


def test_noise_of_samples_is_independent_between_streams() -> None:
    """Of the real noise, a row for each sample."""
    model = Gaussian(config(LAYOUTS["mixed"]))
    model.check(draws(model, SampleConfig(sampler="heun", steps=20)))


def test_a_model_of_the_data_draws_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_noise(monkeypatch)
    model = Gaussian(config(LAYOUTS["mixed"]), predicts="x")
    transport = Flow(prediction="x", time_floor=1e-3)  # below the last of the times
    model.check(draws(model, SampleConfig(sampler="heun", steps=40), transport=transport))


@pytest.mark.parametrize(
    ("sampler", "steps", "variance"),
    [
        ("ddpm", 1000, -1.0),
        pytest.param("ddpm", 1000, 1.0, marks=pytest.mark.slow),
        ("ddim", 250, 0.0),
    ],
)
def test_ddpm_samplers_draw_the_joint_distribution(
    sampler: str, steps: int, variance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged streams on a DiT that also says its variance: the posterior's (-1) and beta (1) agree at 1000 steps."""
    quick_noise(monkeypatch)
    cfg = config(LAYOUTS["merged"], family="dit", learn_sigma=True)
    model = Gaussian(cfg, predicts="noise", variance=variance)
    model.check(draws(model, SampleConfig(sampler=sampler, steps=steps)))


class Still:
    """A backbone whose flow leaves the noise where it is: what is drawn is what was drawn first."""

    def __init__(self, cfg: ModelConfig) -> None:
        self.cfg = cfg

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, *, streams: Sequence[Tensor] = ()) -> ModelOutput:
        zeros = tuple(torch.zeros_like(part) for part in streams)
        return ModelOutput(torch.zeros_like(x), {}, torch.zeros(len(x), 1), zeros)


@pytest.mark.parametrize("sampler", ["sde", "ode"])
def test_latents_have_one_noise_whatever_is_drawn_beside_them(sampler: str) -> None:
    """At first and in every step, to the bit; each stream's own is a function of its name and not of the others'."""
    how, labels, indices = SampleConfig(sampler=sampler, steps=4, seed=7), torch.zeros(3, dtype=torch.int64), [5, 0, 9]
    drawn = {name: draw_streams(Still(config(found)), labels, indices, how) for name, found in LAYOUTS.items()}  # type: ignore[arg-type]
    (alone,) = draw_streams(Still(config(())), labels, indices, how)  # type: ignore[arg-type]
    for parts in drawn.values():
        assert torch.equal(parts[0], alone)
    assert torch.equal(drawn["own"][1], drawn["mixed"][3]) and torch.equal(drawn["merged"][1], drawn["mixed"][2])
    turned = draw_streams(Still(config(LAYOUTS["mixed"][::-1])), labels, indices, how)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(turned[1:], drawn["mixed"][:0:-1]))
    if sampler == "ode":
        assert torch.equal(alone, sample_noise(7, indices, (2, 2, 2), 0))
        wanted = sample_noise(derive_seed(7, f"samples/{TOKEN.name}"), indices, (3, 1), 0)
        assert torch.equal(drawn["own"][1], wanted)


def random_model(cfg: ModelConfig) -> Transformer:
    """Nothing in it is zero."""
    model = build_model(cfg).eval()
    g = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=g))
    return model


@pytest.mark.parametrize("sampler", ["sde", "ode"])
def test_samples_of_latents_alone_keep_their_bits(sampler: str) -> None:
    """What the samplers were called with before there were streams."""
    model = random_model(config(()))
    labels, indices = torch.tensor([0, 2]), [4, 8]

    @torch.no_grad()
    def model_fn(x: Tensor, t: float, *, interval_t: float | None = None) -> Tensor:
        both, ys = torch.cat([x, x]), torch.cat([labels, torch.full_like(labels, 3)])
        prediction = model(both, x.new_full((4,), t), ys).prediction
        assert prediction is not None
        conditional, unconditional = prediction.chunk(2)
        return unconditional + 1.7 * (conditional - unconditional)

    start = sample_noise(2, indices, (2, 2, 2), 0)
    if sampler == "ode":
        expected = euler(model_fn, start, ode_grid(3))
    else:
        noise = lambda step: sample_noise(2, indices, (2, 2, 2), step)  # noqa: E731
        expected = euler_maruyama(model_fn, start, sde_grid(3), noise=noise)
    how = SampleConfig(sampler=sampler, steps=3, seed=2, guidance=Guidance(scale=1.7))
    assert torch.equal(draw_latents(model, labels, indices, how), expected)


# --- guidance, against a sampler of one loop that keeps latents and streams apart

LABELS, NULL, INDICES = torch.tensor([0, 2, 1]), torch.tensor([3, 3, 3]), [0, 1, 2]


def velocities(model: Transformer, parts: Sequence[Tensor], t: float, labels: Tensor) -> list[Tensor]:
    x, own = put_together(model.cfg, [part.float() for part in parts])
    with torch.no_grad():
        output = model(x, torch.full((len(x),), t), labels, streams=own)
    assert output.prediction is not None
    return [part.double() for part in take_apart(model.cfg, output.prediction, output.streams)]


def by_hand(model: Transformer, combine: Callable[[list[Tensor], float], list[Tensor]], steps: int) -> list[Tensor]:
    """Euler's method."""
    cfg = model.cfg
    shapes = [(s.channels, 2, 2) if s.merged else (s.channels, s.side**2) for s in cfg.streams]
    parts = [sample_noise(0, INDICES, cfg.latent_shape, 0).double()]
    parts += [
        sample_noise(derive_seed(0, f"samples/{s.name}"), INDICES, shape, 0).double()
        for s, shape in zip(cfg.streams, shapes)
    ]
    for step in range(steps):
        t = 1 - step / steps
        parts = [part - v / steps for part, v in zip(parts, combine(parts, t))]
    return parts


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("latents", "streams", "channels", "interval"),
    [
        (2.3, 2.3, None, (0.0, 0.85)),  # REG's
        (2.4, None, None, (0.0, 1.0)),  # ReDi's: of the latents alone
        (1.8, 0.5, 1, (0.3, 0.8)),
        (0.0, 1.0, 9, (0.0, 1.0)),
    ],
)
def test_classifier_free_guidance_has_a_scale_for_latents_and_one_for_streams(
    layout: str, latents: float, streams: float | None, channels: int | None, interval: tuple[float, float]
) -> None:
    model = random_model(config(LAYOUTS[layout]))

    def combine(parts: list[Tensor], t: float) -> list[Tensor]:
        found, base = (velocities(model, parts, t, y) for y in (LABELS, NULL))
        if not interval[0] <= t <= interval[1]:
            return found
        first = found[0].clone()
        K = 2 if channels is None else min(channels, 2)
        first[:, :K] = base[0][:, :K] + latents * (found[0][:, :K] - base[0][:, :K])
        if streams is None:
            return [first, *found[1:]]
        return [first, *(b + streams * (f - b) for f, b in zip(found[1:], base[1:]))]

    low, high = interval
    guidance = Guidance(scale=latents, interval=Interval(low, high), channels=channels, streams=streams)
    drawn = draw_streams(model, LABELS, INDICES, SampleConfig(sampler="ode", steps=5, guidance=guidance))
    for found, wanted in zip(drawn, by_hand(model, combine, 5), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    unguided = draw_streams(model, LABELS, INDICES, SampleConfig(sampler="ode", steps=5))
    assert not torch.allclose(drawn[0], unguided[0], atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("scale", "interval"), [(1.5, (0.0, 1.0)), (1.1, (0.25, 0.75))])
def test_representation_guidance_has_streams_of_zero_as_its_reference(
    layout: str, scale: float, interval: tuple[float, float]
) -> None:
    """ReDi: `v(0) + w (v(z) - v(0))` of all channels, the label kept."""
    model = random_model(config(LAYOUTS[layout]))

    def combine(parts: list[Tensor], t: float) -> list[Tensor]:
        found = velocities(model, parts, t, LABELS)
        base = velocities(model, [parts[0], *(torch.zeros_like(part) for part in parts[1:])], t, LABELS)
        if not interval[0] <= t <= interval[1]:
            return found
        return [b + scale * (f - b) for f, b in zip(found, base)]

    guidance = Guidance(representation=scale, interval=Interval(*interval))
    drawn = draw_streams(model, LABELS, INDICES, SampleConfig(sampler="ode", steps=4, guidance=guidance))
    for found, wanted in zip(drawn, by_hand(model, combine, 4), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_guided_noise_of_a_dit_keeps_the_conditional_variance() -> None:
    """ReDi on DiT: guided in noise, one step of DDPM from the middle of the process written out."""
    from trainer.diffusion.ddpm import respace

    model = random_model(config((MERGED,), family="dit", learn_sigma=True))
    schedule = respace(linear_schedule(), 2)
    start = [sample_noise(0, INDICES, (2, 2, 2), 0), sample_noise(derive_seed(0, f"samples/{MERGED.name}"), INDICES, (2, 2, 2), 0)]  # fmt: skip
    later = [sample_noise(0, INDICES, (2, 2, 2), 1), sample_noise(derive_seed(0, f"samples/{MERGED.name}"), INDICES, (2, 2, 2), 1)]  # fmt: skip
    for guidance in (Guidance(scale=1.6), Guidance(scale=1.6, streams=0.7), Guidance(representation=1.4)):
        x, noise = torch.cat(start, 1).double(), torch.cat(later, 1).double()
        for k in (1, 0):
            step = torch.full((3,), float(schedule.steps[k]))
            with torch.no_grad():
                out = model(x.float(), step, LABELS).prediction
                if guidance.representation != 1:
                    emptied = torch.cat([x[:, :2], torch.zeros_like(x[:, 2:])], 1).float()
                    base, scales = model(emptied, step, LABELS).prediction, [guidance.representation] * 4
                else:
                    base = model(x.float(), step, NULL).prediction
                    of_streams = 1.0 if guidance.streams is None else guidance.streams
                    scales = [guidance.scale] * 2 + [of_streams] * 2
            assert out is not None and base is not None
            eps, values = out.double().split(4, 1)
            base = base.double()[:, :4]
            eps = base + torch.tensor(scales).double()[:, None, None] * (eps - base)
            a_bar, a_prev = schedule.alpha_bar[k], schedule.alpha_bar_prev[k]
            x0 = (x - (1 - a_bar) ** 0.5 * eps) / a_bar**0.5
            beta = 1 - a_bar / a_prev
            mean = beta * a_prev**0.5 / (1 - a_bar) * x0 + (1 - a_prev) * (1 - beta) ** 0.5 / (1 - a_bar) * x
            if k:
                low, high = np.log(beta * (1 - a_prev) / (1 - a_bar)), np.log(beta)
                x = mean + (0.5 * (low + (values + 1) / 2 * (high - low))).exp() * noise
            else:
                x = mean
        drawn = draw_streams(model, LABELS, INDICES, SampleConfig(sampler="ddpm", steps=2, guidance=guidance))
        torch.testing.assert_close(torch.cat(drawn, 1).double(), x, rtol=1e-4, atol=1e-4 * float(x.std()))


def test_guidance_that_contradicts_itself_is_refused() -> None:
    for options, said, typed in (
        ({"scale": 2.0, "representation": 1.5}, "both asked for", "--representation-guidance"),
        ({"streams": 2.0}, "no effect without --guidance", "--guidance"),
        ({"streams": 2.0, "representation": 1.5}, "no effect without --guidance", "--stream-guidance"),
        ({"scale": 2.0, "channels": 0}, "channels", "at least 1"),
        ({"representation": 1.5, "channels": 3}, "guides all channels", "--guided-channels"),
    ):
        with pytest.raises(UserError, match=said) as error:
            Guidance(**options)  # type: ignore[arg-type]
        assert typed in str(error.value.remedy)
    assert Guidance(scale=2.0).record() == {"scale": 2.0, "low": 0.0, "high": 1.0, "channels": None}


def test_each_way_to_guide_has_a_folder_and_a_record_of_its_own() -> None:
    ways: list[dict[str, Any]] = [
        *({}, {"guidance": 2.0}, {"guidance": 2.0, "stream_guidance": 2.0}, {"guidance": 2.0, "stream_guidance": 1.5}),
        *({"guidance": 2.0, "guided_channels": 3}, {"guidance": 2.0, "guided_channels": 3, "stream_guidance": 2.0}),
        *({"representation_guidance": 2.0}, {"representation_guidance": 1.5}),
        {"representation_guidance": 2.0, "interval": Interval(0, 0.5)},
    ]
    folders, records = set(), set()
    for way in ways:
        request = SampleRequest(**way)
        folders.add(folder_name(request, 1, "ode", Arithmetic()))
        guidance = Guidance(
            scale=request.guidance,
            interval=request.interval,
            channels=request.guided_channels,
            streams=request.stream_guidance,
            representation=request.representation_guidance,
        )
        records.add(str(guidance.record()))
    assert len(folders) == len(records) == len(ways), folders
