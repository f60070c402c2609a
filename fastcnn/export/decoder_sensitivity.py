"""How much a model's answers depend on what decoded the photos: each decoder, and the model's own resize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import pipelines
from fastcnn.data.index import scan_held_out
from fastcnn.errors import DataError
from fastcnn.inference.artefact import Artefact

BATCH_SIZE = 64
REFERENCE = "pillow"

Probabilities = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Way:
    """What a model says of photos that came to it in one way, beside the reference: Pillow, straight to its size.

    A photo's difference is the largest of its probabilities from the reference's.
    """

    name: str
    photos: int
    """Photos that this way and the reference both read; the figures are of these."""
    accuracy: float
    agreement: float
    """Share of the photos with the same most probable class."""
    mean_difference: float
    largest_difference: float


@dataclass(frozen=True, kw_only=True)
class Skew:
    """What a model says of the same photos, decoded in several ways."""

    model: Path
    data: Path
    ways: tuple[Way, ...]
    """The reference first."""
    left_out: dict[str, str]
    """Ways that cannot be measured here, and why."""
    bad: dict[str, str]
    """Path -> reason of the photos that the reference cannot read."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "model": str(self.model),
            "data": str(self.data),
            "ways": [asdict(way) for way in self.ways],
            "left_out": self.left_out,
            "bad": self.bad,
        }

    def table(self) -> str:
        """Return the figures as text for a terminal."""
        width = max(len(way.name) for way in self.ways)
        columns = "photos", "accuracy", "same class", "mean", "largest"
        lines = [f"{'':{width}}  {'':>8}  {'':>8}  {'':>10}  {'difference':>18}"]
        lines.append(f"{'decoded by':{width}}  {'  '.join(f'{name:>{max(8, len(name))}}' for name in columns)}")
        lines += [
            f"{way.name:{width}}  {way.photos:>8,}  {way.accuracy:>8.4f}  {way.agreement:>10.4f}  "
            f"{way.mean_difference:>8.5f}  {way.largest_difference:>8.5f}"
            for way in self.ways
        ]
        lines += [f"{name}: not measured: {why}" for name, why in self.left_out.items()]
        if self.bad:
            lines.append(f"{len(self.bad)} photos cannot be read and are left out")
        return "\n".join(lines)


def measure(
    model: Artefact,
    data: str | Path,
    decoders: Sequence[str] = ("turbo", "dali"),
    *,
    gpu: int | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Skew:
    """Return how the model's answers for the photos of a folder differ by what decoded them.

    Args:
        model: an exported model, opened.
        data: a folder of photos in classes, see `index.scan_held_out`.
        decoders: what is measured beside the reference, and beside the model's own resize of the whole photo.
        gpu: index of the device on which DALI decodes too; None: on the CPU only.
        workers: decoding threads; None: one for each core.
        progress: told photos done and photos to do.

    Raises DataError where the folder does not fit the model or holds no usable photo.
    """
    index = scan_held_out(data, model.classes)
    ways, left_out = _ways(decoders, gpu, workers)
    answers: dict[str, list[Probabilities]] = {name: [] for name in ways}
    reasons: list[str] = []
    for start in range(0, len(index), BATCH_SIZE):
        sources = index.sources(range(start, min(start + BATCH_SIZE, len(index))))
        for name, way in ways.items():
            probabilities, verdicts = way(model, sources)
            answers[name].append(probabilities)
            reasons += verdicts if name == REFERENCE else []
        progress(start + len(sources), len(index))
    pipelines.close()
    bad = {path: reason for path, reason in zip(index.paths, reasons, strict=True) if reason}
    if len(bad) == len(index):
        raise DataError(f"no usable photos in {index.root}: {len(bad)} cannot be used")
    whole = {name: np.concatenate(parts) for name, parts in answers.items()}
    return Skew(
        model=model.path,
        data=index.root,
        ways=tuple(compare(name, found, whole[REFERENCE], index.labels) for name, found in whole.items()),
        left_out=left_out,
        bad=bad,
    )


def compare(name: str, found: Probabilities, reference: Probabilities, labels: npt.NDArray[np.int64]) -> Way:
    """Return how probabilities (N, K) differ from the reference's; rows of NaN are photos that could not be read."""
    both = ~np.isnan(found + reference).any(1)
    found, reference, labels = found[both], reference[both], labels[both]
    difference = np.abs(found - reference).max(1)
    return Way(
        name=name,
        photos=len(labels),
        accuracy=float((found.argmax(1) == labels).mean()),
        agreement=float((found.argmax(1) == reference.argmax(1)).mean()),
        mean_difference=float(difference.mean()),
        largest_difference=float(difference.max()),
    )


_Answer = Callable[[Artefact, Sequence[pipelines.Source]], tuple[Probabilities, list[str]]]
"""(model, photos) -> (n, K) probabilities, NaN for a photo that cannot be read, and for each the reason or ""."""


def _ways(decoders: Sequence[str], gpu: int | None, workers: int | None) -> tuple[dict[str, _Answer], dict[str, str]]:
    """Return the ways that can be measured here, the reference first, and why the others cannot."""
    ways: dict[str, _Answer] = {REFERENCE: _straight(REFERENCE, None, workers)}
    left_out: dict[str, str] = {}
    for decoder in decoders:
        if decoder == REFERENCE:
            continue
        try:
            pipelines.choose(decoder, gpu=False)
        except pipelines.DecoderUnavailable as error:
            left_out[decoder] = error.why
            continue
        ways["dali on a CPU" if decoder == "dali" else decoder] = _straight(decoder, None, workers)
        if decoder == "dali" and gpu is not None:
            ways["dali on a GPU"] = _straight(decoder, gpu, workers)
        elif decoder == "dali":
            left_out["dali on a GPU"] = "none is there"
    ways["whole photo, model's resize"] = _whole
    return ways, left_out


def _straight(decoder: str, gpu: int | None, workers: int | None) -> _Answer:
    """Return the answers for photos decoded straight to the model's size."""

    def answer(model: Artefact, sources: Sequence[pipelines.Source]) -> tuple[Probabilities, list[str]]:
        pixels = np.zeros((len(sources), model.image_size, model.image_size, 3), np.uint8)
        verdicts = pipelines.decode(sources, model.image_size, pixels, decoder=decoder, workers=workers, gpu=gpu)
        probabilities = model.probabilities(pixels)
        probabilities[[not verdict.ok for verdict in verdicts]] = np.nan
        return probabilities, [str(verdict.reason) for verdict in verdicts]

    return answer


def _whole(model: Artefact, sources: Sequence[pipelines.Source]) -> tuple[Probabilities, list[str]]:
    """Answer for photos decoded by Pillow in their own size, one at a time."""
    probabilities = np.full((len(sources), len(model.classes)), np.nan, np.float32)
    verdicts = []
    for row, source in zip(probabilities, sources, strict=True):
        pixels, verdict = pipelines.decode_whole(source)
        verdicts.append(str(verdict.reason))
        if verdict.ok:
            row[:] = model.probabilities(pixels[None])[0]
    return probabilities, verdicts
