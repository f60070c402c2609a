"""An exported file checked: its hash, its golden inputs, and the photos that its run held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcnn import artefact
from fastcnn.artefact import Artefact, Images, Probabilities
from fastcnn.errors import CheckError, FastCNNError

BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a check found."""

    path: str
    sha256: str
    tolerance: float
    num_golden: int
    golden_difference: float
    """Largest difference in a probability of a golden input."""
    photos: int = 0
    """Photos that the run held out, as it saw them; 0 where they were not compared."""
    difference: float = 0.0
    """Largest difference in a probability of those."""
    other_class: int = 0
    """Photos with another top class than the trained model's, ties apart."""
    accuracy: float | None = None
    trained_accuracy: float | None = None
    """The trained model's on the same photos."""
    problems: tuple[str, ...] = ()
    """What is wrong; nothing where the file is what it says."""


def verify(
    path: str | Path | Artefact,
    pixels: Images | None = None,
    labels: npt.NDArray[np.int64] | None = None,
    trained: Probabilities | None = None,
    *,
    sha256: str | None = None,
) -> Report:
    """Return what a check of an exported file finds.

    Args:
        path: the file, or one that is open.
        pixels: (M, H, W, 3) photos to compare on; None leaves that out.
        labels: (M,) their classes.
        trained: (M, num_classes) what the trained model says of them.
        sha256: see `artefact.open`.
    """
    raise NotImplementedError


def decode_skew(model: Artefact, data: str | Path, decoders: Sequence[str]) -> Any:
    """Return how the model's answers to the photos in `data` differ by what decodes them."""
    raise NotImplementedError
