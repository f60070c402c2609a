"""A training step on G GPUs: what it computes, what ranks tell each other, and how long the slowest is waited for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

from bench.harness.roofline import floor_seconds, fused_passes
from bench.rates import GRADIENT_BYTES, STATISTICS_BYTES

FILTERS = (32,) * 5
A_NODE = 8

Values = Mapping[str, float]
"""Rates of bench/rates.py by name."""


@dataclass(frozen=True)
class Step:
    """A training step's seconds on the slowest rank."""

    launches: float
    """What a step takes however few photos it has, where that is more than computing takes; else 0."""
    compute: float
    stragglers: float
    """What the slowest rank takes longer than the mean."""
    exchange: float
    """Gradient and batch-norm statistics: nothing is computed meanwhile."""
    feed: float
    """What the loader takes for a rank's batch, while the step before runs."""

    @property
    def seconds(self) -> float:
        """From one step to the next."""
        return max(self.feed, self.launches + self.compute + self.stragglers + self.exchange)

    @property
    def bottleneck(self) -> str:
        """The largest of them."""
        return max(vars(self), key=vars(self).__getitem__)


def nodes_of(gpus: int) -> int:
    """Return how many machines hold so many GPUs."""
    return -(-gpus // A_NODE)


def collective(num_bytes: float, gpus: int, rates: Values, ways: int = 2) -> float:
    """Return the seconds of an all-reduce, or with one way of an all-gather: within nodes, then between them.

    On each level the faster of a ring (ways x (n - 1) hops of 1/n of the bytes) and a tree (ways x log2 n hops).
    """
    if gpus == 1:
        return 0.0

    def level(n: int, hop: float, link: float, size: float) -> float:
        ring = ways * (n - 1) * (hop + size / n / link)
        tree = ways * (math.ceil(math.log2(n)) * hop + size / link)
        return min(ring, tree)

    local = min(gpus, A_NODE)
    within = level(local, rates["hop_node"], rates["link_node"], num_bytes)
    between = level(nodes_of(gpus), rates["hop_net"], rates["link_net"], num_bytes / local)
    return rates["collective"] + within + between


def slowest(ranks: int) -> float:
    """Return the expected largest of so many standard normal numbers (Blom's approximation)."""
    return NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


def step(batch: float, gpus: int, rates: Values, *, sync_batch_norm: bool = True, feed: float = 0.0) -> Step:
    """Return a step of `batch` photos a GPU; no GPU is the two measured cores. feed: the loader's seconds a photo."""
    if gpus:
        per_batch = max(1, round(batch))
        floor = floor_seconds(fused_passes(FILTERS, batch=per_batch), rates["bandwidth"], rates["matrix"])
        compute = floor / rates["share"] * batch / per_batch
    else:
        compute = batch / rates["cpu_step"]
    launch = rates["launch"] if gpus else 0.0
    ranks = max(1, gpus)
    exchange = collective(GRADIENT_BYTES, ranks, rates)
    if sync_batch_norm:
        for ways in (1, 2):  # gathered forward, reduced backward
            exchange += len(FILTERS) * collective(STATISTICS_BYTES, ranks, rates, ways)
    bound = launch > compute
    late = rates["jitter"] * slowest(ranks) * max(launch, compute) if ranks > 1 else 0.0
    return Step(launch * bound, compute * (not bound), late, exchange, batch * feed)
