"""95% intervals of means and of ratios over seeds, by Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

Interval = dict[str, float]
"""mean, low and high; of a single value, from -inf to inf."""


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of values and its 95% interval."""
    from scipy.stats import t  # takes a second to import

    mean, n = statistics.mean(values), len(values)
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
    return {"mean": mean, "low": mean - half, "high": mean + half}


def ratio_interval(above: Sequence[float], below: Sequence[float]) -> Interval:
    """Return the geometric mean of ratios in pairs, and its 95% interval: that of their logarithms."""
    logarithms = interval([math.log(a / b) for a, b in zip(above, below, strict=True)])
    return {name: math.exp(value) for name, value in logarithms.items()}
