"""Sampling noise that belongs to a sample, not to a batch, a rank or a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

_PURPOSE = 0x5A3B1E  # keeps these streams apart from every other use of the same seed


def sample_noise(
    seed: int,
    indices: Sequence[int],
    shape: Sequence[int],
    step: int,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise float32 [len(indices), *shape], row i a function of (seed, indices[i], step)
    alone.

    Each row is drawn on the CPU from a Philox stream keyed by the seed whose counter starts at (step,
    index): streams of different rows cannot overlap, and batch size, rank and device change nothing. Step 0
    is by convention the initial noise; samplers draw steps 1, 2, ...
    """
    out = np.empty((len(indices), *shape), dtype=np.float32)
    for row, index in zip(out, indices):
        # Philox counts up from the first word, so the other three name the stream.
        bits = np.random.Philox(key=[seed, _PURPOSE], counter=[0, 0, step, index])
        np.random.Generator(bits).standard_normal(out=row, dtype=np.float32)
    noise = torch.from_numpy(out)
    if torch.device(device).type == "cuda":
        return noise.pin_memory().to(device, non_blocking=True)  # pageable memory would make the copy wait
    return noise.to(device)


def noise_stream(
    seed: int, indices: Sequence[int], shape: Sequence[int], *, device: torch.device | str = "cpu"
) -> Callable[[int], Tensor]:
    """The ``noise(step)`` callable that samplers take, for the samples of one batch."""
    return lambda step: sample_noise(seed, indices, shape, step, device=device)
