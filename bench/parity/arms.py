"""Arms of parity: seed.py's training, the fast path, and single changes between them, each as figures by epoch."""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.baselines import seed as baseline
from fastcnn.config import read_recipe, resolve
from fastcnn.data import dataset
from fastcnn.data.loaders import LOADERS, Options
from fastcnn.errors import DataError
from fastcnn.network.pixels import Normalise
from fastcnn.network.small_cnn import restore
from fastcnn.runs.fit import fit
from fastcnn.storage import checkpoint
from fastcnn.system.device import DTYPES
from fastcnn.training.evaluation import BATCH_SIZE, Evaluator
from fastcnn.training.parameters import FlatParameters

SHARED = ("epochs", "batch_size", "lr", "schedule", "image_size")
"""Options of a run, besides its seed, that its figures depend on."""

Photo = tuple[Path, int]
Found = dict[str, Any]
"""A run: accuracy (0 to 1) on the held-out photos after the last epoch, train_losses and held_out_losses (one an
epoch), seconds; of the fast path also wrong_labels (photos with another label than seed.py's) and settings."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Photos, split and options that both sides train with."""

    data: Path
    classes: list[str]
    train: list[Photo]
    held_out: list[Photo]
    pixels: dict[Path, npt.NDArray[np.uint8]]
    """(size, size, 3) of every photo, as seed.py decodes it. Decoding it once and not in every epoch changes nothing
    that seed.py computes."""
    split: Path
    """A split.csv that says the same to the fast path."""
    epochs: int
    batch_size: int
    lr: float
    schedule: str
    image_size: int
    threads: int | None

    @property
    def photos_key(self) -> str:
        """Hash of the photos' names and their split."""
        names = [str(path.relative_to(self.data)) for path, _ in (*self.train, *self.held_out)]
        return hashlib.sha256("\n".join([*names, str(len(self.train))]).encode(errors="surrogateescape")).hexdigest()

    @property
    def largest_class(self) -> float:
        """The share of held-out photos that are of the most frequent class."""
        return max(Counter(label for _, label in self.held_out).values()) / len(self.held_out)


@contextlib.contextmanager
def prepared(data: Path, *, val_fraction: float, note: Callable[[str], None], **how: Any) -> Iterator[Experiment]:
    """Give the experiment on a folder's photos, those that Pillow cannot read left out.

    Held out are all photos of the val and test folders, or, without those, a share of each class, the same for every
    seed. The listing and the labels are seed.py's.
    """
    data = data.resolve()
    if not data.is_dir():
        raise DataError(f"no folder {data}")
    classes, train, held_out = listing(data, val_fraction)
    if len(classes) < 2 or not train or not held_out:
        raise DataError(f"{data}: expected photos of two classes or more, in DATA/<class>/ or DATA/train/<class>/")
    note(f"decoding {len(train) + len(held_out):,} photos as seed.py does")
    pixels, bad = decoded([*train, *held_out], how["image_size"])
    if bad:
        note(f"{len(bad)} photos cannot be read and are left out: {', '.join(path.name for path in bad[:5])}")
    train, held_out = ([photo for photo in photos if photo[0] in pixels] for photos in (train, held_out))
    with tempfile.TemporaryDirectory(prefix="fastcnn-parity-") as folder:
        split = Path(folder) / "split.csv"
        with split.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label", "split"])
            for name, photos in (("train", train), ("val", held_out)):
                writer.writerows([path.relative_to(data).as_posix(), classes[label], name] for path, label in photos)
        yield Experiment(data=data, classes=classes, train=train, held_out=held_out, pixels=pixels, split=split, **how)


def listing(data: Path, val_fraction: float) -> tuple[list[str], list[Photo], list[Photo]]:
    """Return class names, training photos and all held-out photos."""
    folders = [data / name for name in ("val", "valid", "validation", "test") if (data / name).is_dir()]
    if not folders or not (data / "train").is_dir():
        return baseline.split_photos(data, 0, val_fraction)
    classes = sorted(p.name for p in (data / "train").iterdir() if p.is_dir() and not p.name.startswith("."))
    held_out = [photo for folder in folders for photo in baseline.list_photos(folder, classes)]
    return classes, baseline.list_photos(data / "train", classes), held_out


def decoded(photos: list[Photo], size: int) -> tuple[dict[Path, npt.NDArray[np.uint8]], list[Path]]:
    """Return the pixels of photos as seed.py decodes them, and those that it cannot read."""
    plain, pixels, bad = baseline.Photos(photos, size), {}, []
    for i, (path, _) in enumerate(photos):
        try:
            pixels[path] = plain.pixels(i)
        except (OSError, ValueError, SyntaxError):  # what Pillow raises for a file that is no photo
            bad.append(path)
    return pixels, bad


class Decoded(baseline.Photos):
    """seed.py's photos, decoded before."""

    def __init__(self, pixels: dict[Path, npt.NDArray[np.uint8]], photos: list[Photo], size: int) -> None:
        super().__init__(photos, size)
        self.decoded = pixels

    def pixels(self, item: int) -> npt.NDArray[np.uint8]:
        """Return a photo as (size, size, 3) uint8."""
        return self.decoded[self.photos[item][0]]


Network = Callable[[int, int], nn.Module]


