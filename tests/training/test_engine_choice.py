"""Which engine is chosen: by measuring, and by what an earlier run measured."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastcnn.training import engine_choice, engines
from fastcnn.training.engines import Eager, Engine, Graphed, NoEngine
from fastcnn.training.step import StepFunctions
from tests.training.steps import (
    direct_call,
    make_feed,
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
    monkeypatch.setattr(engine_choice, "time_step", lambda engine, step, slowest: seconds[engine.name])

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

    def time_step(engine: Graphed, step: engines.Step, slowest: Callable[[float], float]) -> float:
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
    step, runs = make_step(), []

    class Counted:
        def run(self, num_steps: int) -> None:
            runs.append(num_steps)

    monkeypatch.setattr(engines, "synchronize", lambda device: None)
    monkeypatch.setattr(engines, "on_gpu", lambda step: True)
    seconds = engines.time_step(Counted(), step, slowest=lambda seconds: 0.025)  # here it takes next to nothing
    assert len(runs) == 2 + 2
    assert seconds == 0.025 / (2 * step.num_steps)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("missing", "taken"), [("graphed", "eager"), ("hybrid+graphed", "compiled+graphed")], ids=["graphed", "hybrid"]
)
def test_ranks_choose_alike_where_one_has_no_engine(
    missing: str, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads as ranks: each asks the other as often, whoever's engine it is that cannot be built."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(engine_choice, "on_gpu", lambda step: True)
    monkeypatch.setattr(engine_choice, "time_step", lambda engine, step, slowest: slowest(seconds[engine.name]))
    seconds = {"graphed": 4e-4, "hybrid+graphed": 1e-4, "compiled+graphed": 2e-4}
    both, told, rank = threading.Barrier(2), [0.0, 0.0], threading.local()

    def named(name: str) -> Callable[[engines.Step], Engine]:
        def make(step: engines.Step) -> Engine:
            if name == missing and rank.number == 1:
                raise NoEngine("not on this rank")
            engine = Eager(step)
            engine.name = name  # type: ignore[attr-defined]
            return engine

        return make

    def slowest(value: float) -> float:
        told[rank.number] = value
        both.wait(60)  # a rank that asks no more is waited for in vain
        longest = max(told)
        both.wait(60)
        return longest

    def choose(number: int) -> str:
        rank.number = number
        return engine_choice.choose(make_step(), 10**6, "x", slowest=slowest)[1]

    for name in seconds:
        monkeypatch.setitem(engines.ENGINES, name, named(name))
    with ThreadPoolExecutor(2) as ranks:
        assert list(ranks.map(choose, range(2))) == [taken] * 2


def test_an_engine_history_that_is_damaged_is_no_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert engine_choice._history() == {}
    engine_choice._remember("a", "x", {"step_seconds": 0.5})
    engine_choice._remember("b", "x", {"step_seconds": 0.1})
    engine_choice._remember("b", "y", {"step_seconds": 0.2})
    assert engine_choice._history() == {
        "a": {"x": {"step_seconds": 0.5}},
        "b": {"x": {"step_seconds": 0.1}, "y": {"step_seconds": 0.2}},
    }
    engine_choice._history_file().write_text("[")
    assert engine_choice._history() == {}
