"""Figures of the runs: seconds to the target of epochs chosen beforehand, with 95% intervals over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench.accuracy.contenders import Contender
from bench.accuracy.experiment import Run
from bench.report.intervals import interval, ratio_interval
from bench.report.record import Row, row_of_runs

TARGET, REFERENCE = "seed", "seed.py"
"""The recipe whose mean accuracy after the last epoch is the target, and the script that whole commands are compared
with."""

BySeed = dict[int, Run]


def rows(runs: Sequence[Run], contenders: Sequence[Contender], seeds: Sequence[int]) -> list[Row]:
    """Return a results file's row a contender that has runs. All compared are over the seeds that both have."""
    found = {one.label: _by_cache(runs, one, seeds) for one in contenders}
    named = {one.name: found[one.label] for one in reversed(contenders)}  # the first of each name
    target, reference = named.get(TARGET, {}), named.get(REFERENCE, {})
    return [_row(one, found[one.label], target, reference) for one in contenders if found[one.label]]


def _by_cache(runs: Sequence[Run], contender: Contender, seeds: Sequence[int]) -> dict[str, BySeed]:
    """Return the runs by cache and seed. What ran cold alone keeps nothing: its warm runs are the same."""
    found: dict[str, BySeed] = {}
    for run in runs:
        if run["contender"] == contender.label and run["seed"] in seeds:
            found.setdefault(run["cache"], {})[run["seed"]] = run
    return found if "warm" in found or not found else found | {"warm": found["cold"]}


def _row(contender: Contender, mine: dict[str, BySeed], target: dict[str, BySeed], reference: dict[str, BySeed]) -> Row:
    warm = mine["warm"]
    first, accuracies = next(iter(warm.values())), [run["accuracy"] for run in warm.values()]
    train_seconds = [run["train_seconds"] for run in warm.values()]
    info: dict[str, Any] = {
        **{name: first[name] for name in ("data", "image_size", "num_train", "num_held_out", "settings")},
        "is_recipe": contender.is_recipe,
        "is_target": mine is target,
        "epochs": len(first["epochs"]),
        "accuracies": accuracies,
        "accuracy": interval(accuracies),
        "train_seconds": interval(train_seconds),
        "commands": {cache: _command(by_seed, reference.get(cache, {})) for cache, by_seed in mine.items()},
        "curves": {cache: _curves(by_seed) for cache, by_seed in mine.items()},
        "images_per_second": first["num_train"] * len(first["epochs"]) / statistics.mean(train_seconds),
    }
    if pairs := _pairs(warm, target.get("warm", {})):
        goal = statistics.mean(theirs["accuracy"] for _, theirs in pairs)
        info |= {
            "target": goal,
            "reached": statistics.mean(ours["accuracy"] for ours, _ in pairs) >= goal,
            "over_target": interval([ours["accuracy"] - theirs["accuracy"] for ours, theirs in pairs]),
            "train_ratio": _ratio(pairs, "train_seconds"),
        }
    return row_of_runs("accuracy", contender.title, [run["seconds"] for run in warm.values()], info)


def _pairs(mine: BySeed, theirs: BySeed) -> list[tuple[Run, Run]]:
    return [(run, theirs[seed]) for seed, run in mine.items() if seed in theirs]


def _ratio(pairs: Sequence[tuple[Run, Run]], measure: str) -> dict[str, float]:
    """Return how many times as long the others take."""
    return ratio_interval([theirs[measure] for _, theirs in pairs], [ours[measure] for ours, _ in pairs])


def _command(mine: BySeed, reference: BySeed) -> dict[str, Any]:
    found = {name: interval([run[name] for run in mine.values()]) for name in ("seconds", "processor_seconds")}
    pairs = _pairs(mine, reference)
    return found | ({"seconds_ratio": _ratio(pairs, "seconds")} if pairs else {})


def _curves(mine: BySeed) -> dict[str, list[list[float]]]:
    """Return seconds, processor_seconds and accuracy at the end of each epoch: (seeds, epochs)."""
    names = ("seconds", "processor_seconds", "accuracy")
    return {name: [[epoch[name] for epoch in run["epochs"]] for run in mine.values()] for name in names}
