"""Fixtures of the benchmarks: sizes, photos, and a race that is timed in turn with its baselines (A B A B).

python -m pytest bench/suites/bench_step.py --scale quick  # one of them; `fastcnn bench` runs all and writes a report
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.harness import json_lines, machine
from bench.harness.race import SCALES, Race
from bench.harness.whole_runs import Runs
from fastcnn.network.kernels import cpu_max_pool
from fastcnn.system.device import describe_hardware, versions
from fastcnn.system.switches import torch_settings

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that `fastcnn bench` passes on."""
    group = parser.getgroup("fastcnn")
    group.addoption("--scale", choices=list(SCALES), default="full")
    group.addoption("--photos", type=Path, help="a folder of photos by class; left out, generated ones")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--lines", type=Path, help="a file that gets a JSON line a benchmark as it ends")
    group.addoption("--budget", type=float, default=float("inf"), help="seconds after which the rest is skipped")


OUTCOMES: dict[str, list[dict[str, str]]] = {"skipped": [], "failed": []}


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Show no dots between the lines that `race` prints."""
    shown = report.when == "call" or report.skipped
    return None if report.failed else (report.outcome if shown else "", "", "")


def pytest_runtest_logreport(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Keep what was left out and why, and what failed."""
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        OUTCOMES["skipped"].append({"name": report.nodeid, "reason": reason.removeprefix("Skipped: ")})
    elif report.failed:
        OUTCOMES["failed"].append({"name": report.nodeid})


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Keep the files that could not be read: a package that they need is missing, say."""
    pytest_runtest_logreport(report)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Keep what the figures depend on; host and user names are not among it."""
    device, scale = torch.device(config.getoption("--device")), config.getoption("--scale")
    output_json["machine_info"] = {
        "hardware": describe_hardware(device),
        "versions": versions(),
        "rates": machine.rates(device),
    }
    output_json["settings"] = {"scale": scale, "device": str(device), **SCALES[scale]}
    output_json.update(OUTCOMES)


@pytest.fixture(scope="session")
def scale(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The sizes to measure at."""
    return SCALES[request.config.getoption("--scale")]


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the network runs."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session", autouse=True)
def _settings(device: torch.device) -> Iterator[None]:
    """Measure with the settings of a run, in a process whose kernels are built."""
    if device.type == "cpu":
        cpu_max_pool.load()
    with torch_settings(device, threads=None, deterministic=False):
        yield


STARTED = time.perf_counter()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what comes after the time is up: before its fixtures, which train and compile."""
    if time.perf_counter() - STARTED > item.config.getoption("--budget"):
        pytest.skip("out of time")


@pytest.fixture(scope="session")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what the benchmarks make."""
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="session")
def photos(request: pytest.FixtureRequest, work_dir: Path, scale: dict[str, Any]) -> Path:
    """A folder of photos of real size: generated ones in 10 classes, or the user's own."""
    own: Path | None = request.config.getoption("--photos")
    if own:
        return own.resolve()
    folder = work_dir / f"photos-{scale['num_photos']}"
    importlib.import_module("make_dataset").make(folder, classes=10, photos=scale["num_photos"], seed=0)
    return folder


@pytest.fixture(scope="session")
def runs(photos: Path, device: torch.device, scale: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Whole runs as commands."""
    return Runs(tmp_path_factory.mktemp("runs"), photos, device, scale)


@pytest.fixture
def race(benchmark: Any, device: torch.device, scale: dict[str, Any], request: pytest.FixtureRequest) -> Iterator[Race]:
    """Race that times a contender against baselines. Its figures are written when the benchmark ends, too."""
    benchmark.group = request.module.__name__.rpartition("bench_")[2]
    yield Race(benchmark, device, scale)
    lines: Path | None = request.config.getoption("--lines")
    if lines and benchmark.stats:
        row = {"group": benchmark.group, "name": benchmark.name, "seconds": benchmark.stats.stats.data}
        json_lines.append(lines, {**row, **benchmark.extra_info})
