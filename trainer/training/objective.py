"""From cached bytes to losses: one region that compiles whole.

Dequantise, draw the latent from the posterior, add noise, run the backbone with taps, align. Everything random comes
in as `Draws`, made outside from (seed, step) for the *global* batch, so any number of ranks sees the same numbers for
the same samples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from featcache.read.normalization import LOGVAR_RANGE
from trainer.align.base import AlignInputs, Alignment, Teacher
from trainer.distributed import is_sharded, local, sum_over_ranks
from trainer.seeds import derive_seed

if TYPE_CHECKING:
    from featcache.codecs import FeatureCodec
    from trainer.diffusion.transport import Transport
    from trainer.models import ModelOutput, Transformer
    from trainer.runs.normalization import Normalization


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

    def rows(self, rows: slice) -> Draws:
        return Draws(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})


def draw(
    *, seed: int, step: int, batch: int, latent_shape: tuple[int, int, int], time_sampling: str, device: torch.device
) -> Draws:
    """All random numbers of one global batch: a function of (seed, step) on a given kind of device.

    Always the same draws in the same order, whatever the method needs: methods can be compared sample by sample.
    """
    generator = torch.Generator(device).manual_seed(derive_seed(seed, "draws", step))

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


def sample_posterior(moments: Tensor, noise: Tensor, *, scale: float | Tensor, shift: float | Tensor) -> Tensor:
    """Latent drawn from the VAE posterior and normalised. [B, 2C, h, w], [B, C, h, w] -> [B, C, h, w].

    `z = (mean + exp(logvar / 2) * noise - shift) * scale` with log-variance clamped as in diffusers.
    """
    mean, logvar = moments.chunk(2, dim=1)
    std = torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE))
    return (mean + std * noise - shift) * scale


class Objective(nn.Module):
    """Backbone + alignment: stored bytes => loss terms.

    Args:
        model: the backbone being trained, on its device.
        alignment: the method's heads and loss, or None.
        features: name -> how it is stored, for `vae/moments` and all that the method reads.
        normalization: of the latent, see `sample_posterior`.
        transport: on the model's device. label_dropout: see `trainer.runs.config.RunConfig`.
        autocast: dtype of autocast, or None for float32.
        teacher: EMA model for methods that need one; kept out of this module's parameters.
    """

    def __init__(
        self,
        model: Transformer,
        alignment: Alignment | None,
        features: Mapping[str, FeatureCodec],
        *,
        normalization: Normalization,
        transport: Transport,
        label_dropout: float,
        autocast: torch.dtype | None,
        teacher: Transformer | None = None,
    ) -> None:
        super().__init__()
        self.model, self.alignment = model, alignment
        self._features = dict(features)
        self._codecs = nn.ModuleList(features.values())  # so that bases move with the module
        self._scale: float | Tensor
        self._shift: float | Tensor
        for name, value in (("_scale", normalization.scale), ("_shift", normalization.shift)):
            if isinstance(value, Tensor):
                self.register_buffer(name, value, persistent=False)  # to move with the module
            else:
                setattr(self, name, value)  # a constant of the graph
        self._label_dropout, self._dtype = label_dropout, autocast
        self._transport = transport
        # In a list: not a submodule, so neither saved, trained nor synchronised with this one.
        self._teacher = [teacher]

    def forward(
        self, batch: Mapping[str, Tensor], draws: Draws, *, aligned: bool = True
    ) -> tuple[dict[str, Tensor], AlignInputs | None]:
        """Loss terms by name, and what the method saw (None if not `aligned`), for `measure` and
        `adversary_loss`: without gradients, and without the targets, which those decode anew where they are due.

        `denoise` is the diffusion loss, `denoise/<term>` what a transport adds to it; `align/<term>` are the method's weighted terms. Their sum is the loss.
        Compiled there are two variants, with and without alignment.
        """
        alignment = self.alignment if aligned else None
        moments = self._features["vae/moments"].decode(batch, torch.float32)
        latent = sample_posterior(moments, draws.posterior, scale=self._scale, shift=self._shift)
        t = self._transport.times(draws.time)
        noisy = self._transport.noisy(latent, draws.noise, t)
        times, labels = self._transport.model_time(t), self._labels(batch, draws)
        with self._autocast():
            output = self.model(noisy, times, labels, taps=alignment.taps if alignment is not None else ())
        terms = self._transport.loss(output, latent, draws.noise, noisy, t)
        if alignment is None:
            return terms, None

        inputs = AlignInputs(
            hidden=output.hidden,
            t=t,
            targets=self._targets(batch, self._dtype or torch.float32),
            time_embedding=output.time_embedding,
            latent=latent,
            uniform=draws.align,
            teacher=self._teach(latent, batch, draws) if alignment.needs_teacher else None,
        )
        with self._autocast():
            terms |= {f"align/{name}": value for name, value in alignment.terms(inputs).items()}
        return terms, _detached(inputs)

    @torch.no_grad()
    def measure(self, inputs: AlignInputs, batch: Mapping[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        """The method's metrics, `metric/<name>`, on what `forward` gave for the same batch.

        Apart from the compiled step, because it is only done when a line is logged.
        """
        assert self.alignment is not None
        teacher = self._teach(inputs.latent, batch, draws) if self.alignment.needs_teacher else None
        inputs = replace(inputs, targets=self._targets(batch, self._dtype or torch.float32), teacher=teacher)
        with self._autocast():
            return {f"metric/{name}": value for name, value in self.alignment.metrics(inputs).items()}

    def adversary_loss(self, inputs: AlignInputs, batch: Mapping[str, Tensor]) -> Tensor:
        """The discriminator's loss on what `forward` gave for the same batch.

        In bfloat16 under autocast as the model; with fp16 in float32, for its gradients have no loss scaling.
        """
        assert self.alignment is not None
        low = self._dtype is torch.bfloat16
        dtype = torch.bfloat16 if low else torch.float32
        hidden = inputs.hidden if low else {depth: h.float() for depth, h in inputs.hidden.items()}
        with self._autocast(enabled=low):
            return self.alignment.adversary_loss(replace(inputs, hidden=hidden, targets=self._targets(batch, dtype)))

    def _targets(self, batch: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """What the method reads, decoded: name -> [B, *shape]."""
        reads = self.alignment.reads if self.alignment is not None else ()
        return {name: self._features[name].decode(batch, dtype) for name in reads}

    def _autocast(self, *, enabled: bool = True) -> torch.autocast:
        device_type = next(self.model.parameters()).device.type
        return torch.autocast(
            device_type, dtype=self._dtype or torch.bfloat16, enabled=enabled and self._dtype is not None
        )

    def _labels(self, batch: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """Labels with a share replaced by the null label, int64 [B]."""
        return torch.where(draws.drop < self._label_dropout, self.model.cfg.num_classes, batch["label"])

    def _teach(self, latent: Tensor, batch: Mapping[str, Tensor], draws: Draws) -> Teacher:
        """The EMA model on this batch: same latent, noise and (already dropped) labels; the method chooses the time."""
        teacher = self._teacher[0]
        assert teacher is not None, "the method needs a teacher and none was given"
        labels = self._labels(batch, draws)

        def hidden(t: Tensor, depth: int) -> Tensor:
            with torch.no_grad(), self._autocast():
                noisy, times = self._transport.noisy(latent, draws.noise, t), self._transport.model_time(t)
                output: ModelOutput = teacher(noisy, times, labels, taps=(depth,), stop_after=depth)
            return output.hidden[depth]

        return hidden


def _detached(inputs: AlignInputs) -> AlignInputs:
    return AlignInputs(
        hidden={depth: h.detach() for depth, h in inputs.hidden.items()},
        t=inputs.t,
        targets={},
        time_embedding=inputs.time_embedding.detach(),
        latent=inputs.latent,
        uniform=inputs.uniform,
    )


@torch.no_grad()
def clip_gradients(groups: Sequence[Sequence[nn.Parameter]], max_norm: float) -> Tensor:
    """Scales all gradients so that their joint L2 norm is at most `max_norm`; returns the norm before, a scalar. An
    infinite `max_norm` leaves them alone, infinite ones too.

    Norms are taken group by group and joined by `hypot`, so that groups without a gradient leave the others' rounding
    untouched. Sharded gradients count with all their shards. Nothing is read back to the host.
    """
    gradients = [[p.grad for p in group if p.grad is not None] for group in groups]
    norms = []
    for grads in filter(None, gradients):
        norm = nn.utils.get_total_norm([local(g) for g in grads], foreach=True)
        norms.append(sum_over_ranks(norm.square()).sqrt() if is_sharded(grads[0]) else norm)
    total = functools.reduce(torch.hypot, norms)
    if math.isinf(max_norm):
        return total
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local(g) for grads in gradients for g in grads], scale)
    return total


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """`ema = decay * ema + (1 - decay) * model` over parameters, in a few fused kernels; buffers are left alone."""
    torch._foreach_lerp_([local(p) for p in ema.parameters()], [local(p) for p in model.parameters()], 1.0 - decay)


def ema_decay_at(step: int, decay: float, *, warmup: bool) -> float:
    """Decay to use after `step` steps: constant, or `min(decay, (1 + step) / (10 + step))` with warm-up."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay
