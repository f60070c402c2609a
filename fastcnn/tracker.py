"""Where a run's figures go, an epoch at a time: the console, a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from fastcnn.console import Console

COLUMNS = (
    "epoch",
    "seconds",
    "train/loss",
    "train/accuracy",
    "val/loss",
    "val/accuracy",
    "lr",
    "images_per_second",
)


class Tracker(Protocol):
    """Takes a run's figures."""

    def epoch(self, row: Mapping[str, float]) -> None:
        """Take the figures of an epoch: the values of `COLUMNS`."""


class ConsoleTracker:
    """A line an epoch, with the time left."""

    def __init__(self, run_dir: Path, console: Console, num_epochs: int) -> None:
        self.console, self.num_epochs = console, num_epochs

    def epoch(self, row: Mapping[str, float]) -> None:
        """Write the epoch's line."""
        minutes, seconds = divmod(round(row["seconds"] * (self.num_epochs - row["epoch"])), 60)
        width = len(str(self.num_epochs))
        self.console.line(
            f"epoch {row['epoch']:{width}.0f}/{self.num_epochs}  "
            f"train loss {row['train/loss']:.4f} accuracy {row['train/accuracy']:.4f}  "
            f"val loss {row['val/loss']:.4f} accuracy {row['val/accuracy']:.4f}  "
            f"{row['images_per_second']:,.0f} images/s  {minutes}:{seconds:02d} left"
        )


class CsvTracker:
    """metrics.csv: a row an epoch."""

    def __init__(self, run_dir: Path, console: Console, num_epochs: int) -> None:
        self.path = run_dir / "metrics.csv"
        with self.path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(COLUMNS)

    def epoch(self, row: Mapping[str, float]) -> None:
        """Append the epoch's row."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([row[column] for column in COLUMNS])


TRACKERS: dict[str, Callable[[Path, Console, int], Tracker]] = {
    "console": ConsoleTracker,
    "csv": CsvTracker,
}
