"""Everything that trains: feeds, network, training step, engine and evaluator, built from a configuration."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastcnn.config import Config
from fastcnn.config import Engine as EngineName
from fastcnn.data import class_names
from fastcnn.data.buffered_feed import BufferedFeed
from fastcnn.data.dataset import Dataset
from fastcnn.data.feeds import Feed
from fastcnn.data.loaders import LOADERS, Options
from fastcnn.errors import FastCNNError, fall_back, first_line, warn
from fastcnn.network import sync_layers
from fastcnn.network.hybrid_forward import plain_blocks
from fastcnn.network.kernels import cpu_max_pool
from fastcnn.network.pixels import Normalise
from fastcnn.network.small_cnn import SmallCNN, all_finite
from fastcnn.runs.resume import restore
from fastcnn.runs.state import RunContext, RunState
from fastcnn.storage import checkpoint, run_folder
from fastcnn.system import generators
from fastcnn.system.device import DTYPES, describe_hardware, is_out_of_memory, release_memory
from fastcnn.system.ranks import ALONE, Ranks
from fastcnn.system.thread_choice import ThreadChoice
from fastcnn.training import engine_choice, engines
from fastcnn.training.augment import Augment
from fastcnn.training.engines import Engine
from fastcnn.training.evaluation import BATCH_SIZE, Evaluator
from fastcnn.training.optimizers import OPTIMIZERS, Muon, Optimizer
from fastcnn.training.parameters import FlatParameters
from fastcnn.training.schedules import average_weights, scaled_lr, schedule
from fastcnn.training.step import TrainingStep


@dataclass(frozen=True, kw_only=True)
class Training:
    """Dataset, feeds, state, engine and evaluator of one run."""

    data: Dataset
    feeds: dict[str, Feed]
    """By split: all training images, and this rank's part of the validation and test images."""
    state: RunState
    engine: Engine
    """Runs the training step."""
    evaluator: Evaluator
    """Scores the validation images."""
    threads: ThreadChoice
    """Number of CPU threads of the next steps."""


def build(run: RunContext, data: Dataset) -> Training:
    """Return what trains on a dataset, restored from `last.pt` if there is one.

    With `--loader auto`, images that turn out not to fit into memory are mapped from the cache instead.
    """
    with run.stopwatch.stage("compile"):
        load_cpu_kernels(run.device, strict=run.config.strict)
    try:
        return _build(run, data)
    except (RuntimeError, MemoryError) as error:
        # With several ranks, the others are already waiting for this one.
        can_map = run.config.loader == "auto" and data.loader == "resident" and run.ranks.count == 1
        if not can_map or not is_out_of_memory(error):
            raise
        why = f"resident ran out of memory ({first_line(error)})"
    release_memory()  # here, as the traceback that held it is gone
    fall_back(f"loader mapped: {why}", strict=run.config.strict)
    return _build(run, dataclasses.replace(data, loader="mapped", loader_reason=why))


def _build(run: RunContext, data: Dataset) -> Training:
    config = dataclasses.replace(run.config, decoder=data.decoder, loader=data.loader)
    with run.stopwatch.stage("upload"):
        feeds = _make_feeds(run, config, data)
    labels, fresh = data.index.labels[data.photos("train")], not run.has_checkpoint
    state = start(config, run.run_dir, data.index.classes, feeds["train"], labels, fresh=fresh, ranks=run.ranks)
    if run.has_checkpoint:
        restore(state, run.console)
    with run.stopwatch.stage("compile"):
        engine = make_engine(state)
        evaluator = make_evaluator(state, feeds["val"])
        if run.device.type != "cpu":  # an eager engine has run nothing yet: does the step fit?
            engines.time_step(engine, state.step, 1)
    threads = ThreadChoice(torch.get_num_threads(), fixed=config.threads is not None or state.config.engine != "eager")
    return Training(data=data, feeds=feeds, state=state, engine=engine, evaluator=evaluator, threads=threads)


def load_cpu_kernels(device: torch.device, *, strict: bool) -> None:
    """Compile or load the pooling kernel for CPUs; falls back to torch's own."""
    if device.type == "cpu" and sys.platform == "linux":
        try:
            cpu_max_pool.load()
        except cpu_max_pool.NoKernel as error:
            fall_back(f"training without the fast pooling kernel: {error}", strict=strict)


