"""Decoding in worker processes: a segmentation fault, or a lack of memory, costs only the photo that causes it.

A server process imports the decoder and does nothing else; it forks a worker whenever one is needed, so that after a
crash the next is there in milliseconds. Workers write pixels into the caller's array, in shared memory. When a worker
dies, its batch is halved until the photo that kills it is alone: it gets a verdict, the others their pixels. Where a
worker begins no photo for as long as one may take, it is killed, and its photos are decoded one by one.

The server is no fork of the caller, which may use threads and a GPU (but see `start_early`), and none of
multiprocessing's, which would run the caller's script again. When the caller dies, however it dies, the server sees its
socket closed and ends the workers.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import pipelines
from pipelines.shared_memory import file_descriptor, shared
from pipelines.verdict import MAX_PIXELS, Source, Verdict
from pipelines.worker_processes import Server, Unavailable, Worker
from pipelines.worker_server import Batch

DECODE_TIMEOUT = 60.0  # seconds that one photo may take
THREADS = 8  # of one worker: more would be slowed down by the interpreter's lock
GIVE_UP = 16  # failed photos, with none decoded, after which the decoder itself is tested


class _Died(Exception):
    """The worker died, hung or its decoder raised an exception; the verdict is for a batch of one photo."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        super().__init__(verdict)


