"""Loaders: training images a second with each, over the resident one, and the decoding rate of a DataLoader.

The first is the cost of not having the photos in memory; the second is what a DataLoader could feed at best, were the
step free.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import pipelines
from bench.baselines import decoding
from bench.harness.race import Race
from bench.harness.step_setup import default_engine, reference_step
from bench.harness.timing import clocked
from fastcnn.config import DataConfig
from fastcnn.data import dataset
from fastcnn.data.dataset import Dataset
from fastcnn.data.loaders import LOADERS, Options
from fastcnn.system.device import num_cores
from fastcnn.training.engines import Engine
from fastcnn.training.step import TrainingStep


@dataclass
class Training:
    """Epochs over a split's training photos with a loader, one a call."""

    step: TrainingStep
    engine: Engine
    num_epochs: int = 0

    def __call__(self) -> None:
        """Train for an epoch."""
        self.num_epochs += 1
        with self.step.feed.start_epoch(0, self.num_epochs) as feed:
            feed.drive(self.engine.run, self.step.num_steps)

    @property
    def images(self) -> int:
        """Photos that an epoch trains on."""
        return self.step.num_steps * self.step.batch_size


@pytest.fixture(scope="module")
def make_data(photos: Path, device: torch.device, scale: dict[str, Any], work_dir: Path) -> Callable[[str], Dataset]:
    """Function that prepares the photos for a loader."""

    def prepare(loader: str) -> Dataset:
        name: Any = loader
        gpu = device.index or 0 if device.type == "cuda" else None
        options = {"image_size": scale["image_size"], "cache_dir": str(work_dir / "cache"), "loader": name}
        return dataset.prepare(DataConfig(data=str(photos), **options), gpu=gpu)

    return functools.cache(prepare)


def train_with(race: Race, loader: str, data: Dataset) -> Training:
    """Return a training with a loader, on the engine that is the default here."""
    options = Options(device=race.device, batch_size=race.scale["batches"][0], decoder=data.decoder)
    step = reference_step(race, LOADERS[loader](data.cache, data.photos("train"), options))
    return Training(step, default_engine(step))


@pytest.mark.parametrize("loader", LOADERS)
def bench_loader(race: Race, loader: str, make_data: Callable[[str], Dataset]) -> None:
    """Ours."""
    ours = train_with(race, loader, make_data(loader))
    resident = train_with(race, "resident", make_data("resident"))
    baselines = {} if loader == "resident" else {"resident": clocked(resident, race.device)}
    if baselines:
        resident()  # warm
    batch = ours.step.batch_size
    race(f"{loader}, batch {batch}", ours, baselines, images=ours.images, loader=loader, batch=batch)
    score = ours.step.sums.read()
    assert score.count == ours.images * ours.num_epochs
    assert math.isfinite(score.loss)
    pipelines.close()


def bench_data_loader(race: Race, make_data: Callable[[str], Dataset]) -> None:
    """Decoding rate of a DataLoader with Pillow, with no step to feed."""
    data = make_data("resident")
    paths = [data.index.root / data.index.paths[photo] for photo in data.photos("train")]
    run = decoding.pillow_loader(paths, race.scale["image_size"], num_cores())
    race(f"DataLoader + Pillow, {num_cores()} workers, no step", run, {}, images=len(paths), peer=True)
    assert len(run()) == len(paths)