def _make_feeds(run: RunContext, config: Config, data: Dataset) -> dict[str, Feed]:
    """Return the feed of each split."""
    ranks = run.ranks

    def feed(photos: npt.NDArray[np.intp], batch_size: int, **share: int) -> Feed:
        options = Options(
            device=run.device,
            batch_size=batch_size,
            decoder=config.decoder,
            workers=config.workers,
            crop_scale=dict(config.augmentations).get("crop"),
            max_pixels=config.max_pixels,
            **share,
        )
        return LOADERS[config.loader](data.cache, photos, options)

    feeds = {"train": feed(data.photos("train"), config.batch_size, rank=ranks.rank, num_ranks=ranks.count)}
    for split in ("val", "test"):  # each rank scores its own part
        feeds[split] = feed(data.photos(split)[ranks.rank :: ranks.count], BATCH_SIZE)
    return feeds


def start(
    config: Config,
    run_dir: Path,
    classes: tuple[str, ...],
    feed: Feed,
    labels: npt.NDArray[np.int64] | None = None,
    *,
    fresh: bool = True,
    ranks: Ranks = ALONE,
) -> RunState:
    """Return the state of a run before its first step: seeded weights, an optimizer and a step over `feed`.

    Args:
        config: resolved for this machine.
        run_dir: the run folder.
        classes: names, in the order of the labels.
        feed: training images on the device.
        labels: (N,) of all training images; None takes the feed's, which a resident feed has in full.
        fresh: whether `--init-from` applies; a checkpoint that is about to be restored replaces it.
        ranks: the processes that train together.
    """
    labels = feed.labels.cpu().numpy() if labels is None else labels
    own = generators.seeded(feed.images.device, config.seed)
    model = SmallCNN(
        len(classes),
        filters=config.filters,
        kernel_size=config.kernel_size,
        activation=config.activation,
        batch_norm=config.batch_norm,
        dense_neurons=config.dense_neurons,
        dropout=config.dropout,
        image_size=config.image_size,
        tta=config.tta,
        generator=own.cpu,
    )
    if config.init_from and fresh:
        load_initial_weights(model, classes, config.init_from)
    sync_layers.convert(model, ranks, batch_norm=config.sync_batch_norm)
    step = _make_step(config, model.to(feed.images.device), feed, labels, ranks, own.device)
    sampling = sampling_weights(labels, len(classes)) if config.balance == "sampling" else None
    return RunState(config, run_dir, classes, model, step, own, ranks, sampling)


