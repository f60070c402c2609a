"""Checks of this machine for `fastcnn doctor`: what is usable, and what to install or repair."""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

import torch

import pipelines
from fastcnn.data.cache_folders import default_folder
from fastcnn.errors import first_line
from fastcnn.network.kernels import cpu_max_pool
from fastcnn.runs.wandb_server import in_netrc
from fastcnn.storage.files import free_bytes
from fastcnn.storage.paths import can_be_written
from fastcnn.system import text
from fastcnn.system.device import describe_hardware, free_memory_bytes, has_bf16
from pipelines.shared_memory import shared
from pipelines.workers import Workers

LOW_DISK, LOW_MEMORY = 5 * 2**30, 2 * 2**30  # bytes; even a small data set may not fit in less

State = Literal["ok", "without", "wrong"]
"""ok: usable. without: a run works without it, slower or with fewer features. wrong: present, but unusable."""


@dataclass(frozen=True)
class Check:
    """State of one thing that a run may use."""

    what: str
    state: State
    found: str
    advice: str = ""
    """How to repair or install it; "" if there is nothing to do."""


def examine(cache_dir: str | Path | None = None) -> list[Check]:
    """Return all checks of this machine. Nothing is installed, and no network is used."""
    return [*_machine(cache_dir), *_gpu(), *_decoders(), _workers(), _compiler(), _wandb()]


def table(checks: list[Check]) -> str:
    """Return the checks as a table for a terminal, with each advice in a row below its check."""
    rows = []
    for check in checks:
        rows.append([check.what, check.state, check.found])
        if check.advice:
            rows.append(["", "", f"-> {check.advice}"])
    return text.table(["", "state", "found"], rows)


def _machine(cache_dir: str | Path | None) -> Iterator[Check]:
    facts = describe_hardware(torch.device("cpu"))
    yield Check("fastcnn", "ok", f"{_version('fastcnn')} on Python {platform.python_version()}")
    bf16 = "bf16" if has_bf16(torch.device("cpu")) else "no bf16: fp32"
    where = f"{facts['system']} {facts['machine']}"
    yield Check("processor", "ok", f"{facts.get('cpu', where)}, {facts['cores']} cores, {bf16}; {where}")
    free = free_memory_bytes(torch.device("cpu"))
    low = free < LOW_MEMORY
    advice = "free some memory: images that do not fit are read from the disk while training" if low else ""
    yield Check("memory", "without" if low else "ok", f"{free / 2**30:,.1f} GiB free", advice)
    folder = default_folder(cache_dir)
    free, writable = free_bytes(folder), can_be_written(folder.absolute())
    state: State = "wrong" if not writable else "without" if free < LOW_DISK else "ok"
    advice = {
        "wrong": f"{folder} is not writable: choose another folder with --cache-dir",
        "without": "10,000 images of 128 px need 0.5 GiB: fastcnn cache clear, or use another disk with --cache-dir",
        "ok": "",
    }[state]
    yield Check("disk", state, f"{free / 2**30:,.1f} GiB free for the cache in {folder}", advice)


def _gpu() -> Iterator[Check]:
    """Yield the checks of torch, GPU and driver: each may be present without the others."""
    built = torch.version.cuda
    driver = _driver()
    seen = torch.cuda.is_available()
    found = f"{torch.__version__}, {f'for CUDA {built}' if built else 'without CUDA'}"
    if driver and not seen:
        advice = (
            f"the driver is for CUDA {driver['cuda']} and this torch for {built}: update the driver, or install torch "
            f"for CUDA {driver['cuda']}"
            if built
            else "this torch is for the CPU: install torch's CUDA build (pip install torch, without the CPU index)"
        )
        yield Check("torch", "wrong", found, advice)
    else:
        yield Check("torch", "ok", found)
    if seen:
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        yield Check("GPU", "ok", f"{', '.join(names)} ({memory:,.0f} GiB)")
    elif driver:
        yield Check("GPU", "wrong", f"{driver['name']}, which torch does not see")
    elif torch.backends.mps.is_available():
        yield Check("GPU", "ok", "Metal (--device mps; not tested)")
    else:
        yield Check("GPU", "without", "no NVIDIA GPU: training runs on the CPU")
    if driver:
        yield Check("driver", "ok", f"{driver['driver']}, for CUDA up to {driver['cuda']}")
    elif Path("/proc/driver/nvidia").exists():
        yield Check("driver", "wrong", "loaded, but nvidia-smi fails", "reinstall the driver, or reboot")
    if seen and util.find_spec("triton") is None:
        yield Check("triton", "without", "not installed: no compiled engine on the GPU", "pip install triton")


def _driver() -> dict[str, str]:
    """Return the GPU's name, driver and CUDA version from nvidia-smi; {} if it fails."""
    try:
        plain = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30, check=True).stdout
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    name, _, driver = next(iter(names.splitlines()), "").rpartition(", ")
    cuda = re.search(r"CUDA Version: *([\d.]+)", plain)
    return {"name": name, "driver": driver, "cuda": cuda[1] if cuda else "an unknown version"} if name else {}


def _decoders() -> Iterator[Check]:
    gpu = torch.cuda.is_available()
    for name, what in (("dali", "DALI"), ("turbo", "libjpeg-turbo"), ("pillow", "Pillow")):
        try:
            pipelines.choose(name, gpu=gpu)
        except pipelines.DecoderUnavailable as error:
            why, _, advice = error.why.rpartition("; ")
            if name == "dali" and not gpu:
                yield Check(what, "without", f"{why}; without a GPU it is not needed")
            else:
                yield Check(what, "without" if name != "pillow" else "wrong", why, advice)
            continue
        yield Check(what, "ok", _decoder_version(name))


def _decoder_version(name: str) -> str:
    if name == "dali":
        package = next((p for p in ("nvidia-dali-cuda130", "nvidia-dali-cuda120") if _version(p)), "")
        both = package and _version("nvidia-dali-cuda130") and _version("nvidia-dali-cuda120")
        return f"{package} {_version(package)}{'; the wheel for CUDA 12 is there too: keep one' if both else ''}"
    if name == "turbo":
        return f"simplejpeg {_version('simplejpeg')}"
    features: Any = importlib.import_module("PIL.features")
    kinds = {"WebP": "webp", "AVIF": "avif", "JPEG 2000": "jpg_2000", "TIFF": "libtiff"}
    lacking = [kind for kind, feature in kinds.items() if not features.check(feature)]
    which = f"without {', '.join(lacking)}" if lacking else f"with {', '.join(kinds)}"
    return f"{_version('pillow')}, {which}"


def _workers() -> Check:
    """Start a decoding process, as a run does."""
    with Workers("pillow", threads=1) as decoding:
        decoding.decode([b""], 32, shared((1, 32, 32, 3)))
    if decoding.note:
        advice = "an image that crashes the decoder ends the run here"
        return Check("workers", "without", f"images are decoded in the run's own process: {decoding.note}", advice)
    return Check("workers", "ok", "images are decoded in separate processes")


def _compiler() -> Check:
    if sys.platform != "linux":
        return Check("compiler", "without", "used on Linux only")
    try:
        cpu_max_pool.load()
    except cpu_max_pool.NoKernel as error:
        advice = "apt-get install gcc (or your system's C compiler): CPU training is then up to 1.6 times as fast"
        return Check("compiler", "without", str(error), advice)
    return Check("compiler", "ok", "the CPU kernels are built")


def _wandb() -> Check:
    version = _version("wandb")
    if not version:
        return Check("W&B", "without", "not installed: runs are not recorded there", "pip install wandb")
    mode = os.environ.get("WANDB_MODE", "")
    if mode in ("disabled", "offline"):
        return Check("W&B", "ok", f"wandb {version}, {mode} by WANDB_MODE")
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        known = bool(os.environ.get("WANDB_API_KEY")) or in_netrc(address)
    except ValueError as error:
        return Check("W&B", "wrong", f"WANDB_BASE_URL is not a URL: {first_line(error)}", "correct or unset it")
    if known:
        return Check("W&B", "ok", f"wandb {version}, logged in at {address}")
    return Check("W&B", "without", f"wandb {version}, not logged in: runs are recorded offline", "wandb login")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
