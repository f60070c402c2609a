"""Going on with a run that was stopped, killed or finished: by what configuration, and from what state."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

from fastcnn.config.coerce import option_name
from fastcnn.config.fields import Config
from fastcnn.config.load import read_yaml, resolve
from fastcnn.errors import DataError, FastCNNError, UsageError, warn
from fastcnn.runs.state import Session
from fastcnn.storage import checkpoint
from fastcnn.storage import run_folder as runs
from fastcnn.system.console import Console

RESUMABLE = (
    "epochs",
    "device",
    "devices",
    "wandb",
    "loader",
    "on_nan",
    "checkpoint_every",
)  # may change when a run goes on


class Interrupted(FastCNNError):
    """The run was told to stop; the message says what is saved."""

    def __init__(self, signum: int, saved: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; {saved}")
        self.exit_code = 128 + signum


def what_is_saved(folder: Path) -> str:
    """Return what is kept of a run that ends here, and how to go on with it."""
    if not (folder / "split.csv").is_file():
        return "no step was saved yet, but the photos decoded so far are: the same command goes on"
    if not (folder / "last.pt").is_file():
        return f"no step was saved yet: fastcnn train --resume {folder} begins again"
    return f"saved in {folder / 'last.pt'}: fastcnn train --resume {folder} goes on"


def resumed_config(run: str | Path, changes: dict[str, Any]) -> Config:
    """Return the configuration to go on with a run by: its own, with other `epochs` or another `device`.

    Raises UsageError for any other change, FastCNNError where there is no such run or no `last.pt` in it.
    """
    refused = ["DATA" if name == "data" else option_name(name) for name in changes if name not in RESUMABLE]
    if refused:
        raise UsageError(
            f"--resume goes on as before: {', '.join(refused)} cannot change, "
            f"only {', '.join(option_name(name) for name in RESUMABLE)}"
        )
    folder = runs.find(run)
    if not (folder / "last.pt").is_file():  # killed before its first step was saved
        return resolve(read_yaml(folder / "config.yaml"), changes)
    state = checkpoint.load(folder / "last.pt")
    config = resolve(state["config"], changes)
    if config.devices != state["config"]["devices"]:
        config = dataclasses.replace(config, threads=None, workers=None)  # they were a share of the cores
    if config.epochs <= state["epoch"] and is_finished(folder):
        raise UsageError(f"--resume: {run} has its {state['epoch']} epochs: give more with --epochs")
    return config


def is_finished(folder: Path) -> bool:
    """Return whether all that a run leaves is there; one that was killed while it was written is not finished."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(result, dict) and result.get("finished") is True


def restore(session: Session, console: Console) -> None:
    """Put a session where the run's `last.pt` left it. Raises DataError where the classes are others by now."""
    state = session.ranks.broadcast(lambda: checkpoint.load(session.run_dir / "last.pt"))
    if tuple(state["classes"]) != session.classes:
        raise DataError(f"{session.run_dir} was trained on other classes than there are now: begin a new run")
    session.restore(state)
    done = session.steps_done
    _mend_best(session, done)
    console.line(f"going on after epoch {session.epoch}" + (f" and {done} steps" if done else ""))


def _mend_best(session: Session, done: int) -> None:
    """Write `best.pt` again where it is not the best epoch's: a run may be killed between last.pt and it."""
    best = session.best.get("epoch")
    if best is None:
        return
    problem = session.ranks.broadcast(lambda: _problem(session, best))
    if not problem:
        return
    if best == session.epoch and not done:
        session.save_best()
        return
    if not done:
        session.best = session.rows[-1]
        session.save_best()
    else:
        session.best = {}
    warn(f"{problem}: the weights of epoch {best:g}, the best, are lost; the best is chosen of what comes")


def _problem(session: Session, best: float) -> str:
    """Return why `best.pt` is not that of the best epoch; "" where it is."""
    path = session.run_dir / "best.pt"
    try:
        state = checkpoint.load(path)
    except FastCNNError as error:
        return str(error)
    if state["best"].get("epoch") == best and tuple(state["classes"]) == session.classes:
        return ""
    return f"{path} is of another epoch than {best:g}"
