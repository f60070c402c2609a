"""W&B's sweep files: the search method, the options it varies and how, and when a trial ends early.

The format is W&B's own, so that one file serves `wandb sweep` and `fastcnn sweep`. A feature that only W&B's server
has (nested parameters, a scheduler, beta distributions) is refused in one line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, cast

from fastcnn.config import (
    METRIC_SYNONYMS,
    OPTIONS,
    as_choice,
    as_field,
    in_our_words,
    parse_yaml,
    propose_option,
    read_yaml,
    resolve,
)
from fastcnn.errors import UsageError, nearest
from fastcnn.sweeps.search_space import Choice, Goal, Hyperband, Normal, Parameter, Sweep, Uniform, round_to_multiple

MAX_DEPTH = 6  # parameters, one of them, its values, a list of filters, and one more for the message
METHODS = ("grid", "random", "bayes")
METRICS = ("train/loss", "train/accuracy", "val/loss", "val/accuracy", "images_per_second", "seconds")
GOALS: tuple[Goal, ...] = ("minimize", "maximize")

_FOR_WANDB = ("apiVersion", "kind", "controller", "description", "program", "job", "image_uri", "entity", "project")
_OURS = ("name", "method", "metric", "parameters", "early_terminate", "run_cap", "command")


def shipped() -> str:
    """Return the text of the sweep file that comes with the package: the reference assignment's questions."""
    return (resources.files("fastcnn.sweeps") / "sweep.yaml").read_text(encoding="utf-8")


def read(path: Path | None) -> Sweep:
    """Return the sweep of a file; None reads the shipped one. Raises UsageError for whatever is wrong with it."""
    if path is None:
        return parse(parse_yaml(shipped(), "sweep.yaml", MAX_DEPTH), "sweep.yaml")
    return parse(read_yaml(path, MAX_DEPTH), str(path), default_name=path.stem)


def parse(text: Mapping[str, Any], file: str, default_name: str = "sweep") -> Sweep:
    """Return the sweep that a file's contents describe. Raises UsageError, naming `file`, for whatever is wrong."""
    text = _in_our_words(file, text)
    _check_keys(file, "", text, (*_OURS, *_FOR_WANDB))
    method = _one_of(f"{file}: method", text.get("method"), METHODS)
    metric = text.get("metric", {})
    _check_keys(file, "metric.", metric, ("name", "goal", "target", "impute", "impute_while_running"))
    metric_name = _one_of(f"{file}: metric.name", metric.get("name", "val/accuracy"), METRICS)
    default_goal = "maximize" if "metric" not in text else "minimize"
    goal = _one_of(f"{file}: metric.goal", metric.get("goal", default_goal), GOALS)
    target = metric.get("target")
    cap = text.get("run_cap")
    if cap is not None and (not isinstance(cap, int) or isinstance(cap, bool) or cap < 1):
        raise UsageError(f"{file}: run_cap: expected a whole number, 1 or more, got '{cap}'")
    command = text.get("command", [])
    if not isinstance(command, list):
        raise UsageError(f"{file}: command: expected a list of words, as [fastcnn, train, photos, '${{args}}']")
    parameters = _parameters(file, text.get("parameters"), listed=method == "grid")
    fixed = {name: p.values[0] for name, p in parameters.items() if isinstance(p, Choice) and len(p.values) == 1}
    return Sweep(
        name=_name(text.get("name", default_name)),
        method=method,
        metric=metric_name,
        goal=cast(Goal, goal),
        target=None if target is None else _number(f"{file}: metric.target", target),
        parameters={name: parameter for name, parameter in parameters.items() if name not in fixed},
        fixed=fixed,
        early=None if text.get("early_terminate") is None else _hyperband(file, text["early_terminate"]),
        run_cap=cap,
        command=tuple(map(str, command)),
        text=dict(text),
    )


