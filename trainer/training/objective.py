"""From cached bytes to losses: one region that compiles whole.

Dequantise, draw the latent from the posterior, add noise, run the backbone with taps, align. Everything random comes
in as `Draws`, made outside from (seed, step) for the *global* batch, so any number of ranks sees the same numbers for
the same samples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from featcache.read.normalization import LOGVAR_RANGE
from trainer.align.base import AlignInputs, Alignment, Teacher
from trainer.diffusion.streams import Layout
from trainer.distributed import is_sharded, local, sum_over_ranks
from trainer.seeds import derive_seed
from trainer.training.conditions import Condition, Labels
from trainer.training.streams import Normalize, Stream

if TYPE_CHECKING:
    from featcache.codecs import FeatureCodec
    from trainer.diffusion.transport import Transport
    from trainer.models import ModelOutput, Transformer
    from trainer.runs.normalization import Normalization


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Random numbers of one micro-batch, float32 on the device.

    time: [B] U(0,1), or N(0,1) for log-normal times. posterior, noise: [B, C, h, w] N(0,1). drop, align: [B] U(0,1).
    streams: feature -> its noise, N(0,1). drop_stream: feature -> [B] U(0,1).
    """

    time: Tensor
    posterior: Tensor
    noise: Tensor
    drop: Tensor
    align: Tensor
    streams: Mapping[str, Tensor] = field(default_factory=dict)
    drop_stream: Mapping[str, Tensor] = field(default_factory=dict)

    def rows(self, rows: slice) -> Draws:
        def cut(value: Tensor | Mapping[str, Tensor]) -> Any:
            return value[rows] if isinstance(value, Tensor) else {name: part[rows] for name, part in value.items()}

        return Draws(**{name: cut(getattr(self, name)) for name in self.__dataclass_fields__})


def draw(
    *,
    seed: int,
    step: int,
    batch: int,
    latent_shape: tuple[int, int, int],
    time_sampling: str,
    device: torch.device,
    streams: Mapping[str, tuple[int, ...]] | None = None,
) -> Draws:
    """All random numbers of one global batch: a function of (seed, step) on a given kind of device.

    Always the same draws in the same order, whatever the method needs: methods can be compared sample by sample. Those of
    streams (feature -> shape of a sample) come of generators of their own, so that they leave the others as they are.
    """

    def uniform(generator: torch.Generator) -> Tensor:
        return torch.rand(batch, generator=generator, device=device)

    def normal(generator: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator, device=device)

    generator = torch.Generator(device).manual_seed(derive_seed(seed, "draws", step))
    beside = {
        name: torch.Generator(device).manual_seed(derive_seed(seed, f"draws/{name}", step)) for name in streams or {}
    }
    return Draws(
        time=normal(generator) if time_sampling == "lognormal" else uniform(generator),
        posterior=normal(generator, *latent_shape),
        noise=normal(generator, *latent_shape),
        drop=uniform(generator),
        align=uniform(generator),
        streams={name: normal(beside[name], *shape) for name, shape in (streams or {}).items()},
        drop_stream={name: uniform(own) for name, own in beside.items()},
    )


def sample_posterior(moments: Tensor, noise: Tensor, *, scale: float | Tensor, shift: float | Tensor) -> Tensor:
    """Latent drawn from the VAE posterior and normalised. [B, 2C, h, w], [B, C, h, w] -> [B, C, h, w].

    `z = (mean + exp(logvar / 2) * noise - shift) * scale` with log-variance clamped as in diffusers.
    """
    mean, logvar = moments.chunk(2, dim=1)
    std = torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE))
    return (mean + std * noise - shift) * scale


