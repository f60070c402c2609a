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
