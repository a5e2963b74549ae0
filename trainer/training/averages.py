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
from trainer.training.objective import average, ema_decay_at


@dataclass(frozen=True)
class FurtherAverages:
    """float32 on the device, laid out as the model's parameters are (sharded, too). values: parameter name -> tensor."""

    values: Mapping[Average, Mapping[str, Tensor]]

    @classmethod
    def begin(cls, model: nn.Module, averages: Sequence[Average]) -> FurtherAverages:
        """Each starts as the model's weights are."""
        return cls({a: {name: p.detach().clone() for name, p in model.named_parameters()} for a in averages})

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, *, warmup: bool, left_out: Tensor | None = None) -> None:
        """After step 0, 1, ...: a fused pass for each. What they keep is a function of the step, so nothing is read back.

        left_out: as of `update_ema`, of averages with a constant decay. In power-function averages a step that was left
        out counts as one in which the weights stayed: their profile is over all steps.
        """
        for kind, values in self.values.items():
            assert kind.value is not None
            if kind.kind == "power":
                average(values.values(), model.parameters(), power_decay(step, gamma_of(kind.value)))
            else:
                keep = ema_decay_at(step, kind.value, warmup=warmup)
                average(values.values(), model.parameters(), keep, left_out=left_out)

    def tensors(self, model: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """File stem -> the state dict `model` with the average in place of its parameters."""
        return {kind.stem: {**model, **values} for kind, values in self.values.items()}

    @torch.no_grad()
    def take_over(
        self, model: nn.Module, kept: Sequence[Average], read: Callable[[str], Mapping[str, Tensor]], *, source: Path
    ) -> list[Average]:
        """Goes on with another run's, which had `kept`; the others, which are returned, start as the model's weights are.

        Raises:
            UserError: as `load`.
        """
        FurtherAverages({a: values for a, values in self.values.items() if a in kept}).load(read, source=source)
        anew = [a for a in self.values if a not in kept]
        for a in anew:
            for own, weights in zip(self.values[a].values(), model.parameters()):
                local(own).copy_(local(weights))
        return anew

    def load(self, read: Callable[[str], Mapping[str, Tensor]], *, source: Path) -> None:
        """Puts back what `read` gives of each stem.

        Raises:
            UserError: it does not fit.
        """
        for kind, values in self.values.items():
            saved = read(kind.stem)
            wrong = [name for name, own in values.items() if name not in saved or saved[name].shape != own.shape]
            if wrong:
                raise UserError(
                    f"{source / kind.stem}.safetensors does not fit this run: {wrong[0]!r:.100} is missing or of another shape",
                    remedy="Remove this checkpoint's folder to go on from the one before.",
                )
            for name, own in values.items():
                local(own).copy_(local(like(saved[name], own)))
