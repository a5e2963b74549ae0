"""Several methods at once, e.g. `ahpa+sra`: their terms are added, each under its method's name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from featcache.errors import UserError
from trainer.align.base import AlignInputs, Alignment, TakeStatistics


class Combined(Alignment):
    """Union of what the methods read and tap; terms and metrics named `<method>/<term>`.

    One method's strategy for switching alignment off (DyA's stochastic dropout) switches all of it off for
    that step: its point is a step on the denoising loss alone.

    Raises:
        UserError: more than one method brings a discriminator.
    """

    def __init__(self, methods: Mapping[str, Alignment]) -> None:
        super().__init__()
        self.methods = nn.ModuleDict(dict(methods))
        self.reads = tuple(dict.fromkeys(name for m in methods.values() for name in m.reads))
        self.taps = tuple(sorted({tap for m in methods.values() for tap in m.taps}))
        self.needs_teacher = any(m.needs_teacher for m in methods.values())
        adversaries = [name for name, m in methods.items() if m.adversary is not None]
        if len(adversaries) > 1:
            raise UserError(
                f"{' and '.join(adversaries)} each bring a discriminator, and a run trains one",
                remedy="Switch the adversarial term off in all but one of them.",
            )
        self._adversarial = adversaries[0] if adversaries else None
        if self._adversarial is not None:
            self.adversary_every = methods[self._adversarial].adversary_every

    @property
    def parts(self) -> dict[str, Alignment]:
        """The methods by name."""
        return {name: m for name, m in self.methods.items() if isinstance(m, Alignment)}

    @property
    def adversary(self) -> nn.Module | None:  # type: ignore[override]
        """The one method's discriminator; owned (and saved) by that method, not a second time here."""
        return None if self._adversarial is None else self.parts[self._adversarial].adversary

    def calibrate(self, take: TakeStatistics) -> None:
        for method in self.parts.values():
            method.calibrate(take)

    def rate_factors(self) -> dict[str, float]:
        return {
            f"methods.{name}.{part}": factor
            for name, method in self.parts.items()
            for part, factor in method.rate_factors().items()
        }

    def terms(self, inputs: AlignInputs) -> dict[str, Tensor]:
        return {f"{name}/{term}": v for name, m in self.parts.items() for term, v in m.terms(inputs).items()}

    def metrics(self, inputs: AlignInputs) -> dict[str, Tensor]:
        return {f"{name}/{term}": v for name, m in self.parts.items() for term, v in m.metrics(inputs).items()}

    def active(self, *, step: int, seed: int) -> bool:
        return all(m.active(step=step, seed=seed) for m in self.parts.values())

    def adversary_loss(self, inputs: AlignInputs) -> Tensor:
        if self._adversarial is None:
            return super().adversary_loss(inputs)
        return self.parts[self._adversarial].adversary_loss(inputs)
