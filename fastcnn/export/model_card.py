"""Model card: what an exported model is, how good it is and how to call it, as Markdown beside the files."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastcnn.data import split_file
from fastcnn.errors import DataError, os_error_as
from fastcnn.storage.files import write as write_file
from fastcnn.system.templates import render
from fastcnn.system.text import comparable, printable


def write(folder: Path, metadata: Mapping[str, Any], files: Sequence[Path], run: Path | None = None) -> Path:
    """Write the card of exported `files`, which share this metadata, and return its path, `folder`/model_card.md.

    Its name begins as that of the first file, here model.torchscript. With a `run` folder it counts the photos of each
    class. Raises FastCNNError where it cannot be written.
    """
    path = folder / f"{files[0].stem}_card.md"
    with os_error_as(f"cannot write {path}"):
        write_file(path, page(metadata, files, count_photos(run) if run else None))
    return path


def page(
    metadata: Mapping[str, Any], files: Sequence[Path], photos: Mapping[str, Mapping[str, int]] | None = None
) -> str:
    """Return the card as Markdown; `photos` is what `count_photos` returns."""
    return render(
        ["fastcnn.export"],
        "model_card.md",
        filters={"plain": _plain},
        classes=metadata["classes"],
        versions={"fastcnn": "", "torch": "", **metadata.get("versions", {})},
        files=[(file.name, file.suffix) for file in files],
        needs=NEEDS,
        photos=_photo_rows(metadata["classes"], photos or {}),
        figures=_figures(metadata.get("training", {})),
        image_size=metadata["image_size"],
        mirrors=metadata.get("tta") == "flip",
        **{name: ", ".join(f"{value:g}" for value in metadata[name]) for name in ("mean", "std")},
    )


def count_photos(run: Path) -> dict[str, Counter[str]]:
    """Return the photos of each class, by its comparable name, in each split of a run; none without its split.csv."""
    counts: dict[str, Counter[str]] = {split: Counter() for split in ("train", "val", "test")}
    with contextlib.suppress(DataError):
        for row in split_file.read_rows(run / split_file.NAME):
            counts[row.split][comparable(row.label)] += 1
    return counts


def _photo_rows(classes: Sequence[str], photos: Mapping[str, Mapping[str, int]]) -> list[tuple[str, list[int]]]:
    """Return the name of each class and its photos in each split, the sums last; none where nothing is known."""
    if not any(photos.values()):
        return []
    rows = [(name, [counts.get(comparable(name), 0) for counts in photos.values()]) for name in classes]
    return [*rows, ("all", [sum(counts.values()) for counts in photos.values()])]


def _figures(training: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (label, f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
        for name, label in FIGURES.items()
        if isinstance(value := training.get(name), int | float)
    ]


def _plain(text: str) -> str:
    """Return a name so that Markdown shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", printable(text))


FIGURES = {
    "epoch": "best epoch, by validation accuracy",
    "train/accuracy": "accuracy on training photos, while training",
    "val/accuracy": "accuracy on validation photos",
    "val/loss": "cross-entropy on validation photos",
}
"""Name in the metadata's training figures -> label on the card."""

NEEDS = {".torchscript": "torch, LibTorch (C++)", ".onnx": "ONNX Runtime", ".pt2": "torch (`torch.export`)"}