class Workers:
    """A decoder in worker processes, started on first use and ended by `close`.

    Args:
        decoder: a name in `pipelines.BACKENDS`.
        threads: decoding threads over all workers; None is one a core.
        gpu: device on which DALI decodes; None is the CPU.
        max_pixels: as for `pipelines.decode`.
        timeout: seconds that one photo may take.
    """

    def __init__(
        self,
        decoder: str,
        *,
        threads: int | None = None,
        gpu: int | None = None,
        max_pixels: int = MAX_PIXELS,
        timeout: float = DECODE_TIMEOUT,
    ) -> None:
        threads = threads or pipelines.num_cores()
        num = 1 if gpu is not None else math.ceil(threads / THREADS)
        self.note = ""
        """Why photos are decoded in this process; "" as long as workers do it."""
        self._decoder, self._timeout = decoder, timeout
        self._server: Server | None = None
        self._options = (math.ceil(threads / num), gpu, max_pixels)
        self._workers: list[Worker | None] = [None] * num
        self._num_decoded = self._num_failed = 0

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def decode(self, sources: Sequence[Source], size: int, out: np.ndarray) -> list[Verdict]:
        """Write the pixels of each usable source into its row of `out`; return the verdict on each, in their order.

        As `pipelines.decode`, except that `out` is an array of `shared` or its first rows. A photo that crashes the
        decoder is "decoder crash", or "decoder killed" where the system killed the worker; one that alone takes longer
        than the time limit is "decoder hung". Where no worker can be started, this process decodes, without a time
        limit, and `note` says why.

        Raises DecoderUnavailable where the decoder fails on every photo.
        """
        assert out.shape == (len(sources), size, size, 3)
        if not self.note:
            try:
                return self._decode_all(sources, size, out)
            except Unavailable as error:
                self.note = str(error)
        threads, gpu, max_pixels = self._options
        return pipelines.decode(
            sources, size, out, decoder=self._decoder, workers=threads, gpu=gpu, max_pixels=max_pixels
        )

    def close(self) -> None:
        """End the processes. Their memory on a GPU is free afterwards."""
        for worker in self._workers:
            if worker is not None:
                worker.kill()
        self._workers = [None] * len(self._workers)
        if self._server is not None:
            self._server.close()

    def _decode_all(self, sources: Sequence[Source], size: int, out: np.ndarray) -> list[Verdict]:
        if self._server is None:
            gpu = self._options[1]
            early = _early.pop(self._decoder, None) if gpu is None else None
            self._server = early or Server(pipelines.BACKENDS[self._decoder], gpu=gpu)
        share = max(1, math.ceil(len(sources) / len(self._workers)))
        parts = [Batch(list(sources[i : i + share]), size, i) for i in range(0, len(sources), share)]
        if len(parts) <= 1:
            verdicts = [self._decode(0, part, out) for part in parts]
        else:
            with ThreadPoolExecutor(len(parts), thread_name_prefix="worker") as pool:
                try:
                    verdicts = list(pool.map(lambda i: self._decode(i, parts[i], out), range(len(parts))))
                except KeyboardInterrupt:  # else it would wait for the batches
                    self._server.given_up = True
                    self.close()
                    raise
        return [verdict for part in verdicts for verdict in part]

    def _decode(self, lane: int, batch: Batch, out: np.ndarray) -> list[Verdict]:
        """Return the verdicts on a batch: after a crash those on its halves, after a hang those on single photos."""
        try:
            verdicts = self._ask(lane, batch, out)
        except _Died as death:
            if len(batch.sources) == 1:
                return [self._alone(lane, batch, out, death.verdict)]
            # Halves would wait for the one that hangs at every division.
            step = 1 if death.verdict.reason == "decoder hung" else math.ceil(len(batch.sources) / 2)
            starts = range(0, len(batch.sources), step)
            parts = [Batch(batch.sources[i : i + step], batch.size, batch.first + i) for i in starts]
            return [verdict for part in parts for verdict in self._decode(lane, part, out)]
        self._num_decoded += len(verdicts)
        return verdicts

    def _alone(self, lane: int, batch: Batch, out: np.ndarray, verdict: Verdict) -> Verdict:
        """Return the verdict on a photo that killed a worker, after a second try: memory may be free again."""
        try:
            if verdict.reason != "decoder hung":
                return self._ask(lane, batch, out)[0]
        except _Died as death:
            verdict = death.verdict
        out[batch.first] = 0
        self._num_failed += 1
        if self._num_failed >= GIVE_UP and not self._num_decoded:
            self._probe(lane, batch.size, verdict)
        return verdict

    def _probe(self, lane: int, size: int, verdict: Verdict) -> None:
        """Raise DecoderUnavailable where the decoder also fails on a photo that is surely good."""
        from PIL import Image

        photo = io.BytesIO()
        Image.new("RGB", (64, 64), "grey").save(photo, "JPEG")
        try:
            self._num_decoded += len(self._ask(lane, Batch([photo.getvalue()], size, 0), shared((1, size, size, 3))))
        except _Died:
            why = f"it fails on every photo ({verdict.detail}); choose another with --decoder"
            raise pipelines.DecoderUnavailable(self._decoder, why) from None

    def _ask(self, lane: int, batch: Batch, out: np.ndarray) -> list[Verdict]:
        assert self._server is not None
        worker = self._workers[lane]
        if worker is None:
            worker = self._workers[lane] = self._server.fork()
        answer = worker.ask((batch, self._options), file_descriptor(out), self._timeout)
        if isinstance(answer, list):
            return answer
        if answer is None:
            self._workers[lane] = None
            ended = self._server.autopsy(worker)
            answer = Verdict("decoder hung", f"longer than {self._timeout:g} s") if worker.hung else ended
        raise _Died(answer)


_early: dict[str, Server] = {}


def start_early(decoder: str, *, fork: bool = False) -> None:
    """Begin to import a decoder in a server process, for the next Workers; `end_early` ends it if none has used it.

    `fork`: import it here and fork, where this process has one thread: for a caller that needs the same libraries.
    """
    if decoder not in _early:
        if fork:
            pipelines.choose(decoder, gpu=False)
            fork = sys.platform == "linux" and len(os.listdir("/proc/self/task")) == 1  # noqa: PTH208
        with contextlib.suppress(Unavailable):
            _early[decoder] = Server(pipelines.BACKENDS[decoder], gpu=None, fork=fork)


def end_early() -> None:
    """End the servers that were started early and not used."""
    while _early:
        _early.popitem()[1].close(wait=False)
