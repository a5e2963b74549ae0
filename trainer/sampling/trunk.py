"""States that samples under several guidances have in common, kept in a folder while all of them are drawn.

Samples of equal noise and labels that differ in their guidance alone go the same way until it acts for the first time: with
an interval of [0, 0.7], all steps above t = 0.7. There they part, and nothing of what the model says to one of them is what
it would say to another. So one state a unit of samples is kept, the furthest that was reached before guidance acted; no bit
of a sample depends on whether it was computed or read. 32 KB for each sample at 256 pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from featcache.store import files

_NAME = re.compile(r"(?P<samples>[0-9a-f]{16})-(?P<step>[0-9]{6})\.npy")


def trunk_record(record: Mapping[str, object], device: torch.device) -> dict[str, object]:
    """What of the record of samples their common states depend on: all but guidance and rounding."""
    kept = {key: value for key, value in record.items() if key not in ("guidance", "pixels")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {**kept, "device": f"{device.type} {name}".strip()}


class Trunk:
    """A folder of states of samples with one record; others have other names."""

    def __init__(self, folder: Path, record: Mapping[str, object]) -> None:
        self._folder = folder
        self._record = json.dumps(record, sort_keys=True, default=str)

    def load(self, indices: Sequence[int], *, shape: tuple[int, ...], most: int) -> tuple[int, Tensor] | None:
        """The furthest state of these samples that is kept, and how many steps led to it, at most `most`; on the CPU."""
        known = self._known(indices)
        for step in sorted((step for step in known if step <= most), reverse=True):
            with contextlib.suppress(OSError, ValueError, TypeError, EOFError):  # damaged: an earlier one, or none
                state = np.load(known[step], allow_pickle=False)
                if state.shape == shape and state.dtype == np.float64:
                    return step, torch.from_numpy(state)
        return None

    def save(self, indices: Sequence[int], step: int, state: Tensor) -> None:
        """Keeps a state after so many steps, in place of earlier ones.

        Raises:
            UserError: the disk refuses.
        """
        earlier = [path for known, path in self._known(indices).items() if known < step]
        files.make_directory(self._folder)
        with files.atomic_file(self._folder / f"{self._samples(indices)}-{step:06d}.npy", durable=False) as file:
            np.save(file, state.cpu().numpy(), allow_pickle=False)
        for path in earlier:
            files.remove_file(path)

    def _known(self, indices: Sequence[int]) -> dict[int, Path]:
        """Number of steps => file, of these samples."""
        matches = (_NAME.fullmatch(path.name) for path in self._folder.glob(f"{self._samples(indices)}-*.npy"))
        return {int(found["step"]): self._folder / found.string for found in matches if found is not None}

    def _samples(self, indices: Sequence[int]) -> str:
        return hashlib.sha256(f"{self._record} {list(indices)}".encode()).hexdigest()[:16]
