"""Decoded photos as a Feed: what every engine's step reads its batches from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastcnn.cache import Cache


@dataclass(frozen=True)
class Feed:
    """Photos and the order in which the step takes them, all on the device."""

    images: Tensor
    """(M, H, W, 3) uint8."""
    labels: Tensor
    """(M,) int64."""
    permutation: Tensor
    """(M,) int64: this epoch's order."""
    cursor: Tensor
    """(1,) int64: where in it the next batch begins."""

    def __len__(self) -> int:
        """Return the number of photos."""
        return len(self.labels)

    def start_epoch(self, seed: int, epoch: int) -> None:
        """Shuffle for an epoch: an order made of (seed, epoch) alone, so that a resumed run sees it again."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self))
        self.permutation.copy_(torch.from_numpy(order))
        self.cursor.zero_()


def resident(cache: Cache, photos: npt.NDArray[np.intp], labels: npt.NDArray[np.int64], device: torch.device) -> Feed:
    """Return a Feed that holds all of `photos` (positions in the cache's index) on the device."""
    images = torch.from_numpy(cache.pixels(photos))
    return Feed(
        images=images.to(device),
        labels=torch.from_numpy(labels[photos]).to(device),
        permutation=torch.arange(len(photos), device=device),
        cursor=torch.zeros(1, dtype=torch.int64, device=device),
    )


LOADERS: dict[str, Callable[[Cache, npt.NDArray[np.intp], npt.NDArray[np.int64], torch.device], Feed]] = {
    "resident": resident,
}
