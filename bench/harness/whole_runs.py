"""Whole runs as commands, ours and the baselines', each in a process of its own."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness.timing import environment_of_torch, ratios

ROOT = Path(__file__).resolve().parents[2]


class Runs:
    """Commands, each in a process of its own, with the output of every run so far."""

    def __init__(self, folder: Path, photos: Path, device: torch.device, scale: dict[str, Any]) -> None:
        self.folder, self.photos, self.device, self.scale = folder, photos, device, scale
        self.count = itertools.count()
        self.done: dict[str, list[dict[str, Any]]] = {}
        self._settings: dict[str, list[str]] = {}

    def train(self, photos: Path, cache: Path, **options: object) -> dict[str, Any]:
        """Run `fastcnn train` and return its result.json, with the command's wall time as `wall_seconds`."""
        run_dir = self.folder / f"run-{next(self.count)}"
        given = {**{name: self.scale[name] for name in ("epochs", "image_size")}, "device": self.device, **options}
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        script = [ROOT / "scripts" / "train.py", photos, "--run-dir", run_dir, "--quiet", *arguments]
        # Kernels, timings and photos: everything that a first run makes is in the cache folder.
        seconds, _ = run(
            [sys.executable, *script], {**os.environ, "XDG_CACHE_HOME": str(cache), "WANDB_MODE": "disabled"}
        )
        return {**json.loads((run_dir / "result.json").read_text()), "wall_seconds": seconds, "run_dir": str(run_dir)}

    def baseline(self, name: str, split: Path) -> float:
        """Run a baseline with its best settings on the photos of a split and return its seconds."""
        seconds, output = run(
            self._command(name) + self.settings(name) + ["--split", str(split)], environment_of_torch()
        )
        found = json.loads(output.splitlines()[-1])
        steady = found["epochs"][1:] or found["epochs"]
        found["images_per_second"] = statistics.harmonic_mean([row["images_per_second"] for row in steady])
        self.done.setdefault(name, []).append(found)
        return seconds

    def named(self, name: str) -> str:
        """Return a baseline's name with its settings."""
        return " ".join([f"{name}.py", *self.settings(name)])

    def steady(self, ours: list[dict[str, Any]], more: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """Return images/s from the second epoch on, ours (`more` of our runs included) and the baselines', and ratios.

        The ratios are of `ours` and each baseline's runs, taken in turn with them.
        """
        rates = {name: [one["images_per_second"] for one in runs] for name, runs in self.done.items()}
        mine = [1 / result["images_per_second"] for result in ours]
        return {
            "steady_images_per_second": {
                "fastcnn": statistics.median(result["images_per_second"] for result in [*ours, *more]),
                **{name: statistics.median(found) for name, found in rates.items()},
            },
            "steady_over": {
                self.named(name): ratios(mine, [1 / rate for rate in found]) for name, found in rates.items()
            },
        }

    def settings(self, name: str) -> list[str]:
        """Return a baseline's fastest settings as options, tried once."""
        if name not in self._settings:
            compiling = self.device.type == "cuda" or self.scale["try_compile"]
            self._settings[name] = fastest_settings(
                name, self._command(name), environment_of_torch(), compiling=compiling
            )
        return self._settings[name]

    def _command(self, name: str) -> list[str]:
        size, epochs = str(self.scale["image_size"]), str(self.scale["epochs"])
        script = [sys.executable, "-m", f"bench.baselines.{name}", str(self.photos)]
        return [*script, "--image-size", size, "--epochs", epochs]


def fastest_settings(name: str, command: list[str], environment: Mapping[str, str], *, compiling: bool) -> list[str]:
    """Return a baseline's fastest settings as options. compiling: whether compilation is tried.

    Trying it out takes a minute on two cores, and it has never won there (docs/notes.md).
    """
    left_out = ["--compile", "off"] if name == "tuned" and not compiling else []
    _, output = run([*command, "--probe", *left_out], environment)
    found = json.loads(output.splitlines()[-1])
    return [f"--{key.replace('_', '-')}={value}" for key, value in found.items()]


def run(command: list[Any], environment: Mapping[str, str]) -> tuple[float, str]:
    """Return the seconds and the output of a command in an environment."""
    start = time.perf_counter()
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - start, done.stdout


def stages(results: list[dict[str, Any]]) -> dict[str, float]:
    """Return the median seconds of each stage; `start` is what the command took before the first of them."""
    found = {
        stage: statistics.median(result["seconds"][stage] for result in results) for stage in results[0]["seconds"]
    }
    found["start"] = statistics.median(result["wall_seconds"] - result["seconds"]["total"] for result in results)
    return found


def to_first_step(results: list[dict[str, Any]]) -> float:
    """Return the median seconds from the start of the command to the first step."""
    before = ("import", "scan", "decode", "upload", "compile")
    return float(
        statistics.median(
            result["wall_seconds"] - result["seconds"]["total"] + sum(result["seconds"][stage] for stage in before)
            for result in results
        )
    )
