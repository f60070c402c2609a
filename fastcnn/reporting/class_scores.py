"""Scores of a model by class: precision, recall, F1 and the confusion matrix, as plain data and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcnn.system.text import finite_or_none, printable, table
from fastcnn.training.metrics import Score

COLUMNS = ("class", "photos", "precision", "recall", "F1")


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """Scores on a set of photos. An undefined score, such as the recall of a class without photos, is NaN.

    A class that has photos and is never predicted has precision and F1 0. Means are over the classes with photos.
    """

    classes: tuple[str, ...]
    score: Score
    top5: float
    """Fraction of photos whose label is among the five most probable classes."""
    confusion: npt.NDArray[np.int64]
    """(K, K) counts of photos by true class (rows) and predicted class (columns)."""

    @property
    def photos(self) -> npt.NDArray[np.int64]:
        """(K,) number of photos of each class."""
        return np.asarray(self.confusion.sum(1))

    @property
    def precision(self) -> npt.NDArray[np.float64]:
        """(K,) fraction of the photos predicted as a class that belong to it."""
        precision = _ratio(self.confusion.diagonal(), self.confusion.sum(0))
        return np.where((self.photos > 0) & np.isnan(precision), 0.0, precision)

    @property
    def recall(self) -> npt.NDArray[np.float64]:
        """(K,) fraction of the photos of a class that are predicted as it."""
        return _ratio(self.confusion.diagonal(), self.confusion.sum(1))

    @property
    def f1(self) -> npt.NDArray[np.float64]:
        """(K,) harmonic mean of precision and recall."""
        return _ratio(2 * self.confusion.diagonal(), self.confusion.sum(0) + self.confusion.sum(1))

    def rows(self) -> list[tuple[str, int, list[float]]]:
        """Return name, photos and [precision, recall, F1] of each class; the last row has their plain means."""
        columns = self.precision, self.recall, self.f1
        classes = [
            (name, int(count), [float(column[i]) for column in columns])
            for i, (name, count) in enumerate(zip(self.classes, self.photos, strict=True))
        ]
        return [*classes, ("mean", int(self.photos.sum()), [_mean(column[self.photos > 0]) for column in columns])]

    def to_dict(self) -> dict[str, Any]:
        """Return all scores as plain data, None for NaN."""
        names = ("precision", "recall", "f1")
        *classes, mean = [
            {"class": name, "photos": photos, **dict(zip(names, map(finite_or_none, figures), strict=True))}
            for name, photos, figures in self.rows()
        ]
        return {
            "photos": self.score.count,
            "accuracy": finite_or_none(self.score.accuracy),
            "loss": finite_or_none(self.score.loss),
            "top5_accuracy": finite_or_none(self.top5),
            "mean": {name: mean[name] for name in names},
            "per_class": classes,
            "confusion_matrix": self.confusion.tolist(),
        }

    def table(self) -> str:
        """Return the scores as text for a terminal."""
        score = self.score
        rows = [(printable(name), f"{photos:,}", *map(number, figures)) for name, photos, figures in self.rows()]
        return (
            f"{score.count:,} photos  accuracy {score.accuracy:.4f}  loss {score.loss:.4f}  top-5 {self.top5:.4f}\n"
            + table(COLUMNS, rows, right=COLUMNS[1:])
        )


def score_classes(
    classes: Sequence[str],
    score: Score,
    labels: npt.NDArray[np.int64],
    predicted: npt.NDArray[np.int64],
    probabilities: npt.NDArray[np.float32],
) -> ClassScores:
    """Return the class scores of M photos: labels (M,), predicted (M,), probabilities (M, K)."""
    return ClassScores(
        classes=tuple(classes),
        score=score,
        top5=top_k_accuracy(labels, probabilities, 5),
        confusion=confusion_matrix(labels, predicted, len(classes)),
    )


def top_k_accuracy(labels: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float32], k: int) -> float:
    """Return the fraction of photos whose label is among the k most probable classes; ties go to the lower class."""
    if not len(labels):
        return float("nan")
    right = np.take_along_axis(probabilities, labels[:, None], 1)  # (M, 1)
    first = np.arange(probabilities.shape[1]) < labels[:, None]
    rank = ((probabilities > right) | ((probabilities == right) & first)).sum(1)
    return float(((rank < k) & np.isfinite(right[:, 0])).mean())


def number(value: float, digits: int = 4) -> str:
    """Return a score as text, "-" for NaN."""
    return f"{value:.{digits}f}" if np.isfinite(value) else "-"


def _ratio(part: npt.NDArray[np.int64], whole: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _mean(values: npt.NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def confusion_matrix(
    labels: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], num_classes: int
) -> npt.NDArray[np.int64]:
    """Return (num_classes, num_classes) counts of photos by true class (rows) and predicted class (columns)."""
    return np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)
