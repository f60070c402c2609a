"""How many kernels a step launches on a GPU, by engine, counted without one: `python -m bench.launches`.

The step runs on a CPU; what is counted is what it would start on a GPU:

- A Triton kernel of the blocks: each `Launch`, recorded instead of started.
- Of what is not compiled: each ATen operator that is neither a view nor an allocation, as one launch. That is the
  least: a reduction or a matrix product may take two.
- Of what is compiled: the calls in the code that inductor makes for an H100, Triton kernels and library ones. The
  graphs are traced on the CPU and then moved to a GPU that is pretended, so the kernels are fused as they are there,
  not as the C++ for a CPU is; what nobody has is the GPU to run them on. Kernels within a library call count as one.

So figures may be too low by a few, for either engine. What `gpu_profile.py` counts on a GPU would settle it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from bench.harness.step_setup import make_step, random_feed
from fastcnn.config.fields import STRENGTHS
from fastcnn.network import fused_forward as fusing
from fastcnn.network.kernels import autotune as launching
from fastcnn.training import engines
from fastcnn.training.step import TrainingStep

GPU = torch.device("cuda", 0)
BLOCKS = "blocks"
NO_LAUNCH = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}
CALLS = re.compile(r"\b(?:triton_\w+\.run|extern_kernels\.\w+|torch\.ops\.(?!fastcnn)[\w.]+|\w+\.copy_)\(")
OWN_CALLS = re.compile(r"\btorch\.ops\.fastcnn\.move_towards\.default\(")  # the blocks' operators count by themselves


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table: launches of a step by engine and part."""
    parser = argparse.ArgumentParser(description="Kernels that a step launches on a GPU, counted without one.")
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp16", "fp32"], choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--augment", nargs="*", default=[], choices=list(STRENGTHS))
    options = parser.parse_args(arguments)
    columns = [BLOCKS, *TrainingStep.PARTS]
    print(f"| engine | precision | {' | '.join(columns)} | all |")
    print("| --- " * (len(columns) + 3) + "|")
    for precision in options.precisions:
        for engine in ("fused", "fused+compiled"):
            found = launches(engine, precision, options.augment)
            figures = [str(found[name]) for name in columns]
            print(f"| {engine} | {precision} | {' | '.join(figures)} | {found.total()} |", flush=True)
    return 0


def launches(
    engine: str, precision: str, augment: Sequence[str] = (), batch: int = 32, size: int = 128
) -> Counter[str]:
    """Return the launches of a step of the reference network: the blocks', and those of each part beside them."""
    strengths = [(name, STRENGTHS[name][0]) for name in augment]  # type: ignore[index]
    step = make_step(random_feed(torch.device("cpu"), 2 * batch, size), (32,) * 5, batch, precision, strengths)
    step.forward = fusing.FusedForward(step.forward)
    counting = Counting()
    if engine == "fused+compiled":
        engines.compile_parts(step, step.PARTS, counting.backend)
    for name in step.PARTS:
        setattr(step, name, counting.under(name, getattr(step, name)))
    with pretended_gpu(), launching.recording() as blocks:
        step()  # compiles
        counting.found.clear()
        blocks.clear()
        with counting:
            step()
    torch._dynamo.reset()
    counting.found[BLOCKS] = len(blocks)
    return counting.found


class Counting(TorchDispatchMode):
    """Counts what would be launched, by part; what happens between parts, such as the backward, is the forward's."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()
        self.part, self.compiled = "forward", False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        blocks = func.namespace == "fastcnn" and name != "move_towards"
        if not (self.compiled or blocks or func.is_view or name in NO_LAUNCH):
            self.found[self.part] += 1
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
        counted.takes_places = getattr(part, "takes_places", False)  # type: ignore[attr-defined]
        return counted

    def backend(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        """Compile as inductor does, to what counts the calls of its code for a GPU and computes as it is written."""
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, inputs, inner_compile=self._counted)

    def _counted(self, graph: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Any:
        code = "\n".join(line for line in gpu_code(graph, inputs).splitlines() if not line.startswith("#"))
        number = len(CALLS.findall(code)) + len(OWN_CALLS.findall(code))

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


def gpu_code(graph: fx.GraphModule, inputs: Sequence[Any]) -> str:
    """Return the Python that inductor makes of a graph traced on a CPU, for a GPU; inside `pretended_gpu` only."""
    from torch._inductor.compile_fx import _recursive_post_grad_passes, record_original_output_strides
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    moved, mode = copy.deepcopy(graph), detect_fake_mode(inputs)
    assert mode is not None
    with V.set_fake_mode(mode):
        record_original_output_strides(moved)
        _recursive_post_grad_passes(moved, is_inference=False)
        with mode:
            there = tree_map_only(Tensor, _on_gpu, list(inputs))
            for node in moved.graph.nodes:
                node.args, node.kwargs = tree_map_only(torch.device, lambda _: GPU, (node.args, node.kwargs))
                if "val" in node.meta:
                    node.meta["val"] = tree_map_only(Tensor, _on_gpu, node.meta["val"])
        moved.recompile()
        lowering = GraphLowering(moved, example_inputs=there, shape_env=mode.shape_env)
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*there)
            return str(lowering.codegen()[0].value)


def _on_gpu(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Let inductor take an H100 to be here: enough for it to make code, not to run it."""
    from torch._inductor import scheduler
    from torch._inductor.runtime.hints import DeviceProperties
    from torch.utils import _triton

    properties = DeviceProperties(
        type="cuda",
        index=0,
        multi_processor_count=132,
        cc=90,
        major=9,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
    )
    own = DeviceProperties.create

    def create(device: torch.device) -> Any:
        return properties if device.type == "cuda" else own(device)

    plain = SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132, warp_size=32)
    with (
        mock.patch.object(DeviceProperties, "create", create),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=plain),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(scheduler, "has_triton", return_value=True),
        mock.patch.object(_triton, "triton_hash_with_backend", return_value="none"),
    ):
        yield


if __name__ == "__main__":
    sys.exit(main())
