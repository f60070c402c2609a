"""Profile of a step on a GPU: kernels launched, time the GPU waits, synchronisations."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from fastcnn.system.device import synchronize


def events_of(run: Callable[[], object], device: torch.device) -> list[Any]:
    """Return the profiler's events of what `run` does; on a GPU those of its kernels, too."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    synchronize(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(activities=activities) as trace:
            run()
        return list(trace.events() or [])


def count_events(run: Callable[[], object], num_steps: int, device: torch.device) -> dict[str, float]:
    """Return kernels a step, the GPU's idle share and synchronisations; `run` does `num_steps`."""
    events = events_of(run, device)
    kernels = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if str(event.device_type).endswith("CUDA") and "mem" not in event.name.lower()
    )
    busy = sum(end - start for start, end in kernels)
    span = kernels[-1][1] - kernels[0][0] if kernels else 0
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::item")
    return {
        "kernels_per_step": len(kernels) / num_steps,
        "idle_share": 1 - busy / span if span else 0.0,
        "synchronisations": sum(event.name in waits for event in events),
    }
