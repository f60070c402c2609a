"""Reference assignment as a plain script, the main baseline of the fast trainer, and what the baselines share.

Pillow in a DataLoader, fp32, NCHW, eager, default threads. Nothing of fastcnn is imported, on purpose.

    python -m bench.baselines.seed DATA --epochs 5               # tries 0 workers and one a core, takes the faster
    python -m bench.baselines.seed DATA --epochs 5 --workers 2
    python -m bench.baselines.seed DATA --probe                  # prints the faster and stops
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

Photo = tuple[Path, int]
Batch = tuple[Tensor, Tensor]
Row = dict[str, float]
"""Figures of an epoch."""
Say = Callable[[Row], None]

WORKERS = {"workers": (0, os.cpu_count() or 1)}


class Photos(Dataset[tuple[Tensor, int]]):
    """Photos as normalised (3, size, size) fp32 tensors, decoded by Pillow each time they are asked for."""

    def __init__(self, photos: list[Photo], size: int) -> None:
        self.photos, self.size = photos, size

    def __len__(self) -> int:
        """Return the number of photos."""
        return len(self.photos)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        """Return photo and label."""
        pixels = torch.from_numpy(self.pixels(item)).permute(2, 0, 1).float() / 255
        return (pixels - MEAN) / STD, self.photos[item][1]

    def pixels(self, item: int) -> np.ndarray:
        """Return a photo as (size, size, 3) uint8."""
        with Image.open(self.photos[item][0]) as photo:
            image = ImageOps.exif_transpose(photo).convert("RGB")
        return np.array(image.resize((self.size, self.size), Image.Resampling.BILINEAR))


def small_cnn(num_classes: int, size: int, filters: Sequence[int] = (32,) * 5) -> nn.Sequential:
    """Return blocks of conv 3x3, ReLU, max pool, batch norm; dense 128 with ReLU; output."""
    layers: list[nn.Module] = []
    for channels, out in zip([3, *filters], filters, strict=False):
        layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(out)]
    side = size // 2 ** len(filters)
    layers += [nn.Flatten(), nn.Linear(filters[-1] * side * side, 128), nn.ReLU(), nn.Linear(128, num_classes)]
    return nn.Sequential(*layers)


def list_photos(folder: Path, classes: list[str]) -> list[Photo]:
    """Return (path, label) of every file below the class folders."""
    return [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    ]


def split_photos(data: Path, seed: int, val_fraction: float = 0.2) -> tuple[list[str], list[Photo], list[Photo]]:
    """Return class names, training photos and validation photos: the folders' own, else 80/20 a class."""
    train_dir = data / "train" if (data / "train").is_dir() else data
    classes = sorted(p.name for p in train_dir.iterdir() if p.is_dir() and not p.name.startswith("."))
    photos = list_photos(train_dir, classes)
    held_out = [data / name for name in ("val", "valid", "validation") if (data / name).is_dir()]
    if held_out and (data / "test").is_dir():
        return classes, photos, list_photos(held_out[0], classes)
    rng = np.random.default_rng(seed)
    train, val = [], []
    for label in range(len(classes)):
        mine = [photo for photo in photos if photo[1] == label]
        order = rng.permutation(len(mine))
        cut = round(len(mine) * val_fraction)
        val += [mine[i] for i in order[:cut]]
        train += [mine[i] for i in order[cut:]]
    return classes, train, val


def read_split(path: Path, data: Path) -> tuple[list[str], list[Photo], list[Photo]]:
    """Return class names, training photos and validation photos of a split.csv (path, label, split)."""
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    classes = sorted({row["label"] for row in rows})
    train, val = (
        [(data / row["path"], classes.index(row["label"])) for row in rows if row["split"] == split]
        for split in ("train", "val")
    )
    return classes, train, val


def evaluate(model: nn.Module, loader: Iterable[Batch], device: torch.device) -> tuple[float, float]:
    """Return mean loss and accuracy over the loader's batches."""
    model.eval()
    loss, correct, count = 0.0, 0, 0
    with torch.no_grad():
        for images, labels in loader:
            logits = model(images.to(device))
            labels = labels.to(device)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += int((logits.argmax(1) == labels).sum())
            count += len(labels)
    return loss / count, correct / count


