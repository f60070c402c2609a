"""A pipeline of batches, simulated: stages that hand over through short buffers, ranks that wait for the slowest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def simulate(
    stages: Sequence[float],
    num_batches: int,
    *,
    ranks: int = 1,
    exchange: float | None = None,
    jitter: Sequence[float] = (),
    depth: int = 2,
    seed: int = 0,
) -> float:
    """Return the seconds from the first batch's start to the last one's end, on all ranks.

    Args:
        stages: seconds that each stage of a rank takes for a batch, in order; the last is the training step.
        num_batches: batches of every rank.
        ranks: pipelines side by side.
        exchange: seconds of the all-reduce after each step, which no rank leaves before the last has come to it;
            None: nothing is exchanged, as when a cache is built.
        jitter: standard deviation of each stage on a rank, as a share of its seconds; none takes less than no time.
        depth: batches that the buffer between two stages holds, the one that is worked on included.
        seed: of the jitter.
    """
    random = np.random.default_rng(seed)
    num_stages, jitter = len(stages), jitter or [0.0] * len(stages)
    left = np.zeros((depth, num_stages, ranks))  # when each stage was done with the last `depth` batches
    for batch in range(num_batches):
        slot, before = batch % depth, left[(batch - 1) % depth].copy()
        freed = left[slot].copy()  # batch - depth: a stage writes where the next one was done reading
        handed = np.zeros(ranks)
        for stage, seconds in enumerate(stages):
            start = np.maximum(handed, before[stage])
            if stage + 1 < num_stages:
                start = np.maximum(start, freed[stage + 1])
            handed = start + seconds * np.maximum(0, 1 + jitter[stage] * random.standard_normal(ranks))
            if stage + 1 == num_stages and exchange is not None:
                handed = np.full(ranks, handed.max() + exchange)
            left[slot, stage] = handed
    return float(left.max())
