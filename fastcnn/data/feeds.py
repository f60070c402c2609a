"""Photos as an engine's step reads them: all on the device, or a buffer of two batches that a thread keeps filled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastcnn.errors import warn

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


class Buffered(Feed):
    """A Feed whose images are two batches, filled in turn by a thread from the start of an epoch to its end.

    Batch k is in slot k % SLOTS, which `permutation` says once and for all: the step's cursor runs over the epoch as
    ever. The steps that an engine tries out before an epoch see whatever is in the buffer.

    Args:
        fill: writes photos into a slot, in the thread.
        count: photos of the split.
        image_size: side in pixels.
        share: which photos of a batch are taken; its batches are no larger than there are photos.
        device: where the step runs.
    """

    def __init__(self, fill: Fill, count: int, image_size: int, share: Share, device: torch.device) -> None:
        share = self.share = share.limited(count)
        batch_size = share.size
        rows = SLOTS * batch_size
        number, place = np.divmod(np.arange(count), share.batch_size)
        super().__init__(
            images=torch.zeros((rows, image_size, image_size, 3), dtype=torch.uint8, device=device),
            labels=torch.zeros(rows, dtype=torch.int64, device=device),
            permutation=torch.from_numpy(number % SLOTS * batch_size + (place - share.start) % batch_size).to(device),
            cursor=torch.zeros(1, dtype=torch.int64, device=device),
            batch_size=batch_size,
        )
        self.fill = fill
        kind = PinnedSlot if device.type == "cuda" else Slot
        self.slots = [
            kind(images, labels)
            for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True)
        ]
        self._producer: Producer | None = None
        self._replaced: dict[str, str] = {}
        self._num_reported = 0

    def start_epoch(self, seed: int, epoch: int, cursor: int = 0, chances: Chances | None = None) -> Feed:
        """See `Feed.start_epoch`. Only whole batches are filled: training drops the order's tail."""
        size = self.share.batch_size
        assert cursor % size == 0, f"{cursor} photos are no whole batches of {size}"
        self.cursor.fill_(cursor)
        batches = range(cursor // size, len(self) // size)
        return self._start(shuffled(len(self), (seed, epoch), chances), (seed, epoch), batches)

    def start_in_order(self) -> Feed:
        """See `Feed.start_in_order`. The last batch is as short as it is."""
        self.cursor.zero_()
        return self._start(np.arange(len(self)), None, range(-(-len(self) // self.share.batch_size)))

    def drive(self, run: Callable[[int], None], num_steps: int) -> None:
        """See `Feed.drive`. Raises what the thread tripped over."""
        assert self._producer, "the epoch was not started"
        for _ in range(num_steps):
            slot = self.slots[self._producer.wait() % SLOTS]
            slot.take()
            run(1)
            slot.release()
            self._producer.release()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """End the thread. Nothing is in flight afterwards, so that an engine may be built."""
        assert self._producer
        self._producer.stop()
        self._producer = None
        for slot in self.slots:
            slot.wait()
        if error is None and len(self._replaced) > self._num_reported:
            self._num_reported = len(self._replaced)
            path, reason = next(iter(self._replaced.items()))
            what = "photo was" if self._num_reported == 1 else "photos were"
            warn(
                f"{self._num_reported} training {what} usable before and cannot be decoded any more; others of the "
                f"batch stand in; the first is {path} ({reason})"
            )

    def _start(self, order: npt.NDArray[np.intp], epoch: Epoch | None, batches: range) -> Feed:
        assert self._producer is None, "the last epoch was not ended"

        def fill(batch: int) -> None:
            slot, places = self.slots[batch % SLOTS], order[self.share.places(batch)]
            slot.wait()
            self._replaced |= self.fill(
                places, slot.host_images[: len(places)].numpy(), slot.host_labels[: len(places)].numpy(), epoch
            )
            slot.send()

        for slot in self.slots:
            slot.release()  # whatever has read the buffer so far comes before what is written into it now
        self._producer = Producer(fill, batches)
        return self


class Slot:
    """Room for a batch. On a CPU the thread writes where the step reads; elsewhere a copy lies in between."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.host_images, self.host_labels = (
            tensor if tensor.device.type == "cpu" else self._host(tensor) for tensor in (images, labels)
        )

    def wait(self) -> None:
        """Wait until the host's memory may be written (thread)."""

    def send(self) -> None:
        """Begin to bring what was written to the device (thread)."""

    def take(self) -> None:
        """Let the step come after what was written (main)."""
        if self.host_images is not self.images:
            self.images.copy_(self.host_images)
            self.labels.copy_(self.host_labels)

    def release(self) -> None:
        """Let what is written next come after the step (main)."""

    def _host(self, tensor: Tensor) -> Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")


class PinnedSlot(Slot):
    """Room for a batch on an NVIDIA GPU: copied from pinned memory, on a stream beside the step's.

    Two events order the streams without the host waiting for the step: `copied` lets the step begin, and `taken` the
    next copy into the same place.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__(images, labels)
        self.stream = torch.cuda.Stream(images.device)
        self.copied, self.taken = torch.cuda.Event(), torch.cuda.Event()

    def wait(self) -> None:
        """See `Slot.wait`: the last copy out of the pinned memory is done."""
        self.copied.synchronize()

    def send(self) -> None:
        """See `Slot.send`."""
        with torch.cuda.stream(self.stream):  # makes its device the thread's, too
            self.stream.wait_event(self.taken)
            self.images.copy_(self.host_images, non_blocking=True)
            self.labels.copy_(self.host_labels, non_blocking=True)
            self.copied.record(self.stream)

    def take(self) -> None:
        """See `Slot.take`."""
        torch.cuda.current_stream(self.images.device).wait_event(self.copied)

    def release(self) -> None:
        """See `Slot.release`."""
        self.taken.record(torch.cuda.current_stream(self.images.device))

    def _host(self, tensor: Tensor) -> Tensor:
        return super()._host(tensor).pin_memory()


class Producer:
    """A thread that prepares batches in turn, never more than SLOTS ahead of the one being used."""

    def __init__(self, fill: Callable[[int], None], batches: range) -> None:
        self._fill, self._batches = fill, batches
        self._idle = threading.Semaphore(SLOTS)
        self._ready: SimpleQueue[int | BaseException] = SimpleQueue()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="feed", daemon=True)
        self._thread.start()

    def wait(self) -> int:
        """Return the next batch's number once it is ready. Raises what preparing it raised."""
        batch = self._ready.get()
        if isinstance(batch, BaseException):
            self._ready.put(batch)  # whoever asks again gets the same answer, and does not wait for ever
            raise batch
        return batch

    def release(self) -> None:
        """Say that a batch has been used."""
        self._idle.release()

    def stop(self) -> None:
        """End the thread, after the batch that it is at."""
        self._stopped = True
        self._idle.release()
        self._thread.join()

    def _work(self) -> None:
        try:
            for batch in self._batches:
                self._idle.acquire()
                if self._stopped:
                    return
                self._fill(batch)
                self._ready.put(batch)
            raise AssertionError(f"the epoch has {len(self._batches)} batches")
        except BaseException as error:  # it belongs to the main thread
            self._ready.put(error)
