"""Accuracy over time as one command's work: contenders parsed, runs made or read, and their record."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from bench.accuracy import figures, runs
from bench.accuracy.contenders import known, parse_seeds, parsed
from bench.accuracy.experiment import Experiment
from bench.harness.machine import slug
from bench.harness.race import SCALES
from bench.report.record import ROOT, Record, own_record
from fastcnn.config import Config
from fastcnn.data import dataset
from fastcnn.errors import FastCNNError
from fastcnn.system.device import describe_hardware, pick_device
from scripts.make_dataset import make

LINES = "accuracy.jsonl"


def measure(args: argparse.Namespace, *, scale: str, budget: float, command: str) -> Record:
    """Return the record of all runs, those that an earlier command made included. Raises FastCNNError.

    args: the command's photos (None generates them), contenders (as `contenders.parsed` reads them; None takes all),
        seeds (FIRST-LAST; None: as many as the scale has), device and out, whose accuracy.jsonl gets a line as each run
        ends (None: the machine's folder).
    budget: seconds after which no run is begun.
    """
    sizes, start = SCALES[scale], time.perf_counter()
    chosen = [parsed(text, sizes["accuracy_epochs"]) for text in args.contenders or known()]
    seeds = parse_seeds(args.seeds) if args.seeds else range(sizes["accuracy_seeds"])
    device = args.device or "auto"
    machine = slug(describe_hardware(pick_device(device)))
    with tempfile.TemporaryDirectory(prefix="fastcnn-accuracy-") as folder:
        data = args.photos.resolve() if args.photos else Path(folder) / "generated"
        if not args.photos:
            make(data, classes=10, photos=sizes["num_photos"], seed=0)
        # Photos that cannot be read are left out.
        config = Config(data=str(data), image_size=sizes["image_size"], cache_dir=str(Path(folder) / "cache"))
        experiment = Experiment(
            data=data,
            index=dataset.prepare(config).index,
            image_size=sizes["image_size"],
            device=device,
            machine=machine,
            try_compile=sizes["try_compile"],
        )
        lines = (args.out or ROOT / "bench" / "results" / machine) / LINES
        measured = runs.measure(experiment, chosen, seeds, lines, seconds=budget)
    rows = figures.rows(measured.runs, chosen, seeds)
    if not rows:
        raise FastCNNError("every contender failed or was left out")
    return own_record(
        rows,
        command=command,
        settings={"scale": scale, "seeds": f"{seeds[0]}-{seeds[-1]}", **experiment.key},
        seconds=time.perf_counter() - start,
        skipped=measured.skipped,
        failed=measured.failed,
    )
