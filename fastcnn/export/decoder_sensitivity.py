"""Decoder sensitivity: how far a model's probabilities depend on the decoder, and on who resizes the photo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import pipelines
from fastcnn.config import LayoutOptions
from fastcnn.data.index import scan_held_out
from fastcnn.data.layout import NO_OPTIONS
from fastcnn.errors import DataError
from fastcnn.inference.artefact import Artefact, Probabilities
from fastcnn.system.text import table

BATCH_SIZE = 64
REFERENCE = "pillow"


@dataclass(frozen=True, kw_only=True)
class DecoderResult:
    """Comparison of one decoder with the reference, Pillow, on the photos that both can read.

    A photo's difference is the largest absolute difference between its probabilities and the reference's.
    """

    name: str
    photos: int
    accuracy: float
    agreement: float
    """Share of the photos with the same most probable class."""
    mean_difference: float
    largest_difference: float


@dataclass(frozen=True, kw_only=True)
class DecoderSensitivity:
    """Comparison of decoders on the same photos and model."""

    model: Path
    data: Path
    results: tuple[DecoderResult, ...]
    """One for each decoder, the reference first."""
    left_out: dict[str, str]
    """Decoder that cannot be measured on this machine -> reason."""
    bad: dict[str, str]
    """Path of a photo that the reference cannot read -> reason."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain data for JSON."""
        return {
            "model": str(self.model),
            "data": str(self.data),
            "ways": [asdict(result) for result in self.results],
            "left_out": self.left_out,
            "bad": self.bad,
        }

    def table(self) -> str:
        """Return the figures as a table for a terminal."""
        columns = "decoded by", "photos", "accuracy", "same class", "mean difference", "largest difference"
        rows = [
            (
                one.name,
                f"{one.photos:,}",
                f"{one.accuracy:.4f}",
                f"{one.agreement:.4f}",
                f"{one.mean_difference:.5f}",
                f"{one.largest_difference:.5f}",
            )
            for one in self.results
        ]
        lines = [table(columns, rows, right=columns[1:])]
        lines += [f"{name}: not measured: {reason}" for name, reason in self.left_out.items()]
        if self.bad:
            lines.append(f"{len(self.bad)} photos cannot be read and are left out")
        return "\n".join(lines)


def measure(
    model: Artefact,
    data: str | Path,
    decoders: Sequence[str] = ("turbo", "dali"),
    *,
    gpu: int | None = None,
    options: LayoutOptions = NO_OPTIONS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DecoderSensitivity:
    """Compare a model's probabilities for a folder of photos between decoders.

    Args:
        model: an exported model, opened.
        data: a folder or table of photos in classes, see `index.scan_held_out`.
        decoders: names of decoders to compare with the reference; the model's own resize of the full-size photo is
            always compared.
        gpu: index of the device on which DALI decodes too; None: on the CPU only.
        options: see `index.scan_held_out`.
        progress: called with the number of photos done and the total.

    Raises DataError if the folder does not fit the model or has no usable photo.
    """
    index = scan_held_out(data, model.classes, options=options)
    predictors, left_out = _predictors(decoders, gpu)
    parts: dict[str, list[Probabilities]] = {name: [] for name in predictors}
    reasons: list[str] = []
    for start in range(0, len(index), BATCH_SIZE):
        sources = index.sources(range(start, min(start + BATCH_SIZE, len(index))))
        for name, predict in predictors.items():
            probabilities, batch_reasons = predict(model, sources)
            parts[name].append(probabilities)
            reasons += batch_reasons if name == REFERENCE else []
        progress(start + len(sources), len(index))
    pipelines.close()
    bad = {path: reason for path, reason in zip(index.paths, reasons, strict=True) if reason}
    if len(bad) == len(index):
        raise DataError(f"no usable photos in {index.root}: {len(bad)} cannot be used")
    found = {name: np.concatenate(batches) for name, batches in parts.items()}
    return DecoderSensitivity(
        model=model.path,
        data=index.root,
        results=tuple(compare(name, one, found[REFERENCE], index.labels) for name, one in found.items()),
        left_out=left_out,
        bad=bad,
    )


def compare(name: str, found: Probabilities, reference: Probabilities, labels: npt.NDArray[np.int64]) -> DecoderResult:
    """Compare probabilities (N, K) with the reference's; rows of NaN stand for photos that could not be read."""
    both = ~np.isnan(found + reference).any(1)
    found, reference, labels = found[both], reference[both], labels[both]
    difference = np.abs(found - reference).max(1)
    return DecoderResult(
        name=name,
        photos=len(labels),
        accuracy=float((found.argmax(1) == labels).mean()),
        agreement=float((found.argmax(1) == reference.argmax(1)).mean()),
        mean_difference=float(difference.mean()),
        largest_difference=float(difference.max()),
    )


_Predictor = Callable[[Artefact, Sequence[pipelines.Source]], tuple[Probabilities, list[str]]]
"""(model, photos) -> (n, K) probabilities, NaN for a photo that cannot be read, and the reason for each photo or ""."""


def _predictors(decoders: Sequence[str], gpu: int | None) -> tuple[dict[str, _Predictor], dict[str, str]]:
    """Return a predictor for each decoder that works here, the reference first, and the reasons for the others."""
    predictors: dict[str, _Predictor] = {REFERENCE: _decoded_to_size(REFERENCE, None)}
    left_out: dict[str, str] = {}
    for decoder in decoders:
        if decoder == REFERENCE:
            continue
        try:
            pipelines.choose(decoder, gpu=False)
        except pipelines.DecoderUnavailable as error:
            left_out[decoder] = error.why
            continue
        predictors["dali on a CPU" if decoder == "dali" else decoder] = _decoded_to_size(decoder, None)
        if decoder == "dali" and gpu is not None:
            predictors["dali on a GPU"] = _decoded_to_size(decoder, gpu)
        elif decoder == "dali":
            left_out["dali on a GPU"] = "this machine has none"
    predictors["whole photo, model's resize"] = _resized_by_model
    return predictors, left_out


def _decoded_to_size(decoder: str, gpu: int | None) -> _Predictor:
    """Return a predictor for photos that the decoder scales to the model's size."""

    def predict(model: Artefact, sources: Sequence[pipelines.Source]) -> tuple[Probabilities, list[str]]:
        pixels = np.zeros((len(sources), model.image_size, model.image_size, 3), np.uint8)
        verdicts = pipelines.decode(sources, model.image_size, pixels, decoder=decoder, gpu=gpu)
        probabilities = model.probabilities(pixels)
        probabilities[[not verdict.ok for verdict in verdicts]] = np.nan
        return probabilities, [str(verdict.reason) for verdict in verdicts]

    return predict


def _resized_by_model(model: Artefact, sources: Sequence[pipelines.Source]) -> tuple[Probabilities, list[str]]:
    """Predict photos that Pillow decodes in full size, one at a time."""
    probabilities = np.full((len(sources), len(model.classes)), np.nan, np.float32)
    reasons = []
    for row, source in zip(probabilities, sources, strict=True):
        pixels, verdict = pipelines.decode_whole(source)
        reasons.append(str(verdict.reason))
        if verdict.ok:
            row[:] = model.probabilities(pixels[None])[0]
    return probabilities, reasons
