"""A run of the benchmarks as a results file: machine, command, a row a benchmark. No host name, user name or path."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report.growth import growth

FORMAT = 1

Row = dict[str, Any]
"""A benchmark: group, name, n, median_seconds, min_seconds, max_seconds, and extra_info: what else it noted."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a results file holds, under the same names."""

    format: int
    machine: str
    """A folder's name for the hardware."""
    hardware: dict[str, Any]
    versions: dict[str, str]
    rates: dict[str, float]
    """The machine's own: bytes copied a second, matrix FLOP/s by precision."""
    settings: dict[str, Any]
    """device, scale, and what its sizes are."""
    command: str
    date: str
    """UTC, to the second."""
    commit: str | None
    """Commit id; with "+" where files had been changed."""
    seconds: float
    """All of the benchmarks together."""
    rows: list[Row]
    growth: dict[str, Any] | None
    skipped: list[dict[str, str]]
    """name and reason of every benchmark left out."""
    failed: list[str]
    """Names of the benchmarks that failed."""

    def of(self, group: str) -> list[Row]:
        """Return a group's rows, in the order in which they ran."""
        return [row for row in self.rows if row["group"] == group]

    @property
    def groups(self) -> list[str]:
        """The groups that have rows."""
        return list(dict.fromkeys(row["group"] for row in self.rows))

    def write(self, folder: Path) -> Path:
        """Write the results file into a folder and return its path."""
        path = folder / f"{re.sub('[^0-9T-]', '', self.date).replace('T', '-')}.json"
        self.save(path)
        return path

    def save(self, path: Path) -> None:
        """Write the results file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".partial")
        temporary.write_text(json.dumps(vars(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)


def read(path: Path) -> Record:
    """Return what a results file holds. Raises ValueError where it is none."""
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
    info = found["machine_info"]
    return Record(
        format=FORMAT,
        machine=slug(info["hardware"]),
        hardware=info["hardware"],
        versions=info["versions"],
        rates=info["rates"],
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
    return {
        "group": one["group"],
        "name": one["name"],
        "n": stats["rounds"],
        **{f"{name}_seconds": stats[name] for name in ("median", "min", "max")},
        "extra_info": one["extra_info"],
    }


def without_paths(text: str) -> str:
    """Return a text with every absolute path cut down to its last part."""
    return re.sub(r"(?<![\w.<])(?:[A-Za-z]:)?(?:[/\\][\w.+@~-]+)+[/\\]([\w.+@~-]+)", r"\1", text)
