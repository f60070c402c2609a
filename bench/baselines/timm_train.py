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
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.data import ImageDataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from bench.baselines.seed import (
    Photo,
    arguments,
    best_workers,
    evaluate,
    photos_of,
    run_command,
    steps_a_second,
    train_epochs,
)
from bench.baselines.timm_loader import Listed

BATCH_SIZE, WARMUP_EPOCHS = 128, 5


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


def network(num_classes: int) -> nn.Module:
    """Return test_resnet from scratch."""
    model: nn.Module = create_model("test_resnet", num_classes=num_classes)
    return model


def training_step(model: nn.Module, optimizer: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function that trains on a batch and returns its loss, still on the device."""
    loss_of = LabelSmoothingCrossEntropy(0.1)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = loss_of(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def optimizer_of(model: nn.Module, args: argparse.Namespace) -> Any:
    """Return train.py's SGD at the learning rate of its rule."""
    return create_optimizer_v2(model, "sgd", lr=0.1 * args.batch_size / 256, weight_decay=2e-5, momentum=0.9)


def train(args: argparse.Namespace, workers: int) -> Iterator[dict[str, float]]:
    """Train and yield a row an epoch."""
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classes, *photos = photos_of(args)
    model = network(len(classes)).to(device)
    train_loader, val_loader = (
        loader(listed, args, model, workers, device, training)
        for listed, training in zip(photos, (True, False), strict=True)
    )
    optimizer = optimizer_of(model, args)
    schedule, _ = create_scheduler_v2(
        optimizer, "cosine", args.epochs, warmup_epochs=min(WARMUP_EPOCHS, args.epochs // 2), warmup_lr=1e-5
    )
    rows = train_epochs(
        args.epochs,
        model,
        train_loader,
        training_step(model, optimizer),
        lambda: evaluate(model, val_loader, device),
    )
    for number, row in enumerate(rows, 1):
        schedule.step(number)
        yield row


def rate(args: argparse.Namespace, workers: int) -> float:
    """Return steps a second with so many workers."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classes, photos, _ = photos_of(args)
    model = network(len(classes)).to(device)
    step = training_step(model, optimizer_of(model, args))
    return steps_a_second(step(*batch).item() for batch in loader(photos, args, model, workers, device, True))


def main() -> None:
    """Train with the workers asked for, else the faster of none and one a core."""
    parser = arguments(__doc__)
    parser.set_defaults(batch_size=BATCH_SIZE)
    args = parser.parse_args()
    run_command(args, lambda args: {"workers": best_workers(args, lambda n: rate(args, n))}, train)


if __name__ == "__main__":
    main()
