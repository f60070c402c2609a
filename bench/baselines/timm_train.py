"""timm's smallest residual network trained as timm's own train.py does by default. Needs timm; nothing of fastcnn.

Photos and split are those of `seed.py`, one file after the other as timm decodes them. The network is `test_resnet`,
whose cost is about that of the seed network. train.py is not in the package, so its defaults are written out here
(version 1.0): SGD with Nesterov momentum, learning rate 0.1 for 256 photos a batch, five epochs of warm-up, cosine;
random crops, flips, colours, label smoothing. Its 300 epochs are not: `--epochs`.

    python -m bench.baselines.timm_train DATA --epochs 10            # tries 0 workers and one a core, takes the faster
    python -m bench.baselines.timm_train DATA --probe                # prints the faster and stops
"""

from __future__ import annotations

import argparse
import functools
import itertools
from typing import Any, BinaryIO

import torch
from timm.data import ImageDataset, create_loader, resolve_data_config
from timm.data.readers.reader import Reader
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from bench.baselines.seed import Photo, Training, arguments, device_here, evaluate, photos_of, run_training, update

BATCH_SIZE, WARMUP_EPOCHS = 128, 5


class Listed(Reader):  # type: ignore[misc]
    """Photos of a given list instead of a folder's, for timm's ImageDataset."""

    def __init__(self, photos: list[Photo]) -> None:
        super().__init__()
        self.photos = photos

    def __getitem__(self, item: int) -> tuple[BinaryIO, int]:
        """Return the open file and the label."""
        path, label = self.photos[item]
        return path.open("rb"), label

    def __len__(self) -> int:
        """Return the number of photos."""
        return len(self.photos)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.photos[index][0]
        return path.name if basename else str(path)


def loader(
    photos: list[Photo], args: argparse.Namespace, model: nn.Module, workers: int, device: torch.device, training: bool
) -> Any:
    """Return timm's loader with the augmentations of train.py, or its resize and crop to evaluate."""
    config = resolve_data_config({"img_size": args.image_size}, model=model, verbose=False)
    augmented = {"scale": (0.08, 1.0), "hflip": 0.5, "color_jitter": 0.4, "interpolation": "random"}
    return create_loader(
        ImageDataset("", reader=Listed(photos)),
        input_size=config["input_size"],
        batch_size=args.batch_size,
        is_training=training,
        mean=config["mean"],
        std=config["std"],
        num_workers=workers,
        device=device,
        **(augmented if training else {"interpolation": config["interpolation"], "crop_pct": config["crop_pct"]}),
    )


def training(args: argparse.Namespace, workers: int) -> Training:
    """Return the training of test_resnet, from scratch, with train.py's SGD at the learning rate of its rule."""
    torch.manual_seed(args.seed)
    device = device_here()
    classes, train_photos, val_photos = photos_of(args)
    model: nn.Module = create_model("test_resnet", num_classes=len(classes)).to(device)
    train_loader = loader(train_photos, args, model, workers, device, True)
    val_loader = loader(val_photos, args, model, workers, device, False)
    rate = 0.1 * args.batch_size / 256
    optimizer = create_optimizer_v2(model, "sgd", lr=rate, weight_decay=2e-5, momentum=0.9)
    schedule, _ = create_scheduler_v2(
        optimizer, "cosine", args.epochs, warmup_epochs=min(WARMUP_EPOCHS, args.epochs // 2), warmup_lr=1e-5
    )
    epochs = itertools.count(1)

    def score() -> tuple[float, float]:  # at the end of an epoch
        found = evaluate(model, val_loader, device)
        schedule.step(next(epochs))
        return found

    step = functools.partial(update, model, optimizer, loss_of=LabelSmoothingCrossEntropy(0.1))
    return Training(model, train_loader.__iter__, step, score)


if __name__ == "__main__":
    run_training(arguments(__doc__, batch_size=BATCH_SIZE).parse_args(), training)
