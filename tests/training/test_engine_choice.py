"""Which engine is chosen: by measuring, and by what an earlier run measured."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcnn import errors
from fastcnn.errors import FastCNNError
from fastcnn.network.sync_layers import convert, operators
from fastcnn.storage import files
from fastcnn.system.ranks import Ranks
from fastcnn.training import engine_choice, engines
from fastcnn.training.engines import Eager, Engine, Graphed, NoEngine
from fastcnn.training.step import StepFunctions
from tests.training.steps import (
    direct_call,
    make_feed,
    make_model,
    make_step,
)


def test_auto_on_a_cpu_is_eager_and_says_why() -> None:
    _, name, why = engine_choice.choose(make_step(), 1000, "x")
    assert name == "eager"
    assert "CPU" in why


@pytest.mark.parametrize(("num_steps", "worth"), [(10, False), (10**9, True)])
def test_what_nobody_measured_is_tried_in_long_runs(num_steps: int, worth: bool) -> None:
    assert engine_choice.worth_building("compiled+graphed", num_steps, 4e-4, None)[0] is worth


def test_an_engine_is_worth_what_it_saves_over_the_best_so_far() -> None:
    measured = {"build_seconds": 1.0, "step_seconds": 240e-6}
    worth, why = engine_choice.worth_building("compiled+graphed", 30_000, 267e-6, measured)
    assert not worth
    assert why == "compiled+graphed took 1.0 s to build and would save 0.8 s over 30,000 steps"
    assert engine_choice.worth_building("compiled+graphed", 30_000, 400e-6, measured)[0]


def test_auto_takes_the_fastest_and_remembers_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short run after a long one knows what the long one measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seconds = {"graphed": 4e-4, "hybrid+graphed": 1e-4, "compiled+graphed": 2e-4}
    built: list[str] = []

    class Named(Eager):
        name = ""

    def named(name: str) -> Callable[[engines.Step], Engine]:
        def make(step: engines.Step) -> Engine:
            built.append(name)
            engine = Named(step)
            engine.name = name
            return engine

        return make

    for name in seconds:
        monkeypatch.setitem(engines.ENGINES, name, named(name))
    monkeypatch.setattr(engine_choice, "time_step", lambda engine, step: seconds[engine.name])

    monkeypatch.setattr(engine_choice, "on_gpu", lambda step: True)
    step = make_step()
    assert engine_choice.choose(step, 1000, "x")[1] == "graphed"
    assert built == ["graphed"]
    _, name, why = engine_choice.choose(step, 10**6, "x")
    assert name == "hybrid+graphed"
    assert "100 us a step by hybrid+graphed" in why
    assert built == ["graphed", "graphed", "hybrid+graphed", "compiled+graphed"]
    assert engine_choice.choose(step, 1000, "x")[1] == "hybrid+graphed"


@pytest.mark.parametrize(
    ("several", "num_photos", "one_by_one", "taken"),
    [(9e-5, 64, False, 8), (2e-4, 64, False, 1), (9e-5, 63, False, 1), (9e-5, 64, True, 1)],
    ids=["faster", "slower", "short epochs", "one by one"],
)
def test_auto_takes_several_steps_a_replay_where_that_was_faster(
    several: float, num_photos: int, one_by_one: bool, taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long run tries them with the functions of the best engine; a short one by what the long one measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    step = make_step(feed=make_feed(num_photos))
    functions = dataclasses.replace(step.functions)

    def capture(step: engines.Step, functions: StepFunctions | None = None, steps_per_replay: int = 1) -> Graphed:
        return Graphed(step, functions, capture=direct_call, steps_per_replay=steps_per_replay)

    def no_engine(step: engines.Step) -> Engine:
        raise NoEngine("not here")

    def time_step(engine: Graphed, step: engines.Step) -> float:
        return several if engine.steps_per_replay > 1 else 1e-4 if engine.functions else 4e-4

    for name, make in {
        "graphed": capture,
        "hybrid+graphed": lambda step: capture(step, functions),
        "compiled+graphed": no_engine,
    }.items():
        monkeypatch.setitem(engines.ENGINES, name, make)
    monkeypatch.setattr(engine_choice, "graphed", capture)
    monkeypatch.setattr(engine_choice, "on_gpu", lambda step: True)
    monkeypatch.setattr(engine_choice, "time_step", time_step)
    for num_steps in (10**6, 10**5):
        engine, name, why = engine_choice.choose(step, num_steps, "x", one_by_one=one_by_one)
        assert isinstance(engine, Graphed)
        assert (name, engine.steps_per_replay, engine.functions) == ("hybrid+graphed", taken, functions)
        assert ("hybrid+graphed with 8 steps a replay" in why) == (num_photos == 64 and not one_by_one)


def test_steps_are_timed_after_a_first_run_and_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph's first replay brings it onto the GPU: it is not timed, and the clock runs for 50 ms or more."""
    step, runs = make_step(), []

    class Counted:
        def run(self, num_steps: int) -> None:
            runs.append(num_steps)

    clock = iter(range(10**6))
    monkeypatch.setattr(engines.time, "perf_counter", lambda: next(clock) * 0.01)  # 10 ms a run
    monkeypatch.setattr(engines, "synchronize", lambda device: None)
    assert engines.time_step(Counted(), step) == pytest.approx(0.01 / step.num_steps)
    assert runs == [step.num_steps]
    monkeypatch.setattr(engines, "on_gpu", lambda step: True)
    assert engines.time_step(Counted(), step) == pytest.approx(0.01 / step.num_steps)
    assert len(runs) == 1 + 2 + 5


