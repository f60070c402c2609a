"""W&B's sweep files: what is read, what is refused and in which words, and the shipped one."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastcnn.config import resolve
from fastcnn.errors import UsageError
from fastcnn.runs.trackers import COLUMNS
from fastcnn.sweeps import search_space, sweep_file
from fastcnn.sweeps.search_space import Choice, Hyperband, Normal, Uniform
from fastcnn.sweeps.sweep_file import parse
from fastcnn.sweeps.wandb_agent import read_parameters

LR: dict[str, Any] = {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}


def file(**more: Any) -> dict[str, Any]:
    return {"method": "random", "parameters": {"lr": LR}, **more}


def of(parameter: dict[str, Any], name: str = "weight_decay") -> Any:
    return parse(file(parameters={name: parameter, "lr": LR}), "s.yaml").parameters[name]


def test_what_a_file_says() -> None:
    sweep = parse(
        {
            "name": "filters & more",
            "method": "bayes",
            "metric": {"name": "val/loss", "goal": "minimize", "target": 0.5},
            "early_terminate": {"type": "hyperband", "min_iter": 2, "eta": 2},
            "run_cap": 30,
            "program": "train.py",
            "project": "mine",
            "parameters": {"batch-size": {"values": [32, 64]}, "lr": LR, "epochs": {"value": 3}},
        },
        "s.yaml",
    )
    assert (sweep.name, sweep.method, sweep.metric, sweep.goal, sweep.target) == (
        "filters---more", "bayes", "val/loss", "minimize", 0.5
    )  # fmt: skip
    assert sweep.parameters == {"batch_size": Choice(values=(32, 64)), "lr": Uniform(low=1e-4, high=1e-2, log=True)}
    assert sweep.fixed == {"epochs": 3}
    assert sweep.early == Hyperband(first_rung=2, eta=2.0)
    assert sweep.run_cap == 30


def test_the_metric_left_out_is_the_validation_accuracy() -> None:
    sweep = parse(file(), "s.yaml")
    assert (sweep.metric, sweep.goal) == ("val/accuracy", "maximize")


def test_metrics_are_those_of_a_run() -> None:
    assert set(sweep_file.METRICS) == set(COLUMNS) - {"epoch", "lr"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"min": 0.0, "max": 0.5}, Uniform(low=0, high=0.5)),
        ({"min": 0.0, "max": 0.5, "distribution": "uniform"}, Uniform(low=0, high=0.5)),
        ({"min": 0, "max": 2}, Uniform(low=0, high=2, integer=True)),
        ({"min": "1e-4", "max": "1e-2", "distribution": "log_uniform_values"}, Uniform(low=1e-4, high=1e-2, log=True)),
        ({"min": 0, "max": 1, "q": 0.1, "distribution": "q_uniform"}, Uniform(low=0, high=1, quantum=0.1)),
        ({"min": 0.0, "max": 1.0, "distribution": "log_uniform"}, Uniform(low=1, high=math.e, log=True)),
        ({"min": 0.0, "max": 1.0, "distribution": "inv_log_uniform"}, Uniform(low=1 / math.e, high=1, log=True)),
        ({"mu": 1, "sigma": 0.1, "distribution": "normal"}, Normal(mean=1, std=0.1)),
        ({"distribution": "q_log_normal"}, Normal(mean=0, std=1, log=True, quantum=1)),
        ({"values": [0, 0.1], "probabilities": [1, 3]}, Choice(values=(0, 0.1), probabilities=(1, 3))),
    ],
)
def test_distributions(given: dict[str, Any], expected: search_space.Parameter) -> None:
    assert of(given) == expected


def test_quantiles() -> None:
    choice = Choice(values=("a", "b", "c"), probabilities=(1, 3, 0))
    assert [choice.at(q) for q in (0.0, 0.24, 0.26, 1.0)] == ["a", "a", "b", "b"]
    assert Normal(mean=5, std=2).at(0.5) == pytest.approx(5)
    assert Normal(mean=5, std=2).at(0.8413447) == pytest.approx(7, abs=1e-4)
    assert Normal(mean=1, std=0, log=True).at(0.3) == pytest.approx(math.e)
    assert math.isfinite(Normal(mean=0, std=1).at(0.0))
    assert Uniform(low=0, high=1, quantum=0.1).rounded(0.31) == 0.3


def test_the_grid_has_every_point_once() -> None:
    sweep = parse(
        {
            "method": "grid",
            "parameters": {
                "filters": {"values": [[8] * 5, [4, 8, 8, 16, 16]]},
                "batch_size": {"min": 8, "max": 10},
                "dropout": {"distribution": "q_uniform", "min": 0, "max": 0.3, "q": 0.1},
            },
        },
        "s.yaml",
    )
    points = [tuple(sweep.grid_point(i).items()) for i in range(24)]
    assert sweep.grid_size == len(set(points)) == 24
    assert isinstance(sweep.parameters["dropout"], Choice)
    assert sweep.parameters["dropout"].values == (0, 0.1, 0.2, 0.3)


def test_an_option_that_is_given_is_not_varied() -> None:
    sweep = parse(file(parameters={"lr": LR, "batch-size": {"values": [8, 16]}}), "s.yaml").without({"batch_size": 4})
    assert list(sweep.parameters) == list(sweep.text["parameters"]) == ["lr"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"s.yaml: method: expected one of grid, random, bayes, got nothing"),
        (file(method="baies"), "did you mean 'bayes'"),
        (file(parametres={}), "no 'parametres' in a sweep file; did you mean 'parameters'"),
        (file(parameters={}), "expected at least one"),
        (file(parameters={"learning_rat": LR}), "s.yaml: no option 'learning_rat' to vary"),
        (file(parameters={"dropot": {"value": 0.1}}), "no option 'dropot' to vary; did you mean 'dropout'"),
        (file(parameters={"dropout": {"value": 3}}), "s.yaml: --dropout: expected a number below 1, got 3"),
        (file(parameters={"activation": {"values": ["relu", "gellu"]}}), "got 'gellu'; did you mean 'gelu'"),
        (file(parameters={"lr": {"min": 0.1}}), "parameters.lr: uniform needs max"),
        (file(parameters={"lr": {"min": 0.2, "max": 0.1}}), "expected min up to max"),
        (file(parameters={"lr": {"min": 0, "max": 1, "distribution": "log_uniform_values"}}), "above 0, got 0"),
        (file(parameters={"lr": {"distribution": "log_unifrm", "min": 1, "max": 2}}), "did you mean 'log_uniform'"),
        (file(parameters={"lr": {"distribution": "beta"}}), "a beta distribution is W&B's alone"),
        (file(parameters={"lr": {"min": "low", "max": 1}}), "parameters.lr.min: expected a number, got 'low'"),
        (file(parameters={"lr": {"parameters": {"a": {"value": 1}}}}), "nested parameters are not supported"),
        (file(parameters={"lr": {"values": []}}), "expected a list of values"),
        (file(parameters={"lr": {"values": [0.1, 0.2], "probabilities": [1]}}), "expected 2 numbers"),
        (file(parameters={"lr": 0.1}), "parameters.lr: expected a mapping, got 0.1"),
        (file(method="grid"), "a grid needs a finite list"),
        (file(metric={"name": "val_acuracy"}), "did you mean 'val/accuracy'"),
        (file(parameters={"lr": LR, "learning_rate": LR}), "lr and learning_rate are the same option: keep one"),
        (file(metric={"name": "val/loss", "goal": "min"}), "did you mean 'minimize'"),
        (file(early_terminate={"type": "median"}), "expected one of hyperband"),
        (file(early_terminate={"type": "hyperband"}), "expected min_iter, or max_iter and s"),
        (file(early_terminate={"type": "hyperband", "min_iter": 1, "eta": 1}), "expected a number above 1"),
        (file(early_terminate={"type": "hyperband", "max_iter": 27, "s": 1e300}), "1e\\+300 rungs do not fit"),
        (file(parameters={"lr": {"distribution": "log_uniform", "min": 0, "max": 1000}}), "exponents of e"),
        (file(run_cap=0), "run_cap: expected a whole number, 1 or more"),
        (file(command="fastcnn train"), "command: expected a list of words"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        parse(given, "s.yaml")
    assert "\n" not in str(error.value)


def test_words_of_other_trainers_are_taken(tmp_path: Path) -> None:
    parameters = {
        "learning_rate": LR,
        "BS": {"values": [8, 16]},
        "hflip": {"values": [True, 0.3, False]},
        "batchnorm": {"value": False},
        "activation": {"values": ["ReLU", "GELU"]},
    }
    metric = {"name": "val_acc", "goal": "Maximize"}
    sweep = parse({"method": "Bayes", "metric": metric, "parameters": parameters}, "s.yaml")
    assert (sweep.method, sweep.metric, sweep.goal, sweep.fixed) == (
        *("bayes", "val/accuracy", "maximize"),
        {"batch_norm": False},
    )
    assert sweep.parameters["augment"] == Choice(values=("flip", "flip=0.3", "none"))
    assert list(sweep.text["parameters"]) == ["lr", "batch_size", "augment", "batch_norm", "activation"]  # for W&B
    assert sweep.text["metric"] == {"name": "val/accuracy", "goal": "maximize"}
    given = {"wandb_version": 1, "lr0": {"value": 0.1}, "fliplr": {"value": 0.5}, "batch-size": {"value": 8}}
    (tmp_path / "agent.yaml").write_text(yaml.safe_dump(given))
    assert resolve(read_parameters(tmp_path / "agent.yaml")) == resolve({"lr": 0.1, "augment": "flip", "batch_size": 8})


def test_rungs_counted_from_the_last_epoch() -> None:
    early = {"type": "hyperband", "max_iter": 27, "s": 2}
    assert parse(file(early_terminate=early), "s.yaml").early == Hyperband(first_rung=3)


def test_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(file()), encoding="utf-8")
    assert sweep_file.read(path).name == "mine"


# the shipped file


def test_the_shipped_file_asks_what_the_assignment_asks() -> None:
    sweep = sweep_file.read(None)
    asked = "filters activation augment batch_norm dense_neurons dropout lr batch_size"
    assert set(sweep.parameters) == set(asked.split())
    filters = sweep.parameters["filters"]
    assert isinstance(filters, Choice)
    growth = {(v[0] < v[-1]) - (v[0] > v[-1]) for v in filters.values}
    assert growth == {-1, 0, 1}
    assert all(resolve({"filters": value}) for value in filters.values)


def test_the_shipped_file_obeys_the_published_schema() -> None:
    """W&B publishes it in its package `sweeps` (pip install --no-deps sweeps; pip install jsonschema)."""
    jsonschema = pytest.importorskip("jsonschema")
    package = importlib.util.find_spec("sweeps")
    if package is None or package.origin is None:
        pytest.skip("needs W&B's package sweeps")
    schema = Path(package.origin).parent / "config" / "schema.json"
    jsonschema.validate(yaml.safe_load(sweep_file.shipped()), json.loads(schema.read_text(encoding="utf-8")))
