"""The number of threads follows the rates that were measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from fastcnn.system import thread_choice
from fastcnn.system.thread_choice import ThreadChoice


@pytest.fixture(autouse=True)
def threads_given_back() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def train(choice: ThreadChoice, rate: Callable[[int], float], seconds: float) -> None:
    """Take portions of steps, each at the rate of its number of threads, in steps a second."""
    while seconds > 0:
        steps = max(1, int(rate(choice.count) / 10))
        took = steps / rate(choice.count)
        choice.took(steps, took)
        seconds -= took


QUIET = {1: 60.0, 2: 100.0, 4: 170.0, 8: 250.0}
BUSY = {1: 40.0, 2: 60.0, 4: 20.0, 8: 8.0}


def test_all_cores_where_they_are_fastest_and_few_steps_elsewhere() -> None:
    choice = ThreadChoice(8)
    train(choice, QUIET.__getitem__, 120)
    assert choice.chosen == 8
    assert choice.steps[8] > 0.95 * sum(choice.steps.values())


def test_fewer_threads_beside_other_programs_and_all_again_afterwards() -> None:
    choice = ThreadChoice(8)
    train(choice, QUIET.__getitem__, 30)
    train(choice, BUSY.__getitem__, 120)
    assert choice.chosen == 2
    train(choice, QUIET.__getitem__, 120)
    assert choice.chosen == 8


def test_a_run_of_a_few_steps_keeps_all_cores() -> None:
    choice = ThreadChoice(8)
    train(choice, QUIET.__getitem__, thread_choice.MEASURED_SECONDS / 2)
    assert list(choice.steps) == [8]


def test_epochs_shorter_than_a_trial_do_not_end_it() -> None:
    choice = ThreadChoice(2)
    for _ in range(100):
        choice.try_others()
        train(choice, BUSY.__getitem__, 0.1)
        train(choice, lambda count: 50.0 / count, 0.1)
    assert choice.chosen == 1


def test_another_number_of_cores_than_a_power_of_two() -> None:
    choice = ThreadChoice(6)
    assert choice.counts == [1, 3, 6]
    train(choice, lambda count: 10.0 / count, 60)
    assert choice.chosen == 1
    assert torch.get_num_threads() == choice.count


@pytest.mark.parametrize("choice", [ThreadChoice(8, fixed=True), ThreadChoice(1)])
def test_a_number_that_was_given_stays(choice: ThreadChoice) -> None:
    before = torch.get_num_threads()
    train(choice, BUSY.__getitem__, 60)
    assert list(choice.steps) == choice.counts
    assert torch.get_num_threads() == before
