"""Number of CPU threads for a training step, chosen by the rates that were measured with each."""

from __future__ import annotations

import torch

MEASURED_SECONDS = 0.5
"""Time over which a rate is measured."""
PAUSE = 12
"""Measurements' time between two trials of other numbers, so that these cost a few percent at most."""
BETTER, CHANGED = 1.05, 1.3
"""Ratios of rates: by which another number is taken, and by which the machine must have changed for a new trial."""


class ThreadChoice:
    """Chooses the number of threads while a run trains: all cores at first, then whichever number was faster.

    On a machine with other work, or whose cores share their arithmetic units, threads that wait for each other can be
    slower than half as many. Half and twice the number in use are tried at the start, in each epoch, and when the
    rate has changed; the steps taken meanwhile are steps of the run like any other.
    """

    def __init__(self, most: int, *, fixed: bool = False) -> None:
        self.counts = [most] if fixed else sorted({most >> i or 1 for i in range(most.bit_length())})
        self.count = self.chosen = most
        self.steps: dict[int, int] = {}
        """Steps taken by each number of threads."""
        self._rates: dict[int, float] = {}
        self._untried: list[int] = []
        self._warm = False
        self._pause = 0.0
        self._measure()
        self.try_others()

    def try_others(self) -> None:
        """Try the numbers beside the one in use next, unless that was done a moment ago."""
        if len(self.counts) > 1 and not self._untried and self._pause <= 0:
            self._rates = {}
            self._untried = [self.chosen, *self._beside()]

    def took(self, num_steps: int, seconds: float) -> None:
        """Take note of steps that were just taken, and set the number of threads for those that follow."""
        self.steps[self.count] = self.steps.get(self.count, 0) + num_steps
        if len(self.counts) == 1:
            return
        self._pause -= seconds
        if not self._warm:  # a change of the number makes new threads and convolutions
            self._warm = True
            return
        self._measured_steps += num_steps
        self._measured_seconds += seconds
        if self._measured_seconds < MEASURED_SECONDS:
            return
        rate = self._measured_steps / self._measured_seconds
        if self._untried:
            self._rates[self._untried.pop(0)] = rate
            self._pause = PAUSE * MEASURED_SECONDS * len(self._rates)
            if not self._untried:
                best = max(self._rates, key=lambda count: self._rates[count])
                if self._rates[best] > BETTER * self._rates[self.chosen]:
                    self.chosen = best
                    self._untried = self._beside()
        elif not 1 / CHANGED < rate / self._rates[self.chosen] < CHANGED:
            self.try_others()
        self._use(self._untried[0] if self._untried else self.chosen)

    def _beside(self) -> list[int]:
        """Return the numbers beside the one chosen that have no rate yet."""
        at = self.counts.index(self.chosen)
        return [count for count in self.counts[max(0, at - 1) : at + 2] if count not in {self.chosen, *self._rates}]

    def _use(self, count: int) -> None:
        self._measure()
        if count != self.count:
            self.count, self._warm = count, False
            torch.set_num_threads(count)

    def _measure(self) -> None:
        self._measured_steps, self._measured_seconds = 0, 0.0
