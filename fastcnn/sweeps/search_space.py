"""Search space: parameters and how they are drawn."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

MAX_POINTS = 100_000  # of a space whose points are listed
MAX_EXPONENT = 709.0  # above it, math.exp overflows

Goal = Literal["minimize", "maximize"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of several values."""

    values: tuple[Any, ...]
    probabilities: tuple[float, ...] | None = None
    """Weight of each value; None: all alike."""

    def at(self, quantile: float) -> Any:
        """Return the value at a quantile (0 to 1) of the distribution."""
        assert self.probabilities
        bounds = list(itertools.accumulate(self.probabilities))
        last = bounds.index(bounds[-1])  # any after it have probability 0
        return self.values[min(bisect.bisect_right(bounds, quantile * bounds[-1]), last)]

    @property
    def points(self) -> Sequence[Any]:
        """Every value that may be drawn."""
        weights = self.probabilities or (1.0,) * len(self.values)
        drawn = [value for value, weight in zip(self.values, weights, strict=True) if weight]
        return [value for i, value in enumerate(drawn) if value not in drawn[:i]]

    def quantile(self, value: Any) -> float:
        """Return a quantile that `at` gives a value for."""
        assert self.probabilities
        i = next(i for i, v in enumerate(self.values) if v == value and self.probabilities[i])
        return (sum(self.probabilities[:i]) + self.probabilities[i] / 2) / sum(self.probabilities)


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """A number between two bounds, uniform in itself or in its logarithm."""

    low: float
    high: float
    log: bool = False
    integer: bool = False
    quantum: float | None = None
    """The number is rounded to a multiple of this."""

    def rounded(self, number: float) -> float:
        """Return a drawn number as a multiple of the quantum."""
        return round_to_multiple(number, self.quantum)

    @property
    def points(self) -> Sequence[Any] | None:
        """Every value that may be drawn; None where they are endless."""
        if self.integer:
            return range(int(self.low), int(self.high) + 1)
        if self.low == self.high:
            return [self.rounded(self.low)]
        if self.quantum is None or self.high / self.quantum > MAX_POINTS:
            return None
        steps = range(round(self.low / self.quantum), round(self.high / self.quantum) + 1)
        return [self.rounded(step * self.quantum) for step in steps]


@dataclass(frozen=True, kw_only=True)
class Normal:
    """A normally distributed number, or one whose logarithm is."""

    mean: float
    std: float
    log: bool = False
    quantum: float | None = None

    def at(self, quantile: float) -> float:
        """Return the value at a quantile (0 to 1) of the distribution."""
        if not self.std:
            number = self.mean
        else:  # the very ends are infinite
            number = NormalDist(self.mean, self.std).inv_cdf(min(max(quantile, 1e-9), 1 - 1e-9))
        number = math.exp(min(number, MAX_EXPONENT)) if self.log else number
        return round_to_multiple(number, self.quantum)

    @property
    def points(self) -> Sequence[Any] | None:
        """Every value that may be drawn; None where they are endless."""
        return None if self.std else [self.at(0.5)]


Parameter = Choice | Uniform | Normal


@dataclass(frozen=True, kw_only=True)
class Hyperband:
    """Early termination: at each rung a trial is pruned unless it is among the best 1 / eta that came so far."""

    first_rung: int
    """Epochs at the first rung; each next rung has eta times as many."""
    eta: float = 3.0
    strict: bool = True
    """Judge by the metric of the rung's epoch, not by the best so far."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A parsed sweep file."""

    name: str
    method: str
    metric: str
    goal: Goal
    target: float | None
    """Value of the metric at which the search ends."""
    parameters: Mapping[str, Parameter]
    """Parameters that vary, by field of Config."""
    fixed: Mapping[str, Any]
    """Parameters with a single value."""
    early: Hyperband | None
    run_cap: int | None
    """Largest number of trials."""
    command: tuple[str, ...]
    """Command that W&B's agent would run."""
    text: Mapping[str, Any]
    """Contents of the file, as plain data."""

    @property
    def grid_size(self) -> int | None:
        """Number of grid points; None for another method."""
        if self.method != "grid":
            return None
        return math.prod(len(p.values) for p in self.parameters.values() if isinstance(p, Choice))

    def grid_point(self, number: int) -> dict[str, int]:
        """Return the index of each parameter's value at a point of the grid; the last parameter changes fastest."""
        point = {}
        for name, parameter in reversed(list(self.parameters.items())):
            assert isinstance(parameter, Choice)
            number, point[name] = divmod(number, len(parameter.values))
        return point

    @property
    def num_points(self) -> int | None:
        """Number of points of the search space; None where it is endless, or has so many that none comes twice."""
        listed = [parameter.points for parameter in self.parameters.values()]
        count = math.prod(0 if points is None else len(points) for points in listed)
        return count if 0 < count <= MAX_POINTS else None

    def points(self) -> Iterator[dict[str, Any]]:
        """Yield every point of the space: the value of each parameter. Only where `num_points` is a number."""
        listed = [parameter.points or () for parameter in self.parameters.values()]
        return (dict(zip(self.parameters, values, strict=True)) for values in itertools.product(*listed))

    def without(self, names: Collection[str]) -> Sweep:
        """Return the sweep without the parameters that an option fixes."""

        def rest(given: Mapping[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in given.items() if key.replace("-", "_") not in names}

        text = {**self.text, "parameters": rest(self.text["parameters"])}
        return dataclasses.replace(self, parameters=rest(self.parameters), fixed=rest(self.fixed), text=text)


def round_to_multiple(number: float, quantum: float | None) -> float:
    """Return the multiple of `quantum` nearest to a number; the number itself where it is None."""
    if quantum is None:
        return number
    digits = max(0, 12 - math.floor(math.log10(quantum)))  # 0.1 * 3 is 0.30000000000000004
    return round(round(number / quantum) * quantum, digits)
