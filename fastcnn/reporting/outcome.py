"""Outcome of a finished run, as trackers record it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Photo with its label and the model's prediction, for a plot."""

    path: str
    image: npt.NDArray[np.uint8]
    """(H, W, 3)."""
    label: str
    predicted: str
    probability: float
    """Probability of the predicted class."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Results of a finished run; a run without a report has no confusion matrix and no samples."""

    summary: Mapping[str, Any]
    """Content of result.json."""
    classes: Sequence[str]
    confusion: npt.NDArray[np.int64] | None = None
    """(K, K), as `confusion_matrix` returns it."""
    samples: Sequence[Sample] = ()
    exported: Sequence[Path] = ()
    """Files of the exported model."""
