"""Engines: a step run as it is, compiled, by kernels of our own, or captured in a CUDA graph and replayed.

An engine is a builder of a step's functions and a way to run them. It takes a step, whose tensors stand in
`step.state()`, builds its functions from the plain ones and runs the step by them a number of times. Making one runs
the step a few times and puts everything back as it was; the step itself is never changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastcnn.errors import FastCNNError, fall_back, first_line
from fastcnn.network.hybrid_forward import HybridForward, refusals, unavailable
from fastcnn.network.small_cnn import SmallCNN
from fastcnn.system.device import capture as cuda_graph
from fastcnn.system.device import is_out_of_memory, synchronize
from fastcnn.system.ranks import Ranks
from fastcnn.system.switches import Compiling, compiling
from fastcnn.training.augment import Batch
from fastcnn.training.step import StepFunctions, TrainingStep

FUNCTIONS = ("read", "forward", "collect", "update")  # of StepFunctions, in turn
REHEARSALS = 3  # before a capture: cudnn tries its algorithms, the compiler compiles, allocators fill


class Step(Protocol):
    """Step that an engine runs: training or evaluation."""

    num_steps: int
    """Steps from the feed's beginning to its end: no engine goes further while it tries a step out."""

    ranks: Ranks
    """Processes that take each step together; each builds its engine alone."""

    generator: torch.Generator | None
    """Draws what a call draws; None: torch's own, or nothing is drawn."""

    @property
    def functions(self) -> StepFunctions:
        """The plain functions, by torch's own kernels."""

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


class Graphed:
    """The step captured whole and replayed; `steps_per_replay` of them per graph; the rest are replayed one by one.

    capture: some steps -> a call that replays them; None: by a CUDA graph.
    """

    def __init__(
        self,
        step: Step,
        functions: StepFunctions | None = None,
        *,
        capture: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
        steps_per_replay: int = 1,
    ) -> None:
        self.functions, self.steps_per_replay = functions, steps_per_replay
        capture = capture or functools.partial(cuda_graph, generator=step.generator)
        eager = Eager(step, functions)
        with rehearsal(step), step.ranks.alone():
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
    """Restore on leaving what the steps inside change: their tensors and their random generator.

    On a GPU they run on a side stream, as CUDA asks of a warm-up before a capture.
    """
    state, generator = step.state(), step.generator
    with torch.no_grad():
        saved = [tensor.clone() for tensor in state]
    drawn = generator.get_state() if generator else None
    try:
        with _side_stream(state[0].device):
            yield
    finally:
        if generator and drawn is not None:
            generator.set_state(drawn)
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
    try:
        with torch.cuda.stream(stream):
            yield
    finally:  # what is put back after an error comes after what was queued before it
        current.wait_stream(stream)


def on_gpu(step: Step) -> bool:
    """Return whether a step's tensors are on a GPU."""
    return step.state()[0].device.type == "cuda"


def graphed(step: Step, functions: StepFunctions | None = None, steps_per_replay: int = 1) -> Graphed:
    """Return the step captured in a CUDA graph. Raises NoEngine without a GPU, or where the capture is refused."""
    if not on_gpu(step):
        raise NoEngine("CUDA graphs need an NVIDIA GPU")
    try:
        with compiling:
            return Graphed(step, functions, steps_per_replay=steps_per_replay)
    except RuntimeError as error:  # out of memory is one of them
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


def compiled(step: Step) -> StepFunctions:
    """Return a step's functions, each compiled as one graph: reading, forward, loss and backward, and the update."""
    return with_compiled(step.functions)


def hybrid(step: Step) -> StepFunctions:
    """Return a step's functions by kernels of our own around the library's convolutions.

    On a GPU the reading of a batch is compiled, and so is an update that they do not take. Evaluation is the plain one.
    Raises NoEngine where no block is for them, or where they cannot run on this device.
    """
    device = step.state()[0].device
    reason, found = unavailable(device), refusals(step.network)
    if reason or all(found):
        raise NoEngine(reason or f"block 1: {found[0]}")
    from fastcnn.network.kernels.pool_norm_layer import new_counters
    from fastcnn.training import written_update

    if not isinstance(step, TrainingStep):
        return step.functions
    counters, plain = new_counters(device), step.functions
    functions = dataclasses.replace(
        plain, read=lambda: _read_normalised(step), forward=HybridForward(plain.forward, counters)
    )
    refused = written_update.refusal(step)
    if not refused:
        update = written_update.WrittenUpdate(step, counters)
        functions = dataclasses.replace(functions, collect=update.collect, update=update.update)
    compiled = ["read", "collect", "update"] if refused else ["read"]
    return with_compiled(functions, compiled) if on_gpu(step) else functions


