"""Drawing of a trial's parameters, and pruning, by Optuna."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastcnn.sweeps.search_space import Choice, Hyperband, Normal, Parameter, Sweep

if TYPE_CHECKING:
    import optuna
    from optuna.trial import Trial


def sampler(sweep: Sweep, seed: int, number: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of a trial: it draws the same for the same seed, number and earlier trials."""
    from optuna import samplers

    if sweep.method == "grid":
        return _grid_point(sweep.grid_point(number))
    seed = (seed * 1_000_003 + number) % 2**32
    if sweep.method == "random":
        return samplers.RandomSampler(seed=seed)
    return samplers.TPESampler(seed=seed, multivariate=False, constant_liar=True)


def suggest(trial: Trial, name: str, parameter: Parameter) -> Any:
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


def pruner(early: Hyperband | None) -> optuna.pruners.BasePruner:
    """Return the rule of W&B's "hyperband": one bracket of rungs, each passed by the best 1 / eta.

    Optuna calls that successive halving; its Hyperband has several brackets and must know the last epoch beforehand.
    """
    from optuna import pruners

    if early is None:
        return pruners.NopPruner()
    return pruners.SuccessiveHalvingPruner(min_resource=early.first_rung, reduction_factor=max(2, round(early.eta)))


def _label(value: Any) -> Any:
    """Return the label of a value in Optuna, whose choices cannot be lists."""
    return value if isinstance(value, bool | int | float | str | None) else json.dumps(value)


def _grid_point(indices: Mapping[str, int]) -> optuna.samplers.BaseSampler:
    from optuna.samplers import RandomSampler

    class GridPoint(RandomSampler):
        """Gives each parameter its value at a point of the grid."""

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return param_distribution.choices[indices[param_name]]

    return GridPoint()
