"""The machine: devices, precisions, memory, hardware and versions."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import re
import sys
import weakref
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastcnn.config import Precision
from fastcnn.errors import FastCNNError, fall_back
from pipelines import num_cores as num_cores  # for the rooms that decode nothing

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def pick_device(name: str, number: int = 0) -> torch.device:
    """Return the device of a name; "auto" is the first of cuda, mps and cpu that exists.

    number: index of the GPU, unless the name has one.

    Raises FastCNNError if there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise FastCNNError(f"--device: expected cpu, cuda, cuda:N or mps, got '{name}'") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise FastCNNError("--device cuda: torch sees no NVIDIA GPU here; use --device cpu, or see nvidia-smi")
        index = number if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise FastCNNError(f"--device cuda:{index}: there are {torch.cuda.device_count()} GPUs, counted from 0")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise FastCNNError("--device mps: torch has no Metal device here; use --device cpu")
    return device


def pick_precision(name: Precision, device: torch.device, *, deterministic: bool, strict: bool) -> Precision:
    """Return the precision, or fp32 if the device lacks it; "auto" is bf16 if it has that, else fp16 on a GPU."""
    if name == "auto":
        if deterministic:
            return "fp32"
        return "bf16" if has_bf16(device) else "fp16" if device.type == "cuda" else "fp32"
    if name in ("fp16", "tf32") and device.type != "cuda":
        fall_back(f"{name} is for NVIDIA GPUs: training in fp32", strict=strict)
        return "fp32"
    if name == "bf16" and not has_bf16(device):
        fall_back(f"{device.type} has no bf16 arithmetic here: training in fp32", strict=strict)
        return "fp32"
    return name


DTYPES: dict[str, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def has_bf16(device: torch.device) -> bool:
    """Return whether the device computes in bf16 rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        known = getattr(torch.cpu, "get_capabilities", None)  # not in the oldest torch that we support
        capabilities = known() if known else {}
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16"))
    return False


def keep_freed_memory() -> None:
    """Make glibc, where that is the C library, keep large freed blocks instead of returning them to the system.

    Every step frees and allocates the same tensors of tens of MiB. By default each is returned and faulted in again,
    page by page; eager fp32 training is 1.8 times as fast without that (docs/notes.md).
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # musl
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)  # never
            mallopt(_M_TOP_PAD, 64 << 20)


def free_memory_bytes(device: torch.device) -> int:
    """Return the free memory of a device: a GPU's own, else what the system and the control group leave."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        free = int(text.partition("MemAvailable:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):  # macOS: half of the physical memory; Windows: a guess
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8 << 30
        return physical // 2
    return max(0, min([free, *_left_in_control_group()]))


def _left_in_control_group() -> list[int]:
    """Return the bytes left below this container's memory limit, cached files aside; empty without a limit."""
    for limit, usage, group in (("memory.max", "memory.current", ""), (*_CGROUP_1, "memory")):
        folder = Path("/sys/fs/cgroup") / group
        with contextlib.suppress(OSError, ValueError):
            cached = re.search(r"^inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
            used = int((folder / usage).read_text()) - (int(cached[1]) if cached else 0)
            return [int((folder / limit).read_text()) - used]  # ValueError for "max": no limit
    return []


_CGROUP_1 = "memory.limit_in_bytes", "memory.usage_in_bytes"


def synchronize(device: torch.device) -> None:
    """Wait for all work queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def capture(steps: Callable[[], None], generator: torch.Generator | None = None) -> Callable[[], None]:
    """Return the replay of a CUDA graph of some steps. Capturing runs nothing. Raises RuntimeError where it fails.

    generator: draws the steps' random numbers; each replay draws the next ones.
    """
    graph = torch.cuda.CUDAGraph()
    if generator:
        graph.register_generator_state(generator)
    # thread_local: another thread's CUDA calls (pinning memory, say) neither break the capture nor get into it.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        steps()
    _captured.add(graph)
    return graph.replay


def release_captures() -> None:
    """Reset all graphs that were captured: NCCL does not end while one holds its work (pytorch #115388)."""
    for graph in list(_captured):
        graph.reset()


_captured: weakref.WeakSet[Any] = weakref.WeakSet()


def release_memory() -> None:
    """Collect garbage, such as tensors of a traceback, and give a GPU's cached memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a device, or the machine, is out of memory."""
    # torch has no exception class for the machine's memory.
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return on_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError):  # Linux: ru_maxrss starts at its parent's value
        peak_kib = re.search(
            r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE
        )
        if peak_kib:
            return int(peak_kib[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def versions() -> dict[str, str]:
    """Return the versions of the packages that a run's figures depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("fastcnn", "numpy", "pillow", "simplejpeg", "triton", "nvidia-dali-cuda120", "nvidia-dali-cuda130"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """Return system, CPU, cores and GPU; never a host or user name."""
    facts: dict[str, Any] = {"system": platform.system(), "machine": platform.machine(), "cores": num_cores()}
    with contextlib.suppress(OSError):  # Linux has it
        name = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if name:
            facts["cpu"] = name[1].strip()
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts
