"""Timing: device work included, rivals in processes of their own, ratios pair by pair."""

from __future__ import annotations

import functools
import importlib
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch

from fastcnn.system.device import synchronize
from fastcnn.system.waiting import BLOCK_TIME, SPIN_COUNT

Clocked = Callable[[], float]
"""Does a piece of work and returns the seconds that it took."""


def clocked(call: Callable[[], object], device: torch.device) -> Clocked:
    """Return a function that does `call` once and returns its seconds, the device's work included."""

    def run() -> float:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - start

    return run


def steps_a_slice(run: Callable[[int], object], seconds: float, device: torch.device) -> int:
    """Return how many steps take so many seconds, after three that warm up; 3 at least. run: does a number of steps."""
    run(3)
    return max(3, math.ceil(3 * seconds / clocked(lambda: run(3), device)()))


def seconds_a_step(run: Callable[[int], object], seconds: float, device: torch.device) -> list[float]:
    """Return the seconds of a step in each of five slices of so many seconds, after a warm-up."""
    count = steps_a_slice(run, seconds, device)
    one_slice = clocked(lambda: run(count), device)
    return [one_slice() / count for _ in range(5)]


def repeated(call: Callable[[], object]) -> Callable[[int], None]:
    """Return a function that does `call` a number of times."""

    def run(count: int) -> None:
        for _ in range(count):
            call()

    return run


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Return how many times as fast ours is, of seconds taken in turn: the pairs' median, lowest and highest."""
    pairs = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(pairs), "low": min(pairs), "high": max(pairs), "n": len(pairs)}


def environment_of_torch() -> dict[str, str]:
    """Return the environment without what importing fastcnn sets in it: a baseline's threads wait as torch has them."""
    set_by_us = {"GOMP_SPINCOUNT": str(SPIN_COUNT), "KMP_BLOCKTIME": str(BLOCK_TIME)}
    return {name: value for name, value in os.environ.items() if set_by_us.get(name) != value}


class RivalFailed(RuntimeError):
    """A rival that could not do its steps; the message is its error."""


class Apart:
    """Work in a process of its own, whose allocator and threads are as Python starts them; idle until it is called.

    `make` names a function, "module:function", that is called there with the arguments and returns a step.
    """

    def __init__(self, make: str, *args: object) -> None:
        self.failed = ""
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args), daemon=True)
        with mock.patch.dict(os.environ, environment_of_torch(), clear=True):
            self._process.start()
        theirs.close()

    def __call__(self, num_steps: int) -> float:
        """Do a number of steps and return the seconds that they took. Raises RivalFailed, then and from then on."""
        if self.failed:
            raise RivalFailed(self.failed)
        self._ours.send(num_steps)
        try:
            answer: float | str = self._ours.recv()
        except EOFError:
            answer = "its process ended"
        if isinstance(answer, str):
            self.failed = answer
            raise RivalFailed(answer)
        return answer

    def close(self) -> None:
        """End the process."""
        self._ours.close()
        self._process.join(10)
        self._process.kill()


def _serve(pipe: Connection, make: str, args: Sequence[Any]) -> None:
    module, _, name = make.partition(":")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step: Callable[[], object] | None = None
    while True:
        try:
            num_steps: int = pipe.recv()
        except EOFError:
            return
        try:
            step = step or getattr(importlib.import_module(module), name)(*args)
            pipe.send(clocked(functools.partial(repeated(step), num_steps), device)())
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
