"""Choice of the engine: by measuring, and by what was measured before."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastcnn.storage import files
from fastcnn.storage.paths import user_cache_folder
from fastcnn.training.engines import ENGINES, Eager, Engine, NoEngine, Step, build, time_step


def choose(
    step: Step,
    num_steps: int,
    signature: str,
    *,
    strict: bool = False,
    slowest: Callable[[float], float] = lambda seconds: seconds,
) -> tuple[Engine, str, str]:
    """Return the engine that ends a run of `num_steps` soonest, its name, and why.

    On a CPU that is eager. On a GPU the graphed engine is ready in about a second; its step is timed, and each of
    `PRIOR` is built and timed too where the predicted saving over the run exceeds the predicted cost. Both predictions
    are what an earlier run of the same `signature` measured (a second compilation is cheaper: inductor and triton keep
    their results on disk), else those of `PRIOR`. The fastest of those built is returned.

    slowest: a time of this rank -> the longest of all ranks, so that all choose the same.
    """
    device = step.state()[0].device
    if device.type != "cuda":
        return Eager(step), "eager", "compiling and capturing gain nothing on a CPU"
    engine, name = build("graphed", step, strict=strict)
    seconds = slowest(time_step(engine, step))
    if name == "eager":
        return engine, name, "nothing can be captured here"
    best, reasons = seconds, [f"{seconds * 1e6:,.0f} us a step when captured"]
    for other, prior in PRIOR.items():
        found = _history().get(signature, {}).get(other, {})
        worth, why = worth_building(other, num_steps, best, {**prior, **found}, seconds)
        reasons.append(why)
        if not slowest(worth):
            continue
        start = time.perf_counter()
        try:
            candidate = ENGINES[other](step)
        except NoEngine as error:
            reasons.append(f"no {other} here: {error}")
            continue
        cost, its_seconds = slowest(time.perf_counter() - start), slowest(time_step(candidate, step))
        _remember(signature, other, {"build_seconds": cost, "saving": 1 - its_seconds / seconds})
        if its_seconds < best:
            engine, name, best = candidate, other, its_seconds
    return engine, name, "; ".join(reasons)


PRIOR = {  # DESIGN's estimates; not measured yet
    "fused+graphed": {"build_seconds": 30.0, "saving": 0.7},
    "fused+compiled+graphed": {"build_seconds": 60.0, "saving": 0.8},
    "compiled+graphed": {"build_seconds": 60.0, "saving": 0.4},
}
"""Engines to try after the graphed one: seconds to build each, and the fraction of the graphed step that it saves."""


def worth_building(
    name: str, num_steps: int, best: float, prediction: dict[str, float], seconds: float | None = None
) -> tuple[bool, str]:
    """Return whether building an engine pays over the run, and the calculation in words.

    best: seconds per step of the best engine so far; seconds: of the one that the predicted saving refers to.
    """
    predicted = (best if seconds is None else seconds) * (1 - prediction["saving"])
    cost, saving = prediction["build_seconds"], num_steps * (best - predicted)
    why = f"{name} would take about {cost:,.0f} s and save {max(saving, 0):,.1f} s over {num_steps:,} steps"
    return saving > cost, why


def _history_file() -> Path:
    return user_cache_folder() / "engines-2.json"


def _history() -> dict[str, Any]:
    try:
        history = json.loads(_history_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return history if isinstance(history, dict) else {}


def _remember(signature: str, engine: str, figures: dict[str, float]) -> None:
    with contextlib.suppress(OSError):  # only the next prediction would be better for it
        path = _history_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        history = _history()
        history[signature] = {**history.get(signature, {}), engine: figures}
        files.write(path, json.dumps(history, indent=1))
