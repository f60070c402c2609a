"""Rates of machines: counted, published or assumed by rates.csv, or measured on two CPU cores."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.report.record import Record, read

FOLDER = Path(__file__).resolve().parent
PUBLISHED = FOLDER.parent / "results" / "published" / "amd-epyc-2-cores.json"
PHOTO_BYTES = 128 * 128 * 3

Values = Mapping[str, float]
"""Rates by name."""


@dataclass(frozen=True)
class Rate:
    """Number with the range that it may well lie in, its unit and its source."""

    value: float
    low: float
    high: float
    unit: str
    kind: str  # measured, published or assumed
    source: str


def rate_table() -> dict[str, Rate]:
    """Return every rate of bench/scale/rates.csv by its name; the published results give the values left out there."""
    record, table = read(PUBLISHED), {}
    measured = _measured_rates(record)
    with (FOLDER / "rates.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            name, source = row["name"], row["source"]
            value = float(row["value"] or measured[name])
            low, high = (float(row[end] or measured.get(f"{name} {end}", value)) for end in ("low", "high"))
            if not row["value"]:
                source = f"`{record.command}`: {source}"
            table[name] = Rate(value, low, high, row["unit"], row["kind"], source)
    return table


def rate_values(*, threads: bool = False) -> dict[str, float]:
    """Return the value of every rate by its name; `threads`: of a loader that reads rows by several threads."""
    faster = ("row_read", "upload") if threads else ()
    return {name: rate.high if name in faster else rate.value for name, rate in rate_table().items()}


def _measured_rates(record: Record) -> dict[str, float]:
    """Return the rates that the published results file of two cores holds."""
    row = {(one["group"], one["name"]): one for one in record.rows}
    run = row["train", "cold start to the end"]["extra_info"]
    cold, warm = run["stages"]["cold"], run["stages"]["warm"]
    a_photo = row["growth", "50,000 photos, batch 32, 1 epoch"]["extra_info"]["photo_seconds"]
    step = row["step", "eager, bf16, 32,32,32,32,32, batch 32"]
    images = step["extra_info"]["images_per_second"] * step["median_seconds"]
    return {
        "start": cold["start"] + cold["import"] + cold["report"],
        "scan": 1 / a_photo["scan"],
        "cpu_decode": row["decode", "turbo, 2 threads"]["extra_info"]["images_per_second"] / 2,
        "cpu_step": images / step["median_seconds"],
        "cpu_step low": images / step["max_seconds"],
        "cpu_step high": images / step["min_seconds"],
        "evaluate": 4 * cold["eval"] / cold["train"],  # four photos are trained on for each that is held out
        "check": run["num_photos"] * PHOTO_BYTES / warm["decode"] / 2,
        "upload": PHOTO_BYTES / a_photo["upload"],
        "checkpoint": cold["checkpoint"] / run["epochs"],
    }
