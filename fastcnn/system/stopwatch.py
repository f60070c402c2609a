"""Seconds, and what raised the peak memory, by stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

OUTSIDE = "other"  # what raises the peak memory between the stages


class Stopwatch:
    """Seconds by stage, and bytes by which each raised the peak memory. A stage inside another counts for itself only.

    Args:
        seconds: by stage, spent before this stopwatch starts.
        peak_memory: returns the peak memory so far; the bytes before this stopwatch starts count as stage "import".
    """

    def __init__(self, seconds: Mapping[str, float] | None = None, peak_memory: Callable[[], int] = lambda: 0) -> None:
        self.seconds = dict(seconds or {})
        self._open: list[str] = []
        self._start = time.perf_counter() - sum(self.seconds.values())
        self._peak_memory, self._peak = peak_memory, peak_memory()
        self._rises = {"import": self._peak}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time and the rise of the peak inside to a stage; subtract the time from the stage around it."""
        self._note_rise()
        start, outer = time.perf_counter(), self._open[-1] if self._open else None
        self._open.append(name)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self._note_rise()
            self._open.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
            if outer is not None:
                self.seconds[outer] = self.seconds.get(outer, 0.0) - elapsed

    def total(self) -> float:
        """Return all seconds, inside and outside of stages."""
        return time.perf_counter() - self._start

    def peak_rises(self) -> dict[str, int]:
        """Return the bytes by which each stage raised the peak memory; their sum is the peak."""
        self._note_rise()
        return dict(self._rises)

    def _note_rise(self) -> None:
        name, before = self._open[-1] if self._open else OUTSIDE, self._peak
        self._peak = max(before, self._peak_memory())
        self._rises[name] = self._rises.get(name, 0) + self._peak - before