class Region(nn.Module):
    """A function that is compiled as modules are."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = function


class Objective(nn.Module):
    """Backbone + alignment: stored bytes => loss terms.

    Args:
        model: the backbone being trained, on its device.
        alignment: the method's heads and loss, or None.
        features: name -> how it is stored, for `vae/moments` and all that the method reads.
        normalization: of the latent, see `sample_posterior`. streams: what is diffused beside it, as the model's.
        transport: on the model's device. label_dropout: see `trainer.runs.config.RunConfig`.
        autocast: dtype of autocast, or None for float32.
        teacher: EMA model for methods that need one; kept out of this module's parameters.
        condition: what the model is conditioned on; None: labels.
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
        streams: Sequence[Stream] = (),
        condition: Condition | None = None,
    ) -> None:
        super().__init__()
        assert [stream.name for stream in streams] == [stream.name for stream in model.cfg.streams]
        self.model, self.alignment = model, alignment
        self._streams, self._layout = nn.ModuleList(streams), Layout(cfg=model.cfg)
        self._features = dict(features)
        self._codecs = nn.ModuleList(features.values())  # so that bases move with the module
        self._normalize = Normalize(normalization)
        self.condition = condition or Labels(model.cfg.num_classes)
        self._label_dropout, self._dtype = label_dropout, autocast
        self._transport = transport
        # In a list: not a submodule, so neither saved, trained nor synchronised with this one.
        self._teacher = [teacher]
        self._before: Callable[..., tuple[list[Tensor], Tensor, list[Tensor]]] = self._prepared
        self._after: Callable[..., tuple[dict[str, Tensor], AlignInputs | None]] = self._losses

    def forward(
        self, batch: Mapping[str, Tensor], draws: Draws, *, aligned: bool = True
    ) -> tuple[dict[str, Tensor], AlignInputs | None]:
        """Loss terms by name, and what the method saw (None if not `aligned`), for `measure` and
        `adversary_loss`: without gradients, and without the targets, which those decode anew where they are due.

        `denoise` is the latents' diffusion loss, `denoise/<term>` what a transport adds to it, `denoise/<feature>` a
        stream's weighted one; `align/<term>` are the method's weighted terms. Their sum is the loss. Compiled there are two
        variants, with and without alignment.
        """
        alignment = self.alignment if aligned else None
        clean, t, noisy = self._before(batch, draws)
        times, condition = self._transport.model_time(t), self._condition(batch, draws)
        x, own = self._layout.inputs(noisy)
        with self._autocast():
            output = self.model(x, times, condition, **own, taps=alignment.taps if alignment is not None else ())
        return self._after(output, clean, t, noisy, batch, draws, aligned=aligned)

    def compile_around_the_model(self) -> None:
        """Compiles what comes before the model and after it, each as one region: for a model that cannot be part of one.

        After it only where no teacher is asked, which is a model of the same kind.
        """
        self._before = before = Region(self._prepared)
        before.compile(dynamic=False)
        if self.alignment is None or not self.alignment.needs_teacher:
            self._after = after = Region(self._losses)
            after.compile(dynamic=False)

    def _prepared(self, batch: Mapping[str, Tensor], draws: Draws) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """The latent and each stream without noise, the times [B], and both with noise."""
        moments = self._features["vae/moments"].decode(batch, torch.float32)
        norm = self._normalize
        latent = sample_posterior(moments, draws.posterior, scale=norm.scale, shift=norm.shift)
        clean = [latent, *self._clean(batch, draws)]
        t = self._transport.times(draws.time)
        return clean, t, self._noisy(clean, draws, t)

    def _losses(
        self,
        output: ModelOutput,
        clean: Sequence[Tensor],
        t: Tensor,
        noisy: Sequence[Tensor],
        batch: Mapping[str, Tensor],
        draws: Draws,
        *,
        aligned: bool,
    ) -> tuple[dict[str, Tensor], AlignInputs | None]:
        """What `forward` gives, from what the model said."""
        alignment, latent = self.alignment if aligned else None, clean[0]
        predicted, *others = self._layout.outputs(output)
        terms = self._transport.loss(predicted, latent, draws.noise, noisy[0], t)
        for stream, out, x0, x_t in zip(self.streams, others, clean[1:], noisy[1:]):
            name, kept = stream.name, stream.kept(draws.drop_stream[stream.name])
            found = self._transport.loss(out, x0, draws.streams[name], x_t, t, weights=kept)
            terms |= {f"denoise/{name}{term.removeprefix('denoise')}": stream.weight * v for term, v in found.items()}
        if alignment is None:
            return terms, None

        inputs = AlignInputs(
            hidden=output.hidden,
            t=t,
            targets=self._targets(batch, self._dtype or torch.float32),
            time_embedding=output.time_embedding,
            latent=latent,
            uniform=draws.align,
            teacher=self._teach(clean, batch, draws) if alignment.needs_teacher else None,
            stream_hidden=self._layout.hidden(output),
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
        clean = [inputs.latent, *self._clean(batch, draws)]
        teacher = self._teach(clean, batch, draws) if self.alignment.needs_teacher else None
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

    @property
    def streams(self) -> list[Stream]:
        """What is diffused beside the latents."""
        return [stream for stream in self._streams if isinstance(stream, Stream)]

    def _clean(self, batch: Mapping[str, Tensor], draws: Draws) -> list[Tensor]:
        """Each stream without noise; zero where it is dropped, which the noise does not know (as in ReDi's code)."""
        found = []
        for stream in self.streams:
            clean, kept = stream.clean(batch), stream.kept(draws.drop_stream[stream.name])
            found.append(clean if kept is None else clean * kept.reshape(-1, *[1] * (clean.ndim - 1)))
        return found

    def _noisy(self, clean: Sequence[Tensor], draws: Draws, t: Tensor) -> list[Tensor]:
        noises = (draws.noise, *(draws.streams[stream.name] for stream in self.streams))
        return [self._transport.noisy(x0, noise, t) for x0, noise in zip(clean, noises, strict=True)]

    def _condition(self, batch: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """Labels int64 [B] or text rows [B, T, W], a share of them replaced by the null condition."""
        condition: Tensor = self.condition(batch, draws.drop < self._label_dropout)
        return condition

    def _teach(self, clean: Sequence[Tensor], batch: Mapping[str, Tensor], draws: Draws) -> Teacher:
        """The EMA model on this batch: same data, noise and (already dropped) condition; the method chooses the time."""
        teacher = self._teacher[0]
        assert teacher is not None, "the method needs a teacher and none was given"
        condition = self._condition(batch, draws)

        def hidden(t: Tensor, depth: int) -> Tensor:
            with torch.no_grad(), self._autocast():
                x, own = self._layout.inputs(self._noisy(clean, draws, t))
                times = self._transport.model_time(t)
                output: ModelOutput = teacher(x, times, condition, **own, taps=(depth,), stop_after=depth)
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
        stream_hidden={
            name: {depth: h.detach() for depth, h in found.items()} for name, found in inputs.stream_hidden.items()
        },
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


def update_ema(ema: nn.Module, model: nn.Module, decay: float, *, left_out: Tensor | None = None) -> None:
    """`ema = decay * ema + (1 - decay) * model` over parameters; see `average`. Buffers are left alone."""
    average(ema.parameters(), model.parameters(), decay, left_out=left_out)


@torch.no_grad()
def average(into: Iterable[Tensor], weights: Iterable[Tensor], decay: float, *, left_out: Tensor | None = None) -> None:
    """`into = decay * into + (1 - decay) * weights`, in a few fused kernels.

    left_out: 1 on the device if the average is to stay as it is, else 0 (to the same bits as without; a kernel for each
    tensor).
    """
    averages, values = [local(p) for p in into], [local(p) for p in weights]
    if left_out is None:
        torch._foreach_lerp_(averages, values, 1.0 - decay)
    else:
        share = torch.where(left_out > 0, 0.0, 1.0 - decay).to(torch.float32)
        torch._foreach_lerp_(averages, values, [share] * len(averages))


def ema_decay_at(step: int, decay: float, *, warmup: bool) -> float:
    """Decay to use after `step` steps: constant, or `min(decay, (1 + step) / (10 + step))` with warm-up."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay
