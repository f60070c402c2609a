"""How fast one revision is over another, from seconds taken in pairs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ratio:
    """Speed of the second over the first, with its interval and the number of pairs."""

    ratio: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        """Return the interval's width on either side, as a part of the ratio."""
        return math.sqrt(self.high / self.low) - 1

    def verdict(self, margin: float) -> str:
        """Return the verdict of the interval: "slower" and "faster" only where all of it lies beyond the margin."""
        if self.high < 1 - margin:
            return "slower"
        if self.low > 1 / (1 - margin):
            return "faster"
        return "the same" if 1 - margin <= self.low and self.high <= 1 / (1 - margin) else "no clear difference"


def speed_ratio(base: Sequence[float], head: Sequence[float], confidence: float = 0.95) -> Ratio:
    """Return how fast `head` is over `base`, of seconds taken in pairs.

    The Hodges-Lehmann estimate of the pairs' log ratios, with the interval that inverts Wilcoxon's signed-rank test
    (M. Hollander, D. A. Wolfe, E. Chicken, "Nonparametric Statistical Methods", 3.2 and 3.3; the normal approximation).
    A few pairs that the machine spoilt move it little.
    """
    logs = np.log(base) - np.log(head)
    n = len(logs)
    rows, columns = np.triu_indices(n)
    averages = np.sort((logs[rows] + logs[columns]) / 2)
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    left_out = max(0, round(n * (n + 1) / 4 - z * math.sqrt(n * (n + 1) * (2 * n + 1) / 24)))
    ratio, low, high = np.exp([np.median(averages), averages[left_out], averages[-1 - left_out]]).tolist()
    return Ratio(ratio, low, high, n)
