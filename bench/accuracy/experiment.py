"""The photos on which contenders are compared, and what all of them have in common."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.accuracy.contenders import Contender, command
from bench.harness.timing import environment_of_torch
from fastcnn.config import Config
from fastcnn.data import dataset
from fastcnn.data.index import Index

Run = dict[str, Any]
"""Line of the file of runs: what was trained on what (`Experiment.key`, contender, seed, cache), seconds and
processor_seconds of the whole command, train_seconds of its steps, accuracy after the last epoch, and epochs: seconds,
processor_seconds (both since the command started) and accuracy at the end of each. Accuracies are on all photos held
out."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Photos and what all contenders have in common."""

    data: Path
    index: Index
    image_size: int
    device: str
    machine: str
    try_compile: bool

    def environment(self, contender: Contender) -> dict[str, str]:
        """Return the variables of a contender's command. The scripts take a GPU wherever they see one."""
        own = os.environ if contender.is_recipe else environment_of_torch()
        return {**own, "WANDB_MODE": "disabled", **({"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {})}

    @property
    def key(self) -> Run:
        """What runs that may be compared have in common."""
        listed = zip(self.index.paths, self.index.sizes.tolist(), strict=True)
        text = "\n".join(f"{path} {size}" for path, size in listed).encode(errors="surrogateescape")
        return {
            "data": self.data.name,
            "photos": hashlib.sha256(text).hexdigest()[:16],
            "image_size": self.image_size,
            "device": self.device,
            "machine": self.machine,
        }

    def command(self, contender: Contender, split: Path, seed: int, run_dir: Path) -> list[str]:
        """Return the command that trains a contender on the photos of a split.csv."""
        return command(
            contender,
            self.data,
            split=split,
            seed=seed,
            image_size=self.image_size,
            run_dir=run_dir,
            device=self.device,
        )


def prepare(data: Path, *, cache_dir: Path, **common: Any) -> Experiment:
    """Return the experiment on a folder's photos, those that cannot be read left out. Raises FastCNNError."""
    config = Config(data=str(data), image_size=common["image_size"], cache_dir=str(cache_dir))
    return Experiment(data=data, index=dataset.prepare(config).index, **common)
