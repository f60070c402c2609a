"""fastai's vision learner as its documentation begins with it, from scratch. Needs fastai; nothing of fastcnn.

Photos and split are those of `seed.py`. The rest is fastai's default: resnet18, photos cropped to squares,
`aug_transforms` a batch, Adam in one cycle (`fit_one_cycle`) at 1e-3, batches of 64.

    python -m bench.baselines.fastai_learner DATA --epochs 10        # tries 0 workers and one a core, takes the faster
    python -m bench.baselines.fastai_learner DATA --probe            # prints the faster and stops
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from typing import Any

from fastai.vision.all import (
    Callback,
    CancelFitException,
    CategoryBlock,
    DataBlock,
    ImageBlock,
    IndexSplitter,
    Resize,
    accuracy,
    aug_transforms,
    set_seed,
    vision_learner,
)
from torchvision.models import resnet18

from bench.baselines.seed import Say, arguments, photos_of, run

BATCH_SIZE = 64  # fastai's own


class Epochs(Callback):  # type: ignore[misc]
    """A row an epoch."""

    order = 60  # after the recorder, whose figures it takes

    def __init__(self, say: Say) -> None:
        self.say = say

    def before_train(self) -> None:
        """Begin the steps of an epoch."""
        self.began = time.perf_counter()

    def after_train(self) -> None:
        """End them."""
        self.seconds = time.perf_counter() - self.began

    def after_epoch(self) -> None:
        """Say the epoch's row."""
        train_loss, val_loss, val_accuracy = map(float, self.recorder.values[-1])
        rate = len(self.dls.train) * self.dls.bs / self.seconds
        row = {"epoch": self.epoch + 1, "train_seconds": self.seconds, "images_per_second": rate}
        self.say({**row, "train_loss": train_loss, "val_loss": val_loss, "val_accuracy": val_accuracy})


class Rate(Callback):  # type: ignore[misc]
    """Steps a second of six after three that warm up, or of what a small folder has; ends the training then."""

    def before_batch(self) -> None:
        """Begin to count."""
        if self.iter in (0, 3):
            self.first, self.began = self.iter, time.perf_counter()

    def after_batch(self) -> None:
        """Stop at the last step."""
        if self.iter == 8 or self.iter + 1 == self.n_iter:
            self.found = (self.iter + 1 - self.first) / (time.perf_counter() - self.began)
            raise CancelFitException


def learner(args: argparse.Namespace, workers: int) -> Any:
    """Return a learner over the command's photos."""
    set_seed(args.seed)
    classes, train, val = photos_of(args)
    labels = {path: classes[label] for path, label in [*train, *val]}
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock(vocab=classes)),
        get_y=lambda path: labels[path],
        splitter=IndexSplitter(range(len(train), len(train) + len(val))),
        item_tfms=Resize(args.image_size),
        batch_tfms=aug_transforms(),
    )
    loaders = block.dataloaders(list(labels), bs=args.batch_size, num_workers=workers)
    return vision_learner(loaders, resnet18, pretrained=False, metrics=accuracy)


def train(args: argparse.Namespace, say: Say, workers: int) -> None:
    """Train and hand on a row an epoch."""
    trained = learner(args, workers)
    with trained.no_bar(), trained.no_logging(), contextlib.redirect_stdout(sys.stderr):  # its log is not ours
        trained.fit_one_cycle(args.epochs, cbs=Epochs(say))


def rate(args: argparse.Namespace, workers: int) -> float:
    """Return steps a second with so many workers."""
    trained, found = learner(args, workers), Rate()
    with trained.no_bar(), trained.no_logging():
        trained.fit_one_cycle(1, cbs=found)
    return float(found.found)


if __name__ == "__main__":
    run(arguments(__doc__, batch_size=BATCH_SIZE).parse_args(), rate, train)
