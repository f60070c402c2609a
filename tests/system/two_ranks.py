"""What each rank of tests/system/test_ranks.py runs: python two_ranks.py PHOTOS OUT CASE..."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {
    "image_size": 32,
    "cache_size": 40,  # of all cases, so that photos are decoded once
    "filters": (8,),
    "batch_size": 16,
    "precision": "fp64",
    "val_fraction": 0.25,
    "threads": 1,
    "epochs": 2,  # of 5 steps, with photos left over
    "report": False,
}
EVERYTHING: dict[str, Any] = {
    "augment": ("flip", "shift", "crop", "rotate", "colour", "cutout", "mixup", "cutmix"),
    "dropout": 0.3,
    "ema": 0.9,
    "label_smoothing": 0.1,
    "optimizer": "adamw",
    "weight_decay": 0.01,
    "schedule": "onecycle",
    "clip_norm": 1.0,
    "on_nan": "skip",
    "balance": "sampling",
    "activation": "gelu",
}
CASES: dict[str, dict[str, Any]] = {
    "norm": {},
    "everything, sharded": {**EVERYTHING, "loader": "sharded"},
    "norm of each": {"sync_batch_norm": False},
}  # fmt: skip
EACH: dict[str, dict[str, Any]] = {
    "no norm": {"batch_norm": False},
    "everything": {**EVERYTHING, "epochs": 4},
    "weights": {"balance": "weights", "lr_scaling": "linear", "optimizer": "sgd", "lr": 0.01},
    "sharded": {"loader": "sharded"},
    "mapped": {"loader": "mapped"},
    "stream": {"loader": "stream"},
    "shards": {},
}
"""Each by itself, in the long form."""
PLANTED = "planted"
"""A case in which the second rank fails."""


def train(photos: str, out: Path, case: str, devices: int) -> None:
    """Train one case in a folder of its own; the cache is shared by all of them."""
    from fastcnn import Config, fit

    data = f"{photos}-shards" if "shards" in case.split() else photos
    config = Config(
        **{**SMALL, **(CASES | EACH).get(case, {}), "data": data, "cache_dir": str(out / "cache")}, devices=devices
    )
    fit(config, run_dir=out / case)


def plant() -> None:
    """Let the second rank fail in its second portion of steps."""
    from fastcnn.errors import DataError
    from fastcnn.runs import loop

    plain = loop.run_steps

    def failing(*args: Any) -> Iterator[Any]:
        for number, state in enumerate(plain(*args)):
            if number == 1 and os.environ["RANK"] == "1":
                raise DataError("planted in rank 1")
            yield state

    loop.run_steps = failing


if __name__ == "__main__":
    from fastcnn.errors import FastCNNError

    photos, out, *cases = sys.argv[1:]
    try:
        for case in cases:
            if case == PLANTED:
                plant()
            train(photos, Path(out), case, int(os.environ["WORLD_SIZE"]))
            assert "torch._dynamo" not in sys.modules, f"{case}: seconds on every rank, and nothing is compiled"
    except FastCNNError as error:
        print(f"exit {error.exit_code}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
