"""Predictions of an exported model for photos, and writers for the command line."""

from __future__ import annotations

import csv
import glob
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastcnn.errors import FastCNNError
from fastcnn.inference.artefact import Artefact, Probabilities
from fastcnn.inference.classifier import Classifier, ranked
from fastcnn.system.text import as_utf8, printable
from pipelines.meant import may_hold_photos, meant_as_photo
from pipelines.verdict import MAX_PIXELS
from pipelines.workers import DECODE_TIMEOUT

BATCH_SIZE = 64


@dataclass(frozen=True)
class Prediction:
    """Probabilities for one photo, or the reason why there are none."""

    path: str
    reason: str
    """Reason why the photo cannot be used; "" if it can."""
    probabilities: Probabilities
    """(num_classes,) fp32; empty if the photo cannot be used."""


def predict_photos(
    model: Artefact,
    inputs: Sequence[str | Path],
    *,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    timeout: float = DECODE_TIMEOUT,
    progress: Callable[[int, int], None] = lambda done, total: None,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[Prediction]:
    """Yield a prediction for each photo in `inputs`, see `find_photos`.

    Args:
        model: an exported model, opened.
        inputs: photos, folders, globs.
        workers: decoding threads; None: one per core.
        max_pixels: photos with more pixels in their header are "too large".
        timeout: seconds that decoding one photo may take.
        progress: called with the number of photos done and the total.
        note: called at the end with a line about the speed, without the time that the start took.

    Raises FastCNNError for an input that does not exist.
    """
    paths, bad = list(find_photos(inputs)), 0
    with Classifier(model, workers=workers, max_pixels=max_pixels, timeout=timeout) as classify:
        if paths:
            classify.start()
        begun = time.perf_counter()
        for start in range(0, len(paths), BATCH_SIZE):
            batch = paths[start : start + BATCH_SIZE]
            for path, (verdict, probabilities) in zip(batch, classify(batch), strict=True):
                bad += not verdict.ok
                yield Prediction(path, verdict.reason, probabilities)
            progress(start + len(batch), len(paths))
        seconds = time.perf_counter() - begun
    decoding = classify.decode_seconds / max(classify.decode_seconds + classify.model_seconds, 1e-9)
    note(
        f"{len(paths):,} photo{'s' * (len(paths) != 1)} in {seconds:.1f} s ({len(paths) / max(seconds, 1e-9):,.0f} "
        f"photos/s, {decoding:.0%} of it decoding)" + (f"; {bad:,} cannot be used" if bad else "")
    )


def find_photos(inputs: Sequence[str | Path]) -> Iterator[str]:
    """Yield files given, files below folders given that may be photos, and matches of globs given, each sorted.

    "-" reads paths from standard input, one per line or separated by null characters (`find -print0`). Raises
    FastCNNError for an input that does not exist.
    """
    for item in inputs:
        if str(item) == "-":
            yield from _standard_input()
        elif os.path.lexists(item):
            yield from _below(str(item))
        elif matches := sorted(glob.glob(str(item), recursive=True)):  # noqa: PTH207 - Path.glob takes no absolute pattern
            for match in matches:
                yield from _below(match)
        else:
            raise FastCNNError(f"no photo or folder {printable(str(item))}: check the path")


def _below(path: str) -> Iterator[str]:
    if not Path(path).is_dir():
        yield path
        return
    for folder, subfolders, files in os.walk(path):
        subfolders[:] = sorted(filter(may_hold_photos, subfolders))
        paths = (str(Path(folder, name)) for name in sorted(files) if not name.startswith("."))
        yield from filter(meant_as_photo, paths)


def _standard_input() -> Iterator[str]:
    text = os.fsdecode(sys.stdin.buffer.read())
    for path in text.split("\0" if "\0" in text else "\n"):
        if path:
            yield from _below(path)


def writer(format: str, classes: Sequence[str], top_k: int) -> Callable[[Prediction], None]:
    """Return a function that writes a prediction to standard output; `format` is table, csv or jsonl."""
    return {"table": _table, "csv": _csv, "jsonl": _jsonl}[format](classes, top_k)


def _table(classes: Sequence[str], top_k: int) -> Callable[[Prediction], None]:
    def write(prediction: Prediction) -> None:
        best = "  ".join(
            f"{printable(name)} {probability:.4f}"
            for name, probability in ranked(prediction.probabilities, classes, top_k)
        )
        print(f"{printable(prediction.path)}  {best or f'not used: {prediction.reason}'}")

    return write


def _csv(classes: Sequence[str], top_k: int) -> Callable[[Prediction], None]:
    lines = csv.writer(sys.stdout, lineterminator="\n")
    lines.writerow(["path", "rank", "class", "probability", "error"])

    def write(prediction: Prediction) -> None:
        path = printable(prediction.path)
        if prediction.reason:
            lines.writerow([path, "", "", "", prediction.reason])
        for rank, (name, probability) in enumerate(ranked(prediction.probabilities, classes, top_k), 1):
            lines.writerow([path, rank, name, f"{probability:.6f}", ""])

    return write


def _jsonl(classes: Sequence[str], top_k: int) -> Callable[[Prediction], None]:
    def write(prediction: Prediction) -> None:
        best = [{"class": name, "probability": p} for name, p in ranked(prediction.probabilities, classes, top_k)]
        result = {"error": prediction.reason} if prediction.reason else {"predictions": best}
        print(json.dumps({"path": as_utf8(prediction.path), **result}))

    return write
