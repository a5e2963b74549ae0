"""What ranks exchange in each step of a run, and what they read back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

REDUCTIONS = ("allreduce_", "_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_")
GATHERS = ("_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_")
READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select")


class Collectives(TorchDispatchMode):
    """Of every step: [operation, dtype, entries of its largest tensor] of each collective and of each reading back."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[tuple[str, str, int]]] = [[]]  # the first: before the first step

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS or func.namespace in ("c10d", "_c10d_functional"):
            tensors = [
                t for a in args for t in (a if isinstance(a, list | tuple) else [a]) if isinstance(t, torch.Tensor)
            ]
            largest = max(tensors, key=torch.Tensor.numel)
            self.steps[-1].append((name, str(largest.dtype).removeprefix("torch."), largest.numel()))
        return func(*args, **(kwargs or {}))

    def stepwise(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """That function, with a new list begun before it."""

        def step(*args: Any, **kw: Any) -> Any:
            self.steps.append([])
            return train_step(*args, **kw)

        return step
