"""Training beside processes that compute: ours and `seed.py` in turn on the same photos, everything decoded before."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from bench.harness.computing import computing
from bench.harness.race import SCALES, Race
from bench.harness.whole_runs import Runs

EPOCHS = 2  # the first is left out of the rates
RIVAL = "seed"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """List the numbers of computing processes."""
    metafunc.parametrize("count", SCALES[metafunc.config.getoption("--scale")]["computing"])


def bench_beside(race: Race, runs: Runs, tmp_path: Path, count: int) -> None:
    """The recipe seed with its defaults; `seed.py` with the workers that are faster in the same state."""
    here = Runs(tmp_path, runs.photos, runs.device, {**race.scale, "epochs": EPOCHS})
    first = here.train(here.photos, tmp_path / "cache", epochs=1)  # decodes; both get its split
    split = Path(first["run_dir"]) / "split.csv"
    ours: list[dict[str, Any]] = []
    with computing(count):
        race(
            "quiet" if not count else f"beside {count} computing process{'es' * (count > 1)}",
            lambda: ours.append(here.train(here.photos, tmp_path / "cache", recipe="seed")),
            {here.named(RIVAL): functools.partial(here.baseline, RIVAL, split)},
            images=first["num_train"] * EPOCHS,
            rounds=race.scale["train_rounds"],
            warm_up=False,
            computing=count,
        )
    race.note(**here.steady(ours), threads=[result["threads"] for result in ours], precision=ours[0]["precision"])
