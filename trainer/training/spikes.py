"""Notices when the loss is far above its recent course."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

COLUMN = "spike"  # of the log: the loss as a multiple of the median before
WINDOW, FEWEST = 50, 10  # lines of the log that are looked back on; before the fewest nothing is said
DEVIATIONS, SHARE = 6.0, 0.2
_TO_DEVIATION = 1.4826  # of the median absolute deviation, for a normal distribution


class Spikes:
    """A line of the log is a spike if its denoising loss exceeds the median of up to `WINDOW` lines before it by more than
    `DEVIATIONS` robust standard deviations (median absolute deviation) and by more than `SHARE` of the median.

    Both thresholds are ours. The median forgets a lasting rise after half a window.
    """

    def __init__(self, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        """lines: of the log so far, so that a resumed run sees what an uninterrupted one does."""
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self.begins = False  # the last line that was seen is a spike, and the one before it was none
        self._is_one = False
        for line in lines:
            loss = line.get("denoise")
            if isinstance(loss, int | float):
                self._recent.append(float(loss))
                self._is_one = COLUMN in line

    def see(self, loss: float | None) -> float | None:
        """The loss as a multiple of the median before it if it is a spike, else None."""
        if loss is None or not math.isfinite(loss):
            self.begins = False
            return None
        ratio = self._ratio(loss)
        self._recent.append(loss)
        self.begins, self._is_one = ratio is not None and not self._is_one, ratio is not None
        return ratio

    def _ratio(self, loss: float) -> float | None:
        if len(self._recent) < FEWEST:
            return None
        middle = statistics.median(self._recent)
        deviation = _TO_DEVIATION * statistics.median(abs(value - middle) for value in self._recent)
        far = loss - middle > max(DEVIATIONS * deviation, SHARE * abs(middle))
        return loss / middle if far and middle > 0 else None
