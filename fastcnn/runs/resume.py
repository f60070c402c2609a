"""Resuming a run that was stopped, killed or finished: its configuration, and its state from the last checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fastcnn.config import OPTIONS, Config, option_name, read_yaml, resolve
from fastcnn.data import class_names
from fastcnn.errors import FastCNNError, UsageError, warn
from fastcnn.runs.state import RunState
from fastcnn.storage import checkpoint, files, run_folder
from fastcnn.system.console import Console

RESUMABLE = ("data", "cache_dir", "epochs", "device", "devices", "wandb", "loader", "on_nan", "checkpoint_every")
"""Options that may change when a run is resumed; DATA and the cache where the same photos were moved."""

_FOUND = ("engine", "precision", "threads", "workers", "path_column", "label_column")  # a run writes down what it took


def resumed_config(run: str | Path, changes: dict[str, Any]) -> Config:
    """Return the configuration of an earlier run, with changes to what is in `RESUMABLE`.

    The run's config.yaml may have been edited: what is in `RESUMABLE` counts.

    Raises UsageError for any other change, and if the run is finished; FastCNNError if there is no such run.
    """
    if refused := [option_name(name) for name in changes if name not in RESUMABLE]:
        raise UsageError(
            f"--resume: {', '.join(refused)} cannot change; "
            f"change only DATA, {', '.join(option_name(name) for name in RESUMABLE[1:])}"
        )
    run_dir = run_folder.find(run)
    if not (run_dir / "last.pt").is_file():  # killed before its first step was saved
        return resolve(read_yaml(run_dir / "config.yaml"), changes)
    saved = checkpoint.load_of_run(run_dir, "last.pt")
    config = resolve(saved["config"], _edited(run_dir, saved["config"]), changes)
    if Path(config.data).is_dir():  # of a run of a table, whose photos were moved
        config = dataclasses.replace(config, path_column=None, label_column=None)
    if config.devices != saved["config"]["devices"]:
        config = dataclasses.replace(config, threads=None, workers=None)  # each was one rank's part of the cores
    if config.epochs <= saved["epoch"] and is_finished(run_dir):
        raise UsageError(f"--resume: {run} has its {saved['epoch']} epochs: give more with --epochs")
    return config


def _edited(run_dir: Path, begun: dict[str, Any]) -> dict[str, Any]:
    """Return what config.yaml has for options that may change. Raises UsageError where another one was edited."""
    path = run_dir / run_folder.CONFIG
    stated = {name: value for name, value in read_yaml(path).items() if name in OPTIONS and value != begun.get(name)}
    now = resolve(begun, stated).to_dict()  # the same value may be written in several ways
    edited = [name for name in stated if now[name] != begun.get(name) and name not in (*RESUMABLE, *_FOUND)]
    if edited:
        name = edited[0]
        raise UsageError(
            f"--resume: {path} has been edited, and {option_name(name)} cannot change: put back {name}: {begun[name]}, "
            f"or begin another run with --config {path}"
        )
    return {name: stated[name] for name in RESUMABLE if name in stated and name != "cache_dir"}


def is_finished(run_dir: Path) -> bool:
    """Return whether a run has written everything; one that was killed while writing has not."""
    return files.read_json(run_dir / "result.json").get("finished") is True


def restore(state: RunState, console: Console) -> None:
    """Load the run's `last.pt` into its state."""
    saved = state.ranks.broadcast(lambda: checkpoint.load(state.run_dir / "last.pt"))
    state.restore(saved)
    _repair_best(state)
    steps = f" and {state.steps_done} steps" if state.steps_done else ""
    console.line(f"going on after epoch {state.epoch}{steps}")


def _repair_best(state: RunState) -> None:
    """Write `best.pt` again if it is not the best epoch's: the run may have been killed after writing `last.pt`."""
    best = state.best.get("epoch")
    problem = "" if best is None else state.ranks.broadcast(lambda: _problem_of_best(state))
    if not problem:
        return
    if state.steps_done:  # no epoch's weights are at hand
        state.best = {}
    else:
        state.best = state.rows[-1]
        state.save_best()
    if best != state.best.get("epoch"):
        warn(f"{problem}: the weights of the best epoch, {best:g}, are lost; the best is chosen among later epochs")


def _problem_of_best(state: RunState) -> str:
    """Return why `best.pt` is not that of the best epoch; "" if it is."""
    path, best = state.run_dir / "best.pt", state.best["epoch"]
    try:
        saved = checkpoint.load(path)
    except FastCNNError as error:
        return str(error)
    if saved["best"].get("epoch") == best and class_names.same(saved["classes"], state.classes):
        return ""
    return f"{path} is of another epoch than {best:g}"
