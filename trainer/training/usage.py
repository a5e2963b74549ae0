"""What a run takes of its machine, line of the log by line: waiting for data, memory, operations per second."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from featcache.console import amount_text
from featcache.errors import first_line
from featcache.machine import peak_rss_bytes
from trainer import distributed
from trainer.distributed import World
from trainer.runs.config import RunConfig
from trainer.runs.log import is_detail
from trainer.training.flops import peak_tflops, training_flops
from trainer.training.state import Parts, precision_of

if TYPE_CHECKING:
    from featcache import Cache

# Counting the operations takes seconds, which a run that ends before this has no use for.
COUNT_AFTER_S = 30.0


class Usage:
    """Reads what has been used since the last time, at a moment when the host has waited for the device anyway.

    Every rank must read at the same steps. Figures are those of the rank that has the largest, rates are of one device.

    Args:
        aligned: whether a step computes alignment. start: steps done before.
    """

    def __init__(
        self,
        parts: Parts,
        cache: Cache,
        config: RunConfig,
        world: World,
        device: torch.device,
        *,
        aligned: Callable[[int], bool],
        start: int,
        warn: Callable[[str], None],
    ) -> None:
        self._config, self._cache, self._parts, self._world = config, cache, parts, world
        self._device, self._aligned, self._warn = device, aligned, warn
        self._last = (start, 0.0, 0.0)  # step, seconds trained, seconds waited
        self._begin_s: float | None = None
        self._flops: dict[bool, float] = {}
        self._uncounted = False
        self._peak = None
        if device.type == "cuda":
            self._peak = peak_tflops(torch.cuda.get_device_name(device), precision_of(config, device))

    def read(self, done: int, *, rate: float | None, trained_s: float, waited_s: float) -> dict[str, float]:
        """Columns of the log.

        data_wait: share of the time in which a step waited for the loader (`featcache.torch.Loader.waited_s`).
        gpu_allocated_bytes, gpu_reserved_bytes: peaks since the last reading; on a CPU rss_bytes, the process's peak.
        tflop_per_s: matrix products of the model and its heads, per device; mfu: as a share of what the device's data
        sheet promises. Both from half a minute of training on.

        Args:
            rate: steps per second since the last reading. trained_s, waited_s: clocks of training and of waiting for data.
        """
        since, since_s, since_waited_s = self._last
        self._last = (done, trained_s, waited_s)
        begun = self._begin_s is not None
        self._begin_s = self._begin_s if self._begin_s is not None else trained_s
        memory = self._memory()
        wait = (waited_s - since_waited_s) / max(trained_s - since_s, 1e-9) if begun else 0.0
        wait, *peaks = distributed.most_over_ranks([min(max(wait, 0.0), 1.0), *memory.values()])
        used = {"data_wait": round(wait, 4)} if begun else {}  # the first line is about starting
        used |= {name: int(peak) for name, peak in zip(memory, peaks)}
        if rate is not None and trained_s - self._begin_s >= COUNT_AFTER_S and self._world.is_main:
            used |= self._operations(rate, range(since, done))
        return used

    def _memory(self) -> dict[str, float]:
        if self._device.type != "cuda":
            return {"rss_bytes": float(peak_rss_bytes())}
        taken = {
            "gpu_allocated_bytes": float(torch.cuda.max_memory_allocated(self._device)),
            "gpu_reserved_bytes": float(torch.cuda.max_memory_reserved(self._device)),
        }
        torch.cuda.reset_peak_memory_stats(self._device)
        return taken

    def _operations(self, rate: float, steps: range) -> dict[str, float]:
        aligned = sum(map(self._aligned, steps))
        counts = {True: aligned, False: len(steps) - aligned}
        per_image = 0.0
        for kind, count in counts.items():
            if count:
                flops = self._counted(kind)
                if flops is None:
                    return {}
                per_image += flops * count / len(steps)
        tflops = per_image * rate * self._config.batch_size / self._world.size / 1e12
        found = {"tflop_per_s": round(tflops, 4)}
        return found if self._peak is None else {**found, "mfu": round(tflops / self._peak, 4)}

    def _counted(self, aligned: bool) -> float | None:
        """Per image of a step with or without alignment; None where counting fails, which is said once."""
        if aligned not in self._flops and not self._uncounted:
            try:
                self._flops[aligned] = training_flops(self._parts, self._cache, aligned=aligned)
            except Exception as error:  # of a method with operations that cannot be done without data
                self._uncounted = True
                self._warn(f"the step's operations cannot be counted, so there is no MFU: {first_line(error)}")
        return self._flops.get(aligned)


def in_words(record: Mapping[str, object], shown: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """A line of the log for people: what to see in any case, and what else where there is room.

    Args:
        shown: of `record`, losses and what the method measures.
    """
    numbers, more = [], []
    if isinstance(rate := record.get("images_per_s"), float):
        numbers.append(f"{amount_text(rate)} images/s")
    if isinstance(wait := record.get("data_wait"), float):
        numbers.append(f"{100 * wait:.0f} % waiting for data")
    if "loss" in shown:
        numbers.append(f"loss {shown['loss']:.4g}")
    if isinstance(mfu := record.get("mfu"), float):
        more.append(f"MFU {100 * mfu:.0f} %")
    more += [f"{name} {value:.4g}" for name, value in shown.items() if name != "loss" and not is_detail(name)]
    return numbers, more
