"""A feed of a few batches: threads fill some while the step uses another."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from fastcnn.data.arrays import Positions
from fastcnn.data.feeds import Epoch, Feed, Fill, RankSlice
from fastcnn.errors import warn

BUFFERS_A_THREAD = 2  # batches in memory: the step uses one while others are filled, and one may take longer


class BufferedFeed(Feed):
    """A feed whose images are a few batches, filled in turn by threads from the start of an epoch to its end.

    Batch k of B buffers is always in buffer k % B, so `permutation` is written once and the step's cursor runs over the
    epoch as with any feed. Steps that an engine tries out before an epoch see whatever is in the buffers.

    Args:
        fill: writes images into a buffer, in a thread.
        count: images of the split.
        image_size: side in pixels.
        rank_slice: the part of each batch that this rank takes; a batch is cut to `count` images.
        device: where the step runs.
        num_threads: batches that are filled at the same time.
    """

    def __init__(
        self,
        fill: Fill,
        count: int,
        image_size: int,
        rank_slice: RankSlice,
        device: torch.device,
        *,
        num_threads: int = 1,
    ) -> None:
        rank_slice = self.rank_slice = rank_slice.limited(count)
        size = rank_slice.size
        batch, position = np.divmod(np.arange(count), rank_slice.batch_size)
        num_buffers = BUFFERS_A_THREAD * num_threads
        rows = batch % num_buffers * size + (position - rank_slice.start) % size
        super().__init__(
            images=torch.zeros((num_buffers * size, image_size, image_size, 3), dtype=torch.uint8, device=device),
            labels=torch.zeros(num_buffers * size, dtype=torch.int64, device=device),
            permutation=torch.from_numpy(rows).to(device),
            cursor=torch.zeros(1, dtype=torch.int64, device=device),
            batch_size=size,
        )
        self.fill, self.num_threads = fill, num_threads
        self.buffers = list(map(BatchBuffer, self.images.split(size), self.labels.split(size)))
        self._threads: ThreadPoolExecutor | None = None
        self._fills: Iterator[Callable[[], BatchBuffer]]
        self._filling: deque[Future[BatchBuffer]]
        self._replaced: dict[str, str] = {}
        self._num_reported = 0

    def drive(self, run: Callable[[int], None], num_steps: int) -> None:
        """See `Feed.drive`. Raises the error that a thread met."""
        for _ in range(num_steps):
            assert self._filling, "the epoch has no more batches"
            buffer = self._filling[0].result()  # an error stays in the queue: a second call raises it again
            self._filling.popleft()
            buffer.take()
            run(1)
            buffer.release()
            self._submit(1)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """End the threads. No copy is in flight afterwards, so that an engine may be built."""
        assert self._threads
        self._threads.shutdown(cancel_futures=True)
        self._threads = None
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

    def _start(self, order: Positions, epoch: Epoch | None, cursor: int) -> None:
        assert self._threads is None, "the last epoch was not ended"
        size = self.rank_slice.batch_size
        assert cursor % size == 0, f"{cursor} images are no whole batches of {size}"
        end = -(-len(order) // size) if epoch is None else len(order) // size  # training drops the tail of the order
        for buffer in self.buffers:
            buffer.release()  # writes of this epoch come after every read before it
        self._threads, self._filling = ThreadPoolExecutor(self.num_threads, "feed"), deque()
        self._fills = (functools.partial(self._fill, batch, order, epoch) for batch in range(cursor // size, end))
        self._submit(len(self.buffers))

    def _submit(self, count: int) -> None:
        assert self._threads, "the epoch was not started"
        self._filling += [self._threads.submit(fill) for fill in itertools.islice(self._fills, count)]

    def _fill(self, batch: int, order: Positions, epoch: Epoch | None) -> BatchBuffer:
        buffer, positions = self.buffers[batch % len(self.buffers)], order[self.rank_slice.positions(batch)]
        buffer.wait()
        images, labels = (host[: len(positions)].numpy() for host in (buffer.host_images, buffer.host_labels))
        self._replaced |= self.fill(positions, images, labels, epoch)
        buffer.send()
        return buffer


class BatchBuffer:
    """Memory of one batch. On a CPU a thread writes where the step reads; on a device it is copied there.

    On an NVIDIA GPU it is copied from pinned memory, on a stream beside the step's. Two events order the streams
    without the host waiting for the step: the step waits for `copied`, the next copy into the same memory for `taken`.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = self.host_images, self.host_labels = images, labels
        self.stream: torch.cuda.Stream | None = None
        if images.device.type != "cpu":
            self._keep_apart()
        if images.device.type == "cuda":
            self.host_images, self.host_labels = self.host_images.pin_memory(), self.host_labels.pin_memory()
            self.stream = torch.cuda.Stream(images.device)
            self.copied, self.taken = torch.cuda.Event(), torch.cuda.Event()

    def wait(self) -> None:
        """Wait until the host's memory may be written: the last copy out of it has ended (called by a thread)."""
        if self.stream:
            self.copied.synchronize()

    def send(self) -> None:
        """Start copying the written batch to the device (called by a thread)."""
        if self.stream:
            with torch.cuda.stream(self.stream):  # also makes its device the thread's
                self.stream.wait_event(self.taken)
                self._copy()
                self.copied.record(self.stream)

    def take(self) -> None:
        """Order the next step after the copy (called by the main thread)."""
        if self.stream:
            torch.cuda.current_stream(self.images.device).wait_event(self.copied)
        elif self.host_images is not self.images:
            self._copy()

    def release(self) -> None:
        """Order the next copy after the step (called by the main thread)."""
        if self.stream:
            self.taken.record(torch.cuda.current_stream(self.images.device))

    def _keep_apart(self) -> None:
        self.host_images, self.host_labels = (torch.zeros_like(t, device="cpu") for t in (self.images, self.labels))

    def _copy(self) -> None:
        self.images.copy_(self.host_images, non_blocking=self.stream is not None)
        self.labels.copy_(self.host_labels, non_blocking=self.stream is not None)
