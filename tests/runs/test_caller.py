"""What belongs to the caller of the library is after a call what it was before."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcnn import Config, FastCNNError, evaluate_run, export_run, fit
from fastcnn.export.exporters import write
from fastcnn.storage import checkpoint


def held() -> dict[str, Any]:
    """What is global to the process."""
    return {
        "python": random.getstate(),
        "numpy": [np.asarray(part).tolist() for part in np.random.get_state()],  # noqa: NPY002
        "torch": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "environment": dict(os.environ),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
    }


def config(photos: Path, **options: Any) -> Config:
    return Config(**{"data": str(photos), "epochs": 1, "image_size": 32, "filters": (8,), "batch_size": 16, **options})


def failing(run: Any) -> Any:
    raise FastCNNError("no tracker")


@pytest.fixture
def calls(photos: Path, run_dir: Path, tmp_path: Path) -> dict[str, Callable[[], object]]:
    def fails(**options: Any) -> None:
        with pytest.raises(FastCNNError):
            fit(config(photos, **options), run_dir=tmp_path / "failing", trackers=[failing])

    return {
        "fit": lambda: fit(config(photos, deterministic=True, threads=1, dropout=0.3), run_dir=tmp_path / "run"),
        "evaluate": lambda: evaluate_run(run_dir),
        "export": lambda: export_run(run_dir, output=tmp_path / "model.torchscript"),
        "trace": lambda: write(checkpoint.load(run_dir / "best.pt"), tmp_path / "model.pt2", "pt2"),
        "error": fails,
        "no such folder": lambda: fails(data="nowhere"),
    }


@pytest.mark.usefixtures("verified_here")
@pytest.mark.parametrize("what", ["fit", "evaluate", "export", "trace", "error", "no such folder"])
def test_the_callers_state_is_left_alone(what: str, calls: dict[str, Callable[[], object]]) -> None:
    before_threads = torch.get_num_threads()
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(2)
    random.seed(4)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(6)
    try:
        before = held()
        calls[what]()
        assert held() == before
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before_threads)
        signal.signal(signal.SIGTERM, handler)


def test_a_random_search_draws_other_values_every_time(photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = [torch.rand(1).item() for _ in range(3)]
    torch.manual_seed(0)
    drawn = []
    for k in range(3):
        drawn.append(torch.rand(1).item())
        fit(config(photos, lr=1e-3 * (1 + drawn[-1]), report=False), run_dir=tmp_path / str(k))
    assert drawn == expected
