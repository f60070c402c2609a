"""The machine: its copy bandwidth, its matrix rates, and a name for it."""

from __future__ import annotations

import functools
import re
import statistics
from collections.abc import Callable
from typing import Any

import torch

from bench.harness.timing import repeated, seconds_a_step
from fastcnn.system.device import has_bf16


@functools.cache
def rates(device: torch.device) -> dict[str, float]:
    """Return copy bandwidth (bytes read and written a second) and matrix rates (FLOP/s): fp32, bf16 where it has it.

    On random data: a GPU multiplies zeros faster.
    """
    source = torch.empty(1 << (32 if device.type == "cuda" else 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source.random_())
    copy_seconds = _seconds_a_call(lambda: target.copy_(source), device)
    kinds = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if has_bf16(device) else {})
    return {"copy_bytes_per_second": 2 * source.numel() / copy_seconds} | {
        f"{name}_flop_per_second": matrix_rate(dtype, device) for name, dtype in kinds.items()
    }


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return the FLOP/s of a large matrix product of random numbers."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _seconds_a_call(functools.partial(torch.mm, a, b), device)


def _seconds_a_call(call: Callable[[], object], device: torch.device) -> float:
    return statistics.median(seconds_a_step(repeated(call), 0.2, device))


def slug(hardware: dict[str, Any]) -> str:
    """Return a folder's name for hardware: the GPU, or the processor and its cores."""
    name = hardware.get("gpu") or f"{hardware.get('cpu') or hardware['machine']} {hardware['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
