"""What checksums cost: opening and building a cache, saving and loading a checkpoint, with them and without.

python -m bench.checksums PHOTOS
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from fastcnn import Config
from fastcnn.data import cache, cache_files, index
from fastcnn.network.small_cnn import SmallCNN
from fastcnn.storage import checkpoint
from fastcnn.training.optimizers import Adam
from fastcnn.training.parameters import FlatParameters

ROUNDS = 9


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    photos = parser.parse_args().photos
    with tempfile.TemporaryDirectory() as folder:
        opening(photos, Path(folder))
        building(photos, Path(folder))
        for filters in ((32, 32, 32, 32, 32), (32, 64, 128, 256, 512)):
            saving(filters, Path(folder))


def opening(photos: Path, folder: Path) -> None:
    """Open a whole cache, its rows checked or not."""
    found, checked = index.scan(photos), cache_files.find_damaged
    cache.build(found, image_size=128, decoder="turbo", cache_dir=folder)

    def open_it(check: Callable[..., list[int]]) -> None:
        cache_files.find_damaged = check
        cache.build(found, image_size=128, decoder="turbo", cache_dir=folder)

    compare(f"open {len(found):,} photos", lambda: open_it(checked), lambda: open_it(lambda *arguments: []))
    cache_files.find_damaged = checked


def building(photos: Path, folder: Path) -> None:
    """Decode photos into a cache, their rows summed or not."""
    found = index.scan(photos)
    found = found.take(np.arange(len(found)) < 1500)
    number = 0

    def build(crc: Callable[..., int]) -> None:
        nonlocal number
        number += 1
        vars(cache)["zlib"] = SimpleNamespace(crc32=crc)
        cache.build(found, image_size=128, decoder="turbo", cache_dir=folder / str(number))

    compare(f"build {len(found):,} photos", lambda: build(zlib.crc32), lambda: build(lambda data: 0), rounds=3)
    vars(cache)["zlib"] = zlib


def saving(filters: tuple[int, ...], folder: Path) -> None:
    """Save and load a checkpoint, by `checkpoint` or by torch alone."""
    model = SmallCNN(10, filters=filters)
    optimizer = Adam(FlatParameters(model), 1e-3)
    state: dict[str, Any] = {
        **dict.fromkeys(("epoch", "cursor", "step", "skipped"), 0),
        **{"config": Config(filters=filters).to_dict(), "classes": list("abcdefghij"), "network": model.options},
        **{"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": None, "loss_scale": {}},
        **{"sums": torch.zeros(3), "best": {}, "rows": [], "rng": torch.get_rng_state(), "device_rng": None},
    }
    ours, bare = folder / "ours.pt", folder / "bare.pt"

    def save_bare() -> None:
        with bare.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    compare(f"save {','.join(map(str, filters))}", lambda: checkpoint.save(ours, state), save_bare)
    compare("load it", lambda: checkpoint.load(ours), lambda: torch.load(bare, weights_only=True))


def compare(what: str, checked: Callable[[], object], unchecked: Callable[[], object], rounds: int = ROUNDS) -> None:
    """Time both in turn and print the medians, with the lowest and the highest."""
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(rounds):
        for name, call in (("with", checked), ("without", unchecked)):
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    shown = (
        f"{name} {statistics.median(s) * 1e3:,.1f} ms ({min(s) * 1e3:,.1f} to {max(s) * 1e3:,.1f})"
        for name, s in seconds.items()
    )
    print(f"{what}: {', '.join(shown)}, n = {rounds}", flush=True)


if __name__ == "__main__":
    main()
