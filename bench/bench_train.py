"""Whole runs, from the start of the command to its end: over the baselines, by stage, and as photos and batch grow."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.conftest import SCALES, Race
from bench.timing import ratios

ROOT = Path(__file__).resolve().parents[1]
BASELINES = ("seed", "tuned")
PEERS = {"timm_loader": "timm", "ultralytics_classify": "ultralytics"}
"""Baselines that need a package: raced in the full form, where it is installed."""
SHOWN = {"True": "on", "False": "off"}


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
        given = {
            "epochs": self.scale["epochs"],
            "image_size": self.scale["image_size"],
            "device": self.device,
            **options,
        }
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        script = [ROOT / "scripts" / "train.py", photos, "--run-dir", run_dir, "--quiet", *arguments]
        # Kernels, timings and photos: everything that a first run makes is in the cache folder.
        seconds, _ = run([sys.executable, *script], {"XDG_CACHE_HOME": str(cache), "WANDB_MODE": "disabled"})
        return {**json.loads((run_dir / "result.json").read_text()), "wall_seconds": seconds, "run_dir": str(run_dir)}

    @property
    def baselines(self) -> list[str]:
        """Return the names of the baselines to race."""
        full = self.scale is SCALES["full"]
        return [*BASELINES, *(name for name, package in PEERS.items() if full and importlib.util.find_spec(package))]

    def baseline(self, name: str, split: Path) -> float:
        """Run a baseline with its best settings on the photos of a split and return its seconds."""
        seconds, output = run(self._command(name) + self.settings(name) + ["--split", str(split)], {})
        found = json.loads(output.splitlines()[-1])
        steady = found["epochs"][1:] or found["epochs"]
        found["images_per_second"] = statistics.harmonic_mean([row["images_per_second"] for row in steady])
        self.done.setdefault(name, []).append(found)
        return seconds

    def settings(self, name: str) -> list[str]:
        """Return a baseline's fastest settings as options, tried once."""
        if name not in self._settings:
            # Trying out compilation takes a minute on two cores, and it has never won there (docs/notes.md).
            compiling = name == "tuned" and (self.device.type == "cuda" or self.scale is SCALES["full"])
            left_out = [] if compiling or name != "tuned" else ["--compile", "off"]
            _, output = run([*self._command(name), "--probe", *left_out], {})
            found = json.loads(output.splitlines()[-1])
            self._settings[name] = [
                f"--{key.replace('_', '-')}={SHOWN.get(str(value), value)}" for key, value in found.items()
            ]
        return self._settings[name]

    def _command(self, name: str) -> list[str]:
        size, epochs = str(self.scale["image_size"]), str(self.scale["epochs"])
        script = [sys.executable, "-m", f"bench.baselines.{name}", str(self.photos)]
        return [*script, "--image-size", size, "--epochs", epochs]


def run(command: list[Any], environment: dict[str, str]) -> tuple[float, str]:
    """Return the seconds and the output of a command."""
    start = time.perf_counter()
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - start, done.stdout