def _in_our_words(file: str, text: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a file's contents with names of other trainers and in other cases as ours; these go to W&B, too."""
    text, given = dict(text), text.get("parameters")
    if isinstance(given, Mapping):
        named = [(key if key.replace("-", "_") in OPTIONS else as_field(key), key) for key in map(str, given)]
        twice = [key for name, key in named if [each for each, _ in named].count(name) > 1]
        if twice:
            raise UsageError(f"{file}: parameters: {' and '.join(twice)} are the same option: keep one")
        text["parameters"] = {
            name if name in OPTIONS else key: _values_in_our_words(key, given[key]) for name, key in named
        }
    if "metric" in text:
        metric = {"name": text["metric"]} if isinstance(text["metric"], str) else text["metric"]
        text["metric"] = metric = dict(_mapping(f"{file}: metric", metric))
        if isinstance(name := metric.get("name"), str):
            metric["name"] = METRIC_SYNONYMS.get(name.lower(), name)
        if isinstance(metric.get("goal"), str):
            metric["goal"] = as_choice(metric["goal"], GOALS)
    if isinstance(text.get("method"), str):
        text["method"] = as_choice(text["method"], METHODS)
    return text


def _values_in_our_words(key: str, given: Any) -> Any:
    """Return a parameter with its values as the option that `key` stands for takes them."""
    if not isinstance(given, Mapping):
        return given
    changed = dict(given)
    if "value" in given:
        changed["value"] = in_our_words(key, given["value"])[1]
    if isinstance(given.get("values"), list):
        changed["values"] = [in_our_words(key, value)[1] for value in given["values"]]
    return changed


def _parameters(file: str, given: Any, *, listed: bool) -> dict[str, Parameter]:
    """Return the parameters by field of Config; `listed` ones, for a grid, value by value."""
    parameters: dict[str, Parameter] = {}
    for key, value in _mapping(f"{file}: parameters", given).items():
        name, where = key.replace("-", "_"), f"{file}: parameters.{key}"
        if name not in OPTIONS or name == "data":
            raise UsageError(f"{file}: no option '{key}' to vary{propose_option(name, OPTIONS)}")
        if name in parameters:
            raise UsageError(f"{file}: parameters: {key} is given twice")
        parameter = _parameter(file, f"parameters.{key}", _mapping(where, value))
        parameters[name] = _listed(where, parameter) if listed else parameter
        _check_values(file, name, parameters[name])
    if not parameters:
        raise UsageError(f"{file}: parameters: expected at least one, as lr: {{min: 0.0001, max: 0.01}}")
    return parameters


def _parameter(file: str, key: str, given: Mapping[str, Any]) -> Parameter:
    """Return a parameter: by the distribution that it names, else by the one that its keys imply."""
    where = f"{file}: {key}"
    if "parameters" in given:
        raise UsageError(f"{where}: nested parameters are not supported: every option has a name of its own")
    kind = given.get("distribution", _implied(given))
    if kind not in DISTRIBUTIONS:
        refused = "; a beta distribution is W&B's alone" if "beta" in str(kind) else nearest(str(kind), DISTRIBUTIONS)
        raise UsageError(f"{where}.distribution: expected one of {', '.join(DISTRIBUTIONS)}, got '{kind}'{refused}")
    keys = DISTRIBUTIONS[kind]
    _check_keys(file, f"{key}.", given, (*keys, "distribution"))
    missing = [name for name in keys if name not in given and name not in ("q", "mu", "sigma")]
    if missing:
        raise UsageError(f"{where}: {kind} needs {' and '.join(missing)}")
    if keys == ("value",):
        return Choice(values=(given["value"],))
    if "values" in keys:
        return _choice(where, given)
    numbers = {name: _number(f"{where}.{name}", given[name]) for name in keys if name in given}
    quantum = numbers.get("q", 1.0) if "q" in keys else None
    if quantum is not None and quantum <= 0:
        raise UsageError(f"{where}.q: expected a number above 0, got {quantum:g}")
    if "mu" in keys:
        mean, std = numbers.get("mu", 0.0), numbers.get("sigma", 1.0)
        if std < 0:
            raise UsageError(f"{where}.sigma: expected 0 or more, got {std:g}")
        return Normal(mean=mean, std=std, log="log" in kind, quantum=quantum)
    low, high = numbers["min"], numbers["max"]
    if low > high:
        raise UsageError(f"{where}: expected min up to max, got {low:g} and {high:g}")
    log = "log" in kind
    if log and not kind.endswith("_values"):  # the bounds are exponents; the inverse's are those of 1 / x
        low, high = (-high, -low) if kind.startswith("inv") else (low, high)
        try:
            low, high = math.exp(low), math.exp(high)
        except OverflowError:
            raise UsageError(
                f"{where}: {kind}: min and max are exponents of e, and e^{high:g} is too large; "
                "for the bounds themselves, use log_uniform_values"
            ) from None
    elif log and low <= 0:
        raise UsageError(f"{where}.min: expected a number above 0, got {low:g}")
    if kind == "int_uniform" and not (low.is_integer() and high.is_integer()):
        raise UsageError(f"{where}: int_uniform: expected whole numbers, got {low:g} and {high:g}")
    return Uniform(low=low, high=high, log=log, integer=kind == "int_uniform", quantum=quantum)


def _implied(given: Mapping[str, Any]) -> str:
    """Return the distribution that a parameter's keys imply, by W&B's rules."""
    keys = {"value": "constant", "probabilities": "categorical_w_probabilities", "values": "categorical"}
    for key, kind in keys.items():
        if key in given:
            return kind
    return "int_uniform" if all(isinstance(given.get(key), int) for key in ("min", "max")) else "uniform"


DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "constant": ("value",),
    "categorical": ("values",),
    "categorical_w_probabilities": ("values", "probabilities"),
    "int_uniform": ("min", "max"),
    "uniform": ("min", "max"),
    "q_uniform": ("min", "max", "q"),
    "log_uniform": ("min", "max"),
    "log_uniform_values": ("min", "max"),
    "q_log_uniform": ("min", "max", "q"),
    "q_log_uniform_values": ("min", "max", "q"),
    "inv_log_uniform": ("min", "max"),
    "inv_log_uniform_values": ("min", "max"),
    "normal": ("mu", "sigma"),
    "q_normal": ("mu", "sigma", "q"),
    "log_normal": ("mu", "sigma"),
    "q_log_normal": ("mu", "sigma", "q"),
}
"""The keys of each distribution, by W&B's names."""


