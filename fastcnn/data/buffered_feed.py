"""A feed of two batches: a thread fills one while the step uses the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastcnn.data.feeds import Epoch, Feed, Fill, RankSlice, SamplingWeights, shuffled
from fastcnn.errors import warn

NUM_BUFFERS = 2  # batches in memory: the step uses one while the other is filled


class BufferedFeed(Feed):
    """A feed whose images are two batches, filled in turn by a thread from the start of an epoch to its end.

    Batch k is always in buffer k % NUM_BUFFERS, so `permutation` is written once and the step's cursor runs over the
    epoch as with any feed. Steps that an engine tries out before an epoch see whatever is in the buffers.

    Args:
        fill: writes images into a buffer, in the thread.
        count: images of the split.
        image_size: side in pixels.
        rank_slice: the part of each batch that this rank takes; a batch is cut to `count` images.
        device: where the step runs.
    """

    def __init__(self, fill: Fill, count: int, image_size: int, rank_slice: RankSlice, device: torch.device) -> None:
        rank_slice = self.rank_slice = rank_slice.limited(count)
        size = rank_slice.size
        batch, position = np.divmod(np.arange(count), rank_slice.batch_size)
        rows = batch % NUM_BUFFERS * size + (position - rank_slice.start) % size
        super().__init__(
            images=torch.zeros((NUM_BUFFERS * size, image_size, image_size, 3), dtype=torch.uint8, device=device),
            labels=torch.zeros(NUM_BUFFERS * size, dtype=torch.int64, device=device),
            permutation=torch.from_numpy(rows).to(device),
            cursor=torch.zeros(1, dtype=torch.int64, device=device),
            batch_size=size,
        )
        self.fill = fill
        kind = PinnedBatchBuffer if device.type == "cuda" else BatchBuffer
        self.buffers = list(map(kind, self.images.split(size), self.labels.split(size)))
        self._producer: Producer | None = None
        self._replaced: dict[str, str] = {}
        self._num_reported = 0

    def start_epoch(
        self, seed: int, epoch: int, cursor: int = 0, sampling_weights: SamplingWeights | None = None
    ) -> Feed:
        """See `Feed.start_epoch`. Only whole batches are filled: training drops the tail of the order."""
        size = self.rank_slice.batch_size
        assert cursor % size == 0, f"{cursor} images are no whole batches of {size}"
        self.cursor.fill_(cursor)
        batches = range(cursor // size, len(self) // size)
        return self._start(shuffled(len(self), (seed, epoch), sampling_weights), (seed, epoch), batches)

    def start_in_order(self) -> Feed:
        """See `Feed.start_in_order`. The last batch may be shorter."""
        self.cursor.zero_()
        return self._start(np.arange(len(self)), None, range(-(-len(self) // self.rank_slice.batch_size)))

    def drive(self, run: Callable[[int], None], num_steps: int) -> None:
        """See `Feed.drive`. Raises the error that the thread met."""
        assert self._producer, "the epoch was not started"
        for _ in range(num_steps):
            buffer = self.buffers[self._producer.wait() % NUM_BUFFERS]
            buffer.take()
            run(1)
            buffer.release()
            self._producer.release()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """End the thread. No copy is in flight afterwards, so that an engine may be built."""
        assert self._producer
        self._producer.stop()
        self._producer = None
        for buffer in self.buffers:
            buffer.wait()
        if error is None and len(self._replaced) > self._num_reported:
            self._num_reported = len(self._replaced)
            path, reason = next(iter(self._replaced.items()))
            photos = "photo was" if self._num_reported == 1 else "photos were"
            warn(
                f"{self._num_reported} training {photos} usable before and cannot be decoded any more, first {path} "
                f"({reason}); other photos of the batch are used instead"
            )

    def _start(self, order: npt.NDArray[np.intp], epoch: Epoch | None, batches: range) -> Feed:
        assert self._producer is None, "the last epoch was not ended"

        def fill(batch: int) -> None:
            buffer, positions = self.buffers[batch % NUM_BUFFERS], order[self.rank_slice.positions(batch)]
            buffer.wait()
            images, labels = (host[: len(positions)].numpy() for host in (buffer.host_images, buffer.host_labels))
            self._replaced |= self.fill(positions, images, labels, epoch)
            buffer.send()

        for buffer in self.buffers:
            buffer.release()  # writes of this epoch come after every read before it
        self._producer = Producer(fill, batches)
        return self


class BatchBuffer:
    """Memory of one batch. On a CPU the thread writes where the step reads; on a device it is copied there."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.host_images, self.host_labels = (
            tensor if tensor.device.type == "cpu" else self._host(tensor) for tensor in (images, labels)
        )

    def wait(self) -> None:
        """Wait until the host's memory may be written (called by the thread)."""

    def send(self) -> None:
        """Start copying the written batch to the device (called by the thread)."""

    def take(self) -> None:
        """Order the next step after the copy (called by the main thread)."""
        if self.host_images is not self.images:
            self.images.copy_(self.host_images)
            self.labels.copy_(self.host_labels)

    def release(self) -> None:
        """Order the next copy after the step (called by the main thread)."""

    def _host(self, tensor: Tensor) -> Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")


class PinnedBatchBuffer(BatchBuffer):
    """Memory of one batch on an NVIDIA GPU: copied from pinned memory, on a stream beside the step's.

    Two events order the streams without the host waiting for the step: the step waits for `copied`, the next copy into
    the same memory for `taken`.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__(images, labels)
        self.stream = torch.cuda.Stream(images.device)
        self.copied, self.taken = torch.cuda.Event(), torch.cuda.Event()

    def wait(self) -> None:
        """See `BatchBuffer.wait`: the last copy out of the pinned memory has ended."""
        self.copied.synchronize()

    def send(self) -> None:
        """See `BatchBuffer.send`."""
        with torch.cuda.stream(self.stream):  # also makes its device the thread's
            self.stream.wait_event(self.taken)
            self.images.copy_(self.host_images, non_blocking=True)
            self.labels.copy_(self.host_labels, non_blocking=True)
            self.copied.record(self.stream)

    def take(self) -> None:
        """See `BatchBuffer.take`."""
        torch.cuda.current_stream(self.images.device).wait_event(self.copied)

    def release(self) -> None:
        """See `BatchBuffer.release`."""
        self.taken.record(torch.cuda.current_stream(self.images.device))

    def _host(self, tensor: Tensor) -> Tensor:
        return super()._host(tensor).pin_memory()


class Producer:
    """A thread that fills batches in turn, at most NUM_BUFFERS ahead of the one in use."""

    def __init__(self, fill: Callable[[int], None], batches: range) -> None:
        self._fill, self._batches = fill, batches
        self._idle = threading.Semaphore(NUM_BUFFERS)
        self._ready: SimpleQueue[int | BaseException] = SimpleQueue()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="feed", daemon=True)
        self._thread.start()

    def wait(self) -> int:
        """Return the number of the next batch once it is filled. Raises what filling it raised."""
        batch = self._ready.get()
        if isinstance(batch, BaseException):
            self._ready.put(batch)  # a second call raises it again instead of waiting for ever
            raise batch
        return batch

    def release(self) -> None:
        """Give back the buffer of a batch that has been used."""
        self._idle.release()

    def stop(self) -> None:
        """End the thread after the batch that it is filling."""
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
        except BaseException as error:  # raised again in the main thread
            self._ready.put(error)
