"""A small run that was not interrupted, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastcnn import Config, fit
from tests.runs.small_runs import SMALL


@pytest.fixture(scope="session")
def config(photos: Path) -> Config:
    return Config(data=str(photos), dropout=0.2, ema=0.9, schedule="onecycle", augment=("flip", "mixup"), **SMALL)


@pytest.fixture(scope="session")
def whole(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    return fit(config, run_dir=tmp_path_factory.mktemp("whole") / "run").run_dir