def _choice(where: str, given: Mapping[str, Any]) -> Choice:
    values = given["values"]
    if not isinstance(values, list) or not values:
        raise UsageError(f"{where}.values: expected a list of values, got '{values}'")
    if "probabilities" not in given:
        return Choice(values=tuple(values))
    probabilities = given["probabilities"]
    if not isinstance(probabilities, list) or len(probabilities) != len(values):
        raise UsageError(f"{where}.probabilities: expected {len(values)} numbers, one for each value")
    numbers = tuple(_number(f"{where}.probabilities", value) for value in probabilities)
    if min(numbers) < 0 or not sum(numbers) > 0:
        raise UsageError(f"{where}.probabilities: expected numbers from 0, not all of them 0")
    return Choice(values=tuple(values), probabilities=numbers)


def _listed(where: str, parameter: Parameter) -> Choice:
    """Return a parameter's values one by one, for a grid."""
    if isinstance(parameter, Choice):
        return Choice(values=parameter.values)
    if isinstance(parameter, Uniform) and parameter.integer:
        return Choice(values=tuple(range(int(parameter.low), int(parameter.high) + 1)))
    if isinstance(parameter, Uniform) and parameter.quantum and not parameter.log:
        low, high = (bound / parameter.quantum for bound in (parameter.low, parameter.high))
        steps = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)  # 0.3 / 0.1 is 2.9999999999999996
        if steps:
            values = (round_to_multiple(step * parameter.quantum, parameter.quantum) for step in steps)
            return Choice(values=tuple(values))
    raise UsageError(f"{where}: a grid needs a finite list: give values, or method: random")


def _check_values(file: str, name: str, parameter: Parameter) -> None:
    """Raise UsageError for a value that the option would refuse."""
    if isinstance(parameter, Normal):
        return  # it may draw any value
    values = parameter.values if isinstance(parameter, Choice) else (parameter.low, parameter.high)
    for value in values:
        try:
            resolve({name: parameter.rounded(value) if isinstance(parameter, Uniform) else value})
        except UsageError as error:
            raise UsageError(f"{file}: {error}") from None


def _hyperband(file: str, given: Any) -> Hyperband:
    where = f"{file}: early_terminate"
    rule = _mapping(where, given)
    _check_keys(file, "early_terminate.", rule, ("type", "min_iter", "max_iter", "s", "eta", "strict"))
    _one_of(f"{where}.type", rule.get("type"), ("hyperband",))
    eta = _number(f"{where}.eta", rule.get("eta", 3))
    if eta <= 1:
        raise UsageError(f"{where}.eta: expected a number above 1, got {eta:g}")
    if "min_iter" in rule:
        first = _number(f"{where}.min_iter", rule["min_iter"])
    elif "max_iter" in rule and "s" in rule:
        last, rungs = (_number(f"{where}.{key}", rule[key]) for key in ("max_iter", "s"))
        try:
            first = max(1.0, last / eta ** int(rungs)) if rungs >= 1 else 1.0
        except OverflowError:
            raise UsageError(
                f"{where}.s: {rungs:g} rungs do not fit into max_iter {last:g}: give fewer, or min_iter instead"
            ) from None
    else:
        raise UsageError(f"{where}: expected min_iter, or max_iter and s")
    if first < 1:
        raise UsageError(f"{where}: the first rung: expected 1 epoch or more, got {first:g}")
    return Hyperband(first_rung=int(first), eta=eta, strict=rule.get("strict", True) is not False)


def _check_keys(file: str, prefix: str, given: Mapping[str, Any], names: Sequence[str]) -> None:
    for key in given:
        if key not in names:
            raise UsageError(f"{file}: no '{prefix}{key}' in a sweep file{nearest(str(key), names)}")


def _mapping(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"{where}: expected a mapping, got {'nothing' if value is None else repr(value)[:40]}")
    return value


def _one_of(where: str, value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        got = "nothing" if value is None else f"'{str(value)[:40]}'"
        raise UsageError(f"{where}: expected one of {', '.join(choices)}, got {got}{nearest(str(value), choices)}")
    return str(value)


def _number(where: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # PyYAML reads 1e-3 as a string
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{where}: expected a number, got '{str(value)[:40]}'")
    return number


def _name(text: Any) -> str:
    """Return a sweep's name as the name of a folder."""
    kept = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in str(text)[:80])
    return kept.strip("-.") or "sweep"
