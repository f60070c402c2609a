"""The seed network fed by timm's loader, as a careful user of timm writes it. Needs timm; imports nothing of fastcnn.

timm decodes with Pillow in workers that stay, hands on uint8 and normalises in its prefetcher, on the device. Photos,
split, network and order of work are those of `seed.py`; only the upright turn (EXIF) is not timm's.

    python -m bench.baselines.timm_loader DATA --epochs 5            # tries 0 workers and one a core, takes the faster
    python -m bench.baselines.timm_loader DATA --probe               # prints the faster and stops
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch
from timm.data import ImageDataset, create_loader, create_transform

from bench.baselines.seed import (
    MEAN,
    STD,
    Photo,
    Training,
    arguments,
    device_here,
    evaluate,
    photos_of,
    run_training,
    small_cnn,
    update,
)
from bench.baselines.timm_train import Listed


def make_loader(
    photos: list[Photo], args: argparse.Namespace, workers: int, device: torch.device, *, training: bool
) -> Any:
    """Return timm's loader: batches on the device, normalised; squashed to the size, not augmented."""
    dataset = ImageDataset("", reader=Listed(photos))
    size, mean, std = (3, args.image_size, args.image_size), MEAN.flatten().tolist(), STD.flatten().tolist()
    loader = create_loader(
        dataset,
        input_size=size,
        batch_size=args.batch_size,
        is_training=training,  # shuffled, the last partial batch dropped
        no_aug=True,
        mean=mean,
        std=std,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        device=device,
    )
    # Without augmentation timm would crop training photos to a square; squashed like the others' instead.
    squash = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash", "use_prefetcher": True}
    dataset.transform = create_transform(size, is_training=False, mean=mean, std=std, **squash)
    return loader


def training(args: argparse.Namespace, workers: int) -> Training:
    """Return the training on the photos of the command."""
    torch.manual_seed(args.seed)
    device = device_here()
    classes, train_photos, val_photos = photos_of(args)
    train_loader = make_loader(train_photos, args, workers, device, training=True)
    val_loader = make_loader(val_photos, args, workers, device, training=False)
    model = small_cnn(len(classes), args.image_size).to(device)
    step = functools.partial(update, model, torch.optim.Adam(model.parameters(), lr=args.lr))
    return Training(model, train_loader.__iter__, step, lambda: evaluate(model, val_loader, device))


if __name__ == "__main__":
    run_training(arguments(__doc__).parse_args(), training)
