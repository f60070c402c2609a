"""How a step is run: as it is, compiled, with its blocks fused, captured whole in a CUDA graph and replayed, or mixed.

An engine takes a step, a function without arguments whose tensors stand in `step.state()`, and runs it a number of
times. Making one runs the step a few times and puts everything back as it was.
"""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastcnn.config.fields import user_cache_folder
from fastcnn.errors import fall_back, first_line
from fastcnn.network import fused_forward as fusing
from fastcnn.network.small_cnn import SmallCNN
from fastcnn.storage import files

REHEARSALS = 3  # cudnn tries its algorithms, the compiler compiles, allocators fill: all before a capture


class Step(Protocol):
    """What an engine runs."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    """The part that has a backward."""

    num_steps: int
    """Steps from the feed's beginning to its end: no engine goes further while it tries a step out."""

    @property
    def PARTS(self) -> Sequence[str]:  # noqa: N802
        """Attributes, `forward` among them, that a compiler takes as one graph each."""

    @property
    def network(self) -> SmallCNN:
        """What computes, in the type that it computes in."""

    def __call__(self) -> None:
        """Do one step."""

    def state(self) -> list[Tensor]:
        """Return every tensor that outlives a call and is changed by it."""


class Engine(Protocol):
    """Runs a step."""

    def run(self, num_steps: int) -> None:
        """Run the step `num_steps` times."""


class NoEngine(Exception):
    """The engine cannot be used for this step here; the message says why."""


class Eager:
    """The step as it is."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def run(self, num_steps: int) -> None:
        """Run the step `num_steps` times."""
        for _ in range(num_steps):
            self.step()


Capture = Callable[[Step, int], Callable[[], None]]
"""(step, k) -> what does k steps in one call."""


def cuda_graph(step: Step, num_steps: int) -> Callable[[], None]:
    """Return the replay of a CUDA graph of `num_steps` steps. Capturing runs nothing."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: another thread's CUDA calls (pinning memory, say) neither break the capture nor get into it.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(num_steps):
            step()
    return graph.replay


def direct_call(step: Step, num_steps: int) -> Callable[[], None]:
    """Return what runs the steps themselves: stands in for `cuda_graph` where a test has no GPU."""

    def replay() -> None:
        for _ in range(num_steps):
            step()

    return replay


class Graphed:
    """The step captured whole and replayed; `steps_per_replay` of them in one graph, one by one what is left over."""

    def __init__(self, step: Step, capture: Capture = cuda_graph, steps_per_replay: int = 1) -> None:
        self.steps_per_replay = steps_per_replay
        with rehearsal(step):
            for _ in range(min(REHEARSALS, step.num_steps)):
                step()
        # A capture runs nothing, but one that breaks off may leave the RNG and the cursor where they were not.
        with rehearsal(step):
            self.replay = capture(step, 1)
            self.replay_many = capture(step, steps_per_replay) if steps_per_replay > 1 else self.replay

    def run(self, num_steps: int) -> None:
        """Replay `num_steps` steps. Queues them: nothing waits for the GPU."""
        many, single = divmod(num_steps, self.steps_per_replay)
        for _ in range(many):
            self.replay_many()
        for _ in range(single):
            self.replay()


@contextlib.contextmanager
def rehearsal(step: Step) -> Iterator[None]:
    """Put back whatever the steps inside change: their tensors and the random number generators.

    On a GPU they run on a stream of their own, as what precedes a capture must.
    """
    state = step.state()
    device = state[0].device
    with torch.no_grad():
        saved = [tensor.clone() for tensor in state]
    rng = torch.get_rng_state()
    cuda_rng = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        with _side_stream(device):
            yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(state, saved, strict=True):
                tensor.copy_(value)
        torch.set_rng_state(rng)
        if cuda_rng is not None:
            torch.cuda.set_rng_state(cuda_rng, device)


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def compiled(step: Step) -> Eager:
    """Return the step with its forward, loss and backward compiled as one graph of fixed shapes."""
    return _changed(step, lambda: compile_parts(step, ("forward",)))


def graphed(step: Step, steps_per_replay: int = 1) -> Graphed:
    """Return the step captured in a CUDA graph. Raises NoEngine without a GPU, or where the capture is refused."""
    if step.state()[0].device.type != "cuda":
        raise NoEngine("CUDA graphs need an NVIDIA GPU")
    try:
        return Graphed(step, steps_per_replay=steps_per_replay)
    except RuntimeError as error:  # out of memory is one of them
        gc.collect()
        torch.cuda.empty_cache()
        raise NoEngine(first_line(error)) from None


def fused(step: Step) -> Eager:
    """Return the step with the network's blocks fused. Raises NoEngine where none can be, or not on this device."""
    return _changed(step, lambda: _fuse(step))


def fused_and_compiled(step: Step) -> Eager:
    """Return the step with the network's blocks fused and all that is around them compiled, a graph a part."""

    def change() -> None:
        _fuse(step)
        compile_parts(step, step.PARTS)

    return _changed(step, change)


def compile_parts(step: Step, names: Sequence[str], backend: Any = "inductor") -> None:
    """Put the compiled forms of some of a step's parts in their places, each one graph of fixed shapes."""
    import torch._dynamo  # a second: not for every start

    # A process may compile a part for more steps than the 8 that dynamo takes for a change without an end.
    torch._dynamo.config.recompile_limit = 64
    for name in names:
        plain = getattr(step, name)
        made = torch.compile(plain, fullgraph=True, dynamic=False, backend=backend)
        made.takes_places = getattr(plain, "takes_places", False)  # type: ignore[attr-defined]
        setattr(step, name, made)


