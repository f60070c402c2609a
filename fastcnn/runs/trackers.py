"""Where a run's figures go, an epoch at a time: the console, a CSV file, W&B."""

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
    """What trackers are told of a run before its first epoch."""

    run_dir: Path
    console: Console
    num_epochs: int
    config: Mapping[str, Any]
    """The configuration, hardware and versions, as plain data."""
    rows: Sequence[Mapping[str, float]] = ()
    """The epochs that a resumed run has behind it."""


class Tracker(Protocol):
    """Takes a run's figures. The three are called in this order, `finish` only for a run that was not cut short."""

    def epoch(self, row: Mapping[str, float]) -> None:
        """Take the figures of an epoch: the values of `COLUMNS`."""

    def finish(self, outcome: Outcome) -> None:
        """Take what the run leaves."""

    def close(self, exit_code: int) -> dict[str, Any]:
        """Write what is not written yet; return what result.json says of it. May be called again."""
        return {}


class ConsoleTracker(Tracker):
    """A line an epoch, with the time left."""

    def __init__(self, run: Run) -> None:
        self.console, self.num_epochs = run.console, run.num_epochs

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


class CsvTracker(Tracker):
    """metrics.csv: a row an epoch."""

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
    "wandb": lambda run: WandbTracker(run.run_dir, run.console, run.config),
}


@contextlib.contextmanager
def opened(run: Run, more: Sequence[Callable[[Run], Tracker]] = ()) -> Iterator[list[Tracker]]:
    """Yield a run's trackers, `more` after the rest; where it is cut short they are closed with its exit code."""
    trackers = [make(run) for make in (*TRACKERS.values(), *more)]
    try:
        yield trackers
    except BaseException as error:
        code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
        for tracker in trackers:
            tracker.close(code)
        raise


def finish(trackers: Sequence[Tracker], outcome: Outcome) -> dict[str, Any]:
    """Give the trackers what the run leaves and close them; return what result.json says of them."""
    notes: dict[str, Any] = {}
    for tracker in trackers:
        tracker.finish(outcome)
        notes |= tracker.close(0)
    return notes
