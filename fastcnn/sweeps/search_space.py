"""Search space: parameters and how they are drawn."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

Goal = Literal["minimize", "maximize"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]
    chances: tuple[float, ...] | None = None
    """Of each value; None where they are alike."""

    def at(self, quantile: float) -> Any:
        """Return the value at a quantile (0 to 1) of the distribution."""
        assert self.chances
        bounds = itertools.accumulate(self.chances)
        total = sum(self.chances)
        return next((v for v, bound in zip(self.values, bounds, strict=True) if quantile * total < bound), self.last)

    @property
    def last(self) -> Any:
        """The last value that has a chance."""
        assert self.chances
        return [value for value, chance in zip(self.values, self.chances, strict=True) if chance][-1]


@dataclass(frozen=True, kw_only=True)
class Range:
    """A number between two, uniformly, or so that its logarithm is uniform."""

    low: float
    high: float
    log: bool = False
    whole: bool = False
    quantum: float | None = None
    """What the number is rounded to multiples of."""

    def rounded(self, number: float) -> float:
        """Return the value that a number drawn from the range stands for."""
        return _to_multiple(number, self.quantum)


@dataclass(frozen=True, kw_only=True)
class Bell:
    """A number, or its logarithm, of a normal distribution."""

    mean: float
    deviation: float
    log: bool = False
    quantum: float | None = None

    def at(self, quantile: float) -> float:
        """Return the value at a quantile (0 to 1) of the distribution."""
        if not self.deviation:
            number = self.mean
        else:  # the very ends are infinite
            number = NormalDist(self.mean, self.deviation).inv_cdf(min(max(quantile, 1e-9), 1 - 1e-9))
        return _to_multiple(math.exp(number) if self.log else number, self.quantum)


Parameter = Choice | Range | Bell


@dataclass(frozen=True, kw_only=True)
class Hyperband:
    """Which runs are given up: at each rung those that are not among the best 1 / eta of all that came so far."""

    first: int
    """Epochs of the first rung; the next have eta times as many."""
    eta: float = 3.0
    strict: bool = True
    """Judge by the epoch's own figure, not by the best so far."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep file says."""

    name: str
    method: str
    metric: str
    goal: Goal
    target: float | None
    """The figure at which the search has what it wants."""
    parameters: Mapping[str, Parameter]
    """What is varied, by the field of Config."""
    fixed: Mapping[str, Any]
    """Parameters of one value."""
    early: Hyperband | None
    run_cap: int | None
    """Runs at most."""
    command: tuple[str, ...]
    """What W&B's agent would run."""
    text: Mapping[str, Any]
    """The file itself, as plain data."""

    @property
    def grid_size(self) -> int | None:
        """Points of the grid; None for another method."""
        if self.method != "grid":
            return None
        return math.prod(len(p.values) for p in self.parameters.values() if isinstance(p, Choice))

    def grid_point(self, number: int) -> dict[str, int]:
        """Return, by name, which value of each parameter the grid's point has; the last parameter changes fastest."""
        point = {}
        for name, parameter in reversed(list(self.parameters.items())):
            assert isinstance(parameter, Choice)
            number, point[name] = divmod(number, len(parameter.values))
        return point

    def without(self, names: Collection[str]) -> Sweep:
        """Return the sweep without the parameters that an option fixes."""

        def rest(given: Mapping[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in given.items() if key.replace("-", "_") not in names}

        text = {**self.text, "parameters": rest(self.text["parameters"])}
        return dataclasses.replace(self, parameters=rest(self.parameters), fixed=rest(self.fixed), text=text)


def _to_multiple(number: float, quantum: float | None) -> float:
    if quantum is None:
        return number
    digits = max(0, 12 - math.floor(math.log10(quantum)))  # 0.1 * 3 is 0.30000000000000004
    return round(round(number / quantum) * quantum, digits)
