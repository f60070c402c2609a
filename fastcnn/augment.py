"""Random changes to a batch of photos, on the device: (N, H, W, 3) uint8 in and out, drawn from the device's RNG."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SHIFT = 1 / 16  # of the side, at most: 8 pixels of 128


def flip(images: Tensor) -> Tensor:
    """Mirror each photo left to right with probability one half."""
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(2), images)


def shift(images: Tensor) -> Tensor:
    """Move each photo by up to `SHIFT` of its side both ways; the edge pixels fill what comes free."""
    count, height, width, _ = images.shape
    device = images.device
    rows = _moved(height, count, device)  # (N, H)
    columns = _moved(width, count, device)  # (N, W)
    photos = torch.arange(count, device=device)
    return images[photos[:, None, None], rows[:, :, None], columns[:, None, :]]


AUGMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": flip,
    "shift": shift,
}


def augment(images: Tensor, names: Sequence[str]) -> Tensor:
    """Apply augmentations one after the other."""
    for name in names:
        images = AUGMENTATIONS[name](images)
    return images


def _moved(side: int, count: int, device: torch.device) -> Tensor:
    """Return (count, side): positions along a side, moved by a random number of pixels and kept inside."""
    most = int(side * SHIFT)
    moves = torch.randint(-most, most + 1, (count, 1), device=device)
    return (torch.arange(side, device=device) + moves).clamp(0, side - 1)
