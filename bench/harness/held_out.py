"""What is trained on, and what accuracy is measured on: all photos that are not trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastcnn.data.index import Index
from fastcnn.data.split_file import write_split


def write_held_out(path: Path, index: Index, splits: npt.NDArray[np.str_]) -> int:
    """Write a split.csv that validates on the test photos of a split, too; return how many photos it validates on."""
    held_out = splits != "train"
    write_split(path, index, np.where(held_out, "val", "train"))
    return int(held_out.sum())
