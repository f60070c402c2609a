"""Launches of a step by engine, counted by running it on a CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bench.harness.step_setup import make_step, random_feed
from bench.kernels import inductor
from bench.kernels.machine_code import REFERENCE, recorded_hybrid
from bench.kernels.pretended_gpu import pretended_gpu
from fastcnn.config import STRENGTHS
from fastcnn.network.kernels import cpu_max_pool
from fastcnn.training import engines
from fastcnn.training import step as training_step
from fastcnn.training.step import StepFunctions, TrainingStep

OWN = "own kernels"
NO_LAUNCH = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}
CALLS = re.compile(r"\b(?:triton_\w+\.run|extern_kernels\.\w+|torch\.ops\.[\w.]+|\w+\.copy_)\(")


def count_launches(engine: str, precision: str, augment: Sequence[str] = (), batch: int = 32) -> Counter[str]:
    """Return the launches of a step of the reference network: our own, and those of each part beside them."""
    strengths = [(name, STRENGTHS[name][0]) for name in augment]  # type: ignore[index]
    step = make_step(random_feed(torch.device("cpu"), 2 * batch, 32), REFERENCE, batch, precision, strengths)
    counting = Counting()
    with (
        pretended_gpu(),
        mock.patch.object(cpu_max_pool, "usable", return_value=False),
        mock.patch.object(training_step, "takes_weights", return_value=True),
        recorded_hybrid() as own,
    ):
        functions = _functions(engine, step, counting.backend)
        counted: dict[str, Any] = {name: counting.under(name, getattr(functions, name)) for name in engines.FUNCTIONS}
        functions = dataclasses.replace(functions, **counted)
        step(functions)  # compiles
        counting.found.clear()
        own.clear()
        with counting:
            step(functions)
    torch._dynamo.reset()
    counting.found[OWN] = len(own)
    return counting.found


def _functions(engine: str, step: TrainingStep, backend: Any) -> StepFunctions:
    """Return an engine's functions, compiled by another compiler."""
    if engine == "compiled":
        return engines.with_compiled(step.functions, backend=backend)
    if engine == "hybrid":
        return engines.with_compiled(engines.hybrid(step), ["read"], backend)
    return step.functions


class Counting(TorchDispatchMode):
    """Counts what would be launched, by part; what happens between parts, such as the backward, is the forward's."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()
        self.part, self.compiled = "forward", False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not (self.compiled or func.is_view or name in NO_LAUNCH):
            # The gradients of a convolution's input and weight are a launch each.
            self.found[self.part] += sum(args[-1][:2]) if name == "convolution_backward" else 1
        return func(*args, **(kwargs or {}))

    def under(self, name: str, part: Callable[..., Any]) -> Callable[..., Any]:
        """Return a step's part that counts under its name."""

        def counted(*args: Any) -> Any:
            self.part = name
            try:  # dynamo runs nothing compiled under a mode
                with _disable_current_modes() if compiled else contextlib.nullcontext():
                    return part(*args)
            finally:
                self.part = "forward"

        compiled = hasattr(part, "_torchdynamo_orig_callable")
        return counted

    def backend(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        """Compile as inductor does, to what counts the calls of its code for a GPU and computes as it is written."""
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, inputs, inner_compile=self._counted)

    def _counted(self, graph: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Any:
        code = "\n".join(line for line in inductor.gpu_code(graph, inputs).splitlines() if not line.startswith("#"))
        number = len(CALLS.findall(code)) + code.count("torch.ops.aten.convolution_backward")

        def run(args: list[Any]) -> Any:
            self.found[self.part] += number
            self.compiled, given = True, list(args)
            args.clear()  # as is asked of what has `_boxed_call`
            try:
                return graph(*given)
            finally:
                self.compiled = False

        run._boxed_call = True  # type: ignore[attr-defined]
        return run
