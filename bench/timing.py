"""Timing side by side: runners taken in turn, warmed up, synchronised inside what is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor


def repeated(call: Callable[[], object]) -> Callable[[int], None]:
    """Return what calls a step a number of times."""

    def run(count: int) -> None:
        for _ in range(count):
            call()

    return run


def interleaved(
    runners: dict[str, Callable[[int], None]], device: torch.device, seconds: float, repeats: int
) -> dict[str, list[float]]:
    """Return seconds a step of each runner, taken in turn (A B C A B C), after a warm-up that sets the counts."""
    counts = {}
    for name, run in runners.items():
        run(3)
        counts[name] = max(2, round(seconds / timed(run, 3, device)))
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(repeats):
        for name, run in runners.items():
            times[name].append(timed(run, counts[name], device))
    return times


def timed(run: Callable[[int], None], count: int, device: torch.device) -> float:
    """Return seconds a step over `count` of them, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    run(count)
    synchronize(device)
    return (time.perf_counter() - start) / count


def seconds_a_call(call: Callable[[], Tensor], device: torch.device, seconds: float, repeats: int) -> float:
    """Return the median seconds of a call."""
    return statistics.median(interleaved({"call": repeated(call)}, device, seconds, repeats)["call"])


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
