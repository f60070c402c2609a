"""Reference assignment as a good engineer writes it in an hour: photos decoded once into memory, batches by index.

Pillow once into one uint8 tensor on the device, fp32, eager, the faster of NCHW and channels_last. The photos, the
network and the order of work are those of `seed.py`; nothing of fastcnn is imported, on purpose.

    python -m bench.baselines.cached DATA --epochs 5
    python -m bench.baselines.cached DATA --probe                 # prints the faster layout and stops
    python -m bench.baselines.cached DATA --channels-last on
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from bench.baselines import seed

Images = tuple[Tensor, Tensor]
"""Pixels, (N, 3, H, W) uint8, and labels, (N,), on the device."""


class Trainer:
    """A network, its optimizer and batches from photos in memory, in one of the two layouts."""

    def __init__(self, num_classes: int, size: int, filters: Sequence[int], lr: float, channels_last: bool) -> None:
        self.device = seed.device_here()
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.mean, self.std = seed.MEAN.to(self.device) * 255, seed.STD.to(self.device) * 255
        network = seed.small_cnn(num_classes, size, filters)
        self.model = network.to(self.device, memory_format=self.format)  # type: ignore[call-overload]
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=lr, fused=True)

    def batches(self, images: Images, batch_size: int, *, shuffle: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised images and labels: all of them in order, or the whole batches of a new order."""
        pixels, labels = images
        count = len(labels) // batch_size * batch_size if shuffle else len(labels)
        order = (torch.randperm if shuffle else torch.arange)(len(labels), device=self.device)[:count]
        for batch in order.split(batch_size):
            chosen = pixels[batch].contiguous(memory_format=self.format)
            yield (chosen - self.mean) / self.std, labels[batch]

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Train on a batch and return its loss, still on the device."""
        return seed.update(self.model, self.optimizer, images, labels)

    def training(self, images: Images, held_out: Images, batch_size: int) -> seed.Training:
        """Return the training on some photos."""
        return seed.Training(
            self.model,
            lambda: self.batches(images, batch_size, shuffle=True),
            self.step,
            lambda: seed.evaluate(self.model, self.batches(held_out, batch_size, shuffle=False), self.device),
        )


def decode(photos: list[seed.Photo], args: argparse.Namespace) -> Images:
    """Return the photos, decoded by Pillow in as many threads as workers were asked for, else one a core."""
    device, reader = seed.device_here(), seed.Photos(photos, args.image_size)
    pixels = torch.empty(len(photos), args.image_size, args.image_size, 3, dtype=torch.uint8)

    def read(item: int) -> None:
        pixels[item] = torch.from_numpy(reader.pixels(item))

    with ThreadPoolExecutor(args.workers or os.cpu_count()) as pool:
        list(pool.map(read, range(len(photos))))
    labels = torch.tensor([label for _, label in photos])
    return pixels.permute(0, 3, 1, 2).contiguous().to(device), labels.to(device)


def trainer(args: argparse.Namespace, num_classes: int, channels_last: str) -> Trainer:
    """Return the trainer of a command."""
    torch.manual_seed(args.seed)
    return Trainer(num_classes, args.image_size, (32,) * 5, args.lr, channels_last == "on")


def rate(args: argparse.Namespace, channels_last: str) -> float:
    """Return steps a second in a layout, over as many photos as that takes."""
    classes, photos, _ = seed.photos_of(args)
    images = decode(photos[: 10 * args.batch_size], args)
    return trainer(args, len(classes), channels_last).training(images, images, args.batch_size).rate()


def train(args: argparse.Namespace, say: seed.Say, channels_last: str) -> None:
    """Decode, train and hand on a row an epoch."""
    classes, *photos = seed.photos_of(args)
    images, held_out = (decode(listed, args) for listed in photos)
    training = trainer(args, len(classes), channels_last).training(images, held_out, args.batch_size)
    for row in training.epochs(args.epochs):
        say(row)


def main() -> None:
    """Train in the layout asked for, else the faster."""
    parser = seed.arguments(__doc__)
    parser.add_argument("--channels-last", choices=["on", "off"], help="left out: the faster")
    seed.run(parser.parse_args(), rate, train, {"channels_last": ("off", "on")})


if __name__ == "__main__":
    main()
