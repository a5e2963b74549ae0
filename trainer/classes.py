"""Which classes samples are drawn of. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from featcache.errors import UserError

if TYPE_CHECKING:
    import numpy as np

KINDS = ("balanced", "random")


@dataclass(frozen=True)
class Classes:
    """`balanced` (0, 1, 2, ... in turn), `random` (uniform, seeded), or `chosen` classes in turn.

    chosen: used where `kind` is `chosen`; not empty there.
    """

    kind: str = "balanced"
    chosen: tuple[int, ...] = ()

    def __str__(self) -> str:
        """One text for equal choices: what `parse` reads."""
        return ",".join(map(str, self.chosen)) if self.chosen else self.kind

    @classmethod
    def parse(cls, value: Classes | str) -> Classes:
        """From `balanced`, `random` or a list such as `3,7`; what is parsed already stays.

        Raises:
            UserError: anything else.
        """
        if isinstance(value, Classes):
            return value
        text = str(value).strip()
        if text in KINDS:
            return cls(text)
        try:
            chosen = tuple(int(part) for part in text.split(","))
        except ValueError:
            raise UserError(
                f"--classes {text!r:.200} is not a list of classes",
                remedy="Classes go by their numbers, from 0 in the cache's order: type "
                "balanced, random, or e.g. 207,360,387",
            ) from None
        return cls("chosen", chosen)

    def labels(self, count: int, num_classes: int, *, seed: int) -> np.ndarray:
        """Labels int64 [count].

        Raises:
            UserError: a chosen class outside 0..num_classes-1.
        """
        import numpy as np

        if self.kind == "balanced":
            return np.arange(count) % num_classes
        if self.kind == "random":
            return np.random.Generator(np.random.Philox(key=[seed, 0x1ABE15])).integers(0, num_classes, count)
        wrong = [c for c in self.chosen if not 0 <= c < num_classes]
        if wrong:
            raise UserError(f"there is no class {wrong[0]}", remedy=f"Classes are 0 to {num_classes - 1}.")
        return np.resize(np.array(self.chosen), count)
