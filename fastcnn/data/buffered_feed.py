"""Feed of two batches, one filled while the other is used."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastcnn.data.feeds import SLOTS, Chances, Epoch, Feed, Fill, Share, shuffled
from fastcnn.errors import warn


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
