"""Sums on the device, turned into loss, accuracy and a confusion matrix when they are read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a model got on a set of photos."""

    loss: float
    """Mean cross-entropy, nats."""
    accuracy: float
    """Share of photos whose most probable class is the right one."""
    count: int
    """Photos."""


class Sums:
    """Loss, right answers and photos of the steps so far, summed on the device: reading them is the only sync."""

    def __init__(self, device: torch.device) -> None:
        # Summed loss, right answers, photos: counts are exact up to 2^53. Metal has no doubles.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.values = torch.zeros(3, dtype=dtype, device=device)

    def add(self, losses: Tensor, right: Tensor, weights: Tensor) -> None:
        """Add a batch: per-photo loss, whether it was right, and weight (0 leaves a photo out), each (N,)."""
        weights = weights.to(self.values.dtype)
        self.values += torch.stack([(losses * weights).sum(), (right * weights).sum(), weights.sum()])

    def reset(self) -> None:
        """Start again from nothing."""
        self.values.zero_()

    def read(self) -> Score:
        """Return the score so far. This waits for the device."""
        return _score(self.values)


def _score(values: Tensor) -> Score:
    loss, right, count = values.tolist()
    return Score(loss=loss / max(count, 1), accuracy=right / max(count, 1), count=int(count))


class Live:
    """Sums as they were a little while ago, without waiting for the device but to keep its queue short.

    On a GPU each mark is a copy into pinned memory and an event. At most three marks are under way: before a fourth,
    `mark` waits for the oldest.
    """

    def __init__(self, sums: Sums) -> None:
        self.sums, self.marks = sums, 0
        self.score = Score(loss=0.0, accuracy=0.0, count=0)
        on_gpu = sums.values.device.type == "cuda"
        self._slots = (
            [(torch.zeros(3, dtype=torch.float64).pin_memory(), torch.cuda.Event()) for _ in range(3)] if on_gpu else []
        )

    def mark(self) -> None:
        """Note what the sums are after the steps queued so far; `score` is what they were at an earlier mark."""
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
