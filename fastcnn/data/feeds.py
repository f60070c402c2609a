"""Feeds: the images a training step reads, all on the device, and the order in which it takes them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastcnn.data.arrays import Labels, Pixels, Positions
from pipelines import num_cores

CHUNK = 256  # images copied to a device at once by a thread, which bounds the host memory that takes

READERS = min(4, num_cores())  # threads that read rows: one copies 1 to 2 GB/s out of the page cache

Epoch = tuple[int, int]
"""(seed, epoch): determines the order of the training images and everything random about each."""

SamplingWeights = npt.NDArray[np.float64] | None
"""(N,) probability of drawing each training image; they sum to 1. None: every image once per epoch."""

Fill = Callable[[Positions, Pixels, Labels, Epoch | None], dict[str, str]]
"""Writes pixels and labels of the images at these positions in the split; returns path and reason of each image that
had to be replaced by another. The epoch is None in an evaluation, where nothing may be replaced."""


@dataclass(frozen=True)
class RankSlice:
    """The part of each batch that one rank takes: `size` images from `start` on."""

    batch_size: int
    """Images a step, of all ranks."""
    rank: int = 0
    num_ranks: int = 1

    @property
    def size(self) -> int:
        """Images of this rank in a batch."""
        return self.batch_size // self.num_ranks

    @property
    def start(self) -> int:
        """Position of this rank's first image in a batch."""
        return self.rank * self.size

    def positions(self, batch: int) -> slice:
        """Return the positions, in an epoch's order, of this rank's images of a batch."""
        start = batch * self.batch_size + self.start
        return slice(start, start + self.size)

    def limited(self, count: int) -> RankSlice:
        """Return the slice of a batch of at most `count` images."""
        return RankSlice(max(1, min(self.batch_size, count)), self.rank, self.num_ranks)


@dataclass(eq=False)
class Feed:
    """Images and the order in which the step takes them, all on the device.

    with feed.start_epoch(seed, epoch):  # or start_in_order(), for an evaluation
        feed.drive(engine.run, num_steps)
    """

    images: Tensor
    """(M, H, W, 3) uint8."""
    labels: Tensor
    """(M,) int64."""
    permutation: Tensor
    """(N,) int64: row in `images` of each image of this epoch, in the epoch's order. A rank that does not hold all
    images has right rows only at the positions of its own slice of each batch."""
    cursor: Tensor
    """(1,) int64: position in `permutation` where the next batch begins."""
    batch_size: int | None = None
    """Images that a step must take at once; None leaves it to the step."""
    rows: npt.NDArray[np.int64] | None = None
    """(N,) row in `images` of each image of the feed, where `images` holds others as well; None: they are the same."""

    def __len__(self) -> int:
        return len(self.permutation)

    @property
    def pixel_bytes(self) -> int:
        """Bytes of pixels in memory, those of other feeds in the same `images` aside."""
        num_rows = len(self.images) if self.rows is None else len(self.rows)
        return num_rows * self.images[:1].nbytes

    def start_epoch(self, seed: int, epoch: int, cursor: int = 0, sampling_weights: SamplingWeights = None) -> Feed:
        """Shuffle for an epoch and return the feed; the order depends on (seed, epoch) alone, so resuming repeats it.

        cursor: images of the epoch that an interrupted run has taken already.
        """
        self.cursor.fill_(cursor)
        self._start(shuffled(len(self), (seed, epoch), sampling_weights), (seed, epoch), cursor)
        return self

    def start_in_order(self) -> Feed:
        """Start an evaluation at the first image, without shuffling, and return the feed."""
        self.cursor.zero_()
        self._start(np.arange(len(self)), None, 0)
        return self

    def _start(self, order: Positions, epoch: Epoch | None, cursor: int) -> None:
        self.permutation.copy_(torch.from_numpy(order if self.rows is None else self.rows[order]))

    def drive(self, run: Callable[[int], None], num_steps: int) -> None:
        """Call an engine's `run` for the next steps, each as soon as its images are there."""
        run(num_steps)

    def __enter__(self) -> Feed:
        """Return the feed, started."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """End the epoch, finished or not."""


class ShardedFeed(Feed):
    """A feed that holds only this rank's slice of every batch, read anew for each epoch.

    Args:
        fill: writes images into memory.
        count: images of the split.
        image_size: side in pixels.
        rank_slice: the part of each batch that this rank takes.
        device: where the step runs.
    """

    def __init__(self, fill: Fill, count: int, image_size: int, rank_slice: RankSlice, device: torch.device) -> None:
        num_batches = count // rank_slice.batch_size
        num_rows = num_batches * rank_slice.size
        super().__init__(
            images=torch.zeros((num_rows, image_size, image_size, 3), dtype=torch.uint8, device=device),
            labels=torch.zeros(num_rows, dtype=torch.int64, device=device),
            permutation=torch.zeros(count, dtype=torch.int64, device=device),
            cursor=torch.zeros(1, dtype=torch.int64, device=device),
        )
        self.fill, self.rank_slice = fill, rank_slice
        first = np.arange(num_batches)[:, None] * rank_slice.batch_size + rank_slice.start
        self.positions = (first + np.arange(rank_slice.size)).ravel()  # (num_rows,) in an epoch's order
        self.permutation[torch.from_numpy(self.positions).to(device)] = torch.arange(num_rows, device=device)

    def _start(self, order: Positions, epoch: Epoch | None, cursor: int) -> None:
        mine = order[self.positions]

        def fill(part: slice) -> None:
            photos = mine[part]
            images, labels = np.empty((len(photos), *self.images.shape[1:]), np.uint8), np.empty(len(photos), np.int64)
            self.fill(photos, images, labels, epoch)
            self.images[part] = torch.from_numpy(images).to(self.images.device)
            self.labels[part] = torch.from_numpy(labels).to(self.images.device)

        in_chunks(fill, cursor // self.rank_slice.batch_size * self.rank_slice.size, len(mine))


def in_chunks(copy: Callable[[slice], None], start: int, stop: int) -> None:
    """Call `copy` for each chunk of the images from `start` to `stop`, in several threads."""
    with ThreadPoolExecutor(READERS) as threads:
        list(threads.map(lambda first: copy(slice(first, min(first + CHUNK, stop))), range(start, stop, CHUNK)))


def shuffled(count: int, epoch: Epoch, sampling_weights: SamplingWeights = None) -> Positions:
    """Return an epoch's order of `count` images: each once, or drawn with replacement by weights (count,)."""
    generator = np.random.default_rng(epoch)
    if sampling_weights is None:
        return generator.permutation(count)
    return generator.choice(count, count, p=sampling_weights)
