"""Cost of each augmentation: training images a second with it, over the same step without."""

from __future__ import annotations

import pytest

from bench.harness.race import Race
from bench.harness.step_setup import default_engine, make_step, random_feed, run_steps, steps_a_slice, timed_steps
from fastcnn.config import PRESETS, STRENGTHS, Config, read_recipe, recipe_names, resolve
from fastcnn.system.device import pick_precision
from fastcnn.training.engines import Engine
from fastcnn.training.step import TrainingStep

LISTS: dict[str, tuple[str, ...]] = {
    **{str(name): (name,) for name in STRENGTHS},
    **{f"preset {name}": names for name, names in PRESETS.items()},
    **{f"recipe {name}": resolve(read_recipe(name)).augment for name in recipe_names()},
}


@pytest.mark.parametrize("name", [name for name, names in LISTS.items() if names])
def bench_augmentation(race: Race, name: str) -> None:
    """Ours, with the engine that is the default here."""
    device, size, batch = race.device, race.scale["image_size"], race.scale["batches"][0]
    precision = pick_precision("auto", device, deterministic=False, strict=False)
    feed = random_feed(device, max(512, 2 * batch), size)

    def prepared(names: tuple[str, ...]) -> tuple[TrainingStep, Engine]:
        step = make_step(feed, race.scale["networks"][0], batch, precision, Config(augment=names).augmentations)
        return step, default_engine(step)

    plain, changed = prepared(()), prepared(LISTS[name])
    count = steps_a_slice(*plain, race.scale["slice_seconds"])
    run_steps(*changed, 3)
    strengths = ",".join(Config(augment=LISTS[name]).augment)
    baselines = {"no augmentation": timed_steps(*plain, count)}
    race(name, timed_steps(*changed, count), baselines, images=batch * count, augment=strengths, batch=batch)
