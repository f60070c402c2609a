"""Summary of a sweep: sweep.csv, the best configuration and the plots in its folder, and the table that is printed."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fastcnn.config import resolve
from fastcnn.errors import first_line, warn
from fastcnn.storage import files
from fastcnn.storage.run_folder import CONFIG
from fastcnn.sweeps import plots
from fastcnn.sweeps.study import Point, Study, TrialRecord
from fastcnn.sweeps.sweep_file import METRICS
from fastcnn.system import text

NUM_SHOWN = 20  # trials in the table
MIN_FOR_IMPORTANCE = 4  # finished trials


def write(study: Study, folder: Path, options: Mapping[str, Any]) -> None:
    """Write the results so far into the sweep's folder: sweep.csv, the best trial's config.yaml, and the plots.

    options: those of every trial.
    """
    records = study.records()
    write_table(study, folder)
    if study.seeds > 1:
        _write_points(study, folder, records)
    best = study.best()
    if best is not None:
        config = folder / best.folder / CONFIG
        if config.is_file():
            files.write(folder / CONFIG, config.read_bytes())
        else:  # the trial ran on another machine
            fields = resolve(options, best.values).to_dict()
            files.write(folder / CONFIG, yaml.safe_dump(fields, sort_keys=False, allow_unicode=True))
    try:
        _draw(study, folder, records)
    except Exception as error:
        warn(f"the plots of {folder} cannot be drawn: {first_line(error)}")


def write_table(study: Study, folder: Path) -> None:
    """Write sweep.csv: a row for each trial that has begun."""
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


def _draw(study: Study, folder: Path, records: Sequence[TrialRecord]) -> None:
    sweep = study.sweep
    measured = [record for record in records if record.value is not None and record.values]
    if measured and sweep.parameters:
        points = [({**record.values, sweep.metric: record.value}, record.state == "finished") for record in measured]
        logs = [name for name, p in sweep.parameters.items() if getattr(p, "log", False)]
        plot = plots.parallel_coordinates(points, sweep.metric, logs=logs, maximize=sweep.goal == "maximize")
        files.write(folder / "parallel_coordinates.png", plot)
    num_finished = sum(record.state == "finished" for record in records)
    if num_finished >= MIN_FOR_IMPORTANCE and sweep.parameters:
        files.write(folder / "importance.png", plots.importance(study.optuna, sweep.metric))


def table(study: Study, records: Sequence[TrialRecord]) -> str:
    """Return the best trials, or points where each has several seeds, as a table for a terminal."""
    sweep = study.sweep
    if study.seeds > 1:
        return _table_of_points(study, records)
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


def _table_of_points(study: Study, records: Sequence[TrialRecord]) -> str:
    points, names = study.points(records), study.sweep.parameters
    rows = [
        [
            point.records[0].folder,
            f"{len(point.finished)} of {study.seeds}",
            "" if point.mean is None else f"{point.mean:.4f}",
            _interval(point),
            *(shown(point.records[0].values.get(name, "")) for name in names),
        ]
        for point in points[:NUM_SHOWN]
    ]
    head = ["first trial", "seeds", f"mean {study.sweep.metric}", "95% interval", *names]
    more = [f"and {len(points) - NUM_SHOWN} more in points.csv"] if len(points) > NUM_SHOWN else []
    return "\n".join(["", text.table(head, rows), *more, ""])


def _interval(point: Point) -> str:
    return "" if point.interval is None else "{:.4f} to {:.4f}".format(*point.interval)


def _write_points(study: Study, folder: Path, records: Sequence[TrialRecord]) -> None:
    names = study.sweep.parameters
    rows = [
        [
            point.records[0].folder,
            len(point.finished),
            *("" if value is None else value for value in (point.mean, *(point.interval or (None, None)))),
            *(_exact(point.records[0].values.get(name, "")) for name in names),
        ]
        for point in study.points(records)
    ]
    metric = study.sweep.metric
    files.write_csv(folder / "points.csv", [["trial", "seeds", f"mean {metric}", "low", "high", *names], *rows])


def outcome(study: Study, records: Sequence[TrialRecord], folder: Path) -> str:
    """Return, in one line, how many trials ended how, and how to train the best one again."""
    counts = Counter(record.state for record in records)
    states = ", ".join(
        f"{counts[state]} {state}" for state in ("finished", "pruned", "failed", "running") if counts[state]
    )
    best = study.best()
    if best is None or best.value is None:
        return f"{len(records)} trials: {states}; see {folder / 'sweep.csv'}"
    point = study.points(records)[0]
    mean = f" ({_interval(point)}, {len(point.finished)} seeds)" if point.interval else ""
    return (
        f"{len(records)} trials: {states}; best {best.folder}: {study.sweep.metric} {point.mean:.4f}{mean}; "
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
