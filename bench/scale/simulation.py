"""Simulation of a pipeline of stages with short buffers, against which the model is held."""

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
) -> float:
    """Return the simulated seconds of a pipeline, from the first batch's start to the last one's end on all ranks.

    Args:
        stages: seconds that each stage of a rank takes for a batch, in order; the last is the training step.
        num_batches: batches of every rank.
        ranks: pipelines side by side.
        exchange: seconds of the all-reduce after each step, which no rank leaves before the last has come to it;
            None: nothing is exchanged, as when a cache is built.
        jitter: standard deviation of each stage on a rank, as a part of its seconds; none takes less than no time.
        depth: batches that the buffer between two stages holds, the one that is worked on included.
    """
    random = np.random.default_rng(0)
    last, jitter = len(stages) - 1, jitter or [0.0] * len(stages)
    left = np.zeros((depth, len(stages), ranks))  # when each stage was done with the last `depth` batches
    for batch in range(num_batches):
        place, before = batch % depth, left[(batch - 1) % depth].copy()
        freed = left[place].copy()  # batch - depth: a stage writes where the next one was done reading
        handed = np.zeros(ranks)
        for stage, seconds in enumerate(stages):
            start = np.maximum(handed, before[stage])
            if stage < last:
                start = np.maximum(start, freed[stage + 1])
            handed = start + seconds * np.maximum(0, 1 + jitter[stage] * random.standard_normal(ranks))
            if stage == last and exchange is not None:
                handed = np.full(ranks, handed.max() + exchange)
            left[place, stage] = handed
    return float(left.max())
