"""Engines: a step run as it is, compiled, with fused blocks, or captured in a CUDA graph and replayed.

An engine is a builder of a step's functions and a way to run them. It takes a step, whose tensors stand in
`step.state()`, builds its functions from the plain ones and runs the step by them a number of times. Making one runs
the step a few times and puts everything back as it was; the step itself is never changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastcnn.errors import fall_back, first_line
from fastcnn.network.fused_forward import FusedForward, refusals, unavailable
from fastcnn.network.small_cnn import SmallCNN
from fastcnn.system.device import synchronize
from fastcnn.training.step import StepFunctions

FUNCTIONS = ("read", "forward", "collect", "update")  # of StepFunctions, in turn
REHEARSALS = 3  # before a capture: cudnn tries its algorithms, the compiler compiles, allocators fill


class Step(Protocol):
    """Step that an engine runs: training or evaluation."""

    num_steps: int
    """Steps from the feed's beginning to its end: no engine goes further while it tries a step out."""

    @property
    def functions(self) -> StepFunctions:
        """The plain functions, uncompiled and unfused."""

    @property
    def network(self) -> SmallCNN:
        """Network that computes, in the type that it computes in."""

    def __call__(self, functions: StepFunctions | None = None) -> None:
        """Do one step, by these functions or the plain ones."""

    def state(self) -> list[Tensor]:
        """Return every tensor that a call changes and the next one reads."""


class Engine(Protocol):
    """Runs a step by functions of its own."""

    def run(self, num_steps: int) -> None:
        """Run the step `num_steps` times."""


class NoEngine(Exception):
    """The engine cannot be used for this step here; the message says why."""


class Eager:
    """The step called again and again, by its plain functions or others."""

    def __init__(self, step: Step, functions: StepFunctions | None = None) -> None:
        self.step, self.functions = step, functions or step.functions

    def run(self, num_steps: int) -> None:
        """Run the step `num_steps` times."""
        for _ in range(num_steps):
            self.step(self.functions)


def cuda_graph(steps: Callable[[], None]) -> Callable[[], None]:
    """Return the replay of a CUDA graph of some steps. Capturing runs nothing."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: another thread's CUDA calls (pinning memory, say) neither break the capture nor get into it.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        steps()
    return graph.replay


class Graphed:
    """The step captured whole and replayed; `steps_per_replay` of them per graph; the rest are replayed one by one.

    capture: some steps -> a call that replays them.
    """

    def __init__(
        self,
        step: Step,
        functions: StepFunctions | None = None,
        *,
        capture: Callable[[Callable[[], None]], Callable[[], None]] = cuda_graph,
        steps_per_replay: int = 1,
    ) -> None:
        self.steps_per_replay = steps_per_replay
        eager = Eager(step, functions)
        with rehearsal(step):
            eager.run(min(REHEARSALS, step.num_steps))
        # A capture runs nothing, but one that breaks off may leave the RNG and the cursor where they were not.
        with rehearsal(step):
            self.replay = capture(lambda: eager.run(1))
            self.replay_many = capture(lambda: eager.run(steps_per_replay)) if steps_per_replay > 1 else self.replay

    def run(self, num_steps: int) -> None:
        """Replay `num_steps` steps. Queues them: nothing waits for the GPU."""
        many, single = divmod(num_steps, self.steps_per_replay)
        for _ in range(many):
            self.replay_many()
        for _ in range(single):
            self.replay()


@contextlib.contextmanager
def rehearsal(step: Step) -> Iterator[None]:
    """Restore on leaving what the steps inside change: their tensors and the random number generators.

    On a GPU they run on a side stream, as CUDA asks of a warm-up before a capture.
    """
    state = step.state()
    device = state[0].device
    with torch.no_grad():
        saved = [tensor.clone() for tensor in state]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), _side_stream(device):
            yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(state, saved, strict=True):
                tensor.copy_(value)


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


def graphed(step: Step, functions: StepFunctions | None = None, steps_per_replay: int = 1) -> Graphed:
    """Return the step captured in a CUDA graph. Raises NoEngine without a GPU, or where the capture is refused."""
    if step.state()[0].device.type != "cuda":
        raise NoEngine("CUDA graphs need an NVIDIA GPU")
    try:
        return Graphed(step, functions, steps_per_replay=steps_per_replay)
    except RuntimeError as error:  # out of memory is one of them
        gc.collect()
        torch.cuda.empty_cache()
        raise NoEngine(first_line(error)) from None


def with_compiled(
    functions: StepFunctions, names: Sequence[str] = FUNCTIONS, backend: Any = "inductor"
) -> StepFunctions:
    """Return StepFunctions of which those named are compiled, each as one graph of fixed shapes."""
    import torch._dynamo  # a second: not for every start

    # A process may compile a function for more steps than the 8 that dynamo takes for a change without an end.
    torch._dynamo.config.recompile_limit = 64
    made: dict[str, Any] = {}
    for name in names:
        if plain := getattr(functions, name):
            made[name] = torch.compile(plain, fullgraph=True, dynamic=False, backend=backend)
    return dataclasses.replace(functions, **made)


def with_fused_blocks(functions: StepFunctions, step: Step) -> StepFunctions:
    """Return StepFunctions whose forward runs the network's blocks by fused kernels.

    Raises NoEngine where no block can be fused, or none on this device.
    """
    reason = unavailable(step.state()[0].device)
    found = refusals(step.network)
    if reason or all(found):
        raise NoEngine(reason or f"block 1: {found[0]}")
    return dataclasses.replace(functions, forward=FusedForward(functions.forward), reads_unread_batches=True)


def compiled(step: Step) -> StepFunctions:
    """Return a step's functions with forward, loss and backward compiled as one graph."""
    return with_compiled(step.functions, ["forward"])


def fused(step: Step) -> StepFunctions:
    """Return a step's functions with the network's blocks fused."""
    return with_fused_blocks(step.functions, step)


def fused_and_compiled(step: Step) -> StepFunctions:
    """Return a step's functions with the network's blocks fused and all that is around them compiled."""
    return with_compiled(fused(step))


def engine(
    build_functions: Callable[[Step], StepFunctions], run: Callable[[Step, StepFunctions], Engine] = Eager
) -> Callable[[Step], Engine]:
    """Return a maker of engines: functions built and tried out once, then run eagerly or captured.

    The maker raises NoEngine where that fails, and changes nothing of the step.
    """

    def make(step: Step) -> Engine:
        try:
            functions = build_functions(step)
            with rehearsal(step):
                step(functions)
        except Exception as error:  # whatever dynamo, inductor, triton, the C++ compiler or the GPU trips over
            raise NoEngine(first_line(error)) from None
        return run(step, functions)

    return make


ENGINES: dict[str, Callable[[Step], Engine]] = {
    "eager": Eager,
    "compiled": engine(compiled),
    "fused": engine(fused),
    "fused+compiled": engine(fused_and_compiled),
    "graphed": graphed,
    "compiled+graphed": engine(compiled, graphed),
    "fused+graphed": engine(fused, graphed),
    "fused+compiled+graphed": engine(fused_and_compiled, graphed),
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


def time_step(engine: Engine, step: Step, num_steps: int = 20) -> float:
    """Return the seconds per step of an engine; the step's state is restored."""
    num_steps = min(num_steps, step.num_steps)
    device = step.state()[0].device
    with rehearsal(step):
        synchronize(device)
        start = time.perf_counter()
        engine.run(num_steps)
        synchronize(device)
        return (time.perf_counter() - start) / num_steps
