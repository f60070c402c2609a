"""Random resized crops of training photos, determined by (seed, epoch, photo) alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

TRIES = 10
SCALE = (0.35, 1.0)
RATIO = (3 / 4, 4 / 3)
"""Smallest and largest width over height; its logarithm is drawn uniformly."""


def crop_boxes(
    seed: int,
    epoch: int,
    photos: npt.NDArray[np.intp],
    sizes: npt.NDArray[np.int64],
    scale: tuple[float, float] = SCALE,
) -> npt.NDArray[np.float64]:
    """Return (n, 4) float64: left, top, right, bottom of a crop of each photo, in its pixels.

    Area and aspect ratio are drawn as in Szegedy et al., "Going deeper with convolutions" (2015), and as torchvision's
    RandomResizedCrop does: up to ten times until the crop fits, else it is the largest central one with an allowed
    ratio. A crop does not depend on the batch, the order or the decoder.

    Args:
        seed: seed of the run.
        epoch: number of the epoch.
        photos: (n,) position of each photo in the index.
        sizes: (n, 2) width and height of each upright photo.
        scale: smallest and largest fraction of the photo's area.
    """
    widths, heights = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)  # (n, 1)
    draws = _uniform(seed, epoch, photos, 2 * TRIES + 2)  # (n, k)
    areas = widths * heights * (scale[0] + (scale[1] - scale[0]) * draws[:, :TRIES])  # (n, TRIES)
    ratios = np.exp(np.log(RATIO[0]) + np.log(RATIO[1] / RATIO[0]) * draws[:, TRIES : 2 * TRIES])
    # The last column is the crop where no try fits: the whole photo, cut to the allowed ratios.
    across = np.hstack([np.sqrt(areas * ratios), np.minimum(widths, heights * RATIO[1])])
    down = np.hstack([np.sqrt(areas / ratios), np.minimum(heights, widths / RATIO[0])])
    chosen = ((across <= widths) & (down <= heights)).argmax(1)[:, None]  # (n, 1) the first that fits
    across, down = (np.maximum(np.take_along_axis(side, chosen, 1), 1.0) for side in (across, down))
    where = np.where(chosen == TRIES, 0.5, draws[:, 2 * TRIES :])  # (n, 2)
    left, top = (widths - across) * where[:, :1], (heights - down) * where[:, 1:]
    return np.hstack([left, top, np.minimum(left + across, widths), np.minimum(top + down, heights)])


def _uniform(seed: int, epoch: int, photos: npt.NDArray[np.intp], count: int) -> npt.NDArray[np.float64]:
    """Return (n, count) uniform numbers in [0, 1): those of photo p are the stream of (seed, epoch, p).

    SplitMix64 (Steele, Lea and Flood, 2014), whose numbers can be computed in any order.
    """
    start = np.zeros(len(photos), np.uint64)
    for part in (np.uint64(seed), np.uint64(epoch), photos.astype(np.uint64)):
        start = _mix(start + _STEP ^ part)
    words = _mix(start[:, None] + _STEP * np.arange(1, count + 1, dtype=np.uint64))
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


_STEP = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
