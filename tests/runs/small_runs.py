"""Small runs, and what must be equal in two of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch

from fastcnn import fit
from fastcnn.runs.resume import resumed_config
from fastcnn.storage import checkpoint

SMALL: dict[str, Any] = {
    "epochs": 2,
    "image_size": 32,
    "filters": (8,),
    "batch_size": 16,
    "deterministic": True,
    "report": False,
}


STEPS = 6  # an epoch


def figures(run_dir: Path) -> list[dict[str, str]]:
    """metrics.csv without what depends on the clock."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in csv.DictReader(file)
        ]


def assert_equal(run_dir: Path, whole: Path) -> None:
    """The weights, the figures and the chosen best, to the bit."""
    for name in ("last.pt", "best.pt"):
        one, other = checkpoint.load(run_dir / name), checkpoint.load(whole / name)
        assert all(torch.equal(one["model"][key], other["model"][key]) for key in other["model"])
        assert torch.equal(one["average"], other["average"])
        assert torch.equal(one["rng"], other["rng"])
        assert (one["best"]["epoch"], one["step"]) == (other["best"]["epoch"], other["step"])
    assert figures(run_dir) == figures(whole)
    assert result(run_dir)["finished"] is True


def result(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "result.json").read_text())  # type: ignore[no-any-return]


def go_on(run_dir: Path | str, **changes: Any) -> Path:
    return fit(resumed_config(run_dir, changes), resume=run_dir).run_dir
