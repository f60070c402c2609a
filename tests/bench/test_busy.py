"""Benchmarks on a busy machine: the processes that compute, and what is made of the runs beside them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.harness import whole_runs
from bench.harness.computing import computing
from bench.harness.race import SCALES, Race
from bench.harness.timing import environment_of_torch
from bench.suites import bench_busy
from fastcnn.system.waiting import BLOCK_TIME, SPIN_COUNT
from tests.bench.test_bench import ROOT, found
from tests.bench.test_race import Timed


def runs_still(process: int) -> bool:
    """Whether a process is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_computes_ends_with_the_benchmark() -> None:
    with pytest.raises(RuntimeError, match="a run failed"), computing(2) as processes:  # noqa: PT012
        assert all(map(runs_still, processes))
        raise RuntimeError("a run failed")
    assert not any(map(runs_still, processes))


KILLED = """
from bench.harness.computing import computing
with computing(1):
    print("begun", flush=True)
    input()
"""


def test_what_computes_ends_when_the_benchmark_is_killed() -> None:
    """It holds the benchmark's standard error, whose end is read only when both are gone."""
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", KILLED], cwd=ROOT, **options) as benchmark:
        assert benchmark.stdout
        assert benchmark.stdout.readline() == b"begun\n"
        benchmark.kill()
        assert benchmark.stderr
        assert benchmark.stderr.read() == b""


class FakeRuns(whole_runs.Runs):
    """Runs whose rates are given; notes the processes that computed beside each."""

    def train(self, photos: Path, cache: Path, **options: object) -> dict[str, Any]:
        return {"run_dir": "run", "num_train": 80, "images_per_second": 200.0, "threads": {"2": 5}, "precision": "bf16"}

    def baseline(self, name: str, split: Path) -> float:
        assert split == Path("run") / "split.csv"
        self.done.setdefault(name, []).append({"images_per_second": 50.0})
        return 2.0

    def settings(self, name: str) -> list[str]:
        return ["--workers=2"]


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Benchmarks of the suite, as pytest-benchmark writes them."""
    monkeypatch.setattr(bench_busy, "Runs", FakeRuns)
    written = []
    for count in (0, 1):
        race = Race(Timed(), torch.device("cpu"), SCALES["quick"])
        runs = FakeRuns(tmp_path, tmp_path, torch.device("cpu"), SCALES["quick"])
        bench_busy.bench_beside(race, runs, tmp_path, count)
        stats = {"median": 1.0, "min": 1.0, "max": 1.0, "rounds": 1}
        name = race.benchmark.name
        written.append({"group": "busy", "name": name, "fullname": name, "stats": stats, "extra_info": {}})
        written[-1]["extra_info"] = race.benchmark.extra_info
    return written


def test_rates_on_a_busy_machine_become_a_table_and_a_picture(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    from bench.report.page import report
    from bench.report.plots import draw
    from bench.report.record import record

    made = record(found(*rows), command="python -m bench --only busy", settings={}, seconds=1.0)
    drawn = draw(made, tmp_path)
    assert drawn["busy.png"] == ""
    page = report(made, tmp_path / "x.json", drawn)
    assert "| quiet | 200 | seed.py --workers=2 | 50 | 4.00 (4.00 to 4.00) | 1 |" in page
    assert "| beside 1 computing process | 200 | seed.py --workers=2 | 50 | 4.00 (4.00 to 4.00) | 1 |" in page


def test_a_baseline_waits_as_torch_does_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """And as the user has set it: what importing fastcnn set is not passed on to it."""
    monkeypatch.setenv("GOMP_SPINCOUNT", str(SPIN_COUNT))
    monkeypatch.setenv("KMP_BLOCKTIME", str(BLOCK_TIME))
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    environment = environment_of_torch()
    assert environment["OMP_WAIT_POLICY"] == "active"
    assert not {"GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & environment.keys()
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert environment_of_torch()["GOMP_SPINCOUNT"] == "7"
