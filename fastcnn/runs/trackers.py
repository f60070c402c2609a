"""Trackers of a run's figures, epoch by epoch: the console, a CSV file, W&B."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fastcnn.reporting.outcome import Outcome
from fastcnn.runs.wandb_tracker import WandbTracker
from fastcnn.system.console import Console

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


@dataclass(frozen=True, kw_only=True)
class Run:
    """Facts about a run that its trackers get before the first epoch."""

    run_dir: Path
    console: Console
    num_epochs: int
    config: Mapping[str, Any]
    """The configuration, hardware and versions, as plain data."""
    rows: Sequence[Mapping[str, float]] = ()
    """Figures of the epochs that a resumed run already has."""


class Tracker(Protocol):
    """Records a run's figures. Methods are called in this order; `finish` only if the run was not cut short."""

    def epoch(self, row: Mapping[str, float]) -> None:
        """Record an epoch: one value for each of `COLUMNS`."""

    def finish(self, outcome: Outcome) -> None:
        """Record the outcome of a finished run."""

    def close(self, exit_code: int) -> dict[str, Any]:
        """Write what is still pending; return entries for result.json. May be called again."""
        return {}


class ConsoleTracker(Tracker):
    """Prints a line per epoch, with the time left."""

    def __init__(self, run: Run) -> None:
        self.console, self.num_epochs = run.console, run.num_epochs

    def epoch(self, row: Mapping[str, float]) -> None:
        """Print the epoch's line."""
        minutes, seconds = divmod(round(row["seconds"] * (self.num_epochs - row["epoch"])), 60)
        width = len(str(self.num_epochs))
        self.console.line(
            f"epoch {row['epoch']:{width}.0f}/{self.num_epochs}  "
            f"train loss {row['train/loss']:.4f} accuracy {row['train/accuracy']:.4f}  "
            f"val loss {row['val/loss']:.4f} accuracy {row['val/accuracy']:.4f}  "
            f"{row['images_per_second']:,.0f} images/s  {minutes}:{seconds:02d} left"
        )


class CsvTracker(Tracker):
    """Writes metrics.csv: a row per epoch."""

    def __init__(self, run: Run) -> None:
        self.path = run.run_dir / "metrics.csv"
        with self.path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(COLUMNS)
        for row in run.rows:
            self.epoch(row)

    def epoch(self, row: Mapping[str, float]) -> None:
        """Append the epoch's row."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([row[column] for column in COLUMNS])


TRACKERS: dict[str, Callable[[Run], Tracker]] = {
    "console": ConsoleTracker,
    "csv": CsvTracker,
    "wandb": WandbTracker,
}


@contextlib.contextmanager
def opened(run: Run, more: Sequence[Callable[[Run], Tracker]] = ()) -> Iterator[list[Tracker]]:
    """Yield a run's trackers, `more` last; if an error ends the run, close them with its exit code."""
    trackers = [make(run) for make in (*TRACKERS.values(), *more)]
    try:
        yield trackers
    except BaseException as error:
        code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
        for tracker in trackers:
            tracker.close(code)
        raise


def finish(trackers: Sequence[Tracker], outcome: Outcome) -> dict[str, Any]:
    """Pass the outcome to the trackers and close them; return their entries for result.json."""
    notes: dict[str, Any] = {}
    for tracker in trackers:
        tracker.finish(outcome)
        notes |= tracker.close(0)
    return notes
