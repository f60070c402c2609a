"""Recipes against each other: accuracy on all held-out photos after the last epoch, paired over seeds.

    python -m bench.recipes DATA --recipes seed strong --seeds 100-107 --set epochs=10

The first recipe is what the others are compared with. A recipe is the name of one that ships with the package, or a
YAML file. Held out is whatever is not trained on: the validation photos and, where there are any, the test photos.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.accuracy.contenders import parse_seeds
from bench.accuracy.experiment import write_held_out
from bench.harness.command import exit_code, typed
from bench.report.intervals import interval
from bench.report.record import Row, own_record, row_of_runs
from bench.report.tables import TABLES
from fastcnn.config import Config, read_recipe, read_yaml, resolve
from fastcnn.data import dataset
from fastcnn.runs.fit import fit


def main(argv: Sequence[str] | None = None) -> int:
    """Train every recipe with every seed, print figures and differences; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--recipes", nargs="+", default=["seed", "strong"])
    parser.add_argument("--seeds", default="0-7", help="first-last")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="options of all runs")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write a results file into this folder")
    args = parser.parse_args(argv)
    return exit_code("bench.recipes", lambda: _compare(args, typed("python -m bench.recipes", argv)))


def _compare(args: argparse.Namespace, command: str) -> int:
    seeds = parse_seeds(args.seeds)
    common = dict(item.split("=", 1) for item in args.set)
    runs: dict[str, list[dict[str, float]]] = {recipe: [] for recipe in args.recipes}
    for seed in seeds:
        for recipe in args.recipes:
            values = read_yaml(Path(recipe)) if recipe.endswith((".yaml", ".yml")) else read_recipe(recipe)
            config = resolve(values, common, {"data": str(args.data), "seed": seed})
            runs[recipe].append(measured(config))
            print(f"seed {seed}  {recipe:20}  {runs[recipe][-1]}", flush=True)
    rows = compared(runs, args.data.name)
    record = own_record(
        rows,
        command=command,
        settings={"seeds": args.seeds, "options": [item for item in args.set if "/" not in item]},
        seconds=sum(row["seconds"] for found in runs.values() for row in found),
    )
    for line in TABLES["recipes"].lines(record):
        print(": ".join(line[1:]))
    if args.out:
        record.write(args.out)
    return 0


def measured(config: Config) -> dict[str, float]:
    """Train and return accuracy and loss on all held-out photos after the last epoch, and images/s."""
    data = dataset.prepare(config, seed=config.seed)
    with tempfile.TemporaryDirectory() as folder:
        split = Path(folder) / "split.csv"
        num_held_out = write_held_out(split, data.index, data.split_numbers)
        run = fit(dataclasses.replace(config, split=str(split)), run_dir=Path(folder) / "run")
    last = run.metrics[-1]
    return {
        "accuracy": last["val/accuracy"],
        "loss": last["val/loss"],
        "num_held_out": num_held_out,
        "seconds": run.summary["seconds"]["total"],
        "images_per_second": run.summary["images_per_second"],
    }


def compared(runs: dict[str, list[dict[str, float]]], data: str) -> list[Row]:
    """Return a results file's row a recipe: its accuracies and, over the first, the differences' 95% interval.

    runs: recipe -> what `measured` returned for each seed.
    """
    rows, first = [], next(iter(runs))
    for recipe, found in runs.items():
        accuracies = [one["accuracy"] for one in found]
        rates = [one["images_per_second"] for one in found]
        info: dict[str, Any] = {
            "data": data,
            "num_held_out": int(found[0]["num_held_out"]),
            "accuracies": accuracies,
            "mean_accuracy": statistics.mean(accuracies),
            "standard_deviation": statistics.stdev(accuracies) if accuracies[1:] else 0.0,
            "images_per_second": statistics.median(rates),
        }
        if recipe != first:
            pairs = [a - one["accuracy"] for a, one in zip(accuracies, runs[first], strict=True)]
            speed = [a / one["images_per_second"] for a, one in zip(rates, runs[first], strict=True)]
            info |= {"over": first, "difference": interval(pairs), "speed": statistics.median(speed)}
        rows.append(row_of_runs("recipes", Path(recipe).stem, [one["seconds"] for one in found], info))
    return rows


if __name__ == "__main__":
    sys.exit(main())
