"""Training beside processes that compute: ours and `seed.py` in turn on the same photos, everything decoded before."""

from __future__ import annotations

import functools
import statistics
from pathlib import Path

import pytest

from bench.harness.computing import computing
from bench.harness.race import SCALES, Race
from bench.harness.timing import ratios
from bench.harness.whole_runs import Runs, named

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
    rivals = [RIVAL] if RIVAL in here.baselines else []
    ours: list[dict[str, object]] = []
    with computing(count):
        names = {name: named(name, here) for name in rivals}
        race(
            "quiet" if not count else f"beside {count} computing process{'es' * (count > 1)}",
            lambda: ours.append(here.train(here.photos, tmp_path / "cache", recipe="seed")),
            {shown: functools.partial(here.baseline, name, split) for name, shown in names.items()},
            images=first["num_train"] * EPOCHS,
            rounds=race.scale["train_rounds"],
            warm_up=False,
            computing=count,
        )
    steady = [1 / float(str(result["images_per_second"])) for result in ours]
    theirs = {name: [1 / found["images_per_second"] for found in here.done[name]] for name in rivals}
    race.note(
        steady_images_per_second={
            "fastcnn": statistics.median(1 / seconds for seconds in steady),
            **{name: statistics.median(1 / seconds for seconds in rates) for name, rates in theirs.items()},
        },
        steady_over={names[name]: ratios(steady, rates) for name, rates in theirs.items()},
        threads=[result["threads"] for result in ours],
        precision=ours[0]["precision"],
    )
