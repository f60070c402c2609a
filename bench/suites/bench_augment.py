"""What each augmentation costs: training images a second with it, over the same step without."""

from __future__ import annotations

import math

import pytest

from bench.harness.race import Race
from bench.harness.step_setup import make_step, random_feed, run_steps
from bench.harness.timing import Clocked, clocked
from fastcnn.config import PRESETS, STRENGTHS, Config, read_recipe, recipe_names, resolve
from fastcnn.system.device import pick_precision
from fastcnn.training import engines

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

    def runner(names: tuple[str, ...]) -> tuple[Clocked, int]:
        strengths = Config(augment=names).augmentations
        step = make_step(feed, race.scale["networks"][0], batch, precision, strengths)
        engine, _ = engines.build("graphed" if device.type == "cuda" else "eager", step)
        run_steps(step, engine, 3)
        seconds = clocked(lambda: run_steps(step, engine, 3), device)() / 3
        num_steps = max(3, math.ceil(0.5 / seconds)) if not names else count

        def run() -> None:
            run_steps(step, engine, num_steps)
            assert math.isfinite(step.sums.read().loss)

        return clocked(run, device), num_steps

    plain, count = runner(())
    changed, _ = runner(LISTS[name])
    strengths = ",".join(Config(augment=LISTS[name]).augment)
    race(name, changed, {"no augmentation": plain}, images=batch * count, augment=strengths, batch=batch)
