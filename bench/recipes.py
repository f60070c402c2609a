"""Recipes against each other: accuracy on all held-out photos after the last epoch, paired over seeds.

    python -m bench.recipes DATA --recipes seed strong --seeds 100-107 --set epochs=10

The first recipe is what the others are compared with. A recipe is the name of one that ships with the package, or a
YAML file. Held out is whatever is not trained on: the validation photos and, where there are any, the test photos.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from fastcnn import checkpoint, dataset, runtime
from fastcnn.config import Config, read_recipe, read_yaml, resolve
from fastcnn.evaluate import BATCH_SIZE, Evaluator, restore
from fastcnn.loader import Options, resident
from fastcnn.optim import FlatParameters
from fastcnn.step import Normalise
from fastcnn.train import fit


def main() -> None:
    """Train every recipe with every seed, and print figures and differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--recipes", nargs="+", default=["seed", "strong"])
    parser.add_argument("--seeds", default="0-7", help="first-last")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="options of all runs")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    first, _, last = args.seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    common = dict(item.split("=", 1) for item in args.set)
    runs: dict[str, list[dict[str, float]]] = {recipe: [] for recipe in args.recipes}
    for seed in seeds:
        for recipe in args.recipes:
            values = read_yaml(Path(recipe)) if recipe.endswith((".yaml", ".yml")) else read_recipe(recipe)
            config = resolve(values, common, {"data": str(args.data), "seed": seed})
            runs[recipe].append(measured(config))
            print(f"seed {seed}  {recipe:20}  {runs[recipe][-1]}", flush=True)
    found = summary(runs)
    for line in lines(found):
        print(line)
    if args.out:
        about = {
            "command": f"python -m bench.recipes {args.data.name} --recipes {' '.join(args.recipes)} "
            f"--seeds {args.seeds} --set {' '.join(args.set)}",
            "hardware": runtime.describe(torch.device("cpu")),
            "versions": runtime.versions(),
        }
        args.out.write_text(json.dumps({**about, **found, "runs": runs}, indent=1) + "\n", encoding="utf-8")


def measured(config: Config) -> dict[str, float]:
    """Train and return accuracy and loss on all held-out photos after the last epoch, and images/s."""
    with tempfile.TemporaryDirectory() as folder:
        run = fit(config, run_dir=Path(folder) / "run")
        state = checkpoint.load(run.run_dir / "last.pt")
        data = dataset.prepare(
            config.data,
            image_size=config.decoded_size,
            decoder=config.decoder,
            cache_dir=config.cache_dir,
            split=run.run_dir / "split.csv",
            max_bad=config.max_bad,
        )
    held_out = (data.splits != "train").nonzero()[0]
    feed = resident(data.index, data.cache, held_out, Options(device=torch.device("cpu"), batch_size=BATCH_SIZE))
    model = restore(state)
    parameters = FlatParameters(model)
    if state["average"] is not None:
        parameters.values.copy_(state["average"])
    score = Evaluator(model, feed, Normalise(config.mean, config.std, config.image_size))().score
    return {
        "accuracy": score.accuracy,
        "loss": score.loss,
        "num_held_out": score.count,
        "images_per_second": run.summary["images_per_second"],
    }


def summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return mean and standard deviation of each recipe, and its differences from the first with a 95% interval."""
    accuracies = {recipe: [row["accuracy"] for row in rows] for recipe, rows in runs.items()}
    base, *others = accuracies
    found: dict[str, Any] = {
        "recipes": {
            recipe: {
                "mean_accuracy": statistics.mean(values),
                "standard_deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
                "images_per_second": statistics.median(row["images_per_second"] for row in runs[recipe]),
            }
            for recipe, values in accuracies.items()
        },
        "n": len(accuracies[base]),
        "num_held_out": runs[base][0]["num_held_out"],
        "over": base,
        "differences": {},
    }
    for recipe in others:
        pairs = [b - a for a, b in zip(accuracies[base], accuracies[recipe], strict=True)]
        half = (
            T_975[min(len(pairs), len(T_975)) - 1] * statistics.stdev(pairs) / math.sqrt(len(pairs)) if pairs[1:] else 0
        )
        mean = statistics.mean(pairs)
        found["differences"][recipe] = {"mean": mean, "low": mean - half, "high": mean + half}
    return found


# Student's t for a two-sided 95% interval of n pairs, from n = 1 on.
T_975 = [
    math.inf,
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
]


def lines(found: dict[str, Any]) -> list[str]:
    """Return the summary in words."""
    out = [
        f"{recipe}: {row['mean_accuracy']:.4f} (standard deviation {row['standard_deviation']:.4f}), "
        f"{row['images_per_second']:,.0f} images/s"
        for recipe, row in found["recipes"].items()
    ]
    for recipe, row in found["differences"].items():
        out.append(
            f"{recipe} - {found['over']}: {100 * row['mean']:+.2f} points "
            f"(95% interval {100 * row['low']:+.2f} to {100 * row['high']:+.2f}, n = {found['n']})"
        )
    return out


if __name__ == "__main__":
    main()
