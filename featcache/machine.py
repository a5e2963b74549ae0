"""What a measurement says of the machine it was taken on."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from featcache.errors import UserError


def cpu_name() -> str:
    """The processor's name as the kernel gives it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Memory that this process may take: the machine's, or its control group's if that has less."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            found = min(found, int(limit.read_text()))
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
    return found


def peak_rss_bytes() -> int:
    """The most memory that this process has taken so far."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        # What getrusage says begins, after exec, with what the process that started this one had.
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe_machine(*packages: str) -> dict[str, Any]:
    """Processor, cores, PyTorch's threads, GPU (None if there is none), system, Python, and versions of packages.

    A package that is not installed has the version None.
    """
    import torch  # late here and below: the command lines load this module at once

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {package: installed(package) for package in packages},
    }


def pick_device(device: str) -> str:
    """`auto` => `cuda` where there is one, else `cpu`.

    Raises `UserError` if the device does not exist here.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise UserError(f"unknown device {device!r}", remedy="Type --device cpu, cuda, cuda:1 or auto.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but PyTorch finds no GPU on this machine", remedy="Type --device cpu.")
    return device
