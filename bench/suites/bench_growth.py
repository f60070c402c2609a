"""Runs over more and more photos and at larger and larger batches: seconds a photo by stage, and peak memory."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench.baselines.seed import split_photos
from bench.harness.race import SCALES, Race
from bench.harness.whole_runs import Runs, stages
from bench.report.record import photo_seconds


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """List the sizes of the growing runs."""
    scale = SCALES[metafunc.config.getoption("--scale")]
    for name in ("growth_photos", "growth_batches"):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, scale[name])


def bench_photos(race: Race, runs: Runs, growth_photos: int, tmp_path: Path) -> None:
    """An epoch from a cold cache over more and more photos."""
    grown(race, runs, tmp_path, num_photos=growth_photos, batch=32, epochs=1, grows="photos")


def bench_batches(race: Race, runs: Runs, growth_batches: int, tmp_path: Path) -> None:
    """Two epochs at larger and larger batches, of three steps at least."""
    # Four in five are trained on.
    num_photos = max(race.scale["growth_photos"][0], 4 * growth_batches)
    grown(race, runs, tmp_path, num_photos=num_photos, batch=growth_batches, epochs=2, grows="batch")


def grown(race: Race, runs: Runs, folder: Path, *, num_photos: int, batch: int, epochs: int, grows: str) -> None:
    """Run once over so many photos and keep what it took."""
    photos = linked(runs.photos, num_photos, folder / "photos")
    results: list[dict[str, Any]] = []
    race(
        f"{num_photos:,} photos, batch {batch}, {epochs} epoch{'s' * (epochs > 1)}",
        lambda: results.append(runs.train(photos, folder / "cache", epochs=epochs, batch_size=batch)),
        {},
        images=num_photos * epochs,
        rounds=1,
        warm_up=False,
        grows=grows,
        num_photos=num_photos,
        batch=batch,
    )
    (result,) = results
    assert result["num_decoded"] == num_photos
    seconds = stages(results)
    race.note(
        stages=seconds,
        photo_seconds=photo_seconds(seconds, num_photos),
        steady_images_per_second=result["images_per_second"],
        peak_memory_bytes=result["peak_memory_bytes"],
        bytes_per_photo=3 * race.scale["image_size"] ** 2,
    )


def linked(photos: Path, count: int, out: Path) -> Path:
    """Return a folder of `count` photos by class: those of another folder under more names."""
    names, *listed = split_photos(photos, seed=0)
    classes = [[path for path, found in itertools.chain(*listed) if found == label] for label in range(len(names))]
    for number in range(count):
        turn, label = divmod(number, len(classes))
        source = classes[label][turn % len(classes[label])]
        target = out / source.parent.name / f"{turn:06}{source.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:  # another file system
            shutil.copyfile(source, target)
    return out
