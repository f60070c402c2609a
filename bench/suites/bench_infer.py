"""The exported model: latency of one photo (median, p99) and photos a second, by format, over the eager model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.harness.race import Race
from bench.harness.timing import clocked
from fastcnn.config import Config
from fastcnn.export.exporters import EXPORTERS, export_run
from fastcnn.inference import artefact
from fastcnn.network.inference_network import Deployed
from fastcnn.network.small_cnn import restore
from fastcnn.runs.fit import fit
from fastcnn.storage import checkpoint


@pytest.fixture(scope="module")
def run_dir(photos: Path, scale: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to export."""
    folder = tmp_path_factory.mktemp("infer")
    config = Config(
        data=str(photos), epochs=1, image_size=scale["image_size"], device="cpu", cache_dir=str(folder / "cache")
    )
    return fit(config, run_dir=folder / "run").run_dir


@pytest.fixture(scope="module")
def eager(run_dir: Path) -> Deployed:
    """The trained network as it is in Python, with the same preprocessing."""
    state = checkpoint.load(run_dir / "best.pt")
    config = state["config"]
    return Deployed(restore(state), config["image_size"], config["mean"], config["std"], state["classes"]).eval()


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("format", EXPORTERS)
def bench_format(race: Race, run_dir: Path, eager: Deployed, format: str, batch: int) -> None:
    """Ours, on the CPU."""
    size = race.scale["image_size"]
    model = artefact.open(export_run(run_dir, format=format))
    images = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)

    def baseline() -> torch.Tensor:
        with torch.inference_mode():
            return eager(torch.from_numpy(images))  # type: ignore[no-any-return]

    timed = clocked(baseline, torch.device("cpu"))

    def alone() -> float:
        time.sleep(0.02)  # onnxruntime's threads look for more work for a while, on the cores that this needs
        return timed()

    rounds = race.scale["infer_rounds"][batch]
    for _ in range(10):  # TorchScript specialises itself in its first calls
        model.probabilities(images)
    seconds = race(
        f"{format}, batch {batch}",
        lambda: model.probabilities(images),
        {"the eager model": alone},
        images=batch,
        rounds=rounds,
    )
    race.note(
        format=format,
        batch=batch,
        median_milliseconds=float(np.median(seconds) * 1e3),
        p99_milliseconds=float(np.quantile(seconds, 0.99) * 1e3),
    )
    np.testing.assert_allclose(model.probabilities(images), baseline().numpy(), atol=1e-4)
