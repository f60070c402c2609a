"""Whether two ways of training are equivalent, by two one-sided tests over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ALPHA = 0.05  # of each one-sided test; the interval that goes with two of them is the 90% one
POWER = 0.8  # chance of a verdict that the number of seeds advised is made for
MOST = 10_000  # seeds: whoever would need more is told so

Verdict = Literal["equivalent", "different", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Paired differences against a margin."""

    n: int
    """Pairs."""
    mean: float
    standard_deviation: float
    low: float
    """Where the mean's interval begins: the 90% one, for tests at 5%."""
    high: float
    margin: float
    p: float
    """The larger p of the two one-sided tests; 1 less it is that of the test that the mean lies beyond the margin."""
    verdict: Verdict
    needed: int | None
    """Pairs that would do in an undecided case, by `needed`; None where it is decided, or for more than `MOST`."""


def compare(differences: Sequence[float], margin: float, alpha: float = ALPHA) -> Comparison:
    """Return the comparison of paired differences with a margin: Student's t, each one-sided test at `alpha`.

    D. J. Schuirmann, J. Pharmacokinet. Biopharm. 15 (1987) 657: "equivalent" where both one-sided tests, that the mean
    is above -margin and that it is below +margin, reject their opposite, which is where the 90% interval lies
    inside (-margin, margin). Its mirror image, as in G. Piaggio et al., JAMA 308 (2012) 2594: "different" where the
    whole interval lies outside, beyond -margin or beyond +margin. Otherwise, it crosses a margin: "undecided". An
    interval inside the margin that leaves out 0 is equivalent: a difference too small to matter.
    """
    from scipy.stats import ttest_1samp  # takes a second to import

    n, mean = len(differences), statistics.fmean(differences)
    deviation = statistics.stdev(differences) if n > 1 else 0.0
    if n < 2:
        low, high, p = -math.inf, math.inf, 0.5
    elif deviation <= 1e-12 * max(abs(mean), margin):  # the very same runs: there is nothing to divide by
        low = high = mean
        p = 0.0 if abs(mean) < margin else 1.0 if abs(mean) > margin else 0.5
    else:
        low, high = map(float, ttest_1samp(differences, 0).confidence_interval(1 - 2 * alpha))
        above = ttest_1samp(differences, -margin, alternative="greater").pvalue
        below = ttest_1samp(differences, margin, alternative="less").pvalue
        p = float(max(above, below))
    verdict: Verdict = "equivalent" if p < alpha else "different" if p > 1 - alpha else "undecided"
    return Comparison(
        n=n,
        mean=mean,
        standard_deviation=deviation,
        low=low,
        high=high,
        margin=margin,
        p=p,
        verdict=verdict,
        needed=needed(deviation, margin) if verdict == "undecided" and n > 1 else None,
    )


def needed(deviation: float, margin: float) -> int | None:
    """Return the pairs with which two equivalent sides are found so in four cases of five, None for more than `MOST`.

    As planned for two one-sided tests where there is no difference: each misses in one case of ten.
    """
    import numpy as np
    from scipy.stats import t

    n = np.arange(2, MOST + 1)
    half = (t.ppf(1 - ALPHA, n - 1) + t.ppf((1 + POWER) / 2, n - 1)) * deviation / np.sqrt(n)
    enough = n[half <= margin]
    return int(enough[0]) if enough.size else None


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdict of several measures: different where one is, equivalent where all are."""
    if "different" in verdicts:
        return "different"
    return "equivalent" if all(verdict == "equivalent" for verdict in verdicts) else "undecided"
