"""Model of a training step on G GPUs: seconds on the slowest rank, by cause."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from bench.harness.roofline import floor_seconds, passes
from bench.scale.rates import Values

NUM_PARAMETERS = 105_162  # SmallCNN(10); a test counts them
GRADIENT_BYTES = 4 * (NUM_PARAMETERS + 1)
STATISTICS_BYTES = 4 * 3 * 32  # a block's count, mean and squares around it, 32 channels
FILTERS = (32,) * 5
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Step:
    """Seconds of a training step on the slowest rank, by cause."""

    launches: float  # however few photos it has, where computing takes less; else 0
    compute: float
    stragglers: float  # that the slowest rank takes longer than the mean
    exchange: float  # gradient and batch-norm statistics: nothing is computed meanwhile
    feed: float  # the loader's for a rank's batch, while the step before runs

    @property
    def seconds(self) -> float:
        """Seconds from one step to the next."""
        return max(self.feed, self.launches + self.compute + self.stragglers + self.exchange)

    @property
    def bottleneck(self) -> str:
        """The largest of them."""
        return max(vars(self), key=vars(self).__getitem__)


def nodes_of(gpus: int) -> int:
    """Return how many machines hold so many GPUs."""
    return max(1, math.ceil(gpus / GPUS_PER_NODE))


def collective(num_bytes: float, gpus: int, rates: Values, ways: int = 2) -> float:
    """Return the seconds of an all-reduce, or with one way of an all-gather: within nodes, then between them.

    On each level the faster of a ring (ways x (n - 1) hops of 1/n of the bytes) and a tree (ways x log2 n hops).
    """

    def level(n: int, hop: float, link: float, size: float) -> float:
        return ways * min((n - 1) * (hop + size / n / link), math.ceil(math.log2(n)) * hop + size / link)

    if gpus == 1:
        return 0.0
    local = min(gpus, GPUS_PER_NODE)
    within = level(local, rates["hop_node"], rates["link_node"], num_bytes)
    return rates["collective"] + within + level(nodes_of(gpus), rates["hop_net"], rates["link_net"], num_bytes / local)


def slowest(ranks: int) -> float:
    """Return the expected largest of so many standard normal numbers (Blom's approximation)."""
    return NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


def step(batch: float, gpus: int, rates: Values, *, sync_batch_norm: bool = True, feed: float = 0.0) -> Step:
    """Return a step of `batch` photos a GPU; no GPU is the two measured cores. feed: the loader's seconds a photo."""
    ranks, launches, compute = max(1, gpus), 0.0, batch / rates["cpu_step"]
    if gpus:
        whole = max(1, round(batch))
        floor = floor_seconds(passes(FILTERS, batch=whole), rates["bandwidth"], rates["matrix"])
        launches, compute = rates["launch"], floor / rates["share"] * batch / whole
    exchange = collective(GRADIENT_BYTES, ranks, rates)
    if sync_batch_norm:
        for ways in (1, 2):  # gathered forward, reduced backward
            exchange += len(FILTERS) * collective(STATISTICS_BYTES, ranks, rates, ways)
    stragglers = rates["jitter"] * slowest(ranks) * max(launches, compute)
    launches, compute = (launches, 0.0) if launches > compute else (0.0, compute)
    return Step(launches, compute, stragglers, exchange, batch * feed)
