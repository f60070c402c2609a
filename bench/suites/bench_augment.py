"""Cost of each augmentation: training images a second with it, over the same step without."""

from __future__ import annotations

import pytest

from bench.harness.race import Race
from bench.harness.step_setup import race_steps, reference_step
from fastcnn.config import PRESETS, STRENGTHS, Config, read_recipe, recipe_names, resolve

LISTS: dict[str, tuple[str, ...]] = {
    **{str(name): (name,) for name in STRENGTHS},
    **{f"preset {name}": names for name, names in PRESETS.items()},
    **{f"recipe {name}": resolve(read_recipe(name)).augment for name in recipe_names()},
}


@pytest.mark.parametrize("name", [name for name, names in LISTS.items() if names])
def bench_augmentation(race: Race, name: str) -> None:
    """Ours, with the engine that is the default here."""
    config = Config(augment=LISTS[name])
    changed = reference_step(race, augmentations=config.augmentations)
    race_steps(race, name, changed, "no augmentation", reference_step(race), augment=",".join(config.augment))
