"""Where the time of a step goes, kernel by kernel, from PyTorch's profiler."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

# Kind -> what kernels' names hold, in the order in which they are looked at: fused attention is built from CUTLASS too.
KINDS = {
    "attention": r"flash|fmha|sdpa|attention",
    "generated": r"^triton_",
    "convolution": r"conv|implicit_gemm|dgrad|wgrad|fprop",
    "matrix product": r"gemm|gemv|nvjet|cutlass|xmma|addmm|^aten::(bmm|mm)$|splitk",
    "optimiser and average": r"multi_tensor|adam|foreach|lerp",
    "copies": r"memcpy|memset|copy",
}
OTHER = "other"
MOST = 40


class Span(NamedTuple):
    """One kernel's run, in microseconds."""

    name: str
    start: float
    end: float


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    return next((kind for kind, words in KINDS.items() if re.search(words, kernel, re.IGNORECASE)), OTHER)


def busy_us(spans: Iterable[Span]) -> float:
    """Microseconds in which at least one kernel ran."""
    total, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda s: s.start):
        total += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return total


def summed(spans: list[Span], steps: int) -> dict[str, Any]:
    """Milliseconds a step by kind and by kernel (the `MOST` longest), and the share of the time in which none ran."""
    kernels: dict[str, list[float]] = {}
    for span in spans:
        kernels.setdefault(span.name, []).append(span.end - span.start)
    kinds = dict.fromkeys([*KINDS, OTHER], 0.0)
    for name, times in kernels.items():
        kinds[kind_of(name)] += sum(times) / steps / 1e3
    whole = max(s.end for s in spans) - min(s.start for s in spans) if spans else 0.0
    longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:MOST]
    return {
        "ms_per_step": {kind: round(value, 4) for kind, value in kinds.items()},
        "idle_share": 1 - busy_us(spans) / whole if whole else None,
        "kernels_per_step": len(spans) / steps,
        "longest": [
            {
                "kernel": name[:160],
                "kind": kind_of(name),
                "ms_per_step": round(sum(times) / steps / 1e3, 4),
                "runs_per_step": round(len(times) / steps, 2),
            }
            for name, times in longest
        ],
    }


def profiled(step: Callable[[], Any], device: str, *, steps: int) -> dict[str, Any]:
    """`summed` over so many calls of `step`, which is warm. On the CPU operators stand for kernels."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    cuda = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):
            step()
        if cuda:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    spans = []
    for event in profiler.events() or ():
        # A GPU's timeline also shows ranges that annotate it.
        if event.device_type != wanted or getattr(event, "is_user_annotation", False):
            continue
        start, end = event.time_range.start, event.time_range.end
        # An operator of the CPU without those that it calls, which have entries of their own.
        spans.append(Span(event.name, start, end if cuda else start + event.self_cpu_time_total))
    return summed(spans, steps)