class Training(NamedTuple):
    """What a baseline trains with."""

    model: nn.Module
    batches: Callable[[], Iterable[Batch]]
    """Returns the training photos' batches, in a new order each time."""
    step: Callable[[Tensor, Tensor], Tensor | float]
    """Trains on a batch of images and labels, and returns its loss."""
    score: Callable[[], tuple[float, float]]
    """Returns validation loss and accuracy."""

    def rate(self) -> float:
        """Return steps a second, over six of them after three that warm up."""
        self.model.train()
        losses = (float(self.step(*batch)) for batch in self.batches())
        for _ in itertools.islice(losses, 3):
            pass
        start = time.perf_counter()
        done = sum(1 for _ in itertools.islice(losses, 6))
        return done / (time.perf_counter() - start)

    def epochs(self, count: int) -> Iterator[Row]:
        """Train and yield a row an epoch."""
        for epoch in range(1, count + 1):
            self.model.train()
            start, num_images = time.perf_counter(), 0
            total: Tensor | float = 0.0
            for images, labels in self.batches():
                total += self.step(images, labels) * len(labels)
                num_images += len(labels)
            train_loss, seconds = float(total) / num_images, time.perf_counter() - start
            row = {"epoch": epoch, "train_seconds": seconds, "images_per_second": num_images / seconds}
            val_loss, val_accuracy = self.score()
            yield {**row, "train_loss": train_loss, "val_loss": val_loss, "val_accuracy": val_accuracy}


def training_on(
    args: argparse.Namespace,
    workers: int,
    num_classes: int,
    train_set: Photos,
    val_set: Photos,
    network: Callable[[int, int], nn.Module] = small_cnn,
    schedule: str = "constant",
) -> Training:
    """Return this baseline's training on some photos. schedule: constant or onecycle."""
    torch.manual_seed(args.seed)
    device = device_here()
    options: dict[str, Any] = {"batch_size": args.batch_size, "num_workers": workers}
    train_loader = DataLoader(train_set, shuffle=True, drop_last=True, **options)
    val_loader = DataLoader(val_set, **options)
    model = network(num_classes, args.image_size).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    step_lr: Callable[[], None] | None = None
    if schedule == "onecycle":
        steps = args.epochs * len(train_loader)
        step_lr = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, steps, cycle_momentum=False).step
    step = training_step(model, optimizer, device, step_lr)
    return Training(model, train_loader.__iter__, step, lambda: evaluate(model, val_loader, device))


def device_here() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Tensor:
    """Train on a batch and return its loss, still on the device."""
    optimizer.zero_grad()
    loss = loss_of(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    step_lr: Callable[[], None] | None,
) -> Callable[[Tensor, Tensor], float]:
    """Return the step: it trains on a batch of images and labels, and waits for its loss."""

    def step(images: Tensor, labels: Tensor) -> float:
        loss = update(model, optimizer, images.to(device), labels.to(device))
        if step_lr:
            step_lr()
        return loss.item()

    return step


def photos_of(args: argparse.Namespace) -> tuple[list[str], list[Photo], list[Photo]]:
    """Return class names, training photos and validation photos."""
    return read_split(args.split, args.data) if args.split else split_photos(args.data, args.seed)


def arguments(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Return the options that the baselines have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", type=Path, help="a split.csv: path, label, split")
    parser.add_argument("--workers", type=int, help="DataLoader workers; left out: the faster of 0 and one a core")
    parser.add_argument("--probe", action="store_true", help="print the fastest settings and stop")
    parser.set_defaults(**defaults)
    return parser


def run(
    args: argparse.Namespace,
    rate: Callable[..., float],
    train: Callable[..., object],
    choices: Mapping[str, Sequence[Any]] = WORKERS,
) -> None:
    """Train and print a JSON line an epoch, then one with everything; with --probe the fastest settings alone.

    rate: (args, **settings) -> speed.
    train: (args, say, **settings) hands `say` a row an epoch.
    choices: settings that are options too, and their values. What was not asked for is tried, one setting after the
        other with the rest fixed, the first value to begin with.
    """
    asked = {name: getattr(args, name) for name in choices}
    settings = {name: values[0] if asked[name] is None else asked[name] for name, values in choices.items()}
    for name, values in choices.items():
        if asked[name] is None and len(values) > 1:
            rates = {value: rate(args, **{**settings, name: value}) for value in values}
            settings[name] = max(rates, key=rates.__getitem__)
    if args.probe:
        print(json.dumps(settings))
        return
    start, rows, output = time.perf_counter(), list[Row](), sys.stdout  # which a package's log may be led away from

    def say(row: Row) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True, file=output)

    train(args, say, **settings)
    print(json.dumps({"settings": settings, "seconds": time.perf_counter() - start, "epochs": rows}))


def run_training(
    args: argparse.Namespace, make: Callable[..., Training], choices: Mapping[str, Sequence[Any]] = WORKERS
) -> None:
    """Run a command whose training `make` returns: (args, **settings) -> Training."""

    def train(args: argparse.Namespace, say: Say, **settings: Any) -> None:
        for row in make(args, **settings).epochs(args.epochs):
            say(row)

    run(args, lambda args, **settings: make(args, **settings).rate(), train, choices)


def training(args: argparse.Namespace, workers: int) -> Training:
    """Return the training on the photos of the command."""
    classes, *photos = photos_of(args)
    train_set, val_set = (Photos(listed, args.image_size) for listed in photos)
    return training_on(args, workers, len(classes), train_set, val_set)


if __name__ == "__main__":
    run_training(arguments(__doc__).parse_args(), training)
