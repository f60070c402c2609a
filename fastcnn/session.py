"""What the training loop works on: network, step and engine of one run, and how they are saved."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from fastcnn import checkpoint, engines, runtime
from fastcnn.config import Config
from fastcnn.config import Engine as EngineName
from fastcnn.engines import Engine
from fastcnn.evaluate import Evaluation, Evaluator
from fastcnn.loader import Feed
from fastcnn.model import SmallCNN
from fastcnn.optim import Adam, FlatParameters, average_weights, schedule
from fastcnn.step import Normalise, TrainingStep


@dataclass
class Session:
    """What the training loop works on."""

    config: Config
    run_dir: Path
    classes: tuple[str, ...]
    model: SmallCNN
    step: TrainingStep
    why: str = ""
    """Why `--engine auto` chose the engine."""
    epoch: int = 0
    """Epochs finished."""
    best: dict[str, float] = dataclasses.field(default_factory=dict)
    """Figures of the best epoch so far."""

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Let the model hold what is evaluated and exported: the moving average of its weights, where there is one."""
        average = self.step.average
        return contextlib.nullcontext() if average is None else self.step.parameters.holding(average)

    def save(self, name: str) -> None:
        """Write a checkpoint into the run folder."""
        step = self.step
        state = {
            "config": self.config.to_dict(),
            "classes": list(self.classes),
            "network": self.model.options,
            "model": self.model.state_dict(),
            "optimizer": step.optimizer.state_dict(),
            "average": step.average,
            "epoch": self.epoch,
            "cursor": int(step.feed.cursor),
            "step": int(step.number),
            "sums": step.sums.values,
            "best": self.best,
            "rng": torch.get_rng_state(),
        }
        checkpoint.save(self.run_dir / name, state)


def start(config: Config, folder: Path, classes: tuple[str, ...], feed: Feed) -> Session:
    """Return a session at its beginning: seeded weights, an optimizer, a step over `feed`."""
    device = feed.images.device
    torch.manual_seed(config.seed)  # on the CPU first: the same initial weights on every device
    model = SmallCNN(
        len(classes),
        filters=config.filters,
        kernel_size=config.kernel_size,
        activation=config.activation,
        batch_norm=config.batch_norm,
        dense_neurons=config.dense_neurons,
        dropout=config.dropout,
        image_size=config.image_size,
    ).to(device)
    dtype = runtime.DTYPES[config.precision]
    parameters = FlatParameters(model, dtype)
    num_steps = config.epochs * (len(feed) // config.batch_size)
    step = TrainingStep(
        parameters,
        Adam(parameters, config.lr),
        feed,
        Normalise(config.mean, config.std, config.image_size, dtype, device),
        batch_size=config.batch_size,
        rates=schedule(config.schedule, config.lr, num_steps),
        augmentations=config.augment,
        clip_norm=config.clip_norm,
        average=average_weights(config.ema, num_steps) if config.ema else None,
    )
    return Session(config, folder, classes, model, step)


def make_engine(session: Session) -> Engine:
    """Return what runs the training step; note in the session which it is and, for `--engine auto`, why."""
    config, step = session.config, session.step
    step.parameters.compute.train()
    if config.engine == "auto":
        hardware = runtime.describe(step.feed.images.device)
        shape = {name: getattr(config, name) for name in ("batch_size", "precision", "augment")}
        signature = json.dumps([hardware, torch.__version__, session.model.options, shape])
        num_steps = config.epochs * step.num_steps
        engine, name, session.why = engines.choose(step, num_steps, signature, strict=config.strict)
    else:
        engine, name = engines.build(config.engine, step, strict=config.strict)
    session.config = dataclasses.replace(config, engine=cast(EngineName, name))
    return engine


def make_evaluator(session: Session, feed: Feed) -> Evaluator:
    """Return what scores the session's model on a feed, by the engine that trains it."""
    name, strict = session.config.engine, session.config.strict
    parameters = session.step.parameters
    return Evaluator(
        parameters.compute, feed, session.step.normalise, lambda step: engines.build(name, step, strict=strict)[0]
    )


def judge(session: Session, feed: Feed) -> Evaluation:
    """Return what the model, as it is now, says of every photo of a feed. One pass: nothing is compiled or captured."""
    step = session.step
    return Evaluator(step.parameters.compute, feed, step.normalise, num_classes=len(session.classes))()
