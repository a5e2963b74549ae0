"""Averages of the weights beside the first: with other constant decays, and EDM2's power-function ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from featcache.errors import UserError
from trainer.averages import Average, gamma_of, power_decay
from trainer.distributed import like, local
from trainer.training.objective import ema_decay_at


@dataclass(frozen=True)
class FurtherAverages:
    """float32 on the device, laid out as the model's parameters are (sharded, too). values: parameter name -> tensor."""

    values: Mapping[Average, Mapping[str, Tensor]]

    @classmethod
    def begin(cls, model: nn.Module, averages: Sequence[Average]) -> FurtherAverages:
        """Each starts as the model's weights are."""
        return cls({a: {name: p.detach().clone() for name, p in model.named_parameters()} for a in averages})

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, *, warmup: bool) -> None:
        """After step 0, 1, ...: a fused pass for each. What they keep is a function of the step, so nothing is read back."""
        for average, values in self.values.items():
            assert average.value is not None
            if average.kind == "power":
                keep = power_decay(step, gamma_of(average.value))
            else:
                keep = ema_decay_at(step, average.value, warmup=warmup)
            parameters = [local(p) for p in model.parameters()]
            torch._foreach_lerp_([local(v) for v in values.values()], parameters, 1.0 - keep)

    def tensors(self, model: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """File stem -> the state dict `model` with the average in place of its parameters."""
        return {average.stem: {**model, **values} for average, values in self.values.items()}

    def load(self, read: Callable[[str], Mapping[str, Tensor]], *, source: Path) -> None:
        """Puts back what `read` gives of each stem.

        Raises:
            UserError: it does not fit.
        """
        for average, values in self.values.items():
            saved = read(average.stem)
            wrong = [name for name, own in values.items() if name not in saved or saved[name].shape != own.shape]
            if wrong:
                raise UserError(
                    f"{source / average.stem}.safetensors does not fit this run: {wrong[0]!r:.100} is missing or of another shape",
                    remedy="Remove this checkpoint's folder to go on from the one before.",
                )
            for name, own in values.items():
                local(own).copy_(local(like(saved[name], own)))
