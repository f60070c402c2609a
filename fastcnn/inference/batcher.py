"""Photos of many requests, gathered into batches for one model."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import prometheus_client

from fastcnn.inference.artefact import Artefact, Probabilities
from fastcnn.inference.classifier import Classifier
from pipelines.verdict import MAX_PIXELS, Verdict


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the service takes."""

    upload: int = 20_000_000
    """Bytes of a photo."""
    pixels: int = MAX_PIXELS
    """Of a photo, as its header has it."""
    queue: int = 256
    """Photos that wait for their turn."""
    batch: int = 32
    """Photos decoded at a time."""
    window: float = 0.005
    """Seconds that the first photo of a batch waits for others."""
    patience: float = 30.0
    """Seconds that an upload may take, and that a shutdown waits for what was accepted."""


class Figures:
    """What Prometheus is told."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self.requests = prometheus_client.Counter(
            "fastcnn_requests", "Photos sent, by the answer's status", ["status"], registry=self.registry
        )
        self.latency = prometheus_client.Histogram(
            "fastcnn_request_seconds",
            "From a request's head to its answer",
            buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
            registry=self.registry,
        )
        self.batches = prometheus_client.Histogram(
            "fastcnn_batch_photos", "Photos a batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )
        self.seconds = prometheus_client.Counter(
            "fastcnn_work_seconds", "Time spent, by stage", ["stage"], registry=self.registry
        )
        self.in_progress = prometheus_client.Gauge(
            "fastcnn_requests_in_progress", "Photos sent and not answered", registry=self.registry
        )
        self.waiting = prometheus_client.Gauge("fastcnn_queue_photos", "Photos waiting", registry=self.registry)


class Closed(Exception):
    """No photo gets an answer any more."""


class Waiting(NamedTuple):
    """A photo that was accepted."""

    photo: bytes
    answer: Future[tuple[Verdict, Probabilities]]


class Batcher:
    """Photos of many requests, gathered into batches for one classifier, in a thread of its own."""

    def __init__(self, model: Artefact, limits: Limits, figures: Figures, workers: int | None = None) -> None:
        self._classify = Classifier(model, workers=workers, max_pixels=limits.pixels)
        self._limits, self._figures = limits, figures
        self._queue: queue.Queue[Waiting | None] = queue.Queue(limits.queue)
        self._warm, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    def submit(self, photo: bytes) -> Future[tuple[Verdict, Probabilities]]:
        """Return what becomes the photo's verdict and probabilities. Raises queue.Full, and Closed where none will."""
        if self._closed.is_set():
            raise Closed
        waiting = Waiting(photo, Future())
        self._queue.put_nowait(waiting)
        if self._closed.is_set():  # just now
            self._refuse_the_rest()
        return waiting.answer

    @property
    def ready(self) -> bool:
        """Whether photos that are submitted get an answer, and soon."""
        return self._warm.is_set() and self._thread.is_alive()

    def __len__(self) -> int:
        return self._queue.qsize()

    def close(self) -> None:
        """Answer what was submitted, and end."""
        while self._thread.is_alive():  # a full queue empties, unless the thread dies
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=0.1)
                break
        self._thread.join()

    def _run(self) -> None:
        try:
            with self._classify:
                self._classify.warm_up()
                self._warm.set()
                ended = False
                while not ended:
                    batch, ended = self._gather()
                    if batch:
                        self._answer(batch)
        finally:
            self._closed.set()
            self._refuse_the_rest()

    def _refuse_the_rest(self) -> None:
        """Leave nobody waiting where the decoder cannot be used."""
        with contextlib.suppress(queue.Empty):
            while True:
                waiting = self._queue.get_nowait()
                if waiting is not None:
                    waiting.answer.set_exception(Closed())

    def _gather(self) -> tuple[list[Waiting], bool]:
        """Return the next batch, and whether it is the last."""
        batch: list[Waiting] = []
        until = float("inf")
        while len(batch) < self._limits.batch:
            left = until - time.monotonic()
            try:
                waiting = self._queue.get(timeout=max(0.0, left) if batch else None)
            except queue.Empty:
                break
            if waiting is None:
                return batch, True
            if not batch:
                until = time.monotonic() + self._limits.window
            batch.append(waiting)
        return batch, False

    def _answer(self, batch: list[Waiting]) -> None:
        classify = self._classify
        before = classify.decode_seconds, classify.model_seconds
        try:
            answers = classify([waiting.photo for waiting in batch])
        except Exception as error:  # of the batch, not of the service
            for waiting in batch:
                waiting.answer.set_exception(error)
            return
        for waiting, answer in zip(batch, answers, strict=True):
            waiting.answer.set_result(answer)
        self._figures.batches.observe(len(batch))
        self._figures.seconds.labels("decode").inc(classify.decode_seconds - before[0])
        self._figures.seconds.labels("model").inc(classify.model_seconds - before[1])