def _read_normalised(step: TrainingStep) -> tuple[Batch, Tensor]:
    """Return what a step reads, its images normalised: one kernel where this is compiled."""
    batch, targets = step.read()
    # Not by _replace, which the compiler of torch 2.11 does not take.
    return Batch(step.normalise(batch.images), batch.labels, batch.others, batch.share), targets


def engine(
    build_functions: Callable[[Step], StepFunctions], run: Callable[[Step, StepFunctions], Engine] = Eager
) -> Callable[[Step], Engine]:
    """Return a maker of engines: functions built and tried out once, then run eagerly or captured.

    The maker raises NoEngine where that fails, and changes nothing of the step.
    """

    def make(step: Step) -> Engine:
        with compiling:
            try:
                functions = build_functions(step)
                with rehearsal(step), step.ranks.alone():
                    step(functions)
            except Exception as error:  # whatever dynamo, inductor, triton, the C++ compiler or the GPU trips over
                raise NoEngine(_cause(error)) from None
            return run(step, functions)

    return make


def _cause(error: Exception) -> str:
    """Return the line that says what a compiler tripped over; the first of torch's error names only the compiler."""
    error = getattr(error, "inner_exception", error)
    of_cpp = (line for line in str(error).splitlines() if ": error: " in line)
    return next(of_cpp, first_line(error))


ENGINES: dict[str, Callable[[Step], Engine]] = {
    "eager": Eager,
    "compiled": engine(compiled),
    "hybrid": engine(hybrid),
    "graphed": graphed,
    "compiled+graphed": engine(compiled, graphed),
    "hybrid+graphed": engine(hybrid, graphed),
}


def compiles(name: str, device: torch.device) -> Compiling:
    """Return when a run with an engine compiles, or calls what is compiled."""
    if name == "auto":
        return "at the start" if device.type == "cuda" else "never"
    if "compiled" not in name and "hybrid" not in name:
        return "never"
    return "at the start" if name.endswith("graphed") else "throughout"


NEXT_BEST = {
    "compiled+graphed": "graphed",
    "hybrid+graphed": "graphed",
    "graphed": "eager",
    "compiled": "eager",
    "hybrid": "eager",
}


def build(name: str, step: Step, *, strict: bool = False) -> tuple[Engine, str]:
    """Return an engine and its name, on all ranks the same: the one asked for, or the next best, with a warning.

    Raises FastCNNError instead of warning where `strict`, and where a failed capture has left a GPU that runs no step.
    """
    reason = ""
    while True:
        made, problem = try_to_make(ENGINES[name], step)
        if made and reason and name == "eager":
            _try_out(step, reason)
        if made:
            return made, name
        # Before torch 2.12 a capture that failed counts as under way (pytorch #180395): no second one then.
        under_way = name.endswith("graphed") and step.ranks.agree("yes" if _capture_under_way() else "")
        tried, name, reason = name, "eager" if under_way else NEXT_BEST[name], problem
        fall_back(f"no {tried} engine here ({problem}): using {name}", strict=strict)


def try_to_make(make: Callable[[Step], Engine], step: Step) -> tuple[Engine | None, str]:
    """Return an engine and ""; or None on all ranks, where one of them cannot make it, and why."""
    try:
        made, problem = make(step), step.ranks.agree("")
    except NoEngine as error:
        made, problem = None, step.ranks.agree(str(error) or "no reason given")
    return None if problem else made, problem


def _capture_under_way() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _try_out(step: Step, reason: str) -> None:
    """Run a step and put everything back. Raises FastCNNError where a failed capture has left nothing that runs."""
    try:
        with rehearsal(step), step.ranks.alone():
            step()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise FastCNNError(
            f"capturing the step failed ({reason}) and nothing runs on this GPU afterwards ({first_line(error)}): "
            "run again with --engine eager"
        ) from None


MEASURED_SECONDS = 0.05  # of steps that are timed; shorter ones would be the clock's and the launch's


def time_step(engine: Engine, step: Step, num_steps: int = 20) -> float:
    """Return the seconds per step of an engine on the slowest rank; the step's state is restored.

    The first steps are not timed: a graph's first replay brings it onto the GPU.
    """
    num_steps, device = min(num_steps, step.num_steps), step.state()[0].device

    def run(rounds: int) -> float:
        """Return the seconds of so many times the steps, each from the same state."""
        total = 0.0
        for _ in range(rounds):
            with rehearsal(step):
                synchronize(device)
                start = time.perf_counter()
                engine.run(num_steps)
                synchronize(device)
                total += time.perf_counter() - start
        return total

    first = run(1)
    if not on_gpu(step):
        return step.ranks.slowest(first) / num_steps
    # As many on all ranks: they add up gradients.
    rounds = max(1, min(100, round(MEASURED_SECONDS / max(step.ranks.slowest(run(1)), 1e-6))))
    return step.ranks.slowest(run(rounds)) / (rounds * num_steps)
