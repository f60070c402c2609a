"""Classes of photos, from an exported model."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

import pipelines
from fastcnn.artefact import Artefact
from fastcnn.errors import FastCNNError
from fastcnn.index import printable

BATCH_SIZE = 64


@dataclass(frozen=True)
class Prediction:
    """What the model says of a photo."""

    path: str
    reason: str
    """Why the photo cannot be used; "" where it can."""
    probabilities: npt.NDArray[np.float32]
    """(num_classes,); empty where the photo cannot be used."""


def predict_photos(
    model: Artefact, inputs: Sequence[str | Path], *, workers: int | None = None
) -> Iterator[Prediction]:
    """Yield a prediction for each photo in `inputs`: photos, and folders with all photos below them.

    Photos are decoded as for training, straight to the model's size. Raises FastCNNError for an input that does not
    exist.
    """
    decoder, _ = pipelines.choose("auto", gpu=False)
    paths = list(find_photos(inputs))
    for start in range(0, len(paths), BATCH_SIZE):
        batch = paths[start : start + BATCH_SIZE]
        pixels = np.zeros((len(batch), model.image_size, model.image_size, 3), np.uint8)
        verdicts = pipelines.decode(batch, model.image_size, pixels, decoder=decoder, workers=workers)
        good = np.array([verdict.ok for verdict in verdicts])
        rows = iter(model.probabilities(pixels[good])) if good.any() else iter(())
        for path, verdict in zip(batch, verdicts, strict=True):
            yield Prediction(path, verdict.reason, next(rows) if verdict.ok else np.zeros(0, np.float32))


def find_photos(inputs: Sequence[str | Path]) -> Iterator[str]:
    """Yield each file given, and each visible file below each folder given, sorted."""
    for item in inputs:
        if not Path(item).exists():
            raise FastCNNError(f"no photo or folder {item}")
        if not Path(item).is_dir():
            yield str(item)
            continue
        for folder, subfolders, files in os.walk(item):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            yield from (str(Path(folder, name)) for name in sorted(files) if not name.startswith("."))


def writer(format: str, classes: Sequence[str], top_k: int) -> Callable[[Prediction], None]:
    """Return a function that writes a prediction to standard output as table, csv or jsonl."""
    return {"table": _table, "csv": _csv, "jsonl": _jsonl}[format](classes, top_k)


def _table(classes: Sequence[str], top_k: int) -> Callable[[Prediction], None]:
    def write(prediction: Prediction) -> None:
        best = "  ".join(f"{name} {probability:.4f}" for name, probability in _best(prediction, classes, top_k))
        print(f"{printable(prediction.path)}  {best or f'not used: {prediction.reason}'}")

    return write


def _csv(classes: Sequence[str], top_k: int) -> Callable[[Prediction], None]:
    lines = csv.writer(sys.stdout, lineterminator="\n")
    lines.writerow(["path", "rank", "class", "probability", "error"])

    def write(prediction: Prediction) -> None:
        path = printable(prediction.path)
        if prediction.reason:
            lines.writerow([path, "", "", "", prediction.reason])
        for rank, (name, probability) in enumerate(_best(prediction, classes, top_k), 1):
            lines.writerow([path, rank, name, f"{probability:.6f}", ""])

    return write


def _jsonl(classes: Sequence[str], top_k: int) -> Callable[[Prediction], None]:
    def write(prediction: Prediction) -> None:
        best = [{"class": name, "probability": p} for name, p in _best(prediction, classes, top_k)]
        result = {"error": prediction.reason} if prediction.reason else {"predictions": best}
        print(json.dumps({"path": prediction.path, **result}))

    return write


def _best(prediction: Prediction, classes: Sequence[str], top_k: int) -> list[tuple[str, float]]:
    order = np.argsort(-prediction.probabilities, kind="stable")[:top_k]
    return [(classes[i], float(prediction.probabilities[i])) for i in order]
