"""How a step is run: as it is, compiled, with its blocks fused, captured whole in a CUDA graph and replayed, or mixed.

An engine takes a step, a function without arguments whose tensors stand in `step.state()`, and runs it a number of
times. Making one runs the step a few times and puts everything back as it was.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastcnn.errors import fall_back, first_line
from fastcnn.network import fused_forward as fusing
from fastcnn.network.small_cnn import SmallCNN

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
