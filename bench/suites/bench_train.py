"""Whole runs, from the start of the command to its end, over the baselines: cold and warm, by stage."""

from __future__ import annotations

import functools
import statistics
from pathlib import Path
from typing import Any

from bench.harness.race import Race
from bench.harness.whole_runs import Runs, stages, to_first_step


def bench_run(race: Race, runs: Runs, tmp_path: Path) -> None:
    """From JPEGs and empty caches to the trained model, over the baselines; then the same again, warm."""
    ours: list[dict[str, Any]] = []
    # The first also settles who trains on what: the baselines get its split.
    first = runs.train(runs.photos, tmp_path / "cold", epochs=1)
    split = Path(first["run_dir"]) / "split.csv"

    def cold() -> None:
        ours.append(runs.train(runs.photos, tmp_path / f"cache-{len(ours)}"))

    epochs, rounds = race.scale["epochs"], race.scale["train_rounds"]
    race(
        "cold start to the end",
        cold,
        {runs.named(name): functools.partial(runs.baseline, name, split) for name in race.scale["baselines"]},
        images=first["num_train"] * epochs,
        rounds=rounds,
        warm_up=False,
        num_photos=first["num_train"] + first["num_val"] + first["num_test"],
        epochs=epochs,
    )
    warm = [runs.train(runs.photos, tmp_path / f"cache-{number}") for number in range(rounds)]
    assert all(result["num_decoded"] == 0 for result in warm)
    assert all(result["num_decoded"] > 0 for result in ours)
    race.note(
        stages={"cold": stages(ours), "warm": stages(warm)},
        seconds_to_first_step={"cold": to_first_step(ours), "warm": to_first_step(warm)},
        **runs.steady(ours, warm),
        val_accuracy={
            "fastcnn": statistics.median(result["val_accuracy"] for result in ours + warm),
            **{
                name: statistics.median(
                    max(row["val_accuracy"] for row in found["epochs"]) for found in runs.done[name]
                )
                for name in runs.done
            },
        },
        engine=ours[0]["engine"],
        precision=ours[0]["precision"],
        decoder=ours[0]["decoder"],
    )
