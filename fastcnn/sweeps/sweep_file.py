"""W&B's sweep files: which options a search varies, over what, by which method, and when it gives a run up.

The format is W&B's own, so that one file serves `wandb sweep` and `fastcnn sweep`. What only W&B's server understands
(nested parameters, a scheduler, beta distributions) is refused in one line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, cast

from fastcnn.config import OPTIONS, load
from fastcnn.errors import UsageError, nearest
from fastcnn.sweeps.search_space import Bell, Choice, Goal, Hyperband, Parameter, Range, Sweep, _to_multiple

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
    """Return what a sweep file says; None reads the shipped one. Raises UsageError for whatever is wrong with it."""
    if path is None:
        return parse(load.parse_yaml(shipped(), "sweep.yaml", MAX_DEPTH), "sweep.yaml")
    return parse(load.read_yaml(path, MAX_DEPTH), str(path), default_name=path.stem)


def parse(text: Mapping[str, Any], file: str, default_name: str = "sweep") -> Sweep:
    """Return what the contents of a sweep file say. Raises UsageError, naming `file`, for whatever is wrong."""
    _known(file, "", text, (*_OURS, *_FOR_WANDB))
    method = _one_of(file, "method", text.get("method"), METHODS)
    metric = text.get("metric", {})
    metric = {"name": metric} if isinstance(metric, str) else _mapping(file, "metric", metric)
    _known(file, "metric.", metric, ("name", "goal", "target", "impute", "impute_while_running"))
    measured = _one_of(file, "metric.name", metric.get("name", "val/accuracy"), METRICS)
    goal = _one_of(file, "metric.goal", metric.get("goal", "maximize" if "metric" not in text else "minimize"), GOALS)
    target = metric.get("target")
    given = _mapping(file, "parameters", text.get("parameters"))
    if not given:
        raise UsageError(f"{file}: parameters: expected at least one, as lr: {{min: 0.0001, max: 0.01}}")
    found: dict[str, Parameter] = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        if name not in OPTIONS or name == "data":
            raise UsageError(f"{file}: no option '{key}' to vary{nearest(name, OPTIONS)}")
        if name in found:
            raise UsageError(f"{file}: parameters: {key} is given twice")
        parameter = _parameter(file, f"parameters.{key}", _mapping(file, f"parameters.{key}", value))
        found[name] = _listed(file, key, parameter) if method == "grid" else parameter
        _check_values(file, name, found[name])
    fixed = {name: p.values[0] for name, p in found.items() if isinstance(p, Choice) and len(p.values) == 1}
    cap = text.get("run_cap")
    if cap is not None and (not isinstance(cap, int) or isinstance(cap, bool) or cap < 1):
        raise UsageError(f"{file}: run_cap: expected a whole number, 1 or more, got '{cap}'")
    command = text.get("command", [])
    if not isinstance(command, list):
        raise UsageError(f"{file}: command: expected a list of words, as [fastcnn, train, photos, '${{args}}']")
    return Sweep(
        name=_name(text.get("name", default_name)),
        method=method,
        metric=measured,
        goal=cast(Goal, goal),
        target=None if target is None else _number(file, "metric.target", target),
        parameters={name: parameter for name, parameter in found.items() if name not in fixed},
        fixed=fixed,
        early=_early(file, text["early_terminate"]) if text.get("early_terminate") is not None else None,
        run_cap=cap,
        command=tuple(map(str, command)),
        text=dict(text),
    )


def _parameter(file: str, where: str, given: Mapping[str, Any]) -> Parameter:
    """Return a parameter: of the distribution that is named, else of the one that its other keys imply."""
    if "parameters" in given:
        raise UsageError(f"{file}: {where}: nested parameters are not understood: every option has a name of its own")
    implied = (
        "constant"
        if "value" in given
        else "categorical_w_probabilities"
        if "probabilities" in given
        else "categorical"
        if "values" in given
        else "int_uniform"
        if all(isinstance(given.get(key), int) for key in ("min", "max"))
        else "uniform"
    )
    kind = given.get("distribution", implied)
    if kind not in DISTRIBUTIONS:
        refused = "; a beta distribution is W&B's alone" if "beta" in str(kind) else nearest(str(kind), DISTRIBUTIONS)
        raise UsageError(
            f"{file}: {where}.distribution: expected one of {', '.join(DISTRIBUTIONS)}, got '{kind}'{refused}"
        )
    keys = DISTRIBUTIONS[kind]
    _known(file, f"{where}.", given, (*keys, "distribution"))
    needed = [key for key in keys if key not in given and key not in ("q", "mu", "sigma")]
    if needed:
        raise UsageError(f"{file}: {where}: {kind} needs {' and '.join(needed)}")
    if keys == ("value",):
        return Choice(values=(given["value"],))
    if "values" in keys:
        return _choice(file, where, given)
    numbers = {key: _number(file, f"{where}.{key}", given[key]) for key in keys if key in given}
    quantum = numbers.get("q", 1.0) if "q" in keys else None
    if quantum is not None and quantum <= 0:
        raise UsageError(f"{file}: {where}.q: expected a number above 0, got {quantum:g}")
    if "mu" in keys:
        mean, deviation = numbers.get("mu", 0.0), numbers.get("sigma", 1.0)
        if deviation < 0:
            raise UsageError(f"{file}: {where}.sigma: expected 0 or more, got {deviation:g}")
        return Bell(mean=mean, deviation=deviation, log="log" in kind, quantum=quantum)
    low, high = numbers["min"], numbers["max"]
    if low > high:
        raise UsageError(f"{file}: {where}: expected min up to max, got {low:g} and {high:g}")
    log = "log" in kind
    if log and not kind.endswith("_values"):  # of exponents; the inverse's are those of 1 / x
        low, high = (-high, -low) if kind.startswith("inv") else (low, high)
        low, high = math.exp(low), math.exp(high)
    elif log and low <= 0:
        raise UsageError(f"{file}: {where}.min: expected a number above 0, got {low:g}")
    if kind == "int_uniform" and not (low.is_integer() and high.is_integer()):
        raise UsageError(f"{file}: {where}: int_uniform: expected whole numbers, got {low:g} and {high:g}")
    return Range(low=low, high=high, log=log, whole=kind == "int_uniform", quantum=quantum)


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
"""The distributions by W&B's names, and what else each takes."""


