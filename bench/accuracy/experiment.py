"""The photos on which contenders are compared, and what all of them have in common."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.accuracy.contenders import PEERS, PEERS_PYTHON, Contender
from bench.harness.timing import environment_of_torch
from bench.harness.whole_runs import ROOT
from fastcnn.data.index import Index
from fastcnn.data.split import SPLITS
from fastcnn.data.split_file import write_split

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
        """Return the command that trains a contender on the photos of a split.csv.

        run_dir: of a recipe. A recipe of smaller photos keeps them.
        """
        size = min(self.image_size, contender.recipe.get("image_size", self.image_size))
        options = [f"--epochs={contender.epochs}", f"--seed={seed}", f"--split={split}", f"--image-size={size}"]
        options += [f"--{option.replace('_', '-')}" for option in contender.options]
        if contender.is_recipe:
            start = [sys.executable, str(ROOT / "scripts" / "train.py")]
            options += [f"--recipe={contender.name}", f"--run-dir={run_dir}", f"--device={self.device}"]
        else:
            python = str(PEERS_PYTHON) if contender.name in PEERS else sys.executable
            start = [python, "-m", f"bench.baselines.{contender.script}"]
        return [*start, str(self.data), *options]


def write_held_out(path: Path, index: Index, splits: npt.NDArray[np.uint8]) -> int:
    """Write a split.csv that validates on the test photos of a split, too; return how many photos it validates on."""
    held_out = splits != SPLITS.index("train")
    write_split(path, index, np.where(held_out, SPLITS.index("val"), splits))
    return int(held_out.sum())
