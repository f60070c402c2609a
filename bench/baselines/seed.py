"""The reference assignment as a plain script: what the fast trainer is compared with.

Pillow in a DataLoader, fp32, NCHW, eager, default threads. It imports nothing of fastcnn, on purpose.

    python -m bench.baselines.seed DATA --epochs 5               # tries 0 workers and one a core, takes the faster
    python -m bench.baselines.seed DATA --epochs 5 --workers 2
    python -m bench.baselines.seed DATA --probe                  # prints the faster and stops
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class Photos(Dataset[tuple[Tensor, int]]):
    """Photos as normalised (3, size, size) fp32 tensors, decoded by Pillow each time they are asked for."""

    def __init__(self, photos: list[tuple[Path, int]], size: int) -> None:
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


def small_cnn(num_classes: int, size: int) -> nn.Sequential:
    """Return the five-block network: conv 3x3, ReLU, max pool, batch norm; dense 128; output."""
    layers: list[nn.Module] = []
    channels = 3
    for _ in range(5):
        layers += [nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(32)]
        channels = 32
    side = size // 32
    layers += [nn.Flatten(), nn.Linear(32 * side * side, 128), nn.ReLU(), nn.Linear(128, num_classes)]
    return nn.Sequential(*layers)


def list_photos(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """Return (path, label) of every file below the class folders."""
    return [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    ]


def split_photos(
    data: Path, seed: int, val_fraction: float = 0.2
) -> tuple[list[str], list[tuple[Path, int]], list[tuple[Path, int]]]:
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


def read_split(path: Path, data: Path) -> tuple[list[str], list[tuple[Path, int]], list[tuple[Path, int]]]:
    """Return what `split_photos` does, read from a split.csv (path, label, split)."""
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    classes = sorted({row["label"] for row in rows})
    train, val = (
        [(data / row["path"], classes.index(row["label"])) for row in rows if row["split"] == split]
        for split in ("train", "val")
    )
    return classes, train, val


def evaluate(model: nn.Module, loader: DataLoader[tuple[Tensor, int]], device: torch.device) -> tuple[float, float]:
    """Return mean loss and accuracy over the loader."""
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


def train(args: argparse.Namespace, workers: int) -> list[dict[str, float]]:
    """Train and return a row an epoch: loss, accuracy, seconds and images a second."""
    classes, train_photos, val_photos = photos_of(args)
    sets = Photos(train_photos, args.image_size), Photos(val_photos, args.image_size)
    rows = []
    for row in train_on(args, workers, len(classes), *sets):
        rows.append(row)
        print(json.dumps({"workers": workers, **row}), flush=True)
    return rows


def train_on(
    args: argparse.Namespace,
    workers: int,
    num_classes: int,
    train_set: Photos,
    val_set: Photos,
    network: Callable[[int, int], nn.Module] = small_cnn,
) -> Iterator[dict[str, float]]:
    """Train and yield each epoch's row."""
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"batch_size": args.batch_size, "num_workers": workers}
    train_loader = DataLoader(train_set, shuffle=True, drop_last=True, **options)
    val_loader = DataLoader(val_set, **options)
    model = network(num_classes, args.image_size).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    schedule = None
    if args.schedule == "onecycle":
        steps = args.epochs * len(train_loader)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, steps, cycle_momentum=False)
    for epoch in range(1, args.epochs + 1):
        model.train()
        start, total, count = time.perf_counter(), 0.0, 0
        for images, labels in train_loader:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            if schedule:
                schedule.step()
            total += loss.item() * len(labels)
            count += len(labels)
        seconds = time.perf_counter() - start
        val_loss, val_accuracy = evaluate(model, val_loader, device)
        yield {
            "epoch": epoch,
            "train_seconds": seconds,
            "images_per_second": count / seconds,
            "train_loss": total / count,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
        }


def photos_of(args: argparse.Namespace) -> tuple[list[str], list[tuple[Path, int]], list[tuple[Path, int]]]:
    """Return class names, training photos and validation photos."""
    return read_split(args.split, args.data) if args.split else split_photos(args.data, args.seed)


def best_workers(args: argparse.Namespace, batches: int = 6) -> int:
    """Return the faster of no workers and one a core, by training on some batches with each."""
    rates = {}
    for workers in (0, os.cpu_count() or 1):
        classes, photos, _ = photos_of(args)
        model = small_cnn(len(classes), args.image_size)
        loader = DataLoader(Photos(photos, args.image_size), args.batch_size, True, num_workers=workers)
        for number, (images, labels) in enumerate(loader):
            if number == 2:
                start = time.perf_counter()
            F.cross_entropy(model(images), labels).backward()
            if number == 2 + batches:
                break
        rates[workers] = (number - 2) / (time.perf_counter() - start)
    return max(rates, key=lambda workers: rates[workers])


def arguments(description: str | None) -> argparse.ArgumentParser:
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
    return parser


def own_arguments() -> argparse.ArgumentParser:
    """Return this baseline's options."""
    parser = arguments(__doc__)
    parser.add_argument("--schedule", choices=("constant", "onecycle"), default="constant")
    return parser


def main() -> None:
    """Train and print a JSON line an epoch, then one with everything."""
    args = own_arguments().parse_args()
    workers = args.workers if args.workers is not None else best_workers(args)
    if args.probe:
        print(json.dumps({"workers": workers}))
        return
    start = time.perf_counter()
    rows = train(args, workers)
    print(json.dumps({"workers": workers, "seconds": time.perf_counter() - start, "epochs": rows}))


if __name__ == "__main__":
    main()