def captured(change: Callable[[Step], Engine]) -> Callable[[Step], Graphed]:
    """Return the engine that captures what another has changed in a CUDA graph."""

    def engine(step: Step) -> Graphed:
        own = parts(step)
        change(step)
        try:
            return graphed(step)
        except NoEngine:
            put_back(step, own)
            raise

    return engine


def parts(step: Step) -> dict[str, Any]:
    """Return what was put into a step's parts, for `put_back`; a method of its own is none."""
    return {name: vars(step)[name] for name in step.PARTS if name in vars(step)}


def put_back(step: Step, own: dict[str, Any]) -> None:
    """Make a step's parts what they were."""
    for name in step.PARTS:
        vars(step).pop(name, None)
    vars(step).update(own)


def _changed(step: Step, change: Callable[[], None]) -> Eager:
    """Return the step with its parts changed, once it has run so. Raises NoEngine, and all is as it was, else."""
    own = parts(step)
    try:
        change()
        with rehearsal(step):
            step()
    except Exception as error:  # whatever dynamo, inductor, triton, the C++ compiler or the GPU trips over
        put_back(step, own)
        raise NoEngine(first_line(error)) from None
    return Eager(step)


def _fuse(step: Step) -> None:
    reason = fusing.unavailable(step.state()[0].device)
    refusals = fusing.refusals(step.network)
    if reason or all(refusals):
        raise NoEngine(reason or f"block 1: {refusals[0]}")
    step.forward = fusing.FusedForward(step.forward)


ENGINES: dict[str, Callable[[Step], Engine]] = {
    "eager": Eager,
    "compiled": compiled,
    "fused": fused,
    "fused+compiled": fused_and_compiled,
    "graphed": graphed,
    "compiled+graphed": captured(compiled),
    "fused+graphed": captured(fused),
    "fused+compiled+graphed": captured(fused_and_compiled),
}

NEXT_BEST = {
    "compiled+graphed": "graphed",
    "fused+graphed": "graphed",
    "fused+compiled+graphed": "fused+graphed",
    "graphed": "eager",
    "compiled": "eager",
    "fused": "eager",
    "fused+compiled": "fused",
}


def build(name: str, step: Step, *, strict: bool = False) -> tuple[Engine, str]:
    """Return an engine and its name: the one asked for, or the next best that works, with a warning.

    Raises FastCNNError instead of warning where `strict`.
    """
    while True:
        try:
            return ENGINES[name](step), name
        except NoEngine as error:
            fall_back(f"no {name} engine here ({error}): using {NEXT_BEST[name]}", strict=strict)
            name = NEXT_BEST[name]


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
    their results on disk), else those of `PRIOR`. What was built stays where it is the fastest.

    slowest: what all ranks make of a time of theirs, so that they choose alike.
    """
    device = step.state()[0].device
    if device.type != "cuda":
        return Eager(step), "eager", "compiling and capturing gain nothing on a CPU"
    engine, name = build("graphed", step, strict=strict)
    seconds = slowest(time_step(engine, step))
    if name == "eager":
        return engine, name, "nothing can be captured here"
    best, plain, reasons = seconds, parts(step), [f"{seconds * 1e6:,.0f} us a step when captured"]
    for other, prior in PRIOR.items():
        found = _history().get(signature, {}).get(other, {})
        worth, why = worth_building(other, num_steps, best, {**prior, **found}, seconds)
        reasons.append(why)
        if not slowest(worth):
            continue
        before, start = parts(step), time.perf_counter()
        put_back(step, plain)
        try:
            candidate = ENGINES[other](step)
        except NoEngine as error:
            reasons.append(f"no {other} here: {error}")
            put_back(step, before)
            continue
        cost, its_seconds = slowest(time.perf_counter() - start), slowest(time_step(candidate, step))
        _remember(signature, other, {"build_seconds": cost, "saving": 1 - its_seconds / seconds})
        if its_seconds < best:
            engine, name, best = candidate, other, its_seconds
        else:
            put_back(step, before)
    return engine, name, "; ".join(reasons)


PRIOR = {  # DESIGN's estimates; not measured yet
    "fused+graphed": {"build_seconds": 30.0, "saving": 0.7},
    "fused+compiled+graphed": {"build_seconds": 60.0, "saving": 0.8},
    "compiled+graphed": {"build_seconds": 60.0, "saving": 0.4},
}
"""What to try after the graphed engine: seconds to build it, and the share of the graphed step that it saves."""


def worth_building(
    name: str, num_steps: int, best: float, prediction: dict[str, float], seconds: float | None = None
) -> tuple[bool, str]:
    """Return whether an engine pays over the run, and the sum in words.

    best: seconds of a step by the best engine so far; seconds: by the one that the prediction's saving is of.
    """
    predicted = (best if seconds is None else seconds) * (1 - prediction["saving"])
    cost, saving = prediction["build_seconds"], num_steps * (best - predicted)
    why = f"{name} would take about {cost:,.0f} s and save {max(saving, 0):,.1f} s over {num_steps:,} steps"
    return saving > cost, why


def time_step(engine: Engine, step: Step, num_steps: int = 20) -> float:
    """Return the seconds that an engine takes for a step, leaving everything as it was."""
    num_steps = min(num_steps, step.num_steps)
    device = step.state()[0].device

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with rehearsal(step):
        synchronize()
        start = time.perf_counter()
        engine.run(num_steps)
        synchronize()
        return (time.perf_counter() - start) / num_steps


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
