"""Training steps over random photos, ready to be timed: a step's time does not depend on what the photos show."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from bench.harness.race import Race
from bench.harness.timing import clocked, steps_a_slice
from fastcnn.data.feeds import Feed
from fastcnn.network.kernels import cpu_max_pool
from fastcnn.network.pixels import Normalise
from fastcnn.network.small_cnn import SmallCNN
from fastcnn.system.device import DTYPES, pick_precision
from fastcnn.system.ranks import ALONE, Ranks
from fastcnn.training import engines
from fastcnn.training.augment import Augment
from fastcnn.training.engine_choice import STEPS_PER_REPLAY
from fastcnn.training.engines import Engine
from fastcnn.training.optimizers import Adam
from fastcnn.training.parameters import FlatParameters
from fastcnn.training.step import TrainingStep

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NUM_CLASSES = 10


def random_feed(device: torch.device, count: int, size: int) -> Feed:
    """Return a feed of random pixels."""
    return Feed(
        images=torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, device=device),
        labels=torch.randint(0, NUM_CLASSES, (count,), device=device),
        permutation=torch.randperm(count, device=device),
        cursor=torch.zeros(1, dtype=torch.int64, device=device),
    )


def num_images(device: torch.device, batch: int) -> int:
    """Return the images of an epoch to time steps on: two batches or more, on a GPU two replays of 8 steps.

    In a shorter epoch none would be replayed 8 at a time.
    """
    return max(512, (2 * STEPS_PER_REPLAY if device.type == "cuda" else 2) * batch)


def make_step(
    feed: Feed,
    filters: tuple[int, ...],
    batch: int,
    precision: str,
    augmentations: Sequence[tuple[str, float]] = (),
    ranks: Ranks = ALONE,
) -> TrainingStep:
    """Return a training step of the reference network, with augmentations by name and strength."""
    device, dtype, size = feed.images.device, DTYPES[precision], feed.images.shape[1]
    torch.manual_seed(0)
    if device.type == "cpu":
        cpu_max_pool.load()
    model = SmallCNN(NUM_CLASSES, filters=filters, image_size=size).to(device)
    parameters = FlatParameters(model, dtype)
    parameters.compute.train()
    step = TrainingStep(
        parameters,
        Adam(parameters, 1e-4),
        feed,
        Normalise(MEAN, STD, size, dtype, device),
        batch_size=batch,
        lr_schedule=torch.full((1_000_000,), 1e-4),
        augment=Augment(augmentations, size),
        ranks=ranks,
    )
    step.draws.copy_(step.augment.draw(len(feed), (0, 1)))
    return step


def reference_step(
    race: Race, feed: Feed | None = None, augmentations: Sequence[tuple[str, float]] = (), ranks: Ranks = ALONE
) -> TrainingStep:
    """Return the step of the form's first network at its first batch size, in the machine's best precision.

    feed: left out, random photos.
    """
    size, batch = race.scale["image_size"], race.scale["batches"][0]
    precision = pick_precision("auto", race.device, deterministic=False, strict=False)
    feed = feed or random_feed(race.device, max(512, 2 * batch), size)
    return make_step(feed, race.scale["networks"][0], batch, precision, augmentations, ranks)


def default_engine(step: TrainingStep) -> Engine:
    """Return the engine that a run takes on the step's device unless told otherwise."""
    return engines.build("graphed" if step.feed.images.device.type == "cuda" else "eager", step)[0]


def race_steps(race: Race, name: str, ours: TrainingStep, baseline: str, theirs: TrainingStep, **info: Any) -> None:
    """Race a step against another at the same batch size, each with the engine that is the default here."""
    engine, other = default_engine(ours), default_engine(theirs)
    count = steps_a_slice(functools.partial(run_steps, theirs, other), race.scale["slice_seconds"], race.device)
    run_steps(ours, engine, 3)
    race(
        name,
        lambda: checked_steps(ours, engine, count),
        {baseline: clocked(lambda: checked_steps(theirs, other, count), race.device)},
        images=ours.batch_size * count,
        batch=ours.batch_size,
        **info,
    )


def run_steps(step: TrainingStep, engine: Engine, num_steps: int) -> None:
    """Run a number of steps, over as many epochs as they take."""
    while num_steps:
        step.feed.cursor.zero_()
        portion = min(num_steps, step.num_steps)
        engine.run(portion)
        num_steps -= portion


def checked_steps(step: TrainingStep, engine: Engine, num_steps: int) -> None:
    """Run a number of steps and check the loss."""
    run_steps(step, engine, num_steps)
    assert math.isfinite(step.sums.read().loss)
