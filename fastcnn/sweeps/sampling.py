"""Drawing of a trial's parameters, and pruning, by Optuna."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastcnn.sweeps.search_space import Choice, Hyperband, Normal, Parameter, Sweep

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial


def sampler(sweep: Sweep, seed: int, number: int, attempt: int = 0) -> optuna.samplers.BaseSampler:
    """Return the sampler of a trial: it draws the same for the same seed, number, attempt and earlier trials."""
    from optuna import samplers

    if sweep.method == "grid":
        indices = sweep.grid_point(number)
        return _given(lambda name, distribution: distribution.choices[indices[name]])
    seed = (seed * 1_000_003 + number + attempt * 777_767_777) % 2**32
    if sweep.method == "random":
        return samplers.RandomSampler(seed=seed)
    return samplers.TPESampler(seed=seed, multivariate=False, constant_liar=True)


def suggest(trial: Trial | Draft, name: str, parameter: Parameter) -> Any:
    """Return the value that Optuna's sampler draws for a parameter, as plain data."""
    if isinstance(parameter, Normal) or (isinstance(parameter, Choice) and parameter.probabilities):
        return parameter.at(trial.suggest_float(name, 0.0, 1.0))  # Optuna lacks these: it draws the quantile
    if isinstance(parameter, Choice):
        labels = [_label(value) for value in parameter.values]
        return parameter.values[labels.index(trial.suggest_categorical(name, labels))]
    if parameter.integer:
        return trial.suggest_int(name, int(parameter.low), int(parameter.high))
    number = parameter.rounded(trial.suggest_float(name, parameter.low, parameter.high, log=parameter.log))
    return int(number) if parameter.quantum and number.is_integer() else number


class Draft:
    """Draws values by a sampler as a trial would, and records them nowhere.

    Args:
        study: its earlier trials are what TPE goes by.
        trial: the one that the values may be for.
        sampler: draws.
    """

    def __init__(self, study: optuna.Study, trial: FrozenTrial, sampler: optuna.samplers.BaseSampler) -> None:
        self._study, self._trial, self._sampler = study, trial, sampler
        self.drawn: dict[str, Any] = {}
        """Value of each parameter in Optuna's own terms, as `recorded` takes them."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Return a number from `low` to `high`."""
        from optuna.distributions import FloatDistribution

        return float(self._draw(name, FloatDistribution(low, high, log=log)))

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """Return a whole number from `low` to `high`."""
        from optuna.distributions import IntDistribution

        return int(self._draw(name, IntDistribution(low, high)))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return one of the choices."""
        from optuna.distributions import CategoricalDistribution

        return self._draw(name, CategoricalDistribution(choices))

    def _draw(self, name: str, distribution: optuna.distributions.BaseDistribution) -> Any:
        if distribution.single():
            value = distribution.to_external_repr(distribution.to_internal_repr(_first(distribution)))
        else:
            value = self._sampler.sample_independent(self._study, self._trial, name, distribution)
        self.drawn[name] = value
        return value


def recorded(drawn: Mapping[str, Any]) -> optuna.samplers.BaseSampler:
    """Return the sampler that gives each parameter a known value, in Optuna's own terms."""
    return _given(lambda name, distribution: drawn[name])


def in_optunas_terms(parameter: Parameter, value: Any) -> Any:
    """Return what Optuna would have to draw for a value: a label, a quantile or a number."""
    if isinstance(parameter, Normal):
        return 0.5
    if isinstance(parameter, Choice):
        return parameter.quantile(value) if parameter.probabilities else _label(value)
    return min(max(value, parameter.low), parameter.high)


def key(values: Mapping[str, Any]) -> str:
    """Return a point as text that is equal for equal points."""
    return json.dumps({name: float(v) if type(v) is int else v for name, v in values.items()}, sort_keys=True)


def pruner(early: Hyperband | None) -> optuna.pruners.BasePruner:
    """Return the rule of W&B's "hyperband": one bracket of rungs, each passed by the best 1 / eta.

    Optuna calls that successive halving; its Hyperband has several brackets and must know the last epoch beforehand.
    """
    from optuna import pruners

    if early is None:
        return pruners.NopPruner()
    return pruners.SuccessiveHalvingPruner(min_resource=early.first_rung, reduction_factor=max(2, round(early.eta)))


def _first(distribution: Any) -> Any:
    return distribution.choices[0] if hasattr(distribution, "choices") else distribution.low


def _label(value: Any) -> Any:
    """Return the label of a value in Optuna, whose choices cannot be lists."""
    return value if isinstance(value, bool | int | float | str | None) else json.dumps(value)


def _given(value: Callable[[str, Any], Any]) -> optuna.samplers.BaseSampler:
    """Return the sampler that draws for a parameter what a function of its name and distribution returns."""
    from optuna.samplers import RandomSampler

    class Given(RandomSampler):
        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return value(param_name, param_distribution)

    return Given()
