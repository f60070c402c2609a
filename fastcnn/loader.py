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

    def start_epoch(self, seed: int, epoch: int, *, balanced: bool = False, start: int = 0) -> None:
        """Shuffle for an epoch: an order made of (seed, epoch) alone, so that a resumed run sees it again.

        balanced: draw as many photos of each class, rare ones several times. start: the place to go on from.
        """
        self.permutation.copy_(torch.from_numpy(epoch_order(self.labels.cpu().numpy(), seed, epoch, balanced)))
        self.cursor.fill_(start)


def resident(cache: Cache, photos: npt.NDArray[np.intp], labels: npt.NDArray[np.int64], device: torch.device) -> Feed:
    """Return a Feed that holds all of `photos` (positions in the cache's index) on the device."""
    images = torch.from_numpy(cache.pixels(photos))
    return Feed(
        images=images.to(device),
        labels=torch.from_numpy(labels[photos]).to(device),
        permutation=torch.arange(len(photos), device=device),
        cursor=torch.zeros(1, dtype=torch.int64, device=device),
    )


def epoch_order(labels: npt.NDArray[np.int64], seed: int, epoch: int, balanced: bool) -> npt.NDArray[np.int64]:
    """Return (N,) positions: a permutation; where balanced, draws with replacement in which classes are alike."""
    generator = np.random.default_rng([seed, epoch])
    if not balanced:
        return generator.permutation(len(labels))
    chances = 1 / np.bincount(labels)[labels]
    return generator.choice(len(labels), len(labels), p=chances / chances.sum())


LOADERS: dict[str, Callable[[Cache, npt.NDArray[np.intp], npt.NDArray[np.int64], torch.device], Feed]] = {
    "resident": resident,
}
