"""One setting of sampling at many values: what `trainer eval --sweep` takes. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, DecimalException

from featcache.errors import UserError
from trainer.interval import plain

SETTINGS = ("guidance", "interval_low", "interval_high")
MOST_POINTS = 200
_EXAMPLES = ("guidance=1.0:2.5:0.1", "guidance=1.0,1.5,2.0", "interval_high=0.5:1.0:0.1")


@dataclass(frozen=True)
class Sweep:
    """A setting (`SETTINGS`) and its values, ascending.

    Raises:
        UserError: an unknown setting; fewer than two values or more than `MOST_POINTS`; a value twice, or one that the
            setting cannot take.
    """

    setting: str
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.setting not in SETTINGS:
            raise _wrong(f"{self.setting!r:.80} is no setting that --sweep takes ({', '.join(SETTINGS)})")
        if len(self.values) < 2:
            raise _wrong(f"--sweep {self.setting} has {len(self.values)} values, and a curve needs two")
        if len(self.values) > MOST_POINTS:
            raise _wrong(f"--sweep {self.setting} has {len(self.values):,} values, and at most {MOST_POINTS} are drawn")
        if len(set(self.values)) < len(self.values):
            raise _wrong(f"--sweep {self.setting} has a value twice")
        highest = float("inf") if self.setting == "guidance" else 1.0
        wrong = [value for value in self.values if not 0 <= value <= highest or value == float("inf")]
        if wrong:
            taken = "scales from 0 up" if self.setting == "guidance" else "times from 0 to 1"
            raise _wrong(f"--sweep {self.setting} has a value of {plain(wrong[0])}, and takes {taken}")
        object.__setattr__(self, "values", tuple(sorted(self.values)))

    @classmethod
    def parse(cls, value: object) -> Sweep:
        """From `SETTING=FIRST:LAST:STEP`, whose last value counts, or `SETTING=A,B,C`; what is parsed already stays.

        Raises:
            UserError: anything else, or as the constructor.
        """
        if isinstance(value, cls):
            return value
        setting, equals, text = str(value).partition("=")
        if not equals or not text:
            raise _wrong(f"--sweep {value!r:.200} is not SETTING=VALUES")
        try:
            values = _range(text) if ":" in text else [_number(part) for part in text.split(",")]
        except (DecimalException, ValueError):
            raise _wrong(f"--sweep {value!r:.200} is neither FIRST:LAST:STEP nor a list of numbers") from None
        return cls(setting.strip().replace("-", "_"), tuple(float(v) for v in values))

    def __str__(self) -> str:
        """One text for equal sweeps: what `parse` reads."""
        return f"{self.setting}={','.join(map(plain, self.values))}"


def _range(text: str) -> list[Decimal]:
    """In decimals: 1.0 and ten times 0.1 are 2.0."""
    first, last, step = (_number(part) for part in text.split(":"))
    if step <= 0 or last < first:
        raise _wrong(f"--sweep: from {first} to {last} in steps of {step} there is nothing")
    if (last - first) / step >= MOST_POINTS:
        raise _wrong(f"--sweep: {text:.80} is more than {MOST_POINTS} values")
    return [first + step * i for i in range(int((last - first) / step) + 1)]


def _number(text: str) -> Decimal:
    number = Decimal(text.strip())
    if not number.is_finite():
        raise ValueError(text)
    return number


def _wrong(what: str) -> UserError:
    return UserError(what, remedy=f"Type for example: {'   or: '.join(f'--sweep {e}' for e in _EXAMPLES)}")
