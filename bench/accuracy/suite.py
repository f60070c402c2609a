"""Accuracy over time as one command's work: contenders parsed, runs made or read, and their record."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.accuracy import figures, runs
from bench.accuracy.contenders import known, parse_seeds, parsed
from bench.accuracy.experiment import prepare
from bench.harness.machine import slug
from bench.harness.race import SCALES
from bench.report.record import ROOT, Record, commit, own_record
from fastcnn.errors import FastCNNError
from fastcnn.system.device import describe_hardware, pick_device
from scripts.make_dataset import make

LINES = "accuracy.jsonl"


def measure(
    photos: Path | None,
    out: Path | None,
    *,
    contenders: Sequence[str] | None,
    seeds: str | None,
    scale: str,
    device: str,
    budget: float,
    command: str,
) -> Record:
    """Return the record of all runs, those that an earlier command made included. Raises FastCNNError.

    photos: a folder of photos by class; None generates them.
    out: folder of the results, whose accuracy.jsonl gets a line as each run ends; None: that of the machine.
    contenders: as `contenders.parsed` reads them; None takes all.
    seeds: FIRST-LAST; None: as many as the scale has.
    budget: seconds after which no run is begun.
    """
    sizes, start = SCALES[scale], time.perf_counter()
    chosen = [parsed(text, sizes["accuracy_epochs"]) for text in contenders or known()]
    numbers = parse_seeds(seeds) if seeds else range(sizes["accuracy_seeds"])
    machine = slug(describe_hardware(pick_device(device)))
    with tempfile.TemporaryDirectory(prefix="fastcnn-accuracy-") as folder:
        data = photos.resolve() if photos else Path(folder) / "generated"
        if not photos:
            make(data, classes=10, photos=sizes["num_photos"], seed=0)
        experiment = prepare(
            data,
            cache_dir=Path(folder) / "cache",
            image_size=sizes["image_size"],
            device=device,
            machine=machine,
            try_compile=sizes["try_compile"],
        )
        lines = (out or ROOT / "bench" / "results" / machine) / LINES
        measured = runs.measure(experiment, chosen, numbers, lines, seconds=budget)
    rows = figures.rows(measured.runs, chosen, numbers)
    if not rows:
        raise FastCNNError("every contender failed or was left out")
    return own_record(
        rows,
        command=command,
        settings={"scale": scale, "seeds": f"{numbers[0]}-{numbers[-1]}", **experiment.key},
        seconds=time.perf_counter() - start,
        commit=commit(),
        skipped=measured.skipped,
        failed=measured.failed,
    )
