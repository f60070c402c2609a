"""Photos as an engine's step reads them: all on the device, or a buffer of two batches that a thread keeps filled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

SLOTS = 2  # batches in the buffer: the step takes one while the other is filled
CHUNK = 256  # photos brought to a device at once: what that takes of the host's memory

Epoch = tuple[int, int]
"""(seed, epoch): all that the order of the training photos, and what is random about each, is made of."""

Chances = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Share:
    """The photos of each batch that one of several ranks takes: those from `start` on, `size` of them."""

    batch_size: int
    """Photos of all ranks."""
    rank: int = 0
    num_ranks: int = 1

    @property
    def size(self) -> int:
        """Photos of this rank."""
        return self.batch_size // self.num_ranks

    @property
    def start(self) -> int:
        """Photos of the batch that come before this rank's."""
        return self.rank * self.size

    def places(self, batch: int) -> slice:
        """Return where in an epoch's order this rank's photos of a batch are."""
        start = batch * self.batch_size + self.start
        return slice(start, start + self.size)

    def limited(self, count: int) -> Share:
        """Return the share of a batch of no more than `count` photos."""
        return Share(max(1, min(self.batch_size, count)), self.rank, self.num_ranks)


Fill = Callable[[npt.NDArray[np.intp], npt.NDArray[np.uint8], npt.NDArray[np.int64], Epoch | None], dict[str, str]]
"""(positions in the split, images, labels, epoch) -> the photos that had to be replaced, and why: writes the pixels
(n, H, W, 3) and labels (n,) of those photos. In an evaluation the epoch is None, and nothing may be replaced."""


@dataclass(eq=False)
class Feed:
    """Photos and the order in which the step takes them, all on the device.

    with feed.start_epoch(seed, epoch):  # or start_in_order(), for an evaluation
        feed.drive(engine.run, num_steps)
    """

    images: Tensor
    """(M, H, W, 3) uint8."""
    labels: Tensor
    """(M,) int64."""
    permutation: Tensor
    """(N,) int64: where in `images` each photo of this epoch is, in the epoch's order. On one of several ranks that do
    not hold all photos, it says so of those in this rank's share of each batch."""
    cursor: Tensor
    """(1,) int64: where in it the next batch begins."""
    batch_size: int | None = None
    """Photos that a step must take at once; None leaves it to the step."""

    def __len__(self) -> int:
        """Return the number of photos."""
        return len(self.permutation)

    def start_epoch(self, seed: int, epoch: int, cursor: int = 0, chances: Chances | None = None) -> Feed:
        """Shuffle for an epoch: an order made of (seed, epoch) alone, so that a resumed run sees it again.

        cursor: photos of the epoch that an interrupted run has taken already.
        chances: see `shuffled`.
        """
        self.permutation.copy_(torch.from_numpy(shuffled(len(self), (seed, epoch), chances)))
        self.cursor.fill_(cursor)
        return self

    def start_in_order(self) -> Feed:
        """Go to the beginning, without shuffling."""
        self.cursor.zero_()
        return self

    def drive(self, run: Callable[[int], None], num_steps: int) -> None:
        """Let `run`, an engine's, do the next steps, each when its photos are there."""
        run(num_steps)

    def __enter__(self) -> Feed:
        """Return itself, started."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """End the epoch, finished or not."""


@dataclass(eq=False)
class Selected(Feed):
    """A Feed of some of `images`, which hold other photos as well."""

    rows: npt.NDArray[np.int64] = field(kw_only=True)
    """(N,) where in `images` each photo of the feed is."""

    def start_epoch(self, seed: int, epoch: int, cursor: int = 0, chances: Chances | None = None) -> Feed:
        """See `Feed.start_epoch`: the same order of the same photos."""
        self.permutation.copy_(torch.from_numpy(self.rows[shuffled(len(self), (seed, epoch), chances)]))
        self.cursor.fill_(cursor)
        return self


class Sharded(Feed):
    """A Feed that holds, of an epoch, the photos of this rank's share of every batch: read anew for each epoch.

    Args:
        fill: writes photos into memory.
        count: photos of the split.
        image_size: side in pixels.
        share: this rank's.
        device: where the step runs.
    """

    def __init__(self, fill: Fill, count: int, image_size: int, share: Share, device: torch.device) -> None:
        rows = count // share.batch_size * share.size
        super().__init__(
            images=torch.zeros((rows, image_size, image_size, 3), dtype=torch.uint8, device=device),
            labels=torch.zeros(rows, dtype=torch.int64, device=device),
            permutation=torch.zeros(count, dtype=torch.int64, device=device),
            cursor=torch.zeros(1, dtype=torch.int64, device=device),
        )
        self.fill, self.share = fill, share
        batches = np.arange(count // share.batch_size)[:, None] * share.batch_size
        self.places = (batches + share.start + np.arange(share.size)).ravel()  # of the rows, in an epoch's order
        self.permutation[torch.from_numpy(self.places).to(device)] = torch.arange(rows, device=device)

    def start_epoch(self, seed: int, epoch: int, cursor: int = 0, chances: Chances | None = None) -> Feed:
        """See `Feed.start_epoch`. What an interrupted run has taken already is not read."""
        self.cursor.fill_(cursor)
        mine = shuffled(len(self), (seed, epoch), chances)[self.places]
        for start in range(cursor // self.share.batch_size * self.share.size, len(mine), CHUNK):
            photos = mine[start : start + CHUNK]
            images, labels = np.empty((len(photos), *self.images.shape[1:]), np.uint8), np.empty(len(photos), np.int64)
            self.fill(photos, images, labels, (seed, epoch))
            self.images[start : start + CHUNK] = torch.from_numpy(images).to(self.images.device)
            self.labels[start : start + CHUNK] = torch.from_numpy(labels).to(self.images.device)
        return self


def shuffled(count: int, epoch: Epoch, chances: Chances | None = None) -> npt.NDArray[np.intp]:
    """Return an epoch's order of `count` photos: each once, or drawn again and again by their chances (count,)."""
    generator = np.random.default_rng(epoch)
    if chances is None:
        return generator.permutation(count)
    return generator.choice(count, count, p=chances)
