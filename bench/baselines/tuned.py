"""Reference assignment as a good engineer tunes it by hand: workers, pinned memory, AMP, channels_last, compile.

The photos, the network and the order of work are those of `seed.py`; nothing of fastcnn is imported, on purpose. Each
setting that is not given is tried on a few batches, one after the other, and the faster is taken.

    python -m bench.baselines.tuned DATA --epochs 5
    python -m bench.baselines.tuned DATA --probe               # prints the fastest settings and stops
    python -m bench.baselines.tuned DATA --workers 2 --amp on --channels-last on --compile off
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bench.baselines import seed

SWITCHES = ("amp", "channels_last", "compile")


class Photos(seed.Photos):
    """Photos as (3, size, size) uint8: a quarter of the bytes between processes; normalised in the batch."""

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        """Return photo and label."""
        return torch.from_numpy(self.pixels(item)).permute(2, 0, 1), self.photos[item][1]


class Trainer:
    """A network, its optimizer and its loaders under some settings."""

    def __init__(self, args: argparse.Namespace, *, workers: int, amp: str, channels_last: str, compile: str) -> None:
        torch.manual_seed(args.seed)
        self.device = seed.device_here()
        on_gpu = self.device.type == "cuda"
        torch.backends.cudnn.benchmark = on_gpu
        self.format = torch.channels_last if channels_last == "on" else torch.contiguous_format
        self.dtype = torch.bfloat16 if amp == "on" else torch.float32
        classes, train_photos, val_photos = seed.photos_of(args)
        options: dict[str, Any] = {
            "batch_size": args.batch_size,
            "num_workers": workers,
            "pin_memory": on_gpu,
            "persistent_workers": workers > 0,
            "prefetch_factor": 4 if workers else None,
        }
        self.train_loader = DataLoader(Photos(train_photos, args.image_size), shuffle=True, drop_last=True, **options)
        self.val_loader = DataLoader(Photos(val_photos, args.image_size), **options)
        self.mean, self.std = seed.MEAN.to(self.device) * 255, seed.STD.to(self.device) * 255
        plain = seed.small_cnn(len(classes), args.image_size).to(self.device, memory_format=self.format)  # type: ignore[call-overload]
        self.model: nn.Module = torch.compile(plain) if compile == "on" else plain  # type: ignore[assignment]
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=args.lr, fused=True)

    def batches(self, loader: DataLoader[tuple[Tensor, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised images and labels on the device."""
        for images, labels in loader:
            images, labels = (x.to(self.device, non_blocking=True) for x in (images, labels))
            yield ((images - self.mean) / self.std).contiguous(memory_format=self.format), labels

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return cross-entropy and logits."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(images)
        return F.cross_entropy(logits.float(), labels), logits

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Train on a batch and return its loss, still on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        loss, _ = self.loss(images, labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Return mean loss and accuracy on the validation photos."""
        self.model.eval()
        total, count = torch.zeros(2, device=self.device), 0
        for images, labels in self.batches(self.val_loader):
            loss, logits = self.loss(images, labels)
            total += torch.stack([loss * len(labels), (logits.argmax(1) == labels).sum()])
            count += len(labels)
        loss, correct = (total / count).tolist()
        return loss, correct


def training(args: argparse.Namespace, **settings: Any) -> seed.Training:
    """Return the training with some settings."""
    trainer = Trainer(args, **settings)
    return seed.Training(trainer.model, lambda: trainer.batches(trainer.train_loader), trainer.step, trainer.evaluate)


def has_bf16() -> bool:
    """Return whether the machine computes in bf16."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def main() -> None:
    """Train with the settings asked for, and the fastest of those left open."""
    parser = seed.arguments(__doc__)
    for name in SWITCHES:
        parser.add_argument(f"--{name.replace('_', '-')}", choices=["on", "off"], help="left out: the faster")
    choices: dict[str, Sequence[Any]] = dict.fromkeys(SWITCHES, ("off", "on"))
    if not has_bf16():
        choices["amp"] = ("off",)  # bf16 would be emulated, a tenth as fast
    # Last: how many serve best depends on how fast the step has become.
    choices["workers"] = (os.cpu_count() or 1, 0)
    seed.run_training(parser.parse_args(), training, choices)


if __name__ == "__main__":
    main()
