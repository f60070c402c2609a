"""What result.json says of memory, and that the photos' pixels are in memory once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastcnn.config import Config
from fastcnn.data import dataset
from fastcnn.runs.results import STAGES
from fastcnn.storage import checkpoint
from fastcnn.system.stopwatch import OUTSIDE, Stopwatch

LARGE = [
    "--image-size",
    "32",
    "--cache-size",
    "512",
    "--filters",
    "2",
    "--batch-size",
    "4",
    "--limit-train-batches",
    "1",
]


def test_a_stage_has_what_it_raises_the_peak_by() -> None:
    peaks = iter([100, 100, 150, 180, 180, 200])
    watch = Stopwatch(peak_memory=lambda: next(peaks))
    with watch.stage("train"), watch.stage("report"):
        pass
    assert watch.peak_rises() == {"import": 100, OUTSIDE: 20, "train": 50, "report": 30}


def test_the_parts_are_those_of_the_peak(run_dir: Path) -> None:
    result = json.loads((run_dir / "result.json").read_text())
    parts, state = result["memory_bytes"], checkpoint.load(run_dir / "last.pt")
    assert set(parts) == {"pixels", "network_and_optimizer", "peak_by_stage"}
    assert set(parts["peak_by_stage"]) == {*STAGES, OUTSIDE}
    assert sum(parts["peak_by_stage"].values()) == result["peak_memory_bytes"]
    assert parts["pixels"] == 120 * 32 * 32 * 3
    moments = sum(tensor.nbytes for tensor in state["optimizer"].values())
    weights = sum(tensor.nbytes for tensor in state["model"].values())
    assert weights + moments < parts["network_and_optimizer"] < 3 * (weights + moments)
    assert f"pixels {parts['pixels'] / 2**20:,.0f} MiB" in (run_dir / "report.html").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="how Linux counts")
@pytest.mark.parametrize(
    ("loader", "copied", "counted"),
    [
        pytest.param("resident", 120, 120, marks=pytest.mark.long),
        pytest.param("shared", 0, 120, marks=pytest.mark.long),  # the cache's own pages, once for all three splits
        pytest.param("mapped", 58, 58, marks=pytest.mark.long),  # two batches: 4 of 96, 24 of 24, 1 of none
    ],
)
def test_pixels_are_in_memory_once(loader: str, copied: int, counted: int, photos: Path, tmp_path: Path) -> None:
    """A run that finds all photos in the cache checks them there and holds the `copied` ones of them, no more."""
    dataset.prepare(Config(data=str(photos), image_size=32, cache_size=512))
    command = ["train", str(photos), *LARGE, "--loader", loader, "--epochs", "1", "--run-dir", str(tmp_path / "run")]
    subprocess.run([sys.executable, "-m", "fastcnn", *command, "--no-report"], check=True, capture_output=True)
    memory = json.loads((tmp_path / "run" / "result.json").read_text())["memory_bytes"]
    image, rises = 512 * 512 * 3, memory["peak_by_stage"]
    assert memory["pixels"] == counted * image
    assert rises["decode"] + rises["upload"] < (copied + 12) * image  # a tenth of all photos for whatever else
