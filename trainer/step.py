"""From cached bytes to losses: one region that compiles whole.

Dequantise, draw the latent from the posterior, interpolate (or diffuse), run the backbone with taps, align. Everything
random comes in as :class:`Draws`, made outside from (seed, step) for the *global* batch, so any number of ranks sees
the same numbers for the same samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featcache.codecs import decode, stored_arrays
from trainer.align.base import AlignInputs, Alignment
from trainer.diffusion import ddpm
from trainer.diffusion.interpolants import draw_times, interpolate

DDPM_STEPS = 1000
LOGVAR_RANGE = (-30.0, 20.0)  # diffusers' clamp of the posterior's log-variance


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Random numbers of one micro-batch, float32 on the device.

    time: [B] U(0,1), or N(0,1) for log-normal times. posterior, noise: [B, C, h, w] N(0,1). drop, align: [B] U(0,1).
    """

    time: Tensor
    posterior: Tensor
    noise: Tensor
    drop: Tensor
    align: Tensor

    def rows(self, start: int, stop: int) -> Draws:
        return Draws(**{name: getattr(self, name)[start:stop] for name in self.__dataclass_fields__})


def draw(
    *, seed: int, step: int, batch: int, latent_shape: tuple[int, int, int], time_sampling: str, device: torch.device
) -> Draws:
    """All random numbers of one global batch: a function of (seed, step) on a given kind of device.

    Always the same draws in the same order, whatever the method needs, so that methods can be compared sample by sample.
    """
    generator = torch.Generator(device).manual_seed((seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9) % (1 << 63))

    def uniform() -> Tensor:
        return torch.rand(batch, generator=generator, device=device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator, device=device)

    return Draws(
        time=normal() if time_sampling == "lognormal" else uniform(),
        posterior=normal(*latent_shape),
        noise=normal(*latent_shape),
        drop=uniform(),
        align=uniform(),
    )


