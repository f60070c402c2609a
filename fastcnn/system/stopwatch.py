"""Seconds by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Stopwatch:
    """Seconds by stage. A stage inside another counts for itself only."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        """seconds: by stage, spent before this stopwatch starts."""
        self.seconds = dict(seconds or {})
        self._open: list[str] = []
        self._start = time.perf_counter() - sum(self.seconds.values())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a stage, and subtract it from the stage around it."""
        start, outer = time.perf_counter(), self._open[-1] if self._open else None
        self._open.append(name)
        try:
            yield
        finally:
            self._open.pop()
            elapsed = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
            if outer is not None:
                self.seconds[outer] = self.seconds.get(outer, 0.0) - elapsed

    def total(self) -> float:
        """Return all seconds, inside and outside of stages."""
        return time.perf_counter() - self._start
