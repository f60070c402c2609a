"""Types of arrays, apart from torch, which takes a second to import and is not needed to find a cache."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.intp]
"""(n,) positions of images in a split, or of photos in an index."""

Pixels = npt.NDArray[np.uint8]
"""(n, H, W, 3) pixels of images."""

Labels = npt.NDArray[np.int64]
"""(n,) labels of images."""
