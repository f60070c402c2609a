"""Classifier: decodes photos and runs an exported model on them."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from PIL import Image

import pipelines
from fastcnn.inference.artefact import Artefact, Images, Probabilities
from pipelines.shared_memory import shared
from pipelines.verdict import MAX_PIXELS, Source, Verdict
from pipelines.workers import DECODE_TIMEOUT, Workers, end_early, start_early

NO_PROBABILITIES = np.zeros(0, np.float32)


class Classifier:
    """Decoder in worker processes, which survives photos that crash it, and an exported model.

    Args:
        model: the exported model, opened.
        workers: decoding threads; None: one per core.
        max_pixels: photos with more pixels in their header are "too large".
        timeout: seconds that decoding one photo may take.
    """

    def __init__(
        self,
        model: Artefact,
        *,
        workers: int | None = None,
        max_pixels: int = MAX_PIXELS,
        timeout: float = DECODE_TIMEOUT,
    ) -> None:
        decoder, _ = pipelines.choose("auto", gpu=False)
        self.model = model
        self.decode_seconds = self.model_seconds = 0.0
        self._workers = Workers(decoder, threads=workers, max_pixels=max_pixels, timeout=timeout)
        self._threads = model_threads()

    def __enter__(self) -> Classifier:
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown()
        self._workers.close()

    def warm_up(self) -> None:
        """Start the worker processes, import the libraries and let TorchScript specialise."""
        for _ in range(3):
            self([_grey_photo()] * 2)
        self.decode_seconds = self.model_seconds = 0.0

    def start(self) -> None:
        """Start the worker processes."""
        size = self.model.image_size
        self._workers.decode([_grey_photo()], size, shared((1, size, size, 3)))

    def __call__(self, sources: Sequence[Source]) -> list[tuple[Verdict, Probabilities]]:
        """Return a verdict for each source with (num_classes,) probabilities, which are empty if it is unusable.

        Sources are decoded as for training, straight to the model's size. Each photo goes through the model alone, in
        threads to use all cores: its probabilities do not depend on the other photos to the bit, whereas another batch
        size would change a probability by up to 3e-7.
        """
        size = self.model.image_size
        start = time.perf_counter()
        pixels = shared((len(sources), size, size, 3))
        verdicts = self._workers.decode(sources, size, pixels)
        decoded = time.perf_counter()
        found = list(self._threads.map(self._probabilities, pixels, verdicts))
        self.decode_seconds += decoded - start
        self.model_seconds += time.perf_counter() - decoded
        return list(zip(verdicts, found, strict=True))

    def _probabilities(self, image: Images, verdict: Verdict) -> Probabilities:
        return self.model.probabilities(image[None])[0] if verdict.ok else NO_PROBABILITIES


def _grey_photo() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "grey").save(file, "JPEG")
    return file.getvalue()


@contextmanager
def decoder_forked() -> Iterator[None]:
    """Have the next classifier's decoder ready, forked from this process where it has no threads yet.

    Both need torch, and importing it a second time takes seconds. For commands: a library's caller has threads.
    """
    decoder, _ = pipelines.choose("auto", gpu=False)
    start_early(decoder, fork=True)
    try:
        yield
    finally:
        end_early()


def model_threads() -> ThreadPoolExecutor:
    """Return threads to run a model in, one a core: for a photo or a few this takes less than torch's own threads."""
    return ThreadPoolExecutor(pipelines.num_cores(), "model", _one_thread)


def _one_thread() -> None:
    """Limit torch to one thread for each thread of the pool."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


def ranked(probabilities: Probabilities, classes: Sequence[str], top_k: int) -> list[tuple[str, float]]:
    """Return the `top_k` most probable classes with their probabilities, in descending order."""
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    return [(classes[i], float(probabilities[i])) for i in order]
