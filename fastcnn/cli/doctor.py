"""What this machine has for fastcnn, and what to install for what it lacks."""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

import torch

import pipelines
from fastcnn.data.cache import default_folder
from fastcnn.errors import first_line
from fastcnn.network.kernels import cpu_max_pool as pool
from fastcnn.runs import wandb_tracker
from fastcnn.storage.files import free_bytes
from fastcnn.system.device import describe_hardware, free_memory_bytes, has_bf16
from pipelines.workers import Workers, shared

LITTLE_DISK, LITTLE_MEMORY = 5 * 2**30, 2 * 2**30  # bytes: below them even a small set may not fit

State = Literal["ok", "without", "wrong"]
"""without: a run does without it, slower or with less. wrong: what is there cannot be used."""


@dataclass(frozen=True)
class Line:
    """One thing that a run may use."""

    what: str
    state: State
    found: str
    advice: str = ""
    """What to do, "" where there is nothing to do."""


def examine(cache_dir: str | Path | None = None) -> list[Line]:
    """Return a line a thing. Nothing is installed, and nothing asked of a network."""
    return [*_machine(cache_dir), *_gpu(), *_decoders(), _workers(), _compiler(), _wandb()]


def table(lines: list[Line]) -> str:
    """Return the lines as text, advice below what it is about."""
    width = max(len(line.what) for line in lines)
    rows = []
    for line in lines:
        rows.append(f"{line.what:<{width}}  {line.state:<7}  {line.found}")
        if line.advice:
            rows.append(f"{'':<{width}}  {'':<7}  -> {line.advice}")
    return "\n".join(rows)


def to_dict(lines: list[Line]) -> list[dict[str, str]]:
    """Return the lines as plain data."""
    return [asdict(line) for line in lines]


def _machine(cache_dir: str | Path | None) -> Iterator[Line]:
    facts = describe_hardware(torch.device("cpu"))
    yield Line("fastcnn", "ok", f"{_version('fastcnn')} on Python {platform.python_version()}")
    bf16 = "bf16" if has_bf16(torch.device("cpu")) else "no bf16: fp32"
    where = f"{facts['system']} {facts['machine']}"
    yield Line("processor", "ok", f"{facts.get('cpu', where)}, {facts['cores']} cores, {bf16}; {where}")
    free = free_memory_bytes(torch.device("cpu"))
    little = free < LITTLE_MEMORY
    advice = "free some: photos that do not fit are read from the disk while training" if little else ""
    yield Line("memory", "without" if little else "ok", f"{free / 2**30:,.1f} GiB free", advice)
    folder = default_folder(cache_dir)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free, writable = free_bytes(folder), os.access(there, os.W_OK)
    state: State = "wrong" if not writable else "without" if free < LITTLE_DISK else "ok"
    advice = {
        "wrong": f"{folder} cannot be written: choose another folder with --cache-dir",
        "without": "10,000 photos of 128 px need 0.5 GiB: `fastcnn cache clear`, or another disk with --cache-dir",
        "ok": "",
    }[state]
    yield Line("disk", state, f"{free / 2**30:,.1f} GiB free for the cache in {folder}", advice)


def _gpu() -> Iterator[Line]:
    """Yield torch, GPU and driver: each may be there without the other."""
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
        yield Line("torch", "wrong", found, advice)
    else:
        yield Line("torch", "ok", found)
    if seen:
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        yield Line("GPU", "ok", f"{', '.join(names)} ({memory:,.0f} GiB)")
    elif driver:
        yield Line("GPU", "wrong", f"{driver['name']}, which torch does not see")
    elif torch.backends.mps.is_available():
        yield Line("GPU", "ok", "Metal (--device mps; not tested)")
    else:
        yield Line("GPU", "without", "no NVIDIA GPU: training runs on the CPU")
    if driver:
        yield Line("driver", "ok", f"{driver['driver']}, for CUDA up to {driver['cuda']}")
    elif Path("/proc/driver/nvidia").exists():
        yield Line("driver", "wrong", "loaded, but nvidia-smi does not answer", "reinstall the driver, or reboot")
    if seen and util.find_spec("triton") is None:
        yield Line("triton", "without", "not installed: no compiled engine on the GPU", "pip install triton")


def _driver() -> dict[str, str]:
    """Return name, driver and cuda that nvidia-smi tells of, {} where it does not answer."""
    try:
        plain = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30, check=True).stdout
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    name, _, driver = next(iter(names.splitlines()), "").rpartition(", ")
    cuda = re.search(r"CUDA Version: *([\d.]+)", plain)
    return {"name": name, "driver": driver, "cuda": cuda[1] if cuda else "an unknown version"} if name else {}


def _decoders() -> Iterator[Line]:
    gpu = torch.cuda.is_available()
    for name, what in (("dali", "DALI"), ("turbo", "libjpeg-turbo"), ("pillow", "Pillow")):
        try:
            pipelines.choose(name, gpu=gpu)
        except pipelines.DecoderUnavailable as error:
            why, _, advice = error.why.rpartition("; ")
            if name == "dali" and not gpu:
                yield Line(what, "without", f"{why}; without a GPU it is not needed")
            else:
                yield Line(what, "without" if name != "pillow" else "wrong", why, advice)
            continue
        yield Line(what, "ok", _decoder_version(name))


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


def _workers() -> Line:
    """Start a worker process, as decoding does."""
    with Workers("pillow", threads=1) as decoding:
        decoding.decode([b""], 32, shared((1, 32, 32, 3)))
    if decoding.note:
        advice = "a photo of which the decoder dies ends the run here"
        return Line("workers", "without", f"photos are decoded in the run's own process: {decoding.note}", advice)
    return Line("workers", "ok", "photos are decoded in processes of their own")


def _compiler() -> Line:
    if sys.platform != "linux":
        return Line("compiler", "without", "used on Linux only")
    try:
        pool.load()
    except pool.NoKernel as error:
        advice = "apt-get install gcc (or your system's C compiler): CPU training is then up to 1.6 times as fast"
        return Line("compiler", "without", str(error), advice)
    return Line("compiler", "ok", "the CPU kernels are built")


def _wandb() -> Line:
    version = _version("wandb")
    if not version:
        return Line("W&B", "without", "not installed: nothing is recorded there", "pip install wandb")
    mode = os.environ.get("WANDB_MODE", "")
    if mode in ("disabled", "offline"):
        return Line("W&B", "ok", f"wandb {version}, {mode} by WANDB_MODE")
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        known = bool(os.environ.get("WANDB_API_KEY")) or wandb_tracker.in_netrc(address)
    except ValueError as error:
        return Line("W&B", "wrong", f"WANDB_BASE_URL is no address: {first_line(error)}", "mend or unset it")
    if known:
        return Line("W&B", "ok", f"wandb {version}, logged in at {address}")
    return Line("W&B", "without", f"wandb {version}, not logged in: runs are recorded offline", "wandb login")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
