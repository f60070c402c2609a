"""How the training step is run. An engine takes a step and runs it a number of times; the results lie in the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from fastcnn import config
from fastcnn.step import TrainingStep


class Engine(Protocol):
    """Runs a training step."""

    def run(self, num_steps: int) -> None:
        """Run the step `num_steps` times."""


class Eager:
    """The step as it is."""

    def __init__(self, step: TrainingStep) -> None:
        self.step = step

    def run(self, num_steps: int) -> None:
        """Run the step `num_steps` times."""
        for _ in range(num_steps):
            self.step()


ENGINES: dict[str, Callable[[TrainingStep], Engine]] = {
    "eager": Eager,
}


def choose(name: config.Engine) -> config.Engine:
    """Return the engine's name; "auto" is eager."""
    return "eager" if name == "auto" else name
