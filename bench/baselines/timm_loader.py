"""The seed network fed by timm's loader, as a careful user of timm writes it. Needs timm; imports nothing of fastcnn.

timm decodes with Pillow in workers that stay, hands on uint8 and normalises in its prefetcher, on the device. Photos,
split, network and order of work are those of `seed.py`; only the upright turn (EXIF) is not timm's.

    python -m bench.baselines.timm_loader DATA --epochs 5            # tries 0 workers and one a core, takes the faster
    python -m bench.baselines.timm_loader DATA --probe               # prints the faster and stops
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from timm.data import ImageDataset, create_loader, create_transform
from timm.data.readers.reader import Reader
from torch import nn

from bench.baselines.seed import MEAN, STD, arguments, evaluate, photos_of, small_cnn


class Listed(Reader):  # type: ignore[misc]
    """Photos of a given list instead of a folder's, for timm's ImageDataset."""

    def __init__(self, photos: list[tuple[Path, int]]) -> None:
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


def make_loader(
    photos: list[tuple[Path, int]], args: argparse.Namespace, workers: int, device: torch.device, *, training: bool
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


def train(args: argparse.Namespace, workers: int) -> list[dict[str, float]]:
    """Train and return a row an epoch: loss, accuracy, seconds and images a second."""
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classes, train_photos, val_photos = photos_of(args)
    train_loader = make_loader(train_photos, args, workers, device, training=True)
    val_loader = make_loader(val_photos, args, workers, device, training=False)
    model = small_cnn(len(classes), args.image_size).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    rows = []
    for epoch in range(1, args.epochs + 1):
        model.train()
        start, total, count = time.perf_counter(), torch.zeros((), device=device), 0
        for images, labels in train_loader:
            total += train_step(model, optimizer, images, labels) * len(labels)
            count += len(labels)
        train_loss, seconds = total.item() / count, time.perf_counter() - start
        val_loss, val_accuracy = evaluate(model, val_loader, device)
        row = {"epoch": epoch, "train_seconds": seconds, "images_per_second": count / seconds, "train_loss": train_loss}
        rows.append({**row, "val_loss": val_loss, "val_accuracy": val_accuracy})
        print(json.dumps({"workers": workers, **rows[-1]}), flush=True)
    return rows


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Train on a batch and return its loss, still on the device."""
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def best_workers(args: argparse.Namespace, batches: int = 6) -> int:
    """Return the faster of no workers and one a core, by training on some batches with each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classes, photos, _ = photos_of(args)
    rates = {}
    for workers in (0, os.cpu_count() or 1):
        model = small_cnn(len(classes), args.image_size).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
        start, done = time.perf_counter(), 0
        for number, (images, labels) in enumerate(make_loader(photos, args, workers, device, training=True), 1):
            train_step(model, optimizer, images, labels).item()
            if number == 2:
                start, done = time.perf_counter(), -1  # warm
            done += 1
            if done == batches:
                break
        rates[workers] = done / (time.perf_counter() - start)
    return max(rates, key=lambda workers: rates[workers])


def main() -> None:
    """Train and print a JSON line an epoch, then one with everything."""
    args = arguments(__doc__).parse_args()
    workers = args.workers if args.workers is not None else best_workers(args)
    if args.probe:
        print(json.dumps({"workers": workers}))
        return
    start = time.perf_counter()
    rows = train(args, workers)
    print(json.dumps({"workers": workers, "seconds": time.perf_counter() - start, "epochs": rows}))


if __name__ == "__main__":
    main()
