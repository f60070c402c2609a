"""The machine: devices, precisions, torch's settings, memory, hardware and versions."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastcnn.config import Precision
from fastcnn.errors import FastCNNError, fall_back
from fastcnn.system import generators
from pipelines import num_cores as num_cores  # for the rooms that decode nothing

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4


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


@contextlib.contextmanager
def torch_settings(
    device: torch.device, *, threads: int | None, deterministic: bool, tf32: bool = False
) -> Iterator[None]:
    """Set torch's threads, allocator, device and determinism; restore them, and the caller's generators, afterwards."""
    with generators.given_back(device), _switches_given_back(device):
        if device.type == "cpu":
            keep_freed_memory()
            torch.set_num_threads(threads or num_cores())
        if device.type == "cuda":
            torch.cuda.set_device(device)  # events, streams and captures are the current device's
            _allow_tf32(tf32, tf32)
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        _use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = not deterministic, deterministic
        yield


@contextlib.contextmanager
def _switches_given_back(device: torch.device) -> Iterator[None]:
    """Give torch's switches, which are the whole process's, back the values that the caller had chosen."""
    threads, workspace = torch.get_num_threads(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    on_cuda = device.type == "cuda"
    current, tf32 = (torch.cuda.current_device(), _tf32_allowed()) if on_cuda else (0, (False, False))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if on_cuda:
            torch.cuda.set_device(current)
            _allow_tf32(*tf32)
        _use_deterministic_algorithms(*deterministic)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = cudnn
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def _use_deterministic_algorithms(mode: bool, warn_only: bool = False) -> None:
    # Only where it changes something: the call imports inductor, a second of every start.
    now = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if mode != now[0] or (mode and warn_only != now[1]):
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)


def _tf32_allowed() -> tuple[bool, bool]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as below
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def _allow_tf32(matmul: bool, cudnn: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9 and later advise another spelling, which inductor trips over
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def keep_freed_memory() -> bool:
    """Make glibc keep large freed blocks instead of returning them to the system; return whether it does.

    Every step frees and allocates the same tensors of tens of MiB. By default each is returned and faulted in again,
    page by page; eager fp32 training is 1.8 times as fast without that (docs/notes.md).
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl
        return False
    never = 2**31 - 1
    return all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, never), mallopt(_M_TOP_PAD, 64 << 20)])


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


def capture(steps: Callable[[], None]) -> Callable[[], None]:
    """Return the replay of a CUDA graph of some steps. Capturing runs nothing. Raises RuntimeError where it fails."""
    graph = torch.cuda.CUDAGraph()
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
