"""A run of the benchmarks as a results file: machine, command, a row a benchmark. No host name, user name or path."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from fastcnn.storage import files

ROOT = Path(__file__).resolve().parents[2]
FORMAT = 1
GROWING = ("scan", "decode", "upload", "train", "eval")
SECONDS_WITHIN, MEMORY_WITHIN = 0.20, 0.25

Row = dict[str, Any]
"""A benchmark: group, name, n, median_seconds, min_seconds, max_seconds, and extra_info: what else it noted."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """Contents of a results file, under the same names."""

    format: int = FORMAT
    machine: str
    """A folder's name for the hardware."""
    hardware: dict[str, Any]
    versions: dict[str, str]
    rates: dict[str, float] = field(default_factory=dict)
    """The machine's own: bytes copied a second, matrix FLOP/s by precision."""
    settings: dict[str, Any]
    """device, scale, and what its sizes are."""
    command: str
    date: str
    """UTC, to the second."""
    commit: str | None = None
    """Commit id; with "+" where files had been changed."""
    seconds: float
    """All of the benchmarks together."""
    rows: list[Row]
    growth: dict[str, Any] | None = None
    skipped: list[dict[str, str]] = field(default_factory=list)
    """name and reason of every benchmark left out."""
    failed: list[str] = field(default_factory=list)
    """Names of the benchmarks that failed."""

    def of(self, group: str) -> list[Row]:
        """Return a group's rows, in the order in which they ran."""
        return [row for row in self.rows if row["group"] == group]

    def grown(self, by: str) -> list[Row]:
        """Return the rows of runs that grow by "photos" or "batch"."""
        return [row for row in self.of("growth") if row["extra_info"]["grows"] == by]

    @property
    def groups(self) -> list[str]:
        """The groups that have rows."""
        return list(dict.fromkeys(row["group"] for row in self.rows))

    def write(self, folder: Path) -> Path:
        """Write the results file into a folder, named for the date, and return its path."""
        path = folder / f"{self.date.replace(':', '').replace('T', '-')}.json"
        self.save(path)
        return path

    def save(self, path: Path) -> None:
        """Write the results file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, json.dumps(vars(self), indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> Record:
    """Return the record of a results file. Raises ValueError where it is none."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path} is no results file of format {FORMAT}: make it again with python -m bench")
    return Record(**found)


def record(found: dict[str, Any], *, command: str, settings: dict[str, Any], seconds: float) -> Record:
    """Return the record of what pytest-benchmark wrote, as `conftest.py` has it written."""
    from bench.harness.machine import slug  # imports torch: reading a record does not

    failed = list(dict.fromkeys(one["name"] for one in found["failed"]))
    # A benchmark whose check failed after it was timed has a row too.
    rows = [_row(one) for one in found["benchmarks"] if one["fullname"] not in failed]
    commit = found["commit_info"].get("id")
    return Record(
        machine=slug(found["machine_info"]["hardware"]),
        **found["machine_info"],
        settings=settings,
        command=command,
        date=found["datetime"][:19],
        commit=None if commit in (None, "unversioned", "unknown") else commit + "+" * found["commit_info"]["dirty"],
        seconds=seconds,
        rows=rows,
        growth=growth([row["extra_info"] for row in rows if row["extra_info"].get("grows") == "photos"]),
        skipped=[{"name": one["name"], "reason": without_paths(one["reason"])} for one in found["skipped"]],
        failed=failed,
    )


def _row(one: dict[str, Any]) -> Row:
    stats = one["stats"]
    times = {f"{name}_seconds": stats[name] for name in ("median", "min", "max")}
    return {"group": one["group"], "name": one["name"], "n": stats["rounds"], **times, "extra_info": one["extra_info"]}


def own_record(rows: list[Row], **others: Any) -> Record:
    """Return the record of rows that were measured on this machine, now. others: Record's, at least command, settings
    and seconds."""
    from bench.harness.machine import slug
    from fastcnn.system.device import describe_hardware, pick_device, versions

    hardware = describe_hardware(pick_device("auto"))
    return Record(
        machine=slug(hardware),
        hardware=hardware,
        versions=versions() | {"scipy": metadata.version("scipy")},
        date=datetime.now(UTC).isoformat()[:19],
        commit=_commit(),
        rows=rows,
        **others,
    )


def _commit() -> str | None:
    """Return the checkout's commit, with "+" where files were changed; None where it is not known."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def row_of_runs(group: str, name: str, seconds: Sequence[float], info: dict[str, Any]) -> Row:
    """Return the row of runs that took so many seconds each."""
    times = {"median_seconds": statistics.median(seconds), "min_seconds": min(seconds), "max_seconds": max(seconds)}
    return {"group": group, "name": name, "n": len(seconds), **times, "extra_info": info}


def without_paths(text: str) -> str:
    """Return a text with every absolute path cut down to its last part."""
    return re.sub(r"(?<![\w.<])(?:[A-Za-z]:)?(?:[/\\][\w.+@~-]+)+[/\\]([\w.+@~-]+)", r"\1", text)


def photo_seconds(stages: dict[str, float], num_photos: int) -> dict[str, float]:
    """Return the seconds a photo of each stage that does more the more photos there are, and their sum.

    Starting, importing, building kernels and saving checkpoints cost the same for any number of photos.
    """
    found = {stage: stages[stage] / num_photos for stage in GROWING}
    return {**found, "total": sum(found.values())}


def growth(runs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return how runs over more and more photos compare with the smallest of them; None for fewer than two.

    Each run has num_photos, photo_seconds, peak_memory_bytes and bytes_per_photo. Memory is what a run took beyond the
    smallest one, which holds the interpreter, torch and the step; the sizes give bytes_per_photo for each photo more.
    """
    if len(runs) < 2:
        return None
    first, *_ = ordered = sorted(runs, key=lambda run: run["num_photos"])
    points = []
    for run in ordered:
        seconds = run["photo_seconds"]["total"]
        point = {name: run[name] for name in ("num_photos", "peak_memory_bytes")} | {"photo_seconds": seconds}
        point["over_fewest"] = seconds / first["photo_seconds"]["total"]
        if run is not first:
            more_bytes = run["peak_memory_bytes"] - first["peak_memory_bytes"]
            by_size = (run["num_photos"] - first["num_photos"]) * run["bytes_per_photo"]
            point |= {"more_bytes": more_bytes, "more_bytes_by_size": by_size}
            point["memory_over_sizes"] = more_bytes / by_size
        points.append(point)
    return {
        "points": points,
        # Less is not growth: what all runs need alike is spread over more photos.
        "seconds_hold": all(point["over_fewest"] - 1 <= SECONDS_WITHIN for point in points),
        "memory_holds": all(point["memory_over_sizes"] - 1 <= MEMORY_WITHIN for point in points[1:]),
    }
