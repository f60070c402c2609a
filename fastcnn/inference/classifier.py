"""Photos to probabilities with one artefact."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from PIL import Image

import pipelines
from fastcnn.inference.artefact import Artefact, Images
from pipelines.verdict import MAX_PIXELS, Source, Verdict
from pipelines.workers import Workers, shared

Probabilities = npt.NDArray[np.float32]


NONE = np.zeros(0, np.float32)


class Classifier:
    """Photos in, probabilities out: a decoder in processes that may die of a photo, and an exported model.

    Args:
        model: opened.
        workers: decoding threads; None: one for each core.
        max_pixels: a photo whose header claims more is "too large".
    """

    def __init__(self, model: Artefact, *, workers: int | None = None, max_pixels: int = MAX_PIXELS) -> None:
        decoder, _ = pipelines.choose("auto", gpu=False)
        self.model = model
        self.decode_seconds = self.model_seconds = 0.0
        self._workers = Workers(decoder, threads=workers, max_pixels=max_pixels)
        self._threads = ThreadPoolExecutor(pipelines.num_cores(), "model", _one_thread)

    def __enter__(self) -> Classifier:
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown()
        self._workers.close()

    def warm_up(self) -> None:
        """Do everything once that is slow at first: processes, imports, programs that specialise themselves."""
        file = io.BytesIO()
        Image.new("RGB", (64, 64)).save(file, "JPEG")
        for _ in range(3):
            self([file.getvalue()] * 2)
        self.decode_seconds = self.model_seconds = 0.0

    def __call__(self, sources: Sequence[Source]) -> list[tuple[Verdict, Probabilities]]:
        """Return a verdict for each source, and (num_classes,) probabilities where it is usable, else none.

        Sources are decoded as for training, straight to the model's size. What is said of a photo does not depend on
        what comes with it, to the bit: each goes through the model alone, as batches of other sizes round otherwise
        (3e-7 in a probability), and so that cores are used, several at a time in a thread each.
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
        return self.model.probabilities(image[None])[0] if verdict.ok else NONE


def _one_thread() -> None:
    """Keep torch's arithmetic in this thread from starting others."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


def ranked(probabilities: Probabilities, classes: Sequence[str], top_k: int) -> list[tuple[str, float]]:
    """Return the most probable classes with their probabilities, the first first."""
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    return [(classes[i], float(probabilities[i])) for i in order]