def _choice(file: str, where: str, given: Mapping[str, Any]) -> Choice:
    values = given["values"]
    if not isinstance(values, list) or not values:
        raise UsageError(f"{file}: {where}.values: expected a list of values, got '{values}'")
    if "probabilities" not in given:
        return Choice(values=tuple(values))
    chances = given["probabilities"]
    if not isinstance(chances, list) or len(chances) != len(values):
        raise UsageError(f"{file}: {where}.probabilities: expected {len(values)} numbers, one a value")
    numbers = tuple(_number(file, f"{where}.probabilities", chance) for chance in chances)
    if min(numbers) < 0 or not sum(numbers) > 0:
        raise UsageError(f"{file}: {where}.probabilities: expected numbers from 0, not all of them 0")
    return Choice(values=tuple(values), chances=numbers)


def _listed(file: str, key: str, parameter: Parameter) -> Choice:
    """Return a parameter's values one by one, for a grid."""
    if isinstance(parameter, Choice):
        return Choice(values=parameter.values)
    if isinstance(parameter, Range) and parameter.whole:
        return Choice(values=tuple(range(int(parameter.low), int(parameter.high) + 1)))
    if isinstance(parameter, Range) and parameter.quantum and not parameter.log:
        low, high = (bound / parameter.quantum for bound in (parameter.low, parameter.high))
        steps = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)  # 0.3 / 0.1 is 2.9999999999999996
        if steps:
            return Choice(values=tuple(_to_multiple(step * parameter.quantum, parameter.quantum) for step in steps))
    raise UsageError(f"{file}: parameters.{key}: a grid has no end of such numbers: give values, or method: random")


def _check_values(file: str, name: str, parameter: Parameter) -> None:
    """Raise UsageError for a value that the option would refuse."""
    if isinstance(parameter, Bell):
        return  # it has every value
    values = parameter.values if isinstance(parameter, Choice) else (parameter.low, parameter.high)
    for value in values:
        try:
            load.resolve({name: parameter.rounded(value) if isinstance(parameter, Range) else value})
        except UsageError as error:
            raise UsageError(f"{file}: {error}") from None


def _early(file: str, given: Any) -> Hyperband:
    rule = _mapping(file, "early_terminate", given)
    _known(file, "early_terminate.", rule, ("type", "min_iter", "max_iter", "s", "eta", "strict"))
    _one_of(file, "early_terminate.type", rule.get("type"), ("hyperband",))
    eta = _number(file, "early_terminate.eta", rule.get("eta", 3))
    if eta <= 1:
        raise UsageError(f"{file}: early_terminate.eta: expected a number above 1, got {eta:g}")
    if "min_iter" in rule:
        first = _number(file, "early_terminate.min_iter", rule["min_iter"])
    elif "max_iter" in rule and "s" in rule:
        last, rungs = (_number(file, f"early_terminate.{key}", rule[key]) for key in ("max_iter", "s"))
        first = max([1.0, *(last / eta**i for i in range(1, int(rungs) + 1) if i == int(rungs))])
    else:
        raise UsageError(f"{file}: early_terminate: expected min_iter, or max_iter and s")
    if first < 1:
        raise UsageError(f"{file}: early_terminate: the first rung: expected 1 epoch or more, got {first:g}")
    return Hyperband(first=int(first), eta=eta, strict=rule.get("strict", True) is not False)


def _known(file: str, where: str, given: Mapping[str, Any], names: Sequence[str]) -> None:
    for key in given:
        if key not in names:
            raise UsageError(f"{file}: no '{where}{key}' in a sweep file{nearest(str(key), names)}")


def _mapping(file: str, where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"{file}: {where}: expected a mapping, got {'nothing' if value is None else repr(value)[:40]}")
    return value


def _one_of(file: str, where: str, value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        got = "nothing" if value is None else f"'{str(value)[:40]}'"
        raise UsageError(
            f"{file}: {where}: expected one of {', '.join(choices)}, got {got}{nearest(str(value), choices)}"
        )
    return str(value)


def _number(file: str, where: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # PyYAML reads 1e-3 as a string
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{file}: {where}: expected a number, got '{str(value)[:40]}'")
    return number


def _name(text: Any) -> str:
    """Return a name as that of a folder."""
    kept = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in str(text)[:80])
    return kept.strip("-.") or "sweep"