def _make_step(
    config: Config,
    model: SmallCNN,
    feed: Feed,
    labels: npt.NDArray[np.int64],
    ranks: Ranks,
    generator: torch.Generator,
) -> TrainingStep:
    """Return the training step of a model on the feed's device. labels: (N,) of all training images."""
    assert feed.batch_size in (None, config.batch_size // ranks.count)
    dtype = DTYPES[config.precision]
    parameters = FlatParameters(model, dtype)
    lr = scaled_lr(config.lr, config.lr_scaling, config.batch_size)
    steps_per_epoch = min(len(feed) // config.batch_size, config.limit_train_batches or len(feed))
    num_steps = config.epochs * steps_per_epoch
    return TrainingStep(
        parameters,
        _make_optimizer(config, parameters, lr),
        feed,
        Normalise(config.mean, config.std, config.image_size, dtype, feed.images.device),
        batch_size=config.batch_size,
        lr_schedule=schedule(
            config.schedule,
            lr,
            num_steps,
            warmup_steps=round(config.warmup_epochs * steps_per_epoch),
            decay_steps=max(1, round(config.decay_epochs * steps_per_epoch)) if config.decay_epochs else None,
            decay_rate=config.decay_rate,
        ),
        augment=Augment(in_the_step(config), config.image_size),
        label_smoothing=config.label_smoothing,
        class_weights=class_weights(labels, model.output.out_features) if config.balance == "weights" else None,
        limit=config.limit_train_batches,
        clip_norm=config.clip_norm,
        skip_nan=config.on_nan == "skip",
        average=average_weights(config.ema, num_steps) if config.ema else None,
        ranks=ranks,
        generator=generator,
    )


def _make_optimizer(config: Config, parameters: FlatParameters, lr: float) -> Optimizer:
    if config.optimizer == "muon":
        adam_lr = config.adam_lr * lr / config.lr
        return Muon(parameters, lr, config.weight_decay, config.momentum, adam_lr=adam_lr, fixed_norm=config.fixed_norm)
    return OPTIMIZERS[config.optimizer](parameters, lr, config.weight_decay, config.momentum)


def in_the_step(config: Config) -> list[tuple[str, float]]:
    """Return (name, strength) of the augmentations that the step applies: a streamed image is cropped on decoding."""
    return [(name, strength) for name, strength in config.augmentations if (name, config.loader) != ("crop", "stream")]


def class_weights(labels: npt.NDArray[np.int64], num_classes: int) -> Tensor:
    """Return (num_classes,) loss weights that balance the classes; their mean over the images is 1."""
    counts = np.bincount(labels, minlength=num_classes)
    return torch.from_numpy(len(labels) / (np.count_nonzero(counts) * counts.clip(min=1))).float()


def sampling_weights(labels: npt.NDArray[np.int64], num_classes: int) -> npt.NDArray[np.float64]:
    """Return (N,) probabilities of drawing each image that draw all classes equally often."""
    weights = class_weights(labels, num_classes)[labels] / len(labels)
    sampling: npt.NDArray[np.float64] = weights.numpy().astype(np.float64)
    sampling /= sampling.sum()
    return sampling


def load_initial_weights(model: SmallCNN, classes: Sequence[str], source: str) -> None:
    """Load the weights of a run or checkpoint.

    Rows of the output layer go by the names of the classes; the layer keeps its own weights, with a warning, where the
    classes are others. Raises FastCNNError, naming the first, if another weight has another shape, or if one is not
    finite.
    """
    path = Path(source) if Path(source).is_file() else run_folder.find(source) / "best.pt"
    saved, own = checkpoint.load(path), model.state_dict()
    found = saved["model"]
    if not all_finite(found.values()):
        raise FastCNNError(f"--init-from {source}: its weights are not finite numbers: give another run")
    output = ("output.weight", "output.bias")
    for name, value in own.items():
        if name not in found or (name not in output and found[name].shape != value.shape):
            shape = tuple(found[name].shape) if name in found else "nothing"
            raise FastCNNError(
                f"--init-from {source}: {name} is {shape} there and {tuple(value.shape)} here: "
                "give the options of that network (its config.yaml has them)"
            )
    places, names = class_names.positions(saved["classes"]), list(class_names.positions(classes))
    if places.keys() == set(names):
        order = [places[name] for name in names]
        found |= {name: found[name][order] for name in output}
    else:
        found |= {name: own[name] for name in output}
        warn(f"--init-from {source} has other classes: the output layer starts from random weights")
    model.load_state_dict({name: found[name] for name in own})


def make_engine(state: RunState) -> Engine:
    """Return the engine for the training step; note its name and the reason for it in the state."""
    config, step = state.config, state.step
    step.parameters.compute.train()
    state.ranks.sum_(torch.zeros(1, device=step.feed.images.device))  # NCCL connects now: no capture can hold that
    if config.engine == "auto":
        hardware = describe_hardware(step.feed.images.device)
        shape = {name: getattr(config, name) for name in ("batch_size", "precision", "augment")}
        signature = json.dumps([hardware, torch.__version__, state.model.options, shape])
        num_steps = config.epochs * step.num_steps
        engine, name, state.engine_reason = engine_choice.choose(
            step,
            num_steps,
            signature,
            strict=config.strict,
            one_by_one=isinstance(step.feed, BufferedFeed),
        )
    else:
        engine, name = engines.build(config.engine, step, strict=config.strict)
        plain = plain_blocks(step.network) if name.startswith("hybrid") else ""
        if plain:
            fall_back(plain, strict=config.strict)
    state.config = dataclasses.replace(config, engine=cast(EngineName, name))
    return engine


def make_evaluator(state: RunState, feed: Feed) -> Evaluator:
    """Return what scores the model on a feed, with the engine that trains it."""
    config, step = state.config, state.step
    return Evaluator(
        step.parameters.compute,
        feed,
        step.normalise,
        lambda evaluation: engines.build(config.engine, evaluation, strict=config.strict)[0],
        ranks=state.ranks,
    )