@pytest.fixture(scope="module")
def runs(photos: Path, device: torch.device, scale: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The commands."""
    pytest.importorskip("yaml")
    return Runs(tmp_path_factory.mktemp("runs"), photos, device, scale)


def bench_run(race: Race, runs: Runs, tmp_path: Path) -> None:
    """From JPEGs and empty caches to the trained model, over the baselines; then the same again, warm."""
    ours: list[dict[str, Any]] = []
    # The first also settles who trains on what: the baselines get its split.
    first = runs.train(runs.photos, tmp_path / "cold", epochs=1)
    split = Path(first["run_dir"]) / "split.csv"

    def cold() -> None:
        ours.append(runs.train(runs.photos, tmp_path / f"cache-{len(ours)}"))

    def baseline(name: str) -> Callable[[], float]:
        return lambda: runs.baseline(name, split)

    epochs, rounds = race.scale["epochs"], race.scale["train_rounds"]
    race(
        "cold start to the end",
        cold,
        {named(name, runs): baseline(name) for name in runs.baselines},
        images=first["num_train"] * epochs,
        rounds=rounds,
        warm_up=False,
        num_photos=first["num_train"] + first["num_val"] + first["num_test"],
        epochs=epochs,
    )
    warm = [runs.train(runs.photos, tmp_path / f"cache-{number}") for number in range(rounds)]
    assert all(result["num_decoded"] == 0 for result in warm)
    assert all(result["num_decoded"] > 0 for result in ours)
    steady = [1 / result["images_per_second"] for result in ours]
    theirs = {name: [1 / found["images_per_second"] for found in runs.done[name]] for name in runs.baselines}
    race.note(
        stages={"cold": stages(ours), "warm": stages(warm)},
        seconds_to_first_step={"cold": to_first_step(ours), "warm": to_first_step(warm)},
        steady_images_per_second={
            "fastcnn": statistics.median(result["images_per_second"] for result in ours + warm),
            **{name: statistics.median(1 / rate for rate in rates) for name, rates in theirs.items()},
        },
        steady_over={named(name, runs): ratios(steady, rates) for name, rates in theirs.items()},
        val_accuracy={
            "fastcnn": statistics.median(result["val_accuracy"] for result in ours + warm),
            **{
                name: statistics.median(
                    max(row["val_accuracy"] for row in found["epochs"]) for found in runs.done[name]
                )
                for name in runs.baselines
            },
        },
        engine=ours[0]["engine"],
        precision=ours[0]["precision"],
        decoder=ours[0]["decoder"],
        baseline_seconds={
            name: statistics.median(found["seconds"] for found in runs.done[name]) for name in runs.baselines
        },
    )


def named(name: str, runs: Runs) -> str:
    """Return a baseline's name with its settings."""
    return " ".join([f"{name}.py", *runs.settings(name)])


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
    return statistics.median(
        result["wall_seconds"] - result["seconds"]["total"] + sum(result["seconds"][stage] for stage in before)
        for result in results
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """List the sizes of the growing runs."""
    scale = SCALES[metafunc.config.getoption("--scale")]
    for name in ("growth_photos", "growth_batches"):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, scale[name])


def bench_photos(race: Race, runs: Runs, growth_photos: int, tmp_path: Path) -> None:
    """An epoch from a cold cache over more and more photos: seconds a photo by stage, and peak memory."""
    folder = linked(runs.photos, growth_photos, tmp_path / "photos")
    results: list[dict[str, Any]] = []
    race(
        f"{growth_photos:,} photos, batch 32",
        lambda: results.append(runs.train(folder, tmp_path / "cache", epochs=1)),
        {},
        images=growth_photos,
        rounds=1,
        warm_up=False,
    )
    note_growth(race, results[0], growth_photos, 32)


def bench_batches(race: Race, runs: Runs, growth_batches: int, tmp_path: Path) -> None:
    """An epoch at larger and larger batches."""
    results: list[dict[str, Any]] = []
    photos = max(race.scale["growth_photos"][0], 3 * growth_batches)
    folder = linked(runs.photos, photos, tmp_path / "photos")
    race(
        f"{photos:,} photos, batch {growth_batches}",
        lambda: results.append(runs.train(folder, tmp_path / "cache", epochs=2, batch_size=growth_batches)),
        {},
        images=photos * 2,
        rounds=1,
        warm_up=False,
    )
    note_growth(race, results[0], photos, growth_batches)


def note_growth(race: Race, result: dict[str, Any], num_photos: int, batch: int) -> None:
    """Keep what grows."""
    race.note(
        num_photos=num_photos,
        batch=batch,
        stages=stages([result]),
        steady_images_per_second=result["images_per_second"],
        peak_memory_bytes=result["peak_memory_bytes"],
        bytes_per_photo=3 * race.scale["image_size"] ** 2,
    )


def linked(photos: Path, count: int, out: Path) -> Path:
    """Return a folder of `count` photos by class: those of another folder under more names (hard links)."""
    folders = sorted((photos / "train" if (photos / "train").is_dir() else photos).iterdir())
    classes = [[path for path in sorted(folder.iterdir()) if path.is_file()] for folder in folders if folder.is_dir()]
    for number in range(count):
        label, turn = number % len(classes), number // len(classes)
        source = classes[label][turn % len(classes[label])]
        target = out / source.parent.name / f"{turn:06}{source.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, target)
    return out
