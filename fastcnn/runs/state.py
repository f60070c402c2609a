"""What the training loop works on: network, step and engine of one run, and how they are saved."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastcnn.config.fields import Config
from fastcnn.config.fields import Engine as EngineName
from fastcnn.data.feeds import Feed, SamplingWeights
from fastcnn.errors import FastCNNError, fall_back, first_line, warn
from fastcnn.network import fused_forward as fused
from fastcnn.network import sync_layers as sync
from fastcnn.network.pixels import Normalise
from fastcnn.network.small_cnn import SmallCNN
from fastcnn.storage import checkpoint
from fastcnn.storage import run_folder as runs
from fastcnn.system.device import DTYPES, describe_hardware
from fastcnn.system.ranks import ALONE, Ranks
from fastcnn.training import engine_choice, engines
from fastcnn.training.augment import Augment
from fastcnn.training.engines import Engine
from fastcnn.training.evaluation import Evaluation, Evaluator
from fastcnn.training.optimizers import OPTIMIZERS
from fastcnn.training.parameters import FlatParameters
from fastcnn.training.schedules import average_weights, scaled_lr, schedule
from fastcnn.training.step import TrainingStep


@dataclass
class Session:
    """What the training loop works on."""

    config: Config
    run_dir: Path
    classes: tuple[str, ...]
    model: SmallCNN
    step: TrainingStep
    ranks: Ranks = ALONE
    chances: SamplingWeights | None = None
    """Of each training photo, to be drawn for an epoch; None takes each once."""
    why: str = ""
    """Why `--engine auto` chose the engine."""
    epoch: int = 0
    """Epochs finished."""
    rows: list[dict[str, float]] = dataclasses.field(default_factory=list)
    """Figures of the epochs finished, as in metrics.csv."""
    best: dict[str, float] = dataclasses.field(default_factory=dict)
    """Figures of the best epoch so far."""

    @property
    def steps_done(self) -> int:
        """Steps that an interrupted epoch has behind it; 0 where the next epoch begins."""
        step = self.step
        return int(step.feed.cursor) // step.batch_size % step.num_steps

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Let the model hold what is evaluated and exported: the moving average of its weights, where there is one."""
        average = self.step.average
        return contextlib.nullcontext() if average is None else self.step.parameters.holding(average)

    def save(self, name: str) -> None:
        """Write a checkpoint into the run folder. All ranks call this, and the first writes."""
        step = self.step
        sums = self.ranks.sum_(step.sums.values.clone())
        self.agree()
        if not self.ranks.first:
            return
        state = {
            "config": self.config.to_dict(),
            "classes": list(self.classes),
            "network": self.model.options,
            "model": self.model.state_dict(),
            "optimizer": step.optimizer.state_dict(),
            "average": step.average,
            "loss_scale": step.loss_scale.state_dict() if step.loss_scale else {},
            "epoch": self.epoch,
            "cursor": int(step.feed.cursor),
            "step": int(step.number),
            "skipped": int(step.skipped),
            "sums": sums,
            "best": self.best,
            "rows": self.rows,
            "rng": torch.get_rng_state(),
            "device_rng": torch.cuda.get_rng_state() if step.number.is_cuda else None,
        }
        checkpoint.save(self.run_dir / name, state)

    def agree(self) -> None:
        """Give batch norms that kept statistics of each rank's own the mean of all ranks'."""
        if self.ranks.count > 1 and not self.config.sync_batch_norm:
            for buffer in self.model.buffers():
                self.ranks.sum_(buffer).div_(self.ranks.count)

    def save_best(self) -> None:
        """Write `best.pt`: as `last.pt`, but for the model, which is what is evaluated and exported."""
        with self.averaged():
            self.save("best.pt")

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to where a checkpoint of this run was saved. Raises FastCNNError where it is none of this run."""
        try:
            self._restore(state)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise FastCNNError(
                f"{self.run_dir / 'last.pt'} does not belong to this run ({first_line(error)}): begin a new one"
            ) from None

    def _restore(self, state: dict[str, Any]) -> None:
        step = self.step
        epochs, done = divmod(state["step"], step.num_steps)
        if (epochs, len(state["rows"]), done * step.batch_size) != (
            state["epoch"],
            state["epoch"],
            state["cursor"] % (step.num_steps * step.batch_size),
        ):
            raise ValueError(f"{state['step']} steps, {state['epoch']} epochs and {len(state['rows'])} rows of figures")
        if state["step"] > len(step.rates):
            raise ValueError(f"{state['step']} steps of {len(step.rates)}")
        self.model.load_state_dict(state["model"])
        step.parameters.refresh()
        saved = {**state["optimizer"], **state["loss_scale"], "average": state["average"]}
        current = {**step.optimizer.state_dict(), "average": step.average}
        current |= step.loss_scale.state_dict() if step.loss_scale else {}
        with torch.no_grad():
            for key, tensor in current.items():
                if tensor is not None and saved.get(key) is not None:
                    _copy(key, tensor, saved[key])
            _copy("sums", step.sums.values, state["sums"] if self.ranks.first else torch.zeros_like(state["sums"]))
        step.number.fill_(state["step"])
        step.skipped.fill_(state["skipped"])
        step.feed.cursor.fill_(state["cursor"])
        self.epoch, self.rows, self.best = state["epoch"], list(state["rows"]), dict(state["best"])
        torch.set_rng_state(state["rng"].cpu())
        if step.number.is_cuda and state["device_rng"] is not None:
            torch.cuda.set_rng_state(state["device_rng"].cpu())


def _copy(name: str, tensor: Tensor, value: Tensor) -> None:
    if tensor.shape != value.shape:
        raise ValueError(f"{name} is {tuple(value.shape)} there and {tuple(tensor.shape)} here")
    tensor.copy_(value)


def start(
    config: Config,
    folder: Path,
    classes: tuple[str, ...],
    feed: Feed,
    labels: npt.NDArray[np.int64] | None = None,
    *,
    fresh: bool = True,
    ranks: Ranks = ALONE,
) -> Session:
    """Return a session at its beginning: seeded weights, an optimizer, a step over `feed`.

    labels: (N,) of the training photos; left out, the feed's, which has them all where it is resident.
    fresh: False where a checkpoint is to be restored, so that `--init-from` is not needed any more.
    ranks: who trains it together.
    """
    labels = feed.labels.cpu().numpy() if labels is None else labels
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
    )
    if config.init_from and fresh:
        begin_with(model, config.init_from)
    sync.convert(model, ranks, batch_norm=config.sync_batch_norm)
    model = model.to(device)
    dtype = DTYPES[config.precision]
    assert feed.batch_size in (None, config.batch_size // ranks.count)
    lr = scaled_lr(config.lr, config.lr_scaling, config.batch_size)
    parameters = FlatParameters(model, dtype)
    steps_per_epoch = min(len(feed) // config.batch_size, config.limit_train_batches or len(feed))
    num_steps = config.epochs * steps_per_epoch
    own = {"momentum": config.momentum} if config.optimizer == "sgd" else {}
    step = TrainingStep(
        parameters,
        OPTIMIZERS[config.optimizer](parameters, lr, config.weight_decay, **own),
        feed,
        Normalise(config.mean, config.std, config.image_size, dtype, device),
        batch_size=config.batch_size,
        rates=schedule(
            config.schedule,
            lr,
            num_steps,
            warmup_steps=round(config.warmup_epochs * steps_per_epoch),
            decay_steps=max(1, round(config.decay_epochs * steps_per_epoch)) if config.decay_epochs else None,
            decay_rate=config.decay_rate,
        ),
        augment=Augment(in_the_step(config), config.image_size),
        label_smoothing=config.label_smoothing,
        class_weights=class_weights(labels, len(classes)) if config.balance == "weights" else None,
        limit=config.limit_train_batches,
        clip_norm=config.clip_norm,
        skip_nan=config.on_nan == "skip",
        average=average_weights(config.ema, num_steps) if config.ema else None,
        ranks=ranks,
    )
    session = Session(config, folder, classes, model, step, ranks)
    if config.balance == "sampling":
        session.chances = (class_weights(labels, len(classes))[labels] / len(labels)).numpy().astype(np.float64)
        session.chances /= session.chances.sum()
    return session


def in_the_step(config: Config) -> list[tuple[str, float]]:
    """Return the augmentations that the step makes: a streamed photo was cropped when it was decoded."""
    return [(name, strength) for name, strength in config.augmentations if (name, config.loader) != ("crop", "stream")]


def class_weights(labels: npt.NDArray[np.int64], num_classes: int) -> Tensor:
    """Return (num_classes,): weights that make the classes count alike; 1 on average over the photos."""
    counts = np.bincount(labels, minlength=num_classes).clip(min=1)
    return torch.from_numpy(len(labels) / (np.count_nonzero(np.bincount(labels)) * counts)).float()


def begin_with(model: SmallCNN, source: str) -> None:
    """Load the weights of a run or checkpoint; the output layer stays as it is where the classes differ in number.

    Raises FastCNNError, naming the first, where another weight has another shape.
    """
    path = Path(source) if Path(source).is_file() else runs.find(source) / "best.pt"
    found, own = checkpoint.load(path)["model"], model.state_dict()
    anew = {name for name in ("output.weight", "output.bias") if found[name].shape != own[name].shape}
    for name, value in own.items():
        if name not in found or (name not in anew and found[name].shape != value.shape):
            shape = tuple(found[name].shape) if name in found else "nothing"
            raise FastCNNError(
                f"--init-from {source}: {name} is {shape} there and {tuple(value.shape)} here: "
                "give the options of that network (its config.yaml has them)"
            )
    model.load_state_dict({name: own[name] if name in anew else found[name] for name in own})
    if anew:
        warn(f"--init-from {source}: its number of classes is another, so the output layer begins anew")


def make_engine(session: Session) -> Engine:
    """Return what runs the training step; note in the session which it is and, for `--engine auto`, why."""
    config, step = session.config, session.step
    step.parameters.compute.train()
    if config.engine == "auto":
        hardware = describe_hardware(step.feed.images.device)
        shape = {name: getattr(config, name) for name in ("batch_size", "precision", "augment")}
        signature = json.dumps([hardware, torch.__version__, session.model.options, shape])
        num_steps = config.epochs * step.num_steps
        engine, name, session.why = engine_choice.choose(
            step, num_steps, signature, strict=config.strict, slowest=session.ranks.slowest
        )
    else:
        engine, name = engines.build(config.engine, step, strict=config.strict)
        plain = fused.plain_blocks(step.network) if name.startswith("fused") else ""
        if plain:
            fall_back(plain, strict=config.strict)
    session.config = dataclasses.replace(config, engine=cast(EngineName, name))
    return engine


def make_evaluator(session: Session, feed: Feed) -> Evaluator:
    """Return what scores the session's model on a feed, by the engine that trains it."""
    name, strict = session.config.engine, session.config.strict
    parameters = session.step.parameters
    return Evaluator(
        parameters.compute,
        feed,
        session.step.normalise,
        lambda step: engines.build(name, step, strict=strict)[0],
        ranks=session.ranks,
    )


def judge(session: Session, feed: Feed) -> Evaluation:
    """Return what the model, as it is now, says of every photo of a feed. One pass: nothing is compiled or captured."""
    step, num_classes = session.step, len(session.classes)
    return Evaluator(step.parameters.compute, feed, step.normalise, num_classes=num_classes, ranks=session.ranks)()
