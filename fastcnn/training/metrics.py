"""Metric sums on the device, turned into loss and accuracy when they are read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Score:
    """Loss and accuracy of a model on a set of images."""

    loss: float
    """Mean cross-entropy, nats."""
    accuracy: float
    """Fraction of images whose most probable class is their label."""
    count: int
    """Number of images."""


class Sums:
    """Sums of loss, correct predictions and images so far, on the device: reading them is the only sync."""

    def __init__(self, device: torch.device) -> None:
        # Loss, correct predictions, images: counts are exact up to 2^53. Metal has no doubles.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.values = torch.zeros(3, dtype=dtype, device=device)

    def add(self, losses: Tensor, correct: Tensor, weights: Tensor) -> None:
        """Add a batch: losses, correct predictions and weights (0 leaves an image out), each (N,)."""
        weights = weights.to(self.values.dtype)
        self.values += torch.stack([(losses * weights).sum(), (correct * weights).sum(), weights.sum()])

    def reset(self) -> None:
        """Set the sums to zero."""
        self.values.zero_()

    def read(self) -> Score:
        """Return the score so far. This waits for the device."""
        return _score(self.values)


def _score(values: Tensor) -> Score:
    loss, correct, count = values.tolist()
    return Score(loss=loss / max(count, 1), accuracy=correct / max(count, 1), count=int(count))


class Live:
    """Recent score of running steps, without a sync: what progress lines show.

    On a GPU each mark is a copy into pinned memory and an event. At most three marks are pending: a fourth waits for
    the oldest, which keeps the device's queue short.
    """

    def __init__(self, sums: Sums) -> None:
        self.sums, self.marks = sums, 0
        self.score = Score(loss=0.0, accuracy=0.0, count=0)
        on_gpu = sums.values.device.type == "cuda"
        self._slots = (
            [(torch.zeros(3, dtype=torch.float64).pin_memory(), torch.cuda.Event()) for _ in range(3)] if on_gpu else []
        )

    def mark(self) -> None:
        """Record the sums after the steps queued so far; `score` becomes that of an earlier mark."""
        if not self._slots:
            self.score = self.sums.read()
            return
        host, event = self._slots[self.marks % len(self._slots)]
        if self.marks >= len(self._slots):
            event.synchronize()
            self.score = _score(host)
        host.copy_(self.sums.values, non_blocking=True)
        event.record()
        self.marks += 1