def test_ranks_time_as_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step adds up the gradients of all ranks: one that ran fewer would leave the others waiting."""

    class Slow(Ranks):
        def slowest(self, seconds: float) -> float:
            return 0.025

    step, runs = make_step(), []

    class Counted:
        def run(self, num_steps: int) -> None:
            runs.append(num_steps)

    monkeypatch.setattr(engines, "synchronize", lambda device: None)
    monkeypatch.setattr(engines, "on_gpu", lambda step: True)
    step.ranks = Slow()
    seconds = engines.time_step(Counted(), step)  # here it takes next to nothing
    assert len(runs) == 2 + 2
    assert seconds == 0.025 / (2 * step.num_steps)


@pytest.fixture
def on_two_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Ranks], Any]], list[Any]]:
    """Two threads as ranks, whose collectives wait for each other; returns what each returns, or its error."""
    both, told, own = threading.Barrier(2), [None, None], threading.local()

    def exchange(value: Any) -> list[Any]:
        told[own.number] = value
        both.wait(20)  # a rank that comes no more is waited for in vain
        found = list(told)
        both.wait(20)
        return found

    def all_reduce(tensor: Tensor, operation: Any = torch.distributed.ReduceOp.SUM) -> None:
        parts = torch.stack(exchange(tensor.clone()))
        tensor.copy_(parts.amax(0) if operation == torch.distributed.ReduceOp.MAX else parts.sum(0))

    def all_gather(parts: list[Tensor], part: Tensor) -> None:
        for to, value in zip(parts, exchange(part.clone()), strict=True):
            to.copy_(value)

    def broadcast(values: list[Any], source: int, device: torch.device) -> None:
        values[:] = exchange(list(values))[source]

    for name, call in (("reduce", all_reduce), ("gather", all_gather)):
        monkeypatch.setattr(torch.distributed, f"all_{name}", call)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)

    def run(work: Callable[[Ranks], Any]) -> list[Any]:
        def one(number: int) -> Any:
            own.number = number
            try:
                return work(Ranks(rank=number, count=2, joined=True))
            except FastCNNError as error:
                return error

        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(one, range(2)))

    return run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("missing", "taken"), [("graphed", "eager"), ("hybrid+graphed", "compiled+graphed")], ids=["graphed", "hybrid"]
)
def test_ranks_choose_alike_where_one_has_no_engine(
    missing: str, taken: str, on_two_ranks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(engine_choice, "on_gpu", lambda step: True)
    monkeypatch.setattr(engine_choice, "time_step", lambda engine, step: step.ranks.slowest(seconds[engine.name]))
    seconds = {"graphed": 4e-4, "hybrid+graphed": 1e-4, "compiled+graphed": 2e-4}

    def named(name: str) -> Callable[[engines.Step], Engine]:
        def make(step: engines.Step) -> Engine:
            if name == missing and step.ranks.rank == 1:
                raise NoEngine("not on this rank")
            engine = Eager(step)
            engine.name = name  # type: ignore[attr-defined]
            return engine

        return make

    for name in seconds:
        monkeypatch.setitem(engines.ENGINES, name, named(name))
    assert on_two_ranks(lambda ranks: engine_choice.choose(make_step(ranks=ranks), 10**6, "x")[1]) == [taken] * 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps_before", [0, 1], ids=["at once", "in the midst"])
def test_an_engine_that_one_rank_cannot_build_is_nobodys(
    steps_before: int, on_two_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others would wait for its sums for ever: what tries an engine out sums nothing up, then all agree."""

    def functions_of(step: engines.Step) -> StepFunctions:
        left = itertools.count(-steps_before)

        def read() -> Any:
            if step.ranks.rank == 1 and next(left) >= 0:
                raise RuntimeError("no compiler here")
            return step.functions.read()

        return dataclasses.replace(step.functions, read=read)

    def captured(step: engines.Step, functions: StepFunctions | None = None) -> Graphed:
        try:
            return Graphed(step, functions, capture=direct_call)
        except RuntimeError as error:
            raise NoEngine(str(error)) from None

    def train(ranks: Ranks, *, strict: bool = False) -> tuple[str, Tensor]:
        own = copy.deepcopy(model)
        convert(own, ranks, batch_norm=True)
        step = make_step(model=own, ranks=ranks)
        engine, name = engines.build("hybrid+graphed", step, strict=strict)
        engines.time_step(engine, step)
        step.start_epoch(0, 1)
        engine.run(3)
        return name, step.parameters.values

    model = make_model()
    operators()  # not by two threads at once
    monkeypatch.setitem(engines.ENGINES, "hybrid+graphed", engines.engine(functions_of, captured))
    monkeypatch.setitem(engines.ENGINES, "graphed", captured)
    told: list[str] = []  # by threads, for whom pytest catches no warnings

    def fall_back(message: str, *, strict: bool) -> None:
        told.append(message)
        errors.fall_back(message, strict=strict)

    monkeypatch.setattr(engines, "fall_back", fall_back)
    (first, weights), (second, same) = on_two_ranks(train)
    assert first == second == "graphed"
    assert told == ["no hybrid+graphed engine here (rank 1: no compiler here): using graphed"] * 2
    assert torch.equal(weights, same)
    both = on_two_ranks(lambda ranks: train(ranks, strict=True))
    assert [str(error) for error in both] == [f"{told[0]} (an error because of --strict)"] * 2


def test_an_engine_history_that_is_damaged_is_no_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.read_json(engine_choice._history_file()) == {}
    engine_choice._remember("a", "x", {"step_seconds": 0.5})
    engine_choice._remember("b", "x", {"step_seconds": 0.1})
    engine_choice._remember("b", "y", {"step_seconds": 0.2})
    assert files.read_json(engine_choice._history_file()) == {
        "a": {"x": {"step_seconds": 0.5}},
        "b": {"x": {"step_seconds": 0.1}, "y": {"step_seconds": 0.2}},
    }
    engine_choice._history_file().write_text("[")
    assert files.read_json(engine_choice._history_file()) == {}
