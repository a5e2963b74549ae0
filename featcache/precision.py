"""Precisions of float32 networks, and TensorFloat-32 on or off for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

PRECISIONS = ("fp32", "tf32", "bf16")


@contextlib.contextmanager
def tensor_float32(allowed: bool) -> Iterator[None]:
    """TensorFloat-32 (10 bits of mantissa) on or off in matrix products and convolutions alike, then as it was before.

    PyTorch's settings are of the whole process: other threads see them too.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