def plain(experiment: Experiment, seed: int, network: Network = baseline.small_cnn) -> Found:
    """Train as seed.py does: fp32, eager, NCHW, its own order of photos."""
    size, start = experiment.image_size, time.perf_counter()
    args = argparse.Namespace(seed=seed, **{name: getattr(experiment, name) for name in SHARED})
    train, held_out = (Decoded(experiment.pixels, photos, size) for photos in (experiment.train, experiment.held_out))
    with threads(experiment.threads):
        num_classes = len(experiment.classes)
        training = baseline.training_on(args, 0, num_classes, train, held_out, network, experiment.schedule)
        rows = list(training.epochs(args.epochs))
    return {
        "accuracy": rows[-1]["val_accuracy"],
        "train_losses": [row["train_loss"] for row in rows],
        "held_out_losses": [row["val_loss"] for row in rows],
        "seconds": time.perf_counter() - start,
    }


def fast(experiment: Experiment, seed: int, **options: Any) -> Found:
    """Train by `fastcnn train`, and let its own evaluation say the class of every held-out photo.

    Whether that is the right one is judged by seed.py's labels, and so is the last epoch's loss.
    """
    start = time.perf_counter()
    how = {name: getattr(experiment, name) for name in (*SHARED, "threads")}
    given = {"data": str(experiment.data), "split": str(experiment.split), "seed": seed, "max_bad": 1.0}
    config = resolve(read_recipe("seed"), how, given, {"wandb": "disabled", "report": False}, options)
    with tempfile.TemporaryDirectory(prefix="fastcnn-parity-") as folder:
        run = fit(config, run_dir=Path(folder) / "run")
        state = checkpoint.load(run.run_dir / "last.pt")
    labels, predictions, wrong = judged(state, dict((*experiment.train, *experiment.held_out)))
    losses = [row["val/loss"] for row in run.metrics[:-1]]
    return {
        "accuracy": float((predictions.argmax(1) == labels).float().mean()),
        "train_losses": [row["train/loss"] for row in run.metrics],
        "held_out_losses": [*losses, float(F.nll_loss(predictions.clamp(min=1e-12).log(), labels))],
        "wrong_labels": wrong,
        "seconds": time.perf_counter() - start,
        "settings": {name: run.summary[name] for name in ("engine", "precision", "decoder", "loader")},
    }


def judged(state: dict[str, Any], truth: dict[Path, int]) -> tuple[Tensor, Tensor, int]:
    """Return (N,) labels and (N, num_classes) probabilities of the held-out photos, by a run's last weights, and the
    number of photos, training ones too, that the run's loader gives another label than the true one.

    The accuracy of a class of few photos may say little; labels need no statistics.
    """
    config = resolve(state["config"])
    data = dataset.prepare(dataclasses.replace(config, loader="resident", max_bad=1.0))
    device, dtype = torch.device(config.device), DTYPES[config.precision]
    wrong = 0
    for split in ("train", "val"):
        photos = data.photos(split)
        labels = torch.tensor([truth[data.index.root / data.index.paths[photo]] for photo in photos])
        feed = LOADERS["resident"](data.cache, photos, Options(device=device, batch_size=BATCH_SIZE))
        wrong += int((feed.labels.cpu() != labels).sum())
    parameters = FlatParameters(restore(state).to(device), dtype)
    normalise = Normalise(config.mean, config.std, config.image_size, dtype, device)
    found = Evaluator(parameters.compute, feed, normalise, num_classes=len(data.index.classes))()
    return labels, found.probabilities.cpu(), wrong


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute with so many threads for a while; None leaves it to torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def channels_last(num_classes: int, size: int) -> nn.Module:
    """Return seed.py's network in channels_last layout."""
    layout = torch.channels_last
    model = baseline.small_cnn(num_classes, size).to(memory_format=layout)  # type: ignore[call-overload]
    model.register_forward_pre_hook(lambda _, given: given[0].contiguous(memory_format=layout))
    return model  # type: ignore[no-any-return]


def pool_first(num_classes: int, size: int) -> nn.Module:
    """Return seed.py's network with each max pool before its ReLU."""
    layers = list(baseline.small_cnn(num_classes, size))
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.MaxPool2d):
            layers[i - 1], layers[i] = layer, layers[i - 1]
    return nn.Sequential(*layers)


Arm = Callable[[Experiment, int], Found]

# Strict: a fallback would measure something else than the row says.
AS_PLAIN = {"precision": "fp32", "engine": "eager", "loader": "resident", "decoder": "pillow", "strict": True}


def changed(**options: Any) -> Arm:
    """Return our step with everything as plain as seed.py's but for some options."""
    return functools.partial(fast, **{**AS_PLAIN, **options})


PLAIN, FAST = "seed.py", "fast path"

INGREDIENTS: dict[str, Arm] = {
    "channels_last": functools.partial(plain, network=channels_last),
    "pooling before the activation": functools.partial(plain, network=pool_first),
    "our step: fp32, eager, resident, Pillow": changed(),
    "decoder turbo": changed(decoder="turbo"),
    "decoder dali": changed(decoder="dali"),
    "precision bf16": changed(precision="bf16"),
    "precision fp16": changed(precision="fp16"),
    "engine compiled": changed(engine="compiled"),
    "engine graphed": changed(engine="graphed"),
    "engine compiled+graphed": changed(engine="compiled+graphed"),
    "loader mapped": changed(loader="mapped"),
    "loader stream": changed(loader="stream"),
    FAST: fast,
}
"""Name -> how to train with one change from seed.py: the first two in its own loop; those below our step, in our step
and one option; the last is all of them together."""
