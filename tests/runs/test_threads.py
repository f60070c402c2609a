"""Runs in several threads of one process: each gives what it gives alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcnn import Config, fit
from fastcnn.errors import UsageError
from fastcnn.storage import checkpoint
from fastcnn.system.switches import torch_settings

CPU = torch.device("cpu")


def result(photos: Path, folder: Path, **changes: Any) -> list[Any]:
    """Return every tensor that a run leaves."""
    options: dict[str, Any] = {"dropout": 0.3, "deterministic": True, "augment": ("flip", "mixup"), "report": False}
    sizes: dict[str, Any] = {"epochs": 1, "image_size": 32, "filters": (8,), "batch_size": 16, "seed": 3}
    fit(Config(data=str(photos), **{**options, **sizes, **changes}), run_dir=folder)
    saved = checkpoint.load(folder / "last.pt")
    return [saved["rng"], *saved["model"].values(), *saved["optimizer"].values()]


@pytest.mark.parametrize("count", [2, *(pytest.param(n, marks=pytest.mark.long) for n in (4, 8))])
def test_runs_at_once_equal_one_alone_to_the_bit(count: int, photos: Path, tmp_path: Path) -> None:
    alone, rng, threads = result(photos, tmp_path / "alone"), torch.get_rng_state(), torch.get_num_threads()
    begin = threading.Barrier(count)

    def one(number: int) -> list[Any]:
        begin.wait()
        return result(photos, tmp_path / str(number))

    with ThreadPoolExecutor(count) as pool:
        for found in pool.map(one, range(count)):
            assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    assert torch.equal(torch.get_rng_state(), rng)
    assert not torch.are_deterministic_algorithms_enabled()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == threads


@pytest.mark.long  # ten runs
@pytest.mark.filterwarnings("ignore:`n_jobs` has been deprecated")
def test_a_search_by_optuna_in_four_threads_equals_one_after_another(photos: Path, tmp_path: Path) -> None:
    """What the points give does not depend on what is trained beside them; whoever draws the points is Optuna."""
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    points = [
        {"lr": lr, "dropout": dropout, "filters": filters}
        for lr, dropout, filters in ((1e-3, 0.3, 8), (1e-2, 0.0, 4), (3e-3, 0.5, 8), (0.1, 0.1, 6), (1e-3, 0.3, 4))
    ]

    def search(n_jobs: int) -> list[list[Any]]:
        found: dict[int, list[Any]] = {}

        def objective(trial: Any) -> float:
            lr, dropout = trial.suggest_float("lr", 1e-4, 1, log=True), trial.suggest_float("dropout", 0, 0.5)
            filters = (trial.suggest_int("filters", 4, 8),)
            folder = tmp_path / f"{n_jobs}-{trial.number}"
            found[trial.number] = result(photos, folder, lr=lr, dropout=dropout, filters=filters, seed=trial.number)
            return float(checkpoint.load(folder / "last.pt")["rows"][-1]["val/loss"])

        study = optuna.create_study()
        for point in points:
            study.enqueue_trial(point)
        study.optimize(objective, n_trials=len(points), n_jobs=n_jobs)
        assert [trial.params for trial in study.trials] == points
        return [[trial.value, *found[trial.number]] for trial in study.trials]

    for one, other in zip(search(1), search(4), strict=True):
        assert one[0] == other[0]
        assert all(torch.equal(a, b) for a, b in zip(one[1:], other[1:], strict=True))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"deterministic": False}, "with --deterministic on, which torch has once for the whole process"),
        ({"threads": 2}, "with --threads 1"),
        ({"compiles": "at the start"}, "with a compiled engine"),
    ],
)
def test_other_switches_in_another_thread_are_refused(other: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"deterministic": True, "threads": 1, "compiles": "throughout"}

    def enter() -> None:
        with torch_settings(CPU, **{**asked, **other}):
            pass

    with torch_settings(CPU, **asked), ThreadPoolExecutor(1) as pool, pytest.raises(UsageError, match=message):
        pool.submit(enter).result()


def test_a_run_that_chooses_its_number_of_threads_leaves_that_of_others() -> None:
    before = torch.get_num_threads()

    def choose() -> int:
        with torch_settings(CPU, deterministic=True, threads=None):
            torch.set_num_threads(before + 1)
        return torch.get_num_threads()

    with torch_settings(CPU, deterministic=True, threads=before + 2):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(choose).result() == before
        assert torch.get_num_threads() == before + 2
    assert torch.get_num_threads() == before


def test_inductor_is_deterministic_where_a_run_compiles() -> None:
    from torch._inductor import config as inductor

    with torch_settings(CPU, deterministic=True, threads=None, compiles="at the start"):
        assert inductor.deterministic
        assert torch.are_deterministic_algorithms_enabled()
    assert not inductor.deterministic
    assert not torch.are_deterministic_algorithms_enabled()
