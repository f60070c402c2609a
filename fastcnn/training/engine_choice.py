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
from fastcnn.training.engines import ENGINES, Eager, Engine, NoEngine, Step, build, on_gpu, time_step

CANDIDATES = ("hybrid+graphed", "compiled+graphed")
"""Engines to try after the graphed one, which is ready in about a second."""

UNMEASURED_AFTER = 60.0
"""Seconds that a run must take, as measured, for an engine to be tried whose cost and saving nobody has measured."""


def choose(
    step: Step,
    num_steps: int,
    signature: str,
    *,
    strict: bool = False,
    slowest: Callable[[float], float] = lambda seconds: seconds,
) -> tuple[Engine, str, str]:
    """Return the engine that ends a run of `num_steps` soonest, its name, and why.

    On a CPU that is eager. On a GPU the graphed engine is built and its step timed. Each of `CANDIDATES` is built and
    timed where that pays: by what an earlier run of the same `signature` measured on this machine, or, where none did,
    if the run is longer than `UNMEASURED_AFTER`. The fastest of those built is returned; all are remembered.

    slowest: a time of this rank -> the longest of all ranks, so that all choose the same.
    """
    if not on_gpu(step):
        return Eager(step), "eager", "compiling and capturing gain nothing on a CPU"
    engine, name = build("graphed", step, strict=strict)
    seconds = slowest(time_step(engine, step))
    if name == "eager":
        return engine, name, "nothing can be captured here"
    best, reasons = seconds, [f"{seconds * 1e6:,.0f} us a step when captured"]
    for other in CANDIDATES:
        worth, why = worth_building(other, num_steps, best, _history().get(signature, {}).get(other))
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
        _remember(signature, other, {"build_seconds": cost, "step_seconds": its_seconds})
        reasons.append(f"{its_seconds * 1e6:,.0f} us a step by {other}, built in {cost:,.1f} s")
        if its_seconds < best:
            engine, name, best = candidate, other, its_seconds
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
