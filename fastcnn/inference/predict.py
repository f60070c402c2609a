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
from fastcnn.storage.own_folders import is_ours
from fastcnn.system.text import as_utf8, printable
from pipelines.meant import may_hold_photos, meant_as_photo
from pipelines.verdict import MAX_PIXELS, Unusable, image_format
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
    started: float | None = None,
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
        started: time.perf_counter() when the start-up began that is told apart from the speed; None: at this call.
        progress: called with the number of photos done and the total.
        note: called at the end with a line about the speed.

    Raises FastCNNError for an input that does not exist.
    """
    started = time.perf_counter() if started is None else started
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
        f"photos/s, {decoding:.0%} of it decoding) after {begun - started:.1f} s of start-up"
        + (f"; {bad:,} cannot be used" if bad else "")
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


def _below(path: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Yield a file, or the files that may be photos below a folder; links are followed, but never in a circle.

    A folder that cannot be read is yielded itself, and reported as such. Runs and caches of ours are left out.
    """
    try:
        info = os.stat(path)  # noqa: PTH116
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except (OSError, ValueError):  # a file; not there; a name that no file can have
        yield path
        return
    inode = (info.st_dev, info.st_ino)
    if inode in above:
        return
    folders = {entry.name for entry in entries if os.path.isdir(entry.path)}  # noqa: PTH112
    for entry in entries:
        if entry.name not in folders and not entry.name.startswith(".") and meant_as_photo(entry.path):
            yield str(Path(entry.path))
    for entry in entries:
        if entry.name in folders and may_hold_photos(entry.name) and not is_ours(entry.path):
            yield from _below(entry.path, above | {inode})


def _standard_input() -> Iterator[str]:
    content = sys.stdin.buffer.read()
    text = os.fsdecode(content)
    lines = text.split("\0" if "\0" in text else "\n")
    if _is_picture(content) and not os.path.lexists(lines[0]):
        raise FastCNNError("standard input is a photo, not a list of paths: give the path of the photo instead of -")
    for line in lines:
        path = line if os.path.lexists(line) else line.removesuffix("\r")  # a list from Windows
        if path:
            yield from _below(path)


def _is_picture(content: bytes) -> bool:
    try:
        image_format(content)
    except Unusable as error:
        return error.verdict.reason == "unsupported format"
    return True


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
