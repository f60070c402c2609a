"""Summary of a sweep: sweep.csv, the best configuration and the plots in its folder, and the table that is printed."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fastcnn.config import resolve
from fastcnn.storage import files
from fastcnn.storage.run_folder import CONFIG
from fastcnn.sweeps import plots
from fastcnn.sweeps.study import Study, TrialRecord
from fastcnn.sweeps.sweep_file import METRICS
from fastcnn.system import text

NUM_SHOWN = 20  # trials in the table
MIN_FOR_IMPORTANCE = 4  # finished trials


def write(study: Study, folder: Path, options: Mapping[str, Any]) -> None:
    """Write the results so far into the sweep's folder: sweep.csv, the plots, and the best trial's config.yaml.

    options: those of every trial.
    """
    sweep, records = study.sweep, study.records()
    metrics = [name for name in METRICS if name != sweep.metric]
    files.write_csv(
        folder / "sweep.csv",
        [
            ["trial", "state", sweep.metric, "epochs", *metrics, *sweep.parameters, "reason"],
            *(
                [
                    record.folder,
                    record.state,
                    "" if record.value is None else record.value,
                    record.epochs,
                    *(record.metrics.get(name, "") for name in metrics),
                    *(_exact(record.values.get(name, "")) for name in sweep.parameters),
                    record.reason,
                ]
                for record in records
            ),
        ],
    )
    measured = [record for record in records if record.value is not None and record.values]
    if measured and sweep.parameters:
        points = [({**record.values, sweep.metric: record.value}, record.state == "finished") for record in measured]
        logs = [name for name, p in sweep.parameters.items() if getattr(p, "log", False)]
        plot = plots.parallel_coordinates(points, sweep.metric, logs=logs, maximize=sweep.goal == "maximize")
        files.write(folder / "parallel_coordinates.png", plot)
    num_finished = sum(record.state == "finished" for record in records)
    if num_finished >= MIN_FOR_IMPORTANCE and sweep.parameters:
        files.write(folder / "importance.png", plots.importance(study.optuna, sweep.metric))
    best = study.best()
    if best is not None:
        config = folder / best.folder / CONFIG
        if config.is_file():
            files.write(folder / CONFIG, config.read_bytes())
        else:  # the trial ran on another machine
            fields = resolve(options, best.values).to_dict()
            files.write(folder / CONFIG, yaml.safe_dump(fields, sort_keys=False, allow_unicode=True))


def table(study: Study, records: Sequence[TrialRecord]) -> str:
    """Return the best trials as a table for a terminal."""
    sweep = study.sweep
    ranked = sorted(records, key=lambda record: (record.state == "failed", study.rank(record.value)))
    rows = [
        [
            record.folder,
            record.state,
            "" if record.value is None else f"{record.value:.4f}",
            str(record.epochs),
            *(shown(record.values.get(name, "")) for name in sweep.parameters),
        ]
        for record in ranked[:NUM_SHOWN]
    ]
    lines = ["", text.table(["trial", "state", sweep.metric, "epochs", *sweep.parameters], rows)]
    if len(records) > NUM_SHOWN:
        lines.append(f"and {len(records) - NUM_SHOWN} more in sweep.csv")
    return "\n".join([*lines, ""])


def outcome(study: Study, records: Sequence[TrialRecord], folder: Path) -> str:
    """Return, in one line, how many trials ended how, and how to train the best one again."""
    counts = Counter(record.state for record in records)
    states = ", ".join(
        f"{counts[state]} {state}" for state in ("finished", "pruned", "failed", "running") if counts[state]
    )
    best = study.best()
    if best is None or best.value is None:
        return f"{len(records)} trials: {states}; see {folder / 'sweep.csv'}"
    return (
        f"{len(records)} trials: {states}; best {best.folder}: {study.sweep.metric} {best.value:.4f}; "
        f"to train it again: fastcnn train --config {shlex.quote(str(folder / CONFIG))}"
    )


def why_none_finished(records: Sequence[TrialRecord]) -> str:
    """Return why no trial finished; "" where one did, or still runs, perhaps in another process."""
    if not records or any(record.state in ("finished", "running") for record in records):
        return ""
    reasons = Counter(record.reason for record in records if record.state == "failed").most_common()
    if not reasons:
        return f"{len(records)} of {len(records)} trials were pruned"
    reason, count = reasons[0]
    return f"{count} of {len(records)} trials failed with: {reason}"


def shown(value: Any) -> str:
    """Return a parameter's value for people: four digits of a number, a list with commas."""
    return f"{value:.4g}" if isinstance(value, float) else _exact(value)


def _exact(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
