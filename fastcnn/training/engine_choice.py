"""Choice of the engine: by measuring, and by what was measured before."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from fastcnn.storage import files
from fastcnn.storage.paths import user_cache_folder
from fastcnn.training.engines import (
    ENGINES,
    Eager,
    Engine,
    Graphed,
    Step,
    build,
    graphed,
    on_gpu,
    time_step,
    try_to_make,
)

CANDIDATES = ("hybrid+graphed", "compiled+graphed")
"""Engines to try after the graphed one, which is ready in about a second."""

UNMEASURED_AFTER = 60.0
"""Seconds that a run must take, as measured, for an engine to be tried whose cost and saving nobody has measured."""

STEPS_PER_REPLAY = 8
"""Steps in one graph that is tried beside one of a single step: between two replays a GPU waits."""

SHORT_STEP = 1e-3
"""Seconds of a step up to which that is tried: in longer ones the wait is nothing, and the memory of a graph much."""


def choose(
    step: Step,
    num_steps: int,
    signature: str,
    *,
    strict: bool = False,
    one_by_one: bool = False,
) -> tuple[Engine, str, str]:
    """Return the engine that ends a run of `num_steps` soonest, its name, and why.

    On a CPU that is eager. On a GPU the graphed engine is built and its step timed. Each of `CANDIDATES` is built and
    timed where that pays: by what an earlier run of the same `signature` measured on this machine, or, where none did,
    if the run is longer than `UNMEASURED_AFTER`. So is the best of them with `STEPS_PER_REPLAY` steps in a graph. The
    fastest of those built is returned; all are remembered. All ranks choose the same.

    one_by_one: whether the engine is run for a single step at a time.
    """
    if not on_gpu(step):
        return Eager(step), "eager", "compiling and capturing gain nothing on a CPU"
    slowest = step.ranks.slowest
    engine, name = build("graphed", step, strict=strict)
    if name == "eager":
        return engine, name, "nothing can be captured here"
    seconds = time_step(engine, step)
    best, reasons = seconds, [f"{seconds * 1e6:,.0f} us a step when captured"]

    def faster(label: str, make: Callable[[Step], Engine]) -> Engine | None:
        """Return an engine if it pays to build it and it is the fastest so far; note why, and its time as the best."""
        nonlocal best
        worth, why = worth_building(
            label, num_steps, best, files.read_json(_history_file()).get(signature, {}).get(label)
        )
        reasons.append(why)
        if not slowest(worth):
            return None
        start = time.perf_counter()
        candidate, problem = try_to_make(make, step)
        if candidate is None:
            reasons.append(f"no {label} here: {problem}")
            return None
        cost, its_seconds = slowest(time.perf_counter() - start), time_step(candidate, step)
        _remember(signature, label, {"build_seconds": cost, "step_seconds": its_seconds})
        reasons.append(f"{its_seconds * 1e6:,.0f} us a step by {label}, built in {cost:,.1f} s")
        if its_seconds >= best:
            return None
        best = its_seconds
        return candidate

    for other in CANDIDATES:
        if found := faster(other, ENGINES[other]):
            engine, name = found, other
    if isinstance(engine, Graphed) and best < SHORT_STEP and step.num_steps >= STEPS_PER_REPLAY and not one_by_one:
        functions = engine.functions
        label = f"{name} with {STEPS_PER_REPLAY} steps a replay"
        engine = faster(label, lambda step: graphed(step, functions, STEPS_PER_REPLAY)) or engine
    return engine, name, "; ".join(reasons)


def worth_building(name: str, num_steps: int, best: float, measured: dict[str, float] | None) -> tuple[bool, str]:
    """Return whether building an engine pays over the run, and the calculation in words.

    best: seconds per step of the best engine so far; measured: what an earlier run found; None: nothing.
    """
    if measured is None:
        whole = num_steps * best
        return whole > UNMEASURED_AFTER, f"{name} is not measured here, and the run takes {whole:,.1f} s without it"
    cost, saving = measured["build_seconds"], num_steps * (best - measured["step_seconds"])
    why = f"{name} took {cost:,.1f} s to build and would save {max(saving, 0):,.1f} s over {num_steps:,} steps"
    return saving > cost, why


def _history_file() -> Path:
    return user_cache_folder() / "engines-3.json"


def _remember(signature: str, engine: str, figures: dict[str, float]) -> None:
    with contextlib.suppress(OSError):  # only the next prediction would be better for it
        path = _history_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        history = files.read_json(path)
        history[signature] = {**history.get(signature, {}), engine: figures}
        files.write(path, json.dumps(history, indent=1))
