"""Decoding photos to uint8 tensors with a DataLoader, as a careful user writes it. Nothing of fastcnn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bench.baselines import seed


class Photos(seed.Photos):
    """Photos as (size, size, 3) uint8, decoded by Pillow; no labels."""

    def __getitem__(self, item: int) -> Tensor:  # type: ignore[override]
        """Return a photo."""
        return torch.from_numpy(self.pixels(item))


def pillow_loader(paths: Sequence[Path], size: int, workers: int) -> Callable[[], Tensor]:
    """Return a function that decodes all photos to (n, size, size, 3) uint8 with a DataLoader, whose workers stay."""
    photos = Photos([(path, 0) for path in paths], size)
    loader = DataLoader(photos, batch_size=32, num_workers=workers, persistent_workers=workers > 0)
    return lambda: torch.cat(list(loader))


def image_folder(folder: Path, size: int, workers: int) -> Callable[[], Tensor]:
    """Return the same by torchvision's ImageFolder with its antialiased resize. Needs torchvision."""
    from torchvision import datasets, transforms

    transform = transforms.Compose([transforms.Resize((size, size), antialias=True), transforms.PILToTensor()])
    loader = DataLoader(
        datasets.ImageFolder(str(folder), transform), batch_size=32, num_workers=workers, persistent_workers=workers > 0
    )
    return lambda: torch.cat([images.permute(0, 2, 3, 1) for images, _ in loader])


def decode_jpeg_on_gpu(paths: Sequence[Path], size: int) -> Callable[[], Tensor]:
    """Return the same by torchvision's nvJPEG decoder, 32 photos a call, resized on the GPU."""
    from torchvision import io, transforms

    resize = transforms.Resize((size, size), antialias=True)

    def run() -> Tensor:
        done = []
        for start in range(0, len(paths), 32):
            encoded = [io.read_file(str(path)) for path in paths[start : start + 32]]
            images = io.decode_jpeg(encoded, mode=io.ImageReadMode.RGB, device="cuda")
            done += [resize(image).permute(1, 2, 0) for image in images]
        return torch.stack(done)

    return run