@dataclass(frozen=True, kw_only=True)
class CachedFeature:
    """How one feature lies in a batch: what :func:`featcache.codecs.decode` needs."""

    name: str
    shape: tuple[int, ...]
    codec: str
    dtype: str

    def decode(self, batch: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Stored arrays of the batch => [B, *shape]."""
        stored = {s: batch[self.name + s] for s in stored_arrays(self.codec, self.shape, self.dtype)}
        return decode(self.codec, stored, self.shape, dtype)


def sample_posterior(moments: Tensor, noise: Tensor, *, scale: float, shift: float) -> Tensor:
    """Latent drawn from the VAE posterior and scaled. [B, 2C, h, w], [B, C, h, w] -> [B, C, h, w].

    ``z = (mean + exp(logvar / 2) * noise - shift) * scale`` with log-variance clamped as in diffusers.
    """
    mean, logvar = moments.chunk(2, dim=1)
    std = torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE))
    return (mean + std * noise - shift) * scale


class Objective(nn.Module):
    """Backbone + alignment: stored bytes => loss terms.

    Args:
        model: the backbone being trained.
        alignment: the method's heads and loss, or None.
        features: name -> layout, for ``vae/moments`` and all that the method reads.
        teacher: EMA model for methods that need one; kept out of this module's parameters.
        path, time_sampling, label_dropout: see :class:`trainer.config.RunConfig`.
        autocast: dtype of autocast, or None for float32.
    """

    def __init__(
        self,
        model: Any,
        alignment: Alignment | None,
        features: Mapping[str, CachedFeature],
        *,
        scale: float,
        shift: float,
        path: str,
        time_sampling: str,
        label_dropout: float,
        autocast: torch.dtype | None,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model, self.alignment = model, alignment
        self._features = dict(features)
        self._scale, self._shift = scale, shift
        self._path, self._time_sampling, self._label_dropout = path, time_sampling, label_dropout
        self._autocast = autocast
        if model.cfg.family == "dit":
            for name, column in ddpm.tables(ddpm.linear_schedule(DDPM_STEPS))._asdict().items():
                self.register_buffer(f"ddpm_{name}", column.to(next(model.parameters()).device), persistent=False)
        self._teacher = [teacher]  # in a list: not a submodule, so neither saved, trained nor synchronised with this one

    def forward(
        self, batch: Mapping[str, Tensor], draws: Draws, *, aligned: bool = True, metrics: bool = False, keep: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], AlignInputs | None]:
        """Loss terms by name, metrics by name (if asked for), and the method's inputs, detached (if ``keep``).

        ``denoise`` is the diffusion loss; ``align/<term>`` are the method's weighted terms. Their sum is the loss.
        """
        cfg = self.model.cfg
        moments = self._features["vae/moments"].decode(batch, torch.float32)
        latent = sample_posterior(moments, draws.posterior, scale=self._scale, shift=self._shift)
        labels = torch.where(draws.drop < self._label_dropout, cfg.num_classes, batch["label"])
        alignment = self.alignment if aligned else None
        taps = alignment.taps if alignment is not None else ()
        device_type = latent.device.type

        if cfg.family == "dit":
            times = (draws.time * DDPM_STEPS).long().clamp(max=DDPM_STEPS - 1)
            t = times.float() / (DDPM_STEPS - 1)
            noisy = ddpm.q_sample(self._table(), latent, times, draws.noise)
        else:
            t = draw_times(self._time_sampling, self._path, draws.time)
            noisy, velocity = interpolate(self._path, latent, draws.noise, t)
            times = t
        with torch.autocast(device_type, dtype=self._autocast or torch.bfloat16, enabled=self._autocast is not None):
            output = self.model(noisy, times, labels, taps=taps)
        prediction = output.prediction.float()
        if cfg.family == "dit":
            loss = ddpm.ddpm_loss(prediction, x0=latent, x_t=noisy, noise=draws.noise, t=times, table=self._table())
            terms = {"denoise": loss.loss.mean()}
        else:
            terms = {"denoise": (prediction - velocity).square().mean()}
        if alignment is None:
            return terms, {}, None

        target_dtype = self._autocast or torch.float32
        inputs = AlignInputs(
            hidden=output.hidden,
            t=t,
            targets={name: self._features[name].decode(batch, target_dtype) for name in alignment.reads},
            time_embedding=output.time_embedding,
            latent=latent,
            uniform=draws.align,
            teacher=self._teach(latent, draws.noise, labels) if alignment.needs_teacher else None,
        )
        with torch.autocast(device_type, dtype=target_dtype, enabled=self._autocast is not None):
            terms |= {f"align/{name}": value for name, value in alignment.terms(inputs).items()}
            measured = {}
            if metrics:
                with torch.no_grad():
                    measured = {f"metric/{name}": value for name, value in alignment.metrics(inputs).items()}
        return terms, measured, _detached(inputs) if keep else None

    def _table(self) -> ddpm.Tables:
        return ddpm.Tables(*(getattr(self, f"ddpm_{name}") for name in ddpm.Tables._fields))

    def _teach(self, latent: Tensor, noise: Tensor, labels: Tensor) -> Any:
        teacher: Any = self._teacher[0]
        assert teacher is not None, "the method needs a teacher and none was given"

        def hidden(t: Tensor, depth: int) -> Tensor:
            with torch.no_grad(), torch.autocast(
                latent.device.type, dtype=self._autocast or torch.bfloat16, enabled=self._autocast is not None
            ):
                if teacher.cfg.family == "dit":
                    times = (t * (DDPM_STEPS - 1)).round().long()
                    noisy = ddpm.q_sample(self._table(), latent, times, noise)
                    return teacher(noisy, times, labels, taps=(depth,), stop_after=depth).hidden[depth]
                noisy, _ = interpolate(self._path, latent, noise, t)
                return teacher(noisy, t, labels, taps=(depth,), stop_after=depth).hidden[depth]

        return hidden


def _detached(inputs: AlignInputs) -> AlignInputs:
    return AlignInputs(
        hidden={depth: h.detach() for depth, h in inputs.hidden.items()},
        t=inputs.t,
        targets=inputs.targets,
        time_embedding=inputs.time_embedding.detach(),
        latent=inputs.latent,
        uniform=inputs.uniform,
    )


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """``ema = decay * ema + (1 - decay) * model`` over parameters, in a handful of fused kernels; buffers are not averaged."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1.0 - decay)


def ema_decay_at(step: int, decay: float, *, warmup: bool) -> float:
    """Decay to use after ``step`` steps: constant, or ``min(decay, (1 + step) / (10 + step))`` with warm-up."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay
