"""Phase 1, does it run: versions and rates of the machine, the cuda tests, and a table of steps by engine."""

from __future__ import annotations

import concurrent.futures
import functools
import importlib.util
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.harness import machine
from bench.harness.step_setup import make_step, num_images, random_feed, run_steps
from bench.harness.timing import seconds_a_step
from bench.proof.lines import NO_TIME, Line, NotHere, Proof
from fastcnn.system.device import describe_hardware, peak_memory_bytes, pick_precision, versions
from fastcnn.system.switches import torch_settings
from fastcnn.training.engines import Engine, NoEngine
from fastcnn.training.step import TrainingStep

ROOT = Path(__file__).resolve().parents[2]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
REFERENCE, SMALL = (128, (32,) * 5), (32, (8,) * 5)
"""Image size and filters of the network in both forms."""
PACKAGES = "pytest xdist pytest_timeout pytest_benchmark triton nvidia.dali nvidia.nvimgcodec simplejpeg platformdirs"
PACKAGES += " pydantic yaml click rich wandb matplotlib torchvision scipy"
PROCESSES = 6
FILE_SECONDS = 75.0  # of a file of tests, where a single test cannot be limited
TABLE = ("eager", "graphed", "hybrid+graphed", "graphed, 8 a replay", "hybrid+graphed, 8 a replay", "compiled+graphed")
"""Engines of the table, those that take long to build last."""


def versions_here(proof: Proof) -> None:
    """Write the hardware, the versions and the packages that are missing."""

    def found() -> Line:
        missing = [name for name in PACKAGES.split() if not installed(name)]
        driver = torch.cuda.get_device_properties(0) if ON_GPU else "none"
        return {
            "hardware": describe_hardware(DEVICE),
            "versions": versions(),
            "missing": missing,
            "gpu": str(driver),
            "cudnn": torch.backends.cudnn.version(),
        }

    proof.measure("versions", found)


def installed(name: str) -> bool:
    """Return whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def rates_here(proof: Proof) -> None:
    """Write copy bandwidth and matrix rates, on a GPU those of fp16 and TF32 too."""

    def found() -> Line:
        rates = dict(machine.rates(DEVICE))
        if ON_GPU:
            rates["fp16_flop_per_second"] = machine.matrix_rate(torch.float16, DEVICE)
            with torch_settings(DEVICE, threads=None, deterministic=False, tf32=True):
                rates["tf32_flop_per_second"] = machine.matrix_rate(torch.float32, DEVICE)
        return rates

    proof.measure("rates", found)


def cuda_tests(proof: Proof) -> None:
    """Run the cuda tests, but for those of the kernels."""
    marks = "not long" if proof.small else "cuda and not long"
    run_tests(proof, [file for file in test_files(proof) if "network" not in file.parts], marks)


def kernel_tests(proof: Proof) -> None:
    """Run the tests of the kernels: on a GPU all, which compare them with plain layers there.

    Last, as one that goes astray may take the GPU with it.
    """
    marks = "not long" if proof.small or ON_GPU else "cuda and not long"
    run_tests(proof, [file for file in test_files(proof) if "network" in file.parts], marks)


def test_files(proof: Proof) -> list[Path]:
    """Return the files with cuda tests; in the small form, which may have no GPU, a few short ones."""
    planted = [Path(name) for name in os.environ.get("FASTCNN_PROOF_TESTS", "").split(os.pathsep) if name]
    if proof.small:
        names = ("system/test_device", "system/test_text", "training/test_optim", "network/test_model")
        return [*planted, *(ROOT / "tests" / f"{name}.py" for name in names)]
    mark = "pytest.mark.cuda"
    return [*planted, *(path for path in sorted((ROOT / "tests").rglob("test_*.py")) if mark in path.read_text())]


def run_tests(proof: Proof, files: Sequence[Path], marks: str) -> None:
    """Run test files on six processes, each test or, without pytest-timeout, each file under a limit.

    Warnings are no errors: another torch than the pinned one may have its own.
    """
    if not installed("pytest"):
        proof.write("tests", "skipped", reason="pytest is not installed")
        return
    options = ["-q", "-W", "default", "-p", "no:cacheprovider", "-p", "bench.proof.pytest_lines", "-rf"]
    options += ["--benchmark-disable"] if installed("pytest_benchmark") else []
    options += ["-m", marks]
    if spread := installed("xdist"):
        options += ["-n", str(2 if proof.small else PROCESSES)]
    if installed("pytest_timeout"):
        groups, options = [list(files)], [*options, "--timeout=90"]
    else:
        groups = [[file] for file in files]
    # Without xdist the files themselves run beside each other.
    with concurrent.futures.ThreadPoolExecutor(1 if spread else PROCESSES) as pool:
        list(pool.map(lambda group: _pytest(proof, options, group), groups))


def _pytest(proof: Proof, options: Sequence[str], files: Sequence[Path]) -> None:
    """Run some files in a process group of their own, ended when its time is over."""
    figure, left = f"tests of {', '.join(path.stem for path in files)}", proof.seconds_left() - 3
    if left < 8:
        proof.write(figure, "skipped", reason=NO_TIME)
        return
    limit = min(left, FILE_SECONDS if len(files) == 1 else left)
    command = [sys.executable, "-m", "pytest", *options, *map(str, files)]
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as process:
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            if limit == left:
                proof.write(figure, "skipped", reason=NO_TIME)
            else:
                proof.write(figure, "failed", reason=f"took more than {limit:.0f} s: the test that hangs has no line")
            return
    if code not in (0, 1, 5):  # 1: tests failed, and each has its line; 5: all have passed before
        proof.write(figure, "failed", reason=f"pytest ended with exit code {code}")
    else:
        proof.write(figure, "measured")


def step_table(proof: Proof) -> None:
    """Write the rate of a step by engine, batch and precision, without rivals."""
    from bench.suites.bench_step import ENGINES

    best = pick_precision("auto", DEVICE, deterministic=False, strict=False)
    shapes = [("bf16", 32), ("bf16", 2048), ("bf16", 256), ("fp16", 32), ("fp32", 32)]
    shapes += [("fp16", 2048), ("fp16", 256)]
    if not ON_GPU or proof.small:
        shapes = [(best, 8), ("fp32", 8)]
    for engine in TABLE:
        for precision, batch in shapes if engine in ENGINES else []:
            work = functools.partial(step_rate, engine, precision, batch, small=proof.small)
            least = 25.0 if "compiled" in engine else 5.0
            proof.measure(f"step: {engine}, {precision}, batch {batch}", work, limit=90.0, least=least)


def step_rate(name: str, precision: str, batch: int, *, small: bool) -> Line:
    """Return images a second of an engine on the reference network (a tiny one in the small form): five slices."""
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with torch_settings(DEVICE, threads=None, deterministic=False):
        step, engine, build_seconds = built(name, batch, small=small, precision=precision)
        found = slices(functools.partial(run_steps, step, engine), batch, 0.02 if small else 0.2)
        loss = step.sums.read().loss
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss}")
    return {**found, "build_seconds": round(build_seconds, 2), "peak_memory_bytes": peak_memory_bytes(DEVICE)}


def built(name: str, batch: int, *, small: bool, precision: str = "") -> tuple[TrainingStep, Engine, float]:
    """Return a step, its engine and the seconds that building this took. Raises NotHere for an engine not to be had."""
    from bench.suites.bench_step import ENGINES

    if "graphed" in name and not ON_GPU:  # before anything is compiled for it
        raise NotHere("CUDA graphs need an NVIDIA GPU")
    torch._dynamo.reset()
    step, start = step_of(batch, small=small, precision=precision), time.perf_counter()
    try:
        return step, ENGINES[name](step), time.perf_counter() - start
    except NoEngine as error:
        raise NotHere(str(error)) from None


def step_of(batch: int, *, small: bool, precision: str = "") -> TrainingStep:
    """Return a step of the reference network, or of a tiny one; precision: left out, the machine's best."""
    size, filters = SMALL if small else REFERENCE
    precision = precision or pick_precision("auto", DEVICE, deterministic=False, strict=False)
    return make_step(random_feed(DEVICE, num_images(DEVICE, batch), size), filters, batch, precision)


def slices(run: Callable[[int], object], batch: int, seconds: float = 0.2) -> Line:
    """Return images a second of what runs a number of steps, over five slices of so many seconds."""
    found = seconds_a_step(run, seconds, DEVICE)
    return {
        "images_per_second": round(batch / statistics.median(found), 1),
        "step_us": [round(1e6 * chosen(found), 2) for chosen in (min, statistics.median, max)],
    }
