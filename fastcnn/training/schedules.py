"""Learning-rate schedules, and the weights of a moving average of the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def scaled_lr(lr: float, rule: str, batch_size: int) -> float:
    """Return the learning rate for a batch size, given the one for 32: scaled by the ratio, its square root, or not.

    linear: P. Goyal et al., "Accurate, Large Minibatch SGD", arXiv:1706.02677. sqrt, which suits Adam: S. Malladi et
    al., "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", arXiv:2205.10287.
    """
    ratio = batch_size / 32
    return lr * {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[rule]


def schedule(
    name: str,
    lr: float,
    num_steps: int,
    *,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    decay_rate: float = 0.1,
) -> Tensor:
    """Return (num_steps,) fp32 learning rates of a schedule in `SCHEDULES`, after a linear warm-up of `warmup_steps`.

    decay_steps, decay_rate: steps between two drops of "step" (None: a third of the run) and the factor of each.
    """
    rise = [(i + 1) / (warmup_steps + 1) for i in range(min(warmup_steps, num_steps))]
    rest = num_steps - len(rise)
    every = decay_steps or max(1, num_steps // 3)
    shares = rise + [SCHEDULES[name](i, rest, every, decay_rate) for i in range(rest)]
    return (lr * torch.tensor(shares, dtype=torch.float64)).float()


def _onecycle(step: int, num_steps: int) -> float:
    """L. N. Smith and N. Topin, "Super-Convergence", arXiv:1708.07120.

    From 1 / 25 up to 1 over the first 30% and down to 1 / 250,000, both along a cosine, as
    torch.optim.lr_scheduler.OneCycleLR does.
    """
    peak = max(0.3 * num_steps - 1, 0.5)  # in a run of a few steps the first is all that rises
    if step <= peak:
        return _between(1 / 25, 1, step / peak)
    return _between(1, 1 / 25e4, (step - peak) / (num_steps - 1 - peak))


def _triangular(step: int, num_steps: int) -> float:
    """L. N. Smith, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186; here in one cycle.

    Linearly up over the first 20% of the steps and linearly down to 0 just after the last.
    """
    rise = max(1, round(0.2 * num_steps))
    return (step + 1) / rise if step < rise else (num_steps - step) / (num_steps - rise + 1)


SCHEDULES: dict[str, Callable[[int, int, int, float], float]] = {
    "constant": lambda step, num_steps, every, rate: 1.0,
    "cosine": lambda step, num_steps, every, rate: _between(1, 0, step / num_steps),
    "step": lambda step, num_steps, every, rate: rate ** (step // every),
    "onecycle": lambda step, num_steps, every, rate: _onecycle(step, num_steps),
    "triangular": lambda step, num_steps, every, rate: _triangular(step, num_steps),
}
"""(step, steps of the run, steps between two drops, factor of a drop) -> fraction of the learning rate."""


def average_weights(decay: float, num_steps: int) -> Tensor:
    """Return (num_steps,) weight of each step's values in their moving average.

    The decay at step i is min(decay, (1 + i) / (10 + i)), so that a short run forgets its initial weights.
    """
    return torch.tensor([1 - min(decay, (1 + i) / (10 + i)) for i in range(num_steps)])


def _between(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
