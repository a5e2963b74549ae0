"""Averages of the weights over training: their names, what they weigh, and one made of others afterwards. No torch here.

Power-function averages are those of EDM2 (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion
Models", Section 3): after T steps the weights of time t count in proportion to t^gamma. sigma_rel, the width of that profile
as a share of T, names it. An average of another width is put together after training from stored ones (the paper's post-hoc
average): their profiles are combined by least squares to the profile that is wanted.

A profile here is continuous and the trajectory constant from one step to the next. That is exact, not an approximation:
`power_decay` gives the weights of step t the integral of the profile over (t - 1, t].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PlainValidator

from featcache.errors import UserError
from trainer.interval import plain

if TYPE_CHECKING:
    import numpy as np

EDM2_WIDTHS = (0.05, 0.1)  # the widths that the paper stores
NARROWEST, WIDEST = 0.005, 0.28  # of sigma_rel; at 0.2887 all steps would count alike
Width = Annotated[float, Field(ge=NARROWEST, le=WIDEST)]


@dataclass(frozen=True)
class Average:
    """One set of weights of a checkpoint: `raw`, `ema` (the average by `ema_decay`), `ema:DECAY`, a further one with a
    constant decay, or `power:SIGMA_REL`, a power-function average.

    value: the decay or sigma_rel; None of `raw` and `ema`.
    """

    kind: Literal["raw", "ema", "power"] = "ema"
    value: float | None = None

    def __str__(self) -> str:
        """One text for equal averages: what `parse` reads."""
        return self.kind if self.value is None else f"{self.kind}:{plain(self.value)}"

    @property
    def stem(self) -> str:
        """Of its file in a checkpoint or snapshot."""
        return "model" if self.kind == "raw" else str(self).replace(":", "-")

    @classmethod
    def parse(cls, value: Average | str) -> Average:
        """From its text; what is parsed already stays.

        Raises:
            UserError: anything else.
        """
        if isinstance(value, cls):
            return value
        text = str(value).strip()
        if text in ("raw", "ema"):
            return cls(text)  # type: ignore[arg-type]  # one of the two
        kind, _, number = text.partition(":")
        low, high = {"ema": (0.0, 1.0), "power": (NARROWEST, WIDEST)}.get(kind, (1.0, 0.0))
        try:
            known = float(number)
        except ValueError:
            known = math.nan
        if not low <= known <= high:
            raise UserError(
                f"--weights {text!r:.100} names no average",
                remedy="Type ema, raw, ema:DECAY (of the run's ema_decays, such as ema:0.999) or power:SIGMA_REL "
                f"({NARROWEST:g} to {WIDEST:g}, such as power:0.08).",
            )
        return cls(kind, known)  # type: ignore[arg-type]  # one of the two


def parse_name(value: Average | str) -> str:
    """The text of an average in its one form. Raises as `Average.parse`."""
    return str(Average.parse(value))


# A field of settings that takes whatever `Average.parse` reads, and holds its text.
Weights = Annotated[str, PlainValidator(parse_name)]


def widths(value: object) -> object:
    """`posthoc` as it is typed: true takes the paper's two widths, false none."""
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], bool):
        value = value[0]
    if isinstance(value, bool):
        return EDM2_WIDTHS if value else ()
    return value


@functools.cache
def gamma_of(sigma_rel: float) -> float:
    """The exponent whose profile has that width: sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))."""
    low, high = 0.0, 1 / sigma_rel + 1  # the width falls as the exponent rises
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if width_of(middle) > sigma_rel else (low, middle)
    return low


def width_of(gamma: float) -> float:
    """sigma_rel of an exponent: the standard deviation of t under its profile, as a share of T."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def power_decay(step: int, gamma: float) -> float:
    """What an average keeps of itself in step 0, 1, ...: (1 - 1/t)^(gamma + 1) with t = step + 1. The first keeps nothing."""
    return float((1 - 1 / (step + 1)) ** (gamma + 1))


@dataclass(frozen=True)
class Combination:
    """An average as a sum of stored ones. coefficients: float64 [n], of sum 1. error: the L2 distance of the profile that
    they make from the one that is wanted, as a share of the latter's norm."""

    coefficients: np.ndarray
    error: float


def combine(stored: Sequence[tuple[int, float]], wanted: tuple[int, float]) -> Combination:
    """The sum of stored profiles, each (step, sigma_rel), that is closest to the wanted one."""
    import numpy as np

    steps = np.array([float(step) for step, _ in stored])
    gammas = np.array([gamma_of(width) for _, width in stored])
    step, gamma = np.array([float(wanted[0])]), np.array([gamma_of(wanted[1])])
    products = _products(steps, gammas, steps, gammas)
    onto = _products(steps, gammas, step, gamma)[:, 0]
    own = float(_products(step, gamma, step, gamma)[0, 0])
    # Profiles of one norm: those of late steps are low and wide, so that the system as it stands loses digits.
    norms = np.sqrt(np.diag(products))
    found = np.linalg.lstsq(products / np.outer(norms, norms), onto / norms, rcond=1e-14)[0] / norms
    found = found / found.sum()
    rest = own - 2 * float(found @ onto) + float(found @ products @ found)
    return Combination(found, math.sqrt(max(rest, 0.0) / own))


def _products(a: np.ndarray, alpha: np.ndarray, b: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """Integrals of the products of profiles (gamma + 1) t^gamma / T^(gamma + 1) on [0, T]: of steps a and exponents alpha
    [n] with steps b and exponents beta [m], float64 [n, m]."""
    import numpy as np

    a, alpha, b, beta = a[:, None], alpha[:, None], b[None, :], beta[None, :]
    # min^(alpha + beta + 1) / (a^(alpha + 1) b^(beta + 1)), as a power of a ratio below 1.
    ratio = np.minimum(a, b) / np.maximum(a, b)
    overlap = ratio ** np.where(a < b, beta, alpha) / np.maximum(a, b)
    product: np.ndarray = (alpha + 1) * (beta + 1) / (alpha + beta + 1) * overlap
    return product
