"""Batcher: gathers photos of many requests into batches for one model."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import prometheus_client

from fastcnn.inference.artefact import Artefact, Probabilities
from fastcnn.inference.classifier import Classifier
from pipelines.verdict import MAX_PIXELS, Verdict
from pipelines.workers import DECODE_TIMEOUT


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the service."""

    upload: int = 20_000_000
    """Maximum bytes of a photo, and of the photos of a request together."""
    pixels: int = MAX_PIXELS
    """Maximum pixels of a photo by its header."""
    decoding: float = DECODE_TIMEOUT
    """Maximum seconds of decoding a photo."""
    queue: int = 256
    """Maximum number of photos waiting, and of photos in a request."""
    batch: int = 32
    """Maximum number of photos in a batch."""
    window: float = 0.005
    """Seconds that the first photo of a batch waits for others."""
    timeout: float = 30.0
    """Seconds allowed for an upload, and for answering accepted photos at shutdown."""

    @property
    def body(self) -> int:
        """Maximum bytes of a form or JSON, unpacked: base64 takes 4/3 of the photos' own."""
        return 2 * self.upload


class Metrics:
    """Metrics of one service for Prometheus."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self.requests = prometheus_client.Counter(
            "fastcnn_requests", "Requests to /predict, by the answer's status", ["status"], registry=self.registry
        )
        self.photos = prometheus_client.Counter(
            "fastcnn_photos", "Photos, by result: ok, or the error's code", ["result"], registry=self.registry
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
            "fastcnn_requests_in_progress", "Requests to /predict that are not answered yet", registry=self.registry
        )
        self.waiting = prometheus_client.Gauge("fastcnn_queue_photos", "Photos waiting", registry=self.registry)


class BatcherClosed(Exception):
    """Raised for photos that will not be answered because the batcher has ended."""


class QueuedPhoto(NamedTuple):
    """Accepted photo and its future answer."""

    photo: bytes
    answer: Future[tuple[Verdict, Probabilities]]


class Batcher:
    """Thread that gathers photos of many requests into batches for one classifier."""

    def __init__(self, model: Artefact, limits: Limits, metrics: Metrics, workers: int | None = None) -> None:
        self._classify = Classifier(model, workers=workers, max_pixels=limits.pixels, timeout=limits.decoding)
        self._limits, self._metrics = limits, metrics
        self._queue: queue.SimpleQueue[QueuedPhoto | None] = queue.SimpleQueue()
        self._warm, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    def submit(self, photos: Sequence[bytes]) -> list[Future[tuple[Verdict, Probabilities]]]:
        """Return the future verdict and (num_classes,) probabilities of each photo. Call it from one thread alone.

        Raises queue.Full if there is no room for all of them, or BatcherClosed.
        """
        if self._closed.is_set():
            raise BatcherClosed
        if len(self) + len(photos) > self._limits.queue:
            raise queue.Full
        queued = [QueuedPhoto(photo, Future()) for photo in photos]
        for one in queued:
            self._queue.put(one)
        if self._closed.is_set():  # it was closed meanwhile
            self._refuse_queued()
        return [one.answer for one in queued]

    @property
    def ready(self) -> bool:
        """Whether the classifier is warm and the thread alive, so that photos are answered."""
        return self._warm.is_set() and self._thread.is_alive()

    def __len__(self) -> int:
        return self._queue.qsize()

    def close(self) -> None:
        """Answer the photos submitted so far, and end the thread."""
        self._queue.put(None)
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
            self._refuse_queued()

    def _refuse_queued(self) -> None:
        """Fail the photos still queued, so that no request waits for a thread that has ended."""
        with contextlib.suppress(queue.Empty):
            while True:
                queued = self._queue.get_nowait()
                if queued is not None:
                    queued.answer.set_exception(BatcherClosed())

    def _gather(self) -> tuple[list[QueuedPhoto], bool]:
        """Return the next batch, and whether it is the last one."""
        batch: list[QueuedPhoto] = []
        until = float("inf")
        while len(batch) < self._limits.batch:
            left = until - time.monotonic()
            try:
                queued = self._queue.get(timeout=max(0.0, left) if batch else None)
            except queue.Empty:
                break
            if queued is None:
                return batch, True
            if not batch:
                until = time.monotonic() + self._limits.window
            batch.append(queued)
        return batch, False

    def _answer(self, batch: list[QueuedPhoto]) -> None:
        classify = self._classify
        before = classify.decode_seconds, classify.model_seconds
        batch = [queued for queued in batch if queued.answer.set_running_or_notify_cancel()]
        try:
            answers = classify([queued.photo for queued in batch])
        except Exception as error:  # fails this batch, the service goes on
            for queued in batch:
                queued.answer.set_exception(error)
            return
        for queued, answer in zip(batch, answers, strict=True):
            queued.answer.set_result(answer)
        self._metrics.batches.observe(len(batch))
        self._metrics.seconds.labels("decode").inc(classify.decode_seconds - before[0])
        self._metrics.seconds.labels("model").inc(classify.model_seconds - before[1])
