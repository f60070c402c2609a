"""Outcome of a model on one split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A photo and what the model says of it, to be shown."""

    path: str
    image: npt.NDArray[np.uint8]
    """(H, W, 3)."""
    label: str
    predicted: str
    probability: float
    """The model's, for the class that it predicts."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished run leaves, for the trackers; what it does not have is left out."""

    summary: Mapping[str, Any]
    """What result.json holds."""
    classes: Sequence[str]
    confusion: npt.NDArray[np.int64] | None = None
    """As `confusion_matrix` returns it."""
    samples: Sequence[Sample] = ()
    exported: Sequence[Path] = ()
    """The exported model's files."""
